"""Adversarial fine-tuning: what a step is made of, that a killed run goes on, and that the pipeline stays as it was."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dori_utils import finetuning
from dori_utils.attack import AttackConfig, attack
from dori_utils.cached import cached_generate
from dori_utils.core.diffusion import denoising_loss, encode_images, encode_prompts
from dori_utils.core.edits import applied
from dori_utils.core.hashes import model_hash
from dori_utils.core.sscd import load_sscd, sscd_scores
from dori_utils.core.store import Store
from dori_utils.core.targets import Target
from dori_utils.core.training import weights_in_training
from dori_utils.finetuning import Config, Pairs, finetune
from dori_utils.presets import PRESETS
from dori_utils.surrogates import find_surrogates

COLORS = ["red", "navy", "gold", "teal", "gray", "pink"]
TARGETS = [
    Target(f"VM-{i}", prompt, Image.new("RGB", (64, 64), COLORS[i]), "VM")
    for i, prompt in enumerate(["a cat", "a dog"])
]
SURROGATES = [[Image.new("RGB", (64, 64), color) for color in COLORS[2 * i : 2 * i + 2]] for i in (1, 2)]
ORDINARY = [
    (Image.new("RGB", (64, 64), color), f"the {word}")
    for color, word in zip(COLORS, ["violin", "guitar", "car"] * 2, strict=True)
]
QUICK = Config(epochs=2, batch_size=2, lr=1e-3, warmup=0, decay=0.0, attack=AttackConfig(steps=2, batch_size=1))


class Killed(Exception):
    """Stands for a killed process."""


def run(pipe, config=QUICK, **kwargs):
    return finetune(pipe, TARGETS, SURROGATES, ORDINARY, config, progress=False, **kwargs)


def share_apart(edit, other):
    """Share of all weights that differ by more than a tenth of a step.

    Not 0 for two ways to the same gradients: where one is nearly 0, rounding decides about a whole step of Adam.
    """
    difference = torch.cat([(edit.deltas[n] - other.deltas[n]).abs().flatten() for n in other.deltas])
    return (difference > QUICK.lr / 10).float().mean()


def largest_difference(edit, other):
    assert set(edit.deltas) == set(other.deltas)
    return max((edit.deltas[name] - other.deltas[name]).abs().max().item() for name in edit.deltas)


# --- Surrogates ---


def test_surrogates_are_the_first_images_that_are_no_copies(tiny_testbed, tmp_path):
    preset, store, sscd = replace(PRESETS["smoke"], surrogates=2), Store(tmp_path), load_sscd()
    settings = (tiny_testbed, TARGETS, [None, None], preset, store, sscd)
    prompts, seeds = [target.prompt for target in TARGETS], range(1000, 1004)
    images = cached_generate(tiny_testbed, prompts, seeds, preset, store)
    assert find_surrogates(*settings) == [row[:2] for row in images]
    originals = [target.image for target in TARGETS]
    scores = sscd_scores(images, originals, transform=preset.sscd_transform, sscd=sscd, progress=False)
    enough = np.sort(scores)[:, 1].max()  # two of each target's images are as dissimilar as that
    between = (enough + min(scores[scores > enough], default=1.0)) / 2
    settings = (*settings[:3], replace(preset, surrogate_sscd=between), *settings[4:])
    found = find_surrogates(*settings)
    for row, own, of_row in zip(images, found, scores, strict=True):
        few = [image for image, score in zip(row, of_row, strict=True) if score <= settings[3].surrogate_sscd]
        assert own == few[:2]
    with pytest.raises(ValueError, match=r"VM-\d: of 4 images by the pruned model only \d are no copies"):
        find_surrogates(*settings[:3], replace(preset, surrogate_sscd=scores.min()), *settings[4:])


# --- What a step takes ---


def test_an_epoch_is_every_surrogate_of_every_target_once(sd1):
    pairs = Pairs(sd1, TARGETS, SURROGATES, ORDINARY, QUICK)
    assert pairs.steps_per_epoch == 2 and len(pairs) == 8
    for epoch in (pairs.order[:4], pairs.order[4:]):
        assert sorted(epoch) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert {target for target, _ in epoch[:2]} == {0, 1}  # no target twice in a step


def test_ordinary_images_come_in_order_and_again(sd1):
    pairs = Pairs(sd1, TARGETS, SURROGATES, ORDINARY[:3], QUICK)
    assert [pairs[i][1][0] for i in range(5)] == ["the violin", "the guitar", "the car", "the violin", "the guitar"]


def test_there_are_as_many_ordinary_images_as_draws(sd1):
    pairs = Pairs(sd1, TARGETS, SURROGATES, ORDINARY, replace(QUICK, draws=2))
    assert pairs[0][1] + pairs[1][1] == ["the violin", "the guitar", "the car", "the violin"]
    assert pairs[0][0].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    "surrogates, ordinary, config, message",
    [
        (SURROGATES[:1], ORDINARY, QUICK, "for each target a list"),
        ([[], []], ORDINARY, QUICK, "none of them empty"),
        (SURROGATES, [], QUICK, "No ordinary images"),
        (SURROGATES, ORDINARY, replace(QUICK, batch_size=5), "fewer than a step takes"),
    ],
)
def test_what_does_not_fit_is_refused(sd1, surrogates, ordinary, config, message):
    with pytest.raises(ValueError, match=message):
        finetune(sd1, TARGETS, surrogates, ordinary, config, progress=False)


def test_unknown_starts_are_refused():
    with pytest.raises(ValueError, match="made of 'prompt' and 'noise'"):
        Config(starts=("prompt", "zeros"))


@pytest.mark.parametrize("settings", [{"carried": 0}, {"carried": 5, "starts": ("prompt", "noise")}])
def test_carried_needs_steps_and_a_single_start(settings):
    with pytest.raises(ValueError, match="carried is a number of steps above 0, and goes with a single start"):
        Config(**settings)


def test_a_carried_attack_goes_on_from_its_target_s_last_trigger(sd1, monkeypatch):
    attacks = []

    def watched(pipe, targets, config, starts=None, **kwargs):
        found = attack(pipe, targets, config, starts=starts, **kwargs)
        attacks.append(([target.id for target in targets], config.steps, starts, found.prompt_embeds))
        return found

    monkeypatch.setattr(finetuning, "attack", watched)
    run(sd1, replace(QUICK, epochs=1, batch_size=1, carried=3))  # each of two targets comes twice
    last = {}
    for (name,), steps, starts, found in attacks:
        assert (steps, starts is None) == ((3, False) if name in last else (QUICK.attack.steps, True))
        if starts is not None:
            assert torch.equal(starts, last[name]) and not torch.equal(found, starts)
        last[name] = found
    assert len(attacks) == 4 and len(last) == 2


# --- What it does to the weights ---


def test_all_weights_are_trained_and_the_pipeline_is_left_as_it_was(pipe):
    before, flags = model_hash(pipe), [p.requires_grad for p in pipe.unet.parameters()]
    edit = run(pipe)
    assert edit.method == "fine-tuning" and edit.targets == ("VM-0", "VM-1") and edit.config["epochs"] == 2
    assert set(edit.deltas) == {name for name, _ in pipe.unet.named_parameters()}
    assert model_hash(pipe) == before and [p.requires_grad for p in pipe.unet.parameters()] == flags
    with applied(pipe, edit):
        assert model_hash(pipe) != before


def test_the_first_step_is_a_step_of_adam_on_the_sum_of_both_losses(sd2):
    """Without dropout and decay, and with as many pairs in a step as there are, that step written plainly."""
    config = replace(QUICK, epochs=1, batch_size=4, weight_decay=0.0, caption_dropout=0.0)
    numbers = Pairs(sd2, TARGETS, SURROGATES, ORDINARY, config)
    edit = run(sd2, config)
    chosen = [target for target, _ in numbers.order]
    found = attack(sd2, [TARGETS[i] for i in chosen], config.attack, seeds=[0] * 4, progress=False)
    latents = encode_images(sd2, [image for image, _ in ORDINARY[:4]] + [SURROGATES[i][j] for i, j in numbers.order])
    embeds = torch.cat([encode_prompts(sd2, [caption for _, caption in ORDINARY[:4]]), found.prompt_embeds])
    generator = torch.Generator().manual_seed(0)
    torch.rand(4, generator=generator)  # captions that are dropped
    noise, timesteps = torch.randn(latents.shape, generator=generator), torch.randint(1000, (8,), generator=generator)
    with weights_in_training(sd2) as changed:
        losses = denoising_loss(sd2, latents, embeds, noise, timesteps)
        (losses[:4].mean() + losses[4:].mean()).backward()
        torch.nn.utils.clip_grad_norm_(sd2.unet.parameters(), 1.0)
        torch.optim.Adam(sd2.unet.parameters(), lr=config.lr).step()
        plain = changed("plain", {}, TARGETS)
    assert share_apart(edit, plain) < 0.01


def test_the_ablation_has_prompts_in_the_place_of_triggers(sd1):
    triggers, prompts = run(sd1), run(sd1, replace(QUICK, adversarial=False))
    no_steps = run(sd1, replace(QUICK, attack=replace(QUICK.attack, steps=0)))  # the attack's start: the prompt
    assert share_apart(prompts, no_steps) < 0.01 < 0.1 < share_apart(prompts, triggers)


@pytest.mark.slow
def test_recovery_goes_on_with_ordinary_images_alone(sd1, tmp_path, monkeypatch):
    attacked, epochs = [], {}
    monkeypatch.setattr(finetuning, "attack", lambda *args, **kwargs: attacked.append(1) or attack(*args, **kwargs))
    config = replace(QUICK, epochs=1, recovery=4)
    last = run(sd1, config, work=tmp_path, callback=lambda found: epochs.setdefault(found["epoch"], found["edit"]))
    assert len(attacked) == 2 and list(epochs) == [1, 2]  # two steps an epoch
    assert largest_difference(epochs[1], run(sd1, replace(QUICK, epochs=1))) == 0 < largest_difference(epochs[1], last)
    log = pd.read_csv(tmp_path / "fine-tuning.csv")
    assert log["L_adv"].isna().tolist() == [False] * 2 + [True] * 4
    others = [[Image.new("RGB", (64, 64), "white")] * 2] * 2
    no_pairs = finetune(sd1, TARGETS, others, ORDINARY, replace(config, adversarial_weight=0.0), progress=False)
    pairs = run(sd1, replace(config, adversarial_weight=0.0))
    assert largest_difference(no_pairs, pairs) == 0  # without its weight nothing but ordinary images counts


@pytest.mark.slow
def test_starts_take_turns(sd1):
    both = run(sd1, replace(QUICK, starts=("prompt", "noise")))
    assert largest_difference(both, run(sd1)) > 0
    assert largest_difference(both, run(sd1, replace(QUICK, starts=("prompt", "noise")))) == 0


@pytest.mark.slow
def test_a_surrogate_takes_the_place_of_the_image(tiny_testbed):
    """After enough steps the prompt denoises the surrogate better, the memorized image not, ordinary ones no worse."""
    config = replace(QUICK, epochs=40, batch_size=4, lr=2e-3, adversarial=False, caption_dropout=0.0)

    def losses():
        groups = {"surrogate": [s[0] for s in SURROGATES], "ordinary": [image for image, _ in ORDINARY[:2]]}
        captions = {"surrogate": [t.prompt for t in TARGETS], "ordinary": [caption for _, caption in ORDINARY[:2]]}
        values = {}
        for name, images in groups.items():
            latents, embeds = encode_images(tiny_testbed, images), encode_prompts(tiny_testbed, captions[name])
            latents, embeds = latents.repeat(32, 1, 1, 1), embeds.repeat(32, 1, 1)
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                of_rows = denoising_loss(tiny_testbed, latents, embeds, noise, torch.arange(64) * 15)
            values[name] = of_rows.mean().item()
        return values

    before = losses()
    with applied(tiny_testbed, run(tiny_testbed, config)):
        after = losses()
    assert after["surrogate"] < 0.8 * before["surrogate"] and after["ordinary"] < before["ordinary"]


# --- Going on, and what is kept on the way ---


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"ema": 0.9}, {"carried": 1}], ids=repr)
def test_a_run_killed_inside_an_epoch_goes_on_to_the_same_weights(sd1, tmp_path, change):
    config, steps = replace(QUICK, **change), []

    class Dies(list):
        def __getitem__(self, index):
            if index == 4 and not steps:  # loading the third of four steps, in the middle of the second epoch
                raise Killed
            return super().__getitem__(index)

    whole = run(sd1, config)
    with pytest.raises(Killed):
        finetune(sd1, TARGETS, SURROGATES, Dies(ORDINARY), config, work=tmp_path, save_seconds=0, progress=False)
    steps.append("again")
    resumed = finetune(sd1, TARGETS, SURROGATES, Dies(ORDINARY), config, work=tmp_path, progress=False)
    assert largest_difference(whole, resumed) <= 1e-5


def test_every_epoch_gives_its_edit(sd1):
    epochs = {}
    last = run(sd1, callback=lambda found: epochs.setdefault(found["epoch"], found["edit"]))
    assert list(epochs) == [1, 2] and largest_difference(epochs[2], last) == 0
    first = run(sd1, replace(QUICK, epochs=1))
    assert largest_difference(epochs[1], first) == 0


def test_an_average_moves_less_than_the_weights(sd1):
    average, weights = run(sd1, replace(QUICK, ema=0.99)), run(sd1)
    moved = [torch.cat([d.flatten() for d in edit.deltas.values()]).norm() for edit in (average, weights)]
    assert 0 < moved[0] < moved[1]


def test_adapters_change_attention_alone_and_leave_nothing_behind(pipe):
    pytest.importorskip("peft")
    before, names = model_hash(pipe), [name for name, _ in pipe.unet.named_modules()]
    edit = run(pipe, replace(QUICK, lora_rank=2))
    assert edit.deltas and all("attn" in name for name in edit.deltas)
    ranks = {torch.linalg.matrix_rank(delta, rtol=1e-3).item() for delta in edit.deltas.values()}
    assert max(ranks) == 2
    assert model_hash(pipe) == before and [name for name, _ in pipe.unet.named_modules()] == names
    with applied(pipe, edit):
        pass


def test_half_precision_is_refused(sd1_folder):
    from dori_utils.core.models import load_pipeline

    half = load_pipeline(sd1_folder, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        run(half)
