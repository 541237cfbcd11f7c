"""Wanda for memorization: zero the weights that a memorized prompt uses much, and more than the empty prompt does.

Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024) scores a weight by
its size times the norm of what it is multiplied with. Chavhan et al. ("Memorized Images in Diffusion Models share a
Subspace that can be Located and Deleted", 2024) turn that round and prune the *highest* scores, in the second linear
layer of every feed-forward block of the U-Net (`ff.net.2`), at each of the first denoising steps:

    score_ij = |W_ij| * ||X_j||_2        X: the layer's inputs, each token's row first scaled to unit length

    pruned at a step: the top share (sparsity) of each output row of the score under the memorized prompt,
                      where that score is also above the same weight's under the empty prompt
    pruned in all:    the union over the first steps

Two details are not in the text, and the authors' code has them otherwise than this module does by default: there the
norms are over *both* halves of a guided batch, so that the rows under the empty prompt count, too, and the top share of
a row is cut off, int(sparsity * columns), not rounded (12 of 1,280 columns at 1%, where ours are 13). `authors=True` is
their way; at the paper's settings it prunes 1.1 to 1.3% of the weights where the default prunes 1.4 to 1.7%, and the
two masks have an IoU of 0.55 to 0.62. A step is an evaluation of the U-Net: PNDM, the sampler of SD 1.x, makes 51 of
them for 50 steps, the second and third at one timestep.

The norms of a prompt (`activation_norms`) hold everything that the model has to be run for; masks for any sparsity
follow from them without it.

Shapes: N prompts, S seeds, K steps; a layer's weight W (rows, columns), its input X (B, T, columns).
"""

from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch

from dori_utils.core import hooks
from dori_utils.core.bars import tqdm
from dori_utils.core.diffusion import denoise, encode_prompts, initial_latents
from dori_utils.core.edits import Edit
from dori_utils.core.hashes import base_hash


@dataclass(frozen=True)
class Config:
    """Settings; those of the paper are the default."""

    sparsity: float = 0.01  # of each row, at each step; the paper's stress test has 0.1
    steps: int = 10  # first denoising steps, over which masks are united
    num_inference_steps: int = 50
    guidance_scale: float = 7.5  # on the way from step to step, as in generation; norms are of the half with the prompt
    seeds: tuple[int, ...] = (0,)  # not published; norms are over all of them
    layers: str = r"\.ff\.net\.2$"  # names of the layers, a regular expression

    def __post_init__(self):
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is {self.sparsity}: it is a share, between 0 and 1.")
        if not 1 <= self.steps <= self.num_inference_steps:
            raise ValueError(f"steps is {self.steps}: it must be between 1 and {self.num_inference_steps}.")


def localize(pipe, targets, config=None, *, authors=False, **kwargs):
    """One edit for a set of targets together: norms over the prompts of all of them. See `localize_each`."""
    config = config or Config()
    norms, empty = _norms(pipe, targets, config, authors, **kwargs)
    together = {name: layer.mean(dim=0) for name, layer in norms.items()}  # (N, K, columns) → (K, columns)
    return _edit(pipe, base_hash(pipe), together, empty, targets, config, authors)


def localize_each(pipe, targets, config=None, *, authors=False, **kwargs):
    """One edit for each target alone.

    Args:
        pipe: a `StableDiffusionPipeline`, without an edit applied to it.
        targets: N `Target`s; only their ids and prompts are used.
        config: a `Config`.
        authors: as the authors' code does it, see the module's docstring: norms over both halves of a guided batch, and
            the share of a row cut off instead of rounded.
        kwargs: prompt_embeds, embeddings (N, T, D) that take the place of the prompts, such as triggers; batch_size,
            progress, callback of `activation_norms`.

    Returns:
        List of N edits.
    """
    config = config or Config()
    norms, empty = _norms(pipe, targets, config, authors, **kwargs)
    base = base_hash(pipe)
    return [
        _edit(pipe, base, {name: layer[i] for name, layer in norms.items()}, empty, [target], config, authors)
        for i, target in enumerate(targets)
    ]


def _norms(pipe, targets, config, authors, prompt_embeds=None, **kwargs):
    """Of each target's prompt (N, K, columns), and of the empty one (K, columns), both by layer name."""
    embeds = encode_prompts(pipe, [target.prompt for target in targets]) if prompt_embeds is None else prompt_embeds
    norms = activation_norms(pipe, embeds, config, both_halves=authors, **kwargs)
    empty = activation_norms(pipe, encode_prompts(pipe, [""]), config, both_halves=authors, progress=False)
    return norms, {name: layer[0] for name, layer in empty.items()}


def localized_layers(unet, pattern=Config.layers):
    """Name → layer of every linear layer whose name fits the pattern; a ValueError if there is none."""
    return hooks.layers(unet, pattern, torch.nn.Linear)


@torch.no_grad()
def activation_norms(
    pipe, prompt_embeds, config=None, *, both_halves=False, batch_size=16, progress=True, callback=None
):
    """Mean squares of every input of every layer, at each of the first denoising steps.

    A mean over tokens and seeds, not a sum: for one prompt both pick the same weights, but only means of several
    prompts can be compared with the empty one's.

    Args:
        prompt_embeds: (N, T, D).
        both_halves: under guidance, the mean is also over what the empty prompt gives beside each prompt.
        batch_size: cases (prompt and seed) in one batch; under guidance the U-Net sees two rows for each.
        callback: called with {"prompts": done, "of": N} after each batch.

    Returns:
        Layer name → (N, K, columns) float32: ||X_j||_2^2 / number of tokens.
    """
    config = config or Config()
    embeds, noise = prompt_embeds.to(pipe.unet.device, pipe.unet.dtype), initial_latents(pipe, config.seeds)
    rows, columns = torch.cartesian_prod(torch.arange(len(embeds)), torch.arange(len(noise))).T
    layers = localized_layers(pipe.unet, config.layers)
    collected = {name: [] for name in layers}
    with tqdm(total=len(rows) * config.steps, desc="Wanda", disable=not progress) as bar:
        for row, column in zip(rows.split(batch_size), columns.split(batch_size), strict=True):
            with _recorded(layers, len(row), both_halves) as records:
                denoise(
                    pipe,
                    noise[column],
                    embeds[row],
                    num_inference_steps=config.num_inference_steps,
                    guidance_scale=config.guidance_scale,
                    on_step=partial(bar.update, len(row)),
                    stop_after=config.steps,
                )
            for name, steps in records.items():
                collected[name].append(torch.stack(steps, dim=1))  # (B, K, columns)
            if callback is not None:
                callback({"prompts": int(row[-1]) + 1, "of": len(embeds)})
    seeds = len(noise)
    return {name: torch.cat(parts).unflatten(0, (-1, seeds)).mean(dim=1) for name, parts in collected.items()}


def pruning_mask(weight, norms, empty, sparsity, *, whole=round):
    """The weights that a layer loses: the definition above.

    Args:
        weight: (rows, columns).
        norms: (K, columns), mean squares of the inputs under the prompt at each step.
        empty: (K, columns), the same under the empty prompt.
        sparsity: share of each row, at each step.
        whole: makes a whole number of weights of that share; the authors' code has int.

    Returns:
        (rows, columns) bool.
    """
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    count = whole(sparsity * weight.shape[1])  # pruned of each row at a step, at most
    if count == 0:
        return mask
    for norm, norm_empty in zip(norms.to(weight.device), empty.to(weight.device), strict=True):
        score = weight.abs().float() * norm.sqrt()
        score_empty = weight.abs().float() * norm_empty.sqrt()
        top = torch.zeros_like(mask).scatter_(1, score.topk(count, dim=1).indices, True)
        mask |= top & (score > score_empty)
    return mask


def _edit(pipe, base, norms, empty, targets, config, authors):
    whole = int if authors else round
    masks = {
        f"{name}.weight": pruning_mask(layer.weight, norms[name], empty[name], config.sparsity, whole=whole).cpu()
        for name, layer in localized_layers(pipe.unet, config.layers).items()
    }
    return Edit("Wanda", base, asdict(config) | {"authors": authors}, [target.id for target in targets], masks)


@contextmanager
def _recorded(layers, count, both_halves):
    """Within it every evaluation of the U-Net adds (count, columns) mean squares to each layer's list.

    The last `count` rows of a batch are the cases; under guidance the unconditional half stands before them, and is
    left out or, with both_halves, averaged with them.
    """
    records = {name: [] for name in layers}

    def record(name, inputs):
        squares = (inputs if both_halves else inputs[-count:]).float().square()  # (1 or 2 halves x B, T, columns)
        unit = 1 / squares.sum(dim=2).clamp_min(1e-12)  # (..., T): scales each token's row to unit length
        norms = torch.einsum("btc,bt->bc", squares, unit).cpu() / squares.shape[1]
        records[name].append(norms.unflatten(0, (-1, count)).mean(dim=0))  # (halves, B, columns) → (B, columns)

    with hooks.watched(layers, record, inputs=True):
        yield records
