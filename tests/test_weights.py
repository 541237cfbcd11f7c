"""Other people's weights, in every layout in which they are handed on, become an `Edit` or a pipeline."""

import copy
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from dori_utils.edits import Edit, applied
from dori_utils.models import load_pipeline, model_hash
from dori_utils.weights import read_edit

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
OUTSIDE = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
OUTSIDE |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
VAE = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "group_norm": "norm"}
VAE |= {"mid_block.attentions.0": "mid.attn_1", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE |= {"downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_norm_out": "norm_out"}
VAE |= {"conv_shortcut": "nin_shortcut", "resnets": "block", "down_blocks": "down"}


def renamed(name, names):
    for old, new in names.items():
        name = re.sub(rf"(^|\.){re.escape(old)}\.", rf"\g<1>{new}.", name)
    return name


def original_unet_name(name):
    """The name of a parameter of a U-Net with two layers a block, in Stable Diffusion's own code."""
    found = re.match(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name)
    if not found:
        return renamed(name, OUTSIDE)
    part, number, kind, layer, rest = found.groups()
    rest, layer = renamed(rest, RESNET) if kind == "resnets" else rest, int(layer)
    if part == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{rest}"
    block, place = 3 * int(number), {"resnets": 0, "attentions": 1}.get(kind)
    if part == "down_blocks":
        return (
            f"input_blocks.{block + layer + 1}.{place}.{rest}"
            if place is not None
            else (f"input_blocks.{block + 3}.0.op.{rest.removeprefix('conv.')}")
        )
    if place is None:
        return f"output_blocks.{block + 2}.{1 if number == '0' else 2}.{rest}"  # the first up block has no attention
    return f"output_blocks.{block + layer}.{place}.{rest}"


def original_vae_name(name, up_blocks):
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{up_blocks - 1 - int(found[1])}", name)
    return renamed(name, VAE)


def original_layout(pipe):
    """Name → tensor of a whole pipeline, as Stable Diffusion 1.x was published."""
    tensors = {f"model.diffusion_model.{original_unet_name(n)}": t for n, t in pipe.unet.state_dict().items()}
    for name, tensor in pipe.vae.state_dict().items():
        new = original_vae_name(name, len(pipe.vae.config.up_block_types))
        is_conv = ".mid.attn_1." in f".{new}" and new.endswith("weight") and tensor.ndim == 2
        tensors[f"first_stage_model.{new}"] = tensor[..., None, None] if is_conv else tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


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
        script = (
            "import sys; from dori_utils.models import load_pipeline as load; load(sys.argv[1], local_files_only=True)"
        )
        online = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        online |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hub")}
        command = [sys.executable, "-c", script, str(tmp_path / "model.safetensors")]
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
    from dori_utils import models

    asked = []
    monkeypatch.setattr(
        models, "_download", lambda *arguments: asked.append(arguments) or (_ for _ in ()).throw(OSError)
    )
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
        names = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
        tensors = {}
        for name, tensor in state.items():
            layer, _, half = name.partition(".lora_")
            layer = f"lora_unet_{layer.replace('.', '_')}"
            tensors[f"{layer}.{names['lora_' + half]}"] = tensor
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
        state = {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v.diff": torch.ones(16, 16)}
    save_file(state, tmp_path / "theirs.safetensors")
    before = model_hash(sd1)
    with pytest.raises(ValueError, match="does not fit this U-Net|diffusers does not read"):
        read_edit(sd1, tmp_path / "theirs.safetensors")
    assert model_hash(sd1) == before


@pytest.mark.parametrize("name", ["mid_block.x.dora_scale", "mid_block.x.lora_magnitude_vector"])
def test_a_dora_is_refused_since_it_is_more_than_a_delta(name, sd1, adapted, tmp_path):
    """The first name is kohya's, which diffusers drops with a warning; the second is peft's, which it takes."""
    state = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(adapted).items()}
    save_file(state | {f"unet.{name}": torch.ones(1)}, tmp_path / "theirs.safetensors")
    with pytest.raises(ValueError, match="is a DoRA"):
        read_edit(sd1, tmp_path / "theirs.safetensors")


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


def test_a_lora_that_changes_the_text_encoder_is_refused(sd1, adapted, tmp_path):
    text = {"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}
    text |= {"text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(16, 2)}
    layers = {"unet_lora_layers": get_peft_model_state_dict(adapted), "text_encoder_lora_layers": text}
    type(sd1).save_lora_weights(tmp_path, **layers)
    before = model_hash(sd1)
    with pytest.raises(ValueError, match="text encoder"):
        read_edit(sd1, tmp_path)
    assert model_hash(sd1) == before


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
