"""An edit may be of any part of a pipeline; whatever it changes is in force where it counts, and undone to the bit."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file

from dori_utils.attack import AttackConfig, attack, descend
from dori_utils.cli.weights import read_edit
from dori_utils.core.cache import key_of
from dori_utils.core.differences import difference
from dori_utils.core.edits import Edit, applied, change, check_fits, union
from dori_utils.core.edits_by_row import applied_by_row, groups
from dori_utils.core.generation import generate
from dori_utils.core.hashes import base_hash, current_hash, known, model_hash
from dori_utils.core.models import load_pipeline
from dori_utils.core.sscd import load_sscd
from dori_utils.core.store import Store
from dori_utils.core.targets import Target
from dori_utils.evaluation import audit
from dori_utils.presets import PRESETS

QUICK = {"num_inference_steps": 2, "guidance_scale": 3.0, "progress": False}


def changed(pipe, part):
    """Another model or scheduler in the place of a part of the pipeline."""
    if part == "scheduler":
        kinds = {"epsilon": "v_prediction", "v_prediction": "epsilon"}
        kind = kinds[pipe.scheduler.config.get("prediction_type", "epsilon")]
        return DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=kind, clip_sample=False)
    other = copy.deepcopy(getattr(pipe, part))
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) * parameter.abs().mean()
    if part == "vae":
        other.register_to_config(scaling_factor=0.9 * other.config.scaling_factor)
    return other


PARTS = ["unet", "text_encoder", "vae", "scheduler"]
MIXES = [*([part] for part in PARTS), PARTS]


@pytest.fixture(params=MIXES, ids="+".join)
def others(request, pipe):
    """Part → another one: of each part alone, and of all."""
    return {part: changed(pipe, part) for part in request.param}


def with_others(pipe, others):
    """The pipeline that has these parts in the place of its own."""
    other = copy.copy(pipe)
    for part, own in others.items():
        setattr(other, part, own)
    return other


def state(pipe):
    """All that a pipeline computes with: the bits of its weights, and settings."""
    weights = {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "text_encoder", "vae")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }
    return weights, dict(pipe.vae.config), dict(pipe.scheduler.config), pipe.scheduler, dict(pipe.config)


def assert_same(found, wanted):
    weights, *settings = found
    assert settings == list(wanted[1:]) and weights.keys() == wanted[0].keys()
    assert all(torch.equal(tensor, wanted[0][name]) for name, tensor in weights.items())


def test_within_the_pipeline_is_the_other_one_and_behind_it_itself_to_the_bit(pipe, others):
    edit, before = Edit.between(pipe, others), state(pipe)
    assert edit.parts == tuple(others)
    other = with_others(pipe, others)
    with applied(pipe, edit):
        weights, vae, scheduler, _, _ = state(pipe)
        wanted = state(other)
        assert all(torch.equal(tensor, wanted[0][name]) for name, tensor in weights.items())
        assert vae["scaling_factor"] == wanted[1]["scaling_factor"]
        assert type(pipe.scheduler) is type(other.scheduler)
        assert scheduler["prediction_type"] == wanted[2]["prediction_type"]
        assert not (others.keys() - {"scheduler"}) or model_hash(pipe) == model_hash(other)
    assert_same(state(pipe), before)
    with pytest.raises(RuntimeError, match="within"), applied(pipe, edit):
        raise RuntimeError("within")
    assert_same(state(pipe), before)


def test_it_survives_the_disk_and_its_fingerprint_is_of_all_parts(pipe, others, tmp_path):
    edit = Edit.between(pipe, others, method="theirs")
    edit.save(tmp_path / "edit.safetensors")
    for loaded in (Edit.load(tmp_path / "edit.safetensors"), Edit.from_arrays(edit.to_arrays())):
        assert loaded.fingerprint() == edit.fingerprint() and loaded.settings == edit.settings
        assert loaded.parts == edit.parts and loaded.remainders.keys() == edit.remainders.keys()
        with applied(pipe, edit):
            once = state(pipe)
        with applied(pipe, loaded):
            again = state(pipe)
        assert_same([*again[:3]], [*once[:3]])
    found = {Edit.between(pipe, {part: other}).fingerprint() for part, other in others.items()}
    assert len(found) == len(others) and (edit.fingerprint() in found) == (len(others) == 1)


@pytest.fixture
def mixed(sd1):
    """Edits of one part each, and None: no two are the same around the U-Net, but those of the U-Net alone."""
    edits = [Edit.between(sd1, {part: changed(sd1, part)}, method=part) for part in PARTS]
    mask = {"mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight": torch.ones(1, 1, dtype=torch.bool)}
    return [None, *edits, Edit("NeMo", base_hash(sd1), masks=mask)]


def pixels(images):
    return np.stack([np.asarray(image) for row in images for image in row]).astype(int)


def test_images_of_rows_under_different_edits_are_those_of_each_alone(sd1, mixed):
    before, seeds = state(sd1), [0, 1]
    prompts, edits = ["a cat on a car", "a dog"] * 6, [edit for edit in mixed for _ in range(2)]
    together = pixels(generate(sd1, prompts, seeds=seeds, edits=edits, batch_size=3, **QUICK))
    assert_same(state(sd1), before)
    for i, edit in enumerate(mixed):  # each alone is the other pipeline
        other = with_others(sd1, {edit.method: changed(sd1, edit.method)}) if 0 < i < 5 else sd1
        settings = {"edits": [edit] * 2} if i == 5 else {}
        alone = pixels(generate(other, prompts[:2], seeds=seeds, **settings, **QUICK))
        assert abs(together[4 * i : 4 * i + 4] - alone).max() <= 1, edit


def test_an_attack_on_cases_under_different_edits_finds_what_it_finds_in_each_pipeline_alone(
    sd1, mixed, random_picture
):
    targets = [Target(f"t{i}", "a cat on a car", random_picture(i), "VM") for i in range(len(mixed))]
    config = AttackConfig(steps=2, batch_size=2, restarts=2, record=(0, 1))
    numbers, before = [], state(sd1)

    def callback(about):
        numbers.extend(about["cases"])

    found = attack(sd1, targets, config, edits=mixed, progress=False, callback=callback)
    assert_same(state(sd1), before)
    assert sorted(numbers) == sorted(list(range(6)) * 4) and [case["target"] for case in found.cases] == [
        target.id for target in targets
    ]
    for i, edit in enumerate(mixed):
        pipe = sd1 if i in (0, 5) else with_others(sd1, {edit.method: changed(sd1, edit.method)})
        alone = attack(pipe, targets[i : i + 1], config, edits=mixed[5] if i == 5 else None, progress=False)
        for step, embeds in found.by_step().items():
            torch.testing.assert_close(embeds[i], alone.by_step()[step][0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.losses[i], alone.losses[0], rtol=1e-3, atol=1e-5)


def test_a_prompts_embedding_under_an_edit_is_the_edited_text_encoders(sd1, mixed, random_picture):
    target = Target("t", "a cat on a car", random_picture(0), "VM")
    config = AttackConfig(steps=0, record=())
    with applied(sd1, mixed[2]):
        wanted = attack(sd1, [target], config, progress=False).prompt_embeds
    own = attack(sd1, [target], config, progress=False).prompt_embeds
    found = attack(sd1, [target] * 2, config, edits=[mixed[2], None], progress=False).prompt_embeds
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], own[0]) and not torch.equal(*found)


def test_cases_of_one_batch_must_be_the_same_around_the_unet(sd1, mixed, random_picture):
    assert groups(mixed) == [[0, 1, 5], [2], [3], [4]]
    start = torch.zeros(2, sd1.tokenizer.model_max_length, 16)
    with pytest.raises(ValueError, match="differ in the text encoder, the VAE or the scheduler"):
        next(descend(sd1, [random_picture(0)] * 2, start, [torch.Generator()] * 2, edits=mixed[1:3]))
    with pytest.raises(ValueError, match="differ in the text encoder"), applied_by_row(sd1, mixed[1:3]):
        pass


def test_rows_that_share_a_text_encoder_may_differ_in_the_unet(sd1, mixed):
    text = changed(sd1, "text_encoder")
    others = [{"text_encoder": text}, {"text_encoder": text, "unet": changed(sd1, "unet")}]
    edits = [Edit.between(sd1, other) for other in others]
    assert groups(edits) == [[0, 1]]
    together = pixels(generate(sd1, ["a cat"] * 2, seeds=[0], edits=edits, **QUICK))
    alone = [pixels(generate(with_others(sd1, other), ["a cat"], seeds=[0], **QUICK))[0] for other in others]
    assert abs(together - np.stack(alone)).max() <= 1 and abs(alone[0] - alone[1]).max() > 1


def test_a_key_of_the_store_knows_settings_that_are_applied(sd1, mixed):
    with known(sd1):
        keys = [key_of(sd1)]
        for edit in mixed[1:5]:
            with applied(sd1, edit):
                keys.append(key_of(sd1))
                assert (current_hash(sd1) == base_hash(sd1)) == (edit.parts == ("scheduler",))
    assert all(keys.count(key) == 1 for key in keys)


def test_files_and_fingerprints_of_edits_of_a_unet_are_what_they_were(tmp_path):
    """The fingerprint was taken when an edit could be of a U-Net alone."""
    mask = torch.zeros(5, 1, dtype=torch.bool)
    mask[[1, 3]] = True
    delta = torch.arange(4) / 8
    edit = Edit(
        "NeMo", "0123456789abcdef", {"tau": 0.4}, ["a"], {"mid_block.to_v.weight": mask}, {"conv_in.bias": delta}
    )
    assert edit.fingerprint() == "e9098a2e6576aa2a" and edit.parts == ("unet",)
    about = {"method": "NeMo", "model": edit.model, "config": {"tau": 0.4}, "targets": ["a"]}
    about |= {"shapes": {"mid_block.to_v.weight": [5, 1]}}
    assert json.loads(str(edit.to_arrays()["about"])) == about
    tensors = {"mask mid_block.to_v.weight": torch.tensor([0b01010000], dtype=torch.uint8), "delta conv_in.bias": delta}
    save_file(tensors, tmp_path / "old.safetensors", {"edit": json.dumps(about)})
    loaded = Edit.load(tmp_path / "old.safetensors")
    assert loaded.fingerprint() == edit.fingerprint() and (loaded.settings, loaded.remainders) == ({}, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_difference_makes_the_other_weight_to_the_bit_however_far_the_two_are_apart(dtype):
    torch.manual_seed(0)
    own = torch.randn(200_000) * 10.0 ** torch.randint(-8, 2, (200_000,))
    other = torch.randn(200_000) * 10.0 ** torch.randint(-8, 2, (200_000,))
    other[::7] = own[::7] * (1 + 2.0**-23)
    other[::11], own[::13] = 0, 0
    own, other = own.to(dtype), other.to(dtype)
    delta, remainder = difference(own, other)
    model = torch.nn.Linear(1, 1)
    model.weight = torch.nn.Parameter(own.reshape(400, 500).clone(), requires_grad=False)
    remainders = {} if remainder is None else {"weight": remainder}
    edit = Edit("theirs", "m", deltas={"weight": delta.reshape(400, 500)}, remainders=remainders)
    change({"weight": model.weight}, edit)
    assert torch.equal(model.weight.flatten(), other)
    assert dtype == torch.float16 or remainder is not None


def test_what_cannot_be_in_an_edit_is_refused_by_what_it_is(sd1):
    text, vae = copy.deepcopy(sd1.text_encoder), copy.deepcopy(sd1.vae)
    text.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="other text encoder is of another architecture: its hidden_act is gelu, here"):
        Edit.between(sd1, {"text_encoder": text})
    vae.register_to_config(norm_num_groups=2)
    with pytest.raises(ValueError, match="other VAE is of another architecture: its norm_num_groups is 2, here 4"):
        Edit.between(sd1, {"vae": vae})
    with pytest.raises(ValueError, match="other U-Net and VAE has the same weights"):
        Edit.between(sd1, {"unet": sd1.unet, "vae": sd1.vae})
    for settings, said in (
        ({"unet": {"act_fn": "gelu"}}, "changes the settings unet"),
        ({"vae": {"act_fn": "gelu"}}, "changes the settings act_fn"),
        ({"scheduler": {"_class_name": "UNet2DConditionModel"}}, "no scheduler called UNet2DConditionModel"),
        ({"scheduler": {}}, "no scheduler called None"),
    ):
        with pytest.raises(ValueError, match=said):
            check_fits(sd1, [Edit("theirs", base_hash(sd1), settings=settings)])
    other = Edit("theirs", base_hash(sd1), deltas={"text_encoder.no.such.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="changes text_encoder.no.such.weight, which the text encoder does not have"):
        check_fits(sd1, [other])
    settings = Edit.between(sd1, {"scheduler": changed(sd1, "scheduler")})
    with pytest.raises(ValueError, match="no union"):
        union([settings])


def test_weights_that_are_no_numbers_are_named_with_their_part(sd1):
    for part, name in (("text_encoder", "final_layer_norm.bias"), ("vae", "decoder.conv_out.bias")):
        other = copy.deepcopy(getattr(sd1, part))
        dict((n.removeprefix("text_model."), p) for n, p in other.named_parameters())[name].data[0] = float("nan")
        with pytest.raises(ValueError, match=f"NaN or infinity in its {name}: it would draw nothing"):
            Edit.between(sd1, {part: other})


def test_a_folder_as_an_edit_gives_the_numbers_of_the_same_folder_as_a_model(pipe, others, random_picture, tmp_path):
    with_others(pipe, others).save_pretrained(tmp_path / "theirs")
    targets = [Target("cat", "a cat on a car", random_picture(0), "VM"), Target("dog", "dog", random_picture(1), "VM")]
    controls = [Target("never", "a red guitar", random_picture(2), "control")]
    attack = AttackConfig(steps=2, batch_size=2, record=(1, 2))
    settings = {"attack": attack, "controls": controls}
    edit, model = read_edit(pipe, tmp_path / "theirs"), load_pipeline(tmp_path / "theirs", device="cpu")
    assert edit.parts == tuple(others)
    preset, sscd = PRESETS["smoke"], load_sscd()
    as_edit = audit(pipe, targets, preset, Store(tmp_path / "a"), sscd, edits={"theirs": edit}, **settings)
    as_model = audit(model, targets, preset, Store(tmp_path / "b"), sscd, edits={"theirs": None}, **settings)
    columns = ["mitigation", "target", "attack", "steps", "seed", "sscd", "d_sscd"]
    pd.testing.assert_frame_equal(as_edit[columns], as_model[columns], check_exact=True)
    base = audit(pipe, targets, preset, Store(tmp_path / "a"), sscd, edits={"theirs": None}, **settings)
    assert not np.allclose(base["sscd"], as_model["sscd"])


def test_an_edit_of_another_base_is_refused_before_anything_is_computed(sd1, sd2, random_picture, monkeypatch):
    edit = Edit.between(sd2, {"text_encoder": changed(sd2, "text_encoder")})
    monkeypatch.setattr(type(sd1), "encode_prompt", lambda *_, **__: pytest.fail("a prompt is encoded"))
    target = Target("t", "a cat", random_picture(0), "VM")
    for call in (
        lambda: generate(sd1, ["a cat"] * 2, edits=[None, edit], **QUICK),
        lambda: attack(sd1, [target] * 2, AttackConfig(steps=1), edits=[None, edit], progress=False),
    ):
        with pytest.raises(ValueError, match="made for a model with the hash"):
            call()
