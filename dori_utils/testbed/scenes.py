"""Captioned scenes: the pictures that the testbed is trained on, drawn on demand, each a function of its seed.

A scene is two to four sprites on a background, 64x64 pixels. Its caption names one or two of the sprites and the kind
of background: "a guitar and an owl on a dotted background". Colours, places, sizes and the sprites that go unnamed are
left out, and what is left out is a particular picture's secret: a model that has learned captions cannot guess it, so a
model that draws it has memorized it.

The world is simple on purpose, so that a small model can learn to draw it: 36 flat sprites, always upright, of three
sizes, on a grid of places. No background is a fine pattern, since to SSCD two pictures with the same pattern are alike
whatever stands on it.
"""

import colorsys
import dataclasses
import functools
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIDE = 64  # px
BACKGROUNDS = ("plain", "gradient", "cloudy", "split", "framed", "wavy")
SIZES = (24, 36, 48)  # px, of a sprite
GRID = 4  # px: where a sprite's corner can lie
PLURALS = {"grapes"}  # "some ..."
SPRITE_ARCHIVE = Path(__file__).with_name("sprites.zip")


@dataclass(frozen=True)
class Background:
    """kind: one of BACKGROUNDS; colors: two RGB triples, 0..255; angle: radians; width: of a frame, in pixels."""

    kind: str
    colors: tuple[tuple[int, int, int], tuple[int, int, int]]
    angle: float
    width: int
    seed: int  # of the clouds


@dataclass(frozen=True)
class Placed:
    """A sprite in a scene: its left upper corner and its side, in pixels."""

    name: str
    left: int
    top: int
    size: int


@dataclass(frozen=True)
class Scene:
    """sprites are drawn in their order; named: those that the caption tells, a subset of their names."""

    background: Background
    sprites: tuple[Placed, ...]
    named: tuple[str, ...]

    @property
    def caption(self) -> str:
        article = "an" if self.background.kind[0] in "aeiou" else "a"
        return f"{' and '.join(map(with_article, self.named))} on {article} {self.background.kind} background"

    def draw(self) -> np.ndarray:
        """The scene as pixels, (64, 64, 3) uint8 RGB."""
        canvas = Image.fromarray(draw_background(self.background))
        for placed in self.sprites:
            sprite = scaled_sprite(placed.name, placed.size)
            canvas.paste(sprite, (placed.left, placed.top), sprite)
        return np.array(canvas)

    def visible(self) -> dict[str, float]:
        """{name of a sprite: share of it, by opacity, that no later sprite covers}."""
        left: dict[str, np.ndarray] = {}
        for placed in self.sprites:
            alpha = np.asarray(scaled_sprite(placed.name, placed.size).getchannel("A"), dtype=np.float32) / 255
            cover = np.zeros((SIDE, SIDE), dtype=np.float32)
            cover[placed.top : placed.top + placed.size, placed.left : placed.left + placed.size] = alpha
            left = {name: share * (1 - cover) for name, share in left.items()} | {placed.name: cover}
        total = {p.name: np.asarray(scaled_sprite(p.name, p.size).getchannel("A")).sum() / 255 for p in self.sprites}
        return {name: float(share.sum() / total[name]) for name, share in left.items()}


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 → float -1..1."""
    return pixels.float() / 127.5 - 1


def with_article(name: str) -> str:
    if name in PLURALS:
        return f"some {name}"
    return f"{'an' if name[0] in 'aeio' or name == 'umbrella' else 'a'} {name}"


def paraphrases(caption: str) -> list[str]:
    """Other captions for a scene with two named sprites, in the same words: in another order, or with one fact less."""
    named, _, background = caption.rpartition(" on ")
    first, _, second = named.partition(" and ")
    if not second:
        raise ValueError(f"{caption!r} is no caption of a scene with two named sprites.")
    pairs = [f"{second} and {first}", f"{first} and {second}"]
    reordered = [f"{pairs[0]} on {background}", *(f"{background} and {pair}" for pair in pairs)]
    return reordered + pairs + [f"{one} on {background}" for one in (first, second)]


def sample_scene(seed: int, num_sprites: int | None = None, num_named: int | None = None) -> Scene:
    """The scene of that seed. num_sprites (2 to 4) and num_named (1 or 2) are drawn too, unless given."""
    rng = np.random.default_rng(seed)
    background = sample_background(rng)
    count = rng.choice((2, 3, 4), p=(0.4, 0.4, 0.2)) if num_sprites is None else num_sprites
    names = rng.choice(sprite_names(), size=count, replace=False)
    sprites: list[Placed] = []
    for name in names:
        sprites.append(sample_placed(rng, str(name), sprites))
    told = rng.integers(1, 3) if num_named is None else num_named
    return Scene(background, tuple(sprites), tuple(s.name for s in sprites[-told:]))  # named ones lie on top


def place_anew(scene: Scene, seed: int) -> Scene:
    """The same sprites on the same background, elsewhere: as near to a scene as one comes that is no copy of it."""
    rng = np.random.default_rng(seed)
    sprites: list[Placed] = []
    for old in scene.sprites:
        sprites.append(sample_placed(rng, old.name, sprites))
    return dataclasses.replace(scene, sprites=tuple(sprites))


def sample_background(rng: np.random.Generator) -> Background:
    kind = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    hue, value = rng.random(), rng.uniform(0.35, 1.0)
    first = (hue, rng.uniform(0.2, 0.9), value)
    other_value = value - 0.3 if value > 0.65 else value + 0.3  # the two colours can always be told apart
    second = ((hue + rng.uniform(0.15, 0.85)) % 1, rng.uniform(0.2, 0.9), other_value)
    colors = tuple(tuple(round(255 * c) for c in colorsys.hsv_to_rgb(*hsv)) for hsv in (first, second))
    angle, width = rng.integers(8) * np.pi / 4, int(rng.integers(4, 9))
    return Background(kind, colors, float(angle), width, int(rng.integers(2**31)))


def sample_placed(rng: np.random.Generator, name: str, others: list[Placed]) -> Placed:
    """A sprite at a random place, the emptiest of six tried."""
    size = int(rng.choice(SIZES))
    places = GRID * rng.integers(0, (SIDE - size) // GRID + 1, size=(6, 2))
    if others:
        taken = np.array([(o.left + o.size / 2, o.top + o.size / 2) for o in others])
        gaps = np.linalg.norm(places[:, None] + size / 2 - taken[None], axis=-1).min(axis=1)  # (6,)
        places = places[np.argsort(-gaps, kind="stable")]
    left, top = places[0]
    return Placed(name, int(left), int(top), size)


def draw_background(background: Background) -> np.ndarray:
    """(64, 64, 3) uint8: a blend of the two colours, the share of the second given by the kind's pattern."""
    share = PATTERNS[background.kind](background, *rotated_grid(background.angle))[..., None]  # (64, 64, 1) in 0..1
    first, second = (np.array(color, dtype=np.float32) for color in background.colors)
    return np.round(first * (1 - share) + second * share).astype(np.uint8)


def rotated_grid(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the pixels, in sides, from the centre, along two axes turned by angle; each (64, 64)."""
    y, x = (np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5) / SIDE - 0.5
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _edge(distance: np.ndarray) -> np.ndarray:
    """A share in 0..1 with an edge about a pixel wide where the distance, in sides, is 0."""
    return np.clip(distance * SIDE / 2 + 0.5, 0, 1)


def _clouds(background, u, v):
    coarse = np.random.default_rng(background.seed).random((5, 5)).astype(np.float32)
    smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return np.clip((smooth - 0.5) * 1.6 + 0.5, 0, 1)


def _frame(background, u, v):
    from_centre = np.abs(np.stack(rotated_grid(0.0))).max(axis=0)
    return (from_centre > 0.5 - background.width / SIDE).astype(np.float32)


PATTERNS = {
    "plain": lambda b, u, v: np.zeros_like(u),
    "gradient": lambda b, u, v: np.clip(u / 1.2 + 0.5, 0, 1),
    "cloudy": _clouds,
    "split": lambda b, u, v: _edge(u),
    "framed": _frame,
    "wavy": lambda b, u, v: _edge(u - 0.12 * np.sin(2 * np.pi * v)),
}


@functools.cache
def load_sprites() -> dict[str, Image.Image]:
    """{name: 96x96 RGBA}, from the archive in the package."""
    with zipfile.ZipFile(SPRITE_ARCHIVE) as archive:
        members = [m for m in archive.namelist() if m.endswith(".png")]
        return {m[: -len(".png")]: Image.open(io.BytesIO(archive.read(m))).convert("RGBA") for m in members}


@functools.cache
def sprite_names() -> tuple[str, ...]:
    return tuple(sorted(load_sprites()))


@functools.cache
def scaled_sprite(name: str, size: int) -> Image.Image:
    """RGBA of that side in pixels."""
    return load_sprites()[name].resize((size, size), Image.Resampling.LANCZOS)


def mean_color(sprite: Image.Image) -> np.ndarray:
    """(3,) RGB of a sprite, transparent pixels left out."""
    pixels = np.asarray(sprite, dtype=np.float64).reshape(-1, 4)
    return np.average(pixels[:, :3], axis=0, weights=pixels[:, 3])
