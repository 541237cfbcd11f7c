"""The command line: is the image really gone from this model?

    python -m dori_utils audit --out build/audit --limit 4               # the bundled testbed, a quarter of an hour
    python -m dori_utils audit --out DIR --model sd14 --targets data/sd14 --controls mine/unseen.csv --unet their_unet/

Prints where the report is. Finished cases are kept in cache/: after an interruption the same command goes on.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from .presets import PRESETS


def _parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m dori_utils", description="Is the image really gone?")
    commands = parser.add_subparsers(dest="command", required=True)
    audit = commands.add_parser("audit", help="attack a model's memorized images and write a report")
    audit.add_argument("--model", default="testbed", help="testbed, sd14, sd15, sd2, a folder or a Hub id")
    audit.add_argument("--preset", choices=sorted(PRESETS), help="default: testbed for the testbed, else paper")
    audit.add_argument("--targets", help="a table (CSV: prompt,image) or a folder filled by download_targets")
    audit.add_argument("--controls", help="images that the model has never seen, likewise; default: our own scenes")
    audit.add_argument("--unet", action="append", default=[], type=Path, help="a folder with another U-Net; repeatable")
    audit.add_argument("--edit", action="append", default=[], type=Path, help="a file of Edit.save; repeatable")
    audit.add_argument("--steps", type=int, help="of the attack; default: the preset's, as of what follows")
    audit.add_argument("--lr", type=float, help="of the attack")
    audit.add_argument("--start", choices=["prompt", "noise"], help="of the attack")
    audit.add_argument("--restarts", type=int, help="attacks on each image, of which the best counts")
    audit.add_argument("--seeds", type=int, help="generations of each prompt and trigger")
    audit.add_argument("--limit", type=int, help="only the first so many targets, and as many controls")
    audit.add_argument("--out", type=Path, required=True, help="folder of the report")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = _parse(arguments)
    try:
        print(_audit(options))
    except (ValueError, OSError) as error:
        print(f"{error}", file=sys.stderr)
        return 1
    return 0


def _audit(options):
    from .models import load_pipeline
    from .report import write_report
    from .store import default_store

    own = options.model == "testbed"
    if options.targets is None and not own:
        raise ValueError("Which images? Give --targets a table (CSV: prompt,image) or a folder.")
    preset = replace(PRESETS[options.preset or ("testbed" if own else "paper")], model=options.model)
    if options.seeds is not None:
        preset = replace(preset, seeds=tuple(range(options.seeds)))
    chosen = {name: getattr(options, name) for name in ("steps", "lr", "start", "restarts")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    steps = chosen.get("steps", preset.attack.steps)
    record = (*(step for step in preset.attack.record if step < steps), steps)
    attack = replace(preset.attack, record=record, **chosen)
    targets = _targets(options.targets, "VM")[: options.limit]
    controls = _targets(options.controls, "control")
    controls = controls[: options.limit or (len(controls) if options.controls else len(targets))]
    pipe = load_pipeline(options.model)
    return write_report(options.out, pipe, targets, controls, preset, default_store(), attack, _edits(pipe, options))


def _targets(where, kind):
    """Targets with an image: of a table, of a folder that `download_targets` has filled, or the testbed's."""
    from .targets import load_targets, read_targets

    if where is None:
        return load_targets("testbed", kind=kind)
    if Path(where).is_dir():
        return [target for target in load_targets("sd14", kind=kind, folder=where) if target.image is not None]
    return read_targets(where)


def _edits(pipe, options):
    """The name and `Edit` of each edit file and each U-Net, after the model as it is."""
    from .edits import Edit
    from .models import load_unet

    edits = {"original": None}
    for path in [*options.edit, *options.unet]:
        name = path.resolve().parent.name if path.name == "unet" else path.stem if path.is_file() else path.name
        if name in edits:
            raise ValueError(f"Two mitigations are called {name!r}. Rename one of the files or folders.")
        if path in options.edit:
            edits[name] = Edit.load(path)
        else:
            edits[name] = Edit.between(pipe, load_unet(path, dtype=pipe.unet.dtype), method=name)
    return edits


if __name__ == "__main__":
    sys.exit(main())
