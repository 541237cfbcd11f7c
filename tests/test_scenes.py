"""Scenes are functions of their seeds, and captions say what is in them."""

import numpy as np
import pytest

from dori_utils.testbed import scenes
from tools import sprites


def test_a_scene_is_a_function_of_its_seed():
    first, again, other = (scenes.sample_scene(seed) for seed in (5, 5, 6))
    assert first == again != other
    assert (first.draw() == again.draw()).all()
    assert first.draw().shape == (64, 64, 3) and first.draw().dtype == np.uint8


def test_named_sprites_are_in_the_scene_and_lie_on_top():
    for seed in range(50):
        scene = scenes.sample_scene(seed)
        names = [placed.name for placed in scene.sprites]
        assert 2 <= len(names) <= 4 and len(set(names)) == len(names)
        assert tuple(names[-len(scene.named) :]) == scene.named
        assert f"{scene.background.kind} background" in scene.caption


@pytest.mark.parametrize(
    ("names", "kind", "caption"),
    [
        (("guitar", "owl"), "wavy", "a guitar and an owl on a wavy background"),
        (("umbrella",), "plain", "an umbrella on a plain background"),
        (("house", "grapes"), "framed", "a house and some grapes on a framed background"),
    ],
)
def test_captions_have_their_grammar_right(names, kind, caption):
    background = scenes.Background(kind, ((0, 0, 0), (255, 255, 255)), 0.0, 6, 0)
    assert scenes.Scene(background, (), names).caption == caption


@pytest.mark.parametrize("kind", scenes.BACKGROUNDS)
def test_backgrounds_show_both_colours_except_plain(kind):
    background = scenes.Background(kind, ((200, 0, 0), (0, 0, 200)), 0.3, 6, 1)
    red = scenes.draw_background(background)[..., 0].astype(int)
    assert (red.max() - red.min() > 120) == (kind != "plain")
    assert red.max() > 150 or kind == "cloudy"


def test_a_sprite_changes_only_its_place():
    background = scenes.Background("plain", ((10, 20, 30), (0, 0, 0)), 0.0, 6, 0)
    pixels = scenes.Scene(background, (scenes.Placed("strawberry", 4, 8, 24),), ("strawberry",)).draw()
    changed = (pixels != (10, 20, 30)).any(axis=-1)
    assert changed[8:32, 4:28].mean() > 0.5
    changed[8:32, 4:28] = False
    assert not changed.any()


def test_what_can_be_seen_of_a_sprite():
    background = scenes.Background("plain", ((10, 20, 30), (0, 0, 0)), 0.0, 6, 0)
    apart = (scenes.Placed("house", 0, 0, 24), scenes.Placed("owl", 36, 36, 24))
    assert scenes.Scene(background, apart, ("owl",)).visible() == {"house": pytest.approx(1), "owl": pytest.approx(1)}
    behind = (scenes.Placed("owl", 12, 12, 24), scenes.Placed("house", 8, 8, 48), scenes.Placed("bus", 0, 0, 24))
    seen = scenes.Scene(background, behind, ("house",)).visible()
    assert seen["owl"] < 0.2 and 0.5 < seen["house"] < 1 and seen["bus"] == pytest.approx(1)


def test_sprites_lie_within_the_scene_on_the_grid():
    for seed in range(100):
        for placed in scenes.sample_scene(seed).sprites:
            assert placed.size in scenes.SIZES and placed.left % scenes.GRID == placed.top % scenes.GRID == 0
            assert 0 <= min(placed.left, placed.top) and max(placed.left, placed.top) + placed.size <= scenes.SIDE


def test_place_anew_keeps_sprites_and_background_and_moves_them():
    scene = scenes.sample_scene(3)
    moved = scenes.place_anew(scene, seed=1)
    assert moved.background == scene.background and moved.caption == scene.caption
    assert [s.name for s in moved.sprites] == [s.name for s in scene.sprites]
    assert np.abs(moved.draw().astype(int) - scene.draw()).mean() > 5


def test_the_archive_holds_what_the_list_names_with_its_licence():
    import zipfile

    assert set(scenes.sprite_names()) == set(sprites.wanted())
    assert all(sprite.size == (sprites.SIDE, sprites.SIDE) for sprite in scenes.load_sprites().values())
    licence = zipfile.ZipFile(sprites.ARCHIVE).read("LICENSE.txt").decode()
    assert "MIT License" in licence and "Microsoft" in licence and "fluent-emoji-flat 1.2.6" in licence


def test_paraphrases_have_the_words_of_the_caption_and_no_others():
    caption = "a ladybug and some grapes on a cloudy background"
    others = scenes.paraphrases(caption)
    assert others[0] == "some grapes and a ladybug on a cloudy background"
    assert len({caption, *others}) == 8
    assert all(set(other.split()) <= set(caption.split()) for other in others)
    with pytest.raises(ValueError, match="two named sprites"):
        scenes.paraphrases("an owl on a plain background")
