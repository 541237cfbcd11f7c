"""Edits change a model while they are applied, leave nothing behind, and can be kept, compared and refused."""

import copy
import hashlib

import pytest
import torch

from dori_utils import evaluation as audit
from dori_utils import nemo
from dori_utils.cli import main as command
from dori_utils.core import models
from dori_utils.core.diffusion import encode_prompts, initial_latents
from dori_utils.core.edits import Edit, applied, check_fits, union
from dori_utils.core.edits_by_row import applied_by_row
from dori_utils.core.hashes import base_hash, model_hash
from dori_utils.core.targets import Target
from dori_utils.core.triggers import Triggers
from dori_utils.nemo_statistics import Statistics
from dori_utils.presets import PRESETS

ROWS = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
WEIGHTS = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"


def parameter(pipe, name):
    return pipe.unet.get_parameter(name)


def rows_off(pipe, *rows, **kwargs):
    mask = torch.zeros(len(parameter(pipe, ROWS)), 1, dtype=torch.bool)
    mask[list(rows)] = True
    return Edit("NeMo", base_hash(pipe), masks={ROWS: mask}, **kwargs)


def test_masked_rows_are_zero_within_and_back_to_the_bit_behind(pipe):
    before = copy.deepcopy(pipe.unet.state_dict())
    with applied(pipe, rows_off(pipe, 0, 3)):
        weight = parameter(pipe, ROWS)
        assert not weight[[0, 3]].any() and torch.equal(weight[1], before[ROWS][1])
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


def test_the_model_is_restored_after_an_exception(sd1):
    before = model_hash(sd1)
    with pytest.raises(RuntimeError, match="within"), applied(sd1, rows_off(sd1, 1)):
        raise RuntimeError("within")
    assert model_hash(sd1) == before == base_hash(sd1)


def test_edits_nest_and_each_takes_back_only_its_own(sd1):
    delta = torch.ones_like(parameter(sd1, ROWS))
    added = Edit("fine-tuning", base_hash(sd1), deltas={ROWS: delta})
    original = parameter(sd1, ROWS).clone()
    with applied(sd1, added):
        edited = model_hash(sd1)
        assert edited != base_hash(sd1)
        with applied(sd1, rows_off(sd1, 2)):  # made for the model without the outer edit
            assert not parameter(sd1, ROWS)[2].any()
            torch.testing.assert_close(parameter(sd1, ROWS)[3], original[3] + 1)
        assert model_hash(sd1) == edited
    assert torch.equal(parameter(sd1, ROWS), original)


def test_a_mask_comes_after_a_delta_in_one_edit(sd1):
    weight = parameter(sd1, ROWS)
    both = Edit("both", base_hash(sd1), masks=rows_off(sd1, 0).masks, deltas={ROWS: torch.ones_like(weight)})
    with applied(sd1, both):
        assert not weight[0].any() and (weight[1:] != 0).all()


def test_no_edit_is_no_change(sd1):
    before = model_hash(sd1)
    with applied(sd1, None):
        assert model_hash(sd1) == before


def test_an_edit_for_another_model_is_refused_and_changes_nothing(sd1, sd2):
    before = model_hash(sd2)
    with pytest.raises(ValueError, match="made for a model with the hash"), applied(sd2, rows_off(sd1, 0)):
        pass
    assert model_hash(sd2) == before
    unknown = Edit("hand-made", base_hash(sd1), masks={"no.such.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match="no.such.weight"), applied(sd1, unknown):
        pass


def test_weights_of_someone_else_become_an_edit(sd1):
    other = copy.deepcopy(sd1.unet)
    with torch.no_grad():
        other.get_parameter(ROWS)[1] = 0
        other.conv_in.bias += 0.25
    edit = Edit.between(sd1, other, method="theirs")
    assert set(edit.deltas) == {ROWS, "conv_in.bias"}
    with applied(sd1, edit):
        assert not parameter(sd1, ROWS)[1].any()
        torch.testing.assert_close(sd1.unet.conv_in.bias, other.conv_in.bias)
    with pytest.raises(ValueError, match="same weights"):
        Edit.between(sd1, sd1.unet)


def test_a_unet_of_another_architecture_is_named(sd1, sd2):
    with pytest.raises(ValueError, match="another architecture: its .* shape"):
        Edit.between(sd1, sd2.unet)  # linear projections have weights of another shape


def test_an_edit_survives_the_disk(sd1, tmp_path):
    mask = torch.rand_like(parameter(sd1, WEIGHTS)) < 0.1
    edit = rows_off(sd1, 0, 5, config={"tau": 0.4, "seeds": [0, 1]}, targets=("VM-00", "VM-01"))
    edit.masks[WEIGHTS] = mask
    edit.deltas["conv_in.bias"] = torch.randn(8)
    edit.save(tmp_path / "edit.safetensors")
    for loaded in (Edit.load(tmp_path / "edit.safetensors"), Edit.from_arrays(edit.to_arrays())):
        for what in ("method", "model", "config", "targets"):
            assert getattr(loaded, what) == getattr(edit, what)
        for kind in ("masks", "deltas"):
            ours, theirs = getattr(edit, kind), getattr(loaded, kind)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [file.name for file in tmp_path.iterdir()] == ["edit.safetensors"]


def test_a_damaged_file_and_one_that_is_no_edit_are_named(sd1, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "edit.safetensors"
    rows_off(sd1, 0).save(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError, match="Corrupt edit file .*edit.safetensors"):
        Edit.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(OSError, match="no edit"):
        Edit.load(path)
    with pytest.raises(FileNotFoundError):
        Edit.load(tmp_path / "nothing.safetensors")


def test_union_zeroes_what_any_zeroes_for_all_targets(sd1):
    a, b = rows_off(sd1, 0, targets=("a",), config={"k": 1}), rows_off(sd1, 3, targets=("b", "a"), config={"k": 1})
    both = union([a, b])
    assert both.masks[ROWS].flatten().nonzero().flatten().tolist() == [0, 3]
    assert (both.targets, both.config, both.method) == (("a", "b"), {"k": 1}, "NeMo")
    assert both.sparsity()[ROWS] == 2 / len(parameter(sd1, ROWS))


def test_deltas_and_other_models_have_no_union(sd1, sd2):
    delta = Edit("fine-tuning", base_hash(sd1), deltas={ROWS: torch.zeros_like(parameter(sd1, ROWS))})
    with pytest.raises(ValueError, match="nest"):
        union([rows_off(sd1, 0), delta])
    with pytest.raises(ValueError, match="different models"):
        union([rows_off(sd1, 0), rows_off(sd2, 0)])
    with pytest.raises(ValueError, match="No edits"):
        union([])


def weights_off(pipe):
    mask = torch.rand(parameter(pipe, WEIGHTS).shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return Edit("Wanda", base_hash(pipe), masks={WEIGHTS: mask})


@pytest.mark.parametrize("layout", ["abcbd", "abc", "aabbcc"])
@torch.no_grad()
def test_rows_of_one_batch_run_under_their_own_edits(pipe, layout):
    made = {"a": rows_off(pipe, *range(12)), "b": None, "c": weights_off(pipe), "d": rows_off(pipe, 1)}
    edits, count = [made[letter] for letter in layout], len(layout)
    before = model_hash(pipe)
    embeds, noise = encode_prompts(pipe, ["a cat"] * count), initial_latents(pipe, range(count))
    with applied_by_row(pipe, edits):
        once = pipe.unet(noise, 500, encoder_hidden_states=embeds).sample
        twice = pipe.unet(noise.repeat(2, 1, 1, 1), 500, encoder_hidden_states=embeds.repeat(2, 1, 1)).sample
        assert model_hash(pipe) == before
    for row, edit in enumerate(edits):
        with applied(pipe, edit):
            alone = pipe.unet(noise[row : row + 1], 500, encoder_hidden_states=embeds[row : row + 1]).sample[0]
        for together in (once[row], twice[row], twice[row + count]):
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(pipe.unet.get_submodule(ROWS.removesuffix(".weight")))


def test_gradients_reach_the_embeddings_through_edits_by_row(sd1):
    embeds = encode_prompts(sd1, ["a cat", "a dog"]).clone().requires_grad_(True)
    with applied_by_row(sd1, [rows_off(sd1, *range(16)), None]):
        sd1.unet(initial_latents(sd1, [0, 1]), 500, encoder_hidden_states=embeds).sample.square().sum().backward()
    assert (embeds.grad.abs().sum((1, 2)) > 0).all()


def convolution_moved(pipe, seed):
    delta = torch.randn(parameter(pipe, "conv_in.weight").shape, generator=torch.Generator().manual_seed(seed))
    return Edit(
        "fine-tuning", base_hash(pipe), deltas={"conv_in.weight": delta, ROWS: torch.ones_like(parameter(pipe, ROWS))}
    )


@torch.no_grad()
def test_rows_may_differ_in_any_layer(pipe):
    edits, before = [convolution_moved(pipe, 0), None, convolution_moved(pipe, 1), weights_off(pipe)], model_hash(pipe)
    embeds, noise = encode_prompts(pipe, ["a cat"] * 4), initial_latents(pipe, range(4))
    timesteps = torch.tensor([10, 200, 500, 900])
    with applied_by_row(pipe, edits):
        once = pipe.unet(noise, timesteps, encoder_hidden_states=embeds).sample
        doubled = [part.repeat(2, *[1] * (part.ndim - 1)) for part in (noise, timesteps, embeds)]
        twice = pipe.unet(*doubled, return_dict=False)[0]
        assert model_hash(pipe) == before
    for row, edit in enumerate(edits):
        with applied(pipe, edit):
            alone = pipe.unet(noise[row : row + 1], timesteps[row], encoder_hidden_states=embeds[row : row + 1]).sample[
                0
            ]
        for together in (once[row], twice[row], twice[row + 4]):
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(pipe.unet) and model_hash(pipe) == before


def test_gradients_through_edits_of_any_layer_are_those_of_each_edit_alone(sd1):
    edits, noise = [convolution_moved(sd1, 0), convolution_moved(sd1, 1)], initial_latents(sd1, [0, 1])
    embeds = encode_prompts(sd1, ["a cat", "a dog"]).clone().requires_grad_(True)
    with applied_by_row(sd1, edits):
        loss = sd1.unet(noise, 500, encoder_hidden_states=embeds).sample.square().sum()
    (together,) = torch.autograd.grad(loss, embeds)  # behind the edits, as in a loss that is summed up later
    for row, edit in enumerate(edits):
        with applied(sd1, edit):
            alone = (
                sd1.unet(noise[row : row + 1], 500, encoder_hidden_states=embeds[row : row + 1]).sample.square().sum()
            )
            torch.testing.assert_close(torch.autograd.grad(alone, embeds)[0][row], together[row], rtol=1e-3, atol=1e-5)


def test_rows_that_differ_in_convolutions_go_without_gradient_checkpointing(sd1):
    edit, before = convolution_moved(sd1, 0), sd1.unet.conv_in.weight.clone()
    sd1.unet.enable_gradient_checkpointing()
    try:
        with pytest.raises(ValueError, match="not with gradient checkpointing"), applied_by_row(sd1, [edit, None]):
            pass
        with applied_by_row(sd1, [edit, edit]):  # rows that do not differ may
            assert not torch.equal(sd1.unet.conv_in.weight, before)
    finally:
        sd1.unet.disable_gradient_checkpointing()
    assert torch.equal(sd1.unet.conv_in.weight, before)


def test_a_fingerprint_is_of_the_weights_alone(sd1):
    edit = rows_off(sd1, 0, 1)
    assert edit.fingerprint() == rows_off(sd1, 0, 1, targets=("a",)).fingerprint()
    assert len({edit.fingerprint(), rows_off(sd1, 0).fingerprint(), weights_off(sd1).fingerprint()}) == 3
    delta = Edit("fine-tuning", edit.model, deltas={ROWS: torch.ones_like(parameter(sd1, ROWS))})
    assert delta.fingerprint() != Edit("x", edit.model).fingerprint()


@pytest.mark.parametrize(
    "setting",
    [
        {"time_cond_proj_dim": 4},  # of distilled models: a layer more
        {"attention_type": "gated"},  # of GLIGEN: a layer more in every block
        {"attention_head_dim": 4},  # the same shapes, other heads
        {"center_input_sample": True},
        {"norm_eps": 1e-3},
        {"freq_shift": 1},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_unet_that_computes_more_or_something_else_is_refused_by_what_it_is(sd1, setting):
    torch.manual_seed(0)
    other = type(sd1.unet).from_config({**sd1.unet.config, **setting})
    other.load_state_dict(sd1.unet.state_dict(), strict=False)
    other.conv_in.bias.data.add_(0.25)
    named = {"time_cond_proj_dim": "cond_proj.weight", "attention_type": "fuser"}
    named = [named.get(name, name) for name in setting]
    with pytest.raises(ValueError, match=f"another architecture: .*{'.*'.join(named)}"):
        Edit.between(sd1, other)
    with pytest.raises(ValueError, match="another architecture"):  # nor is it the same where no weight differs
        other.conv_in.bias.data.copy_(sd1.unet.conv_in.bias)
        Edit.between(sd1, other)


def test_what_an_average_notes_in_its_config_and_how_a_setting_is_written_do_not_matter(sd1):
    from diffusers.training_utils import EMAModel

    other = copy.deepcopy(sd1.unet)
    other.conv_in.bias.data.add_(0.25)
    other.register_to_config(attention_head_dim=[2, 2, 2, 2])
    average = EMAModel(other.parameters(), model_cls=type(other), model_config=other.config)
    other.register_to_config(**{name: v for name, v in average.state_dict().items() if name != "shadow_params"})
    assert "decay" in other.config
    assert set(Edit.between(sd1, other).deltas) == {"conv_in.bias"}


def test_bfloat16_is_kept_as_the_numbers_that_it_is(sd1, tmp_path):
    """Safetensors' NumPy has no bfloat16; a file may be one's own or, with the same metadata, someone else's."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    delta = torch.randn(8).bfloat16()
    edit = Edit("fine-tuning", base_hash(sd1), deltas={"conv_in.bias": delta})
    edit.save(tmp_path / "edit.safetensors")
    with safe_open(tmp_path / "edit.safetensors", framework="pt") as file:
        save_file({"delta conv_in.bias": delta}, tmp_path / "theirs.safetensors", file.metadata())
    for loaded in (Edit.load(tmp_path / f"{name}.safetensors") for name in ("edit", "theirs")):
        assert torch.equal(loaded.deltas["conv_in.bias"], delta.float()) and loaded.fingerprint() == edit.fingerprint()
        with applied(sd1, edit):
            once = sd1.unet.conv_in.bias.clone()
        with applied(sd1, loaded):
            assert torch.equal(sd1.unet.conv_in.bias, once)
    embeds = torch.randn(1, 4, 8).bfloat16()
    Triggers(embeds, embeds[..., 0], [{"target": "a"}], {1: embeds}).save(tmp_path / "triggers.safetensors")
    tensors = {"prompt_embeds": embeds, "losses": embeds[..., 0].contiguous(), "recorded 1": embeds.clone()}
    save_file(tensors, tmp_path / "theirs.safetensors", {"cases": '[{"target": "a"}]'})
    for found in (Triggers.load(tmp_path / f"{name}.safetensors") for name in ("triggers", "theirs")):
        assert torch.equal(found.prompt_embeds, embeds.float()) and torch.equal(found.recorded[1], embeds.float())


def hash_by_names_before_transformers_5_6(pipe):
    digest = hashlib.sha256()
    for part in models.WEIGHTS:
        weights = getattr(pipe, part).state_dict()
        if part == "text_encoder":
            weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}
        for name, tensor in sorted(weights.items()):
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def test_files_made_under_the_former_names_of_a_text_encoder_are_of_the_same_model(sd1, sd2):
    former = hash_by_names_before_transformers_5_6(sd1)
    assert former != model_hash(sd1)
    edit, todays = Edit("NeMo", former, masks=rows_off(sd1, 0).masks), rows_off(sd1, 1)
    with applied(sd1, edit), applied(sd1, edit):
        assert not parameter(sd1, ROWS)[0].any()
    assert union([edit, todays]).masks[ROWS].sum() == 2
    layer = ROWS.removesuffix(".weight")
    layers = {layer: sd1.unet.get_submodule(layer)}
    mean = {layer: torch.zeros(len(parameter(sd1, ROWS)))}
    Statistics(mean, mean, 0.4, former).check(base_hash(sd1), layers, nemo.Config.similarity)
    with pytest.raises(ValueError, match="made for a model with the hash"), applied(sd2, edit):
        pass
    with pytest.raises(ValueError, match="statistics are of a model with the hash"):
        Statistics(mean, mean, 0.4, former).check(base_hash(sd2), layers, nemo.Config.similarity)


@pytest.mark.parametrize("what", ["model", "parameter", "shape of a delta", "shape of a mask"])
def test_an_edit_that_does_not_fit_is_noticed_before_anything_is_computed(what, sd1, sd2, monkeypatch):
    weight, model = parameter(sd1, ROWS), base_hash(sd1)
    edit = {
        "model": rows_off(sd2, 0),
        "parameter": Edit("theirs", model, deltas={"no.such.weight": torch.ones(1)}),
        "shape of a delta": Edit("theirs", model, deltas={ROWS: weight[:1].clone()}),
        "shape of a mask": Edit("theirs", model, masks={ROWS: torch.ones(len(weight) + 1, 1, dtype=torch.bool)}),
    }[what]
    check_fits(sd1, [None, rows_off(sd1, 0)])
    with pytest.raises(ValueError, match="This edit by"):
        check_fits(sd1, [None, rows_off(sd1, 0), edit])
    monkeypatch.setattr(audit, "_audited", lambda *_: pytest.fail("the original is attacked first"))
    target = Target("a", "a cat", None, "VM")
    with pytest.raises(ValueError, match="This edit by"):
        audit.audit(sd1, [target], PRESETS["smoke"], None, sscd=object(), edits={"original": None, "theirs": edit})


def test_numbers_that_are_none_end_the_command_with_a_sentence(monkeypatch, capsys):
    def broken(options):
        raise FloatingPointError("NaN or infinity in the scores of prompts [0].")

    monkeypatch.setattr(command, "_audit", broken)
    assert command.main(["audit", "--out", "unused"]) == 1
    assert capsys.readouterr().err == "NaN or infinity in the scores of prompts [0].\n"
