"""Significance: intervals and tests over images, since triggers of one image are not independent.

Pairs of triggers are averaged into blocks, one for each two of G images (`block_means`), and images are resampled.
"""

import numpy as np
import pandas as pd


def block_means(matrix, images):
    """(G, G) means of a matrix (N, N) over pairs of different embeddings, one block for each two of G images.

    The diagonal holds pairs of one image, and is NaN for an image with a single embedding. NaN in the matrix counts as
    no pair. Images are in the order in which they come first.
    """
    matrix, images = np.asarray(matrix, dtype=float), np.asarray(images)
    names = list(dict.fromkeys(images.tolist()))
    member = np.array([images == name for name in names], dtype=float)  # (G, N)
    valid = np.isfinite(matrix) & ~np.eye(len(matrix), dtype=bool)
    pairs = member @ valid @ member.T
    with np.errstate(invalid="ignore"):
        return (member @ np.where(valid, matrix, 0) @ member.T) / np.where(pairs > 0, pairs, np.nan)


def between_interval(blocks, level=0.95, resamples=2000, seed=0):
    """Mean of a (G, G) matrix over pairs of different images, with its percentile bootstrap interval over images.

    An image drawn twice is no pair with itself. Averaging each image's row first and resampling those would be half as
    wide as it should be, as every pair moves with two images.

    Returns:
        (mean, low, high).
    """
    count = len(blocks)
    off = np.where(np.eye(count, dtype=bool) | np.isnan(blocks), 0, blocks)
    exists = (~np.eye(count, dtype=bool) & ~np.isnan(blocks)).astype(float)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples).astype(float)
    sums, pairs = (np.einsum("rg,gh,rh->r", draws, matrix, draws) for matrix in (off, exists))
    low, high = np.quantile(sums[pairs > 0] / pairs[pairs > 0], [(1 - level) / 2, (1 + level) / 2])
    return float(off.sum() / exists.sum()), float(low), float(high)


def permutation_test(matrix, images, resamples=1999, seed=0):
    """Are pairs of one image different from pairs of two images? Embeddings change places between images at random.

    Args:
        matrix: (N, N), distances or IoU.
        images: N names.

    Returns:
        (difference, p): mean over images of the pairs within, less the mean of the pairs between; and its two-sided p.
    """
    matrix, rng = np.asarray(matrix, dtype=float), np.random.default_rng(seed)
    groups = np.unique(np.asarray(images), return_inverse=True)[1]

    def difference(groups):
        blocks = block_means(matrix, groups)
        return np.nanmean(np.diag(blocks)) - np.nanmean(blocks[~np.eye(len(blocks), dtype=bool)])

    ours = difference(groups)
    null = np.array([difference(rng.permutation(groups)) for _ in range(resamples)])
    extreme = np.sum(np.abs(null - null.mean()) >= abs(ours - null.mean()) - 1e-12)
    return float(ours), float((1 + extreme) / (1 + resamples))


def difference_test(a, b, paired):
    """Difference of the means of a and b, one number an image, and its two-sided permutation p.

    Of eight images and eight others all 12,870 ways to change groups are tried, so that p is exact; of more, 19,999.

    paired: a[i] and b[i] are of the same image, and change places within it; else images change groups.
    """
    from scipy.stats import permutation_test as scipy_test

    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    test = scipy_test(
        (a, b),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=19_999,
        rng=np.random.default_rng(0),
    )
    return float(test.statistic), float(test.pvalue)


def difference_interval(a, b, paired):
    """95% interval (low, high) of what `difference_test` tests: Student's, and Welch's for groups of their own.

    For eight numbers a group the bootstrap is too narrow.
    """
    from scipy.stats import ttest_ind, ttest_rel

    test = ttest_rel(a, b) if paired else ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval()
    return float(low), float(high)


def rate_test(ours, theirs):
    """p of Fisher's exact test, two-sided, that two memorization rates differ: rows of `metrics.summarize`."""
    from scipy.stats import fisher_exact

    back = [round(row["rate"] * row["targets"]) for row in (ours, theirs)]
    return float(fisher_exact([back, [ours["targets"] - back[0], theirs["targets"] - back[1]]]).pvalue)


def holm(p):
    """p-values (N,) corrected for there being N of them (Holm, 1979).

    Whoever believes what is below 0.05 is wrong, in one of them or more, in at most 5% of such tables.
    """
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def difference_tests(pairs):
    """`difference_test` of each claim → (a, b, paired), a row for each: claim, difference, low, high, p, Holm."""
    rows = [(claim, *difference_test(*pair), *difference_interval(*pair)) for claim, pair in pairs.items()]
    table = pd.DataFrame(rows, columns=["claim", "difference", "p", "low", "high"])
    return table.assign(Holm=holm(table["p"]))[["claim", "difference", "low", "high", "p", "Holm"]]


def as_notes(tests):
    """Tests as lines for the head of a CSV (`plots.save_figure`): claim → difference, its interval, p, Holm."""
    notes = {}
    for test in tests.to_dict("records"):
        interval = "" if np.isnan(test["low"]) else f" ({test['low']:.2g} to {test['high']:.2g})"
        notes[test["claim"]] = f"{test['difference']:.3g}{interval}, p {test['p']:.2g}, Holm {test['Holm']:.2g}"
    return notes
