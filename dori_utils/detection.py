"""Detection: is this prompt memorized? Four answers that need the model but not the training images.

A memorized prompt pulls every noise towards one picture. Each detector sees another side of that:

* `noise_magnitude`: how hard the prompt pulls, |eps(x_t, t, y) - eps(x_t, t, "")| (Wen et al., "Detecting, Explaining,
  and Mitigating Memorization in Diffusion Models", ICLR 2024). Costs two U-Net evaluations a seed and step.
* `first_step_similarity`: whether all seeds are pulled the same way in the first step (Hintersdorf et al., "Finding
  NeMo", NeurIPS 2024). One evaluation a seed.
* `anisotropy`: how hard it pulls, and whether, at low noise, it pulls along the way that the model goes without it
  (Asthana and Belagiannis, "Detecting and Mitigating Memorization in Diffusion Models through Anisotropy of the
  Log-Probability", ICLR 2026). Four evaluations a seed, no denoising.
* `metrics.diversity`: whether all seeds end as the same picture (D_SSCD). Whole generations.

Every detector returns one float32 score a prompt, and **higher always means more likely memorized**. `roc_auc` and
`tpr_at_fpr` say how well scores separate memorized prompts from ordinary ones.

These papers' models predict the noise eps. SD 2.x and the testbed predict v = sqrt(a) eps - sqrt(1 - a) x0, a being
alpha-bar at t. Where nothing but noise is left, a is 0, and eps is the image itself whatever the prompt: there v alone
tells. So the detectors that look at the U-Net's answer take the part of it in which prompts can differ.

Shapes: N prompts, S seeds, B of their cases in one batch; latents (B, C, H, W); embeddings (B, T, D).
"""

import torch

from dori_utils.core.bars import tqdm
from dori_utils.core.diffusion import ddim, encode_prompts, initial_latents
from dori_utils.core.map_similarity import pairwise_similarity


@torch.no_grad()
def noise_magnitude(
    pipe, prompts, *, seeds=range(4), steps=1, num_inference_steps=50, guidance_scale=7.5, batch_size=16, progress=True
):
    """Text-conditional noise magnitude: mean L2 norm of eps(x_t, t, y) - eps(x_t, t, "") over steps and seeds.

    As in the authors' code the images are on their way under guidance, with DDIM whatever sampler the pipeline has. For
    v-prediction it is v's difference, from which that of eps is the factor sqrt(a) away, 0 where nothing but noise is
    left: the same score up to a factor in one step; a mean over steps gives noisy ones more weight than eps would.

    Args:
        pipe: a `StableDiffusionPipeline`.
        prompts: N texts.
        seeds: one initial noise each, the same for all prompts.
        steps: how many of the first denoising steps to average; 1 is the authors' cheapest, and nearly their best.
        num_inference_steps: steps of the whole schedule, which fixes the timesteps.
        guidance_scale: guidance between the steps; without effect when steps is 1.
        batch_size: cases (prompt and seed) in one batch; the U-Net sees two rows for each.

    Returns:
        (N,) float32.

    Raises:
        FloatingPointError: NaN or infinity in a score; also from `first_step_similarity`.
    """
    scheduler = ddim(pipe, num_inference_steps)
    _prediction_type(scheduler)
    if not 1 <= steps <= len(scheduler.timesteps):
        raise ValueError(f"steps is {steps}: it must be between 1 and {len(scheduler.timesteps)}.")
    uncond = encode_prompts(pipe, [""])  # (1, T, D)
    norms = []
    for embeds, latents in _batches(pipe, prompts, seeds, batch_size, "noise magnitude", progress):
        both = torch.cat([uncond.expand_as(embeds), embeds])  # (2B, T, D)
        total = torch.zeros(len(latents), device=latents.device)
        for t in scheduler.timesteps[:steps]:
            output = pipe.unet(torch.cat([latents, latents]), t, encoder_hidden_states=both).sample
            output_uncond, output_text = output.chunk(2)
            total += (output_text.float() - output_uncond.float()).flatten(1).norm(dim=1)
            guided = output_uncond + guidance_scale * (output_text - output_uncond)
            latents = scheduler.step(guided, t, latents).prev_sample
        norms.append(total / steps)
    return _scores(torch.cat(norms).unflatten(0, (-1, len(seeds))).mean(dim=1))  # (N * S,) → (N, S) → (N,)


@torch.no_grad()
def first_step_similarity(
    pipe,
    prompts,
    *,
    seeds=range(10),
    pairwise="ssim",
    num_inference_steps=50,
    second_timestep=False,
    batch_size=16,
    progress=True,
):
    """Highest pairwise similarity, among seeds, of what the first step does to the initial noise.

    NeMo takes a seed as evidence of memorization when its maximum over the other seeds exceeds tau, and a prompt as
    memorized when any seed does: the maximum over all pairs is the number that tau cuts.

    Args:
        seeds: S >= 2 initial noises, the same for all prompts.
        pairwise: how two seeds are compared, see `pairwise_similarity`; NeMo's own is "ms_ssim", to which its tau of
            0.428 belongs.
        num_inference_steps: its first timestep is where the U-Net is evaluated.
        second_timestep: take the second timestep instead, still on the initial noise, as NeMo's code does.
        batch_size: cases (prompt and seed) in one batch; no guidance, so the U-Net sees one row for each.

    Returns:
        (N,) float32.
    """
    t = ddim(pipe, num_inference_steps).timesteps[int(second_timestep)]
    batches = _batches(pipe, prompts, seeds, batch_size, "first-step similarity", progress)
    maps = torch.cat([first_step_change(pipe, embeds, latents, t) for embeds, latents in batches])
    maps = maps.unflatten(0, (-1, len(seeds)))  # (N * S, C, H, W) → (N, S, C, H, W)
    return _scores(torch.stack([pairwise_similarity(prompt_maps, pairwise).max() for prompt_maps in maps]))


def first_step_change(pipe, prompt_embeds, latents, t):
    """NeMo's delta = eps(x_T, T, y) - x_T, each channel scaled to [0, 1].

    For v-prediction eps tends to x_T as a tends to 0, and delta to nothing. But with eps = sqrt(a) v + sqrt(1 - a) x_T

        delta / sqrt(a) = v - sqrt(a) / (1 + sqrt(1 - a)) x_T

    exactly, without a small difference of large numbers, and the scaling to [0, 1] removes the factor. It is the same
    quantity for both kinds of model: up to sign and scale nearly the model's first guess of the clean image.

    Args:
        prompt_embeds: (B, T, D).
        latents: initial noise x_T (B, C, H, W).
        t: the first timestep.

    Returns:
        (B, C, H, W) float32; a channel without any change is 0 throughout.

    Source: Hintersdorf et al. (2024), section 3.1.
    """
    output = pipe.unet(latents, t, encoder_hidden_states=prompt_embeds).sample.float()
    delta = output - latents.float()
    if _prediction_type(pipe.scheduler) == "v_prediction":
        a = float(pipe.scheduler.alphas_cumprod[int(t)])
        delta = output - a**0.5 / (1 + (1 - a) ** 0.5) * latents.float()
    low, high = delta.amin((2, 3), keepdim=True), delta.amax((2, 3), keepdim=True)  # (B, C, 1, 1)
    return (delta - low) / torch.where(high == low, 1, high - low)


@torch.no_grad()
def anisotropy(pipe, prompts, *, seeds=range(4), num_inference_steps=50, weight=2.0, batch_size=16, progress=True):
    """Norm of the guidance at high noise, plus its alignment with the unconditional prediction at low noise.

    Two passes on the same pure noise x_T, each with the prompt y and without:

        g_s = eps(x_T, s, y) - eps(x_T, s, "")        |g_T|  +  weight * mean over pixels of cos(g_t, eps(x_T, t, ""))

    with t the third timestep from the end: x_T is given there as if it were nearly clean. The cosine is that of a
    pixel's channels, as in the authors' code. For v-prediction v takes the place of eps. So it does in the authors'
    cosine; their norm is that of the score, the factor sqrt(a) / (1 - a) away from v's, see `noise_magnitude`.

    Args:
        pipe: a `StableDiffusionPipeline`.
        prompts: N texts.
        seeds: one initial noise each, the same for all prompts.
        num_inference_steps: of the schedule that both timesteps are from, at least 3; 50 are the authors'.
        weight: of the alignment, which lies between -1 and 1. The authors have 2 for Stable Diffusion 1.4, and for
            2.x 0.1, beside a norm that is a thirteenth of v's: 1.3 beside v's.
        batch_size: cases (prompt and seed) in one batch; the U-Net sees two rows for each, twice.

    Returns:
        (N,) float32, means over seeds.

    Raises:
        ValueError: a schedule of fewer than three steps.
    """
    timesteps = ddim(pipe, num_inference_steps).timesteps
    _prediction_type(pipe.scheduler)
    if len(timesteps) < 3:
        raise ValueError(f"num_inference_steps is {num_inference_steps}: the third timestep from the end needs 3.")
    uncond = encode_prompts(pipe, [""])  # (1, T, D)
    scores = []
    for embeds, latents in _batches(pipe, prompts, seeds, batch_size, "anisotropy", progress):
        guidance, _ = _guidance(pipe, latents, timesteps[0], embeds, uncond)
        aligned = torch.nn.functional.cosine_similarity(*_guidance(pipe, latents, timesteps[-3], embeds, uncond), dim=1)
        scores.append(guidance.flatten(1).norm(dim=1) + weight * aligned.mean((1, 2)))  # aligned: (B, H, W)
    return _scores(torch.cat(scores).unflatten(0, (-1, len(seeds))).mean(dim=1))  # (N * S,) → (N, S) → (N,)


def _guidance(pipe, latents, t, embeds, uncond):
    """What a prompt changes in the prediction for B latents, and the prediction without it: (B, C, H, W) each."""
    both = torch.cat([uncond.expand_as(embeds), embeds])  # (2B, T, D)
    output = pipe.unet(torch.cat([latents, latents]), t, encoder_hidden_states=both).sample.float()
    output_uncond, output_text = output.chunk(2)
    return output_text - output_uncond, output_uncond


def _batches(pipe, prompts, seeds, batch_size, desc, progress):
    """Yields embeddings (B, T, D) and initial noise (B, C, H, W) of the cases prompts x seeds, with a bar."""
    embeds, noise = encode_prompts(pipe, prompts), initial_latents(pipe, seeds)
    rows, columns = torch.cartesian_prod(torch.arange(len(embeds)), torch.arange(len(noise))).T
    with tqdm(total=len(rows), desc=desc, disable=not progress) as bar:
        for row, column in zip(rows.split(batch_size), columns.split(batch_size), strict=True):
            yield embeds[row], noise[column]
            bar.update(len(row))


def _prediction_type(scheduler):
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"Detection knows models that predict 'epsilon' or 'v_prediction', not {kind!r}.")
    return kind


def _scores(values):
    if not values.isfinite().all():
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        raise FloatingPointError(f"NaN or infinity in the scores of prompts {bad}. Check the weights; try float32.")
    return values.float().cpu().numpy()
