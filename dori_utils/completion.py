"""Completion: half of the image is given. Does the model know the other half?

An attack that needs no optimisation, and by which no other half can be put in: the model paints the picture of the
image's own prompt with its own sampler, and after every step the known half is put back, noised as of that step. Of an
image that it holds, the other half comes back; of one that it has never seen it makes something up. Carlini et al.
("Extracting Training Data from Diffusion Models", 2023) attack by inpainting so; the sampling is that of RePaint
(Lugmayr et al., CVPR 2022) without its jumps back in time, for which samplers that remember their steps, as Stable
Diffusion's PNDM does, have no way; with one noise a case it is diffusers' inpainting with an ordinary U-Net.

Only the unknown half is judged. It is never seen: before the VAE encodes the image it is painted over in grey, for the
encoder of Stable Diffusion looks at the whole image wherever it encodes. A ground or a shape that goes on from the
known half may be guessed all the same: how often, images that the model has never seen must say.

Shapes: N targets, S seeds; C, H, W of a latent.
"""

from dataclasses import dataclass

import torch

from dori_utils.core.diffusion import Given, encode_images
from dori_utils.core.generation import generate
from dori_utils.core.pictures import corners, part_of

# Known half → box of the other one: left, top, right, bottom, as shares of width and height.
UNKNOWN = {"left": (0.5, 0, 1, 1), "right": (0, 0, 0.5, 1), "top": (0, 0.5, 1, 1), "bottom": (0, 0, 1, 0.5)}


@dataclass(frozen=True)
class Config:
    """Which half is given, a name in `UNKNOWN`. Ours: the left one."""

    known: str = "left"

    def __post_init__(self):
        if self.known not in UNKNOWN:
            raise ValueError(f"known is {self.known!r}: the half that is given is one of {', '.join(UNKNOWN)}.")

    @property
    def unknown(self):
        """The box of the half that is judged, see `pictures.part_of`."""
        return UNKNOWN[self.known]


def complete(pipe, targets, config=None, *, seeds=range(4), **sampling):
    """Paint the other half of N images, under their own prompts.

    Args:
        pipe: a `StableDiffusionPipeline`, without an edit applied to it.
        targets: N `Target`s with an image.
        config: a `Config`.
        seeds: S integers.
        sampling: what else `generate` takes: num_inference_steps, guidance_scale, edits, batch_size, progress.

    Returns:
        N lists of S PIL images, whole ones; `unknown_halves` is what counts of them.
    """
    config = config or Config()
    prompts = [target.prompt for target in targets]
    return generate(pipe, prompts, seeds=seeds, given=known_halves(pipe, targets, config), **sampling)


def known_halves(pipe, targets, config):
    """A `Given` for each target, with nothing in it of the unknown half."""
    latents = encode_images(pipe, [_painted_over(target.image, config.unknown) for target in targets])
    left, top, right, bottom = corners(config.unknown, *latents.shape[:1:-1])
    where = torch.ones(latents.shape[2:], dtype=torch.bool)
    where[top:bottom, left:right] = False
    return [Given(own, where) for own in latents]


def unknown_halves(images, config):
    """Of N lists of S PIL images the half that is judged."""
    return [[part_of(image, config.unknown) for image in row] for row in images]


def _painted_over(image, box):
    """The image with grey in a box; before it is resized, which would carry pixels over the edge."""
    painted = image.copy()
    painted.paste("grey", corners(box, *image.size))
    return painted
