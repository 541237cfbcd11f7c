"""What notebooks need beside a model: the testbed's is there, everyone else's is in data/, or the error says how."""

import json

import numpy as np
import pytest

from dori_utils import cached, nemo
from dori_utils.core.store import Store
from dori_utils.materials import Pairs, load_materials
from dori_utils.nemo_statistics import collect_statistics
from dori_utils.presets import PRESETS


@pytest.fixture
def data(tmp_path, write_data, monkeypatch):
    monkeypatch.setenv("DORI_DATA", str(tmp_path))
    return tmp_path, *write_data(tmp_path, "mine")


def test_the_testbeds_are_in_the_repository_or_drawn():
    materials = load_materials("testbed")
    pair, *_ = materials.ordinary(3)
    assert len(materials.targets("VM")) == 24 and len(materials.targets()) == 176
    assert pair.image.size == (64, 64) and pair.caption
    prompt = materials.targets("VM")[0].prompt
    things = prompt.rpartition(" on ")[0].split(" and ")
    for related in materials.related(prompt, 4):
        assert sum(thing in related.caption for thing in things) == 1
    assert len(materials.paraphrases(prompt)) >= 3


def test_another_models_are_what_its_owner_put_there(data, random_picture):
    folder, rows, captions = data
    materials = load_materials("mine")
    assert [t.prompt for t in materials.targets("VM")] == [row["prompt"] for row in rows[:3]]
    assert {t.kind for t in materials.targets()} == {"VM", "TM", "control"}
    assert materials.paraphrases(rows[0]["prompt"]) == [f"{word} {rows[0]['prompt'][2:]}" for word in ("the", "red")]
    assert [pair.caption for pair in materials.ordinary(3)] == captions[:3]
    assert np.array_equal(materials.ordinary(3)[2].image, random_picture(1002))
    assert materials.clip.name == "clip"


def test_captions_that_nothing_is_trained_on_and_those_that_training_takes_are_apart(data):
    _, _, captions = data
    materials = load_materials("mine")
    training = materials.training_pairs()
    measured = {pair.caption for pair in materials.ordinary(len(captions) // 2)}
    assert not measured & {caption for _, caption in training} and len(training) == len(captions) // 2
    with pytest.raises(ValueError, match=f"there are {len(captions)}"):
        materials.ordinary(len(captions) // 2 + 1)


def test_a_training_takes_pictures_one_by_one(data):
    image, caption = Pairs(load_materials("mine").ordinary(4))[2]
    assert image.mode == "RGB" and caption
    with pytest.raises(IndexError):
        Pairs(load_materials("mine").ordinary(4))[4]


def test_related_captions_are_those_nearest_to_the_prompt_by_clip(data):
    materials = load_materials("mine")
    prompt = materials.ordinary(5)[4].caption
    related = materials.related(prompt, 2)
    assert related[0].caption == prompt and related[1].caption != prompt


def test_nearest_known_training_image(data, tmp_path):
    from dori_utils.core.sscd import load_sscd

    materials, preset, sscd = load_materials("mine"), PRESETS["smoke"], load_sscd()
    images = [materials.targets()[5].image, materials.targets()[0].image]
    found = materials.nearest(images, preset, Store(tmp_path / "store"), sscd)
    assert found["target"].tolist() == ["control-5", "VM-0"] and (found["sscd"] > 0.99).all()
    assert np.array_equal(materials.training_image(found.to_dict("records")[1], preset), images[1])


def test_statistics_of_any_model_come_from_the_ordinary_captions_once(data, sd1, tmp_path, monkeypatch):
    materials, store, config = load_materials("mine"), Store(tmp_path / "store"), PRESETS["smoke"].nemo
    first = materials.statistics(sd1, config, store)
    assert set(nemo.value_layers(sd1.unet, r"attn2\.to_v$")) == set(first.mean) == set(first.std)
    assert first.fingerprint() == collect_statistics(sd1, data[2], config, progress=False).fingerprint()
    monkeypatch.setattr(cached, "collect_statistics", None)  # not again
    again = load_materials("mine").statistics(sd1, config, store)
    assert again.fingerprint() == first.fingerprint() and again.model == first.model


@pytest.mark.parametrize(
    ("gone", "ask", "says"),
    [
        ("mine/targets.csv", lambda m: m.targets(), "targets.csv .CSV: prompt,image,kind"),
        ("mine/paraphrases.csv", lambda m: m.paraphrases("a cat"), "paraphrases.csv: write it"),
        ("coco/captions.csv", lambda m: m.ordinary(1), "captions_val2014.json"),
        ("coco/3.png", lambda m: m.ordinary(1), "1 of the 80 pictures .* are not there, such as .*3.png"),
        ("clip/model.safetensors", lambda m: m.clip, "model.safetensors"),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(data, gone, ask, says):
    (data[0] / gone).unlink()
    with pytest.raises(OSError, match=says):
        ask(load_materials("mine"))


def test_without_a_folder_stable_diffusion_says_how_to_download(data):
    with pytest.raises(FileNotFoundError, match=r"download_targets\('sd14'"):
        load_materials("sd14").targets("VM")


def test_a_kind_that_is_not_there(data):
    with pytest.raises(ValueError, match="there are: TM, VM, control"):
        load_materials("mine").targets("ladder")


def test_coco_pairs_are_each_pictures_first_caption(tmp_path, random_picture):
    from dori_utils.core.tables import read_pairs

    (tmp_path / "val2014").mkdir()
    for number in (3, 7):
        random_picture(number).save(tmp_path / "val2014" / f"COCO_{number}.png")
    content = {
        "images": [{"id": 7, "file_name": "COCO_7.png"}, {"id": 3, "file_name": "COCO_3.png"}],
        "annotations": [
            {"image_id": 7, "caption": "A dog. "},
            {"image_id": 3, "caption": "A cat."},
            {"image_id": 7, "caption": "A dog again."},
        ],
    }
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps(content))
    assert [(image.name, caption) for image, caption in read_pairs(path)] == [
        ("COCO_3.png", "A cat."),
        ("COCO_7.png", "A dog."),
    ]
    (tmp_path / "annotations").mkdir()
    path = path.rename(tmp_path / "annotations" / path.name)
    assert len(read_pairs(path)) == 2, "as COCO's own archive has it"
    path.write_text("{}")
    with pytest.raises(ValueError, match="Give a CSV"):
        read_pairs(path)


@pytest.mark.parametrize(
    ("table", "says"),
    [("picture,caption\na.png,a cat", "its columns are picture, caption"), ("image,caption\na.png,", "in row 1")],
)
def test_a_table_that_is_none_of_pairs_says_what_to_give(table, says, tmp_path):
    from dori_utils.core.tables import read_pairs

    (tmp_path / "pairs.csv").write_text(table)
    with pytest.raises(ValueError, match=f"{says}.*Give a CSV .image,caption"):
        read_pairs(tmp_path / "pairs.csv")
