"""Other people's weights, in every layout in which they are handed on, become an `Edit` or a pipeline."""

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import original_layout
from diffusers import DDIMScheduler
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from dori_utils.cli.weights import edit_names, read_edit
from dori_utils.core.edits import Edit, applied
from dori_utils.core.hashes import model_hash
from dori_utils.core.models import load_pipeline


def same_weights(model, other):
    theirs = dict(other.named_parameters())
    return all(torch.equal(own, theirs[name]) for name, own in model.named_parameters())


@pytest.fixture
def theirs(sd1):
    """Another U-Net of the same architecture: one layer is fine-tuned."""
    unet = copy.deepcopy(sd1.unet)
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight.data.add_(0.25)
    return unet


@pytest.fixture
def adapted(sd1):
    """A U-Net with a LoRA on its cross-attention, and what its adapters do when they are fused."""
    unet = copy.deepcopy(sd1.unet)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_k", "to_v"], init_lora_weights="gaussian"))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return unet


def test_a_single_file_gives_the_pipeline_of_its_folder(sd1, sd1_folder, tmp_path):
    save_file(original_layout(sd1), tmp_path / "model.safetensors")
    pipe = load_pipeline(tmp_path / "model.safetensors", base=sd1_folder, device="cpu")
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(sd1, part), getattr(pipe, part)), part
        assert not getattr(pipe, part).training
        assert not any(parameter.requires_grad for parameter in getattr(pipe, part).parameters())
    assert model_hash(pipe) == model_hash(sd1) and pipe.safety_checker is None
    assert type(pipe.scheduler) is type(sd1.scheduler)
    assert (
        load_pipeline(str(tmp_path / "model.safetensors"), base=sd1_folder, dtype=torch.bfloat16).dtype
        == torch.bfloat16
    )


def test_a_single_file_without_its_base_says_what_to_give(sd1, sd1_folder, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(original_layout(sd1), file)
    with pytest.raises(OSError, match="configuration of 'stable-diffusion-v1-5/.* Give as `base`"):
        load_pipeline(file, local_files_only=True)
    with pytest.raises(ValueError, match="Unknown model 'sd1.4'. Did you mean 'sd14'"):
        load_pipeline(file, base="sd1.4")
    with pytest.raises(ValueError, match="no folder in diffusers' layout"):
        load_pipeline(file, base=sd1_folder / "unet")
    base = shutil.copytree(sd1_folder, tmp_path / "base")
    (base / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="No tokenizer file"):  # transformers would make one up
        load_pipeline(file, base=base)


def test_the_base_of_a_single_file_needs_no_weights_and_may_be_on_the_hub(sd1, sd1_folder, tmp_path, monkeypatch):
    import huggingface_hub

    ignored = shutil.ignore_patterns("*.safetensors")
    base, asked = shutil.copytree(sd1_folder, tmp_path / "base", ignore=ignored), {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda hub_id, **options: asked.update(options, id=hub_id) or str(base)
    )
    save_file(original_layout(sd1), tmp_path / "model.safetensors")
    pipe = load_pipeline(tmp_path / "model.safetensors", base="owner/model@v2", local_files_only=True, device="cpu")
    assert model_hash(pipe) == model_hash(sd1) and len(pipe.tokenizer) == len(sd1.tokenizer)
    assert (asked["id"], asked["revision"], asked["local_files_only"]) == ("owner/model", "v2", True)
    assert not any("safetensors" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


@pytest.mark.slow
def test_without_a_network_nothing_is_asked_of_one(sd1, tmp_path):
    """Diffusers itself goes online for a single file's configuration, even with local_files_only."""
    save_file(original_layout(sd1), tmp_path / "model.safetensors")
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        load = "from dori_utils.core.models import load_pipeline; load_pipeline(sys.argv[1], local_files_only=True)"
        online = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        online |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hub")}
        command = [sys.executable, "-c", f"import sys; {load}", str(tmp_path / "model.safetensors")]
        done = subprocess.run(command, env=online, capture_output=True, text=True)
        server.shutdown()
    assert "Give as `base`" in done.stderr and asked == []


def test_a_path_to_a_checkpoint_is_not_looked_for_on_the_hub():
    for name in ("mine/model.safetensors", "model.safetensors", "mine/model.ckpt"):
        with pytest.raises(FileNotFoundError, match=f"No file {name}"):
            load_pipeline(name)


def test_a_file_that_lacks_weights_or_is_none_of_a_whole_model_is_refused(sd1, sd1_folder, theirs, tmp_path):
    tensors = original_layout(sd1)
    del tensors["model.diffusion_model.out.2.weight"]
    save_file(tensors, tmp_path / "lacking.safetensors")
    with pytest.raises(OSError, match="it lacks weights"):
        load_pipeline(tmp_path / "lacking.safetensors", base=sd1_folder)
    with pytest.raises(ValueError, match="lacks weights of the U-Net"):
        read_edit(sd1, tmp_path / "lacking.safetensors")
    save_file(theirs.state_dict(), tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="no checkpoint of a whole model"):
        load_pipeline(tmp_path / "unet.safetensors", base=sd1_folder)
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    with pytest.raises(OSError, match="pickled"):
        load_pipeline(tmp_path / "model.ckpt")


def test_a_hub_id_may_bring_its_revision(monkeypatch):
    from dori_utils.core import hub

    asked = []
    monkeypatch.setattr(hub, "_download", lambda *arguments: asked.append(arguments) or (_ for _ in ()).throw(OSError))
    for name, revision in (("owner/model@v2", None), ("owner/model@refs/pr/15", None), ("owner/model", "main")):
        with pytest.raises(OSError):
            load_pipeline(name, revision=revision)
    assert asked == [("owner/model", "v2", False), ("owner/model", "refs/pr/15", False), ("owner/model", "main", False)]


@pytest.mark.parametrize("layout", ["folder", "pipeline", "file", "checkpoint", "edit"])
def test_a_unet_in_any_layout_is_the_edit_that_makes_it(layout, sd1, theirs, tmp_path):
    path = tmp_path / "theirs"
    if layout == "folder":
        theirs.save_pretrained(path)
    elif layout == "pipeline":
        theirs.save_pretrained(path / "unet")
    elif layout == "file":
        path = tmp_path / "theirs.safetensors"
        save_file(theirs.state_dict(), path)
    elif layout == "checkpoint":
        path = tmp_path / "theirs.safetensors"
        other = copy.copy(sd1)
        other.unet = theirs
        save_file(original_layout(other), path)
    else:
        path = tmp_path / "theirs.safetensors"
        Edit.between(sd1, theirs, method="theirs").save(path)
    before = model_hash(sd1)
    edit = read_edit(sd1, path)
    assert edit.method == "theirs" and list(edit.deltas) == [
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    ]
    with applied(sd1, edit):
        for name, parameter in sd1.unet.named_parameters():
            assert torch.allclose(parameter, dict(theirs.named_parameters())[name], atol=1e-6)
    assert model_hash(sd1) == before


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "folder"])
def test_a_lora_in_any_layout_is_the_edit_that_fuses_it(layout, sd1, adapted, tmp_path):
    state, path = get_peft_model_state_dict(adapted), tmp_path / "theirs.safetensors"
    if layout == "folder":
        path, about = tmp_path / "theirs", adapted.peft_config["default"].to_dict()
        type(sd1).save_lora_weights(path, unet_lora_layers=state, unet_lora_adapter_metadata=about)
    elif layout == "kohya":
        tensors = {}
        for name, tensor in state.items():
            layer, _, half = name.partition(".lora_")
            layer = f"lora_unet_{layer.replace('.', '_')}"
            tensors[f"{layer}.{KOHYA['lora_' + half]}"] = tensor
            tensors[f"{layer}.alpha"] = torch.tensor(1.0 if "attn2_to_v" in layer else 4.0)
        save_file(tensors, path)
    else:
        save_file({f"unet.{name}": tensor for name, tensor in state.items()}, path)
    before = model_hash(sd1)
    edit = read_edit(sd1, path)
    wanted = {
        n: m.get_delta_weight("default") / 2 for n, m in adapted.named_modules() if hasattr(m, "get_delta_weight")
    }
    assert set(edit.deltas) == {f"{name}.weight" for name in wanted} and len(wanted) == 64
    for name, delta in wanted.items():
        scale = 1 if layout == "diffusers" else 2  # alpha / rank; a file that does not say its alpha means the rank
        if layout == "kohya" and name.endswith("attn2.to_v"):
            scale = 0.5
        assert torch.allclose(edit.deltas[f"{name}.weight"], scale * delta, atol=1e-5), name
    assert model_hash(sd1) == before and not any("lora" in name for name, _ in sd1.unet.named_modules())


def test_a_lora_of_peft_has_its_scale_in_the_file_beside_it(sd1, tmp_path):
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_k", "ff.net.2"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(sd1.unet), config)
    model.save_pretrained(tmp_path / "theirs")
    fused = model.merge_and_unload()
    for path in (tmp_path / "theirs", tmp_path / "theirs" / "adapter_model.safetensors"):
        with applied(sd1, read_edit(sd1, path)):
            for name, parameter in fused.named_parameters():
                assert torch.allclose(parameter, sd1.unet.get_parameter(name), atol=1e-6), name
    (tmp_path / "theirs" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="No .*adapter_config.json, and without it the scale"):
        read_edit(sd1, tmp_path / "theirs")


def test_a_lora_that_a_unet_has_saved_is_the_edit_that_fuses_it(sd1, adapted, tmp_path):
    adapted.save_lora_adapter(tmp_path / "theirs")
    edit = read_edit(sd1, tmp_path / "theirs")
    adapted.fuse_lora()
    fused = {name.replace(".base_layer", ""): parameter for name, parameter in adapted.named_parameters()}
    with applied(sd1, edit):
        assert all(torch.allclose(own, fused[name], atol=1e-6) for name, own in sd1.unet.named_parameters())


@pytest.mark.parametrize("what", ["a layer of another model", "half a layer", "a bias", "a kind of its own"])
def test_a_lora_of_which_a_part_would_be_left_out_is_refused(what, sd1, adapted, tmp_path):
    state = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(adapted).items()}
    if what == "a layer of another model":
        layer = "unet.down_blocks.9.attentions.0.to_k.lora"
        state |= {f"{layer}_A.weight": torch.ones(2, 16), f"{layer}_B.weight": torch.ones(16, 2)}
    elif what == "half a layer":
        del state[next(name for name in state if "lora_B" in name)]
    elif what == "a bias":
        layer = next(name for name in state if "lora_B" in name).removesuffix(".weight")
        state[f"{layer}.bias"] = torch.ones(len(state[f"{layer}.weight"]))
    else:
        state = {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v.oft_blocks": torch.ones(2, 8, 8)}
    save_file(state, tmp_path / "theirs.safetensors")
    before = model_hash(sd1)
    named = {"a bias": "lora_B.bias", "a kind of its own": "oft_blocks", "half a layer": "to_[kv] it has down"}
    with pytest.raises(ValueError, match=f"does not fit this U-Net.*{named.get(what, 'down_blocks.9')}"):
        read_edit(sd1, tmp_path / "theirs.safetensors")
    assert model_hash(sd1) == before


KOHYA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
CONVOLUTION = "mid_block.resnets.0.conv1"


def kohya_names(state):
    """A LoRA of peft's tensors by kohya's names, without alphas."""
    renamed = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".lora_")
        renamed[f"lora_unet_{layer.replace('.', '_')}.{KOHYA.get('lora_' + kind, 'dora_scale')}"] = tensor
    return renamed


@pytest.fixture
def decomposed(sd1):
    """A U-Net with a DoRA on linear layers and on a convolution; and the weights that peft merges it to."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_k", "ff.net.2", CONVOLUTION], use_dora=True, init_lora_weights=False
    )
    model = get_peft_model(copy.deepcopy(sd1.unet), config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + torch.rand_like(parameter))
    merged = copy.deepcopy(model).merge_and_unload()
    return model, dict(merged.named_parameters())


@pytest.mark.parametrize("layout", ["kohya", "kohya in float16", "peft", "diffusers", "unet"])
def test_a_dora_is_the_delta_that_peft_merges(layout, sd1, decomposed, tmp_path):
    """Diffusers drops kohya's dora_scale: what its fuse_lora saves is the LoRA without."""
    model, merged = decomposed
    state, path, precision = get_peft_model_state_dict(model), tmp_path / "theirs.safetensors", 1e-6
    state = {name.removeprefix("base_model.model."): tensor.clone() for name, tensor in state.items()}
    if layout == "peft":
        path = tmp_path / "theirs"
        model.save_pretrained(path)
    elif layout == "unet":
        path = tmp_path / "theirs"
        sd1_unet = copy.deepcopy(sd1.unet)
        sd1_unet.add_adapter(model.peft_config["default"])
        mine, own = dict(sd1_unet.named_parameters()), dict(model.base_model.model.named_parameters())
        for name, parameter in mine.items():
            parameter.data.copy_(own[name].data)
        sd1_unet.save_lora_adapter(path)
    elif layout == "diffusers":
        about = model.peft_config["default"].to_dict()
        path = tmp_path / "theirs"
        type(sd1).save_lora_weights(path, unet_lora_layers=state, unet_lora_adapter_metadata=about)
    else:
        state, alpha = kohya_names(state), torch.tensor(6.0)
        if layout.endswith("float16"):
            state, precision = {name: tensor.half() for name, tensor in state.items()}, 0.02
        for name in [name for name in state if name.endswith("dora_scale")]:
            scale, layer = state[name], name.removesuffix(".dora_scale")
            trailing = state[f"{layer}.lora_down.weight"].ndim - 1
            state |= {name: scale.flatten().reshape(-1, *[1] * trailing), f"{layer}.alpha": alpha.clone()}
        save_file(state, path)
    before = model_hash(sd1)
    edit = read_edit(sd1, path)
    changed = [name for name, own in sd1.unet.named_parameters() if not torch.equal(own, merged[name])]
    assert set(edit.deltas) == set(changed) and f"{CONVOLUTION}.weight" in changed and len(changed) == 49
    for name in changed:
        wanted = merged[name] - sd1.unet.get_parameter(name)
        assert (edit.deltas[name] - wanted).abs().max() <= precision * merged[name].abs().max(), name
    assert model_hash(sd1) == before


def test_of_a_lycoris_dora_the_magnitudes_may_be_of_columns(sd1, decomposed, tmp_path):
    """LyCORIS before its wd_on_out: dora_scale (1, columns, ...) where the weight is (rows, columns, ...)."""
    model, _ = decomposed
    state = {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(model).items()}
    layers = {name.removesuffix(".lora_A.weight") for name in state if name.endswith("lora_A.weight")}
    state, scales = kohya_names(state), {}
    for layer in layers:
        weight = sd1.unet.get_submodule(layer).weight
        scales[layer] = 0.5 + torch.rand(1, weight.shape[1], *[1] * (weight.ndim - 2))
        state[f"lora_unet_{layer.replace('.', '_')}.dora_scale"] = scales[layer]
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, tmp_path / "theirs.safetensors")
    with applied(sd1, read_edit(sd1, tmp_path / "theirs.safetensors")):
        for layer, scale in scales.items():
            weight = sd1.unet.get_submodule(layer).weight
            norms = weight.transpose(0, 1).flatten(1).norm(dim=1)
            torch.testing.assert_close(norms, scale.flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["unknown layer", "other size", "lacking"])
def test_a_dora_whose_magnitudes_do_not_fit_is_refused(what, sd1, decomposed, tmp_path):
    model, _ = decomposed
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    name = next(name for name in state if "magnitude" in name)
    magnitude = state.pop(name)
    if what == "unknown layer":
        state[name.replace("to_k", "to_q")] = magnitude
    elif what == "other size":
        state[name] = magnitude[:-1].clone()
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match="The DoRA in .* (has magnitudes of layers|has . magnitudes|lacks magnitudes)"):
        read_edit(sd1, tmp_path)


def test_of_a_pipelines_folder_the_unet_counts_and_not_a_checkpoint_beside_it(sd1, theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs" / "unet")
    save_file(original_layout(sd1), tmp_path / "theirs" / "v1-5-pruned.safetensors")  # as on the Hub
    assert list(read_edit(sd1, tmp_path / "theirs").deltas) == [
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    ]


def test_a_folder_with_one_file_in_it_stands_for_the_file(sd1, theirs, tmp_path):
    edit = Edit.between(sd1, theirs, method="theirs")
    edit.save(tmp_path / "a.safetensors")
    assert read_edit(sd1, tmp_path).fingerprint() == edit.fingerprint()
    edit.save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="holds 2 safetensors files: give the one"):
        read_edit(sd1, tmp_path)


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("also_unet", [True, False])
@pytest.mark.parametrize("projections", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "out_proj"]])
def test_a_lora_of_the_text_encoder_is_read_whole(layout, also_unet, projections, sd1, adapted, tmp_path):
    """Of attention that is adapted without out_proj, diffusers forgets all."""
    text = {}
    for projection in projections:
        layer = f"text_model.encoder.layers.0.self_attn.{projection}"
        text |= {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    unet = get_peft_model_state_dict(adapted) if also_unet else {}
    if layout == "diffusers":
        layers = {"unet_lora_layers": unet, "text_encoder_lora_layers": text}
        type(sd1).save_lora_weights(tmp_path, **{name: layer for name, layer in layers.items() if layer})
    elif layout == "kohya":
        text = {name.replace("unet", "te", 1): tensor for name, tensor in kohya_names(text).items()}
        save_file(kohya_names(unet) | text, tmp_path / "theirs.safetensors")
    else:
        save_file({f"base_model.model.{n}": t for n, t in (unet | text).items()}, tmp_path / "theirs.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    before = model_hash(sd1)
    edit = read_edit(sd1, tmp_path)
    of_text = {name: delta for name, delta in edit.deltas.items() if name.startswith("text_encoder.")}
    wanted = {f"text_encoder.encoder.layers.0.self_attn.{projection}.weight" for projection in projections}
    assert of_text.keys() == wanted and all((delta == 2).all() for delta in of_text.values())
    assert len(edit.deltas) == len(wanted) + 64 * also_unet
    assert edit.parts == (("unet", "text_encoder") if also_unet else ("text_encoder",))
    assert model_hash(sd1) == before


def changed_part(pipe, part):
    """Another of the pipeline's parts, in a single number, word or setting."""
    other = copy.deepcopy(getattr(pipe, part.split()[0]))
    if part in ("text_encoder", "vae"):
        next(other.parameters()).data.view(-1)[0] += 0.01
    elif part == "text_encoder setting":
        other.config.hidden_act = "gelu"
    elif part == "vae setting":
        other.register_to_config(scaling_factor=0.5)
    elif part == "scheduler":
        other = DDIMScheduler.from_config(other.config)
    elif part == "scheduler setting":
        other.register_to_config(prediction_type="v_prediction")
    elif part == "tokenizer setting":
        other.pad_token = "!"
    return other


@pytest.mark.parametrize("also_unet", [True, False])
@pytest.mark.parametrize("part", ["text_encoder", "vae", "vae setting", "scheduler", "scheduler setting"])
def test_whatever_a_pipeline_is_changed_in_is_part_of_the_edit(part, also_unet, sd1, theirs, tmp_path):
    other, changed = copy.copy(sd1), part.split()[0]
    if also_unet:
        other.unet = theirs
    setattr(other, changed, changed_part(sd1, part))
    other.save_pretrained(tmp_path / "theirs")
    before = model_hash(sd1)
    edit = read_edit(sd1, tmp_path / "theirs")
    assert edit.parts == (("unet", changed) if also_unet else (changed,)) and model_hash(sd1) == before
    with applied(sd1, edit):
        assert model_hash(sd1) == model_hash(other)
        assert sd1.vae.config.scaling_factor == other.vae.config.scaling_factor
        assert type(sd1.scheduler) is type(other.scheduler)
        assert sd1.scheduler.config.prediction_type == other.scheduler.config.prediction_type
    if also_unet:
        shutil.rmtree(tmp_path / "theirs" / "unet")  # what edits the text encoder alone may be published alone
        assert read_edit(sd1, tmp_path / "theirs").parts == (changed,)


@pytest.mark.parametrize("also_unet", [True, False])
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("text_encoder setting", "The other text encoder is of another architecture: its hidden_act is gelu"),
        ("tokenizer setting", "differs from the pipeline in its tokenizer, and"),
    ],
)
def test_a_pipeline_that_is_changed_in_what_no_edit_holds_is_refused_by_it(
    part, said, also_unet, sd1, theirs, tmp_path
):
    other = copy.copy(sd1)
    if also_unet:
        other.unet = theirs
    setattr(other, part.split()[0], changed_part(sd1, part))
    other.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=rf"{said}.* --model .*theirs"):
        read_edit(sd1, tmp_path / "theirs")


def test_a_part_of_another_kind_is_named(sd1, tiny_testbed, tmp_path):
    tiny_testbed.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="in its vae, and"):
        read_edit(sd1, tmp_path / "theirs")
    (tmp_path / "theirs" / "text_encoder_2").mkdir()
    with pytest.raises(ValueError, match="of another kind than the pipeline: it has a text_encoder_2"):
        read_edit(sd1, tmp_path / "theirs")


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float16, torch.float16),
    ],
)
def test_the_precision_in_which_a_pipeline_was_saved_is_no_change(saved, loaded, sd1, sd1_folder, theirs, tmp_path):
    other = copy.copy(sd1)
    other.unet, other.text_encoder, other.vae = (
        copy.deepcopy(part).to(saved) for part in (theirs, sd1.text_encoder, sd1.vae)
    )
    other.save_pretrained(tmp_path / "theirs")
    base = load_pipeline(sd1_folder, dtype=loaded, device="cpu")
    changed = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    assert read_edit(base, tmp_path / "theirs").deltas[changed].mean() == pytest.approx(0.25, abs=1e-2)


def test_a_part_that_cannot_be_compared_is_named(sd1, theirs, tmp_path):
    other = copy.copy(sd1)
    other.unet = theirs
    other.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="text_encoder cannot be compared (?s:.*)give its folder alone: .*unet"):
        read_edit(sd1, tmp_path / "theirs")
    with pytest.warns(
        UserWarning, match="taken alone, as asked for. The pipeline around it may differ in more: .*text"
    ):
        assert len(read_edit(sd1, tmp_path / "theirs" / "unet").deltas) == 1


def test_a_unets_own_folder_is_taken_alone_with_a_warning_where_its_pipeline_differs_in_more(sd1, theirs, tmp_path):
    other = copy.copy(sd1)
    other.unet = theirs
    other.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings(action="error"):
        assert len(read_edit(sd1, tmp_path / "theirs" / "unet").deltas) == 1
    changed_part(sd1, "text_encoder").save_pretrained(tmp_path / "theirs" / "text_encoder")
    with pytest.warns(UserWarning, match="taken alone, .*differs in its text_encoder, too.*to take all: .*theirs"):
        assert len(read_edit(sd1, tmp_path / "theirs" / "unet").deltas) == 1
    with pytest.warns(UserWarning, match="text_encoder is taken alone, .*differs in its unet, too"):
        assert read_edit(sd1, tmp_path / "theirs" / "text_encoder").parts == ("text_encoder",)
    DDIMScheduler.from_config(sd1.scheduler.config).save_pretrained(tmp_path / "ddim")
    assert read_edit(sd1, tmp_path / "ddim").parts == ("scheduler",)
    (tmp_path / "ddim" / "scheduler_config.json").unlink()
    (tmp_path / "ddim" / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match="holds BertModel, which is no part of the pipeline"):
        read_edit(sd1, tmp_path / "ddim")


@pytest.mark.parametrize("also_unet", [True, False])
@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_whatever_a_checkpoint_is_changed_in_is_part_of_the_edit(part, also_unet, sd1, theirs, tmp_path):
    other = copy.copy(sd1)
    if also_unet:
        other.unet = theirs
    setattr(other, part, changed_part(sd1, part))
    save_file(original_layout(other), tmp_path / "theirs.safetensors")
    edit = read_edit(sd1, tmp_path / "theirs.safetensors")
    assert edit.parts == (("unet", part) if also_unet else (part,)) and len(edit.deltas) == 1 + also_unet
    with applied(sd1, edit):
        assert model_hash(sd1) == model_hash(other)


def test_of_a_checkpoint_counts_what_it_holds_and_says(sd1, theirs, tmp_path):
    """A U-Net alone, under a checkpoint's names; half precision; and what the U-Net predicts."""
    other, file = copy.copy(sd1), tmp_path / "theirs.safetensors"
    other.unet = theirs
    tensors = original_layout(other)
    save_file({name: t for name, t in tensors.items() if name.startswith("model.diffusion_model.")}, file)
    alone = read_edit(sd1, file)
    save_file(tensors, file, {"modelspec.prediction_type": "epsilon"})
    assert read_edit(sd1, file).fingerprint() == alone.fingerprint() and len(alone.deltas) == 1
    save_file({name: tensor.half() for name, tensor in tensors.items()}, file)
    assert alone.deltas.keys() <= read_edit(sd1, file).deltas.keys()
    save_file(tensors, file, {"modelspec.prediction_type": "v"})
    other = read_edit(sd1, file)
    assert other.parts == ("unet", "scheduler")
    with applied(sd1, other):
        assert sd1.scheduler.config.prediction_type == "v_prediction"
        assert type(sd1.scheduler).__name__ == "PNDMScheduler"


def test_a_checkpoint_with_a_part_of_another_kind_is_refused(sd1, tiny_testbed, theirs, tmp_path):
    """The tiny testbed's U-Net is that of SD 1.x, but its VAE is an AutoencoderTiny."""
    file = tmp_path / "theirs.safetensors"
    save_file(original_layout(sd1), file)
    with pytest.raises(ValueError, match="another architecture than the pipeline's, .*it has more, first_stage_model"):
        read_edit(tiny_testbed, file)
    tensors = original_layout(sd1)
    del tensors["cond_stage_model.transformer.text_model.final_layer_norm.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="lacks weights of the text encoder: text_encoder.final_layer_norm.weight"):
        read_edit(sd1, file)


def test_weights_of_a_checkpoints_unet_that_no_layer_takes_are_named(sd1, sd1_folder, theirs, tmp_path):
    other, file = copy.copy(sd1), tmp_path / "theirs.safetensors"
    other.unet = theirs
    extra = ["time_embed.cond_proj.weight", "middle_block.1.transformer_blocks.0.fuser.linear.weight"]
    extra = {f"model.diffusion_model.{name}": torch.ones(2) for name in extra}
    save_file(original_layout(other) | extra, file)
    for read in (lambda: read_edit(sd1, file), lambda: load_pipeline(file, base=sd1_folder, device="cpu")):
        with pytest.raises(ValueError, match="it has more, .*fuser.linear.weight, .*cond_proj.weight"):
            read()


def test_of_a_unets_file_what_its_config_says_counts(sd1, theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
    assert len(read_edit(sd1, file).deltas) == 1
    theirs.register_to_config(attention_head_dim=4)
    theirs.save_config(tmp_path / "theirs")
    for path in (file, tmp_path / "theirs"):
        with pytest.raises(ValueError, match="another architecture: its attention_head_dim is 4, here 2"):
            read_edit(sd1, path)
    save_file(theirs.state_dict() | {"cond_proj.weight": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="(?s)another architecture .*cond_proj.weight"):
        read_edit(sd1, tmp_path / "more.safetensors")


def test_of_a_checkpoint_with_an_average_it_is_said_which_is_taken(sd1, sd1_folder, theirs, tmp_path):
    other, file = copy.copy(sd1), tmp_path / "theirs.safetensors"
    other.unet = theirs
    tensors = original_layout(other)
    flat = {name: name.removeprefix("model.").replace(".", "") for name in tensors if name.startswith("model.d")}
    save_file(tensors | {f"model_ema.{average}": tensors[name] + 1 for name, average in flat.items()}, file)
    with pytest.warns(UserWarning, match="two U-Nets: the trained weights .* are taken, and their average"):
        assert len(read_edit(sd1, file).deltas) == 1
    with pytest.warns(UserWarning, match="two U-Nets"):
        assert same_weights(load_pipeline(file, base=sd1_folder, device="cpu").unet, theirs)
    save_file(tensors, file)
    with warnings.catch_warnings(action="error"):
        read_edit(sd1, file)


def test_an_edit_of_another_base_is_refused_as_it_is_read(sd1, sd2, tmp_path):
    other = copy.deepcopy(sd2.unet)
    other.conv_in.bias.data.add_(1)
    Edit.between(sd2, other).save(tmp_path / "theirs.safetensors")
    with pytest.raises(ValueError, match="made for a model with the hash"):
        read_edit(sd1, tmp_path / "theirs.safetensors")


def test_names_that_are_the_same_are_told_apart_by_their_folders(tmp_path):
    paths = ["esd/run 1/unet_ema", "esd/run 2/unet_ema", "uce/unet", "a/uce.safetensors", "mine.safetensors"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch() if path.endswith("safetensors") else (tmp_path / path).mkdir()
    named = edit_names([tmp_path / path for path in paths])
    assert named == ["run 1/unet_ema", "run 2/unet_ema", f"{tmp_path.name}/uce", "a/uce", "mine"]
    assert edit_names([tmp_path / "esd/run 1/unet_ema", tmp_path / "mine.safetensors"]) == ["unet_ema", "mine"]
    assert edit_names([]) == []
    for same in ([tmp_path / "uce", tmp_path / "uce" / "unet"], [tmp_path / "mine.safetensors"] * 2):
        with pytest.raises(ValueError, match="Two mitigations are called"):
            edit_names(same)


def test_what_is_no_weights_says_what_can_be_given(sd1, sd2, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no .*nothing.safetensors. Give a file of Edit.save, a U-Net"):
        read_edit(sd1, tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(OSError, match="not a readable safetensors file"):
        read_edit(sd1, tmp_path / "text.safetensors")
    save_file({"strange": torch.ones(1)}, tmp_path / "strange.safetensors")
    with pytest.raises(ValueError, match="unknown kind, such as strange"):
        read_edit(sd1, tmp_path / "strange.safetensors")
    (tmp_path / "lora.ckpt").write_bytes(b"\x80\x04.")
    with pytest.raises(OSError, match="pickled"):
        read_edit(sd1, tmp_path / "lora.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no U-Net"):
        read_edit(sd1, tmp_path / "empty")
    sd2.unet.save_pretrained(tmp_path / "sd2")
    with pytest.raises(ValueError, match="another architecture"):
        read_edit(sd1, tmp_path / "sd2")
    with pytest.raises(ValueError, match="the same weights"):
        sd1.unet.save_pretrained(tmp_path / "same")
        read_edit(sd1, tmp_path / "same")


def test_weights_that_are_no_numbers_are_refused(sd1, theirs, adapted, tmp_path):
    """A U-Net with NaN draws black pictures, which an audit would take for forgetting."""
    theirs.conv_out.bias.data[0] = float("nan")
    save_file(theirs.state_dict(), tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="NaN or infinity in its conv_out.bias"):
        read_edit(sd1, tmp_path / "unet.safetensors")
    state = {f"unet.{name}": tensor.clone() for name, tensor in get_peft_model_state_dict(adapted).items()}
    next(iter(state.values()))[0] = float("inf")
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="NaN or infinity in .*weight: the U-Net"):
        read_edit(sd1, tmp_path / "lora.safetensors")
