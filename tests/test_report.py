"""The report of an audit, and the command line that writes it."""

import base64
import io
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dori_utils import wanda
from dori_utils.__main__ import main
from dori_utils.attack import AttackConfig, Triggers
from dori_utils.edits import Edit, base_hash
from dori_utils.models import load_pipeline, load_unet
from dori_utils.presets import PRESETS
from dori_utils.report import conclusion, settings_table, verdicts, write_report
from dori_utils.store import Store
from dori_utils.targets import read_targets

WANDA = wanda.Config(sparsity=0.3, steps=1, num_inference_steps=2, guidance_scale=3.0)


def make_rows(targets, controls, mitigation="NeMo"):
    """Rows as `audit` gives them, two seeds; of each image the mean SSCD after steps 0 (prompt), 10 and 50."""
    rows = []
    for kind, images in (("VM", targets), ("control", controls)):
        for number, of_steps in enumerate(images):
            for steps, mean in zip((0, 10, 50), of_steps, strict=True):
                about = {"mitigation": mitigation, "target": f"{kind}-{number}", "prompt": "a cat", "kind": kind}
                about |= {"attack": "DoRI" if steps else "none", "steps": steps}
                rows += [about | {"seed": seed, "sscd": mean + 0.1 * (-1) ** seed} for seed in (0, 1)]
    return pd.DataFrame(rows)


def test_a_verdict_says_from_what_and_after_how_many_steps_an_image_comes_back():
    rows = make_rows([[0.9, 0.9, 0.9], [0.3, 0.65, 0.8], [0.2, 0.3, 0.4]], [[0.1, 0.2, 0.5]])
    table = verdicts(rows).set_index("target")
    assert table["step"].fillna(-1).to_dict() == {"VM-0": 10, "VM-1": 50, "VM-2": -1, "control-0": -1}
    assert table.loc["VM-1", ["prompt", "trigger"]].tolist() == pytest.approx([0.3, 0.8])
    rates = settings_table(rows).set_index(["images_of", "attack", "steps"])["rate"]
    assert rates["targets", "none", 0] == pytest.approx(1 / 3) and rates["targets", "DoRI", 50] == pytest.approx(2 / 3)


def test_the_conclusion_claims_no_more_than_targets_and_controls_carry():
    back, gone, never = [0.3, 0.5, 0.9], [0.3, 0.4, 0.5], [0.1, 0.2, 0.3]
    held = conclusion(make_rows([back] * 16, [never] * 16), "NeMo")
    assert "0 of 16 images come back from their own prompts, 16 of 16 from a trigger" in held
    assert "hidden from their prompts, not removed" in held and "brings back 0 of 16" in held
    injected = conclusion(make_rows([back] * 16, [back] * 16), "NeMo")
    assert "not clearly more often" in injected and "holds" not in injected
    few = conclusion(make_rows([back], [never]), "NeMo")
    assert "not clearly more often" in few  # one image and one control show nothing
    none = conclusion(make_rows([gone] * 16, [never] * 16), "NeMo")
    assert "no proof" in none and "holds" not in none
    weak = conclusion(make_rows([[0.9, 0.4, 0.5]] * 16, [never] * 16), "NeMo")
    assert "too short or badly set" in weak and "no proof" not in weak
    plain = conclusion(make_rows([[0.9, 0.9, 0.9]] * 16, [never] * 16), "NeMo")
    assert "So the model holds these images." in plain


@pytest.fixture
def own_images(tmp_path):
    """Tables of two targets and of two controls, which are larger than a report shows them."""
    (tmp_path / "images").mkdir()
    draw = np.random.default_rng(0).integers
    for name, side in {"cat": 40, "dog": 50, "noise 0": 300, "noise 1": 400}.items():
        Image.fromarray(draw(0, 255, (side, 40, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    table = pd.DataFrame({"prompt": ["a cat", "a dog", "a red car", "a # guitar"]})
    table["image"] = [f"images/{name}.png" for name in ("cat", "dog", "noise 0", "noise 1")]
    table[:2].to_csv(tmp_path / "targets.csv", index=False)
    table[2:].to_csv(tmp_path / "controls.csv", index=False)
    return tmp_path


def test_own_targets_are_read_from_a_table(own_images):
    cat, dog = read_targets(own_images / "targets.csv")
    assert (cat.id, cat.prompt, cat.kind, cat.duplicates) == ("cat", "a cat", "target", None)
    assert dog.image.mode == "RGB" and dog.image.size == (40, 50)
    assert read_targets(own_images / "controls.csv")[1].prompt == "a # guitar"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt\na cat\n", "no column image"),
        ("prompt,image\na cat,\n", "no prompt or no image in row 1"),
        ("prompt,image\na cat,images/cat.png\na dog,images/cat.png\n", "'cat' twice"),
        ("prompt,image\na cat,images/none.png\n", "none.png"),
    ],
)
def test_a_bad_table_of_targets_is_refused(own_images, text, message):
    (own_images / "bad.csv").write_text(text)
    with pytest.raises((ValueError, OSError), match=message):
        read_targets(own_images / "bad.csv")


def test_a_unet_alone_is_loaded_and_another_folder_refused(tiny_testbed, tiny_testbed_folder, tmp_path):
    for folder in (tiny_testbed_folder, tiny_testbed_folder / "unet"):
        theirs = dict(load_unet(folder).named_parameters())
        assert all((theirs[name] == own).all() for name, own in tiny_testbed.unet.named_parameters())
    with pytest.raises(FileNotFoundError, match="no U-Net"):
        load_unet(tmp_path)


@pytest.mark.slow
def test_the_command_writes_a_report_that_stands_alone(tiny_testbed_folder, own_images, monkeypatch, capsys):
    monkeypatch.setenv("DORI_CACHE", str(own_images / "cache"))
    pipe = load_pipeline(tiny_testbed_folder)
    targets = read_targets(own_images / "targets.csv")
    wanda.localize(pipe, targets, WANDA, progress=False).save(own_images / "pruned.safetensors")
    other = load_unet(tiny_testbed_folder)
    other.conv_out.weight.mul_(1.5)
    other.save_pretrained(own_images / "theirs")
    command = ["audit", "--model", tiny_testbed_folder, "--preset", "smoke", "--out", own_images / "out"]
    command += ["--targets", own_images / "targets.csv", "--controls", own_images / "controls.csv", "--steps", "2"]
    command += ["--edit", own_images / "pruned.safetensors", "--edit", own_images / "theirs"]
    assert main([str(part) for part in command]) == 0
    assert capsys.readouterr().out.strip() == str(own_images / "out" / "report.html")
    html = (own_images / "out" / "report.html").read_text()
    pictures = re.findall(r'src="data:image/\w+;base64,([^"]+)"', html)
    assert len(pictures) == 1 + 3 * 4 * (1 + 3)  # the curves; mitigations x images x (original, prompt, 1 and 2 steps)
    assert all(max(Image.open(io.BytesIO(base64.b64decode(p))).size) <= 160 for p in pictures[1:])
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert all(
        name in html for name in ("original.", "pruned.", "theirs.", "a # guitar", "steps=2", "seeds", "torch 2")
    )
    assert Edit.load(own_images / "pruned.safetensors").fingerprint() in html
    assert "noise 0 (control)" in html and base_hash(pipe) in html
    rows = pd.read_csv(own_images / "out" / "rows.csv", comment="#", quotechar='"')
    assert len(rows) == 3 * 4 * 3 * 2  # mitigations x images x (prompt, 1, 2 steps) x seeds
    assert set(rows["mitigation"]) == {"original", "pruned", "theirs"}
    assert rows["sscd"].notna().all() and "a # guitar" in set(rows["prompt"])
    assert "num_inference_steps" in html.split("Replay a trigger")[1]
    found = Triggers.load(own_images / "out" / "triggers" / "pruned.safetensors")
    edit = Edit.load(own_images / "pruned.safetensors")
    assert [case["target"] for case in found.cases] == ["cat", "dog", "noise 0", "noise 1"]
    assert {case["edit"] for case in found.cases} == {edit.fingerprint()}


def test_ids_that_targets_and_controls_share_are_refused_at_once(tiny_testbed, own_images):
    targets = read_targets(own_images / "targets.csv")
    arguments = (PRESETS["smoke"], Store(own_images / "cache"), AttackConfig(steps=1))
    with pytest.raises(ValueError, match="share ids: dog"):
        write_report(own_images / "out", tiny_testbed, targets, targets[1:], *arguments)
    with pytest.raises(ValueError, match="No targets"):
        write_report(own_images / "out", tiny_testbed, [], targets, *arguments)
    with pytest.raises(ValueError, match="at least one step"):
        write_report(own_images / "out", tiny_testbed, targets[:1], targets[1:], *arguments[:2], AttackConfig(steps=0))
    assert not (own_images / "out").exists()


def test_the_command_says_what_is_missing(tiny_testbed_folder, own_images, capsys):
    out = ["--out", str(own_images / "out")]
    assert main(["audit", "--model", str(tiny_testbed_folder), *out]) == 1
    assert "--targets" in capsys.readouterr().err
    assert main(["audit", "--targets", "data/sd41", *out]) == 1
    assert "There is no data/sd41" in capsys.readouterr().err
    assert main(["audit", "--model", "sd41", "--targets", str(own_images / "targets.csv"), *out]) == 1
    assert "Did you mean" in capsys.readouterr().err
    assert main(["audit", "--edit", str(own_images), "--limit", "1", *out]) == 1
    assert "holds no U-Net" in capsys.readouterr().err
    assert main(["audit", "--edit", "nothing.safetensors", "--limit", "1", *out]) == 1
    assert "There is no nothing.safetensors. Give a file of Edit.save, a U-Net" in capsys.readouterr().err
    pruned = own_images / "original.safetensors"
    pruned.touch()
    assert main(["audit", "--edit", str(pruned), "--limit", "1", *out]) == 1
    assert "Two mitigations are called 'original'" in capsys.readouterr().err
    assert not (own_images / "out").exists()
