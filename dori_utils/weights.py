"""Weights that someone else has made: `read_edit` reads them as the `Edit` that they are of a pipeline's U-Net.

* a file that `Edit.save` wrote;
* a U-Net: its folder or its file in diffusers' layout, a pipeline's folder, or a single-file checkpoint;
* a LoRA: a file or a folder of diffusers, peft or kohya. Its delta is scale * B A of every layer that it adapts.

Which it is, is told by what the file holds, not by its name. Pickled files are refused.
"""

import copy
import tempfile
from pathlib import Path

from .edits import Edit, known_base
from .models import PICKLED, load_unet, quiet

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
    keys, about = _content(path)
    if "edit" in about:
        return Edit.load(path)
    if any("lora" in key for key in keys):
        return _lora(pipe, path, name)
    if any(key.startswith("model.diffusion_model.") for key in keys):
        return Edit.between(pipe, _unet_of_checkpoint(pipe, path), method=name)
    if path.is_dir():
        return Edit.between(pipe, load_unet(path, dtype=pipe.unet.dtype), method=name)
    if "conv_in.weight" in keys:
        return Edit.between(pipe, _unet_of_file(pipe, path), method=name)
    raise ValueError(f"{path} holds weights of an unknown kind, such as {', '.join(sorted(keys)[:3])}. Give {KINDS}.")


def edit_name(path):
    """What the edit in a file or folder is called; of a folder named unet, what the one around it is called."""
    path = Path(path).resolve()
    return path.parent.name if path.name == "unet" else path.stem if path.is_file() else path.name


def _content(path):
    """Names of the tensors, and the texts about them, of a file; of a folder, those of the files right in it."""
    from safetensors import SafetensorError, safe_open

    keys, about = set(), {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        try:
            with safe_open(file, framework="pt") as content:
                keys |= set(content.keys())
                about |= content.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise OSError(f"{file} is not a readable safetensors file ({error}). Give {KINDS}.") from error
    return keys, about


def _unet_of_checkpoint(pipe, path):
    """The U-Net of a single-file checkpoint in the original layout; its architecture is the pipeline's."""
    from diffusers import UNet2DConditionModel

    with tempfile.TemporaryDirectory() as folder, quiet():
        pipe.unet.save_config(folder)
        try:
            unet = UNet2DConditionModel.from_single_file(str(path), config=folder, local_files_only=True)
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
    if path.is_dir() and len(files := sorted(path.glob("*.safetensors"))) != 1:
        raise ValueError(f"{path} holds {len(files)} safetensors files: give the one that is meant.")
    file = files[0] if path.is_dir() else path
    if any("dora_scale" in key for key in _content(file)[0]):
        raise ValueError(f"The LoRA in {path} is a DoRA, of which diffusers would leave out the scales.")
    with quiet():
        options = {"local_files_only": True, "use_safetensors": True, "return_lora_metadata": True}
        state, alphas, about = pipe.lora_state_dict(str(file.parent), weight_name=file.name, **options)
        if any(key.startswith(("text_encoder", "lora_te")) for key in state):
            raise ValueError(
                f"The LoRA in {path} changes the text encoder, too, and an Edit holds changes of the U-Net alone. Fuse "
                "it into a pipeline (load_lora_weights, fuse_lora), save that, and audit it as a model of its own."
            )
        with known_base(pipe) as base:
            unet = copy.deepcopy(pipe.unet)  # adapters leave traces in a U-Net
            try:
                pipe.load_lora_into_unet(state, alphas, unet, adapter_name="theirs", metadata=about)
            except (RuntimeError, KeyError, ValueError) as error:
                raise ValueError(f"The LoRA in {path} does not fit this U-Net ({error}).") from error
    layers = {layer: module for layer, module in unet.named_modules() if hasattr(module, "get_delta_weight")}
    deltas = {f"{layer}.weight": module.get_delta_weight("theirs").detach().float() for layer, module in layers.items()}
    deltas = {parameter: delta for parameter, delta in deltas.items() if delta.any()}
    if not deltas:
        raise ValueError(f"The LoRA in {path} changes nothing in this U-Net.")
    return Edit(name, base, deltas=deltas)
