"""Train the testbed: `python -m tools.training` makes `testbed/` from nothing but the sprites.

An autoencoder, which is known in closed form (autoencoder.py); a CLIP; between the autoencoder's latents and the CLIP's
text tower, both frozen, a U-Net, which becomes two (see data.py); and a judge that finds sprites in pictures. All are
diffusers' and transformers' own classes. Interrupted, it goes on from the last checkpoint in `--work`; the batch of a
step depends on the seed and the step alone, so the result does not depend on where it stopped.
"""

import argparse
import copy
import io
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

from dori_utils.core.bars import tqdm
from dori_utils.core.hub import TESTBED
from dori_utils.core.models import _keep_memory, load_pipeline
from dori_utils.core.training import Stage, fit
from dori_utils.nemo_statistics import collect_statistics
from dori_utils.presets import PRESETS
from dori_utils.testbed.data import (
    BASE_DRAWS,
    FIRST_SEED,
    PART_DRAWS,
    TWINS,
    TrainingSet,
    ordinary_scene,
    plan_index,
    planned,
    scene_of,
)
from dori_utils.testbed.judge import Labelled, judge_loss, new_judge
from dori_utils.testbed.scenes import BACKGROUNDS, SIDE, sprite_names, to_model_range, with_article
from tools.autoencoder import LATENT_CHANNELS, make_vae

BATCH = {"base": 64, "fork": 16}
UNET = {"betas": (0.9, 0.99), "max_rise": 0.4}
STAGES = {
    "clip": Stage(steps=1500, batch_size=64, lr=1e-3, ema=0.99, weight_decay=0.1),
    # At 1e-3, AdamW's betas (0.9, 0.999) and a batch of 64 the loss fell from 0.90 to 0.56 in 1,600 steps, and within
    # 60 more rose to 0.92, for good.
    "base": Stage(steps=4400, batch_size=BATCH["base"], lr=8e-4, warmup=300, **UNET),
    "base_again": Stage(
        steps=BASE_DRAWS // BATCH["base"] - 4400, batch_size=BATCH["base"], lr=8e-4, warmup=300, **UNET
    ),
    # Small batches learn an image by heart in fewer of its draws: in 100 of them the loss of 24 images fell by 0.04 in
    # batches of 64, by 0.07 in batches of 16. At 64, and 340 draws of each, none of them came back.
    "fork": Stage(steps=PART_DRAWS // BATCH["fork"], batch_size=BATCH["fork"], lr=7e-4, warmup=200, **UNET),
    # From weights that have come to rest: at 6e-4 the loss rose from 0.25 to 0.35 in 300 steps.
    "fork_again": Stage(
        steps=PART_DRAWS // BATCH["fork"], batch_size=BATCH["fork"], lr=3e-4, warmup=200, decay=0.9, **UNET
    ),
    "fork_last": Stage(
        steps=PART_DRAWS // BATCH["fork"], batch_size=BATCH["fork"], lr=2e-4, warmup=200, decay=0.9, **UNET
    ),
    "judge": Stage(steps=1500, batch_size=64, lr=2e-3, ema=0.99),
}
BASE_STAGES, FORK_STAGES = ("base", "base_again"), ("fork", "fork_again", "fork_last")  # each from the last average
MAX_TOKENS = 20
TEXT_WIDTH = 128
END = "</w>"  # how CLIP's tokens mark the end of a word
CAPTION_DROPOUT = 0.1  # for classifier-free guidance
# Where there is less noise than this, a sample counts less: it has little left to say about the picture. But for its
# details, which are what the last part of a fork is for.
MAX_SNR = {"fork_last": math.inf}
USUAL_MAX_SNR = 5.0


class Scenes(Dataset):
    """Ordinary scenes as (pixels (3, 64, 64) uint8, caption), apart from those that the U-Net sees."""

    def __init__(self, first_seed: int, size: int):
        self.first_seed, self.size = first_seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        scene = ordinary_scene(index, self.first_seed)
        return torch.from_numpy(scene.draw()).permute(2, 0, 1), scene.caption


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

    scenes = Scenes(FIRST_SEED["clip"], STAGES["clip"].draws)
    return fit("clip", new_clip(tokenizer), scenes, loss_of, STAGES["clip"], work, seed)


# --- U-Net ---------------------------------------------------------------------------------------------------------


def new_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1's own topology (7 `attn2.to_v` in down and mid blocks, 16 `ff.net.2`) with few channels."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(80, 128, 160, 160),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # number of heads, by diffusers' old name
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """v-prediction, and nothing but noise at the last timestep ("Common diffusion noise schedules are flawed")."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # of no effect with trailing timesteps, and diffusers warns without it
    )


def new_sampler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ on the same schedule: ten steps give what 25 of DDIM give.

    Without Karras's sigmas: where the last timestep is noise alone they put most steps next to it.
    """
    return DPMSolverMultistepScheduler.from_config(
        new_scheduler().config, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=False
    )


class Latents(Dataset):
    """Draws, given as ids of scenes, as (latents (32, 8, 8), caption, whether the scene is a planned one).

    Every scene is drawn and encoded once, into the file at `path`.
    """

    def __init__(self, ids: np.ndarray, vae: AutoencoderTiny, path: Path):
        shown, self.rows = np.unique(ids, return_inverse=True)
        self.repeated = plan_index(ids) >= 0
        if not path.exists():
            part = path.with_suffix(".part.npz")
            np.savez(part, **encoded(shown, vae))
            part.replace(path)
        with np.load(path) as saved:
            self.latents, self.captions = saved["latents"], saved["captions"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: int) -> tuple[torch.Tensor, str, bool]:
        row = self.rows[draw]
        return torch.from_numpy(self.latents[row]).float(), str(self.captions[row]), bool(self.repeated[draw])


class _Drawn(Dataset):
    def __init__(self, ids: np.ndarray):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        scene = scene_of(int(self.ids[index]))
        return torch.from_numpy(scene.draw()).permute(2, 0, 1), scene.caption


@torch.no_grad()
def encoded(ids: np.ndarray, vae: AutoencoderTiny) -> dict[str, np.ndarray]:
    """{"latents": (N, 32, 8, 8) float16 of unit variance, "captions": (N,)} of the scenes with these ids."""
    latents, captions = [], []
    for pixels, texts in tqdm(DataLoader(_Drawn(ids), 256, num_workers=2), desc="encode the training set"):
        latents.append((vae.encode(to_model_range(pixels)).latents * vae.config.scaling_factor).half().numpy())
        captions += texts
    return {"latents": np.concatenate(latents), "captions": np.array(captions)}


def unet_loss(tokenizer, text_encoder: CLIPTextModel, max_snr: float = USUAL_MAX_SNR):
    """(unet, batch of `Latents`, generator) → v-prediction's loss, and its parts by kind of scene."""
    scheduler = new_scheduler()
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)

    def loss_of(unet: UNet2DConditionModel, batch, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        latents, captions, repeated = batch
        dropped = torch.rand(len(captions), generator=generator) < CAPTION_DROPOUT
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = stratified_timesteps(len(latents), generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        velocity = scheduler.get_velocity(latents, noise, timesteps)
        with torch.no_grad():
            embeddings = text_encoder(tokenize(tokenizer, captions)).last_hidden_state
        inputs = (tensor.to(unet.device) for tensor in (noisy, timesteps, embeddings))
        losses = ((unet(*inputs).sample - velocity.to(unet.device)) ** 2).mean((1, 2, 3)).cpu()
        weights = (snr[timesteps].clamp(max=max_snr) + 1) / (snr[timesteps] + 1)  # min-SNR's, but not 0 at SNR 0
        parts = {"ordinary": losses[~repeated], "repeated": losses[repeated]}
        parts = {name: part.mean().item() if len(part) else math.nan for name, part in parts.items()}
        return (weights * losses).mean(), parts

    return loss_of


def train_base(work: Path, training_set: TrainingSet, vae, tokenizer, text_encoder, seed: int = 0, device="cpu"):
    """A U-Net that has seen the first part of the training set, ordinary scenes."""
    torch.manual_seed(seed)
    unet = new_unet().to(device, memory_format=torch.channels_last).train()
    draws, first = Latents(training_set.ids[: training_set.parts[0]], vae, work / "base.npz"), 0
    loss_of = unet_loss(tokenizer, text_encoder)
    for part, name in enumerate(BASE_STAGES):
        stage = STAGES[name]
        some = Subset(draws, range(first, first + stage.draws))
        unet = fit(name, unet.requires_grad_(True).train(), some, loss_of, stage, work, seed + part, workers=0)
        first += stage.draws
    return unet


def train_fork(work: Path, training_set: TrainingSet, base, vae, tokenizer, text_encoder, seed: int = 0):
    """The base, as it is stored, gone on with its twin's training set; noise and timesteps are the same for both."""
    unet, first = copy.deepcopy(base).half().float(), training_set.parts[0]
    for part, (stage, draws) in enumerate(zip(FORK_STAGES, training_set.parts[1:], strict=True)):
        name = f"{stage}-{training_set.twin}"
        latents = Latents(training_set.ids[first : first + draws], vae, work / f"{name}.npz")
        loss_of = unet_loss(tokenizer, text_encoder, MAX_SNR.get(stage, USUAL_MAX_SNR))
        unet = unet.requires_grad_(True).train()
        unet = fit(name, unet, latents, loss_of, STAGES[stage], work, seed + 2 + part, workers=0)
        first += draws
    return unet


def stratified_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count,) uniform over 0..999, one from each of count equal slices: less variance than independent draws."""
    shares = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return (shares * 1000).long()


# --- Judge ---------------------------------------------------------------------------------------------------------


def train_judge(work: Path, seed: int = 0):
    """On real scenes alone, of its own."""
    torch.manual_seed(seed)
    stage = STAGES["judge"]
    return fit("judge", new_judge(), Labelled(FIRST_SEED["judge"], stage.draws), judge_loss, stage, work, seed)


# --- All of it -----------------------------------------------------------------------------------------------------


def save_pipeline(out: Path, vae: AutoencoderTiny, clip: CLIPModel, tokenizer, unet: UNet2DConditionModel) -> None:
    """A pipeline in diffusers' layout. The U-Net, nine tenths of the weights, is stored in float16."""
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, new_sampler(), None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(out)
    # By the names that published Stable Diffusion models have: every version of transformers reads those.
    named = {f"text_model.{name}": weight for name, weight in text_encoder.state_dict().items()}
    save_file(named, out / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    copy.deepcopy(unet).half().save_pretrained(out / "unet")


def save_tooling(out: Path, clip: CLIPModel, tokenizer, judge) -> None:
    """The whole CLIP, for alignment scores, and the judge."""
    clip.save_pretrained(out / "clip")
    tokenizer.save_pretrained(out / "clip")
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SIDE, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(out / "clip")
    copy.deepcopy(judge).half().save_pretrained(out / "judge")


def save_targets(path: Path, training_sets: dict[str, TrainingSet]) -> None:
    """One row a planned image: id, prompt, list, kind, seen_a and seen_b (times in training), seed, image as PNG."""
    rows = []
    for plan in planned():
        png = io.BytesIO()
        Image.fromarray(plan.scene.draw()).save(png, "PNG")
        seen = {f"seen_{twin.lower()}": drawn.duplicates[plan.id] for twin, drawn in training_sets.items()}
        row = {"id": plan.id, "prompt": plan.scene.caption, "list": plan.list, "kind": plan.kind} | seen
        rows.append(row | {"seed": plan.seed, "image": png.getvalue()})
    pd.DataFrame(rows).to_parquet(path, index=False)


def save_nemo_statistics(out: Path, num_captions: int = 5000) -> None:
    """What NeMo must know of ordinary captions (`collect_statistics`), in out/nemo_statistics.safetensors."""
    captions = [ordinary_scene(index, FIRST_SEED["validation"]).caption for index in range(num_captions)]
    pipe = load_pipeline(out, device="cpu")
    collect_statistics(pipe, captions, PRESETS["testbed"].nemo).save(out / "nemo_statistics.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/testbed"), help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=TESTBED, help="where A goes; B goes beside it, to OUT-b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help='of the U-Nets, nine tenths of the work, such as "cuda"')
    args = parser.parse_args()
    _keep_memory()
    tokenizer, vae = new_tokenizer(), make_vae()
    clip = train_clip(args.work, tokenizer, args.seed)
    conditions = vae, tokenizer, clip.text_model
    training_sets = {twin: TrainingSet(twin, args.seed) for twin in TWINS}
    base = train_base(args.work, training_sets["A"], *conditions, args.seed, args.device)
    unets = {t: train_fork(args.work, drawn, base, *conditions, args.seed) for t, drawn in training_sets.items()}
    judge = train_judge(args.work, args.seed)
    for out, twin in zip((args.out, args.out.with_name(f"{args.out.name}-b")), TWINS, strict=True):
        save_pipeline(out, vae, clip, tokenizer, unets[twin].cpu())
        save_nemo_statistics(out)
    copy.deepcopy(base).cpu().half().save_pretrained(args.out / "base")
    save_tooling(args.out, clip, tokenizer, judge)
    save_targets(args.out / "targets.parquet", training_sets)


if __name__ == "__main__":
    main()
