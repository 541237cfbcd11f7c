"""A kept result belongs to everything that it was made of: many at once as one alone (test_notebook_keys)."""

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from dori_utils.core.cache import kept_each, key_of
from dori_utils.core.store import Store


class Drawn(Sequence):
    """Pictures that are drawn when they are asked for."""

    def __init__(self, colors):
        self.colors, self.asked = colors, []

    def __len__(self):
        return len(self.colors)

    def __getitem__(self, index):
        self.asked.append(index)
        return Image.new("RGB", (4, 4), self.colors[index])


def test_only_missing_cases_are_computed_and_each_for_its_own_number(tmp_path):
    store, asked = Store(tmp_path), []

    def compute(chosen):
        asked.append(chosen)
        return [{"double": 2 * values[i]} for i in chosen]

    values = [3, 1, 4]
    first = kept_each(store, "doubles", [{"value": v} for v in values], compute, batch_size=2, shared=1)
    assert [int(result["double"]) for result in first] == [6, 2, 8] and asked == [[0, 1], [2]]
    values = [4, 5, 3]
    second = kept_each(store, "doubles", [{"value": v} for v in values], compute, batch_size=2, shared=1)
    assert [int(result["double"]) for result in second] == [8, 10, 6] and asked[2:] == [[1]]
    kept_each(store, "doubles", [{"value": 4}], compute, shared=2)
    assert asked[3:] == [[0]]


def test_of_what_is_drawn_when_asked_for_the_ends_count():
    drawn = Drawn(["red", "green", "blue"])
    assert key_of(drawn) != key_of(Drawn(["red", "green", "white"])) and set(drawn.asked) == {0, 2}
    assert key_of(drawn) != key_of(Drawn(["red", "blue"]))


def test_an_array_is_told_by_its_shape_and_its_numbers():
    assert key_of(np.zeros((2, 1))) != key_of(np.zeros((1, 2))) and key_of(np.zeros(2)) != key_of(np.ones(2))


def test_what_cannot_be_told_is_refused():
    with pytest.raises(TypeError, match="A set cannot be part of a key"):
        key_of({1, 2})
