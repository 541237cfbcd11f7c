"""Metrics: scores become the numbers of a table, each with the interval that it deserves.

* Memorization rate (MR): a target counts as memorized when its mean SSCD over seeds is above 0.7. Decided here, once.
* Diversity (D_SSCD): mean pairwise SSCD among one prompt's generations. High means always the same picture.
* Fréchet distance between two sets of features: FID, when they are Inception's (inception.py).
* Intervals: the bootstrap for means over targets, Wilson's for shares. The bootstrap of 0 out of 64 is [0, 0], which
  claims to know what 64 targets cannot tell; Wilson's is [0, 0.057].

Shapes: N targets or prompts, S seeds, D features.
"""

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch

THRESHOLD = 0.7  # SSCD above which a generation is a copy: Wen et al. (2024), NeMo, DoRI


@dataclass(frozen=True)
class MemorizationRate:
    """How much is memorized; `rate` is MR, the others stand beside it.

    Args:
        rate: share of targets whose mean over seeds is above the threshold.
        low, high: Wilson's 95% interval of `rate`.
        images: share of all images above the threshold.
        any_seed: share of targets with at least one seed above the threshold.
        targets: N.
    """

    rate: float
    low: float
    high: float
    images: float
    any_seed: float
    targets: int


def memorization_rate(scores, threshold=THRESHOLD):
    """MR of SSCD scores (N, S) as `sscd_scores` returns them.

    Raises:
        ValueError: not a table of at least one target and seed, or with NaN.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not scores.size or np.isnan(scores).any():
        raise ValueError(f"Scores must be (targets, seeds), at least one of each, without NaN; got {scores.shape}.")
    copies = scores > threshold
    memorized = scores.mean(axis=1) > threshold
    low, high = share_interval(memorized.sum(), len(memorized))
    return MemorizationRate(
        memorized.mean().item(), low, high, copies.mean().item(), copies.any(axis=1).mean().item(), len(scores)
    )


def diversity(embeddings):
    """D_SSCD: mean pairwise cosine among the S >= 2 generations of each prompt; higher is less diverse.

    Args:
        embeddings: (N, S, D), rows of length 1.

    Returns:
        (N,) float32.
    """
    seeds = embeddings.shape[1]
    if seeds < 2:
        raise ValueError("Diversity needs at least two generations for each prompt.")
    pairs = np.einsum("nsd,ntd->nst", embeddings, embeddings)  # (N, S, S)
    first, second = np.triu_indices(seeds, k=1)
    return pairs[:, first, second].mean(axis=1)


def frechet_distance(features_a, features_b):
    """Fréchet distance of two Gaussians fitted to features (N, D) and (M, D): FID's formula for any features.

    |mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with sample covariances C, in float64. Name the features (SSCD,
    CLIP, Inception) wherever the number stands. It is biased upwards for small N: compare only at equal N and M.

    Raises:
        ValueError: fewer than two rows, other widths, or NaN.

    Source: Heusel et al. (2017), Eq. 6.
    """
    a, b = (torch.as_tensor(np.asarray(features), dtype=torch.float64) for features in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"Features must be (N, D) and (M, D) with N, M >= 2; got {tuple(a.shape)}, {tuple(b.shape)}.")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("The features hold NaN or infinity.")
    # Centred rows A, scaled so that C = A^T A. R of A = QR keeps C = R^T R in at most D rows, and the trace of
    # (C_a C_b)^(1/2) is the nuclear norm of R_a R_b^T: no square root of a singular matrix, exact also for N < D.
    mean_a, mean_b = a.mean(0), b.mean(0)
    r_a, r_b = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b))
    cross = torch.linalg.matrix_norm(r_a @ r_b.T, ord="nuc")
    return ((mean_a - mean_b).square().sum() + r_a.square().sum() + r_b.square().sum() - 2 * cross).item()


def bootstrap_interval(values, statistic=np.mean, level=0.95, resamples=2000, seed=0):
    """Percentile bootstrap interval of a statistic over targets; the same numbers give the same interval.

    For shares use `share_interval`: where all targets agree, the bootstrap's interval has no width. For few targets it
    is too narrow: of means of normal numbers a 95% interval held 88% at N = 8 and 92% at N = 16 (4,000 draws each).

    Args:
        values: (N,), one number a target (average over seeds first: seeds of one target are not independent).
        statistic: a function of (..., N) and `axis`, as NumPy's are.

    Returns:
        (low, high).

    Raises:
        ValueError: fewer than two targets, or NaN.
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or np.isnan(values).any():
        raise ValueError(f"An interval over targets needs (N >= 2,) numbers without NaN; got shape {values.shape}.")
    interval = bootstrap(
        (values,),
        statistic,
        vectorized=True,
        method="percentile",
        confidence_level=level,
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def share_interval(count, n, level=0.95):
    """Wilson's interval (low, high) of a share of count out of n; it keeps its width at 0 and at n.

    Source: Wilson (1927); as good as any for small n in Brown, Cai and DasGupta (2001).
    """
    from scipy.stats import binomtest

    interval = binomtest(int(count), int(n)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def scores_by_target(rows: pd.DataFrame) -> np.ndarray:
    """(targets, seeds) from tidy rows, in the order of the rows.

    Raises:
        ValueError: a target and seed have more than one row, such as those of several mitigations.
    """
    if rows.duplicated(["target", "seed"]).any():
        about = rows.columns.intersection(["model", "mitigation", "attack", "steps"])
        differ = [name for name in about if rows[name].nunique() > 1]
        raise ValueError(f"Several rows of one target and seed: group by {differ or 'what tells them apart'} as well.")
    return rows.pivot(index="target", columns="seed", values="sscd").loc[rows["target"].unique()].to_numpy()


def summarize(rows: pd.DataFrame, by: str | list[str] = "kind", interval=bootstrap_interval) -> pd.DataFrame:
    """One row for each group of targets: how many, mean SSCD_Orig, MR and both with 95% intervals.

    One target has a mean without an interval (NaN).

    Args:
        interval: of the mean: (N,) numbers, one a target, N > 1, to (low, high).
    """
    groups = []
    for name, group in rows.groupby(by, sort=False):
        scores = scores_by_target(group)
        low, high = interval(scores.mean(axis=1)) if len(scores) > 1 else (np.nan, np.nan)
        names = dict(zip([by] if isinstance(by, str) else by, np.atleast_1d(np.array(name, dtype=object)), strict=True))
        mean = {"sscd": scores.mean(), "sscd_low": low, "sscd_high": high}
        groups.append(names | mean | asdict(memorization_rate(scores)))
    return pd.DataFrame(groups)
