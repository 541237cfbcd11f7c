"""State dicts: files with weights by their names, of some layers of a model, of parts of it, or of a whole checkpoint.

What a file holds takes the place of the pipeline's; what it does not hold stays. Every tensor is used, or the file is
refused by the names of those that no layer takes. Not of a layer of their own are a second name of the same weights;
position_ids; a checkpoint's noise schedule, which must be the pipeline's; and an average over training beside the
trained weights, of which it is said.
"""

from types import SimpleNamespace

import torch

from dori_utils.cli.published.names import Names
from dori_utils.core import checkpoints, models
from dori_utils.core.arguments import first_three
from dori_utils.core.differences import IGNORED, edit_of_weights
from dori_utils.core.edits import Edit
from dori_utils.core.hashes import differing_settings
from dori_utils.core.parts import WORDS, named_parameters, part_of, scheduler_settings

ORIGINAL = {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.", "vae": "first_stage_model."}
NO_WEIGHTS = (  # what CompVis' code keeps of a noise schedule, which follows from alphas_cumprod; and how it trained
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
    "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 logvar global_step v_pred"
).split()
OPEN_CLIP = "cond_stage_model.model."  # of which Stable Diffusion 2 takes all layers but the last, and not what follows
BEHIND_OPEN_CLIP = ("text_projection", "logit_scale", "attn_mask")


def read_state_dict(pipe, path, tensors, about, name) -> Edit:
    """The `Edit` that puts a file's weights into a pipeline.

    Args:
        tensors, about: of `read_tensors`.
        name: its `method`.

    Raises:
        ValueError: tensors that no layer takes, or of another shape; a whole checkpoint that lacks weights; another
            noise schedule or architecture; masks instead of weights; or no change at all.
    """
    tensors = {key.removeprefix("state_dict."): tensor for key, tensor in tensors.items()}
    checkpoints.warn_of_averages(path, tensors)
    of_layers = {key: tensor for key, tensor in tensors.items() if not _is_no_weight(pipe, tensors, key)}
    weights = _weights(pipe, path, of_layers)
    _check_whole(pipe, path, of_layers, weights)
    _check_beside(pipe, path, tensors, weights)
    settings = _predicts(pipe, tensors, about)
    edit = edit_of_weights(pipe, weights, settings=settings, method=name)
    if not edit.parts:
        raise ValueError(f"{path} has the same weights as the pipeline: there is nothing to audit.")
    return edit


def _is_no_weight(pipe, tensors, key):
    if key in NO_WEIGHTS or key.endswith("position_ids"):
        return True
    if key.startswith("model_ema."):
        return any(other.startswith(ORIGINAL["unet"]) for other in tensors)
    if not key.startswith(OPEN_CLIP):
        return False
    last = f"{OPEN_CLIP}transformer.resblocks.{pipe.text_encoder.config.num_hidden_layers}."
    return key.startswith(last) or key.removeprefix(OPEN_CLIP) in BEHIND_OPEN_CLIP


def _weights(pipe, path, tensors):
    """Name in an edit → tensor, in the shape of the parameter."""
    names, parameters = Names(pipe), named_parameters(pipe)
    known = {key: names.find(key) for key in tensors}
    if not any(known.values()):
        raise ValueError(f"{path} holds weights of an unknown kind, such as {', '.join(sorted(tensors)[:3])}.")
    unknown = [key for key, of in known.items() if not of]
    if unknown := sorted(key for key in unknown if not _is_alias(tensors, known, key)):
        raise ValueError(
            f"{path} is of another architecture than the pipeline's, or of more than its parts: it has more, "
            f"{first_three(unknown)}, and no layer takes that."
        )
    found = {}
    for key, of in known.items():
        check_is_weight(path, key, tensors[key])
        for own, piece in zip(of, _pieces(tensors[key], len(of)), strict=True):
            piece = _fitted(path, key, piece, own, parameters[own].shape)
            if own in found and not torch.equal(found[own], piece):
                raise ValueError(f"{path} holds the weights of {own} twice, as {key} and otherwise.")
            found[own] = piece
    if all(((tensor == 0) | (tensor == 1)).all() for tensor in found.values()) and any(map(_has_both, found.values())):
        raise ValueError(f"{path} holds nothing but 0 and 1: masks, not weights. Give the weights that they led to.")
    return found


def _has_both(tensor):
    return bool(tensor.any()) and not bool(tensor.all())


def _is_alias(tensors, known, key):
    """Is a tensor that no layer takes another name of one that a layer does take?"""
    last, own = key.rpartition(".")[2], tensors[key]
    names = (other for other, of in known.items() if of and other.rpartition(".")[2] == last)
    return any(tensors[other].shape == own.shape and torch.equal(tensors[other], own) for other in names)


def check_is_weight(path, key, tensor):
    """A ValueError for a tensor of whole numbers or of booleans."""
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{path}: {key} is of {kind}, so no weight; quantized weights and masks are not read.")


def _pieces(tensor, count):
    """A tensor cut into as many parts, one below the other."""
    return tensor.chunk(count) if count > 1 and tensor.ndim and len(tensor) % count == 0 else [tensor] * count


def _fitted(path, key, tensor, own, shape):
    """A tensor in the shape of its parameter, from which a VAE's may differ in ones at the end."""
    longer, shorter = sorted([tuple(tensor.shape), tuple(shape)], key=len, reverse=True)
    if part_of(own) == "vae" and set(longer[len(shorter) :]) <= {1} and longer[: len(shorter)] == shorter:
        return tensor.reshape(shape)
    if tensor.shape != shape:
        whose = f"The {WORDS[part_of(own)]} in {path} is of another architecture than the pipeline's"
        raise ValueError(f"{whose}: {key} has the shape {tuple(tensor.shape)}, here it is {tuple(shape)}.")
    return tensor


def _check_whole(pipe, path, tensors, weights):
    """A checkpoint with several parts is of a whole model: none of them may lack weights."""
    parts = [part for part, prefix in ORIGINAL.items() if any(key.startswith(prefix) for key in tensors)]
    for part in parts if len(parts) > 1 else ():
        if missing := sorted(named_parameters(pipe, [part]).keys() - weights):
            raise ValueError(f"{path} lacks weights of the {WORDS[part]}: {first_three(missing)}.")


def _check_beside(pipe, path, tensors, weights):
    """What stands beside weights must be of the pipeline: a noise schedule, or the configuration of a U-Net."""
    theirs, own = tensors.get("alphas_cumprod"), getattr(pipe.scheduler, "alphas_cumprod", None)
    known = theirs is not None and own is not None
    if known and (len(theirs) != len(own) or (theirs.float() - own.to(theirs.device)).abs().max() > 1e-4):
        raise ValueError(f"{path} is of another noise schedule than the pipeline (alphas_cumprod).")
    beside = models.config_of(path.parent)
    if beside.get("_class_name") != type(pipe.unet).__name__ or "unet" not in {part_of(name) for name in weights}:
        return
    beside = SimpleNamespace(config=dict(pipe.unet.config) | beside)
    if differ := differing_settings(pipe.unet, beside, IGNORED["unet"]):
        settings = [f"{name} is {beside.config[name]}, here {pipe.unet.config[name]}" for name in differ]
        raise ValueError(f"The U-Net in {path} is of another architecture: its {first_three(settings)}.")


def _predicts(pipe, tensors, about):
    """The scheduler's settings if a checkpoint says that its U-Net predicts something else than the pipeline's."""
    says = checkpoints.says_it_predicts(tensors, about)
    if says in (None, pipe.scheduler.config.get("prediction_type", "epsilon").removesuffix("_prediction")):
        return {}
    kind = {"v": "v_prediction"}.get(says, says)
    return {"scheduler": scheduler_settings(pipe.scheduler) | {"prediction_type": kind}}
