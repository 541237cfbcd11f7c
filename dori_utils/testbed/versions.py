"""Versions: a template was shown in as many versions as there are objects to put into it; which is nearest?"""

import numpy as np
import pandas as pd
from PIL import Image

from dori_utils.cached import cached_embeddings
from dori_utils.testbed.data import num_variants, planned, template_variant


def version_images(id: str) -> list[Image.Image]:
    """Every version of the template with this id that training has shown; the first is the target's image."""
    (template,) = [p.scene for p in planned() if p.id == id]
    return [Image.fromarray(template_variant(template, v).draw()) for v in range(num_variants(template))]


def nearest_version(rows: pd.DataFrame, targets, pipe, preset, store, sscd) -> pd.DataFrame:
    """`audit`'s rows of the model as it is, in which a template's generations are compared with all its versions.

    Args:
        rows: of `audit(pipe, targets, preset, store, sscd)`, without edits and attack.
        targets, pipe, preset, store, sscd: the same.

    Returns:
        The rows; where the target is a template, of either twin, sscd is that of the version most similar to the
        generation, and version says which.
    """
    templates = [target for target in targets if target.id.startswith("TM-")]
    rows = rows.assign(version=-1)
    if not templates:
        return rows
    prompts = [target.prompt for target in templates]
    ours = cached_embeddings(pipe, prompts, preset.seeds, preset, store, sscd)  # (N, S, D)
    for target, of_target in zip(templates, ours, strict=True):
        versions = sscd.embed(version_images(target.id), preset.sscd_transform, progress=False)  # (V, D)
        scores = of_target @ versions.T  # (S, V)
        mine = rows["target"] == target.id
        if rows.loc[mine, "seed"].tolist() != list(preset.seeds):
            raise ValueError(f"The rows of {target.id} are not one for each seed of the preset.")
        rows.loc[mine, "sscd"] = scores.max(axis=1).astype(np.float64)
        rows.loc[mine, "version"] = scores.argmax(axis=1)
    return rows
