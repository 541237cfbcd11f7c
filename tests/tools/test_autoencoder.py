"""The autoencoder in closed form: the encoder is a matrix, the decoder its pseudo-inverse, and scenes survive both."""

import pytest
import torch

from dori_utils.testbed.data import FIRST_SEED
from tools import autoencoder


@pytest.fixture(scope="module")
def vae():
    return autoencoder.make_vae()


@pytest.fixture(scope="module")
def scenes():
    return autoencoder.some_pixels(FIRST_SEED["held_out"], 40)


def zero(vae):
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
    return vae.requires_grad_(False)


def test_the_encoder_takes_patches_apart_into_the_given_components():
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(192, generator=generator, dtype=torch.float64)
    components = torch.randn(autoencoder.LATENT_CHANNELS, 192, generator=generator, dtype=torch.float64)
    vae = zero(autoencoder.new_vae().double())
    autoencoder.write_encoder(vae, mean, components)
    pixels = torch.rand(2, 3, 64, 64, generator=generator, dtype=torch.float64) * 2 - 1
    latents = vae.encode(pixels).latents
    for row, column in ((0, 0), (7, 7), (3, 5)):
        patch = pixels[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].reshape(2, 192)
        torch.testing.assert_close(latents[:, :, row, column], (patch - mean) @ components.T, rtol=0, atol=1e-4)


def test_the_decoder_puts_every_pixel_where_the_pseudo_inverse_does(vae):
    mean, components, variances = autoencoder.principal_components()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 32, 8, 8, generator=generator, dtype=torch.float64) * variances.sqrt()[:, None, None]
    patches = torch.linalg.pinv(components) @ latents.flatten(2) + mean[:, None]
    expected = torch.nn.functional.fold(patches, (64, 64), 8, stride=8)
    decoded = vae.decode(latents.float()).sample.double()
    left_out = (decoded - expected).square().mean() / (expected - expected.mean()).square().mean()
    assert left_out < 0.01  # 15 numbers rather than 32 on the level of 4x4 pixels; a pixel out of place would be 1 or 2
    assert (decoded - expected).mean((0, 2, 3)).abs().max() < 1e-3


def test_scenes_survive(vae, scenes):
    decoded = vae.decode(vae.encode(scenes).latents).sample
    assert autoencoder.psnr(decoded, scenes) > 24


def test_the_decoder_does_to_each_patch_the_same(vae, scenes):
    latents = vae.encode(scenes[:2]).latents
    whole = vae.decode(latents).sample
    turned = vae.decode(latents.roll((3, 2), dims=(2, 3))).sample
    torch.testing.assert_close(turned, whole.roll((24, 16), dims=(2, 3)), rtol=0, atol=1e-4)


def test_latents_times_the_scaling_factor_have_unit_variance(vae, scenes):
    latents = vae.encode(scenes).latents * vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=0.1)
