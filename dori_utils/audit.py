"""Audit: do the targets come back? (pipe, targets) → tidy rows, one for each target and seed; all else from those.

Tables and figures are pure functions of the rows, so they redraw without a model. Generations are kept in a store,
one case for each prompt, so that every notebook that asks for the same ones gets them from disk.
"""

import time
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
from PIL import Image

from . import __version__
from .detection import first_step_similarity, noise_magnitude, seed_diversity
from .edits import Edit, base_hash
from .generation import generate
from .metrics import bootstrap_interval, memorization_rate
from .models import model_hash
from .similarity import load_sscd


def cached_generate(pipe, prompts, seeds, preset, store, edits=None) -> list[list[Image.Image]]:
    """`generate` with the preset's sampling; each prompt's images are one case of the store.

    Args:
        edits: None, or one `Edit` or None for each prompt.

    Returns:
        One list of images for each prompt, one image for each seed.
    """
    return _images(_generated(pipe, prompts, seeds, preset, store, edits))


def _generated(pipe, prompts, seeds, preset, store, edits=None) -> list[dict]:
    edits = edits or [None] * len(prompts)
    fingerprints = {edit: edit.fingerprint() for edit in set(edits) if edit}  # once for an edit that prompts share
    by_fingerprint = {fingerprint: edit for edit, fingerprint in fingerprints.items()}

    def compute(cases: list[dict]) -> list[dict]:
        chosen = [by_fingerprint.get(case.get("edit")) for case in cases]
        prompts = [case["prompt"] for case in cases]
        images = generate(pipe, prompts, seeds=seeds, edits=chosen, **preset.sampling, progress=False)
        return [{"images": np.stack([np.asarray(image) for image in row])} for row in images]

    config = {"what": "generate", "seeds": list(seeds), **preset.sampling}
    cases = [{"prompt": p} | ({"edit": fingerprints[e]} if e else {}) for p, e in zip(prompts, edits, strict=True)]
    return _timed_cases(pipe, cases, config, compute, store)


def _images(cases: list[dict]) -> list[list[Image.Image]]:
    return [[Image.fromarray(pixels) for pixels in case["images"]] for case in cases]


def detect(pipe, prompts, preset, store, sscd=None) -> pd.DataFrame:
    """Every detector's score of every prompt, higher where it is more likely memorized, and what each cost.

    Returns:
        Rows (prompt, detector, score, evaluations, seconds): evaluations of the U-Net and seconds, both for one prompt.
    """
    sscd = sscd or load_sscd()
    steps = preset.num_inference_steps
    settings = {"seeds": preset.detection_seeds, "num_inference_steps": steps, "progress": False}
    detectors = {
        "noise magnitude": (noise_magnitude, {}, 2),
        "first-step similarity": (first_step_similarity, {"pairwise": preset.pairwise}, 1),
    }
    rows, prompt_cases = [], [{"prompt": prompt} for prompt in prompts]
    for name, (function, own, evaluations) in detectors.items():
        config = {"what": name, "seeds": list(preset.detection_seeds), "steps": steps, **own}
        detector = partial(function, pipe, **settings, **own)
        cases = _timed_cases(pipe, prompt_cases, config, partial(_detector_scores, detector), store)
        cost = evaluations * len(preset.detection_seeds)
        rows += [_detected(p, name, c["score"], cost, c["seconds"]) for p, c in zip(prompts, cases, strict=True)]

    generated = _generated(pipe, prompts, preset.seeds, preset, store)
    images, seconds = _images(generated), [case["seconds"] for case in generated]
    scores = seed_diversity(images, transform=preset.sscd_transform, sscd=sscd)
    cost = 2 * steps * len(preset.seeds)
    rows += [_detected(p, "seed diversity", s, cost, t) for p, s, t in zip(prompts, scores, seconds, strict=True)]
    table = pd.DataFrame(rows)
    table.attrs = provenance(pipe, preset, sscd)
    return table


def _detected(prompt, detector, score, evaluations, seconds) -> dict:
    return {
        "prompt": prompt,
        "detector": detector,
        "score": float(score),
        "evaluations": evaluations,
        "seconds": float(seconds),
    }


def _detector_scores(detector, cases: list[dict]) -> list[dict]:
    return [{"score": score} for score in detector([case["prompt"] for case in cases])]


def _timed_cases(pipe, cases: list[dict], config: dict, compute, store) -> list[dict]:
    """Cases of the store, computed in batches; `seconds` of a result is its share of its batch's time."""

    def timed(chosen: list[dict]) -> list[dict]:
        start = time.perf_counter()
        results = compute(chosen)
        seconds = (time.perf_counter() - start) / len(chosen)
        return [{**result, "seconds": seconds} for result in results]

    config = {**config, "model": model_hash(pipe)}
    cases = [{**config, **case} for case in cases]
    return store.map(cases, timed, batch_size=max(1, 32 // len(config["seeds"])), desc=config["what"])


def audit(pipe, targets, preset, store, sscd=None, edits=None) -> pd.DataFrame:
    """Generate every target's prompt, under every mitigation, and compare with its image.

    Args:
        edits: mitigation's name → one `Edit` for all targets, a list with one for each, or None for the model as it
            is; default: {"none": None}.

    Returns:
        Rows (mitigation, target, prompt, kind, duplicates, seed, sscd, sscd_gen): sscd is SSCD_Orig of that target and
        seed, sscd_gen the same image's similarity to the one without mitigation. `attrs` of the table says what made
        it: model, weights, SSCD, transform, sampling, version.

    Raises:
        ValueError: a list of edits that is not as long as the targets.
    """
    sscd = sscd or load_sscd()
    prompts = [target.prompt for target in targets]
    originals = sscd.embed([target.image for target in targets], preset.sscd_transform)  # (N, D)

    def generated(each):  # (N, S, D)
        images = cached_generate(pipe, prompts, preset.seeds, preset, store, each)
        return sscd.embed_rows(images, preset.sscd_transform)

    plain, rows = generated(None), []
    for name, edit in (edits or {"none": None}).items():
        ours = plain if edit is None else generated(_one_for_each(edit, targets, name))
        scores, scores_gen = np.einsum("nsd,nd->ns", ours, originals), np.einsum("nsd,nsd->ns", ours, plain)
        for i, target in enumerate(targets):
            about = {"mitigation": name, "target": target.id, "prompt": target.prompt, "kind": target.kind}
            about |= {"duplicates": target.duplicates}
            for j, seed in enumerate(preset.seeds):
                rows.append(about | {"seed": seed, "sscd": float(scores[i, j]), "sscd_gen": float(scores_gen[i, j])})
    table = pd.DataFrame(rows)
    table.attrs = provenance(pipe, preset, sscd)
    return table


def _one_for_each(edit, targets, name) -> list:
    each = list(edit) if isinstance(edit, list | tuple) else [edit] * len(targets)
    if len(each) != len(targets):
        raise ValueError(f"{name}: {len(each)} edits for {len(targets)} targets. Give one for each, or one for all.")
    return each


def cached_edits(localize_each, pipe, targets, config, store, **kwargs) -> list[Edit]:
    """`localize_each` of nemo or wanda, one target a case of the store.

    Args:
        localize_each: the function, called as localize_each(pipe, targets, config=config, **kwargs).
        kwargs: what else it takes; `statistics` counts for the case.
    """
    key = {"what": localize_each.__module__, "config": asdict(config), "model": base_hash(pipe)}
    if "statistics" in kwargs:
        key["statistics"] = kwargs["statistics"].fingerprint()
    by_id = {target.id: target for target in targets}

    def compute(cases: list[dict]) -> list[dict]:
        chosen = [by_id[case["target"]] for case in cases]
        return [edit.to_arrays() for edit in localize_each(pipe, chosen, config=config, **kwargs)]

    cases = [{**key, "target": target.id, "prompt": target.prompt} for target in targets]
    return [Edit.from_arrays(arrays) for arrays in store.map(cases, compute, batch_size=16, progress=False)]


def provenance(pipe, preset, sscd) -> dict:
    """What made a table: goes into its `attrs`, and from there into the CSV."""
    return {
        "model": preset.model,
        "weights": model_hash(pipe),
        "sscd": f"{sscd.name}, transform {preset.sscd_transform}",
        "sampling": " ".join(f"{k}={v}" for k, v in preset.sampling.items()),
        "dori_utils": __version__,
    }


def scores_by_target(rows: pd.DataFrame) -> np.ndarray:
    """(targets, seeds) from tidy rows, in the order of the rows."""
    return rows.pivot(index="target", columns="seed", values="sscd").loc[rows["target"].unique()].to_numpy()


def summarize(rows: pd.DataFrame, by: str | list[str] = "kind") -> pd.DataFrame:
    """One row for each group of targets: how many, mean SSCD_Orig, MR and both with 95% intervals."""
    groups = []
    for name, group in rows.groupby(by, sort=False):
        scores = scores_by_target(group)
        low, high = bootstrap_interval(scores.mean(axis=1))
        names = dict(zip([by] if isinstance(by, str) else by, np.atleast_1d(np.array(name, dtype=object)), strict=True))
        mean = {"sscd": scores.mean(), "sscd_low": low, "sscd_high": high}
        groups.append(names | mean | asdict(memorization_rate(scores)))
    return pd.DataFrame(groups)
