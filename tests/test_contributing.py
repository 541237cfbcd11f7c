"""The recipes of CONTRIBUTING.md, followed to the letter: a mitigation and an attack that a stranger adds."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from dori_utils.core.edits import applied
from dori_utils.core.hashes import model_hash
from dori_utils.core.store import Store
from dori_utils.core.targets import Target
from dori_utils.presets import PRESETS

PAGE = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_recipes_work_as_they_stand(tiny_testbed, tmp_path):
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "green")]
    made = [Target(color, f"a {color} car", image, "VM") for color, image in zip("rbg", images, strict=True)]
    names = {"pipe": tiny_testbed, "targets": made[:2], "controls": [Target("c", "a cat", images[2], "control")]}
    names |= {"preset": PRESETS["smoke"], "store": Store(tmp_path)}
    before = model_hash(tiny_testbed)
    results = []
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)  # noqa: S102, it is our own page
        results.append(names.get("rows"))
    of_mitigation, of_attack = results[1], results[3]
    assert set(of_mitigation["mitigation"]) == {"original", "random pruning"}
    assert set(of_mitigation["attack"]) == {"none", "DoRI"} and set(of_mitigation["kind"]) == {"VM", "control"}
    pruned = names["edits"]["random pruning"]
    assert all(0 < share < 0.05 for share in pruned.sparsity().values())
    with applied(tiny_testbed, pruned):
        assert model_hash(tiny_testbed) != before
    assert model_hash(tiny_testbed) == before
    assert set(of_attack["steps"]) == {0} and "DoRI" in set(of_attack["attack"])
    assert names["found"].shape[0] == 3 and torch.isfinite(names["found"]).all()


def test_every_place_on_the_map_is_there():
    root = Path(__file__).resolve().parents[1]
    table = PAGE[PAGE.index("## The map") : PAGE.index("## A day")]
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", table):
        assert name == "cache/" or any((root / folder / name).exists() for folder in ("", "dori_utils")), name
