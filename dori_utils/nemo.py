"""NeMo: find the neurons that make a prompt replicate, and switch them off.

Hintersdorf et al., "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models" (NeurIPS 2024),
and the authors' code. A neuron is one output of a value layer of cross-attention (`attn2.to_v`) in the down and middle
blocks of the U-Net; blocking it sets that output to zero, which is zeroing one row of a weight.

* What a neuron does for a prompt, its activation, is the mean over tokens of |to_v(text embedding)|: no U-Net needed.
* Memorization score of a set of blocked neurons: how similar the first denoising step's change of the noise
  (`detection.first_step_change`) is with and without blocking, the largest over seeds. Low: the memory is gone. Only
  those seeds count whose change is, without blocking, more similar than tau to another seed's; if there is none, the
  prompt is not memorized and nothing is blocked.
* Initial selection: block neurons whose activation lies more than theta standard deviations from its mean over ordinary
  prompts, and the k strongest of each layer; lower theta and raise k round by round until the score is below tau.
* Refinement: unblock whole layers, from the last to the first, then single neurons, as long as the score stays below.

tau is the mean plus one standard deviation of first-step similarity over ordinary prompts (`collect_statistics`). It
belongs to one similarity: the authors' 0.428 to their MS-SSIM, "ms_ssim". Which of many sufficient sets of neurons
refinement ends at depends on the order in which it tries them (`ORDERS`).

The decisions are those of trying one set after the other, but sets do not go through the U-Net one by one. All targets
search at once; each asks for several sets ahead, as they would come if its next decisions were as guessed: in
refinement from the gradient of the score by how far each neuron is blocked. One seed above tau decides against a set,
so in selection all seeds are tried only where the most telling one is below. As refinement goes from the last layer to
the first, whatever comes before that layer in the U-Net is not run again, but gives what it gave under the initial
selection (`replayed`). Each set of a batch blocks its own neurons, by a hook.

Two shortcuts are not exact, and `Config.margin` is their one setting. In refinement only those seeds are watched at
every decision that were within the margin of tau when all were tried last; and a set that is guessed to be below tau
by more than the margin is not tried. All seeds are tried after `VERIFY_AFTER` decisions to unblock, later less often,
and at the end; if one is not below tau then, search goes back to the first decision that it is against. So the result
always has every seed below tau, but a score that leaps over tau and back between two such points is missed;
`localize_one_by_one` tries everything.

Shapes: N prompts, S seeds; M sets of neurons (M, neurons) bool over all layers, one after the other.
"""

import hashlib
import math
import re
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from .bars import tqdm
from .detection import ddim, first_step_change, first_step_similarity, pairwise_similarity, rowwise_similarity
from .edits import Edit, base_hash, union
from .generation import encode_prompts, initial_latents
from .models import todays_hash

PUBLISHED_TAU = 0.428  # Hintersdorf et al. (2024), for SD 1.4 and `similarity="ms_ssim"`
MOST_AHEAD = 64  # rows that a target asks for at once
VERIFY_AFTER = 32  # decisions to unblock, after which all seeds are tried; twice as many after each time without a miss
ORDERS = ("ascending", "descending", "authors")  # in which refinement tries a layer's neurons, see `localize_each`
DOUBT = 0.003  # of a guessed score, or half the guessed rise; one guess in four so near to tau is wrong on the testbed


@dataclass(frozen=True)
class Config:
    """Settings; those of the paper are the default."""

    seeds: tuple[int, ...] = tuple(range(10))
    first_theta: float = 5.0
    theta_step: float = 0.25  # down each round, while k goes up by one
    min_theta: float = 1.0
    rounds: int = 16  # then selection gives up and tau becomes its score; the authors' code does when theta would be 1
    similarity: str = "ms_ssim"  # of two changes of the noise, see `detection.pairwise_similarity`; tau belongs to it
    num_inference_steps: int = 50  # of the schedule whose first timestep is used
    second_timestep: bool = False  # the authors' code evaluates the initial noise at the second timestep
    margin: float = 0.05  # of similarity, for what need not be tried; infinity: try everything. Ours, for speed
    layers: str = r"^(down_blocks|mid_block)\..*attn2\.to_v$"  # names of the layers, a regular expression


@dataclass(frozen=True)
class Statistics:
    """Activations over ordinary prompts, by layer, and the threshold tau that follows from ordinary prompts too.

    model: `model_hash` of the pipeline; None if unknown.
    similarity: `Config.similarity` that tau was measured with; None if unknown.
    """

    mean: dict[str, torch.Tensor]
    std: dict[str, torch.Tensor]
    tau: float
    model: str | None = None
    similarity: str | None = None

    def tensors(self):
        """Named tensors that hold its activations, for `from_tensors`."""
        kinds = {"mean": self.mean, "std": self.std}
        return {f"{kind} {name}": value for kind, values in kinds.items() for name, value in values.items()}

    def fingerprint(self):
        """16 hex characters that change with any number in it. What else a search depends on is in its `Config`."""
        digest = hashlib.sha256(repr(self.tau).encode())
        for name, value in self.tensors().items():
            digest.update(name.encode() + value.float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path):
        from safetensors.torch import save_file

        about = {"tau": repr(self.tau), "model": self.model or "", "similarity": self.similarity or ""}
        save_file(self.tensors(), path, metadata=about)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise OSError(
                f"Corrupt statistics file {path} ({error}). Make it again: nemo.collect_statistics."
            ) from error
        similarity = about.get("similarity") or None  # files of older versions do not say
        return cls.from_tensors(tensors, float(about["tau"]), about["model"] or None, similarity)

    @classmethod
    def from_tensors(cls, tensors, tau, model, similarity=None):
        """The statistics that `tensors` was called on."""
        kinds = [{k.split(" ")[1]: v for k, v in tensors.items() if k.startswith(kind)} for kind in ("mean ", "std ")]
        return cls(*kinds, tau=tau, model=model, similarity=similarity)


def published_statistics(path, unet, *, similarity=Config.similarity, tau=None):
    """The authors' statistics of SD 1.4 over 50,000 LAION prompts, a `.pt` file; tau is theirs as well: 0.428.

    Their script for tau saves the MS-SSIM of all 45 pairs of 10 seeds of every prompt, and their README says "the mean
    plus one standard deviation" of that file. It evaluates the second timestep under a guidance of 7, where their
    search for neurons has none.

    Only tensors are read from the file (`weights_only`), so it cannot run code.

    Args:
        path: of the file.
        unet: a U-Net of SD 1.4's sizes.
        similarity: as in `Config`, for which tau is; the published one is for "ms_ssim" alone.
        tau: one's own, such as `collect_statistics` measures; needed with any other similarity.

    Raises:
        ValueError: layers of other sizes, or another similarity without a tau.
    """
    if tau is None and similarity != "ms_ssim":
        raise ValueError(
            f"The published tau of {PUBLISHED_TAU} is of the similarity 'ms_ssim', not of {similarity!r}: give a tau "
            "of its own, nemo.collect_statistics(pipe, ordinary_prompts, config).tau."
        )
    mean, std = torch.load(Path(path), weights_only=True)
    layers = value_layers(unet)
    sizes, theirs = [layer.out_features for layer in layers.values()], [len(m) for m in mean]
    if sizes != theirs:
        raise ValueError(f"These statistics are of value layers with {theirs} neurons; this model's have {sizes}.")
    values = [dict(zip(layers, of_layers, strict=True)) for of_layers in (mean, std)]
    return Statistics(*values, tau=PUBLISHED_TAU if tau is None else tau, similarity=similarity)


def value_layers(unet, pattern=Config.layers):
    """Name → value layer, in the order of the forward pass.

    Raises:
        ValueError: no layer has a name that fits the pattern.
    """
    order = ["down_blocks", "mid_block", "up_blocks"]  # the U-Net lists its middle block last
    names = [name for name, _ in unet.named_modules() if re.search(pattern, name)]
    if not names:
        raise ValueError(f"No layer of this {type(unet).__name__} has a name that fits {pattern!r}.")
    return {name: unet.get_submodule(name) for name in sorted(names, key=lambda name: order.index(name.split(".")[0]))}


@torch.no_grad()
def activations(pipe, prompt_embeds, pattern=Config.layers):
    """Layer name → (N, its neurons) float32: mean over tokens of |to_v(embedding)|, for embeddings (N, T, D)."""
    return {
        name: layer(prompt_embeds).float().abs().mean(dim=1)  # (N, T, neurons) → (N, neurons)
        for name, layer in value_layers(pipe.unet, pattern).items()
    }


def collect_statistics(pipe, prompts, config=None, *, tau_prompts=500, batch_size=64, progress=True):
    """Statistics over ordinary prompts; tau over the first `tau_prompts` of them, as it needs the U-Net.

    Every value layer of the U-Net is in it, so that `Config.layers` can choose among them.

    tau is of the most similar pair of seeds of each prompt, the number that it cuts later. The authors' is of all pairs
    (see `published_statistics`), so it is lower: on the testbed it would be 0.53 instead of 0.68.
    """
    config = config or Config()
    parts = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    bar = tqdm(parts, desc="activations of ordinary prompts", disable=not progress)
    collected = [activations(pipe, encode_prompts(pipe, part), r"attn2\.to_v$") for part in bar]
    values = {name: torch.cat([part[name] for part in collected]) for name in collected[0]}  # (prompts, neurons)
    similarity = first_step_similarity(
        pipe,
        prompts[:tau_prompts],
        seeds=config.seeds,
        pairwise=config.similarity,
        num_inference_steps=config.num_inference_steps,
        second_timestep=config.second_timestep,
        batch_size=batch_size,
        progress=progress,
    )
    return Statistics(
        mean={name: value.mean(dim=0).cpu() for name, value in values.items()},
        std={name: value.std(dim=0).cpu() for name, value in values.items()},
        tau=float(similarity.mean() + similarity.std(ddof=1)),
        model=base_hash(pipe),
        similarity=config.similarity,
    )


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
    config = config or Config()
    layers, base = value_layers(pipe.unet, config.layers), base_hash(pipe)
    _check_statistics(base, layers, statistics, config)
    embeds = encode_prompts(pipe, [target.prompt for target in targets]) if prompt_embeds is None else prompt_embeds
    judge = _Judge(pipe, embeds.to(pipe.unet.device, pipe.unet.dtype), layers, statistics.tau, config, batch_size)
    searches = {}
    for i in (i for i, seeds in enumerate(judge.counted) if seeds):
        report = partial(_report, callback, targets[i].id)
        rounds = _rounds(pipe, judge.embeds[i : i + 1], statistics, config, order)
        searches[i] = _search(rounds, layers, judge.counted[i], statistics.tau, config.margin, report)
    none = torch.zeros(sum(layer.out_features for layer in layers.values()), dtype=torch.bool)
    found = {i: none for i in range(len(targets)) if i not in searches}
    requests = {i: next(search) for i, search in searches.items()}
    with tqdm(total=len(targets), initial=len(found), desc="NeMo", disable=not progress) as bar:
        while requests:
            answers = judge.answers(requests)
            ahead = min(MOST_AHEAD, math.ceil(batch_size / len(requests)))  # as many as fill a batch
            for i, (scores, slopes) in answers.items():
                try:
                    requests[i] = searches[i].send((scores, slopes, ahead))
                except StopIteration as end:
                    found[i] = end.value
                    del requests[i]
                    bar.update()
    about = asdict(config) | {"tau": statistics.tau, "order": order}
    return [_edit(base, target, found[i], layers, about) for i, target in enumerate(targets)]


@torch.no_grad()
def localize_one_by_one(pipe, target, statistics, config=None, *, order="ascending", callback=None):
    """`localize_each` for one target without its shortcuts: one set of neurons after the other, on all counted seeds.

    It is there to compare with: the same decisions, up to rounding and `Config.margin`, in more time.
    """
    config = config or Config()
    layers, base = value_layers(pipe.unet, config.layers), base_hash(pipe)
    _check_statistics(base, layers, statistics, config)
    about = asdict(config) | {"tau": statistics.tau, "order": order}
    judge = _Judge(pipe, encode_prompts(pipe, [target.prompt]), layers, statistics.tau, config, len(config.seeds))
    seeds, rounds = judge.counted[0], _rounds(pipe, judge.embeds, statistics, config, order)
    if not seeds:
        return _edit(base, target, torch.zeros_like(rounds.sets[0]), layers, about)
    search = _search(rounds, layers, seeds, statistics.tau, math.inf, partial(_report, callback, target.id))
    embeds, latest, no_slopes = judge.embeds.expand(len(seeds), -1, -1), None, torch.zeros(rounds.sets.shape[1])
    asked = next(search)
    try:
        while True:
            if latest is None or not torch.equal(latest, asked.sets[0]):
                latest = asked.sets[0]
                with blocked(layers, latest.expand(len(seeds), -1)):
                    maps = first_step_change(pipe, embeds, judge.noise[seeds], judge.t)
                scores = judge.similarity(maps, judge.unblocked[0, seeds]).cpu()
            asked = search.send((scores[[seeds.index(seed) for seed in asked.seeds]], no_slopes, 1))
    except StopIteration as end:
        return _edit(base, target, end.value, layers, about)


def neurons(edit):
    """Layer name → list of the neurons that an edit by NeMo blocks."""
    return {name.removesuffix(".weight"): mask.nonzero()[:, 0].tolist() for name, mask in edit.masks.items()}


def blocked(layers, sets):
    """Within it row i of a batch runs with the neurons sets[i] blocked: (B, neurons) bool over all layers."""
    return multiplied(layers, (~sets).float())


@contextmanager
def multiplied(layers, factors):
    """Within it the outputs of the layers' neurons are multiplied: (B, neurons) float over all layers."""
    widths = [layer.out_features for layer in layers.values()]
    with ExitStack() as hooks:
        for layer, factor in zip(layers.values(), factors.split(widths, dim=1), strict=True):
            factor = factor[:, None].to(layer.weight)  # (B, 1, neurons of the layer)
            hooks.enter_context(layer.register_forward_hook(lambda layer, args, out, factor=factor: out * factor))
        yield


@contextmanager
def recorded(modules):
    """Yields a list to which each module adds itself and its output, a tensor or a nested tuple of tensors."""
    outputs = []
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(lambda m, args, out: outputs.append((m, out))))
        yield outputs


@contextmanager
def replayed(modules, outputs):
    """Within it these modules do not run, but return the outputs given."""
    for module, output in zip(modules, outputs, strict=True):
        module.forward = lambda *args, output=output, **kwargs: output
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def parts(unet):
    """The layers that a U-Net's blocks are made of, which run one after the other."""
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    kinds = (ResnetBlock2D, Transformer2DModel, Downsample2D, Upsample2D)
    return [module for module in unet.modules() if isinstance(module, kinds)]


def _stacked(outputs):
    """One output with a row for each of the given ones (without rows), whatever their nesting."""
    if isinstance(outputs[0], tuple):
        return tuple(_stacked(of_rows) for of_rows in zip(*outputs, strict=True))
    return torch.stack(outputs)


def _row(output, number):
    return tuple(_row(part, number) for part in output) if isinstance(output, tuple) else output[number]


# --- The search of one target, as a coroutine ----------------------------------------------------------------------
# It yields a _Request and is sent three things: the scores (R,) of its rows; the slopes (neurons,) if asked for, which
# say how fast the score of the highest row rises as a neuron is unblocked; and how many rows to ask for next.


class _Request(NamedTuple):
    sets: torch.Tensor  # (R, neurons)
    seeds: list[int]  # R, one for each set
    base: torch.Tensor | None = None  # (neurons,), a set that many requests share their first layers with
    slopes_below: float | None = None  # slopes are wanted if every score is below this


def _on_seeds(candidate, seeds, slopes_below, base=None):
    return _Request(candidate.expand(len(seeds), -1), seeds, base, slopes_below)


class _Rounds(NamedTuple):
    """The initial selection, round by round (R): sets of neurons, and when refinement tries each of its layer."""

    sets: torch.Tensor  # (R, neurons) bool
    turns: torch.Tensor  # (R, neurons), lowest first; to compare within a layer


def _rounds(pipe, prompt_embeds, statistics, config, order):
    """`_Rounds` for one embedding (1, T, D)."""
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
    return _Rounds(*(torch.cat(parts).unflatten(0, (config.rounds, -1)) for parts in (sets, turns)))


def _search(rounds, layers, seeds, tau, margin, report):
    """Returns the set (neurons,) that stays blocked."""
    number, scores, slopes, tau = yield from _select(rounds.sets, seeds, tau, report)
    chosen, turns = rounds.sets[number], rounds.turns[number]
    members = torch.arange(len(chosen)).split([layer.out_features for layer in layers.values()])
    unblock = partial(_unblock, chosen, seeds, tau, margin, report)
    whole = [layer for layer in reversed(members) if chosen[layer].any()]
    chosen, scores, slopes = yield from unblock("layers", chosen, scores, slopes, whole)
    members = [layer[turns[layer].argsort()] for layer in members]
    single = [neuron for layer in reversed(members) for neuron in layer[chosen[layer]].split(1)]
    chosen, scores, slopes = yield from unblock("neurons", chosen, scores, slopes, single)
    return chosen


def _select(rounds, seeds, tau, report):
    """Number of the first round with all seeds below tau, its scores and slopes; else the last, its score as new tau.

    rounds: their sets (R, neurons).
    """
    position, ahead, order = 0, 1, seeds  # the seed that was above tau last comes first
    while position < len(rounds):
        sets = rounds[position : position + ahead]
        of_sets, _, ahead = yield _Request(sets, order[:1] * len(sets))
        for number, (candidate, score) in enumerate(zip(sets, of_sets.tolist(), strict=True), start=position):
            for some in (order[1:4], seeds):
                if score < tau and some:
                    scores, slopes, ahead = yield _on_seeds(candidate, some, tau if some is seeds else -math.inf)
                    score, highest = scores.max().item(), some[scores.argmax()]
                    order = sorted(order, key=lambda seed: seed != highest)
            report("selection", candidate, score, tau)
            if score < tau:
                return number, scores, slopes, tau
        position += len(sets)
    scores, slopes, _ = yield _on_seeds(rounds[-1], seeds, math.inf)
    return len(rounds) - 1, scores, slopes, scores.max().item()


def _unblock(base, seeds, tau, margin, report, stage, chosen, scores, slopes, groups):
    """Unblock one group of neurons after the other, keeping it unblocked where the score stays below tau.

    Returns the set that stays blocked, and the scores and slopes under it.
    """
    position, ahead, verify_after = 0, 1, VERIFY_AFTER
    verified, watched = chosen, _watched(seeds, scores, tau - margin)
    decisions = []  # (set, score), since all seeds were tried on the set `verified`
    while True:
        below = [number for number, (_, score) in enumerate(decisions) if score < tau]
        chosen, level = decisions[below[-1]] if below else (verified, scores.max().item())
        if position == len(groups) or len(below) >= verify_after:
            if below:
                new_scores, new_slopes, ahead = yield _on_seeds(chosen, seeds, tau, base)
                if new_scores.max() >= tau:
                    missed, verify_after = seeds[new_scores.argmax()], VERIFY_AFTER
                    sets = torch.stack([decisions[number][0] for number in below])
                    of_missed, _, ahead = yield _Request(sets, [missed] * len(below), base)
                    for number, score in zip(below, of_missed.tolist(), strict=True):
                        decisions[number] = decisions[number][0], max(decisions[number][1], score)
                    first = next((number for number in below if decisions[number][1] >= tau), below[-1])
                    position -= len(decisions) - first - 1
                    decisions = [*decisions[:first], (decisions[first][0], new_scores.max().item())]
                    watched = watched + [missed] * (missed not in watched)
                    continue
                scores, slopes, verify_after = new_scores, new_slopes, 2 * verify_after
            for candidate, score in decisions:
                report(stage, candidate, score, tau)
            if position == len(groups):
                return chosen, scores, slopes
            verified, watched, decisions = chosen, _watched(seeds, scores, tau - margin), []
            level = scores.max().item()
        plan = _plan(groups[position:], chosen, level, slopes, tau, margin, watched, ahead)
        rows = [(candidate, seed) for candidate, _, tried in plan for seed in tried]
        if rows:
            sets, of_rows = zip(*rows, strict=True)
            answers, _, ahead = yield _Request(torch.stack(sets), list(of_rows), base)
            of_plan = answers.split([len(tried) for _, _, tried in plan])
        for number, (candidate, guess, tried) in enumerate(plan):
            score = of_plan[number].max().item() if tried else guess
            rest = watched[len(tried) :] if tried and score < tau else []
            if rest:
                answers, _, ahead = yield _Request(candidate.expand(len(rest), -1), rest, base)
                score = max(score, answers.max().item())
            decisions.append((candidate, score))
            position += 1
            if (score < tau) != (guess < tau):  # what comes after this set was planned under a wrong guess
                break


def _plan(groups, chosen, level, slopes, tau, margin, watched, ahead):
    """The next sets: (set, the score that it is guessed to have from the slopes, seeds to try it on).

    A set that is guessed to be below tau by more than the margin is not tried; the highest seed is enough for one that
    is guessed to be above. They are as many as have `ahead` seeds to try, or fewer if one is too close to tau to guess
    on from there.
    """
    plan, rows = [], 0
    for group in groups:
        rise = slopes[group].sum().item()
        candidate, guess = chosen.clone(), level + rise
        candidate[group] = False
        if guess + margin < tau:
            tried = []
        else:
            tried = watched if guess < tau else watched[:1]
        plan.append((candidate, guess, tried))
        rows += len(tried)
        too_close = abs(guess - tau) < max(DOUBT, abs(rise) / 2)
        if rows >= ahead or too_close and rows >= ahead / 4:
            break
        if guess < tau:
            chosen, level = candidate, guess
    return plan


def _watched(seeds, scores, threshold):
    """The seeds that score at least the threshold, or the one that scores highest; the highest first."""
    order = scores.argsort(descending=True).tolist()
    return [seeds[i] for i in order if scores[i] >= threshold or i == order[0]]


def _report(callback, target, stage, candidate, score, threshold):
    if callback is not None:
        about = {"target": target, "stage": stage, "blocked": int(candidate.sum())}
        callback(about | {"score": score, "threshold": threshold})


# --- The judge: memorization scores of many sets for many targets in few batches -----------------------------------


class _Judge:
    """Memorization scores. counted[i]: the seeds of target i that count, the most telling one first."""

    def __init__(self, pipe, prompt_embeds, layers, tau, config, batch_size):
        self.pipe, self.layers, self.batch_size = pipe, layers, batch_size
        self.kind = config.similarity
        self.t = ddim(pipe, config.num_inference_steps).timesteps[int(config.second_timestep)]
        self.embeds, self.noise = prompt_embeds, initial_latents(pipe, config.seeds)
        with recorded(parts(pipe.unet)) as outputs:
            first_step_change(pipe, self.embeds[:1], self.noise[:1], self.t)
        self.parts = [module for module, _ in outputs]  # in the order in which they run
        widths = [layer.out_features for layer in layers.values()]
        first = torch.tensor([self._part_of(layer) for layer in layers.values()])
        self.part_of_neuron = first.repeat_interleave(torch.tensor(widths))  # (neurons,)
        self.known = {}  # target → base, and of each counted seed what every part gave under it
        everything = torch.cartesian_prod(torch.arange(len(prompt_embeds)), torch.arange(len(self.noise)))
        nothing = torch.zeros(len(everything), sum(widths), dtype=torch.bool)
        self.unblocked = self._changes(everything, nothing).unflatten(0, (len(self.embeds), -1))  # (N, S, C, H, W)
        self.counted = [_counted_seeds(maps, tau, config.similarity) for maps in self.unblocked]

    def answers(self, requests):
        """Target → `_Request` to target → scores (R,), and slopes (neurons,) or None."""
        for i, asked in requests.items():
            if asked.base is not None and i not in self.known:
                self.known[i] = asked.base, self._record(i, asked.base)
        rows = torch.tensor([(i, seed) for i, asked in requests.items() for seed in asked.seeds])
        maps = self._changes(rows, torch.cat([asked.sets for asked in requests.values()]))
        scores = self._similarity(maps, rows).cpu().split([len(asked.seeds) for asked in requests.values()])
        scores = dict(zip(requests, scores, strict=True))
        below = {i: asked.slopes_below for i, asked in requests.items() if asked.slopes_below is not None}
        with_slopes = {i: scores[i].argmax().item() for i, limit in below.items() if scores[i].max() < limit}
        highest = {i: (requests[i].sets[row], requests[i].seeds[row]) for i, row in with_slopes.items()}
        slopes = self._slopes(highest) if highest else {}
        return {i: (scores[i], slopes.get(i)) for i in requests}

    def similarity(self, maps, unblocked):
        """Scores (B,) of changes under blocking (B, C, H, W), against those of the same seeds without."""
        scores = rowwise_similarity(maps, unblocked, self.kind)
        if not scores.isfinite().all():
            raise FloatingPointError("A memorization score is not a number. Check the weights; try float32.")
        return scores

    def _similarity(self, maps, rows):
        return self.similarity(maps, self.unblocked[rows[:, 0], rows[:, 1]])

    @torch.enable_grad()
    def _slopes(self, points):
        """Target → (set, seed) to target → derivative of the score by how far each neuron is unblocked (neurons,)."""
        rows = torch.tensor([(i, seed) for i, (_, seed) in points.items()])
        factors, slopes = torch.stack([~off for off, _ in points.values()]).float(), []
        some = max(1, self.batch_size // 8)  # a gradient takes several times the memory
        for row, factor in zip(rows.split(some), factors.split(some), strict=True):
            factor.requires_grad_()
            with multiplied(self.layers, factor):
                maps = first_step_change(self.pipe, self.embeds[row[:, 0]], self.noise[row[:, 1]], self.t)
            slopes += torch.autograd.grad(self._similarity(maps, row).sum(), factor)[0]
        return dict(zip(points, slopes, strict=True))

    def _changes(self, rows, sets):
        """First-step changes (B, C, H, W) of rows (B, 2), target and seed, under sets (B, neurons)."""
        counts = torch.tensor([self._known_parts(int(i), off) for i, off in zip(rows[:, 0], sets, strict=True)])
        order, changes = counts.argsort(stable=True), []
        for batch in order.tensor_split(math.ceil(len(order) / self.batch_size)):
            row, count = rows[batch], int(counts[batch].min())
            records = [self.known[i][1][seed][:count] if count else () for i, seed in row.tolist()]
            outputs = [_stacked(of_rows) for of_rows in zip(*records, strict=True)]  # part by part
            with blocked(self.layers, sets[batch]), replayed(self.parts[:count], outputs):
                changes.append(first_step_change(self.pipe, self.embeds[row[:, 0]], self.noise[row[:, 1]], self.t))
        return torch.cat(changes)[order.argsort()]

    def _part_of(self, layer):
        """The number of the part that has the layer in it; 0, so that nothing before it is known, if none has."""
        return next((number for number, part in enumerate(self.parts) if layer in part.modules()), 0)

    def _known_parts(self, i, off):
        """How many parts, from the first, give under the set `off` what they gave when target i was recorded."""
        if i not in self.known:
            return 0
        differs = self.part_of_neuron[off != self.known[i][0]]
        return int(differs.min()) if len(differs) else len(self.parts)

    def _record(self, i, base):
        seeds = self.counted[i]
        with blocked(self.layers, base.expand(len(seeds), -1)), recorded(self.parts) as outputs:
            first_step_change(self.pipe, self.embeds[i].expand(len(seeds), -1, -1), self.noise[seeds], self.t)
        return {seed: [_row(output, row) for _, output in outputs] for row, seed in enumerate(seeds)}


def _counted_seeds(maps, tau, similarity):
    """The seeds whose map (S, C, H, W) is more similar than tau to another seed's, the most similar first."""
    pairs = torch.combinations(torch.arange(len(maps)))
    values = pairwise_similarity(maps, similarity).cpu()
    highest = torch.stack([values[(pairs == seed).any(dim=1)].max() for seed in range(len(maps))])
    return [int(seed) for seed in highest.argsort(descending=True) if highest[seed] > tau]


def _check_statistics(base, layers, statistics, config):
    if statistics.model is not None and todays_hash(statistics.model) != base:
        raise ValueError(
            f"These statistics are of a model with the hash {statistics.model}, this one's is {base}. "
            "Collect them for this one: nemo.collect_statistics(pipe, ordinary_prompts)."
        )
    if statistics.similarity not in (None, config.similarity):
        raise ValueError(
            f"The tau of these statistics is of the similarity {statistics.similarity!r}, and config.similarity is "
            f"{config.similarity!r}: a tau belongs to one. Collect them with this config, nemo.collect_statistics, or "
            "give published_statistics a tau of its own."
        )
    for name, layer in layers.items():
        if name not in statistics.mean or len(statistics.mean[name]) != layer.out_features:
            raise ValueError(f"These statistics have no layer {name} of {layer.out_features} neurons.")


def _edit(base, target, chosen, layers, about):
    parts = chosen.split([layer.out_features for layer in layers.values()])
    masks = {f"{name}.weight": off[:, None] for name, off in zip(layers, parts, strict=True)}
    return Edit("NeMo", base, about, [target.id], masks)
