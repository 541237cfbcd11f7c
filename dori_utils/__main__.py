"""The command line: is the image really gone from this model?

    python -m dori_utils audit --out build/audit --limit 8               # the bundled testbed
    python -m dori_utils audit --out DIR --model sd14 --targets data/sd14 --controls mine/unseen.csv --edit their_unet/
    python -m dori_utils sweep ...                                       # many audits, case by case: see sweep
    python -m dori_utils download sd14                                   # prompts and images known to be memorized

Prints where the result is. Finished cases are kept: after an interruption the same command goes on.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from . import sweep
from .edits import hashed_once
from .models import load_pipeline
from .presets import PRESETS
from .report import write_report
from .store import data_folder, default_store
from .targets import PROMPT_LISTS, download_targets, load_targets, read_targets
from .weights import edit_names, read_edit


def _parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m dori_utils", description="Is the image really gone?")
    commands = parser.add_subparsers(dest="command", required=True)
    audit = commands.add_parser("audit", help="attack a model's memorized images and write a report")
    sweep.add_model_arguments(audit)
    audit.add_argument(
        "--edit", action="append", default=[], metavar="PATH", help="weights to audit on top: see weights; repeatable"
    )
    audit.add_argument("--steps", type=int, help="of the attack; default: the preset's, as of what follows")
    audit.add_argument("--lr", type=float, help="of the attack")
    audit.add_argument("--start", choices=["prompt", "noise"], help="of the attack")
    audit.add_argument("--restarts", type=int, help="attacks on each image, of which the best counts")
    audit.add_argument("--out", type=Path, required=True, help="folder of the report")
    sweep.add_arguments(commands.add_parser("sweep", help="many audits, case by case, on this machine or on a cluster"))
    download = commands.add_parser("download", help="prompts that a model is known to have memorized, and their images")
    download.add_argument("name", choices=sorted(PROMPT_LISTS), help="the model")
    download.add_argument("--folder", type=Path, help="default: data/NAME")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = _parse(arguments)
    try:
        print({"audit": _audit, "sweep": _sweep, "download": _download}[options.command](options))
    except (ValueError, OSError, ImportError, FloatingPointError, sweep.CasesFailed) as error:
        print(f"{error}", file=sys.stderr)
        return 1
    return 0


def _audit(options):
    preset, targets, controls = _asked(options)
    chosen = {name: getattr(options, name) for name in ("steps", "lr", "start", "restarts")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    attack = sweep.changed_attack(preset.attack, chosen)
    pipe = load_pipeline(options.model, base=options.base)
    return write_report(options.out, pipe, targets, controls, preset, default_store(), attack, _edits(pipe, options))


def _sweep(options):
    return sweep.command(options, *_asked(options))


def _asked(options):
    """Preset, targets and controls of either command."""
    own = options.model == "testbed"
    if options.targets is None and not own:
        raise ValueError("Which images? Give --targets a table (CSV: prompt,image) or a folder of captioned pictures.")
    preset = replace(PRESETS[options.preset or ("testbed" if own else "paper")], model=options.model)
    if options.seeds is not None:
        preset = replace(preset, seeds=tuple(range(options.seeds)))
    targets = _targets(options.targets, ("VM", "TM"))[: options.limit]
    controls = _targets(options.controls, ("control",))
    return preset, targets, controls[: options.limit or (len(controls) if options.controls else len(targets))]


def _targets(where, kinds):
    """Targets with an image: of a table, of a folder of pictures or of `download`, or the testbed's."""
    if where is None:
        return load_targets("testbed", kind=kinds[0])
    if not Path(where).exists():
        raise FileNotFoundError(
            f"There is no {where}. Give a table (CSV: prompt,image) or a folder of captioned pictures; "
            "data/sd14 is what `python -m dori_utils download sd14` fills."
        )
    if (Path(where) / PROMPT_LISTS["sd14"][0].file).is_file():
        found = load_targets("sd14", folder=where)
        return [target for target in found if target.kind in kinds and target.image is not None]
    return read_targets(where)


def _edits(pipe, options):
    """The name and `Edit` of each path, after the model as it is."""
    names = edit_names(options.edit)
    if "original" in names:
        raise ValueError("Two mitigations are called 'original'. Rename one of the files or folders.")
    with hashed_once(pipe):
        return {"original": None} | {
            name: read_edit(pipe, path) for name, path in zip(names, options.edit, strict=True)
        }


def _download(options):
    folder = options.folder or data_folder() / options.name
    dead = download_targets(options.name, folder)
    return f"{folder}: prompts, and in images/ those that are still online; {len(dead)} are not (dead_images.csv)"


if __name__ == "__main__":
    sys.exit(main())
