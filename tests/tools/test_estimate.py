"""Estimates by calculation: known counts are met, and what training needs more of is more."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from dori_utils.core.generation import generate
from dori_utils.plots import ROOT
from dori_utils.presets import PRESETS
from tools.estimate import ABOUT, SD1, SD2, as_markdown, costs, count_pass, works

SMALL = {"sample_size": 8, "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 16}
SMALL |= {"attention_head_dim": 2}
LEAST = SMALL | {"block_out_channels": (8, 16), "layers_per_block": 1}
LEAST |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
LEAST |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}


@pytest.mark.slow
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


@pytest.mark.slow
def test_more_rows_and_more_gradients_cost_more():
    plain, twice = count_pass(SMALL), count_pass(SMALL, rows=2)
    assert plain.saved == 0 and twice.flops == pytest.approx(2 * plain.flops, rel=0.01)
    embeddings, weights = (count_pass(SMALL, gradient=what) for what in ("embeddings", "weights"))
    assert plain.flops < embeddings.flops < weights.flops and 0 < embeddings.saved < weights.saved
    checkpointed = count_pass(SMALL, gradient="weights", checkpointing=True)
    assert checkpointed.saved < weights.saved / 3 and weights.flops < checkpointed.flops < 1.5 * weights.flops


def test_what_is_not_trained_takes_no_gradient():
    some, all_of_it = (count_pass(LEAST, gradient="weights", pattern=pattern) for pattern in (r"\.attn2\.", ""))
    assert 0 < some.trained < all_of_it.trained == all_of_it.parameters
    assert some.flops < all_of_it.flops and some.saved < all_of_it.saved


def test_rows_are_those_of_the_paper_s_settings():
    """By hand, for settings that the papers and their code give."""
    generation, nemo, wanda, dori, tuning, esd, ablation, siss = works(PRESETS["paper"], SMALL).values()
    assert generation.forward == 10 * 51 * 2  # seeds, evaluations of PNDM in 50 steps, guidance
    assert nemo.forward == 10 * (1 + 16 + 7 + 7 * 15)  # seeds, of every set that is tried
    assert wanda.forward == 2 * 10 * 2  # two prompts, the first ten steps, guidance
    assert (dori.embeddings, dori.together) == (50 * 8, (8, 0))
    pairs = 5 * 112 * 10  # epochs, images, surrogates
    assert (tuning.embeddings, tuning.weights) == (pairs * 400, 2 * pairs)
    assert tuning.together == (8 * 8, 2 * 8)
    assert (esd.forward, esd.weights) == (1000 * (2 * 25 + 2), 1000)
    assert (ablation.forward, ablation.weights) == (1000 * 201 * 2 + 400 * 2, 400 * 2 * 2)
    assert (siss.weights, siss.again) == (35 * 16, 35 * 16)


def test_sampling_asks_the_unet_as_often_as_generation_does(sd1):
    calls = []
    handle = sd1.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    preset = replace(PRESETS["paper"], num_inference_steps=3, seeds=(0,))
    try:
        generate(sd1, ["a cat"], seeds=preset.seeds, **preset.sampling, progress=False)
    finally:
        handle.remove()
    generation, *_ = works(preset, SMALL).values()
    assert generation.forward == 2 * len(calls) == 2 * (3 + 1)  # rows: two for each evaluation, which guidance wants


@pytest.mark.slow
def test_costs_follow_the_settings():
    paper = PRESETS["paper"]
    changed = replace(paper, num_inference_steps=100, attack=replace(paper.attack, steps=100), compared_targets=224)
    table, twice = costs(paper, LEAST), costs(changed, LEAST, speed=50e12)
    ratio = (twice["PFLOP"] / table["PFLOP"]).tolist()
    assert ratio == pytest.approx([101 / 51, 1, 1, 2, 2, 2, 2, 1, 1, 1])  # generation (PNDM), DoRI and fine-tuning
    assert (twice["hours"] / table["hours"]).tolist() == pytest.approx([2 * value for value in ratio])
    assert (twice["GB"] == table["GB"]).all()
    for name, both in table.groupby("method").filter(lambda rows: len(rows) == 2).groupby("method"):
        plain, checkpointed = (both[both["checkpointing"] == wanted].iloc[0] for wanted in (False, True))
        assert checkpointed["GB"] < plain["GB"] and plain["PFLOP"] < checkpointed["PFLOP"], name
    lines = as_markdown(table).splitlines()
    assert len(lines) == 2 + len(table) == 12 and len({line.count("|") for line in lines}) == 1
    assert "By calculation, not measured" in ABOUT and "100 TFLOP/s" in ABOUT and "32% of what an A100" in ABOUT


@pytest.mark.slow
def test_stable_diffusion_1_has_its_known_size():
    """860 million parameters, and about 0.8 TFLOPs for a forward pass: its model card, and Rombach et al. (2022)."""
    found = count_pass(SD1)
    assert found.parameters == 859_520_964 and 0.6e12 < found.flops < 0.9e12


@pytest.mark.slow
def test_stable_diffusion_2_has_its_known_size():
    """866 million parameters; 96 x 96 latents have 2.25 times as many pixels, and attention more than that."""
    found = count_pass(SD2)
    assert found.parameters == 865_910_724 and 2.25 * 0.6e12 < found.flops < 3 * 0.9e12


@pytest.mark.slow
def test_the_committed_table_is_what_the_settings_give_now():
    committed = pd.read_csv(ROOT / "figures" / "estimate.csv", comment="#")
    pd.testing.assert_frame_equal(committed, costs(PRESETS["paper"]), rtol=1e-4, check_dtype=False)
