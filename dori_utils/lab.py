"""Lab: one model, one preset, a store and a judge: what every notebook begins with.

Each method is one call of `cached`, `evaluation` or `core` with what the lab has.
"""

import copy
from dataclasses import replace
from functools import cached_property

import numpy as np
import pandas as pd
from PIL import Image

from dori_utils import nemo, wanda
from dori_utils.cached import cached_attack, cached_edits, cached_generate, cached_training
from dori_utils.core.cache import kept
from dori_utils.core.edits import Edit
from dori_utils.core.models import load_pipeline
from dori_utils.core.sscd import load_sscd, sscd_scores
from dori_utils.core.store import default_store
from dori_utils.core.triggers import Triggers
from dori_utils.evaluation import audit, ordinary_cost, provenance
from dori_utils.materials import load_materials
from dori_utils.presets import PRESETS


class Lab:
    """A model, its preset, what goes with it, and where results are kept.

    Args:
        model: as `load_pipeline` takes it.
        preset: a key of `PRESETS`.

    Attributes:
        pipe, preset, store, sscd; materials: what goes with the model, such as targets and ordinary captions.
    """

    def __init__(self, model: str = "testbed", preset: str = "testbed"):
        self.preset = replace(PRESETS[preset], model=model)
        self.store, self.sscd = default_store(), load_sscd()
        self.pipe, self.materials = load_pipeline(model), load_materials(model)

    @cached_property
    def clip(self):
        return self.materials.clip

    @cached_property
    def statistics(self):
        """NeMo's, of this model."""
        return self.materials.statistics(self.pipe, self.preset.nemo, self.store)

    @property
    def quick(self) -> "Lab":
        """The same with the sampling of where many settings are compared."""
        lab = copy.copy(self)
        lab.preset = self.preset.quick
        return lab

    def memorized(self) -> list:
        """The VM targets on which all notebooks report."""
        return self.materials.targets("VM")[: self.preset.pruned_targets]

    def controls(self) -> list:
        """Targets that the model has never seen, for the same treatment."""
        return self.materials.targets("control")[: self.preset.compared_targets]

    def nemo(self, targets, config=None, **options) -> list[Edit]:
        config = config or self.preset.nemo
        given = {"statistics": self.statistics, **options}
        return cached_edits(nemo.localize_each, self.pipe, targets, config, self.store, **given)

    def wanda(self, targets, config=None, **options) -> list[Edit]:
        return cached_edits(wanda.localize_each, self.pipe, targets, config or self.preset.wanda, self.store, **options)

    def train(self, method, targets, config, **data) -> list[Edit]:
        """As `cached_training`: the edits after each epoch, the last one being the result."""
        return cached_training(method, self.pipe, targets, config, self.store, **data)

    def attack(self, targets, edits=None, config=None, **options) -> Triggers:
        """DoRI; edits: None, or one or None for each target."""
        return cached_attack(self.pipe, targets, config or self.preset.attack, self.store, edits, **options)

    def generate(self, prompts, edits=None, prompt_embeds=None, seeds=None) -> list[list[Image.Image]]:
        """Images of each prompt, or of each embedding, for each seed."""
        seeds = self.preset.seeds if seeds is None else seeds
        return cached_generate(self.pipe, prompts, seeds, self.preset, self.store, edits, prompt_embeds)

    def scores(self, images, originals) -> np.ndarray:
        """SSCD (N, S) of N rows of S images to N originals."""
        return sscd_scores(images, originals, transform=self.preset.sscd_transform, sscd=self.sscd, progress=False)

    def audit(self, targets, **options) -> pd.DataFrame:
        """As `evaluation.audit`: a row for each target, mitigation, attack and seed."""
        return audit(self.pipe, targets, self.preset, self.store, self.sscd, **options)

    def cost(self, captions, reference, edits) -> pd.DataFrame:
        """As `evaluation.ordinary_cost`: what edits cost captions that nobody wanted changed."""
        given = (self.pipe, captions, reference, self.preset, self.store, self.clip, edits)
        return ordinary_cost(*given, self.materials.inception)

    def kept(self, what: str, compute, **inputs) -> dict:
        """As `core.cache.kept`: a notebook's own result, computed once for these inputs."""
        return kept(self.store, what, compute, **inputs)

    def made_by(self, **more) -> dict:
        """What goes into the head of a table: model, weights, judge, sampling, version."""
        return provenance(self.pipe, self.preset, self.sscd) | more
