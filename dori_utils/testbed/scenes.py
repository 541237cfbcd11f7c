"""Captioned scenes: the pictures that the testbed is trained on, drawn on demand, each a function of its seed.

A scene is two to four sprites on a background, 64x64 pixels. Its caption names one or two of the sprites and the kind
of background: "a violin and an owl on a dotted background". Colours, places, sizes, tilts and the sprites that go
unnamed are left out, and what is left out is a particular picture's secret: a model that has learned captions cannot
guess it, so a model that draws it has memorized it.
"""

import colorsys
import dataclasses
import functools
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64  # px
BACKGROUNDS = ("plain", "striped", "checkered", "dotted", "cloudy", "gradient")
PLURALS = {"grapes", "cherries", "fries", "pancakes", "popcorn", "sushi", "broccoli", "coral", "cheese"}  # "some ..."
SPRITE_ARCHIVE = Path(__file__).with_name("sprites.zip")


@dataclass(frozen=True)
class Background:
    """kind: one of BACKGROUNDS; colors: two RGB triples, 0..255; angle: radians; frequency: periods across the side."""

    kind: str
    colors: tuple[tuple[int, int, int], tuple[int, int, int]]
    angle: float
    frequency: float
    seed: int  # of the clouds


@dataclass(frozen=True)
class Placed:
    """A sprite in a scene: centre x, y and size in sides, angle in degrees, hue shift as a share of the wheel."""

    name: str
    x: float
    y: float
    size: float
    angle: float
    flip: bool
    hue: float


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
            sprite = draw_sprite(placed)
            corner = (round(placed.x * SIDE - sprite.width / 2), round(placed.y * SIDE - sprite.height / 2))
            canvas.paste(sprite, corner, sprite)
        return np.array(canvas)


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
    return Background(kind, colors, rng.uniform(0, 2 * np.pi), rng.uniform(2, 4.5), int(rng.integers(2**31)))


def sample_placed(rng: np.random.Generator, name: str, others: list[Placed]) -> Placed:
    """A sprite at a random place, the emptiest of six tried."""
    places = rng.uniform(0.2, 0.8, size=(6, 2))
    if others:
        taken = np.array([(o.x, o.y) for o in others])
        gaps = np.linalg.norm(places[:, None] - taken[None], axis=-1).min(axis=1)  # (6,)
        places = places[np.argsort(-gaps)]
    x, y = places[0]
    size, angle, hue = rng.uniform(0.40, 0.65), rng.uniform(-25, 25), rng.uniform(-0.04, 0.04)
    return Placed(name, float(x), float(y), float(size), float(angle), bool(rng.random() < 0.5), float(hue))


def draw_background(background: Background) -> np.ndarray:
    """(64, 64, 3) uint8: a blend of the two colours, the share of the second given by the kind's pattern."""
    share = PATTERNS[background.kind](background, *rotated_grid(background.angle))[..., None]  # (64, 64, 1) in 0..1
    first, second = (np.array(color, dtype=np.float32) for color in background.colors)
    return np.round(first * (1 - share) + second * share).astype(np.uint8)


def rotated_grid(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the pixels, in sides, from the centre, along two axes turned by angle; each (64, 64)."""
    y, x = (np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5) / SIDE - 0.5
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _soft_step(wave: np.ndarray, sharpness: float = 4.0) -> np.ndarray:
    """From a wave in -1..1 to a share in 0..1 with edges about a pixel wide."""
    return np.clip(wave * sharpness / 2 + 0.5, 0, 1)


def _clouds(background, u, v):
    coarse = np.random.default_rng(background.seed).random((5, 5)).astype(np.float32)
    smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return np.clip((smooth - 0.5) * 1.6 + 0.5, 0, 1)


def _waves(background, *axes):
    return [np.sin(2 * np.pi * background.frequency * axis) for axis in axes]


PATTERNS = {
    "plain": lambda b, u, v: np.zeros_like(u),
    "striped": lambda b, u, v: _soft_step(_waves(b, u)[0]),
    "checkered": lambda b, u, v: _soft_step(np.prod(_waves(b, u, v), axis=0), 6.0),
    "dotted": lambda b, u, v: _soft_step(sum(_waves(b, u, v)) / 2 - 0.35),
    "cloudy": _clouds,
    "gradient": lambda b, u, v: np.clip(u / 1.2 + 0.5, 0, 1),
}


@functools.cache
def load_sprites() -> dict[str, Image.Image]:
    """{name: 96x96 RGBA}, from the archive in the package."""
    with zipfile.ZipFile(SPRITE_ARCHIVE) as archive:
        members = [m for m in archive.namelist() if m.endswith(".webp")]
        return {m[: -len(".webp")]: Image.open(io.BytesIO(archive.read(m))).convert("RGBA") for m in members}


@functools.cache
def sprite_names() -> tuple[str, ...]:
    return tuple(sorted(load_sprites()))


def mean_color(sprite: Image.Image) -> np.ndarray:
    """(3,) RGB of a sprite, transparent pixels left out."""
    pixels = np.asarray(sprite, dtype=np.float64).reshape(-1, 4)
    return np.average(pixels[:, :3], axis=0, weights=pixels[:, 3])


def draw_sprite(placed: Placed) -> Image.Image:
    """The sprite flipped, scaled, recoloured and turned, RGBA."""
    sprite = load_sprites()[placed.name]
    side = round(placed.size * SIDE)
    sprite = sprite.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if placed.flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return shift_hue(sprite, placed.hue).rotate(placed.angle, Image.Resampling.BICUBIC, expand=True)


def shift_hue(sprite: Image.Image, shift: float) -> Image.Image:
    """RGBA turned around the grey axis by shift (a share of the circle), which keeps lightness."""
    cos, sin = np.cos(2 * np.pi * shift), np.sin(2 * np.pi * shift)
    same, left, right = cos + (1 - cos) / 3, (1 - cos) / 3 - sin / np.sqrt(3), (1 - cos) / 3 + sin / np.sqrt(3)
    matrix = (same, left, right, 0, right, same, left, 0, left, right, same, 0)
    shifted = sprite.convert("RGB").convert("RGB", matrix)
    shifted.putalpha(sprite.getchannel("A"))
    return shifted
