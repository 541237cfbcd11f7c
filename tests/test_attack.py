"""DoRI: its loss is the model's own, cases do not know of each other, and what it finds can be handed on."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from dori_utils.attack import AttackConfig, _generator, attack, cases_together, descend
from dori_utils.core.diffusion import denoising_loss, encode_images, encode_prompts
from dori_utils.core.edits import Edit, applied
from dori_utils.core.generation import generate
from dori_utils.core.hashes import model_hash
from dori_utils.core.targets import Target
from dori_utils.core.triggers import REPLAY, Triggers

CONFIG = AttackConfig(steps=3, batch_size=2)


def target(name, prompt="a cat on a car"):
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Target(name, prompt, Image.fromarray(pixels), "VM")


def values_off(pipe, number):
    """An edit that switches off the value layers of one down block: much, so that the triggers under it differ."""
    names = [f"down_blocks.{number}.attentions.{i}.transformer_blocks.0.attn2.to_v.weight" for i in (0, 1)]
    masks = {name: torch.ones(len(pipe.unet.get_parameter(name)), 1, dtype=torch.bool) for name in names}
    return Edit("off", model_hash(pipe), masks=masks)


def close(found, other):
    """Equal but for rounding: where a gradient is nearly 0, Adam makes a whole step of it, so not in every number."""
    apart = (found.prompt_embeds - other.prompt_embeds).abs() > 2e-3
    return apart.float().mean() < 0.01 and torch.allclose(found.losses, other.losses, rtol=1e-3)


def test_the_loss_is_the_one_of_training(pipe):
    latents = encode_images(pipe, [target("one").image] * 2)
    noise, timesteps = torch.randn(latents.shape, generator=torch.manual_seed(0)), torch.tensor([10, 700])
    embeds = encode_prompts(pipe, ["a dog", "a car"])
    a = pipe.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    with torch.no_grad():
        output = pipe.unet(noisy, timesteps, encoder_hidden_states=embeds).sample
        loss = denoising_loss(pipe, latents, embeds, noise, timesteps)
    v = pipe.scheduler.config.prediction_type == "v_prediction"
    wanted = a.sqrt() * noise - (1 - a).sqrt() * latents if v else noise
    assert torch.allclose(loss, (output - wanted).square().mean((1, 2, 3)), rtol=1e-4)


def test_latents_decode_to_the_image_size_of_the_model(pipe):
    small, large = Image.new("RGB", (30, 50)), Image.new("RGB", (200, 100))
    size = pipe.unet.config.sample_size
    assert encode_images(pipe, [small, large]).shape == (2, pipe.unet.config.in_channels, size, size)


def test_the_first_step_is_adams(pipe):
    one = target("one")
    start = encode_prompts(pipe, [one.prompt])
    found = attack(pipe, [one], AttackConfig(steps=1), progress=False)
    moved = (found.prompt_embeds - start.cpu()).abs()
    assert moved.max() <= 0.1 + 1e-4 and moved.median() > 0.09  # Adam's first update is lr times the gradient's sign


@pytest.mark.slow
def test_the_loss_falls(sd1):
    found = attack(sd1, [target("one")], AttackConfig(steps=40), progress=False)
    assert found.losses[0, -10:].mean() < found.losses[0, :10].mean()


def test_a_case_is_the_same_alone_and_beside_others(pipe):
    targets = [target("one"), target("two"), target("three")]
    together = attack(pipe, targets, CONFIG, progress=False)
    for i, each in enumerate(targets):
        assert close(together[[i]], attack(pipe, [each], CONFIG, progress=False))
    assert close(together, attack(pipe, targets, CONFIG, rows=2, progress=False))


def test_cases_are_shared_out_in_batches_of_one_size():
    config = AttackConfig(batch_size=8)
    assert [cases_together(count, config, 96) for count in (1, 12, 13, 16, 100)] == [1, 12, 7, 8, 12]
    assert all(cases_together(count, config, 20) <= 2 for count in range(1, 40))
    assert cases_together(5, config, 4) == 1


def test_each_case_is_attacked_under_its_own_edit(pipe):
    targets, edits = [target("one"), target("two"), target("one")], [values_off(pipe, 0), None, values_off(pipe, 1)]
    together = attack(pipe, targets, CONFIG, edits=edits, progress=False)
    for i, edit in enumerate(edits):
        with applied(pipe, edit):
            alone = attack(pipe, [targets[i]], CONFIG, progress=False)
        assert close(together[[i]], alone)
    assert not close(together[[0]], together[[2]])  # the same image under two edits
    assert [case["mitigation"] for case in together.cases] == ["off", None, "off"]


def test_the_model_is_left_as_it_was_even_if_someone_interrupts(sd1):
    before = model_hash(sd1)

    def interrupt(about):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attack(
            sd1,
            [target("one")],
            CONFIG,
            edits=values_off(sd1, 0),
            checkpointing=True,
            callback=interrupt,
            progress=False,
        )
    assert model_hash(sd1) == before and not sd1.unet.is_gradient_checkpointing
    assert not any(parameter.requires_grad for parameter in sd1.unet.parameters())


def test_checkpointing_changes_nothing(sd1):
    plain = attack(sd1, [target("one")], CONFIG, progress=False)
    assert close(attack(sd1, [target("one")], CONFIG, checkpointing=True, progress=False), plain)


def test_starts_are_the_prompt_noise_or_given(sd1):
    one, none = target("one"), AttackConfig(steps=0)
    assert torch.equal(attack(sd1, [one], none).prompt_embeds, encode_prompts(sd1, [one.prompt]).cpu())
    noise = attack(sd1, [one, one], AttackConfig(steps=0, start="noise"), seeds=[0, 1]).prompt_embeds
    assert abs(noise.std() - 1) < 0.1 and not torch.allclose(noise[0], noise[1])
    given = encode_prompts(sd1, ["a dog"])
    assert torch.equal(attack(sd1, [one], none, starts=given).prompt_embeds, given.cpu())


def test_embeddings_along_the_way_are_recorded(sd1):
    found = attack(sd1, [target("one")], AttackConfig(steps=3, batch_size=2, record=(0, 2, 3)), progress=False)
    assert torch.equal(found.recorded[0], encode_prompts(sd1, ["a cat on a car"]).cpu())
    assert torch.equal(found.recorded[3], found.prompt_embeds)
    two = attack(sd1, [target("one")], AttackConfig(steps=2, batch_size=2), progress=False)
    assert torch.allclose(found.recorded[2], two.prompt_embeds, atol=1e-5)


def test_a_case_that_stops_early_leaves_the_others_alone(sd1):
    targets = [target("one"), target("two")]
    found = attack(sd1, targets, CONFIG, stop=lambda step, cases, embeds: [case == 0 for case in cases], progress=False)
    assert [case["stopped"] for case in found.cases] == ["early", None]
    assert [case["steps"] for case in found.cases] == [1, 3]
    assert found.losses[0].isnan().tolist() == [False, True, True]
    assert close(found[[1]], attack(sd1, targets[1:], CONFIG, progress=False))


def test_a_case_that_diverges_is_named_and_the_others_go_on(sd1):
    targets, starts = [target("one"), target("two")], encode_prompts(sd1, ["a cat on a car"] * 2)
    starts[0, 0, 0] = torch.inf
    with pytest.warns(UserWarning, match="one at step 1"):
        found = attack(sd1, targets, CONFIG, starts=starts, progress=False)
    assert [case["stopped"] for case in found.cases] == ["diverged", None]
    assert close(found[[1]], attack(sd1, targets[1:], CONFIG, starts=starts[1:], progress=False))


@pytest.mark.slow
def test_of_several_restarts_the_best_is_kept(sd1):
    one, settings = target("one"), dict(steps=2, batch_size=2, start="noise")
    best = attack(sd1, [one], AttackConfig(**settings, restarts=3), progress=False)
    single = [attack(sd1, [one], AttackConfig(**settings, seed=seed), progress=False) for seed in range(3)]
    noise = torch.randn((64, *encode_images(sd1, [one.image]).shape[1:]), generator=torch.manual_seed(1))
    timesteps = torch.arange(64) * 15

    def loss(found):
        with torch.no_grad():
            latents = encode_images(sd1, [one.image]).expand(64, -1, -1, -1)
            return denoising_loss(sd1, latents, found.prompt_embeds.expand(64, -1, -1), noise, timesteps).mean()

    chosen = best.cases[0]["seed"]
    assert torch.allclose(best.prompt_embeds, single[chosen].prompt_embeds, atol=1e-4)
    assert loss(best) <= min(map(loss, single)) + 0.01


def test_the_callback_sees_every_step(sd1):
    seen = []
    found = attack(sd1, [target("one"), target("two")], CONFIG, callback=seen.append, progress=False)
    assert [(about["step"], about["cases"]) for about in seen] == [(1, [0, 1]), (2, [0, 1]), (3, [0, 1])]
    assert torch.equal(seen[-1]["prompt_embeds"], found.prompt_embeds)
    assert torch.equal(torch.stack([about["losses"] for about in seen], dim=1), found.losses)


def test_triggers_survive_the_disk(sd1, tmp_path):
    found = attack(sd1, [target("one")], AttackConfig(steps=2, batch_size=2, record=(1,)), progress=False)
    found.save(tmp_path / "trigger.safetensors")
    back = Triggers.load(tmp_path / "trigger.safetensors")
    assert torch.equal(back.prompt_embeds, found.prompt_embeds) and torch.equal(back.losses, found.losses)
    assert back.cases == found.cases and torch.equal(back.recorded[1], found.recorded[1])
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "trigger.safetensors").read_bytes()[:-100])
    with pytest.raises(OSError, match="Corrupt trigger file"):
        Triggers.load(tmp_path / "half.safetensors")


@pytest.mark.slow
def test_a_trigger_is_replayed_by_plain_diffusers(sd1, sd1_folder, tmp_path):
    attack(sd1, [target("one")], CONFIG, progress=False).save(tmp_path / "trigger.safetensors")
    names = {"MODEL": str(sd1_folder), "THIS_FILE": str(tmp_path / "trigger.safetensors")}
    *first, last = REPLAY.splitlines()
    exec("\n".join(first), names)
    names["pipe"].set_progress_bar_config(disable=True)
    theirs = np.asarray(eval(last, names), dtype=int)
    trigger = Triggers.load(names["THIS_FILE"]).prompt_embeds
    assert np.abs(theirs - np.asarray(generate(sd1, prompt_embeds=trigger, seeds=[0])[0][0], dtype=int)).max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(start="nothing"), "start is 'nothing'"),
        (dict(record=(60,)), "between 0 and 50"),
        (dict(batch_size=0), "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AttackConfig(**change)


def test_what_does_not_fit_the_targets_is_refused(sd1):
    one = target("one")
    with pytest.raises(ValueError, match="No targets"):
        attack(sd1, [])
    with pytest.raises(ValueError, match="lost has no image"):
        attack(sd1, [Target("lost", "a dog", None, "VM")])
    with pytest.raises(ValueError, match="2 seeds for 1 targets"):
        attack(sd1, [one], seeds=[0, 1])
    with pytest.raises(ValueError, match="starts has the shape"):
        attack(sd1, [one], starts=torch.zeros(1, 2, 3))


def test_the_bare_iterator_is_the_attack(sd1):
    """What notebook 03 writes out, `descend`, and `attack` are one thing."""
    one, config = target("one"), AttackConfig(steps=3, batch_size=2)
    found = attack(sd1, [one], config, progress=False)
    start = encode_prompts(sd1, [one.prompt]).float()
    steps = descend(sd1, [one.image], start, [_generator(one, config.seed)], lr=config.lr, draws=config.batch_size)
    taken = [step for step, _ in zip(steps, range(3), strict=False)]
    assert torch.equal(taken[-1].embeds.cpu(), found.prompt_embeds)
    assert [float(step.losses) for step in taken] == found.losses[0].tolist()
    steps.close()

    x, y = encode_images(sd1, [one.image]).repeat(2, 1, 1, 1), start.clone().requires_grad_()
    adam, generator = torch.optim.Adam([y], lr=0.1), _generator(one, config.seed)
    for _ in range(3):
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(sd1.scheduler.config.num_train_timesteps, (2,), generator=generator)
        (y.grad,) = torch.autograd.grad(denoising_loss(sd1, x, y.repeat(2, 1, 1), noise, t).mean(), y)
        adam.step()
    torch.testing.assert_close(y.detach(), found.prompt_embeds, rtol=0, atol=2e-2)  # a rounding apart, and Adam's sign
