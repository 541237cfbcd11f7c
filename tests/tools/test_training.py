"""Training the testbed at a toy size: it resumes where it stopped, and what it writes loads by diffusers alone."""

import csv
import math
import subprocess
import sys

import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from dori_utils.core.hashes import model_hash
from dori_utils.core.hub import TESTBED
from dori_utils.core.models import load_pipeline
from dori_utils.core.targets import load_targets
from dori_utils.core.training import Stage, fit
from dori_utils.nemo_statistics import Statistics
from dori_utils.testbed import data
from dori_utils.testbed.judge import Labelled, judge_loss, new_judge
from tools import training as train
from tools.autoencoder import make_vae

TINY = Stage(steps=4, batch_size=2, lr=1e-3, warmup=2)


class Stop(Exception):
    """Stands for a killed process."""


def stop_after(step):
    def callback(numbers):
        if numbers["step"] == step:
            raise Stop

    return callback


def fit_judge(work, callback=None, save_seconds=1e9, stage=TINY):
    torch.manual_seed(0)
    scenes = Labelled(0, stage.steps * stage.batch_size)
    options = {"callback": callback, "save_seconds": save_seconds}
    return fit("judge", new_judge(), scenes, judge_loss, stage, work, **options)


@pytest.mark.slow
def test_interrupted_training_goes_on_to_the_same_weights(tmp_path):
    whole = fit_judge(tmp_path / "whole")
    with pytest.raises(Stop):
        fit_judge(tmp_path / "parts", stop_after(2), save_seconds=0)
    resumed = fit_judge(tmp_path / "parts")
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_log_has_a_row_for_the_loss(tmp_path):
    fit_judge(tmp_path)
    rows = list(csv.DictReader((tmp_path / "judge.csv").open()))
    assert [row["step"] for row in rows] == ["0", "3"]
    assert float(rows[0]["loss"]) > 0
    assert 0 < float(rows[0]["seconds"]) < float(rows[1]["seconds"])


def linear_fit(work, losses, **stage):
    """A fit of one number, whose loss at each step is the given one."""
    model, given = torch.nn.Linear(1, 1), iter(losses)

    def loss_of(model, batch, generator):
        return next(given) + 0 * model(batch).sum(), {}

    stage = Stage(steps=len(losses), batch_size=1, lr=1e-3, ema=0.0, **stage)
    fit("line", model, torch.zeros(len(losses), 1), loss_of, stage, work, workers=0, save_seconds=0, progress=False)


def test_a_training_that_diverges_stops_and_leaves_two_checkpoints_from_before(tmp_path):
    losses = [1.0] * 60 + [0.5] * 60 + [1.0] * 60
    with pytest.raises(FloatingPointError, match=r"line has diverged: at step 1\d\d .*line.before.pt"):
        linear_fit(tmp_path, losses, max_rise=0.15)
    steps = [torch.load(tmp_path / f"line{part}.pt", weights_only=True)["step"] for part in ("", ".before")]
    assert 120 <= steps[0] < 135 and steps[1] == steps[0] - 1  # at 15 of 50 losses the mean is 0.65
    with pytest.raises(FloatingPointError, match="diverged"):
        linear_fit(tmp_path / "nan", [1.0] * 60 + [math.nan] * 60, max_rise=0.15)
    linear_fit(tmp_path / "may rise", losses)


def test_the_average_has_the_statistics_of_the_trained_model():
    """A BatchNorm's are no weights, and an average that kept those of the first step would be another model."""
    model, inputs = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4)), 5 + torch.randn(64, 1)

    def loss_of(model, batch, generator):
        return model(batch).square().mean(), {}

    stage = Stage(steps=8, batch_size=8, lr=1e-3, warmup=1, ema=0.5)
    average = fit("norm", model, inputs, loss_of, stage, None, workers=0, progress=False)
    assert average[1].num_batches_tracked == 8
    assert torch.equal(average[1].running_mean, model[1].running_mean)


def test_learning_rate_warms_up_and_decays():
    stage = Stage(steps=100, batch_size=1, lr=1.0, warmup=10, decay=0.3)
    factors = [stage.lr_factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[10:70] == [1.0] * 60
    assert factors[85] == pytest.approx(0.5) and factors[99] < 0.05
    assert all(a >= b for a, b in zip(factors[70:], factors[71:], strict=False))


def test_every_word_of_a_caption_is_one_token():
    tokenizer = train.new_tokenizer()
    for plan in data.planned():
        assert len(tokenizer.tokenize(plan.scene.caption)) == len(plan.scene.caption.split())
    assert len(tokenizer.tokenize("a xylophone")) > 2  # an unknown word is spelled, not lost


@pytest.mark.slow
def test_the_tokenizer_is_the_same_in_every_process():
    ours = train.new_tokenizer()
    script = "from tools import training; print(sorted(training.new_tokenizer().get_vocab().items()))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(sorted(ours.get_vocab().items()))


def test_the_testbed_was_saved_with_this_tokenizer():
    saved = CLIPTokenizer.from_pretrained(TESTBED / "tokenizer")
    assert saved.get_vocab() == train.new_tokenizer().get_vocab()
    captions = [plan.scene.caption for plan in data.planned()]
    assert (train.tokenize(saved, captions) == train.tokenize(train.new_tokenizer(), captions)).all()


def test_merges_take_the_most_frequent_pair_first():
    merges = train.learn_merges(["hog", "hot", "on"])
    assert merges[0] == ("h", "o") and set(merges[1:]) == {("ho", "t</w>"), ("ho", "g</w>"), ("o", "n</w>")}
    assert train.merge(["a", "a", "a", "b"], ("a", "a")) == ["aa", "a", "b"]


def test_timesteps_cover_the_schedule_evenly():
    timesteps = train.stratified_timesteps(50, torch.Generator().manual_seed(0))
    assert sorted((timesteps // 20).tolist()) == list(range(50))


def test_the_last_timestep_is_noise_alone_and_its_loss_counts():
    scheduler, latents = train.new_scheduler(), torch.full((2, 4, 4, 4), 5.0)
    noise, last = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 999])
    torch.testing.assert_close(scheduler.add_noise(latents, noise, last), noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(scheduler.get_velocity(latents, noise, last), -latents, rtol=0, atol=1e-6)
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999


@pytest.fixture(scope="module")
def tiny():
    """The autoencoder, the tokenizer, and a text encoder that knows nothing."""
    torch.manual_seed(0)
    tokenizer = train.new_tokenizer()
    return make_vae(), tokenizer, train.new_clip(tokenizer).text_model.requires_grad_(False)


def test_unet_has_the_topology_of_stable_diffusion():
    names = [name for name, _ in train.new_unet().named_modules()]
    value = [n for n in names if n.endswith("attn2.to_v") and not n.startswith("up_blocks")]
    assert len(value) == 7
    assert sum(n.endswith("ff.net.2") for n in names) == 16


@pytest.mark.slow
def test_the_twins_go_on_from_the_base_and_differ_by_their_lists(tmp_path, monkeypatch, tiny):
    short = {name: Stage(steps=2, batch_size=32, lr=1e-3, ema=0.0) for name in ("base", "fork")}
    monkeypatch.setattr(train, "STAGES", train.STAGES | short)
    monkeypatch.setattr(train, "BASE_STAGES", ("base",))
    training_sets = {twin: data.TrainingSet(twin, most=160) for twin in data.TWINS}
    base = train.train_base(tmp_path, training_sets["A"], *tiny)
    unets = {twin: train.train_fork(tmp_path, drawn, base, *tiny) for twin, drawn in training_sets.items()}
    differ = {n for n, w in unets["A"].state_dict().items() if (w != unets["B"].state_dict()[n]).any()}
    moved = {n for n, w in unets["A"].state_dict().items() if (w != base.state_dict()[n]).any()}
    assert "conv_in.weight" in differ and differ <= moved
    logs = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in ("base", "fork-A", "fork-B")}
    assert logs["base"]["repeated"].isna().all() and logs["fork-A"]["repeated"].notna().all()
    assert abs(logs["fork-A"]["ordinary"][0] - logs["fork-B"]["ordinary"][0]) < 1e-5  # the same scenes, noise, times


def test_latents_are_of_the_scenes_in_the_order_of_the_draws(tmp_path, tiny):
    vae = tiny[0]
    training_set = data.TrainingSet("A", most=40)
    draws = train.Latents(training_set.ids, vae, tmp_path / "some.npz")
    again = train.Latents(training_set.ids, None, tmp_path / "some.npz")  # from the file
    for draw in (0, 41, 79):
        latents, caption, repeated = draws[draw]
        pixels = torch.from_numpy(training_set.scene(draw).draw()).permute(2, 0, 1)[None]
        expected = vae.encode(train.to_model_range(pixels)).latents[0] * vae.config.scaling_factor
        torch.testing.assert_close(latents, expected, rtol=2e-3, atol=2e-3)
        assert caption == training_set.scene(draw).caption and repeated == (training_set.plan_index[draw] >= 0)
        assert (again[draw][0] == latents).all()


@pytest.mark.slow
def test_what_is_saved_loads_by_diffusers_alone_and_draws(tmp_path, tiny):
    torch.manual_seed(0)
    vae, tokenizer, _ = tiny
    clip = train.new_clip(tokenizer)
    train.save_pipeline(tmp_path, vae, clip, tokenizer, train.new_unet())
    names = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)  # older versions of transformers look for that
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    image = pipe("an owl on a plain background", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all()
    train.save_nemo_statistics(tmp_path, num_captions=3)
    statistics = Statistics.load(tmp_path / "nemo_statistics.safetensors")
    assert statistics.model == model_hash(load_pipeline(tmp_path, device="cpu")) and len(statistics.mean) == 16
    expected = clip.text_model(train.tokenize(tokenizer, ["an owl"])).last_hidden_state
    torch.testing.assert_close(pipe.text_encoder(train.tokenize(tokenizer, ["an owl"])).last_hidden_state, expected)


@pytest.mark.slow
def test_the_table_of_targets_says_how_often_each_model_saw_them(tmp_path):
    sets = {twin: data.TrainingSet(twin) for twin in data.TWINS}
    train.save_targets(tmp_path / "targets.parquet", sets)
    for name, own, other in (("testbed", "A", "B"), ("testbed-b", "B", "A")):
        found = load_targets(name, folder=tmp_path)
        assert len(found) == len(data.planned()) and found[0].id == f"VM-{own}00"
        by_id = {target.id: target for target in found}
        for plan in data.planned():
            target = by_id[plan.id]
            assert target.prompt == plan.scene.caption and target.duplicates == sets[own].duplicates[plan.id]
            assert target.kind == ("twin" if plan.list == other else plan.kind)
