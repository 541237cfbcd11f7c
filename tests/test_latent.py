"""Latent: inversion leads back to the image, and what it is mixed into stays like N(0, I)."""

import copy

import numpy as np
import pytest
import torch

from dori_utils.core.diffusion import ddim, denoise, encode_images, encode_prompts, initial_latents
from dori_utils.core.edits import Edit, applied
from dori_utils.core.hashes import model_hash
from dori_utils.core.targets import Target
from dori_utils.latent import Config, _inverted, invert, mixed

QUICK = dict(num_inference_steps=4, progress=False)
PROMPTS = ["a cat on a car", "the red dog", "a violin"]


@pytest.fixture
def targets(random_picture):
    return [Target(f"t{i}", prompt, random_picture(i, 64), "VM") for i, prompt in enumerate(PROMPTS)]


def values_off(pipe, number):
    names = [f"down_blocks.{number}.attentions.{i}.transformer_blocks.0.attn2.to_v.weight" for i in (0, 1)]
    masks = {name: torch.ones(len(pipe.unet.get_parameter(name)), 1, dtype=torch.bool) for name in names}
    return Edit("off", model_hash(pipe), masks=masks)


@pytest.fixture
def calm(pipe):
    """The pipeline with a U-Net whose prediction changes less with its input than a random one's does."""
    unet = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1), unet.conv_out.bias.mul_(0.1)
    calm = copy.copy(pipe)
    calm.unet = unet
    return calm


@torch.no_grad()
def test_ddim_leads_from_the_inverted_noise_to_the_image_and_refinements_bring_it_nearer(calm, targets):
    clean, embeds = encode_images(calm, [targets[0].image]), encode_prompts(calm, PROMPTS[:1])
    errors = []
    for refinements in (0, 2, 20):
        scheduler = ddim(calm, 5)
        latents = _inverted(calm, clean, embeds, scheduler, refinements, lambda: None)
        for t in scheduler.timesteps:
            output = calm.unet(latents, t, encoder_hidden_states=embeds).sample
            latents = scheduler.step(output, t, latents).prev_sample
        errors.append((latents - clean).abs().max().item())
    assert errors[2] < 1e-4 < errors[1] < errors[0] / 2


def test_the_inverted_noise_has_mean_0_and_variance_1_and_the_mixture_nearly_so(pipe, targets):
    inverted = invert(pipe, targets, **QUICK)
    assert inverted.shape == initial_latents(pipe, range(3)).shape
    torch.testing.assert_close(inverted.mean((2, 3)), torch.zeros(inverted.shape[:2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(inverted.square().mean((2, 3)), torch.ones(inverted.shape[:2]), atol=1e-4, rtol=0)
    latents = mixed(pipe, inverted, range(64), 0.5)  # (3, 64, C, H, W)
    assert latents.shape[:2] == (3, 64)
    # Of N(0, I) these would be 0 and 1 but for chance; inverted noise that has something of the seed's would show here.
    assert latents.mean((2, 3, 4)).abs().mean() < 0.1 and latents.square().mean().item() == pytest.approx(1, abs=0.05)


def test_a_mixture_is_the_seeds_own_noise_but_for_its_share(pipe, targets):
    inverted, noise = invert(pipe, targets[:1], **QUICK), initial_latents(pipe, [3, 5])
    torch.testing.assert_close(mixed(pipe, inverted, [3, 5], 1.0)[0], inverted.expand(2, -1, -1, -1))
    part = mixed(pipe, inverted, [3, 5], 0.25)[0]
    torch.testing.assert_close(part, 0.5 * inverted + 0.75**0.5 * noise)


def test_a_target_is_inverted_alike_in_any_batch_and_every_time(pipe, targets):
    together = invert(pipe, targets, **QUICK)
    assert torch.equal(together, invert(pipe, targets, **QUICK))
    torch.testing.assert_close(together, invert(pipe, targets, rows=2, **QUICK), atol=1e-3, rtol=1e-3)
    for i, target in enumerate(targets):
        torch.testing.assert_close(together[[i]], invert(pipe, [target], **QUICK), atol=1e-3, rtol=1e-3)


def test_each_target_is_inverted_under_its_own_edit(pipe, targets):
    edits = [values_off(pipe, 0), None, values_off(pipe, 1)]
    together = invert(pipe, targets, edits=edits, **QUICK)
    for i, edit in enumerate(edits):
        with applied(pipe, edit):
            torch.testing.assert_close(together[[i]], invert(pipe, [targets[i]], **QUICK), atol=1e-3, rtol=1e-3)
    assert (together[0] - invert(pipe, targets[:1], **QUICK)[0]).abs().max() > 1e-3


def test_prompt_and_image_both_count(pipe, targets):
    own = invert(pipe, targets[:1], **QUICK)
    for other in (Target("a", PROMPTS[1], targets[0].image, "VM"), Target("b", PROMPTS[0], targets[1].image, "VM")):
        assert (own - invert(pipe, [other], **QUICK)).abs().max() > 1e-3


@torch.no_grad()
def test_the_more_of_it_is_inverted_noise_the_nearer_the_picture_is_to_the_image(calm, targets):
    clean, embeds = encode_images(calm, [targets[0].image]), encode_prompts(calm, PROMPTS[:1])
    inverted = _inverted(calm, clean, embeds, ddim(calm, 5), 20, lambda: None)
    calm.scheduler = ddim(calm, 5)  # Stable Diffusion 1.x samples by PNDM
    errors = []
    for share in (0.0, 0.5, 0.9, 1.0):
        latents = mixed(calm, inverted, [0], share)[:, 0]
        found = denoise(calm, latents, embeds, num_inference_steps=5, guidance_scale=1.0)
        errors.append((found - clean).square().mean().item())
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-6


def test_nan_is_named_with_its_target(sd1, targets):
    bias = sd1.unet.conv_out.bias
    with torch.no_grad():
        kept = bias.clone()
        try:
            bias[0] = float("nan")
            with pytest.raises(FloatingPointError, match="inverting t0"):
                invert(sd1, targets[:1], **QUICK)
        finally:
            bias.copy_(kept)


@pytest.mark.parametrize("change", [dict(share=0), dict(share=1.5), dict(record=(0.5, 2)), dict(refinements=-1)])
def test_settings_that_make_no_sense_are_refused(change):
    with pytest.raises(ValueError, match="must be"):
        Config(**change)


def test_the_bar_counts_the_steps(sd1, targets, capsys):
    invert(sd1, targets, num_inference_steps=4)
    assert "inversion" in capsys.readouterr().err
    assert np.isfinite(invert(sd1, targets, **QUICK).numpy()).all()
