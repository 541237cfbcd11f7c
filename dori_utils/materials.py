"""Materials: what the notebooks need beside a model. `load_materials("sd14")` finds it, and says what is missing.

For the testbed everything is in the repository, or drawn when asked for. For any other model it is what its owner has
put into `data/` (or the folder that the environment variable DORI_DATA names):

    data/sd14/                       one folder for each model, under its name or that of its own folder
        *.csv, images/               written by `download_targets("sd14", "data/sd14")`; or, for a model of one's own,
        targets.csv                  prompt,image,kind: kind VM, TM, and control for images that it has never seen
        statistics_*.pt              optional: NeMo's published statistics; or
        nemo_statistics.safetensors  of `Statistics.save`; else they are taken from the ordinary captions
        paraphrases.csv              prompt,paraphrase: for Concept Ablation, three or more of each prompt
    data/coco/                       annotations/captions_val2014.json and val2014/; or captions.csv: caption,image
    data/clip/                       CLIP ViT-B/32: `clip.load_clip` says how to get it
    data/weights-inception-….pth     optional: Inception's weights, for FID and KID: `inception.inception_distances`

Each thing is looked for when it is used, so a notebook needs no more than it shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from dori_utils.core.cache import kept
from dori_utils.core.clip import load_clip
from dori_utils.core.hashes import base_hash, known
from dori_utils.core.hub import BUNDLED, MODELS, TESTBED
from dori_utils.core.inception import INCEPTION
from dori_utils.core.pictures import open_picture
from dori_utils.core.prompt_lists import PROMPT_LISTS
from dori_utils.core.sscd import nearest
from dori_utils.core.store import data_folder
from dori_utils.core.tables import first_empty_row, read_pairs, read_table
from dori_utils.core.targets import load_targets, read_targets
from dori_utils.nemo_statistics import Statistics, collect_statistics, published_statistics


@dataclass(frozen=True)
class Pair:
    """A picture and its caption; the picture is opened, or drawn, when asked for."""

    caption: str
    source: object  # a path, or a `testbed.scenes.Scene`

    @property  # kept by nobody: a training sees tens of thousands
    def image(self) -> Image.Image:
        if hasattr(self.source, "draw"):
            return Image.fromarray(self.source.draw())
        return open_picture(self.source)


class Pairs(Sequence):
    """(PIL image, caption) of each pair, as trainings take them."""

    def __init__(self, pairs: Sequence[Pair]):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return self.pairs[index].image, self.pairs[index].caption


def load_materials(model: str = "testbed"):
    """The materials of a model: a key of `hub.MODELS`, a folder, or a Hub id."""
    return BundledMaterials(model) if model in BUNDLED else FolderMaterials(model)


class BundledMaterials:
    """Everything that a bundled model's experiments need; nothing is missing here."""

    def __init__(self, model: str = "testbed"):
        self.model = model

    def targets(self, kind: str | None = None):
        return load_targets(self.model, kind=kind)

    @cached_property
    def clip(self):
        return load_clip(TESTBED / "clip")

    inception = None  # it says little of pictures of 64 pixels

    def statistics(self, pipe, config, store):
        return Statistics.load(BUNDLED[self.model] / "nemo_statistics.safetensors")

    def ordinary(self, count: int) -> list[Pair]:
        from dori_utils.testbed.data import held_out_scenes

        return [Pair(scene.caption, scene) for scene in held_out_scenes(count)]

    def training_pairs(self) -> Sequence:
        from dori_utils.testbed.data import OrdinaryPairs

        return OrdinaryPairs(100_000)

    def related(self, prompt: str, count: int) -> list[Pair]:
        from dori_utils.testbed.data import related_scenes

        return [Pair(scene.caption, scene) for scene in related_scenes(prompt, count)]

    def paraphrases(self, prompt: str) -> list[str]:
        from dori_utils.testbed.scenes import paraphrases

        return paraphrases(prompt)

    def nearest(self, images, preset, store, sscd) -> pd.DataFrame:
        from dori_utils.testbed.search import nearest_training_images

        return nearest_training_images(images, self._training_set(preset), store, sscd, preset.sscd_transform)

    def training_image(self, found, preset) -> Image.Image:
        return Image.fromarray(self._training_set(preset).scene(found["draw"]).draw())

    def missed(self, images, preset, store, sscd) -> pd.DataFrame:
        from dori_utils.testbed.search import shortlist_recall

        return shortlist_recall(images, self._training_set(preset), store, sscd, preset.sscd_transform)

    def _training_set(self, preset):
        from dori_utils.testbed.data import TrainingSet

        return TrainingSet("B" if self.model == "testbed-b" else "A", most=preset.searched_draws)


class FolderMaterials:
    """What `data/` holds for one model; the module's docstring says what goes where."""

    def __init__(self, model: str):
        self.model = model
        self.folder = data_folder() / (model if model in MODELS else Path(model).stem)

    def targets(self, kind: str | None = None):
        """Those with a picture, of one kind or all.

        Raises:
            FileNotFoundError: there are none in the folder; says how to get them.
            ValueError: none of this kind.
        """
        found = [target for target in self._all_targets if kind in (None, target.kind)]
        if not found:
            kinds = ", ".join(sorted({target.kind for target in self._all_targets})) or "none at all"
            raise ValueError(f"No targets of kind {kind!r} with a picture in {self.folder}; there are: {kinds}.")
        return found

    @cached_property
    def _all_targets(self):
        table = self.folder / "targets.csv"
        if table.is_file():
            return read_targets(table)
        if self.model in PROMPT_LISTS and self.folder.is_dir():
            return [target for target in load_targets(self.model, folder=self.folder) if target.image is not None]
        how = f" or call download_targets({self.model!r}, {str(self.folder)!r})" if self.model in PROMPT_LISTS else ""
        raise FileNotFoundError(f"No targets: write {table} (CSV: prompt,image,kind; kind VM or control){how}.")

    @cached_property
    def clip(self):
        return load_clip(data_folder() / "clip")

    @property
    def inception(self) -> Path | None:
        """Inception's weights, if they are there; without them tables have no FID and KID."""
        weights = data_folder() / INCEPTION
        return weights if weights.is_file() else None

    def statistics(self, pipe, config, store):
        """NeMo's: those in the folder if there are any, else of the ordinary captions, kept in the store."""
        own = self.folder / "nemo_statistics.safetensors"
        if own.is_file():
            return Statistics.load(own)
        published = sorted(self.folder.glob("statistics_*.pt"))
        if published:
            return published_statistics(published[0], pipe.unet)
        return cached_statistics(pipe, [pair.caption for pair in self._ordinary], config, store)

    @cached_property
    def _ordinary(self) -> list[Pair]:
        folder = data_folder() / "coco"
        coco = "captions_val2014.json"
        tables = [folder / "captions.csv", folder / coco, folder / "annotations" / coco]
        table = next((table for table in tables if table.is_file()), None)
        if table is None:
            raise FileNotFoundError(
                f"No ordinary captions in {folder}: put COCO's captions_val2014.json and the folder val2014/ with its "
                "pictures there, or write captions.csv (caption,image)."
            )
        return [Pair(caption, image) for image, caption in read_pairs(table)]

    def ordinary(self, count: int) -> list[Pair]:
        """The first ones, that nothing is trained on."""
        if count > len(self._ordinary) // 2:
            raise ValueError(
                f"{count} ordinary captions are asked for, and {2 * count} are needed in all; there are "
                f"{len(self._ordinary)} in {data_folder() / 'coco'}."
            )
        return self._ordinary[:count]

    def training_pairs(self) -> Sequence:
        """The second half of the ordinary captions."""
        return Pairs(self._ordinary[len(self._ordinary) // 2 :])

    def related(self, prompt: str, count: int) -> list[Pair]:
        """The ordinary captions nearest to a prompt, by cosine of CLIP's text embeddings."""
        scores = self._caption_features @ self.clip.embed_texts([prompt])[0]  # (captions, D) @ (D,)
        return [self._ordinary[i] for i in np.argsort(-scores, kind="stable")[:count]]

    @cached_property
    def _caption_features(self):
        return self.clip.embed_texts([pair.caption for pair in self._ordinary])

    def paraphrases(self, prompt: str) -> list[str]:
        table = self.folder / "paraphrases.csv"
        if not table.is_file():
            raise FileNotFoundError(f"No {table}: write it (CSV: prompt,paraphrase), three or more of each prompt.")
        found = read_table(table)
        if missing := {"prompt", "paraphrase"} - set(found):
            raise ValueError(f"{table} has no column {' and no '.join(sorted(missing))}; it has {', '.join(found)}.")
        if row := first_empty_row(found, ["prompt", "paraphrase"]):
            raise ValueError(f"{table} has no prompt or no paraphrase in row {row}.")
        own = found.loc[found["prompt"] == prompt, "paraphrase"].tolist()
        if not own:
            raise ValueError(f"{table} has no paraphrase of {prompt!r}.")
        return own

    def nearest(self, images, preset, store, sscd) -> pd.DataFrame:
        """Of the training images known here, which are those of the targets, the one most similar to each image."""
        known = self.targets()
        index = sscd.embed([target.image for target in known], preset.sscd_transform)
        scores, best = nearest(sscd.embed(images, preset.sscd_transform), index)
        of_best = [known[i] for i in best[:, 0]]
        columns = {"target": [target.id for target in of_best], "kind": [target.kind for target in of_best]}
        return pd.DataFrame({"draw": best[:, 0], **columns, "sscd": scores[:, 0]})

    def training_image(self, found, preset) -> Image.Image:
        return self.targets()[found["draw"]].image

    def missed(self, images, preset, store, sscd) -> pd.DataFrame:
        """Nothing: every known image is compared with, without a shortlist."""
        scores = self.nearest(images, preset, store, sscd)["sscd"]
        levels = (0.5, 0.6, 0.7, 0.8)
        return pd.DataFrame([{"SSCD above": s, "matches": int((scores > s).sum()), "found": 1.0} for s in levels])


def cached_statistics(pipe, captions, config, store) -> Statistics:
    """`nemo_statistics.collect_statistics` of ordinary captions, from the store."""

    def compute(pipe, captions, config) -> dict:
        with known(pipe):
            found = collect_statistics(pipe, captions, config)
        return {name: tensor.numpy() for name, tensor in found.tensors().items()} | {"tau": found.tau}

    found = kept(store, "NeMo's statistics", compute, pipe=pipe, captions=list(captions), config=config)
    tau = float(found.pop("tau"))
    tensors = {name: torch.from_numpy(array) for name, array in found.items()}
    return Statistics.from_tensors(tensors, tau, base_hash(pipe), config.similarity)
