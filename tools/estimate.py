"""Estimates: what a method would take on a model that is not there, by calculation, not by measurement.

The U-Net is built from its configuration on torch's meta device, which has shapes and no numbers: every operation is
counted as it would run, in floating-point operations (FLOPs), and every tensor that the backward pass would need, in
bytes. From these follow time, at a stated rate, and memory. Attention is counted in its plain form, which keeps its
matrices of probabilities; a fused one keeps less. What kernels need for themselves comes on top.

    python -m tools.estimate     # every method on Stable Diffusion 1.4: prints it, writes figures/estimate.csv
"""

import re
from dataclasses import dataclass
from functools import cache, partial

import pandas as pd
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dori_utils.erasure.esd import VARIANTS
from dori_utils.nemo import value_layers

# What is not named is diffusers' default. Each model's own unet/config.json has the same numbers.
SD1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # Stable Diffusion 1.x
SD2 = {  # Stable Diffusion 2.1, for 768 pixels
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "upcast_attention": True,
}

SPEED = 100e12  # FLOP/s: an assumption
A100, H100 = 312e12, 989e12  # FLOP/s that they promise in bfloat16, without sparsity
ABOUT = (
    "By calculation, not measured: rows of the U-Net from the settings of `PRESETS['paper']`; FLOPs, and what the "
    "backward pass keeps, of one row, counted on the real architecture without weights. "
    f"Time at {SPEED / 1e12:.0f} TFLOP/s, which is an assumption: {SPEED / A100:.0%} of what an A100 promises in "
    f"bfloat16, {SPEED / H100:.0%} of an H100. GB: the U-Net's weights in half precision, in training in float32 with "
    "gradients, AdamW's moments and the originals; and what the backward pass keeps in bfloat16, with attention in its "
    "plain form. NeMo's rows are those of trying every set on every seed, where no round is enough and only the "
    "strongest neurons are blocked. Sampling is PNDM's, which makes one evaluation more than it has steps. Left out: "
    "text encoder, VAE and SSCD; what a forward pass needs for itself; the choice of Concept Ablation's anchors; the "
    "surrogates of fine-tuning; the images that SISS keeps."
)


@dataclass(frozen=True)
class Pass:
    """One forward and, where something is trained, backward pass of a batch.

    Args:
        flops: floating-point operations; a multiplication and an addition are two.
        saved: bytes that the forward pass keeps for the backward one.
        parameters: of the model.
        trained: how many of them take a gradient.
    """

    flops: float
    saved: int
    parameters: int
    trained: int = 0


@dataclass(frozen=True)
class Work:
    """Rows of the U-Net that a method takes in all, by what is wanted of them.

    Args:
        forward: rows without a gradient.
        embeddings: rows with a gradient of embeddings.
        weights: rows with a gradient of weights.
        again: of these, backward passes beyond the first, in rows.
        together: rows with a gradient of embeddings and of weights, that are in memory at once.
        pattern: names of the weights, a regular expression.
        teacher: whether a frozen copy of the U-Net stands beside it.
    """

    forward: float = 0
    embeddings: float = 0
    weights: float = 0
    again: float = 0
    together: tuple[int, int] = (0, 0)
    pattern: str = ""
    teacher: bool = False


def count_pass(config, rows=1, tokens=77, gradient=None, checkpointing=False, pattern="") -> Pass:
    """Count a pass of a `UNet2DConditionModel` with this configuration, in float32.

    Args:
        config: arguments of `UNet2DConditionModel`, such as `SD1`.
        rows: of the batch.
        tokens: of an embedding.
        gradient: None; "embeddings", as in an attack; or "weights", as in training.
        checkpointing: what lies inside the U-Net's blocks is computed twice and not kept.
        pattern: with "weights", names of those that are trained, a regular expression; default: all.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        latents = torch.empty(rows, unet.config.in_channels, *[unet.config.sample_size] * 2)
        embeds = torch.empty(rows, tokens, unet.config.cross_attention_dim, requires_grad=gradient == "embeddings")
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(gradient == "weights" and re.search(pattern, name) is not None)
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
    sizes = [(p.numel(), p.requires_grad) for p in unet.parameters()]
    trained = sum(size for size, wanted in sizes if wanted)
    return Pass(counter.get_total_flops(), bytes_kept, sum(size for size, _ in sizes), trained)


def costs(preset, config=SD1, speed=SPEED) -> pd.DataFrame:
    """What every method would take: rows of the U-Net, PFLOP, hours and GB. `ABOUT` says what is in the numbers.

    Args:
        preset: a `Preset`, of which the settings of all methods are taken.
        config: arguments of `UNet2DConditionModel`.
        speed: floating-point operations in a second.
    """
    counted = cache(partial(count_pass, config))
    rows = []
    for name, work in works(preset, config).items():
        for checkpointing in (False, True) if work.embeddings else (False,):  # the others have no such option
            flops, size = _flops_and_bytes(work, checkpointing, counted)
            about = {"method": name, "checkpointing": checkpointing}
            about |= {"forward": work.forward, "embeddings": work.embeddings, "weights": work.weights}
            rows.append(about | {"PFLOP": flops / 1e15, "hours": flops / speed / 3600, "GB": size / 1e9})
    return pd.DataFrame(rows)


def _flops_and_bytes(work, checkpointing, counted):
    plain, attack = counted(), counted(gradient="embeddings", checkpointing=checkpointing)
    train = counted(gradient="weights", checkpointing=checkpointing, pattern=work.pattern)
    flops = work.forward * plain.flops + work.embeddings * attack.flops + work.weights * train.flops
    flops += work.again * (train.flops - plain.flops)
    kept = max(work.together[0] * attack.saved, work.together[1] * train.saved) / 2  # bfloat16
    size = 2 * plain.parameters
    if work.weights:  # float32; of what is trained also gradients, two moments of AdamW, and the originals
        size = 4 * plain.parameters * (1 + work.teacher) + 16 * train.trained
    return flops, size + kept


def works(preset, config=SD1) -> dict[str, Work]:
    """Method → `Work`, from the settings of a preset."""
    seeds, attack = len(preset.seeds), preset.attack
    return {
        f"generation, {seeds} seeds of a prompt": Work(
            forward=seeds * _evaluations(preset.num_inference_steps) * _guided(preset.guidance_scale)
        ),
        "NeMo, one prompt": _nemo(preset.nemo, config),
        "Wanda, one prompt": _wanda(preset.wanda),
        f"DoRI, one image, {attack.steps} steps of {attack.batch_size} draws": Work(
            embeddings=attack.restarts * attack.steps * attack.batch_size, together=(attack.batch_size, 0)
        ),
        f"adversarial fine-tuning, {preset.compared_targets} images": _finetuning(preset),
        "ESD, one run": _esd(preset.esd),
        "Concept Ablation, one image": _ablation(preset.ablation),
        "SISS, one image": _siss(preset.siss),
    }


def _evaluations(steps):
    """How often sampling asks the U-Net, with the sampler that Stable Diffusion 1.x is published with."""
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


def _guided(scale):
    """Rows of one evaluation in sampling."""
    return 2 if scale > 1 else 1


def _nemo(nemo, config):
    """At most: nothing blocked, every round, and of the last one, in which every layer has rounds - 1 neurons (more
    where some are far from their mean), every layer and every neuron unblocked."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        layers = len(value_layers(UNet2DConditionModel(**config), nemo.layers))
    return Work(forward=len(nemo.seeds) * (1 + nemo.rounds + layers + layers * (nemo.rounds - 1)))


def _wanda(wanda):
    """The prompt and the empty one."""
    return Work(forward=2 * len(wanda.seeds) * wanda.steps * _guided(wanda.guidance_scale))


def _finetuning(preset):
    tuning, inner = preset.finetuning, preset.finetuning.attack
    pairs = preset.compared_targets * preset.surrogates // tuning.batch_size * tuning.batch_size * tuning.epochs
    draws = inner.restarts * inner.steps * inner.batch_size if tuning.adversarial else 0
    return Work(
        embeddings=pairs * draws,
        weights=2 * pairs * tuning.draws + tuning.recovery * tuning.batch_size * tuning.draws,
        together=(tuning.batch_size * inner.batch_size, 2 * tuning.batch_size * tuning.draws),
    )


def _esd(esd):
    """A step draws its latents by half of sampling on average, and asks the original twice."""
    drawn = _guided(esd.guidance_scale) * (_evaluations(esd.num_inference_steps) - 1) / 2
    rows = esd.steps * esd.batch_size
    together, pattern = (0, esd.batch_size), VARIANTS[esd.variant]
    return Work(forward=rows * (drawn + 2), weights=rows, together=together, pattern=pattern, teacher=True)


def _ablation(ablation):
    """Images of the anchors, then steps of one or two terms, of which the first has a target without gradient."""
    drawn = ablation.images * _evaluations(ablation.num_inference_steps) * _guided(ablation.guidance_scale)
    rows, terms = ablation.steps * ablation.batch_size, 2 if ablation.regularization else 1
    return Work(forward=drawn + rows, weights=terms * rows, together=(0, terms * ablation.batch_size))


def _siss(siss):
    """Beside the step's own backward pass one for each gradient whose length is measured."""
    rows, measured = siss.steps * siss.batch_size, 2 if siss.scaling_norm is None else 1
    return Work(weights=rows, again=measured * rows, together=(0, siss.batch_size))


def as_markdown(table) -> str:
    """The table of `costs`, with numbers that one can read."""
    shown = pd.DataFrame(
        {
            "method": table["method"] + table["checkpointing"].map({True: ", checkpointing", False: ""}),
            "rows: forward": [f"{n:,.0f}" for n in table["forward"]],
            "gradient of embeddings": [f"{n:,.0f}" for n in table["embeddings"]],
            "gradient of weights": [f"{n:,.0f}" for n in table["weights"]],
            "PFLOP": [f"{n:,.2g}" if n < 10 else f"{n:,.0f}" for n in table["PFLOP"]],
            "time": [_duration(n) for n in table["hours"]],
            "GB": [f"{n:.1f}" for n in table["GB"]],
        }
    )
    rows = [shown.columns, ["---"] * shown.shape[1], *shown.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _duration(hours):
    if hours < 1 / 60:
        return f"{3600 * hours:.2g} s"
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.0f} h"


if __name__ == "__main__":
    from dori_utils.plots import FIGURES, csv_text, figures_folder
    from dori_utils.presets import PRESETS

    table = costs(PRESETS["paper"])
    table.attrs["about"] = ABOUT
    (figures_folder(FIGURES) / "estimate.csv").write_text(csv_text(table), encoding="utf-8")
    print(f"{as_markdown(table)}\n\n{ABOUT}")
