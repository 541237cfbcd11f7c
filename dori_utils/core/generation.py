"""Generation: prompts or embeddings x seeds become images, in batches of unrelated cases.

Randomness belongs to the case: the noise of a seed is the same for every prompt, batch size, device and dtype.
"""

from typing import SupportsIndex

import torch

from dori_utils.core.arguments import listed
from dori_utils.core.bars import tqdm
from dori_utils.core.diffusion import (
    _generators,
    _noise,
    count_evaluations,
    decode,
    denoise,
    encode_prompts,
    latent_size,
)
from dori_utils.core.edits_by_row import applied_by_row
from dori_utils.core.hashes import known

# CPU: 128 testbed images (8 x 8 latents), or two of Stable Diffusion (64 x 64).
LATENT_PIXELS_PER_CPU_BATCH = 8192

# CUDA, for each byte of the dtype: 1.6 GB for a guided 512-pixel image in float16. An estimate on the safe side.
CUDA_BYTES_PER_LATENT_PIXEL = 200_000


@torch.inference_mode()
def generate(
    pipe,
    prompts=None,
    *,
    prompt_embeds=None,
    seeds=range(4),
    num_inference_steps=50,
    guidance_scale=7.5,
    edits=None,
    latents=None,
    given=None,
    batch_size=None,
    truncate=False,
    progress=True,
):
    """Generate one image for each prompt (or embedding) and seed.

    Args:
        pipe: a `StableDiffusionPipeline`.
        prompts: list of N prompts, or one string.
        prompt_embeds: instead of prompts, text-encoder outputs (N, T, D).
        seeds: S integers; a seed is the same initial noise for every prompt.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 or less goes without it.
        edits: one `Edit` or None for each prompt, under which its images are generated; default: none.
        latents: initial noise (N, S, C, H, W) for each prompt and seed, instead of the seeds' own.
        given: a `Given` for each prompt, the part of its pictures that is given.
        batch_size: images that go through the U-Net together; default: what fits the device's memory.
        truncate: cut prompts that are too long (with a warning) instead of raising.
        progress: show a progress bar.

    Returns:
        A list of N lists of S PIL images.

    Raises:
        TypeError: prompts or seeds that are no lists of texts or integers.
        ValueError: neither or both of prompts and prompt_embeds, wrong shapes, a prompt that is too long, not one edit
            or `Given` for each prompt.
        FloatingPointError: NaN or infinity in a result, with the case that it is from.
    """
    seeds = listed("seeds", seeds, SupportsIndex, "a list of integers, such as range(4)")
    if not seeds:
        raise ValueError("No seeds: give at least one, for example seeds=[0].")
    batch_size = _default_batch_size(pipe) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1.")
    embeds = _embeddings(pipe, prompts, prompt_embeds, truncate)
    edits = [None] * len(embeds) if edits is None else list(edits)
    if len(edits) != len(embeds):
        raise ValueError(f"{len(edits)} edits for {len(embeds)} prompts: give one (or None) for each.")
    if given is not None and len(given) != len(embeds):
        raise ValueError(f"{len(given)} given for {len(embeds)} prompts: give a `Given` for each.")
    _check_latents(pipe, latents, len(embeds), len(seeds))
    cases = [(row, seed) for row in range(len(embeds)) for seed in seeds]
    starts = None if latents is None else latents.flatten(0, 1).to(pipe.unet.device, pipe.unet.dtype)
    batches = [cases[i : i + batch_size] for i in range(0, len(cases), batch_size)]
    steps = count_evaluations(pipe, num_inference_steps)

    images = []
    bar = tqdm(total=len(batches) * steps, desc=f"generate {len(cases)} images", disable=not progress)
    with bar, known(pipe):
        for number, batch in enumerate(batches):
            rows, generators = [row for row, _ in batch], _generators(seed for _, seed in batch)
            noise = _noise(pipe, generators)
            if starts is not None:
                noise = starts[number * batch_size :][: len(batch)]
            with applied_by_row(pipe, [edits[row] for row in rows]):
                clean = denoise(
                    pipe,
                    noise,
                    embeds[rows],
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    generators=generators,
                    given=given and [given[row] for row in rows],
                    on_step=bar.update,
                )
            _check_finite(clean, batch)
            pixels = pipe.image_processor.pt_to_numpy(decode(pipe, clean))
            images += pipe.image_processor.numpy_to_pil(pixels)
    return [images[i : i + len(seeds)] for i in range(0, len(images), len(seeds))]


def _embeddings(pipe, prompts, prompt_embeds, truncate):
    """Whichever of the two was given, as (N, T, D) on the pipeline's device and dtype."""
    if (prompts is None) == (prompt_embeds is None):
        raise ValueError("Give either prompts or prompt_embeds, one of the two.")
    if prompts is not None:
        return encode_prompts(pipe, prompts, truncate=truncate)
    tokens, channels = pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim
    if prompt_embeds.ndim != 3 or prompt_embeds.shape[1:] != (tokens, channels):
        raise ValueError(
            f"prompt_embeds has shape {tuple(prompt_embeds.shape)}; this model takes (N, {tokens}, {channels}), "
            "as encode_prompts gives."
        )
    return prompt_embeds.to(pipe.unet.device, pipe.unet.dtype)


def _check_latents(pipe, latents, prompts, seeds):
    shape = (prompts, seeds, pipe.unet.config.in_channels, *latent_size(pipe))
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"latents has the shape {tuple(latents.shape)}; these prompts and seeds take {shape}.")


def _check_finite(latents, cases):
    for sample, (row, seed) in zip(latents, cases, strict=True):
        if not sample.isfinite().all():
            raise FloatingPointError(
                f"NaN or infinity while generating prompt number {row} with seed {seed}. Check its embedding and the "
                "weights for NaN; in float16 try dtype=torch.float32."
            )


def _default_batch_size(pipe):
    height, width = latent_size(pipe)
    device = pipe.unet.device
    if device.type != "cuda":
        return max(1, LATENT_PIXELS_PER_CPU_BATCH // (height * width))
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # cached by torch, but not in use
    image = height * width * CUDA_BYTES_PER_LATENT_PIXEL * pipe.unet.dtype.itemsize
    return min(256, max(1, int(0.8 * free / image)))
