"""The report of an audit, and the command line that writes it."""

import base64
import io
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dori_utils import wanda
from dori_utils.attack import AttackConfig
from dori_utils.cli.main import PRESET_NAMES, PROMPT_LIST_NAMES, _parse, main
from dori_utils.cli.report import _words, write_report
from dori_utils.cli.verdicts import conclusion, settings_table, verdicts
from dori_utils.cli.words import way_of
from dori_utils.core.edits import Edit
from dori_utils.core.hashes import base_hash
from dori_utils.core.models import load_pipeline, load_unet
from dori_utils.core.prompt_lists import PROMPT_LISTS
from dori_utils.core.store import Store
from dori_utils.core.targets import read_targets
from dori_utils.core.triggers import Triggers
from dori_utils.presets import PRESETS

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


GONE, NEVER = [0.3, 0.4, 0.5], [0.1, 0.2, 0.3]  # not back from anything; a control
OPEN, HIDDEN = [0.9, 0.9, 0.9], [0.3, 0.5, 0.9]  # back from prompt and trigger; from a trigger alone
MISSED = [0.9, 0.4, 0.5]  # back from its prompt, and the attack loses it


def test_a_verdict_is_what_the_last_step_of_the_attack_found():
    images = [OPEN, [0.3, 0.65, 0.8], GONE, [0.3, 0.8, 0.6], [0.9, 0.3, 0.8], MISSED]
    rows = make_rows(images, [[0.1, 0.2, 0.5]])
    table = verdicts(rows).set_index("target")
    alone, prompt, none = "back from a trigger alone", "back from its prompt", "not back"
    assert table["verdict"].tolist() == [prompt, alone, none, none, prompt, prompt, none]
    assert table["step"].fillna(-1).tolist() == [10, 50, -1, -1, 50, -1, -1]
    assert table["lost"].fillna(-1).tolist() == [-1, -1, -1, 10, -1, -1, -1]
    assert table["prompt"].tolist() == pytest.approx([of[0] for of in images] + [0.1])
    assert table["trigger"].tolist() == pytest.approx([of[-1] for of in images] + [0.5])
    rates = settings_table(rows).set_index(["images_of", "attack", "steps"])["rate"]
    assert rates["targets", "none", 0] == (table["prompt"] > 0.7).sum() / 6 == 3 / 6
    assert rates["targets", "DoRI", 50] == (table["trigger"] > 0.7).sum() / 6 == 3 / 6


def test_an_image_that_is_lost_again_is_back_from_the_step_on_at_which_it_stays():
    rows = make_rows([[0.3, 0.8, 0.9]], [NEVER])
    late = rows[rows["steps"] == 10].assign(steps=25, sscd=0.4)
    assert verdicts(pd.concat([rows, late], ignore_index=True)).loc[0, "step"] == 50


def test_the_words_of_an_image_are_those_of_its_verdict():
    words = [
        _words(verdict, 50)
        for verdict in verdicts(make_rows([OPEN, HIDDEN, GONE, [0.3, 0.8, 0.6], MISSED], [NEVER])).itertuples()
    ]
    assert words[:5] == [
        "comes back from its prompt, and from a trigger, from 10 steps on",
        "does not come back from its prompt, but from a trigger, after 50 steps",
        "comes back neither from its prompt nor from a trigger, after 50 steps",
        "comes back neither from its prompt nor from a trigger, after 50 steps; "
        "from one after 10 steps it did, and was lost again",
        "comes back from its prompt, but not from a trigger, after 50 steps",
    ]


HELD, HIDES = "so the model holds them: neither hidden nor removed", "hidden from their prompts, not removed"
NOT_SHOWN, NO_PROOF, WEAK = "not show that", "no proof that they are gone", "too short or badly set"
FEW, SOME, NOT_EACH = "too few images to show", "holds images among these", "if not each of them"


@pytest.mark.parametrize(
    ("targets", "controls", "said"),
    [
        pytest.param([OPEN] * 2, [NEVER] * 2, {HELD}, id="two from their prompts are two that are held"),
        pytest.param([OPEN] * 2, [HIDDEN] * 2, {HELD}, id="whatever the attack puts into controls"),
        pytest.param([MISSED] * 16, [NEVER] * 16, {HELD, WEAK}, id="whatever the attack finds"),
        pytest.param([OPEN] * 2, [OPEN] * 2, {NOT_SHOWN}, id="unless controls come back from theirs"),
        pytest.param([OPEN] * 16, [OPEN] + [NEVER] * 15, {SOME, NOT_EACH}, id="clearly less often"),
        pytest.param([HIDDEN] * 16, [NEVER] * 16, {HIDES}, id="hidden"),
        pytest.param([OPEN] * 8 + [HIDDEN] * 8, [NEVER] * 16, {HELD, HIDES}, id="half of them hidden"),
        pytest.param([OPEN] * 8 + [GONE] * 8, [NEVER] * 16, {HELD, NO_PROOF}, id="half of them not found"),
        pytest.param([HIDDEN] * 16, [HIDDEN] * 16, {NOT_SHOWN}, id="put in by the attack"),
        pytest.param([HIDDEN] * 16, [HIDDEN] + [NEVER] * 15, {HIDES, NOT_EACH}, id="some perhaps put in"),
        pytest.param([HIDDEN] * 2, [NEVER] * 2, {FEW}, id="too few"),
        pytest.param([HIDDEN] * 4, [NEVER] * 4, {HIDES}, id="four of each, as the advice says"),
        pytest.param([OPEN] + [HIDDEN] * 2, [NEVER] * 2, {HELD, FEW}, id="one from its prompt, the others too few"),
        pytest.param([HIDDEN] * 2, [OPEN] * 2, {FEW}, id="no control left whose prompt does not give it"),
        pytest.param([GONE] * 16, [NEVER] * 16, {NO_PROOF}, id="not found"),
        pytest.param([[0.3, 0.9, 0.5]] * 16, [NEVER] * 16, {NO_PROOF}, id="found on the way is not found"),
        pytest.param([GONE], [NEVER], {NO_PROOF}, id="one of each"),
    ],
)
def test_the_conclusion_claims_what_targets_and_controls_carry(targets, controls, said):
    rows = make_rows(targets, controls)
    found, table = conclusion(rows, "NeMo"), verdicts(rows)
    claims = (HELD, HIDES, NOT_SHOWN, NO_PROOF, WEAK, FEW, SOME, NOT_EACH)
    assert {claim for claim in claims if claim in found.verdict} == said
    assert found.advice
    own = table[table["kind"] == "VM"]
    prompt, trigger = (own["prompt"] > 0.7).sum(), (own["trigger"] > 0.7).sum()
    alone, count = (own["verdict"] == "back from a trigger alone").sum(), len(own)
    assert f"own prompts {prompt} of {count} " in found.facts
    assert f"triggers found in 50 steps {trigger} of {count} " in found.facts
    assert prompt == 0 or f"{prompt} of {count} images come back from their own prompts" in found.verdict
    assert alone == 0 or re.search(rf"{alone} of (the other )?{count - prompt}( images)? comes? back", found.verdict)


@pytest.mark.parametrize(("last", "said"), [(GONE, "does not come back"), (HIDDEN, "comes back")])
def test_one_that_is_left_is_not_called_the_other_1(last, said):
    found = conclusion(make_rows([OPEN] * 7 + [last], [NEVER] * 8), "NeMo")
    assert f"The other one {said} from a trigger" in found.verdict and "other 1" not in found.verdict


def with_attacks(targets, controls, attack, others, of_controls):
    """`make_rows`, and beside DoRI another attack that finds others in the same images."""
    rows, more = make_rows(targets, controls), make_rows(others, of_controls)
    return pd.concat([rows, more[more["attack"] != "none"].assign(attack=attack)], ignore_index=True)


PAST = "this defence holds against an embedding alone"


@pytest.mark.parametrize("attack", ["completion", "latent", "tokens"])
def test_a_defence_that_stops_an_embedding_and_not_another_attack_is_reported_as_such(attack):
    found = conclusion(with_attacks([GONE] * 8, [NEVER] * 8, attack, [HIDDEN] * 8, [NEVER] * 8), "NeMo")
    source = way_of(attack).source
    assert f"What stops triggers does not stop {source}: {PAST}." in found.verdict
    assert NO_PROOF in found.verdict and HIDES in found.verdict  # each attack has its own sentence
    assert f"8 of 8 images come back from {source}, clearly more" in found.verdict
    assert f"from {way_of(attack).found(50)} 8 of 8" in found.facts and f"from {source} 0 of 8" in found.facts


@pytest.mark.parametrize(
    ("targets", "others", "of_controls"),
    [
        pytest.param([HIDDEN] * 8, [HIDDEN] * 8, [NEVER] * 8, id="it stops neither"),
        pytest.param([GONE] * 8, [GONE] * 8, [NEVER] * 8, id="it stops both"),
        pytest.param([GONE] * 8, [HIDDEN] * 8, [HIDDEN] * 8, id="the other attack finds controls, too"),
        pytest.param([OPEN] * 8, [OPEN] * 8, [NEVER] * 8, id="prompts give them all"),
    ],
)
def test_nothing_is_said_to_get_past_a_defence_that_does_not(targets, others, of_controls):
    rows = with_attacks(targets, [NEVER] * 8, "completion", others, of_controls)
    assert PAST not in conclusion(rows, "NeMo").verdict


def test_an_attack_of_a_sweep_is_worded_by_its_name_without_its_options():
    rows = make_rows([HIDDEN] * 8, [NEVER] * 8)
    rows["attack"] = rows["attack"].replace("DoRI", "latent share=0.5")
    assert verdicts(rows)["verdict"][0] == "back from inverted noise alone"
    assert "8 of 8 images come back from inverted noise" in conclusion(rows, "NeMo").verdict


def test_the_words_of_other_attacks_say_how_much_it_took():
    images = [HIDDEN, GONE, [0.3, 0.8, 0.9], [0.3, 0.8, 0.6]]
    words = {}
    for attack in ("completion", "latent", "tokens"):
        rows = make_rows(images, [NEVER])
        rows["attack"] = rows["attack"].replace("DoRI", attack)
        words[attack] = [_words(verdict, 50) for verdict in verdicts(rows).itertuples()][:4]
    assert words["completion"][0] == "does not come back from its prompt, but from one half"
    assert words["completion"][1] == "comes back neither from its prompt nor from one half"
    assert words["latent"] == [
        "does not come back from its prompt, but from inverted noise, at a share of 50%",
        "comes back neither from its prompt nor from inverted noise, at a share of 50%",
        "does not come back from its prompt, but from inverted noise, from a share of 10% on",
        "comes back neither from its prompt nor from inverted noise, at a share of 50%; "
        "from one at a share of 10% it did, and was lost again",
    ]
    assert words["tokens"][2] == "does not come back from its prompt, but from a typed prompt, from 10 steps on"


@pytest.mark.parametrize(
    ("of_targets", "of_controls", "said"),
    [
        (
            0.8,
            0.3,
            "Of 8 that do not come back whole, 8 do in part, .*, clearly more than of those never seen \\(0 of 8",
        ),
        (0.8, 0.8, ", not clearly more than of those never seen \\(8 of 8"),
    ],
)
def test_copies_of_a_part_count_where_nothing_is_back_whole(of_targets, of_controls, said):
    rows = make_rows([GONE] * 8 + [OPEN] * 8, [NEVER] * 8)
    none = rows["attack"] == "none"
    rows["regions"] = np.where(none, np.where(rows["kind"] == "control", of_controls, of_targets), np.nan)
    assert re.search(said, conclusion(rows, "NeMo").verdict)
    assert verdicts(rows)["regions"].tolist() == [of_targets] * 16 + [of_controls] * 8
    assert "in part" not in conclusion(rows.assign(regions=0.6), "NeMo").verdict
    assert "in part" not in conclusion(rows.drop(columns="regions"), "NeMo").verdict


def test_a_mean_has_an_interval_from_eight_images_on_and_it_is_students():
    from scipy.stats import ttest_1samp

    few = settings_table(make_rows([OPEN, HIDDEN], [NEVER] * 8))
    assert few.groupby("images_of")["sscd_low"].count().to_dict() == {"targets": 0, "control": 3}
    means = np.linspace(0.2, 0.9, 9)
    table = settings_table(make_rows([[mean] * 3 for mean in means], [NEVER]))
    expected = ttest_1samp(means, 0).confidence_interval(0.95)
    for row in table[table["images_of"] == "targets"].itertuples():
        assert (row.sscd_low, row.sscd_high) == pytest.approx((expected.low, expected.high))


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


def check_pictures(html, count):
    """A report's pictures are in it, small, and described."""
    pictures = re.findall(r'src="data:image/\w+;base64,([^"]+)"', html)
    assert len(pictures) == count
    assert all(max(Image.open(io.BytesIO(base64.b64decode(p))).size) <= 160 for p in pictures[1:])
    assert not re.search(r'src="(?!data:)', html)  # nothing is fetched
    assert html.count("<img") == len(re.findall(r'<img [^>]*alt="[^"]{10,}"', html))


def check_links(html, folder, some):
    """Links lead to what is beside the report, or inside."""
    links = set(re.findall(r'href="([^"]+)"', html))
    assert some <= links
    for link in links:
        assert f'id="{link[1:]}"' in html if link.startswith("#") else (folder / link).is_file()


def check_frames(html, rows):
    """Of each picture, the first seed's: a dark frame by its own number, a bold mean by the mean."""
    figure = r"<figure( class=copy)?>.*?<br>(.*?)<br><span( class=back)?>mean (.*?)</span>"
    shown = re.findall(figure, html.replace("<figcaption>its image", "").replace("\n", ""))
    wanted = []
    for _, group in rows.groupby(["mitigation", "target", "steps"]):
        own, mean = group.loc[group["seed"] == 0, "sscd"].item(), group["sscd"].mean()
        frame, bold = " class=copy" * bool(own > 0.7), " class=back" * bool(mean > 0.7)
        wanted.append((frame, f"{own:.2f}", bold, f"{mean:.2f}"))
    assert sorted(shown) == sorted(wanted)


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
    check_pictures(html, 1 + 3 * 4 * (1 + 3))  # the curves; mitigations x images x (original, prompt, 1 and 2 steps)
    beside = {"rows.csv", "table.csv", "verdicts.csv", "steps.png", "triggers/theirs.safetensors"}
    check_links(html, own_images / "out", beside)
    assert html.count("<figcaption>never seen<") == html.count("<figcaption>its image<") == 3 * 2
    assert "What next?" in html and "training image" not in html
    assert all(
        name in html for name in ("original:", "pruned:", "theirs:", "a # guitar", "steps=2", "seeds", "torch 2")
    )
    assert Edit.load(own_images / "pruned.safetensors").fingerprint() in html
    assert "noise 0 (control)" in html and base_hash(pipe) in html
    rows = pd.read_csv(own_images / "out" / "rows.csv", comment="#", quotechar='"')
    assert len(rows) == 3 * 4 * 3 * 2  # mitigations x images x (prompt, 1, 2 steps) x seeds
    assert set(rows["mitigation"]) == {"original", "pruned", "theirs"}
    assert rows["sscd"].notna().all() and "a # guitar" in set(rows["prompt"])
    assert "num_inference_steps" in html.split("Replay a trigger")[1]
    check_frames(html, rows)
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


def test_an_audit_finds_out_at_once_that_its_folder_cannot_be(tiny_testbed, own_images):
    targets, controls = (read_targets(own_images / f"{name}.csv") for name in ("targets", "controls"))
    (own_images / "taken").write_text("a file")
    arguments = (PRESETS["smoke"], Store(own_images / "cache"), AttackConfig(steps=1))
    with pytest.raises(OSError, match="taken"):
        write_report(own_images / "taken", tiny_testbed, targets, controls, *arguments)
    assert not (own_images / "cache").exists()


def test_help_loads_nothing_heavy():
    code = """
import sys
from dori_utils.cli.main import main
for arguments in (["--help"], ["audit", "--help"], ["sweep", "--help"], ["audit", "--stepps", "3"]):
    try:
        main(arguments)
    except SystemExit:
        pass
print("LOADED", sorted({"torch", "diffusers", "transformers", "pandas", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("LOADED []\n") and "examples:" in done.stdout


@pytest.mark.parametrize("command", ["audit", "sweep", "download"])
def test_help_has_examples_and_says_every_default(command, capsys):
    with pytest.raises(SystemExit):
        _parse([command, "--help"])
    out = capsys.readouterr().out
    text = " ".join(out.split())
    described = text.split("options:")[1].split("example")[0]
    for option in re.findall(r" (--[\w-]+) ", described.replace(",", " ")):
        if option not in ("--help", "--out", "--dry-run"):
            own = re.search(rf" {option} (.*?)(?= --[\w-]+ [A-Z{{]|$)", described)[1]
            assert "(default: " in own, option
    examples = re.findall("^  python -m dori_utils (.*)", out, re.MULTILINE)
    assert examples and all(_parse(example.split()).command == command for example in examples)


def test_the_defaults_in_the_help_are_those_of_the_presets(capsys):
    with pytest.raises(SystemExit):
        _parse(["audit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("testbed", "paper"):
        attack = PRESETS[name].attack
        assert f"steps of the attack (default: {attack.steps})" in text
        assert f"learning rate of the attack (default: {attack.lr:g})" in text
        assert f"the attack starts from (default: {attack.start})" in text
        assert f"of which the best counts (default: {attack.restarts})" in text
        assert re.search(rf"generations of each [a-z ]+ \(default: [^)]*{name} {len(PRESETS[name].seeds)}\b", text)
    assert (PRESET_NAMES, PROMPT_LIST_NAMES) == (tuple(sorted(PRESETS)), tuple(sorted(PROMPT_LISTS)))


@pytest.mark.parametrize("option", ["--limit", "--seeds", "--steps", "--restarts"])
@pytest.mark.parametrize("number", ["0", "-1"])
def test_numbers_that_make_no_sense_are_refused(option, number, tmp_path, capsys):
    assert main(["audit", "--out", str(tmp_path / "out"), option, number]) == 1
    assert capsys.readouterr().err == f"{option} is {number}: give 1 or more.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lr", ["0", "-1", "nan", "inf"])
def test_a_learning_rate_that_makes_no_sense_is_refused_before_anything_is_computed(lr, tmp_path, capsys):
    for command in (["audit", "--lr", lr], ["sweep", "--attack", "dori", f"lr={lr}"]):
        assert main([*command, "--limit", "1", "--out", str(tmp_path / "out")]) == 1
        assert capsys.readouterr().err == f"lr is {float(lr)}: a learning rate is above 0.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FloatingPointError("NaN or infinity in prompt number 1."), "NaN or infinity in prompt number 1.\n"),
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory.\n"),
        (FileExistsError(17, "File exists", "report"), "report: File exists.\n"),
        (KeyboardInterrupt(), "\nInterrupted. Finished cases are kept: the same command goes on from here.\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_go_wrong_ends_in_a_sentence(error, said, monkeypatch, capsys):
    def fail(options):
        raise error

    monkeypatch.setattr("dori_utils.cli.main._download", fail)
    assert main(["download", "sd14"]) == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert capsys.readouterr().err == said
