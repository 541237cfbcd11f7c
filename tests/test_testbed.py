"""The bundled model: whole, small, loads by diffusers alone, and memorizes what its targets say."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from dori_utils import nemo
from dori_utils.audit import audit, scores_by_target
from dori_utils.metrics import load_clip, retrieval_accuracy
from dori_utils.models import TESTBED, load_pipeline, model_hash
from dori_utils.presets import PRESETS
from dori_utils.store import Store
from dori_utils.targets import load_targets
from dori_utils.testbed.data import held_out_scenes, planned
from dori_utils.testbed.train import UNET_STAGES, unet_training_set


def test_weights_fit_in_80_megabytes():
    assert sum(file.stat().st_size for file in TESTBED.rglob("*.safetensors")) <= 80e6


def test_targets_are_the_plan_and_its_counts():
    counts = unet_training_set().duplicates
    by_id = {target.id: target for target in load_targets("testbed")}
    assert set(by_id) == {plan.id for plan in planned()}
    for plan in planned()[::7]:
        target = by_id[plan.id]
        assert (target.prompt, target.kind, target.duplicates) == (plan.scene.caption, plan.kind, counts[plan.id])
        assert (np.asarray(target.image) == plan.scene.draw()).all()


def test_a_smaller_training_set_has_fewer_draws_in_each_part():
    assert unet_training_set(most=1000).parts == (1000,) * len(UNET_STAGES)
    assert unet_training_set(most=10**9).parts == unet_training_set().parts


def test_statistics_for_nemo_are_of_this_model():
    statistics = nemo.Statistics.load(TESTBED / "nemo_statistics.safetensors")
    assert statistics.model == model_hash(load_pipeline("testbed", device="cpu"))
    assert 0.3 < statistics.tau < 0.9 and len(statistics.mean) == 16
    assert statistics.similarity == PRESETS["testbed"].nemo.similarity


def test_it_loads_by_diffusers_alone():
    pipe = StableDiffusionPipeline.from_pretrained(TESTBED)
    generator = torch.Generator().manual_seed(0)
    image = pipe("an owl on a plain background", num_inference_steps=2, generator=generator).images[0]
    assert image.size == (64, 64) and np.asarray(image).std() > 5


@pytest.mark.slow
def test_memorized_prompts_bring_their_image_back_and_controls_do_not(tmp_path):
    targets = load_targets("testbed", kind="VM")[:4] + load_targets("testbed", kind="control")[:4]
    rows = audit(load_pipeline("testbed"), targets, PRESETS["testbed"], Store(tmp_path))
    means = scores_by_target(rows).mean(axis=1)
    assert means[:4].mean() > means[4:].mean() + 0.3  # the scorecard has the bars


def test_its_clip_knows_held_out_scenes():
    scenes = held_out_scenes(50)
    captions = [scene.caption for scene in scenes]
    images = [[Image.fromarray(scene.draw())] for scene in scenes]
    assert retrieval_accuracy(images, captions, load_clip(TESTBED / "clip")).mean() > 0.5  # chance: 0.02
