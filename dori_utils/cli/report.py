"""The report of an audit: a folder to hand on, with a verdict in words that its numbers carry.

    report.html   one file with everything in it: verdict, table, curves, pictures, settings
    rows.csv      every number: target x mitigation x attack x steps x seed
    table.csv     memorization rates with their 95% intervals
    verdicts.csv  for each target under each mitigation: back from its prompt? from a trigger? after how many steps?
    steps.png     what the attack brings back, step by step, and of images that the model has never seen
    triggers/     what DoRI found, one safetensors file for each mitigation; each says how to replay it

The rule of the verdict. An image is *back* where the mean SSCD over seeds is above 0.7, the rule of the memorization
rate. The attack's result is what its last step found, as in the paper; steps before it are shown, not counted. There
are two kinds of evidence, and each is held against controls, images that the model has never seen, treated alike:

1. Back from its own prompt: the model holds the image, whatever the attack does, for the prompt knows nothing of the
   image's pixels. Unless controls come back from their own prompts: then the share of targets must be clearly higher.
2. Not from its prompt but from a trigger, or whatever else an attack has found: hidden, not removed, if the share of
   those that come back so is clearly higher than the share of controls that do: what comes back there, the attack has
   put in. Each attack is held against its own controls.

Neither: not found by this attack, which is no proof that it is gone; and if the attack also misses images that the
prompts give, it was too short or badly set. *Clearly higher*: Wilson's 95% intervals of the two shares do not overlap.
"""

import base64
import datetime
import importlib.metadata
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from dori_utils.attack import AttackConfig
from dori_utils.cached import cached_attack, cached_generate
from dori_utils.cli.verdicts import INTERVAL_TARGETS, conclusion, settings_table, verdicts
from dori_utils.cli.words import WAYS, way_of
from dori_utils.core.metrics import THRESHOLD
from dori_utils.core.sscd import load_sscd, to_rgb
from dori_utils.core.triggers import REPLAY
from dori_utils.evaluation import audit, edit_of_each
from dori_utils.plots import DPI, MITIGATIONS, PAGE, csv_text, curve_with_interval, use_style
from dori_utils.ways import Answer, answers, name_of

THUMBNAIL = 160  # pixels, the longer side of a picture in the report
TEMPLATE = Path(__file__).with_name("report.html")


def write_report(folder, pipe, targets, controls, preset, store, attack, edits=None, sscd=None):
    """Audit targets under every mitigation, with the same attack on controls, and write the folder.

    Args:
        folder: made if it is not there; files of an earlier report in it are replaced.
        targets, controls: lists of `Target`s with images; the model has never seen the controls' images.
        attack: settings of an attack that `ways` knows, or a list of them.
        edits: as `evaluation.audit` takes them; default: the model as it is.

    Returns:
        Path of report.html.

    Raises:
        ValueError: no targets, or no controls: without them the attack's result says nothing; an id that comes twice;
            no step or no seed.
    """
    attacks = list(attack) if isinstance(attack, list | tuple) else [attack]
    _check(targets, controls, preset, attacks)
    (Path(folder) / "triggers").mkdir(parents=True, exist_ok=True)  # an attack may take hours: not into nowhere
    folder, sscd, edits = Path(folder), sscd or load_sscd(), edits or {"original": None}
    targets = [replace(t, kind="target") if t.kind == "control" else t for t in targets]
    controls = [replace(control, kind="control") for control in controls]
    attacks = [_without_start(config) for config in attacks]
    rows = audit(pipe, targets, preset, store, sscd, edits=edits, attack=attacks, controls=controls, regions=True)
    pictures = {}
    for name, edit in edits.items():
        everyone, each = [*targets, *controls], edit_of_each(edit, targets, controls, name)
        for config in attacks:
            if isinstance(config, AttackConfig):
                rows.attrs |= _saved(folder, name, cached_attack(pipe, everyone, config, store, each))
        pictures[name] = _pictures(pipe, everyone, attacks, preset, store, each)
    write_tables(folder, rows)
    fig = step_curves(rows)
    fig.savefig(folder / "steps.png", dpi=DPI, bbox_inches="tight")
    plt.close(fig)
    path = folder / "report.html"
    replay = REPLAY.replace("manual_seed(0)", f"manual_seed({preset.seeds[0]}), **{preset.sampling}")
    html = _html(rows, pictures, folder / "steps.png", _settings(rows, edits), replay)
    path.write_text(html, encoding="utf-8")
    return path


def _without_start(config):
    """Settings that do not record step 0, which is the prompt."""
    steps = getattr(config, "record", ())
    return replace(config, record=tuple(step for step in steps if step)) if 0 in steps else config


def _saved(folder, name, found):
    """Writes what DoRI found under a mitigation; returns a line of the settings about attacks that show nothing."""
    found.save(folder / "triggers" / f"{_file_name(name)}.safetensors")
    diverged = [case["target"] for case in found.cases if case["stopped"] == "diverged"]
    return {f"{name}: the loss became NaN, so these attacks show nothing": ", ".join(diverged)} if diverged else {}


def _check(targets, controls, preset, attacks):
    if not targets:
        raise ValueError("No targets with an image: there is nothing to look for.")
    if not controls:
        raise ValueError("No controls: the attack must also be tried on images that the model has never seen.")
    ids = [target.id for target in [*targets, *controls]]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"Targets and controls share ids: {', '.join(twice)}. Give the tables a column id.")
    if any(getattr(config, "steps", 1) < 1 for config in attacks) or not attacks or not preset.seeds:
        raise ValueError("An audit needs at least one step of the attack and one seed.")
    if len({name_of(config) for config in attacks}) < len(attacks):
        raise ValueError("An attack is given twice: a sweep can have it with several settings, an audit with one.")


def write_tables(folder, rows):
    """rows.csv, table.csv and verdicts.csv; lines with a # in front say what made them."""
    for name, table in (("rows", rows), ("table", settings_table(rows)), ("verdicts", verdicts(rows))):
        table.attrs = rows.attrs
        (folder / f"{name}.csv").write_text(csv_text(table), encoding="utf-8")


def step_curves(rows):
    """Figure: mean SSCD_Orig and MR by steps of each attack, targets and controls, a colour for each mitigation."""
    use_style()
    table = settings_table(rows)
    attacks = [name for name in table["attack"].unique() if name != "none"]
    fig, axes = plt.subplots(len(attacks), 2, figsize=(PAGE, 2.4 * len(attacks)), squeeze=False)
    spare = iter(color for name, color in MITIGATIONS.items() if name not in set(table["mitigation"]))
    colors = {name: MITIGATIONS.get(name) or next(spare, "#000000") for name in table["mitigation"].unique()}
    for (left, right), attack in zip(axes, attacks, strict=True):
        own = table[table["attack"].isin(["none", attack])]
        for (mitigation, images_of), curve in own.groupby(["mitigation", "images_of"], sort=False):
            curve = curve.sort_values("steps")
            style = {"color": colors[mitigation], "linestyle": "--" if images_of == "control" else "-"}
            label = f"{mitigation}, control" if images_of == "control" else mitigation
            curve_with_interval(
                left, curve["steps"], curve["sscd"], curve["sscd_low"], curve["sscd_high"], label=label, **style
            )
            curve_with_interval(right, curve["steps"], curve["rate"], curve["low"], curve["high"], **style)
        left.axhline(THRESHOLD, color="#999999", linewidth=0.6)
        for ax, name in ((left, "SSCD_Orig"), (right, "memorization rate")):
            ax.set_xscale("symlog", linthresh=1)
            steps = sorted(set(own["steps"]))
            ax.set_xticks(steps, steps)
            ax.set(xlabel=way_of(attack).axis, ylabel=name, xlim=(-0.1, 1.1 * max(steps)), ylim=(-0.02, 1.02))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return fig


def _pictures(pipe, everyone, attacks, preset, store, each):
    """Target id → its image, and that of the first seed under its prompt and for each step of each attack."""
    prompts, found = [target.prompt for target in everyone], [Answer(preset, {})]
    for config in attacks:
        found += answers(pipe, everyone, config, preset, store, each).values()
    by_step = [cached_generate(pipe, prompts, preset.seeds, own.preset, store, each, **own.given) for own in found]
    return {target.id: [target.image, *(images[i][0] for images in by_step)] for i, target in enumerate(everyone)}


def _settings(rows, edits):
    """What made the numbers: name → value."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "transformers")
    )
    seeds = ", ".join(map(str, rows["seed"].unique()))
    return rows.attrs | {"seeds": seeds, "libraries": versions} | {name: _about_edit(e) for name, e in edits.items()}


def _about_edit(edit):
    if edit is None:
        return "no edit"
    each = edit if isinstance(edit, list | tuple) else [edit]
    about = f"{each[0]!r}, fingerprint {each[0].fingerprint()}, config {json.dumps(each[0].config)}"
    return about if len(each) == 1 else f"{len(each)} edits, one for each target, the first: {about}"


def _html(rows, pictures, curves, settings, replay):
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    by_target, prompts = verdicts(rows), dict(zip(rows["target"], rows["prompt"], strict=True))
    last, seeds = rows.groupby("attack")["steps"].max().to_dict(), rows["seed"].unique()
    mitigations = []
    for name, group in by_target.groupby("mitigation", sort=False):
        own = rows[rows["mitigation"] == name]
        targets = [
            {
                "id": target,
                "control": (of_target["kind"] == "control").all(),
                "prompt": prompts[target],
                "verdicts": _labels(of_target),
                "words": [_words(verdict, last[verdict.attack]) for verdict in of_target.itertuples()],
                "part": _part(of_target),
                "typed": _typed(own[own["target"] == target]),
                "image": _data_uri(pictures[name][target][0]),
                "pictures": _captioned(own[own["target"] == target], pictures[name][target][1:]),
            }
            for target, of_target in group.groupby("target", sort=False)
        ]
        mitigations.append(
            {"name": name, "file": _file_name(name), "conclusion": conclusion(rows, name), "targets": targets}
        )
    table = settings_table(rows)
    return template.render(
        mitigations=mitigations,
        seeds=seeds,
        table=table[table["steps"] == table["attack"].map(last)].to_dict("records"),
        interval_targets=INTERVAL_TARGETS,
        ways={name: way for name, way in WAYS.items() if name in last},
        last=last,
        curves=_embedded(curves.read_bytes(), "png"),
        settings=settings,
        replay=replay,
        threshold=THRESHOLD,
        date=datetime.date.today().isoformat(),
    )


def _captioned(rows, pictures):
    """One target's pictures, of the first seed, step by step: with that picture's own SSCD and the mean over seeds."""
    found = []
    for ((attack, steps), group), picture in zip(rows.groupby(["attack", "steps"], sort=False), pictures, strict=True):
        own = group["sscd"].iloc[0]  # seeds come in their order
        about = {"src": _data_uri(picture), "from": "prompt", "source": "its prompt"}
        if attack != "none":
            way = way_of(attack)
            about |= {"from": way.caption(steps), "source": f"{way.source} {way.after(steps)}".strip()}
        mean = group["sscd"].mean()
        found.append(about | {"own": own, "mean": mean, "is_copy": own > THRESHOLD, "back": mean > THRESHOLD})
    return found


def _typed(rows):
    """The prompt that the attack by words found last for one target, if there was one."""
    return rows["found"].dropna().iloc[-1] if "found" in rows and rows["found"].notna().any() else None


def _words(verdict, last):
    """One target's verdict under an attack, in a sentence."""
    way, prompt = way_of(verdict.attack), verdict.prompt > THRESHOLD
    after = f", {way.after(last)}" if way.after(last) else ""
    if verdict.trigger > THRESHOLD:
        since = after if verdict.step == last else f", from {way.amount(verdict.step)} on"
        start = "comes back from its prompt, and" if prompt else "does not come back from its prompt, but"
        return f"{start} from {way.source}{since}"
    lost = "" if np.isnan(verdict.lost) else f"; from one {way.after(verdict.lost)} it did, and was lost again"
    if prompt:
        return f"comes back from its prompt, but not from {way.source}{after}{lost}"
    return f"comes back neither from its prompt nor from {way.source}{after}{lost}"


def _labels(verdicts_of_target):
    """The different verdicts of one target; "not back" only if nothing brings it back."""
    labels = list(dict.fromkeys(verdicts_of_target["verdict"]))
    return [label for label in labels if label != "not back"] or labels


def _part(verdicts_of_target):
    """Similarity by region of a target that comes back in part alone; else None."""
    whole, part = verdicts_of_target[["prompt", "trigger"]].max(axis=None), verdicts_of_target["regions"].max()
    return part if part > THRESHOLD >= whole else None


def _file_name(name):
    return re.sub(r"[^\w.-]+", "_", name)


def _data_uri(picture):
    """A picture as the src of an img: as it is if it is small, else reduced and as JPEG."""
    small = max(picture.size) <= THUMBNAIL
    picture, buffer, kind = to_rgb(picture), io.BytesIO(), "png" if small else "jpeg"
    if not small:
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    picture.save(buffer, kind, **({} if small else {"quality": 85}))
    return _embedded(buffer.getvalue(), kind)


def _embedded(data, kind):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
