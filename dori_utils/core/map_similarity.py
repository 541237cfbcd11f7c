"""How alike two maps of latents are: MS-SSIM as NeMo has it, and what small latents allow."""

import torch


def pairwise_similarity(maps, kind):
    """Similarity of all S (S - 1) / 2 pairs among S maps with values in [0, 1].

    Args:
        maps: (S, C, H, W).
        kind: a name in `PAIRWISE`:

            * "ms_ssim", as NeMo's code has it: kernel 11, three scales, exponents .33, and no range of the values, so
              that torchmetrics takes it from all pairs of the call, at each scale anew. For latents of at least 44 px.
            * "ms_ssim_unit", ours: the same with the range 1, which the maps have, and exponents 1/3.
            * "ssim" on the one scale that there is, with the range 1, for latents of at least 11 px.
            * "cosine" of the maps with the mean of each channel removed (a correlation: without that, all maps in
              [0, 1] are alike), for any size.

    Returns:
        (pairs,), in the order of `torch.combinations`. Two maps of zeros, as `first_step_change` gives where
        nothing changes, are 0 in "cosine" and "ms_ssim": they show nothing that could be memorized (and in "ms_ssim",
        whose formula is 0 / 0 there, so are any two flat maps). The other kinds are as their formula.

    Raises:
        ValueError: unknown kind, fewer than two maps, or maps too small for the kind.
    """
    if len(maps) < 2:
        raise ValueError("Pairwise similarity needs at least two seeds.")
    first, second = torch.combinations(torch.arange(len(maps), device=maps.device)).T
    return _compare(kind, maps)(maps[first], maps[second])


def rowwise_similarity(maps, others, kind):
    """Similarity (B,) of each of the maps (B, C, H, W) to the other at its place; `kind` as in `pairwise_similarity`.

    A row does not depend on the rows beside it. That is so in every kind but "ms_ssim", whose range is of all rows of a
    call: here each row is a call of its own. NeMo's code has all counted seeds in one call, which makes scores higher
    by up to 0.003 on maps of noise, and by less than 0.001 on smooth ones, as memorized images have.
    """
    compare = _compare(kind, maps)
    if kind != "ms_ssim":
        return compare(maps, others)
    return torch.cat([compare(*row) for row in zip(maps.split(1), others.split(1), strict=True)])


def _compare(kind, maps):
    if kind not in PAIRWISE:
        raise ValueError(f"No pairwise similarity {kind!r}; there is {', '.join(PAIRWISE)}.")
    smallest, compare = PAIRWISE[kind]
    if min(maps.shape[-2:]) < smallest:
        raise ValueError(f"{kind!r} needs latents of at least {smallest} px, these have {tuple(maps.shape[-2:])}.")
    return compare


def _cosine(a, b):
    a, b = (x - x.mean((2, 3), keepdim=True) for x in (a, b))
    return torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1))


def _ssim(a, b):
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    return ssim(a, b, data_range=1.0, reduction="none")


def _ms_ssim(a, b):
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    flat = ((a.amax((1, 2, 3)) == a.amin((1, 2, 3))) & (b.amax((1, 2, 3)) == b.amin((1, 2, 3)))).nonzero().flatten()
    if len(flat) == len(a):
        return 0 * a.sum((1, 2, 3))  # their range is 0: torchmetrics says 1, 0 or NaN, as its rounding falls
    return ms_ssim(a, b, kernel_size=11, betas=(0.33, 0.33, 0.33), reduction="none").index_fill(0, flat, 0)


def _ms_ssim_unit(a, b):
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    return ms_ssim(a, b, data_range=1.0, kernel_size=11, betas=(1 / 3, 1 / 3, 1 / 3), reduction="none")


# Name → smallest side, function of maps (B, C, H, W) and others. MS-SSIM: a quarter of the side must be over ten.
PAIRWISE = {"ssim": (11, _ssim), "ms_ssim": (44, _ms_ssim), "ms_ssim_unit": (44, _ms_ssim_unit), "cosine": (1, _cosine)}
