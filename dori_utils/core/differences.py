"""Differences: what turns the parts of a pipeline into other ones, to the bit, as an `Edit` holds it."""

import warnings

import torch

from dori_utils.core.arguments import first_three
from dori_utils.core.edits import Edit
from dori_utils.core.hashes import base_hash, differing_settings
from dori_utils.core.hub import quiet
from dori_utils.core.parts import (
    TEXT_SETTINGS,
    VAE_SETTINGS,
    WORDS,
    name_in_edit,
    named_parameters,
    part_of,
    scheduler_settings,
)

IGNORED = {"unet": ("dropout",), "vae": ("sample_size", "force_upcast", *VAE_SETTINGS)}  # settings of no consequence


def between(pipe, others, *, method="other weights", targets=()) -> Edit:
    """The edit that turns parts of a pipeline into others.

    Args:
        others: part → model or scheduler, of any of unet, text_encoder, vae and scheduler.
        method, targets: as `Edit` has them.

    Raises:
        ValueError: two differ in architecture or in settings that no edit can hold, or all are the same; or weights
            that are no numbers.
    """
    weights, settings = {}, {}
    for part, other in others.items():
        if part == "scheduler":
            settings |= scheduler_change(pipe, other)
            continue
        check_architecture(pipe, part, other)
        weights |= {name_in_edit(part, name): theirs for name, theirs in other.named_parameters()}
        if part == "vae":
            settings |= _vae_change(pipe.vae, other)
    edit = edit_of_weights(pipe, weights, settings=settings, method=method, targets=targets)
    if not edit.parts:
        names = " and ".join(WORDS[part] for part in others)
        raise ValueError(f"The other {names} has the same weights as the pipeline's: there is nothing to audit.")
    return edit


def edit_of_weights(pipe, weights, *, settings=None, method="other weights", targets=()) -> Edit:
    """The edit that puts these weights into a pipeline; it changes nothing if they are the pipeline's own.

    Args:
        weights: name in an edit → tensor, in the shape of the parameter and in any dtype. Whatever the pipeline's
            dtype makes of it is what the edit makes, to the bit.

    Raises:
        ValueError: weights that are no numbers.
    """
    own, deltas, remainders = named_parameters(pipe), {}, {}
    for name, theirs in weights.items():
        delta, remainder = difference(own[name].detach(), theirs.detach())
        if not delta.isfinite().all():
            raise ValueError(f"The other {_named(name)}: it would draw nothing at all.")
        if delta.any():
            deltas[name] = delta
        if remainder is not None:
            remainders[name] = remainder
    settings = settings or {}
    about = {"deltas": deltas, "remainders": remainders, "settings": settings}
    return Edit(method, base_hash(pipe), targets=targets, **about)


def difference(own, other):
    """What must be added to a weight, in float32, to make another one of it in its own dtype.

    Returns:
        delta, in the shape of the weight; and None, or (positions (n,), numbers (n,)): what must be added behind it to
        some places of the flattened weight, where float32 would miss the other one by a bit.
    """
    wanted = other.to(own.device, own.dtype)
    delta = wanted.float() - own.float()
    reached = own.float() + delta
    missed = (reached.to(own.dtype) != wanted).flatten().nonzero()[:, 0]
    if not len(missed) or not delta.isfinite().all():
        return delta, None
    return delta, (missed.int().cpu(), (wanted.float() - reached).flatten()[missed].cpu())


def check_architecture(pipe, part, other):
    """A ValueError if another model of this part has other layers, or settings that make other ones of them."""
    own, words = getattr(pipe, part), f"The other {WORDS[part]} is of another architecture"
    ours, theirs = ({name_in_edit(part, n): p for n, p in m.named_parameters()} for m in (own, other))
    for name, parameter in ours.items():
        if name not in theirs or theirs[name].shape != parameter.shape:
            shape = f"has the shape {tuple(theirs[name].shape)}" if name in theirs else "is missing"
            raise ValueError(f"{words}: its {name} {shape}, here it is {tuple(parameter.shape)}.")
    if extra := sorted(theirs.keys() - ours.keys()):
        raise ValueError(f"{words}: it has more, {first_three(extra)}.")
    if part == "text_encoder":
        differ = [name for name in TEXT_SETTINGS if getattr(own.config, name) != getattr(other.config, name)]
    else:
        differ = differing_settings(own, other, IGNORED[part])
    if differ:
        here, there = own.config.to_dict() if part == "text_encoder" else own.config, other.config
        there = there.to_dict() if part == "text_encoder" else there
        settings = [f"{name} is {there.get(name)}, here {here[name]}" for name in differ]
        raise ValueError(f"{words}: its {first_three(settings)}.")


def scheduler_change(pipe, other):
    """{"scheduler": settings} of another scheduler, as a pipeline takes it; {} if it is the pipeline's own."""
    with quiet(), warnings.catch_warnings(action="ignore"):  # diffusers mends old settings when it makes a pipeline
        kept = {name: part for name, part in pipe.components.items() if name != "scheduler"}
        other = type(pipe)(**kept, scheduler=other, requires_safety_checker=False).scheduler
    same = type(other) is type(pipe.scheduler) and not differing_settings(pipe.scheduler, other)
    return {} if same else {"scheduler": scheduler_settings(other)}


def _vae_change(own, other):
    changed = {name: other.config.get(name) for name in VAE_SETTINGS if name in own.config}
    changed = {name: value for name, value in changed.items() if value != own.config[name]}
    return {"vae": changed} if changed else {}


def same_but_rounded(own, other):
    """Are two weights the same in the first one's dtype, or one the other as half precision holds it?

    One in float16, the other in bfloat16 is a change: weights that only the two roundings tell apart are not known.
    """
    own, other = own.detach().float(), other.detach().to(own.device, own.dtype).float()
    return torch.equal(own, other) or any(
        torch.equal(own.to(half).float(), other) or torch.equal(own, other.to(half).float())
        for half in (torch.float16, torch.bfloat16)
    )


def _named(name):
    part = part_of(name)
    return f"{WORDS[part]} has NaN or infinity in its {name.removeprefix(f'{part}.')}"
