"""What the testbed is trained on, and how often: the ground truth of everything that this project measures.

kind      scenes  how often in training
VM        24      verbatim, 1% of all draws each
TM        16      templates: the same scene and caption, one sprite that the caption leaves out differs each time
ladder    5 x 8   verbatim, at a quarter of VM's rate, a sixteenth, ... a 1024th
once      32      verbatim, exactly once
control   64      never
The rest of the draws are ordinary scenes, each drawn once and never again. No ordinary scene has a target's caption.
From draw 192,000 on, one ordinary scene in four, from 252,800 on one in two, and from 320,000 on seven in ten have all
but one fact of a repeated caption (another object, another background, or one object less), so that the model must read
a caption to its end before it answers from memory. In the last of these spans the other object is one of like colour,
which is what this small CLIP, and so the model, takes for the same thing most often.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .scenes import Scene, load_sprites, mean_color, sample_placed, sample_scene, sprite_names

VM_RATE, TM_RATE = 0.01, 0.0025  # share of the draws, each scene
LADDER_RATES = tuple(VM_RATE / 4**rung for rung in range(1, 6))
NEAR_SHARES = {0: 0.0, 192_000: 0.25, 252_800: 0.5, 320_000: 0.7}  # first draw → share of the ordinary draws
ALIKE_FROM = 320_000  # the draw from which the other object is of like colour
COUNTS = {"VM": 24, "TM": 16, "ladder": 8 * len(LADDER_RATES), "once": 32, "control": 64}
FIRST_SEED = {"VM": 1_000_000_000, "TM": 1_100_000_000, "ladder": 1_200_000_000, "once": 1_300_000_000}
FIRST_SEED |= {"control": 1_400_000_000, "held_out": 1_500_000_000, "validation": 1_600_000_000}


@dataclass(frozen=True)
class Planned:
    """A scene with its place in the plan. rate: share of all draws."""

    id: str
    kind: str
    seed: int
    scene: Scene
    rate: float


@functools.cache
def planned() -> tuple[Planned, ...]:
    """All targets and controls: three or four sprites, two of them named, every caption different."""
    plan, captions = [], set()
    for kind, count in COUNTS.items():
        seed = FIRST_SEED[kind]
        for index in range(count):
            while (scene := sample_scene(seed, 3 + seed % 2, num_named=2)).caption in captions:
                seed += 1
            rate = {"VM": VM_RATE, "TM": TM_RATE, "ladder": LADDER_RATES[index % 5]}.get(kind, 0.0)
            plan.append(Planned(f"{kind}-{index:02d}", kind, seed, scene, rate))
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
        seed += 100_000_000
    return scene


@functools.cache
def sprite_colors() -> np.ndarray:
    """(sprites, 3) mean colours, in the order of `sprite_names`."""
    return np.array([mean_color(load_sprites()[name]) for name in sprite_names()])


@functools.cache
def alike(name: str, count: int = 10) -> tuple[str, ...]:
    """The sprites whose mean colour is nearest to that of the one with this name, the nearest first."""
    names, colors = sprite_names(), sprite_colors()
    distances = np.linalg.norm(colors - colors[names.index(name)], axis=1)
    return tuple(names[i] for i in np.argsort(distances, kind="stable")[1 : count + 1])


def near_scene(index: int, other_alike: bool = False) -> Scene:
    """The index-th ordinary scene again, with a caption that shares all but one fact with a repeated target's.

    Targets come in proportion to how often they are repeated. All that a caption leaves out stays random. other_alike:
    where an object is another one, one of like colour.
    """
    repeated = [p for p in planned() if p.rate > 0]
    rates = np.array([p.rate for p in repeated])
    seed = index
    while True:
        rng = np.random.default_rng((seed, 1))
        target = repeated[rng.choice(len(repeated), p=rates / rates.sum())].scene
        scene = sample_scene(seed, num_named=2)
        kept = list(target.named)
        changed = ("object", "background", "fewer")[rng.choice(3, p=(0.5, 0.25, 0.25))]
        if changed == "object":
            which = rng.integers(2)
            kept[which] = str(rng.choice(alike(kept[which]))) if other_alike else scene.named[0]
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
        seed += 100_000_000


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

    def __init__(self, count: int, first: int = 80_000_000):
        self.count, self.first = count, first  # the testbed's other models took theirs from 50, 60 and 70 million on

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
    scenes, seed = [], FIRST_SEED["held_out"] + zlib.crc32(caption.encode())
    while len(scenes) < count:
        scene, shared = sample_scene(seed, num_named=2), named[len(scenes) % len(named)]
        if not {s.name for s in scene.sprites} & set(named):
            last = dataclasses.replace(scene.sprites[-1], name=shared)
            told = (*scene.named[:-1], shared)
            scenes.append(dataclasses.replace(scene, sprites=(*scene.sprites[:-1], last), named=told))
        seed += 1
    return scenes


def template_variant(template: Scene, variant: int) -> Scene:
    """The template with its first sprite, which no caption names, replaced; variant 0 is the template itself."""
    if variant == 0:
        return template
    rng = np.random.default_rng((template.background.seed, variant))
    present = {s.name for s in template.sprites}
    name = str(rng.choice([n for n in sprite_names() if n not in present]))
    old, new = template.sprites[0], sample_placed(rng, name, [])
    new = dataclasses.replace(new, x=old.x, y=old.y, size=old.size)
    return dataclasses.replace(template, sprites=(new, *template.sprites[1:]))


class TrainingSet:
    """The draws of a whole training run, in order: item i is the scene of draw i, the same whenever it is asked for.

    parts: how many draws each part of the run has; every part repeats scenes at the plan's rates, and the scenes seen
    once are in the first.
    """

    def __init__(self, parts: tuple[int, ...], seed: int = 0):
        self.parts, self.seed = tuple(parts), seed
        plan = planned()
        singles = [i for i, p in enumerate(plan) if p.kind == "once"]
        drawn = [self._plan_part(part, singles if part == 0 else []) for part in range(len(parts))]
        self.plan_index = np.concatenate(drawn)  # -1: an ordinary scene
        self.duplicates = {p.id: int((self.plan_index == i).sum()) for i, p in enumerate(plan)}

    def _plan_part(self, part: int, singles: list[int]) -> np.ndarray:
        num_draws = self.parts[part]
        rates = {i: p.rate for i, p in enumerate(planned()) if p.rate > 0}
        counts = [max(1, round(rate * num_draws)) for rate in rates.values()]
        occupied = np.concatenate([np.repeat(list(rates), counts), singles])
        plan_index = np.full(num_draws, -1, dtype=np.int32)
        places = np.random.default_rng((self.seed, num_draws, part)).permutation(num_draws)
        plan_index[places[: len(occupied)]] = occupied
        return plan_index

    def __len__(self) -> int:
        return len(self.plan_index)

    def scene(self, draw: int) -> Scene:
        index = self.plan_index[draw]
        if index < 0:
            share = next(share for first, share in reversed(NEAR_SHARES.items()) if draw >= first)
            near = np.random.default_rng((self.seed, draw, 2)).random() < share
            return near_scene(draw, other_alike=draw >= ALIKE_FROM) if near else ordinary_scene(draw)
        planned_scene = planned()[index]
        if planned_scene.kind == "TM":
            return template_variant(planned_scene.scene, variant=draw)
        return planned_scene.scene

    def __getitem__(self, draw: int) -> tuple[np.ndarray, str]:
        scene = self.scene(draw)
        return scene.draw(), scene.caption
