"""DoRI: find a text embedding that brings a training image back, under whatever was done to the weights.

"Finding DoRI: Discovery of Retained Images in Diffusion Models" (ICML 2026). The embedding y, the trigger, is optimised
with Adam so that the model denoises the known image x well:

    y_adv = argmin_y  E_(eps, t) || eps - eps_theta(x_t, t, y) ||^2        x_t = sqrt(a_t) x + sqrt(1 - a_t) eps

with fresh noise and timesteps at every step, no constraint on y, and no guidance in the loss. Where the model predicts
v (Stable Diffusion 2, the testbed), v takes the place of eps: the loss is the one that the model was trained with.

A case is a target, an edit, a start and a seed. Cases go through the U-Net together, a batch of cases x draws, and do
not know of each other: noise and timesteps of a case come from its own generator, Adam works element by element, and
each case runs under its own edit. What a batch does change is rounding, which many steps amplify: in 50 steps the
SSCD of a single case moves by some hundredths, means over cases hardly.

An attack that finds something says little without the same attack on an image that the model has never seen.

Shapes: N cases, B draws of a case at a step; T tokens and D channels of an embedding; C, H, W of a latent.
"""

import hashlib
import json
import math
import warnings
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import NamedTuple, SupportsIndex

import torch

from dori_utils.core.arguments import listed
from dori_utils.core.bars import tqdm
from dori_utils.core.diffusion import (
    denoising_loss,
    encode_images,
    gradient_checkpointing,
    latent_size,
)
from dori_utils.core.edits import applied, check_fits
from dori_utils.core.edits_by_row import applied_by_row, around_unet, encode_by_row, groups
from dori_utils.core.hashes import base_hash, known
from dori_utils.core.targets import Target
from dori_utils.core.triggers import Triggers


@dataclass(frozen=True)
class AttackConfig:
    """Settings; those of the paper are the default."""

    steps: int = 50
    lr: float = 0.1  # of Adam
    batch_size: int = 8  # draws of noise and timestep for a case at each step
    start: str = "prompt"  # the target's own prompt, or "noise": N(0, I)
    seed: int = 0  # of the draws and of N(0, I), together with the target's id
    restarts: int = 1  # attacks on a target, with seeds one after the other, of which the best is kept. Ours
    record: tuple[int, ...] = ()  # steps after which embeddings are kept as well; 0 is the start

    def __post_init__(self):
        if self.start not in ("prompt", "noise"):
            raise ValueError(f"start is {self.start!r}: it is 'prompt' or 'noise'; other embeddings go into `starts`.")
        if self.steps < 0 or self.batch_size < 1 or self.restarts < 1:
            raise ValueError("steps must be at least 0, batch_size and restarts at least 1.")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}: a learning rate is above 0.")
        if any(not 0 <= step <= self.steps for step in self.record):
            raise ValueError(f"record is {self.record}: its steps must be between 0 and {self.steps}.")


def attack(
    pipe,
    targets,
    config=None,
    *,
    edits=None,
    starts=None,
    seeds=None,
    stop=None,
    rows=96,
    checkpointing=False,
    progress=True,
    callback=None,
):
    """DoRI for N cases.

    Args:
        pipe: a `StableDiffusionPipeline`, without an edit applied to it.
        targets: N `Target`s with an image; the same one may come several times, with other starts or seeds.
        config: an `AttackConfig`.
        edits: one `Edit` or None for each case, under which it is attacked; or one for all of them.
        starts: embeddings (N, T, D) to start from, instead of `config.start`.
        seeds: one for each case, instead of `config.seed`.
        stop: called after each step with (step, case numbers, their embeddings (n, T, D)); returns n booleans, True for
            a case that need not go on.
        rows: cases x draws in one batch of the U-Net, at most.
        checkpointing: gradient checkpointing, slower by a third, for GPUs with little memory.
        callback: called after each step with {"step", "steps", "cases", "losses", "prompt_embeds"}: case numbers, their
            losses (n,) before the step and embeddings (n, T, D) after it. Of several restarts each begins at step 1.

    Returns:
        `Triggers`, one for each case.

    Raises:
        TypeError: targets that are no list of `Target`s, or seeds that are none of integers.
        ValueError: a target without image; as many edits, starts or seeds as do not fit the targets; or an edit of
            another model.

    A case whose loss is no longer finite stops there and keeps its last embedding; a warning says which.
    """
    config = config or AttackConfig()
    targets = listed("targets", targets, Target, "a list of Targets, as load_targets and read_targets return")
    edits = list(edits) if isinstance(edits, list | tuple) else [edits] * len(targets)
    seeds = [config.seed] * len(targets) if seeds is None else seeds
    seeds = listed("seeds", seeds, SupportsIndex, "a list of integers, one for each target")
    _check(pipe, targets, edits, seeds, starts)
    with known(pipe):
        check_fits(pipe, edits)
        settings = (starts, config, rows, stop, callback, checkpointing, progress)
        attempts = [
            _attempt(pipe, targets, edits, [seed + attempt for seed in seeds], attempt, *settings)
            for attempt in range(config.restarts)
        ]
        found = attempts[0] if config.restarts == 1 else _best(pipe, attempts, targets, edits, config, rows)
    diverged = [f"{case['target']} at step {case['steps']}" for case in found.cases if case["stopped"] == "diverged"]
    if diverged:
        warnings.warn(f"The loss is no longer a number for {', '.join(diverged)}: try a smaller lr.", stacklevel=2)
    return found


def _attempt(pipe, targets, edits, seeds, attempt, starts, config, rows, stop, callback, checkpointing, progress):
    """`Triggers` of all cases, attacked once."""
    generators = [_generator(target, seed) for target, seed in zip(targets, seeds, strict=True)]
    embeds = _starts(pipe, targets, edits, config, generators) if starts is None else starts.detach().clone()
    embeds = embeds.to(pipe.unet.device, torch.float32)
    start = config.start if starts is None else "given"
    cases = [_about(base_hash(pipe), *case, start, config) for case in zip(targets, seeds, edits, strict=True)]
    parts = _parts(edits, cases_together(len(targets), config, rows))
    desc = "DoRI" if config.restarts == 1 else f"DoRI, attempt {attempt + 1} of {config.restarts}"
    found = []
    bar = tqdm(total=len(parts) * config.steps, desc=desc, disable=not progress)
    with gradient_checkpointing(pipe.unet, checkpointing), bar:
        for part in parts:
            own = [[values[i] for i in part] for values in (targets, edits, generators, cases)]
            found.append(_attack_together(pipe, *own, embeds[part], config, part, stop, callback, bar.update))
    return _joined(found)[_back(parts)]


def _parts(edits, size):
    """Numbers of the cases that go through the U-Net together, at most `size`: a list for each such part."""
    return [group[first : first + size] for group in groups(edits) for first in range(0, len(group), size)]


def _back(parts):
    """Where each case is when the parts stand one behind the other."""
    return torch.tensor([number for part in parts for number in part]).argsort()


def cases_together(count, config, rows):
    """How many of `count` cases go through the U-Net together: as many as `rows` allow, shared out evenly."""
    most = max(1, rows // config.batch_size)
    return math.ceil(count / math.ceil(count / most))


class Step(NamedTuple):
    """One step of n cases: their numbers, losses (n,) before it and embeddings (n, T, D) after it, and who diverged."""

    active: list[int]
    losses: torch.Tensor
    embeds: torch.Tensor
    diverged: list[int]


def descend(pipe, images, embeds, generators, *, lr=0.1, draws=8, edits=None):
    """DoRI itself: yields a `Step` after each of its steps, for as long as there is a case to go on with.

    Args:
        images: N PIL images to find embeddings for.
        embeds: (N, T, D) float32 to start from.
        generators: one for each case, on the CPU, for noise and timesteps.
        lr: of Adam. draws: of noise and timestep for a case at each step.
        edits: one `Edit` or None for each case, in the weights from the first step until the iterator is closed; all
            the same around the U-Net.

    Whoever iterates may send a list of cases that need not go on; a case whose loss is no longer finite is not changed
    by that step, and goes no further.
    """
    edits = edits or [None] * len(images)
    with applied(pipe, around_unet(edits)):
        clean = encode_images(pipe, images)
    triggers = [start.clone().requires_grad_() for start in embeds]
    adam = torch.optim.Adam(triggers, lr=lr)
    active = list(range(len(triggers)))
    while active:
        ended = []
        with applied_by_row(pipe, [edits[i] for i in active]):
            while not ended:
                drawn = [_draws(pipe, generators[i], draws) for i in active]
                losses = _losses(pipe, clean[active], torch.stack([triggers[i] for i in active]), drawn)
                finite = losses.isfinite()
                gradients = torch.autograd.grad(torch.where(finite, losses, 0.0).sum(), [triggers[i] for i in active])
                for i, gradient, good in zip(active, gradients, finite.tolist(), strict=True):
                    if good and gradient.isfinite().all():
                        triggers[i].grad = gradient
                    else:
                        ended.append(i)
                adam.step()  # passes over those without a gradient
                adam.zero_grad()
                now = torch.stack([triggers[i].detach() for i in active])
                ended = [*ended, *((yield Step(active, losses.detach(), now, list(ended))) or [])]
        active = [i for i in active if i not in ended]


def _attack_together(pipe, targets, edits, generators, cases, embeds, config, part, stop, callback, on_step):
    """`Triggers` of one part of the cases, these numbers of them; says in `cases` how it went."""
    latest, losses = embeds.clone(), torch.full((len(targets), config.steps), torch.nan)
    recorded = {0: embeds.clone()} if 0 in config.record else {}
    images, settings = [target.image for target in targets], {"lr": config.lr, "draws": config.batch_size}
    ended = None
    with closing(descend(pipe, images, embeds, generators, edits=edits, **settings)) as steps:
        for step in range(1, config.steps + 1):
            if all(case["stopped"] for case in cases):
                on_step(config.steps + 1 - step)
                break
            active, of_step, now, diverged = steps.send(ended)
            latest[active], losses[active, step - 1] = now, of_step.cpu()
            if step in config.record:
                recorded[step] = latest.clone()
            numbers = [part[i] for i in active]
            if callback is not None:
                about = {"step": step, "steps": config.steps, "cases": numbers}
                callback(about | {"losses": of_step.cpu(), "prompt_embeds": now})
            enough = [False] * len(active) if stop is None else stop(step, numbers, now)
            ended = [i for i, of_case in zip(active, enough, strict=True) if of_case and i not in diverged]
            for i in active:
                cases[i]["steps"] = step
            for why, which in (("diverged", diverged), ("early", ended)):
                for i in which:
                    cases[i]["stopped"] = why
            on_step()
    recorded |= {step: latest for step in config.record if step not in recorded}  # everyone had stopped by then
    return Triggers(latest.cpu(), losses, cases, {step: embeds.cpu() for step, embeds in sorted(recorded.items())})


def _losses(pipe, clean, embeds, draws):
    """Mean loss (n,) over the draws of each of n cases, given for each as noise (B, C, H, W) and timesteps (B,).

    Rows are in the order that `applied_by_row` wants: all cases' first draw, then their second.
    """
    noise = torch.stack([noise for noise, _ in draws], dim=1).flatten(0, 1)  # (B, n, C, H, W) → (B * n, C, H, W)
    timesteps = torch.stack([timesteps for _, timesteps in draws], dim=1).flatten()
    noise, timesteps = noise.to(embeds.device), timesteps.to(embeds.device)
    count = len(draws[0][1])
    rows = denoising_loss(pipe, clean.repeat(count, 1, 1, 1), embeds.repeat(count, 1, 1), noise, timesteps)
    return rows.unflatten(0, (count, -1)).mean(dim=0)


def _draws(pipe, generator, count):
    """Noise (count, C, H, W) and timesteps (count,) from the case's own generator, on the CPU.

    They are moved later, all at once: to ask a U-Net for its device takes as long as a row of it.
    """
    noise = torch.randn((count, pipe.unet.config.in_channels, *latent_size(pipe)), generator=generator)
    timesteps = torch.randint(pipe.scheduler.config.num_train_timesteps, (count,), generator=generator)
    return noise, timesteps


def _starts(pipe, targets, edits, config, generators):
    if config.start == "prompt":
        return encode_by_row(pipe, [target.prompt for target in targets], edits)
    shape = (pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def _generator(target, seed):
    digest = hashlib.sha256(f"{target.id} {seed}".encode()).hexdigest()
    return torch.Generator("cpu").manual_seed(int(digest[:15], 16))


def _about(base, target, seed, edit, start, config):
    own = {"target": target.id, "prompt": target.prompt, "seed": seed, "start": start}
    own |= {"edit": edit and edit.fingerprint(), "mitigation": edit and edit.method, "model": base}
    return own | {"config": json.loads(json.dumps(asdict(config))), "steps": 0, "stopped": None}  # as it comes back


@torch.no_grad()
def _best(pipe, attempts, targets, edits, config, rows):
    """Of each case the attempt with the lowest loss on 32 draws that are the same for all attempts."""
    losses = torch.empty(len(attempts), len(targets))
    for part in _parts(edits, max(1, rows // 32)):
        with applied_by_row(pipe, [edits[i] for i in part]):
            draws = [_draws(pipe, _generator(targets[i], -1), 32) for i in part]
            clean = encode_images(pipe, [targets[i].image for i in part])
            for number, found in enumerate(attempts):
                embeds = found.prompt_embeds[part].to(pipe.unet.device)
                losses[number, part] = _losses(pipe, clean, embeds, draws).cpu()
    chosen = losses.nan_to_num(nan=torch.inf).argmin(dim=0).tolist()
    return _joined([attempts[number][[i]] for i, number in enumerate(chosen)])


def _joined(parts):
    recorded = {step: torch.cat([part.recorded[step] for part in parts]) for step in parts[0].recorded}
    cases = [case for part in parts for case in part.cases]
    embeds, losses = [torch.cat([getattr(part, name) for part in parts]) for name in ("prompt_embeds", "losses")]
    return Triggers(embeds, losses, cases, recorded)


def _check(pipe, targets, edits, seeds, starts):
    if not targets:
        raise ValueError("No targets: give at least one.")
    for target in targets:
        if target.image is None:
            raise ValueError(f"{target.id} has no image: DoRI optimises towards the image, so it must be known.")
    for name, values in (("edits", edits), ("seeds", seeds)):
        if len(values) != len(targets):
            raise ValueError(f"{len(values)} {name} for {len(targets)} targets: give one for each.")
    shape = (len(targets), pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
    if starts is not None and tuple(starts.shape) != shape:
        raise ValueError(f"starts has the shape {tuple(starts.shape)}; these targets and this model take {shape}.")
