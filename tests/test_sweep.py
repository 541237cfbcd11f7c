"""A sweep gives the same rows however its cases are computed, and loses and doubles none of them."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dori_utils import completion, nemo, wanda
from dori_utils.attack import AttackConfig
from dori_utils.cli import engines, sweep
from dori_utils.cli.main import _parse, main
from dori_utils.cli.sweep import Plan, read_attacks, read_mitigations
from dori_utils.core.edits import Edit
from dori_utils.core.hashes import base_hash
from dori_utils.core.store import Store
from dori_utils.core.targets import read_targets
from dori_utils.evaluation import audit
from dori_utils.nemo_statistics import collect_statistics
from dori_utils.presets import PRESETS
from tools.scorecard import (
    InstantWorker,
    Watched,
    differing_rows,
    driver_killed,
    entries,
    lost_or_doubled,
    swept,
    worker_killed,
)

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: the extra [cluster]")
NEMO = nemo.Config(seeds=(0, 1), rounds=2, similarity="cosine", num_inference_steps=2)
WANDA = wanda.Config(sparsity=0.3, steps=1, num_inference_steps=2, guidance_scale=3.0)
DORI = AttackConfig(steps=2, batch_size=2, record=(1, 2))


@pytest.fixture
def tables(tmp_path):
    """Tables of two targets and of two controls."""
    draw = np.random.default_rng(0).integers
    for name in ("cat", "dog", "noise-0", "noise-1"):
        Image.fromarray(draw(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / f"{name}.png")
    table = pd.DataFrame({"prompt": ["a cat", "a dog", "a red car", "the guitar"]})
    table["image"] = ["cat.png", "dog.png", "noise-0.png", "noise-1.png"]
    table[:2].to_csv(tmp_path / "targets.csv", index=False)
    table[2:].to_csv(tmp_path / "controls.csv", index=False)
    return tmp_path / "targets.csv", tmp_path / "controls.csv"


@pytest.fixture
def make_plan(tiny_testbed, tiny_testbed_folder, tables, tmp_path):
    """Folder name → plan and cases: two targets and two controls under three mitigations, with and without attack."""
    model = str(tiny_testbed_folder)
    preset = replace(PRESETS["smoke"], model=model, num_inference_steps=2, seeds=(0, 1), nemo=NEMO, wanda=WANDA)
    prompts = ["a cat on the car", "the red dog", "a violin", "grapes"]
    collect_statistics(tiny_testbed, prompts, NEMO, progress=False).save(tmp_path / "statistics.safetensors")
    mitigations = {"original": None, "NeMo": "nemo", "Wanda": "wanda"}

    def make(folder, targets=None):
        store = str(tmp_path / folder)
        plan = Plan(preset, mitigations, {"none": None, "DoRI": DORI}, store, tmp_path / "statistics.safetensors")
        return plan, plan.cases(targets or read_targets(tables[0]), read_targets(tables[1]))

    return make


@pytest.fixture
def options(tiny_testbed_folder, tables):
    """The command's options for the tiny testbed."""
    targets, controls = map(str, tables)
    return ["--model", str(tiny_testbed_folder), "--preset", "smoke", "--targets", targets, "--controls", controls]


def test_cases_are_all_targets_and_controls_under_all_mitigations_and_attacks(make_plan):
    plan, cases = make_plan("store")
    assert len(cases) == len(set(map(str, cases))) == 4 * 3 * 2
    assert str(cases[0]) == "cat, original, none"
    of_controls = {case.target.id: case.edited_for.id for case in cases if case.target.kind == "control"}
    assert of_controls == {"noise-0": "cat", "noise-1": "dog"}  # a control has the edit of some target
    with pytest.raises(ValueError, match="No targets"):
        plan.cases([], [])
    with pytest.raises(ValueError, match="No controls"):
        plan.cases([cases[0].target], [])
    with pytest.raises(ValueError, match="share ids: cat"):
        plan.cases([cases[0].target], [cases[0].target])


@pytest.mark.slow
def test_rows_are_those_of_an_audit(make_plan, tiny_testbed, tmp_path):
    plan, cases = make_plan("store")
    cases = [case for case in cases if case.mitigation != "NeMo" and case.target.id in ("cat", "noise-0")]
    rows, (_, failed, computed) = swept(plan, cases)
    assert computed == len(cases) == 2 * 2 * 2 and not failed
    assert len(rows) == 2 * 2 * 3 * 2  # images, mitigations, steps 0 to 2, seeds
    assert not rows.duplicated(sweep.ROW).any() and set(rows["kind"]) == {"target", "control"}
    assert rows.attrs["DoRI"].startswith("steps=2") and len(rows.attrs["weights"]) == 16
    targets = {case.target.id: case.target for case in cases}
    everyone = [targets["cat"], targets["noise-0"]]
    cat = wanda.localize_each(tiny_testbed, [targets["cat"]], WANDA, progress=False)
    edits = {"original": None, "Wanda": cat * 2}  # the control has the target's
    theirs = audit(tiny_testbed, everyone, plan.preset, Store(tmp_path / "audit"), edits=edits, attack=DORI)
    both = rows.merge(theirs, on=[*sweep.ROW, "prompt", "kind"])
    assert len(both) == len(rows) == len(theirs)
    assert (both["sscd_x"] - both["sscd_y"]).abs().max() < 0.05  # two targets in one batch are rounded otherwise


@pytest.mark.slow
def test_rows_depend_neither_on_the_order_nor_on_the_number_of_threads(make_plan):
    plan, cases = make_plan("store")
    cases = [case for case in cases if case.target.id in ("cat", "noise-0") and case.attack == "DoRI"]
    rows, _ = swept(plan, cases)
    other, before = make_plan("alone")[0], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        others = pd.concat([swept(other, [case])[0] for case in cases[::-2]])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    own = rows[rows["target"] == cases[-1].target.id]
    assert len(others) == 3 * 3 * 2 and differing_rows(own, others) == 0


def test_what_is_there_is_not_computed_again(make_plan):
    plan, cases = make_plan("store")
    rows, _ = swept(plan, cases[:4])
    before = entries(plan.store)
    again, (_, _, computed) = swept(plan, cases[:4])
    assert len(before) == 4 and computed == 0 and entries(plan.store) == before
    assert differing_rows(rows, again) == 0
    lost = sorted(before)[2]
    Store(plan.store).folder.joinpath(lost).unlink()
    again, (_, _, computed) = swept(plan, cases[:4])
    after = entries(plan.store)
    assert computed == 1 and differing_rows(rows, again) == 0
    assert {name for name in before if before[name] != after[name]} == {lost}
    other = replace(plan, preset=replace(plan.preset, seeds=(0,)))
    assert swept(other, cases[:1])[1][2] == 1  # other seeds are another case


def test_a_case_that_fails_stops_no_other(make_plan, tables):
    cat, dog = read_targets(tables[0])
    plan, cases = make_plan("store", [cat, replace(dog, prompt="the photo " * 20)])  # more tokens than the model takes
    cases = [case for case in cases if case.mitigation == "original" and case.attack == "none"]
    rows, (results, failed, computed) = swept(plan, cases)
    assert {cases[number].target.id for number in failed} == {"dog"}
    assert all(error.startswith("ValueError: Prompt too long") for error in failed.values())
    assert set(rows["target"]) == {"cat", "noise-0", "noise-1"} and computed == len(cases) - len(failed) == 3


@pytest.mark.slow
def test_the_command_writes_tables_and_goes_on_where_it_was(options, tmp_path, capsys):
    command = ["sweep", *options, "--mitigations", "none", "wanda", "--limit", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert "8 cases, 8 of them computed now" in capsys.readouterr().out
    assert main([*command, "--attack", "none", "dori", "dori", "lr=0.2"]) == 0
    assert "12 cases, 4 of them computed now" in capsys.readouterr().out
    rows, table, verdicts = (
        pd.read_csv(tmp_path / "out" / f"{name}.csv", comment="#", keep_default_na=False)
        for name in ("rows", "table", "verdicts")
    )
    assert len(rows) == 2 * 2 * 5 * 2  # images, mitigations, (prompt, two attacks of two steps), seeds
    assert set(table["attack"]) == {"none", "DoRI", "DoRI lr=0.2"}
    assert set(table["images_of"]) == {"targets", "control"} and set(table["targets"]) == {1}
    counts = verdicts.groupby(["attack", "mitigation"]).size()
    assert counts.to_dict() == {(a, m): 2 for a in ("DoRI", "DoRI lr=0.2") for m in ("original", "Wanda")}


@pytest.mark.slow
def test_a_dry_run_lists_cases_and_keeps_the_one_that_it_measures(options, tmp_path, capsys):
    command = ["sweep", *options, "--mitigations", "none", "--limit", "1", "--out", str(tmp_path / "out")]
    assert main([*command, "--dry-run", "--workers", "8"]) == 0
    out = capsys.readouterr().out
    assert "4 cases:" in out and "original   DoRI      2" in out and "0 are in the store, 4 are left" in out
    assert "Measured, and kept: cat, original, DoRI" in out  # the kind that takes longest
    assert "The other 3" in out and "hours with 1 worker or" in out and "hours with 8 workers" in out
    assert len(entries(tmp_path / "out" / "store")) == 1 and not (tmp_path / "out" / "rows.csv").exists()
    assert main(command) == 0
    assert "4 cases, 3 of them computed now" in capsys.readouterr().out
    assert main([*command, "--dry-run"]) == 0
    assert "0 are left" in capsys.readouterr().out


def test_the_command_says_where_the_others_are_if_there_are_any(options, tables, tmp_path, capsys):
    command = ["sweep", *options, "--mitigations", "none", "--attack", "none", "--out", str(tmp_path / "out")]
    table = pd.read_csv(tables[0])
    too_long = "the photo " * 20  # more tokens than the model takes
    table.assign(prompt=["a cat", too_long]).to_csv(tables[0], index=False)
    assert main(command) == 1
    assert "1 of 4 cases failed, the first: dog, original, none: " in (error := capsys.readouterr().err)
    assert f". The others are kept and in the tables in {tmp_path / 'out'}; the same command" in error
    assert (tmp_path / "out" / "rows.csv").exists()
    for own in tables:
        pd.read_csv(own).assign(prompt=too_long).to_csv(own, index=False)
    assert main([*command[:-1], str(tmp_path / "none")]) == 1
    assert "4 of 4 cases failed" in (error := capsys.readouterr().err)
    assert "No tables were written; the same command tries the failed ones again" in error and "others" not in error
    assert not (tmp_path / "none" / "rows.csv").exists()


def test_a_sweep_may_be_stored_elsewhere(options):
    command = ["sweep", *options, "--mitigations", "none", "--limit", "1", "--out", "memory://bucket/sweep"]
    assert main([*command, "--attack", "none"]) == 0
    rows = pd.read_csv("memory://bucket/sweep/rows.csv", comment="#")
    assert set(rows["target"]) == {"cat", "noise-0"} and len(rows) == 4


def test_an_edit_of_ones_own_is_a_mitigation(make_plan, tiny_testbed, tmp_path):
    weight = tiny_testbed.unet.conv_out.weight
    edit = Edit("theirs", base_hash(tiny_testbed), masks={"conv_out.weight": torch.ones_like(weight, dtype=torch.bool)})
    edit.save(tmp_path / "theirs.safetensors")
    mitigations = read_mitigations(["none", str(tmp_path / "theirs.safetensors")])
    assert list(mitigations) == ["original", "theirs"]
    plan, cases = make_plan("store")
    plan = replace(plan, mitigations=mitigations, attacks={"none": None})
    rows, _ = swept(plan, plan.cases([cases[0].target], []))
    means = rows.groupby("mitigation")["sscd_gen"].mean()
    assert means["original"] > 0.99 > means["theirs"]


def test_workers_in_another_folder_find_everything(tiny_testbed_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_testbed_folder)
    Path("theirs.safetensors").touch()
    given = ["sweep", "--mitigations", "nemo", "theirs.safetensors", "--nemo-statistics", "statistics.safetensors"]
    options = _parse([*given, "--model", "model", "--out", "out"])
    plan = sweep.plan_of(options, replace(PRESETS["smoke"], model="model"))
    paths = [plan.preset.model, plan.mitigations["theirs"], plan.statistics, plan.store]
    assert all(Path(path).is_absolute() for path in paths) and plan.store == str(tmp_path / "out" / "store")
    options = _parse(["sweep", "--out", "s3://bucket/out/", "--model", "sd14"])
    plan = sweep.plan_of(options, PRESETS["paper"])
    assert plan.store == "s3://bucket/out/store" and plan.preset.model == "sd14"


def test_attacks_are_read_with_their_options():
    usual = AttackConfig(steps=50, record=(1, 10, 25, 50))
    preset = replace(PRESETS["testbed"], attack=usual)
    found = read_attacks(["none", "dori", "dori", "steps=20", "lr=0.05", "start=noise"], preset)
    assert list(found) == ["none", "DoRI", "DoRI steps=20 lr=0.05 start=noise"] and found["none"] is None
    assert found["DoRI"] == usual
    other = AttackConfig(steps=20, lr=0.05, start="noise", record=(1, 10, 20))
    assert found["DoRI steps=20 lr=0.05 start=noise"] == other
    words = ["completion", "known=top", "latent", "latent", "share=0.4", "tokens", "steps=4", "exchanges=2"]
    found = read_attacks(words, preset)
    assert found["completion known=top"] == completion.Config("top") and found["latent"] == preset.latent
    assert found["latent share=0.4"] == replace(preset.latent, share=0.4, record=(0.25,))
    assert found["tokens steps=4 exchanges=2"] == replace(preset.tokens, steps=4, exchanges=2, record=())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none", "dor"], "Unknown attack 'dor'"),
        (["steps=5"], "Unknown attack 'steps=5'"),
        (["none", "steps=5"], "Unknown attack 'steps=5'"),
        (["dori", "speed=5"], "Unknown attack 'speed=5'"),
        (["dori", "steps=many"], "steps=many"),
        (["dori", "steps=0"], "at least one step"),
        (["dori", "start=here"], "'here'"),
        (["dori", "none", "dori"], "twice"),
        (["completion", "steps=5"], "Unknown attack 'steps=5'"),
        (["completion", "known=middle"], "known is 'middle'"),
        (["latent", "share=all"], "share takes a number"),
        (["latent", "share=2"], "share is 2.0"),
        (["tokens", "steps=0"], "at least one step"),
    ],
)
def test_bad_attacks_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        read_attacks(words, PRESETS["testbed"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mitigations", "nemmo"], "Unknown mitigation 'nemmo'"),
        (["--mitigations", "none", "none"], "Two mitigations are called 'original'"),
        (["--mitigations", "nemo"], "--nemo-statistics"),
        (["--limit", "0"], "--limit is 0: give 1 or more"),
        (["--out", "nowhere://x"], "No store can be at nowhere://x"),
        (["--engine", "ray"], r'pip install "dori_utils\[cluster\]"'),
    ],
)
def test_bad_commands_get_one_clear_message(options, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert main(["sweep", *options, "--out", str(tmp_path / "out"), *arguments]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error


@pytest.mark.filterwarnings("ignore:Ray could not start in time")
def test_only_a_machine_that_is_too_busy_for_ray_is_asked_again(monkeypatch):
    asked, left = [], []

    def start(busy, message):
        """As Ray does it: with the busy machine's message so often, leaving a process behind."""
        asked.append(message)
        if len(asked) <= busy:
            left.append(subprocess.Popen(["sh", "-c", "sleep 600", "/ray/raylet"]))
            raise Exception(message)
        return "started"

    too_busy = "The current node timed out during startup. This could happen because some of the raylet failed"
    others = subprocess.Popen(["sleep", "600"])
    assert engines.patiently(start, busy=2, message=too_busy) == "started" and len(asked) == 3
    assert [process.wait() for process in left] == [-signal.SIGKILL] * 2
    assert others.poll() is None
    others.kill()
    with pytest.raises(Exception, match="No space left"):
        engines.patiently(start, busy=9, message="No space left on device")
    assert len(asked) == 4
    monkeypatch.setattr(engines, "START_SECONDS", 0)
    with pytest.raises(Exception, match="timed out during startup"):
        engines.patiently(start, busy=9, message=too_busy)
    assert len(asked) == 5
    for process in left[2:]:
        process.kill()
    for process in (*left, others):
        process.wait()


@with_ray
@pytest.mark.slow
def test_two_ray_workers_one_of_them_killed_give_the_local_engines_rows(make_plan, tables):
    cat = read_targets(tables[0])[:1]
    wrong, remark, rows = worker_killed(*make_plan("ray", cat))
    others, (_, _, computed) = swept(*make_plan("local", cat))
    assert wrong == 0, remark
    assert computed == 18 and len(rows) == 3 * 3 * 3 * 2  # images, mitigations, steps, seeds
    assert differing_rows(rows, others) == 0


@with_ray
@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(options, tmp_path):
    options = [*options, "--limit", "1", "--mitigations", "none", "wanda"]
    wrong, remark = driver_killed(tmp_path / "killed", *options)
    assert wrong == 0, remark
    assert main(["sweep", *options, "--out", str(tmp_path / "whole")]) == 0
    killed, whole = [(tmp_path / name / "rows.csv").read_text() for name in ("killed", "whole")]
    assert killed == whole


@pytest.fixture(scope="module")
def cluster():
    """A running Ray cluster of one node, which has room for one worker."""
    engines._import_ray()  # with its settings
    import ray.cloudpickle
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = engines.patiently(Cluster, initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


class DeadlyWorker(InstantWorker):
    """Case 3 ends the process that computes it, each time."""

    def compute(self, case, config):
        if case == 3:
            os._exit(1)
        return super().compute(case, config)


class SlowWorker(InstantWorker):
    def compute(self, case, config):
        time.sleep(1)
        return super().compute(case, config)


TASKS = [(number, {"what": "sweep", "number": number}) for number in range(8)]


@with_ray
@pytest.mark.slow
def test_a_case_that_kills_its_worker_each_time_is_given_up(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "RETRIES", 1)
    with engines.started("ray", DeadlyWorker, tmp_path, workers=1, address=cluster.address) as engine:
        engine.about()
        results, failed, computed = sweep.run(engine, TASKS, Store(tmp_path), progress=False)
    assert list(failed) == [3] and computed == 7
    assert [result and int(result["number"]) for result in results] == [0, 1, 2, None, 4, 5, 6, 7]


@with_ray
@pytest.mark.slow
def test_a_lost_node_costs_no_case_though_nothing_takes_its_place(cluster, tmp_path):
    node = engines.patiently(cluster.add_node, num_cpus=1, wait=False)  # the engine waits until the worker is there
    with engines.started("ray", SlowWorker, tmp_path, workers=2, address=cluster.address) as engine:
        engine.about()
        watched = Watched(tmp_path, 3, lambda: cluster.remove_node(node, allow_graceful=False))
        results, failed, computed = sweep.run(watched(engine), TASKS, Store(tmp_path), progress=False)
    assert not failed and computed == 8 and [int(result["number"]) for result in results] == list(range(8))
    assert lost_or_doubled(watched.entries, entries(tmp_path), 8) == 0
