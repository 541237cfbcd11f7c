"""Edits: what a mitigation did to a model's weights, as a thing of its own.

NeMo switches neurons off, which is zeroing rows of a weight; Wanda zeroes single weights; fine-tuning and erasure add
something to them. Each is an `Edit` of the U-Net: masks (True where a weight becomes zero) and deltas (added), by the
parameter's name, with the method, its settings, the model and the targets that it was made for. Methods return edits,
`applied` applies them, and the invariant of ROME's code (Meng et al., 2022) holds:

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

from dori_utils.core.arguments import first_three
from dori_utils.core.files import as_array, read_safetensors, write_safetensors
from dori_utils.core.hashes import base_hash, changing, differing_settings, known, todays_hash


@dataclass(frozen=True, eq=False)
class Edit:
    """What was done to the weights of a U-Net.

    Args:
        method: whose work it is, for tables: "NeMo", "Wanda".
        model: `model_hash` of the pipeline that it was made for; it can be applied to no other.
        config: the method's settings, JSON values.
        targets: ids of the targets that it was made for.
        masks: parameter name → bool tensor that broadcasts to the parameter, True where weights become zero. A mask
            (rows, 1) of a linear layer switches whole neurons off.
        deltas: parameter name → what is added, in the shape of the parameter. A mask of the same name comes after it.
    """

    method: str
    model: str
    config: dict = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    deltas: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "config", json.loads(json.dumps(self.config)))  # as it comes back from disk
        object.__setattr__(self, "targets", tuple(self.targets))

    def __repr__(self):
        shares = list(self.sparsity().values())
        zeroed = f"{sum(shares) / max(1, len(shares)):.2%} of the weights of {len(shares)} layers zeroed"
        return f"Edit({self.method}, {len(self.targets)} targets, {zeroed}, {len(self.deltas)} layers added to)"

    def sparsity(self):
        """Parameter name → share of its weights that become zero."""
        return {name: mask.float().mean().item() for name, mask in self.masks.items()}

    def fingerprint(self):
        """16 hex characters that change with any bit of what is zeroed or added, and with nothing else."""
        return self._fingerprint

    @cached_property  # of a fine-tuned U-Net it takes as long as a picture
    def _fingerprint(self):
        shapes = [(name, tuple(mask.shape)) for name, mask in sorted(self.masks.items())]  # packed bits have lost them
        digest = hashlib.sha256(f"{self.model} {shapes}".encode())
        arrays = self.to_arrays()
        del arrays["about"]
        for name, array in sorted(arrays.items()):
            digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def between(cls, pipe, other_unet, *, method="other weights", targets=()):
        """The edit that turns the pipeline's U-Net into another one, for example a published mitigation.

        Raises:
            ValueError: the two differ in architecture or in settings, or in nothing; or weights that are no numbers.
        """
        deltas = {}
        theirs = dict(other_unet.named_parameters())
        for name, own in pipe.unet.named_parameters():
            if name not in theirs or theirs[name].shape != own.shape:
                shape = f"has the shape {tuple(theirs[name].shape)}" if name in theirs else "is missing"
                raise ValueError(
                    f"The other U-Net is of another architecture: its {name} {shape}, here it is {tuple(own.shape)}."
                )
            delta = theirs[name].detach().to(own.device).float() - own.detach().float()
            if not delta.isfinite().all():
                raise ValueError(f"The other U-Net has NaN or infinity in its {name}: it would draw nothing at all.")
            if delta.any():
                deltas[name] = delta
        if extra := sorted(theirs.keys() - dict(pipe.unet.named_parameters()).keys()):
            raise ValueError(f"The other U-Net is of another architecture: it has more, {first_three(extra)}.")
        if differ := differing_settings(pipe.unet, other_unet, ignored=("dropout",)):
            settings = [f"{name} is {other_unet.config.get(name)}, here {pipe.unet.config[name]}" for name in differ]
            raise ValueError(f"The other U-Net is of another architecture: its {first_three(settings)}.")
        if not deltas:
            raise ValueError("The other U-Net has the same weights as the pipeline's: there is nothing to audit.")
        return cls(method, base_hash(pipe), targets=targets, deltas=deltas)

    def to_arrays(self):
        """Named arrays that hold all of it, masks as single bits; for `Store`, and what `save` writes."""
        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        about = {"method": self.method, "model": self.model, "config": self.config, "targets": self.targets}
        arrays = {f"mask {name}": _pack(mask) for name, mask in self.masks.items()}
        arrays |= {f"delta {name}": as_array(delta) for name, delta in self.deltas.items()}
        return {"about": np.array(json.dumps(about | {"shapes": shapes})), **arrays}

    @classmethod
    def from_arrays(cls, arrays):
        """The edit that `to_arrays` was called on."""
        about = json.loads(str(arrays["about"]))
        masks = {name: _unpack(arrays[f"mask {name}"], shape) for name, shape in about.pop("shapes").items()}
        deltas = {k.removeprefix("delta "): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("delta ")}
        return cls(**about, masks=masks, deltas=deltas)

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
    """Within `with applied(pipe, edit):` the U-Net has the edited weights; behind it, its own again, bit by bit.

    Edits nest: the inner one comes on top of the outer. `edit` may be None, for "without any".

    Raises:
        ValueError: the edit was made for another model.
    """
    if edit is None:
        yield pipe
        return
    with changing(pipe) as base:
        changed = changed_parameters(pipe.unet, edit, base)
        originals = {name: parameter.detach().clone() for name, parameter in changed.items()}
        try:
            change(changed, edit)
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
                changed_parameters(pipe.unet, edit, base_hash(pipe))


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
        if edit.deltas:
            raise ValueError(
                f"The edit by {edit.method} changes weights by adding to them, which has no union or overlap; "
                "to combine such edits, nest applied(...)."
            )


def changed_parameters(unet, edit, base):
    if todays_hash(edit.model) != base:
        raise ValueError(
            f"This edit by {edit.method} was made for a model with the hash {edit.model}, this one's is {base}: other "
            "weights, or the same ones in another dtype. Load the model that it was made for, or make the edit again."
        )
    parameters = dict(unet.named_parameters())
    names = dict.fromkeys([*edit.deltas, *edit.masks])
    for name in names:
        if name not in parameters:
            raise ValueError(f"This edit by {edit.method} changes {name}, which the U-Net does not have.")
        shape, mask = parameters[name].shape, edit.masks.get(name)
        fits = edit.deltas[name].shape == shape if name in edit.deltas else True
        if not fits or (mask is not None and _broadcast(mask.shape, shape) != shape):
            raise ValueError(f"This edit by {edit.method} changes {name} in another shape than its {tuple(shape)}.")
    return {name: parameters[name] for name in names}


def _broadcast(shape, other):
    try:
        return torch.broadcast_shapes(shape, other)
    except RuntimeError:
        return None


@torch.no_grad()
def change(parameters, edit):
    for name, delta in edit.deltas.items():
        parameter = parameters[name]
        parameter.copy_(parameter.float() + delta.to(parameter.device).float())  # in float32: small deltas survive
    for name, mask in edit.masks.items():
        parameters[name].masked_fill_(mask.to(parameters[name].device), 0)


def _pack(mask):
    return np.packbits(mask.cpu().numpy().ravel())


def _unpack(bits, shape):
    size = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits, count=size).astype(bool)).reshape(shape)
