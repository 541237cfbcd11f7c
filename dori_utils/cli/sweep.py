"""Sweep: every target under every mitigation and every attack, on one machine or on a cluster.

    python -m dori_utils sweep --mitigations none nemo wanda --attack none dori --limit 4 --out build/sweep
    python -m dori_utils sweep --model sd14 --targets data/sd14 --controls unseen.csv --mitigations none their_unet/ \\
        --attack dori dori steps=200 start=noise --engine ray --address auto --out s3://bucket/sweep

A case is one target, one mitigation, one attack. It is computed alone and with its own seeds, on a CPU by one thread,
so that its numbers depend neither on the engine, nor on the order, nor on how many compute. What is finished is in the
store; so workers, or the whole sweep, may be killed at any time, and the same command goes on from there.

An engine has workers, which hold the pipeline, and hands them cases: "local" is this process, "ray" is Ray (Moritz et
al., 2018), with one worker for each GPU, or as many as asked for. A worker that dies is started again by Ray, and its
case given out again. See docs/cluster.md.
"""

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import torch

from dori_utils import nemo, wanda
from dori_utils.attack import AttackConfig
from dori_utils.cached import cached_attack, cached_edits
from dori_utils.cli.engines import started
from dori_utils.cli.verdicts import settings_table, verdicts
from dori_utils.cli.weights import edit_names, read_edit
from dori_utils.core.bars import tqdm
from dori_utils.core.cache import beside_weights, key_of
from dori_utils.core.hashes import base_hash, known
from dori_utils.core.hub import BUNDLED, MODELS
from dori_utils.core.models import load_pipeline
from dori_utils.core.sscd import SSCD, TRANSFORMS, load_sscd
from dori_utils.core.store import Store
from dori_utils.core.targets import Target
from dori_utils.evaluation import audit, provenance
from dori_utils.nemo_statistics import Statistics, published_statistics
from dori_utils.plots import csv_text
from dori_utils.presets import Preset
from dori_utils.ways import USUAL, answers, name_of, settings_of

PRUNING = {"nemo": "NeMo", "wanda": "Wanda"}  # mitigations that are made for each target
ATTACK_OPTIONS = {
    "none": {},
    "dori": {"steps": int, "lr": float, "start": str, "restarts": int},
    "completion": {"known": str},
    "latent": {"share": float, "refinements": int},
    "tokens": {"steps": int, "exchanges": int, "length": int},
}
NUMBERS = ["steps", "seed", "sscd", "sscd_gen", "d_sscd"]  # columns of `evaluation.audit` that a case's entry holds
ROW = ["mitigation", "target", "attack", "steps", "seed"]  # what names a row


class CasesFailed(Exception):
    """Cases that could not be computed, and why; the others are kept."""


@dataclass(frozen=True)
class Case:
    """One target under one mitigation and one attack, which are names of a `Plan`.

    edited_for is whose edit it is under, where each target has its own: of a control, that of some target.
    """

    target: Target
    mitigation: str
    attack: str
    edited_for: Target

    def __str__(self):
        return f"{self.target.id}, {self.mitigation}, {self.attack}"


@dataclass(frozen=True)
class Plan:
    """What all cases have in common.

    Args:
        preset: with the model and the seeds.
        mitigations: name → None for the model as it is, "nemo", "wanda", or the path of an edit.
        attacks: name → settings of an attack, see `ways`, or None for the prompt itself.
        store: folder or URL of the store.
        statistics: file of NeMo's statistics, where "nemo" is among the mitigations.
        base: as `load_pipeline` takes it.
    """

    preset: Preset
    mitigations: dict[str, str | None]
    attacks: dict
    store: str
    statistics: Path | None = None
    base: str | None = None

    def cases(self, targets, controls) -> list[Case]:
        """All cases: of every target, and of every control for comparison.

        Raises:
            ValueError: no targets; attacks without controls, whose result says nothing; an id that comes twice.
        """
        if not targets:
            raise ValueError("No targets with an image: there is nothing to look for.")
        if not controls and any(self.attacks.values()):
            raise ValueError("No controls: the attack must also be tried on images that the model has never seen.")
        ids = [target.id for target in [*targets, *controls]]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"Targets and controls share ids: {', '.join(twice)}. Give the tables a column id.")
        targets = [replace(t, kind="target") if t.kind == "control" else t for t in targets]
        pairs = [(target, target) for target in targets]
        pairs += [(replace(c, kind="control"), targets[i % len(targets)]) for i, c in enumerate(controls)]
        return [
            Case(target, mitigation, attack, edited_for)
            for mitigation in self.mitigations
            for attack in self.attacks
            for target, edited_for in pairs
        ]

    def configs(self, cases, about) -> list[dict]:
        """Under which each case is in the store: whatever its result depends on.

        Args:
            about: what a worker says of its model, see `Worker.about`.
        """
        preset = self.preset
        common = {name: value for name, value in about.items() if name not in ("mitigations", "made by")}
        common |= {"what": "sweep", "seeds": preset.seeds, "transform": repr(TRANSFORMS[preset.sscd_transform])}
        common |= preset.sampling
        images = {target.id: target.image for target in (case.target for case in cases)}
        images = {name: key_of(image) for name, image in images.items()}
        attacks = {name: key_of(attack) for name, attack in self.attacks.items()}
        configs = []
        for case in cases:
            own = {"target": case.target.id, "prompt": case.target.prompt, "image": images[case.target.id]}
            own |= {"mitigation": about["mitigations"][case.mitigation], "attack": attacks[case.attack]}
            if self.mitigations[case.mitigation] in PRUNING:
                own["edited for"] = [case.edited_for.id, case.edited_for.prompt]
            configs.append(common | own)
        return configs


class Worker:
    """Computes cases, one after the other. The pipeline is loaded when it is first needed, and stays."""

    def __init__(self, plan):
        self.plan, self.store = plan, _QuietStore(plan.store)

    @functools.cached_property
    def pipe(self):
        pipe = load_pipeline(self.plan.preset.model, base=self.plan.base)
        self._hashed = ExitStack()  # for good: hashing a large model takes seconds, and this one stays as it is
        self._hashed.enter_context(known(pipe))
        return pipe

    @functools.cached_property
    def statistics(self):
        if self.plan.statistics.suffix == ".pt":
            return published_statistics(self.plan.statistics, self.pipe.unet)
        return Statistics.load(self.plan.statistics)

    @functools.cached_property
    def edits(self):
        paths = {name: how for name, how in self.plan.mitigations.items() if how and how not in PRUNING}
        return {name: read_edit(self.pipe, path) for name, path in paths.items()}

    def about(self) -> dict:
        """What results depend on beside the case, JSON values; "made by" is for tables."""
        mitigations = {name: self._about(name, how) for name, how in self.plan.mitigations.items()}
        sscd = load_sscd()
        about = {"model": base_hash(self.pipe), **beside_weights(self.pipe), "sscd": sscd.name}
        return about | {"mitigations": mitigations, "made by": provenance(self.pipe, self.plan.preset, sscd)}

    def _about(self, name, how):
        if how is None:
            return None
        if how not in PRUNING:
            return {"edit": self.edits[name].fingerprint()}
        about = {"method": PRUNING[how], "config": asdict(getattr(self.plan.preset, how))}
        return about | ({"statistics": self.statistics.fingerprint()} if how == "nemo" else {})

    def compute(self, case, config) -> dict:
        """The case's result, from the store or computed now: `NUMBERS`, and whether the attack diverged."""
        with _one_thread():
            return self.store.fetch(config, partial(self._compute, case))

    def _compute(self, case):
        preset, attack, edits = self.plan.preset, self.plan.attacks[case.attack], self._edits(case)
        judge = load_sscd()
        sscd = SSCD(judge.name, judge.model)  # remembers the images of this case alone: there may be many
        sscd.embed([case.target.image], preset.sscd_transform, progress=False)
        diverged = False
        if isinstance(attack, AttackConfig):
            found = cached_attack(self.pipe, [case.target], attack, self.store, edits, progress=False)
            diverged = found.cases[0]["stopped"] == "diverged"
        elif attack is not None:
            answers(self.pipe, [case.target], attack, preset, self.store, edits, progress=False)
        named = {case.mitigation: edits}
        table = audit(self.pipe, [case.target], preset, self.store, sscd, edits=named, attack=attack)
        found = {"found": table["found"].fillna("").to_numpy(str)} if "found" in table else {}
        return {name: table[name].to_numpy() for name in NUMBERS} | found | {"diverged": diverged}

    def _edits(self, case):
        """What `audit` takes for a single target: None, or a list with one edit."""
        how = self.plan.mitigations[case.mitigation]
        if how is None:
            return None
        if how not in PRUNING:
            return [self.edits[case.mitigation]]
        localize_each = {"nemo": nemo, "wanda": wanda}[how].localize_each
        own = {"progress": False} | ({"statistics": self.statistics} if how == "nemo" else {})
        config = getattr(self.plan.preset, how)
        return cached_edits(localize_each, self.pipe, [case.edited_for], config, self.store, **own)


class _QuietStore(Store):
    """Without bars: the sweep has its own."""

    def map(self, configs, compute_many, batch_size=1, desc=None, progress=False):
        return super().map(configs, compute_many, batch_size, desc, progress=False)


@contextmanager
def _one_thread():
    """One thread of a CPU for torch: how sums are split among threads shows in their last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- Engines --------------------------------------------------------------------------------------------------------


def run(engine, tasks, store, progress=True):
    """Compute whatever is not in the store.

    Args:
        tasks: list of (case, config).

    Returns:
        A list of results, None for those that failed; number of a task → why it failed; how many were computed.
    """
    results, failed = read(store, [config for _, config in tasks]), {}
    missing = [number for number, result in enumerate(results) if result is None]
    # By the hash in the name: so kinds of cases are mixed, the time left is honest, and two workers seldom want the
    # edit of one target at once.
    missing.sort(key=lambda number: str(store.path(tasks[number][1])))
    about = {"total": len(tasks), "initial": len(tasks) - len(missing), "desc": "cases", "smoothing": 0}
    with tqdm(**about, disable=not progress) as bar:
        for number, result, error in engine.results([(number, *tasks[number]) for number in missing]):
            if error is None:
                results[number] = result
            else:
                failed[number] = error
            bar.update()
    return results, failed, len(missing) - len(failed)


def read(store, configs):
    """What is in the store of these, None for what is not; several at a time, as a store may be far away."""
    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(store.read, configs))


# --- Tables, and the command ----------------------------------------------------------------------------------------


def tidy_rows(plan, cases, results, about) -> pd.DataFrame:
    """Rows as `evaluation.audit` gives them, of all cases that have a result; `attrs` say what made them."""
    parts = []
    for case, result in zip(cases, results, strict=True):
        if result is not None:
            target = case.target
            labels = {"mitigation": case.mitigation, "target": target.id, "prompt": target.prompt, "kind": target.kind}
            labels |= {"duplicates": target.duplicates, "attack": np.where(result["steps"] == 0, "none", case.attack)}
            parts.append(pd.DataFrame(labels | {name: result[name] for name in (*NUMBERS, "found") if name in result}))
    rows = pd.concat(parts, ignore_index=True).drop_duplicates(ROW, ignore_index=True)  # each attack has its prompt's
    rows.attrs = about["made by"] | {name: settings_of(attack) for name, attack in plan.attacks.items() if attack}
    diverged = [str(case) for case, result in zip(cases, results, strict=True) if result and result["diverged"]]
    if diverged:
        rows.attrs["the loss became NaN, so these attacks show nothing"] = "; ".join(diverged)
    return rows


def write_tables(out, rows):
    """rows.csv, table.csv and verdicts.csv, as those of a report; verdicts for each attack.

    Args:
        out: a folder or an fsspec URL.
    """
    attack = rows["attack"]
    of_attacks = [verdicts(rows[attack.isin(["none", name])]) for name in attack.unique() if name != "none"]
    tables = {"rows": rows, "table": settings_table(rows)}
    tables["verdicts"] = pd.concat(of_attacks, ignore_index=True) if of_attacks else verdicts(rows)
    for name, table in tables.items():
        table.attrs = rows.attrs
        with fsspec.open(f"{out}/{name}.csv", "w", encoding="utf-8", newline="") as file:
            file.write(csv_text(table))


def command(options, preset, targets, controls) -> str:
    """What `python -m dori_utils sweep` does and prints.

    Raises:
        CasesFailed: some cases could not be computed. The tables have the others; there are none without any.
    """
    out, plan = options.out.rstrip("/"), plan_of(options, preset)
    cases, store = plan.cases(targets, controls), Store(plan.store)
    with started(options.engine, Worker, plan, workers=options.workers, address=options.address) as engine:
        about = engine.about()
        tasks = list(zip(cases, plan.configs(cases, about), strict=True))
        if options.dry_run:
            return dry_run(engine, plan, tasks, store, options.workers or engine.workers)
        results, failed, computed = run(engine, tasks, store)
    if len(failed) < len(cases):
        write_tables(out, tidy_rows(plan, cases, results, about))
    if failed:
        number, error = next(iter(failed.items()))
        all_failed = len(failed) == len(cases)
        others = "No tables were written" if all_failed else f"The others are kept and in the tables in {out}"
        raise CasesFailed(
            f"{len(failed)} of {len(cases)} cases failed, the first: {cases[number]}: {error.rstrip('.')}. {others}; "
            "the same command tries the failed ones again."
        )
    return f"{len(cases)} cases, {computed} of them computed now. Tables: {out}/rows.csv, table.csv, verdicts.csv"


def plan_of(options, preset) -> Plan:
    """The plan of the command's options, with absolute paths: a worker may have another working directory."""
    model, out = options.model, options.out.rstrip("/")
    return Plan(
        preset if model in MODELS or not Path(model).exists() else replace(preset, model=str(Path(model).resolve())),
        read_mitigations(options.mitigations),
        read_attacks(options.attack, preset),
        f"{out}/store" if "://" in out else str(Path(out, "store").resolve()),
        _statistics(options),
        str(Path(options.base).resolve()) if options.base and Path(options.base).exists() else options.base,
    )


def dry_run(engine, plan, tasks, store, workers) -> str:
    """The cases in words, and how long those take that are not there; one of them is measured, and kept."""
    cases = [case for case, _ in tasks]
    counts = pd.DataFrame([{"mitigation": case.mitigation, "attack": case.attack} for case in cases]).value_counts(
        sort=False
    )
    lines = [f"{len(cases)} cases:", counts.rename("cases").reset_index().to_string(index=False), *map(str, cases[:3])]
    lines += ["...", *map(str, cases[-3:])]
    found = read(store, [config for _, config in tasks])
    missing = [number for number, result in enumerate(found) if result is None]
    lines.append(f"{len(cases) - len(missing)} are in the store, {len(missing)} are left.")
    if missing:
        number = max(missing, key=lambda number: _cost(plan.attacks[cases[number].attack]))
        start = time.perf_counter()
        ((_, _, error),) = engine.results([(number, *tasks[number])])
        seconds = time.perf_counter() - start
        if error is not None:
            raise CasesFailed(f"{cases[number]}: {error}")
        lines.append(f"Measured, and kept: {cases[number]}: {seconds:.1f} s.")
        rest = [
            f"{(len(missing) - 1) * seconds / n / 3600:.2f} hours with {n} worker{'s' * (n > 1)}" for n in (1, workers)
        ]
        lines.append(f"The other {len(missing) - 1} at this speed: {' or '.join(dict.fromkeys(rest))}; less, as far as")
        lines[-1] += " they have fewer steps or find their edit made."
    return "\n".join(lines)


def _cost(attack):
    """Roughly how often an attack asks the U-Net, each way counted by what it does most."""
    if attack is None:
        return 0
    steps = getattr(attack, "steps", 1) * getattr(attack, "batch_size", 1)
    return steps * getattr(attack, "restarts", 1) * getattr(attack, "exchanges", 1)


def read_mitigations(words) -> dict[str, str | None]:
    """Name → how, as `Plan` has it, of the command line's words.

    Raises:
        ValueError: a word that is neither a mitigation's name nor an existing path; a name that comes twice.
    """
    paths = [word for word in words if word != "none" and word not in PRUNING and Path(word).exists()]
    names = dict(zip(paths, edit_names(paths), strict=True))
    found = {}
    for word in words:
        if word == "none":
            name, how = "original", None
        elif word in PRUNING:
            name, how = PRUNING[word], word
        elif word in names:
            name, how = names[word], str(Path(word).resolve())
        else:
            raise ValueError(f"Unknown mitigation {word!r}: give none, nemo, wanda, or the path of an edit.")
        if name in found:
            raise ValueError(f"Two mitigations are called {name!r}. Rename one of the files or folders.")
        found[name] = how
    return found


def read_attacks(words, preset) -> dict:
    """Name → settings, of the command line's words: each attack is followed by its options.

    Args:
        preset: with the settings of what is not given.

    Raises:
        ValueError: an unknown name or option, a value that is none, or the same attack twice.
    """
    attacks = []
    for word in words:
        key, is_option, value = word.partition("=")
        known = ATTACK_OPTIONS[attacks[-1][0]] if attacks else {}
        if not is_option and word in ATTACK_OPTIONS:
            attacks.append((word, {}))
        elif is_option and key in known:
            try:
                attacks[-1][1][key] = known[key](value)
            except ValueError as error:
                raise ValueError(f"{word}: {key} takes a number.") from error
        else:
            raise ValueError(f"Unknown attack {word!r}: give none, or {_all_options()}")
    found = {}
    for kind, options in attacks:
        usual = None if kind == "none" else getattr(preset, USUAL[kind])
        label = "none" if usual is None else name_of(usual)
        name = " ".join([label, *(f"{key}={value}" for key, value in options.items())])
        if name in found:
            raise ValueError(f"The attack {name!r} is given twice.")
        if usual is not None and options.get("steps", getattr(usual, "steps", 1)) < 1:
            raise ValueError("A sweep's attack needs at least one step; attack none is the prompt itself.")
        found[name] = usual and changed_attack(usual, options)
    return found


def _all_options():
    """Attacks and their options in words."""
    options = {name: ", ".join(f"{option}=" for option in own) for name, own in ATTACK_OPTIONS.items() if own}
    return "; ".join(f"{name} and behind it any of {own}" for name, own in options.items())


def changed_attack(usual, options):
    """Settings with these options changed; they record what is usual before their end, and of DoRI the end as well."""
    changed = replace(usual, **({"record": ()} if hasattr(usual, "record") else {}), **options)
    end = getattr(changed, "steps", getattr(changed, "share", None))
    if end is None:
        return changed
    record = tuple(step for step in usual.record if 0 < step < end)
    return replace(changed, record=(*record, end) if isinstance(changed, AttackConfig) else record)


def _statistics(options):
    """The file of NeMo's statistics, if it is needed."""
    if "nemo" not in options.mitigations:
        return None
    if options.nemo_statistics is None and options.model not in BUNDLED:
        raise ValueError("NeMo needs statistics of this model: give --nemo-statistics (see collect_statistics).")
    return (options.nemo_statistics or BUNDLED[options.model] / "nemo_statistics.safetensors").resolve()
