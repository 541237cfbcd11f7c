"""Erasure: each loss is its paper's, each method moves what it should and leaves the pipeline as it was."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from PIL import Image

from dori_utils.core.diffusion import denoise, denoising_loss, encode_images, encode_prompts, latent_size
from dori_utils.core.edits import applied
from dori_utils.core.generation import generate
from dori_utils.core.hashes import model_hash
from dori_utils.core.models import load_pipeline
from dori_utils.core.sscd import load_sscd
from dori_utils.core.targets import Target
from dori_utils.core.training import weights_in_training
from dori_utils.erasure.concept_ablation import AblationConfig, concept_ablation, select_anchors
from dori_utils.erasure.esd import ESDConfig, esd, guided_away
from dori_utils.erasure.siss import SISSConfig, importance_weights, siss, subtracted

TARGETS = [
    Target("VM-0", "a cat on a red car", Image.new("RGB", (16, 16), "navy"), "VM"),
    Target("VM-1", "the violin and grapes", Image.linear_gradient("L").resize((16, 16)).convert("RGB"), "VM"),
]
ANCHORS = [["a dog"], ["a guitar", "the photo of a dog"]]
OTHER = "a striped background"
ORDINARY = [
    (Image.new("RGB", (16, 16), "gold"), TARGETS[0].prompt),  # another image of the target's prompt
    (Image.radial_gradient("L").resize((16, 16)).convert("RGB"), OTHER),
]
ESD = ESDConfig(steps=2, batch_size=2, lr=1e-3, num_inference_steps=4)
ABLATION = AblationConfig(steps=2, batch_size=4, lr=1e-3, images=2, num_inference_steps=2)
SISS = SISSConfig(steps=2, batch_size=4, lr=1e-3, first_timestep=900)
CONFIGS = {"ESD": ESD, "concept ablation": ABLATION, "SISS": SISS}
METHODS = {
    "ESD": lambda pipe, targets=TARGETS, config=ESD, **options: esd(pipe, targets, config, **options),
    "concept ablation": lambda pipe, targets=TARGETS, config=ABLATION, **options: concept_ablation(
        pipe, targets, ANCHORS[: len(targets)], config, **options
    ),
    "SISS": lambda pipe, targets=TARGETS, config=SISS, **options: siss(pipe, targets, ORDINARY, config, **options),
}
each_method = pytest.mark.parametrize("method", METHODS)


class Killed(Exception):
    """Stands for a killed process."""


def killed_after(step):
    def callback(numbers):
        if numbers["step"] == step:
            raise Killed

    return callback


def logged(method, pipe, **kwargs):
    """What a run tells its callback, step by step, and its edit."""
    steps = []
    edit = METHODS[method](pipe, progress=False, callback=steps.append, **kwargs)
    return steps, edit


def first_generator(config):
    return torch.Generator().manual_seed(config.seed * 1_000_003)


def predict(pipe, noisy, timesteps, prompts):
    return pipe.unet(noisy, timesteps, encode_prompts(pipe, prompts)).sample


def random_noisy(pipe, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn((rows, 4, *latent_size(pipe)), generator=generator)
    return noisy, torch.linspace(20, 980, rows).long()


# --- What all three do ---


@each_method
def test_the_pipeline_is_left_as_it_was_also_after_an_exception(pipe, method):
    before, flags = model_hash(pipe), [p.requires_grad for p in pipe.unet.parameters()]
    edit = METHODS[method](pipe, progress=False)
    assert (edit.method, edit.targets, edit.model) == (method, ("VM-0", "VM-1"), before)
    with applied(pipe, edit):
        assert model_hash(pipe) != before
    with pytest.raises(Killed):
        METHODS[method](pipe, progress=False, callback=killed_after(1))
    assert model_hash(pipe) == before and [p.requires_grad for p in pipe.unet.parameters()] == flags


@pytest.mark.slow
@each_method
def test_a_killed_run_goes_on_to_the_same_weights(sd1, method, tmp_path):
    config = replace(CONFIGS[method], steps=3, batch_size=2)
    whole = METHODS[method](sd1, config=config, progress=False)
    with pytest.raises(Killed):
        METHODS[method](sd1, config=config, work=tmp_path, save_seconds=0, progress=False, callback=killed_after(0))
    steps, resumed = logged(method, sd1, config=config, work=tmp_path)
    assert [numbers["step"] for numbers in steps] == [1, 2]
    for name, delta in whole.deltas.items():
        torch.testing.assert_close(resumed.deltas[name], delta, rtol=0, atol=1e-5)


@each_method
def test_another_seed_gives_other_weights(sd1, method):
    config = replace(CONFIGS[method], steps=1, batch_size=2)
    edit, other = [METHODS[method](sd1, config=replace(config, seed=seed), progress=False) for seed in (0, 1)]
    assert any((edit.deltas[name] != delta).any() for name, delta in other.deltas.items())


@each_method
def test_half_precision_and_no_targets_are_refused(sd1_folder, sd1, method):
    half = load_pipeline(sd1_folder, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        METHODS[method](half, progress=False)
    with pytest.raises(ValueError, match="No targets"):
        METHODS[method](sd1, targets=[], progress=False)


# --- ESD ---


@pytest.mark.parametrize("variant, cross", [("x", True), ("u", False)])
def test_esd_x_moves_cross_attention_and_esd_u_all_the_rest(pipe, variant, cross):
    edit = esd(pipe, TARGETS, replace(ESD, variant=variant), progress=False)
    names = {name for name, _ in pipe.unet.named_parameters() if (".attn2." in name) == cross}
    # The middle block attends over a single position here: its attention is 1 whatever queries and keys are, so they
    # have no gradient, and rounding alone, which is each processor's own, may move them.
    idle = {f"mid_block.attentions.0.transformer_blocks.0.attn1.{part}.weight" for part in ("to_q", "to_k")}
    assert names - idle and names - idle <= set(edit.deltas) <= names


def esd_loss(pipe, student_edit, generator, chosen, config):
    """Eq. 6, word by word: latents and prediction of the student, the rest of the original."""
    prompts = [TARGETS[i].prompt for i in chosen]
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(config.num_inference_steps)
    stop = torch.randint(len(scheduler.timesteps), (), generator=generator)
    noise = torch.randn((len(chosen), 4, *latent_size(pipe)), generator=generator)
    settings = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    with torch.no_grad():
        with applied(pipe, student_edit):
            x_t = denoise(pipe, noise, encode_prompts(pipe, prompts), stop_after=stop, **settings)
            student = predict(pipe, x_t, scheduler.timesteps[stop], prompts)
        unconditional = predict(pipe, x_t, scheduler.timesteps[stop], [""] * len(chosen))
        conditional = predict(pipe, x_t, scheduler.timesteps[stop], prompts)
    wanted = unconditional - config.eta * (conditional - unconditional)
    return ((student - wanted) ** 2).mean().item(), scheduler.timesteps[stop].item()


def test_esd_draws_and_trains_with_the_model_as_it_is_and_is_taught_by_the_original(pipe):
    config = replace(ESD, eta=2.0, lr=0.01, num_inference_steps=6)
    steps, _ = logged("ESD", pipe, config=config)
    after_one = esd(pipe, TARGETS, replace(config, steps=1), progress=False)
    rng = np.random.default_rng(0)
    for numbers, student in zip(steps, (None, after_one), strict=True):
        generator = torch.Generator().manual_seed(numbers["step"])
        loss, timestep = esd_loss(pipe, student, generator, rng.permutation(2), config)
        assert numbers["loss"] == pytest.approx(loss, rel=1e-4)
        assert numbers["timestep"] == timestep


def test_eq_6_reads_the_same_for_v_as_for_noise(sd2):
    abar = sd2.scheduler.alphas_cumprod[700]
    x_t, v_uncond, v_cond = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def to_noise(v):  # Salimans and Ho (2022)
        return abar.sqrt() * v + (1 - abar).sqrt() * x_t

    of_noise = guided_away(to_noise(v_uncond), to_noise(v_cond), eta=1.7)
    torch.testing.assert_close(to_noise(guided_away(v_uncond, v_cond, eta=1.7)), of_noise)


def test_esd_brings_the_prompt_near_its_opposite_and_moves_another_less(tiny_testbed):
    noisy, timesteps = random_noisy(tiny_testbed, 8)

    def predictions():
        with torch.no_grad():
            return [predict(tiny_testbed, noisy, timesteps, [p] * 8) for p in (TARGETS[0].prompt, OTHER, "")]

    before, other_before, unconditional = predictions()
    wanted = guided_away(unconditional, before, eta=1.0)
    config = replace(ESD, steps=15, num_inference_steps=2)
    with applied(tiny_testbed, esd(tiny_testbed, TARGETS[:1], config, progress=False)):
        after, other_after, _ = predictions()
    assert (after - wanted).norm() < 0.7 * (before - wanted).norm()
    assert (other_after - other_before).norm() < 0.95 * (after - before).norm()


def test_a_sampler_that_adds_noise_takes_it_from_the_seed(sd1_folder):
    pipe = load_pipeline(sd1_folder, device="cpu")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    edits = [esd(pipe, TARGETS, replace(ESD, steps=1, num_inference_steps=6), progress=False) for _ in range(2)]
    assert edits[0].fingerprint() == edits[1].fingerprint()


def test_a_sampler_with_latents_of_its_own_scale_is_refused(sd1_folder):
    pipe = load_pipeline(sd1_folder, device="cpu")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler.*sampler like DDIM"):
        esd(pipe, TARGETS, ESD, progress=False)


# --- Concept ablation ---


def ablation_terms(pipe, config):
    """Both terms of the loss of the first step, written plainly, with gradients; its four rows are all images."""
    prompts = [TARGETS[0].prompt] * 2 + [TARGETS[1].prompt] * 2  # two images of one anchor, one of each of two
    anchors = ["a dog", "a dog", "a guitar", "the photo of a dog"]
    settings = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    images = [image for own in generate(pipe, ["a dog"], seeds=[0, 1], progress=False, **settings) for image in own]
    images += [image for (image,) in generate(pipe, anchors[2:], seeds=[0], progress=False, **settings)]
    order = np.random.default_rng(config.seed).permutation(4)
    clean, generator = encode_images(pipe, [images[i] for i in order]), first_generator(config)
    c_star, c = [encode_prompts(pipe, [texts[i] for i in order]) for texts in (prompts, anchors)]
    draws = []
    for _ in range(2):
        noise = torch.randn(clean.shape, generator=generator)
        draws.append((noise, torch.randint(1000, (4,), generator=generator)))
    noise, timesteps = draws[0]
    abar = pipe.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    x_t = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    wanted = pipe.unet(x_t, timesteps, c).sample.detach()
    ablation = ((pipe.unet(x_t, timesteps, c_star).sample - wanted) ** 2).mean()
    return ablation, denoising_loss(pipe, clean, c, *draws[1]).mean()


def test_the_first_step_of_ablation_is_one_of_adamw_on_its_loss(sd2):
    config = replace(ABLATION, steps=1, regularization=0.3)
    (numbers,), edit = logged("concept ablation", sd2, config=config)
    with weights_in_training(sd2) as changed:
        ablation, anchor = ablation_terms(sd2, config)
        (ablation + 0.3 * anchor).backward()
        torch.nn.utils.clip_grad_norm_(sd2.unet.parameters(), 1.0)
        torch.optim.AdamW(sd2.unet.parameters(), lr=config.lr, weight_decay=config.weight_decay).step()
        plain = changed("plain", {}, TARGETS)
    assert numbers["ablation"] == pytest.approx(ablation.item(), rel=1e-4)
    assert numbers["anchor"] == pytest.approx(anchor.item(), rel=1e-4)
    assert numbers["loss"] == pytest.approx(ablation.item() + 0.3 * anchor.item(), rel=1e-4)
    assert set(edit.deltas) == {name for name, _ in sd2.unet.named_parameters()}
    difference = torch.cat([(edit.deltas[n] - plain.deltas[n]).abs().flatten() for n in plain.deltas])
    assert (difference > 1e-4).float().mean() < 0.01  # the first step of Adam is +-lr: a gradient near 0 may turn


def test_without_regularization_the_loss_is_ablation_alone(sd1):
    config = replace(ABLATION, steps=1, regularization=0.0)
    (numbers,), _ = logged("concept ablation", sd1, config=config)
    assert numbers["loss"] == pytest.approx(ablation_terms(sd1, config)[0].item(), rel=1e-4)


@pytest.mark.slow
def test_ablation_brings_the_prompt_near_its_anchor_and_moves_others_less(tiny_testbed):
    noisy, timesteps = random_noisy(tiny_testbed, 8)

    def predictions():
        with torch.no_grad():
            return [predict(tiny_testbed, noisy, timesteps, [p] * 8) for p in (TARGETS[0].prompt, "a dog", OTHER)]

    before = predictions()
    config = replace(ABLATION, steps=20, images=4, lr=1e-5, regularization=0.0)
    with applied(tiny_testbed, concept_ablation(tiny_testbed, TARGETS[:1], ANCHORS[:1], config, progress=False)):
        after = predictions()
    assert (after[0] - before[1]).norm() < 0.8 * (before[0] - before[1]).norm()
    moved, anchor_moved, other_moved = [(a - b).norm() for a, b in zip(after, before, strict=True)]
    assert anchor_moved < moved and other_moved < moved


@pytest.mark.parametrize(
    "anchors, message",
    [
        (ANCHORS[:1], "1 lists of anchors for 2 targets"),
        ([["a dog"], []], "anchors of VM-1"),
        (["a dog", "a guitar"], "anchors of VM-0"),
    ],
)
def test_anchors_that_do_not_fit_are_refused(sd1, anchors, message):
    with pytest.raises(ValueError, match=message):
        concept_ablation(sd1, TARGETS, anchors, ABLATION, progress=False)


def test_anchors_are_the_candidates_that_give_no_copy_the_least_similar_first(sd1):
    candidates = ["a dog", "a guitar", "the photo of a dog", "grapes"]
    sampling = {"num_inference_steps": ABLATION.num_inference_steps, "guidance_scale": ABLATION.guidance_scale}
    images = generate(sd1, candidates, seeds=range(2), progress=False, **sampling)
    target = replace(TARGETS[0], image=images[1][1])  # the guitar's second image
    sscd = load_sscd()
    embeddings = sscd.embed_rows(images, "testbed", progress=False)
    worst = (embeddings @ embeddings[1, 1]).max(axis=1)
    ranking = [candidates[i] for i in np.argsort(worst)]
    assert ranking[-1] == "a guitar"
    config = replace(ABLATION, checked=2, threshold=float(np.sort(worst)[2]) + 1e-4)
    options = {"transform": "testbed", "sscd": sscd, "progress": False}
    assert select_anchors(sd1, [target], [candidates], config, **options) == [ranking[:3]]
    assert select_anchors(sd1, [target], [candidates], replace(config, anchors=1), **options) == [ranking[:1]]
    with pytest.raises(ValueError, match=r"Each of the 1 candidates of VM-0 .* the least 1\.00"):
        select_anchors(sd1, [target], [["a guitar"]], config, **options)


# --- SISS ---


def test_importance_weights_turn_the_mixture_into_either_of_the_two():
    """On five points that can be listed, expectations under the mixture are exact."""
    q_x, q_a = torch.tensor([0.4, 0.3, 0.2, 0.09, 0.01]), torch.tensor([0.01, 0.04, 0.15, 0.3, 0.5])
    loss = torch.tensor([3.0, -1.0, 2.0, 5.0, 7.0])
    for mixture in (0.0, 0.3, 0.5, 1.0):
        q = (1 - mixture) * q_x + mixture * q_a
        w_x, w_a = importance_weights(q_a.log() - q_x.log(), mixture)
        torch.testing.assert_close((q * w_x * loss).sum(), (q_x * loss).sum())
        torch.testing.assert_close((q * w_a * loss).sum(), (q_a * loss).sum())


def test_half_and_half_no_weight_is_above_two():
    ratios = torch.tensor([-torch.inf, -200.0, -3.0, 0.0, 3.0, 200.0, torch.inf])
    w_x, w_a = importance_weights(ratios, 0.5)
    assert w_x.tolist() == sorted(w_x.tolist(), reverse=True) and w_x[0] == 2 and w_x[3] == 1 and w_x[-1] == 0
    torch.testing.assert_close(w_x + w_a, torch.full((7,), 2.0))


def test_without_a_mixture_the_first_term_is_the_plain_loss():
    w_x, w_a = importance_weights(torch.tensor([-torch.inf, -2.0, 0.0]), 0.0)
    assert w_x.tolist() == [1, 1, 1]
    torch.testing.assert_close(w_a, torch.tensor([0.0, torch.e**-2, 1.0]))  # q(m_t | a) / q(m_t | x)


@pytest.mark.parametrize("scaling_norm", [5.0, None])
def test_the_gradient_is_that_of_the_first_term_less_a_given_length_of_the_second(scaling_norm):
    torch.manual_seed(0)
    model, rows = torch.nn.Linear(3, 2), torch.randn(2, 4, 3)
    keep, forget = [model(part).square().sum() for part in rows]
    (of_keep, _), (of_forget, _) = [
        torch.autograd.grad(t, model.parameters(), retain_graph=True) for t in (keep, forget)
    ]
    lengths = [
        torch.cat([g.flatten() for g in torch.autograd.grad(t, model.parameters(), retain_graph=True)]).norm()
        for t in (keep, forget)
    ]
    loss, numbers = subtracted(model, keep, forget, scaling_norm)
    loss.backward()
    length = 0.1 * lengths[0] if scaling_norm is None else scaling_norm
    torch.testing.assert_close(model.weight.grad, of_keep - length / lengths[1] * of_forget)
    assert numbers["scale"] == pytest.approx(float(length / lengths[1]))


def test_a_batch_with_nothing_to_forget_only_keeps():
    model = torch.nn.Linear(3, 2)
    keep = model(torch.ones(1, 3)).square().sum()
    loss, _ = subtracted(model, keep, 0 * keep, 750.0)
    assert loss.isfinite() and loss == keep


def siss_terms(pipe, config):
    """Both terms at the first step, with the densities of torch.distributions; row by row."""
    generator, chosen = first_generator(config), np.concatenate([np.random.default_rng(0).permutation(1)] * 4)
    kept = [ORDINARY[i % 2] for i in range(4)]
    clean_x = encode_images(pipe, [image for image, _ in kept])
    clean_a = encode_images(pipe, [TARGETS[i].image for i in chosen])
    around_a = torch.rand(4, generator=generator) < config.mixture
    noise = torch.randn(clean_x.shape, generator=generator)
    timesteps = torch.randint(config.first_timestep, 1000, (4,), generator=generator)
    keep, forget, same_captions = [], [], []
    for i in range(4):
        abar = pipe.scheduler.alphas_cumprod[timesteps[i]]
        x, a, prompt, caption = clean_x[i], clean_a[i], TARGETS[chosen[i]].prompt, kept[i][1]
        m_t = abar.sqrt() * (a if around_a[i] else x) + (1 - abar).sqrt() * noise[i]
        with torch.no_grad():
            predicted = predict(pipe, m_t[None], timesteps[i], [prompt if around_a[i] else caption])[0]
        losses, densities = [], []
        for clean in (x, a):
            eps = (m_t - abar.sqrt() * clean) / (1 - abar).sqrt()
            v = abar.sqrt() * eps - (1 - abar).sqrt() * clean
            wanted = v if pipe.scheduler.config.prediction_type == "v_prediction" else eps
            losses.append(((predicted - wanted) ** 2).sum())
            normal = torch.distributions.Normal(abar.sqrt() * clean.double(), (1 - abar).sqrt().double())
            densities.append(normal.log_prob(m_t.double()).sum())
        densities = torch.stack(densities)
        density_x, density_a = (densities - densities.max()).exp()
        if caption != prompt:  # densities of latents *and* captions: of one of the two it is zero
            density_x, density_a = density_x * ~around_a[i], density_a * around_a[i]
        mixture = (1 - config.mixture) * density_x + config.mixture * density_a
        keep.append(density_x / mixture * losses[0])
        forget.append(density_a / mixture * losses[1])
        same_captions.append(caption == prompt)
    assert True in same_captions and False in same_captions
    return torch.stack(keep).mean().item(), torch.stack(forget).mean().item()


@pytest.mark.parametrize("mixture, first_timestep, seed", [(0.5, 999, 0), (0.4, 990, 3), (0.0, 995, 0)])
def test_the_loss_of_siss_is_that_of_its_paper(pipe, mixture, first_timestep, seed):
    config = replace(SISS, steps=1, mixture=mixture, first_timestep=first_timestep, seed=seed)
    (numbers,), _ = logged("SISS", pipe, targets=TARGETS[:1], config=config)
    keep, forget = siss_terms(pipe, config)
    assert numbers["keep"] == pytest.approx(keep, rel=1e-3)
    assert numbers["forget"] == pytest.approx(forget, rel=1e-3)
    assert numbers["loss"] == pytest.approx(keep - numbers["scale"] * forget, rel=1e-2, abs=1e-2)


@pytest.mark.slow
def test_siss_forgets_the_one_image_of_a_prompt_and_keeps_the_other(tiny_testbed):
    """The model is untrained, so by keeping alone it learns to denoise anything: that is what to compare with."""

    def losses():
        latents = encode_images(tiny_testbed, [TARGETS[0].image, ORDINARY[0][0]]).repeat_interleave(8, dim=0)
        noise, timesteps = random_noisy(tiny_testbed, 16, seed=1)
        embeds = encode_prompts(tiny_testbed, [TARGETS[0].prompt] * 16)
        with torch.no_grad():
            return denoising_loss(tiny_testbed, latents, embeds, noise, timesteps).unflatten(0, (2, 8)).mean(dim=1)

    found, (_, keep_before) = {}, losses()
    for scaling_norm in (0.0, 150.0):
        config = replace(SISS, steps=15, scaling_norm=scaling_norm, first_timestep=0)
        with applied(tiny_testbed, siss(tiny_testbed, TARGETS[:1], ORDINARY[:1], config, progress=False)):
            found[scaling_norm] = losses()
    (forget_kept, _), (forget, keep) = found[0.0], found[150.0]
    assert forget > forget_kept + 0.05 and keep < keep_before


@pytest.mark.parametrize(
    "targets, ordinary, config, message",
    [
        (TARGETS, [], SISS, "No ordinary images"),
        ([replace(TARGETS[0], image=None)], ORDINARY, SISS, "VM-0 has no image"),
        (TARGETS, ORDINARY, replace(SISS, first_timestep=1000), "first_timestep is 1000"),
    ],
)
def test_what_siss_cannot_do_without_is_asked_for(sd1, targets, ordinary, config, message):
    with pytest.raises(ValueError, match=message):
        siss(sd1, targets, ordinary, config, progress=False)


@pytest.mark.parametrize(
    "config, wrong, message",
    [
        (ESDConfig, {"variant": "y"}, "variant is 'y'"),
        (ESDConfig, {"steps": 0}, "at least 1"),
        (AblationConfig, {"images": 0}, "at least 1"),
        (AblationConfig, {"regularization": -1.0}, "regularization is -1"),
        (SISSConfig, {"mixture": 1.5}, "mixture is 1.5"),
        (SISSConfig, {"batch_size": 0}, "at least 1"),
    ],
)
def test_bad_settings_are_refused(config, wrong, message):
    with pytest.raises(ValueError, match=message):
        config(**wrong)
