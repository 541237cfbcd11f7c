"""NeMo: find the neurons that make a prompt replicate, and switch them off.

Hintersdorf et al., "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models" (NeurIPS 2024),
and the authors' code. A neuron is one output of a value layer of cross-attention (`attn2.to_v`) in the down and middle
blocks of the U-Net; blocking it sets that output to zero, which is zeroing one row of a weight.

* What a neuron does for a prompt, its activation, is the mean over tokens of |to_v(text embedding)|: no U-Net needed.
* Memorization score of a set of blocked neurons: how similar the first denoising step's change of the noise
  (`detection.first_step_change`) is with and without blocking, the largest over seeds. Low: the memory is gone. Only
  those seeds count whose change is, without blocking, more similar than tau to another seed's; if there is none, the
  prompt is not memorized and nothing is blocked.
* Initial selection (`candidates`, `select`): block neurons whose activation lies more than theta standard deviations
  from its mean over ordinary prompts, and the k strongest of each layer; lower theta and raise k round by round until
  the score is below tau.
* Refinement (`refine`): unblock whole layers, from the last to the first, then single neurons, as long as the score
  stays below.

tau and what is usual for a neuron are `nemo_statistics.Statistics`. Which of many sufficient sets of neurons refinement
ends at depends on the order in which it tries them (`ORDERS`).

`localize_plainly` is the method as it stands here. `localize_each` is several times as fast, for many targets at once,
and comes to the same decisions but for two shortcuts: see `nemo_search`.

Shapes: N prompts, S seeds; R rounds of selection; a set of neurons (neurons,) bool over all layers, one after another.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch

from dori_utils.core import hooks
from dori_utils.core.diffusion import ddim, encode_prompts, initial_latents
from dori_utils.core.edits import Edit, union
from dori_utils.core.hashes import base_hash
from dori_utils.core.map_similarity import pairwise_similarity, rowwise_similarity
from dori_utils.detection import first_step_change

ORDERS = ("ascending", "descending", "authors")  # in which refinement tries a layer's neurons, see `localize_each`


@dataclass(frozen=True)
class Config:
    """Settings; those of the paper are the default."""

    seeds: tuple[int, ...] = tuple(range(10))
    first_theta: float = 5.0
    theta_step: float = 0.25  # down each round, while k goes up by one
    min_theta: float = 1.0
    rounds: int = 16  # then selection gives up and tau becomes its score; the authors' code does when theta would be 1
    similarity: str = "ms_ssim"  # of two changes of the noise, see map_similarity; tau belongs to it
    num_inference_steps: int = 50  # of the schedule whose first timestep is used
    second_timestep: bool = False  # the authors' code evaluates the initial noise at the second timestep
    margin: float = 0.05  # of similarity, for what need not be tried; infinity: try everything. Ours, for speed
    layers: str = r"^(down_blocks|mid_block)\..*attn2\.to_v$"  # names of the layers, a regular expression


def value_layers(unet, pattern: str = Config.layers) -> dict:
    """Name → value layer, in the order of the forward pass; a ValueError if no layer has a name that fits."""
    return hooks.layers(unet, pattern, torch.nn.Linear)


@torch.no_grad()
def activations(pipe, prompt_embeds, pattern=Config.layers):
    """Layer name → (N, its neurons) float32: mean over tokens of |to_v(embedding)|, for embeddings (N, T, D)."""
    return {
        name: layer(prompt_embeds).float().abs().mean(dim=1)  # (N, T, neurons) → (N, neurons)
        for name, layer in value_layers(pipe.unet, pattern).items()
    }


class Candidates(NamedTuple):
    """The initial selection, round by round: sets of neurons, and when refinement tries each of its layer."""

    sets: torch.Tensor  # (R, neurons) bool
    turns: torch.Tensor  # (R, neurons), lowest first; to compare within a layer


def candidates(pipe, prompt_embeds, statistics, config: Config, order: str = "ascending") -> Candidates:
    """Of one embedding (1, T, D): theta falls and k rises from round to round."""
    if order not in ORDERS:
        raise ValueError(f"No order {order!r}; there is {', '.join(ORDERS)}.")
    values = activations(pipe, prompt_embeds, config.layers)
    values = {name: value[0].cpu() for name, value in values.items()}
    sets, turns = [], []
    for k in range(config.rounds):
        theta = max(config.min_theta, config.first_theta - k * config.theta_step)
        for name, value in values.items():
            off = (value - statistics.mean[name]).abs() / statistics.std[name] > theta
            strongest = value.topk(min(k, len(value))).indices
            off[strongest] = True
            turn = torch.arange(len(value))
            if order == "descending":
                turn = -turn
            elif order == "authors":
                turn[strongest] = len(value) + torch.arange(len(strongest))
            sets.append(off)
            turns.append(turn)
    return Candidates(*(torch.cat(parts).unflatten(0, (config.rounds, -1)) for parts in (sets, turns)))


def counted_seeds(maps, tau: float, similarity: str) -> list[int]:
    """The seeds whose map (S, C, H, W) is more similar than tau to another seed's, the most similar first."""
    pairs = torch.combinations(torch.arange(len(maps)))
    values = pairwise_similarity(maps, similarity).cpu()
    highest = torch.stack([values[(pairs == seed).any(dim=1)].max() for seed in range(len(maps))])
    return [int(seed) for seed in highest.argsort(descending=True) if highest[seed] > tau]


def memorization_scores(maps, unblocked, kind: str) -> torch.Tensor:
    """Scores (B,) of first-step changes under blocking (B, C, H, W), against those of the same seeds without.

    Raises:
        FloatingPointError: one is not a number.
    """
    scores = rowwise_similarity(maps, unblocked, kind)
    if not scores.isfinite().all():
        raise FloatingPointError("A memorization score is not a number. Check the weights; try float32.")
    return scores


def select(score: Callable, sets: torch.Tensor, tau: float) -> tuple[int, float]:
    """The number of the first set that scores below tau, and tau; if there is none, the last, and its score as tau."""
    for number, candidate in enumerate(sets):
        level = score(candidate)
        if level < tau:
            return number, tau
    return len(sets) - 1, level


def refine(score: Callable, chosen: torch.Tensor, groups: list[torch.Tensor], tau: float) -> torch.Tensor:
    """What stays blocked of a set when one group of neurons after the other is unblocked, if the score allows."""
    for group in groups:
        candidate = chosen.clone()
        candidate[group] = False
        if score(candidate) < tau:
            chosen = candidate
    return chosen


def layer_groups(chosen: torch.Tensor, layers: dict) -> list[torch.Tensor]:
    """Numbers of the neurons of whole layers, the last layer first; those that have any in the set."""
    members = torch.arange(len(chosen)).split([layer.out_features for layer in layers.values()])
    return [layer for layer in reversed(members) if chosen[layer].any()]


def neuron_groups(chosen: torch.Tensor, turns: torch.Tensor, layers: dict) -> list[torch.Tensor]:
    """Numbers of the single neurons of the set, the last layer first, in a layer by their turns."""
    in_order = [layer[turns[layer].argsort()] for layer in layer_groups(chosen, layers)]
    return [neuron for layer in in_order for neuron in layer[chosen[layer]].split(1)]


@torch.no_grad()
def localize_plainly(
    pipe, target, statistics, config: Config | None = None, *, order="ascending", callback=None
) -> Edit:
    """NeMo for one target, one set of neurons after the other, each on all counted seeds.

    Its arguments mean what they mean in `localize_each`.
    """
    config = config or Config()
    layers, base = value_layers(pipe.unet, config.layers), base_hash(pipe)
    statistics.check(base, layers, config.similarity)
    embeds, noise = encode_prompts(pipe, [target.prompt]), initial_latents(pipe, config.seeds)
    t = ddim(pipe, config.num_inference_steps).timesteps[int(config.second_timestep)]
    sets, turns = candidates(pipe, embeds, statistics, config, order)
    about = asdict(config) | {"tau": statistics.tau, "order": order}
    unblocked = first_step_change(pipe, embeds.expand(len(noise), -1, -1), noise, t)  # (S, C, H, W)
    seeds = counted_seeds(unblocked, statistics.tau, config.similarity)
    if not seeds:
        return edit_of(base, target, torch.zeros_like(sets[0]), layers, about)

    def score(stage, candidate):
        with blocked(layers, candidate.expand(len(seeds), -1)):
            changes = first_step_change(pipe, embeds.expand(len(seeds), -1, -1), noise[seeds], t)
        highest = memorization_scores(changes, unblocked[seeds], config.similarity).max().item()
        report(callback, target.id, stage, candidate, highest, tau)
        return highest

    tau = statistics.tau
    number, tau = select(partial(score, "selection"), sets, tau)
    chosen = refine(partial(score, "layers"), sets[number], layer_groups(sets[number], layers), tau)
    chosen = refine(partial(score, "neurons"), chosen, neuron_groups(chosen, turns[number], layers), tau)
    return edit_of(base, target, chosen, layers, about)


def localize(pipe, targets, statistics, config=None, **kwargs):
    """One edit for a set of targets: all neurons that any of them needs blocked. See `localize_each`."""
    return union(localize_each(pipe, targets, statistics, config, **kwargs))


@torch.no_grad()
def localize_each(
    pipe,
    targets,
    statistics,
    config=None,
    *,
    prompt_embeds=None,
    order="ascending",
    batch_size=64,
    progress=True,
    callback=None,
):
    """One edit for each target: the neurons that must be blocked so that its prompt no longer replicates.

    Which they are depends on the order in which they are tried: one that is tried early can be spared as long as others
    are still blocked. Each order ends at a set that suffices; two such sets of one prompt have an IoU of 0.6 on average
    (notebook 06).

    Args:
        pipe: a `StableDiffusionPipeline`, without an edit applied to it.
        targets: N `Target`s; only their ids and prompts are used.
        prompt_embeds: embeddings (N, T, D), such as triggers, that take the place of the prompts.
        statistics: `Statistics` of this model.
        config: a `Config`.
        order: in which refinement tries a layer's neurons, of `ORDERS`: "ascending" and "descending" by number;
            "authors", as their code does, those that are out of distribution by number and then the k strongest by
            strength, with a neuron that is both in its second place.
        batch_size: rows (a set of neurons and a seed) in one batch of the U-Net.
        callback: called with {"target", "stage", "blocked", "score", "threshold"} for every decision. blocked is how
            many neurons the set has; the score is over the seeds that were tried, or as guessed.

    Returns:
        List of N edits; a prompt that is not memorized has one without any neuron.

    Raises:
        ValueError: statistics of another model, of another similarity, or without this model's layers; an unknown
            order.
        FloatingPointError: a score is not a number.
    """
    from dori_utils.nemo_search import search  # it builds on this module

    config = config or Config()
    layers, base = value_layers(pipe.unet, config.layers), base_hash(pipe)
    statistics.check(base, layers, config.similarity)
    embeds = encode_prompts(pipe, [target.prompt for target in targets]) if prompt_embeds is None else prompt_embeds
    embeds = embeds.to(pipe.unet.device, pipe.unet.dtype)
    chosen = search(pipe, targets, embeds, layers, statistics, config, order, batch_size, progress, callback)
    about = asdict(config) | {"tau": statistics.tau, "order": order}
    return [edit_of(base, target, off, layers, about) for target, off in zip(targets, chosen, strict=True)]


def neurons(edit: Edit) -> dict[str, list[int]]:
    """Layer name → list of the neurons that an edit by NeMo blocks."""
    return {name.removesuffix(".weight"): mask.nonzero()[:, 0].tolist() for name, mask in edit.masks.items()}


def blocked(layers: dict, sets: torch.Tensor) -> AbstractContextManager:
    """Within it row i of a batch runs with the neurons sets[i] blocked: (B, neurons) bool over all layers."""
    return hooks.scaled(layers, (~sets).float())


def report(callback, target, stage, candidate, score, threshold) -> None:
    if callback is not None:
        about = {"target": target, "stage": stage, "blocked": int(candidate.sum())}
        callback(about | {"score": score, "threshold": threshold})


def edit_of(base, target, chosen, layers, about) -> Edit:
    parts = chosen.split([layer.out_features for layer in layers.values()])
    masks = {f"{name}.weight": off[:, None] for name, off in zip(layers, parts, strict=True)}
    return Edit("NeMo", base, about, [target.id], masks)
