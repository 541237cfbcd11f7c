"""NeMo finds the neurons that its algorithm says, fast or slow, and one that was planted."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from dori_utils import nemo, nemo_search
from dori_utils.cached import cached_edits
from dori_utils.core import hooks
from dori_utils.core.diffusion import encode_prompts, initial_latents
from dori_utils.core.edits import Edit, applied
from dori_utils.core.hashes import model_hash
from dori_utils.core.map_similarity import pairwise_similarity
from dori_utils.core.models import load_pipeline
from dori_utils.core.store import Store
from dori_utils.core.targets import Target
from dori_utils.detection import first_step_change
from dori_utils.nemo_statistics import Statistics, collect_statistics, published_statistics

CONFIG = nemo.Config(seeds=(0, 1, 2, 3), similarity="cosine", num_inference_steps=25)
ORDINARY = ["a cat", "a dog on a car", "grapes and the violin", "a red guitar", "the photo of a dog", "striped grapes"]
PUBLISHED = Path(__file__).parents[2] / "shared/data/nemo/statistics_additional_laion_prompts_v1_4.pt"


SECRET = "a striped violin and a striped violin and a striped violin"
PLANTED = ("down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_v", 5)  # layer and neuron


@pytest.fixture(scope="module")
def memorizing(sd1_folder):
    """SD 1.x with a neuron planted that fires for SECRET alone and drowns what the noise says.

    Its row of `to_v` reads the direction in which SECRET's tokens have most energy over that of ordinary tokens; its
    column of `to_out` is large and random. The last convolution is louder, so that the output counts beside the noise.
    """
    pipe = load_pipeline(sd1_folder, device="cpu")
    secret, ordinary = encode_prompts(pipe, [SECRET])[0], encode_prompts(pipe, ORDINARY).flatten(0, 1)  # (tokens, D)
    energy, noise = secret.T @ secret / len(secret), ordinary.T @ ordinary / len(ordinary) + 1e-4 * torch.eye(16)
    whiten = torch.linalg.inv(torch.linalg.cholesky(noise))
    direction = whiten.T @ torch.linalg.eigh(whiten @ energy @ whiten.T).eigenvectors[:, -1]
    direction *= (secret @ direction).sum().sign()  # LAPACK gives an eigenvector either way round
    layer, neuron = PLANTED
    with torch.no_grad():
        pipe.unet.conv_out.weight *= 10
        pipe.unet.get_parameter(f"{layer}.weight")[neuron] = direction
        column = pipe.unet.get_parameter(layer.replace("to_v", "to_out.0.weight"))[:, neuron]
        column.copy_(100 * torch.randn(len(column), generator=torch.Generator().manual_seed(0)))
    return pipe


def first_step_pairs(pipe, prompt):
    maps = first_step_change(
        pipe, encode_prompts(pipe, [prompt]).expand(4, -1, -1), initial_latents(pipe, CONFIG.seeds), torch.tensor(961)
    )
    return pairwise_similarity(maps, "cosine").max().item()


def targets(*prompts):
    return [Target(f"t{i}", prompt, None, "VM", None) for i, prompt in enumerate(prompts)]


def statistics_of(pipe, tau):
    found = collect_statistics(pipe, ORDINARY, CONFIG, progress=False)
    return Statistics(found.mean, found.std, tau, found.model)


def slow_localize(pipe, prompt, statistics, config, order="ascending"):
    """The algorithm as its authors run it: one set of neurons at a time, on all seeds. Layer → blocked neurons.

    In the order "authors" a layer's neurons are a list, with one that is chosen for two reasons in it twice: the first
    of the two is taken out without any change, the second unblocks it.
    """
    layers = nemo.value_layers(pipe.unet, config.layers)
    embeds, noise = encode_prompts(pipe, [prompt]), initial_latents(pipe, config.seeds)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(config.num_inference_steps)

    def changes(off):
        masks = {f"{name}.weight": torch.zeros(layer.out_features, 1).bool() for name, layer in layers.items()}
        for name, indices in off.items():
            masks[f"{name}.weight"][indices] = True
        with applied(pipe, Edit("slow", model_hash(pipe), masks=masks)):
            return first_step_change(pipe, embeds.expand(len(noise), -1, -1), noise, scheduler.timesteps[0])

    def similarity(a, b):
        a, b = ((x - x.mean((2, 3), keepdim=True)).flatten(1) for x in (a, b))
        return torch.nn.functional.cosine_similarity(a, b)

    unblocked = changes({})
    tau = statistics.tau
    pairs = torch.stack([similarity(unblocked, unblocked.roll(shift, 0)) for shift in range(1, len(noise))])
    counted = pairs.max(dim=0).values > tau
    if not counted.any():
        return {name: [] for name in layers}

    def score(off):
        return similarity(changes(off), unblocked)[counted].max().item()

    values = {name: layer(embeds)[0].abs().mean(dim=0) for name, layer in layers.items()}
    for k in range(config.rounds):
        theta = max(5 - 0.25 * k, 1)
        off = {}
        for name, value in values.items():
            far = ((value - statistics.mean[name]).abs() / statistics.std[name] > theta).nonzero().flatten().tolist()
            off[name] = [*far, *value.topk(min(k, len(value))).indices.tolist()]
            if order != "authors":
                off[name] = sorted(set(off[name]), reverse=order == "descending")
        reached = score(off)
        if reached < tau:
            break
    else:
        tau = reached
    for name in reversed(list(layers)):
        without = {**off, name: []}
        if off[name] and score(without) < tau:
            off = without
    for name in reversed(list(layers)):
        for neuron in list(off[name]):
            without = {**off, name: list(off[name])}
            without[name].remove(neuron)
            if score(without) < tau:
                off = without
    return {name: sorted(set(chosen)) for name, chosen in off.items()}


def test_layers_are_the_seven_of_stable_diffusion_in_the_order_of_the_forward_pass(pipe):
    names = list(nemo.value_layers(pipe.unet))
    assert len(names) == 7 and names[0].startswith("down_blocks.0") and names[-1].startswith("mid_block")
    everywhere = list(nemo.value_layers(pipe.unet, r"attn2\.to_v$"))
    assert len(everywhere) == 16 and everywhere[:7] == names
    with pytest.raises(ValueError, match="No linear layer"):
        nemo.value_layers(pipe.unet, "attn3")


@torch.no_grad()
def test_activations_are_those_that_the_unet_sees(pipe):
    embeds = encode_prompts(pipe, ["a cat on a car", "grapes"])
    values = nemo.activations(pipe, embeds)
    seen = {}
    handles = [
        layer.register_forward_hook(lambda layer, args, out, name=name: seen.update({name: out.abs().mean(1)}))
        for name, layer in nemo.value_layers(pipe.unet).items()
    ]
    pipe.unet(initial_latents(pipe, [0, 1]), 500, encoder_hidden_states=embeds)
    for handle in handles:
        handle.remove()
    for name, value in values.items():
        torch.testing.assert_close(value, seen[name])


@torch.no_grad()
def test_each_row_of_a_batch_blocks_its_own_neurons(pipe):
    layers = nemo.value_layers(pipe.unet)
    sets = torch.rand(3, sum(layer.out_features for layer in layers.values())) < 0.3
    embeds, noise = encode_prompts(pipe, ORDINARY[:3]), initial_latents(pipe, range(3))
    with nemo.blocked(layers, sets):
        together = pipe.unet(noise, 980, encoder_hidden_states=embeds).sample
    for i in range(3):
        parts = sets[i].split([layer.out_features for layer in layers.values()])
        masks = {f"{name}.weight": off[:, None] for name, off in zip(layers, parts, strict=True)}
        with applied(pipe, Edit("rows", model_hash(pipe), masks=masks)):
            alone = pipe.unet(noise[i : i + 1], 980, encoder_hidden_states=embeds[i : i + 1]).sample
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-5)
    assert not any(layer._forward_hooks for layer in layers.values())


@torch.no_grad()
def test_parts_give_what_was_recorded_without_running(pipe):
    unet, noise, embeds = pipe.unet, initial_latents(pipe, [0, 1]), encode_prompts(pipe, ["a cat", "grapes"])
    with nemo_search.recorded(nemo_search.parts(unet)) as outputs:
        expected = unet(noise, 500, encoder_hidden_states=embeds).sample
    order, outputs = zip(*outputs, strict=True)
    assert (
        len(order) == len(nemo_search.parts(unet)) >= 38
    )  # 22 residual blocks and 16 transformers, and what is between
    for count in (0, 2, 17, len(order)):
        with hooks.replayed(order[:count], outputs[:count]), nemo_search.recorded(order) as ran:
            torch.testing.assert_close(unet(noise, 500, encoder_hidden_states=embeds).sample, expected)
        assert all(ours is theirs for (_, ours), theirs in zip(ran[:count], outputs[:count], strict=True))
    assert not any("forward" in vars(part) for part in order)


@pytest.mark.slow
@pytest.mark.parametrize(  # from "selection gives up" to "a few neurons are enough"
    ("tau", "layers"),
    [(0.3, nemo.Config.layers), (0.45, nemo.Config.layers), (0.5, r"attn2\.to_v$"), (0.7, nemo.Config.layers)],
)
def test_the_result_is_that_of_one_set_after_the_other(memorizing, tau, layers):
    prompts = [SECRET, "a dog on a car", "striped grapes and a violin"]
    statistics, config = statistics_of(memorizing, tau), dataclasses.replace(CONFIG, layers=layers)
    edits = nemo.localize_each(memorizing, targets(*prompts), statistics, config, batch_size=7)
    for target, edit in zip(targets(*prompts), edits, strict=True):
        assert nemo.neurons(edit) == slow_localize(memorizing, target.prompt, statistics, config)
    one_by_one = nemo.localize_plainly(memorizing, targets(SECRET)[0], statistics, config)
    assert one_by_one.fingerprint() == edits[0].fingerprint()
    assert sum(edits[0].sparsity().values()) > 0


@pytest.mark.slow
def test_other_orders_are_those_of_one_set_after_the_other_too(memorizing):
    config, statistics = dataclasses.replace(CONFIG, rounds=40), statistics_of(memorizing, tau=0.35)
    prompts, found = [SECRET, "striped grapes and a violin"], {}
    for order in nemo.ORDERS:
        edits = nemo.localize_each(memorizing, targets(*prompts), statistics, config, order=order)
        for target, edit in zip(targets(*prompts), edits, strict=True):
            assert nemo.neurons(edit) == slow_localize(memorizing, target.prompt, statistics, config, order)
        found[order] = [edit.fingerprint() for edit in edits]
    assert len({tuple(prints) for prints in found.values()}) == 3  # they do end at other neurons
    with pytest.raises(ValueError, match="No order 'random'"):
        nemo.localize_each(memorizing, targets(SECRET), statistics, config, order="random")


def test_in_the_authors_order_the_strongest_come_last_and_strongest_first(sd1):
    statistics, embeds = statistics_of(sd1, 0.5), encode_prompts(sd1, ["a dog on a car"])
    config = dataclasses.replace(CONFIG, layers=PLANTED[0].replace(".", r"\."), rounds=4)
    rounds = nemo.candidates(sd1, embeds, statistics, config, "authors")
    (strength,) = nemo.activations(sd1, embeds, config.layers).values()
    strongest = strength[0].argsort(descending=True)[:3].tolist()
    others = [neuron for neuron in range(strength.shape[1]) if neuron not in strongest]
    assert rounds.turns[3].argsort().tolist() == others + strongest
    assert rounds.turns[0].argsort().tolist() == list(range(strength.shape[1]))  # k is 0


def test_an_order_is_a_case_of_its_own_and_the_usual_one_is_the_case_that_it_was(memorizing, tmp_path):
    statistics, store = statistics_of(memorizing, tau=0.5), Store(tmp_path)
    for options in ({}, {"order": "ascending"}, {"order": "descending"}):
        cached_edits(nemo.localize_each, memorizing, targets(SECRET), CONFIG, store, statistics=statistics, **options)
    cases = [json.loads(np.load(file)["__config__"].item()) for file in tmp_path.iterdir()]
    assert sorted("order" in case for case in cases) == [False, True]
    usual = next(case for case in cases if "order" not in case)
    assert usual.keys() == {"what", "dori_utils", "config", "pipe", "statistics", "target", "prompt"}
    assert (
        usual["pipe"].keys() == {"model", "scheduler", "latents", "tokens"}
        and usual["config"]["similarity"] == "cosine"
    )


@pytest.fixture
def falling_silent(memorizing, monkeypatch):
    """Adds one picture to any noise, as strongly as the planted neuron fires, and nothing without it. 48 px wide."""
    unet, (name, neuron) = memorizing.unet, PLANTED
    layer, side = unet.get_submodule(name), unet.config.sample_size
    picture = torch.rand(1, 4, 12, 12, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 2)
    picture = picture.repeat_interleave(4, 3)

    def forward(sample, t, encoder_hidden_states, **kwargs):
        strength = layer(encoder_hidden_states)[..., neuron].abs().sum(1)[:, None, None, None]
        changed = torch.where(strength > 0, sample + sample.flip(3) / 10 + strength * picture, sample)
        return type("Output", (), {"sample": changed})

    monkeypatch.setattr(unet, "forward", forward)
    unet.register_to_config(sample_size=48)
    yield memorizing
    unet.register_to_config(sample_size=side)


@pytest.mark.parametrize("similarity", ["ms_ssim", "ms_ssim_unit", "ssim", "cosine"])
def test_a_model_that_falls_silent_ends_the_search_and_is_no_error(falling_silent, similarity):
    config = dataclasses.replace(CONFIG, similarity=similarity)
    statistics = statistics_of(falling_silent, tau=0.5)
    edits = nemo.localize_each(falling_silent, targets(SECRET, "a dog"), statistics, config)
    for edit in edits:
        assert {layer: off for layer, off in nemo.neurons(edit).items() if off} == {PLANTED[0]: [PLANTED[1]]}
    alone = nemo.localize_plainly(falling_silent, targets(SECRET)[0], statistics, config)
    assert alone.fingerprint() == edits[0].fingerprint()


@pytest.mark.parametrize("similarity", ["ms_ssim", "cosine"])
def test_what_is_silent_from_the_start_is_not_memorized(falling_silent, similarity):
    config, statistics = dataclasses.replace(CONFIG, similarity=similarity), statistics_of(falling_silent, tau=0.5)
    unheard = torch.zeros_like(encode_prompts(falling_silent, [SECRET]))
    (edit,) = nemo.localize_each(falling_silent, targets(SECRET), statistics, config, prompt_embeds=unheard)
    assert not any(nemo.neurons(edit).values())


def unblocked(score, scores, seeds, margin=0.05, slopes=(0.0,) * 4):
    """Unblock four neurons one after the other: what stays blocked, which (blocked, seed) were tried, the decisions.

    score: (list of four, seed) → score of that set on that seed. scores: those of the seeds with all four blocked.
    """
    asked, reported, slopes = [], [], torch.tensor(slopes)
    chosen, groups = torch.ones(4, dtype=torch.bool), list(torch.arange(4).split(1))
    search = nemo_search._unblock(
        chosen,
        seeds,
        0.6,
        margin,
        lambda *args: reported.append(args),
        "neurons",
        chosen,
        torch.tensor(scores),
        slopes,
        groups,
    )
    request = next(search)
    try:
        while True:
            rows = list(zip(request.sets.tolist(), request.seeds, strict=True))
            asked += [(sum(off), seed) for off, seed in rows]
            request = search.send((torch.tensor([score(off, seed) for off, seed in rows]), slopes, 1))
    except StopIteration as end:
        return end.value[0].tolist(), asked, reported


def test_a_seed_far_below_tau_is_tried_at_the_end_alone():
    kept, asked, reported = unblocked(lambda off, seed: 0.58 if seed == 7 else 0.2, [0.2, 0.56], [3, 7])
    assert kept == [False] * 4 and asked == [(3, 7), (2, 7), (1, 7), (0, 7), (0, 3), (0, 7)] and len(reported) == 4


def test_a_seed_within_the_margin_is_watched_at_every_decision():
    kept, asked, _ = unblocked(lambda off, seed: 0.9 if seed == 3 and not off[1] else 0.58, [0.56, 0.57], [3, 7])
    assert kept == [False, True, False, False] and (2, 3) in asked and (2, 7) in asked


def test_search_goes_back_to_the_decision_that_an_unwatched_seed_is_against():
    def score(off, seed):
        return 0.9 if seed == 3 and not off[2] else 0.58

    kept, asked, reported = unblocked(score, [0.2, 0.58], [3, 7])
    assert kept == unblocked(score, [0.2, 0.58], [3, 7], margin=float("inf"))[0] == [False, False, True, False]
    assert asked.count((3, 7)) == 1  # what came before that decision is not tried again on the seed that was for it
    assert [args[2] < args[3] for args in reported] == [True, True, False, True]  # what was taken back is not reported


def test_a_set_that_is_guessed_to_be_well_below_tau_is_not_tried():
    rises = (0.01, 0.02, 0.03, 0.5)

    def score(off, seed):
        return 0.3 + sum(rise for rise, blocked in zip(rises, off, strict=True) if not blocked)

    kept, asked, reported = unblocked(score, [0.3], [3], slopes=rises)
    assert kept == [False, False, False, True] and asked == [
        (0, 3),
        (1, 3),
    ]  # the last decision, and all seeds at the end
    assert [round(args[2], 2) for args in reported] == [0.31, 0.33, 0.36, 0.86]


def test_a_set_that_was_not_tried_is_taken_back_if_its_guess_was_wrong():
    def score(off, seed):
        return 0.3 if off[1] else 0.9

    assert unblocked(score, [0.3], [3])[0] == [False, True, False, False]


def test_all_seeds_are_tried_after_some_decisions(monkeypatch):
    monkeypatch.setattr(nemo_search, "VERIFY_AFTER", 2)
    _, asked, _ = unblocked(lambda off, seed: 0.58 if seed == 7 else 0.15, [0.15, 0.58], [3, 7])
    assert [blocked for blocked, seed in asked if seed == 3] == [2, 0]


@torch.no_grad()
def test_a_planted_neuron_is_found_and_nothing_else(memorizing):
    secret, ordinary = nemo.localize_each(
        memorizing, targets(SECRET, "a dog on a car"), statistics_of(memorizing, tau=0.5), CONFIG
    )
    assert {layer: off for layer, off in nemo.neurons(secret).items() if off} == {PLANTED[0]: [PLANTED[1]]}
    assert not any(nemo.neurons(ordinary).values())
    assert first_step_pairs(memorizing, SECRET) > 0.7
    with applied(memorizing, secret):
        assert first_step_pairs(memorizing, SECRET) < 0.5


@torch.no_grad()
def test_an_embedding_takes_the_place_of_the_prompt(memorizing):
    embeds, statistics = encode_prompts(memorizing, [SECRET]), statistics_of(memorizing, tau=0.5)
    (edit,) = nemo.localize_each(memorizing, targets("a dog on a car"), statistics, CONFIG, prompt_embeds=embeds)
    assert {layer: off for layer, off in nemo.neurons(edit).items() if off} == {PLANTED[0]: [PLANTED[1]]}


def test_prompts_that_are_not_memorized_block_nothing(sd1):
    edits = nemo.localize_each(sd1, targets("a cat", "a dog"), statistics_of(sd1, tau=1.1), CONFIG)
    assert [sum(edit.sparsity().values()) for edit in edits] == [0, 0]
    assert all(len(edit.masks) == 7 for edit in edits)


def test_selection_goes_on_to_more_neurons_if_it_may(memorizing):
    seen = []
    longer = dataclasses.replace(CONFIG, rounds=19)
    nemo.localize_each(memorizing, targets(SECRET), statistics_of(memorizing, tau=0.05), longer, callback=seen.append)
    sizes = [d["blocked"] for d in seen if d["stage"] == "selection"]
    assert len(sizes) == 19 and sizes == sorted(sizes)  # theta stays at 1, k grows


@pytest.mark.slow
def test_a_set_blocks_what_any_of_its_targets_needs(memorizing):
    statistics, two = statistics_of(memorizing, tau=0.45), targets(SECRET, "a dog on a car")
    each, both = (f(memorizing, two, statistics, CONFIG) for f in (nemo.localize_each, nemo.localize))
    for name, mask in both.masks.items():
        assert torch.equal(mask, each[0].masks[name] | each[1].masks[name])
    assert both.targets == ("t0", "t1") and any(nemo.neurons(both).values())


def test_decisions_reach_the_callback_in_the_order_of_the_algorithm(memorizing):
    seen, stages = [], ["selection", "layers", "neurons"]
    (edit,) = nemo.localize_each(
        memorizing, targets(SECRET), statistics_of(memorizing, tau=0.5), CONFIG, callback=seen.append, progress=False
    )
    assert [d["stage"] for d in seen] == sorted((d["stage"] for d in seen), key=stages.index)
    assert {d["stage"] for d in seen} == set(stages) and {d["target"] for d in seen} == {"t0"}
    accepted = [d for d in seen if d["score"] < d["threshold"]]
    assert accepted[-1]["blocked"] == sum(map(len, nemo.neurons(edit).values())) == 1


def test_the_second_timestep_of_the_authors_code_is_an_option(memorizing):
    first = collect_statistics(memorizing, ORDINARY, CONFIG)
    second = collect_statistics(memorizing, ORDINARY, dataclasses.replace(CONFIG, second_timestep=True))
    assert first.tau != second.tau


def test_statistics_are_mean_and_spread_and_survive_the_disk(sd1, tmp_path):
    statistics = collect_statistics(sd1, ORDINARY, CONFIG, batch_size=4)
    layer = list(nemo.value_layers(sd1.unet))[2]
    values = torch.cat([nemo.activations(sd1, encode_prompts(sd1, [prompt]))[layer] for prompt in ORDINARY])
    torch.testing.assert_close(statistics.mean[layer], values.mean(dim=0))
    torch.testing.assert_close(statistics.std[layer], values.std(dim=0))
    assert len(statistics.mean) == 16  # also the layers that the paper leaves out
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = Statistics.load(tmp_path / "statistics.safetensors")
    assert (loaded.tau, loaded.model) == (statistics.tau, model_hash(sd1))
    assert all(torch.equal(loaded.std[name], value) for name, value in statistics.std.items())
    assert loaded.fingerprint() == statistics.fingerprint() != dataclasses.replace(loaded, tau=0.5).fingerprint()
    assert loaded.similarity == statistics.similarity == "cosine"


def test_tau_is_one_deviation_above_the_mean_of_ordinary_prompts(sd1):
    statistics = collect_statistics(sd1, ORDINARY, CONFIG)
    embeds, noise = encode_prompts(sd1, ORDINARY), initial_latents(sd1, CONFIG.seeds)
    scores = []
    for row in embeds:
        maps = first_step_change(sd1, row.expand(4, -1, -1), noise, torch.tensor(961))
        scores.append(pairwise_similarity(maps, "cosine").max())
    scores = torch.stack(scores)
    assert abs(statistics.tau - (scores.mean() + scores.std()).item()) < 1e-5


def test_statistics_of_another_model_are_refused(sd1, sd2):
    with pytest.raises(ValueError, match="statistics are of a model with the hash"):
        nemo.localize_each(sd2, targets("a cat"), statistics_of(sd1, 0.9), CONFIG)
    unknown = Statistics({}, {}, 0.9)
    with pytest.raises(ValueError, match="have no layer down_blocks.0"):
        nemo.localize_each(sd1, targets("a cat"), unknown, CONFIG)


def test_a_tau_is_used_with_its_own_similarity_alone(sd1, tmp_path):
    statistics, other = (
        collect_statistics(sd1, ORDINARY, CONFIG),
        dataclasses.replace(CONFIG, similarity="ssim"),
    )
    for search in (nemo.localize_each, lambda pipe, some, *rest: nemo.localize_plainly(pipe, some[0], *rest)):
        with pytest.raises(ValueError, match="similarity 'cosine', and config.similarity is 'ssim': a tau belongs to"):
            search(sd1, targets("a cat"), statistics, other)
    about = {"tau": repr(statistics.tau), "model": statistics.model}
    save_file(statistics.tensors(), tmp_path / "old.safetensors", metadata=about)  # as version 0.1.0 wrote it
    old = Statistics.load(tmp_path / "old.safetensors")
    assert (old.similarity, old.fingerprint()) == (None, statistics.fingerprint())
    nemo.localize_each(sd1, targets("a cat"), dataclasses.replace(old, tau=1.1), CONFIG)  # not known, so not refused


def test_the_published_tau_is_of_the_published_similarity(sd1, tmp_path):
    widths, path = [layer.out_features for layer in nemo.value_layers(sd1.unet).values()], tmp_path / "published.pt"
    torch.save(([torch.zeros(n) for n in widths], [torch.ones(n) for n in widths]), path)
    theirs = published_statistics(path, sd1.unet)
    assert (theirs.tau, theirs.similarity) == (0.428, nemo.Config().similarity) == (0.428, "ms_ssim")
    with pytest.raises(ValueError, match="is of the similarity 'ms_ssim', not of 'ms_ssim_unit': give a tau"):
        published_statistics(path, sd1.unet, similarity="ms_ssim_unit")
    ours = published_statistics(path, sd1.unet, similarity="cosine", tau=0.6)
    assert (ours.tau, ours.similarity) == (0.6, "cosine")
    with pytest.raises(ValueError, match="a tau belongs to one"):
        nemo.localize_each(sd1, targets("a cat"), theirs, CONFIG)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs the authors' statistics file")
def test_published_statistics_are_of_stable_diffusion_1_4(sd1):
    with torch.device("meta"):  # SD 1.4's own sizes without its weights
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    statistics = published_statistics(PUBLISHED, unet)
    widths = [len(mean) for mean in statistics.mean.values()]
    assert widths == [320, 320, 640, 640, 1280, 1280, 1280] and statistics.tau == 0.428
    assert list(statistics.mean)[-1] == "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    with pytest.raises(ValueError, match="this model's have"):
        published_statistics(PUBLISHED, sd1.unet)
