"""Adaptive attack: how much work is it to bring an image back, for an attacker who knows that there is a defence?

A defence that holds at the budget it was trained against may fall at a larger one. So an attacker is given several
attempts, with other starts and learning rates, each long, and looks at what a trigger gives every so often; what counts
is the work until a first copy, in evaluations of the U-Net (with gradient), all attempts added up. Who never got one is
censored at the whole budget, which is the same for all, so that the survival curve, the share of images not yet back,
is a plain share (Kaplan and Meier's estimate with nobody leaving early).

The same attacker on images that the model has never seen says from where on work proves nothing.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from dori_utils.attack import AttackConfig, attack
from dori_utils.core.diffusion import decode, denoise, initial_latents
from dori_utils.core.metrics import THRESHOLD, share_interval


@dataclass(frozen=True)
class Config:
    """An attacker. Not the paper's, which attacks once for 50 steps: ours, asked for by its reviewers."""

    attempts: tuple[AttackConfig, ...] = tuple(
        AttackConfig(steps=500, lr=lr, start=start) for start in ("prompt", "noise") for lr in (0.1, 0.05, 0.2)
    )
    checks: tuple[int, ...] = (1, 2, 5, 10, 15, 25, 35, 50, 75, 100, 150, 200, 250, 300, 400, 500)  # looks after these
    seeds: tuple[int, ...] = (0, 1, 2, 3)  # a copy is a mean SSCD above 0.7 over these
    num_inference_steps: int = 50
    guidance_scale: float = 7.5

    @property
    def budget(self) -> int:
        """Evaluations of the U-Net that all attempts on one image take."""
        return sum(attempt.steps * attempt.batch_size for attempt in self.attempts)


def time_to_copy(pipe, targets, config, sscd, transform, *, edits=None, progress=True) -> list[dict]:
    """Attack every target until its first copy, or to the end of the budget.

    Args:
        pipe: a `StableDiffusionPipeline`, without an edit applied to it.
        targets: N `Target`s with an image.
        config: a `Config`.
        sscd: of `sscd.load_sscd`; transform: a name in `sscd.TRANSFORMS`.
        edits: None, or one `Edit` or None for each target.

    Returns:
        For each target a dict: work (evaluations of the U-Net until its first copy, or the whole budget), copied,
        attempt (number of the last one), steps (made in it), sscd (the highest mean over seeds that was seen).
    """
    originals = sscd.embed([target.image for target in targets], transform)  # (N, D)
    found = [{"work": 0, "copied": False, "attempt": 0, "steps": 0, "sscd": -math.inf} for _ in targets]
    for number, attempt in enumerate(config.attempts):
        left = [i for i, own in enumerate(found) if not own["copied"]]
        if not left:
            break

        def stop(step, cases, embeds, left=left, last=attempt.steps):
            if step not in config.checks and step != last:
                return [False] * len(cases)
            scores = _scores(pipe, embeds, originals[[left[case] for case in cases]], config, sscd, transform)
            for case, score in zip(cases, scores.tolist(), strict=True):
                own = found[left[case]]
                own["sscd"] = max(own["sscd"], score)
                own["copied"] = score > THRESHOLD
            return [found[left[case]]["copied"] for case in cases]

        chosen = [targets[i] for i in left]
        own_edits = None if edits is None else [edits[i] for i in left]
        once = replace(attempt, seed=attempt.seed + number)
        triggers = attack(pipe, chosen, once, edits=own_edits, stop=stop, progress=progress)
        for i, case in zip(left, triggers.cases, strict=True):
            found[i]["work"] += case["steps"] * attempt.batch_size
            found[i] |= {"attempt": number, "steps": case["steps"]}
    return found


def _scores(pipe, embeds, originals, config, sscd, transform):
    """Mean SSCD_Orig (n,) over seeds of what n embeddings give; one seed after the other, so that a batch has the rows
    that `attack`'s own has, each under its own edit."""
    scores = []
    for noise in initial_latents(pipe, config.seeds):
        latents = denoise(
            pipe,
            noise.expand(len(embeds), -1, -1, -1),
            embeds.to(pipe.unet.dtype),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )
        images = pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(decode(pipe, latents)))
        scores.append((sscd.embed(images, transform) * originals).sum(axis=1))
    return np.mean(scores, axis=0)


def survival(rows: pd.DataFrame, by: str | list[str], budget: int) -> pd.DataFrame:
    """Share of images that are not back after so much work, with Wilson's 95% intervals; a step curve for each group.

    Args:
        rows: with the columns work and copied, one for each image.
        budget: evaluations after which everyone is censored.

    Returns:
        Rows (*by, work, survival, low, high, targets), from work 0 to the budget.
    """
    curves = []
    for name, group in rows.groupby(by, sort=False):
        names = dict(zip(np.atleast_1d(by), np.atleast_1d(np.array(name, dtype=object)), strict=True))
        times = group.loc[group["copied"], "work"]
        for work in [0, *sorted(set(times)), budget]:
            left = len(group) - int((times <= work).sum())
            low, high = share_interval(left, len(group))
            own = {"work": work, "survival": left / len(group), "low": low, "high": high, "targets": len(group)}
            curves.append(names | own)
    return pd.DataFrame(curves)
