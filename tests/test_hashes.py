"""Which weights these are: computed once within `known`, with and without edits, and one thread's affair."""

import pytest
import torch

from dori_utils.core import hashes
from dori_utils.core.edits import Edit, applied
from dori_utils.core.hashes import base_hash, changing, current_hash, known, model_hash


@pytest.fixture
def counted(monkeypatch):
    calls = []
    monkeypatch.setattr(hashes, "model_hash", lambda pipe: calls.append(pipe) or model_hash(pipe))
    return calls


@pytest.fixture
def edits(sd1):
    delta = torch.ones_like(sd1.unet.conv_out.bias)
    return [Edit("shift", model_hash(sd1), deltas={"conv_out.bias": size * delta}) for size in (1, 2)]


def test_within_known_each_is_computed_once_and_behind_it_anew(sd1, counted):
    with known(sd1), known(sd1):
        assert base_hash(sd1) == current_hash(sd1) == base_hash(sd1) == model_hash(sd1)
    assert len(counted) == 1
    base_hash(sd1)
    assert len(counted) == 2


def test_an_edit_changes_the_one_and_not_the_other_also_when_edits_nest(sd1, edits, counted):
    before, now = model_hash(sd1), []
    with known(sd1):
        for _ in range(2):
            with applied(sd1, edits[0]):
                now.append(current_hash(sd1))
                with applied(sd1, edits[1]):
                    now.append(current_hash(sd1))
                    assert base_hash(sd1) == before
                now.append(current_hash(sd1))
            assert current_hash(sd1) == base_hash(sd1) == before
    assert now[0] == now[2] == now[3] == now[5] != now[1] == now[4] and before not in now
    assert len(counted) == 5  # the base once, and at each of two times the one edit and both


def test_weights_in_training_are_never_taken_for_known(sd1):
    bias, own = sd1.unet.conv_out.bias, sd1.unet.conv_out.bias.clone()
    with changing(sd1, trained=True) as base, torch.no_grad():
        first = current_hash(sd1)
        bias += 1
        assert current_hash(sd1) != first == base == base_hash(sd1)
        bias.copy_(own)
    assert model_hash(sd1) == base
