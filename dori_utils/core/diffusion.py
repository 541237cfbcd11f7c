"""Diffusion: prompts, images and noise, and what a model makes of them: its training loss, and the reverse process.

`denoise` is the sampling loop of diffusers' `StableDiffusionPipeline.__call__`, opened up so that it takes a batch of
unrelated cases: row i has its own embedding (a prompt, or a trigger that an attack found) and its own noise. It gives
the same latents as diffusers does; the tests hold it to that.

Randomness belongs to the case. The noise of a seed is drawn on the CPU from a generator with that seed alone, so it is
the same for every prompt, batch size, device and dtype, and whatever ran before.

Shapes: N cases; T tokens and D channels of an embedding; C, H, W of a latent; pixels are floats in [0, 1] or PIL.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dori_utils.core.arguments import listed
from dori_utils.core.pictures import to_rgb


@torch.no_grad()  # not inference_mode: attacks start from these embeddings and need gradients later
def encode_prompts(pipe, prompts, *, truncate=False):
    """Text-encoder outputs (N, T, D) of N prompts; [""] gives the unconditional embedding of guidance.

    Raises:
        ValueError: a prompt has more tokens than the model takes, unless `truncate` (then diffusers warns).
    """
    prompts = [prompts] if isinstance(prompts, str) else listed("prompts", prompts, str, "a list of texts")
    if not prompts:
        raise ValueError("No prompts: give at least one.")
    if not truncate:
        _check_lengths(pipe.tokenizer, prompts)
    chunks = [prompts[i : i + 64] for i in range(0, len(prompts), 64)]
    return torch.cat([pipe.encode_prompt(chunk, pipe.unet.device, 1, False)[0] for chunk in chunks])


def initial_latents(pipe, seeds):
    """Standard normal noise (N, C, H, W), one CPU generator for each of N seeds, on the pipeline's device and dtype."""
    return _noise(pipe, _generators(seeds))


@dataclass(frozen=True, eq=False)
class Given:
    """The part of a picture that its generation is given: clean latents (C, H, W), and where (H, W) they are, True."""

    latents: torch.Tensor
    where: torch.Tensor


@torch.no_grad()
def denoise(
    pipe,
    latents,
    prompt_embeds,
    *,
    num_inference_steps=50,
    guidance_scale=7.5,
    generators=None,
    given=None,
    on_step=None,
    stop_after=None,
):
    """Run the reverse process on one batch.

    Args:
        latents: (N, C, H, W) standard normal noise, see `initial_latents`.
        prompt_embeds: (N, T, D), one for each case.
        generators: one for each case, for samplers that add noise (DDPM, Euler ancestral); DDIM and PNDM add none.
        given: a `Given` for each case: after every step it is put back, with the case's own noise as of that step.
        on_step: called without arguments after every evaluation of the U-Net.
        stop_after: evaluations of the U-Net after which to stop half-way; default: go to the end.

    Returns:
        Latents (N, C, H, W) of clean images, for `decode`, or of noisy ones with `stop_after`.

    Source: Ho and Salimans (2022) for guidance, in the order that diffusers has: unconditional half first. `given` is
    what its inpainting pipeline does with an ordinary U-Net.
    """
    scheduler = _scheduler(pipe, num_inference_steps)  # a fresh one: PNDM remembers what it saw
    extra = pipe.prepare_extra_step_kwargs(generators, eta=0.0)
    guided = guidance_scale > 1
    if guided:
        uncond = encode_prompts(pipe, [""]).expand_as(prompt_embeds)
        prompt_embeds = torch.cat([uncond, prompt_embeds])  # (2N, T, D)
    noise, latents = latents, latents * scheduler.init_noise_sigma
    for step, t in enumerate(scheduler.timesteps[:stop_after], start=1):
        model_input = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
        output = pipe.unet(model_input, t, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        if guided:
            output_uncond, output_text = output.chunk(2)
            output = output_uncond + guidance_scale * (output_text - output_uncond)
        latents = scheduler.step(output, t, latents, **extra, return_dict=False)[0]
        if given is not None:
            latents = _put_back(given, latents, noise, scheduler, scheduler.timesteps[step : step + 1])
        if on_step is not None:
            on_step()
    return latents


def _put_back(given, latents, noise, scheduler, t):
    """Latents (N, C, H, W) with what is given of them, noised as of the next timestep t (1,), or clean at the end."""
    clean = torch.stack([own.latents for own in given]).to(latents)
    where = torch.stack([own.where for own in given])[:, None].to(latents.device)  # (N, 1, H, W)
    return torch.where(where, scheduler.add_noise(clean, noise, t) if len(t) else clean, latents)


@torch.no_grad()
def decode(pipe, latents):
    """Latents (N, C, H, W) to pixels: floats in [0, 1], (N, 3, height, width)."""
    sample = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return pipe.image_processor.postprocess(sample, output_type="pt")


def preprocess(pipe, image):
    """A PIL image as the VAE takes it: (1, 3, H, W) in [-1, 1], resized to the model's size."""
    height, width = [side * pipe.vae_scale_factor for side in latent_size(pipe)]
    return pipe.image_processor.preprocess(to_rgb(image), height, width)


@torch.no_grad()
def encode_pixels(pipe, pixels):
    """Pixels (N, 3, H, W) in [-1, 1] to clean latents (N, C, H, W) float32, scaled as the U-Net knows them.

    Where the VAE gives a distribution, this is its mean: training draws from it, but its spread is small beside the
    noise that follows.
    """
    encoded = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return latents.float() * pipe.vae.config.scaling_factor


def encode_images(pipe, images):
    """Clean latents (N, C, H, W) float32 of N PIL images of any size, see `preprocess` and `encode_pixels`."""
    return torch.cat([encode_pixels(pipe, preprocess(pipe, image)) for image in images])


def ddim(pipe, num_inference_steps):
    """DDIM on the pipeline's noise schedule. Latents are not in [-1, 1], so the old default to clip them is off."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(num_inference_steps, device=pipe.unet.device)
    return scheduler


def denoising_loss(pipe, latents, prompt_embeds, noise, timesteps):
    """The loss that the model was trained with, for each row (N,): mean square error of its prediction.

    Args:
        latents: clean ones (N, C, H, W), see `encode_images`.
        prompt_embeds: (N, T, D).
        noise: standard normal (N, C, H, W).
        timesteps: (N,) integers below the scheduler's num_train_timesteps.

    Raises:
        ValueError: a model that predicts neither noise nor v.
    """
    noisy, wanted = noised(pipe, latents, noise, timesteps)
    return (predict(pipe.unet, noisy, timesteps, prompt_embeds) - wanted).square().mean(dim=(1, 2, 3))


def noised(pipe, latents, noise, timesteps):
    """x_t (N, C, H, W), and what the model was trained to predict there, noise or v; arguments of `denoising_loss`."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"Only models are known that predict 'epsilon' or 'v_prediction', not {kind!r}.")
    wanted = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    return scheduler.add_noise(latents, noise, timesteps), wanted


def predict(unet, noisy, timesteps, prompt_embeds):
    """What the U-Net predicts for x_t (N, C, H, W), in float32."""
    dtype = unet.dtype
    return unet(noisy.to(dtype), timesteps, encoder_hidden_states=prompt_embeds.to(dtype)).sample.float()


@contextmanager
def gradient_checkpointing(unet, wanted):
    before = unet.is_gradient_checkpointing
    if wanted:
        unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if wanted and not before:
            unet.disable_gradient_checkpointing()


def _check_lengths(tokenizer, prompts):
    limit = tokenizer.model_max_length
    for prompt, ids in zip(prompts, tokenizer(prompts, verbose=False).input_ids, strict=True):
        if len(ids) > limit:
            raise ValueError(
                f"Prompt too long: {len(ids)} tokens, this model takes {limit} (start and end token included): "
                f"{prompt!r}. Shorten it, or pass truncate=True to cut it."
            )


def count_evaluations(pipe, num_inference_steps):
    """How often sampling asks the U-Net: PNDM once more than it has steps."""
    return len(_scheduler(pipe, num_inference_steps).timesteps)


def _scheduler(pipe, num_inference_steps):
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps, device=pipe.unet.device)
    return scheduler


def _generators(seeds):
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def _noise(pipe, generators):
    # float32 first: in float16 the generator would give other noise for the same seed.
    shape = (pipe.unet.config.in_channels, *latent_size(pipe))
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])  # (N, C, H, W)
    return noise.to(pipe.unet.device, pipe.unet.dtype)


def latent_size(pipe):
    """Height and width of a latent."""
    size = pipe.unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)
