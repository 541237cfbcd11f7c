"""Training: the one training loop of this project, for the testbed and for mitigations that train.

It is deterministic given a seed, and goes on where it stopped.
"""

import copy
import csv
import math
import re
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from dori_utils.core.bars import tqdm
from dori_utils.core.edits import Edit
from dori_utils.core.hashes import changing


@dataclass(frozen=True)
class Stage:
    """How long and how fast one model is trained. Learning rate: warm-up, constant, linear decay over the last part."""

    steps: int
    batch_size: int
    lr: float
    warmup: int = 100
    decay: float = 0.3  # share of the steps; 0: constant to the end
    ema: float = 0.999  # of the weights; the averaged ones are kept. 0: no average
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    max_rise: float | None = None  # of the mean loss of 50 steps above its lowest; beyond it the training has diverged

    @property
    def draws(self) -> int:
        return self.steps * self.batch_size

    def lr_factor(self, step: int) -> float:
        left = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return min(1.0, (step + 1) / max(1, self.warmup), max(left, 0.01))


def fit(
    name: str,
    model: nn.Module,
    dataset: Dataset,
    loss_of: Callable[[nn.Module, tuple, torch.Generator], tuple[torch.Tensor, dict]],
    stage: Stage,
    work: Path | None,
    seed: int = 0,
    *,
    workers: int = 1,
    save_seconds: float = 120,
    log_every: int = 10,
    progress: bool = True,
    callback: Callable[[dict], None] | None = None,
    memory: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Train model in place, or go on with it; returns its moving average in eval mode, or the model if it has none.

    Args:
        dataset: the samples of the whole run in order.
        loss_of: (model, batch, generator) → the loss, and more numbers to log; the generator is on the CPU and knows
            the seed and the step alone.
        work: folder of the checkpoint NAME.pt and the log NAME.csv; None: neither is written.
        workers: processes that load samples.
        save_seconds: between checkpoints; there is one more at the end.
        callback: called after every step with {"step", "loss", "average", **numbers}.
        memory: tensors that `loss_of` keeps from step to step, in place; a run that goes on finds them as they were.

    Raises:
        FloatingPointError: the training has diverged (`Stage.max_rise`). NAME.pt and NAME.before.pt, the checkpoint
            before it, are older than that.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, stage.lr, stage.betas, weight_decay=stage.weight_decay, fused=True)
    average = copy.deepcopy(model).requires_grad_(False).eval() if stage.ema else None
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    memory = memory or {}
    start, before, lowest = resume(work and work / f"{name}.pt", model, average, optimizer, memory)
    samples = Subset(dataset, range(start * stage.batch_size, stage.draws))
    options = {"num_workers": workers, "prefetch_factor": 4, "worker_init_fn": one_thread} if workers else {}
    loader = DataLoader(samples, stage.batch_size, **options)
    bar = tqdm(loader, desc=name, initial=start, total=stage.steps, disable=not progress)
    began = saved = time.monotonic()
    recent = deque(maxlen=50)
    for step, batch in enumerate(bar, start):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * stage.lr_factor(step)
        loss, numbers = loss_of(model, batch, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if average is not None:
            update_average(average, model, min(stage.ema, (step + 1) / (step + 10)))
        numbers = {"step": step, "loss": loss.item(), **numbers}
        bar.set_postfix(loss=f"{numbers['loss']:.4f}")
        recent.append(numbers["loss"])
        if len(recent) == recent.maxlen:
            lowest = min(lowest, mean(recent))
            if stage.max_rise is not None and not mean(recent) <= lowest * (1 + stage.max_rise):
                raise FloatingPointError(diverged(name, step, mean(recent), lowest, work))
        last = step == stage.steps - 1
        seconds = before + time.monotonic() - began
        if work is not None and (last or step % log_every == 0):
            append_row(work / f"{name}.csv", numbers | {"seconds": seconds})
        if work is not None and (last or time.monotonic() - saved > save_seconds):
            progress_made = {"step": step + 1, "seconds": seconds, "lowest": lowest, "memory": memory}
            save_checkpoint(work / f"{name}.pt", progress_made, model, average, optimizer)
            saved = time.monotonic()
        if callback is not None:
            callback(numbers | {"average": average})
    optimizer.zero_grad(set_to_none=True)
    return model.eval() if average is None else average


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Weights are averaged; buffers, such as the statistics of a BatchNorm, are the model's."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for ours, now in zip(average.buffers(), model.buffers(), strict=True):
        ours.copy_(now)


def diverged(name: str, step: int, loss: float, lowest: float, work: Path | None) -> str:
    kept = f"Its last checkpoints are {work / name}.pt and, older, {name}.before.pt. " if work is not None else ""
    return (
        f"{name} has diverged: at step {step} the mean loss of 50 steps is {loss:.4g}, and was {lowest:.4g}. {kept}"
        "Go on from one of them with a lower learning rate."
    )


def resume(
    path: Path | None, model: nn.Module, average: nn.Module | None, optimizer, memory: dict[str, torch.Tensor]
) -> tuple[int, float, float]:
    """Load the checkpoint, if there is one.

    Returns the step to go on with, the seconds spent so far and the lowest mean loss of 50 steps.
    """
    if path is None or not path.exists():
        return 0, 0.0, math.inf
    state = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    if average is not None:
        average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    for name, tensor in state.get("memory", {}).items():
        memory[name].copy_(tensor)
    return state["step"], state.get("seconds", 0.0), state.get("lowest", math.inf)


def save_checkpoint(path: Path, progress_made: dict, model: nn.Module, average: nn.Module | None, optimizer):
    """The checkpoint that was there before stays, as NAME.before.pt."""
    state = progress_made | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if average is not None:
        state["average"] = average.state_dict()
    part = path.with_suffix(".part")
    torch.save(state, part)
    if path.exists():
        path.replace(path.with_suffix(".before.pt"))
    part.replace(path)


def append_row(path: Path, row: dict) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


@contextmanager
def weights_in_training(pipe, pattern: str = ""):
    """Within it the U-Net's weights may be trained in place; behind it, it is bit by bit what it was.

    Args:
        pattern: regular expression; only parameters whose name it fits take a gradient. Default: all.

    Yields:
        changed(method, config, targets, unet): the `Edit` of what has changed so far; unet is the pipeline's by
        default, or another of the same shape, such as a moving average.

    Raises:
        ValueError: weights in half precision, or no parameter has a name that fits.
    """
    parameters = dict(pipe.unet.named_parameters())
    chosen = {name: parameter for name, parameter in parameters.items() if re.search(pattern, name)}
    if not chosen:
        raise ValueError(f"No parameter of this {type(pipe.unet).__name__} has a name that fits {pattern!r}.")
    if pipe.unet.dtype != torch.float32:
        raise ValueError(
            f"The U-Net is in {pipe.unet.dtype}, in which small steps of training are lost: load it with "
            "dtype=torch.float32; `with torch.autocast(...)` around the call still computes in half precision."
        )
    originals = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    gradients = {name: parameter.requires_grad for name, parameter in parameters.items()}
    with changing(pipe, trained=True) as base:

        def changed(method, config, targets, unet=pipe.unet):
            now = dict(unet.named_parameters())
            deltas = {name: (now[name].detach() - before).cpu() for name, before in originals.items()}
            deltas = {name: delta for name, delta in deltas.items() if delta.any()}
            return Edit(method, base, config, [target.id for target in targets], deltas=deltas)

        try:
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in chosen)
            yield changed
        finally:
            with torch.no_grad():
                for name, before in originals.items():
                    parameters[name].copy_(before)
            for name, parameter in parameters.items():
                parameter.requires_grad_(gradients[name])
                parameter.grad = None
