"""Edits: what a mitigation did to a model, as a thing of its own.

NeMo switches neurons off, which is zeroing rows of a weight; Wanda zeroes single weights; fine-tuning and erasure add
something to them. Each is an `Edit`: masks (True where a weight becomes zero) and deltas (added), by the parameter's
name, with the method, its settings, the model and the targets that it was made for. Most are edits of a U-Net; those of
others may change the text encoder, the VAE and the scheduler as well (`parts` says how these are called). Methods
return edits, `applied` applies them, and the invariant of ROME's code (Meng et al., 2022) holds:

    model at the beginning of `with applied(pipe, edit)` == model at its end, bit by bit, also after an exception.

Weights that someone else pruned or fine-tuned become an edit by subtraction (`Edit.between`), and are looked into like
ours.
"""

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from dori_utils.core.files import as_array, read_safetensors, write_safetensors
from dori_utils.core.hashes import WEIGHTS, base_hash, changing, known, todays_hash
from dori_utils.core.parts import WORDS, check_settings, named_parameters, part_of, with_settings


@dataclass(frozen=True, eq=False)
class Edit:
    """What was done to a pipeline.

    Args:
        method: whose work it is, for tables: "NeMo", "Wanda".
        model: `model_hash` of the pipeline that it was made for; it can be applied to no other.
        config: the method's settings, JSON values.
        targets: ids of the targets that it was made for.
        masks: parameter name → bool tensor that broadcasts to the parameter, True where weights become zero. A mask
            (rows, 1) of a linear layer switches whole neurons off.
        deltas: parameter name → what is added, in the shape of the parameter. A mask of the same name comes after it.
        settings: of the scheduler and of the VAE, what they become: {"scheduler": {"_class_name": ..., ...}}.
        remainders: parameter name → (positions (n,) in the flattened parameter, numbers (n,)): what is added behind the
            delta, so that weights become those of a file to the bit, where float32 would round their difference.
    """

    method: str
    model: str
    config: dict = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    deltas: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: dict[str, dict] = field(default_factory=dict)
    remainders: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("config", "settings"):  # as they come back from disk
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))
        object.__setattr__(self, "targets", tuple(self.targets))

    def __repr__(self):
        shares = list(self.sparsity().values())
        zeroed = f"{sum(shares) / max(1, len(shares)):.2%} of the weights of {len(shares)} layers zeroed"
        also = f", in {', '.join(WORDS[part] for part in self.parts)}" if set(self.parts) - {"unet"} else ""
        return f"Edit({self.method}, {len(self.targets)} targets, {zeroed}, {len(self.deltas)} layers added to{also})"

    @property
    def parts(self):
        """The parts of a pipeline that it changes: of unet, text_encoder, vae and scheduler."""
        changed = {part_of(name) for name in [*self.deltas, *self.masks]} | self.settings.keys()
        return tuple(part for part in WORDS if part in changed)

    @cached_property
    def around_unet(self):
        """The `Edit` of all but the U-Net that is part of this one; None if it is of the U-Net alone.

        Prompts are encoded, and images encoded and decoded, under it.
        """
        if set(self.parts) <= {"unet"}:
            return None
        masks, deltas, remainders = (
            {name: value for name, value in values.items() if part_of(name) != "unet"}
            for values in (self.masks, self.deltas, self.remainders)
        )
        return Edit(self.method, self.model, self.config, self.targets, masks, deltas, self.settings, remainders)

    def sparsity(self):
        """Parameter name → share of its weights that become zero."""
        return {name: mask.float().mean().item() for name, mask in self.masks.items()}

    def fingerprint(self):
        """16 hex characters that change with any bit of what is changed, and with nothing else."""
        return self._fingerprint

    @cached_property  # of a fine-tuned U-Net it takes as long as a picture
    def _fingerprint(self):
        shapes = [(name, tuple(mask.shape)) for name, mask in sorted(self.masks.items())]  # packed bits have lost them
        digest = hashlib.sha256(f"{self.model} {shapes}".encode())
        if self.settings:
            digest.update(json.dumps(self.settings, sort_keys=True).encode())
        arrays = self.to_arrays()
        del arrays["about"]
        for name, array in sorted(arrays.items()):
            digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def between(cls, pipe, other, *, method="other weights", targets=()):
        """The edit that turns the pipeline into another one, for example a published mitigation.

        Args:
            other: a U-Net, or part → model or scheduler, of any of unet, text_encoder, vae and scheduler.

        Raises:
            ValueError: two differ in architecture or in settings that no edit can hold, or in nothing; or weights that
                are no numbers.
        """
        from dori_utils.core.differences import between  # it builds on this module

        others = other if isinstance(other, dict) else {"unet": other}
        return between(pipe, others, method=method, targets=targets)

    def to_arrays(self):
        """Named arrays that hold all of it, masks as single bits; for `Store`, and what `save` writes."""
        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        about = {"method": self.method, "model": self.model, "config": self.config, "targets": self.targets}
        about |= {"settings": self.settings} if self.settings else {}
        arrays = {f"mask {name}": _pack(mask) for name, mask in self.masks.items()}
        arrays |= {f"delta {name}": as_array(delta) for name, delta in self.deltas.items()}
        for name, (positions, numbers) in self.remainders.items():
            arrays |= {f"positions {name}": as_array(positions), f"remainder {name}": as_array(numbers)}
        return {"about": np.array(json.dumps(about | {"shapes": shapes})), **arrays}

    @classmethod
    def from_arrays(cls, arrays):
        """The edit that `to_arrays` was called on."""
        about = json.loads(str(arrays["about"]))
        masks = {name: _unpack(arrays[f"mask {name}"], shape) for name, shape in about.pop("shapes").items()}
        deltas, positions, numbers = (
            {k.removeprefix(kind): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(kind)}
            for kind in ("delta ", "positions ", "remainder ")
        )
        remainders = {name: (positions[name], own) for name, own in numbers.items()}
        return cls(**about, masks=masks, deltas=deltas, remainders=remainders)

    def save(self, path):
        """Write a safetensors file. The file is written whole or not at all."""
        arrays = self.to_arrays()
        about = str(arrays.pop("about"))
        write_safetensors(path, arrays, {"edit": about})

    @classmethod
    def load(cls, path):
        """Read what `save` wrote.

        Raises:
            OSError: the file is missing or damaged, or is no edit.
        """
        arrays, about = read_safetensors(path, "edit", "make the edit again")
        if "edit" not in about:
            raise OSError(f"{path} holds weights, but no edit. Edit.between makes one of a whole U-Net.")
        return cls.from_arrays({"about": about["edit"], **arrays})


@contextmanager
def applied(pipe, edit):
    """Within `with applied(pipe, edit):` the pipeline is edited; behind it, it is its own again, bit by bit.

    Edits nest: the inner one comes on top of the outer. `edit` may be None, for "without any". What was encoded before,
    prompts or images, is not of the edited text encoder or VAE.

    Raises:
        ValueError: the edit was made for another model.
    """
    if edit is None:
        yield pipe
        return
    with changing(pipe) as base:
        changed = changed_parameters(pipe, edit, base)
        originals = {name: parameter.detach().clone() for name, parameter in changed.items()}
        try:
            change(changed, edit)
            with with_settings(pipe, edit.settings):
                yield pipe
        finally:
            with torch.no_grad():
                for name, parameter in changed.items():
                    parameter.copy_(originals[name])


def check_fits(pipe, edits):
    """Before anything is computed with them: are all of these edits, of which some may be None, for this pipeline?

    Raises:
        ValueError: what `applied` would raise of one of them.
    """
    with known(pipe):
        for edit in dict.fromkeys(edits):
            if edit is not None:
                changed_parameters(pipe, edit, base_hash(pipe))


def union(edits):
    """One edit that zeroes whatever any of the edits does, for all their targets.

    Raises:
        ValueError: no edits, edits of different models, or edits with deltas (those have no union: nest `applied`).
    """
    edits = list(edits)
    check_comparable(edits)
    masks = {}
    for edit in edits:
        for name, mask in edit.masks.items():
            masks[name] = masks[name] | mask if name in masks else mask
    methods, configs = [[getattr(edit, what) for edit in edits] for what in ("method", "config")]
    return Edit(
        method=" + ".join(dict.fromkeys(methods)),
        model=edits[0].model,
        config=configs[0] if all(config == configs[0] for config in configs) else {"union of": configs},
        targets=tuple(dict.fromkeys(target for edit in edits for target in edit.targets)),
        masks=masks,
    )


def check_comparable(edits):
    if not edits:
        raise ValueError("No edits: give at least one.")
    if len({todays_hash(edit.model) for edit in edits}) > 1:
        raise ValueError(f"Edits of different models: {', '.join(sorted({edit.model for edit in edits}))}.")
    for edit in edits:
        if edit.deltas or edit.settings:
            raise ValueError(
                f"The edit by {edit.method} changes weights by adding to them, which has no union or overlap; "
                "to combine such edits, nest applied(...)."
            )


def changed_parameters(pipe, edit, base, parts=WEIGHTS):
    """Name → parameter of these parts that an edit changes, once it is certain that it fits the pipeline."""
    if todays_hash(edit.model) != base:
        raise ValueError(
            f"This edit by {edit.method} was made for a model with the hash {edit.model}, this one's is {base}: other "
            "weights, or the same ones in another dtype. Load the model that it was made for, or make the edit again."
        )
    check_settings(edit.method, edit.settings)
    parameters = named_parameters(pipe, [part for part in WEIGHTS if part in edit.parts])
    names = dict.fromkeys([*edit.deltas, *edit.masks])
    for name in names:
        if name not in parameters:
            whose = WORDS[part_of(name)]
            raise ValueError(f"This edit by {edit.method} changes {name}, which the {whose} does not have.")
        shape, mask = parameters[name].shape, edit.masks.get(name)
        fits = edit.deltas[name].shape == shape if name in edit.deltas else True
        if not fits or (mask is not None and _broadcast(mask.shape, shape) != shape):
            raise ValueError(f"This edit by {edit.method} changes {name} in another shape than its {tuple(shape)}.")
    return {name: parameters[name] for name in names if part_of(name) in parts}


def _broadcast(shape, other):
    try:
        return torch.broadcast_shapes(shape, other)
    except RuntimeError:
        return None


@torch.no_grad()
def change(parameters, edit):
    """Do to these parameters, by name, what an edit does to them."""
    for name, parameter in parameters.items():
        if name in edit.deltas:  # in float32: small deltas survive
            moved = (parameter.float() + edit.deltas[name].to(parameter.device).float()).contiguous()
            if name in edit.remainders:
                positions, numbers = (own.to(parameter.device) for own in edit.remainders[name])
                moved.view(-1)[positions.long()] += numbers.float()
            parameter.copy_(moved)
        if name in edit.masks:
            parameter.masked_fill_(edit.masks[name].to(parameter.device), 0)


def _pack(mask):
    return np.packbits(mask.cpu().numpy().ravel())


def _unpack(bits, shape):
    size = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits, count=size).astype(bool)).reshape(shape)
