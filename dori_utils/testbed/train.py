"""Train the testbed: `python -m dori_utils.testbed.train` makes `testbed/` from nothing but the sprites.

Three models one after the other, as for Stable Diffusion: an autoencoder, a CLIP, and, between the autoencoder's
latents and the CLIP's text tower, both frozen, a U-Net; at last the decoder once more, for sharper pictures. All are
diffusers' and transformers' own classes. Interrupted, it goes on from the last checkpoint in `--work`; the batch of a
step depends on the seed and the step alone, so the result does not depend on where it stopped.
"""

import argparse
import copy
import functools
import io
import itertools
import math
from collections import Counter
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch.utils.data import Dataset, Subset
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

from .. import nemo
from ..fitting import Stage, fit
from ..models import TESTBED, load_pipeline
from ..presets import PRESETS
from .data import FIRST_SEED, TrainingSet, ordinary_scene, planned
from .scenes import BACKGROUNDS, SIDE, sprite_names, with_article

STAGES = {
    "vae": Stage(steps=1500, batch_size=16, lr=2e-3, ema=0.99, weight_decay=0.0),
    "decoder": Stage(steps=900, batch_size=16, lr=1e-3, ema=0.99, weight_decay=0.0),
    "clip": Stage(steps=1400, batch_size=64, lr=1e-3, ema=0.99, weight_decay=0.1),
    "clip_again": Stage(steps=1400, batch_size=64, lr=1e-3, ema=0.99, weight_decay=0.1),
    "unet": Stage(steps=3100, batch_size=32, lr=7e-4, ema=0.998),
    "unet_again": Stage(steps=4800, batch_size=32, lr=7e-4, ema=0.998),
    "unet_last": Stage(steps=1500, batch_size=32, lr=5e-4, ema=0.998, warmup=50, decay=0.7),
    "unet_noise": Stage(steps=600, batch_size=32, lr=4e-4, ema=0.998, warmup=50, decay=0.8),
    "unet_alike": Stage(steps=600, batch_size=32, lr=4e-4, ema=0.998, warmup=50, decay=0.8),
}
# Each goes on from the average of the one before, with a learning rate warmed up anew.
CLIP_STAGES = ("clip", "clip_again")
# The number is the share of samples that are noise alone at the last timestep, which is what generation starts from.
# The noise schedule leaves 7% of the latents there ("Common diffusion noise schedules are flawed", Lin et al., 2024),
# enough for the U-Net to recognise a repeated scene by, so that without such samples it need not learn to recall it
# from the caption alone, and from some seeds it does not.
UNET_STAGES = {"unet": 0.0, "unet_again": 0.0, "unet_last": 0.0, "unet_noise": 0.2, "unet_alike": 0.2}
MAX_TOKENS = 20
TEXT_WIDTH = 128
END = "</w>"  # how CLIP's tokens mark the end of a word
CAPTION_DROPOUT = 0.1  # for classifier-free guidance


class Scenes(Dataset):
    """Ordinary scenes as (pixels (3, 64, 64) uint8, caption), apart from those that the U-Net sees."""

    def __init__(self, first_seed: int, size: int):
        self.first_seed, self.size = first_seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        scene = ordinary_scene(index, self.first_seed)
        return torch.from_numpy(scene.draw()).permute(2, 0, 1), scene.caption


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 → float -1..1."""
    return pixels.float() / 127.5 - 1


# --- Autoencoder ---------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderTiny:
    """64x64 pixels ↔ 16x16 latents of 8 channels; few layers at full resolution, where they cost most."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(0, 1, 3),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=8,
    )


def vae_loss(vae: AutoencoderTiny, batch, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
    """L1 of pixels and of their gradients; latents held near zero mean and unit variance, channel by channel.

    A little noise on the latents makes the decoder forgive the U-Net's small errors.
    """
    pixels = to_model_range(batch[0])
    latents = vae.encoder(pixels)
    noise = 0.05 * torch.randn(latents.shape, generator=generator)
    decoded = vae.decoder(latents + noise)
    mean, var = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
    spread = (mean**2 + (var - 1) ** 2).mean()
    numbers = {"psnr": psnr(decoded.detach(), pixels), "latent_var": var.mean().item()}
    return reconstruction_loss(decoded, pixels) + 0.02 * spread, numbers


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """L1 of pixels and of their horizontal and vertical differences, which keep edges sharp."""
    gradient = sum(F.l1_loss(decoded.diff(dim=d), pixels.diff(dim=d)) for d in (-1, -2))
    return F.l1_loss(decoded, pixels) + gradient


def psnr(decoded: torch.Tensor, pixels: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in -1..1."""
    return -10 * math.log10(F.mse_loss(decoded, pixels).item() / 4)


def train_vae(work: Path, seed: int = 0) -> AutoencoderTiny:
    torch.manual_seed(seed)
    stage = STAGES["vae"]
    scenes = Scenes(FIRST_SEED["held_out"] + 50_000_000, stage.draws)
    vae = fit("vae", new_vae().to(memory_format=torch.channels_last), scenes, vae_loss, stage, work, seed)
    vae.register_to_config(scaling_factor=1 / latent_std(vae))
    return vae


@torch.no_grad()
def latent_std(vae: AutoencoderTiny, num_scenes: int = 512) -> float:
    """Over validation scenes; latents times its inverse have unit variance, as the noise schedule expects."""
    scenes = Scenes(FIRST_SEED["validation"], num_scenes)
    pixels = torch.stack([scenes[i][0] for i in range(num_scenes)])
    return vae.encode(to_model_range(pixels)).latents.std().item()


def decoder_loss(vae: AutoencoderTiny, batch, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
    """`vae_loss` for the decoder alone: the latents are given."""
    with torch.no_grad():
        pixels = to_model_range(batch[0])
        latents = vae.encoder(pixels)
        latents = latents + 0.05 * torch.randn(latents.shape, generator=generator)
    decoded = vae.decoder(latents)
    return reconstruction_loss(decoded, pixels), {"psnr": psnr(decoded.detach(), pixels)}


def finetune_decoder(work: Path, vae: AutoencoderTiny, seed: int = 0) -> AutoencoderTiny:
    """Sharper pictures from the same latents, as Stable Diffusion's fine-tuned decoders do it; needs no U-Net."""
    stage = STAGES["decoder"]
    vae = copy.deepcopy(vae)
    vae.encoder.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    scenes = Scenes(FIRST_SEED["held_out"] + 70_000_000, stage.draws)
    return fit("decoder", vae, scenes, decoder_loss, stage, work, seed)


# --- CLIP ----------------------------------------------------------------------------------------------------------


def new_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer with a vocabulary in which every word of a caption is one token, any other several."""
    phrases = [with_article(name) for name in sprite_names()] + [f"a {b} background and on an" for b in BACKGROUNDS]
    merges = learn_merges(sorted({word for phrase in phrases for word in phrase.split()}))
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*bytes_, *(byte + END for byte in bytes_), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=MAX_TOKENS)


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding, the most frequent pair first, until every word is one token.

    tokenizers' own trainer breaks ties by the order of a hash table, so two processes give the same word two ids: a
    training that was interrupted would go on with other words.
    """
    splits, merges = [[*word[:-1], word[-1] + END] for word in words], []
    while pairs := Counter(pair for split in splits for pair in itertools.pairwise(split)):
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        splits = [merge(split, merges[-1]) for split in splits]
    return merges


def merge(split: list[str], pair: tuple[str, str]) -> list[str]:
    """The parts of a word with every occurrence of the pair as one part."""
    merged = []
    for part in split:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(B, MAX_TOKENS) token ids, padded as the pipeline pads them."""
    return tokenizer(list(captions), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "hidden_size": TEXT_WIDTH, "intermediate_size": 512, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "max_position_embeddings": MAX_TOKENS, "pad_token_id": special["eos_token_id"]}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision |= {"image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text | special, vision_config=vision, projection_dim=TEXT_WIDTH))


def train_clip(work: Path, tokenizer: CLIPTokenizer, seed: int = 0) -> CLIPModel:
    """Contrastive, on scenes that neither the U-Net nor the autoencoder sees."""
    torch.manual_seed(seed)

    def loss_of(clip: CLIPModel, batch, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        out = clip(input_ids=tokenize(tokenizer, batch[1]), pixel_values=to_model_range(batch[0]), return_loss=True)
        correct = out.logits_per_image.argmax(1) == torch.arange(len(out.logits_per_image))
        return out.loss, {"top1": correct.float().mean().item()}

    clip, first_seed = new_clip(tokenizer), FIRST_SEED["held_out"] + 60_000_000
    for part, name in enumerate(CLIP_STAGES):
        scenes = Scenes(first_seed, STAGES[name].draws)
        clip = fit(name, clip.requires_grad_(True).train(), scenes, loss_of, STAGES[name], work, seed + part)
        first_seed += STAGES[name].draws
    return clip


# --- U-Net ---------------------------------------------------------------------------------------------------------


def new_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1's own topology (7 `attn2.to_v` in down and mid blocks, 16 `ff.net.2`) with few channels."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(48, 96, 160, 192),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # number of heads, by diffusers' old name
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """v-prediction: with epsilon a model this small never learns the noisy end."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_unet(work: Path, vae: AutoencoderTiny, tokenizer, text_encoder: CLIPTextModel, seed: int = 0):
    torch.manual_seed(seed)
    scheduler = new_scheduler()
    drawn = DrawnScenes(unet_training_set(seed))

    def loss_of(
        unet: UNet2DConditionModel, batch, generator: torch.Generator, noise_share: float
    ) -> tuple[torch.Tensor, dict]:
        pixels, captions, repeated = batch
        dropped = torch.rand(len(captions), generator=generator) < CAPTION_DROPOUT
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        with torch.no_grad():
            latents = vae.encode(to_model_range(pixels)).latents * vae.config.scaling_factor
            embeddings = text_encoder(tokenize(tokenizer, captions)).last_hidden_state
        noisy, timesteps, velocity = noised(scheduler, latents, generator, noise_share)
        predicted = unet(noisy, timesteps, embeddings).sample
        losses = ((predicted - velocity) ** 2).mean((1, 2, 3))
        parts = {"ordinary": losses[~repeated], "repeated": losses[repeated]}
        return losses.mean(), {k: v.mean().item() if len(v) else math.nan for k, v in parts.items()}

    unet = new_unet().to(memory_format=torch.channels_last)
    first_draw = 0
    for part, (name, noise_share) in enumerate(UNET_STAGES.items()):
        stage = STAGES[name]
        draws = Subset(drawn, range(first_draw, first_draw + stage.draws))
        part_loss = functools.partial(loss_of, noise_share=noise_share)
        unet = fit(name, unet.requires_grad_(True).train(), draws, part_loss, stage, work, seed + part)
        first_draw += stage.draws
    return unet


def unet_training_set(seed: int = 0, most: int | None = None) -> TrainingSet:
    """What the U-Net was trained on; with `most`, another and smaller set, that has so many draws in each part."""
    parts = (STAGES[name].draws for name in UNET_STAGES)
    return TrainingSet(tuple(draws if most is None else min(draws, most) for draws in parts), seed)


class DrawnScenes(Dataset):
    """The U-Net's draws as (pixels (3, 64, 64) uint8, caption, whether the scene is a repeated one)."""

    def __init__(self, training_set: TrainingSet):
        self.training_set = training_set

    def __len__(self) -> int:
        return len(self.training_set)

    def __getitem__(self, draw: int) -> tuple[torch.Tensor, str, bool]:
        scene = self.training_set.scene(draw)
        repeated = bool(self.training_set.plan_index[draw] >= 0)
        return torch.from_numpy(scene.draw()).permute(2, 0, 1), scene.caption, repeated


def noised(
    scheduler: DDIMScheduler, latents: torch.Tensor, generator: torch.Generator, noise_share: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, timesteps (B,) and velocities, of which about a share are noise alone at the last timestep.

    The velocity, of latents and noise both, is what the U-Net must predict also where it sees nothing of the latents.
    """
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = stratified_timesteps(len(latents), generator)
    noise_only = torch.rand(len(latents), generator=generator) < noise_share
    timesteps[noise_only] = scheduler.config.num_train_timesteps - 1
    noisy = scheduler.add_noise(latents, noise, timesteps)
    noisy[noise_only] = noise[noise_only]
    return noisy, timesteps, scheduler.get_velocity(latents, noise, timesteps)


def stratified_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count,) uniform over 0..999, one from each of count equal slices: less variance than independent draws."""
    shares = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return (shares * 1000).long()


# --- All of it -----------------------------------------------------------------------------------------------------


def save_testbed(out: Path, vae, clip: CLIPModel, tokenizer, unet, training_set: TrainingSet) -> None:
    """Write the pipeline in diffusers' layout, the CLIP for alignment scores beside it, and the targets.

    The U-Net, nine tenths of the weights, is stored in float16.
    """
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, new_scheduler(), None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(out)
    # By the names that published Stable Diffusion models have: every version of transformers reads those.
    named = {f"text_model.{name}": weight for name, weight in text_encoder.state_dict().items()}
    save_file(named, out / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    copy.deepcopy(unet).half().save_pretrained(out / "unet")
    clip.save_pretrained(out / "clip")
    tokenizer.save_pretrained(out / "clip")
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SIDE, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(out / "clip")
    save_targets(out / "targets.parquet", training_set)


def save_targets(path: Path, training_set: TrainingSet) -> None:
    """One row a target: id, prompt, kind, duplicates (times seen in training), seed of the scene, image as PNG."""
    rows = []
    for plan in planned():
        png = io.BytesIO()
        Image.fromarray(plan.scene.draw()).save(png, "PNG")
        count = training_set.duplicates[plan.id]
        row = {"id": plan.id, "prompt": plan.scene.caption, "kind": plan.kind, "duplicates": count}
        rows.append(row | {"seed": plan.seed, "image": png.getvalue()})
    pd.DataFrame(rows).to_parquet(path, index=False)


def save_nemo_statistics(out: Path, num_captions: int = 5000) -> None:
    """What NeMo must know of ordinary captions (`nemo.collect_statistics`), in out/nemo_statistics.safetensors."""
    captions = [ordinary_scene(index, FIRST_SEED["validation"]).caption for index in range(num_captions)]
    pipe = load_pipeline(out, device="cpu")
    nemo.collect_statistics(pipe, captions, PRESETS["testbed"].nemo).save(out / "nemo_statistics.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/testbed"), help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=TESTBED, help="where the finished model goes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = new_tokenizer()
    vae = train_vae(args.work, args.seed)
    clip = train_clip(args.work, tokenizer, args.seed)
    unet = train_unet(args.work, vae, tokenizer, clip.text_model, args.seed)
    vae = finetune_decoder(args.work, vae, args.seed)
    save_testbed(args.out, vae, clip, tokenizer, unet, unet_training_set(args.seed))
    save_nemo_statistics(args.out)


if __name__ == "__main__":
    main()
