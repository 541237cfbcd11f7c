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
search at once; each asks for several sets ahead, guessing that its next decisions will be like its last; as one seed
above tau decides against a set, the seed that was highest last time is tried before the others; and as refinement goes
from the last layer to the first, the blocks of the U-Net before it are not run again, but give what they gave under the
initial selection (`replayed`). Each set of a batch blocks its own neurons, by a hook (`blocked`).

One thing is taken for granted. While neurons are unblocked one after the other (a run of at most `MOST_AHEAD`), a seed
that is below tau by a margin (`Config.margin`) both before the run and at its end is not tried in between. A seed whose
score leaps up by more than that and back within a run would be missed; `localize_one_by_one` tries everything.

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
    margin: float = 0.05  # of similarity, for seeds that need not be tried; infinity: try all, always. Ours, for speed
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
            many neurons the set has; the score is over the seeds that were tried, one of which is enough to reject.

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
    searches = {}
    for i, target in enumerate(targets):
        if judge.counted[i]:
            report = partial(_report, callback, target.id)
            rounds = _rounds(pipe, target.prompt, layers, statistics, config)
            searches[i] = _search(rounds, layers, statistics.tau, report)
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
    search = _search(rounds, layers, statistics.tau, partial(_report, None, target.id), most_ahead=1)
    ((chosen,), *_) = next(search)
    try:
        while True:
            with blocked(layers, chosen.expand(len(seeds), -1)):
                embeds = judge.embeds.expand(len(seeds), -1, -1)
                maps = first_step_change(pipe, embeds, judge.noise[seeds], judge.t)
            score = _finite(judge.compare(maps, judge.unblocked[0, seeds]).max().item())
            ((chosen,), *_) = search.send([score])
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
def recorded(blocks):
    """Yields a list to which each block adds its output, a tensor or a nested tuple of tensors."""
    outputs = []
    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(lambda block, args, out: outputs.append(out)))
        yield outputs


@contextmanager
def replayed(blocks, outputs):
    """Within it these blocks do not run, but return the outputs given."""
    for block, output in zip(blocks, outputs, strict=True):
        block.forward = lambda *args, output=output, **kwargs: output
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _stacked(outputs):
    """One output with a row for each of the given ones (without rows), whatever their nesting."""
    if isinstance(outputs[0], tuple):
        return tuple(_stacked(parts) for parts in zip(*outputs, strict=True))
    return torch.stack(outputs)


def _row(output, number):
    return tuple(_row(part, number) for part in output) if isinstance(output, tuple) else output[number]


# --- The search of one target, as a coroutine: it yields sets to judge and is sent their scores --------------------


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


def _search(rounds, layers, tau, report, most_ahead=MOST_AHEAD):
    """Yields (sets, threshold, base, run) and is sent the sets' scores; returns the set (neurons,) that stays blocked.

    base is a set that these and many later ones share their first layers with, or None; run says that every set is
    the one before without some neurons.
    """
    chosen, tau = yield from _select(rounds, tau, report, most_ahead)
    members = torch.arange(len(chosen)).split([layer.out_features for layer in layers.values()])
    whole = [layer for layer in reversed(members) if chosen[layer].any()]
    selected = chosen
    chosen = yield from _unblock("layers", chosen, whole, tau, selected, report, most_ahead)
    single = [neuron for layer in reversed(members) for neuron in layer[chosen[layer]].split(1)]
    return (yield from _unblock("neurons", chosen, single, tau, selected, report, most_ahead))


def _select(rounds, tau, report, most_ahead):
    """The first round with a score below tau; else the last, and its score as the new tau."""
    position, ahead = 0, 1
    while position < len(rounds):
        sets = rounds[position : position + ahead]
        scores = yield sets, tau, None, False
        for candidate, score in zip(sets, scores, strict=True):
            report("selection", candidate, score, tau)
            if score < tau:
                return candidate, tau
        position, ahead = position + len(sets), min(2 * ahead, most_ahead)
    (score,) = yield rounds[-1:], float("inf"), None, False  # its score over all seeds
    return rounds[-1], score


def _unblock(stage, chosen, groups, tau, selected, report, most_ahead):
    """Unblock one group of neurons after the other, keeping it unblocked where the score stays below tau."""
    position, ahead, last = 0, 1, True
    while position < len(groups):
        next_groups = groups[position : position + ahead]
        sets, base = [], chosen
        for group in next_groups:  # as they would come if all decisions were like the last
            candidate = base.clone()
            candidate[group] = False
            sets.append(candidate)
            base = candidate if last else chosen
        scores = yield torch.stack(sets), tau, selected, last and stage == "neurons"
        ahead = min(2 * ahead, most_ahead)
        for candidate, score in zip(sets, scores, strict=True):
            report(stage, candidate, score, tau)
            unblocked = score < tau
            chosen = candidate if unblocked else chosen
            position += 1
            if unblocked != last:  # the sets after this one were asked for under a wrong guess
                last, ahead = unblocked, 1
                break
    return chosen


def _report(callback, target, stage, candidate, score, threshold):
    if callback is not None:
        about = {"target": target, "stage": stage, "blocked": int(candidate.sum())}
        callback(about | {"score": score, "threshold": threshold})


# --- The judge: memorization scores of many sets for many targets in few batches -----------------------------------


class _Judge:
    """Memorization scores. counted[i]: the seeds of target i that count, the most telling one first."""

    def __init__(self, pipe, prompts, layers, tau, config, batch_size):
        self.pipe, self.layers, self.batch_size = pipe, layers, batch_size
        self.compare, self.margin = PAIRWISE[config.similarity][1], config.margin
        self.t = ddim(pipe, config.num_inference_steps).timesteps[int(config.second_timestep)]
        self.embeds, self.noise = encode_prompts(pipe, prompts), initial_latents(pipe, config.seeds)
        unet = pipe.unet
        self.blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        inside = [[b for b, block in enumerate(self.blocks) if layer in block.modules()] for layer in layers.values()]
        widths = torch.tensor([layer.out_features for layer in layers.values()])
        self.block_of_neuron = torch.tensor(inside).flatten().repeat_interleave(widths)  # (neurons,)
        self.latest = [{} for _ in prompts]  # target → seed → its last score under a set that might stay
        self.recorded = {}  # target → base, and what every block gave under it: for each seed, for each block
        everything = torch.cartesian_prod(torch.arange(len(prompts)), torch.arange(len(self.noise)))
        nothing = torch.zeros(len(everything), int(widths.sum()), dtype=torch.bool)
        self.unblocked = self._changes(everything, nothing).unflatten(0, (len(prompts), -1))  # (N, S, C, H, W)
        self.counted = [_counted_seeds(maps, tau, config.similarity) for maps in self.unblocked]

    def scores(self, requests):
        """Target → (sets (M, neurons), threshold, base, run) to target → list of M scores.

        A score is the largest over the counted seeds that were tried. Those are all where it is below the threshold,
        but for the seeds that a run lets out. Of a run, scores after the first that is not below mean nothing.
        """
        for i, (_, _, base, _) in requests.items():
            if base is not None and i not in self.recorded:
                self.recorded[i] = base, self._record(i, base)
        tried = {i: [{} for _ in sets] for i, (sets, *_) in requests.items()}  # target → for each set: seed → score
        needed = [(i, c, self.counted[i][0]) for i, (sets, *_) in requests.items() for c in range(len(sets))]
        while needed:
            self._try(needed, requests, tried)
            needed = [
                case
                for i, (_, threshold, _, run) in requests.items()
                for case in self._needed(i, tried[i], threshold, run)
            ]
        for i, (_, threshold, _, run) in requests.items():
            if accepted := _below(tried[i], threshold, run):
                self.latest[i] |= tried[i][accepted[-1 if run else 0]]
        return {i: [max(scores.values()) for scores in of_target] for i, of_target in tried.items()}

    def _needed(self, i, tried, threshold, run):
        """The cases (target, number of the set, seed) without which the target's sets cannot be decided on yet."""
        seeds, below = self.counted[i], _below(tried, threshold, run)
        if not run:
            return [(i, c, seed) for c in below for seed in seeds if seed not in tried[c]]
        if not below:
            return []
        *between, end = below
        if missing := [(i, end, seed) for seed in seeds if seed not in tried[end]]:
            return missing
        doubtful = [s for s in seeds if max(tried[end][s], self.latest[i].get(s, 1)) >= threshold - self.margin]
        return [(i, c, seed) for c in between for seed in doubtful if seed not in tried[c]]

    def _try(self, cases, requests, tried):
        """Scores of cases (target, number of the set, seed), into `tried`."""
        if not cases:
            return
        rows = torch.tensor([(i, seed) for i, _, seed in cases])
        maps = self._changes(rows, torch.stack([requests[i][0][c] for i, c, _ in cases]))
        similarity = self.compare(maps, self.unblocked[rows[:, 0], rows[:, 1]]).tolist()
        for (i, c, seed), value in zip(cases, similarity, strict=True):
            if _finite(value) > max(tried[i][c].values(), default=-float("inf")):
                self.counted[i].remove(seed)
                self.counted[i].insert(0, seed)
            tried[i][c][seed] = value

    def _changes(self, rows, sets):
        """First-step changes (B, C, H, W) of rows (B, 2), target and seed, under sets (B, neurons)."""
        known = torch.tensor([self._known_blocks(int(i), off) for i, off in zip(rows[:, 0], sets, strict=True)])
        order, parts = known.argsort(stable=True), []
        for batch in order.split(self.batch_size):
            row, count = rows[batch], int(known[batch].min())
            records = [self.recorded[i][1][seed][:count] if count else () for i, seed in row.tolist()]
            outputs = [_stacked(of_rows) for of_rows in zip(*records, strict=True)]  # block by block
            with blocked(self.layers, sets[batch]), replayed(self.blocks[:count], outputs):
                parts.append(first_step_change(self.pipe, self.embeds[row[:, 0]], self.noise[row[:, 1]], self.t))
        return torch.cat(parts)[order.argsort()]

    def _known_blocks(self, i, off):
        """How many blocks, from the first, give under the set `off` what they gave when target i was recorded."""
        if i not in self.recorded:
            return 0
        differs = self.block_of_neuron[off != self.recorded[i][0]]
        return int(differs.min()) if len(differs) else len(self.blocks)

    def _record(self, i, base):
        count = len(self.noise)
        with blocked(self.layers, base.expand(count, -1)), recorded(self.blocks) as outputs:
            first_step_change(self.pipe, self.embeds[i].expand(count, -1, -1), self.noise, self.t)
        return [[_row(output, seed) for output in outputs] for seed in range(count)]


def _finite(score):
    if not math.isfinite(score):
        raise FloatingPointError("A memorization score is not a number. Check the weights; try float32.")
    return score


def _below(tried, threshold, run):
    """The sets whose score is below the threshold so far; of a run only those before the first that is not."""
    below = [max(scores.values()) < threshold for scores in tried]
    if run and False in below:
        return list(range(below.index(False)))
    return [c for c, is_below in enumerate(below) if is_below]


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
