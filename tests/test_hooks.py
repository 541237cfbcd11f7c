"""Hooks: layers are found by name, seen as they run, and scaled row by row; behind them nothing is left of it."""

import pytest
import torch

from dori_utils.core import hooks
from dori_utils.core.diffusion import encode_prompts, initial_latents

VALUES = r"attn2\.to_v$"


@pytest.fixture
def run(pipe):
    embeds, noise = encode_prompts(pipe, ["a cat", "grapes"]), initial_latents(pipe, [0, 1])
    with torch.no_grad():
        yield lambda: pipe.unet(noise, 500, encoder_hidden_states=embeds).sample


def test_layers_come_in_the_order_in_which_they_run(pipe, run):
    ran, layers = [], hooks.layers(pipe.unet, VALUES, torch.nn.Linear)
    with hooks.watched(layers, lambda name, out: ran.append(name)):
        run()
    assert ran == list(layers) and len(ran) == 16
    with pytest.raises(ValueError, match="No linear layer of this UNet2DConditionModel has a name that fits 'to_w'"):
        hooks.layers(pipe.unet, "to_w", torch.nn.Linear)


def test_inputs_and_outputs_are_those_of_the_layer(pipe, run):
    layers, given = hooks.layers(pipe.unet, VALUES), {}
    with hooks.outputs(layers) as seen, hooks.watched(layers, given.__setitem__, inputs=True):
        run()
        run()
    for name, layer in layers.items():
        assert len(seen[name]) == 2
        torch.testing.assert_close(seen[name][1], layer(given[name]).detach())


def test_each_row_has_its_own_factors_and_all_of_it_is_gone_behind(pipe, run):
    layers, before = hooks.layers(pipe.unet, VALUES), run()
    width = sum(layer.out_features for layer in layers.values())
    factors = torch.stack([torch.ones(width), torch.zeros(width)])
    with hooks.scaled(layers, factors):
        changed = run()
    torch.testing.assert_close(changed[0], before[0])
    assert not torch.allclose(changed[1], before[1])
    assert torch.equal(run(), before)
    assert not any(layer._forward_hooks for layer in layers.values())
