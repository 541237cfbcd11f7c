"""Presets: the numbers of an experiment, once for the bundled testbed and once as the paper has them.

Every number that a notebook or the scorecard uses and that is not the model's own stands here, with its source or,
where nobody published it, our choice and why.
"""

from dataclasses import dataclass

from . import nemo, wanda
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
    ),
}
