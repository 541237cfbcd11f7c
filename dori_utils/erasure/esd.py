"""ESD, Erased Stable Diffusion: the prompt gives the opposite of what it gave.

Gandikota et al., "Erasing Concepts from Diffusion Models" (ICCV 2023). The prompt c is to give what guidance *away*
from c gives in the frozen original eps*, on latents x_t that the model in training has drawn itself (their Eq. 6):

    eps(x_t, c)  <-  eps*(x_t) - eta [eps*(x_t, c) - eps*(x_t)]

Where the model predicts v, nothing changes in form: at a given x_t, v is eps / sqrt(abar_t) minus a multiple of x_t,
and such a map takes a sum whose weights add up to 1, as (1 + eta) and -eta do, to the same sum.
"""

import copy
from dataclasses import dataclass

import torch

from dori_utils.core.diffusion import denoise, encode_prompts, latent_size, predict
from dori_utils.core.edits import Edit
from dori_utils.erasure import check_targets, train, turns

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
    check_targets(targets)
    loss_of, order = _esd_loss(pipe, targets, config), turns(len(targets), config)
    return train("ESD", pipe, targets, order, loss_of, config, VARIANTS[config.variant], **options)


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
