"""Edits: what a mitigation did to a model's weights, as a thing of its own.

NeMo switches neurons off, which is zeroing rows of a weight; Wanda zeroes single weights; fine-tuning and erasure add
something to them. Each is an `Edit` of the U-Net: masks (True where a weight becomes zero) and deltas (added), by the
parameter's name, with the method, its settings, the model and the targets that it was made for. Methods return edits,
`applied` applies them, and the invariant of ROME's code (Meng et al., 2022) holds:

    model at the beginning of `with applied(pipe, edit)` == model at its end, bit by bit, also after an exception.

Weights that someone else pruned or fine-tuned become an edit by subtraction (`Edit.between`), and are looked into like
ours. How much two edits have in common is `iou`.
"""

import hashlib
import json
import threading
import uuid
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from dori_utils.core.models import differing_settings, first_three, model_hash, todays_hash

_BASE = weakref.WeakKeyDictionary()  # a U-Net that edits are applied to → the hash of its pipeline without them
_LOCKS = weakref.WeakKeyDictionary()  # a U-Net → the lock of the thread that counts on its weights, or edits them
_NOW = weakref.WeakKeyDictionary()  # a U-Net → the hash of its pipeline with them, within `hashed_once`


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


def as_array(tensor):
    """NumPy's array of a tensor; it has no bfloat16, whose numbers float32 holds as they are."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def write_safetensors(path, arrays, metadata):
    """Write named arrays and texts about them to a file, whole or not at all."""
    from safetensors.numpy import save_file

    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        save_file(arrays, part, metadata=metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_safetensors(path, what, remedy):
    """Named arrays and the texts about them; an `OSError` with the remedy if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: as_array(file.get_tensor(key)) for key in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise OSError(f"Corrupt {what} file {path} ({error}). Delete it and {remedy}.") from error


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
    with known_base(pipe) as base:
        changed = _changed_parameters(pipe.unet, edit, base)
        originals = {name: parameter.detach().clone() for name, parameter in changed.items()}
        try:
            _change(changed, edit)
            yield pipe
        finally:
            with torch.no_grad():
                for name, parameter in changed.items():
                    parameter.copy_(originals[name])


@contextmanager
def applied_by_row(pipe, edits):
    """Within it every row of a batch has its own weights: row r of k * B rows runs under edits[r % B].

    So B cases with different edits go through the U-Net together, twice each (k = 2) under guidance. The weights of the
    model stay as they are; its linear layers compute with edited copies. Where an edit changes other layers, too, the
    U-Net runs once for each edit instead.

    Rows that all have the same edit, or none, need no copies: that is `applied`.

    Args:
        edits: list of B edits, or None for rows without.

    Raises:
        ValueError: an edit of another model, or rows that differ in layers that are not linear while gradient
            checkpointing is on.
    """
    distinct = list(dict.fromkeys(edits))  # by identity
    if len(distinct) == 1:
        with applied(pipe, distinct[0]):
            yield pipe
        return
    unet, base = pipe.unet, base_hash(pipe)
    changed = [{} if edit is None else _changed_parameters(unet, edit, base) for edit in distinct]
    row_edit = torch.tensor([distinct.index(edit) for edit in edits])
    rows = [(row_edit == e).nonzero()[:, 0] for e in range(len(distinct))]
    copies = []
    for edit, parameters in zip(distinct, changed, strict=True):
        edited = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        if edit is not None:
            _change(edited, edit)
        copies.append(edited)
    patches = _patches(unet, copies, rows, len(edits))
    try:
        for module, forward in patches:
            module.forward = forward
        yield pipe
    finally:
        for module, _ in patches:
            module.__dict__.pop("forward", None)


def _patches(unet, copies, rows, count):
    """(module, new `forward`) of every edited layer, or of the U-Net as a whole if one of those is not linear."""
    layers = dict.fromkeys(name.rpartition(".")[0] for edited in copies for name in edited)
    layers = {name: unet.get_submodule(name) for name in layers}
    if all(isinstance(layer, torch.nn.Linear) for layer in layers.values()):
        return [(layer, _by_row(name, layer, copies, rows, count)) for name, layer in layers.items()]
    if unet.is_gradient_checkpointing:  # it would compute once more when the edited weights are gone
        raise ValueError("Rows under different edits of layers that are not linear: not with gradient checkpointing.")
    return [(unet, partial(_unet_by_row, unet, copies, rows, count))]


def _by_row(name, layer, copies, rows, count):
    """A new `forward` for an edited linear layer; takes its weights out of `copies`."""
    weights = [edited.pop(f"{name}.weight", layer.weight) for edited in copies]
    biases = [edited.pop(f"{name}.bias", layer.bias) for edited in copies]
    if len({len(own) for own in rows}) > 1 or not torch.equal(torch.cat(rows), torch.arange(count)):
        return partial(_forward_by_row, list(zip(weights, biases, strict=True)), rows, count)
    bias = None if layer.bias is None else torch.stack(biases)[:, None]
    return partial(_forward_at_once, torch.stack([weight.T for weight in weights]), bias, count=count)


class _Unpatched(torch.nn.Module):
    """A module whose `forward` has been replaced, with its own."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return type(self.module).forward(self.module, *args, **kwargs)


def _unet_by_row(unet, copies, rows, count, sample, timestep, encoder_hidden_states, return_dict=True):
    """The U-Net once for each edit, on the rows that have it; slower than `_forward_by_row`, for edits of any layer."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    repeats = torch.arange(len(sample) // count)[:, None] * count
    own_timesteps = torch.is_tensor(timestep) and timestep.ndim > 0 and len(timestep) == len(sample)
    outputs, order = [], []
    for edited, own in zip(copies, rows, strict=True):
        chosen = (repeats + own).flatten()
        weights = {f"module.{name}": weight for name, weight in edited.items()}
        inputs = (sample[chosen], timestep[chosen] if own_timesteps else timestep, encoder_hidden_states[chosen])
        outputs.append(torch.func.functional_call(_Unpatched(unet), weights, inputs).sample)
        order.append(chosen)
    output = torch.cat(outputs)[torch.cat(order).argsort()]
    return UNet2DConditionOutput(output) if return_dict else (output,)


def _forward_by_row(weights, rows, count, inputs):
    """Row r of inputs (k * count, ..., columns) times the weights that its edit has."""
    repeats = torch.arange(len(inputs) // count)[:, None] * count
    outputs, order = [], []
    for (weight, bias), own in zip(weights, rows, strict=True):
        chosen = (repeats + own).flatten()
        outputs.append(torch.nn.functional.linear(inputs[chosen], weight, bias))
        order.append(chosen)
    return torch.cat(outputs)[torch.cat(order).argsort()]


def _forward_at_once(weight, bias, inputs, count):
    """The same in one product, of `count` rows in as many neighbours for each of E edits.

    Args:
        weight: (E, columns, rows of it).
        bias: (E, 1, rows of it), or None.
    """
    by_edit = inputs.unflatten(0, (-1, len(weight), count // len(weight))).transpose(0, 1)
    outputs = by_edit.flatten(1, -2) @ weight  # (E, k * count / E * ..., rows of it)
    outputs = outputs if bias is None else outputs + bias
    return outputs.unflatten(1, by_edit.shape[1:-1]).transpose(0, 1).flatten(0, 2)


def base_hash(pipe):
    """`model_hash` of the pipeline as it is without the edits that are applied at the moment."""
    return _BASE.get(pipe.unet) or model_hash(pipe)


@contextmanager
def exclusive(pipe):
    """Within it the weights of the U-Net are this thread's affair; an edit is in them for whichever thread looks.

    Raises:
        RuntimeError: they are another thread's. To wait could take for ever, if that one waits for this.
    """
    lock = _LOCKS.setdefault(pipe.unet, threading.RLock())
    if not lock.acquire(blocking=False):
        raise RuntimeError(
            "Another thread is at work with this pipeline and may have an edit in its weights: wait until it is done, "
            "or load the model once more for this one."
        )
    try:
        yield
    finally:
        lock.release()


@contextmanager
def known_base(pipe):
    """Yields `base_hash`, and within it that is not computed again: hashing a large model takes seconds.

    It is `exclusive`, and so is whatever applies edits.
    """
    with exclusive(pipe):
        outermost = pipe.unet not in _BASE
        _BASE[pipe.unet] = base = base_hash(pipe)
        try:
            yield base
        finally:
            if outermost:
                del _BASE[pipe.unet]


def current_hash(pipe):
    """`model_hash` of the pipeline as it is now, edits that are applied included."""
    return _NOW.get(pipe.unet) or model_hash(pipe)


@contextmanager
def hashed_once(pipe):
    """Within it neither `current_hash` nor `base_hash` is computed again: weights must be as now when one is asked."""
    outermost = pipe.unet not in _NOW
    with known_base(pipe):
        _NOW[pipe.unet] = current_hash(pipe)
        try:
            yield
        finally:
            if outermost:
                del _NOW[pipe.unet]


def check_fits(pipe, edits):
    """Before anything is computed with them: are all of these edits, of which some may be None, for this pipeline?

    Raises:
        ValueError: what `applied` would raise of one of them.
    """
    with known_base(pipe) as base:
        for edit in dict.fromkeys(edits):
            if edit is not None:
                _changed_parameters(pipe.unet, edit, base)


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


def iou(edit, other):
    """Intersection over union of the weights that two edits zero. Two empty sets count as 1, as in the paper."""
    overlap, together = map(sum, zip(*_overlaps(edit, other).values(), strict=True))
    return overlap / together if together else 1.0


def iou_by_layer(edit, other):
    """Parameter name → intersection over union in that layer alone."""
    overlaps = _overlaps(edit, other)
    return {name: overlap / together if together else 1.0 for name, (overlap, together) in overlaps.items()}


def _overlaps(edit, other):
    """Parameter name → sizes of intersection and union; layers that only one edit has count as untouched in the other.

    Where one edit masks whole rows and the other single weights, both are counted in weights.
    """
    check_comparable([edit, other])
    sizes = {}
    for name in dict.fromkeys([*edit.masks, *other.masks]):
        ours, theirs = edit.masks.get(name), other.masks.get(name)
        if ours is None or theirs is None:
            sizes[name] = (0, int((theirs if ours is None else ours).sum()))
        else:
            sizes[name] = (int((ours & theirs).sum()), int((ours | theirs).sum()))
    return sizes


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


def _changed_parameters(unet, edit, base):
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
def _change(parameters, edit):
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
