"""Detection: is this prompt memorized? Three answers that need the model but not the training images.

A memorized prompt pulls every noise towards one picture. Each detector sees another side of that:

* `noise_magnitude`: how hard the prompt pulls, |eps(x_t, t, y) - eps(x_t, t, "")| (Wen et al., "Detecting, Explaining,
  and Mitigating Memorization in Diffusion Models", ICLR 2024). Costs two U-Net evaluations a seed and step.
* `first_step_similarity`: whether all seeds are pulled the same way in the first step (Hintersdorf et al., "Finding
  NeMo", NeurIPS 2024). One evaluation a seed.
* `metrics.diversity`: whether all seeds end as the same picture (D_SSCD). Whole generations.

Every detector returns one float32 score a prompt, and **higher always means more likely memorized**. `roc_auc` and
`tpr_at_fpr` say how well scores separate memorized prompts from ordinary ones.

Both papers' models predict the noise eps. SD 2.x and the testbed predict v = sqrt(a) eps - sqrt(1 - a) x0, a being
alpha-bar at t. Where nothing but noise is left, a is 0, and eps is the image itself whatever the prompt: there v alone
tells. So both detectors that look at the U-Net's answer take the part of it in which prompts can differ.

Shapes: N prompts, S seeds, B of their cases in one batch; latents (B, C, H, W); embeddings (B, T, D).
"""

from dataclasses import dataclass

import numpy as np
import torch

from dori_utils.core.bars import tqdm
from dori_utils.core.diffusion import ddim, encode_prompts, initial_latents


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


@dataclass(frozen=True)
class AUC:
    """Area under the ROC curve with its 95% interval, and how many prompts it is from."""

    auc: float
    low: float
    high: float
    positives: int
    negatives: int


def roc_auc(scores_pos, scores_neg, *, resamples=2000, seed=0):
    """AUC: the chance that a memorized prompt scores above an ordinary one, with a 95% interval over prompts.

    The interval is the percentile bootstrap's, both groups resampled. Where the groups do not overlap at all the
    bootstrap is [1, 1], whatever the number of prompts; there Newcombe's score interval takes over.

    Args:
        scores_pos: (P,) scores of memorized prompts.
        scores_neg: (M,) scores of ordinary prompts.

    Raises:
        ValueError: no scores in a group, or NaN.
    """
    pos, neg, labels = _labelled(scores_pos, scores_neg)
    from sklearn.metrics import roc_auc_score

    auc = float(roc_auc_score(labels, np.concatenate([pos, neg])))
    wins = (pos[:, None] > neg) + 0.5 * (pos[:, None] == neg)  # (P, M): AUC is its mean (Mann and Whitney)
    rng = np.random.default_rng(seed)
    drawn_pos, drawn_neg = (rng.multinomial(n, np.full(n, 1 / n), resamples) / n for n in wins.shape)
    low, high = np.quantile(np.einsum("rp,pm,rm->r", drawn_pos, wins, drawn_neg, optimize=True), [0.025, 0.975])
    if auc in (0.0, 1.0):
        low, high = _separated_interval(auc, len(pos), len(neg))
    return AUC(auc, float(low), float(high), len(pos), len(neg))


def tpr_at_fpr(scores_pos, scores_neg, max_fpr=0.01):
    """Share of memorized prompts found when at most `max_fpr` of the ordinary ones are flagged (0.01 or 0.05).

    With M ordinary prompts the false-positive rate moves in steps of 1 / M: below that, 0.01 means not one false alarm.
    """
    pos, neg, labels = _labelled(scores_pos, scores_neg)
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(labels, np.concatenate([pos, neg]), drop_intermediate=False)
    return float(tpr[fpr <= max_fpr].max())


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


def _labelled(scores_pos, scores_neg):
    pos, neg = (np.asarray(scores, dtype=np.float64).ravel() for scores in (scores_pos, scores_neg))
    if not len(pos) or not len(neg) or np.isnan(pos).any() or np.isnan(neg).any():
        raise ValueError("A ROC curve needs scores of at least one memorized and one ordinary prompt, and no NaN.")
    return pos, neg, np.repeat([1, 0], [len(pos), len(neg)])


def _separated_interval(auc, positives, negatives, z=1.959964):
    """Interval of an AUC of exactly 0 or 1: all values whose own standard error puts them within z of it.

    Source: Newcombe (2006), method 5, with Hanley and McNeil's variance.
    """
    from scipy.optimize import brentq

    extra = (positives + negatives) / 2 - 1

    def excess(theta):
        spread = 1 + extra * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (1 - theta) - z**2 * theta * spread / (positives * negatives)  # squared, divided by (1 - theta)

    low = brentq(excess, 0, 1)
    return (low, 1.0) if auc == 1 else (0.0, 1 - low)
