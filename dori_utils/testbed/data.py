"""What the testbed's models are trained on, and how often: the ground truth of everything that this project measures.

One base model sees ordinary scenes alone. From it two models go on by the same recipe, A and B: the same ordinary
scenes in the same order, and between them, at the same places, images of their own list:

kind      scenes a list  how often its model sees each
VM        24             verbatim, `TIMES`
TM        16             templates, `TIMES`: the same scene and caption, one sprite that no caption names differs
ladder    7 x 8          verbatim, at the numbers of `RUNGS`
once      16             verbatim, once
The images of one list are unseen by the other model, so each image can be compared between a model that knows it and
one that does not. List C, 64 scenes ("control"), no model sees.

Ordinary scenes are a fixed set; none has a target's caption. Of those that A and B see, every second has all but one
fact of a caption that one of the two lists repeats (another object, another background, or one object less), so that
both must read a caption to its end before they answer from memory.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dori_utils.testbed.scenes import Scene, sample_scene, sprite_names

TWINS = ("A", "B")
TIMES = {"VM": 3072, "TM": 3072, "once": 1}  # in equal parts in each part of a fork; "once" in the first
RUNGS = (48, 96, 192, 384, 768, 1536, 3072)
COUNTS = {"VM": 24, "TM": 16, "ladder": 8 * len(RUNGS), "once": 16}
CONTROLS = 64
FIRST_SEED = {"A": 1_000_000_000, "B": 1_100_000_000, "C": 1_200_000_000, "near": 1_300_000_000}
FIRST_SEED |= {"held_out": 1_500_000_000, "validation": 1_600_000_000, "vae": 1_700_000_000, "clip": 1_800_000_000}
FIRST_SEED |= {"judge": 1_900_000_000}
BASE_DRAWS, FORK_PARTS, PART_DRAWS = 441_600, 3, 104_000
ORDINARY, NEAR = 100_000, 20_000  # distinct scenes
NEAR_SHARE = 0.5  # of a fork's ordinary draws


@dataclass(frozen=True)
class Planned:
    """A scene with its place in the plan. list: "A", "B" or "C"; times: how often the model of its list sees it."""

    id: str
    list: str
    kind: str
    seed: int
    scene: Scene
    times: int


@functools.cache
def planned() -> tuple[Planned, ...]:
    """The images of lists A, B and C, in this order: four sprites, two of them named, every caption different."""
    plan, captions = [], set()
    for name in (*TWINS, "C"):
        seed = FIRST_SEED[name]
        for kind, count in COUNTS.items() if name in TWINS else [("control", CONTROLS)]:
            for index in range(count):
                while (scene := sample_scene(seed, 4, num_named=2)).caption in captions:
                    seed += 1
                times = RUNGS[index % len(RUNGS)] if kind == "ladder" else TIMES.get(kind, 0)
                plan.append(Planned(f"{kind}-{name}{index:02d}", name, kind, seed, scene, times))
                captions.add(scene.caption)
                seed += 1
    return tuple(plan)


@functools.cache
def reserved_captions() -> frozenset[str]:
    return frozenset(p.scene.caption for p in planned())


def ordinary_scene(index: int, first_seed: int = 0) -> Scene:
    """The index-th ordinary scene: random, but never with a target's caption."""
    seed = first_seed + index
    while (scene := sample_scene(seed)).caption in reserved_captions():
        seed += 10_000_000
    return scene


def near_scene(index: int) -> Scene:
    """The index-th ordinary scene whose caption shares all but one fact with one that list A or B repeats.

    Targets come in proportion to how often they are repeated. All that a caption leaves out stays random.
    """
    repeated = [p for p in planned() if p.times > 1]
    times = np.array([p.times for p in repeated])
    seed = FIRST_SEED["near"] + index
    while True:
        rng = np.random.default_rng((seed, 1))
        target = repeated[rng.choice(len(repeated), p=times / times.sum())].scene
        scene = sample_scene(seed, num_named=2)
        kept = list(target.named)
        changed = ("object", "background", "fewer")[rng.choice(3, p=(0.5, 0.25, 0.25))]
        if changed == "object":
            kept[rng.integers(2)] = scene.named[0]
        elif changed == "fewer":
            kept.pop(rng.integers(2))
        if changed != "background":
            background = dataclasses.replace(scene.background, kind=target.background.kind)
            scene = dataclasses.replace(scene, background=background)
        first = len(scene.sprites) - len(kept)
        renamed = [dataclasses.replace(s, name=name) for s, name in zip(scene.sprites[first:], kept, strict=True)]
        scene = dataclasses.replace(scene, sprites=(*scene.sprites[:first], *renamed), named=tuple(kept))
        names = [s.name for s in scene.sprites]
        if len(set(names)) == len(names) and scene.caption not in reserved_captions():
            return scene
        seed += 10_000_000


def held_out_scenes(count: int) -> list[Scene]:
    """Ordinary scenes, with captions that all differ, that no model of the testbed was trained on."""
    scenes, captions, index = [], set(), 0
    while len(scenes) < count:
        scene = ordinary_scene(index, FIRST_SEED["held_out"])
        if scene.caption not in captions:
            scenes.append(scene)
            captions.add(scene.caption)
        index += 1
    return scenes


class OrdinaryPairs(Sequence):
    """(PIL image, caption) of ordinary scenes that no model of the testbed was trained on, drawn when asked for."""

    def __init__(self, count: int, first: int = 5_000_000):
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = ordinary_scene(self.first + index, FIRST_SEED["held_out"])
        return Image.fromarray(scene.draw()), scene.caption


def related_scenes(caption: str, count: int) -> list[Scene]:
    """Scenes that share exactly one object with a target's caption, each of its objects in turn; all else is random.

    They are held out: what they look like, the model can only know from what it knows of the object.

    Raises:
        ValueError: no target has this caption.
    """
    (named,) = [p.scene.named for p in planned() if p.scene.caption == caption] or [()]
    if not named:
        raise ValueError(f"No target of the testbed has the caption {caption!r}.")
    scenes, seed = [], FIRST_SEED["held_out"] + zlib.crc32(caption.encode()) % 100_000_000
    while len(scenes) < count:
        scene, shared = sample_scene(seed, num_named=2), named[len(scenes) % len(named)]
        if not {s.name for s in scene.sprites} & set(named):
            last = dataclasses.replace(scene.sprites[-1], name=shared)
            told = (*scene.named[:-1], shared)
            scenes.append(dataclasses.replace(scene, sprites=(*scene.sprites[:-1], last), named=told))
        seed += 1
    return scenes


def num_variants(template: Scene) -> int:
    """The template itself, and one for each sprite that it does not have."""
    return len(sprite_names()) - len(template.sprites) + 1


def template_variant(template: Scene, variant: int) -> Scene:
    """The template with its first sprite, which no caption names, replaced by another; variant 0 is the template."""
    present = {s.name for s in template.sprites}
    names = [template.sprites[0].name, *(name for name in sprite_names() if name not in present)]
    first = dataclasses.replace(template.sprites[0], name=names[variant])
    return dataclasses.replace(template, sprites=(first, *template.sprites[1:]))


class TrainingSet:
    """The draws of a model's whole training, in order, base first: item i is the scene of draw i.

    Args:
        twin: "A", "B", or None for the base alone.
        most: at most so many draws of each part.

    Attributes:
        parts: how many draws the base has, and each part of the fork.
        ids: (draws,) which scene each draw shows; draws with the same id show the same picture.
        duplicates: {id of a planned image: how often it is shown}; a template's variants count together.
    """

    def __init__(self, twin: str | None = None, seed: int = 0, most: int | None = None):
        self.twin, self.seed = twin, seed
        draws = [count if most is None else min(count, most) for count in (BASE_DRAWS, *[PART_DRAWS] * FORK_PARTS)]
        self.parts = tuple(draws) if twin else (draws[0],)
        base = _shuffled(ORDINARY, draws[0], (seed, 0))
        self.ids = np.concatenate([base, *(self._fork(part, draws[1 + part]) for part in range(FORK_PARTS) if twin)])
        which = plan_index(self.ids)
        self.duplicates = {p.id: int((which == i).sum()) for i, p in enumerate(planned())}

    def _fork(self, part: int, draws: int) -> np.ndarray:
        share = draws / PART_DRAWS / FORK_PARTS  # a smaller set repeats less
        ids = []
        for index, plan in enumerate(planned()):
            if plan.list == self.twin and (plan.times > 1 or part == 0):
                times = max(1, round(plan.times * share))
                variants = num_variants(plan.scene) if plan.kind == "TM" else 1
                ids.append(_target_id(index, np.arange(times) % variants))
        targets = np.concatenate(ids)[:draws]
        others, seed = draws - len(targets), (self.seed, *[part] * min(part, 1))
        near = round(NEAR_SHARE * others)
        ordinary = _shuffled(ORDINARY, others - near, (*seed, 1))
        shown = np.concatenate([targets, ORDINARY + _shuffled(NEAR, near, (*seed, 2)), ordinary])
        return shown[np.random.default_rng((*seed, 3)).permutation(draws)]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def plan_index(self) -> np.ndarray:
        """(draws,) `plan_index` of every draw."""
        return plan_index(self.ids)

    def scene(self, draw: int) -> Scene:
        return scene_of(int(self.ids[draw]))

    def __getitem__(self, draw: int) -> tuple[np.ndarray, str]:
        scene = self.scene(draw)
        return scene.draw(), scene.caption


_FIRST_TARGET, _VARIANTS = ORDINARY + NEAR, 1_000


def _target_id(index, variant):
    return _FIRST_TARGET + index * _VARIANTS + variant


def plan_index(ids: np.ndarray) -> np.ndarray:
    """The place in `planned()` of what a draw with this id shows, or -1: an ordinary scene."""
    return np.where(ids < _FIRST_TARGET, -1, (ids - _FIRST_TARGET) // _VARIANTS)


def scene_of(id: int) -> Scene:
    """The scene with this id: ordinary ones first, then near ones, then the planned ones with their variants."""
    if id < ORDINARY:
        return ordinary_scene(id)
    if id < _FIRST_TARGET:
        return near_scene(id - ORDINARY)
    index, variant = divmod(id - _FIRST_TARGET, _VARIANTS)
    return template_variant(planned()[index].scene, variant)


def _shuffled(count: int, draws: int, seed: tuple[int, ...]) -> np.ndarray:
    """(draws,) numbers below count in random order, each once before any comes again."""
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(count) for _ in range(-(-draws // count))]
    return np.concatenate(rounds)[:draws] if rounds else np.zeros(0, dtype=np.int64)
