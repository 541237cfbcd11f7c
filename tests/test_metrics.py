"""Every number against one known by hand, by a closed form, or by another library."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from dori_utils.metrics import (
    bootstrap_interval,
    clip_alignment,
    diversity,
    frechet_distance,
    load_clip,
    memorization_rate,
    retrieval_accuracy,
    share_interval,
)

# Memorization rate and diversity


def test_a_target_counts_when_its_mean_over_seeds_is_above_the_threshold():
    scores = np.float32(
        [
            [0.9, 0.9, 0.6],  # mean 0.8: memorized, though one image is not a copy
            [0.9, 0.5, 0.5],  # one copy, mean 0.63: not memorized
            [0.1, 0.2, 0.3],
            [0.7, 0.7, 0.7],  # not above the line
        ]
    )
    found = memorization_rate(scores)
    assert (found.rate, found.images, found.any_seed, found.targets) == (1 / 4, 3 / 12, 2 / 4, 4)
    assert (found.low, found.high) == share_interval(1, 4)


@pytest.mark.parametrize("scores", [np.zeros(3), np.zeros((0, 4)), np.array([[0.5, np.nan]])])
def test_scores_that_are_no_table_have_no_rate(scores):
    with pytest.raises(ValueError, match="targets, seeds"):
        memorization_rate(scores)


def test_diversity_is_the_mean_over_pairs_without_the_image_itself():
    x, y, z = np.eye(3, dtype=np.float32)
    np.testing.assert_allclose(diversity(np.stack([[x, x, x], [x, y, z], [x, x, y]])), [1, 0, 1 / 3], atol=1e-6)
    with pytest.raises(ValueError, match="two generations"):
        diversity(np.stack([[x]]))


# Fréchet distance


def test_frechet_distance_of_gaussians_is_the_closed_form():
    # Diagonal covariances commute: the distance is |mu|^2 + sum (sigma_a - sigma_b)^2 = 4 + (1 + 0 + 4) = 9.
    rng = np.random.default_rng(0)
    a = rng.normal(0, [1, 2, 3], (200_000, 3))
    b = rng.normal([2, 0, 0], [2, 2, 1], (200_000, 3))
    assert frechet_distance(a, b) == pytest.approx(9, rel=0.01)


@pytest.mark.parametrize("rows", [40, 5])  # more rows than columns, and fewer: singular covariances
def test_frechet_distance_agrees_with_the_matrix_square_root(rows):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(rows, 8)) @ rng.normal(size=(8, 8)), rng.normal(1, 2, (rows + 3, 8))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a + 1e-12 * np.eye(8)) @ (cov_b + 1e-12 * np.eye(8)) @ sqrtm(cov_a + 1e-12 * np.eye(8))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(root).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b))


def test_frechet_distance_of_a_set_to_itself_is_zero_and_bad_features_are_refused():
    a = np.random.default_rng(2).normal(size=(10, 20)).astype(np.float32)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="Features must be"):
        frechet_distance(a, a[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(a, a * np.nan)


# Intervals


def test_the_bootstrap_interval_of_a_mean_is_that_of_normal_theory():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20  # sigma / sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)


def test_the_bootstrap_takes_another_statistic_and_level():
    values = np.arange(101.0)
    low, high = bootstrap_interval(values, np.median, level=0.5)
    wide_low, wide_high = bootstrap_interval(values, np.median)
    assert wide_low < low < 50 < high < wide_high


@pytest.mark.parametrize("values", [[1.0], [1.0, np.nan], [[1.0, 2.0], [3.0, 4.0]]])
def test_an_interval_needs_one_number_for_each_of_several_targets(values):
    with pytest.raises(ValueError, match="over targets"):
        bootstrap_interval(values)


def test_nobody_out_of_64_is_not_certainly_nobody():
    assert bootstrap_interval(np.zeros(64)) == (0, 0)  # why shares have an interval of their own
    # Wilson at 0: z^2 / (n + z^2) = 3.8415 / 67.8415
    assert share_interval(0, 64) == pytest.approx((0, 0.0566), abs=1e-4)
    assert share_interval(64, 64) == pytest.approx((0.9434, 1), abs=1e-4)


# CLIP: a tiny one of the real classes (conftest.py), and ViT-B/32's preprocessing


def scene(seed, side=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


CAPTIONS = ["a photo of a cat", "grapes and violin on a striped background", "a dog"]


def test_alignment_is_the_cosine_that_clip_itself_computes(clip):
    images = [scene(seed) for seed in range(3)]
    tokens = clip.tokenizer(CAPTIONS, padding="max_length", max_length=16, return_tensors="pt")
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1  # the testbed trains its CLIP like this
    out = clip.model(**tokens, pixel_values=pixels)
    expected = out.logits_per_image.diagonal() / clip.model.logit_scale.exp()
    found = clip_alignment(images, CAPTIONS, clip)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)


def test_images_of_another_size_and_mode_are_resized_and_cropped_by_the_model_s_own_processor(clip):
    wide = scene(0).resize((128, 64), Image.Resampling.NEAREST)
    np.testing.assert_allclose(
        clip.embed_images([wide.convert("RGBA")]), clip.embed_images([wide.crop((32, 0, 96, 64))]), atol=1e-5
    )


def test_embeddings_have_length_one_and_do_not_depend_on_the_batch(clip):
    images = [scene(seed) for seed in range(5)]
    whole = clip.embed_images(images)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(whole, clip.embed_images(images, batch_size=2), atol=1e-5)
    np.testing.assert_allclose(clip.embed_texts(CAPTIONS), clip.embed_texts(CAPTIONS, batch_size=1), atol=1e-5)


class Matching:
    """Stands where a trained CLIP would: an image of grey level i means caption i."""

    def embed_images(self, images):
        return np.eye(3, dtype=np.float32)[[image.getpixel((0, 0))[0] for image in images]]

    def embed_texts(self, captions):
        return np.eye(3, dtype=np.float32)[: len(captions)]


def test_retrieval_counts_the_images_whose_own_caption_is_ranked_first():
    def grey(level):
        return Image.new("RGB", (4, 4), (level,) * 3)

    images = [[grey(0), grey(0)], [grey(1), grey(2)], [grey(0), grey(1)]]
    np.testing.assert_array_equal(retrieval_accuracy(images, CAPTIONS, Matching()), [1, 0.5, 0])
    with pytest.raises(ValueError, match="different captions"):
        retrieval_accuracy(images, ["a dog", "a dog", "a cat"], Matching())


def test_a_caption_that_is_too_long_is_an_error(clip):
    with pytest.raises(ValueError, match="20 tokens; .* takes 16"):
        clip.embed_texts(["cat", "dog " * 18])


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
def test_a_missing_file_of_clip_is_named(clip_folder, tmp_path, name):
    for file in clip_folder.iterdir():
        if file.name != name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(FileNotFoundError, match=name):
        load_clip(tmp_path)


def test_vit_b32_s_preprocessing_needs_no_torchvision(clip_folder, tmp_path):
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    # As in openai/clip-vit-base-patch32, in the form of its time; only the size is the tiny model's.
    config = {
        "crop_size": 64,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 64,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    processor, white = load_clip(tmp_path, device="cpu").image_processor, Image.new("RGB", (512, 512), "white")
    pixels = processor(white, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 64, 64)
    np.testing.assert_allclose(pixels[0, :, 5, 5], [1.9303, 2.0749, 2.1459], atol=1e-4)  # (1 - mean) / std
