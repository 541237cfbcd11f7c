"""Whoever gives something else than is asked for gets one sentence, where it came in."""

import numpy as np
import pytest
from PIL import Image

from dori_utils.attack import attack
from dori_utils.core.arguments import listed
from dori_utils.core.generation import generate
from dori_utils.core.sscd import sscd_scores
from dori_utils.core.targets import Target
from dori_utils.evaluation import audit, detect
from dori_utils.presets import PRESETS

IMAGE = Image.new("RGB", (64, 64))
TARGET = Target("one", "a cat", IMAGE, "VM")
SMOKE = PRESETS["smoke"]

WRONG = {
    "prompts is Target": lambda pipe: generate(pipe, TARGET),
    "prompts has Target": lambda pipe: generate(pipe, [TARGET]),
    "seeds is 3: give a list of integers, such as": lambda pipe: generate(pipe, ["a cat"], seeds=3),
    "seeds has 0.5 in it": lambda pipe: generate(pipe, ["a cat"], seeds=[0.5]),
    "targets is <PIL.Image": lambda pipe: sscd_scores([[IMAGE]], IMAGE, transform="testbed"),
    "targets has 'cat.png' in it: give a list of PIL": lambda pipe: sscd_scores([[IMAGE]], ["cat.png"], transform="sd"),
    "targets has Target": lambda pipe: sscd_scores([[IMAGE]], [TARGET], transform="testbed"),
    "images has <PIL.Image": lambda pipe: sscd_scores([IMAGE], [IMAGE], transform="testbed"),
    "images has 'cat.png' in it": lambda pipe: sscd_scores([["cat.png"]], [IMAGE], transform="testbed"),
    "targets is Target": lambda pipe: attack(pipe, TARGET),
    "targets is 'a cat'": lambda pipe: attack(pipe, "a cat"),
    "targets has 'a cat' in it": lambda pipe: attack(pipe, ["a cat"]),
    "seeds is 3: give a list of integers, one": lambda pipe: attack(pipe, [TARGET], seeds=3),
    "targets is Target.*: give a list of Targets": lambda pipe: audit(pipe, TARGET, SMOKE, None),
    "controls is Target": lambda pipe: audit(pipe, [TARGET], SMOKE, None, controls=TARGET),
    r"preset is the name 'smoke': give .*PRESETS\['smoke'\]": lambda pipe: audit(pipe, [TARGET], "smoke", None),
    "preset is the name 'paper'": lambda pipe: detect(pipe, ["a cat"], "paper", None),
    "prompts is 'a cat': give a list of texts": lambda pipe: detect(pipe, "a cat", SMOKE, None),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_argument_is_one_sentence(words, sd1):
    with pytest.raises(TypeError, match=words) as caught:
        WRONG[words](sd1)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_whatever_has_the_right_things_in_it_counts_as_a_list():
    prompts = listed("prompts", np.array(["a", "b"]), str, "texts")
    assert prompts == ["a", "b"] == listed("prompts", (word for word in "ab"), str, "texts")
