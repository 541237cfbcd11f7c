"""Evaluation: do the targets come back? (pipe, targets) → tidy rows, one for each target and seed; all else from those.

Tables and figures are pure functions of the rows, so they redraw without a model.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from dori_utils import __version__
from dori_utils.adaptive import time_to_copy
from dori_utils.attack import AttackConfig
from dori_utils.cached import (
    cached_attack,
    cached_clip_embeddings,
    cached_distances,
    cached_embeddings,
    generated,
    timed_cases,
)
from dori_utils.core.arguments import check_preset, listed
from dori_utils.core.cache import kept_each
from dori_utils.core.diffusion import count_evaluations
from dori_utils.core.edits import Edit, check_fits
from dori_utils.core.hashes import current_hash, known
from dori_utils.core.metrics import bootstrap_interval, diversity, frechet_distance
from dori_utils.core.sscd import TRANSFORMS, load_sscd
from dori_utils.core.targets import Target
from dori_utils.detection import anisotropy, first_step_similarity, noise_magnitude


def detect(pipe, prompts, preset, store, sscd=None) -> pd.DataFrame:
    """Every detector's score of every prompt, higher where it is more likely memorized, and what each cost.

    Returns:
        Rows (prompt, detector, score, evaluations, seconds): evaluations of the U-Net and seconds, both for one prompt.

    Raises:
        TypeError: prompts that are no list of texts, or a preset's name.
    """
    check_preset(preset)
    prompts = listed("prompts", prompts, str, "a list of texts")
    sscd = sscd or load_sscd()
    steps = preset.num_inference_steps
    settings = {"seeds": preset.detection_seeds, "num_inference_steps": steps, "progress": False}
    first_step = {"pairwise": preset.nemo.similarity, "second_timestep": preset.nemo.second_timestep}
    detectors = {
        "noise magnitude": (noise_magnitude, {}, 2),
        "first-step similarity": (first_step_similarity, first_step, 1),
        "anisotropy": (anisotropy, {"num_inference_steps": 50}, 4),  # the authors' timesteps: nothing is sampled
    }
    rows, prompt_cases = [], [{"prompt": prompt} for prompt in prompts]
    for name, (function, own, evaluations) in detectors.items():
        compute = partial(_scores, partial(function, pipe, **settings | own), prompts)
        sampling = {"seeds": list(preset.detection_seeds), "num_inference_steps": steps}
        cases = timed_cases(store, name, prompt_cases, compute, pipe, sampling, settings=own)
        cost = evaluations * len(preset.detection_seeds)
        rows += [_detected(p, name, c["score"], cost, c["seconds"]) for p, c in zip(prompts, cases, strict=True)]

    seconds = [case["seconds"] for case in generated(pipe, prompts, preset.seeds, preset, store)]
    scores = diversity(cached_embeddings(pipe, prompts, preset.seeds, preset, store, sscd))
    cost = (2 if preset.guidance_scale > 1 else 1) * count_evaluations(pipe, steps) * len(preset.seeds)
    rows += [_detected(p, "seed diversity", s, cost, t) for p, s, t in zip(prompts, scores, seconds, strict=True)]
    table = pd.DataFrame(rows)
    table.attrs = provenance(pipe, preset, sscd)
    return table


def _scores(detector, prompts, chosen: list[int]) -> list[dict]:
    return [{"score": score} for score in detector([prompts[i] for i in chosen])]


def _detected(prompt, detector, score, evaluations, seconds) -> dict:
    return {
        "prompt": prompt,
        "detector": detector,
        "score": float(score),
        "evaluations": evaluations,
        "seconds": float(seconds),
    }


def audit(
    pipe,
    targets,
    preset,
    store,
    sscd=None,
    edits=None,
    clip=None,
    attack: AttackConfig | None = None,
    controls=(),
    control_pipe=None,
    starts=None,
    recorded=True,
) -> pd.DataFrame:
    """Generate every target's prompt, under every mitigation, and compare with its image; then attack, and again.

    Args:
        pipe: a `StableDiffusionPipeline`, without an edit applied to it.
        targets: list of N `Target`s with an image.
        preset: a `Preset`, for sampling, seeds and SSCD's transform.
        store: a `Store`; what it holds is not computed again.
        sscd: an `SSCD`; default: `load_sscd()`.
        edits: mitigation's name → one `Edit` for all targets, a list with one for each, or None for the model as it
            is; default: {"none": None}.
        clip: of `clip.load_clip`, for the column alignment.
        attack: settings of DoRI; default: no attack.
        controls: targets that the model has never seen, for the same treatment; of a list of K edits, control i gets
            number i % K.
        control_pipe: another pipeline, such as a twin that has never seen the targets, to generate and attack the same
            targets in; its mitigation is called "control model".
        starts: embeddings (N, T, D), one for each target and then each control, that the attack starts from instead of
            `attack.start`; only without `control_pipe`, which has embeddings of its own.
        recorded: generate from what `attack.record` kept on the way as well, not from the last embeddings alone.

    Returns:
        Rows (mitigation, target, prompt, kind, duplicates, attack, steps, seed, sscd, sscd_gen, d_sscd, alignment).
        attack is "none" for the prompt itself and "DoRI" for a trigger, after that many steps: the last, and if
        `recorded` those in `attack.record`. Of that target and seed, sscd is SSCD_Orig; sscd_gen its generation's
        similarity to that of the prompt without mitigation; d_sscd that to the other seeds' generations, so that its
        mean is D_SSCD (NaN for a single seed); alignment A_CLIP, if `clip` is given. `attrs` of the table says what
        made it: model, weights, SSCD, transform, sampling, version, attack.

    Raises:
        TypeError: targets or controls that are no lists of `Target`s, or a preset's name.
        ValueError: a list of edits that is not as long as the targets, an edit of another model, or starts that do not
            fit; before anything is computed.
    """
    check_preset(preset)
    of_targets = "a list of Targets, as load_targets and read_targets return"
    targets = listed("targets", targets, Target, of_targets)
    controls = listed("controls", controls, Target, of_targets)
    sscd, everyone, rows = sscd or load_sscd(), [*targets, *controls], []
    if starts is not None and (control_pipe is not None or len(starts) != len(everyone)):
        raise ValueError("starts: one for each target and then each control, and only without control_pipe.")
    settings = (preset, store, sscd, clip, attack, starts, recorded)
    edits = edits or {"none": None}
    of_each = {name: edit_of_each(edit, targets, controls, name) for name, edit in edits.items()}
    with known(pipe):
        check_fits(pipe, [edit for each in of_each.values() for edit in each or ()])
        for name, each in of_each.items():
            rows += _audited(pipe, everyone, name, each, *settings)
        about = provenance(pipe, preset, sscd, clip)
    if control_pipe is not None:
        with known(control_pipe):
            rows += _audited(control_pipe, targets, "control model", None, *settings)
    table = pd.DataFrame(rows)
    table.attrs = about
    if attack is not None:
        about = asdict(attack) if starts is None else asdict(attack) | {"start": "given"}
        table.attrs["attack"] = " ".join(f"{key}={value}" for key, value in about.items())
    if control_pipe is not None:
        table.attrs["control weights"] = current_hash(control_pipe)
    return table


def _audited(pipe, targets, name, edits, preset, store, sscd, clip, config, starts, recorded) -> list[dict]:
    """Rows of one mitigation: under the prompts, and under what DoRI found after so many steps."""
    prompts, seeds = [target.prompt for target in targets], preset.seeds
    plain = cached_embeddings(pipe, prompts, seeds, preset, store, sscd)  # (N, S, D)
    originals = sscd.embed([target.image for target in targets], preset.sscd_transform)  # (N, D)
    texts = None if clip is None else clip.embed_texts(prompts)
    embeddings = {("none", 0): None}
    if config is not None:
        found = cached_attack(pipe, targets, config, store, edits, starts)
        by_step = found.by_step() if recorded else {config.steps: found.prompt_embeds}
        embeddings |= {("DoRI", step): of_step for step, of_step in by_step.items()}
    rows = []
    for (attacked, steps), prompt_embeds in embeddings.items():
        ours = cached_embeddings(pipe, prompts, seeds, preset, store, sscd, edits, prompt_embeds)
        others = ours.sum(axis=1, keepdims=True) - ours
        scores = {  # name → (N, S)
            "sscd": np.einsum("nsd,nd->ns", ours, originals),
            "sscd_gen": np.einsum("nsd,nsd->ns", ours, plain),
            "d_sscd": np.einsum("nsd,nsd->ns", ours, others) / (len(seeds) - 1 or np.nan),
        }
        if clip is not None:
            ours = cached_clip_embeddings(pipe, prompts, seeds, preset, store, clip, edits, prompt_embeds)
            scores["alignment"] = np.einsum("nsd,nd->ns", ours, texts)
        for i, target in enumerate(targets):
            about = {"mitigation": name, "target": target.id, "prompt": target.prompt, "kind": target.kind}
            about |= {"duplicates": target.duplicates, "attack": attacked, "steps": steps}
            for j, seed in enumerate(seeds):
                rows.append(about | {"seed": seed} | {column: float(of[i, j]) for column, of in scores.items()})
    return rows


def ordinary_cost(pipe, captions, reference, preset, store, clip, edits, inception=None) -> pd.DataFrame:
    """What mitigations cost prompts that nobody wanted changed.

    Args:
        captions: C ordinary prompts.
        reference: PIL images that the generations should be distributed like, such as real ones of these captions.
        clip: of `clip.load_clip`.
        edits: as `audit` takes them; of a list of K edits, each made for another target, caption i gets number i % K.
        inception: file of Inception's weights, for FID and KID; None: without them.

    Returns:
        A row for each mitigation: alignment, mean A_CLIP of C captions; change, its difference to the same captions and
        seeds without mitigation, with a 95% interval over captions (low, high); frechet, the Fréchet distance of CLIP's
        image features to the reference's, images one for each caption and seed: compare only rows of one table. With
        `inception` the fields of `inception.InceptionDistances`, too.
    """
    real, texts, rows = clip.embed_images(reference), clip.embed_texts(captions), []

    def embedded(each=None):  # (C, S, D)
        return cached_clip_embeddings(pipe, captions, preset.seeds, preset, store, clip, each)

    with known(pipe):
        each_edit = [edit if isinstance(edit, list | tuple) else [edit] for edit in edits.values()]
        check_fits(pipe, [edit for each in each_edit for edit in each])
        without = embedded()
        plain = np.einsum("csd,cd->c", without, texts) / len(preset.seeds)
        for name, edit in edits.items():
            each = edit if isinstance(edit, list | tuple) else [edit]
            each = None if edit is None else [each[i % len(each)] for i in range(len(captions))]
            features = without if each is None else embedded(each)
            ours = np.einsum("csd,cd->c", features, texts) / len(preset.seeds)
            change = ours - plain
            low, high = bootstrap_interval(change)
            row = {"mitigation": name, "alignment": ours.mean(), "change": change.mean(), "low": low, "high": high}
            row["frechet"] = frechet_distance(features.reshape(-1, features.shape[-1]), real)
            if inception is not None:
                row |= cached_distances(pipe, captions, reference, preset, store, each, inception)
            rows.append(row)
        table = pd.DataFrame(rows)
        table.attrs = provenance(pipe, preset, clip=clip)
    return table


def edit_of_each(edit, targets, controls=(), name="edits") -> list[Edit] | None:
    """The edit for each of the targets and then the controls, from what `audit` takes; None: nobody has one."""
    if edit is None:
        return None
    each = list(edit) if isinstance(edit, list | tuple) else [edit] * len(targets)
    if len(each) != len(targets):
        raise ValueError(f"{name}: {len(each)} edits for {len(targets)} targets. Give one for each, or one for all.")
    return each + [each[i % len(each)] for i in range(len(controls))]


def provenance(pipe, preset, sscd=None, clip=None) -> dict:
    """What made a table: goes into its `attrs`, and from there into the CSV."""
    judges = {}
    if sscd is not None:
        judges["sscd"] = f"{sscd.name}, transform {preset.sscd_transform}"
    if clip is not None:
        judges["clip"] = f"{Path(clip.model.name_or_path).name} {clip.fingerprint[:8]}"
    return {
        "model": preset.model,
        "weights": current_hash(pipe),
        **judges,
        "sampling": " ".join(f"{k}={v}" for k, v in preset.sampling.items()),
        "dori_utils": __version__,
    }


def cached_work(pipe, targets, config, store, sscd, transform, edits=None) -> pd.DataFrame:
    """`adaptive.time_to_copy`, one target a case of the store.

    Args:
        config: an `adaptive.Config`.
        edits: None, or one `Edit` or None for each target.

    Returns:
        A row for each target: target, work, copied, attempt, steps, sscd.
    """
    edits = list(edits) if edits else [None] * len(targets)
    cases = [
        {"target": target.id, "prompt": target.prompt, "image": target.image, "edit": edit}
        for target, edit in zip(targets, edits, strict=True)
    ]

    def compute(chosen: list[int]) -> list[dict]:
        own = [edits[i] for i in chosen]
        return time_to_copy(pipe, [targets[i] for i in chosen], config, sscd, transform, edits=own)

    shared = {"pipe": pipe, "config": config, "sscd": sscd, "transform": TRANSFORMS[transform]}
    with known(pipe):
        results = kept_each(store, "adaptive attack", cases, compute, batch_size=32, **shared)
    table = pd.DataFrame([{name: value.item() for name, value in result.items()} for result in results])
    return table.assign(target=[target.id for target in targets])
