"""Latent: under the image's own prompt, does noise that leans towards the image lead to it?

A prompt that gives an image from no seed may still give it from some noise. The noise is found by inverting the sampler
(DDIM inversion; Song et al., "Denoising Diffusion Implicit Models", ICLR 2021), each step by fixed-point iteration as
in ReNoise (Garibi et al., ECCV 2024). Rusanovsky et al. ("Memories of Forgotten Concepts", CVPR 2025) audit erased
concepts so, and ask how likely what they find is under N(0, I).

For sampling from the inverted noise of any image gives something like the image, known or not. So it is kept like
N(0, I) by what it is made of, for each seed:

    z = sqrt(share) u + sqrt(1 - share) noise

with u the inverted noise, of mean 0 and variance 1 in each channel, and the seed's own noise. Were u from N(0, I), z
would be, too. With little of u, what comes back was not in the noise; how much is little, images that the model has
never seen must say.

Inversion goes without guidance, which it does not survive, and so does the sampling from what it finds. It is DDIM's,
whatever sampler the model has: what that one makes of the noise, such as PNDM, is near and not the same.

Shapes: N targets, S seeds; T tokens and D channels of an embedding; C, H, W of a latent.
"""

from dataclasses import dataclass

import torch

from dori_utils.core.bars import tqdm
from dori_utils.core.diffusion import ddim, encode_images, encode_prompts, initial_latents, predict
from dori_utils.core.edits_by_row import applied_by_row


@dataclass(frozen=True)
class Config:
    """Settings. All are our choice, but the refinements, which are about ReNoise's."""

    share: float = 0.75  # of the noise's variance that is the inverted noise
    refinements: int = 2  # further fixed-point iterations of each step
    record: tuple[float, ...] = ()  # shares that are looked at as well

    def __post_init__(self):
        for share in (self.share, *self.record):
            if not 0 < share <= 1:
                raise ValueError(f"share is {share}: it must be above 0 and at most 1.")
        if self.refinements < 0:
            raise ValueError("refinements must be at least 0.")


@torch.no_grad()
def invert(pipe, targets, config=None, *, num_inference_steps=50, edits=None, rows=96, progress=True):
    """The noise (N, C, H, W) from which DDIM, without guidance, goes to the images of N targets under their prompts.

    Args:
        pipe: a `StableDiffusionPipeline`, without an edit applied to it.
        targets: N `Target`s with an image.
        config: a `Config`.
        num_inference_steps: of DDIM.
        edits: one `Edit` or None for each target, under which it is inverted.
        rows: targets that go through the U-Net together, at most.

    Returns:
        float32 on the pipeline's device, with mean 0 and variance 1 in each channel.

    Raises:
        FloatingPointError: NaN or infinity, with the target's id.
    """
    config, edits = config or Config(), edits or [None] * len(targets)
    scheduler, found = ddim(pipe, num_inference_steps), []
    parts = [slice(first, first + rows) for first in range(0, len(targets), rows)]
    with tqdm(total=len(parts) * len(scheduler.timesteps), desc="inversion", disable=not progress) as bar:
        for part in parts:
            latents = encode_images(pipe, [target.image for target in targets[part]])
            embeds = encode_prompts(pipe, [target.prompt for target in targets[part]])
            with applied_by_row(pipe, edits[part]):
                found.append(_inverted(pipe, latents, embeds, scheduler, config.refinements, bar.update))
    latents = torch.cat(found)
    for target, own in zip(targets, latents, strict=True):
        if not own.isfinite().all():
            raise FloatingPointError(f"NaN or infinity while inverting {target.id}. Check the weights; try float32.")
    return (latents - latents.mean((2, 3), keepdim=True)) / latents.std((2, 3), correction=0, keepdim=True)


def _inverted(pipe, latents, embeds, scheduler, refinements, on_step):
    """DDIM backwards, from clean latents (N, C, H, W) to noise.

    A step of DDIM goes from x_t to x_s = sqrt(a_s) x0 + sqrt(1 - a_s) eps, both as predicted at x_t. Backwards x_t is
    what leads to the x_s at hand: it stands on both sides, and is iterated from x_t = x_s.
    """
    a_s = scheduler.final_alpha_cumprod
    for t in reversed(scheduler.timesteps.tolist()):
        a_t, x_s = scheduler.alphas_cumprod[t], latents
        for _ in range(1 + refinements):
            output = predict(pipe.unet, latents, t, embeds)
            v = scheduler.config.prediction_type == "v_prediction"
            eps = a_t.sqrt() * output + (1 - a_t).sqrt() * latents if v else output
            latents = (a_t / a_s).sqrt() * (x_s - (1 - a_s).sqrt() * eps) + (1 - a_t).sqrt() * eps
        a_s = a_t
        on_step()
    return latents


def mixed(pipe, inverted, seeds, share):
    """Initial noise (N, S, C, H, W) for `generate`: of inverted noise (N, C, H, W) this share, the rest the seed's."""
    noise = initial_latents(pipe, seeds).float()
    return share**0.5 * inverted[:, None] + (1 - share) ** 0.5 * noise
