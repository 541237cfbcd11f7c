"""Generation gives what diffusers gives, for any mix of prompts and seeds in a batch."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

from dori_utils.core import generation, hashes
from dori_utils.core.diffusion import Given, decode, denoise, encode_prompts, initial_latents
from dori_utils.core.edits import Edit, applied
from dori_utils.core.generation import generate
from dori_utils.core.hashes import model_hash

PROMPTS = ["a photo of a cat", "violin and grapes"]
SAMPLING = dict(num_inference_steps=6, guidance_scale=7.5)
QUICK = dict(num_inference_steps=3, guidance_scale=3.0, progress=False)


def with_scheduler(pipe, scheduler):
    pipe = copy.copy(pipe)
    pipe.scheduler = scheduler
    return pipe


def diffusers_images(pipe, latents, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    return pipe(latents=latents, output_type="pt", **kwargs).images


def pixels(images):
    """Nested lists of PIL images as one int array (prompts, seeds, height, width, 3)."""
    return np.array([[np.asarray(image, dtype=int) for image in row] for row in images])


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_equals_diffusers_own_pipeline(pipe, guidance_scale):
    """SD 1.x with PNDM, SD 2.x with v-prediction, the testbed with AutoencoderTiny and trailing timesteps."""
    latents, sampling = initial_latents(pipe, [0, 1]), SAMPLING | {"guidance_scale": guidance_scale}
    theirs = diffusers_images(pipe, latents, prompt=PROMPTS, **sampling)
    ours = decode(pipe, denoise(pipe, latents, encode_prompts(pipe, PROMPTS), **sampling))
    assert theirs.std() > 0.02  # else any two would be equal
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance_scale, evaluated", [(7.5, 4), (1.0, 2), (0.5, 2)])
def test_guidance_of_one_or_less_saves_the_unconditional_half(sd1, guidance_scale, evaluated):
    batches = []
    hook = sd1.unet.register_forward_pre_hook(lambda unet, args: batches.append(len(args[0])))
    denoise(
        sd1,
        initial_latents(sd1, [0, 1]),
        encode_prompts(sd1, PROMPTS),
        num_inference_steps=2,
        guidance_scale=guidance_scale,
    )
    hook.remove()
    assert set(batches) == {evaluated}


def test_guidance_prompts_and_noise_all_matter(pipe):
    latents, embeds = initial_latents(pipe, [0, 1]), encode_prompts(pipe, PROMPTS)
    images = decode(pipe, denoise(pipe, latents, embeds, **SAMPLING))
    for other in (
        denoise(pipe, latents, embeds, num_inference_steps=6, guidance_scale=1.0),
        denoise(pipe, latents, embeds.flip(0), **SAMPLING),
        denoise(pipe, latents.flip(0), embeds, **SAMPLING),
    ):
        assert (decode(pipe, other) - images).abs().max() > 1e-3


def test_ddim_on_sd1_equals_diffusers(sd1):
    pipe = with_scheduler(sd1, DDIMScheduler.from_config(sd1.scheduler.config, clip_sample=False))
    latents = initial_latents(pipe, [3])
    theirs = diffusers_images(pipe, latents, prompt="a red car", **SAMPLING)
    ours = decode(pipe, denoise(pipe, latents, encode_prompts(pipe, ["a red car"]), **SAMPLING))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_seeds_are_the_generators_of_diffusers(pipe):
    theirs = diffusers_images(
        pipe, None, prompt=PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)], **SAMPLING
    )
    ours = decode(pipe, denoise(pipe, initial_latents(pipe, [5, 6]), encode_prompts(pipe, PROMPTS), **SAMPLING))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_generate_returns_prompts_x_seeds(pipe):
    images = generate(pipe, PROMPTS, seeds=[7, 8, 9], **QUICK)
    assert [len(row) for row in images] == [3, 3]
    assert images[0][0].mode == "RGB"
    for prompt, row in zip(PROMPTS, images, strict=True):
        for seed, image in zip([7, 8, 9], row, strict=True):
            theirs = diffusers_images(
                pipe, initial_latents(pipe, [seed]), prompt=prompt, num_inference_steps=3, guidance_scale=3.0
            )[0].permute(1, 2, 0)  # (3, height, width) → (height, width, 3)
            assert np.abs(np.asarray(image, dtype=int) - theirs.numpy() * 255).max() <= 1.0


def test_batch_size_does_not_change_an_image(pipe):
    """A batch of 8 mixes four prompts with two seeds; and nothing is left over from batch to batch."""
    prompts = ["a cat", "a dog on a striped background", "grapes", ""]
    alone = generate(pipe, prompts, seeds=range(2), batch_size=1, **QUICK)
    together = generate(pipe, prompts, seeds=range(2), batch_size=8, **QUICK)
    uneven = generate(pipe, prompts, seeds=range(2), batch_size=3, **QUICK)
    assert np.abs(pixels(alone) - pixels(together)).max() <= 1
    assert np.abs(pixels(alone) - pixels(uneven)).max() <= 1

    latents, embeds = initial_latents(pipe, range(8)), encode_prompts(pipe, prompts).repeat(2, 1, 1)
    sampling = dict(num_inference_steps=3, guidance_scale=7.5)
    together = denoise(pipe, latents, embeds, **sampling)
    alone = torch.cat([denoise(pipe, latents[i, None], embeds[i, None], **sampling) for i in range(8)])
    torch.testing.assert_close(decode(pipe, together), decode(pipe, alone), atol=1e-4, rtol=0)


def test_a_seed_is_the_same_noise_whatever_ran_before(sd1):
    torch.manual_seed(123)
    first = initial_latents(sd1, [1, 2])
    torch.manual_seed(456)
    again = initial_latents(sd1, [2, 1, 2])
    assert torch.equal(first, again[[1, 0]]) and torch.equal(again[0], again[2])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1)), first[0])


def test_global_random_state_is_neither_used_nor_changed(sd1):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    images = generate(sd1, "a cat", seeds=[0], **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert np.array_equal(pixels(images), pixels(generate(sd1, "a cat", seeds=[0], **QUICK)))


def test_a_sampler_that_adds_noise_is_reproducible_at_any_batch_size(sd1):
    """Its noise goes on with each case's own generator; the same numbers as in diffusers."""
    pipe = with_scheduler(sd1, EulerAncestralDiscreteScheduler.from_config(sd1.scheduler.config))
    alone, together = (generate(pipe, PROMPTS, seeds=[0, 1], batch_size=size, **QUICK) for size in (1, 4))
    assert np.abs(pixels(alone) - pixels(together)).max() <= 1
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    theirs = diffusers_images(
        pipe, None, prompt=[PROMPTS[0]] * 2, generator=generators, num_inference_steps=3, guidance_scale=3.0
    ).permute(0, 2, 3, 1)
    assert np.abs(pixels(together)[0] - theirs.numpy() * 255).max() <= 1.0


def test_the_pipelines_scheduler_is_left_alone(sd1):
    """PNDM remembers earlier outputs; whoever is stepping with it must not find it changed."""
    sd1.scheduler.set_timesteps(17)
    generate(sd1, "a cat", seeds=[0], **QUICK)
    assert sd1.scheduler.num_inference_steps == 17 and sd1.scheduler.counter == 0 and sd1.scheduler.ets == []


def test_images_of_one_batch_have_their_own_edits(pipe):
    name = next(n for n, _ in pipe.unet.named_parameters() if n.endswith("attn2.to_v.weight"))
    mask = torch.ones(len(pipe.unet.get_parameter(name)), 1, dtype=torch.bool)
    edit = Edit("rows", model_hash(pipe), masks={name: mask})
    mixed = pixels(generate(pipe, PROMPTS, seeds=[0, 1], edits=[edit, None], **QUICK))
    with applied(pipe, edit):
        edited = pixels(generate(pipe, PROMPTS, seeds=[0, 1], **QUICK))
    plain = pixels(generate(pipe, PROMPTS, seeds=[0, 1], **QUICK))
    assert abs(mixed[0] - edited[0]).max() <= 1 and abs(mixed[1] - plain[1]).max() <= 1
    with pytest.raises(ValueError, match="1 edits for 2 prompts"):
        generate(pipe, PROMPTS, edits=[edit], **QUICK)


def test_the_model_is_hashed_once_for_all_batches(sd1, monkeypatch):
    hashed = []
    monkeypatch.setattr(hashes, "model_hash", lambda pipe: hashed.append(pipe) or model_hash(pipe))
    name = next(n for n, _ in sd1.unet.named_parameters() if n.endswith("attn2.to_v.weight"))
    edit = Edit("rows", model_hash(sd1), masks={name: torch.ones(1, 1, dtype=torch.bool)})
    generate(sd1, PROMPTS, seeds=[0, 1], edits=[edit, None], batch_size=1, **QUICK)
    assert len(hashed) == 1
    generate(sd1, PROMPTS, seeds=[0], **QUICK)
    assert len(hashed) == 1  # without edits not at all


def test_embeddings_of_a_prompt_give_the_images_of_the_prompt(pipe):
    from_prompt = generate(pipe, PROMPTS, seeds=[0], **QUICK)
    from_embeds = generate(pipe, prompt_embeds=encode_prompts(pipe, PROMPTS), seeds=[0], **QUICK)
    assert np.array_equal(pixels(from_prompt), pixels(from_embeds))


def test_one_string_is_one_prompt(sd1):
    assert len(generate(sd1, "a cat", seeds=[0], **QUICK)) == 1
    assert encode_prompts(sd1, "a cat").shape == (1, 16, 16)


def test_many_prompts_are_encoded_as_if_alone(sd1):
    prompts = [f"a cat and {'a dog ' * (i % 3)}" for i in range(70)]  # more than one chunk
    together = encode_prompts(sd1, prompts)
    alone = torch.cat([encode_prompts(sd1, [prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_embeddings_and_latents_can_take_gradients(sd1):
    """Attacks start from them, so they must not be inference tensors."""
    embeds = encode_prompts(sd1, ["a cat"]).requires_grad_()
    latents = denoise(sd1, initial_latents(sd1, [0]), encode_prompts(sd1, [""]), num_inference_steps=1)
    output = sd1.unet(latents, 500, encoder_hidden_states=embeds).sample
    output.square().sum().backward()
    assert embeds.grad.abs().sum() > 0


def test_a_prompt_that_is_too_long_is_named_with_both_numbers(sd1):
    long = "a dog " * 8  # 16 tokens, and start and end
    with pytest.raises(ValueError, match=r"18 tokens, this model takes 16 .*'a dog a dog"):
        generate(sd1, ["a cat", long], seeds=[0], **QUICK)
    just_fits = "a dog " * 7
    assert len(generate(sd1, [just_fits], seeds=[0], **QUICK)) == 1


def test_a_long_prompt_is_cut_on_request(sd1):
    cut = encode_prompts(sd1, ["a dog " * 8], truncate=True)
    torch.testing.assert_close(cut, encode_prompts(sd1, ["a dog " * 7]))
    assert len(generate(sd1, ["a dog " * 8], seeds=[0], truncate=True, **QUICK)) == 1


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(), "either prompts or prompt_embeds"),
        (dict(prompts=["a cat"], prompt_embeds=torch.zeros(1, 16, 16)), "either prompts or prompt_embeds"),
        (dict(prompt_embeds=torch.zeros(16, 16)), r"shape \(16, 16\); this model takes \(N, 16, 16\)"),
        (dict(prompt_embeds=torch.zeros(1, 77, 16)), r"shape \(1, 77, 16\)"),
        (dict(prompts=[]), "No prompts"),
        (dict(prompts=["a cat"], seeds=[]), "No seeds"),
        (dict(prompts=["a cat"], batch_size=0), "batch_size is 0"),
    ],
)
def test_bad_arguments_get_one_clear_message(sd1, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(sd1, **kwargs, progress=False)


def test_nan_is_reported_with_its_case_instead_of_a_black_image(sd1):
    embeds = encode_prompts(sd1, PROMPTS)
    embeds[1, 3, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="prompt number 1 with seed 4"):
        generate(sd1, prompt_embeds=embeds, seeds=[4], **QUICK)


def test_default_batch_is_32_testbed_images_on_a_cpu_and_two_of_sd(sd1, monkeypatch):
    monkeypatch.setattr(generation, "latent_size", lambda pipe: (16, 16))
    assert generation._default_batch_size(sd1) == 32
    monkeypatch.setattr(generation, "latent_size", lambda pipe: (64, 64))
    assert generation._default_batch_size(sd1) == 2
    monkeypatch.setattr(generation, "latent_size", lambda pipe: (96, 96))
    assert generation._default_batch_size(sd1) == 1


@pytest.mark.parametrize("dtype, free, batch_size", [(torch.float16, 24e9, 11), (torch.float32, 24e9, 5), (None, 0, 1)])
def test_default_batch_follows_the_memory_of_a_gpu(monkeypatch, dtype, free, batch_size):
    """Stands in for a GPU: 24 GB take 11 images of 512 pixels in float16, by our own estimate of 1.6 GB each."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 24e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    config = SimpleNamespace(sample_size=64)
    unet = SimpleNamespace(device=torch.device("cuda"), dtype=dtype or torch.float16, config=config)
    assert generation._default_batch_size(SimpleNamespace(unet=unet)) == batch_size


def test_progress_counts_every_evaluation_of_the_unet(sd1, monkeypatch):
    bars = []

    class Bar(generation.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(generation, "tqdm", Bar)
    generate(sd1, PROMPTS, seeds=[0, 1], batch_size=3, **QUICK | {"progress": True})
    assert bars[0].n == bars[0].total == 2 * 4  # two batches; PNDM takes 4 evaluations for 3 steps


# What a picture starts from, and what is given of it


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_a_known_part_is_kept_as_by_diffusers_own_inpainting(pipe, guidance_scale):
    from diffusers import StableDiffusionInpaintPipeline

    theirs = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    noise, sampling = initial_latents(pipe, [0, 1]), SAMPLING | {"guidance_scale": guidance_scale}
    clean = 0.5 * initial_latents(pipe, [2])
    where = torch.zeros(8, 8, dtype=torch.bool)
    where[:, :4] = True
    mask = (~where)[None, None].float().repeat_interleave(pipe.vae_scale_factor, 2)
    expected = theirs(
        prompt=PROMPTS,
        image=clean,
        mask_image=mask.repeat_interleave(pipe.vae_scale_factor, 3),
        masked_image_latents=clean,
        latents=noise,
        strength=1.0,
        output_type="latent",
        **sampling,
    ).images
    found = denoise(pipe, noise, encode_prompts(pipe, PROMPTS), given=[Given(clean[0], where)] * 2, **sampling)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[..., :4], clean[..., :4].expand(2, -1, -1, -1))
    plain = denoise(pipe, noise, encode_prompts(pipe, PROMPTS), **sampling)
    assert (found - plain)[..., 4:].abs().max() > 1e-3  # the other half takes notice of it


def test_each_case_has_its_own_known_part_whatever_the_batch(pipe):
    clean = initial_latents(pipe, [5, 6])
    where = torch.zeros(2, 8, 8, dtype=torch.bool)
    where[0, :, :4] = where[1, 4:] = True
    known = [Given(clean[0], where[0]), Given(clean[1], where[1])]
    together = generate(pipe, PROMPTS, seeds=[0, 1], given=known, batch_size=3, **QUICK)
    alone = [generate(pipe, [PROMPTS[i]], seeds=[0, 1], given=[known[i]], **QUICK)[0] for i in range(2)]
    assert np.abs(pixels(together) - pixels(alone)).max() <= 1
    with pytest.raises(ValueError, match="1 given for 2 prompts"):
        generate(pipe, PROMPTS, given=known[:1], **QUICK)


def test_given_latents_take_the_place_of_the_seeds_noise(pipe):
    latents = initial_latents(pipe, [3, 1, 4, 1]).unflatten(0, (2, 2))
    found = generate(pipe, PROMPTS, seeds=[8, 9], latents=latents, batch_size=3, **QUICK)
    expected = [
        generate(pipe, [prompt], seeds=seeds, **QUICK)[0]
        for prompt, seeds in zip(PROMPTS, [(3, 1), (4, 1)], strict=True)
    ]
    assert np.abs(pixels(found) - pixels(expected)).max() <= 1
    with pytest.raises(ValueError, match=r"latents has the shape \(2, 2, .*take \(2, 3, "):
        generate(pipe, PROMPTS, seeds=range(3), latents=latents, **QUICK)
