"""Presets: the numbers of an experiment, once for the bundled testbed and once as the paper has them.

Every number that a notebook or the scorecard uses and that is not the model's own stands here, with its source or,
where nobody published it, our choice and why.
"""

from dataclasses import dataclass

from . import locality, nemo, wanda
from .attack import AttackConfig


@dataclass(frozen=True)
class Preset:
    """Settings of one size of the experiments. `sampling` is what `generate` takes."""

    model: str
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]  # of the generations that MR is taken over
    sscd_transform: str  # a name in similarity.TRANSFORMS
    detection_seeds: tuple[int, ...]  # of first-step similarity and noise magnitude
    pruned_targets: int  # how many memorized prompts mitigations are tried on
    nemo: nemo.Config  # detection by first-step similarity takes `similarity` and `second_timestep` from it
    wanda: wanda.Config
    attack: AttackConfig  # DoRI
    long_attack: AttackConfig  # on images that the model has never seen: when does it find those?
    long_controls: int  # how many of those
    locality: locality.Config  # triggers from random starts, of notebooks 04 to 06
    searched_draws: int | None = None  # of each part of the testbed's training, in notebook 01; None: all

    @property
    def sampling(self) -> dict:
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}


PRESETS = {
    "testbed": Preset(
        model="testbed",
        num_inference_steps=25,
        guidance_scale=3.0,  # our choice: the captions are simple, and 7.5 burns colours at this size
        seeds=tuple(range(4)),  # minutes on two cores
        sscd_transform="testbed",  # chosen by the table in notebook 00
        detection_seeds=tuple(range(4)),
        pruned_targets=16,
        # 16x16 latents leave MS-SSIM no scales; a correlation uses every pixel. At its first timestep the testbed was
        # trained on noise alone (see train.UNET_STAGES), so that for any caption its answer hardly depends on the seed.
        # Layers, rounds and sparsity by the rule in notebook 02: the least that brings MR to 0.25.
        nemo=nemo.Config(
            rounds=200,
            layers=r"^(down_blocks|mid_block|up_blocks\.[12])\..*attn2\.to_v$",
            similarity="cosine",
            num_inference_steps=25,
            second_timestep=True,
        ),
        wanda=wanda.Config(sparsity=0.02, num_inference_steps=25, guidance_scale=3.0),
        attack=AttackConfig(record=(1, 10, 25, 50)),  # the paper's settings, and the steps of its figure
        long_attack=AttackConfig(steps=500, record=(50, 100, 200, 500)),
        long_controls=8,  # minutes on two cores
        # Three notebooks in minutes on two cores. For so many cases it is steps that count, not draws: on 24 of them 50
        # steps of one draw gave SSCD 0.76, of two 0.76; 25 steps of one 0.65, of four 0.71. Of the eight images that
        # the testbed memorizes best, 20 steps of one draw bring back 88%, 25 92%, 30 all (3 starts each). Few sampling
        # steps without guidance show what a trigger gives as well as the book's own do (0.76 against 0.75).
        locality=locality.Config(
            starts=32,
            control_starts=8,
            attack=AttackConfig(start="noise", steps=20, batch_size=1, record=(0,)),
            num_inference_steps=6,
            guidance_scale=1.0,
            compared=8,
            edited=3,
            edited_nemo=2,
            nemo_seeds=4,  # a third of the time of ten, and the same agreement (IoU 0.15 against 0.16)
            timesteps=6,
        ),
    ),
    "smoke": Preset(  # whether everything runs: three steps and two seeds give pictures of nothing
        model="testbed",
        num_inference_steps=3,
        guidance_scale=3.0,
        seeds=(0, 1),
        sscd_transform="testbed",
        detection_seeds=(0, 1),
        pruned_targets=2,
        # At the first timestep: nothing is alike between two seeds at the second of three.
        nemo=nemo.Config(seeds=(0, 1), rounds=2, similarity="cosine", num_inference_steps=3),
        wanda=wanda.Config(steps=2, num_inference_steps=3, guidance_scale=3.0),
        attack=AttackConfig(steps=2, batch_size=2, record=(1, 2)),
        long_attack=AttackConfig(steps=3, batch_size=2, record=(2, 3)),
        long_controls=2,
        locality=locality.Config(
            images=2,
            starts=4,
            controls=2,
            control_starts=3,
            attack=AttackConfig(start="noise", steps=1, batch_size=1, record=(0,)),
            num_inference_steps=2,
            guidance_scale=1.0,
            compared=3,
            edited=2,
            edited_nemo=2,
            nemo_seeds=2,
            timesteps=2,
        ),
        searched_draws=1000,
    ),
    "paper": Preset(
        model="sd14",
        num_inference_steps=50,  # diffusers' default; NeMo's code
        guidance_scale=7.5,  # diffusers' default; NeMo's code
        seeds=tuple(range(10)),  # NeMo
        sscd_transform="sd",
        detection_seeds=tuple(range(10)),  # NeMo
        pruned_targets=500,
        nemo=nemo.Config(),
        wanda=wanda.Config(),
        attack=AttackConfig(record=(1, 10, 25, 50)),
        long_attack=AttackConfig(steps=500, record=(50, 100, 200, 500)),
        long_controls=500,
        locality=locality.Config(),
    ),
}
