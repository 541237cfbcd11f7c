"""Surrogates: what a model shall give instead of a memorized image, for fine-tuning."""

import numpy as np

from dori_utils.cached import cached_embeddings, cached_generate


def find_surrogates(pipe, targets, edits, preset, store, sscd, first_seed=1000):
    """What a pruned model draws for a target's prompt and is no copy: the first `preset.surrogates` of each.

    Args:
        edits: one pruning `Edit` for each target, as `nemo` or `wanda` gives it.
        first_seed: of twice as many seeds as are wanted; apart from those that MR is measured with.

    Raises:
        ValueError: a target for which there are not that many with an SSCD_Orig of at most `preset.surrogate_sscd`.
    """
    count, most = preset.surrogates, preset.surrogate_sscd
    prompts, seeds = [target.prompt for target in targets], range(first_seed, first_seed + 2 * count)
    images = cached_generate(pipe, prompts, seeds, preset, store, edits)
    ours = cached_embeddings(pipe, prompts, seeds, preset, store, sscd, edits)  # (N, S, D)
    originals = sscd.embed([target.image for target in targets], preset.sscd_transform, progress=False)
    chosen = []
    for target, row, scores in zip(targets, images, np.einsum("nsd,nd->ns", ours, originals), strict=True):
        chosen.append([image for image, score in zip(row, scores, strict=True) if score <= most][:count])
        if len(chosen[-1]) < count:
            raise ValueError(
                f"{target.id}: of {len(row)} images by the pruned model only {len(chosen[-1])} are no copies (SSCD at "
                f"most {most}), {count} are wanted. Prune more, ask for fewer, or leave this target out."
            )
    return chosen
