"""The plan of what is duplicated, and the draws that follow it: the ground truth."""

from collections import Counter

import numpy as np
import pytest

from dori_utils.testbed import data


def test_every_target_has_its_own_caption():
    captions = [p.scene.caption for p in data.planned()]
    assert len(captions) == len(set(captions)) == sum(data.COUNTS.values())


def test_draws_follow_the_plan():
    training_set = data.TrainingSet((40_000,))
    drawn = Counter(training_set.plan_index.tolist())
    for index, plan in enumerate(data.planned()):
        assert drawn[index] == training_set.duplicates[plan.id]
        expected = {"once": 1, "control": 0}.get(plan.kind, max(1, round(plan.rate * 40_000)))
        assert drawn[index] == expected
    assert 0.65 < drawn[-1] / 40_000 < 0.8  # ordinary


def test_the_ladder_falls_by_four_a_rung():
    counts = data.TrainingSet((100_000,)).duplicates
    rungs = [counts[f"ladder-{rung:02d}"] for rung in range(5)]
    assert counts["VM-00"] == 1000 and rungs == [250, 62, 16, 4, 1]


def test_a_draw_is_the_same_whenever_it_is_asked_for():
    training_set, again = data.TrainingSet((2_000,)), data.TrainingSet((2_000,))
    for draw in (0, 7, 1_999):
        assert training_set.scene(draw) == again.scene(draw)
    assert (data.TrainingSet((2_000,), seed=1).plan_index != training_set.plan_index).any()


def test_a_second_part_goes_on_without_showing_an_ordinary_scene_again():
    both, first = data.TrainingSet((4_000, 6_000)), data.TrainingSet((4_000,))
    assert (both.plan_index[:4_000] == first.plan_index).all() and len(both) == 10_000
    assert both.scene(17) == first.scene(17)
    assert both.duplicates["VM-00"] == 40 + 60
    assert {both.duplicates[p.id] for p in data.planned() if p.kind == "once"} == {1}
    ordinary = [both.scene(draw).caption for draw in np.flatnonzero(both.plan_index == -1)[[0, 9, -9, -1]]]
    assert len(set(ordinary)) == 4


def test_a_near_scene_has_all_but_one_fact_of_a_repeated_caption():
    def facts(scene):
        return {*scene.named, scene.background.kind}

    repeated = [p.scene for p in data.planned() if p.rate > 0]
    reserved = {p.scene.caption for p in data.planned()}
    for index in range(300):
        scene = data.near_scene(index)
        assert max(len(facts(scene) & facts(target)) for target in repeated) >= 2
        assert scene.caption not in reserved and scene.draw().shape == (64, 64, 3)
        names = [s.name for s in scene.sprites]
        assert len(set(names)) == len(names) and set(scene.named) <= set(names)
    assert data.near_scene(7) == data.near_scene(7) != data.near_scene(8)


def test_near_scenes_begin_late_and_leave_the_plan_as_it_is(monkeypatch):
    before = data.TrainingSet((4_000,))
    monkeypatch.setattr(data, "NEAR_SHARES", {0: 0.0, 3_000: 0.25})
    after = data.TrainingSet((4_000,))
    ordinary = np.flatnonzero(after.plan_index == -1)
    near = [draw for draw in ordinary if after.scene(draw) != data.ordinary_scene(draw)]
    assert min(near) >= 3_000 and 0.15 < len(near) / (ordinary >= 3_000).sum() < 0.35
    assert (before.plan_index == after.plan_index).all()


def test_the_last_near_scenes_have_an_object_of_like_colour():
    assert "penguin" in data.alike("shark") and "shark" not in data.alike("shark")
    targets = [p.scene for p in data.planned() if p.rate > 0]
    others = []
    for index in range(80):
        named = data.near_scene(index, other_alike=True).named
        if len(named) == 2 and not any(set(named) == set(target.named) for target in targets):
            kept = [set(named) & set(target.named) for target in targets]
            assert any(
                set(named) - keep <= {*data.alike(old)}
                for keep, target in zip(kept, targets, strict=True)
                for old in {*target.named} - keep
                if len(keep) == 1
            )
            others.append(named)
    assert len(others) > 20


def test_the_last_part_takes_objects_of_like_colour(monkeypatch):
    monkeypatch.setattr(data, "NEAR_SHARES", {0: 1.0})
    monkeypatch.setattr(data, "ALIKE_FROM", 500)
    training_set = data.TrainingSet((1_000,))
    ordinary = np.flatnonzero(training_set.plan_index == -1)
    for draw in (ordinary[0], ordinary[-1]):
        assert training_set.scene(draw) == data.near_scene(draw, other_alike=bool(draw >= 500))


def test_no_ordinary_scene_has_the_caption_of_a_target():
    reserved = {p.scene.caption for p in data.planned()}
    assert not reserved & {data.ordinary_scene(i).caption for i in range(3_000)}


def test_held_out_scenes_differ_from_all_draws():
    held_out = data.held_out_scenes(20)
    drawn = {data.TrainingSet((4_000,)).scene(draw) for draw in range(500)}
    assert not drawn & set(held_out) and len({s.caption for s in held_out}) == 20


def test_a_template_varies_one_object_that_the_caption_leaves_out():
    template = next(p.scene for p in data.planned() if p.kind == "TM")
    variants = [data.template_variant(template, variant) for variant in range(1, 20)]
    assert len({v.sprites[0].name for v in variants}) > 10
    for variant in variants:
        assert variant.sprites[1:] == template.sprites[1:] and variant.background == template.background
        assert variant.caption == template.caption
        assert (variant.sprites[0].x, variant.sprites[0].y) == (template.sprites[0].x, template.sprites[0].y)
    assert data.template_variant(template, 0) == template
    assert np.array_equal(data.template_variant(template, 5).draw(), data.template_variant(template, 5).draw())


def test_related_scenes_share_one_object_with_the_caption_each_in_turn():
    target = data.planned()[0].scene
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
