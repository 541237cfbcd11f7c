"""Every number against one known by hand, by a closed form, or by another library."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from dori_utils.core.clip import CLIP_FILES, load_clip, retrieval_accuracy
from dori_utils.core.inception import INCEPTION, inception_distances
from dori_utils.core.metrics import (
    bootstrap_interval,
    diversity,
    frechet_distance,
    memorization_rate,
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
    found = (clip.embed_images(images) * clip.embed_texts(CAPTIONS)).sum(axis=1)
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


def test_a_clip_that_is_not_there_says_what_to_download_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DORI_DATA", str(tmp_path / "mine"))
    with pytest.raises(FileNotFoundError, match=rf"--revision refs/pr/15 --local-dir {tmp_path}/clip\n"):
        load_clip(tmp_path / "clip")
    with pytest.raises(
        FileNotFoundError, match=rf"(?s)no such folder, and of the Hub: .* --local-dir {tmp_path}/mine/clip\n"
    ):
        load_clip("openai/clip-vit-base-patch32")
    (tmp_path / "clip").mkdir()
    for name in ["pytorch_model.bin", *(name for name in CLIP_FILES if name != "model.safetensors")]:
        (tmp_path / "clip" / name).touch()
    with pytest.raises(
        FileNotFoundError, match="(?s)model.safetensors is missing.* pickled weights, which are never read"
    ):
        load_clip(tmp_path / "clip")


@pytest.mark.slow
def test_a_clip_is_found_by_its_id_in_the_hub_s_local_cache(clip_folder, clip, tmp_path):
    """The cache as huggingface_hub lays it out; the tests are offline."""
    code = """
from dori_utils.core.clip import load_clip
clip = load_clip("someone/tiny-clip", device="cpu")
print(clip.name, clip.fingerprint)
try:
    load_clip("someone/tiny-clip", revision="other")
except FileNotFoundError as error:
    print("no such revision" if "of the Hub" in str(error) else error)
"""
    repository = tmp_path / "hub" / "models--someone--tiny-clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(clip_folder, repository / "snapshots" / ("0" * 40))
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert out.stdout == f"tiny-clip {clip.fingerprint}\nno such revision\n", out.stderr


# FID and KID, with Inception's real network and random weights


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError):
        pytest.skip("needs torch-fidelity and a torchvision that fits torch")

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            """Stay as random as you are."""

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.manual_seed(0)
    torch.save({}, path)
    network = Untrained("random", ["2048"], path)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)  # else nothing is left of an image after so many layers
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_fid_and_kid_are_those_of_inception_s_features(inception_file, tmp_path):
    """FID against our own formula, KID against its definition, on features taken one image at a time."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    bright = [scene(seed).point(lambda level: 128 + level // 2) for seed in range(6)]
    dark = [scene(seed).point(lambda level: level // 2) for seed in range(10, 15)]
    for number, image in enumerate(dark):  # wide ones, as files; their middle is the scene
        wide = Image.new("RGB", (128, 64))
        wide.paste(image, (32, 0))
        wide.save(tmp_path / f"{number}.png")
    found = inception_distances(bright, sorted(tmp_path.iterdir()), inception_file, batch_size=4, device="cpu")

    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], inception_file)
    a, b = (
        torch.cat([network(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]) for image in images]).double()
        for images in (bright, dark)
    )
    assert (found.images, found.reference) == (6, 5) and found.fid > 1
    assert found.fid == pytest.approx(frechet_distance(a, b), rel=0.01)
    # Subsets of all five real ones, and five of our six: the mean over them is near that of all.
    kernel_aa, kernel_bb, kernel_ab = ((x @ y.T / 2048 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = [(kernel.sum() - kernel.trace()) / (n * (n - 1)) for kernel, n in ((kernel_aa, 6), (kernel_bb, 5))]
    kid = (sum(within) - 2 * kernel_ab.mean()).item()
    assert found.kid == pytest.approx(kid, abs=3 * found.kid_std) and 0 < found.kid_std < kid / 2
    again = inception_distances(bright, sorted(tmp_path.iterdir()), inception_file, device="cpu", progress=False)
    assert again.kid == pytest.approx(found.kid, rel=1e-3)  # subsets have a seed of their own


@pytest.mark.slow
def test_weights_of_another_network_are_refused(inception_file, tmp_path):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(OSError, match="other weights than Inception's"):
        inception_distances([scene(0)] * 2, [scene(1)] * 2, tmp_path / "other.pth")


def test_inception_weights_that_are_not_there_say_where_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("DORI_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"Download https://github.com/.*/{INCEPTION} to {tmp_path}/"):
        inception_distances([scene(0)] * 2, [scene(1)] * 2)
    (tmp_path / INCEPTION).write_bytes(b"half of it")
    begins = hashlib.sha256(b"half of it").hexdigest()[:8]
    with pytest.raises(OSError, match=f"damaged: its SHA-256 begins with {begins}"):
        inception_distances([scene(0)] * 2, [scene(1)] * 2)
    with pytest.raises(ValueError, match="two of each"):
        inception_distances([scene(0)], [scene(1)] * 2)


def test_weights_that_would_run_code_do_not(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").touch, ()

    torch.save(Trap(), tmp_path / "trap.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    for name in ("trap.pth", "bare.pth"):
        with pytest.raises(OSError, match="no file of tensors alone"):
            inception_distances([scene(0)] * 2, [scene(1)] * 2, tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_without_torch_fidelity_the_error_says_how_to_install_it(tmp_path):
    torch.save({}, tmp_path / "some.pth")
    try:
        import torch_fidelity  # noqa: F401
    except (ImportError, RuntimeError):
        with pytest.raises(ImportError, match=r"pip install -e '\.\[fid\]'"):
            inception_distances([scene(0)] * 2, [scene(1)] * 2, tmp_path / "some.pth")
    else:
        pytest.skip("it is installed")


def test_rows_of_several_mitigations_are_not_taken_for_one():
    rows = pd.DataFrame(
        {"target": ["a", "a"], "seed": [0, 0], "kind": "VM", "mitigation": ["none", "NeMo"], "sscd": 0.5}
    )
    with pytest.raises(ValueError, match="group by .*mitigation"):
        metrics.summarize(rows)
    assert len(metrics.summarize(rows, ["kind", "mitigation"])) == 2
