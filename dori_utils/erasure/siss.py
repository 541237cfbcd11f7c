"""SISS, Subtracted Importance Sampled Scores: the prompt gives anything else.

Alberti et al., "Data Unlearning in Diffusion Models" (ICLR 2025). The loss on images x to keep falls, the loss on the
image a to forget rises, and both come from one pass through the U-Net, at a latent m_t of their mixture
q = (1 - lambda) q(. | x) + lambda q(. | a):

    w_x || eps_x - eps(m_t) ||^2  -  s w_a || eps_a - eps(m_t) ||^2       w_x = q(m_t | x) / q(m_t),  w_a likewise

where eps_x = (m_t - sqrt(abar_t) x) / sqrt(1 - abar_t) is the noise that leads from x to m_t. s is set at each step so
that the gradient of the second term has a given length. Where the model predicts v, losses at t grow by 1 / abar_t, and
s makes up for that.
"""

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from dori_utils.core.diffusion import encode_images, encode_pixels, encode_prompts, noised, predict, preprocess
from dori_utils.core.edits import Edit
from dori_utils.erasure import check_targets, draws, train, turns


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
    check_targets(targets, images=True)
    if len(ordinary) == 0:
        raise ValueError("No ordinary images: without them the loss has no lower bound.")
    if not 0 <= config.first_timestep < pipe.scheduler.config.num_train_timesteps:
        raise ValueError(f"first_timestep is {config.first_timestep}: this model has no such timestep.")
    loss_of, kept = _siss_loss(pipe, targets, config), KeptPairs(pipe, targets, ordinary, config)
    return train("SISS", pipe, targets, kept, loss_of, config, **options)


def _siss_loss(pipe, targets, config):
    prompts = encode_prompts(pipe, [target.prompt for target in targets])
    forgotten = encode_images(pipe, [target.image for target in targets])

    def loss_of(unet, batch, generator):
        chosen, pixels, captions, same = batch
        x, a = encode_pixels(pipe, pixels), forgotten[chosen]
        around_a = (torch.rand(len(x), generator=generator) < config.mixture).to(x.device)
        noise, timesteps = draws(pipe, x, generator, config.first_timestep)
        m_t, _ = noised(pipe, torch.where(around_a[:, None, None, None], a, x), noise, timesteps)
        embeds = torch.where(around_a[:, None, None], prompts[chosen], encode_prompts(pipe, captions))
        predicted = predict(unet, m_t, timesteps, embeds)
        (loss_x, log_x), (loss_a, log_a) = [explained(pipe, clean, m_t, timesteps, predicted) for clean in (x, a)]
        certain = torch.where(around_a, torch.inf, -torch.inf)
        log_ratio = torch.where(same.to(x.device), log_a - log_x, certain)
        w_x, w_a = importance_weights(log_ratio, config.mixture)
        return subtracted(unet, (w_x * loss_x).mean(), (w_a * loss_a).mean(), config.scaling_norm)

    return loss_of


class KeptPairs(Dataset):
    """What all steps take, in order: (target's number, pixels to keep, their caption, is it the target's prompt)."""

    def __init__(self, pipe, targets, ordinary, config):
        self.pipe, self.targets, self.ordinary = pipe, targets, ordinary
        self.order = turns(len(targets), config)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        number = self.order[index]
        image, caption = self.ordinary[index % len(self.ordinary)]
        return number, preprocess(self.pipe, image)[0], caption, caption == self.targets[number].prompt


def explained(pipe, clean, m_t, timesteps, predicted):
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
