"""The search over the training set finds copies and says whose they are."""

import numpy as np
import pytest
from PIL import Image

from dori_utils.core.sscd import load_sscd
from dori_utils.core.store import Store
from dori_utils.testbed import data, search

SMALL = data.TrainingSet("A", most=3_000)


def test_each_distinct_scene_is_searched_once():
    draws = search.distinct_draws(SMALL)
    assert len(draws) == len(set(SMALL.ids)) and set(SMALL.ids[draws]) == set(SMALL.ids)
    kinds = [data.planned()[i].kind if i >= 0 else "ordinary" for i in SMALL.plan_index[draws]]
    assert kinds.count("VM") == data.COUNTS["VM"] and kinds.count("once") == data.COUNTS["once"]
    assert kinds.count("TM") == sum(min(n, 33) for k, n in SMALL.duplicates.items() if k.startswith("TM"))
    assert "control" not in kinds


def test_the_shortlist_holds_the_image_itself_under_noise():
    scenes = [s.draw() for s in data.held_out_scenes(200)]
    thumbnails = np.stack([search.thumbnail(Image.fromarray(s)) for s in scenes])
    noise = np.random.default_rng(0).normal(0, 15, scenes[0].shape)
    noisy = [Image.fromarray((s + noise).clip(0, 255).astype(np.uint8)) for s in scenes[:20]]
    shortlist = search.shortlisted(noisy, thumbnails, 5)
    assert all(i in shortlist[i] for i in range(20))


@pytest.mark.slow
def test_a_copy_is_found_and_attributed_and_a_new_scene_is_no_copy(tmp_path):
    target = next(p for p in data.planned() if p.kind == "VM")
    queries = [Image.fromarray(s.draw()) for s in (target.scene, SMALL.scene(1), data.held_out_scenes(1)[0])]
    ordinary = int(np.flatnonzero(SMALL.plan_index == -1)[3])
    queries[1] = Image.fromarray(SMALL.scene(ordinary).draw())
    found = search.nearest_training_images(queries, SMALL, Store(tmp_path), load_sscd(), "testbed", shortlist=10)
    assert list(found["target"][:2]) == [target.id, "ordinary"] and found["draw"][1] == ordinary
    assert (found["sscd"][:2] > 0.99).all() and found["sscd"][2] < 0.7
    turned = search.nearest_training_images(queries[::-1], SMALL, Store(tmp_path), load_sscd(), "testbed", shortlist=10)
    assert turned[::-1].reset_index(drop=True).equals(found)  # what is kept is of these images, in this order
