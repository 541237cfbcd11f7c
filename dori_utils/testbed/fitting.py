"""Fitting: the one training loop that all models of the testbed share; resumable, deterministic given a seed."""

import copy
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Stage:
    """How long and how fast one model is trained. Learning rate: warm-up, constant, linear decay over the last part."""

    steps: int
    batch_size: int
    lr: float
    warmup: int = 100
    decay: float = 0.3  # share of the steps
    ema: float = 0.999  # of the weights; the averaged ones are kept
    weight_decay: float = 0.01

    @property
    def draws(self) -> int:
        return self.steps * self.batch_size

    def lr_factor(self, step: int) -> float:
        left = (self.steps - step) / (self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, max(left, 0.01))


def fit(
    name: str,
    model: nn.Module,
    dataset: Dataset,
    loss_of: Callable[[nn.Module, tuple, torch.Generator], tuple[torch.Tensor, dict]],
    stage: Stage,
    work: Path,
    seed: int = 0,
    save_seconds: float = 120,
    callback: Callable[[dict], None] | None = None,
) -> nn.Module:
    """Train model in place, or go on with it; returns its moving average, in eval mode.

    dataset holds the samples of the whole run in order. loss_of(model, batch, generator) gives the loss and more
    numbers to log. work/NAME.pt is the checkpoint, work/NAME.csv the log.
    """
    work.mkdir(parents=True, exist_ok=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, stage.lr, weight_decay=stage.weight_decay, fused=True)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    start = resume(work / f"{name}.pt", model, average, optimizer)
    samples = Subset(dataset, range(start * stage.batch_size, stage.draws))
    loader = DataLoader(samples, stage.batch_size, num_workers=1, prefetch_factor=4, worker_init_fn=one_thread)
    bar = tqdm(loader, desc=name, initial=start, total=stage.steps)
    saved = time.monotonic()
    for step, batch in enumerate(bar, start):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * stage.lr_factor(step)
        loss, numbers = loss_of(model, batch, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        update_average(average, model, min(stage.ema, (step + 1) / (step + 10)))
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if step % 10 == 0:
            append_row(work / f"{name}.csv", {"step": step, "loss": loss.item(), **numbers})
        if callback is not None:
            callback({"step": step, "loss": loss.item(), "average": average})
        if time.monotonic() - saved > save_seconds or step == stage.steps - 1:
            save_checkpoint(work / f"{name}.pt", step + 1, model, average, optimizer)
            saved = time.monotonic()
    return average


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def resume(path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint, if there is one; returns the step to go on with."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def save_checkpoint(path: Path, step: int, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer):
    state = {"step": step, "model": model.state_dict(), "average": average.state_dict()}
    part = path.with_suffix(".part")
    torch.save(state | {"optimizer": optimizer.state_dict()}, part)
    part.replace(path)


def append_row(path: Path, row: dict) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
