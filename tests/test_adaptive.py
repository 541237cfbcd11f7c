"""The adaptive attack: it stops where an image is back, counts its work, and leaves the model as it was."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from dori_utils import adaptive
from dori_utils.adaptive import Config, survival, time_to_copy
from dori_utils.attack import AttackConfig
from dori_utils.core.diffusion import encode_prompts
from dori_utils.core.edits import Edit
from dori_utils.core.generation import generate
from dori_utils.core.hashes import model_hash
from dori_utils.core.sscd import load_sscd, sscd_scores
from dori_utils.core.targets import Target, load_targets

ATTEMPTS = tuple(AttackConfig(steps=4, batch_size=2, start=start) for start in ("prompt", "noise"))
QUICK = Config(attempts=ATTEMPTS, checks=(2,), seeds=(0, 1), num_inference_steps=2, guidance_scale=1.0)
PROMPTS = ["a cat", "the red car", "a violin"]


@pytest.fixture
def targets():
    images = [target.image for target in load_targets("testbed", kind="VM")[:3]]
    return [Target(f"T{i}", prompt, image, "VM") for i, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True))]


def test_who_is_not_back_has_used_the_whole_budget(tiny_testbed, targets):
    before = model_hash(tiny_testbed)
    found = time_to_copy(tiny_testbed, targets, QUICK, load_sscd(), "testbed", progress=False)
    assert [own["work"] for own in found] == [QUICK.budget] * 3 == [16] * 3
    assert not any(own["copied"] for own in found) and {own["attempt"] for own in found} == {1}
    assert all(-1 <= own["sscd"] <= 0.7 for own in found) and model_hash(tiny_testbed) == before


def test_who_is_back_at_a_check_stops_there(tiny_testbed, targets, monkeypatch):
    monkeypatch.setattr(adaptive, "THRESHOLD", -1.0)  # whatever a random model draws is a copy
    found = time_to_copy(tiny_testbed, targets, QUICK, load_sscd(), "testbed", progress=False)
    assert [(own["work"], own["copied"], own["attempt"], own["steps"]) for own in found] == [(4, True, 0, 2)] * 3


@pytest.mark.slow
def test_those_who_are_left_go_on_alone_in_the_next_attempt(tiny_testbed, targets, monkeypatch):
    first = replace(QUICK, attempts=ATTEMPTS[:1])
    scores = [own["sscd"] for own in time_to_copy(tiny_testbed, targets, first, load_sscd(), "testbed", progress=False)]
    monkeypatch.setattr(adaptive, "THRESHOLD", np.mean(sorted(scores)[-2:]))  # the best of the three is a copy
    found = time_to_copy(tiny_testbed, targets, QUICK, load_sscd(), "testbed", progress=False)
    best = int(np.argmax(scores))
    assert found[best]["copied"] and found[best]["attempt"] == 0
    assert all(found[i]["attempt"] == 1 for i in range(3) if i != best)


def test_a_check_scores_what_generation_gives_under_the_same_edit(tiny_testbed, targets):
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    mask = torch.ones(tiny_testbed.unet.get_parameter(name).shape[0], 1, dtype=torch.bool)
    edits = [None, Edit("all", model_hash(tiny_testbed), masks={name: mask}), None]
    once = replace(QUICK, attempts=(AttackConfig(steps=1, lr=1e-12),), checks=(1,))  # the trigger is the prompt
    found = time_to_copy(tiny_testbed, targets, once, load_sscd(), "testbed", edits=edits, progress=False)
    embeds = encode_prompts(tiny_testbed, PROMPTS)
    settings = {"seeds": QUICK.seeds, "num_inference_steps": 2, "guidance_scale": 1.0, "progress": False}
    images = generate(tiny_testbed, prompt_embeds=embeds, edits=edits, **settings)
    scores = sscd_scores(images, [t.image for t in targets], transform="testbed", progress=False).mean(axis=1)
    assert [own["sscd"] for own in found] == pytest.approx(scores.tolist(), abs=0.01)


def test_survival_is_the_share_not_yet_back():
    rows = pd.DataFrame({"defence": ["a"] * 4 + ["b"] * 2, "work": [10, 30, 100, 100, 100, 100]})
    rows["copied"] = [True, True, False, False, False, False]
    curves = survival(rows, "defence", budget=100)
    a, b = (curves[curves["defence"] == name] for name in "ab")
    assert a["work"].tolist() == [0, 10, 30, 100] and a["survival"].tolist() == [1, 0.75, 0.5, 0.5]
    assert b["survival"].tolist() == [1, 1] and b["low"].iloc[-1] < 0.5 < b["high"].iloc[-1] == 1
