"""The judge's transform: which preparation of a picture lets SSCD tell copies from others at 64 pixels."""

import numpy as np
import pandas as pd

from dori_utils.core.bars import tqdm
from dori_utils.core.sscd import load_sscd


def transform_table(originals, same, near, transforms, sscd=None, progress=True):
    """How well SSCD tells copies from other pictures under each transform: the table that a transform is chosen by.

    Args:
        originals: N PIL images, all different: N (N - 1) / 2 pairs that are no copies.
        same: {name: N PIL images}, each what SSCD must call a copy of its original, such as noisy ones.
        near: N PIL images that resemble their originals and are no copies.
        transforms: list of `SSCDTransform`.
        sscd: an `SSCD`; default: `load_sscd()`.

    Returns:
        DataFrame, a row for each transform: the median score of each kind of `same` and its lowest tenth ("NAME 10%"),
        the median of `near` and its 95% quantile, of different originals the mean, standard deviation, 99.9% quantile
        and maximum, and the margin: the lowest tenth of the hardest kind of `same` less the 95% quantile of `near`.
    """
    sscd = sscd or load_sscd()
    rows = []
    for transform in tqdm(transforms, desc="transforms", disable=not progress):
        base = sscd.embed(originals, transform, progress=False)  # (N, D)
        scores = {k: (base * sscd.embed(v, transform, progress=False)).sum(axis=1) for k, v in same.items()}
        close = (base * sscd.embed(near, transform, progress=False)).sum(axis=1)
        different = (base @ base.T)[np.triu_indices(len(base), k=1)]
        lowest = {f"{name} 10%": np.quantile(values, 0.1) for name, values in scores.items()}
        rows.append(
            {
                "size": transform.size,
                "blur": transform.blur,
                **{name: np.median(values) for name, values in scores.items()},
                **lowest,
                "near": np.median(close),
                "near 95%": np.quantile(close, 0.95),
                "different": different.mean(),
                "different std": different.std(),
                "different 99.9%": np.quantile(different, 0.999),
                "different max": different.max(),
                "margin": min(lowest.values()) - np.quantile(close, 0.95),
            }
        )
    return pd.DataFrame(rows)
