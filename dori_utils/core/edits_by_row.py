"""Edits by row: cases with different edits go through the U-Net together, each row under its own weights.

That is for U-Nets alone. Cases whose edits differ in a text encoder, a VAE or a scheduler have embeddings, latents and
timesteps of their own, and go one group after the other: `groups` says which go together.
"""

from contextlib import contextmanager
from functools import partial

import torch

from dori_utils.core.diffusion import encode_prompts
from dori_utils.core.edits import applied, change, changed_parameters
from dori_utils.core.hashes import base_hash


def groups(edits):
    """Numbers of the cases whose edits (or None) are the same around the U-Net: a list for each such group."""
    found = {}
    for number, edit in enumerate(edits):
        around = edit and edit.around_unet
        found.setdefault(around and around.fingerprint(), []).append(number)
    return list(found.values())


def around_unet(edits):
    """The `Edit` of all but the U-Net that these edits share, or None.

    Raises:
        ValueError: they differ in it.
    """
    if len(groups(edits)) > 1:
        raise ValueError(
            "These edits differ in the text encoder, the VAE or the scheduler, so their cases cannot share a batch: "
            "do one group after the other (edits_by_row.groups)."
        )
    return edits[0] and edits[0].around_unet


def encode_by_row(pipe, prompts, edits, **kwargs):
    """`encode_prompts` of N prompts, each by the text encoder under its own edit (or None): (N, T, D)."""
    parts, order = [], []
    for group in groups(edits):
        with applied(pipe, around_unet([edits[number] for number in group])):
            parts.append(encode_prompts(pipe, [prompts[number] for number in group], **kwargs))
        order += group
    return torch.cat(parts)[torch.tensor(order).argsort()]


@contextmanager
def applied_by_row(pipe, edits):
    """Within it every row of a batch has its own weights: row r of k * B rows runs under edits[r % B].

    So B cases with different edits go through the U-Net together, twice each (k = 2) under guidance. The weights of the
    model stay as they are; its linear layers compute with edited copies. Where an edit changes other layers, too, the
    U-Net runs once for each edit instead. What the edits change around the U-Net must be the same of all.

    Rows that all have the same edit, or none, need no copies: that is `applied`.

    Args:
        edits: list of B edits, or None for rows without.

    Raises:
        ValueError: an edit of another model; edits that differ around the U-Net; or rows that differ in layers that
            are not linear while gradient checkpointing is on.
    """
    distinct = list(dict.fromkeys(edits))  # by identity
    if len(distinct) == 1:
        with applied(pipe, distinct[0]):
            yield pipe
        return
    with applied(pipe, around_unet(edits)), _patched(_patches(pipe, edits, distinct)):
        yield pipe


@contextmanager
def _patched(patches):
    try:
        for module, forward in patches:
            module.forward = forward
        yield
    finally:
        for module, _ in patches:
            module.__dict__.pop("forward", None)


def _patches(pipe, edits, distinct):
    """(module, new `forward`) of every edited layer, or of the U-Net as a whole if one of those is not linear."""
    unet, base, copies = pipe.unet, base_hash(pipe), []
    row_edit = torch.tensor([distinct.index(edit) for edit in edits])
    rows = [(row_edit == e).nonzero()[:, 0] for e in range(len(distinct))]
    for edit in distinct:
        changed = {} if edit is None else changed_parameters(pipe, edit, base, parts=["unet"])
        edited = {name: parameter.detach().clone() for name, parameter in changed.items()}
        if edit is not None:
            change(edited, edit)
        copies.append(edited)
    layers = dict.fromkeys(name.rpartition(".")[0] for edited in copies for name in edited)
    layers = {name: unet.get_submodule(name) for name in layers}
    if all(isinstance(layer, torch.nn.Linear) for layer in layers.values()):
        return [(layer, _by_row(name, layer, copies, rows, len(edits))) for name, layer in layers.items()]
    if unet.is_gradient_checkpointing:  # it would compute once more when the edited weights are gone
        raise ValueError("Rows under different edits of layers that are not linear: not with gradient checkpointing.")
    return [(unet, partial(_unet_by_row, unet, copies, rows, len(edits)))]


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
