"""Judge: a small network that says which sprites are in a picture, so that we can count what a model draws.

It was trained on real scenes alone (`tools.training.train_judge`), and on none that a U-Net or the CLIP has seen.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification

from dori_utils.testbed.data import ordinary_scene
from dori_utils.testbed.scenes import sprite_names, to_model_range

SIDE = 128  # px, that pictures are enlarged to
VISIBLE = 1 / 3  # a sprite of which less can be seen counts neither way in training


def new_judge() -> ResNetForImageClassification:
    """One yes or no for each sprite."""
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(sprite_names())),
        label2id={name: i for i, name in enumerate(sprite_names())},
        problem_type="multi_label_classification",
    )
    return ResNetForImageClassification(config)


def load_judge(folder: Path) -> ResNetForImageClassification:
    return ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


class Labelled(Dataset):
    """Ordinary scenes as (pixels (3, 64, 64) uint8, (sprites,) how much of each can be seen; 0: it is not there)."""

    def __init__(self, first_seed: int, size: int):
        self.first_seed, self.size = first_seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        scene = ordinary_scene(index, self.first_seed)
        visible = torch.zeros(len(sprite_names()))
        for name, share in scene.visible().items():
            visible[sprite_names().index(name)] = share
        return torch.from_numpy(scene.draw()).permute(2, 0, 1), visible


def judge_loss(judge: ResNetForImageClassification, batch, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
    pixels, visible = batch
    logits, there = judge(judge_input(pixels)).logits, visible >= VISIBLE
    counts = there | (visible == 0)
    losses = F.binary_cross_entropy_with_logits(logits, there.float(), reduction="none")
    return losses[counts].mean(), {"found": (logits[there] > 0).float().mean().item()}


def judge_input(pixels: torch.Tensor) -> torch.Tensor:
    """(N, 3, 64, 64) uint8 → what the judge takes."""
    return F.interpolate(to_model_range(pixels), SIDE, mode="bilinear")


@torch.inference_mode()
def sprites_in(judge: ResNetForImageClassification, images: list[Image.Image]) -> np.ndarray:
    """(N, sprites) bool, in the order of `sprite_names`: what the judge sees in each image of 64x64 pixels."""
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images])
    return torch.cat([judge(judge_input(some)).logits > 0 for some in pixels.split(64)]).numpy()


def named_found(judge: ResNetForImageClassification, images: list[list[Image.Image]], scenes) -> np.ndarray:
    """(N, seeds) for N scenes and their images: the share of the sprites named in the caption that the judge sees."""
    shares = []
    for scene, row in zip(scenes, images, strict=True):
        seen = sprites_in(judge, row)
        shares.append(seen[:, [sprite_names().index(name) for name in scene.named]].mean(axis=1))
    return np.array(shares)
