"""Wanda picks the weights that its formula says, on real U-Nets, for one target and for a set."""

import json

import numpy as np
import pytest
import torch

from dori_utils import wanda
from dori_utils.cached import cached_edits
from dori_utils.core.diffusion import denoise, encode_prompts, initial_latents
from dori_utils.core.edits import applied
from dori_utils.core.hashes import model_hash
from dori_utils.core.models import load_pipeline
from dori_utils.core.store import Store
from dori_utils.core.targets import Target

CONFIG = wanda.Config(sparsity=0.1, steps=3, num_inference_steps=6, guidance_scale=3.0, seeds=(0, 1))


def targets(*prompts):
    return [Target(f"t{i}", prompt, None, "VM", None) for i, prompt in enumerate(prompts)]


def inputs_of(pipe, prompt, name, config):
    """Raw inputs of a layer under the prompt: one list of (T, columns) arrays, over seeds, for each step."""
    layer, steps = pipe.unet.get_submodule(name), []
    handle = layer.register_forward_hook(lambda layer, args, output: steps.append(args[0][len(args[0]) // 2 :].numpy()))
    embeds = encode_prompts(pipe, [prompt] * len(config.seeds))
    noise = initial_latents(pipe, config.seeds)
    denoise(pipe, noise, embeds, num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale)
    handle.remove()
    return steps[: config.steps]


def slow_masks(pipe, prompts, name, config, tolerance=1e-4):
    """The definition, read out word by word: what the mask must have, and what it may have.

    They differ in weights whose score is nearly that of the last one taken or left, or that under the empty prompt.
    """
    weight = pipe.unet.get_submodule(name).weight.detach().numpy()
    empty_steps = inputs_of(pipe, "", name, config)
    prompt_steps = [inputs_of(pipe, prompt, name, config) for prompt in prompts]
    must, may = np.zeros((2, *weight.shape), dtype=bool)
    for step in range(config.steps):
        scores = []
        for inputs in (np.concatenate([steps[step] for steps in prompt_steps]), empty_steps[step]):
            rows = inputs.reshape(-1, weight.shape[1])
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            norms = np.linalg.norm(rows, axis=0) / len(rows) ** 0.5
            scores.append(np.abs(weight) * norms)
        for i, (score, score_empty) in enumerate(zip(*scores, strict=True)):
            order = np.argsort(score)
            taken = round(config.sparsity * len(score))
            last_taken, first_left = score[order[-taken]], score[order[-taken - 1]]
            more, less = score * (1 + tolerance), score * (1 - tolerance)
            must[i] |= (less > first_left) & (less > score_empty)
            may[i] |= (more > last_taken) & (more > score_empty)
    assert (must <= may).all() and (must != may).mean() < 0.01
    return must, may


def test_a_hand_made_layer_loses_what_the_formula_says():
    weight = torch.tensor([[1.1, -2.0, 3.0, 0.5], [4.0, 1.0, -1.0, 2.0]])
    norms = torch.tensor([[16.0, 4.0, 1.0, 0.0], [0.0, 0.0, 1.0, 25.0]])  # two steps; roots 4 2 1 0 and 0 0 1 5
    empty = torch.tensor([[1.0, 9.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    # Step 1, scores [4.4 4 3 0] and [16 2 1 0]: top halves {0, 1} and {0, 1}, but column 1 has more under "".
    # Step 2, scores [0 0 3 2.5] and [0 0 1 10]: top halves {2, 3} and {2, 3}.
    expected = torch.tensor([[True, False, True, True], [True, False, True, True]])
    assert torch.equal(wanda.pruning_mask(weight, norms, empty, sparsity=0.5), expected)
    assert not wanda.pruning_mask(weight, norms, empty, sparsity=0).any()
    assert torch.equal(wanda.pruning_mask(weight, norms[:1], empty[:1], sparsity=0.25).sum(1), torch.tensor([1, 1]))


def test_a_share_is_rounded_or_cut_off():
    weight, norms = torch.arange(1.0, 1281)[None], torch.ones(1, 1280)  # 1% of them are 12.8
    counts = [wanda.pruning_mask(weight, norms, 0 * norms, 0.01, **how).sum() for how in ({}, {"whole": int})]
    assert counts == [13, 12]


def authors_scores(pipe, prompt, name, config):
    """(K, rows, columns) float64: |W| times the norms of a layer's inputs, of both halves of each guided batch."""
    layer, steps = pipe.unet.get_submodule(name), []
    handle = layer.register_forward_hook(lambda layer, args, output: steps.append(args[0].double()))
    embeds, noise = encode_prompts(pipe, [prompt] * len(config.seeds)), initial_latents(pipe, config.seeds)
    denoise(pipe, noise, embeds, num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale)
    handle.remove()
    tokens = [torch.nn.functional.normalize(x.flatten(0, 1), dim=1) for x in steps[: config.steps]]
    return torch.stack([layer.weight.double().abs() * x.norm(dim=0) for x in tokens])


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "tiny_testbed"])
def test_the_authors_way_has_both_halves_of_guidance_and_cuts_off(name, request):
    pipe, layer = request.getfixturevalue(name), "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
    config = wanda.Config(sparsity=0.12, steps=3, num_inference_steps=6, guidance_scale=3.0, seeds=(0, 1))  # 7.7 of 64
    prompt = targets("a cat on a red car")
    ours, theirs = (wanda.localize_each(pipe, prompt, config, authors=authors)[0] for authors in (False, True))
    expected, sure = torch.zeros(16, 64, dtype=torch.bool), torch.ones(16, 64, dtype=torch.bool)
    scores, scores_empty = (authors_scores(pipe, text, layer, config) for text in ("a cat on a red car", ""))
    for score, score_empty in zip(scores, scores_empty, strict=True):
        order = score.sort(dim=1, descending=True).values
        least, next_one = order[:, [int(0.12 * 64) - 1]], order[:, [int(0.12 * 64)]]
        expected |= (score >= least) & (score > score_empty)
        near = [(score / limit - 1).abs() < 1e-5 for limit in (score_empty, (least + next_one) / 2)]
        sure &= ~(near[0] | near[1])
    assert sure.float().mean() > 0.9  # the others hang on the last bit
    mask = theirs.masks[f"{layer}.weight"]
    assert torch.equal(mask[sure], expected[sure]) and mask.any()
    assert not torch.equal(mask, ours.masks[f"{layer}.weight"])
    assert (ours.config["authors"], theirs.config["authors"]) == (False, True)


def test_the_authors_way_is_a_case_of_its_own_and_the_usual_one_is_the_case_that_it_was(sd1, tmp_path):
    store = Store(tmp_path)
    for options in ({}, {"authors": False}, {"authors": True}):
        cached_edits(wanda.localize_each, sd1, targets("a cat"), CONFIG, store, **options)
    cases = [json.loads(np.load(file)["__config__"].item()) for file in tmp_path.iterdir()]
    assert sorted("authors" in case for case in cases) == [False, True]
    settings = {"of", "sparsity", "steps", "num_inference_steps", "guidance_scale", "seeds", "layers"}
    assert all(case["config"].keys() == settings for case in cases)


def test_layers_are_the_sixteen_of_stable_diffusion(pipe):
    assert len(wanda.localized_layers(pipe.unet)) == 16


def test_the_mask_is_that_of_the_definition(pipe):
    name = "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
    (edit,) = wanda.localize_each(pipe, targets("a cat on a red car"), CONFIG, batch_size=1)
    must, may = slow_masks(pipe, ["a cat on a red car"], name, CONFIG)
    found = edit.masks[f"{name}.weight"].numpy()
    assert (must <= found).all() and (found <= may).all()
    assert 0 < edit.sparsity()[f"{name}.weight"] <= 0.3  # at most a tenth a step
    assert (edit.method, edit.targets, edit.model) == ("Wanda", ("t0",), model_hash(pipe))


@pytest.mark.slow
def test_a_set_is_pruned_for_all_its_prompts_together(sd1):
    name = "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.2"
    prompts = ["a cat", "a dog and grapes", "the violin"]
    edit = wanda.localize(sd1, targets(*prompts), CONFIG)
    found, (must, may) = edit.masks[f"{name}.weight"].numpy(), slow_masks(sd1, prompts, name, CONFIG)
    assert (must <= found).all() and (found <= may).all()
    assert edit.targets == ("t0", "t1", "t2")


def test_a_target_does_not_depend_on_its_neighbours(sd1):
    alone = wanda.localize_each(sd1, targets("a dog"), CONFIG)[0]
    among = wanda.localize_each(sd1, targets("a cat", "a dog", "grapes"), CONFIG, batch_size=4)[1]
    embeds = encode_prompts(sd1, ["a cat", "a dog"])
    norms, beside = (wanda.activation_norms(sd1, some, CONFIG) for some in (embeds[1:], embeds))
    for name, norm in norms.items():
        torch.testing.assert_close(beside[name][1], norm[0], rtol=1e-4, atol=1e-7)
    for name, mask in list(among.masks.items())[::5]:  # of each resolution one
        must, may = slow_masks(sd1, ["a dog"], name.removesuffix(".weight"), CONFIG)
        for found in (alone.masks[name].numpy(), mask.numpy()):
            assert (must <= found).all() and (found <= may).all(), name


def test_the_empty_prompt_loses_nothing(sd1):
    (edit,) = wanda.localize_each(sd1, targets(""), CONFIG)
    assert sum(edit.sparsity().values()) == 0


@pytest.mark.slow
def test_more_sparsity_prunes_more_and_the_output_changes(sd1):
    embeds, noise = encode_prompts(sd1, ["a cat"]), initial_latents(sd1, [0])
    norms = wanda.activation_norms(sd1, encode_prompts(sd1, ["a cat"]), CONFIG)
    assert {layer.shape[:2] for layer in norms.values()} == {(1, 3)}
    plain = denoise(sd1, noise, embeds, num_inference_steps=2)
    sizes = []
    for sparsity in (0.02, 0.1, 0.5):
        (edit,) = wanda.localize_each(sd1, targets("a cat"), wanda.Config(sparsity, 3, 6, 3.0, (0, 1)))
        sizes.append(sum(edit.sparsity().values()))
        with applied(sd1, edit):
            assert not torch.equal(denoise(sd1, noise, embeds, num_inference_steps=2), plain)
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]


def test_progress_reaches_the_callback_and_no_hook_stays(sd1):
    seen = []
    embeds = encode_prompts(sd1, ["a cat", "a dog"])
    wanda.activation_norms(sd1, embeds, CONFIG, batch_size=2, progress=False, callback=seen.append)
    assert seen == [{"prompts": 1, "of": 2}, {"prompts": 2, "of": 2}]
    assert not any(layer._forward_pre_hooks for layer in wanda.localized_layers(sd1.unet).values())


def test_bad_settings_are_refused(sd1):
    with pytest.raises(ValueError, match="sparsity is 3"):
        wanda.Config(sparsity=3)
    with pytest.raises(ValueError, match="steps is 60"):
        wanda.Config(steps=60)
    with pytest.raises(ValueError, match="No linear layer"):
        wanda.localized_layers(sd1.unet, r"\.no\.such$")


@pytest.mark.slow
def test_the_testbed_has_the_sixteen_layers_and_is_left_as_it_was():
    pipe = load_pipeline("testbed", device="cpu")
    before = model_hash(pipe)
    config = wanda.Config(sparsity=0.05, steps=2, num_inference_steps=25, guidance_scale=3.0)
    edit = wanda.localize(pipe, targets("an owl and a drum on a plain background"), config)
    assert len(edit.masks) == 16 and 0 < max(edit.sparsity().values()) <= 0.1
    assert model_hash(pipe) == before
