"""Concept Ablation: the prompt gives something like what it gave.

Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models" (ICCV 2023), as they use it on memorized images.
The prompt c* is to give what its anchors c give, paraphrases whose images x are no copies; sg stops the gradient, and
the second term keeps the anchors what they are:

    || eps(x_t, c*) - sg[eps(x_t, c)] ||^2  +  weight * || eps - eps(x_t, c) ||^2
"""

from dataclasses import dataclass

import numpy as np
import torch

from dori_utils.core.diffusion import denoising_loss, encode_images, encode_prompts, noised, predict
from dori_utils.core.edits import Edit
from dori_utils.core.generation import generate
from dori_utils.core.sscd import sscd_scores
from dori_utils.erasure import check_lists, check_targets, draws, train, turns


@dataclass(frozen=True)
class AblationConfig:
    """Settings of `concept_ablation`; all are of the authors' first code and its script for memorized images."""

    steps: int = 400  # its README; 410 in its configuration
    batch_size: int = 2  # anchor images at a step: one on each of two GPUs
    lr: float = 2e-6  # 5e-7 times two GPUs times a batch of two, as its script scales it
    weight_decay: float = 0.01  # AdamW's default
    regularization: float = 0.2  # weight of the loss on anchors; 1 in their diffusers version. 0: without
    images: int = 1000  # of a target, over all its anchors
    anchors: int = 10  # of a target, at most
    checked: int = 5  # images of each candidate that `select_anchors` looks at
    threshold: float = 0.5  # SSCD up to which an image is no copy
    guidance_scale: float = 6.0  # of the images
    num_inference_steps: int = 200  # of the images; 100 of those that are looked at, which are the first of them here
    seed: int = 0  # of the order of images, noise and timesteps

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.images, self.anchors, self.checked, self.num_inference_steps) < 1:
            raise ValueError("steps, batch_size, images, anchors, checked, num_inference_steps must be at least 1.")
        if self.regularization < 0:
            raise ValueError(f"regularization is {self.regularization}: it must be at least 0.")


def concept_ablation(pipe, targets, anchors, config=None, **options) -> Edit:
    """Have the targets' prompts give what their anchors give (Kumari et al., 2023, model-based, all weights).

    Their code has three of the paraphrases that copy most as targets beside the prompt, flips images at random, and
    stops gradients through the first token's keys and values in cross-attention; this does none of it. The last hardly
    shows in the whole gradient (cosine 0.9996), but changes that of cross-attention's `to_k` and `to_v` by 20%.

    Args:
        pipe: a `StableDiffusionPipeline` in float32, without an edit applied to it.
        targets: N `Target`s, of which only ids and prompts are used.
        anchors: for each target a list of prompts, as `select_anchors` gives them.
        config: an `AblationConfig`.
        options: as for `esd`; the callback gets {"step", "loss", "ablation", "anchor"}, the last two the terms of the
            loss. A run that goes on draws its anchor images again, the same ones.

    Returns:
        One `Edit` for all targets.

    Raises:
        ValueError: no targets, half precision, or a target without anchors.
    """
    config = config or AblationConfig()
    check_targets(targets)
    check_lists(targets, anchors, "anchors")
    clean, rows = _anchor_images(pipe, anchors, config, options.get("progress", True))
    loss_of, order = _ablation_loss(pipe, targets, anchors, clean, rows, config), turns(len(clean), config)
    return train("concept ablation", pipe, targets, order, loss_of, config, **options)


def _ablation_loss(pipe, targets, anchors, clean, rows, config):
    prompts = encode_prompts(pipe, [target.prompt for target in targets])
    anchor_prompts = encode_prompts(pipe, [prompt for own in anchors for prompt in own])

    def loss_of(unet, chosen, generator):
        x, (of_target, of_anchor) = clean[chosen], rows[chosen].T
        c_star, c = prompts[of_target], anchor_prompts[of_anchor]
        noise, timesteps = draws(pipe, x, generator)
        x_t, _ = noised(pipe, x, noise, timesteps)
        with torch.no_grad():
            wanted = predict(unet, x_t, timesteps, c)  # sg[...]: of the model in training, there is no teacher
        ablation = (predict(unet, x_t, timesteps, c_star) - wanted).square().mean()
        if config.regularization == 0:
            return ablation, {"ablation": ablation.item()}
        anchor = denoising_loss(pipe, x, c, *draws(pipe, x, generator)).mean()
        numbers = {"ablation": ablation.item(), "anchor": anchor.item()}
        return ablation + config.regularization * anchor, numbers

    return loss_of


def _anchor_images(pipe, anchors, config, progress):
    """Clean latents (M, C, H, W) of all targets' anchor images, and (M, 2): the numbers of their target and anchor."""
    latents, rows = [], []
    for number, own in enumerate(anchors):
        count = max(1, config.images // len(own))
        first = sum(len(others) for others in anchors[:number])
        images = _images(pipe, own, count, config, progress)
        latents.append(encode_images(pipe, [image for of_anchor in images for image in of_anchor]))
        rows += [(number, first + anchor) for anchor in range(len(own)) for _ in range(count)]
    return torch.cat(latents), torch.tensor(rows)


def _images(pipe, prompts, count, config, progress):
    """For each prompt the images of seeds 0 to count: what is checked comes first in what is trained on."""
    sampling = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    return generate(pipe, prompts, seeds=range(count), progress=progress, **sampling)


def select_anchors(pipe, targets, candidates, config=None, *, transform, sscd=None, progress=True):
    """For each target the paraphrases of its prompt that give no copy of its image.

    Stricter than the authors' code, which ranks candidates by the number of images that are no copies, and sorts out
    copies once more among the images that it trains on.

    Args:
        pipe: a `StableDiffusionPipeline`.
        targets: N `Target`s with an image.
        candidates: for each target a list of prompts.
        config: an `AblationConfig`.
        transform: of SSCD, a name in `sscd.TRANSFORMS`.
        sscd: an `SSCD`; default: `load_sscd()`.

    Returns:
        For each target a list of prompts, at most `config.anchors`, the one whose worst image is least similar first.

    Raises:
        ValueError: every candidate of a target copies it; or no targets, no candidates, no image.
    """
    config = config or AblationConfig()
    check_targets(targets, images=True)
    check_lists(targets, candidates, "candidates")
    selected = []
    for target, own in zip(targets, candidates, strict=True):
        images = _images(pipe, own, config.checked, config, progress)
        originals = [target.image] * len(own)
        scores = sscd_scores(images, originals, transform=transform, sscd=sscd, progress=progress)  # (P, S)
        worst = scores.max(axis=1)
        kept = [own[i] for i in np.argsort(worst, kind="stable") if worst[i] <= config.threshold]
        if not kept:
            raise ValueError(
                f"Each of the {len(own)} candidates of {target.id} gives an image with an SSCD above "
                f"{config.threshold}, the least {worst.min():.2f}: think of prompts that are further from "
                f"{target.prompt!r}."
            )
        selected.append(kept[: config.anchors])
    return selected
