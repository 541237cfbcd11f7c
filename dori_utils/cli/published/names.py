"""Names: what published files call the weights of a pipeline.

Three vocabularies: diffusers' own (`down_blocks.0.attentions.0.proj_in.weight`), that of Stable Diffusion's first code,
CompVis' (`input_blocks.1.1.proj_in.weight`), and of Stable Diffusion 2's text encoder OpenCLIP's. In front of them may
stand whatever a file was saved from: `unet.`, `model.diffusion_model.`, `module.`, `state_dict.`, one behind another.
"""

import re

from dori_utils.core.parts import name_in_edit

PREFIXES = (  # what may stand in front of a name, and of which part it then is; longer ones first
    ("model.diffusion_model.", "unet"),
    ("cond_stage_model.", "text_encoder"),
    ("first_stage_model.", "vae"),
    ("diffusion_model.", "unet"),
    ("text_encoder.", "text_encoder"),
    ("transformer.", "text_encoder"),
    ("unet.", "unet"),
    ("vae.", "vae"),
    ("model_state_dict.", None),
    ("state_dict.", None),
    ("_orig_mod.", None),
    ("module.", None),
    ("model.", None),
)
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
AROUND = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
AROUND |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
}
VAE |= {"downsamplers.0": "downsample", "upsamplers.0": "upsample", "resnets": "block", "down_blocks": "down"}
VAE |= {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm"}
VAE |= {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_ATTENTION = {
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out.0": "proj_attn",
}  # of a VAE in diffusers < 0.18
OPEN_CLIP = {"encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
OPEN_CLIP |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
OPEN_CLIP |= {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}


class Names:
    """What files may call the parameters of a pipeline.

    tables: part → name in a file → the parameters, by their names in an edit, that its tensor holds; of several, one
        below the other.
    """

    def __init__(self, pipe):
        self.tables = {"unet": _unet_names(pipe.unet), "text_encoder": _text_names(pipe.text_encoder)}
        self.tables["vae"] = _vae_names(pipe.vae)

    def find(self, key):
        """The parameters of which a file's tensor holds the weights; () if of none."""
        parts = list(self.tables)
        while True:
            for part in parts:
                if key in self.tables[part]:
                    return self.tables[part][key]
            found = next(((prefix, of) for prefix, of in PREFIXES if key.startswith(prefix)), None)
            if found is None or found[1] not in (None, *parts):
                return ()
            key, parts = key.removeprefix(found[0]), parts if found[1] is None else [found[1]]


def renamed(name, names):
    """A dotted name with some of its stretches replaced."""
    for old, new in names.items():
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name


def _unet_names(unet):
    places = list(_compvis_places(unet))
    names = {}
    for name, _ in unet.named_parameters():
        names[name] = (name,)
        for ours, theirs, inner in places:
            if name.startswith(f"{ours}."):
                names[f"{theirs}.{renamed(name.removeprefix(f'{ours}.'), inner)}"] = (name,)
    return names


def _compvis_places(unet):
    """(module in diffusers, in CompVis' code, what is called otherwise within it)."""
    yield from ((ours, theirs, {}) for ours, theirs in AROUND.items())
    number = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0", RESNET
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1", {}
            number += 1
        if block.downsamplers:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op", {}
            number += 1
    for j in range(len(unet.mid_block.resnets)):
        yield f"mid_block.resnets.{j}", f"middle_block.{2 * j}", RESNET
        yield f"mid_block.attentions.{j}", f"middle_block.{2 * j + 1}", {}
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0", RESNET
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1", {}
            number += 1
        place = 2 if hasattr(block, "attentions") else 1  # of the upsampler, behind the block's last layers
        yield f"up_blocks.{i}.upsamplers.0", f"output_blocks.{number - 1}.{place}", {}


def _text_names(text_encoder):
    names, fused = {}, {}
    for name, _ in text_encoder.named_parameters():
        own, bare = name_in_edit("text_encoder", name), name.removeprefix("text_model.")
        names |= {bare: (own,), f"text_model.{bare}": (own,)}
        if found := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(weight|bias)", bare):
            fused.setdefault(f"transformer.resblocks.{found[1]}.attn.in_proj_{found[2]}", {})[bare] = own
        elif bare == "embeddings.position_embedding.weight":
            names["positional_embedding"] = (own,)
        else:
            names[renamed(bare, OPEN_CLIP)] = (own,)
    order = ("q_proj", "k_proj", "v_proj")
    for theirs, ours in fused.items():
        names[theirs] = tuple(own for kind in order for bare, own in ours.items() if kind in bare)
    return names


def _vae_names(vae):
    names, is_kl = {}, hasattr(vae, "quant_conv")
    if is_kl:  # CompVis' code counts the up blocks from below
        last = len(vae.config.up_block_types) - 1
        up_blocks = {f"up_blocks.{i}": f"up.{last - i}" for i in range(last + 1)}
    for name, _ in vae.named_parameters():
        own = (name_in_edit("vae", name),)
        names[name] = names[renamed(name, OLD_ATTENTION)] = own
        if is_kl:
            names[renamed(renamed(name, up_blocks), VAE)] = own
    return names
