"""Evaluation: do the targets come back? (pipe, targets) → tidy rows, one for each target and seed; all else from those.

Tables and figures are pure functions of the rows, so they redraw without a model.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from dori_utils import __version__
from dori_utils.adaptive import time_to_copy
from dori_utils.cached import (
    cached_clip_embeddings,
    cached_distances,
    cached_embeddings,
    cached_window_features,
    generated,
    timed_cases,
)
from dori_utils.core.arguments import check_preset, listed
from dori_utils.core.cache import kept_each
from dori_utils.core.diffusion import count_evaluations
from dori_utils.core.edits import Edit, check_fits
from dori_utils.core.hashes import current_hash, known
from dori_utils.core.metrics import bootstrap_interval, diversity, frechet_distance
from dori_utils.core.pictures import part_of
from dori_utils.core.regions import maps_of, region_similarity, window_features
from dori_utils.core.sscd import TRANSFORMS, load_sscd
from dori_utils.core.targets import Target
from dori_utils.detection import anisotropy, first_step_similarity, noise_magnitude
from dori_utils.ways import Answer, answers, name_of, settings_of


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
    attack=None,
    controls=(),
    control_pipe=None,
    starts=None,
    recorded=True,
    regions=False,
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
        attack: settings of DoRI, of another attack that `ways` knows, or a list of them; default: no attack.
        controls: targets that the model has never seen, for the same treatment; of a list of K edits, control i gets
            number i % K.
        control_pipe: another pipeline, such as a twin that has never seen the targets, to generate and attack the same
            targets in; its mitigation is called "control model".
        starts: embeddings (N, T, D), one for each target and then each control, that DoRI starts from instead of
            `attack.start`; only without `control_pipe`, which has embeddings of its own.
        recorded: generate from what `attack.record` kept on the way as well, not from the last result alone.
        regions: compare region by region as well, see core.regions, what the prompts and each attack's result give.

    Returns:
        Rows (mitigation, target, prompt, kind, duplicates, attack, steps, seed, sscd, sscd_gen, d_sscd, alignment,
        regions, found). attack is "none" for the prompt itself, "DoRI" for a trigger, after that many steps: the last,
        and if `recorded` those in `attack.record`; or another attack's name, see `ways.answers` for its steps. Of that
        target and seed, sscd is SSCD_Orig, of the half that is not given in a completion; sscd_gen its generation's
        similarity to that of the prompt without mitigation; d_sscd that to the other seeds' generations, so that its
        mean is D_SSCD (NaN for a single seed); alignment A_CLIP, if `clip` is given; regions the similarity of the
        better half of its regions, if `regions` (NaN for halves, and on the way); found the prompt that `tokens` found,
        if it was among the attacks. `attrs` of the table says what made it: model, weights, SSCD, transform, sampling,
        version, attack.

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
    attacks = [] if attack is None else list(attack) if isinstance(attack, list | tuple) else [attack]
    if starts is not None and [name_of(config) for config in attacks] != ["DoRI"]:
        raise ValueError("starts are embeddings that DoRI starts from: give it as the only attack.")
    if starts is not None and (control_pipe is not None or len(starts) != len(everyone)):
        raise ValueError("starts: one for each target and then each control, and only without control_pipe.")
    settings = (preset, store, sscd, clip, attacks, starts, recorded, regions)
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
    for config in attacks:
        about = settings_of(config)
        about = about if starts is None else about.replace(f"start={config.start}", "start=given")
        table.attrs["attack" if len(attacks) == 1 else name_of(config)] = about
    if control_pipe is not None:
        table.attrs["control weights"] = current_hash(control_pipe)
    return table


def _audited(pipe, targets, name, edits, preset, store, sscd, clip, attacks, starts, recorded, regions) -> list[dict]:
    """Rows of one mitigation: under the prompts, and under what each attack found after so many steps."""
    texts = None if clip is None else clip.embed_texts([target.prompt for target in targets])
    rows = []
    for attacked, steps, last, answer in _found(pipe, targets, edits, preset, store, attacks, starts, recorded):
        scores = _compared(pipe, targets, edits, preset, store, sscd, answer)  # name → (N, S)
        if clip is not None:
            ours = _of_answer(cached_clip_embeddings, pipe, targets, store, clip, edits, answer)
            scores["alignment"] = np.einsum("nsd,nd->ns", ours, texts)
        if regions:
            scores["regions"] = np.full_like(scores["sscd"], np.nan)
            if last and answer.part is None:
                scores["regions"] = _by_region(pipe, targets, edits, store, sscd, answer)
        for i, target in enumerate(targets):
            about = {"mitigation": name, "target": target.id, "prompt": target.prompt, "kind": target.kind}
            about |= {"duplicates": target.duplicates, "attack": attacked, "steps": steps}
            about |= {} if answer.texts is None else {"found": answer.texts[i]}
            for j, seed in enumerate(preset.seeds):
                rows.append(about | {"seed": seed} | {column: float(of[i, j]) for column, of in scores.items()})
    return rows


def _found(pipe, targets, edits, preset, store, attacks, starts, recorded):
    """Yields attack, steps, whether these are its last, and the `Answer`: first that of the prompts themselves."""
    yield "none", 0, True, Answer(preset, {})
    for config in attacks:
        by_step = answers(pipe, targets, config, preset, store, edits, starts)
        last = list(by_step)[-1]
        for step, answer in by_step.items():
            if recorded or step == last:
                yield name_of(config), step, step == last, answer


def _of_answer(cached, pipe, targets, store, judge, edits, answer, **more) -> np.ndarray:
    """Features of an answer's pictures, by one of the functions in `cached`."""
    prompts, preset = [target.prompt for target in targets], answer.preset
    return cached(pipe, prompts, preset.seeds, preset, store, judge, edits, **answer.given, **more)


def _compared(pipe, targets, edits, preset, store, sscd, answer) -> dict[str, np.ndarray]:
    """SSCD (N, S) of an answer's pictures with the targets' images, the prompts' pictures, and each other."""
    part = {"part": answer.part}
    plain = _of_answer(cached_embeddings, pipe, targets, store, sscd, None, Answer(preset, {}), **part)  # (N, S, D)
    ours = _of_answer(cached_embeddings, pipe, targets, store, sscd, edits, answer, **part)
    images = [target.image if answer.part is None else part_of(target.image, answer.part) for target in targets]
    originals = sscd.embed(images, preset.sscd_transform)  # (N, D)
    others = ours.sum(axis=1, keepdims=True) - ours
    return {
        "sscd": np.einsum("nsd,nd->ns", ours, originals),
        "sscd_gen": np.einsum("nsd,nsd->ns", ours, plain),
        "d_sscd": np.einsum("nsd,nsd->ns", ours, others) / (len(preset.seeds) - 1 or np.nan),
    }


def _by_region(pipe, targets, edits, store, sscd, answer) -> np.ndarray:
    """`region_similarity` (N, S) of an answer's pictures to the targets' images."""
    ours = _of_answer(cached_window_features, pipe, targets, store, sscd, edits, answer)  # (N, S, G * G, D)
    originals = window_features([target.image for target in targets], answer.preset.sscd_transform, sscd)
    return region_similarity(maps_of(ours, originals))


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
