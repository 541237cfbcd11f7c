#!/usr/bin/env bash
# Two equal CLIP text encoders write their weights under different names, by where each was loaded from.
#
# Versions:  transformers 5.23.0, torch 2.13.0.
# Behaviour: CLIPTextModel has its parameters under flat names (embeddings.token_embedding.weight). It reads files with
#            these names and files with the published ones (text_model.embeddings. ...), and save_pretrained gives back
#            the kind that it was loaded from; a model made from a config writes the flat ones. The two objects have
#            equal state dicts, and nothing that is printed of them says which file they will write.
# Output:    made from a config: embeddings.token_embedding.weight
#            loaded from the published names: text_model.embeddings.token_embedding.weight
#            loaded from the flat names: embeddings.token_embedding.weight
#            equal state dicts: True
# Why it matters here: a hash over names and weights, or a loader that expects one kind of names, takes equal models for
#            different ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> /dev/null <<'PY'
import torch, transformers
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

assert transformers.__version__ == "5.23.0"
config = CLIPTextConfig(
    vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
)


def written(model, folder):
    model.save_pretrained(folder)
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        return next(name for name in file.keys() if name.endswith("token_embedding.weight"))


made = written(CLIPTextModel(config), "made")
weights = load_file("made/model.safetensors")
Path("published").mkdir()
Path("published/config.json").write_text(Path("made/config.json").read_text())
prefixed = {f"text_model.{name}": tensor for name, tensor in weights.items()}
save_file(prefixed, "published/model.safetensors", {"format": "pt"})
one, other = CLIPTextModel.from_pretrained("published"), CLIPTextModel.from_pretrained("made")
states = one.state_dict(), other.state_dict()
equal = states[0].keys() == states[1].keys() and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
from_published, from_flat = written(one, "again"), written(other, "again flat")
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"made from a config: {made}\nloaded from the published names: {from_published}")
print(f"loaded from the flat names: {from_flat}\nequal state dicts: {equal}")
assert equal and made == from_flat == "embeddings.token_embedding.weight"
assert from_published == "text_model.embeddings.token_embedding.weight"
PY
