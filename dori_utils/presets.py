"""Presets: the numbers of an experiment, once for the bundled testbed and once as the paper has them.

Every number that a notebook or the scorecard uses and that is not the model's own stands here, with its source or,
where nobody published it, our choice and why.
"""

from dataclasses import dataclass, replace

from dori_utils import adaptive, completion, finetuning, latent, locality, nemo, tokens, wanda
from dori_utils.attack import AttackConfig
from dori_utils.erasure.concept_ablation import AblationConfig
from dori_utils.erasure.esd import ESDConfig
from dori_utils.erasure.siss import SISSConfig


@dataclass(frozen=True)
class Preset:
    """Settings of one size of the experiments. `sampling` is what `generate` takes."""

    model: str  # that the numbers are meant for; a notebook puts its own MODEL here
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]  # of the generations that MR is taken over; NeMo's search has seen them, see `nemo`
    sscd_transform: str  # a name in sscd.TRANSFORMS
    detection_seeds: tuple[int, ...]  # of first-step similarity and noise magnitude
    ordinary_captions: int  # that mitigations should not change; and four real pictures for each
    pruned_targets: int  # how many memorized prompts mitigations are tried on; settings are chosen on the others
    # Detection by first-step similarity takes `similarity` and `second_timestep` from it. Its `seeds`, by which neurons
    # are found, are the same noise as the preset's `seeds`, by which they are judged; NeMo's authors have other noise
    # for each of the two. On six targets of the testbed SSCD_Orig under NeMo is 0.42 on the seeds that the search has
    # seen, 0.29 and 0.35 on two sets that it has not.
    nemo: nemo.Config
    wanda: wanda.Config
    attack: AttackConfig  # DoRI
    completion: completion.Config  # the other attacks of an audit, see `ways`
    latent: latent.Config
    tokens: tokens.Config
    long_attack: AttackConfig  # on images that the model has never seen: when does it find those?
    long_controls: int  # how many of those
    locality: locality.Config  # triggers from random starts, of notebooks 04 to 06
    quick_attack: AttackConfig  # DoRI where many settings are compared, in notebooks 07 to 09
    quick_seeds: tuple[int, ...]  # and in so many steps: generations where many settings are compared, see `quick`
    quick_steps: int
    sparsities: tuple[float, ...]  # of Wanda, in notebook 07
    compared_targets: int  # memorized images in notebooks 07 and 09, and controls wherever something is attacked
    related_captions: int  # for each memorized prompt, captions that share an object with it
    surrogates: int  # what fine-tuning has each memorized prompt give instead
    finetuning: finetuning.Config
    esd: ESDConfig
    ablation: AblationConfig
    siss: SISSConfig
    adaptive: adaptive.Config
    surrogate_sscd: float = 0.5  # SSCD_Orig of a surrogate, at most: far below a copy's 0.7. Our choice
    searched_draws: int | None = None  # of each part of the testbed's training, in notebook 01; None: all

    @property
    def quick(self) -> "Preset":
        """The same with the sampling of where many settings are compared with each other, not with other tables."""
        return replace(self, seeds=self.quick_seeds, num_inference_steps=self.quick_steps)

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
        ordinary_captions=50,
        pruned_targets=12,  # half of them
        # 8x8 latents leave MS-SSIM no scales; a correlation uses every pixel. Layers, rounds, sparsity by the rule of
        # notebook 02: the least that brings MR to 0.25 on the memorized prompts that are not reported on.
        nemo=nemo.Config(
            rounds=200,
            layers=r"^(down_blocks|mid_block|up_blocks\.[12])\..*attn2\.to_v$",
            similarity="cosine",
            num_inference_steps=25,
        ),
        wanda=wanda.Config(sparsity=0.02, num_inference_steps=25, guidance_scale=3.0),
        # Half of the paper's draws and of the time: under Wanda SSCD_Orig of 16 images is 0.76 instead of 0.77, MR 0.69
        # instead of 0.81. The scorecard has all eight. Recorded: the steps of the paper's figure.
        attack=AttackConfig(batch_size=4, record=(1, 10, 25, 50)),
        completion=completion.Config(),
        latent=latent.Config(record=(0.25, 0.5)),
        # 360 evaluations of the U-Net for an image, of which 40 with gradients; of DoRI 200, all with gradients.
        tokens=tokens.Config(steps=10, batch_size=4, exchanges=8, record=(5,)),
        long_attack=AttackConfig(steps=500, batch_size=1, record=(50, 100, 200, 500)),
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
            nemo_seeds=3,  # of ten: a third of the time, and of four the agreement is the same (IoU 0.15 against 0.16)
            timesteps=6,
        ),
        quick_attack=AttackConfig(batch_size=2),
        quick_seeds=(0, 1),
        quick_steps=12,  # SSCD_Orig of VM prompts is 0.02 lower than in 25
        sparsities=(0.005, 0.02, 0.05, 0.1, 0.2),
        compared_targets=8,
        related_captions=4,
        surrogates=5,
        # Each of 25 steps attacks all 16 targets, with one draw instead of eight: it is most of the time even so.
        # Learning rate: this model was trained at 5e-4 to 8e-4, Stable Diffusion at 1e-4. Recovery: after these steps
        # A_CLIP of ordinary captions is 16% lower, after 40 more on ordinary images 6%, after 80 2%.
        finetuning=finetuning.Config(
            recovery=160, batch_size=16, draws=4, lr=3e-4, decay=0.85, attack=AttackConfig(batch_size=1)
        ),
        # Erasure: learning rates by the rule of notebook 02, of 1e-5, 3e-5 and 1e-4 the least that brings MR under the
        # prompts to 0.25.
        esd=ESDConfig(steps=100, batch_size=8, lr=1e-4, num_inference_steps=10),
        ablation=AblationConfig(
            steps=60,
            batch_size=16,
            lr=3e-5,
            images=16,
            anchors=4,
            checked=2,
            guidance_scale=3.0,
            num_inference_steps=10,
        ),
        siss=SISSConfig(scaling_norm=None, batch_size=8, first_timestep=0),
        adaptive=adaptive.Config(
            attempts=(
                AttackConfig(steps=500, batch_size=1),
                AttackConfig(steps=50, batch_size=1, lr=0.2, start="noise"),
                AttackConfig(steps=50, batch_size=1, lr=0.05),
            ),
            seeds=(0, 1),
            num_inference_steps=6,
            guidance_scale=1.0,
        ),
    ),
    "smoke": Preset(  # whether everything runs: three steps and two seeds give pictures of nothing
        model="testbed",
        num_inference_steps=3,
        guidance_scale=3.0,
        seeds=(0, 1),
        sscd_transform="testbed",
        detection_seeds=(0, 1),
        ordinary_captions=8,
        pruned_targets=2,
        nemo=nemo.Config(seeds=(0, 1), rounds=2, similarity="cosine", num_inference_steps=3),
        wanda=wanda.Config(steps=2, num_inference_steps=3, guidance_scale=3.0),
        attack=AttackConfig(steps=2, batch_size=2, record=(1, 2)),
        completion=completion.Config(),
        latent=latent.Config(refinements=0, record=(0.5,)),
        tokens=tokens.Config(steps=2, batch_size=1, exchanges=2, record=(1,)),
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
        quick_attack=AttackConfig(steps=2, batch_size=1),
        quick_seeds=(0, 1),
        quick_steps=3,
        sparsities=(0.01, 0.2),
        compared_targets=2,
        related_captions=1,
        surrogates=2,
        finetuning=finetuning.Config(
            epochs=2, recovery=1, batch_size=2, lr=1e-4, attack=AttackConfig(steps=1, batch_size=1)
        ),
        esd=ESDConfig(steps=2, batch_size=2, num_inference_steps=2),
        ablation=AblationConfig(
            steps=2, batch_size=2, images=2, anchors=1, checked=1, threshold=1.0, num_inference_steps=2
        ),
        siss=SISSConfig(steps=2, batch_size=2, scaling_norm=None, first_timestep=0),
        adaptive=adaptive.Config(
            attempts=(AttackConfig(steps=2, batch_size=1), AttackConfig(steps=2, batch_size=1, start="noise")),
            checks=(1, 2),
            seeds=(0,),
            num_inference_steps=2,
            guidance_scale=1.0,
        ),
        surrogate_sscd=1.0,  # two rounds of NeMo prune nothing away
        searched_draws=1000,
    ),
    "paper": Preset(
        model="sd14",  # the paper's main tables
        num_inference_steps=50,  # diffusers' default; NeMo's code
        guidance_scale=7.5,  # diffusers' default; DoRI's is not published, NeMo's script has 7
        seeds=tuple(range(10)),  # as many as NeMo's authors have; theirs are not those of its search
        sscd_transform="sd",
        detection_seeds=tuple(range(10)),  # NeMo
        ordinary_captions=1000,  # our choice: with ten seeds as many images as FID is published on
        pruned_targets=112,  # all VM prompts; the 388 TM ones: `python -m dori_utils sweep`
        nemo=nemo.Config(),
        wanda=wanda.Config(),
        attack=AttackConfig(record=(1, 10, 25, 50)),  # DoRI; the steps of its figure
        completion=completion.Config(),  # our choice, as of the next two: see there
        latent=latent.Config(record=(0.25, 0.5)),
        tokens=tokens.Config(record=(10, 25)),
        long_attack=AttackConfig(steps=500, record=(50, 100, 200, 500)),  # our choice: ten times the attack
        long_controls=50,  # our choice: as much work as the main table has with 500
        locality=locality.Config(),  # see there
        quick_attack=AttackConfig(),  # DoRI: nothing to save on a GPU
        quick_seeds=tuple(range(10)),
        quick_steps=50,
        sparsities=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2),  # DoRI has 1% and 10%; the rest is our choice, to see a curve
        compared_targets=112,  # all VM prompts
        related_captions=4,  # our choice: DoRI does not say how many
        surrogates=10,  # not published; our choice: as many as seeds
        finetuning=finetuning.Config(checkpointing=True),  # ours: a ninth of the memory, see estimate
        esd=ESDConfig(),  # published numbers, as of the next two: see erasure
        ablation=AblationConfig(),
        siss=SISSConfig(),
        adaptive=adaptive.Config(),  # our choice: see adaptive
    ),
}
