"""Tensor files: named tensors of safetensors and of pickled files, and which files of a folder hold a model's weights.

Safetensors come first. Of a pickled file (.pt, .pth, .ckpt, .bin) tensors only are read; no code of the file is run:
PyTorch's `weights_only`, which knows tensors, numbers, texts and their containers, and ends at anything else.
"""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from dori_utils.core.arguments import first_three
from dori_utils.core.hub import PICKLED, first_line

MOST_BYTES = 16 * 2**30  # of a pickled file: twice Stable Diffusion 1.x with its average over training
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of a folder's weight files: diffusers', transformers'


def read_tensors(file):
    """Name → tensor on the CPU, and the texts about them (name → text).

    Containers within a pickled file are told by their names: {"unet": {"conv_in.bias": ...}} has unet.conv_in.bias.
    Numbers and texts in it are left out.

    Raises:
        OSError: a file that is damaged, too large, or holds more than tensors, numbers and texts.
    """
    file = Path(file)
    if file.suffix not in PICKLED:
        return _read_safetensors(file)
    check_size(file)
    flat = dict(_flat(_unpickled(file)))
    if not flat:
        raise OSError(f"{file} is pickled, and no tensor is in it.")
    if "" in flat:
        raise OSError(f"{file} is pickled, and holds a single tensor without a name.")
    return flat, {}


def check_size(file):
    """An OSError if a pickled file is larger than `MOST_BYTES`, or would be when it is unpacked."""
    size, packed = file.stat().st_size, False
    if zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as content:
                packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in content.infolist())
        except zipfile.BadZipFile as error:
            raise OSError(f"{file} is pickled, and damaged ({first_line(error)}).") from error
    if packed:
        raise OSError(f"{file} is a compressed archive, and PyTorch writes none: it is not read. Give safetensors.")
    if size > MOST_BYTES:
        raise OSError(
            f"{file} is pickled and has {size / 2**30:.1f} GiB, more than the {MOST_BYTES / 2**30:.0f} that are read "
            "of a pickled file. Give safetensors, or its weights alone (its state_dict, without the optimizer's)."
        )


def weight_files(folder):
    """Which files of a model's folder hold its weights, and what `from_pretrained` must be told to take them.

    The default ones, safetensors before pickled; else those of the only variant that is there (fp16).

    Returns:
        A list of files, without one if there is none; and {"use_safetensors": ..., "variant": ...}.

    Raises:
        OSError: several variants and no default.
    """
    for kind in ("safetensors", "bin"):
        names = "|".join(STEMS)
        pattern = rf"({names})(\.(?P<a>\w+))?(-\d+-of-\d+)?(\.(?P<b>(?!index)\w+))?\.{kind}"
        found = {}
        for file in sorted(Path(folder).glob(f"*.{kind}")):
            if named := re.fullmatch(pattern, file.name):
                found.setdefault(named["a"] or named["b"], []).append(file)
        if not found:
            continue
        if None not in found and len(found) > 1:
            raise OSError(f"{folder} holds {first_three(found)} variants of weights and no default: keep one of them.")
        variant = None if None in found else next(iter(found))
        return found[variant], {"use_safetensors": kind == "safetensors", "variant": variant}
    return [], {}


def warn_of_files(files, chosen):
    """A `UserWarning` that says which files are taken where they are not the usual ones."""
    names, pickled = first_three(file.name for file in files), not chosen["use_safetensors"]
    if pickled:
        taken = "pickled and taken: tensors only; no code of the file is run"
    elif chosen["variant"]:
        taken = "taken, as it is all that is there"
    else:
        return
    warnings.warn(f"{files[0].parent}: {names} is {taken}.", stacklevel=3)


def _read_safetensors(file):
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(file, framework="pt") as content:
            about = content.metadata() or {}
        return load_file(file), about
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} is not a readable safetensors file ({first_line(error)}).") from error


def _unpickled(file):
    words = f"{file} is pickled (of such a file, tensors only; no code of the file is run)"
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of many kinds, for whatever may be in a file
        if needs := re.search(r"(?:Unsupported (?:global|class)|GLOBAL)[: ]+(?:GLOBAL )?([\w.]+)", str(error)):
            raise OSError(
                f"{words}, and holds more: {needs[1]}. Save its weights alone, where you trust it: "
                "torch.save(model.state_dict(), file)."
            ) from error
        raise OSError(f"{words}, and cannot be read: {first_line(error).split('. ')[0]}.") from error


def _flat(value, name=""):
    """(name, tensor) of each tensor within nested containers."""
    if isinstance(value, torch.Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from _flat(item, f"{name}.{number}".removeprefix("."))
