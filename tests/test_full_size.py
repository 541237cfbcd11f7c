"""SD 1.4 and SD 2.1 at their real size, with random weights, on a CPU: `make test-slow`.

Their configurations are those that were published, so layers, shapes and memory are the real models'; only what their
weights know is missing. Each model has a process of its own, so that its peak of memory is its own.

Weights, activations and gradients are bfloat16. Arithmetic inside a linear layer or a convolution is float32: many CPUs
have none in bfloat16, and then a convolution takes fifty times as long. A tiny model, in `make test`, does without.
"""

import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from PIL import Image
from torch.nn.functional import linear

from tools.estimate import SD1, SD2

MOST = 20e9  # bytes
PROMPT = "a photo of a cat"
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
TEXT = {  # text_encoder/config.json
    "sd14": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    "sd2": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16),
}
WIDTHS = {"down_blocks.0": 320, "down_blocks.1": 640, "down_blocks.2": 1280, "mid_block": 1280}
WIDTHS |= {"up_blocks.1": 1280, "up_blocks.2": 640, "up_blocks.3": 320}
LAYERS = {"down_blocks": 2, "mid_block": 1, "up_blocks": 3}


def transformer_blocks(*parts):
    """Name and width of each transformer block in these parts of the published U-Nets."""
    for block, width in WIDTHS.items():
        if (part := block.split(".")[0]) in parts:
            for number in range(LAYERS[part]):
                yield f"{block}.attentions.{number}.transformer_blocks.0", width


def save_random(name, folder):
    """Save the model with random weights in bfloat16, in diffusers' layout; how many parameters each part has."""
    from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size={"sd14": 512, "sd2": 768}[name],
    )
    activation = {"sd14": "quick_gelu", "sd2": "gelu"}[name]
    text = CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, hidden_act=activation, **TEXT[name])
    unet = UNet2DConditionModel(**{"sd14": SD1, "sd2": SD2}[name])
    parts = dict(unet=unet, vae=vae, text_encoder=CLIPTextModel(text))
    torch.set_default_dtype(torch.float32)
    same = dict(**BETAS, set_alpha_to_one=False, steps_offset=1)
    schedulers = {
        "sd14": PNDMScheduler(**same, skip_prk_steps=True),
        "sd2": DDIMScheduler(**same, clip_sample=False, prediction_type="v_prediction"),
    }
    StableDiffusionPipeline(
        **parts,
        scheduler=schedulers[name],
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return {part: sum(p.numel() for p in model.parameters()) for part, model in parts.items()}


def compute_in_float32(model):
    """Have convolutions and linear layers of bfloat16 compute in float32 and give bfloat16."""

    def forward(layer, compute, x):
        assert x.dtype == layer.weight.dtype == torch.bfloat16  # so that no less is refused than by PyTorch
        bias = None if layer.bias is None else layer.bias.float()
        return compute(x.float(), layer.weight.float(), bias).bfloat16()

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.forward = partial(forward, layer, layer._conv_forward)
        elif isinstance(layer, torch.nn.Linear):
            layer.forward = partial(forward, layer, linear)


def attack_and_denoise(pipe, lap=lambda what: None):
    """One step of DoRI with gradient checkpointing, and one guided denoising step."""
    from dori_utils.attack import AttackConfig, attack
    from dori_utils.core.diffusion import denoise, encode_prompts, initial_latents
    from dori_utils.core.targets import Target

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    target, config = Target("random", PROMPT, Image.fromarray(pixels), "VM"), AttackConfig(steps=1, batch_size=1)
    triggers = attack(pipe, [target], config, checkpointing=True, progress=False)
    lap("one DoRI step")
    start = encode_prompts(pipe, [PROMPT])
    latents = denoise(pipe, initial_latents(pipe, [0]), start, stop_after=1)
    lap("one denoising step")
    return {"loss": triggers.losses.item(), "moved": triggers.prompt_embeds - start.float(), "latents": latents}


def check_numbers(found, shape):
    """Embeddings that moved by one step of Adam, and latents: all finite."""
    assert np.isfinite(found["loss"]) and found["moved"].isfinite().all()
    assert 0.09 < found["moved"].abs().max() < 0.11  # lr is 0.1
    assert found["latents"].dtype == torch.bfloat16
    assert found["latents"].shape == shape and found["latents"].isfinite().all()


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_tiny_model_is_attacked_and_sampled_in_bfloat16(family, request):
    from dori_utils.core.models import load_pipeline

    pipe = load_pipeline(request.getfixturevalue(f"{family}_folder"), device="cpu", dtype=torch.bfloat16)
    check_numbers(attack_and_denoise(pipe), (1, 4, 8, 8))


def try_everything(name):
    """What a process of its own finds: layers, numbers, seconds, and the peak of memory."""
    from dori_utils import nemo, wanda
    from dori_utils.core.diffusion import encode_prompts
    from dori_utils.core.models import load_pipeline

    found, seconds, started = {}, {}, time.monotonic()

    def lap(what):
        nonlocal started
        seconds[what], started = round(time.monotonic() - started), time.monotonic()

    with tempfile.TemporaryDirectory() as folder:
        found["parameters"] = save_random(name, folder)
        lap("make and save")
        pipe = load_pipeline(folder, device="cpu", dtype=torch.bfloat16)
    lap("load")
    values = {"down and mid": nemo.Config.layers, "all": r"attn2\.to_v$"}
    for where, pattern in values.items():
        layers = nemo.value_layers(pipe.unet, pattern)
        found[where] = {layer: tuple(module.weight.shape) for layer, module in layers.items()}
    found["wanda"] = {layer: tuple(module.weight.shape) for layer, module in wanda.localized_layers(pipe.unet).items()}
    activations = nemo.activations(pipe, encode_prompts(pipe, [PROMPT]))
    found["activations"] = all(bool(values.isfinite().all()) for values in activations.values())
    lap("layers")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        compute_in_float32(part)
    found |= attack_and_denoise(pipe, lap)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return found | {"dtype": pipe.unet.dtype, "seconds": seconds, "peak": peak}


@pytest.mark.slow
@pytest.mark.full_size
@pytest.mark.parametrize(
    ("name", "channels", "side", "unet", "text_encoder"),
    [("sd14", 768, 64, 859_520_964, 123_060_480), ("sd2", 1024, 96, 865_910_724, 340_387_840)],
)
def test_a_model_of_full_size_is_pruned_attacked_and_sampled_within_20_gb(name, channels, side, unet, text_encoder):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(try_everything, name).result()
    peak, seconds = found["peak"], ", ".join(f"{what} {s} s" for what, s in found["seconds"].items())
    print(f"\n{name} in {found['dtype']}: peak {peak / 1e9:.1f} GB; {seconds}")

    # The published sizes: the models' own cards and files.
    assert found["parameters"] == {"unet": unet, "vae": 83_653_863, "text_encoder": text_encoder}
    down_and_mid = dict(transformer_blocks("down_blocks", "mid_block"))
    everywhere = dict(transformer_blocks(*LAYERS))
    assert (len(down_and_mid), len(everywhere)) == (7, 16)
    for where, blocks in (("down and mid", down_and_mid), ("all", everywhere)):
        assert found[where] == {f"{block}.attn2.to_v": (width, channels) for block, width in blocks.items()}
    assert found["wanda"] == {f"{block}.ff.net.2": (width, 4 * width) for block, width in everywhere.items()}
    assert found["activations"]

    check_numbers(found, (1, 4, side, side))
    assert peak < MOST
