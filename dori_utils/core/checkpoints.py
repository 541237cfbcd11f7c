"""Checkpoints: a whole model in one safetensors file, in Stable Diffusion's original layout."""

import warnings

from dori_utils.core.arguments import first_three
from dori_utils.core.hashes import WEIGHTS
from dori_utils.core.hub import SD2_BASES, _locate, _repair, first_line, quiet


def check_tokenizer(folder):
    """Without its files transformers makes up a tokenizer of three words without a length limit, and says nothing."""
    tokenizer = folder / "tokenizer"
    vocabulary = ["tokenizer.json"] if (tokenizer / "tokenizer.json").is_file() else ["vocab.json", "merges.txt"]
    for name in ["tokenizer_config.json", *vocabulary]:
        if not (tokenizer / name).is_file():
            raise FileNotFoundError(f"No tokenizer file {tokenizer / name}. {_repair(folder)}")


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
            "with model.diffusion_model. A U-Net or a LoRA goes on top of a model: cli.weights.read_edit, or --edit."
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
    """What the U-Net of a single file predicts, "epsilon" or "v", if the file says so; else None."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        keys, about = set(content.keys()), content.metadata() or {}
        told = {key: content.get_tensor(key) for key in keys & {"global_step", "v_pred"}}
    return says_it_predicts(told, about)


def says_it_predicts(tensors, about):
    """The same of a file's tensors and the texts about them.

    It may say so in the texts (github.com/Stability-AI/ModelSpec), in a tensor without content called v_pred, or by
    global_step: of Stable Diffusion 2, whose weights have the same names and shapes either way, diffusers knows the
    512-pixel model by that.
    """
    step = tensors["global_step"].item() if "global_step" in tensors else None
    said = {about.get(f"modelspec.{field}") for field in ("prediction_type", "predict_key")} & {"epsilon", "v"}
    architecture = about.get("modelspec.architecture", "")
    if "v_pred" in tensors or architecture.startswith("stable-diffusion-v2-768-v"):
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
    if {key for key in keys if key.startswith("model_ema.")} - {"model_ema.decay", "model_ema.num_updates"}:
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


def _check_safetensors(file):
    """A cheap check: the header must be readable, and the file as long as it says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise OSError(f"Corrupt weight file {file} ({first_line(error)}). {_repair(file.parent.parent)}") from error


def _check_cross_attention(unet, folder):
    if not any(name.endswith("attn2") for name, _ in unet.named_modules()):
        raise ValueError(
            f"The {type(unet).__name__} in {folder} has no cross-attention (no layer named attn2), so no prompt "
            "can trigger anything in it. Use a text-to-image Stable Diffusion model."
        )
