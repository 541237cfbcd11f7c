"""Estimates by calculation: known counts are met, and what training needs more of is more."""

import pytest
import torch

from dori_utils.estimate import SD1, count_pass

SMALL = {"sample_size": 8, "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 16}
SMALL |= {"attention_head_dim": 2}


def test_a_small_unets_pass_is_what_it_really_keeps_and_computes():
    """Against the same U-Net with numbers in it."""
    from diffusers import UNet2DConditionModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    unet, embeds = UNet2DConditionModel(**SMALL).requires_grad_(False), torch.randn(2, 5, 16, requires_grad=True)
    # torch does not count its fused attention on CPUs
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        unet(torch.randn(2, 4, 8, 8), 0, encoder_hidden_states=embeds).sample.sum().backward()
    ours = count_pass(SMALL, rows=2, tokens=5, gradient="embeddings")
    assert ours.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert ours.parameters == sum(p.numel() for p in unet.parameters())


def test_more_rows_and_more_gradients_cost_more():
    plain, twice = count_pass(SMALL), count_pass(SMALL, rows=2)
    assert plain.saved == 0 and twice.flops == pytest.approx(2 * plain.flops, rel=0.01)
    embeddings, weights = (count_pass(SMALL, gradient=what) for what in ("embeddings", "weights"))
    assert plain.flops < embeddings.flops < weights.flops and 0 < embeddings.saved < weights.saved
    checkpointed = count_pass(SMALL, gradient="weights", checkpointing=True)
    assert checkpointed.saved < weights.saved / 3 and weights.flops < checkpointed.flops < 1.5 * weights.flops


@pytest.mark.slow
def test_stable_diffusion_1_has_its_known_size():
    """860 million parameters, and about 0.8 TFLOPs for a forward pass: its model card, and Rombach et al. (2022)."""
    found = count_pass(SD1)
    assert found.parameters == 859_520_964 and 0.6e12 < found.flops < 0.9e12
