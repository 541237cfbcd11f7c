"""Copies of a part: windows lie where they should, and templates count as what they are."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dori_utils.core.regions import GRID, region_maps, region_similarity, windows
from dori_utils.core.roc import roc_auc
from dori_utils.core.sscd import load_sscd, sscd_scores
from dori_utils.testbed.data import num_variants, template_variant
from dori_utils.testbed.scenes import place_anew, sample_scene

SETTINGS = dict(transform="testbed", progress=False)
TEMPLATES = [sample_scene(7_700_000_000 + seed, 4, num_named=2) for seed in range(24)]


def shown(scene, seed):
    """A scene as a model might give it: blurred, of another tint, with noise."""
    rng = np.random.default_rng(seed)
    blurred = np.asarray(Image.fromarray(scene.draw()).filter(ImageFilter.GaussianBlur(0.8)), dtype=float)
    pixels = blurred * rng.uniform(0.95, 1.05) + rng.normal(0, 4, 3) + rng.normal(0, 4, blurred.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def originals():
    return [Image.fromarray(scene.draw()) for scene in TEMPLATES]


@pytest.fixture(scope="module")
def variants():
    """Of each template a version with another object in it."""
    rng = np.random.default_rng(0)
    chosen = [int(rng.integers(1, num_variants(scene))) for scene in TEMPLATES]
    return [shown(template_variant(scene, v), i) for i, (scene, v) in enumerate(zip(TEMPLATES, chosen, strict=True))]


def similarity(images, targets):
    return region_similarity(region_maps([[image] for image in images], targets, **SETTINGS))[:, 0]


@pytest.mark.parametrize("size", [(64, 64), (63, 40), (5, 3)])
def test_windows_are_halves_that_cover_the_image_from_edge_to_edge(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    found, (width, height) = windows(image), ((side + 1) // 2 for side in size)
    assert len(found) == GRID * GRID and {part.size for part in found} == {(width, height)}
    pixels = np.asarray(image)
    np.testing.assert_array_equal(found[0], pixels[:height, :width])
    np.testing.assert_array_equal(found[2], pixels[:height, -width:])
    np.testing.assert_array_equal(found[6], pixels[-height:, :width])
    np.testing.assert_array_equal(found[8], pixels[-height:, -width:])


def test_windows_overlap_by_half():
    image = Image.fromarray(np.arange(64, dtype=np.uint8)[None].repeat(64, 0))
    assert [np.asarray(part)[0, 0] for part in windows(image)[:3]] == [0, 16, 32]


def test_the_image_itself_is_one_in_every_window(originals):
    maps = region_maps([[image, image] for image in originals], originals, **SETTINGS)
    assert maps.shape == (len(originals), 2, GRID, GRID)
    np.testing.assert_allclose(maps, 1, atol=1e-5)
    np.testing.assert_allclose(region_similarity(maps), 1, atol=1e-5)


def test_the_map_shows_where_the_copy_is(originals):
    """The right half of one scene beside the left half of another."""
    mixed = originals[0].copy()
    mixed.paste(originals[1].crop((0, 0, 32, 64)), (0, 0))
    (map_,), (other,) = region_maps([[mixed], [mixed]], originals[:2], **SETTINGS)
    assert map_[:, 2] == pytest.approx(1, abs=1e-4) and map_[:, 0].max() < 0.7
    assert other[:, 0] == pytest.approx(1, abs=1e-4) and other[:, 2].max() < 0.7


def test_the_better_half_of_the_windows_counts():
    maps = np.array([[0.9, 0.8, 0.1], [0.2, 0.7, 0.6], [0.3, 0.5, 0.0]])[None]
    assert region_similarity(maps) == pytest.approx([np.mean([0.9, 0.8, 0.7, 0.6, 0.5])])


def test_templates_count_with_another_object_in_them_and_other_scenes_do_not(originals, variants):
    """The transform's line for copies, 0.7, serves here too: what of it is the same is as much alike as a copy is."""
    copied = similarity(variants, originals)
    others = similarity([shown(scene, 100 + i) for i, scene in enumerate(TEMPLATES[1:] + TEMPLATES[:1])], originals)
    whole = sscd_scores([[image] for image in variants], originals, **SETTINGS)[:, 0]
    assert (copied > 0.7).mean() > 0.85 > 0.7 > (whole > 0.7).mean()
    assert others.max() < 0.5


def test_the_same_things_elsewhere_are_no_copy_of_a_part(originals, variants):
    anew = [shown(place_anew(scene, i), 200 + i) for i, scene in enumerate(TEMPLATES)]
    assert roc_auc(similarity(variants, originals), similarity(anew, originals)).auc > 0.98
    assert (similarity(anew, originals) > 0.7).mean() < 0.05


def test_lists_that_do_not_fit_the_targets_are_refused(originals):
    for images in ([[originals[0]]], [[originals[0]], [originals[0]] * 2]):
        with pytest.raises(ValueError, match="2 targets need as many lists"):
            region_maps(images, originals[:2], sscd=load_sscd(), **SETTINGS)
