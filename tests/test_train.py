"""Training the testbed at a toy size: it resumes where it stopped, and what it writes loads by diffusers alone."""

import csv
import subprocess
import sys

import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from dori_utils import nemo
from dori_utils.fitting import Stage, fit
from dori_utils.models import TESTBED, load_pipeline, model_hash
from dori_utils.testbed import data, train

TINY = Stage(steps=4, batch_size=2, lr=1e-3, warmup=2)


class Stop(Exception):
    """Stands for a killed process."""


def stop_after(step):
    def callback(numbers):
        if numbers["step"] == step:
            raise Stop

    return callback


def fit_vae(work, callback=None, save_seconds=1e9):
    torch.manual_seed(0)
    scenes = train.Scenes(0, TINY.steps * TINY.batch_size)
    return fit("vae", train.new_vae(), scenes, train.vae_loss, TINY, work, callback=callback, save_seconds=save_seconds)


@pytest.mark.slow
def test_interrupted_training_goes_on_to_the_same_weights(tmp_path):
    whole = fit_vae(tmp_path / "whole")
    with pytest.raises(Stop):
        fit_vae(tmp_path / "parts", stop_after(2), save_seconds=0)
    resumed = fit_vae(tmp_path / "parts")
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_log_has_a_row_for_the_loss(tmp_path):
    fit_vae(tmp_path)
    rows = list(csv.DictReader((tmp_path / "vae.csv").open()))
    assert [row["step"] for row in rows] == ["0"]
    assert float(rows[0]["loss"]) > 0 and float(rows[0]["psnr"]) > 0


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
    script = "from dori_utils.testbed import train; print(sorted(train.new_tokenizer().get_vocab().items()))"
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


def test_some_samples_are_noise_alone_at_the_last_timestep():
    latents, scheduler = torch.full((400, 8, 4, 4), 5.0), train.new_scheduler()
    noisy, timesteps, velocity = train.noised(scheduler, latents, torch.Generator().manual_seed(0), 0.25)
    signal, noise = scheduler.alphas_cumprod[999] ** 0.5, (1 - scheduler.alphas_cumprod[999]) ** 0.5
    alone = noisy.mean((1, 2, 3)).abs() < 0.3  # the schedule alone would leave 0.34 of the 5, and more before its end
    last = timesteps == 999
    assert 60 < last.sum() < 140 and (last & alone).sum() > 0.9 * last.sum()
    torch.testing.assert_close(velocity[last], signal * noisy[last] - noise * 5.0, rtol=0, atol=0.15)


def test_without_a_share_no_sample_is_noise_alone():
    latents, generator = torch.full((400, 8, 4, 4), 5.0), torch.Generator().manual_seed(0)
    noisy, timesteps, _ = train.noised(train.new_scheduler(), latents, generator, 0.0)
    assert (timesteps == 999).sum() <= 1
    assert noisy[timesteps > 990].mean() > 0.25


def test_unet_has_the_topology_of_stable_diffusion():
    names = [name for name, _ in train.new_unet().named_modules()]
    value = [n for n in names if n.endswith("attn2.to_v") and not n.startswith("up_blocks")]
    assert len(value) == 7
    assert sum(n.endswith("ff.net.2") for n in names) == 16


@pytest.mark.slow
def test_the_unet_is_trained_in_parts_and_each_starts_where_the_last_ended(tmp_path, monkeypatch):
    short = {"unet": Stage(steps=4, batch_size=32, lr=1e-3), "unet_again": Stage(steps=3, batch_size=32, lr=1e-3)}
    short |= {name: Stage(steps=3, batch_size=32, lr=0.0) for name in ("unet_last", "unet_noise", "unet_alike")}
    monkeypatch.setattr(train, "STAGES", train.STAGES | short)
    tokenizer = train.new_tokenizer()
    text_encoder = train.new_clip(tokenizer).text_model
    unet = train.train_unet(tmp_path, train.new_vae().requires_grad_(False), tokenizer, text_encoder)
    first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True)["average"] for name in ("unet", "unet_again")
    )
    for name, weight in unet.state_dict().items():  # a learning rate of zero: what the second part left
        torch.testing.assert_close(weight, second[name])
    assert any((first[name] != second[name]).any() for name in first)
    logs = [pd.read_csv(tmp_path / f"{name}.csv") for name in ("unet_again", "unet_last", "unet_noise")]
    assert [len(log) for log in logs] == [1, 1, 1]
    assert logs[1]["repeated"][0] != logs[2]["repeated"][0]


@pytest.mark.slow
def test_clip_goes_on_with_other_scenes_where_its_first_part_ended(tmp_path, monkeypatch):
    short = {name: Stage(steps=2, batch_size=8, lr=0.0) for name in ("clip", "clip_again")}
    monkeypatch.setattr(train, "STAGES", train.STAGES | short)
    clip = train.train_clip(tmp_path, train.new_tokenizer())
    first = torch.load(tmp_path / "clip.pt", weights_only=True)["average"]
    for name, weight in clip.state_dict().items():
        torch.testing.assert_close(weight, first[name])
    losses = [pd.read_csv(tmp_path / f"{name}.csv")["loss"].iloc[0] for name in ("clip", "clip_again")]
    assert losses[0] != losses[1]  # of the same weights: other scenes


@pytest.mark.slow
def test_what_is_saved_loads_by_diffusers_alone_and_draws(tmp_path):
    torch.manual_seed(0)
    tokenizer = train.new_tokenizer()
    clip = train.new_clip(tokenizer)
    train.save_testbed(tmp_path, train.new_vae(), clip, tokenizer, train.new_unet(), data.TrainingSet((4_000,)))
    names = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)  # older versions of transformers look for that
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    image = pipe("an owl on a plain background", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all()
    train.save_nemo_statistics(tmp_path, num_captions=3)
    statistics = nemo.Statistics.load(tmp_path / "nemo_statistics.safetensors")
    assert statistics.model == model_hash(load_pipeline(tmp_path, device="cpu")) and len(statistics.mean) == 16
    expected = clip.text_model(train.tokenize(tokenizer, ["an owl"])).last_hidden_state
    torch.testing.assert_close(pipe.text_encoder(train.tokenize(tokenizer, ["an owl"])).last_hidden_state, expected)
