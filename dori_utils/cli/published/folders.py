"""Folders: whole pipelines, and single parts of them, in diffusers' layout.

Of a pipeline's folder every part that is there is compared with the pipeline: U-Net, text encoder, VAE and scheduler
become part of the edit where they differ. A tokenizer cannot: an edit knows no words. So a pipeline with another one,
or with a part of another kind, is refused by the name of the part: it is a model of its own.
"""

import json
import warnings

import torch

from dori_utils.core import checkpoints, models
from dori_utils.core.differences import between, check_architecture, same_but_rounded, scheduler_change
from dori_utils.core.edits import Edit
from dori_utils.core.hub import first_line, quiet
from dori_utils.core.models import load_unet
from dori_utils.core.parts import WORDS

PARTS = ("unet", "text_encoder", "vae", "scheduler", "tokenizer")  # what a pipeline's images depend on
OTHERS = ("text_encoder_2", "text_encoder_3", "transformer", "prior", "controlnet")  # of pipelines of other kinds


def is_pipeline(folder):
    return any((folder / part).is_dir() for part in (*PARTS, *OTHERS))


def read_pipeline(pipe, folder, name) -> Edit:
    """The `Edit` that makes a pipeline the one in a folder, of which parts may be missing.

    Raises:
        ValueError: parts of other kinds or with other layers, another tokenizer, or no change at all.
        OSError: a part that cannot be read.
    """
    if strange := [part for part in OTHERS if (folder / part).is_dir()]:
        raise ValueError(f"{folder} is of another kind than the pipeline: it has a {strange[0]}. {of_its_own(folder)}")
    others = {part: _loaded(pipe, folder, part) for part in PARTS if (folder / part).is_dir()}
    tokenizer = others.pop("tokenizer", None)
    changed = [part for part, other in others.items() if isinstance(other, str)]
    changed += ["tokenizer"] if tokenizer is not None and _tokens(pipe.tokenizer) != _tokens(tokenizer) else []
    if changed:
        raise ValueError(
            f"{folder} differs from the pipeline in its {' and '.join(changed)}, and that is more than other weights "
            f"or another scheduler: no edit holds it. {of_its_own(folder)}"
        )
    try:
        return between(pipe, others, method=name)
    except ValueError as error:
        advice = f" {of_its_own(folder)}" if "another architecture" in str(error) else ""
        raise ValueError(f"{folder}: {error}{advice}") from error


def read_part(pipe, folder, name) -> Edit:
    """The `Edit` to the single model or scheduler that a folder holds."""
    config = models.config_of(folder)
    kind = config.get("_class_name") or (config.get("architectures") or ["an unknown model"])[0]
    part = next((part for part in WORDS if type(getattr(pipe, part)).__name__ == kind), None)
    if part is None and kind.endswith("Scheduler"):
        part = "scheduler"
    if part is None:
        raise ValueError(f"{folder} holds {kind}, which is no part of the pipeline.")
    edit = between(pipe, {part: _load(pipe, folder, part)}, method=name)
    if folder.resolve().name == part:
        _warn_of_changes_around(pipe, folder.resolve().parent, part)
    return edit


def of_its_own(path):
    """What to do with what is no edit."""
    return f"Audit it as a model of its own: load_pipeline({str(path)!r}), or --model {path}."


def _loaded(pipe, folder, part):
    """The part of a pipeline's folder; the name of its class where that is another than the pipeline's part has."""
    own, place = getattr(pipe, part), folder / part
    try:
        kind = _class_of(folder, part)
        if part in ("unet", "text_encoder", "vae") and kind not in (None, type(own).__name__):
            return kind
        return _load(pipe, place, part, kind)
    except Exception as error:  # of many kinds, the libraries' among them
        if part == "unet" and isinstance(error, OSError | ValueError):
            raise
        raise OSError(
            f"{place} cannot be compared with the pipeline's {part} ({first_line(error)}). If nothing but the U-Net "
            f"was changed, give its folder alone: {folder / 'unet'}."
        ) from error


def _class_of(folder, part):
    """The class of a part, as the pipeline's index or the part's own configuration has it."""
    index = folder / "model_index.json"
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8")).get(part)
        if named and named[-1]:
            return named[-1]
    config = models.config_of(folder / part)
    return config.get("_class_name") or next(iter(config.get("architectures") or []), None)


def _load(pipe, place, part, kind=None):
    own = getattr(pipe, part)
    if part == "unet":
        return load_unet(place, dtype=own.dtype)
    if part == "tokenizer":
        checkpoints.check_tokenizer(place.parent)
    elif part != "scheduler":
        models.check_weight_files(place)
        return models.from_pretrained(type(own), place, all_used=True)
    with quiet():
        return (_scheduler_class(place, kind) if part == "scheduler" else type(own)).from_pretrained(
            place, local_files_only=True
        )


def _scheduler_class(place, kind):
    import diffusers

    kind = kind or models.config_of(place).get("_class_name")
    found = getattr(diffusers, str(kind), None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise ValueError(f"{place} is of {kind}, which is no scheduler in diffusers {diffusers.__version__}")
    return found


def _tokens(tokenizer):
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges")
    return tokenizer.get_vocab(), merges, tokenizer.pad_token, tokenizer.model_max_length


def _warn_of_changes_around(pipe, around, alone):
    """A `UserWarning` if the pipeline that a part's folder lies in differs in more than this part."""
    try:
        changed = [part for part in PARTS if part != alone and _differs(pipe, around, part)]
    except OSError as error:
        differs = f"may differ in more: {first_line(error.__cause__ or error)}."
    else:
        differs = changed and f"differs in its {' and '.join(changed)}, too. Give its folder to take all: {around}."
    if differs:
        warnings.warn(f"{around / alone} is taken alone, as asked for. The pipeline around it {differs}", stacklevel=4)


def _differs(pipe, folder, part):
    """Is a part of a pipeline's folder another one than the pipeline's, in more than the precision of its weights?"""
    if not (folder / part).is_dir():
        return False
    own, other = getattr(pipe, part), _loaded(pipe, folder, part)
    if isinstance(other, str):
        return True
    if part == "tokenizer":
        return _tokens(own) != _tokens(other)
    if part == "scheduler":
        return bool(scheduler_change(pipe, other))
    try:
        check_architecture(pipe, part, other)
    except ValueError:
        return True
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        return not all(same_but_rounded(weight, theirs[name]) for name, weight in own.named_parameters())
