"""Erasure: three published ways of training something out of a text-to-image model, from their papers' equations.

None of them was made against DoRI, and "Finding DoRI" (ICML 2026) audits them beside pruning. All train the U-Net
with `fitting.fit` and give what has changed as an `Edit`. They differ in what takes the place of the image:

* `esd`, Erased Stable Diffusion (Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023): its opposite.
  The prompt c is to give what guidance *away* from c gives in the frozen original eps*, on latents x_t that the model
  in training has drawn itself (their Eq. 6):

      eps(x_t, c)  <-  eps*(x_t) - eta [eps*(x_t, c) - eps*(x_t)]

* `concept_ablation` (Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models", ICCV 2023), as they use it
  on memorized images: something like it. The prompt c* is to give what its anchors c give, paraphrases whose images x
  are no copies; sg stops the gradient, and the second term keeps the anchors what they are:

      || eps(x_t, c*) - sg[eps(x_t, c)] ||^2  +  weight * || eps - eps(x_t, c) ||^2

* `siss`, Subtracted Importance Sampled Scores (Alberti et al., "Data Unlearning in Diffusion Models", ICLR 2025):
  anything else. The loss on images x to keep falls, the loss on the image a to forget rises, and both come from one
  pass through the U-Net, at a latent m_t of their mixture q = (1 - lambda) q(. | x) + lambda q(. | a):

      w_x || eps_x - eps(m_t) ||^2  -  s w_a || eps_a - eps(m_t) ||^2       w_x = q(m_t | x) / q(m_t),  w_a likewise

  where eps_x = (m_t - sqrt(abar_t) x) / sqrt(1 - abar_t) is the noise that leads from x to m_t. s is set at each step
  so that the gradient of the second term has a given length.

Where the model predicts v, v takes the place of eps. The first two change nothing in form: at a given x_t, v is
eps / sqrt(abar_t) minus a multiple of x_t, and such a map takes a sum whose weights add up to 1, as those of Eq. 6 do,
(1 + eta) and -eta, to the same sum. In the third, losses at t grow by 1 / abar_t, and s makes up for that.

`fit` clips gradients to length 1, as the code of the second (its diffusers version) and third does; that of ESD does
not, but its Adam takes steps of one size anyway.

Shapes: N targets, B rows of a step; T tokens and D channels of an embedding; C, H, W of a latent.
"""

import copy
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from dori_utils.core.diffusion import (
    denoise,
    denoising_loss,
    encode_images,
    encode_pixels,
    encode_prompts,
    generate,
    latent_size,
    noised,
    predict,
    preprocess,
)
from dori_utils.core.edits import Edit
from dori_utils.core.sscd import sscd_scores
from dori_utils.core.training import Stage, fit, weights_in_training

# Of ESD: names of the parameters that are trained. The authors' first code spares the time embedding and the output
# layers in "u" as well; their paper and later code do not say so.
VARIANTS = {"x": r"\.attn2\.", "u": r"^(?!.*\.attn2\.)"}


@dataclass(frozen=True)
class ESDConfig:
    """Settings of `esd`; "paper" is its section 5, "code" the authors' first code.

    Their repository has been rewritten since and has other defaults now: 200 steps at a learning rate of 5e-5, latents
    drawn under a guidance of 2, and by the frozen model, where the paper's are by the one in training. Ours are the
    paper's.
    """

    variant: str = "x"  # paper: x, cross-attention, for what the prompt names; u, all the rest, for what it need not
    eta: float = 1.0  # paper: "ESD-x" alone means 1
    steps: int = 1000  # paper
    batch_size: int = 1  # paper. Of several targets, so many take turns at each step: our choice, the paper has one
    lr: float = 1e-5  # paper
    weight_decay: float = 0.0  # paper: Adam
    guidance_scale: float = 3.0  # code; of the latents that the model draws to be trained on
    num_inference_steps: int = 50  # code
    seed: int = 0

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}: it is 'x', cross-attention, or 'u', all the rest.")
        if min(self.steps, self.batch_size, self.num_inference_steps) < 1:
            raise ValueError("steps, batch_size and num_inference_steps must be at least 1.")


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


@dataclass(frozen=True)
class SISSConfig:
    """Settings of `siss`; those of the authors' code for Stable Diffusion v1.4."""

    mixture: float = 0.5  # lambda: share of latents that are drawn around the image to forget
    # Length of the second term's gradient, for losses summed over C, H, W. It belongs to that model: their advice is a
    # tenth of the first term's. None: that tenth, measured at each step, which is our choice for other models.
    scaling_norm: float | None = 750.0
    steps: int = 35
    batch_size: int = 16  # by accumulation
    lr: float = 1e-5
    weight_decay: float = 0.01
    first_timestep: int = 999  # of the noise: the code has 999 alone, whatever the equation says. 0: all
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.mixture <= 1:
            raise ValueError(f"mixture is {self.mixture}: it is a share, between 0 and 1.")
        if min(self.steps, self.batch_size) < 1:
            raise ValueError("steps and batch_size must be at least 1.")


# --- ESD -----------------------------------------------------------------------------------------------------------


def esd(pipe, targets, config=None, **options) -> Edit:
    """Erase what the targets' prompts give: Eq. 6 of Gandikota et al. (2023).

    Args:
        pipe: a `StableDiffusionPipeline` in float32, without an edit applied to it.
        targets: N `Target`s, of which only ids and prompts are used.
        config: an `ESDConfig`.
        options: work, folder of a checkpoint from which an interrupted run goes on, of this run alone; save_seconds
            between checkpoints; progress; callback, called after each step with {"step", "loss", "timestep"}.

    Returns:
        One `Edit` for all targets.

    Raises:
        ValueError: no targets, half precision, or a sampler whose latents are not x_t (use DDIM, as ESD does).
    """
    config = config or ESDConfig()
    _check_targets(targets)
    loss_of, order = _esd_loss(pipe, targets, config), _turns(len(targets), config)
    return _train("ESD", pipe, targets, order, loss_of, config, VARIANTS[config.variant], **options)


def _esd_loss(pipe, targets, config):
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(config.num_inference_steps, device=pipe.unet.device)
    if scheduler.init_noise_sigma != 1:
        name = type(scheduler).__name__
        raise ValueError(f"{name} has latents that are not x_t as the U-Net takes it: ESD needs a sampler like DDIM.")
    teacher = copy.deepcopy(pipe.unet).requires_grad_(False)  # eps*
    prompts = encode_prompts(pipe, [target.prompt for target in targets])
    empty = encode_prompts(pipe, [""])

    def loss_of(unet, chosen, generator):
        c, uncond = prompts[chosen], empty.expand(len(chosen), -1, -1)
        stop = int(torch.randint(len(scheduler.timesteps), (), generator=generator))
        x_t = _drawn(pipe, c, stop, generator, config)
        t = scheduler.timesteps[stop].expand(len(chosen))
        with torch.no_grad():
            wanted = guided_away(predict(teacher, x_t, t, uncond), predict(teacher, x_t, t, c), config.eta)
        return (predict(unet, x_t, t, c) - wanted).square().mean(), {"timestep": int(t[0])}

    return loss_of


def guided_away(uncond, cond, eta):
    """What ESD has the model predict for the prompt: the right-hand side of Eq. 6."""
    return uncond - eta * (cond - uncond)


def _drawn(pipe, prompt_embeds, stop, generator, config):
    """x_t (B, C, H, W): what the model as it is now has made of noise after `stop` evaluations."""
    shape = (len(prompt_embeds), pipe.unet.config.in_channels, *latent_size(pipe))
    return denoise(
        pipe,
        torch.randn(shape, generator=generator).to(prompt_embeds),
        prompt_embeds,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        generators=[generator] * len(prompt_embeds),
        stop_after=stop,
    )


# --- Concept ablation ----------------------------------------------------------------------------------------------


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
    _check_targets(targets)
    _check_lists(targets, anchors, "anchors")
    clean, rows = _anchor_images(pipe, anchors, config, options.get("progress", True))
    loss_of, order = _ablation_loss(pipe, targets, anchors, clean, rows, config), _turns(len(clean), config)
    return _train("concept ablation", pipe, targets, order, loss_of, config, **options)


def _ablation_loss(pipe, targets, anchors, clean, rows, config):
    prompts = encode_prompts(pipe, [target.prompt for target in targets])
    anchor_prompts = encode_prompts(pipe, [prompt for own in anchors for prompt in own])

    def loss_of(unet, chosen, generator):
        x, (of_target, of_anchor) = clean[chosen], rows[chosen].T
        c_star, c = prompts[of_target], anchor_prompts[of_anchor]
        noise, timesteps = _draws(pipe, x, generator)
        x_t, _ = noised(pipe, x, noise, timesteps)
        with torch.no_grad():
            wanted = predict(unet, x_t, timesteps, c)  # sg[...]: of the model in training, there is no teacher
        ablation = (predict(unet, x_t, timesteps, c_star) - wanted).square().mean()
        if config.regularization == 0:
            return ablation, {"ablation": ablation.item()}
        anchor = denoising_loss(pipe, x, c, *_draws(pipe, x, generator)).mean()
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
        transform: of SSCD, a name in `similarity.TRANSFORMS`.
        sscd: an `SSCD`; default: `load_sscd()`.

    Returns:
        For each target a list of prompts, at most `config.anchors`, the one whose worst image is least similar first.

    Raises:
        ValueError: every candidate of a target copies it; or no targets, no candidates, no image.
    """
    config = config or AblationConfig()
    _check_targets(targets, images=True)
    _check_lists(targets, candidates, "candidates")
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


# --- SISS ----------------------------------------------------------------------------------------------------------


def siss(pipe, targets, ordinary, config=None, **options) -> Edit:
    """Unlearn the targets' images and keep the ordinary ones (Alberti et al., 2025).

    The paper makes one model for each prompt, so give one target; and what it keeps are other images *of that prompt*,
    generations that are no copies, for which `ordinary` is pairs of such an image and the target's own prompt. A pair
    with a caption of its own is kept under that. But then m_t belongs to one of the two for sure, since the caption
    tells which, and the weights are (1 / (1 - lambda), 0) or (0, 1 / lambda): no pass through the U-Net is shared.

    Args:
        pipe: a `StableDiffusionPipeline` in float32, without an edit applied to it.
        targets: N `Target`s with an image, which take turns.
        ordinary: a sequence of (PIL image, caption) to keep; taken in order, and from the start again where it ends.
        config: a `SISSConfig`.
        options: as for `esd`; the callback gets {"step", "loss", "keep", "forget", "scale"}: the loss is keep minus
            scale times forget, scale being s.

    Returns:
        One `Edit` for all targets.

    Raises:
        ValueError: no targets, one without image, nothing to keep, half precision.
    """
    config = config or SISSConfig()
    _check_targets(targets, images=True)
    if len(ordinary) == 0:
        raise ValueError("No ordinary images: without them the loss has no lower bound.")
    if not 0 <= config.first_timestep < pipe.scheduler.config.num_train_timesteps:
        raise ValueError(f"first_timestep is {config.first_timestep}: this model has no such timestep.")
    loss_of, kept = _siss_loss(pipe, targets, config), KeptPairs(pipe, targets, ordinary, config)
    return _train("SISS", pipe, targets, kept, loss_of, config, **options)


def _siss_loss(pipe, targets, config):
    prompts = encode_prompts(pipe, [target.prompt for target in targets])
    forgotten = encode_images(pipe, [target.image for target in targets])

    def loss_of(unet, batch, generator):
        chosen, pixels, captions, same = batch
        x, a = encode_pixels(pipe, pixels), forgotten[chosen]
        around_a = (torch.rand(len(x), generator=generator) < config.mixture).to(x.device)
        noise, timesteps = _draws(pipe, x, generator, config.first_timestep)
        m_t, _ = noised(pipe, torch.where(around_a[:, None, None, None], a, x), noise, timesteps)
        embeds = torch.where(around_a[:, None, None], prompts[chosen], encode_prompts(pipe, captions))
        predicted = predict(unet, m_t, timesteps, embeds)
        (loss_x, log_x), (loss_a, log_a) = [_explained(pipe, clean, m_t, timesteps, predicted) for clean in (x, a)]
        certain = torch.where(around_a, torch.inf, -torch.inf)
        log_ratio = torch.where(same.to(x.device), log_a - log_x, certain)
        w_x, w_a = importance_weights(log_ratio, config.mixture)
        return subtracted(unet, (w_x * loss_x).mean(), (w_a * loss_a).mean(), config.scaling_norm)

    return loss_of


class KeptPairs(Dataset):
    """What all steps take, in order: (target's number, pixels to keep, their caption, is it the target's prompt)."""

    def __init__(self, pipe, targets, ordinary, config):
        self.pipe, self.targets, self.ordinary = pipe, targets, ordinary
        self.order = _turns(len(targets), config)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        number = self.order[index]
        image, caption = self.ordinary[index % len(self.ordinary)]
        return number, preprocess(self.pipe, image)[0], caption, caption == self.targets[number].prompt


def _explained(pipe, clean, m_t, timesteps, predicted):
    """If m_t came from the clean latents: the loss (B,), summed over C, H, W, and log q(m_t | clean), up to a constant.

    The constant, of t alone, is the same for all clean latents.
    """
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod
    abar = schedule.to(clean)[timesteps][:, None, None, None]
    eps = (m_t - abar.sqrt() * clean) / (1 - abar).sqrt()
    _, wanted = noised(pipe, clean, eps, timesteps)
    return (predicted - wanted).square().sum(dim=(1, 2, 3)), -eps.square().sum(dim=(1, 2, 3)) / 2


def importance_weights(log_ratio, mixture):
    """w_x = q(m_t | x) / q(m_t) and w_a = q(m_t | a) / q(m_t), from log q(m_t | a) - log q(m_t | x) and lambda.

    (1 - lambda) w_x + lambda w_a = 1, so neither is ever above 1 / (1 - lambda) or 1 / lambda: that is what a mixture
    is for.
    """
    w_x = 1 / ((1 - mixture) + mixture * log_ratio.exp())
    w_a = 1 / ((1 - mixture) * (-log_ratio).exp() + mixture)
    return w_x, w_a


def subtracted(unet, keep, forget, scaling_norm):
    """keep - s forget, with s such that the second gradient has the length scaling_norm; and the numbers to log."""
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]

    def length(loss):
        gradients = torch.autograd.grad(loss, trained, retain_graph=True)
        return torch.stack([gradient.norm() for gradient in gradients]).norm()

    wanted = 0.1 * length(keep) if scaling_norm is None else scaling_norm
    scale = wanted / length(forget).clamp_min(1e-12)  # a batch may have nothing to forget in it
    return keep - scale * forget, {"keep": keep.item(), "forget": forget.item(), "scale": float(scale)}


# --- What they share -----------------------------------------------------------------------------------------------


def _train(method, pipe, targets, samples, loss_of, config, pattern="", *, save_seconds=300, work=None, **options):
    """Train the parameters that fit the pattern, at a constant learning rate; the `Edit` of it."""
    with weights_in_training(pipe, pattern) as changed:
        stage = Stage(
            config.steps, config.batch_size, config.lr, warmup=0, decay=0.0, ema=0.0, weight_decay=config.weight_decay
        )
        options = {"workers": 0, "save_seconds": save_seconds, "log_every": 1, **options}
        unet = fit(method, pipe.unet, samples, loss_of, stage, work, config.seed, **options)
        return changed(method, asdict(config), targets, unet)


def _turns(count, config):
    """Numbers below count for all draws of a run, each once before any comes again, in an order of the seed."""
    draws, rng = config.steps * config.batch_size, np.random.default_rng(config.seed)
    passes = [rng.permutation(count) for _ in range(-(-draws // count))]
    return np.concatenate(passes)[:draws].tolist()


def _draws(pipe, latents, generator, first_timestep=0):
    """Noise (B, C, H, W) and timesteps (B,) from the step's generator, on the latents' device."""
    noise = torch.randn(latents.shape, generator=generator)
    steps = pipe.scheduler.config.num_train_timesteps
    timesteps = torch.randint(first_timestep, steps, (len(latents),), generator=generator)
    return noise.to(latents), timesteps.to(latents.device)


def _check_targets(targets, images=False):
    if not targets:
        raise ValueError("No targets: give at least one.")
    for target in targets:
        if images and target.image is None:
            raise ValueError(f"{target.id} has no image, which this method needs.")


def _check_lists(targets, lists, name):
    if len(lists) != len(targets):
        raise ValueError(f"{len(lists)} lists of {name} for {len(targets)} targets: give one for each.")
    for target, own in zip(targets, lists, strict=True):
        if isinstance(own, str) or not own:
            raise ValueError(f"{name} of {target.id}: give a list of at least one prompt.")
