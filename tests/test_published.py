"""What authors hand on: each method's files, made by hand from their key names, are read to the bit, or refused.

A form is called by its method and its layout. Its builder writes it into a folder and says what it holds: weights, by
the names that an `Edit` has for them; or deltas; or masks; or why it is refused.
"""

import copy
import json
import shutil

import pytest
import torch
from conftest import original_layout, original_unet_name
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from dori_utils.cli.weights import read_edit
from dori_utils.core.edits import applied
from dori_utils.core.hashes import model_hash
from dori_utils.core.parts import named_parameters

VALUES = "attn2.to_v.weight"
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"
FORMS = {}


def form(name):
    """Adds a builder to the forms."""
    return lambda build: FORMS.setdefault(name, build)


def tuned(pipe, chosen=lambda name: True, dtype=torch.float32, part="unet"):
    """Name → other weights, of those parameters of a part that are chosen; some far from the pipeline's own."""
    torch.manual_seed(3)
    found = {}
    for name, parameter in getattr(pipe, part).named_parameters():
        if chosen(name):
            found[name] = (parameter * (1 + torch.randn_like(parameter))).to(dtype)
    return found


def attn2(name):
    return "attn2" in name


def keys_and_values(name):
    return "attn2.to_k" in name or "attn2.to_v" in name


def prefixed(weights, prefix, renamed=lambda name: name):
    return {prefix + renamed(name): tensor for name, tensor in weights.items()}


def in_edit(weights, part):
    return {f"{part}.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}


def with_text_model(weights):
    """As transformers before 5.6 called them."""
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}


# --- Weights of some layers -----------------------------------------------------------------------------------------


@form("ESD-x: safetensors of cross-attention, bfloat16")
def _(pipe, folder):
    weights = tuned(pipe, attn2, torch.bfloat16)
    save_file(weights, folder / "esd-x-from-x-esdx.safetensors")
    return folder / "esd-x-from-x-esdx.safetensors", {"weights": weights}


@form("ESD-u: safetensors of all but cross-attention, in its folder")
def _(pipe, folder):
    weights = tuned(pipe, lambda name: "attn2" not in name and "norm" not in name, torch.bfloat16)
    save_file(weights, folder / "esd-x-from-x-esdu.safetensors")
    return folder, {"weights": weights}


@form("UCE: safetensors of keys and values")
def _(pipe, folder):
    weights = tuned(pipe, keys_and_values)
    assert len(weights) == 32
    save_file(weights, folder / "uce.safetensors")
    return folder / "uce.safetensors", {"weights": weights}


@form("UCE: pickled, names from unet. on, float16")
def _(pipe, folder):
    weights = tuned(pipe, keys_and_values, torch.float16)
    torch.save(prefixed(weights, "unet."), folder / "erased.pt")
    return folder / "erased.pt", {"weights": weights}


@form("Concept Ablation: delta.bin of diffusers")
def _(pipe, folder):
    weights = tuned(pipe, keys_and_values)
    torch.save({"unet": weights}, folder / "delta.bin")
    return folder / "delta.bin", {"weights": weights}


@form("Concept Ablation: delta.bin with embeddings")
def _(pipe, folder):
    weights, text = tuned(pipe, keys_and_values), tuned(pipe, part="text_encoder")
    held = with_text_model(text) | {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    torch.save({"unet": weights, "text_encoder": held}, folder / "delta.bin")
    return folder / "delta.bin", {"weights": weights | in_edit(text, "text_encoder")}


@form("Concept Ablation: delta_epoch=000004.ckpt of CompVis")
def _(pipe, folder):
    weights = tuned(pipe, keys_and_values)
    tensors = prefixed(weights, "model.diffusion_model.", original_unet_name)
    torch.save({"state_dict": tensors}, folder / "delta_epoch=000004.ckpt")
    return folder / "delta_epoch=000004.ckpt", {"weights": weights}


@form("Concept Ablation: delta of CompVis with a new token")
def _(pipe, folder):
    tensors = prefixed(tuned(pipe, keys_and_values), "model.diffusion_model.", original_unet_name)
    torch.save({"state_dict": tensors | {"embed": torch.ones(1, 16)}}, folder / "delta_epoch=000004.ckpt")
    return folder / "delta_epoch=000004.ckpt", {"refused": "it has more, embed, and no layer takes that"}


@form("CompVis' names without a prefix")
def _(pipe, folder):
    weights = tuned(pipe, attn2)
    torch.save(prefixed(weights, "", original_unet_name), folder / "compvis.pt")
    return folder / "compvis.pt", {"weights": weights}


@form("names from module. on, of parallel training")
def _(pipe, folder):
    weights = tuned(pipe, attn2, torch.float16)
    torch.save(prefixed(weights, "module."), folder / "parallel.pth")
    return folder / "parallel.pth", {"weights": weights}


@form("names from model. on, in a model_state_dict")
def _(pipe, folder):
    weights = tuned(pipe, attn2)
    torch.save({"model_state_dict": prefixed(weights, "model."), "epoch": 3}, folder / "model.pt")
    return folder / "model.pt", {"weights": weights}


# --- A whole U-Net, a whole model -----------------------------------------------------------------------------------


@form("ESD of 2023: diffusers-*.pt, the whole U-Net")
def _(pipe, folder):
    weights = tuned(pipe)
    torch.save(weights, folder / "diffusers-esd.pt", _use_new_zipfile_serialization=False)
    return folder / "diffusers-esd.pt", {"weights": weights}


@form("SalUn: compvis-*.pt, the whole model with its noise schedule")
def _(pipe, folder):
    other = copy.copy(pipe)
    other.unet = copy.deepcopy(pipe.unet)
    other.unet.load_state_dict(weights := tuned(pipe))
    schedule = {"betas": pipe.scheduler.betas, "alphas_cumprod": pipe.scheduler.alphas_cumprod}
    torch.save(original_layout(other) | schedule, folder / "compvis-salun.pt")
    return folder / "compvis-salun.pt", {"weights": weights}


@form("SalUn: its mask")
def _(pipe, folder):
    torch.save({name: (w > 0).float() for name, w in tuned(pipe).items()}, folder / "with_0.5.pt")
    return folder / "with_0.5.pt", {"refused": "nothing but 0 and 1: masks, not weights"}


@form("EraseDiff: .pt of the whole U-Net in CompVis' names, float16")
def _(pipe, folder):
    weights = tuned(pipe, dtype=torch.float16)
    torch.save(prefixed(weights, "model.diffusion_model.", original_unet_name), folder / "erasediff.pt")
    return folder / "erasediff.pt", {"weights": weights}


@form("RECE: .pt of the whole U-Net")
def _(pipe, folder):
    weights = tuned(pipe)
    torch.save(weights, folder / "rece.pt")
    return folder / "rece.pt", {"weights": weights}


@form("concept-prune: .pt of the whole U-Net with neurons at zero, float16")
def _(pipe, folder):
    weights = {name: parameter.half() for name, parameter in pipe.unet.named_parameters()}
    for name in weights:
        if name.endswith("ff.net.2.weight"):
            weights[name] = weights[name].clone()
            weights[name][:, ::3] = 0
    torch.save(weights, folder / "pruned.pt")
    return folder / "pruned.pt", {"weights": weights}


@form("Selective Amnesia: Lightning's .ckpt with its optimizer")
def _(pipe, folder):
    tensors = prefixed(tuned(pipe), "model.diffusion_model.", original_unet_name)
    states = [{"state": {0: {"exp_avg": torch.zeros(2)}}}]
    torch.save({"state_dict": tensors, "optimizer_states": states, "epoch": 1}, folder / "last.ckpt")
    return folder / "last.ckpt", {"refused": "it has more, optimizer_states.0.state.0.exp_avg"}


def other_pipeline(pipe, folder, weights, **parts):
    other = copy.copy(pipe)
    other.unet = copy.deepcopy(pipe.unet)
    other.unet.load_state_dict(weights, strict=False)
    for part, own in parts.items():
        setattr(other, part, own)
    other.save_pretrained(folder)
    return folder


@form("MACE: a pipeline's folder")
def _(pipe, folder):
    weights = tuned(pipe, attn2)
    return other_pipeline(pipe, folder / "mace", weights), {"weights": weights}


@form("SISS: a U-Net's folder")
def _(pipe, folder):
    weights = tuned(pipe)
    return other_pipeline(pipe, folder / "siss", weights) / "unet", {"weights": weights}


@form("Wen et al.: a pipeline's folder with .bin alone")
def _(pipe, folder):
    weights = tuned(pipe)
    path = other_pipeline(pipe, folder / "wen", weights)
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (path / part).glob("*.safetensors")
        torch.save(load_file(file), file.with_name("pytorch_model.bin" if "text" in part else f"{file.stem}.bin"))
        file.unlink()
    return path, {"weights": weights, "warns": "pickled and taken: tensors only; no code of the file is run"}


@form("a pipeline's folder with *.fp16.safetensors alone")
def _(pipe, folder):
    path = other_pipeline(pipe, folder / "half", tuned(pipe, attn2))
    held = {}
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (path / part).glob("*.safetensors")
        tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(tensors, file.with_name(f"{file.stem}.fp16.safetensors"))
        file.unlink()
        held |= tensors if part == "unet" else in_edit(tensors, part)
    return path, {"weights": held, "warns": r"fp16.safetensors is taken, as it is all that is there"}


# --- Text encoders, and other parts ---------------------------------------------------------------------------------


@form("AdvUnlearn: TextEncoder-*.pt, with other names of the same weights")
def _(pipe, folder):
    text = tuned(pipe, part="text_encoder")
    tensors = prefixed(with_text_model(text), "text_encoder.")
    tensors |= {"embedding.weight": tensors["text_encoder.text_model.embeddings.token_embedding.weight"]}
    torch.save(tensors, folder / "TextEncoder-text_encoder_full-epoch_999.pt")
    return folder / "TextEncoder-text_encoder_full-epoch_999.pt", {"weights": in_edit(text, "text_encoder")}


@form("AdvUnlearn: a text encoder's folder")
def _(pipe, folder):
    text = copy.deepcopy(pipe.text_encoder)
    text.load_state_dict(weights := tuned(pipe, part="text_encoder"))
    text.save_pretrained(folder / "text_encoder_unlearned")
    return folder / "text_encoder_unlearned", {"weights": in_edit(weights, "text_encoder")}


@form("a text encoder in bare names, safetensors")
def _(pipe, folder):
    text = tuned(pipe, lambda name: "mlp" in name, torch.float16, "text_encoder")
    save_file({name.removeprefix("text_model."): t for name, t in text.items()}, folder / "model.safetensors")
    return folder / "model.safetensors", {"weights": in_edit(text, "text_encoder")}


@form("a VAE in CompVis' names")
def _(pipe, folder):
    other = copy.copy(pipe)
    other.vae = copy.deepcopy(pipe.vae)
    other.vae.load_state_dict(weights := tuned(pipe, part="vae"))
    held = {name: t for name, t in original_layout(other).items() if name.startswith("first_stage_model.")}
    save_file(held, folder / "vae.safetensors")
    return folder / "vae.safetensors", {"weights": in_edit(weights, "vae")}


# --- Adapters -------------------------------------------------------------------------------------------------------


def eighths(*shape):
    """Numbers whose products and sums float32 holds as they are."""
    return torch.randint(-8, 9, shape) / 8


def flat(name, part="unet"):
    return f"lora_{part}_{name.replace('.', '_')}"


@form("SPM: safetensors of kohya's names with alphas, float16")
def _(pipe, folder):
    tensors, deltas = {}, {}
    for name in ("attn2.to_q", "ff.net.2", "ff.net.0.proj"):
        layer = f"mid_block.attentions.0.transformer_blocks.0.{name}"
        rows, columns = pipe.unet.get_submodule(layer).weight.shape
        up, down = eighths(rows, 1), eighths(1, columns)
        tensors |= {f"{flat(layer)}.lora_up.weight": up.half(), f"{flat(layer)}.lora_down.weight": down.half()}
        tensors[f"{flat(layer)}.alpha"] = torch.tensor(0.5)
        deltas[f"{layer}.weight"] = 0.5 * up @ down
    save_file(tensors, folder / "spm.safetensors")
    return folder / "spm.safetensors", {"deltas": deltas}


@form("Forget-Me-Not: pytorch_lora_weights.bin of old attention processors")
def _(pipe, folder):
    tensors, deltas = {}, {}
    for ours, theirs in (("to_q", "to_q_lora"), ("to_out.0", "to_out_lora")):
        rows, columns = pipe.unet.get_submodule(f"{MIDDLE}.{ours}").weight.shape
        up, down = eighths(rows, 4), eighths(4, columns)
        name = f"unet.{MIDDLE}.processor.{theirs}"
        tensors |= {f"{name}.up.weight": up, f"{name}.down.weight": down}
        deltas[f"{MIDDLE}.{ours}.weight"] = up @ down
    torch.save(tensors, folder / "pytorch_lora_weights.bin")
    return folder, {"deltas": deltas}


@form("kohya: a LoRA of U-Net and text encoder")
def _(pipe, folder):
    layer = "text_model.encoder.layers.1.mlp.fc1"
    up, down, rows, columns = eighths(32, 2), eighths(2, 16), eighths(16, 2), eighths(2, 16)
    tensors = {f"{flat(layer, 'te')}.lora_up.weight": up, f"{flat(layer, 'te')}.lora_down.weight": down}
    tensors |= {f"{flat(MIDDLE)}_to_v.lora_up.weight": rows, f"{flat(MIDDLE)}_to_v.lora_down.weight": columns}
    save_file(tensors, folder / "kohya.safetensors")
    deltas = {"text_encoder.encoder.layers.1.mlp.fc1.weight": up @ down, f"{MIDDLE}.to_v.weight": rows @ columns}
    return folder / "kohya.safetensors", {"deltas": deltas}


@form("diffusers of 2023: a LoRA of the text encoder's attention, in both of its namings")
def _(pipe, folder):
    tensors, deltas = {}, {}
    for theirs, ours in (("to_k_lora", "k_proj"), ("to_out_lora", "out_proj"), ("q_proj.lora_linear_layer", "q_proj")):
        up, down = eighths(16, 2), eighths(2, 16)
        name = f"text_encoder.text_model.encoder.layers.0.self_attn.{theirs}"
        tensors |= {f"{name}.up.weight": up, f"{name}.down.weight": down}
        deltas[f"text_encoder.encoder.layers.0.self_attn.{ours}.weight"] = up @ down
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder, {"deltas": deltas}


CONVOLUTION = "mid_block.resnets.0.conv1"


def core_product(core, left, right):
    """Number by number: sum over i, j of core[i, j] left[i, rows] right[j, columns]."""
    found = torch.zeros(left.shape[1], right.shape[1], *core.shape[2:])
    for i in range(core.shape[0]):
        for j in range(core.shape[1]):
            found += left[i][:, None, None, None] * right[j][None, :, None, None] * core[i, j]
    return found


@form("LyCORIS LoCon: a convolution with a core")
def _(pipe, folder):
    rows, columns, *kernel = pipe.unet.get_submodule(CONVOLUTION).weight.shape
    up, core, down = eighths(rows, 2, 1, 1), eighths(2, 2, *kernel), eighths(2, columns, 1, 1)
    name = flat(CONVOLUTION)
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": core, f"{name}.lora_down.weight": down}
    save_file(tensors | {f"{name}.alpha": torch.tensor(4.0)}, folder / "locon.safetensors")
    delta = 2 * core_product(core, up[..., 0, 0].T, down[..., 0, 0])
    return folder / "locon.safetensors", {"deltas": {f"{CONVOLUTION}.weight": delta}}


@form("LyCORIS LoHa: linear layers and convolutions, with and without cores")
def _(pipe, folder):
    tensors, deltas = {}, {}
    for layer, kind in ((f"{MIDDLE}.to_k", "plain"), (CONVOLUTION, "plain"), ("mid_block.resnets.1.conv2", "core")):
        rows, columns, *kernel = pipe.unet.get_submodule(layer).weight.shape
        halves = []
        for half in "12":
            name = f"{flat(layer)}.hada_w{half}"
            if kind == "core":
                left, right, core = eighths(2, rows), eighths(2, columns), eighths(2, 2, *kernel)
                tensors[f"{flat(layer)}.hada_t{half}"] = core
                halves.append(core_product(core, left, right))
            else:
                left, right = eighths(rows, 2), eighths(2, columns * max(1, len(kernel) and 9))
                halves.append((left @ right).reshape(rows, columns, *kernel))
            tensors |= {f"{name}_a": left, f"{name}_b": right}
        tensors[f"{flat(layer)}.alpha"] = torch.tensor(1.0)
        deltas[f"{layer}.weight"] = 0.5 * halves[0] * halves[1]
    save_file(tensors, folder / "loha.safetensors")
    return folder / "loha.safetensors", {"deltas": deltas}


@form("LyCORIS LoKr: whole factors and products, linear layers and convolutions")
def _(pipe, folder):
    tensors, deltas = {}, {}
    rows, columns = pipe.unet.get_submodule(f"{MIDDLE}.to_k").weight.shape
    first, second = eighths(4, 4), eighths(rows // 4, columns // 4)
    name = flat(f"{MIDDLE}.to_k")
    tensors |= {f"{name}.lokr_w1": first, f"{name}.lokr_w2": second, f"{name}.alpha": torch.tensor(64.0)}
    deltas[f"{MIDDLE}.to_k.weight"] = kronecker(first, second)  # of two whole factors alpha says nothing
    name, (left, right), (a, b) = flat(f"{MIDDLE}.to_v"), (eighths(2, 2), eighths(2, 2)), (eighths(8, 2), eighths(2, 8))
    tensors |= {f"{name}.lokr_w1_a": left, f"{name}.lokr_w1_b": right, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
    tensors[f"{name}.alpha"] = torch.tensor(4.0)
    deltas[f"{MIDDLE}.to_v.weight"] = 2 * kronecker(left @ right, a @ b)
    rows, columns, *kernel = pipe.unet.get_submodule(CONVOLUTION).weight.shape
    name, first = flat(CONVOLUTION), eighths(2, 2)
    core, a, b = eighths(2, 2, *kernel), eighths(2, rows // 2), eighths(2, columns // 2)
    tensors |= {f"{name}.lokr_w1": first, f"{name}.lokr_t2": core, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
    deltas[f"{CONVOLUTION}.weight"] = kronecker(first, core_product(core, a, b))
    layer = "mid_block.resnets.1.conv1"
    name, first, a, b = flat(layer), eighths(2, 2), eighths(rows // 2, 2), eighths(2, columns // 2 * 9)
    tensors |= {f"{name}.lokr_w1": first, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
    deltas[f"{layer}.weight"] = kronecker(first, (a @ b).reshape(rows // 2, columns // 2, *kernel))
    save_file(tensors, folder / "lokr.safetensors")
    return folder / "lokr.safetensors", {"deltas": deltas}


def kronecker(first, second):
    """Block by block: first[i, j] second."""
    return torch.cat([torch.cat([number * second for number in row], dim=1) for row in first], dim=0)


@form("LyCORIS: full differences and norms")
def _(pipe, folder):
    deltas = {}
    for layer in (f"{MIDDLE}.to_out.0", CONVOLUTION, "mid_block.resnets.0.norm1", "conv_norm_out"):
        for own in ("weight", "bias"):
            deltas[f"{layer}.{own}"] = eighths(*pipe.unet.get_parameter(f"{layer}.{own}").shape)
    kinds = {"weight": "diff", "bias": "diff_b"}, {"weight": "w_norm", "bias": "b_norm"}
    tensors = {}
    for name, delta in deltas.items():
        layer, _, own = name.rpartition(".")
        tensors[f"{flat(layer)}.{kinds['norm' in layer][own]}"] = delta
    save_file(tensors, folder / "full.safetensors")
    return folder / "full.safetensors", {"deltas": deltas}


@form("LyCORIS' own names (lycoris_)")
def _(pipe, folder):
    delta = eighths(16, 16)
    save_file({f"lycoris_{f'{MIDDLE}.to_v'.replace('.', '_')}.diff": delta}, folder / "lycoris.safetensors")
    return folder / "lycoris.safetensors", {"deltas": {f"{MIDDLE}.to_v.weight": delta}}


@form("LyCORIS Diag-OFT")
def _(pipe, folder):
    save_file({f"{flat(MIDDLE)}_to_v.oft_blocks": torch.ones(2, 8, 8)}, folder / "oft.safetensors")
    return folder / "oft.safetensors", {"refused": "of no known kind, .*oft_blocks"}


@form("LyCORIS IA3")
def _(pipe, folder):
    tensors = {f"{flat(MIDDLE)}_to_v.weight": torch.ones(16, 1), f"{flat(MIDDLE)}_to_v.on_input": torch.tensor(False)}
    save_file(tensors, folder / "ia3.safetensors")
    return folder / "ia3.safetensors", {"refused": "of no known kind, .*on_input, .*weight"}


def peft_of(kind, pipe, folder, **settings):
    import peft

    torch.manual_seed(0)
    config = getattr(peft, kind)(target_modules=["attn2.to_k", CONVOLUTION], init_weights=False, **settings)
    model = peft.get_peft_model(copy.deepcopy(pipe.unet), config)
    model.save_pretrained(folder / kind)
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "scaling")}
    assert len(layers) == 17
    return folder / kind, {"close": {f"{n}.weight": m.get_delta_weight("default") for n, m in layers.items()}}


@form("peft LoHa")
def _(pipe, folder):
    return peft_of("LoHaConfig", pipe, folder, r=2, alpha=6, use_effective_conv2d=True)


@form("peft LoKr")
def _(pipe, folder):
    return peft_of("LoKrConfig", pipe, folder, r=2, alpha=6, decompose_both=True, alpha_pattern={"attn2.to_k": 3})


@form("peft LoKr of whole factors")
def _(pipe, folder):
    return peft_of("LoKrConfig", pipe, folder, r=64, alpha=16, rank_pattern={"attn2.to_k": 32})


# --- Neurons --------------------------------------------------------------------------------------------------------


def neuron_table(folder, rows, name="memorization_statistics_v1_4.csv"):
    """As NeMo's authors' code writes it."""
    lines = ["Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM"]
    lines += [f'"{caption}";http://x;{[[0]] * 7};0.4;{numbers};0.3' for caption, numbers in rows.items()]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


@form("NeMo: memorization_statistics_v1_4.csv")
def _(pipe, folder):
    rows = {"a cat; a dog": [[0, 3], [], [], [], [], [], [1]], "a car": [[], [5], [], [], [], [], [1, 2]]}
    layers = [f"down_blocks.{i // 2}.attentions.{i % 2}.transformer_blocks.0.attn2" for i in range(6)] + [MIDDLE]
    masks = {}
    for layer, off in zip(layers, ([0, 3], [5], [], [], [], [], [1, 2]), strict=True):
        mask = torch.zeros(len(pipe.unet.get_submodule(layer).to_v.weight), 1, dtype=torch.bool)
        mask[off] = True
        masks[f"{layer}.to_v.weight"] = mask
    return neuron_table(folder, rows), {"masks": masks}


def test_there_are_twenty_forms_and_more():
    assert len(FORMS) >= 20


@pytest.mark.parametrize("name", FORMS)
def test_a_published_form_is_read_to_the_bit_or_refused_with_the_reason(name, sd1, tmp_path, recwarn):
    torch.manual_seed(0)
    path, held = FORMS[name](sd1, tmp_path)
    before = model_hash(sd1)
    if "refused" in held:
        with pytest.raises(ValueError, match=held["refused"]):
            read_edit(sd1, path)
        assert model_hash(sd1) == before
        return
    recwarn.clear()
    edit = read_edit(sd1, path)
    said = " ".join(str(warning.message) for warning in recwarn)
    assert held.get("warns", "") in said and bool(said) == ("warns" in held)
    for kind in ("deltas", "masks"):
        if kind in held:
            found = getattr(edit, kind)
            assert found.keys() == held[kind].keys()
            assert all(torch.equal(found[name], wanted) for name, wanted in held[kind].items())
    if "close" in held:
        assert edit.deltas.keys() == held["close"].keys()
        for layer, wanted in held["close"].items():
            torch.testing.assert_close(edit.deltas[layer], wanted.detach(), rtol=1e-5, atol=1e-7)
    if "weights" in held:
        own = {name: parameter.clone() for name, parameter in named_parameters(sd1).items()}
        assert held["weights"].keys() <= own.keys()
        with applied(sd1, edit):
            for layer, parameter in named_parameters(sd1).items():
                wanted = held["weights"].get(layer)
                if wanted is None:
                    assert torch.equal(parameter, own[layer]), layer
                else:
                    assert torch.equal(parameter.to(wanted.dtype), wanted), layer
                    assert torch.equal(parameter, wanted.to(parameter.dtype)), layer
    assert model_hash(sd1) == before


@pytest.mark.parametrize("where", ["bare", "unet.", "state_dict.", "text_encoder.", "lora", "kohya", "nested"])
def test_a_tensor_that_nothing_takes_is_named_wherever_it_stands(where, sd1, tmp_path):
    strange, values = "no.such.layer.weight", f"{MIDDLE}.to_v"
    tensors = {f"{values}.weight": torch.ones(16, 16)}
    if where == "bare":
        save_file(tensors | {strange: torch.ones(2)}, tmp_path / "theirs.safetensors")
    elif where == "lora":
        lora = {f"unet.{values}.lora_A.weight": torch.ones(1, 16), f"unet.{values}.lora_B.weight": torch.ones(16, 1)}
        more = {"unet.no.such.layer.lora_A.weight": torch.ones(1, 16)}
        strange = "unet.no.such.layer.lora_A.weight"
        save_file(lora | more, tmp_path / "theirs.safetensors")
    elif where == "kohya":
        strange = "lora_unet_no_such_layer.diff"
        more = {strange: torch.ones(2)}
        save_file({f"{flat(values)}.diff": torch.ones(16, 16)} | more, tmp_path / "theirs.safetensors")
    elif where == "nested":
        strange = "optimizer.state.weight"
        torch.save({"unet": tensors, "optimizer": {"state": {"weight": torch.ones(2)}}}, tmp_path / "theirs.pt")
    else:
        torch.save(tensors | {f"{where}{strange}": torch.ones(2)}, tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match=f"{strange}"):
        read_edit(sd1, next(tmp_path.glob("theirs.*")))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{MIDDLE}.to_v.weight": torch.ones(8, 16) / 3}, r"has the shape \(8, 16\), here it is \(16, 16\)"),
        ({f"{MIDDLE}.to_v.weight": torch.ones(16, 16, dtype=torch.int8)}, "is of int8, so no weight"),
        ({f"{MIDDLE}.to_v.weight": torch.full((16, 16), torch.nan)}, "NaN or infinity in its mid_block"),
        (
            {f"{MIDDLE}.to_v.weight": torch.ones(16, 16) / 3, f"unet.{MIDDLE}.to_v.weight": torch.ones(16, 16)},
            "twice, as unet.mid_block",
        ),
        ({"alphas_cumprod": torch.ones(1000), "conv_in.bias": torch.ones(8) / 3}, "another noise schedule"),
        ({f"{flat(MIDDLE)}_to_v.lora_up.weight": torch.ones(16, 2)}, "has up, which make no delta"),
        (
            {
                f"{flat(MIDDLE)}_to_v.lora_up.weight": torch.ones(16, 2),
                f"{flat(MIDDLE)}_to_v.lora_down.weight": torch.ones(3, 16),
            },
            "does not fit this U-Net: of mid_block.*shapes",
        ),
        ({f"{flat(MIDDLE)}_to_v.diff_b": torch.ones(16)}, "does not fit this U-Net, which has no .*to_v.bias"),
        ({f"{flat(MIDDLE)}_to_v.diff": torch.tensor(1.0)}, r"has the shape \(\), the weight \(16, 16\)"),
        ({f"{flat(MIDDLE)}_to_v.diff": torch.zeros(16, 16)}, "changes nothing"),
    ],
)
def test_a_file_that_does_not_fit_says_why(tensors, said, sd1, tmp_path):
    before = model_hash(sd1)
    for file, save in (("theirs.safetensors", save_file), ("theirs.pt", torch.save)):
        save(tensors, tmp_path / file)
        with pytest.raises(ValueError, match=said):
            read_edit(sd1, tmp_path / file)
    assert model_hash(sd1) == before


def test_openclip_names_of_a_whole_stable_diffusion_2_are_read(sd2, tmp_path):
    """Its text encoder has one layer more there, and what follows it, and holds queries, keys and values in one."""
    tensors, other = original_layout(sd2), copy.deepcopy(sd2.text_encoder)
    for name in [name for name in tensors if name.startswith("cond_stage_model")]:
        del tensors[name]
    torch.manual_seed(0)
    for parameter in other.parameters():
        parameter.data += torch.randn_like(parameter)
    own = {name.removeprefix("text_model."): parameter for name, parameter in other.named_parameters()}
    text = {"token_embedding.weight": own["embeddings.token_embedding.weight"]}
    text |= {"positional_embedding": own["embeddings.position_embedding.weight"]}
    text |= {f"ln_final.{kind}": own[f"final_layer_norm.{kind}"] for kind in ("weight", "bias")}
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    inner |= {"self_attn.out_proj": "attn.out_proj"}
    for layer in range(2):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            text |= {f"{theirs}.{new}.{kind}": own[f"{ours}.{old}.{kind}"] for old, new in inner.items()}
            parts = [own[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            text[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(parts)
    text |= {"transformer.resblocks.2.ln_1.weight": torch.ones(16), "text_projection": torch.ones(16, 16)}
    text |= {"logit_scale": torch.tensor(1.0), "attn_mask": torch.zeros(16, 16)}
    tensors |= {f"cond_stage_model.model.{name}": tensor.detach().clone() for name, tensor in text.items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    edit = read_edit(sd2, tmp_path / "theirs.safetensors")
    assert edit.parts == ("text_encoder",) and len(edit.deltas) == len(own)
    with applied(sd2, edit):
        theirs = dict(other.named_parameters())
        assert all(torch.equal(own, theirs[name]) for name, own in sd2.text_encoder.named_parameters())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,image\na cat,x.png\n", "no columns Caption and Refined Neurons, but prompt, image"),
        ("", "no columns Caption and Refined Neurons"),
        ("Caption;Refined Neurons\na cat;[[0], [1]]\n", "neurons of 2 layers, and this U-Net has 7"),
        ("Caption;Refined Neurons\na cat;[[99], [], [], [], [], [], []]\n", "no neuron 99 in down_blocks.0.*has 8"),
        ("Caption;Refined Neurons\na cat;tensor(3)\n", "row 1: 'tensor.3.' is no list of lists"),
        ("Caption;Refined Neurons\na cat\n", "row 1: 'None' is no list of lists"),
        ("Caption;Refined Neurons\na;[[],[],[],[],[],[],[1]]\na;[[],[],[],[],[],[],[2]]\n", "'a' twice"),
    ],
)
def test_a_table_that_is_none_of_nemos_says_why(text, said, sd1, tmp_path):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_edit(sd1, tmp_path / "table.csv")


def test_a_target_is_audited_under_the_neurons_of_its_own_prompt(sd1, tmp_path):
    from dori_utils.cli.weights import read_edits
    from dori_utils.core.targets import Target

    rows = {"a cat": [[0], [], [], [], [], [], []], "a dog": [[], [], [], [], [], [], [1, 2]]}
    table, targets = neuron_table(tmp_path, rows), [Target(p, p, None, "VM") for p in ("a dog", "a cat", "a dog")]
    edits = read_edits(sd1, table, targets)
    assert [edit.targets for edit in edits] == [("a dog",), ("a cat",), ("a dog",)]
    assert [sum(int(mask.sum()) for mask in edit.masks.values()) for edit in edits] == [2, 1, 2]
    assert len(read_edit(sd1, table).targets) == 2
    with pytest.raises(ValueError, match="neurons for 2 prompts, but none for 'a car'"):
        read_edits(sd1, table, [Target("x", "a car", None, "VM")])


NOISE = [b"", b"hello", b"\x80\x04.", b"PK\x03\x04" + bytes(40), bytes(range(256)), b"8" + bytes(7) + b"{}      "]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt", ".bin", ".pth", ".csv", ".txt", ""])
def test_whatever_a_file_holds_ends_in_a_sentence(suffix, sd1, tmp_path):
    for number, content in enumerate(NOISE):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(content)
        with pytest.raises((ValueError, OSError), match=r"\w{2,} \w+.*\.$") as caught:
            read_edit(sd1, path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("held", ["text", "list", "number", "nothing", "nested lists", "tensor", "object"])
def test_whatever_a_pickled_file_holds_ends_in_a_sentence_and_none_of_its_code_is_run(held, sd1, tmp_path):
    class Bad:
        def __reduce__(self):
            return (eval, (f"open({str(tmp_path / 'was run')!r}, 'w').close()",))

    values = {"text": "hello", "list": [torch.ones(2)], "number": 3, "nothing": None, "tensor": torch.ones(2)}
    values |= {"nested lists": [[torch.ones(2)], [torch.ones(3)]], "object": {"unet": Bad()}}
    for new in (True, False):
        torch.save(values[held], tmp_path / "theirs.pt", _use_new_zipfile_serialization=new)
        with pytest.raises((ValueError, OSError), match=r"theirs.pt .*\.$"):
            read_edit(sd1, tmp_path / "theirs.pt")
    assert not (tmp_path / "was run").exists()


def test_a_pickled_file_that_is_too_large_or_packed_is_not_opened(sd1, tmp_path, monkeypatch):
    import zipfile

    from dori_utils.core import tensor_files

    torch.save({"conv_in.bias": torch.ones(8) / 3}, tmp_path / "theirs.pt")
    with zipfile.ZipFile(tmp_path / "theirs.pt") as content, zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        for entry in content.infolist():
            packed.writestr(entry.filename, content.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(OSError, match="packed.pt is a compressed archive"):
        read_edit(sd1, tmp_path / "packed.pt")
    assert read_edit(sd1, tmp_path / "theirs.pt").deltas
    monkeypatch.setattr(tensor_files, "MOST_BYTES", 100)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(OSError, match="theirs.pt is pickled and has .* GiB, more than"):
        read_edit(sd1, tmp_path / "theirs.pt")


def test_a_scheduler_of_an_old_configuration_is_what_the_pipeline_makes_of_it(sd1, sd1_folder, tmp_path):
    """Diffusers mends steps_offset and clip_sample when it makes a pipeline."""
    from dori_utils.core.models import load_pipeline

    path = shutil.copytree(sd1_folder, tmp_path / "theirs")
    DDIMScheduler.from_config(sd1.scheduler.config, steps_offset=0, clip_sample=True).save_pretrained(
        path / "scheduler"
    )
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    wanted, edit = load_pipeline(path, device="cpu").scheduler, read_edit(sd1, path)
    with applied(sd1, edit):
        ours, theirs = dict(sd1.scheduler.config), dict(wanted.config)
        assert {key: ours[key] for key in theirs if key[0] != "_"} == {k: v for k, v in theirs.items() if k[0] != "_"}
        assert ours["steps_offset"] == 1 and ours["clip_sample"] is False
