"""Scenes are functions of their seeds, and captions say what is in them."""

import numpy as np
import pytest

from dori_utils.testbed import scenes, sprites


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
        (("violin", "owl"), "dotted", "a violin and an owl on a dotted background"),
        (("umbrella",), "plain", "an umbrella on a plain background"),
        (("unicorn", "grapes"), "striped", "a unicorn and some grapes on a striped background"),
    ],
)
def test_captions_have_their_grammar_right(names, kind, caption):
    background = scenes.Background(kind, ((0, 0, 0), (255, 255, 255)), 0.0, 3.0, 0)
    assert scenes.Scene(background, (), names).caption == caption


@pytest.mark.parametrize("kind", scenes.BACKGROUNDS)
def test_backgrounds_show_both_colours_except_plain(kind):
    background = scenes.Background(kind, ((200, 0, 0), (0, 0, 200)), 0.3, 3.0, 1)
    red = scenes.draw_background(background)[..., 0].astype(int)
    assert (red.max() - red.min() > 120) == (kind != "plain")
    assert red.max() > 150 or kind == "cloudy"


def test_a_sprite_drawn_white_out_changes_only_its_place():
    background = scenes.Background("plain", ((10, 20, 30), (0, 0, 0)), 0.0, 3.0, 0)
    apple = scenes.Placed("apple", 0.25, 0.25, 0.4, 0.0, False, 0.0)
    pixels = scenes.Scene(background, (apple,), ("apple",)).draw()
    changed = (pixels != (10, 20, 30)).any(axis=-1)
    assert changed[8:24, 8:24].mean() > 0.7
    assert not changed[32:, :].any() and not changed[:, 32:].any()


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
    assert "MIT License" in licence and "Microsoft" in licence and "fluent-emoji-3d 1.1.0" in licence


def test_paraphrases_have_the_words_of_the_caption_and_no_others():
    caption = "a hot dog and some grapes on a dotted background"
    others = scenes.paraphrases(caption)
    assert others[0] == "some grapes and a hot dog on a dotted background"
    assert len({caption, *others}) == 8
    assert all(set(other.split()) <= set(caption.split()) for other in others)
    with pytest.raises(ValueError, match="two named sprites"):
        scenes.paraphrases("an owl on a plain background")
