"""The live attack does what `attack` does, only in a thread; the widget is clicked through, also in a browser."""

import io
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from dori_utils.attack import AttackConfig, attack
from dori_utils.core import diffusion
from dori_utils.core.diffusion import encode_prompts, predict
from dori_utils.core.edits import Edit
from dori_utils.core.generation import generate
from dori_utils.core.hashes import model_hash
from dori_utils.core.sscd import load_sscd, sscd_scores
from dori_utils.core.store import Store
from dori_utils.core.targets import Target
from dori_utils.evaluation import audit, detect
from dori_utils.presets import PRESETS
from dori_utils.widgets import MITIGATIONS, LiveAttack, _curves, attack_widget

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = Path("/usr/bin/chromium")
CONFIG = AttackConfig(steps=5, batch_size=2)
PRESET = replace(PRESETS["smoke"], attack=CONFIG)
ENDLESS = replace(CONFIG, steps=10_000)
PATIENCE = 600  # seconds: no test waits so long, unless something is broken


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


TARGETS = [
    Target("one", "a cat on a car", noise(0), "VM"),
    Target("two", "a red dog", noise(1), "VM"),
    Target("lost", "a guitar", None, "VM"),
]


def neuron_off(pipe, number):
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    mask = torch.zeros(pipe.unet.get_parameter(name).shape[0], 1, dtype=torch.bool)
    mask[number] = True
    return Edit("off", model_hash(pipe), masks={name: mask})


@pytest.fixture(scope="module")
def sscd():
    return load_sscd()


def ended(live, *case, **kwargs):
    live.start(*case, **kwargs)
    live.wait()
    return live


@contextmanager
def endless(pipe, sscd, *case):
    """A live attack that would take hours, past its first pictures; stopped at the end."""
    past = threading.Event()
    live = LiveAttack(pipe, PRESET, sscd, on_update=lambda live: live.step > 5 and past.set())
    live.start(*case, ENDLESS)
    try:
        assert past.wait(PATIENCE), live.error
        yield live
    finally:
        live.stop()
        live.wait()


def generated(pipe, embeds, edit):
    """The picture of each embedding."""
    settings = dict(seeds=[0], edits=[edit], **PRESET.sampling, progress=False)
    return [generate(pipe, prompt_embeds=of_one[None], **settings)[0][0] for of_one in embeds]


def same(images, others):
    """Equal but for rounding."""
    return np.abs(np.stack(images).astype(int) - np.stack(others)).max() <= 1


# The attack without widgets


def test_it_finds_what_attack_finds(tiny_testbed, sscd):
    edit = neuron_off(tiny_testbed, 0)
    live = ended(LiveAttack(tiny_testbed, PRESET, sscd, every=2), TARGETS[0], edit, CONFIG)
    found = attack(tiny_testbed, TARGETS[:1], CONFIG, edits=edit, progress=False)
    assert live.error is None and not live.running
    assert torch.allclose(live.triggers.prompt_embeds, found.prompt_embeds, atol=1e-4)
    assert live.triggers.cases == found.cases
    assert live.losses == live.triggers.losses[0].tolist()


@pytest.mark.slow
def test_its_pictures_are_those_of_the_embeddings_under_the_edit(tiny_testbed, sscd):
    delta = torch.ones_like(tiny_testbed.unet.conv_out.bias)  # large enough to be seen
    edit, images = Edit("shift", model_hash(tiny_testbed), deltas={"conv_out.bias": delta}), {}
    live = LiveAttack(
        tiny_testbed, PRESET, sscd, every=2, on_update=lambda live: images.update({live.step: live.image})
    )
    ended(live, TARGETS[0], edit, replace(CONFIG, record=(0, 2, 4, 5)))
    embeds = torch.cat(list(live.triggers.recorded.values()))
    theirs = generated(tiny_testbed, embeds, edit)
    assert same([images[step] for step in (0, 2, 4, 5)], theirs)
    assert not same(theirs, generated(tiny_testbed, embeds, None)), "the edit changes pictures"
    assert same([live.start_image, live.image], [theirs[0], theirs[-1]])
    scores = sscd_scores([theirs], [TARGETS[0].image], transform="testbed", sscd=sscd, progress=False)[0]
    assert list(live.sscds) == [0, 2, 4, 5]
    assert np.allclose(list(live.sscds.values()), scores, atol=0.02) and live.image_sscd == live.sscds[5]


def test_an_edit_of_a_text_encoder_is_in_a_copy_and_counts_from_the_start(sd1, sscd):
    name = "text_encoder.final_layer_norm.bias"
    edit = Edit("shift", model_hash(sd1), deltas={name: torch.ones(16)})
    live = LiveAttack(sd1, PRESET, sscd)
    live.start(TARGETS[0], edit, replace(CONFIG, steps=1, record=(0,)))
    assert live._copy.text_encoder is not sd1.text_encoder and live._copy.vae is sd1.vae
    live.wait()
    assert live.error is None and model_hash(sd1) == edit.model
    start = live.triggers.recorded[0]
    torch.testing.assert_close(start, encode_prompts(sd1, [TARGETS[0].prompt]) + 1)


def test_it_reports_every_step_and_its_end(sd1, sscd):
    seen = []
    live = LiveAttack(sd1, PRESET, sscd, on_update=lambda live: seen.append((live.step, live.running)))
    ended(live, TARGETS[0], None, CONFIG)
    assert [step for step, _ in seen] == [0, 0, 1, 2, 3, 4, 5, 5]
    assert [running for _, running in seen] == [True] * 7 + [False]


def test_it_starts_from_the_prompt_noise_or_other_words(sd1, sscd):
    live, none = LiveAttack(sd1, PRESET, sscd), AttackConfig(steps=0)
    for config, prompt, start in (
        (none, None, encode_prompts(sd1, [TARGETS[0].prompt])),
        (none, "a striped violin", encode_prompts(sd1, ["a striped violin"])),
        (replace(none, start="noise"), None, attack(sd1, TARGETS[:1], replace(none, start="noise")).prompt_embeds),
    ):
        ended(live, TARGETS[0], None, config, prompt)
        assert torch.equal(live.triggers.prompt_embeds, start)


@pytest.mark.slow
def test_stop_ends_it_early_and_keeps_what_was_found(tiny_testbed, sscd):
    before, edit = model_hash(tiny_testbed), neuron_off(tiny_testbed, 0)
    with endless(tiny_testbed, sscd, TARGETS[0], edit) as live:
        live.stop()
        live.wait()
    (case,) = live.triggers.cases
    assert (case["stopped"], case["steps"]) == ("early", live.step)
    assert 5 < live.step < ENDLESS.steps and len(live.losses) == live.step
    assert same([live.image], generated(tiny_testbed, live.triggers.prompt_embeds, edit))
    assert model_hash(tiny_testbed) == before


@pytest.mark.slow
def test_other_cells_find_the_pipeline_without_the_edit_meanwhile(tiny_testbed, sscd, tmp_path):
    delta = torch.ones_like(tiny_testbed.unet.conv_out.bias)  # large enough to be seen
    edit = Edit("shift", model_hash(tiny_testbed), deltas={"conv_out.bias": delta})

    def results(folder):
        rows = audit(tiny_testbed, TARGETS[:2], PRESET, Store(folder), sscd, attack=replace(CONFIG, steps=1))
        detected = detect(tiny_testbed, ["a cat on a car"], PRESET, Store(folder), sscd)
        own = attack(tiny_testbed, TARGETS[:1], CONFIG, edits=edit, progress=False)
        numbers = rows["sscd"].to_numpy(), detected["score"].to_numpy(), own.prompt_embeds.numpy()
        return model_hash(tiny_testbed), *numbers

    alone = results(tmp_path / "alone")
    images = generated(tiny_testbed, encode_prompts(tiny_testbed, ["a cat on a car"]), None)
    with endless(tiny_testbed, sscd, TARGETS[0], edit) as live:
        meanwhile = results(tmp_path / "meanwhile")
        assert live.running and not live.stopping, live.error
        assert same(generated(tiny_testbed, encode_prompts(tiny_testbed, ["a cat on a car"]), None), images)
        assert live.running and not live.stopping, live.error
    assert meanwhile[0] == alone[0]
    for found, expected in zip(meanwhile[1:], alone[1:], strict=True):
        assert np.allclose(found, expected, atol=0.02)
    after = audit(tiny_testbed, TARGETS[:2], PRESET, Store(tmp_path / "meanwhile"), sscd)  # from what was stored
    assert np.array_equal(after["sscd"], meanwhile[1][: len(after)])


def test_one_runs_at_a_time(sd1, sscd):
    with endless(sd1, sscd, TARGETS[0], None) as live:
        with pytest.raises(RuntimeError, match="stop it first"):
            live.start(TARGETS[1])
        assert live.target is TARGETS[0] and live.running
    with pytest.raises(ValueError, match="a live attack is a single one"):
        live.start(TARGETS[0], config=AttackConfig(restarts=2))


@pytest.mark.filterwarnings("ignore:The loss is no longer a number")
def test_an_error_is_kept_and_the_next_one_runs(sd1, sscd, monkeypatch):
    live = ended(LiveAttack(sd1, PRESET, sscd), TARGETS[2])
    assert isinstance(live.error, ValueError) and "lost has no image" in str(live.error)
    predictions = []

    def broken(*args):
        predictions.append(predict(*args))
        return predictions[-1] if len(predictions) == 1 else predictions[-1] * torch.nan

    with monkeypatch.context() as patched:
        patched.setattr(diffusion, "predict", broken)
        ended(live, TARGETS[0], None, CONFIG)
    assert "no longer a number at step 2: try a smaller learning rate" in str(live.error)
    ended(live, TARGETS[0], None, CONFIG)
    assert live.error is None and live.triggers.cases[0]["steps"] == 5


# The widget


@pytest.fixture
def widget(tiny_testbed, sscd):
    off = [neuron_off(tiny_testbed, number) for number in range(3)]
    widget = attack_widget(tiny_testbed, TARGETS, {"original": None, "each": off, "all": off[2]}, PRESET, sscd)
    yield widget
    widget.live.stop()
    widget.live.wait()


def clicked(widget):
    widget.start_button.click()
    widget.live.wait()
    return widget


@pytest.mark.slow
def test_the_choices_reach_the_attack(widget):
    off = widget.edits["each"]
    widget.target.value, widget.mitigation.value, widget.start.value = TARGETS[1], "each", "noise"
    widget.steps.value, widget.lr.value = 3, 0.01
    (case,) = clicked(widget).live.triggers.cases
    assert (case["target"], case["edit"], case["start"]) == ("two", off[1].fingerprint(), "noise")
    assert (case["config"]["steps"], case["config"]["lr"], case["config"]["batch_size"]) == (3, 0.01, 2)
    widget.mitigation.value = "all"
    assert clicked(widget).live.triggers.cases[0]["edit"] == off[2].fingerprint()


@pytest.mark.slow
def test_the_words_to_start_from_are_asked_for_when_they_are_wanted(widget, tiny_testbed):
    assert widget.prompt.layout.display == "none"
    widget.start.value = "other"
    assert widget.prompt.layout.display is None
    widget.prompt.value = "a striped violin"
    assert clicked(widget).live.triggers.cases[0]["start"] == "given"
    widget.prompt.value = "dog " * 20
    assert "Prompt too long" in clicked(widget).status.value


def test_pictures_curves_and_words_follow(widget):
    before = [widget.curves.value, *(picture.value for picture, _ in widget.pictures)]
    clicked(widget)
    after = [widget.curves.value, *(picture.value for picture, _ in widget.pictures)]
    assert [new == old for new, old in zip(after, before, strict=True)] == [False, True, False, False]
    assert "Done after step 5" in widget.status.value and widget.progress.value == widget.progress.max == 5
    assert f"SSCD {widget.live.image_sscd:.2f}" in widget.pictures[2][1].value
    assert "after step 5" in widget.pictures[2][1].value
    widget.target.value = TARGETS[1]
    assert widget.pictures[2][0].value == before[3], "no picture of another target beside this one"
    assert widget.curves.value == before[0] and widget.progress.value == 0 and "Ready" in widget.status.value
    assert widget.live.triggers is not None, "what was found is kept"


def test_a_control_is_not_called_a_training_image(tiny_testbed, sscd):
    control = replace(TARGETS[0], id="new", kind="control")
    widget = attack_widget(tiny_testbed, [TARGETS[0], control], {"original": None}, PRESET, sscd)
    caption = widget.pictures[0][1]
    assert "training image" in caption.value
    widget.target.value = control
    assert "never seen in training" in caption.value and "training image" not in caption.value


def test_curves_without_points_fill_the_same_place():
    wide = []
    for losses, sscds in (([], {}), ([0.5] * 50, {0: 0.1, 50: 0.9})):
        picture = _curves(losses, sscds, 50, MITIGATIONS["NeMo"])
        dark = np.asarray(Image.open(io.BytesIO(picture)).convert("L")) < 128
        wide.append(np.flatnonzero(dark.any(axis=0))[[0, -1]])
        assert dark.any(axis=1).mean() > 0.5 and np.ptp(wide[-1]) > 0.8 * dark.shape[1]
    assert np.abs(wide[0] - wide[1]).max() < 0.1 * dark.shape[1]


def test_start_and_stop_take_turns(widget):
    under_way = threading.Event()
    widget.stop_button.observe(lambda change: under_way.set(), "disabled")
    widget.steps.value = 10_000
    assert not widget.start_button.disabled and widget.stop_button.disabled
    widget.start_button.click()
    assert under_way.wait(PATIENCE)
    assert widget.start_button.disabled and not widget.stop_button.disabled and widget.target.disabled
    said = []
    widget.status.observe(lambda change: said.append(change["new"]), "value")
    widget.stop_button.click()
    widget.live.wait()
    assert "stops after this step" in said[0], "at once, although it ends later"
    assert "Stopped after step" in widget.status.value
    assert not widget.start_button.disabled and widget.stop_button.disabled and not widget.target.disabled


def test_an_error_is_said_in_words_and_start_works_again(widget):
    widget.target.value = TARGETS[2]
    assert "lost has no image" in clicked(widget).status.value
    widget.target.value = TARGETS[0]
    assert "Done" in clicked(widget).status.value


def test_a_list_of_edits_must_fit_the_targets(tiny_testbed, sscd):
    with pytest.raises(ValueError, match="off: 1 edits for 3 targets"):
        attack_widget(tiny_testbed, TARGETS, {"off": [neuron_off(tiny_testbed, 0)]}, PRESET, sscd)


# In a browser


NOTEBOOK = [
    """from test_widgets import PRESET, TARGETS, neuron_off
from dori_utils.core.models import load_pipeline
from dori_utils.widgets import attack_widget

pipe = load_pipeline({folder!r}, device="cpu")
widget = attack_widget(pipe, TARGETS, {{"original": None, "off": neuron_off(pipe, 0)}}, PRESET)
widget""",
    "print('answered while it ran:', widget.live.running)",
    """from dori_utils.core.bars import tqdm
from dori_utils.plots import image_grid, save_figure, use_style

for _ in tqdm(range(2), mininterval=0):
    for _ in tqdm(range(2), mininterval=0):
        pass
image_grid([[TARGETS[0].image]])""",
    """import matplotlib.pyplot as plt
import pandas as pd

use_style()
fig, ax = plt.subplots()
save_figure(fig, pd.DataFrame({{"a": [1]}}), "saved")""",
]


@contextmanager
def jupyter_lab(folder):
    """The address of a JupyterLab that has its notebooks and all its settings in the folder."""
    token = secrets.token_hex()
    places = {f"JUPYTER_{what}_DIR": str(folder / what) for what in ("CONFIG", "DATA", "RUNTIME")}
    places |= {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    places["DORI_FIGURES"] = str(folder / "figures")
    places["OMP_NUM_THREADS"] = "1"  # for a tiny model, in the company of a browser
    options = [f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}", "--ServerApp.port_retries=1000"]
    options += ["--no-browser", "--allow-root", "--LabApp.extension_manager=readonly"]
    with open(folder / "log", "w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=os.environ | places, stdout=log, stderr=subprocess.STDOUT)
    about = folder / "RUNTIME" / f"jpserver-{server.pid}.json"  # written when it listens, at a port that was free
    try:
        while not (about.exists() and about.read_text().endswith("}")):
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{json.loads(about.read_text())['port']}/lab/tree/live.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(PATIENCE)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs Chromium at {CHROMIUM}")
def test_in_jupyterlab_one_can_choose_start_watch_stop_and_read_errors(tiny_testbed_folder, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    expect = playwright.expect
    expect.set_options(timeout=1000 * PATIENCE)
    cells = [new_code_cell(source.format(folder=str(tiny_testbed_folder))) for source in NOTEBOOK]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "live.ipynb")
    with jupyter_lab(tmp_path) as address, playwright.sync_playwright() as browsers:
        arguments = ["--no-sandbox", "--disable-gpu"]
        patient = {"timeout": 1000 * PATIENCE}
        browser = browsers.chromium.launch(executable_path=str(CHROMIUM), args=arguments, **patient)
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(address)
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        notebook_cells = page.locator(".jp-Notebook .jp-CodeCell")
        notebook_cells.nth(0).locator(".cm-content").click()
        page.keyboard.press("Control+Enter")

        start, stop = [page.locator("button.widget-button", has_text=word) for word in ("Start", "Stop")]
        start.wait_for()
        page.get_by_label("mitigation", exact=True).select_option("off")
        page.get_by_label("steps", exact=True).fill("10000")
        page.get_by_label("steps", exact=True).press("Enter")
        start.click()
        caption = page.locator(".widget-html", has_text=re.compile("after step [1-9]"))
        curves = page.locator("img.widget-image").nth(3)
        words, drawn = caption.inner_text(), curves.get_attribute("src")
        assert "SSCD" in words
        expect(caption).not_to_have_text(words, use_inner_text=True)
        expect(curves).not_to_have_attribute("src", drawn)

        notebook_cells.nth(1).locator(".cm-content").click()
        page.keyboard.press("Control+Enter")
        page.get_by_text("answered while it ran: True").wait_for()
        stop.click()
        page.get_by_text("Stopped after step").wait_for()

        page.get_by_label("target", exact=True).select_option("lost: a guitar")
        start.click()
        page.get_by_text("lost has no image").wait_for()
        page.get_by_label("target", exact=True).select_option("two: a red dog")
        page.get_by_label("steps", exact=True).fill("3")
        page.get_by_label("steps", exact=True).press("Enter")
        start.click()
        page.get_by_text("Done after step 3").wait_for()

        for number in (2, 3):
            notebook_cells.nth(number).locator(".cm-content").click()
            page.keyboard.press("Control+Enter")
            expect(notebook_cells.nth(number).locator(".jp-OutputArea img")).to_have_count(1)
        page.keyboard.press("Control+s")
        for _ in range(600):
            saved = nbformat.read(tmp_path / "live.ipynb", as_version=4).cells[2:]
            if saved[-1].outputs:
                break
            time.sleep(0.1)
        for cell in saved:
            words = [output.text.strip() for output in cell.outputs if output.output_type == "stream"]
            pictures = [output.data for output in cell.outputs if output.output_type != "stream"]
            assert set(words) <= {""} and not [output for output in cell.outputs if output.get("name") == "stderr"]
            assert len(pictures) == 1 and set(pictures[0]) == {"image/png", "text/plain"}, "no widget, no path"
        browser.close()
