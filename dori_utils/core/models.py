"""Stable Diffusion models: a name or a path becomes a pipeline that is ready to be looked into.

Everything here works on diffusers' `StableDiffusionPipeline`: a text encoder turns a prompt into embeddings, the U-Net
reads them through cross-attention while it denoises latents, and the VAE decodes the latents to pixels. `load_pipeline`
finds one by short name, folder or Hugging Face Hub id, and hands it over in the state that every analysis expects:
evaluation mode, no gradients on weights, no safety checker (a replaced black image would read as "not memorized").

Safetensors are read; of a folder that has pickled weights alone (.bin), those: tensors only; no code of the file is
run.
"""

import ctypes
import importlib
import json
import sys
from pathlib import Path

import torch

from dori_utils.core.arguments import first_three
from dori_utils.core.checkpoints import _check_cross_attention, _check_safetensors, _load_single_file, check_tokenizer
from dori_utils.core.hashes import WEIGHTS
from dori_utils.core.hub import BUNDLED, _locate, _repair, first_line, quiet
from dori_utils.core.tensor_files import check_size, warn_of_files, weight_files


@torch.inference_mode(False)  # else weights loaded under a caller's inference_mode could not be attacked
def load_pipeline(name_or_path="testbed", *, base=None, device=None, dtype=None, revision=None, local_files_only=False):
    """Load a Stable Diffusion pipeline, in evaluation mode and without gradients.

    Args:
        name_or_path: a key of `MODELS`, a folder in diffusers' layout, a single-file checkpoint (safetensors), or a Hub
            id "owner/name", also with its revision, "owner/name@revision". A key wins over a folder of the same name;
            write "./sd14" for the folder.
        base: of a single file, which has weights alone: the model whose configuration and tokenizer it has, named as
            above, but no single file; default: Stable Diffusion 1.5, or of 2 the one that the file says it is, if it
            does. Of a Hub model the weights are not fetched.
        device: where to put it; default: the best one that there is (`default_device`).
        dtype: of the weights; default: float16 on CUDA, float32 elsewhere, and everywhere for the testbed, which is
            small: so its hash, and with it edits and NeMo's statistics, are the same on every device.
        revision: branch, tag or commit of a Hub model.
        local_files_only: never use the network; take a Hub model from the local cache.

    Returns:
        A `StableDiffusionPipeline`.

    Raises:
        ValueError: an unknown name (with the nearest known ones), a model without cross-attention, or a file that is no
            checkpoint of a whole Stable Diffusion 1.x or 2.x, or does not say which 2.x; a U-Net with more weights than
            its configuration has layers for.
        FileNotFoundError: a missing folder or file.
        OSError: a model that the Hub does not give, or a file that cannot be read.
    """
    with quiet():
        from diffusers import StableDiffusionPipeline

    device = torch.device(device) if device is not None else default_device()
    if device.type == "cpu":
        _keep_memory()
    folder = _locate(name_or_path, revision, local_files_only)
    bundled = folder.resolve() in BUNDLED.values()
    dtype = dtype or (torch.float16 if device.type == "cuda" and not bundled else torch.float32)
    if folder.is_file():
        return _load_single_file(folder, base, dtype, local_files_only).to(device)
    _check_files(folder)
    try:
        with quiet():
            parts = {part: _load_part(folder, part, dtype) for part in WEIGHTS}
            pipe = StableDiffusionPipeline.from_pretrained(
                folder, **parts, safety_checker=None, requires_safety_checker=False, local_files_only=True
            )
    except Exception as error:
        raise OSError(f"Cannot load the model in {folder}: {first_line(error)}. {_repair(folder)}") from error
    _check_cross_attention(pipe.unet, folder)
    for part in parts.values():
        part.eval().requires_grad_(False)
    return pipe.to(device)


def load_unet(folder, *, dtype=None):
    """Load a U-Net alone, such as someone's edited one, from its own folder or from that of a pipeline.

    Args:
        folder: in diffusers' layout; or a pipeline's, of which the other parts are not looked at.
        dtype: of the weights; default: float32.

    Raises:
        FileNotFoundError: no U-Net there.
        ValueError: weights that its configuration has no layer for, or that are missing.
        OSError: a file that cannot be read.
    """
    from diffusers import UNet2DConditionModel

    folder = Path(folder).expanduser()
    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    if not weight_files(folder)[0] or not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no U-Net: a config.json and weights *.safetensors. Check the path.")
    check_weight_files(folder)
    unet = from_pretrained(UNet2DConditionModel, folder)
    with quiet():
        return unet.to(dtype or torch.float32).eval().requires_grad_(False)


def default_device():
    """The best device that there is: CUDA, else MPS (Apple), else CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _keep_memory():
    """Has glibc keep what is freed, where the C library is glibc (Linux).

    By default it gives large blocks back to the system at once, and every activation of the U-Net is such a block: a
    quarter of the time of a forward pass went into clearing pages for the next one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        most = 2**31 - 1
        mallopt(-4, 0)  # M_MMAP_MAX: no block by a mapping of its own
        mallopt(-1, most)  # M_TRIM_THRESHOLD: nothing given back


def _check_files(folder):
    """Name the file that is missing or damaged before diffusers and transformers guess around it."""
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model_index.json, so it is no diffusers pipeline. Check the path.")
    for part in WEIGHTS:
        if not weight_files(folder / part)[0]:
            there = sorted(file.name for file in (folder / part).glob("*")) or ["nothing"]
            raise FileNotFoundError(
                f"No weight file {folder / part}/*.safetensors, nor *.bin; there is {first_three(there)}. "
                f"{_repair(folder)}"
            )
        check_weight_files(folder / part)
    check_tokenizer(folder)


def check_weight_files(folder):
    """Name the weight file that is damaged or too large, and say which are taken if these are not the usual ones."""
    files, chosen = weight_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights: no file *.safetensors, nor *.bin.")
    for file in files:
        (_check_safetensors if chosen["use_safetensors"] else check_size)(file)
    warn_of_files(files, chosen)


def config_of(folder):
    """What a model's or a scheduler's config.json says; nothing of a tokenizer, which has none."""
    for file in (folder / "config.json", folder / "scheduler_config.json"):
        if file.is_file():
            try:
                return dict(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise OSError(f"{file} cannot be read as a configuration ({error}).") from error
    return {}


def _load_part(folder, part, dtype):
    """One model of the pipeline."""
    library, class_name = json.loads((folder / "model_index.json").read_text())[part]
    if library not in ("diffusers", "transformers"):
        raise ValueError(f"its {part} needs code of {library!r}, which is not run")
    model = from_pretrained(getattr(importlib.import_module(library), class_name), folder / part)
    return model.to(dtype)  # not at loading: diffusers calls that torch_dtype or dtype, depending on its version


def from_pretrained(model_class, folder, all_used=False):
    """A model whose every weight is from its file: the libraries only warn when they make up a random one.

    Of a U-Net, and with `all_used` of any model, also no weight may be left over.
    """
    with quiet():
        model, report = model_class.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **weight_files(folder)[1]
        )
    if report["missing_keys"]:
        raise ValueError(f"weights are missing from {folder}: {', '.join(sorted(report['missing_keys'])[:3])}")
    unused = sorted(name for name in report["unexpected_keys"] if not name.endswith("position_ids"))
    if unused and (all_used or model_class.__name__ == "UNet2DConditionModel"):
        raise ValueError(f"{folder} holds weights that no layer in its config.json has: {first_three(unused)}")
    return model
