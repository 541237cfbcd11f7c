"""Cached: what takes long, from the store or computed now: images and their features, triggers, edits, trainings.

Each function has the arguments of what it keeps, and a case of the store for each prompt or target, so that every
notebook that asks for the same ones gets them from disk.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from dori_utils import __version__
from dori_utils.attack import attack, cases_together
from dori_utils.core.cache import kept, kept_each, key_of
from dori_utils.core.edits import Edit
from dori_utils.core.generation import generate
from dori_utils.core.hashes import known
from dori_utils.core.inception import inception_distances
from dori_utils.core.pictures import part_of
from dori_utils.core.regions import window_features
from dori_utils.core.sscd import TRANSFORMS
from dori_utils.core.store import canonical_json
from dori_utils.core.triggers import Triggers
from dori_utils.latent import invert
from dori_utils.tokens import find_prompts


def cached_generate(pipe, prompts, seeds, preset, store, edits=None, prompt_embeds=None, **more):
    """`generate` with the preset's sampling.

    Args:
        edits: None, or one `Edit` or None for each prompt.
        prompt_embeds: None, or embeddings (N, T, D), such as triggers, that take the place of the prompts.
        more: latents (N, S, C, H, W), or given, a `Given` for each prompt, as `generate` takes them.

    Returns:
        One list of PIL images for each prompt, one image for each seed.
    """
    cases = generated(pipe, prompts, seeds, preset, store, edits, prompt_embeds, **more)
    return [[Image.fromarray(pixels) for pixels in case["images"]] for case in cases]


def generated(pipe, prompts, seeds, preset, store, edits=None, prompt_embeds=None, **more) -> list[dict]:
    """The same as arrays: {"images": (S, height, width, 3) uint8, "seconds"} of each prompt."""
    rows = {"edits": edits or None, "prompt_embeds": prompt_embeds} | more

    def compute(chosen: list[int]) -> list[dict]:
        texts = [prompts[i] for i in chosen] if prompt_embeds is None else None
        own = _chosen(rows, chosen)
        images = generate(pipe, texts, seeds=seeds, **own, **preset.sampling, progress=False)
        return [{"images": np.stack([np.asarray(image) for image in row])} for row in images]

    return _of_prompts("generate", compute, pipe, prompts, seeds, preset, store, rows)


def cached_embeddings(
    pipe, prompts, seeds, preset, store, sscd, edits=None, prompt_embeds=None, part=None, **more
) -> np.ndarray:
    """SSCD features (N, S, D) of what `cached_generate` gives for the same arguments; part: the box that is judged."""
    judge = {"sscd": sscd, "transform": TRANSFORMS[preset.sscd_transform]} | ({"part": part} if part else {})

    def embed(images):
        images = [[part_of(image, part) for image in row] for row in images] if part else images
        return sscd.embed_rows(images, transform=preset.sscd_transform, progress=False)

    rows = {"edits": edits or None, "prompt_embeds": prompt_embeds} | more
    return _features("SSCD", judge, embed, pipe, prompts, seeds, preset, store, rows)


def cached_window_features(pipe, prompts, seeds, preset, store, sscd, edits=None, prompt_embeds=None, **more):
    """SSCD features (N, S, G * G, D) of the windows of the same images, see core.regions."""
    judge = {"sscd": sscd, "transform": TRANSFORMS[preset.sscd_transform]}

    def embed(images):
        return [window_features(row, preset.sscd_transform, sscd, progress=False) for row in images]

    rows = {"edits": edits or None, "prompt_embeds": prompt_embeds} | more
    return _features("SSCD of windows", judge, embed, pipe, prompts, seeds, preset, store, rows)


def cached_clip_embeddings(
    pipe, prompts, seeds, preset, store, clip, edits=None, prompt_embeds=None, **more
) -> np.ndarray:
    """CLIP's features (N, S, D) of the same images."""
    rows = {"edits": edits or None, "prompt_embeds": prompt_embeds} | more
    return _features("CLIP", {"clip": clip}, clip.embed_rows, pipe, prompts, seeds, preset, store, rows)


def _features(what, judge, embed_rows, pipe, prompts, seeds, preset, store, rows) -> np.ndarray:
    def compute(chosen: list[int]) -> list[dict]:
        texts = [prompts[i] for i in chosen]
        images = cached_generate(pipe, texts, seeds, preset, store, **_chosen(rows, chosen))
        return [{"features": row} for row in embed_rows(images)]

    results = _of_prompts(what, compute, pipe, prompts, seeds, preset, store, rows, **judge)
    return np.stack([result["features"] for result in results])


def _chosen(rows, chosen) -> dict:
    """Of some prompts what they are generated from."""
    return {
        name: values[chosen] if isinstance(values, torch.Tensor) else [values[i] for i in chosen]
        for name, values in rows.items()
        if values is not None
    }


def _of_prompts(what, compute, pipe, prompts, seeds, preset, store, rows, **judge) -> list[dict]:
    """A case for each prompt; rows: what each is generated from, by name, with a value for each prompt, or None."""
    if not prompts:
        raise ValueError("No prompts: give at least one.")
    cases, called = [{"prompt": prompt} for prompt in prompts], {"edits": "edit", "prompt_embeds": "embedding"}
    for name, values in rows.items():
        if values is not None:
            cases = [case | {called.get(name, name): value} for case, value in zip(cases, values, strict=True)]
    sampling = preset.sampling | {"seeds": list(seeds)}
    return timed_cases(store, what, cases, compute, pipe, sampling=sampling, **judge)


def timed_cases(store, what, cases, compute: Callable, pipe, sampling: dict, **shared) -> list[dict]:
    """`kept_each` in batches of 32 images; `seconds` of a result is its share of its batch's time."""

    def timed(chosen: list[int]) -> list[dict]:
        start = time.perf_counter()
        results = compute(chosen)
        seconds = (time.perf_counter() - start) / len(chosen)
        return [{**result, "seconds": seconds} for result in results]

    batch_size = max(1, 32 // len(sampling["seeds"]))
    with known(pipe):  # weights stay what the key says
        shared |= {"pipe": pipe, "sampling": sampling}
        return kept_each(store, what, cases, timed, batch_size=batch_size, progress=True, **shared)


def cached_attack(pipe, targets, config, store, edits=None, starts=None, seeds=None, *, rows=96, **kwargs) -> Triggers:
    """`attack`, one case of it a case of the store.

    Args:
        targets, config, edits, starts, seeds, rows: as `attack` takes them; edits None or one for each.
        kwargs: what else it takes and its result does not depend on: progress, checkpointing, callback.
    """
    if not targets:
        raise ValueError("No targets: give at least one.")
    edits = list(edits) if edits else [None] * len(targets)
    seeds = [config.seed] * len(targets) if seeds is None else list(seeds)
    cases = [case | {"seed": seed} for case, seed in zip(_image_cases(targets, edits), seeds, strict=True)]
    if starts is not None:
        cases = [case | {"start": start} for case, start in zip(cases, starts, strict=True)]

    def compute(chosen: list[int]) -> list[dict]:
        own = {"edits": [edits[i] for i in chosen], "seeds": [seeds[i] for i in chosen]}
        own["starts"] = None if starts is None else starts[chosen]
        found = attack(pipe, [targets[i] for i in chosen], config, rows=rows, **own, **kwargs)
        return [_trigger_arrays(found[[i]]) for i in range(len(found))]

    together = cases_together(len(cases), config, rows)
    with known(pipe):
        results = kept_each(store, "DoRI", cases, compute, batch_size=together, pipe=pipe, config=config)
    return _triggers(results, config.record)


def cached_prompts(pipe, targets, config, store, edits=None, *, rows=96, **kwargs) -> Triggers:
    """`tokens.find_prompts`, one target a case of the store; edits None or one for each, kwargs: progress."""
    edits, together = list(edits) if edits else [None] * len(targets), cases_together(len(targets), config, rows)

    def compute(chosen: list[int]) -> list[dict]:
        some, own = [targets[i] for i in chosen], [edits[i] for i in chosen]
        found = find_prompts(pipe, some, config, edits=own, rows=rows, **kwargs)
        return [_trigger_arrays(found[[i]]) for i in range(len(found))]

    with known(pipe):
        cases = _image_cases(targets, edits)
        results = kept_each(store, "tokens", cases, compute, batch_size=together, pipe=pipe, config=config)
    return _triggers(results, config.record)


def cached_inversion(pipe, targets, config, num_inference_steps, store, edits=None, **kwargs) -> torch.Tensor:
    """`latent.invert`, (N, C, H, W), one target a case of the store; edits None or one for each, kwargs: progress."""
    edits = list(edits) if edits else [None] * len(targets)
    shared = {"num_inference_steps": num_inference_steps, "refinements": config.refinements}

    def compute(chosen: list[int]) -> list[dict]:
        some, own = [targets[i] for i in chosen], [edits[i] for i in chosen]
        found = invert(pipe, some, config, num_inference_steps=num_inference_steps, edits=own, **kwargs)
        return [{"noise": noise} for noise in found.cpu().numpy()]

    with known(pipe):
        cases = _image_cases(targets, edits)
        results = kept_each(store, "inverted noise", cases, compute, batch_size=32, pipe=pipe, **shared)
    return torch.stack([torch.from_numpy(result["noise"]) for result in results])


def _image_cases(targets, edits) -> list[dict]:
    return [
        {"target": target.id, "prompt": target.prompt, "image": target.image, "edit": edit}
        for target, edit in zip(targets, edits, strict=True)
    ]


def _triggers(results, record) -> Triggers:
    return Triggers(
        torch.stack([torch.from_numpy(result["prompt_embeds"]) for result in results]),
        torch.stack([torch.from_numpy(result["losses"]) for result in results]),
        [json.loads(str(result["about"])) for result in results],
        {s: torch.stack([torch.from_numpy(r[f"recorded {s}"]) for r in results]) for s in sorted(record)},
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


USUAL = {"statistics": None, "order": "ascending", "authors": False}  # options of `localize_each` that count for a case


def cached_edits(localize_each, pipe, targets, config, store, prompt_embeds=None, **kwargs) -> list[Edit]:
    """`localize_each` of nemo or wanda, one target a case of the store.

    Args:
        localize_each: the function, called as localize_each(pipe, targets, config=config, **kwargs).
        prompt_embeds: None, or embeddings (N, T, D), such as triggers, that take the place of the prompts.
        kwargs: what else it takes; `statistics`, nemo's `order` and wanda's `authors` count for the case.
    """
    method = localize_each.__module__.rpartition(".")[2]
    cases = [{"target": target.id, "prompt": target.prompt} for target in targets]
    if prompt_embeds is not None:
        cases = [case | {"embedding": embeds} for case, embeds in zip(cases, prompt_embeds, strict=True)]

    def compute(chosen: list[int]) -> list[dict]:
        embeds = {} if prompt_embeds is None else {"prompt_embeds": prompt_embeds[chosen]}
        found = localize_each(pipe, [targets[i] for i in chosen], config=config, **embeds, **kwargs)
        return [edit.to_arrays() for edit in found]

    unusual = {name: kwargs[name] for name, usual in USUAL.items() if kwargs.get(name, usual) != usual}
    shared = {"pipe": pipe, "config": config} | unusual
    with known(pipe):
        results = kept_each(store, method, cases, compute, batch_size=64, **shared)
    return [Edit.from_arrays(arrays) for arrays in results]


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
    what = {"what": train.__name__, "dori_utils": __version__}
    key = what | key_of({"config": config, "pipe": pipe, "targets": list(targets), "data": data})
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


def cached_distances(pipe, captions, reference, preset, store, edits, weights) -> dict:
    """`inception_distances` of what `cached_generate` gives for these captions, to reference pictures."""
    edits = edits or [None] * len(captions)

    def compute(**given) -> dict:
        images = cached_generate(pipe, captions, preset.seeds, preset, store, edits)
        return asdict(inception_distances([image for row in images for image in row], reference, weights))

    inputs = {"captions": captions, "edits": edits, "reference": reference, "weights": Path(weights).name}
    inputs |= {"pipe": pipe, "sampling": preset.sampling, "seeds": list(preset.seeds)}
    return {name: value.item() for name, value in kept(store, "FID and KID", compute, **inputs).items()}
