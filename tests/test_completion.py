"""Completion: the unknown half is never seen, and it alone is judged."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from dori_utils.completion import UNKNOWN, Config, complete, known_halves, unknown_halves
from dori_utils.core.diffusion import encode_images
from dori_utils.core.edits import Edit, applied
from dori_utils.core.hashes import model_hash
from dori_utils.core.targets import Target

QUICK = dict(seeds=(0, 1), num_inference_steps=3, guidance_scale=3.0, progress=False)
PROMPTS = ["a cat on a car", "the red dog", "a violin"]

each_half = pytest.mark.parametrize("known", UNKNOWN)


@pytest.fixture
def targets(random_picture):
    return [Target(f"t{i}", prompt, random_picture(i, 64), "VM") for i, prompt in enumerate(PROMPTS)]


def values_off(pipe, number):
    names = [f"down_blocks.{number}.attentions.{i}.transformer_blocks.0.attn2.to_v.weight" for i in (0, 1)]
    masks = {name: torch.ones(len(pipe.unet.get_parameter(name)), 1, dtype=torch.bool) for name in names}
    return Edit("off", model_hash(pipe), masks=masks)


def with_other_half(target, known, other):
    """The target with the half that is not known from another picture."""
    left, top, right, bottom = (round(64 * share) for share in UNKNOWN[known])
    image = target.image.copy()
    image.paste(other.crop((left, top, right, bottom)), (left, top))
    return dataclasses.replace(target, image=image)


def pixels(images):
    return np.array([[np.asarray(image, dtype=int) for image in row] for row in images])


@each_half
def test_whatever_the_unknown_half_shows_changes_nothing(pipe, targets, random_picture, known):
    other = with_other_half(targets[0], known, random_picture(99, 64))
    assert np.asarray(other.image).tobytes() != np.asarray(targets[0].image).tobytes()
    images, others = (complete(pipe, [target], Config(known), **QUICK) for target in (targets[0], other))
    assert (pixels(images) == pixels(others)).all()


@each_half
def test_whatever_the_known_half_shows_does(pipe, targets, random_picture, known):
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[known]
    other = with_other_half(targets[0], opposite, random_picture(99, 64))
    given, others = (known_halves(pipe, [target], Config(known))[0] for target in (targets[0], other))
    assert (given.latents - others.latents)[:, given.where].abs().max() > 1e-3
    images, changed = (complete(pipe, [target], Config(known), **QUICK) for target in (targets[0], other))
    unknown, of_changed = (pixels(unknown_halves(own, Config(known))) for own in (images, changed))
    assert (unknown != of_changed).any()  # what is painted goes on from what is given


@each_half
def test_half_of_the_latents_are_given(pipe, targets, known):
    for given in known_halves(pipe, targets, Config(known)):
        assert given.where.float().mean() == 0.5 and given.latents.shape[1:] == given.where.shape
    whole = encode_images(pipe, [targets[0].image])[0]
    given = known_halves(pipe, targets, Config(known))[0]
    first = {"left": (..., 0), "right": (..., -1), "top": (..., 0, slice(None)), "bottom": (..., -1, slice(None))}[
        known
    ]
    assert (
        given.where[first].all() and (whole - given.latents).abs()[first].mean() < (whole - given.latents).abs().mean()
    )


@each_half
def test_the_half_that_is_judged_is_the_other_one(known):
    image = Image.new("RGB", (64, 64), "white")
    left, top, right, bottom = (round(64 * share) for share in UNKNOWN[known])
    image.paste("black", (left, top, right, bottom))
    ((part,),) = unknown_halves([[image]], Config(known))
    assert part.size in ((32, 64), (64, 32)) and not np.asarray(part).any()


def test_an_image_is_the_same_in_any_batch_and_every_time(pipe, targets):
    together = complete(pipe, targets, **QUICK)
    assert (pixels(together) == pixels(complete(pipe, targets, **QUICK))).all()
    for i, target in enumerate(targets):
        assert np.abs(pixels(together[i : i + 1]) - pixels(complete(pipe, [target], batch_size=1, **QUICK))).max() <= 1


def test_each_target_is_completed_under_its_own_edit(pipe, targets):
    edits = [values_off(pipe, 0), None, values_off(pipe, 1)]
    together = pixels(complete(pipe, targets, edits=edits, **QUICK))
    for i, edit in enumerate(edits):
        with applied(pipe, edit):
            alone = pixels(complete(pipe, [targets[i]], **QUICK))[0]
        assert np.abs(together[i] - alone).max() <= 2
    assert (together[0] != pixels(complete(pipe, targets[:1], **QUICK))[0]).any()


def test_a_half_that_is_none_is_refused():
    with pytest.raises(
        ValueError, match="known is 'middle': the half that is given is one of left, right, top, bottom"
    ):
        Config("middle")
