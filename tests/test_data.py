"""The plan of what is duplicated, and the draws that follow it: the ground truth."""

from collections import Counter

import numpy as np
import pytest

from dori_utils.testbed import data

PLAN = data.planned()


def test_every_target_has_its_own_caption_and_id():
    assert len(PLAN) == len({p.scene.caption for p in PLAN}) == len({p.id for p in PLAN})
    assert Counter((p.list, p.kind) for p in PLAN) == Counter(
        {(twin, kind): count for twin in data.TWINS for kind, count in data.COUNTS.items()} | {("C", "control"): 64}
    )


@pytest.mark.parametrize("twin", data.TWINS)
def test_draws_follow_the_plan(twin):
    training_set = data.TrainingSet(twin)
    drawn = Counter(training_set.plan_index.tolist())
    for index, plan in enumerate(PLAN):
        assert drawn[index] == training_set.duplicates[plan.id] == (plan.times if plan.list == twin else 0)
    assert len(training_set) == sum(training_set.parts) == data.BASE_DRAWS + data.FORK_PARTS * data.PART_DRAWS
    assert (training_set.plan_index[: data.BASE_DRAWS] == -1).all()
    repeated = (training_set.plan_index[data.BASE_DRAWS :] >= 0).mean()
    assert 0.5 < repeated < 0.6


def test_the_twins_differ_in_nothing_but_whose_images_they_see():
    a, b = data.TrainingSet("A"), data.TrainingSet("B")
    repeated = a.plan_index >= 0
    assert (repeated == (b.plan_index >= 0)).all() and (a.ids[~repeated] == b.ids[~repeated]).all()
    same_place = {
        (PLAN[i].kind, PLAN[i].times, PLAN[j].kind, PLAN[j].times)
        for i, j in zip(a.plan_index[repeated], b.plan_index[repeated], strict=True)
    }
    assert all((kind, times) == (other, others) for kind, times, other, others in same_place)


def test_the_base_is_what_both_saw_first():
    base, a = data.TrainingSet(), data.TrainingSet("A")
    assert (a.ids[: len(base)] == base.ids).all() and set(base.duplicates.values()) == {0}


def test_the_ladder_doubles_from_rung_to_rung():
    counts = data.TrainingSet("B").duplicates
    assert [counts[f"ladder-B{rung:02d}"] for rung in range(7)] == list(data.RUNGS)
    assert all(2 * low == high for low, high in zip(data.RUNGS, data.RUNGS[1:], strict=False))


def test_every_ordinary_scene_comes_before_any_comes_again():
    ids = data.TrainingSet().ids
    assert set(ids[: data.ORDINARY]) == set(range(data.ORDINARY))
    assert (ids[: data.ORDINARY] != np.arange(data.ORDINARY)).any()


def test_a_smaller_training_set_has_fewer_draws_in_each_part():
    small = data.TrainingSet("A", most=2_000)
    assert small.parts == (2_000,) * 4 and len(small) == 8_000
    assert all(small.duplicates[p.id] > 0 for p in PLAN if p.list == "A")
    assert data.TrainingSet("A", most=10**9).parts == data.TrainingSet("A").parts


def test_a_draw_is_the_same_whenever_it_is_asked_for():
    training_set, again = (data.TrainingSet("A", most=2_000) for _ in range(2))
    for draw in (0, 7, 3_999):
        assert training_set.scene(draw) == again.scene(draw)
    assert (data.TrainingSet("A", seed=1, most=2_000).ids != training_set.ids).any()


def test_draws_with_one_id_show_one_picture_and_others_another():
    training_set = data.TrainingSet("A", most=2_000)
    template = next(i for i, p in enumerate(PLAN) if p.kind == "TM")
    first_part = sum(training_set.parts[:2])
    draws = np.flatnonzero(training_set.plan_index[:first_part] == template)
    assert len(set(training_set.ids[draws])) == len(draws) > 1
    assert len({training_set.scene(draw) for draw in draws}) == len(draws)
    verbatim = np.flatnonzero(training_set.plan_index == 0)
    assert len(set(training_set.ids[verbatim])) == 1 and training_set.scene(verbatim[0]) == PLAN[0].scene


def test_a_near_scene_has_all_but_one_fact_of_a_repeated_caption():
    def facts(scene):
        return {*scene.named, scene.background.kind}

    repeated = [p.scene for p in PLAN if p.times > 1]
    reserved = {p.scene.caption for p in PLAN}
    for index in range(300):
        scene = data.near_scene(index)
        assert max(len(facts(scene) & facts(target)) for target in repeated) >= 2
        assert scene.caption not in reserved and scene.draw().shape == (64, 64, 3)
        names = [s.name for s in scene.sprites]
        assert len(set(names)) == len(names) and set(scene.named) <= set(names)
    assert data.near_scene(7) == data.near_scene(7) != data.near_scene(8)


def test_half_of_a_forks_ordinary_draws_are_near():
    fork = data.TrainingSet("A").ids[data.BASE_DRAWS :]
    ordinary = fork[data.plan_index(fork) < 0]
    assert abs((ordinary >= data.ORDINARY).mean() - data.NEAR_SHARE) < 0.001


def test_no_ordinary_scene_has_the_caption_of_a_target():
    reserved = {p.scene.caption for p in PLAN}
    assert not reserved & {data.ordinary_scene(i).caption for i in range(3_000)}


def test_held_out_scenes_differ_from_all_draws():
    held_out = data.held_out_scenes(20)
    drawn = {data.scene_of(id) for id in range(500)}
    assert not drawn & set(held_out) and len({s.caption for s in held_out}) == 20


def test_a_template_varies_one_object_that_the_caption_leaves_out():
    template = next(p.scene for p in PLAN if p.kind == "TM")
    variants = [data.template_variant(template, variant) for variant in range(1, 33)]
    assert len({v.sprites[0].name for v in variants}) == 32
    for variant in variants:
        assert variant.sprites[1:] == template.sprites[1:] and variant.background == template.background
        assert variant.caption == template.caption
        old, new = template.sprites[0], variant.sprites[0]
        assert (new.left, new.top, new.size) == (old.left, old.top, old.size)
    assert data.template_variant(template, 0) == template
    assert np.array_equal(data.template_variant(template, 5).draw(), data.template_variant(template, 5).draw())


def test_related_scenes_share_one_object_with_the_caption_each_in_turn():
    target = PLAN[0].scene
    scenes = data.related_scenes(target.caption, 6)
    shared = [set(scene.named) & set(target.named) for scene in scenes]
    assert shared == [{name} for name in target.named] * 3
    for scene in scenes:
        assert len({s.name for s in scene.sprites} & set(target.named)) == 1 and scene.sprites[-1].name in target.named
    assert len({scene.caption for scene in scenes}) == 6 and target.caption not in {scene.caption for scene in scenes}
    assert scenes == data.related_scenes(target.caption, 6)
    with pytest.raises(ValueError, match="No target"):
        data.related_scenes("a photo of nothing", 1)


def test_ordinary_pairs_are_drawn_when_asked_for_and_end():
    pairs = data.OrdinaryPairs(3)
    assert len(list(pairs)) == 3 and pairs[1][0].tobytes() == pairs[1][0].tobytes()
    assert pairs[0][1] != pairs[1][1] and pairs[0][0].size == (64, 64)
