"""An edit is in the weights for every thread: while one is at work with a pipeline, the others are told, not misled."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from dori_utils import wanda
from dori_utils.attack import AttackConfig, attack
from dori_utils.cached import cached_attack, cached_edits
from dori_utils.core.edits import Edit, applied
from dori_utils.core.generation import generate
from dori_utils.core.hashes import model_hash
from dori_utils.core.store import Store
from dori_utils.core.targets import Target
from dori_utils.evaluation import audit, detect
from dori_utils.materials import cached_statistics
from dori_utils.presets import PRESETS

PRESET = PRESETS["smoke"]
TARGETS = [Target("one", "a cat on a car", Image.new("RGB", (64, 64), "red"), "VM")]


@pytest.fixture
def edit(sd1):
    return Edit("shift", model_hash(sd1), deltas={"conv_out.bias": torch.ones_like(sd1.unet.conv_out.bias)})


@contextmanager
def in_another_thread(context):
    """Within it another thread is within the context."""
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with context:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    try:
        assert inside.wait(60)
        yield
    finally:
        leave.set()
        thread.join()


def test_what_depends_on_the_weights_is_refused_and_nothing_wrong_is_stored(sd1, edit, tmp_path):
    store, config = Store(tmp_path / "store"), AttackConfig(steps=1)
    calls = [
        lambda: generate(sd1, ["a cat"], seeds=[0], **PRESET.sampling),
        lambda: generate(sd1, ["a cat"], seeds=[0], edits=[edit], **PRESET.sampling),
        lambda: attack(sd1, TARGETS, config),
        lambda: cached_attack(sd1, TARGETS, config, store),
        lambda: audit(sd1, TARGETS, PRESET, store),
        lambda: detect(sd1, ["a cat"], PRESET, store),
        lambda: cached_edits(wanda.localize_each, sd1, TARGETS, PRESET.wanda, store),
        lambda: cached_statistics(sd1, ["a cat", "a dog"], PRESET.nemo, store),
        lambda: applied(sd1, edit).__enter__(),
    ]
    with in_another_thread(applied(sd1, edit)):
        for call in calls:
            with pytest.raises(RuntimeError, match="Another thread is at work with this pipeline"):
                call()
    assert not list(tmp_path.rglob("*.npz"))
    for call in calls[:2]:
        call()


def test_afterwards_and_beside_another_pipeline_all_is_as_ever(sd1, tiny_testbed, edit, tmp_path):
    alone = generate(sd1, ["a cat"], seeds=[0], **PRESET.sampling)
    with in_another_thread(applied(sd1, edit)):
        generate(tiny_testbed, ["a cat"], seeds=[0], **PRESET.sampling)
    again = generate(sd1, ["a cat"], seeds=[0], **PRESET.sampling)
    assert np.array_equal(alone[0][0], again[0][0])
    with applied(sd1, edit):  # within one thread they nest
        shifted = generate(sd1, ["a cat"], seeds=[0], **PRESET.sampling)
    assert not np.array_equal(alone[0][0], shifted[0][0])
