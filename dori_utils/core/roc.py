"""ROC: how well scores separate memorized prompts from ordinary ones."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AUC:
    """Area under the ROC curve with its 95% interval, and how many prompts it is from."""

    auc: float
    low: float
    high: float
    positives: int
    negatives: int


def roc_auc(scores_pos, scores_neg, *, resamples=2000, seed=0):
    """AUC: the chance that a memorized prompt scores above an ordinary one, with a 95% interval over prompts.

    The interval is the percentile bootstrap's, both groups resampled. Where the groups do not overlap at all the
    bootstrap is [1, 1], whatever the number of prompts; there Newcombe's score interval takes over.

    Args:
        scores_pos: (P,) scores of memorized prompts.
        scores_neg: (M,) scores of ordinary prompts.

    Raises:
        ValueError: no scores in a group, or NaN.
    """
    pos, neg, labels = _labelled(scores_pos, scores_neg)
    from sklearn.metrics import roc_auc_score

    auc = float(roc_auc_score(labels, np.concatenate([pos, neg])))
    wins = (pos[:, None] > neg) + 0.5 * (pos[:, None] == neg)  # (P, M): AUC is its mean (Mann and Whitney)
    rng = np.random.default_rng(seed)
    drawn_pos, drawn_neg = (rng.multinomial(n, np.full(n, 1 / n), resamples) / n for n in wins.shape)
    low, high = np.quantile(np.einsum("rp,pm,rm->r", drawn_pos, wins, drawn_neg, optimize=True), [0.025, 0.975])
    if auc in (0.0, 1.0):
        low, high = _separated_interval(auc, len(pos), len(neg))
    return AUC(auc, float(low), float(high), len(pos), len(neg))


def tpr_at_fpr(scores_pos, scores_neg, max_fpr=0.01):
    """Share of memorized prompts found when at most `max_fpr` of the ordinary ones are flagged (0.01 or 0.05).

    With M ordinary prompts the false-positive rate moves in steps of 1 / M: below that, 0.01 means not one false alarm.
    """
    pos, neg, labels = _labelled(scores_pos, scores_neg)
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(labels, np.concatenate([pos, neg]), drop_intermediate=False)
    return float(tpr[fpr <= max_fpr].max())


def _labelled(scores_pos, scores_neg):
    pos, neg = (np.asarray(scores, dtype=np.float64).ravel() for scores in (scores_pos, scores_neg))
    if not len(pos) or not len(neg) or np.isnan(pos).any() or np.isnan(neg).any():
        raise ValueError("A ROC curve needs scores of at least one memorized and one ordinary prompt, and no NaN.")
    return pos, neg, np.repeat([1, 0], [len(pos), len(neg)])


def _separated_interval(auc, positives, negatives, z=1.959964):
    """Interval of an AUC of exactly 0 or 1: all values whose own standard error puts them within z of it.

    Source: Newcombe (2006), method 5, with Hanley and McNeil's variance.
    """
    from scipy.optimize import brentq

    extra = (positives + negatives) / 2 - 1

    def excess(theta):
        spread = 1 + extra * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (1 - theta) - z**2 * theta * spread / (positives * negatives)  # squared, divided by (1 - theta)

    low = brentq(excess, 0, 1)
    return (low, 1.0) if auc == 1 else (0.0, 1 - low)
