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

# What takes seconds to import is imported where it is used: `--help` and a mistyped option are answered at once.
PRESET_NAMES = ("paper", "smoke", "testbed")  # of presets.PRESETS
PROMPT_LIST_NAMES = ("sd14",)  # of prompt_lists.PROMPT_LISTS
ATTACK_NAMES = ("dori", "completion", "latent", "tokens")  # of ways.USUAL

EXAMPLES = {
    "audit": """examples:
  python -m dori_utils audit --out build/audit --limit 8
      eight images that the bundled testbed has memorized, and eight that it has never seen
  python -m dori_utils audit --out audit --model sd14 --targets mine/targets.csv --controls unseen.csv --edit theirs/
      your images in Stable Diffusion 1.4, before and after an edit of its weights
  python -m dori_utils audit --out longer --limit 8 --steps 500 --start noise
      a stronger attack
  python -m dori_utils audit --out ways --limit 8 --attack dori completion latent tokens
      other ways in, too: from half of the image, from inverted noise, by a prompt that can be typed
""",
    "sweep": """examples:
  python -m dori_utils sweep --out build/sweep --limit 4 --mitigations none nemo wanda --dry-run
      what there is to do on the bundled testbed, and how long it takes; without --dry-run, do it
  python -m dori_utils sweep --out build/sweep --limit 4 --attack none dori dori steps=200 start=noise
      no attack, the usual one, and a longer one that starts from noise
  python -m dori_utils sweep --out build/sweep --limit 4 --attack completion known=right latent share=0.5 tokens
      other ways in, two of them with settings of their own
""",
    "download": """example:
  python -m dori_utils download sd14
      the prompts of Stable Diffusion 1.4, and what is still online of its images, into data/sd14
""",
}


def _parse(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m dori_utils",
        description="Is the image really gone? To begin: python -m dori_utils audit --out build/audit --limit 8",
        epilog="python -m dori_utils COMMAND --help has the options, their defaults, and examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _audit_arguments(_command(commands, "audit", "attack a model's memorized images and write a report"))
    _sweep_arguments(_command(commands, "sweep", "many audits, case by case, on this machine or on a cluster"))
    download = _command(commands, "download", "prompts that a model is known to have memorized, and their images")
    download.add_argument("name", choices=PROMPT_LIST_NAMES, help="the model")
    download.add_argument("--folder", type=Path, help="where they go (default: data/NAME)")
    return parser.parse_args(arguments)


def _command(commands, name, purpose):
    raw = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=purpose, description=purpose, epilog=EXAMPLES[name], formatter_class=raw)


def _model_arguments(parser):
    """The options that `audit` and `sweep` share: of what model, for which images."""
    parser.add_argument(
        "--model",
        default="testbed",
        help="testbed, sd14, sd15, sd2, a folder, a checkpoint, a Hub id or ID@REVISION (default: testbed)",
    )
    parser.add_argument(
        "--base",
        help="the model whose configuration and tokenizer a checkpoint has (default: told from the checkpoint)",
    )
    parser.add_argument(
        "--preset", choices=PRESET_NAMES, help="settings of everything (default: testbed for the testbed, else paper)"
    )
    parser.add_argument(
        "--targets",
        help="images to look for: a table (CSV: prompt,image), a folder of captioned pictures, or what `download` "
        "filled (default: what the testbed has memorized; of any other model they must be given)",
    )
    parser.add_argument(
        "--controls",
        help="images that the model has never seen, given likewise (default: scenes that this project drew)",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="generations of each prompt and trigger (default: testbed 4, paper 10)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="take only the first N targets, and as many controls (default: all)"
    )


def _audit_arguments(parser):
    _model_arguments(parser)
    parser.add_argument(
        "--edit",
        action="append",
        default=[],
        metavar="PATH",
        help="what someone did to the weights: a U-Net's folder, a checkpoint, a LoRA or a file of Edit.save; may be "
        "given several times (default: none, so that the model is audited as it is)",
    )
    parser.add_argument(
        "--attack",
        nargs="+",
        choices=ATTACK_NAMES,
        default=["dori"],
        metavar="NAME",
        help="dori optimises an embedding, completion gives half of the image, latent leans the noise towards it, "
        "tokens looks for a prompt that can be typed; several may follow each other (default: dori)",
    )
    attack = parser.add_argument_group("the attack dori", "defaults are those of the presets testbed and paper")
    attack.add_argument("--steps", type=int, metavar="N", help="steps of the attack (default: 50)")
    attack.add_argument("--lr", type=float, help="learning rate of the attack (default: 0.1)")
    attack.add_argument(
        "--start", choices=["prompt", "noise"], help="the embedding that the attack starts from (default: prompt)"
    )
    attack.add_argument(
        "--restarts", type=int, metavar="N", help="attacks on each image, of which the best counts (default: 1)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the report; it is made if it is not there")


def _sweep_arguments(parser):
    _model_arguments(parser)
    parser.add_argument(
        "--mitigations",
        nargs="+",
        default=["none"],
        metavar="NAME",
        help="any of none, nemo, wanda, and paths of edits (default: none)",
    )
    parser.add_argument(
        "--nemo-statistics",
        type=Path,
        metavar="FILE",
        help="NeMo's statistics of this model (default: the testbed's own)",
    )
    parser.add_argument(
        "--attack",
        nargs="+",
        default=["none", "dori"],
        metavar="NAME [OPTION=VALUE ...]",
        help="none; dori and its steps=, lr=, start=, restarts=; completion and its known=; latent and its share=, "
        "refinements=; tokens and its steps=, exchanges=, length=; several may follow each other (default: none dori)",
    )
    parser.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="local is this process, ray Ray (default: local)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="Ray's workers (default: one for each GPU, or one where there is none)"
    )
    parser.add_argument(
        "--address",
        default="local",
        help="the Ray cluster's; auto is the one that this machine is in, local starts one on it (default: local)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the cases, and measure one of them to say how long all take"
    )
    parser.add_argument("--out", required=True, help="folder or fsspec URL of tables and store")


def main(arguments=None):
    options = _parse(arguments)
    from torch import OutOfMemoryError

    from dori_utils.cli.sweep import CasesFailed

    try:
        print({"audit": _audit, "sweep": _sweep, "download": _download}[options.command](options))
    except OSError as error:
        print(f"{error.filename}: {error.strerror}." if error.filename else error, file=sys.stderr)
        return 1
    except (ValueError, ImportError, FloatingPointError, OutOfMemoryError, CasesFailed) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Finished cases are kept: the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _audit(options):
    from dori_utils.cli.report import write_report
    from dori_utils.cli.sweep import changed_attack
    from dori_utils.core.models import load_pipeline
    from dori_utils.core.store import default_store
    from dori_utils.ways import USUAL

    preset, targets, controls = _asked(options)
    chosen = {name: getattr(options, name) for name in ("steps", "lr", "start", "restarts")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if chosen and "dori" not in options.attack:
        raise ValueError(f"--{next(iter(chosen))} is of the attack dori, which --attack does not name.")
    attacks = [
        changed_attack(getattr(preset, USUAL[name]), chosen if name == "dori" else {})
        for name in dict.fromkeys(options.attack)
    ]
    pipe = load_pipeline(options.model, base=options.base)
    return write_report(options.out, pipe, targets, controls, preset, default_store(), attacks, _edits(pipe, options))


def _sweep(options):
    from dori_utils.cli.sweep import command

    return command(options, *_asked(options))


def _asked(options):
    """Preset, targets and controls of either command."""
    from dori_utils.core.hub import BUNDLED
    from dori_utils.presets import PRESETS

    for name in ("seeds", "limit", "steps", "restarts", "workers"):
        if (number := getattr(options, name, None)) is not None and number < 1:
            raise ValueError(f"--{name} is {number}: give 1 or more.")
    own = options.model in BUNDLED
    if options.targets is None and not own:
        raise ValueError("Which images? Give --targets a table (CSV: prompt,image) or a folder of captioned pictures.")
    preset = replace(PRESETS[options.preset or ("testbed" if own else "paper")], model=options.model)
    if options.seeds is not None:
        preset = replace(preset, seeds=tuple(range(options.seeds)))
    targets = _targets(options.targets, options.model, ("VM", "TM"))[: options.limit]
    controls = _targets(options.controls, options.model, ("control",))
    return preset, targets, controls[: options.limit or (len(controls) if options.controls else len(targets))]


def _targets(where, model, kinds):
    """Targets with an image: of a table, of a folder of pictures or of `download`, or the testbed's."""
    from dori_utils.core.hub import BUNDLED
    from dori_utils.core.prompt_lists import PROMPT_LISTS
    from dori_utils.core.targets import load_targets, read_targets

    if where is None:
        return load_targets(model if model in BUNDLED else "testbed", kind=kinds[0])
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
    from dori_utils.cli.weights import edit_names, read_edit
    from dori_utils.core.hashes import known

    names = edit_names(options.edit)
    if "original" in names:
        raise ValueError("Two mitigations are called 'original'. Rename one of the files or folders.")
    with known(pipe):
        return {"original": None} | {
            name: read_edit(pipe, path) for name, path in zip(names, options.edit, strict=True)
        }


def _download(options):
    from dori_utils.core.prompt_lists import download_targets
    from dori_utils.core.store import data_folder

    folder = options.folder or data_folder() / options.name
    dead = download_targets(options.name, folder)
    return f"{folder}: prompts, and in images/ those that are still online; {len(dead)} are not (dead_images.csv)"
