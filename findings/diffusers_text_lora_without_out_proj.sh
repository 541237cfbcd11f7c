#!/usr/bin/env bash
# Of a text encoder's LoRA without out_proj, diffusers loads the feed-forward half and drops the attention half.
#
# Versions:  diffusers 0.42.1, peft 0.21.2, transformers 5.23.0, torch 2.13.0.
# Behaviour: a kohya LoRA of q_proj, k_proj, v_proj, fc1 and fc2 (with the published names of SD 1.x's text encoder)
#            loads without an error, and adapts fc1 and fc2 alone. With out_proj in the file, all six are adapted. What
#            kind of names a file has is told from a few of them; without out_proj it is taken for another kind, and
#            names such as to_q_lora, which no layer has, stay as they are. A table of "unexpected" names is logged.
# Output:    with out_proj: fc1, fc2, k_proj, out_proj, q_proj, v_proj
#            without: fc1, fc2
# Why it matters here: half of what its author did to the text encoder is applied, and looks like all of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 peft==0.21.2 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> /dev/null <<'PY'
import diffusers, torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

assert diffusers.__version__ == "0.42.1"
ATTENTION, FEED_FORWARD = ["q_proj", "k_proj", "v_proj", "out_proj"], ["fc1", "fc2"]


def adapted(names):
    """The kinds of layers that get a delta from a LoRA of all layers with these names."""
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
        )
    )
    layers, state = {name: module for name, module in encoder.named_modules()}, {}
    for number in range(2):
        for name in names:
            block = "self_attn" if name in ATTENTION else "mlp"
            layer = next(m for n, m in layers.items() if n.endswith(f"layers.{number}.{block}.{name}"))
            key = f"lora_te_text_model_encoder_layers_{number}_{block}_{name}"
            state[f"{key}.lora_down.weight"] = torch.randn(4, layer.in_features)
            state[f"{key}.lora_up.weight"] = torch.randn(layer.out_features, 4)
            state[f"{key}.alpha"] = torch.tensor(4.0)
    state, alphas = StableDiffusionPipeline.lora_state_dict(state)
    StableDiffusionPipeline.load_lora_into_text_encoder(
        state, alphas, encoder, prefix="text_encoder", adapter_name="lora"
    )
    return sorted({name.split(".")[-1] for name, m in encoder.named_modules() if hasattr(m, "get_delta_weight")})


whole, without = adapted(ATTENTION + FEED_FORWARD), adapted(ATTENTION[:3] + FEED_FORWARD)
print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")
print(f"with out_proj: {', '.join(whole)}\nwithout: {', '.join(without)}")
assert whole == sorted(ATTENTION + FEED_FORWARD)
assert without == sorted(FEED_FORWARD)
PY
