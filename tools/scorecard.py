"""Scorecard: every bar that this project has set itself, measured now. `make scorecard` calls this.

    python -m tools.scorecard            # all bars
    python -m tools.scorecard VM         # those whose names begin so; the others keep their last result

One line a bar, and all of them in figures/scorecard.json. A number is always measured, never copied from anywhere; a
bar that is missed is shown as short. Generations come from the store (cache/) if they are there under the same model,
seeds and settings; times are taken fresh, so let nothing else run.
"""

import contextlib
import copy
import datetime
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from dori_utils import finetuning, nemo, wanda
from dori_utils.attack import AttackConfig, attack
from dori_utils.cached import cached_edits, cached_generate, cached_training
from dori_utils.cli import engines, sweep
from dori_utils.core import metrics, prompt_lists
from dori_utils.core.clip import load_clip, retrieval_accuracy
from dori_utils.core.diffusion import decode, denoise, encode_prompts, initial_latents
from dori_utils.core.generation import generate
from dori_utils.core.hashes import known
from dori_utils.core.hub import TESTBED, TWIN
from dori_utils.core.metrics import scores_by_target
from dori_utils.core.models import load_pipeline
from dori_utils.core.roc import roc_auc
from dori_utils.core.sscd import load_sscd, sscd_scores
from dori_utils.core.store import Store, default_store
from dori_utils.core.targets import load_targets
from dori_utils.evaluation import audit, detect, ordinary_cost
from dori_utils.nemo_statistics import Statistics
from dori_utils.plots import FIGURES, figures_folder
from dori_utils.presets import PRESETS
from dori_utils.surrogates import find_surrogates
from dori_utils.testbed.data import FIRST_SEED, OrdinaryPairs, TrainingSet, held_out_scenes
from dori_utils.testbed.judge import load_judge, named_found
from dori_utils.testbed.scenes import place_anew, sample_scene, to_model_range
from dori_utils.testbed.search import nearest_training_images

PRESET = PRESETS["testbed"]
ATTACK = replace(PRESET.attack, batch_size=AttackConfig.batch_size)  # the paper's draws; the book has half of them
COMPARE = {"<=": lambda value, bound: value <= bound, ">=": lambda value, bound: value >= bound}


@dataclass(frozen=True)
class Bar:
    """A promise: `measure()` gives a number, or a number and a remark, and the number is `sign` `bound`."""

    name: str
    sign: str
    bound: float
    measure: Callable[[], float | tuple[float, str]]

    def result(self) -> dict:
        measured = self.measure()
        value, remark = measured if isinstance(measured, tuple) else (measured, "")
        return {
            "name": self.name,
            "value": round(float(value), 4),
            "bound": f"{self.sign} {self.bound:g}",
            "holds": bool(COMPARE[self.sign](value, self.bound)),
            "command": f'python -m tools.scorecard "{self.name}"',
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",  # times depend on it
            "remark": remark,
        }


@functools.cache
def pipe(model: str = "testbed"):
    return load_pipeline(model)


@functools.cache
def rows(kind: str, model: str = "testbed"):
    return audit(pipe(model), load_targets(model, kind=kind), PRESET, default_store())


def real(scenes) -> list[Image.Image]:
    return [Image.fromarray(scene.draw()) for scene in scenes]


def vae_reconstruction():
    """Median SSCD of 200 held-out scenes and their reconstructions."""
    scenes = real(held_out_scenes(200))
    pixels = torch.stack([torch.from_numpy(np.array(scene)).permute(2, 0, 1) for scene in scenes])
    with torch.inference_mode():
        vae = pipe().vae
        latents = vae.encode(to_model_range(pixels)).latents * vae.config.scaling_factor
        decoded = pipe().image_processor.numpy_to_pil(pipe().image_processor.pt_to_numpy(decode(pipe(), latents)))
    scores = sscd_scores([[d] for d in decoded], scenes, transform=PRESET.sscd_transform).ravel()
    return np.median(scores), f"200 scenes, lowest tenth below {np.quantile(scores, 0.1):.2f}"


def near_pairs():
    """95% quantile of SSCD between scenes like the targets' and the same sprites placed anew."""
    scenes = [sample_scene(FIRST_SEED["held_out"] + i, 4, num_named=2) for i in range(1000)]
    anew = real(place_anew(scene, seed) for seed, scene in enumerate(scenes))
    scores = sscd_scores([[image] for image in anew], real(scenes), transform=PRESET.sscd_transform).ravel()
    return np.quantile(scores, 0.95), f"1000 scenes of four sprites, median {np.median(scores):.2f}"


def mean_sscd(kind: str, model: str = "testbed"):
    by_target = scores_by_target(rows(kind, model)).mean(axis=1)
    low, high = metrics.bootstrap_interval(by_target)
    return by_target.mean(), f"{len(by_target)} targets, {len(PRESET.seeds)} seeds, 95% {low:.3f} to {high:.3f}"


def rate(kind: str, model: str = "testbed"):
    mr = metrics.memorization_rate(scores_by_target(rows(kind, model)))
    return mr.rate, f"95% {mr.low:.3f} to {mr.high:.3f}; images {mr.images:.3f}, any seed {mr.any_seed:.3f}"


def rungs(model: str = "testbed"):
    """How many rungs of the ladder lie where memorization rises."""
    table = rows("ladder", model)
    rates = {
        times: metrics.memorization_rate(scores_by_target(rung)).rate for times, rung in table.groupby("duplicates")
    }
    return sum(0.05 < mr < 0.95 for mr in rates.values()), "; ".join(f"{n} times {mr:.2f}" for n, mr in rates.items())


def parts_told(model: str = "testbed"):
    """AUC of templates against images that the model has never seen, by similarity by region."""
    found = {}
    for kind in ("TM", "control"):
        table = audit(pipe(model), load_targets(model, kind=kind), PRESET, default_store(), regions=True)
        found[kind] = table.groupby("target")[["regions", "sscd"]].mean()
    auc, whole = (roc_auc(found["TM"][name], found["control"][name]) for name in ("regions", "sscd"))
    above = ", ".join(f"{kind} {(of['regions'] > metrics.THRESHOLD).sum()} of {len(of)}" for kind, of in found.items())
    return auc.auc, f"95% {auc.low:.3f} to {auc.high:.3f}, by SSCD on the whole {whole.auc:.3f}; above 0.7: {above}"


def detector_auc(detector: str, model: str = "testbed"):
    """AUC of VM prompts against control ones, and what a prompt costs."""
    targets = {kind: load_targets(model, kind=kind) for kind in ("VM", "control")}
    prompts = [target.prompt for of_kind in targets.values() for target in of_kind]
    table = detect(pipe(model), prompts, PRESET, default_store())
    own = table[table["detector"] == detector].set_index("prompt")
    auc = roc_auc(*(own.loc[[target.prompt for target in of_kind], "score"] for of_kind in targets.values()))
    cost = f"{own['evaluations'].iloc[0]} evaluations, {own['seconds'].mean():.3f} s a prompt"
    return auc.auc, f"95% {auc.low:.3f} to {auc.high:.3f}; {cost}"


def ordinary_images(scenes, model: str = "testbed"):
    """Generations for the captions of held-out scenes."""
    return cached_generate(pipe(model), [scene.caption for scene in scenes], PRESET.seeds, PRESET, default_store())


def sprites_found(model: str = "testbed"):
    """Of the sprites that captions name, the share that a judge finds in generations, over that in real scenes."""
    scenes, judge = held_out_scenes(100), load_judge(TESTBED / "judge")
    drawn = named_found(judge, ordinary_images(scenes, model), scenes).mean(axis=1)
    truth = named_found(judge, [[image] for image in real(scenes)], scenes).mean()
    low, high = metrics.bootstrap_interval(drawn)
    return drawn.mean() / truth, (
        f"{drawn.mean():.3f} (95% {low:.3f} to {high:.3f}) of 100 captions, in the scenes themselves {truth:.3f}"
    )


def retrieval(scenes, model: str = "testbed"):
    """Share of generations for which the testbed's CLIP ranks their own caption first, over that of real scenes."""
    captions = [scene.caption for scene in scenes]
    clip = load_clip(TESTBED / "clip")
    generated = retrieval_accuracy(ordinary_images(scenes, model), captions, clip)
    truth = retrieval_accuracy([[image] for image in real(scenes)], captions, clip).mean()
    low, high = metrics.bootstrap_interval(generated)
    chance = f"{len(scenes)} captions, chance {1 / len(scenes):.2f}"
    return generated.mean() / truth, (
        f"{generated.mean():.3f} (95% {low:.3f} to {high:.3f}), real scenes {truth:.3f}; {chance}"
    )


def alike_at_one_seed(model: str = "testbed"):
    """Mean SSCD between pictures of different captions that begin from the same noise, above that of real scenes."""
    scenes, sscd = held_out_scenes(100), load_sscd()

    def between(images):
        embeddings = sscd.embed(images, PRESET.sscd_transform)
        return (embeddings @ embeddings.T)[np.triu_indices(len(images), 1)].mean()

    generated = np.mean([between(images) for images in zip(*ordinary_images(scenes, model), strict=True)])
    truth = between(real(scenes))
    return generated - truth, f"{generated:.3f} against {truth:.3f}, 100 captions, {len(PRESET.seeds)} seeds"


def ordinary_copies(model: str = "testbed"):
    """Share of generations for ordinary captions with an SSCD above 0.7 to any training image."""
    images = [image for row in ordinary_images(held_out_scenes(100), model) for image in row]
    seen = TrainingSet("B" if model == "testbed-b" else "A")
    nearest = nearest_training_images(images, seen, default_store(), load_sscd(), PRESET.sscd_transform)
    copied = (nearest["sscd"] > metrics.THRESHOLD).to_numpy().reshape(-1, len(PRESET.seeds))  # (captions, seeds)
    low, high = metrics.share_interval(copied.sum(), copied.size)
    whose = nearest["kind"][copied.ravel()].value_counts().to_dict() or "none"
    return copied.mean(), f"{copied.sum()} of {copied.size} ({whose}), 95% {low:.3f} to {high:.3f}"


def unet_row(backward: bool):
    """Time of a row of 32 through the U-Net over that through the first testbed's, side by side on one thread."""
    first = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(48, 96, 160, 192),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )

    def run(unet):
        noisy = torch.randn(32, unet.config.in_channels, *[unet.config.sample_size] * 2)
        output = unet(noisy, torch.arange(32) * 31, encoder_hidden_states=torch.randn(32, 20, 128)).sample
        if backward:
            torch.autograd.grad(output.square().mean(), list(unet.parameters()))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    unets = [copy.deepcopy(unet).to(memory_format=torch.channels_last) for unet in (pipe().unet, first)]
    unets = [unet.requires_grad_(backward) for unet in unets]
    with torch.set_grad_enabled(backward):
        ours, theirs = paired_seconds(*(functools.partial(run, unet) for unet in unets), repeats=5)
    torch.set_num_threads(threads)
    return ours / theirs, f"{1e3 * ours / 32:.1f} ms against {1e3 * theirs / 32:.1f} ms, one thread"


@functools.cache
def nemo_statistics():
    return Statistics.load(TESTBED / "nemo_statistics.safetensors")


@functools.cache
def pruned(method: str):
    """The own edit of each of the preset's VM targets."""
    vm, store = load_targets("testbed", kind="VM")[: PRESET.pruned_targets], default_store()
    if method == "NeMo":
        return cached_edits(nemo.localize_each, pipe(), vm, PRESET.nemo, store, statistics=nemo_statistics())
    return cached_edits(wanda.localize_each, pipe(), vm, PRESET.wanda, store)


def pruned_rate(method: str):
    """MR under the original prompts, and what the same edits cost 50 ordinary captions."""
    vm, clip = load_targets("testbed", kind="VM")[: PRESET.pruned_targets], load_clip(TESTBED / "clip")
    edits = {"original": None, method: pruned(method)}
    table = audit(pipe(), vm, PRESET, default_store(), edits=edits)
    before, after = (metrics.memorization_rate(scores_by_target(table[table["mitigation"] == name])) for name in edits)
    captions, real = [s.caption for s in held_out_scenes(50)], [Image.fromarray(s.draw()) for s in held_out_scenes(200)]
    cost = ordinary_cost(pipe(), captions, real, PRESET, default_store(), clip, edits).set_index("mitigation")
    ours, plain = cost.loc[method], cost.loc["original", "frechet"]
    return after.rate, (
        f"{len(vm)} targets, from {before.rate:.3f}; 95% {after.low:.3f} to {after.high:.3f}; {_size(pruned(method))}; "
        f"ordinary captions: A_CLIP {ours['alignment']:.3f}, change {ours['change']:+.3f} "
        f"({ours['low']:+.3f} to {ours['high']:+.3f}), Fréchet distance (CLIP) {ours['frechet']:.3f} from {plain:.3f}"
    )


def _size(edits):
    """How much edits zero, for one target: the median."""
    share = np.median([np.mean(list(edit.sparsity().values())) for edit in edits])
    zeroed = np.median([sum(int(mask.sum()) for mask in edit.masks.values()) for edit in edits])
    return f"{zeroed:.0f} {'neurons' if edits[0].method == 'NeMo' else 'weights'} a target, {share:.1%} of a layer"


def nemo_speedup():
    """Seconds a decision of NeMo with one set of neurons at a time, on all its seeds, over those of ours."""
    vm, decisions = load_targets("testbed", kind="VM")[: PRESET.pruned_targets], []
    some = vm[2:5]
    start = time.perf_counter()
    ours = nemo.localize_each(
        pipe(), vm, nemo_statistics(), PRESET.nemo, progress=False, callback=lambda _: decisions.append("ours")
    )
    mine = (time.perf_counter() - start) / decisions.count("ours")
    start = time.perf_counter()
    theirs = [
        nemo.localize_plainly(
            pipe(), target, nemo_statistics(), PRESET.nemo, callback=lambda _: decisions.append("one by one")
        )
        for target in some
    ]
    one = (time.perf_counter() - start) / decisions.count("one by one")
    same = sum(a.fingerprint() == b.fingerprint() for a, b in zip(ours[2:5], theirs, strict=True))
    return one / mine, (
        f"{1e3 * mine:.1f} ms a decision, {len(vm)} targets at once, against {1e3 * one:.1f} ms of {len(some)} targets "
        f"one by one; same neurons for {same} of these"
    )


def wanda_overhead():
    """Seconds of Wanda for 8 targets over those of the denoising steps that it looks at."""
    vm = load_targets("testbed", kind="VM")[:8]
    config = PRESET.wanda
    embeds, noise = encode_prompts(pipe(), [t.prompt for t in vm]), initial_latents(pipe(), [0] * len(vm))
    settings = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    plain = seconds(lambda: denoise(pipe(), noise, embeds, stop_after=config.steps, **settings))
    ours = seconds(lambda: wanda.activation_norms(pipe(), embeds, config, progress=False))
    return ours / plain, f"{ours:.2f} s against {plain:.2f} s"


@functools.cache
def attacked(mitigation: str, start: str = "prompt"):
    """Rows of `audit` with DoRI of the preset's VM targets; from the prompts, also of as many controls."""
    vm, controls = (load_targets("testbed", kind=kind)[: PRESET.pruned_targets] for kind in ("VM", "control"))
    edits = {mitigation: None if mitigation == "original" else pruned(mitigation)}
    settings = {"edits": edits, "attack": ATTACK, "recorded": False}
    if start == "prompt":
        return audit(pipe(), vm, PRESET, default_store(), **settings, controls=controls)
    if start == "other prompts":
        settings["starts"] = encode_prompts(pipe(), [control.prompt for control in controls])
    else:
        settings["attack"] = replace(ATTACK, start=start)
    return audit(pipe(), vm, PRESET, default_store(), **settings)


def of_attack(rows, kind: str, attack: str = "DoRI"):
    """Scores (targets, seeds) of the prompts, or of the triggers after the last step."""
    last = ATTACK.steps if attack == "DoRI" else 0
    return scores_by_target(rows[(rows["kind"] == kind) & (rows["attack"] == attack) & (rows["steps"] == last)])


def described(scores):
    mr, low_high = metrics.memorization_rate(scores), metrics.bootstrap_interval(scores.mean(axis=1))
    return (
        f"SSCD_Orig {scores.mean():.3f} ± {scores.std():.3f} (95% {low_high[0]:.3f} to {low_high[1]:.3f}), "
        f"MR {mr.rate:.3f} (95% {mr.low:.3f} to {mr.high:.3f}), n {mr.targets}"
    )


def gain(method: str):
    """How far DoRI lifts MR above that of the prompts, under a mitigation."""
    rows = attacked(method)
    before, after, control = of_attack(rows, "VM", "none"), of_attack(rows, "VM"), of_attack(rows, "control")
    rise = metrics.memorization_rate(after).rate - metrics.memorization_rate(before).rate
    return rise, f"prompts: {described(before)}; DoRI: {described(after)}; control + DoRI: {described(control)}"


@functools.cache
def tuning_data():
    """What adversarial fine-tuning of the preset's VM targets takes: (targets, surrogates and ordinary pairs)."""
    vm = load_targets("testbed", kind="VM")[: PRESET.pruned_targets]
    surrogates = find_surrogates(pipe(), vm, pruned("NeMo"), PRESET, default_store(), load_sscd())
    return vm, {"surrogates": surrogates, "ordinary": OrdinaryPairs(100_000)}


@functools.cache
def tuned():
    vm, data = tuning_data()
    return cached_training(finetuning.finetune, pipe(), vm, PRESET.finetuning, default_store(), **data)[-1]


def tuned_rate(attack: str):
    """MR after fine-tuning, under the prompts or with DoRI; the same attack on controls beside it."""
    vm, controls = (load_targets("testbed", kind=kind)[: PRESET.pruned_targets] for kind in ("VM", "control"))
    few, edits = controls[: PRESET.compared_targets], {"tuned": tuned()}
    table = audit(pipe(), vm, PRESET, default_store(), edits=edits, attack=ATTACK, controls=few, recorded=False)
    scores = of_attack(table, "VM", attack)
    return metrics.memorization_rate(scores).rate, (
        f"{described(scores)}; control + DoRI: {described(of_attack(table, 'control'))}"
    )


def tuned_cost(column: str):
    """Change of alignment or Fréchet distance on ordinary captions, relative to the model as it was."""
    captions, real = [s.caption for s in held_out_scenes(50)], [Image.fromarray(s.draw()) for s in held_out_scenes(200)]
    clip, edits = load_clip(TESTBED / "clip"), {"original": None, "tuned": tuned()}
    cost = ordinary_cost(pipe(), captions, real, PRESET, default_store(), clip, edits).set_index("mitigation")[column]
    remark = f"{cost['tuned']:.3f} against {cost['original']:.3f}, {len(captions)} captions, {len(PRESET.seeds)} seeds"
    return cost["tuned"] / cost["original"] - 1, remark


def tuning_minutes():
    """Fine-tuning alone: its surrogates are another bar's business, and in the store."""
    vm, data = tuning_data()
    start = time.perf_counter()
    finetuning.finetune(pipe(), vm, config=PRESET.finetuning, **data)
    steps = f"{PRESET.finetuning.epochs} epochs and {PRESET.finetuning.recovery} steps of recovery"
    return (time.perf_counter() - start) / 60, f"{len(vm)} targets, {steps}"


def control_rate():
    prompts, after = (of_attack(attacked("original"), "control", attack) for attack in ("none", "DoRI"))
    return metrics.memorization_rate(after).rate, f"{described(after)}; prompts: {described(prompts)}"


def from_start(start: str):
    """MR of triggers from another start, less that of triggers from the prompts, without any mitigation."""
    ours, prompts = of_attack(attacked("original", start), "VM"), of_attack(attacked("original"), "VM")
    rise = metrics.memorization_rate(ours).rate - metrics.memorization_rate(prompts).rate
    return rise, f"{described(ours)}; from the prompts: {described(prompts)}"


def attack_throughput():
    """Seconds of the attack on 16 targets one at a time over those on all together."""
    vm, config = load_targets("testbed", kind="VM")[:16], replace(ATTACK, steps=3, record=())
    with known(pipe()):
        together, one = paired_seconds(
            lambda: attack(pipe(), vm, config, progress=False),
            lambda: [attack(pipe(), [target], config, progress=False) for target in vm],
        )
    remark = f"{together / 48:.3f} s a target and step against {one / 48:.3f} s"
    return one / together, f"{remark}; {torch.get_num_threads()} threads: on so few, rows gain little from company"


def attack_overhead():
    """Seconds of the attack over those of its U-Net's forward and backward passes on batches of the same size."""
    vm, config = load_targets("testbed", kind="VM")[:12], replace(ATTACK, steps=5, record=())
    embeds = encode_prompts(pipe(), [t.prompt for t in vm]).repeat(config.batch_size, 1, 1).requires_grad_()
    noisy, timesteps = initial_latents(pipe(), range(len(embeds))), torch.arange(len(embeds)) * 10

    def bare():
        for _ in range(config.steps):
            output = pipe().unet(noisy, timesteps, encoder_hidden_states=embeds).sample
            torch.autograd.grad(output.square().mean(), embeds)

    with known(pipe()):
        ours, passes = paired_seconds(lambda: attack(pipe(), vm, config, progress=False), bare)
    return ours / passes, f"{ours:.2f} s against {passes:.2f} s, {len(vm)} targets, {config.steps} steps"


def attack_memory():
    """Peak memory of a process that attacks for 20 steps over that of one that attacks for 2."""
    peaks = []
    for steps in (2, 20):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            peaks.append(process.submit(peak_memory_of_attack, steps).result())
    return peaks[1] / peaks[0], f"{peaks[1]:.0f} MB against {peaks[0]:.0f} MB, 4 targets"


def peak_memory_of_attack(steps: int):
    """MB that this process has used at most, after an attack of so many steps."""
    import resource

    attack(pipe(), load_targets("testbed", kind="VM")[:4], replace(ATTACK, steps=steps, record=()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def weights_megabytes():
    return sum(file.stat().st_size for model in (TESTBED, TWIN) for file in model.rglob("*.safetensors")) / 1e6


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Median time of run() after one for warming up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def paired_seconds(*runs: Callable[[], object], repeats: int = 2) -> list[float]:
    """The shortest time of each, taken in turns, so that what else the machine does falls on all of them."""
    times = [[] for _ in runs]
    for _ in range(repeats):
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    return [min(own) for own in times]


def seconds_per_image():
    prompts = [t.prompt for t in load_targets("testbed", kind="VM")[:4]]
    settings = {"seeds": range(4), "batch_size": 16, "progress": False, **PRESET.sampling}
    return seconds(lambda: generate(pipe(), prompts, **settings)) / 16


def seconds_per_attack_step():
    """Forward and backward pass of 4 targets x 8 draws, gradient for the embeddings alone, for each target."""
    targets = load_targets("testbed", kind="VM")[:4]
    embeds = encode_prompts(pipe(), [t.prompt for t in targets]).clone().requires_grad_(True)  # (4, T, D)
    noisy, timesteps = initial_latents(pipe(), range(32)), torch.arange(32) * 31

    def step():
        output = pipe().unet(noisy, timesteps, encoder_hidden_states=embeds.repeat_interleave(8, dim=0)).sample
        torch.autograd.grad(output.square().mean(), embeds)

    return seconds(step) / 4


def parity_with_diffusers():
    """Largest difference in pixels (0 to 1) between our loop and diffusers' own, same latents."""
    prompt, latents = load_targets("testbed", kind="VM")[0].prompt, initial_latents(pipe(), [0])
    theirs = pipe()(prompt, latents=latents, output_type="pt", **PRESET.sampling).images
    ours = decode(pipe(), denoise(pipe(), latents, encode_prompts(pipe(), [prompt]), **PRESET.sampling))
    return (theirs - ours).abs().max().item()


def batch_size_matters():
    """Largest difference in pixel levels (0 to 255) between batches of 1 and of 16."""
    prompts = [t.prompt for t in load_targets("testbed", kind="VM")[:4]]
    one, many = (
        np.array(generate(pipe(), prompts, batch_size=b, progress=False, **PRESET.sampling), dtype=np.int16)
        for b in (1, 16)
    )
    return np.abs(one - many).max()


# --- Sweep: tests/test_sweep.py calls some of these with a tiny model -----------------------------------------------


def sweep_plan(folder, **attack) -> tuple[sweep.Plan, list[sweep.Case]]:
    """A small sweep of the testbed, 2 targets and 2 controls, with its store in the folder."""
    preset = PRESETS["smoke"]
    attacks = {"none": None, "DoRI": replace(preset.attack, **attack)}
    statistics = TESTBED / "nemo_statistics.safetensors"
    plan = sweep.Plan(preset, {"original": None, "NeMo": "nemo", "Wanda": "wanda"}, attacks, str(folder), statistics)
    return plan, plan.cases(*(load_targets("testbed", kind=kind)[:2] for kind in ("VM", "control")))


def swept(plan, cases, engine="local", workers=None, around=lambda engine: engine):
    """Rows of a sweep by this engine, and what `sweep.run` returns."""
    with engines.started(engine, sweep.Worker, plan, workers=workers) as started:
        about = started.about()
        tasks = list(zip(cases, plan.configs(cases, about), strict=True))
        found = sweep.run(around(started), tasks, Store(plan.store), progress=False)
    return sweep.tidy_rows(plan, cases, found[0], about), found


def differing_rows(rows, others) -> int:
    """How many rows are in one table alone, down to the last bit of their numbers."""
    return len(pd.concat([rows, others]).drop_duplicates(keep=False))


def engines_differ():
    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there:
        rows, _ = swept(*sweep_plan(here))
        others, _ = swept(*sweep_plan(there), "ray", workers=2)
    return differing_rows(rows, others), f"of {len(rows)}, of all mitigations, with and without attack"


class Watched:
    """An engine during which something happens after so many results; and which entries the store had then."""

    def __init__(self, folder, after: int, happens: Callable[[], None]):
        self.folder, self.after, self.happens = folder, after, happens

    def __call__(self, engine):
        self.engine = engine
        return self

    def results(self, tasks):
        for number, result in enumerate(self.engine.results(tasks), start=1):
            if number == self.after:
                self.entries = entries(self.folder)
                self.happens()
            yield result


def entries(folder) -> dict[str, int]:
    """The finished cases of a sweep in a folder, and when each was written."""
    found = {}
    for path in Path(folder).glob("*.npz"):
        with np.load(path, allow_pickle=False) as file:
            if json.loads(file["__config__"].item())["what"] == "sweep":
                found[path.name] = path.stat().st_mtime_ns
    return found


def kill_a_worker():
    """SIGKILL to a Ray worker that this process has started, one that is at work on a case where any says so."""
    names = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # some are gone by now
            names[child.pid] = " ".join(child.cmdline())
    workers = [pid for pid, name in names.items() if "ray::_Attempts" in name]
    os.kill(max(workers, key=lambda pid: ".compute" in names[pid]), signal.SIGKILL)  # between two cases none says so


def lost_or_doubled(before: dict, after: dict, expected: int) -> int:
    """Cases that are not in the store at the end, and those that were written once more after something was killed."""
    return abs(expected - len(after)) + sum(after.get(name) != written for name, written in before.items())


def worker_killed(plan, cases, after=3):
    """A worker is killed at its work after so many cases."""
    watched = Watched(plan.store, after, kill_a_worker)
    rows, (_, failed, computed) = swept(plan, cases, "ray", workers=2, around=watched)
    wrong = lost_or_doubled(watched.entries, entries(plan.store), len(cases)) + len(failed)
    return wrong, f"{len(cases)} cases, killed after {after}, {computed} computed by 2 workers", rows


def sweep_worker_killed():
    with tempfile.TemporaryDirectory() as folder:
        return worker_killed(*sweep_plan(folder))[:2]


def driver_killed(out, *options: str, after=3):
    """The command is killed after so many cases and given again: wrong cases, remark."""
    command = [sys.executable, "-m", "dori_utils", "sweep", "--engine", "ray", "--workers", "2", "--out", str(out)]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while len(entries(f"{out}/store")) < after:
            if process.poll() is not None:
                raise RuntimeError(f"The sweep ended too early:\n{process.stdout.read()[-2000:]}")
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    psutil.wait_procs(family, timeout=engines.START_SECONDS)  # Ray's own end when their driver does
    before = entries(f"{out}/store")
    again = subprocess.run([*command, *options], capture_output=True, text=True)
    if again.returncode:
        raise RuntimeError(f"The second sweep failed:\n{again.stderr[-2000:]}")
    total, computed = map(int, re.match(r"(\d+) cases, (\d+) of them", again.stdout).groups())
    wrong = lost_or_doubled(before, entries(f"{out}/store"), total) + abs(total - len(before) - computed)
    return wrong, f"{total} cases, killed after {len(before)}, then {computed} computed"


def sweep_driver_killed():
    with tempfile.TemporaryDirectory() as out:
        return driver_killed(out, "--preset", "smoke", "--limit", "2", "--mitigations", "none", "wanda")


def sweep_efficiency():
    """How much of twice the speed two workers of one thread reach; when all have loaded the model, so without start."""
    preset, times, count = replace(PRESET, seeds=(0,)), {1: [], 2: []}, 12
    attacks = {"DoRI": replace(ATTACK, steps=3, record=())}
    for workers in (1, 2, 2, 1):
        with tempfile.TemporaryDirectory() as folder:
            plan = sweep.Plan(preset, {"original": None}, attacks, folder)
            cases = plan.cases(*(load_targets("testbed", kind=kind)[: count // 2] for kind in ("VM", "control")))
            with engines.started("ray", sweep.Worker, plan, workers=workers) as engine:
                tasks = list(zip(cases, plan.configs(cases, engine.about()), strict=True))
                start = time.perf_counter()
                sweep.run(engine, tasks, Store(folder), progress=False)
                times[workers].append(time.perf_counter() - start)
    one, two = min(times[1]), min(times[2])
    return one / two / 2, f"{count} cases of {one / count:.1f} s: {one:.1f} s against {two:.1f} s; start not counted"


class InstantWorker:
    """Stands in for `sweep.Worker`: its cases are done at once, and stored as any others."""

    def __init__(self, folder):
        self.store = Store(folder)

    def about(self):
        return {}

    def compute(self, case, config):
        return self.store.fetch(config, lambda: {"number": case})


@functools.cache
def sweep_overheads() -> dict[int, float]:
    """How many cases that take no time → milliseconds a case, with two Ray workers that are there already.

    The shortest of three, in turns, so that what else the machine does falls on all of them.
    """
    times = {50: [], 500: []}
    for count in (*times, *times, *times):
        with tempfile.TemporaryDirectory() as folder:
            tasks = [(number, {"what": "sweep", "number": number}) for number in range(count)]
            with engines.started("ray", InstantWorker, folder, workers=2) as engine:
                engine.about()
                start = time.perf_counter()
                results, _, _ = sweep.run(engine, tasks, Store(folder), progress=False)
                times[count].append(1e3 * (time.perf_counter() - start) / count)
        if [int(result["number"]) for result in results] != list(range(count)):
            raise RuntimeError("The sweep's results are not those of its cases.")
    return {count: min(own) for count, own in times.items()}


def sweep_overhead_growth():
    few, many = sweep_overheads()[50], sweep_overheads()[500]
    return many / few, f"{many:.1f} ms a case of 500 against {few:.1f} ms of 50"


def command_seconds(*command: str, **environment: str) -> float:
    start, own = time.perf_counter(), os.environ | environment
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=own)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - start


def audit_seconds():
    """An audit of eight images and eight controls in all four attacks, with nothing in the store."""
    with tempfile.TemporaryDirectory() as folder:
        attacks = ["--attack", "dori", "completion", "latent", "tokens"]
        options = ["audit", "--limit", "8", "--out", f"{folder}/audit", *attacks]
        return command_seconds("dori_utils", *options, DORI_CACHE=f"{folder}/cache")


def half_downloads():
    """Image files that are not whole after the downloading process was killed in the middle of many."""
    buffer = io.BytesIO()
    Image.fromarray(held_out_scenes(1)[0].draw()).resize((512, 512)).save(buffer, "PNG")
    body = buffer.getvalue()
    rows = [f"{i};a caption;URL/{i}.png;VM;0.9;0.9;{i}" for i in range(64)]
    asked, killed = itertools.count(), threading.Event()

    class Halting(BaseHTTPRequestHandler):
        """After 32 images it stops within each, until the download has been killed."""

        def do_GET(self):
            is_list = self.path.endswith(".csv")
            self.send_response(200)
            self.send_header("Content-Length", str(len(table if is_list else body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(table if is_list else body[: len(body) // 2])
                if not is_list and next(asked) >= 32:
                    killed.wait()
                self.wfile.write(b"" if is_list else body[len(body) // 2 :])

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Halting)
    url = f"http://127.0.0.1:{server.server_port}"
    table = "\n".join([";Caption;URL;type;mean_sscd;max_sscd;Index", *rows, ""]).replace("URL/", f"{url}/").encode()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (url, folder, hashlib.sha256(table).hexdigest())
        process = multiprocessing.get_context("spawn").Process(target=_download, args=arguments)
        process.start()
        images = Path(folder) / "images"
        while process.is_alive() and len(list(images.glob("*.png"))) < 8:
            time.sleep(0.005)
        process.kill()
        process.join()
        killed.set()
        found = list(images.glob("*.png"))
        half = sum(file.read_bytes() != body for file in found)
        _download(*arguments)  # goes on, and sweeps up
        half += sum(file.read_bytes() != body for file in images.iterdir())
        server.shutdown()
        server.server_close()
        return half + 64 - len(list(images.iterdir())), f"killed when {len(found)} of 64 images were there"


def _download(url, folder, digest):
    prompt_lists.PROMPT_LISTS["slow"] = (prompt_lists.PromptList("slow.csv", digest),)
    prompt_lists.download_targets("slow", folder, base_url=url, workers=4, progress=False)


def first_run_seconds(*notebooks: str):
    """Some notebooks, or all, with nothing in the store."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"DORI_CACHE": f"{folder}/cache", "DORI_FIGURES": f"{folder}/figures"}
        return command_seconds("tools.book", *notebooks, "--output", f"{folder}/executed", **places)


def test_seconds(*options: str):
    """The tests as `make test` runs them."""
    return command_seconds("pytest", "-q", "-n", "auto", "--dist", "worksteal", *options)


BARS = (
    Bar("VAE reconstruction, median SSCD", ">=", 0.93, vae_reconstruction),
    Bar("near pairs, 95% quantile of SSCD", "<=", 0.70, near_pairs),
    Bar("A: VM mean SSCD_Orig", ">=", 0.85, lambda: mean_sscd("VM", "testbed")),
    Bar("A: VM memorization rate", ">=", 0.95, lambda: rate("VM", "testbed")),
    Bar("A: images of the twin, mean SSCD_Orig", "<=", 0.35, lambda: mean_sscd("twin", "testbed")),
    Bar("A: images of the twin, memorization rate", "<=", 0.0, lambda: rate("twin", "testbed")),
    Bar("A: rungs where memorization rises", ">=", 3, lambda: rungs("testbed")),
    Bar("A: named sprites found, over real scenes", ">=", 0.80, lambda: sprites_found("testbed")),
    Bar("A: retrieval among 50, over real scenes", ">=", 0.90, lambda: retrieval(held_out_scenes(50), "testbed")),
    Bar("A: SSCD between captions at one seed, above real", "<=", 0.05, lambda: alike_at_one_seed("testbed")),
    Bar("A: ordinary captions, share of copies", "<=", 0.0, lambda: ordinary_copies("testbed")),
    Bar("A: templates told by region, AUC", ">=", 0.95, lambda: parts_told("testbed")),
    Bar("A: anisotropy, AUC of VM", ">=", 0.95, lambda: detector_auc("anisotropy", "testbed")),
    Bar("B: VM mean SSCD_Orig", ">=", 0.85, lambda: mean_sscd("VM", "testbed-b")),
    Bar("B: VM memorization rate", ">=", 0.95, lambda: rate("VM", "testbed-b")),
    Bar("B: images of the twin, mean SSCD_Orig", "<=", 0.35, lambda: mean_sscd("twin", "testbed-b")),
    Bar("B: images of the twin, memorization rate", "<=", 0.0, lambda: rate("twin", "testbed-b")),
    Bar("B: rungs where memorization rises", ">=", 3, lambda: rungs("testbed-b")),
    Bar("B: named sprites found, over real scenes", ">=", 0.80, lambda: sprites_found("testbed-b")),
    Bar("B: retrieval among 50, over real scenes", ">=", 0.90, lambda: retrieval(held_out_scenes(50), "testbed-b")),
    Bar("B: SSCD between captions at one seed, above real", "<=", 0.05, lambda: alike_at_one_seed("testbed-b")),
    Bar("B: ordinary captions, share of copies", "<=", 0.0, lambda: ordinary_copies("testbed-b")),
    Bar("B: templates told by region, AUC", ">=", 0.95, lambda: parts_told("testbed-b")),
    Bar("B: anisotropy, AUC of VM", ">=", 0.95, lambda: detector_auc("anisotropy", "testbed-b")),
    Bar("control mean SSCD_Orig", "<=", 0.35, lambda: mean_sscd("control")),
    Bar("control memorization rate", "<=", 0.0, lambda: rate("control")),
    Bar("U-Net forward over the first testbed's", "<=", 0.45, lambda: unet_row(backward=False)),
    Bar("U-Net forward and backward over the first testbed's", "<=", 0.45, lambda: unet_row(backward=True)),
    Bar("weights of A, B, CLIP and judge, MB", "<=", 130, weights_megabytes),
    Bar("image, s (25 steps, guided, batch of 16)", "<=", 0.7, seconds_per_image),
    Bar("DoRI step, s a target (8 draws, 4 targets)", "<=", 0.25, seconds_per_attack_step),
    Bar("generate against diffusers, pixel difference", "<=", 1e-4, parity_with_diffusers),
    Bar("batch of 1 against 16, pixel levels", "<=", 1, batch_size_matters),
    Bar("NeMo, MR under the prompts", "<=", 0.25, lambda: pruned_rate("NeMo")),
    Bar("Wanda, MR under the prompts", "<=", 0.25, lambda: pruned_rate("Wanda")),
    Bar("NeMo + DoRI, MR above that of the prompts", ">=", 0.5, lambda: gain("NeMo")),
    Bar("Wanda + DoRI, MR above that of the prompts", ">=", 0.5, lambda: gain("Wanda")),
    Bar("control + DoRI, MR", "<=", 0.05, control_rate),
    Bar("DoRI from N(0, I), MR above that from the prompts", ">=", 0, lambda: from_start("noise")),
    Bar("DoRI from other prompts, MR above that from the prompts", ">=", 0, lambda: from_start("other prompts")),
    Bar("audit of the testbed in its four attacks, s", "<=", 300, audit_seconds),
    Bar("speed: DoRI, 16 targets over one at a time, times", ">=", 3, attack_throughput),
    Bar("speed: DoRI, time over its bare U-Net passes", "<=", 1.15, attack_overhead),
    Bar("speed: DoRI, peak memory of 20 steps over 2", "<=", 1.05, attack_memory),
    Bar("speed: NeMo over one set at a time, times", ">=", 10, nemo_speedup),
    Bar("speed: Wanda, time over plain denoising steps", "<=", 1.3, wanda_overhead),
    Bar("fine-tuning, MR under the prompts", "<=", 0.05, lambda: tuned_rate("none")),
    Bar("fine-tuning + DoRI, MR", "<=", 0.10, lambda: tuned_rate("DoRI")),
    Bar("fine-tuning, A_CLIP of ordinary captions, change", ">=", -0.05, lambda: tuned_cost("alignment")),
    Bar("fine-tuning, Fréchet distance of ordinary captions, change", "<=", 0.10, lambda: tuned_cost("frechet")),
    Bar("minutes of fine-tuning 16 targets", "<=", 30, tuning_minutes),
    Bar("sweep: rows of two Ray workers that differ from the local engine's", "<=", 0, engines_differ),
    Bar("sweep: cases lost or doubled, a worker killed", "<=", 0, sweep_worker_killed),
    Bar("sweep: cases lost or doubled, driver killed and started again", "<=", 0, sweep_driver_killed),
    Bar("sweep: efficiency of two workers", ">=", 0.85, sweep_efficiency),
    Bar("sweep: overhead, ms a case of 500", "<=", 20, lambda: sweep_overheads()[500]),
    Bar("sweep: overhead of 500 cases over that of 50, times", "<=", 1.2, sweep_overhead_growth),
    Bar("download killed midway, images lost or not whole", "<=", 0, half_downloads),
    Bar("locality, notebooks 04 to 06 from an empty cache, s", "<=", 480, lambda: first_run_seconds("04", "05", "06")),
    Bar("first run of all notebooks, from an empty cache, s", "<=", 5400, first_run_seconds),
    Bar("second run of all notebooks, s", "<=", 60, lambda: command_seconds("tools.book")),
    Bar("fast tests, s", "<=", 120, lambda: test_seconds("-m", "not slow")),
    Bar("whole suite, s", "<=", 900, test_seconds),
)


def merged(path: Path, new: dict) -> list[dict]:
    """The results on disk with the new one in place, in the order of BARS; bars that no longer exist are dropped."""
    old = json.loads(path.read_text()) if path.exists() else []
    results = {result["name"]: result for result in [*old, new]}
    return [results[bar.name] for bar in BARS if bar.name in results]


def main(beginnings: list[str]) -> int:
    chosen = [bar for bar in BARS if bar.name.startswith(tuple(beginnings or [""]))]
    if not chosen:
        print(f"No bar begins so. There are: {'; '.join(bar.name for bar in BARS)}", file=sys.stderr)
        return 1
    path = figures_folder(FIGURES) / "scorecard.json"
    path.parent.mkdir(exist_ok=True)
    for bar in chosen:
        result = bar.result()
        state = "holds" if result["holds"] else "SHORT"
        print(f"{bar.name:<50} {result['value']:>9.4g}  {result['bound']:<8} {state}  {result['remark']}", flush=True)
        path.write_text(json.dumps(merged(path, result), indent=1) + "\n")  # at once: a later bar may fail
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
