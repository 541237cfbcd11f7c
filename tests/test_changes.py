"""What a report says of an edit: which parts of the model it changes, and how much."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler

from dori_utils.cli.changes import changes
from dori_utils.core.edits import Edit
from dori_utils.core.hashes import base_hash, known
from dori_utils.core.parts import named_parameters

WEIGHT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"


def test_each_part_has_a_sentence_with_its_numbers(sd1):
    mask = torch.zeros(16, 1, dtype=torch.bool)
    mask[:4] = True
    weight, bias = sd1.unet.get_parameter(WEIGHT), sd1.unet.conv_in.bias
    masked = Edit("NeMo", base_hash(sd1), masks={WEIGHT: mask}, deltas={"conv_in.bias": torch.ones(8)})
    weights = sum(parameter.numel() for parameter in sd1.unet.parameters())
    far = ((weight[:4].square().sum() + 8) / (weight.square().sum() + bias.square().sum())).sqrt().item()
    (said,) = changes(sd1, masked)
    count = len(named_parameters(sd1, ["unet"]))
    assert said == f"U-Net: 2 of {count} tensors, 72 of {weights:,} weights, moved by {far:.2g} of their norm"


def test_settings_are_said_with_what_they_were(sd1):
    vae, text = copy.deepcopy(sd1.vae), copy.deepcopy(sd1.text_encoder)
    vae.register_to_config(scaling_factor=0.5)
    for parameter in text.parameters():
        parameter.data = parameter.data.half().float()
    scheduler = DDIMScheduler.from_config(sd1.scheduler.config, prediction_type="v_prediction")
    with known(sd1):
        edit = Edit.between(sd1, {"text_encoder": text, "vae": vae, "scheduler": scheduler})
        text, vae, scheduler = changes(sd1, edit)
    count = len(named_parameters(sd1, ["text_encoder"]))
    assert text.startswith("text encoder: ") and f"of {count} tensors" in text
    assert text.endswith("no more than half precision rounds")
    assert vae == f"VAE: scaling_factor {sd1.vae.config.scaling_factor} → 0.5"
    assert "class_name PNDMScheduler → DDIMScheduler" in scheduler
    assert "prediction_type epsilon → v_prediction" in scheduler and "beta_start" not in scheduler


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_weights_that_were_zero_have_no_size(part, sd1):
    name = {"unet": "conv_in.bias", "text_encoder": "text_encoder.final_layer_norm.bias"}
    name = name.get(part, "vae.decoder.conv_norm_out.bias")
    parameter = named_parameters(sd1, [part])[name]
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.zero_()
        try:
            said = changes(sd1, Edit("theirs", base_hash(sd1), deltas={name: torch.ones_like(parameter)}))
        finally:
            parameter.copy_(before)
    assert said[0].endswith("from zero")
