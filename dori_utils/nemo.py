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

tau is the mean plus one standard deviation of first-step similarity over ordinary prompts (`collect_statistics`).

The decisions are those of trying one set after the other, but sets do not go through the U-Net one by one. All targets
search at once; each asks for several sets ahead, guessing that its next decisions will be like its last; one seed above
tau decides against a set, so in selection all seeds are tried only where the most telling one is below; and as
refinement goes from the last layer to the first, whatever comes before that layer in the U-Net is not run again, but
gives what it gave under the initial selection (`replayed`). Each set of a batch blocks its own neurons, by a hook.

In refinement only those seeds are watched at every decision that were within `Config.margin` of tau when all were
tried last. All are tried again after `VERIFY_AFTER` decisions to unblock and at the end; if another one is not below
tau then, it is watched too, and the decisions since are taken anew. So the result always has every seed below tau, but
a seed that leaps over tau and back between two such points is missed; `localize_one_by_one` tries everything.

Shapes: N prompts, S seeds; M sets of neurons (M, neurons) bool over all layers, one after the other.
"""

import hashlib
import math
import re
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .detection import PAIRWISE, ddim, first_step_change, first_step_similarity, pairwise_similarity
from .edits import Edit, base_hash, union
from .generation import encode_prompts, initial_latents

MOST_AHEAD = 32  # sets that a target asks for at once
VERIFY_AFTER = 32  # decisions to unblock, after which all seeds are tried


@dataclass(frozen=True)
class Config:
    """Settings; those of the paper are the default."""

    seeds: tuple[int, ...] = tuple(range(10))
    first_theta: float = 5.0
    theta_step: float = 0.25  # down each round, while k goes up by one
    min_theta: float = 1.0
    rounds: int = 16  # then selection gives up and tau becomes its score; the authors' code does when theta would be 1
    similarity: str = "ms_ssim"  # of two changes of the noise, see `detection.pairwise_similarity`
    num_inference_steps: int = 50  # of the schedule whose first timestep is used
    second_timestep: bool = False  # the authors' code evaluates the initial noise at the second timestep
    margin: float = 0.05  # of similarity, for seeds that need not be watched; infinity: watch all. Ours, for speed
    layers: str = r"^(down_blocks|mid_block)\..*attn2\.to_v$"  # names of the layers, a regular expression


@dataclass(frozen=True)
class Statistics:
    """Activations over ordinary prompts, by layer, and the threshold tau that follows from ordinary prompts too.

    model: `model_hash` of the pipeline; None if unknown.
    """

    mean: dict[str, torch.Tensor]
    std: dict[str, torch.Tensor]
    tau: float
    model: str | None = None

    def _tensors(self):
        kinds = {"mean": self.mean, "std": self.std}
        return {f"{kind} {name}": value for kind, values in kinds.items() for name, value in values.items()}

    def fingerprint(self):
        """16 hex characters that change with any number in it."""
        digest = hashlib.sha256(repr(self.tau).encode())
        for name, value in self._tensors().items():
            digest.update(name.encode() + value.float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path):
        from safetensors.torch import save_file

        tensors = self._tensors()
        save_file(tensors, path, metadata={"tau": repr(self.tau), "model": self.model or ""})

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
        kinds = [{k.split(" ")[1]: v for k, v in tensors.items() if k.startswith(kind)} for kind in ("mean ", "std ")]
        return cls(*kinds, tau=float(about["tau"]), model=about["model"] or None)


def published_statistics(path, unet, tau=0.428):
    """The authors' statistics of SD 1.4 over 50,000 LAION prompts, a `.pt` file; tau is theirs as well.

    Only tensors are read from the file (`weights_only`), so it cannot run code.
    """
    mean, std = torch.load(Path(path), weights_only=True)
    layers = value_layers(unet)
    sizes, theirs = [layer.out_features for layer in layers.values()], [len(m) for m in mean]
    if sizes != theirs:
        raise ValueError(f"These statistics are of value layers with {theirs} neurons; this model's have {sizes}.")
    return Statistics(dict(zip(layers, mean, strict=True)), dict(zip(layers, std, strict=True)), tau)


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
    )


def localize(pipe, targets, statistics, config=None, **kwargs):
    """One edit for a set of targets: all neurons that any of them needs blocked. See `localize_each`."""
    return union(localize_each(pipe, targets, statistics, config, **kwargs))


@torch.no_grad()
def localize_each(pipe, targets, statistics, config=None, *, batch_size=64, progress=True, callback=None):
    """One edit for each target: the neurons that must be blocked so that its prompt no longer replicates.

    Args:
        pipe: a `StableDiffusionPipeline`, without an edit applied to it.
        targets: N `Target`s; only their prompts are used.
        statistics: `Statistics` of this model.
        config: a `Config`.
        batch_size: rows (a set of neurons and a seed) in one batch of the U-Net.
        callback: called with {"target", "stage", "blocked", "score", "threshold"} for every decision. blocked is how
            many neurons the set has; the score is over the seeds that were tried.

    Returns:
        List of N edits; a prompt that is not memorized has one without any neuron.

    Raises:
        ValueError: statistics of another model, or without this model's layers.
        FloatingPointError: a score is not a number.
    """
    config = config or Config()
    layers, base = value_layers(pipe.unet, config.layers), base_hash(pipe)
    _check_statistics(base, layers, statistics)
    judge = _Judge(pipe, [target.prompt for target in targets], layers, statistics.tau, config, batch_size)
    memorized = [i for i in range(len(targets)) if judge.counted[i]]
    most_ahead = min(MOST_AHEAD, max(1, batch_size // (2 * len(memorized) or 1)))  # a batch is full without more
    searches = {}
    for i in memorized:
        report = partial(_report, callback, targets[i].id)
        rounds = _rounds(pipe, targets[i].prompt, layers, statistics, config)
        searches[i] = _search(rounds, layers, judge.counted[i], statistics.tau, config.margin, report, most_ahead)
    none = torch.zeros(sum(layer.out_features for layer in layers.values()), dtype=torch.bool)
    found = {i: none for i in range(len(targets)) if i not in searches}
    requests = {i: next(search) for i, search in searches.items()}
    with tqdm(total=len(targets), initial=len(found), desc="NeMo", disable=not progress) as bar:
        while requests:
            scores = judge.scores(requests)
            for i in list(requests):
                try:
                    requests[i] = searches[i].send(scores[i])
                except StopIteration as end:
                    found[i] = end.value
                    del requests[i]
                    bar.update()
    return [_edit(base, target, found[i], layers, statistics, config) for i, target in enumerate(targets)]


@torch.no_grad()
def localize_one_by_one(pipe, target, statistics, config=None):
    """`localize_each` for one target without its shortcuts: one set of neurons after the other, on all counted seeds.

    It is there to compare with: the same decisions, up to rounding and `Config.margin`, in more time.
    """
    config = config or Config()
    layers = value_layers(pipe.unet, config.layers)
    _check_statistics(base_hash(pipe), layers, statistics)
    judge = _Judge(pipe, [target.prompt], layers, statistics.tau, config, len(config.seeds))
    seeds, rounds = judge.counted[0], _rounds(pipe, target.prompt, layers, statistics, config)
    if not seeds:
        return _edit(base_hash(pipe), target, torch.zeros_like(rounds[0]), layers, statistics, config)
    report = partial(_report, None, target.id)
    search = _search(rounds, layers, seeds, statistics.tau, math.inf, report, most_ahead=1)
    embeds, latest = judge.embeds.expand(len(seeds), -1, -1), None
    sets, asked, _ = next(search)
    try:
        while True:
            if latest is None or not torch.equal(latest, sets[0]):
                latest = sets[0]
                with blocked(layers, latest.expand(len(seeds), -1)):
                    maps = first_step_change(pipe, embeds, judge.noise[seeds], judge.t)
                scores = _finite(judge.compare(maps, judge.unblocked[0, seeds])).cpu()
            sets, asked, _ = search.send(scores[None, [seeds.index(seed) for seed in asked]])
    except StopIteration as end:
        return _edit(base_hash(pipe), target, end.value, layers, statistics, config)


def neurons(edit):
    """Layer name → list of the neurons that an edit by NeMo blocks."""
    return {name.removesuffix(".weight"): mask.nonzero()[:, 0].tolist() for name, mask in edit.masks.items()}


@contextmanager
def blocked(layers, sets):
    """Within it row i of a batch runs with the neurons sets[i] blocked: (B, neurons) bool over all layers."""
    widths = [layer.out_features for layer in layers.values()]
    with ExitStack() as hooks:
        for layer, off in zip(layers.values(), sets.split(widths, dim=1), strict=True):
            off = off[:, None].to(layer.weight.device)  # (B, 1, neurons of the layer)
            hook = layer.register_forward_hook(lambda layer, args, out, off=off: out.masked_fill(off, 0))
            hooks.enter_context(hook)
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
# It yields (sets (M, neurons), seeds, base) and is sent the sets' scores on these seeds (M, seeds). base is a set that
# these and many later ones share their first layers with, or None.


def _rounds(pipe, prompt, layers, statistics, config):
    """The sets of neurons (rounds, neurons) of the initial selection, round by round."""
    values = activations(pipe, encode_prompts(pipe, [prompt]), config.layers)
    values = {name: value[0].cpu() for name, value in values.items()}
    rounds = []
    for k in range(config.rounds):
        theta = max(config.min_theta, config.first_theta - k * config.theta_step)
        parts = []
        for name, value in values.items():
            off = (value - statistics.mean[name]).abs() / statistics.std[name] > theta
            off[value.topk(min(k, len(value))).indices] = True
            parts.append(off)
        rounds.append(torch.cat(parts))
    return torch.stack(rounds)


def _search(rounds, layers, seeds, tau, margin, report, most_ahead):
    """Returns the set (neurons,) that stays blocked."""
    chosen, scores, tau = yield from _select(rounds, seeds, tau, report, most_ahead)
    members = torch.arange(len(chosen)).split([layer.out_features for layer in layers.values()])
    unblock = partial(_unblock, chosen, seeds, tau, margin, report, most_ahead)
    whole = [layer for layer in reversed(members) if chosen[layer].any()]
    chosen, scores = yield from unblock("layers", chosen, scores, whole)
    single = [neuron for layer in reversed(members) for neuron in layer[chosen[layer]].split(1)]
    chosen, scores = yield from unblock("neurons", chosen, scores, single)
    return chosen


def _select(rounds, seeds, tau, report, most_ahead):
    """The first round with all seeds below tau, and their scores; else the last, and its score as the new tau."""
    position, ahead, telling = 0, 1, seeds[:1]
    while position < len(rounds):
        sets = rounds[position : position + ahead]
        scores = yield sets, telling, None
        for candidate, score in zip(sets, scores.amax(dim=1).tolist(), strict=True):
            if score < tau:
                (scores,) = yield candidate[None], seeds, None
                score = scores.max().item()
            report("selection", candidate, score, tau)
            if score < tau:
                return candidate, scores, tau
        position, ahead = position + len(sets), min(2 * ahead, most_ahead)
    (scores,) = yield rounds[-1:], seeds, None
    return rounds[-1], scores, scores.max().item()


def _unblock(base, seeds, tau, margin, report, most_ahead, stage, chosen, scores, groups):
    """Unblock one group of neurons after the other, keeping it unblocked where the score stays below tau.

    Returns the set that stays blocked, and the scores of all seeds under it.
    """
    tried_on_all, watched = (0, chosen), _watched(seeds, scores, tau - margin)
    position, ahead, last, unblocked, decisions = 0, 1, True, 0, []
    while position < len(groups) or unblocked:
        if position == len(groups) or unblocked >= VERIFY_AFTER:
            (new_scores,) = yield chosen[None], seeds, base
            missed = [s for s, score in zip(seeds, new_scores, strict=True) if score >= tau and s not in watched]
            if missed:
                position, chosen = tried_on_all
                watched, ahead, last = watched + missed, 1, True
            else:
                for candidate, score in decisions:
                    report(stage, candidate, score, tau)
                scores, tried_on_all = new_scores, (position, chosen)
                watched = _watched(seeds, scores, tau - margin)
            unblocked, decisions = 0, []
            continue
        sets, guessed = [], chosen
        for group in groups[position : position + ahead]:  # as they would come if all decisions were like the last
            candidate = guessed.clone()
            candidate[group] = False
            sets.append(candidate)
            guessed = candidate if last else chosen
        of_sets = yield torch.stack(sets), watched, base
        ahead = min(2 * ahead, most_ahead)
        for candidate, score in zip(sets, of_sets.amax(dim=1).tolist(), strict=True):
            decisions.append((candidate, score))
            position += 1
            if score < tau:
                chosen, unblocked = candidate, unblocked + 1
            if (score < tau) != last:  # the sets after this one were asked for under a wrong guess
                last, ahead = score < tau, 1
                break
    for candidate, score in decisions:
        report(stage, candidate, score, tau)
    return chosen, scores


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

    def __init__(self, pipe, prompts, layers, tau, config, batch_size):
        self.pipe, self.layers, self.batch_size = pipe, layers, batch_size
        self.compare = PAIRWISE[config.similarity][1]
        self.t = ddim(pipe, config.num_inference_steps).timesteps[int(config.second_timestep)]
        self.embeds, self.noise = encode_prompts(pipe, prompts), initial_latents(pipe, config.seeds)
        with recorded(parts(pipe.unet)) as outputs:
            first_step_change(pipe, self.embeds[:1], self.noise[:1], self.t)
        self.parts = [module for module, _ in outputs]  # in the order in which they run
        widths = [layer.out_features for layer in layers.values()]
        first = torch.tensor([self._part_of(layer) for layer in layers.values()])
        self.part_of_neuron = first.repeat_interleave(torch.tensor(widths))  # (neurons,)
        self.known = {}  # target → base, and of each counted seed what every part gave under it
        everything = torch.cartesian_prod(torch.arange(len(prompts)), torch.arange(len(self.noise)))
        nothing = torch.zeros(len(everything), sum(widths), dtype=torch.bool)
        self.unblocked = self._changes(everything, nothing).unflatten(0, (len(prompts), -1))  # (N, S, C, H, W)
        self.counted = [_counted_seeds(maps, tau, config.similarity) for maps in self.unblocked]

    def scores(self, requests):
        """Target → (sets (M, neurons), seeds, base) to target → scores (M, seeds)."""
        for i, (_, _, base) in requests.items():
            if base is not None and i not in self.known:
                self.known[i] = base, self._record(i, base)
        rows = torch.tensor([(i, seed) for i, (sets, seeds, _) in requests.items() for _ in sets for seed in seeds])
        sets = torch.cat([sets.repeat_interleave(len(seeds), dim=0) for sets, seeds, _ in requests.values()])
        similarity = _finite(self.compare(self._changes(rows, sets), self.unblocked[rows[:, 0], rows[:, 1]])).cpu()
        counts = [len(sets) * len(seeds) for sets, seeds, _ in requests.values()]
        return {
            i: scores.unflatten(0, (-1, len(seeds)))
            for (i, (_, seeds, _)), scores in zip(requests.items(), similarity.split(counts), strict=True)
        }

    def _changes(self, rows, sets):
        """First-step changes (B, C, H, W) of rows (B, 2), target and seed, under sets (B, neurons)."""
        counts = torch.tensor([self._known_parts(int(i), off) for i, off in zip(rows[:, 0], sets, strict=True)])
        order, changes = counts.argsort(stable=True), []
        for batch in order.split(self.batch_size):
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


def _finite(scores):
    if not scores.isfinite().all():
        raise FloatingPointError("A memorization score is not a number. Check the weights; try float32.")
    return scores


def _counted_seeds(maps, tau, similarity):
    """The seeds whose map (S, C, H, W) is more similar than tau to another seed's, the most similar first."""
    pairs = torch.combinations(torch.arange(len(maps)))
    values = pairwise_similarity(maps, similarity).cpu()
    highest = torch.stack([values[(pairs == seed).any(dim=1)].max() for seed in range(len(maps))])
    return [int(seed) for seed in highest.argsort(descending=True) if highest[seed] > tau]


def _check_statistics(base, layers, statistics):
    if statistics.model not in (None, base):
        raise ValueError(
            f"These statistics are of a model with the hash {statistics.model}, this one's is {base}. "
            "Collect them for this one: nemo.collect_statistics(pipe, ordinary_prompts)."
        )
    for name, layer in layers.items():
        if name not in statistics.mean or len(statistics.mean[name]) != layer.out_features:
            raise ValueError(f"These statistics have no layer {name} of {layer.out_features} neurons.")


def _edit(base, target, chosen, layers, statistics, config):
    parts = chosen.split([layer.out_features for layer in layers.values()])
    masks = {f"{name}.weight": off[:, None] for name, off in zip(layers, parts, strict=True)}
    return Edit("NeMo", base, asdict(config) | {"tau": statistics.tau}, [target.id], masks)
