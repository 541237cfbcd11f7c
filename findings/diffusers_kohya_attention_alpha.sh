#!/usr/bin/env bash
# A kohya LoRA whose attention layers have an alpha of their own is loaded with the alpha of the other layers.
#
# Versions:  diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, torch 2.13.0.
# Behaviour: in kohya's format every layer has its own alpha, and its delta is alpha / rank * up @ down. Where most
#            layers have alpha 4 and attn2.to_v has alpha 1 (rank 4), diffusers loads all with alpha 4 and warns of
#            nothing: the alphas of attention layers are kept under names (...processor.to_v_lora.down.weight.alpha)
#            that fit no layer of the U-Net. A feed-forward layer with an alpha of its own is right.
# Output:    attn2.to_v 4.00 times its delta, ff.net.2 1.00 times
# Why it matters here: an edit is applied four times too strong, so what is judged is not what its author published.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 peft==0.21.2 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> /dev/null <<'PY'
import diffusers, torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

assert diffusers.__version__ == "0.42.1"
RANK = 4
print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")


def too_strong(special):
    """How many times its own delta the layers named `special` get, with alpha 1 where all others have alpha 4."""
    generator = torch.Generator().manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    layers = {n: m for n, m in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "ff.net.2"))}
    state, deltas = {}, {}
    for name, layer in layers.items():
        down = torch.randn(RANK, layer.in_features, generator=generator)
        up = torch.randn(layer.out_features, RANK, generator=generator)
        alpha = 1.0 if name.endswith(special) else 4.0
        key = f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        deltas[name] = alpha / RANK * up @ down
    state, alphas = StableDiffusionPipeline.lora_state_dict(state)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, adapter_name="lora")
    loaded = {n: m.get_delta_weight("lora").detach() for n, m in unet.named_modules() if hasattr(m, "get_delta_weight")}
    assert loaded.keys() == deltas.keys()
    factors = [(loaded[n] * d).sum() / d.square().sum() for n, d in deltas.items() if n.endswith(special)]
    assert max(factors) - min(factors) < 1e-4
    return factors[0].item()


attention, feed_forward = too_strong("attn2.to_v"), too_strong("ff.net.2")
print(f"attn2.to_v {attention:.2f} times its delta, ff.net.2 {feed_forward:.2f} times")
assert abs(attention - 4) < 1e-3 and abs(feed_forward - 1) < 1e-3
PY
