"""Tiny pipelines of the real diffusers and transformers classes, random weights, saved to disk and loaded back.

Three families: SD 1.x (PNDM, noise prediction), SD 2.x (v-prediction, linear projections, heads per level) and one like
the testbed (AutoencoderTiny, DDIM, v-prediction, trailing timesteps). All have SD 1.x's topology: three cross-attention
down blocks and a plain one, two layers each, so 7 `attn2.to_v` in down and mid and 16 `ff.net.2`.

`sd1`, `sd2` and `tiny_testbed` are shared by the whole session: a test that changes a pipeline puts it back.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Before torch is, too: pytest-xdist's workers share out the cores.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests are written for float32 on a CPU

import re  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

MAX_TOKENS = 16


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Processes of `pytest -n auto`: more than four would want more memory than most machines have."""
    return min(4, os.cpu_count() or 1)


WORDS = "a an the photo of and on cat dog violin grapes guitar car red striped dotted background".split()


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory):
    return _save_sd1(tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory):
    return _save_sd2(tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="session")
def tiny_testbed_folder(tmp_path_factory):
    return _save_testbed(tmp_path_factory.mktemp("testbed"))


@pytest.fixture(scope="session")
def sd1(sd1_folder):
    return _load(sd1_folder)


@pytest.fixture(scope="session")
def sd2(sd2_folder):
    return _load(sd2_folder)


@pytest.fixture(scope="session")
def tiny_testbed(tiny_testbed_folder):
    return _load(tiny_testbed_folder)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer, folder = build_tokenizer(), tmp_path_factory.mktemp("clip")
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    special = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    text = small | special | dict(vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS)
    vision = small | dict(image_size=64, patch_size=8)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    CLIPImageProcessorPil(size=64, crop_size=64, image_mean=half, image_std=half).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip(clip_folder):
    """A tiny `CLIPModel` with the preprocessing of the testbed's."""
    from dori_utils.core.clip import load_clip

    return load_clip(clip_folder, device="cpu")


@pytest.fixture(params=["sd1", "sd2", "tiny_testbed"])
def pipe(request):
    """Each of the three families in turn."""
    return request.getfixturevalue(request.param)


def _load(folder):
    from dori_utils.core.models import load_pipeline

    return load_pipeline(folder, device="cpu")


def _save_sd1(folder):
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(**_betas(), skip_prk_steps=True, steps_offset=1)
    return _save(folder, unet=_unet(attention_head_dim=2), vae=_autoencoder_kl(), scheduler=scheduler)


def _save_sd2(folder):
    from diffusers import DDIMScheduler

    unet = _unet(attention_head_dim=[1, 2, 2, 2], use_linear_projection=True)
    scheduler = DDIMScheduler(
        **_betas(), prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    return _save(folder, unet=unet, vae=_autoencoder_kl(), scheduler=scheduler, hidden_act="gelu")


def _save_testbed(folder):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        **_betas(),
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    return _save(folder, unet=_unet(attention_head_dim=2), vae=_autoencoder_tiny(), scheduler=scheduler)


def _save(folder, *, unet, vae, scheduler, hidden_act="quick_gelu"):
    from diffusers import StableDiffusionPipeline

    tokenizer = build_tokenizer()
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        scheduler=scheduler,
        text_encoder=_text_encoder(tokenizer, hidden_act),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def build_tokenizer():
    """A CLIPTokenizer as OpenAI's, made offline: every byte, and merges that make each of WORDS one token."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens, merges = letters + [letter + "</w>" for letter in letters], []
    for word in WORDS:
        left = word[0]
        for i, letter in enumerate(word[1:], start=2):
            right = letter + "</w>" * (i == len(word))
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            if left not in tokens:
                tokens.append(left)
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _betas():
    return dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def _text_encoder(tokenizer, hidden_act):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            hidden_act=hidden_act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _unet(**kwargs):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        **kwargs,
    )


def _autoencoder_kl():
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def _autoencoder_tiny():
    from diffusers import AutoencoderTiny

    torch.manual_seed(2)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
        scaling_factor=0.7,
    )
    vae.decoder.layers[-1].weight.data.mul_(8)  # else a random decoder's pixels are nearly all black
    vae.decoder.layers[-1].bias.data.fill_(0.5)
    return vae


@pytest.fixture(scope="session")
def random_picture():
    """Seed → a picture of 16 coloured squares."""
    import numpy as np
    from PIL import Image

    def draw(seed, side=32):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((side, side), Image.Resampling.NEAREST)

    return draw


@pytest.fixture(scope="session")
def write_data(clip_folder, random_picture):
    """(folder, model's name) → a data/ folder as the owner of a model fills it; returns its targets and captions."""
    import itertools
    import shutil

    import pandas as pd

    things = ("cat", "dog", "violin", "guitar", "grapes")

    def write(folder, model):
        own, coco = folder / model, folder / "coco"
        for needed in (own / "images", coco):
            needed.mkdir(parents=True)
        prompts = [f"a {a} and {b} on the car" for a, b in itertools.permutations(things, 2)]
        kinds = ["VM"] * 3 + ["TM"] * 2 + ["control"] * 3
        rows = [{"prompt": prompts[i], "image": f"images/{k}-{i}.png", "kind": k} for i, k in enumerate(kinds)]
        for i, row in enumerate(rows):
            random_picture(i).save(own / row["image"])
        pd.DataFrame(rows).to_csv(own / "targets.csv", index=False)
        same = [(row["prompt"], f"{word} {row['prompt'][2:]}") for row in rows for word in ("the", "red")]
        pd.DataFrame(same, columns=["prompt", "paraphrase"]).to_csv(own / "paraphrases.csv", index=False)
        colors = ("red", "striped", "dotted", "a red")
        captions = [f"{color} {a} and {b}" for color in colors for a, b in itertools.permutations(things, 2)]
        for i in range(len(captions)):
            random_picture(1000 + i).save(coco / f"{i}.png")
        names = [f"{i}.png" for i in range(len(captions))]
        pd.DataFrame({"caption": captions, "image": names}).to_csv(coco / "captions.csv", index=False)
        shutil.copytree(clip_folder, folder / "clip")
        return rows, captions

    return write


# --- Stable Diffusion's original names, written down by hand --------------------------------------------------------

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
