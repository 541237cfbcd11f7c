"""Erasure: three published ways of training something out of a text-to-image model, from their papers' equations.

None of them was made against DoRI, and "Finding DoRI" (ICML 2026) audits them beside pruning. All train the U-Net and
give what has changed as an `Edit`. They differ in what takes the place of the image: its opposite (esd.py), something
like it (concept_ablation.py), anything else (siss.py).

Where the model predicts v, v takes the place of eps. `training.fit` clips gradients to length 1, as the code of the
second (its diffusers version) and third does; that of ESD does not, but its Adam takes steps of one size anyway.

Shapes: N targets, B rows of a step; T tokens and D channels of an embedding; C, H, W of a latent.
"""

from dataclasses import asdict

import numpy as np
import torch

from dori_utils.core.training import Stage, fit, weights_in_training


def train(method, pipe, targets, samples, loss_of, config, pattern="", *, save_seconds=300, work=None, **options):
    """Train the parameters that fit the pattern, at a constant learning rate; the `Edit` of it."""
    with weights_in_training(pipe, pattern) as changed:
        stage = Stage(
            config.steps, config.batch_size, config.lr, warmup=0, decay=0.0, ema=0.0, weight_decay=config.weight_decay
        )
        options = {"workers": 0, "save_seconds": save_seconds, "log_every": 1, **options}
        unet = fit(method, pipe.unet, samples, loss_of, stage, work, config.seed, **options)
        return changed(method, asdict(config), targets, unet)


def turns(count, config):
    """Numbers below count for all draws of a run, each once before any comes again, in an order of the seed."""
    total, rng = config.steps * config.batch_size, np.random.default_rng(config.seed)
    passes = [rng.permutation(count) for _ in range(-(-total // count))]
    return np.concatenate(passes)[:total].tolist()


def draws(pipe, latents, generator, first_timestep=0):
    """Noise (B, C, H, W) and timesteps (B,) from the step's generator, on the latents' device."""
    noise = torch.randn(latents.shape, generator=generator)
    steps = pipe.scheduler.config.num_train_timesteps
    timesteps = torch.randint(first_timestep, steps, (len(latents),), generator=generator)
    return noise.to(latents), timesteps.to(latents.device)


def check_targets(targets, images=False):
    if not targets:
        raise ValueError("No targets: give at least one.")
    for target in targets:
        if images and target.image is None:
            raise ValueError(f"{target.id} has no image, which this method needs.")


def check_lists(targets, lists, name):
    if len(lists) != len(targets):
        raise ValueError(f"{len(lists)} lists of {name} for {len(targets)} targets: give one for each.")
    for target, own in zip(targets, lists, strict=True):
        if isinstance(own, str) or not own:
            raise ValueError(f"{name} of {target.id}: give a list of at least one prompt.")
