"""Weights that someone else has made: `read_edit` reads them as the `Edit` that they are of a pipeline's U-Net.

* a file that `Edit.save` wrote;
* a U-Net: its folder or its file in diffusers' layout, a pipeline's folder, or a single-file checkpoint;
* a LoRA: a file or a folder of diffusers, peft or kohya. Its delta is scale * B A of every layer that it adapts. What
  is more than that (DoRA's magnitudes, biases) or does not fit is refused, never left out.

Which it is, is told by what the file holds, not by its name. Pickled files are refused.
"""

import copy
import json
import tempfile
from pathlib import Path

from .edits import Edit, known_base
from .models import PICKLED, load_unet, quiet

PEFT = "base_model.model."  # what names begin with in peft's own files
SCALE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")  # settings that matter
KINDS = "a file of Edit.save, a U-Net (its folder or a checkpoint, as safetensors), or a LoRA"


def read_edit(pipe, path, *, name=None) -> Edit:
    """The edit of a pipeline's U-Net that a file or a folder stands for.

    Args:
        pipe: the base that it was made from, without an edit applied to it; left as it is.
        path: see the module's docstring.
        name: its `method`, for tables; default: the name of the file, or of the folder. A file of `Edit.save` has one.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another architecture, no change at all, a LoRA that changes the text encoder, or none of the kinds.
        OSError: a damaged or a pickled file.
    """
    path = Path(path).expanduser()
    name = name or edit_name(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}. Give {KINDS}.")
    if path.suffix in PICKLED:
        raise OSError(f"{path} is pickled, and a pickle can run code when it is opened. Give it as safetensors.")
    if path.is_dir() and ((path / "unet").is_dir() or (path / "config.json").is_file()):
        # A pipeline's folder may hold a checkpoint of the same model, too, as those on the Hub do.
        return Edit.between(pipe, load_unet(path, dtype=pipe.unet.dtype), method=name)
    path = _only_file(path) if path.is_dir() else path
    keys, about = _content(path)
    if "edit" in about:
        return Edit.load(path)
    if any("lora" in key for key in keys):
        return _lora(pipe, path, name)
    if any(key.startswith("model.diffusion_model.") for key in keys):
        return Edit.between(pipe, _unet_of_checkpoint(pipe, path), method=name)
    if "conv_in.weight" in keys:
        return Edit.between(pipe, _unet_of_file(pipe, path), method=name)
    raise ValueError(f"{path} holds weights of an unknown kind, such as {', '.join(sorted(keys)[:3])}. Give {KINDS}.")


def edit_name(path):
    """What the edit in a file or folder is called; of a folder named unet, what the one around it is called."""
    path = Path(path).resolve()
    return path.parent.name if path.name == "unet" else path.stem if path.is_file() else path.name


def _only_file(folder):
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no U-Net with its config.json, and no safetensors file. Give {KINDS}.")
    if len(files) > 1:
        raise ValueError(f"{folder} holds {len(files)} safetensors files: give the one that is meant.")
    return files[0]


def _content(file):
    """Names of a file's tensors, and the texts about them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            return set(content.keys()), content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} is not a readable safetensors file ({error}). Give {KINDS}.") from error


def _unet_of_checkpoint(pipe, path):
    """The U-Net of a single-file checkpoint in the original layout; its architecture is the pipeline's."""
    from diffusers import UNet2DConditionModel

    with tempfile.TemporaryDirectory() as folder, quiet():
        pipe.unet.save_config(folder)
        try:
            unet = UNet2DConditionModel.from_single_file(str(path), config=folder, local_files_only=True)
        except NotImplementedError as error:  # torch's, of a parameter that no weight was found for
            raise ValueError(f"{path} lacks weights of the U-Net.") from error
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"The U-Net in {path} is of another architecture than the pipeline's ({error})."
            ) from error
        return unet.to(pipe.unet.dtype)


def _unet_of_file(pipe, path):
    from safetensors.torch import load_file

    unet = copy.deepcopy(pipe.unet)
    try:
        unet.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(f"The U-Net in {path} is of another architecture than the pipeline's ({error}).") from error
    return unet


def _lora(pipe, path, name):
    if any("dora_scale" in key or "lora_magnitude_vector" in key for key in _content(path)[0]):
        raise ValueError(
            f"The LoRA in {path} is a DoRA, which is more than scale * B A. Fuse it into a pipeline (fuse_lora), save "
            "that, and give its folder."
        )
    with quiet():
        state, about = _lora_of_unet(pipe, path)
        if any(key.startswith(("text_encoder", "lora_te")) for key in state):
            raise ValueError(
                f"The LoRA in {path} changes the text encoder, too, and an Edit holds changes of the U-Net alone. Fuse "
                "it into a pipeline (load_lora_weights, fuse_lora), save that, and audit it as a model of its own."
            )
        with known_base(pipe) as base:
            unet = copy.deepcopy(pipe.unet).float()  # a copy, since adapters leave traces
            try:
                pipe.load_lora_into_unet(state, None, unet, adapter_name="theirs", metadata=about)
            except (RuntimeError, KeyError, ValueError, TypeError) as error:
                raise ValueError(f"The LoRA in {path} does not fit this U-Net ({error}).") from error
    layers = {layer: module for layer, module in unet.named_modules() if hasattr(module, "get_delta_weight")}
    if len(state) != 2 * len(layers):  # diffusers warns, and leaves out what it does not know
        raise ValueError(
            f"The LoRA in {path} does not fit this U-Net: it has {len(state)} tensors, not two for each of the "
            f"{len(layers)} layers that it names and that are here."
        )
    deltas = {f"{layer}.weight": module.get_delta_weight("theirs").detach().float() for layer, module in layers.items()}
    deltas = {parameter: delta for parameter, delta in deltas.items() if delta.any()}
    if not deltas:
        raise ValueError(f"The LoRA in {path} changes nothing in this U-Net.")
    if broken := [parameter for parameter, delta in deltas.items() if not delta.isfinite().all()]:
        raise ValueError(f"The LoRA in {path} has NaN or infinity in {broken[0]}: the U-Net would draw nothing at all.")
    return Edit(name, base, deltas=deltas)


def _lora_of_unet(pipe, file):
    """Tensors by name, and settings, of a LoRA, as diffusers has them; the U-Net's names begin with unet."""
    from safetensors.torch import load_file

    state, about = load_file(file), _content(file)[1].get("lora_adapter_metadata")
    about = about and json.loads(about)
    try:
        # Left to it, diffusers loses the alpha of an attention layer where it is not that of most layers.
        state = pipe.lora_state_dict(_scaled(state), return_lora_metadata=True)[0]
    except (KeyError, ValueError) as error:
        raise ValueError(f"The LoRA in {file} is of a kind that diffusers does not read ({error}).") from error
    own = PEFT if any(key.startswith(PEFT) for key in state) else ""
    if own:
        settings = file.parent / "adapter_config.json"
        if not settings.is_file():
            raise FileNotFoundError(f"No {settings}, and without it the scale of peft's LoRA in {file} is not known.")
        settings = json.loads(settings.read_text(encoding="utf-8"))
        about = {name: settings[name] for name in SCALE if name in settings}
    if own or not any(key.startswith(("unet.", "text_encoder")) for key in state):  # of `unet.save_lora_adapter`
        state = {f"unet.{key.removeprefix(own)}": tensor for key, tensor in state.items()}
        about = about and {f"unet.{name}": value for name, value in about.items()}
    return state, about


def _scaled(state):
    """A LoRA of kohya's with alpha / rank within its matrices; any other as it is."""
    state = dict(state)
    for key in [key for key in state if key.endswith(".alpha")]:
        layer, alpha = key.removesuffix(".alpha"), state.pop(key).item()
        up, rank = f"{layer}.lora_up.weight", len(state[f"{layer}.lora_down.weight"])
        state[up] = state[up].float() * (alpha / rank)
    return state
