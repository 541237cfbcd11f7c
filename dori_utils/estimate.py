"""Estimates: what a method would take on a model that is not there, by calculation, not by measurement.

The U-Net is built from its configuration on torch's meta device, which has shapes and no numbers: every operation is
counted as it would run, in floating-point operations (FLOPs), and every tensor that the backward pass would need, in
bytes. From these follow time, at a stated rate, and memory. Attention is counted in its plain form, which keeps its
matrices of probabilities; a fused one keeps less. What kernels need for themselves comes on top.
"""

from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

# Stable Diffusion 1.x; what is not named is diffusers' default. Its own model card has the same numbers.
SD1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


@dataclass(frozen=True)
class Pass:
    """One forward and, where something is trained, backward pass of a batch.

    Args:
        flops: floating-point operations; a multiplication and an addition are two.
        saved: bytes that the forward pass keeps for the backward one.
        parameters: of the model.
    """

    flops: float
    saved: int
    parameters: int


def count_pass(config, rows=1, tokens=77, gradient=None, checkpointing=False) -> Pass:
    """Count a pass of a `UNet2DConditionModel` with this configuration, in float32.

    Args:
        config: arguments of `UNet2DConditionModel`, such as `SD1`.
        rows: of the batch.
        tokens: of an embedding.
        gradient: None; "embeddings", as in an attack; or "weights", as in training.
        checkpointing: what lies inside the U-Net's blocks is computed twice and not kept.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).requires_grad_(gradient == "weights")
        latents = torch.empty(rows, unet.config.in_channels, *[unet.config.sample_size] * 2)
        embeds = torch.empty(rows, tokens, unet.config.cross_attention_dim, requires_grad=gradient == "embeddings")
    weights = {id(parameter) for parameter in unet.parameters()}
    if checkpointing:
        unet.enable_gradient_checkpointing()
    saved = {}

    def keep(tensor):
        if id(tensor) not in weights:
            saved[id(tensor)] = (tensor, tensor.numel() * tensor.element_size())  # once, if kept by several
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unet(latents, torch.zeros((), device="meta"), encoder_hidden_states=embeds).sample
        if gradient is not None:
            output.sum().backward()
    bytes_kept = sum(size for _, size in saved.values())
    return Pass(counter.get_total_flops(), bytes_kept, sum(p.numel() for p in unet.parameters()))
