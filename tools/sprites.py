"""Build `sprites.zip`: the pictures that scenes are made of, Microsoft's Fluent Emoji in the flat style (MIT).

Users never need this: the archive is in the repository. It is here so that everyone can see where it came from, and can
make it again with other sprites. The package is on npm, `npm pack` downloads it, and resvg draws it:

    npm pack @iconify-json/fluent-emoji-flat@1.2.6 && pip install resvg_py==0.5.0
    python -m tools.sprites iconify-json-fluent-emoji-flat-1.2.6.tgz
"""

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

ARCHIVE = Path(__file__).resolve().parents[1] / "dori_utils/testbed/sprites.zip"
SIDE = 96  # px; a scene shows a sprite at 28 to 36 px

# Our name, where it differs from the emoji's own. Chosen to look unlike each other at 30 px, in shape and colour.
NAMES = """
penguin fox frog owl whale=spouting-whale butterfly ladybug=lady-beetle crab panda chick=front-facing-baby-chick
pig=pig-face strawberry banana carrot watermelon grapes mushroom doughnut cupcake hamburger cactus sunflower tulip
tree=evergreen-tree rocket sailboat bus umbrella guitar crown gem=gem-stone balloon anchor clock=alarm-clock house ghost
"""

PROVENANCE = """Sprites of the testbed: Microsoft's Fluent Emoji in the flat style, drawn at 96 px.
Source: npm package @iconify-json/fluent-emoji-flat 1.2.6, under the MIT licence below.
Made by: python -m tools.sprites

Fluent Emoji: Copyright (c) Microsoft Corporation.

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
    """{our name: name of the icon}."""
    pairs = (entry.partition("=") for entry in NAMES.split())
    return {ours: theirs or ours for ours, _, theirs in pairs}


def build(package: str, archive: Path = ARCHIVE) -> None:
    """Write the archive from the npm tarball."""
    import resvg_py  # not a dependency of the project: only this needs it

    with tarfile.open(package) as tar:
        icons = json.load(tar.extractfile("package/icons.json"))["icons"]
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out:
        out.writestr(zipfile.ZipInfo("LICENSE.txt"), PROVENANCE)
        for ours, theirs in wanted().items():
            size = f'width="{SIDE}" height="{SIDE}" viewBox="0 0 32 32"'
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{icons[theirs]["body"]}</svg>'
            sprite = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
            buffer = io.BytesIO()
            sprite.save(buffer, "PNG", optimize=True)
            out.writestr(zipfile.ZipInfo(f"{ours}.png"), buffer.getvalue())


if __name__ == "__main__":
    build(*sys.argv[1:])
