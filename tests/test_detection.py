"""Each detector against its definition, on tiny pipelines that predict noise and v; ROC numbers against counting."""

import copy

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dori_utils.core.diffusion import encode_prompts, initial_latents
from dori_utils.core.map_similarity import pairwise_similarity, rowwise_similarity
from dori_utils.core.roc import roc_auc, tpr_at_fpr
from dori_utils.detection import anisotropy, first_step_change, first_step_similarity, noise_magnitude

PROMPTS = ["a photo of a cat", "a dog on a striped background", "grapes and violin"]
QUIET = dict(progress=False)


def ddim(pipe, num_inference_steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def noise_by_way_of_x0(scheduler, output, t, x_t):
    """eps from diffusers' own estimate of x_0: (x_t - sqrt(a) x_0) / sqrt(1 - a); for v-prediction over sqrt(a)."""
    a = scheduler.alphas_cumprod[t]
    noise = (x_t - a.sqrt() * scheduler.step(output, t, x_t).pred_original_sample) / (1 - a).sqrt()
    return noise if scheduler.config.prediction_type == "epsilon" else noise / a.sqrt()


# Text-conditional noise magnitude


def test_a_model_that_predicts_something_else_is_refused(sd1):
    pipe = copy.copy(sd1)
    pipe.scheduler = copy.deepcopy(sd1.scheduler)
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="not 'sample'"):
        noise_magnitude(pipe, PROMPTS, **QUIET)


def test_detectors_tell_prompts_apart_where_nothing_but_noise_is_left(tiny_testbed):
    pipe = copy.copy(tiny_testbed)
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **zero)
    for scores in (
        noise_magnitude(pipe, PROMPTS, seeds=[0, 1], **QUIET),
        first_step_similarity(pipe, PROMPTS, seeds=[0, 1], pairwise="cosine", **QUIET),
        anisotropy(pipe, PROMPTS, seeds=[0, 1], **QUIET),
    ):
        assert np.isfinite(scores).all() and len(set(scores.round(6))) == 3 and (scores != 0).all()


@torch.no_grad()
def test_noise_magnitude_is_the_mean_norm_along_diffusers_own_guided_path(pipe):
    steps, scheduler = 3, ddim(pipe, 5)
    embeds, uncond = encode_prompts(pipe, PROMPTS[:1]), encode_prompts(pipe, [""])
    visited = [initial_latents(pipe, [7])]
    diffusers_pipe = type(pipe)(**(pipe.components | {"scheduler": ddim(pipe, 5)}), requires_safety_checker=False)
    diffusers_pipe.set_progress_bar_config(disable=True)
    diffusers_pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=uncond,
        latents=visited[0],
        num_inference_steps=5,
        guidance_scale=4.0,
        output_type="latent",
        callback_on_step_end=lambda *args: visited.append(args[3]["latents"].clone()) or {},
    )
    norms = []
    for t, x_t in zip(scheduler.timesteps[:steps], visited[:steps], strict=True):
        outputs = [pipe.unet(x_t, t, encoder_hidden_states=y).sample for y in (embeds, uncond)]
        text, empty = (noise_by_way_of_x0(scheduler, output, t, x_t) for output in outputs)
        norms.append((text - empty).norm())
    settings = dict(seeds=[7], steps=steps, num_inference_steps=5, guidance_scale=4.0)
    found = noise_magnitude(pipe, PROMPTS[:1], **settings, **QUIET)
    np.testing.assert_allclose(found, [torch.stack(norms).mean()], rtol=1e-3)


def test_noise_magnitude_of_the_empty_prompt_is_zero_and_of_others_is_not(tiny_testbed):
    scores = noise_magnitude(tiny_testbed, ["", "a cat"], **QUIET)
    assert scores.dtype == np.float32 and scores.shape == (2,)
    assert scores[0] < 1e-4 * scores[1] and scores[1] > 1e-4  # not 0: both halves of a batch need not be rounded alike


def test_more_steps_than_the_schedule_has_are_refused(sd1):
    with pytest.raises(ValueError, match="between 1 and 5"):
        noise_magnitude(sd1, PROMPTS, steps=6, num_inference_steps=5, **QUIET)


@pytest.mark.parametrize(
    ("detector", "settings"),
    [
        (noise_magnitude, dict(steps=2, num_inference_steps=4)),
        (first_step_similarity, dict(pairwise="cosine")),
        (anisotropy, dict(weight=5.0)),
    ],
)
def test_scores_are_the_mean_or_maximum_over_their_own_seeds_at_any_batch_size(sd1, detector, settings):
    settings = settings | dict(seeds=[3, 1, 4]) | QUIET
    together = detector(sd1, PROMPTS, batch_size=16, **settings)
    np.testing.assert_allclose(together, detector(sd1, PROMPTS, batch_size=2, **settings), rtol=1e-4)
    alone = [detector(sd1, [prompt], batch_size=1, **settings)[0] for prompt in PROMPTS]
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    assert len(set(together.round(6))) == 3


def test_detectors_leave_the_pipeline_s_scheduler_alone(sd1):
    before = copy.deepcopy(sd1.scheduler.__dict__)
    noise_magnitude(sd1, PROMPTS[:1], seeds=[0], steps=2, **QUIET)
    first_step_similarity(sd1, PROMPTS[:1], seeds=[0, 1], pairwise="cosine", **QUIET)
    assert str(sd1.scheduler.__dict__) == str(before)


def test_nan_in_the_weights_is_an_error_with_the_prompt_s_number(sd1):
    bias = sd1.unet.conv_out.bias
    with torch.no_grad():
        kept = bias.clone()
        try:
            bias[0] = float("nan")
            with pytest.raises(FloatingPointError, match=r"prompts \[0, 1\]"):
                noise_magnitude(sd1, PROMPTS[:2], seeds=[0], **QUIET)
        finally:
            bias.copy_(kept)


# Anisotropy


@torch.no_grad()
def test_anisotropy_is_the_norm_at_the_first_timestep_and_the_cosine_at_the_third_from_the_end(pipe):
    scheduler, x_t = ddim(pipe, 50), initial_latents(pipe, [7])
    embeds, uncond = encode_prompts(pipe, PROMPTS[:1]), encode_prompts(pipe, [""])
    answers = [
        [pipe.unet(x_t, t, encoder_hidden_states=y).sample[0] for y in (embeds, uncond)]
        for t in (scheduler.timesteps[0], scheduler.timesteps[47])
    ]
    (text, empty), (low_text, low_empty) = answers
    cosines = []
    for row in range(8):
        for column in range(8):  # of each pixel's channels
            guidance, base = (low_text - low_empty)[:, row, column], low_empty[:, row, column]
            cosines.append(guidance @ base / (guidance.norm() * base.norm()))
    for weight in (0.0, 2.0, 100.0):
        found = anisotropy(pipe, PROMPTS[:1], seeds=[7], weight=weight, **QUIET)
        expected = (text - empty).norm() + weight * torch.stack(cosines).mean()
        np.testing.assert_allclose(found, [expected], rtol=1e-3, atol=1e-3)


def test_without_weight_anisotropy_is_noise_magnitude_and_asks_four_rows_of_the_unet(tiny_testbed):
    rows = []
    handle = tiny_testbed.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        found = anisotropy(tiny_testbed, PROMPTS, seeds=[0, 1], weight=0.0, **QUIET)
    finally:
        handle.remove()
    assert sum(rows) == 4 * len(PROMPTS) * 2
    magnitude = noise_magnitude(tiny_testbed, PROMPTS, seeds=[0, 1], num_inference_steps=50, **QUIET)
    np.testing.assert_allclose(found, magnitude, rtol=1e-5)


def test_anisotropy_needs_a_third_timestep_from_the_end(sd1):
    with pytest.raises(ValueError, match="num_inference_steps is 2"):
        anisotropy(sd1, PROMPTS, num_inference_steps=2, **QUIET)


# First-step similarity


@torch.no_grad()
def test_first_step_change_is_nemo_s_delta_scaled_by_channel(pipe):
    scheduler = ddim(pipe, 50)
    t, x_t, embeds = scheduler.timesteps[0], initial_latents(pipe, [0, 1]), encode_prompts(pipe, PROMPTS[:2])
    output = pipe.unet(x_t, t, encoder_hidden_states=embeds).sample.double()
    delta = predicted_noise_in_float64(scheduler, output, t, x_t.double()) - x_t
    low, high = delta.amin((2, 3), keepdim=True), delta.amax((2, 3), keepdim=True)
    found = first_step_change(pipe, embeds, x_t, t)
    assert found.amin((2, 3)).eq(0).all() and found.amax((2, 3)).eq(1).all()
    torch.testing.assert_close(found, ((delta - low) / (high - low)).float(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_that_changes_nothing_has_a_flat_change_and_not_nan(sd1, monkeypatch):
    x_t, embeds = initial_latents(sd1, [0, 1]), encode_prompts(sd1, PROMPTS[:2])
    whole = first_step_change(sd1, embeds, x_t, 981)
    answer = sd1.unet.forward

    def forward(sample, t, encoder_hidden_states, **kwargs):
        output = answer(sample, t, encoder_hidden_states, **kwargs)
        output.sample[0], output.sample[1, 2] = sample[0], sample[1, 2]  # all of one map, a channel of the other
        return output

    monkeypatch.setattr(sd1.unet, "forward", forward)
    maps = first_step_change(sd1, embeds, x_t, 981)
    assert maps[0].eq(0).all() and maps[1, 2].eq(0).all()
    assert torch.equal(maps[1, [0, 1, 3]], whole[1, [0, 1, 3]])


def predicted_noise_in_float64(scheduler, output, t, x_t):
    a = scheduler.alphas_cumprod[t].double()
    return output if scheduler.config.prediction_type == "epsilon" else a.sqrt() * output + (1 - a).sqrt() * x_t


@torch.no_grad()
def test_at_zero_signal_a_v_model_s_change_is_v_itself(tiny_testbed):
    from diffusers import DDIMScheduler

    pipe = copy.copy(tiny_testbed)
    pipe.scheduler = DDIMScheduler.from_config(tiny_testbed.scheduler.config, rescale_betas_zero_snr=True)
    assert pipe.scheduler.alphas_cumprod[999] < 1e-12  # where eps - x_T is nothing but rounding
    x_t, embeds = initial_latents(pipe, [0]), encode_prompts(pipe, PROMPTS[:1])
    v = pipe.unet(x_t, 999, encoder_hidden_states=embeds).sample
    low, high = v.amin((2, 3), keepdim=True), v.amax((2, 3), keepdim=True)
    torch.testing.assert_close(first_step_change(pipe, embeds, x_t, 999), (v - low) / (high - low))


def test_a_prompt_that_always_gives_the_same_picture_has_similarity_one(tiny_testbed, monkeypatch):
    same = torch.rand(1, 4, 8, 8)
    pull = tiny_testbed.unet.forward

    def forward(sample, t, encoder_hidden_states, **kwargs):
        output = pull(sample, t, encoder_hidden_states, **kwargs)
        a = tiny_testbed.scheduler.alphas_cumprod[999]
        output.sample = 5 * same + a.sqrt() / (1 + (1 - a).sqrt()) * sample  # v of a model that knows one picture
        return output

    ordinary = first_step_similarity(tiny_testbed, PROMPTS[:1], seeds=range(4), pairwise="cosine", **QUIET)
    monkeypatch.setattr(tiny_testbed.unet, "forward", forward)
    memorized = first_step_similarity(tiny_testbed, PROMPTS[:1], seeds=range(4), pairwise="cosine", **QUIET)
    assert memorized == pytest.approx(1, abs=1e-4)
    assert ordinary < 0.9


def test_the_score_is_the_most_similar_pair(sd1):
    t = ddim(sd1, 50).timesteps[0]
    noise, embeds = initial_latents(sd1, range(3)), encode_prompts(sd1, PROMPTS[:1])
    with torch.no_grad():
        maps = first_step_change(sd1, embeds.expand(3, -1, -1), noise, t)
    best = max(np.corrcoef(*(centred(maps[i]) for i in pair))[0, 1] for pair in ((0, 1), (0, 2), (1, 2)))
    found = first_step_similarity(sd1, PROMPTS[:1], seeds=range(3), pairwise="cosine", **QUIET)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [best], atol=1e-5)


def centred(tensor):
    return (tensor - tensor.mean((1, 2), keepdim=True)).flatten().numpy()


@pytest.mark.parametrize(("kind", "side"), [("cosine", 8), ("ssim", 16), ("ms_ssim", 44), ("ms_ssim_unit", 44)])
def test_pairs_are_compared_in_order_and_equal_maps_are_one(kind, side):
    torch.manual_seed(0)
    a, b = torch.rand(2, 4, side, side)
    similarities = pairwise_similarity(torch.stack([a, b, a]), kind)  # pairs (a, b), (a, a), (b, a)
    assert similarities.shape == (3,)
    torch.testing.assert_close(similarities[1], torch.tensor(1.0))
    torch.testing.assert_close(similarities[0], similarities[2])
    assert similarities[0] < 0.2


def test_ssim_of_constant_maps_is_its_formula():
    # Constant maps have no variance: SSIM = (2 x y + C1) / (x^2 + y^2 + C1), C1 = 0.01^2 (Wang et al., 2004).
    maps = torch.stack([torch.full((4, 16, 16), 0.2), torch.full((4, 16, 16), 0.6)])
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert pairwise_similarity(maps, "ssim").item() == pytest.approx(expected, abs=1e-4)


def ms_ssim_by_formula(a, b, exponent, value_range=None):
    """Wang et al. (2003) in float64 for maps (B, C, H, W): contrast and structure at the first two scales, the whole
    SSIM at the third. Without a range, that of all the values at hand."""
    a, b, result = a.double().numpy(), b.double().numpy(), 1

    def blurred(x):  # a Gaussian window of 11 px
        return gaussian_filter(x, 1.5, radius=5, mode="mirror", axes=(2, 3))

    for scale in range(3):
        spread = max(np.ptp(a), np.ptp(b)) if value_range is None else value_range
        c1, c2 = (0.01 * spread) ** 2, (0.03 * spread) ** 2
        mean_a, mean_b = blurred(a), blurred(b)
        variances = blurred(a * a) - mean_a**2 + blurred(b * b) - mean_b**2
        structure = (2 * (blurred(a * b) - mean_a * mean_b) + c2) / (variances + c2)
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        of_scale = luminance * structure if scale == 2 else structure[..., 5:-5, 5:-5]  # where the window is inside
        result = result * np.maximum(of_scale.mean((1, 2, 3)), 0) ** exponent
        a, b = (x.reshape(*x.shape[:2], x.shape[2] // 2, 2, -1, 2).mean((3, 5)) for x in (a, b))
    return result


def maps_of_unlike_contrast():
    """Four maps that share a picture, the first two faintly and under a chessboard, which is gone at the next scale."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(4, 12, 12, generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    chessboard = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(24, 24)
    own = torch.rand(4, 4, 48, 48, generator=generator)
    faint = 0.9 * chessboard + 0.05 * picture + 0.05 * own[:2]
    return torch.cat([faint, 0.8 * picture + 0.2 * own[2:]])


def test_ms_ssim_is_that_of_nemo_s_code_and_takes_its_range_from_all_pairs():
    maps = maps_of_unlike_contrast()
    first, second = torch.combinations(torch.arange(4)).T
    expected = ms_ssim_by_formula(maps[first], maps[second], 0.33)
    np.testing.assert_allclose(pairwise_similarity(maps, "ms_ssim"), expected, atol=1e-4)
    alone = [ms_ssim_by_formula(maps[i][None], maps[j][None], 0.33)[0] for i, j in torch.combinations(torch.arange(4))]
    assert np.abs(expected - alone).max() > 0.01  # it is not the same
    np.testing.assert_allclose(rowwise_similarity(maps[first], maps[second], "ms_ssim"), alone, atol=1e-4)


def test_ms_ssim_unit_is_the_formula_with_the_maps_own_range():
    maps = maps_of_unlike_contrast()
    first, second = torch.combinations(torch.arange(4)).T
    expected = ms_ssim_by_formula(maps[first], maps[second], 1 / 3, value_range=1)
    np.testing.assert_allclose(pairwise_similarity(maps, "ms_ssim_unit"), expected, atol=1e-4)
    assert (
        np.abs(expected - ms_ssim_by_formula(maps[first], maps[second], 0.33)).max() > 0.002
    )  # it is not the authors'


@pytest.mark.parametrize("kind", ["ssim", "ms_ssim", "ms_ssim_unit", "cosine"])
def test_a_row_s_similarity_does_not_depend_on_the_rows_beside_it(kind):
    maps = maps_of_unlike_contrast()
    together = rowwise_similarity(maps, maps.flip(0), kind)
    alone = [rowwise_similarity(maps[[i]], maps[[3 - i]], kind) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


# With a range of 0 torchmetrics says 1, 0 or NaN, as the value is rounded. Our own flat maps are of zeros.
@pytest.mark.parametrize(
    ("kind", "value"), [("ms_ssim", 0.0), ("ms_ssim", 0.1), ("ms_ssim", 1 / 3), ("ms_ssim", 1.0), ("cosine", 0.0)]
)
def test_flat_maps_show_nothing_that_is_alike(kind, value):
    flat = torch.full((2, 4, 48, 48), value, requires_grad=True)
    for similarity in (pairwise_similarity(flat, kind), rowwise_similarity(flat, flat.detach(), kind)):
        assert similarity.abs().max() < 1e-6
        (gradient,) = torch.autograd.grad(similarity.sum(), flat)
        assert gradient.isfinite().all()
    picture = maps_of_unlike_contrast()[[3]]
    for others in (flat[:1], picture):
        assert rowwise_similarity(picture, others, kind).isfinite().all()
    assert rowwise_similarity(picture, flat[:1], kind).item() < 0.4
    mixed = pairwise_similarity(torch.cat([flat, picture, picture]), kind)  # pairs 01 02 03 12 13 23
    assert mixed[0].abs() < 1e-6 and mixed[5].item() == pytest.approx(1, abs=1e-4) and mixed.isfinite().all()


@pytest.mark.parametrize(("kind", "smallest"), [("ssim", 11), ("ms_ssim", 44), ("ms_ssim_unit", 44), ("cosine", 1)])
def test_the_smallest_maps_that_are_let_through_can_be_compared(kind, smallest):
    shapes = [(2, 4, smallest, smallest + 4), (2, 4, smallest + 4, smallest)]
    assert all(pairwise_similarity(torch.rand(shape), kind).isfinite().all() for shape in shapes)
    for shape in [] if smallest == 1 else [(2, 4, smallest - 1, 64), (2, 4, 64, smallest - 1)]:
        with pytest.raises(ValueError, match=f"'{kind}' needs latents of at least {smallest} px"):
            pairwise_similarity(torch.rand(shape), kind)


@pytest.mark.parametrize(
    ("maps", "kind", "message"),
    [
        (torch.rand(2, 4, 8, 8), "ssim", "at least 11 px"),
        (torch.rand(2, 4, 32, 32), "ms_ssim", "at least 44 px"),
        (torch.rand(1, 4, 16, 16), "ssim", "two seeds"),
        (torch.rand(2, 4, 16, 16), "lpips", "ssim, ms_ssim, ms_ssim_unit, cosine"),
    ],
)
def test_maps_that_cannot_be_compared_are_refused(maps, kind, message):
    with pytest.raises(ValueError, match=message):
        pairwise_similarity(maps, kind)


# Seed diversity


# ROC


def test_auc_is_the_share_of_pairs_that_are_in_order():
    found = roc_auc([3, 2, 1], [2, 0, 0, 0])  # of 12 pairs 10 in order, 1 tied, 1 reversed
    assert found.auc == pytest.approx(10.5 / 12)
    assert (found.positives, found.negatives) == (3, 4)
    assert found.low < found.auc < found.high
    assert roc_auc([0, 0], [1, 1]).auc == 0  # higher means memorized: the other way round is wrong, not mirrored


def test_the_interval_of_auc_is_the_bootstrap_over_both_groups():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    pos, neg = rng.normal(1, 1, 40), rng.normal(0, 1, 60)
    labels = np.repeat([1, 0], [40, 60])
    drawn = [roc_auc_score(labels, np.concatenate([rng.choice(pos, 40), rng.choice(neg, 60)])) for _ in range(300)]
    found = roc_auc(pos, neg)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.025)
    assert found == roc_auc(pos, neg)


def test_perfect_separation_is_not_certainty():
    # Newcombe (2006), method 5: at AUC 1, 1 - theta = z^2 theta (1 + 63 (...)) / 64^2 has the root 0.9703.
    found = roc_auc(np.arange(64) + 100, np.arange(64))
    assert (found.auc, found.high) == (1, 1)
    theta = found.low
    spread = 1 + 63 * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    assert 1 - theta == pytest.approx(1.96**2 * theta * spread / 64**2, rel=1e-3)
    assert 0.96 < theta < 0.98
    assert roc_auc([2, 3], [0, 1]).low < theta  # few prompts know less
    assert (roc_auc(np.arange(64), np.arange(64) + 100).low, found.low) == (0, pytest.approx(theta))


def test_tpr_at_fpr_allows_only_so_many_false_alarms():
    neg = np.arange(100)
    pos = [98.5, 97.5, 95.5, 94.5, 50]  # above all but 1, 2, 4, 5 and 49 of the hundred
    assert tpr_at_fpr(pos, neg, 0.01) == 1 / 5
    assert tpr_at_fpr(pos, neg, 0.05) == 4 / 5
    assert tpr_at_fpr(pos, neg[:50], 0.01) == 1  # not one false alarm allowed, and none needed


def test_scores_with_nan_or_an_empty_group_have_no_curve():
    for pos, neg in (([1, np.nan], [0]), ([], [0])):
        with pytest.raises(ValueError, match="ROC"):
            roc_auc(pos, neg)
        with pytest.raises(ValueError, match="ROC"):
            tpr_at_fpr(pos, neg)
