"""The audit: tidy rows from a pipeline and targets, computed once, and what is read off them."""

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from dori_utils import cached as cached_module
from dori_utils import wanda
from dori_utils.attack import AttackConfig, attack
from dori_utils.cached import cached_attack, cached_clip_embeddings, cached_edits, cached_embeddings, cached_generate
from dori_utils.core.diffusion import encode_prompts
from dori_utils.core.edits import Edit, applied
from dori_utils.core.generation import generate
from dori_utils.core.hashes import model_hash
from dori_utils.core.inception import InceptionDistances
from dori_utils.core.metrics import diversity, scores_by_target, summarize
from dori_utils.core.sscd import load_sscd, sscd_scores
from dori_utils.core.store import Store
from dori_utils.core.targets import Target
from dori_utils.evaluation import audit, detect, ordinary_cost
from dori_utils.presets import PRESETS

PRESET = dataclasses.replace(PRESETS["testbed"], num_inference_steps=2, seeds=(0, 1), detection_seeds=(0, 1, 2))


def clip_alignment(images, captions, clip):
    """A_CLIP of each image and its caption, without the cache."""
    return (clip.embed_images(images) * clip.embed_texts(captions)).sum(axis=1)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def make_targets(pipe):
    """Two that the pipeline draws itself, so it replicates them, and one that it never would."""
    prompts = ["a cat", "a dog", "a red car"]
    # All seeds at once, as an audit does it: in another batch a pixel may be rounded to its neighbour.
    images = [row[0] for row in generate(pipe, prompts, seeds=PRESET.seeds, **PRESET.sampling, progress=False)]
    images[2] = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    kinds = ["VM", "VM", "control"]
    return [Target(f"t{i}", p, image, k, 9) for i, (p, image, k) in enumerate(zip(prompts, images, kinds, strict=True))]


def test_cached_images_are_those_of_generate_and_are_made_once(tiny_testbed, store, monkeypatch):
    expected = generate(tiny_testbed, ["a cat", "a dog"], seeds=(0, 1), **PRESET.sampling, progress=False)
    first = cached_generate(tiny_testbed, ["a cat", "a dog"], (0, 1), PRESET, store)
    asked = []
    monkeypatch.setattr(cached_module, "generate", lambda pipe, p, **k: asked.append(p) or generate(pipe, p, **k))
    again = cached_generate(tiny_testbed, ["a dog", "a cat"], (0, 1), PRESET, store)[::-1]
    for ours in (first, again):
        assert (np.array(ours) == np.array(expected)).all()
    assert asked == []


def test_deleting_one_case_recomputes_that_case_alone(tiny_testbed, store, monkeypatch):
    cached_generate(tiny_testbed, ["a cat", "a dog"], (0, 1), PRESET, store)
    one = sorted(store.folder.glob("*.npz"))[0]
    one.unlink()
    asked = []
    monkeypatch.setattr(cached_module, "generate", lambda pipe, p, **k: asked.append(p) or generate(pipe, p, **k))
    cached_generate(tiny_testbed, ["a cat", "a dog"], (0, 1), PRESET, store)
    assert len(asked) == 1 and len(asked[0]) == 1 and one.exists()


def test_other_weights_are_another_case(tiny_testbed, store):
    before = cached_generate(tiny_testbed, ["a cat"], (0,), PRESET, store)[0][0]
    weight = tiny_testbed.unet.conv_out.weight
    original = weight.data.clone()
    try:
        weight.data.mul_(3)
        after = cached_generate(tiny_testbed, ["a cat"], (0,), PRESET, store)[0][0]
    finally:
        weight.data.copy_(original)
    assert len(list(store.folder.glob("*.npz"))) == 2
    assert (np.asarray(before) != np.asarray(after)).any()


def test_rows_are_tidy_and_say_what_made_them(tiny_testbed, store):
    rows = audit(tiny_testbed, make_targets(tiny_testbed), PRESET, store)
    assert list(zip(rows["target"], rows["seed"], strict=True)) == [(f"t{i}", s) for i in range(3) for s in (0, 1)]
    assert rows.loc[(rows["seed"] == 0) & (rows["kind"] == "VM"), "sscd"].min() > 0.9999  # its own image
    assert set(rows.attrs) == {"model", "weights", "sscd", "sampling", "dori_utils"}
    assert "onnx" in rows.attrs["sscd"] and "transform testbed" in rows.attrs["sscd"]


def value_rows_off(pipe, share):
    """An edit that switches off the first share of every value layer's neurons."""
    masks = {}
    for name, weight in pipe.unet.named_parameters():
        if name.endswith("attn2.to_v.weight"):
            masks[name] = (torch.arange(len(weight)) < share * len(weight))[:, None]
    return Edit("rows", model_hash(pipe), masks=masks)


def test_each_target_is_audited_under_its_own_edit(tiny_testbed, store):
    targets = make_targets(tiny_testbed)
    half, all_off = value_rows_off(tiny_testbed, 0.5), value_rows_off(tiny_testbed, 1)
    settings = {"none": None, "each": [half, None, all_off], "half": half}
    rows = audit(tiny_testbed, targets, PRESET, store, edits=settings)
    assert list(rows["mitigation"].unique()) == ["none", "each", "half"] and len(rows) == 3 * 3 * 2
    table = rows.set_index(["mitigation", "target"])
    same = [("none", "t0"), ("none", "t2"), ("each", "t1")]
    assert all((table.loc[case, "sscd_gen"] > 0.9999).all() for case in same)
    assert table.loc[("each", "t0"), "sscd"].tolist() == pytest.approx(table.loc[("half", "t0"), "sscd"], abs=1e-3)
    with applied(tiny_testbed, all_off):
        images = generate(tiny_testbed, ["a red car"], seeds=PRESET.seeds, **PRESET.sampling, progress=False)
    expected = sscd_scores(images, [targets[2].image], transform=PRESET.sscd_transform)[0]
    assert table.loc[("each", "t2"), "sscd"].tolist() == pytest.approx(expected, abs=0.02)  # a pixel level or two
    with pytest.raises(ValueError, match="each: 1 edits for 3 targets"):
        audit(tiny_testbed, targets, PRESET, store, edits={"each": [half]})


def test_rows_hold_diversity_and_alignment(tiny_testbed, store, clip):
    targets, preset = make_targets(tiny_testbed), dataclasses.replace(PRESET, seeds=(0, 1, 2))
    half = value_rows_off(tiny_testbed, 0.5)
    rows = audit(tiny_testbed, targets, preset, store, edits={"none": None, "half": half}, clip=clip)
    prompts = [target.prompt for target in targets]
    images = cached_generate(tiny_testbed, prompts, preset.seeds, preset, store, [half] * 3)
    of_half = rows[rows["mitigation"] == "half"]
    expected = diversity(load_sscd().embed_rows(images, PRESET.sscd_transform))
    assert of_half.groupby("target", sort=False)["d_sscd"].mean().tolist() == pytest.approx(expected, abs=1e-5)
    aligned = [clip_alignment(row, [prompt] * 3, clip).tolist() for row, prompt in zip(images, prompts, strict=True)]
    assert of_half["alignment"].tolist() == pytest.approx(sum(aligned, []), abs=1e-5)
    assert rows.attrs["clip"] == "clip0"  # the folder's name
    one_seed = audit(tiny_testbed, targets, dataclasses.replace(PRESET, seeds=(0,)), store)
    assert one_seed["d_sscd"].isna().all() and "alignment" not in one_seed


def test_features_are_kept_apart_by_edit_and_need_no_second_generation(tiny_testbed, store):
    half, prompts = value_rows_off(tiny_testbed, 0.5), ["a cat", "a dog"]
    sscd, arguments = load_sscd(), (PRESET.seeds, PRESET, store)
    features = cached_embeddings(tiny_testbed, prompts, *arguments, sscd, [half, None])
    images = cached_generate(tiny_testbed, prompts, *arguments, [half, None])
    assert features == pytest.approx(sscd.embed_rows(images, PRESET.sscd_transform), abs=1e-6)
    plain = cached_embeddings(tiny_testbed, prompts, *arguments, sscd)
    assert (plain[0] != features[0]).any() and (plain[1] == features[1]).all()
    for path in store.folder.glob("*.npz"):
        if "images" in np.load(path):
            path.unlink()
    assert (cached_embeddings(tiny_testbed, prompts, *arguments, sscd, [half, None]) == features).all()
    assert not any("images" in np.load(path) for path in store.folder.glob("*.npz"))


def test_clip_features_are_kept_and_belong_to_their_clip(tiny_testbed, store, clip):
    prompts, arguments = ["a cat", "a dog"], (PRESET.seeds, PRESET, store)
    features = cached_clip_embeddings(tiny_testbed, prompts, *arguments, clip)
    images = cached_generate(tiny_testbed, prompts, *arguments)
    assert features.shape[:2] == (2, 2) and features == pytest.approx(clip.embed_rows(images), abs=1e-5)
    cases = len(list(store.folder.glob("*.npz")))
    cached_clip_embeddings(tiny_testbed, prompts, *arguments, clip)
    other = dataclasses.replace(clip, model=copy.deepcopy(clip.model))
    other.model.visual_projection.weight.mul_(-1)
    assert (cached_clip_embeddings(tiny_testbed, prompts, *arguments, other) == -features).all()
    assert len(list(store.folder.glob("*.npz"))) == cases + 2


def test_another_sampler_or_judge_is_another_case(tiny_testbed, store):
    sscd, arguments = load_sscd(), (["a cat"], PRESET.seeds)
    features = cached_embeddings(tiny_testbed, *arguments, PRESET, store, sscd)
    sharper = dataclasses.replace(PRESET, sscd_transform="sd")
    assert (cached_embeddings(tiny_testbed, *arguments, sharper, store, sscd) != features).any()
    other = dataclasses.replace(sscd, name="another SSCD")
    cases = len(list(store.folder.glob("*.npz")))
    cached_embeddings(tiny_testbed, *arguments, PRESET, store, other)
    assert len(list(store.folder.glob("*.npz"))) == cases + 1
    own, images = tiny_testbed.scheduler, cached_generate(tiny_testbed, *arguments, PRESET, store)
    try:
        tiny_testbed.scheduler = EulerDiscreteScheduler.from_config(own.config)
        others = cached_generate(tiny_testbed, *arguments, PRESET, store)
    finally:
        tiny_testbed.scheduler = own
    assert (np.array(images) != np.array(others)).any()


def test_no_prompts_are_refused(tiny_testbed, store):
    with pytest.raises(ValueError, match="No prompts"):
        cached_generate(tiny_testbed, [], (0, 1), PRESET, store)


def test_what_edits_cost_ordinary_prompts_is_compared_caption_by_caption(tiny_testbed, store, clip):
    captions = ["a cat", "a dog", "a red car"]
    half, all_off = value_rows_off(tiny_testbed, 0.5), value_rows_off(tiny_testbed, 1)
    plain = cached_generate(tiny_testbed, captions, PRESET.seeds, PRESET, store)
    reference = [image for row in plain for image in row]
    edits = {"none": None, "two": [half, all_off]}
    cost = ordinary_cost(tiny_testbed, captions, reference, PRESET, store, clip, edits).set_index("mitigation")
    assert cost.loc["none", "change"] == 0 and cost.loc["none", "frechet"] == pytest.approx(0, abs=1e-6)
    images = cached_generate(tiny_testbed, captions, PRESET.seeds, PRESET, store, [half, all_off, half])
    aligned = [clip_alignment(row, [c] * 2, clip).mean() for row, c in zip(images, captions, strict=True)]
    assert cost.loc["two", "alignment"] == pytest.approx(np.mean(aligned), abs=1e-5)
    assert cost.loc["two", "change"] == pytest.approx(np.mean(aligned) - cost.loc["none", "alignment"], abs=1e-5)
    assert cost.loc["two", "low"] <= cost.loc["two", "change"] <= cost.loc["two", "high"]
    assert cost.loc["two", "frechet"] > 1e-4


def test_edits_are_made_once_for_each_target(tiny_testbed, store):
    targets, config = make_targets(tiny_testbed), wanda.Config(sparsity=0.1, steps=1, num_inference_steps=2)
    made = []

    def localize_each(pipe, chosen, config):
        made.extend(target.id for target in chosen)
        return wanda.localize_each(pipe, chosen, config)

    first = cached_edits(localize_each, tiny_testbed, targets[:2], config, store)
    again = cached_edits(localize_each, tiny_testbed, targets, config, store)
    assert made == ["t0", "t1", "t2"]
    assert [edit.fingerprint() for edit in first] == [edit.fingerprint() for edit in again[:2]]
    assert again[2].targets == ("t2",) and again[2].config["sparsity"] == 0.1


def test_summary_groups_targets_not_images():
    scores = {"a": [0.9, 0.8], "b": [0.95, 0.2], "c": [0.1, 0.1]}
    rows = pd.DataFrame(
        [
            {"target": t, "kind": "VM" if t != "c" else "control", "seed": s, "sscd": v}
            for t, values in scores.items()
            for s, v in enumerate(values)
        ]
    )
    assert scores_by_target(rows).tolist() == list(scores.values())
    two = pd.concat([rows, rows[rows["target"] == "c"].assign(target="d")])
    summary = summarize(two, "kind").set_index("kind")
    assert summary.loc["VM", "rate"] == 0.5 and summary.loc["VM", "images"] == 0.75
    assert summary.loc["VM", "any_seed"] == 1.0 and summary.loc["VM", "targets"] == 2
    assert summary.loc["control", "sscd"] == pytest.approx(0.1)


def test_detectors_score_every_prompt_and_count_their_cost(tiny_testbed, store):
    detected = detect(tiny_testbed, ["a cat", "a dog"], PRESET, store)
    cost = detected.groupby("detector")["evaluations"].first()
    expected = {"noise magnitude": 6, "first-step similarity": 3, "anisotropy": 12, "seed diversity": 8}
    assert cost.to_dict() == expected
    assert len(detected) == 8 and detected["score"].notna().all() and (detected["seconds"] > 0).all()
    again = detect(tiny_testbed, ["a cat", "a dog"], PRESET, store)
    pd.testing.assert_frame_equal(detected, again)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_the_cost_of_seeds_is_what_the_sampler_really_asks_of_the_unet(pipe, store, guidance):
    """PNDM, Stable Diffusion 1.x's, makes an evaluation more than it has steps; without guidance one row will do."""
    rows = []
    preset = dataclasses.replace(PRESET, guidance_scale=guidance)
    handle = pipe.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        cached_generate(pipe, ["a cat"], preset.seeds, preset, store)
    finally:
        handle.remove()
    cost = detect(pipe, ["a cat"], preset, store).set_index("detector")["evaluations"]
    assert cost["seed diversity"] == sum(rows)


WANDA = wanda.Config(sparsity=0.2, steps=1, num_inference_steps=2, guidance_scale=3.0)
ATTACK = AttackConfig(steps=2, batch_size=2, record=(0, 1))


@pytest.mark.slow
def test_attacks_add_rows_for_every_recorded_step_and_for_the_controls(tiny_testbed, store):
    targets = make_targets(tiny_testbed)
    vm, controls = targets[:2], targets[2:]
    pruned = wanda.localize_each(tiny_testbed, vm, WANDA, progress=False)
    edits = {"original": None, "Wanda": pruned}
    table = audit(tiny_testbed, vm, PRESET, store, edits=edits, attack=ATTACK, controls=controls)
    assert len(table) == 2 * 3 * (1 + 3) * 2  # mitigations x targets and control x (prompt, steps 0, 1, 2) x seeds
    assert set(zip(table["attack"], table["steps"], strict=True)) == {
        ("none", 0),
        ("DoRI", 0),
        ("DoRI", 1),
        ("DoRI", 2),
    }
    assert set(table.loc[table["kind"] == "control", "target"]) == {"t2"}
    numbers = ["sscd", "sscd_gen", "d_sscd"]
    prompts, starts = (table[(table["attack"] == a) & (table["steps"] == 0)] for a in ("none", "DoRI"))
    assert np.allclose(prompts[numbers].to_numpy(), starts[numbers].to_numpy(), atol=1e-4)
    found = attack(tiny_testbed, targets, ATTACK, edits=[*pruned, pruned[0]], progress=False)
    images = generate(
        tiny_testbed,
        prompt_embeds=found.prompt_embeds,
        seeds=PRESET.seeds,
        edits=[*pruned, pruned[0]],
        **PRESET.sampling,
        progress=False,
    )
    expected = sscd_scores(images, [t.image for t in targets], transform=PRESET.sscd_transform)
    last = table[(table["mitigation"] == "Wanda") & (table["steps"] == 2)]
    assert np.allclose(scores_by_target(last), expected, atol=0.02)
    assert "steps=2" in table.attrs["attack"]
    cases = len(list(store.folder.iterdir()))
    ends = audit(tiny_testbed, vm, PRESET, store, edits=edits, attack=ATTACK, controls=controls, recorded=False)
    on_the_way = (table["attack"] == "DoRI") & (table["steps"] < 2)
    assert ends.equals(table[~on_the_way].reset_index(drop=True))
    assert len(list(store.folder.iterdir())) == cases  # the same attacks


def test_an_audit_attacks_from_the_starts_given(tiny_testbed, store):
    targets = make_targets(tiny_testbed)[:2]
    starts = encode_prompts(tiny_testbed, ["a guitar", "a violin"])
    table = audit(tiny_testbed, targets, PRESET, store, attack=ATTACK, starts=starts)
    found = attack(tiny_testbed, targets, ATTACK, starts=starts, progress=False)
    images = generate(
        tiny_testbed, prompt_embeds=found.prompt_embeds, seeds=PRESET.seeds, **PRESET.sampling, progress=False
    )
    expected = sscd_scores(images, [t.image for t in targets], transform=PRESET.sscd_transform)
    assert np.allclose(scores_by_target(table[table["steps"] == 2]), expected, atol=0.02)
    assert "start=given" in table.attrs["attack"]
    with pytest.raises(ValueError, match="one for each target and then each control"):
        audit(tiny_testbed, targets, PRESET, store, attack=ATTACK, starts=starts[:1])


def test_an_attack_is_made_once(tiny_testbed, store, monkeypatch):
    targets = make_targets(tiny_testbed)[:2]
    first = cached_attack(tiny_testbed, targets, ATTACK, store, progress=False)
    monkeypatch.setattr(cached_module, "attack", None)  # would fail if it were called
    again = cached_attack(tiny_testbed, targets[::-1], ATTACK, store)[[1, 0]]
    assert torch.equal(first.prompt_embeds, again.prompt_embeds) and torch.equal(first.losses, again.losses)
    assert first.cases == again.cases and torch.equal(first.recorded[1], again.recorded[1])


def test_an_attack_of_another_image_start_seed_or_edit_is_another_case(tiny_testbed, store):
    one = make_targets(tiny_testbed)[0]
    other = dataclasses.replace(one, image=Image.new("RGB", one.image.size))
    embeds = torch.zeros(1, tiny_testbed.tokenizer.model_max_length, tiny_testbed.unet.config.cross_attention_dim)
    edit = wanda.localize(tiny_testbed, [one], WANDA, progress=False)
    variants = [{}, {"seeds": [1]}, {"starts": embeds}, {"edits": [edit]}]
    found = [cached_attack(tiny_testbed, [one], ATTACK, store, progress=False, **more) for more in variants]
    found.append(cached_attack(tiny_testbed, [other], ATTACK, store, progress=False))
    assert len({f.prompt_embeds.numpy().tobytes() for f in found}) == len(found)


@pytest.mark.slow
def test_a_control_model_is_attacked_on_the_same_targets(tiny_testbed, sd2, store):
    targets = make_targets(tiny_testbed)[:1]
    table = audit(tiny_testbed, targets, PRESET, store, attack=ATTACK, control_pipe=sd2)
    assert table["mitigation"].unique().tolist() == ["none", "control model"]
    own, other = (table.loc[table["mitigation"] == name, "sscd"].to_numpy() for name in ("none", "control model"))
    assert own.shape == other.shape and not np.allclose(own, other)
    assert table.attrs["control weights"] == model_hash(sd2) != table.attrs["weights"]


def test_fid_and_kid_stand_beside_the_cost_where_inceptions_weights_are(tiny_testbed, clip, tmp_path, monkeypatch):
    asked = []

    def distances(images, reference, weights):  # the real one needs weights that are not here
        asked.append((len(images), len(reference), weights))
        return InceptionDistances(10.0 + len(asked), 0.1, 0.01, len(images), len(reference))

    monkeypatch.setattr(cached_module, "inception_distances", distances)
    store, captions = Store(tmp_path), ["a cat", "a red dog", "the violin"]
    real = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    given = (captions, real, PRESET, store, clip, {"original": None, "pruned": value_rows_off(tiny_testbed, 0.5)})
    for _ in range(2):  # the second time from the store
        cost = ordinary_cost(tiny_testbed, *given, "weights.pth")
    images = 3 * len(PRESET.seeds)
    assert cost["fid"].tolist() == [11.0, 12.0] and cost["images"].tolist() == [images] * 2
    assert asked == [(images, 3, "weights.pth")] * 2
    assert "fid" not in ordinary_cost(tiny_testbed, *given)


def test_an_audit_hashes_the_model_once_and_sees_an_edit_that_is_applied(tiny_testbed, tmp_path, monkeypatch):
    from dori_utils.core import hashes as module

    calls = []
    monkeypatch.setattr(module, "model_hash", lambda pipe: calls.append(pipe) or model_hash(pipe))
    store, edit = Store(tmp_path), value_rows_off(tiny_testbed, 0.5)
    target = Target("t", "a cat", Image.new("RGB", (16, 16)), "VM")
    plain = audit(tiny_testbed, [target], PRESET, store)
    assert len(calls) == 1
    with applied(tiny_testbed, edit):
        edited = audit(tiny_testbed, [target], PRESET, store)
        assert edited.attrs["weights"] == model_hash(tiny_testbed) != plain.attrs["weights"]
    assert audit(tiny_testbed, [target], PRESET, store).attrs["weights"] == plain.attrs["weights"]
    assert not edited["sscd"].equals(plain["sscd"])


def test_what_is_found_under_an_applied_edit_is_not_taken_for_the_models_own(tiny_testbed, store):
    targets, off = make_targets(tiny_testbed)[:1], value_rows_off(tiny_testbed, 1.0)
    config = AttackConfig(steps=2, batch_size=1)

    def found():
        attacked = cached_attack(tiny_testbed, targets, config, store, progress=False).losses
        (mask,) = cached_edits(wanda.localize_each, tiny_testbed, targets, PRESET.wanda, store, progress=False)
        return attacked, mask.fingerprint()

    with applied(tiny_testbed, off):
        under_edit = found()
    own = found()
    (expected,) = wanda.localize_each(tiny_testbed, targets, PRESET.wanda, progress=False)
    assert own[1] == expected.fingerprint() != under_edit[1]
    assert not torch.equal(own[0], under_edit[0])
