"""Weights that someone else has made: `read_edit` reads them as the `Edit` that they are of a pipeline's U-Net.

* a file that `Edit.save` wrote;
* a U-Net: its folder or its file in diffusers' layout, a pipeline's folder, or a single-file checkpoint;
* a LoRA: a file or a folder of diffusers, peft or kohya. Its delta is scale * B A of every layer that it adapts; a
  DoRA's is that of the layer as a whole. What is more (biases) or does not fit is refused, never left out.

An `Edit` is of the U-Net alone. So a pipeline, a checkpoint or a LoRA that changes more than the U-Net is refused by
the name of what it changes: it is a model of its own. The folder of a U-Net stands for that U-Net.

Which it is, is told by what the file holds, not by its name. Pickled files are refused.
"""

import copy
import json
import tempfile
import warnings
from pathlib import Path

import torch

from dori_utils.core import checkpoints, models
from dori_utils.core.arguments import first_three
from dori_utils.core.edits import Edit, check_fits
from dori_utils.core.hashes import changing, differing_settings
from dori_utils.core.hub import PICKLED, first_line, quiet
from dori_utils.core.models import load_unet

PEFT = "base_model.model."  # what names begin with in peft's own files
SCALE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")  # settings that matter
PARTS = ("text_encoder", "tokenizer", "vae", "scheduler")  # beside the U-Net, what a pipeline's images depend on
TEXT = (  # settings of CLIP's text model that what it computes depends on
    "hidden_act hidden_size intermediate_size layer_norm_eps max_position_embeddings num_attention_heads "
    "num_hidden_layers vocab_size"
).split()
MAGNITUDES = ("dora_scale", "lora_magnitude_vector")  # of a DoRA's layer, as LyCORIS and as peft name it
KINDS = "a file of Edit.save, a U-Net (its folder or a checkpoint, as safetensors), or a LoRA"


def read_edit(pipe, path, *, name=None) -> Edit:
    """The edit of a pipeline's U-Net that a file or a folder stands for.

    Args:
        pipe: the base that it was made from, without an edit applied to it; left as it is.
        path: see the module's docstring.
        name: its `method`, for tables; default: the name of the file, or of the folder. A file of `Edit.save` has one.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another architecture, no change at all, a change of more than the U-Net, an `Edit` of another base,
            or none of the kinds.
        OSError: a damaged or a pickled file, or a part of a pipeline that cannot be read to compare it.
    """
    path = Path(path).expanduser()
    name = name or edit_name(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}. Give {KINDS}.")
    if path.suffix in PICKLED:
        raise OSError(f"{path} is pickled, and a pickle can run code when it is opened. Give it as safetensors.")
    if path.is_dir() and any((path / part).is_dir() for part in ("unet", *PARTS)):
        # A pipeline's folder may hold a checkpoint of the same model, too, as those on the Hub do.
        _refuse_changes(path, _changed_parts(pipe, _parts_of_folder(pipe, path)))
        return Edit.between(pipe, load_unet(path, dtype=pipe.unet.dtype), method=name)
    if path.is_dir() and (path / "config.json").is_file():
        return _unet_of_folder(pipe, path, name)
    path = _only_file(path) if path.is_dir() else path
    keys, about = _content(path)
    if "edit" in about:
        edit = Edit.load(path)
        check_fits(pipe, [edit])
        return edit
    if any("lora" in key for key in keys):
        return _lora(pipe, path, name)
    if any(key.startswith("model.diffusion_model.") for key in keys):
        checkpoints.warn_of_averages(path, keys)
        _refuse_changes(path, _changed_parts_of_checkpoint(pipe, path, keys))
        return Edit.between(pipe, _unet_of_checkpoint(pipe, path, keys), method=name)
    if "conv_in.weight" in keys:
        return Edit.between(pipe, _unet_of_file(pipe, path), method=name)
    raise ValueError(f"{path} holds weights of an unknown kind, such as {', '.join(sorted(keys)[:3])}. Give {KINDS}.")


def edit_name(path):
    """What the edit in a file or folder is called; of a folder named unet, what the one around it is called."""
    path = Path(path).resolve()
    return path.parent.name if path.name == "unet" else path.stem if path.is_file() else path.name


def edit_names(paths):
    """`edit_name` of each path, where two are the same with the folders around them in front: "esd/unet_ema".

    Raises:
        ValueError: the same path twice, or names that no folder tells apart.
    """
    places = [Path(path).resolve() for path in paths]
    places = [(place.parent if place.name == "unet" else place).parent / edit_name(place) for place in places]
    names = []
    for i, own in enumerate(places):
        rivals = [place.parts for j, place in enumerate(places) if j != i]
        lengths = range(1, len(own.parts))
        length = next((n for n in lengths if all(own.parts[-n:] != rival[-n:] for rival in rivals)), None)
        if length is None:
            raise ValueError(f"Two mitigations are called {own.name!r}. Rename one of the files or folders.")
        names.append("/".join(own.parts[-length:]))
    return names


def _parts_of_folder(pipe, folder):
    """The parts beside the U-Net that a pipeline's folder holds, by name; a class's name where it is another class."""
    found = {}
    for part in PARTS:
        own, place = getattr(pipe, part), folder / part
        if not place.is_dir():
            continue
        try:
            config = models.config_of(place)
            if config.get("_class_name", type(own).__name__) != type(own).__name__:
                found[part] = config["_class_name"]
            elif isinstance(own, torch.nn.Module):
                found[part] = models.from_pretrained(type(own), place)
            else:
                if part == "tokenizer":
                    checkpoints.check_tokenizer(folder)
                with quiet():
                    found[part] = type(own).from_pretrained(place, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise OSError(
                f"{place} cannot be compared with the pipeline's {part} ({first_line(error)}). If nothing but "
                f"the U-Net was changed, give its folder alone: {folder / 'unet'}."
            ) from error
    return found


def _changed_parts_of_checkpoint(pipe, path, keys):
    """Names of the parts beside the U-Net in which a single-file checkpoint differs from the pipeline."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    prefixes = {"text_encoder": "cond_stage_model.", "vae": "first_stage_model."}
    theirs = [part for part, prefix in prefixes.items() if any(key.startswith(prefix) for key in keys)]
    says, changed = checkpoints.predicted(path), []
    if says not in (None, pipe.scheduler.config.get("prediction_type", "epsilon").removesuffix("_prediction")):
        changed = ["scheduler"]
    if not theirs:
        return changed
    kept = {name: part for name, part in pipe.components.items() if name not in theirs}
    with tempfile.TemporaryDirectory() as folder, quiet():
        pipe.save_config(folder)
        pipe.text_encoder.config.save_pretrained(f"{folder}/text_encoder")
        pipe.vae.save_config(f"{folder}/vae")
        try:
            other = type(pipe).from_single_file(str(path), config=folder, local_files_only=True, **kept)
        except (SingleFileComponentError, RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"The {' or '.join(theirs)} in {path} is of another architecture than the pipeline's, or lacks weights "
                f"({first_line(error)}). {_of_its_own(path)}"
            ) from error
    return changed + _changed_parts(pipe, {part: getattr(other, part) for part in theirs})


def _changed_parts(pipe, theirs):
    """Names of the parts that are not the pipeline's own."""
    return [part for part, other in theirs.items() if not _same(getattr(pipe, part), other)]


def _same(own, other):
    """Do two parts of a pipeline compute the same, but for the precision in which weights were saved?"""
    if isinstance(other, str):  # the name of another class
        return False
    if hasattr(own, "get_vocab"):
        return _tokens(own) == _tokens(other)
    if hasattr(own.config, "hidden_act"):  # of transformers, whose configs note much that changes nothing
        if any(getattr(own.config, name) != getattr(other.config, name) for name in TEXT):
            return False
    elif differing_settings(own, other, ignored=("sample_size", "force_upcast")):  # of a VAE: neither is used here
        return False
    if not isinstance(own, torch.nn.Module):
        return True
    theirs = dict(other.named_parameters())
    return theirs.keys() == dict(own.named_parameters()).keys() and all(
        _same_but_rounded(weight, theirs[name]) for name, weight in own.named_parameters()
    )


def _same_but_rounded(own, other):
    """The same in the pipeline's dtype, or one is the other as half precision holds it.

    One in float16, the other in bfloat16 is a change: weights that only the two roundings tell apart are not known.
    """
    if own.shape != other.shape or other.is_meta:  # the latter: a weight that the file lacks
        return False
    own, other = own.detach().float(), other.detach().to(own.device, own.dtype).float()
    return torch.equal(own, other) or any(
        torch.equal(own.to(half).float(), other) or torch.equal(own, other.to(half).float())
        for half in (torch.float16, torch.bfloat16)
    )


def _tokens(tokenizer):
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges")
    return tokenizer.get_vocab(), merges, tokenizer.pad_token, tokenizer.model_max_length


def _refuse_changes(path, changed):
    if changed:
        raise ValueError(
            f"{path} differs from the pipeline in its {' and '.join(changed)}, and an edit is of the U-Net alone: "
            f"without the rest it would be another model than its authors'. {_of_its_own(path)}"
        )


def _of_its_own(path):
    return f"Audit it as a model of its own: load_pipeline({str(path)!r}), or --model {path}."


def _unet_of_folder(pipe, folder, name):
    """The edit to a U-Net's own folder."""
    config = models.config_of(folder)
    kind = config.get("_class_name") or " ".join(config.get("architectures") or ["an unknown model"])
    if kind != type(pipe.unet).__name__:
        raise ValueError(
            f"{folder} holds {kind}, and an edit is of the U-Net alone. Save a pipeline with it (pipe.save_pretrained) "
            "and audit that as a model of its own: load_pipeline(folder), or --model FOLDER."
        )
    edit = Edit.between(pipe, load_unet(folder, dtype=pipe.unet.dtype), method=name)
    if folder.resolve().name == "unet":
        _warn_of_changes_around(pipe, folder)
    return edit


def _warn_of_changes_around(pipe, folder):
    """A `UserWarning` if the pipeline that a U-Net's folder lies in is not the given one with this U-Net."""
    around = folder.resolve().parent
    try:
        changed = _changed_parts(pipe, _parts_of_folder(pipe, around))
    except OSError as error:
        differs = f"may differ in more: {first_line(error.__cause__)}."
    else:
        differs = changed and f"differs in its {' and '.join(changed)}, too. {_of_its_own(around)}"
    if differs:
        warnings.warn(f"{folder} is taken alone, as asked for. The pipeline around it {differs}", stacklevel=4)


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


def _unet_of_checkpoint(pipe, path, keys):
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
        checkpoints.check_all_used(path, keys, unet)
        return unet.to(pipe.unet.dtype)


def _unet_of_file(pipe, path):
    from safetensors.torch import load_file

    unet, beside = copy.deepcopy(pipe.unet), models.config_of(path.parent)
    if beside.get("_class_name") == type(unet).__name__:  # Edit.between compares what it says
        unet.register_to_config(**{name: value for name, value in beside.items() if not name.startswith("_")})
    try:
        unet.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(f"The U-Net in {path} is of another architecture than the pipeline's ({error}).") from error
    return unet


def _lora(pipe, path, name):
    if any(part in key for key in _content(path)[0] for part in ("lora_te", "text_encoder", "text_model")):
        raise ValueError(
            f"The LoRA in {path} changes the text encoder, too, and an Edit holds changes of the U-Net alone. Add its "
            "deltas to a pipeline's weights, save that (pipe.save_pretrained), and audit it as a model of its own "
            "(--model FOLDER). diffusers' fuse_lora adds the right ones only to layers without dora_scale, where all "
            "alphas are the same and a text encoder's attention is adapted with its out_proj."
        )
    with quiet(), changing(pipe, trained=True) as base:
        state, magnitudes, about = _lora_of_unet(pipe, path)
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
    named = {_flat(layer): f"{layer}.weight" for layer in layers}
    if unknown := sorted(magnitudes.keys() - named):
        raise ValueError(f"The DoRA in {path} has magnitudes of layers that it does not adapt: {first_three(unknown)}.")
    for layer, magnitude in magnitudes.items():
        parameter = named[layer]
        weight = pipe.unet.get_parameter(parameter).detach().float()
        deltas[parameter] = _decomposed(path, weight, deltas[parameter].to(weight.device), magnitude)
    deltas = {parameter: delta for parameter, delta in deltas.items() if delta.any()}
    if not deltas:
        raise ValueError(f"The LoRA in {path} changes nothing in this U-Net.")
    if broken := [parameter for parameter, delta in deltas.items() if not delta.isfinite().all()]:
        raise ValueError(f"The LoRA in {path} has NaN or infinity in {broken[0]}: the U-Net would draw nothing at all.")
    return Edit(name, base, deltas=deltas)


def _decomposed(path, weight, delta, magnitude):
    """A DoRA's delta: m (W + delta) / ||W + delta|| - W (Liu et al., 2024, Eq. 5).

    Args:
        weight, delta: (rows, columns, ...) of a linear layer or a convolution.
        magnitude: m, for each row; in files of LyCORIS it may be (1, columns, ...), for each column.
    """
    moved, axis = weight + delta, 0
    if magnitude.ndim > 1 and len(magnitude) == 1 and len(weight) > 1:
        axis = 1
    if magnitude.numel() != weight.shape[axis]:
        raise ValueError(f"The DoRA in {path} has {magnitude.numel()} magnitudes for a weight {tuple(weight.shape)}.")
    others = [d for d in range(weight.ndim) if d != axis]
    shape = [-1 if d == axis else 1 for d in range(weight.ndim)]
    magnitude = magnitude.to(weight.device).float().reshape(shape)
    return magnitude * moved / torch.linalg.vector_norm(moved, dim=others, keepdim=True) - weight


def _lora_of_unet(pipe, file):
    """A LoRA's tensors by diffusers' names (unet. ...), magnitudes by layer, and settings."""
    from safetensors.torch import load_file

    state, about = load_file(file), _content(file)[1].get("lora_adapter_metadata")
    about = about and json.loads(about)
    magnitudes = _take_magnitudes(state)
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
        about["use_dora"] = settings.get("use_dora", False)
    if own or not any(key.startswith("unet.") for key in state):  # of `unet.save_lora_adapter`
        state = {f"unet.{key.removeprefix(own)}": tensor for key, tensor in state.items()}
        about = about and {f"unet.{name}": value for name, value in about.items()}
    if about and about.pop("unet.use_dora", False) and 2 * len(magnitudes) != len(state):
        raise ValueError(f"The DoRA in {file} lacks magnitudes: {len(magnitudes)} for {len(state) // 2} layers.")
    return state, magnitudes, about


def _take_magnitudes(state):
    """A DoRA's magnitudes, taken out of its tensors, by the `_flat` name of their layers."""
    found = {}
    for key in [key for key in state if any(kind in key for kind in MAGNITUDES)]:
        layer, kind = next(key.split(f".{kind}")[:1] + [kind] for kind in MAGNITUDES if kind in key)
        magnitude = state.pop(key)
        layer = layer.removeprefix("lora_unet_").removeprefix(PEFT).removeprefix("unet.")
        found[_flat(layer)] = magnitude.flatten() if kind == "lora_magnitude_vector" else magnitude
    return found


def _flat(layer):
    """A layer's name as kohya's files have it."""
    return layer.replace(".", "_")


def _scaled(state):
    """A LoRA of kohya's with alpha / rank within its matrices; any other as it is."""
    state = dict(state)
    for key in [key for key in state if key.endswith(".alpha")]:
        layer, alpha = key.removesuffix(".alpha"), state.pop(key).item()
        up, rank = f"{layer}.lora_up.weight", len(state[f"{layer}.lora_down.weight"])
        state[up] = state[up].float() * (alpha / rank)
    return state
