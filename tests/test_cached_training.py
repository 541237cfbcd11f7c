"""Mitigations that train and attacks that take long are kept: made once, resumed when killed, remade for other data."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from PIL import Image

from dori_utils import finetuning
from dori_utils.adaptive import Config, time_to_copy
from dori_utils.attack import AttackConfig
from dori_utils.cached import cached_training
from dori_utils.core.edits import Edit
from dori_utils.core.sscd import load_sscd
from dori_utils.core.store import Store
from dori_utils.core.targets import Target, load_targets
from dori_utils.erasure.esd import ESDConfig, esd
from dori_utils.evaluation import cached_work

QUICK = finetuning.Config(epochs=2, batch_size=2, lr=1e-3, attack=AttackConfig(steps=1, batch_size=1))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


@pytest.fixture
def targets():
    images = [target.image for target in load_targets("testbed", kind="VM")[:2]]
    return [
        Target(name, prompt, image, "VM") for name, prompt, image in zip("ab", ["a cat", "a dog"], images, strict=True)
    ]


def data(color="red"):
    surrogates = [[Image.new("RGB", (64, 64), color)] for _ in range(2)]
    return {"surrogates": surrogates, "ordinary": [(Image.new("RGB", (64, 64), "gray"), "the violin")]}


@pytest.mark.slow
def test_training_is_kept_epoch_by_epoch_and_done_once(tiny_testbed, targets, store):
    trained = []

    def train(*args, **kwargs):
        trained.append(kwargs["config"])
        return finetuning.finetune(*args, progress=False, **kwargs)

    first = cached_training(train, tiny_testbed, targets, QUICK, store, **data())
    again = cached_training(train, tiny_testbed, targets, QUICK, store, **data())
    alone = finetuning.finetune(tiny_testbed, targets, config=QUICK, progress=False, **data())
    assert len(trained) == 1 and len(first) == 2
    assert [e.fingerprint() for e in first] == [e.fingerprint() for e in again]
    assert first[-1].fingerprint() == alone.fingerprint() != first[0].fingerprint()
    assert not list((store.folder / "training").iterdir())  # checkpoints are gone
    for other in (data("blue"), data() | {"ordinary": [(Image.new("RGB", (64, 64), "gray"), "the car")]}):
        cached_training(train, tiny_testbed, targets, QUICK, store, **other)
    cached_training(train, tiny_testbed, targets, replace(QUICK, lr=2e-3), store, **data())
    assert len(trained) == 4
    other_images = [replace(target, image=Image.new("RGB", (64, 64), "blue")) for target in targets]
    cached_training(train, tiny_testbed, other_images, QUICK, store, **data())
    assert len(trained) == 5


def test_of_two_that_want_the_same_at_once_one_trains(tiny_testbed, targets, store):
    trained, work_is_there = [], []

    def train(*args, work, **kwargs):
        trained.append(work)
        edit = finetuning.finetune(*args, work=work, progress=False, **kwargs)
        work_is_there.append(work.is_dir())
        return edit

    pipes = tiny_testbed, copy.deepcopy(tiny_testbed)  # as in two notebooks
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(cached_training, train, pipe, targets, QUICK, store, **data()) for pipe in pipes]
        one, other = [[edit.fingerprint() for edit in waiting.result()] for waiting in both]
    assert len(trained) == 1 and work_is_there == [True] and one == other


def test_killed_training_goes_on_and_has_all_epochs(tiny_testbed, targets, store):
    steps = []

    def train(pipe, targets, *, callback, **kwargs):
        def and_die(found):
            callback(found)
            steps.append(found["epoch"])
            if len(steps) == 1:
                raise KeyboardInterrupt

        return finetuning.finetune(pipe, targets, save_seconds=0, progress=False, callback=and_die, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        cached_training(train, tiny_testbed, targets, QUICK, store, **data())
    edits = cached_training(train, tiny_testbed, targets, QUICK, store, **data())
    whole = finetuning.finetune(tiny_testbed, targets, config=QUICK, progress=False, **data())
    assert steps == [1, 2] and len(edits) == 2  # the first epoch is not trained again
    for name, delta in whole.deltas.items():
        assert (edits[-1].deltas[name] - delta).abs().max() <= 1e-5


def test_a_method_without_epochs_gives_one_edit(tiny_testbed, targets, store):
    config = ESDConfig(steps=1, num_inference_steps=2)
    (edit,) = cached_training(esd, tiny_testbed, targets, config, store)
    assert isinstance(edit, Edit) and edit.method == "ESD" and all("attn2" in name for name in edit.deltas)


def test_the_work_of_an_attacker_is_kept_for_each_target(tiny_testbed, targets, store):
    attempts = (AttackConfig(steps=2, batch_size=1),)
    config = Config(attempts=attempts, checks=(1,), seeds=(0,), num_inference_steps=2, guidance_scale=1.0)
    sscd = load_sscd()
    table = cached_work(tiny_testbed, targets, config, store, sscd, "testbed")
    alone = time_to_copy(tiny_testbed, targets, config, sscd, "testbed", progress=False)
    assert table.drop(columns="target").to_dict("records") == [pytest.approx(own) for own in alone]
    assert table["target"].tolist() == ["a", "b"] and len(list(store.folder.glob("*.npz"))) == 2
    assert cached_work(tiny_testbed, targets, config, store, sscd, "testbed").equals(table)
