"""Ways in: every attack is audited by the same line, kept, and found again; and the report says what gets past what."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dori_utils import cached as cached_module
from dori_utils import completion, latent, tokens, ways
from dori_utils.attack import AttackConfig
from dori_utils.cli.main import ATTACK_NAMES, main
from dori_utils.cli.report import write_report
from dori_utils.cli.words import WAYS
from dori_utils.core.diffusion import initial_latents
from dori_utils.core.edits import Edit
from dori_utils.core.generation import generate
from dori_utils.core.hashes import model_hash
from dori_utils.core.metrics import scores_by_target
from dori_utils.core.regions import region_maps, region_similarity
from dori_utils.core.sscd import sscd_scores
from dori_utils.core.store import Store
from dori_utils.core.targets import Target
from dori_utils.evaluation import audit
from dori_utils.presets import PRESETS
from dori_utils.ways import NAMES, USUAL, answers

PRESET = dataclasses.replace(PRESETS["smoke"], num_inference_steps=2, seeds=(0, 1))
DORI = AttackConfig(steps=2, batch_size=1, record=(1,))
LATENT = latent.Config(share=0.75, refinements=1, record=(0.5,))
TOKENS = tokens.Config(steps=2, batch_size=1, exchanges=2, length=6, record=(1,))
ALL = [DORI, completion.Config(), LATENT, TOKENS]
QUIET = {"seeds": PRESET.seeds, **PRESET.sampling, "progress": False}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


@pytest.fixture
def targets(random_picture):
    prompts, kinds = ["a cat", "a dog", "a red car"], ["VM", "VM", "control"]
    images = [random_picture(i, 64) for i in range(3)]
    return [Target(f"t{i}", *own) for i, own in enumerate(zip(prompts, images, kinds, strict=True))]


@pytest.fixture
def half_off(tiny_testbed):
    masks = {}
    for name, weight in tiny_testbed.unet.named_parameters():
        if name.endswith("attn2.to_v.weight"):
            masks[name] = (torch.arange(len(weight)) < len(weight) // 2)[:, None]
    return Edit("half", model_hash(tiny_testbed), masks=masks)


def of(table, attack, steps):
    return table[(table["attack"] == attack) & (table["steps"] == steps)]


def test_every_attack_has_a_name_settings_and_words():
    assert tuple(USUAL) == ATTACK_NAMES and set(NAMES.values()) == set(WAYS)
    for preset in PRESETS.values():
        assert {type(getattr(preset, field)) for field in USUAL.values()} == set(NAMES)
        assert [NAMES[type(getattr(preset, field))].lower() for field in USUAL.values()] == list(USUAL)


def test_an_audit_has_rows_of_every_attack_and_of_what_it_found_on_the_way(tiny_testbed, targets, store):
    table = audit(tiny_testbed, targets[:2], PRESET, store, attack=ALL, controls=targets[2:])
    steps = [("none", 0), ("DoRI", 1), ("DoRI", 2), ("completion", 2), ("latent", 50), ("latent", 75)]
    steps += [("tokens", 1), ("tokens", 2)]
    assert list(dict.fromkeys(zip(table["attack"], table["steps"], strict=True))) == steps
    assert len(table) == len(steps) * 3 * 2 and table["sscd"].notna().all()
    assert set(table.loc[table["kind"] == "control", "target"]) == {"t2"}
    for name in NAMES.values():
        assert name in table.attrs
    assert table.attrs["completion"] == "known=left" and "share=0.75" in table.attrs["latent"]
    assert (table["found"].notna() == (table["attack"] == "tokens")).all()
    ends = audit(tiny_testbed, targets[:2], PRESET, store, attack=ALL, controls=targets[2:], recorded=False)
    assert set(zip(ends["attack"], ends["steps"], strict=True)) == {*steps} - {
        ("DoRI", 1),
        ("latent", 50),
        ("tokens", 1),
    }


def test_of_a_completion_the_unknown_half_alone_is_scored(tiny_testbed, targets, store):
    config = completion.Config("right")
    table = audit(tiny_testbed, targets, PRESET, store, attack=config)
    images = completion.complete(tiny_testbed, targets, config, **QUIET)
    halves = completion.unknown_halves(images, config)
    originals = [row[0] for row in completion.unknown_halves([[t.image] for t in targets], config)]
    expected = sscd_scores(halves, originals, transform=PRESET.sscd_transform)
    assert np.allclose(scores_by_target(of(table, "completion", 2)), expected, atol=0.02)
    plain = generate(tiny_testbed, [t.prompt for t in targets], **QUIET)
    theirs = [
        sscd_scores([[half] for half in ours], [half for half in of_plain], transform=PRESET.sscd_transform)[:, 0]
        for ours, of_plain in zip(halves, completion.unknown_halves(plain, config), strict=True)
    ]
    assert np.allclose(of(table, "completion", 2)["sscd_gen"], np.concatenate(theirs), atol=0.02)


def test_what_is_shown_of_an_image_that_is_given_changes_no_score_of_another(tiny_testbed, targets, store):
    """The known half of the target's image is in no score: only the unknown one is looked at, in both."""
    config = completion.Config("left")
    image = targets[0].image.copy()
    image.paste("white", (0, 0, 32, 64))
    judged = [completion.unknown_halves([[own]], config)[0][0] for own in (image, targets[0].image)]
    assert np.asarray(judged[0]).tobytes() == np.asarray(judged[1]).tobytes()


def test_latents_are_the_inverted_noise_mixed_with_the_seeds_and_sampled_without_guidance(tiny_testbed, targets, store):
    table = audit(tiny_testbed, targets, PRESET, store, attack=LATENT)
    inverted = latent.invert(tiny_testbed, targets, LATENT, num_inference_steps=2, progress=False)
    noise = latent.mixed(tiny_testbed, inverted, PRESET.seeds, 0.5)
    images = generate(tiny_testbed, [t.prompt for t in targets], latents=noise, **QUIET | {"guidance_scale": 1.0})
    expected = sscd_scores(images, [t.image for t in targets], transform=PRESET.sscd_transform)
    assert np.allclose(scores_by_target(of(table, "latent", 50)), expected, atol=0.02)
    assert noise.shape[:2] == (3, 2) and not torch.equal(noise[0], initial_latents(tiny_testbed, PRESET.seeds))


def test_typed_prompts_are_audited_as_they_would_be_typed(tiny_testbed, targets, store):
    table = audit(tiny_testbed, targets, PRESET, store, attack=TOKENS)
    last = of(table, "tokens", 2)
    typed = last.drop_duplicates("target")["found"].tolist()
    images = generate(tiny_testbed, typed, **QUIET)
    expected = sscd_scores(images, [t.image for t in targets], transform=PRESET.sscd_transform)
    assert np.allclose(scores_by_target(last), expected, atol=0.02)
    assert (of(table, "tokens", 1)["found"] != "").all() and (table["prompt"] != table["found"]).all()


def test_attacks_are_made_once_and_alone_or_together_alike(tiny_testbed, targets, store, monkeypatch):
    first = audit(tiny_testbed, targets, PRESET, store, attack=ALL[1:])
    for name in ("invert", "find_prompts", "generate"):
        monkeypatch.setattr(cached_module, name, None)  # would fail if it were called
    pd.testing.assert_frame_equal(first, audit(tiny_testbed, targets, PRESET, store, attack=ALL[1:]))
    monkeypatch.undo()
    for target in targets[:2]:
        alone = audit(tiny_testbed, [target], PRESET, Store(store.folder / target.id), attack=ALL[1:])
        both = first[first["target"] == target.id].merge(alone, on=["attack", "steps", "seed"])
        assert len(both) == len(alone) and (both["sscd_x"] - both["sscd_y"]).abs().max() < 0.05
        assert (both["found_x"].fillna("") == both["found_y"].fillna("")).all()


def test_each_target_is_attacked_under_its_own_edit(tiny_testbed, targets, store, half_off):
    edits = {"each": [half_off, None, half_off], "none": None, "half": half_off}
    table = audit(tiny_testbed, targets, PRESET, store, edits=edits, attack=ALL[1:])
    by = table.set_index(["mitigation", "target"])
    for name, target in (("half", "t0"), ("none", "t1"), ("half", "t2")):
        ours, theirs = by.loc[("each", target)], by.loc[(name, target)]
        assert np.allclose(ours["sscd"], theirs["sscd"], atol=0.05)
    assert not np.allclose(by.loc[("none", "t0")]["sscd"], by.loc[("half", "t0")]["sscd"], atol=1e-3)


def test_other_settings_are_another_case(tiny_testbed, targets, store):
    def noise(config, preset=PRESET):
        (answer,) = answers(tiny_testbed, targets[:1], config, preset, store, progress=False).values()
        return answer.given["latents"]

    one = latent.Config(refinements=0)
    assert torch.equal(noise(one), noise(one))
    more = dataclasses.replace(PRESET, num_inference_steps=3)
    assert not torch.equal(noise(one), noise(latent.Config(refinements=3)))
    assert not torch.equal(noise(one), noise(one, more))


def test_regions_are_compared_where_they_are_asked_for(tiny_testbed, targets, store):
    table = audit(tiny_testbed, targets, PRESET, store, attack=[DORI, completion.Config()], regions=True)
    compared = table["regions"].notna()
    assert set(zip(table["attack"][compared], table["steps"][compared], strict=True)) == {("none", 0), ("DoRI", 2)}
    images = generate(tiny_testbed, [t.prompt for t in targets], **QUIET)
    maps = region_maps(images, [t.image for t in targets], transform=PRESET.sscd_transform)
    expected = region_similarity(maps).ravel()
    assert np.allclose(of(table, "none", 0)["regions"], expected, atol=0.02)
    assert "regions" not in audit(tiny_testbed, targets, PRESET, store)


def test_starts_are_for_dori_alone(tiny_testbed, targets, store):
    embeds = torch.zeros(1, tiny_testbed.tokenizer.model_max_length, tiny_testbed.unet.config.cross_attention_dim)
    for attack in (LATENT, [DORI, LATENT]):
        with pytest.raises(ValueError, match="DoRI starts from: give it as the only attack"):
            audit(tiny_testbed, targets[:1], PRESET, store, attack=attack, starts=embeds)
    with pytest.raises(ValueError, match="latent takes none"):
        ways.answers(tiny_testbed, targets[:1], LATENT, PRESET, store, starts=embeds)


# The report


def test_a_report_shows_every_attack(tiny_testbed, targets, store, tmp_path):
    path = write_report(tmp_path / "out", tiny_testbed, targets[:1], targets[2:], PRESET, store, ALL)
    html = path.read_text()
    rows = pd.read_csv(tmp_path / "out" / "rows.csv", comment="#", keep_default_na=False)
    assert set(rows["attack"]) == {"none", *NAMES.values()}
    assert html.count("<img") == 1 + 2 * (
        1 + 1 + 2 + 1 + 2 + 2
    )  # curves; images x (own, prompt, by step of each attack)
    for caption in ("half given", "50% inverted", "75% inverted", "typed, 1 step<", "typed, 2 steps", "2 steps"):
        assert f"<figcaption>{caption}" in html
    for term in ("<dt>trigger</dt>", "<dt>one half</dt>", "<dt>inverted noise</dt>", "<dt>typed prompt</dt>"):
        assert term in html
    typed = rows.loc[(rows["attack"] == "tokens") & (rows["steps"] == 2), "found"].unique()
    assert len(typed) == 2 and all(f"typed: {text}" in html for text in typed)
    verdicts = pd.read_csv(tmp_path / "out" / "verdicts.csv", comment="#")
    assert verdicts["attack"].tolist() == list(NAMES.values()) * 2 and verdicts["regions"].notna().all()


def test_without_dori_there_is_no_trigger_to_replay(tiny_testbed, targets, store, tmp_path):
    path = write_report(tmp_path / "out", tiny_testbed, targets[:1], targets[2:], PRESET, store, completion.Config())
    html = path.read_text()
    assert "Replay a trigger" not in html and not list((tmp_path / "out" / "triggers").iterdir())
    assert "one half of them (the other is judged)" in html


def test_an_attack_is_given_once(tiny_testbed, targets, store, tmp_path):
    for attacks, message in (([], "at least one step"), ([LATENT, LATENT], "given twice")):
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path / "out", tiny_testbed, targets[:1], targets[2:], PRESET, store, attacks)


@pytest.mark.slow
def test_the_command_takes_several_attacks(tiny_testbed_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DORI_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0).integers
    for name in ("cat", "noise"):
        Image.fromarray(draw(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / f"{name}.png")
        pd.DataFrame({"prompt": ["a cat"], "image": [f"{name}.png"]}).to_csv(tmp_path / f"{name}.csv", index=False)
    command = ["--model", str(tiny_testbed_folder), "--preset", "smoke", "--targets", str(tmp_path / "cat.csv")]
    command += ["--controls", str(tmp_path / "noise.csv")]
    out = str(tmp_path / "audit")
    assert main(["audit", *command, "--out", out, "--attack", "tokens", "completion", "latent"]) == 0
    rows = pd.read_csv(tmp_path / "audit" / "rows.csv", comment="#", keep_default_na=False)
    assert set(rows["attack"]) == {"none", "tokens", "completion", "latent"}
    assert main(["audit", *command, "--out", out, "--attack", "latent", "--steps", "3"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "--steps is of the attack dori, which --attack does not name."
    sweep = ["sweep", *command, "--out", str(tmp_path / "sweep"), "--attack", "none", "completion", "known=right"]
    assert main([*sweep, "latent", "share=0.5", "tokens"]) == 0
    swept = pd.read_csv(tmp_path / "sweep" / "rows.csv", comment="#", keep_default_na=False)
    assert set(swept["attack"]) == {"none", "completion known=right", "latent share=0.5", "tokens"}
    both = swept.merge(rows, on=["target", "attack", "steps", "seed"])
    assert set(both["attack"]) == {"none", "tokens"} and (both["sscd_x"] - both["sscd_y"]).abs().max() < 0.05
    assert (both["found_x"] == both["found_y"]).all() and re.search("[a-z]", "".join(both["found_x"]))
