"""Build `sprites.zip`: the pictures that scenes are made of, cut down from Microsoft's Fluent Emoji 3D (MIT).

Users never need this: the archive is in the repository. It is here so that everyone can see where it came from, and can
make it again with other sprites. The two packages are on npm, and `npm pack` downloads them:

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && npm pack emoji-datasource-google@16.0.0
    python -m dori_utils.testbed.sprites lobehub-fluent-emoji-3d-1.1.0.tgz emoji-datasource-google-16.0.0.tgz
"""

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

ARCHIVE = Path(__file__).with_name("sprites.zip")
SIDE = 96  # px; a scene shows a sprite at 26 to 42 px

# Our name, where it differs from the emoji's own. Chosen to look unlike each other at 30 px.
NAMES = """
tulip rose sunflower cactus mushroom maple-leaf=maple_leaf clover=four_leaf_clover palm-tree=palm_tree cow tiger
rabbit cat dog pig elephant octopus turtle penguin koala dolphin panda=panda_face frog=frog_face lion=lion_face
fox=fox_face butterfly crab owl shark giraffe=giraffe_face zebra=zebra_face hedgehog parrot flamingo swan peacock
snail honeybee ladybug=lady_beetle blowfish whale rooster chick=baby_chick unicorn=unicorn_face monkey=monkey_face
sheep dragon snake coral jellyfish hot-dog=hot_dog taco chili=hot_pepper tomato eggplant=aubergine grapes watermelon
orange=tangerine lemon banana pineapple apple=red_apple pear cherries strawberry hamburger pizza=slice_of_pizza
fries=french_fries sushi doughnut lollipop cake=birthday_cake cupcake avocado carrot broccoli pretzel
cheese=cheese_wedge croissant pancakes popcorn kiwi=kiwifruit teapot saxophone guitar trumpet violin
drum=drum_with_drumsticks crown top-hat=top_hat umbrella handbag gem=gem_stone bomb key bell camera television radio
magnet axe scroll book=closed_book shield balloon present=wrapped_present pumpkin=jack-o-lantern teddy-bear=teddy_bear
kite soccer-ball=soccer_ball basketball=basketball_and_hoop trophy die=game_die rocket helicopter bus tractor bicycle
sailboat airplane snowman volcano planet=ringed_planet clock=alarm_clock
"""

PROVENANCE = """Sprites of the testbed: pictures of Microsoft's Fluent Emoji in the 3D style, scaled to 96 px.
Source: npm package @lobehub/fluent-emoji-3d 1.1.0 (pictures by code point), names by npm package
emoji-datasource-google 16.0.0. Both packages and the pictures are under the MIT licence below.
Made by: python -m dori_utils.testbed.sprites

Fluent Emoji: Copyright (c) Microsoft Corporation. Packaging: Copyright (c) 2023 LobeHub.
Names: Copyright (c) 2013 Cal Henderson.

MIT License

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def wanted() -> dict[str, str]:
    """{our name: name in emoji.json}, both with spaces."""
    pairs = (entry.partition("=") for entry in NAMES.split())
    return {ours.replace("-", " "): (theirs or ours).replace("_", " ") for ours, _, theirs in pairs}


def build(pictures: str, datasource: str, archive: Path = ARCHIVE) -> None:
    """Write the archive from the two npm tarballs."""
    with tarfile.open(datasource) as tar:
        emoji = json.load(tar.extractfile("package/emoji.json"))
    code_points = {entry["name"].lower(): entry["unified"].lower() for entry in emoji}
    with tarfile.open(pictures) as tar, zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out:
        available = set(tar.getnames())
        out.writestr(zipfile.ZipInfo("LICENSE.txt"), PROVENANCE)
        for ours, theirs in wanted().items():
            code = code_points[theirs]
            candidates = [f"package/assets/{c}.webp" for c in (code, code.replace("-fe0f", ""))]
            member = next(c for c in candidates if c in available)
            sprite = Image.open(tar.extractfile(member)).convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            sprite.save(buffer, "WEBP", quality=90, method=6)
            out.writestr(zipfile.ZipInfo(f"{ours}.webp"), buffer.getvalue())


if __name__ == "__main__":
    build(*sys.argv[1:])
