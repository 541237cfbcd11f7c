"""Adapters: LoRA and what goes beyond it, as the deltas that they are of the weights beneath; see `formulas`.

Names are those of diffusers, old and new, of peft, of kohya and LyCORIS. Whatever is of another kind, or of a layer
that is not here, is refused, never left out.
"""

import json
import re
from functools import partial

from dori_utils.cli.published import formulas
from dori_utils.cli.published.names import Names
from dori_utils.core.arguments import first_three
from dori_utils.core.edits import Edit
from dori_utils.core.hashes import base_hash
from dori_utils.core.hub import first_line
from dori_utils.core.parts import WORDS, named_parameters, part_of

PEFT = "base_model.model."  # what names begin with in peft's own files
MARKS = r"lora|lycoris|lokr_|hada_|\.dora_scale$|\.diff(_b)?$|\.[wb]_norm$|^base_model\.model\."
KINDS = {  # what the names of tensors end in → what they are
    r"lora_up\.weight|lora_B(\.default)?\.weight|lora(_linear_layer)?\.up\.weight": "up",
    r"lora_down\.weight|lora_A(\.default)?\.weight|lora(_linear_layer)?\.down\.weight": "down",
    r"lora_mid\.weight": "mid",
    r"alpha": "alpha",
    r"dora_scale": "dora_scale",
    r"lora_magnitude_vector(\.default)?(\.weight)?": "magnitude",
    r"hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2|diff|diff_b|w_norm|b_norm": None,  # what they end in
}
FLAT = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lycoris_": None}  # → part
OLD_LAYERS = {r"self_attn\.to_([qkv])_lora": r"self_attn.\1_proj", r"self_attn\.to_out_lora": "self_attn.out_proj"}
OLD_LAYERS |= {r"(processor\.)?to_([qkv])_lora": r"to_\2", r"(processor\.)?to_out_lora": "to_out.0"}  # diffusers < 0.22


def is_adapter(keys):
    """Does a file with these names hold adapters?"""
    return any(re.search(MARKS, key) for key in keys)


def read_adapters(pipe, path, tensors, about, name) -> Edit:
    """The `Edit` that fuses a file's adapters into a pipeline.

    Args:
        tensors, about: of `read_tensors`.
        name: its `method`.

    Raises:
        ValueError: a layer that is not here, a kind that is not known, half a layer, or no change at all.
        FileNotFoundError: settings that peft writes beside the file.
    """
    settings = _settings(path, tensors, about)
    layers = _by_layer(pipe, path, tensors)
    lacking = [layer for layer, own in layers.items() if not own.keys() & {"magnitude", "dora_scale"}]
    if lacking := [layer for layer in lacking if _of_part(settings, layer).get("use_dora")]:
        raise ValueError(f"The DoRA in {path} lacks magnitudes, those of {first_three(lacking)}.")
    parameters, deltas = named_parameters(pipe), {}
    for layer, own in layers.items():
        deltas |= _deltas_of_layer(path, layer, own, settings, parameters)
    deltas = {parameter: delta for parameter, delta in deltas.items() if delta.any()}
    if not deltas:
        raise ValueError(f"The LoRA in {path} changes nothing in this pipeline.")
    for parameter, delta in deltas.items():
        if not delta.isfinite().all():
            whose = f"the {WORDS[part_of(parameter)]} would draw nothing at all"
            raise ValueError(f"The LoRA in {path} has NaN or infinity in {parameter}: {whose}.")
    return Edit(name, base_hash(pipe), deltas=deltas)


def _by_layer(pipe, path, tensors):
    """Layer, by its name in an edit → what its tensors are → tensor."""
    places = _Places(pipe)
    layers, unknown, strange = {}, [], []
    for key, tensor in tensors.items():
        layer, kind = _parsed(key)
        if kind is None:
            strange.append(key)
        elif (place := places.find(layer)) is None:
            unknown.append(key)
        elif kind in layers.setdefault(place, {}):
            raise ValueError(f"The LoRA in {path} has {kind} of {place} twice, the second time as {key}.")
        else:
            layers[place][kind] = tensor.float()
    if strange:
        raise ValueError(
            f"The LoRA in {path} does not fit this U-Net: it holds what is of no known kind, "
            f"{first_three(sorted(strange))}. Known are LoRA, LoCon, DoRA, LoHa, LoKr, full differences and norms."
        )
    if unknown:
        raise ValueError(
            f"The LoRA in {path} does not fit this U-Net, nor the pipeline's other parts: no layer is called as in "
            f"{first_three(sorted(unknown))}."
        )
    return layers


def _parsed(key):
    """The layer that a tensor is of, as the file calls it, and what it is; None if that is not known."""
    for old, new in OLD_LAYERS.items():
        key = re.sub(rf"(?<=\.){old}(?=\.(up|down)\.weight$)", f"{new}.lora", key)
    for pattern, kind in KINDS.items():
        if found := re.fullmatch(rf"(.+?)\.({pattern})", key):
            return found[1], kind or found[2]
    return key, None


class _Places:
    """Where the layers of files are in a pipeline."""

    def __init__(self, pipe):
        self.names, self.flat = Names(pipe), {}
        for part, table in self.names.tables.items():
            for theirs, ours in table.items():
                if len(ours) == 1 and ours[0].rpartition(".")[0]:
                    flat = theirs.rpartition(".")[0].replace(".", "_")
                    self.flat.setdefault((part, flat), ours[0].rpartition(".")[0])

    def find(self, layer):
        """The layer's name in an edit, or None."""
        for prefix, part in FLAT.items():
            if layer.startswith(prefix):
                flat = layer.removeprefix(prefix).replace(".", "_")
                parts = list(self.names.tables) if part is None else [part]
                return next((self.flat[part, flat] for part in parts if (part, flat) in self.flat), None)
        layer = layer.removeprefix(PEFT)
        for ending in (".weight", ".bias"):
            if found := self.names.find(layer + ending):
                return found[0].rpartition(".")[0] if len(found) == 1 else None
        return None


def _deltas_of_layer(path, layer, own, settings, parameters):
    """Name in an edit → delta, of what a file holds of one layer."""
    kinds = own.keys() - {"alpha", "magnitude", "dora_scale"}
    magnitude = own["magnitude"].flatten() if "magnitude" in own else own.get("dora_scale")
    if magnitude is not None and not kinds:
        raise ValueError(f"The DoRA in {path} has magnitudes of layers that it does not adapt: {layer}.")
    scale = partial(_scale, settings, layer, own.get("alpha"))
    found = {}
    whose = f"The LoRA in {path} does not fit this {WORDS[part_of(layer)]}"
    try:
        matrices = formulas.matrices(own, kinds, scale)
    except (RuntimeError, IndexError) as error:  # torch's, of shapes that do not go together
        raise ValueError(f"{whose}: of {layer}, {first_line(error)}.") from error
    if matrices is None:
        raise ValueError(f"{whose}: of {layer} it has {', '.join(sorted(own))}, which make no delta of a known kind.")
    for ending, matrix in matrices.items():
        parameter = f"{layer}.{ending}"
        if parameter not in parameters:
            raise ValueError(f"{whose}, which has no {parameter}.")
        weight = parameters[parameter].detach()
        if matrix.numel() != weight.numel() or matrix.shape[:1] != weight.shape[:1]:
            shapes = f"{tuple(matrix.shape)}, the weight {tuple(weight.shape)}"
            raise ValueError(f"{whose}: its delta of {parameter} has the shape {shapes}.")
        found[parameter] = matrix.reshape(weight.shape)
        if magnitude is not None and ending == "weight":
            try:
                found[parameter] = formulas.decomposed(weight.float().cpu(), found[parameter], magnitude)
            except ValueError as error:
                raise ValueError(f"The DoRA in {path} {error}") from error
    return found


def _settings(path, tensors, about):
    """Part → peft's settings of its adapters; under None those that do not say of which part they are."""
    text, beside = about.get("lora_adapter_metadata"), path.parent / "adapter_config.json"
    if any(key.startswith(PEFT) for key in tensors):
        if not beside.is_file():
            raise FileNotFoundError(f"No {beside}, and without it the scale of peft's LoRA in {path} is not known.")
        text = beside.read_text(encoding="utf-8")
    try:
        settings = json.loads(text) if text else {}
    except ValueError as error:
        raise ValueError(f"The settings of the LoRA in {path} cannot be read ({error}).") from error
    found = {}
    for name, value in settings.items():
        part, _, own = name.rpartition(".")
        found.setdefault(part or None, {})[own] = value
    return found


def _scale(settings, layer, alpha, rank):
    """alpha / rank, from the file's tensor or from peft's settings; 1 where neither says an alpha."""
    if alpha is not None:
        return 1.0 if rank is None else alpha.item() / rank
    own = _of_part(settings, layer)
    alpha = _of_layer(own.get("alpha_pattern"), layer, own.get("lora_alpha", own.get("alpha")))
    rank = _of_layer(own.get("rank_pattern"), layer, own.get("r")) if rank is None else rank
    if alpha is None or rank is None:
        return 1.0
    return alpha / rank**0.5 if own.get("use_rslora") else alpha / rank


def _of_part(settings, layer):
    return settings.get(part_of(layer)) or settings.get(None, {})


def _of_layer(patterns, layer, usual):
    """What peft's alpha_pattern or rank_pattern (end of a name, or regular expression → value) says of a layer."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(found, usual)
