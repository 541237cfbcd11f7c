"""Search: which training image is nearest to this one, among all that the testbed was ever shown?

SSCD of the whole training set would take most of an hour on two cores. So every distinct training scene is drawn again
and kept as a thumbnail of 8x8 pixels, and only the `shortlist` whose thumbnails correlate most with the query's are
compared by SSCD. Notebook 01 measures what that misses.

Shapes: N queries, M distinct training scenes.
"""

import hashlib

import numpy as np
import pandas as pd
from joblib import Parallel, cpu_count, delayed
from PIL import Image

from dori_utils.core.sscd import TRANSFORMS, nearest
from dori_utils.testbed.data import TrainingSet, planned
from dori_utils.testbed.scenes import sprite_names

THUMBNAIL = 8  # px
CHUNK = 4096  # draws in one case of the store


def distinct_draws(training_set: TrainingSet) -> np.ndarray:
    """(M,) the draws whose scene no earlier draw has shown."""
    return np.sort(np.unique(training_set.ids, return_index=True)[1])


def thumbnail(image: Image.Image) -> np.ndarray:
    """(8, 8, 3) uint8."""
    return np.asarray(image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def training_thumbnails(training_set: TrainingSet, draws: np.ndarray, store) -> np.ndarray:
    """(M, 8, 8, 3) uint8, from the store or drawn, which takes minutes the first time."""
    chunks = [draws[i : i + CHUNK] for i in range(0, len(draws), CHUNK)]
    key = {"what": "training thumbnails", **_about(training_set)}

    def compute(cases: list[dict]) -> list[dict]:
        jobs = (delayed(_scene_thumbnails)(training_set, chunks[case["chunk"]]) for case in cases)
        return [{"thumbnails": thumbnails} for thumbnails in Parallel(n_jobs=processes)(jobs)]

    processes = cpu_count()
    cases = [{**key, "chunk": i} for i in range(len(chunks))]
    stored = store.map(cases, compute, batch_size=processes, desc="training set, in chunks")
    return np.concatenate([case["thumbnails"] for case in stored])


def _about(training_set: TrainingSet) -> dict:
    """What a search in it depends on, beside the queries."""
    ids = hashlib.sha256(training_set.ids.tobytes()).hexdigest()[:32]
    return {"ids": ids, "side": THUMBNAIL, "world": list(sprite_names())}


def _pixels(images: list[Image.Image]) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return digest.hexdigest()[:32]


def _scene_thumbnails(training_set: TrainingSet, draws: np.ndarray) -> np.ndarray:
    return np.stack([thumbnail(Image.fromarray(training_set.scene(draw).draw())) for draw in draws])


def nearest_training_images(
    images: list[Image.Image], training_set: TrainingSet, store, sscd, transform, shortlist: int = 20
) -> pd.DataFrame:
    """The training image most similar to each of N images, from the store or searched for.

    Returns:
        A row for each image: draw (its number in the training set), target (id, or "ordinary"), kind, sscd.
    """
    config = {"what": "nearest training images", "images": _pixels(images), **_about(training_set)}
    config |= {"sscd": sscd.name, "transform": repr(TRANSFORMS[transform]), "shortlist": shortlist}

    def search() -> dict:
        best, scores = _searched(images, training_set, store, sscd, transform, shortlist)
        return {"draw": best, "sscd": scores}

    found = store.fetch(config, search)
    who = [planned()[i] if i >= 0 else None for i in training_set.plan_index[found["draw"]]]
    names = {"target": [p.id if p else "ordinary" for p in who], "kind": [p.kind if p else "ordinary" for p in who]}
    return pd.DataFrame({"draw": found["draw"], **names, "sscd": found["sscd"]})


def _searched(images, training_set, store, sscd, transform, shortlist) -> tuple[np.ndarray, np.ndarray]:
    """Of each image the draw nearest to it (N,), and its SSCD (N,)."""
    draws = distinct_draws(training_set)
    candidates = shortlisted(images, training_thumbnails(training_set, draws, store), shortlist)  # (N, shortlist)
    once, places = np.unique(candidates, return_inverse=True)  # copies of one image have the same candidates
    theirs = sscd.embed([Image.fromarray(training_set.scene(d).draw()) for d in draws[once]], transform)
    theirs = theirs[places.reshape(candidates.shape)]  # (N, shortlist, D)
    scores = np.einsum("nd,nsd->ns", sscd.embed(images, transform), theirs)
    best = scores.argmax(axis=1)
    rows = np.arange(len(images))
    return draws[candidates[rows, best]], scores[rows, best]


def shortlisted(images: list[Image.Image], thumbnails: np.ndarray, count: int) -> np.ndarray:
    """(N, count) rows of thumbnails (M, 8, 8, 3) that correlate most with each of N images, in no order."""
    queries = _standardized(np.stack([thumbnail(image) for image in images]))
    similarity = queries @ _standardized(thumbnails).T  # (N, M)
    return np.argpartition(-similarity, count, axis=1)[:, :count]


def shortlist_recall(images: list[Image.Image], training_set: TrainingSet, store, sscd, transform) -> pd.DataFrame:
    """What a shortlist of 20 misses: against SSCD to each of a sample of the training set, repeated scenes in it.

    Returns:
        For each level of SSCD: how many images have a match above it, and the share whose match was on the shortlist.
    """
    draws = distinct_draws(training_set)
    sample = np.sort(np.random.default_rng(0).choice(len(draws), min(2000, len(draws) // 4), replace=False))
    repeated = np.flatnonzero(training_set.plan_index[draws] >= 0)
    sample = np.union1d(sample, repeated[:: max(1, len(repeated) // 500)])
    config = {"what": "exhaustive search", "images": _pixels(images), "n": len(sample), **_about(training_set)}
    config |= {"sscd": sscd.name, "transform": repr(TRANSFORMS[transform])}

    def exhaustive() -> dict:
        scenes = [Image.fromarray(training_set.scene(draw).draw()) for draw in draws[sample]]
        scores, best = nearest(sscd.embed(images, transform), sscd.embed(scenes, transform))
        return {"scores": scores[:, 0], "best": best[:, 0]}

    full = store.fetch(config, exhaustive)
    shortlist = shortlisted(images, training_thumbnails(training_set, draws, store)[sample], 20)
    hit = (shortlist == full["best"][:, None]).any(axis=1)
    above = {level: full["scores"] > level for level in (0.5, 0.6, 0.7, 0.8)}
    return pd.DataFrame(
        [
            {"SSCD above": s, "matches": int(of.sum()), "found": hit[of].mean() if of.any() else 1.0}
            for s, of in above.items()
        ]
    )


def _standardized(thumbnails: np.ndarray) -> np.ndarray:
    """(M, 192) float32, zero mean and length 1, so that products are correlations."""
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
