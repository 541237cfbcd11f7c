"""Audit: do the targets come back? (pipe, targets) → tidy rows, one for each target and seed; all else from those.

Tables and figures are pure functions of the rows, so they redraw without a model. Generations are kept in a store,
one case for each prompt, so that every notebook that asks for the same ones gets them from disk.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from PIL import Image

from dori_utils import __version__
from dori_utils.adaptive import time_to_copy
from dori_utils.attack import AttackConfig, Triggers, attack, cases_together
from dori_utils.core.arguments import check_preset, listed
from dori_utils.core.diffusion import count_evaluations, generate
from dori_utils.core.edits import Edit, check_fits
from dori_utils.core.hashes import base_hash, current_hash, known
from dori_utils.core.metrics import (
    bootstrap_interval,
    diversity,
    frechet_distance,
    inception_distances,
    memorization_rate,
)
from dori_utils.core.pictures import to_rgb
from dori_utils.core.sscd import SSCD, TRANSFORMS, load_sscd
from dori_utils.core.store import canonical_json
from dori_utils.core.targets import Target
from dori_utils.detection import first_step_similarity, noise_magnitude
from dori_utils.nemo_statistics import Statistics, collect_statistics


def cached_generate(pipe, prompts, seeds, preset, store, edits=None, prompt_embeds=None) -> list[list[Image.Image]]:
    """`generate` with the preset's sampling; each prompt's images are one case of the store.

    Args:
        edits: None, or one `Edit` or None for each prompt.
        prompt_embeds: None, or embeddings (N, T, D), such as triggers, that take the place of the prompts.

    Returns:
        One list of images for each prompt, one image for each seed.
    """
    return _images(_generated(pipe, prompts, seeds, preset, store, edits, prompt_embeds))


def cached_embeddings(pipe, prompts, seeds, preset, store, sscd, edits=None, prompt_embeds=None) -> np.ndarray:
    """SSCD features (N, S, D) of what `cached_generate` gives for the same arguments, also one case for each prompt."""
    config = {"what": "SSCD", "sscd": sscd.name, "transform": repr(TRANSFORMS[preset.sscd_transform])}
    embed_rows = partial(sscd.embed_rows, transform=preset.sscd_transform, progress=False)
    return _cached_features(config, embed_rows, pipe, prompts, seeds, preset, store, edits, prompt_embeds)


def cached_clip_embeddings(pipe, prompts, seeds, preset, store, clip, edits=None, prompt_embeds=None) -> np.ndarray:
    """CLIP's features (N, S, D) of the same images."""
    config = {"what": "CLIP", "clip": clip.fingerprint}
    return _cached_features(config, clip.embed_rows, pipe, prompts, seeds, preset, store, edits, prompt_embeds)


def _cached_features(config, embed_rows, pipe, prompts, seeds, preset, store, edits, prompt_embeds) -> np.ndarray:
    cases, inputs = _cases(prompts, seeds, preset, edits, prompt_embeds)

    def compute(cases: list[dict]) -> list[dict]:
        images = cached_generate(pipe, seeds=seeds, preset=preset, store=store, **inputs(cases))
        return [{"features": row} for row in embed_rows(images)]

    results = _timed_cases(pipe, [case | config for case in cases], compute, store)
    return np.stack([result["features"] for result in results])


def _generated(pipe, prompts, seeds, preset, store, edits=None, prompt_embeds=None) -> list[dict]:
    cases, inputs = _cases(prompts, seeds, preset, edits, prompt_embeds)

    def compute(cases: list[dict]) -> list[dict]:
        given = inputs(cases)
        texts = given.pop("prompts")
        images = generate(
            pipe, texts if prompt_embeds is None else None, seeds=seeds, **given, **preset.sampling, progress=False
        )
        return [{"images": np.stack([np.asarray(image) for image in row])} for row in images]

    return _timed_cases(pipe, [case | {"what": "generate"} for case in cases], compute, store)


def _cases(prompts, seeds, preset, edits, prompt_embeds=None) -> tuple[list[dict], Callable]:
    """What a generation of each prompt depends on, beside the model; and cases → their prompts, edits, embeddings."""
    if not prompts:
        raise ValueError("No prompts: give at least one.")
    edits = edits or [None] * len(prompts)
    fingerprints = {edit: edit.fingerprint() for edit in set(edits) if edit}  # once for an edit that prompts share
    fingerprints[None] = None
    about = {"seeds": list(seeds), **preset.sampling}
    cases = [about | {"prompt": p, "edit": fingerprints[e]} for p, e in zip(prompts, edits, strict=True)]
    if prompt_embeds is not None:
        cases = [case | {"embedding": _hash(e)} for case, e in zip(cases, prompt_embeds, strict=True)]
    by_fingerprint = {fingerprint: edit for edit, fingerprint in fingerprints.items()}
    by_hash = {} if prompt_embeds is None else {c["embedding"]: e for c, e in zip(cases, prompt_embeds, strict=True)}

    def inputs(chosen: list[dict]) -> dict:
        return {
            "prompts": [case["prompt"] for case in chosen],
            "edits": [by_fingerprint[case["edit"]] for case in chosen],
            "prompt_embeds": torch.stack([by_hash[case["embedding"]] for case in chosen]) if by_hash else None,
        }

    return cases, inputs


def _hash(tensor: torch.Tensor) -> str:
    array = tensor.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:32]


def _images(cases: list[dict]) -> list[list[Image.Image]]:
    return [[Image.fromarray(pixels) for pixels in case["images"]] for case in cases]


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
    }
    rows, prompt_cases = [], [{"prompt": prompt} for prompt in prompts]
    for name, (function, own, evaluations) in detectors.items():
        config = {"what": name, "seeds": list(preset.detection_seeds), "steps": steps, **own}
        config |= {"pairwise": _similarity(own["pairwise"])} if "pairwise" in own else {}
        detector = partial(function, pipe, **settings, **own)
        cases = _timed_cases(pipe, [case | config for case in prompt_cases], partial(_detector_scores, detector), store)
        cost = evaluations * len(preset.detection_seeds)
        rows += [_detected(p, name, c["score"], cost, c["seconds"]) for p, c in zip(prompts, cases, strict=True)]

    seconds = [case["seconds"] for case in _generated(pipe, prompts, preset.seeds, preset, store)]
    scores = diversity(cached_embeddings(pipe, prompts, preset.seeds, preset, store, sscd))
    cost = (2 if preset.guidance_scale > 1 else 1) * count_evaluations(pipe, steps) * len(preset.seeds)
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


def _timed_cases(pipe, cases: list[dict], compute, store) -> list[dict]:
    """Cases of the store, computed in batches; `seconds` of a result is its share of its batch's time."""

    def timed(chosen: list[dict]) -> list[dict]:
        start = time.perf_counter()
        results = compute(chosen)
        seconds = (time.perf_counter() - start) / len(chosen)
        return [{**result, "seconds": seconds} for result in results]

    batch_size = max(1, 32 // len(cases[0]["seeds"]))
    with known(pipe):  # weights stay what the key says
        key = {"model": current_hash(pipe), **_beside_weights(pipe)}
        return store.map([case | key for case in cases], timed, batch_size=batch_size, desc=cases[0]["what"])


def _beside_weights(pipe) -> dict:
    """What else of a pipeline its generations depend on: the sampler, and which token a word is."""
    settings = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    scheduler = f"{type(pipe.scheduler).__name__} {sorted(settings.items())}"
    tokens = hashlib.sha256(repr(sorted(pipe.tokenizer.get_vocab().items())).encode())
    return {"scheduler": scheduler, "tokens": tokens.hexdigest()[:16]}


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
        clip: of `metrics.load_clip`, for the column alignment.
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


def cached_attack(pipe, targets, config, store, edits=None, starts=None, seeds=None, *, rows=96, **kwargs) -> Triggers:
    """`attack`, one case of it a case of the store.

    Args:
        targets, config, edits, starts, seeds, rows: as `attack` takes them; edits None or one for each.
        kwargs: what else it takes and its result does not depend on: progress, checkpointing, callback.
    """
    edits = list(edits) if edits else [None] * len(targets)
    seeds = [config.seed] * len(targets) if seeds is None else list(seeds)
    fingerprints = {edit: edit.fingerprint() for edit in set(edits) if edit} | {None: None}
    key = {"what": "DoRI", "config": asdict(config), "model": current_hash(pipe), **_beside_weights(pipe)}
    cases = []
    for i, (target, edit, seed) in enumerate(zip(targets, edits, seeds, strict=True)):
        case = {"target": target.id, "prompt": target.prompt, "image": _data_hash(target.image)}
        case |= {"edit": fingerprints[edit], "seed": seed, "start": None if starts is None else _hash(starts[i])}
        cases.append(key | case)

    def compute(numbers: list[int]) -> list[dict]:
        own = {"edits": [edits[i] for i in numbers], "seeds": [seeds[i] for i in numbers]}
        own["starts"] = None if starts is None else starts[numbers]
        found = attack(pipe, [targets[i] for i in numbers], config, rows=rows, **own, **kwargs)
        return [_trigger_arrays(found[[i]]) for i in range(len(found))]

    together = cases_together(len(cases), config, rows)
    results = store.map(cases, _of_numbers(compute, cases), batch_size=together, progress=False)
    return Triggers(
        torch.stack([torch.from_numpy(result["prompt_embeds"]) for result in results]),
        torch.stack([torch.from_numpy(result["losses"]) for result in results]),
        [json.loads(str(result["about"])) for result in results],
        {s: torch.stack([torch.from_numpy(r[f"recorded {s}"]) for r in results]) for s in sorted(config.record)},
    )


def _trigger_arrays(found: Triggers) -> dict:
    recorded = {f"recorded {step}": embeds[0].numpy() for step, embeds in found.recorded.items()}
    about = np.array(json.dumps(found.cases[0]))
    return {
        "prompt_embeds": found.prompt_embeds[0].numpy(),
        "losses": found.losses[0].numpy(),
        "about": about,
        **recorded,
    }


def ordinary_cost(pipe, captions, reference, preset, store, clip, edits, inception=None) -> pd.DataFrame:
    """What mitigations cost prompts that nobody wanted changed.

    Args:
        captions: C ordinary prompts.
        reference: PIL images that the generations should be distributed like, such as real ones of these captions.
        clip: of `metrics.load_clip`.
        edits: as `audit` takes them; of a list of K edits, each made for another target, caption i gets number i % K.
        inception: file of Inception's weights, for FID and KID; None: without them.

    Returns:
        A row for each mitigation: alignment, mean A_CLIP of C captions; change, its difference to the same captions and
        seeds without mitigation, with a 95% interval over captions (low, high); frechet, the Fréchet distance of CLIP's
        image features to the reference's, images one for each caption and seed: compare only rows of one table. With
        `inception` the fields of `metrics.InceptionDistances`, too.
    """
    real, texts, rows = clip.embed_images(reference), clip.embed_texts(captions), []

    def embedded(each=None):  # (C, S, D)
        return cached_clip_embeddings(pipe, captions, preset.seeds, preset, store, clip, each)

    with known(pipe):
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
                row |= _cached_distances(pipe, captions, reference, preset, store, each, inception)
            rows.append(row)
        table = pd.DataFrame(rows)
        table.attrs = provenance(pipe, preset, clip=clip)
    return table


def _cached_distances(pipe, captions, reference, preset, store, edits, weights) -> dict:
    cases, _ = _cases(captions, preset.seeds, preset, edits)
    about = {"what": "FID and KID", "cases": cases, "reference": _data_hash(reference), "weights": Path(weights).name}
    about |= {"model": current_hash(pipe), **_beside_weights(pipe)}

    def compute() -> dict:
        images = cached_generate(pipe, captions, preset.seeds, preset, store, edits)
        return asdict(inception_distances([image for row in images for image in row], reference, weights))

    return {name: value.item() for name, value in store.fetch(about, compute).items()}


def edit_of_each(edit, targets, controls=(), name="edits") -> list[Edit] | None:
    """The edit for each of the targets and then the controls, from what `audit` takes; None: nobody has one."""
    if edit is None:
        return None
    each = list(edit) if isinstance(edit, list | tuple) else [edit] * len(targets)
    if len(each) != len(targets):
        raise ValueError(f"{name}: {len(each)} edits for {len(targets)} targets. Give one for each, or one for all.")
    return each + [each[i % len(each)] for i in range(len(controls))]


def cached_edits(localize_each, pipe, targets, config, store, prompt_embeds=None, **kwargs) -> list[Edit]:
    """`localize_each` of nemo or wanda, one target a case of the store.

    Args:
        localize_each: the function, called as localize_each(pipe, targets, config=config, **kwargs).
        prompt_embeds: None, or embeddings (N, T, D), such as triggers, that take the place of the prompts.
        kwargs: what else it takes; `statistics`, nemo's `order` and wanda's `authors` count for the case.
    """
    key = {"what": localize_each.__module__, "config": _config_of(config), "model": current_hash(pipe)}
    key |= _beside_weights(pipe)
    usual = {"order": "ascending", "authors": False}  # left out, as in cases from before these options
    key |= {name: kwargs[name] for name in usual if kwargs.get(name, usual[name]) != usual[name]}
    if "statistics" in kwargs:
        key["statistics"] = kwargs["statistics"].fingerprint()
    cases = [{**key, "target": target.id, "prompt": target.prompt} for target in targets]
    if prompt_embeds is not None:
        cases = [case | {"embedding": _hash(e)} for case, e in zip(cases, prompt_embeds, strict=True)]

    def compute(numbers: list[int]) -> list[dict]:
        embeds = {} if prompt_embeds is None else {"prompt_embeds": prompt_embeds[numbers]}
        with known(pipe):
            found = localize_each(pipe, [targets[i] for i in numbers], config=config, **embeds, **kwargs)
        return [edit.to_arrays() for edit in found]

    results = store.map(cases, _of_numbers(compute, cases), batch_size=64, progress=False)
    return [Edit.from_arrays(arrays) for arrays in results]


def _config_of(config) -> dict:
    """A config as part of a case."""
    settings = asdict(config)
    if "similarity" in settings:
        settings["similarity"] = _similarity(settings["similarity"])
    return settings


def _similarity(kind) -> str:
    """The name of a pairwise similarity in a case: plain "ms_ssim" was what "ms_ssim_unit" is now."""
    return "ms_ssim, authors'" if kind == "ms_ssim" else kind


def cached_statistics(pipe, captions, config, store) -> Statistics:
    """`nemo_statistics.collect_statistics` of ordinary captions, from the store."""
    about = {"what": "NeMo's statistics", "captions": _data_hash(list(captions)), "config": _config_of(config)}
    about |= {"model": current_hash(pipe), **_beside_weights(pipe)}

    def compute() -> dict:
        with known(pipe):
            found = collect_statistics(pipe, captions, config)
        return {name: tensor.numpy() for name, tensor in found.tensors().items()} | {"tau": found.tau}

    kept = store.fetch(about, compute)
    tau = float(kept.pop("tau"))
    tensors = {name: torch.from_numpy(array) for name, array in kept.items()}
    return Statistics.from_tensors(tensors, tau, base_hash(pipe), config.similarity)


def cached_training(train, pipe, targets, config, store, **data) -> list[Edit]:
    """An edit by a mitigation that trains, such as `finetuning.finetune`, from the store; interrupted, it goes on.

    Args:
        train: called as train(pipe, targets, config=config, work=folder, callback=function, **data).
        data: what else it takes, such as surrogates and ordinary images; counts for the case. Of a sequence that is not
            a list, and so may draw its items when asked for, only its length, first and last item do.

    Returns:
        The edits after each epoch, and one more after recovery, the last one being the result; a single one from a
        function without epochs.
    """
    key = {"what": f"{train.__module__}.{train.__name__}", "config": asdict(config), "model": current_hash(pipe)}
    key |= _beside_weights(pipe) | {"targets": [[t.id, t.prompt, t.image and _data_hash(t.image)] for t in targets]}
    key |= {"data": {name: _data_hash(value) for name, value in data.items()}}
    epochs = range(1, getattr(config, "epochs", 1) + bool(getattr(config, "recovery", 0)) + 1)
    work = store.folder / "training" / hashlib.sha256(canonical_json(key).encode()).hexdigest()[:32]

    def keep(found: dict) -> None:
        if "epoch" in found:
            found["edit"].save(work / f"epoch {found['epoch']}.safetensors")

    def compute(chosen: list[dict]) -> list[dict]:
        work.mkdir(parents=True, exist_ok=True)
        last = train(pipe, targets, config=config, work=work, callback=keep, **data)
        last.save(work / f"epoch {epochs[-1]}.safetensors")
        return [Edit.load(work / f"epoch {case['epoch']}.safetensors").to_arrays() for case in chosen]

    store.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(store.folder / f".{work.name}.lock"):  # two notebooks may want the same at once: one trains
        results = store.map([key | {"epoch": epoch} for epoch in epochs], compute, len(epochs), progress=False)
        shutil.rmtree(work, ignore_errors=True)  # checkpoint and copies: the edits are in the store now
    return [Edit.from_arrays(arrays) for arrays in results]


def cached_work(pipe, targets, config, store, sscd, transform, edits=None) -> pd.DataFrame:
    """`adaptive.time_to_copy`, one target a case of the store.

    Args:
        config: an `adaptive.Config`.
        edits: None, or one `Edit` or None for each target.

    Returns:
        A row for each target: target, work, copied, attempt, steps, sscd.
    """
    edits = list(edits) if edits else [None] * len(targets)
    fingerprints = {edit: edit.fingerprint() for edit in set(edits) if edit} | {None: None}
    key = {"what": "adaptive attack", "config": asdict(config), "model": current_hash(pipe), **_beside_weights(pipe)}
    key |= {"sscd": sscd.name, "transform": repr(TRANSFORMS[transform])}
    cases = []
    for target, edit in zip(targets, edits, strict=True):
        case = {"target": target.id, "prompt": target.prompt, "image": _data_hash(target.image)}
        cases.append(key | case | {"edit": fingerprints[edit]})

    def compute(numbers: list[int]) -> list[dict]:
        own = [edits[i] for i in numbers]
        return time_to_copy(pipe, [targets[i] for i in numbers], config, sscd, transform, edits=own)

    results = store.map(cases, _of_numbers(compute, cases), batch_size=32, progress=False)
    table = pd.DataFrame([{name: value.item() for name, value in result.items()} for result in results])
    return table.assign(target=[target.id for target in targets])


def kept(store, what, compute, **inputs) -> dict:
    """A notebook's own result from the store, or `compute(**inputs)`: the key is what it is, and all that it is given.

    So nothing that the result depends on can be missing from the key, as long as `compute` uses its arguments alone;
    tests/test_notebook_keys.py sees to that.

    Args:
        what: a name, such as "NeMo's decisions".
        compute: a function that returns a dict of named arrays.
        inputs: pipelines, edits, statistics, an SSCD, targets, settings (dataclasses), images, tensors; what JSON has;
            and lists and dicts of those.

    Raises:
        TypeError: an input of another kind, of which no key is known.
    """
    key = {"what": what, "dori_utils": __version__, **{name: _key_of(value) for name, value in inputs.items()}}
    return store.fetch(key, lambda: compute(**inputs))


def _key_of(value):
    """What stands for a value in a key: itself if JSON has it, else a fingerprint of all of it."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {name: _key_of(item) for name, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_key_of(item) for item in value]
    if isinstance(value, Image.Image):
        return _data_hash(value)
    if isinstance(value, torch.Tensor):
        return _hash(value)
    if isinstance(value, Edit | Statistics):
        return value.fingerprint()
    if isinstance(value, SSCD):
        return value.name
    if hasattr(value, "unet"):  # a pipeline
        return {"model": current_hash(value), **_beside_weights(value)}
    if is_dataclass(value):
        return {"of": type(value).__name__} | {f.name: _key_of(getattr(value, f.name)) for f in fields(value)}
    raise TypeError(f"A {type(value).__name__} cannot be part of a key: give what it is made of.")


def _of_numbers(compute, cases: list[dict]) -> Callable:
    """What `Store.map` calls, of a function that takes the numbers of the missing cases."""
    numbers = {canonical_json(case): number for number, case in enumerate(cases)}
    return lambda missing: compute([numbers[canonical_json(case)] for case in missing])


def _data_hash(value) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Image.Image):
        return _hash(torch.from_numpy(np.array(to_rgb(value))))
    if isinstance(value, list | tuple):
        return hashlib.sha256(repr([_data_hash(item) for item in value]).encode()).hexdigest()[:32]
    return _data_hash([str(len(value)), *value[0], *value[len(value) - 1]])


def provenance(pipe, preset, sscd=None, clip=None) -> dict:
    """What made a table: goes into its `attrs`, and from there into the CSV."""
    judges = {}
    if sscd is not None:
        judges["sscd"] = f"{sscd.name}, transform {preset.sscd_transform}"
    if clip is not None:
        judges["clip"] = Path(clip.model.name_or_path).name
    return {
        "model": preset.model,
        "weights": current_hash(pipe),
        **judges,
        "sampling": " ".join(f"{k}={v}" for k, v in preset.sampling.items()),
        "dori_utils": __version__,
    }


def scores_by_target(rows: pd.DataFrame) -> np.ndarray:
    """(targets, seeds) from tidy rows, in the order of the rows."""
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
