"""Hooks: find layers by name, look at what they are given or give, and change it while the U-Net runs.

Shapes: B rows of a batch; a layer's output (B, ...), that of a linear layer (B, T, its neurons).
"""

import re
from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import torch

BLOCKS = ("time_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks")  # a U-Net lists its middle block last


def layers(unet, pattern: str, kind=torch.nn.Module) -> dict:
    """Name → layer of every layer of that kind whose name fits the regular expression, block by block as they run.

    Raises:
        ValueError: there is none.
    """
    found = {n: m for n, m in unet.named_modules() if re.search(pattern, n) and isinstance(m, kind)}
    if not found:
        what = "linear layer" if kind is torch.nn.Linear else "layer"
        raise ValueError(f"No {what} of this {type(unet).__name__} has a name that fits {pattern!r}.")

    def block(name):
        first = name.split(".")[0]
        return BLOCKS.index(first) if first in BLOCKS else len(BLOCKS)

    return {name: found[name] for name in sorted(found, key=block)}


@contextmanager
def watched(layers: dict, keep: Callable, inputs: bool = False):
    """Within it keep(name, value) is called whenever a layer has run, with its output, or with its first input."""

    def after(name):
        return lambda layer, args, out: keep(name, args[0] if inputs else out)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_hook(after(name)))
        yield


@contextmanager
def outputs(layers: dict):
    """Yields {name: list}, to which each run of the U-Net adds a layer's output."""
    lists = {name: [] for name in layers}
    with watched(layers, lambda name, out: lists[name].append(out)):
        yield lists


@contextmanager
def scaled(layers: dict, factors: torch.Tensor):
    """Within it the outputs of linear layers are multiplied: factors (B, neurons) float, over all layers in order."""
    widths = [layer.out_features for layer in layers.values()]
    with ExitStack() as stack:
        for layer, factor in zip(layers.values(), factors.split(widths, dim=1), strict=True):
            factor = factor[:, None].to(layer.weight)  # (B, 1, neurons of the layer)
            stack.enter_context(layer.register_forward_hook(lambda layer, args, out, factor=factor: out * factor))
        yield


@contextmanager
def replayed(layers: list, given: list):
    """Within it these layers do not run, but return the outputs given."""
    try:
        for layer, output in zip(layers, given, strict=True):
            layer.forward = lambda *args, output=output, **kwargs: output
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
