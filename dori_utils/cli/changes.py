"""Changes: which parts of a pipeline an edit changes, and how much, in words."""

import torch

from dori_utils.core.differences import same_but_rounded
from dori_utils.core.edits import change, changed_parameters
from dori_utils.core.hashes import WEIGHTS, base_hash
from dori_utils.core.parts import WORDS, named_parameters, scheduler_settings


def changes(pipe, edit) -> list[str]:
    """A sentence for each part of the pipeline that an edit changes.

    How far weights move is ||W' - W|| / ||W||, over the tensors that change, in the Frobenius norm. It is no measure of
    what becomes of the images.

    Args:
        pipe: the base, without the edit.
    """
    base = base_hash(pipe)
    said = [_of_weights(pipe, edit, part, base) for part in WEIGHTS if part in edit.parts]
    vae = edit.settings.get("vae", {})
    said += [f"{WORDS['vae']}: {_settings({n: pipe.vae.config.get(n) for n in vae}, vae)}"] if vae else []
    if "scheduler" in edit.settings:
        said.append(f"scheduler: {_settings(scheduler_settings(pipe.scheduler), edit.settings['scheduler'])}")
    return [sentence for sentence in said if sentence]


@torch.no_grad()
def _of_weights(pipe, edit, part, base):
    parameters = changed_parameters(pipe, edit, base, [part])
    if not parameters:  # its settings alone change
        return None
    moved, size, weights, tensors, rounded = 0.0, 0.0, 0, 0, True
    for name, before in parameters.items():
        after = {name: before.detach().clone()}
        change(after, edit)
        different = (after[name] != before).sum().item()
        if different:
            moved += (after[name].float() - before.float()).square().sum().item()
            size += before.float().square().sum().item()
            weights, tensors = weights + different, tensors + 1
            rounded = rounded and same_but_rounded(before, after[name])
    of = named_parameters(pipe, [part]).values()
    all_weights = sum(parameter.numel() for parameter in of)
    far = f"moved by {(moved / size) ** 0.5:.2g} of their norm" if size else "from zero"
    only = ", no more than half precision rounds" if weights and rounded else ""
    return f"{WORDS[part]}: {tensors} of {len(of)} tensors, {weights:,} of {all_weights:,} weights, {far}{only}"


def _settings(before, after):
    """What differs of two dicts of settings."""
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return ", ".join(f"{name.removeprefix('_')} {before.get(name)} → {after.get(name)}" for name in names)
