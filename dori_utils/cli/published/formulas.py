"""Formulas: what an adapter adds to the weights of a layer.

A delta is scale * M, where M (rows, columns) of a layer is

    LoRA, LoCon   up down, or with a core t (rank, rank, ...) between them for a convolution
    LoHa          (w1_a w1_b) * (w2_a w2_b), element by element (Hyeon-Woo et al., 2022)
    LoKr          w1 (x) w2, the Kronecker product; each of the two may be a product w_a w_b (Yeh et al., 2024)
    full, norms   the delta itself, of weights (diff, w_norm) and of biases (diff_b, b_norm)

and scale = alpha / rank, 1 where no alpha is said, and for what has no rank. A DoRA's is that of the layer as a whole.
The weight of a convolution is taken as (rows, columns * height * width).
"""

import torch

HADAMARD = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
KRONECKER = [
    {*first, *second}
    for first in (["lokr_w1"], ["lokr_w1_a", "lokr_w1_b"])
    for second in (["lokr_w2"], ["lokr_w2_a", "lokr_w2_b"], ["lokr_w2_a", "lokr_w2_b", "lokr_t2"])
]


def matrices(own, kinds, scale):
    """{"weight": delta, "bias": delta} of one layer, whichever it has; None if it is of no kind that is known.

    Args:
        own: what a tensor is, as files of LyCORIS have it ("up" and "down" for LoRA's) → tensor.
        kinds: the keys among them that make the delta.
        scale: function of the rank, or of None where there is none.
    """
    if kinds in ({"up", "down"}, {"up", "down", "mid"}):
        return {"weight": _low_rank(own, scale)}
    if kinds in (HADAMARD, HADAMARD | {"hada_t1", "hada_t2"}):
        return {"weight": _hadamard(own, scale)}
    if kinds in KRONECKER:
        return {"weight": _kronecker(own, scale)}
    whole = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}
    return {whole[kind]: own[kind] for kind in kinds} if kinds and kinds <= whole.keys() else None


def _low_rank(own, scale):
    up, down = own["up"].flatten(1), own["down"].flatten(1)
    matrix = _with_core(own["mid"], up.T, down) if "mid" in own else up @ down
    return scale(len(down)) * matrix


def _hadamard(own, scale):
    halves = [_product(own, f"hada_w{half}", f"hada_t{half}") for half in "12"]
    return scale(len(own["hada_w1_b"])) * (halves[0] * halves[1])


def _kronecker(own, scale):
    first, second = (
        own[f"lokr_w{i}"] if f"lokr_w{i}" in own else _product(own, f"lokr_w{i}", f"lokr_t{i}") for i in "12"
    )
    ranks = [len(own[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in own]
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return scale(ranks[-1] if ranks else None) * torch.kron(first, second.contiguous())


def _product(own, name, core):
    left, right = own[f"{name}_a"], own[f"{name}_b"]
    return _with_core(own[core], left, right) if core in own else left @ right.flatten(1)


def _with_core(core, left, right):
    """A convolution (rows, columns, ...) from its core (rank, rank, ...), (rank, rows) and (rank, columns)."""
    return torch.einsum("ij...,ip,jr->pr...", core, left, right)


def decomposed(weight, delta, magnitude):
    """A DoRA's delta: m (W + delta) / ||W + delta|| - W (Liu et al., 2024, Eq. 5).

    Args:
        weight, delta: (rows, columns, ...) of a linear layer or a convolution.
        magnitude: m, for each row; in files of LyCORIS it may be (1, columns, ...), for each column.

    Raises:
        ValueError: as many magnitudes as do not fit the weight.
    """
    moved, axis = weight + delta, 0
    if magnitude.ndim > 1 and len(magnitude) == 1 and len(weight) > 1:
        axis = 1
    if magnitude.numel() != weight.shape[axis]:
        raise ValueError(f"has {magnitude.numel()} magnitudes for a weight {tuple(weight.shape)}.")
    others = [d for d in range(weight.ndim) if d != axis]
    shape = [-1 if d == axis else 1 for d in range(weight.ndim)]
    return magnitude.reshape(shape) * moved / torch.linalg.vector_norm(moved, dim=others, keepdim=True) - weight
