"""The judge says which sprites are in a picture, and what of a caption's sprites it sees is counted right."""

import numpy as np
import pytest
import torch
from PIL import Image

from dori_utils.core.training import Stage
from dori_utils.testbed import data, judge, scenes
from tools import training as train


def test_labels_are_the_sprites_that_can_be_seen():
    pixels, visible = judge.Labelled(0, 3)[1]
    scene = data.ordinary_scene(1, 0)
    assert (pixels.permute(1, 2, 0).numpy() == scene.draw()).all()
    assert {scenes.sprite_names()[i] for i in np.flatnonzero(visible)} == {s.name for s in scene.sprites}


def test_what_is_hidden_counts_neither_way():
    class Same(torch.nn.Module):
        def forward(self, pixels):
            return type("Output", (), {"logits": torch.tensor([[2.0, -3.0, 5.0]])})

    visible = torch.tensor([[1.0, 0.0, 0.1]])  # there and found; not there and not found; hidden
    loss, numbers = judge.judge_loss(Same(), (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), visible), None)
    assert loss == pytest.approx((np.log1p(np.exp(-2)) + np.log1p(np.exp(-3))) / 2, rel=1e-5) and numbers["found"] == 1


@pytest.mark.slow
def test_a_judge_learns_a_few_scenes_by_heart_and_counts_what_captions_name(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STAGES", {"judge": Stage(steps=60, batch_size=16, lr=3e-3, warmup=5, ema=0.9)})
    monkeypatch.setattr(judge.Labelled, "__getitem__", lambda self, i, get=judge.Labelled.__getitem__: get(self, i % 8))
    trained = train.train_judge(tmp_path)
    seen = [data.ordinary_scene(i, data.FIRST_SEED["judge"]) for i in range(8)]
    images = [[Image.fromarray(scene.draw())] * 2 for scene in seen]
    shares = judge.named_found(trained, images, seen)
    assert shares.shape == (8, 2) and shares.mean() > 0.6
    others = judge.named_found(trained, images[1:] + images[:1], seen)  # the pictures of other captions
    assert others.mean() < shares.mean() - 0.3

    trained.half().save_pretrained(tmp_path / "judge")
    again = judge.load_judge(tmp_path / "judge")
    assert again.config.id2label[0] == scenes.sprite_names()[0]
    assert np.abs(judge.named_found(again, images, seen) - shares).mean() < 0.1
