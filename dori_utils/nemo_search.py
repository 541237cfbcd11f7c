"""NeMo's search, many sets of neurons at a time: the decisions of `nemo.localize_plainly` several times as fast.

The decisions are those of trying one set after the other, but sets do not go through the U-Net one by one. All targets
search at once; each asks for several sets ahead, as they would come if its next decisions were as guessed: in
refinement from the gradient of the score by how far each neuron is blocked. One seed above tau decides against a set,
so in selection all seeds are tried only where the most telling one is below. As refinement goes from the last layer to
the first, whatever comes before that layer in the U-Net is not run again, but gives what it gave under the initial
selection (`hooks.replayed`). Each set of a batch blocks its own neurons, by a hook.

Two shortcuts are not exact, and `Config.margin` is their one setting. In refinement only those seeds are watched at
every decision that were within the margin of tau when all were tried last; and a set that is guessed to be below tau
by more than the margin is not tried. All seeds are tried after `VERIFY_AFTER` decisions to unblock, later less often,
and at the end; if one is not below tau then, search goes back to the first decision that it is against. So the result
always has every seed below tau, but a score that leaps over tau and back between two such points is missed;
`nemo.localize_plainly` tries everything.

Shapes: N prompts, S seeds; M sets of neurons (M, neurons) bool over all layers, one after the other.
"""

import math
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from dori_utils.core import hooks
from dori_utils.core.bars import tqdm
from dori_utils.core.diffusion import ddim, initial_latents
from dori_utils.detection import first_step_change
from dori_utils.nemo import (
    blocked,
    candidates,
    counted_seeds,
    layer_groups,
    memorization_scores,
    neuron_groups,
    report,
)

MOST_AHEAD = 64  # rows that a target asks for at once
VERIFY_AFTER = 32  # decisions to unblock, after which all seeds are tried; twice as many after each time without a miss
DOUBT = 0.003  # of a guessed score, or half the guessed rise; one guess in four so near to tau is wrong on the testbed


def search(pipe, targets, embeds, layers, statistics, config, order, batch_size, progress, callback) -> list:
    """What stays blocked (neurons,) for each target; its arguments are those of `nemo.localize_each`."""
    judge = _Judge(pipe, embeds, layers, statistics.tau, config, batch_size)
    searches = {}
    for i in (i for i, seeds in enumerate(judge.counted) if seeds):
        rounds = candidates(pipe, embeds[i : i + 1], statistics, config, order)
        told = partial(report, callback, targets[i].id)
        searches[i] = _search(rounds, layers, judge.counted[i], statistics.tau, config.margin, told)
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
    return [found[i] for i in range(len(targets))]


def parts(unet):
    """The layers that a U-Net's blocks are made of, which run one after the other."""
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    kinds = (ResnetBlock2D, Transformer2DModel, Downsample2D, Upsample2D)
    return [module for module in unet.modules() if isinstance(module, kinds)]


@contextmanager
def recorded(modules):
    """Yields a list to which each module adds itself and its output, a tensor or a nested tuple of tensors."""
    ran = []
    with hooks.watched(dict(enumerate(modules)), lambda number, out: ran.append((modules[number], out))):
        yield ran


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


def _search(rounds, layers, seeds, tau, margin, report):
    """Returns the set (neurons,) that stays blocked."""
    number, scores, slopes, tau = yield from _select(rounds.sets, seeds, tau, report)
    chosen, turns = rounds.sets[number], rounds.turns[number]
    unblock = partial(_unblock, chosen, seeds, tau, margin, report)
    whole = layer_groups(chosen, layers)
    chosen, scores, slopes = yield from unblock("layers", chosen, scores, slopes, whole)
    single = neuron_groups(chosen, turns, layers)
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
        self.counted = [counted_seeds(maps, tau, config.similarity) for maps in self.unblocked]

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

    def _similarity(self, maps, rows):
        return memorization_scores(maps, self.unblocked[rows[:, 0], rows[:, 1]], self.kind)

    @torch.enable_grad()
    def _slopes(self, points):
        """Target → (set, seed) to target → derivative of the score by how far each neuron is unblocked (neurons,)."""
        rows = torch.tensor([(i, seed) for i, (_, seed) in points.items()])
        factors, slopes = torch.stack([~off for off, _ in points.values()]).float(), []
        some = max(1, self.batch_size // 8)  # a gradient takes several times the memory
        for row, factor in zip(rows.split(some), factors.split(some), strict=True):
            factor.requires_grad_()
            with hooks.scaled(self.layers, factor):
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
            with blocked(self.layers, sets[batch]), hooks.replayed(self.parts[:count], outputs):
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
