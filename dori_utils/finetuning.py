"""Adversarial fine-tuning: train the model to give something else wherever DoRI finds the image.

"Finding DoRI" (ICML 2026): pruning hides an image, because it closes the one way to it that the prompt takes, and the
attack finds others. So at each step the attack is run first, against the weights as they are now, and what it finds is
trained away. In the paper a step collects a trigger for *each* memorized image; here it attacks the B images of its
batch alone, which makes a step N / B times as cheap:

    L = L_DM + L_adv

    L_DM    the model's own training loss on ordinary images and captions: what it must keep
    L_adv   the same loss on a surrogate image under the trigger y_adv that DoRI has just found for the memorized one

A surrogate is what a pruned model draws for the memorized prompt: it fits the caption and is no copy. An epoch is one
pass over all pairs of target and surrogate. The ablation (`adversarial=False`) has the prompt's own embedding in the
place of y_adv.

Ours: `carried`. The weights change little from one step to the next, so an attack of few steps that begins with what
the last one found comes as far as one of many that begins anew ("Adversarial training for free!", Shafahi et al. 2019).

Ours: `recovery`, more steps with L_DM alone. L_adv costs ordinary captions some of their alignment; ordinary images
win most of it back, and none of the memorized ones that were tried returned with it (notebook 08 and the scorecard).

Shapes: N targets, M surrogates of each; B pairs in a step, K draws of noise and timestep for each of them, and as many
ordinary images.
"""

from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from dori_utils.attack import AttackConfig, attack
from dori_utils.core.diffusion import (
    denoising_loss,
    encode_images,
    encode_pixels,
    encode_prompts,
    gradient_checkpointing,
    preprocess,
)
from dori_utils.core.edits import Edit
from dori_utils.core.hashes import changing
from dori_utils.core.training import Stage, fit, weights_in_training

# Where adapters go, as in diffusers' and peft's examples for Stable Diffusion: all linear layers of the attention.
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Config:
    """Settings. The paper says: 50 steps of DoRI inside, all weights of the U-Net, 5 epochs; the rest is our choice."""

    epochs: int = 5  # the paper's; one already helps much there
    recovery: int = 0  # steps with L_DM alone, after the epochs. Not in the paper
    batch_size: int = 8  # B: targets attacked in a step. Not published
    draws: int = 1  # K: draws for each trigger, and ordinary images for each of them, B * K in a step. Not published
    lr: float = 1e-5  # not published: diffusers' example of fine-tuning a whole U-Net
    warmup: int = 10  # steps. Not published
    decay: float = 0.5  # share of the steps over which lr falls to zero. Not published
    weight_decay: float = 0.01  # not published: AdamW's default
    adversarial_weight: float = 1.0  # the paper's sum has no weights
    caption_dropout: float = 0.1  # of ordinary captions, for guidance: Stable Diffusion's own training
    adversarial: bool = True  # False: the ablation
    attack: AttackConfig = AttackConfig()  # the inner one
    starts: tuple[str, ...] = ("prompt",)  # of the inner attack, step by step in turn; "noise" is N(0, I)
    carried: int | None = None  # steps of an inner attack that goes on from its target's last one; None: each is anew
    lora_rank: int | None = None  # adapters on the attention layers instead of all weights. The paper: this failed
    ema: float = 0.0  # of the weights; 0: none
    checkpointing: bool = False  # gradient checkpointing, for GPUs with little memory
    seed: int = 0

    def __post_init__(self):
        if min(self.epochs, self.batch_size, self.draws, len(self.starts)) < 1:
            raise ValueError("epochs, batch_size, draws and the number of starts must be at least 1.")
        if self.recovery < 0:
            raise ValueError(f"recovery is {self.recovery}: it is a number of steps.")
        if self.carried is not None and (self.carried < 1 or len(self.starts) > 1):
            raise ValueError("carried is a number of steps above 0, and goes with a single start.")
        if unknown := set(self.starts) - {"prompt", "noise"}:
            raise ValueError(f"starts has {unknown}: it is made of 'prompt' and 'noise'.")


def finetune(
    pipe, targets, surrogates, ordinary, config=None, *, work=None, save_seconds=300, progress=True, callback=None
) -> Edit:
    """Fine-tune until the targets' images no longer come back.

    Args:
        pipe: a `StableDiffusionPipeline` in float32, without an edit applied to it.
        targets: N `Target`s with an image.
        surrogates: for each target M PIL images that it shall give instead.
        ordinary: a sequence of (PIL image, caption); taken in order, and from the start again where it ends.
        config: a `Config`.
        work: folder for checkpoints, from which an interrupted run goes on; of this run alone.
        save_seconds: between checkpoints.
        callback: called after each epoch, and after recovery, which counts as one more, with {"epoch", "edit": the
            `Edit` so far}.

    Returns:
        One `Edit` for all targets.

    Raises:
        ValueError: as many surrogates as do not fit, no ordinary images, fewer pairs than a step takes, or half
            precision.
    """
    config = config or Config()
    pairs = Pairs(pipe, targets, surrogates, ordinary, config)
    adversarial_steps = config.epochs * pairs.steps_per_epoch
    steps = adversarial_steps + config.recovery
    with _trainable(pipe, config) as changed:
        last = torch.full((len(targets), *_embedding_shape(pipe)), torch.nan)  # (N, T, D); NaN: not attacked yet
        loss_of = _loss(pipe, targets, surrogates, config, adversarial_steps, last)

        def after_step(numbers):
            done = numbers["step"] + 1
            ends_epoch = done % pairs.steps_per_epoch == 0 and done <= adversarial_steps
            if callback is not None and (ends_epoch or done == steps):
                unet = pipe.unet if numbers["average"] is None else numbers["average"]
                epoch = done // pairs.steps_per_epoch if ends_epoch else config.epochs + 1
                callback({"epoch": epoch, "edit": changed(*about, unet)})

        about = ("fine-tuning", asdict(config), targets)
        stage = Stage(
            steps=steps,
            batch_size=config.batch_size,
            lr=config.lr,
            warmup=config.warmup,
            decay=config.decay,
            ema=config.ema,
            weight_decay=config.weight_decay,
        )
        options = {"workers": 0, "save_seconds": save_seconds, "log_every": 1, "progress": progress}
        options |= {"callback": after_step, "memory": {"triggers": last}}
        with gradient_checkpointing(pipe.unet, config.checkpointing):
            unet = fit("fine-tuning", pipe.unet, pairs, loss_of, stage, work, config.seed, **options)
        return changed(*about, unet)


class Pairs(Dataset):
    """What all steps take, in order: (K ordinary images, their captions, target's number, surrogate's number, step).

    In an epoch every target comes with every surrogate of its own, all targets once before the first comes again. What
    does not fill a step at an epoch's end is left out. In recovery they come again, for their ordinary images alone.
    """

    def __init__(self, pipe, targets, surrogates, ordinary, config):
        if len(surrogates) != len(targets) or len({len(own) for own in surrogates}) != 1 or not surrogates[0]:
            raise ValueError("surrogates: for each target a list of images, all of one length and none of them empty.")
        if len(ordinary) == 0:
            raise ValueError("No ordinary images: without them the model forgets everything else.")
        pairs = len(targets) * len(surrogates[0])
        if pairs < config.batch_size:
            raise ValueError(f"{pairs} pairs of target and surrogate are fewer than a step takes, {config.batch_size}.")
        self.steps_per_epoch = pairs // config.batch_size
        self.pipe, self.ordinary, self.config = pipe, ordinary, config
        rng, order = np.random.default_rng(config.seed), []
        for _ in range(config.epochs):
            columns = np.stack([rng.permutation(len(surrogates[0])) for _ in targets])  # (N, M)
            epoch = [(i, columns[i, m]) for m in range(columns.shape[1]) for i in rng.permutation(len(targets))]
            order += epoch[: self.steps_per_epoch * config.batch_size]
        self.order = order

    def __len__(self):
        return len(self.order) + self.config.recovery * self.config.batch_size

    def __getitem__(self, index):
        draws, (target, surrogate) = self.config.draws, self.order[index % len(self.order)]
        numbers = range(index * draws, (index + 1) * draws)
        images, captions = zip(*(self.ordinary[n % len(self.ordinary)] for n in numbers), strict=True)
        pixels = torch.cat([preprocess(self.pipe, image) for image in images])
        return pixels, list(captions), int(target), int(surrogate), index // self.config.batch_size


def _embedding_shape(pipe):
    return pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim


def _loss(pipe, targets, surrogates, config, adversarial_steps, last):
    """loss_of for `fit`: L_DM + L_adv of a step, after the attack; L_DM alone after that many steps.

    Each target's latest trigger stands in `last` (N, T, D).
    """
    wanted = torch.stack([encode_images(pipe, own) for own in surrogates])  # (N, M, C, H, W)
    prompts = encode_prompts(pipe, [target.prompt for target in targets])

    def pair(chosen, which, step):
        """Surrogates and what L_adv has them under: latents (K * B, C, H, W) and embeddings (K * B, T, D)."""
        embeds = prompts[chosen]
        if config.adversarial:
            embeds = _triggers(pipe, targets, chosen.tolist(), step, config, last)
        return wanted[chosen, which].repeat(config.draws, 1, 1, 1), embeds.repeat(config.draws, 1, 1)

    def loss_of(unet, batch, generator):
        pixels, captions, chosen, which, (step, *_) = batch
        surrogate = pair(chosen, which, int(step)) if step < adversarial_steps else None
        pixels = pixels.transpose(0, 1).flatten(0, 1)  # (B, K, 3, H, W) → (K * B, 3, H, W), in the captions' order
        latents = encode_pixels(pipe, pixels)
        captions = [caption for of_draw in captions for caption in of_draw]
        dropped = torch.rand(len(captions), generator=generator) < config.caption_dropout
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        embeds = encode_prompts(pipe, captions)
        if surrogate is not None:
            latents, embeds = torch.cat([latents, surrogate[0]]), torch.cat([embeds, surrogate[1]])
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
        losses = denoising_loss(pipe, latents, embeds.to(latents), noise, timesteps.to(latents.device))
        if surrogate is None:
            return losses.mean(), {"L_DM": losses.mean().item(), "L_adv": float("nan")}
        keep, adversarial = losses.unflatten(0, (2, -1)).mean(dim=1)
        return keep + config.adversarial_weight * adversarial, {"L_DM": keep.item(), "L_adv": adversarial.item()}

    return loss_of


def _triggers(pipe, targets, chosen, step, config, last):
    """y_adv (B, T, D): what DoRI finds for the chosen targets against the weights as they are at this step."""
    attacked = replace(config.attack, start=config.starts[step % len(config.starts)], record=())
    trained = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)  # the attack needs gradients of embeddings alone
    goes_on = [config.carried is not None and not last[i].isnan().any() for i in chosen]
    for again in sorted(set(goes_on)):
        some = [i for i, of_target in zip(chosen, goes_on, strict=True) if of_target == again]
        starts, inner = (last[some], replace(attacked, steps=config.carried)) if again else (None, attacked)
        found = attack(pipe, [targets[i] for i in some], inner, starts=starts, seeds=[step] * len(some), progress=False)
        last[some] = found.prompt_embeds
    for parameter in trained:
        parameter.requires_grad_(True)
    return last[chosen]


@contextmanager
def _trainable(pipe, config):
    """`weights_in_training` of all weights, or of adapters beside them, which leave with it."""
    if config.lora_rank is None:
        with weights_in_training(pipe) as changed:
            yield changed
        return
    from peft import LoraConfig

    torch.manual_seed(config.seed)  # adapters begin at random
    layers = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=LORA_LAYERS)
    with changing(pipe, trained=True) as base:
        pipe.unet.add_adapter(layers)

        def changed(method, about, targets, unet=pipe.unet):
            modules = dict(unet.named_modules())
            adapted = {name: module for name, module in modules.items() if hasattr(module, "get_delta_weight")}
            deltas = {f"{name}.weight": m.get_delta_weight("default").detach().cpu() for name, m in adapted.items()}
            return Edit(method, base, about, [target.id for target in targets], deltas=deltas)

        try:
            yield changed
        finally:
            pipe.unet.unload_lora()
