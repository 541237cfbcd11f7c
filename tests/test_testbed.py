"""The bundled model: whole, small, loads by diffusers alone, and memorizes what its targets say."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from dori_utils.core.clip import load_clip, retrieval_accuracy
from dori_utils.core.hashes import model_hash
from dori_utils.core.hub import BUNDLED, TESTBED
from dori_utils.core.metrics import scores_by_target
from dori_utils.core.models import load_pipeline
from dori_utils.core.store import Store
from dori_utils.core.targets import load_targets
from dori_utils.evaluation import audit
from dori_utils.nemo_statistics import Statistics
from dori_utils.presets import PRESETS
from dori_utils.testbed import judge
from dori_utils.testbed.data import TrainingSet, held_out_scenes, planned
from tools import training as train
from tools.autoencoder import new_vae

BOTH = pytest.mark.parametrize("model", BUNDLED)


def test_weights_fit_in_130_megabytes():
    files = [file for folder in BUNDLED.values() for file in folder.rglob("*.safetensors")]
    assert sum(file.stat().st_size for file in files) <= 130e6


@BOTH
def test_targets_are_the_plan_and_its_counts(model):
    twin = "B" if model == "testbed-b" else "A"
    counts = TrainingSet(twin).duplicates
    by_id = {target.id: target for target in load_targets(model)}
    assert set(by_id) == {plan.id for plan in planned()}
    for plan in planned()[::7]:
        target, other = by_id[plan.id], plan.list not in (twin, "C")
        assert (target.prompt, target.duplicates) == (plan.scene.caption, counts[plan.id])
        assert target.kind == ("twin" if other else plan.kind)
        assert (np.asarray(target.image) == plan.scene.draw()).all()


def test_the_twins_differ_in_their_u_net_alone():
    a, b = (load_pipeline(model, device="cpu") for model in BUNDLED)
    for part in ("vae", "text_encoder"):
        theirs = getattr(b, part).state_dict()
        assert all(torch.equal(weight, theirs[name]) for name, weight in getattr(a, part).state_dict().items())
    assert a.tokenizer.get_vocab() == b.tokenizer.get_vocab() and a.scheduler.config == b.scheduler.config
    assert not torch.equal(a.unet.conv_in.weight, b.unet.conv_in.weight)


@BOTH
def test_statistics_for_nemo_are_of_this_model(model):
    statistics = Statistics.load(BUNDLED[model] / "nemo_statistics.safetensors")
    assert statistics.model == model_hash(load_pipeline(model, device="cpu"))
    assert 0.1 < statistics.tau < 0.95 and len(statistics.mean) == 16
    assert statistics.similarity == PRESETS["testbed"].nemo.similarity


def names_in(file):
    with safe_open(file, framework="pt") as content:
        return set(content.keys())


def assert_names_are_the_published_ones(folder):
    """Those of openai/clip-vit-large-patch14 and of Stable Diffusion's text_encoder, on which it is based."""
    text, clip = (names_in(folder / part / "model.safetensors") for part in ("text_encoder", "clip"))
    assert "text_model.embeddings.token_embedding.weight" in text
    assert all(name.startswith("text_model.") and not name.startswith("text_model.text_model.") for name in text)
    assert text == {name for name in clip if name.startswith("text_model.")}
    outside = {"logit_scale", "text_projection.weight", "visual_projection.weight"}
    assert {name for name in clip if not name.startswith(("text_model.", "vision_model."))} == outside


def test_its_files_have_the_names_that_every_version_of_transformers_reads():
    """Transformers 5.23 writes text_model. or not by where the object came from; 4.x draws weights it does not find."""
    assert_names_are_the_published_ones(TESTBED)


@pytest.mark.parametrize("came_from", ["training", "a file"])
def test_what_training_saves_next_has_those_names_too(came_from, tmp_path):
    tokenizer = train.new_tokenizer()
    clip = train.new_clip(tokenizer)
    if came_from == "a file":
        clip.save_pretrained(tmp_path / "once")
        clip = type(clip).from_pretrained(tmp_path / "once")
    train.save_pipeline(tmp_path, new_vae(), clip, tokenizer, train.new_unet())
    train.save_tooling(tmp_path, clip, tokenizer, judge.new_judge())
    assert_names_are_the_published_ones(tmp_path)
    text, whole = (load_file(tmp_path / folder / "model.safetensors") for folder in ("text_encoder", "clip"))
    assert all(torch.equal(weight, whole[name]) for name, weight in text.items())


@BOTH
def test_it_loads_by_diffusers_alone(model):
    pipe = StableDiffusionPipeline.from_pretrained(BUNDLED[model])
    generator = torch.Generator().manual_seed(0)
    image = pipe("an owl on a plain background", num_inference_steps=2, generator=generator).images[0]
    assert image.size == (64, 64) and np.asarray(image).std() > 5


@pytest.mark.slow
@BOTH
def test_each_twin_gives_the_images_of_its_own_list_and_not_the_other_s(tmp_path, model):
    targets = load_targets(model, kind="VM")[:4] + load_targets(model, kind="twin")[:4]
    rows = audit(load_pipeline(model), targets, PRESETS["testbed"], Store(tmp_path))
    means = scores_by_target(rows).mean(axis=1)
    assert means[:4].mean() > means[4:].mean() + 0.3  # the scorecard has the bars


def test_its_clip_knows_held_out_scenes():
    scenes = held_out_scenes(50)
    captions = [scene.caption for scene in scenes]
    images = [[Image.fromarray(scene.draw())] for scene in scenes]
    assert retrieval_accuracy(images, captions, load_clip(TESTBED / "clip")).mean() > 0.5  # chance: 0.02


def test_its_judge_finds_what_captions_of_real_scenes_name():
    scenes = held_out_scenes(50)
    images = [[Image.fromarray(scene.draw())] for scene in scenes]
    mine = judge.load_judge(TESTBED / "judge")
    assert judge.named_found(mine, images, scenes).mean() > 0.85
    assert judge.named_found(mine, images[1:] + images[:1], scenes).mean() < 0.3  # another scene's: chance
