"""Regions: is a part of this image in that one, at the same place?

SSCD answers for whole images. Of a template, which a model gives again and again with another object in it, it often
sees no copy, for a good part of the picture is another one. So the same windows of both images are compared, each by
SSCD, and what counts is the better half of them: background and layout are there, whatever else is not.

An image has nine windows, three in a row, of half its height and half its width, that overlap by half. Each is compared
with the window at its own place alone: the same things elsewhere are no copy of a part, while to SSCD on the whole they
may be one of the image.

An even ground is a region, too: two images on the same white have the white in common. As always, controls say how much
that is. Others look at parts as well: Carlini et al. ("Extracting Training Data from Diffusion Models", 2023) at the
worst of 16 tiles, so that a common background is no copy; Somepalli et al. ("Diffusion Art or Digital Forgery?", CVPR
2023) at the best part of a feature, wherever in the image it is.

Shapes: N targets, S generations of each, G = 3 windows in a row and in a column, D features.
"""

import numpy as np

from dori_utils.core.sscd import load_sscd

GRID = 3


def windows(image):
    """The G * G windows of a PIL image, row by row."""
    lefts, tops = (_starts(side) for side in image.size)
    width, height = (_half(side) for side in image.size)
    return [image.crop((left, top, left + width, top + height)) for top in tops for left in lefts]


def window_features(images, transform, sscd, progress=True):
    """SSCD features (N, G * G, D) of the windows of N PIL images; `transform` as `SSCD.embed` takes it."""
    parts = [part for image in images for part in windows(image)]
    return sscd.embed(parts, transform, progress=progress).reshape(len(images), GRID * GRID, -1)


def region_maps(images, targets, *, transform, sscd=None, progress=True):
    """SSCD of every window of each generation and the same window of its target.

    Args:
        images: N lists of S PIL images, as `generate` returns them.
        targets: N PIL images.
        transform: a name in `sscd.TRANSFORMS`, or an `SSCDTransform`; it is applied to each window.
        sscd: an `SSCD`; default: `load_sscd()`.

    Returns:
        (N, S, G, G) float32 cosine similarities, window for window as one sees them.

    Raises:
        ValueError: not one list for each target, or lists of unequal length.
    """
    sscd, images = sscd or load_sscd(), [list(row) for row in images]
    if len(images) != len(targets) or len({len(row) for row in images}) != 1:
        raise ValueError(f"{len(targets)} targets need as many lists of generations, all of one length.")
    originals = window_features(targets, transform, sscd, progress)  # (N, G * G, D)
    found = window_features([image for row in images for image in row], transform, sscd, progress)
    return maps_of(found.reshape(len(images), -1, *found.shape[1:]), originals)


def maps_of(features, originals):
    """Maps (N, S, G, G) of features (N, S, G * G, D) of generations and (N, G * G, D) of their targets."""
    return np.einsum("nsgd,ngd->nsg", features, originals).reshape(*features.shape[:2], GRID, GRID)


def region_similarity(maps):
    """Mean (...) over the better half of the windows, five of nine, of maps (..., G, G): 1 for the image itself."""
    values = np.sort(maps.reshape(*maps.shape[:-2], -1))
    return values[..., values.shape[-1] // 2 :].mean(axis=-1)


def _half(side):
    return (side + 1) // 2


def _starts(side):
    return [i * (side - _half(side)) // (GRID - 1) for i in range(GRID)]
