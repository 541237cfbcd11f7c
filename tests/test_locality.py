"""Locality: matrices of pairs, and what may be concluded from them; planted structure is found, its absence is not."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from dori_utils import nemo, wanda
from dori_utils.cached import cached_edits
from dori_utils.core.diffusion import encode_prompts, initial_latents
from dori_utils.core.edits import Edit
from dori_utils.core.generation import generate
from dori_utils.core.hashes import model_hash
from dori_utils.core.metrics import bootstrap_interval
from dori_utils.core.significance import (
    as_notes,
    between_interval,
    block_means,
    difference_interval,
    difference_test,
    difference_tests,
    holm,
    permutation_test,
    rate_test,
)
from dori_utils.core.sscd import load_sscd, sscd_scores
from dori_utils.core.store import Store
from dori_utils.core.targets import Target, load_targets
from dori_utils.locality import activation_discrepancy, distances, embedding_map, probe, wanda_neurons, weight_agreement
from dori_utils.paper import LOCALITY
from dori_utils.presets import PRESETS
from dori_utils.random_triggers import closest, random_triggers, strongest

WORDS = ["a cat", "the red car", "a violin on a striped background"]
IMAGES = np.repeat(["a", "b", "c", "d"], 6)


def iou_by_layer(edit, other):
    """Of each layer, counted one weight after the other."""
    pairs = {name: (mask.bool(), other.masks[name].bool()) for name, mask in edit.masks.items()}
    return {n: float((a & b).sum() / (a | b).sum()) if (a | b).any() else 1.0 for n, (a, b) in pairs.items()}


def iou(edit, other):
    (value,) = iou_by_layer(edit, other).values()
    return value


def clusters(spread):
    """24 embeddings (N, 2, 8) around four centres that are `spread` away from each other."""
    noise, centres = torch.randn(24, 2, 8, generator=torch.manual_seed(0)), torch.eye(4).repeat_interleave(6, dim=0)
    return noise + spread * torch.nn.functional.pad(centres, (0, 12)).reshape(24, 2, 8)


def masked(pipe, layer, chosen, method="NeMo"):
    mask = torch.zeros(pipe.unet.get_parameter(layer).shape[0], 1, dtype=torch.bool)
    mask[chosen] = True
    return Edit(method, model_hash(pipe), masks={layer: mask})


# --- Embeddings ---


@pytest.mark.parametrize("method", ["tsne", "pca", pytest.param("umap", marks=pytest.mark.slow)])  # compiles for 15 s
def test_maps_keep_groups_together_and_are_the_same_every_time(method):
    embeds = clusters(spread=40)
    points = embedding_map(embeds, method)
    assert points.shape == (24, 2) and np.array_equal(points, embedding_map(embeds, method))
    blocks = block_means(distances(torch.from_numpy(points)), IMAGES)
    assert np.diag(blocks).max() < blocks[~np.eye(4, dtype=bool)].min()


def test_an_unknown_map_is_refused():
    with pytest.raises(ValueError, match="there is umap, tsne, pca"):
        embedding_map(clusters(0), "isomap")


@pytest.mark.parametrize(("method", "least"), [("umap", 4), ("tsne", 2), ("pca", 2)])
def test_a_map_says_how_many_embeddings_it_takes(method, least):
    for count in range(least):
        with pytest.raises(ValueError, match=f"^{count} embeddings are too few for a map by {method}: .* {least}"):
            embedding_map(clusters(0)[:count], method)


@pytest.mark.parametrize(
    ("method", "least"), [pytest.param("umap", 4, marks=pytest.mark.slow), ("tsne", 2), ("pca", 2)]
)
def test_so_many_embeddings_are_enough(method, least):
    points = embedding_map(clusters(0)[:least], method)
    assert points.shape == (least, 2) and np.isfinite(points).all()


def test_distances_are_those_of_whole_embeddings():
    embeds = clusters(1)
    matrix = distances(embeds, embeds[:3])
    assert matrix[5, 2] == pytest.approx((embeds[5] - embeds[2]).norm().item(), rel=1e-5)
    assert np.allclose(matrix[:3], distances(embeds[:3]), atol=1e-5)


def test_a_probe_finds_classes_that_are_there_and_no_others():
    assert probe(clusters(10).flatten(1), IMAGES).mean() == 1
    assert probe(clusters(0).flatten(1), IMAGES).mean() < 0.5  # chance is 0.25


def test_a_probe_does_not_win_by_knowing_the_image():
    kinds = np.isin(IMAGES, ["a", "b"])  # images gather, kinds of images do not
    features = clusters(10).flatten(1)
    assert probe(features, kinds).mean() == 1
    assert probe(features, kinds, groups=IMAGES).mean() < 0.8


# --- Activations ---


@torch.no_grad()
@pytest.mark.parametrize("layer", ["ff.net.2", "attn2.to_v"])
def test_discrepancy_is_the_distance_of_a_layers_outputs(pipe, layer):
    name = f"down_blocks.1.attentions.0.transformer_blocks.0.{layer}"
    embeds = encode_prompts(pipe, ["a cat", "a dog on grapes", "the violin"])
    found = activation_discrepancy(pipe, embeds, f"^{name}$", batch_size=2, progress=False)
    outputs = []
    hook = pipe.unet.get_submodule(name).register_forward_hook(lambda m, args, out: outputs.append(out.flatten()))
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(50)
    noise = initial_latents(pipe, [0]) * scheduler.init_noise_sigma
    for embed in embeds:
        pipe.unet(noise, scheduler.timesteps[0], encoder_hidden_states=embed[None])
    hook.remove()
    l2 = (outputs[0] - outputs[1]).norm().item()
    size = ((outputs[0].square().sum() + outputs[1].square().sum()) / 2).sqrt().item()
    assert list(found.l2) == [name] and found.l2[name].shape == (1, 3, 3)
    assert found.l2[name][0, 0, 1] == pytest.approx(l2, rel=1e-3)
    assert found.relative[name][0, 0, 1] == pytest.approx(l2 / size, rel=1e-3)
    assert not pipe.unet.get_submodule(name)._forward_hooks


def test_every_step_is_compared_and_layers_must_exist(sd1):
    embeds = encode_prompts(sd1, ["a cat", "a dog"])
    found = activation_discrepancy(sd1, embeds, r"\.ff\.net\.2$", steps=3, num_inference_steps=4, progress=False)
    assert len(found.l2) == 16 and {matrix.shape for matrix in found.l2.values()} == {(3, 2, 2)}
    with pytest.raises(ValueError, match="fits 'no such layer'"):
        activation_discrepancy(sd1, embeds, "no such layer")


@torch.no_grad()
def test_each_step_is_one_of_its_own_whatever_sampler_the_pipeline_has(sd1):
    """PNDM evaluates its second timestep twice; step k is that of DDIM, here to the last bit."""
    embeds, seen = encode_prompts(sd1, ["a cat", "a dog"]), []
    hook = sd1.unet.register_forward_pre_hook(lambda m, args: seen.append(int(args[1])))
    sampler, results = sd1.scheduler, []
    for other in (PNDMScheduler, DDIMScheduler):
        sd1.scheduler = other.from_config(sampler.config)
        settings = {"steps": 3, "num_inference_steps": 50, "progress": False}
        results.append(activation_discrepancy(sd1, embeds, r"\.ff\.net\.2$", **settings).l2)
    hook.remove()
    sd1.scheduler = sampler
    assert seen[:3] == seen[3:] and len(set(seen[:3])) == 3
    assert all(np.array_equal(results[0][layer], results[1][layer]) for layer in results[0])


# --- Weights ---

VALUE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"


def test_agreement_is_iou_of_each_pair_with_either_convention(sd1):
    edits = [masked(sd1, VALUE, chosen) for chosen in ([0, 1, 2], [1, 2, 3], [], [])]
    agreement = weight_agreement(edits)
    for i, j in ((0, 1), (0, 2), (2, 3)):
        assert agreement.iou()[VALUE][i, j] == agreement.iou()["all"][i, j] == iou(edits[i], edits[j])
    assert np.isnan(agreement.iou(np.nan)["all"][2, 3]) and agreement.iou(np.nan)["all"][0, 2] == 0


def test_agreement_of_wanda_is_that_of_single_weights(sd1):
    targets = [Target(name, prompt, None, "VM") for name, prompt in (("one", "a cat"), ("two", "the red car"))]
    edits = wanda.localize_each(sd1, targets, wanda.Config(sparsity=0.1, steps=1), progress=False)
    ours = weight_agreement(edits).iou()
    assert {name: ours[name][0, 1] for name in edits[0].masks} == pytest.approx(iou_by_layer(*edits))


def test_chance_is_what_random_sets_of_these_sizes_give(sd1):
    width, rng = sd1.unet.get_parameter(VALUE).shape[0], np.random.default_rng(0)
    sizes = (width // 2, width // 4)
    pairs = [[rng.permutation(width)[:size] for size in sizes] for _ in range(2000)]
    drawn = np.mean([len(np.intersect1d(a, b)) / len(np.union1d(a, b)) for a, b in pairs])
    edits = [masked(sd1, VALUE, list(range(size))) for size in sizes]
    assert weight_agreement(edits).chance()[VALUE][0, 1] == pytest.approx(drawn, rel=0.05)


def test_chance_over_all_layers_keeps_each_layers_share(sd1):
    other = VALUE.replace("mid_block.attentions.0", "down_blocks.0.attentions.0")
    one = masked(sd1, VALUE, [0, 1])
    masks = one.masks | {other: torch.zeros(sd1.unet.get_parameter(other).shape[0], 1, dtype=torch.bool)}
    agreement = weight_agreement([Edit("NeMo", one.model, masks=masks)] * 2)
    assert agreement.chance()["all"][0, 1] == pytest.approx(agreement.chance()[VALUE][0, 1])


def test_edits_that_do_not_compare_are_refused(sd1):
    whole, single = masked(sd1, VALUE, [0]), torch.zeros_like(sd1.unet.get_parameter(VALUE), dtype=torch.bool)
    with pytest.raises(ValueError, match="whole neurons"):
        weight_agreement([whole, Edit("Wanda", whole.model, masks={VALUE: single})])
    with pytest.raises(ValueError, match="different layers"):
        weight_agreement([whole, Edit("NeMo", whole.model, masks={})])


@torch.no_grad()
def test_wandas_neurons_are_the_highest_of_as_many_as_nemo_took(sd1):
    embeds = encode_prompts(sd1, ["a cat on the grapes"])
    (ours,) = wanda_neurons(sd1, [masked(sd1, VALUE, [3, 5])], embeds)
    weight, tokens = sd1.unet.get_parameter(VALUE), torch.nn.functional.normalize(embeds[0], dim=1)
    scores = [sum(abs(w) * x.norm() for w, x in zip(row, tokens.T, strict=True)).item() for row in weight]
    assert set(nemo.neurons(ours)[VALUE.removesuffix(".weight")]) == set(np.argsort(scores)[-2:].tolist())


def test_edits_for_embeddings_are_those_for_the_prompts_that_they_encode(sd1, tmp_path):
    targets = [Target("one", "a cat", None, "VM")] * 2  # one target, two embeddings
    prompts, store, config = ["a cat", "the red car"], Store(tmp_path), wanda.Config(sparsity=0.1, steps=1)
    by_embedding = cached_edits(wanda.localize_each, sd1, targets, config, store, encode_prompts(sd1, prompts))
    by_prompt = wanda.localize_each(sd1, [Target("one", p, None, "VM") for p in prompts], config, progress=False)
    assert [e.fingerprint() for e in by_embedding] == [e.fingerprint() for e in by_prompt]
    assert by_embedding[0].fingerprint() != by_embedding[1].fingerprint()


# --- Statistics ---


def test_blocks_are_means_over_pairs_of_different_embeddings():
    matrix = np.array([[9, 1, 2, 3], [1, 9, 4, 5], [2, 4, 9, np.nan], [3, 5, np.nan, 9]])
    blocks = block_means(matrix, ["x", "x", "y", "y"])
    assert blocks[0, 0] == 1 and blocks[0, 1] == blocks[1, 0] == 3.5
    assert np.isnan(blocks[1, 1])  # its one pair is no number


def test_the_interval_between_images_covers_what_it_should():
    """95% of intervals hold the mean of |x - y|, 2 / sqrt(pi) for standard normal numbers; half as wide ones do not."""
    rng, inside, naive = np.random.default_rng(0), 0, 0
    for _ in range(200):
        values = rng.normal(size=12)
        matrix = np.abs(values[:, None] - values)
        _, low, high = between_interval(matrix, resamples=400)
        inside += low <= 2 / np.sqrt(np.pi) <= high
        low, high = bootstrap_interval(matrix.sum(axis=1) / 11, resamples=400)
        naive += low <= 2 / np.sqrt(np.pi) <= high
    assert naive < inside and 0.85 <= inside / 200 <= 0.99


def test_permutation_finds_images_that_gather_and_no_others():
    together, p = permutation_test(distances(clusters(10)), IMAGES, resamples=199)
    assert together < -5 and p == 1 / 200
    assert permutation_test(distances(clusters(0)), IMAGES, resamples=199)[1] > 0.05


def test_differences_of_images_are_exact_for_a_few():
    a, b = [3.0, 4, 5, 6, 7, 8], [1.0, 2, 3, 4, 5, 6]
    assert difference_test(a, b, paired=True) == (2, pytest.approx(2 / 2**6))  # of 64 signs, two are as extreme
    assert difference_test(a, b, paired=False)[1] > 0.05


def test_eight_images_against_eight_have_an_exact_p():
    a, b = np.arange(8) + 100.0, np.arange(8) + 0.0
    assert difference_test(a, b, paired=False)[1] == pytest.approx(2 / math.comb(16, 8))  # the smallest there is
    assert difference_test(a, b, paired=True)[1] == 2 / 2**8


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_of_a_difference_covers_it_for_eight_images(paired):
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        low, high = difference_interval(rng.normal(1, 1, 8), rng.normal(0, 2, 8), paired)
        inside += low <= 1 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_holm_steps_down_from_the_smallest():
    assert holm([0.04, 0.01, 0.03]).tolist() == pytest.approx([0.06, 0.03, 0.06])  # 3 * .01, 2 * .03, then no smaller
    assert holm([0.5, 0.9]).tolist() == [1, 1]


def test_rates_are_compared_by_the_numbers_of_images_that_came_back():
    """15 of 16 against 0 of 8, margins fixed: of C(24, 15) tables 16 are this one, and none else is as rare."""
    ours, theirs = {"rate": 15 / 16, "targets": 16}, {"rate": 0.0, "targets": 8}
    assert rate_test(ours, theirs) == pytest.approx(16 / math.comb(24, 15))
    assert rate_test(theirs, theirs) == 1


def test_tests_of_a_table_are_corrected_together_and_written_down():
    a, b = [3.0, 4, 5, 6, 7, 8], [1.0, 2, 3, 4, 5, 5]
    table = difference_tests({"shifted": (a, b, True), "not": (a, a[::-1], False)})
    assert table["claim"].tolist() == ["shifted", "not"] and table["Holm"].tolist() == holm(table["p"]).tolist()
    assert table["difference"].tolist() == pytest.approx([13 / 6, 0]) and table["low"][1] < 0 < table["high"][1]
    assert as_notes(table)["shifted"] == "2.17 (1.7 to 2.6), p 0.031, Holm 0.062"
    unknown = table.assign(low=np.nan, high=np.nan)
    assert as_notes(unknown)["not"] == "0, p 1, Holm 1"


# --- Triggers ---


def test_the_strongest_are_those_whose_prompts_give_the_training_image(tiny_testbed, tmp_path):
    preset, sscd = PRESETS["smoke"], load_sscd()
    targets = [replace(t, prompt=p) for t, p in zip(load_targets("testbed", kind="VM")[:3], WORDS, strict=True)]
    chosen = strongest(tiny_testbed, targets, 2, preset, Store(tmp_path), sscd)
    settings = {"num_inference_steps": preset.locality.num_inference_steps, "guidance_scale": 1.0, "progress": False}
    images = generate(tiny_testbed, WORDS, seeds=preset.seeds, **settings)
    scores = sscd_scores(images, [t.image for t in targets], transform=preset.sscd_transform).mean(axis=1)
    assert [t.id for t in chosen] == [targets[i].id for i in np.argsort(-scores)[:2]]


def test_triggers_from_random_starts_are_attacked_once_and_scored(tiny_testbed, tmp_path):
    preset, store, sscd = PRESETS["smoke"], Store(tmp_path), load_sscd()
    preset = replace(preset, locality=replace(preset.locality, starts=3, control_starts=2))
    some = [load_targets("testbed", kind=kind)[0] for kind in ("VM", "control")]
    targets = [replace(target, prompt="a cat") for target in some]  # the tiny tokenizer knows few words
    table, starts, triggers = random_triggers(tiny_testbed, targets[:1], targets[1:], preset, store, sscd)
    again = random_triggers(tiny_testbed, targets[:1], targets[1:], preset, store, sscd)
    assert table["kind"].tolist() == ["VM"] * 3 + ["control"] * 2 and table["sscd"].between(-1, 1).all()
    assert len(torch.unique(starts.flatten(1), dim=0)) == 5 and abs(starts.std().item() - 1) < 0.1
    moved = (triggers - starts).abs()
    assert 0 < moved.mean() <= preset.locality.attack.lr * preset.locality.attack.steps * 1.01
    assert table.equals(again[0]) and torch.equal(triggers, again[2])
    best = table.loc[closest(table, 1)]
    assert best["image"].tolist() == [t.id for t in targets]
    assert best["sscd"].tolist() == table.groupby("image", sort=False)["sscd"].max().tolist()


def test_the_papers_numbers_are_of_its_seven_layers():
    assert {len(values) for values in LOCALITY.values()} == {7} and len(LOCALITY) == 8
