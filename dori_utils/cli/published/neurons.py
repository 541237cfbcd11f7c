"""Neurons: the tables that NeMo's authors' code writes, as edits of masks.

A table (memorization_statistics_v1_4.csv, fields parted by semicolons) has a row for each prompt: the column Caption,
and Refined Neurons, a list with the numbers of the blocked neurons of each of the 7 value layers of cross-attention in
the down and middle blocks, in the order in which they run.
"""

import csv
import hashlib
import json

import torch

from dori_utils.core.arguments import first_three
from dori_utils.core.edits import Edit, union
from dori_utils.core.hashes import base_hash
from dori_utils.nemo import value_layers

PROMPT, NEURONS = "Caption", "Refined Neurons"


def is_table(path):
    return path.suffix.lower() == ".csv"


def read_table(pipe, path, name) -> dict[str, Edit]:
    """Prompt → the `Edit` that switches its neurons off, in the order of the table.

    Raises:
        ValueError: no such table; neurons that the U-Net does not have; or a prompt twice with different neurons.
    """
    rows, base, layers = _rows(path), base_hash(pipe), value_layers(pipe.unet)
    found = {}
    for number, row in enumerate(rows, start=1):
        prompt, text = row[PROMPT], row[NEURONS]
        edit = Edit(name, base, {}, [prompt], _masks(f"{path}, row {number}", text, layers))
        if prompt in found and found[prompt].fingerprint() != edit.fingerprint():
            raise ValueError(f"{path} has the prompt {prompt!r} twice, with different neurons.")
        found[prompt] = edit
    return found


def read_union(pipe, path, name) -> Edit:
    """One edit that switches off the neurons of all prompts of a table."""
    return union(read_table(pipe, path, name).values())


def edits_of_targets(table, targets, path) -> list[Edit]:
    """For each target the edit of its prompt.

    Raises:
        ValueError: targets whose prompts are not in the table.
    """
    if missing := [target.prompt for target in targets if target.prompt not in table]:
        raise ValueError(
            f"{path} has neurons for {len(table)} prompts, but none for {first_three(map(repr, missing))}. A target is "
            "audited under the neurons of its own prompt: give --targets that the table has."
        )
    return [table[target.prompt] for target in targets]


def fingerprint(table):
    """16 hex characters that change with any neuron of any prompt."""
    rows = [f"{prompt} {edit.fingerprint()}" for prompt, edit in sorted(table.items())]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def _rows(path):
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            rows = list(csv.DictReader(file, delimiter=";" if ";" in header else ","))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table ({error}).") from error
    if not rows or not {PROMPT, NEURONS} <= rows[0].keys():
        columns = ", ".join(map(str, rows[0])) if rows else header.strip()
        raise ValueError(f"{path} is no table of NeMo's: it has no columns {PROMPT} and {NEURONS}, but {columns}.")
    return rows


def _masks(where, text, layers):
    """Parameter → mask (rows, 1), of the numbers of the neurons by layer."""
    try:
        numbers = json.loads(text)
        if not all(isinstance(number, int) for of_layer in numbers for number in of_layer):
            raise ValueError("no whole numbers")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {str(text)[:40]!r} is no list of lists of neurons' numbers.") from error
    if len(numbers) != len(layers):
        raise ValueError(f"{where}: neurons of {len(numbers)} layers, and this U-Net has {len(layers)}.")
    masks = {}
    for (name, layer), of_layer in zip(layers.items(), numbers, strict=True):
        if of_layer and not 0 <= min(of_layer) <= max(of_layer) < layer.out_features:
            raise ValueError(f"{where}: there is no neuron {max(of_layer)} in {name}, which has {layer.out_features}.")
        mask = torch.zeros(layer.out_features, 1, dtype=torch.bool)
        mask[of_layer] = True
        masks[f"{name}.weight"] = mask
    return masks
