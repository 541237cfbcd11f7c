"""Random triggers: DoRI from N(0, I), many times for each image: what notebooks 04 to 06 look at."""

from dataclasses import replace

import numpy as np
import pandas as pd

from dori_utils.cached import cached_attack, cached_embeddings


def strongest(pipe, targets, count, preset, store, sscd):
    """The `count` targets that the model memorizes best, by mean SSCD_Orig of their prompts; sampled as by `sketch`."""
    prompts, originals = [t.prompt for t in targets], sscd.embed([t.image for t in targets], preset.sscd_transform)
    ours = cached_embeddings(pipe, prompts, preset.seeds, sketch(preset), store, sscd)  # (N, S, D)
    scores = np.einsum("nsd,nd->n", ours, originals)
    return [targets[i] for i in np.argsort(-scores, kind="stable")[:count]]


def random_triggers(pipe, targets, controls, preset, store, sscd):
    """DoRI from N(0, I), several times for each image: what notebooks 04 to 06 look at, attacked in one run.

    Returns:
        table: a row for each trigger (image, kind, start, sscd): SSCD_Orig of its generation, see `sketch`.
        starts: (N, T, D).
        triggers: (N, T, D).
    """
    config = preset.locality
    cases = [(target, start) for target in targets for start in range(config.starts)]
    cases += [(control, start) for control in controls for start in range(config.control_starts)]
    everyone, seeds = [target for target, _ in cases], [start for _, start in cases]
    found = cached_attack(pipe, everyone, config.attack, store, seeds=seeds)
    prompts = [target.prompt for target in everyone]
    ours = cached_embeddings(
        pipe, prompts, preset.seeds[:1], sketch(preset), store, sscd, prompt_embeds=found.prompt_embeds
    )
    originals = sscd.embed([target.image for target in dict.fromkeys(everyone)], preset.sscd_transform)
    by_id = dict(zip(dict.fromkeys(target.id for target in everyone), originals, strict=True))
    table = pd.DataFrame(
        {
            "image": [target.id for target in everyone],
            "kind": [target.kind for target in everyone],
            "start": seeds,
            "sscd": [float(row[0] @ by_id[target.id]) for row, target in zip(ours, everyone, strict=True)],
        }
    )
    return table, found.recorded[0], found.prompt_embeds


def sketch(preset):
    """The preset with the sampling that shows what an embedding gives: on the testbed few steps, without guidance."""
    config = preset.locality
    return replace(preset, num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale)


def closest(table, count):
    """Of each image the `count` triggers whose generation is most like it: row numbers, image by image."""
    order = table.sort_values("sscd", ascending=False, kind="stable")
    chosen = order.groupby("image", sort=False).head(count).index
    return sorted(chosen)
