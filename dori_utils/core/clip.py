"""CLIP: does the image show what the caption says?

Alignment (A_CLIP) is the cosine of CLIP's image and text embedding; retrieval: does it pick the right caption among
many? Nothing is downloaded unless it is asked for: weights are looked for in data/ (`store.data_folder`), and what is
missing is named together with where to get it.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from dori_utils.core.pictures import to_rgb
from dori_utils.core.store import data_folder

CLIP_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class CLIP:
    """A `CLIPModel` with its tokenizer and image processor, whatever its image size: embeddings of length 1."""

    name: str
    model: torch.nn.Module
    tokenizer: object
    image_processor: object

    @torch.inference_mode()
    def embed_images(self, images, batch_size=64):
        """N PIL images to (N, D) float32."""
        images = [to_rgb(image) for image in images]
        batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        pixels = (self.image_processor(batch, return_tensors="pt").pixel_values for batch in batches)
        return self._unit_rows(
            self.model.get_image_features(batch.to(self.model.device, self.model.dtype)) for batch in pixels
        )

    def embed_rows(self, images):
        """N lists of S PIL images, as `generate` returns them, to (N, S, D) float32."""
        rows = self.embed_images([image for row in images for image in row])
        return rows.reshape(len(images), len(images[0]), -1)  # (N * S, D) → (N, S, D)

    @torch.inference_mode()
    def embed_texts(self, captions, batch_size=256):
        """N captions to (N, D) float32.

        Raises:
            ValueError: a caption has more tokens than the model takes.
        """
        tokens = self.tokenizer(list(captions), padding=True, return_tensors="pt").to(self.model.device)
        length, limit = tokens.input_ids.shape[1], self.model.config.text_config.max_position_embeddings
        if length > limit:
            raise ValueError(f"The longest caption has {length} tokens; {self.name} takes {limit}. Shorten it.")
        batches = zip(*(part.split(batch_size) for part in (tokens.input_ids, tokens.attention_mask)), strict=True)
        return self._unit_rows(
            self.model.get_text_features(input_ids=ids, attention_mask=mask) for ids, mask in batches
        )

    @cached_property
    def fingerprint(self):
        """16 hex characters that change with any weight, and with how images are prepared."""
        digest = hashlib.sha256(self.image_processor.to_json_string().encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _unit_rows(self, outputs):
        rows = torch.cat([output.pooler_output for output in outputs]).float()
        return torch.nn.functional.normalize(rows, dim=1).cpu().numpy()


def load_clip(name_or_path, *, device=None, revision=None, local_files_only=True):
    """Load a CLIP from a folder or, by its id, from the Hugging Face Hub.

    Args:
        name_or_path: a folder with model.safetensors, the tokenizer's files and preprocessor_config.json, such as the
            testbed's own; or a Hub id, such as "openai/clip-vit-base-patch32". Pickled weights are never read.
        device: default: the best there is.
        revision: branch, tag or commit of a Hub model. OpenAI's has safetensors in "refs/pr/15" alone.
        local_files_only: take a Hub model from the local cache; False: download what is not there.

    Raises:
        FileNotFoundError: a file is missing; says which, and how to get it.
    """
    # The variant that resizes with Pillow: the other one needs torchvision, which nothing else here does.
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    from dori_utils.core.models import default_device

    folder = _clip_folder(name_or_path, revision, local_files_only)
    model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return CLIP(
        name=Path(name_or_path).name,
        model=model.to(device or default_device()).eval().requires_grad_(False),
        tokenizer=CLIPTokenizer.from_pretrained(folder, local_files_only=True),
        image_processor=CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True),
    )


def retrieval_accuracy(images, captions, clip):
    """Share of each caption's images for which CLIP ranks that caption first among all N.

    Args:
        images: N lists of PIL images, as `generate` returns them.
        captions: N different captions; chance is 1 / N.

    Returns:
        (N,) float64, one share for each caption; its mean is the accuracy, `bootstrap_interval` its interval.
    """
    if len(images) != len(captions) or len(set(captions)) != len(captions):
        raise ValueError(f"{len(images)} lists of images need as many different captions, got {len(set(captions))}.")
    texts = clip.embed_texts(captions)  # (N, D)
    best = [(clip.embed_images(row) @ texts.T).argmax(axis=1) for row in images]
    return np.array([(picked == caption).mean() for caption, picked in enumerate(best)])


def _clip_folder(name_or_path, revision, local_files_only):
    """The folder with all the files of a CLIP."""
    folder, wanted = Path(name_or_path).expanduser(), Path(name_or_path)
    if not folder.is_dir() and isinstance(name_or_path, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name_or_path):
        from transformers.utils import cached_file

        wanted, options = data_folder() / "clip", {"revision": revision, "local_files_only": local_files_only}
        try:
            files = [cached_file(name_or_path, name, **options) for name in CLIP_FILES]
        except OSError as error:
            reason = f"there is no such folder, and of the Hub: {str(error).splitlines()[0]}"
            raise FileNotFoundError(_no_clip(name_or_path, reason, wanted)) from error
        folder = Path(files[0]).parent
    for name in CLIP_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(_no_clip(name_or_path, f"{name} is missing", wanted))
    return folder


def _no_clip(name_or_path, reason, wanted):
    return (
        f"No CLIP in {name_or_path}: {reason.rstrip('.')}. To get CLIP ViT-B/32:\n    "
        f"hf download openai/clip-vit-base-patch32 {' '.join(CLIP_FILES)} --revision refs/pr/15 --local-dir {wanted}\n"
        "Its main revision has no model.safetensors, only pickled weights, which are never read. By its id it is taken "
        "from the Hub's local cache, or downloaded with local_files_only=False, revision='refs/pr/15'."
    )
