"""Finished cases survive; unfinished and damaged ones are computed again."""

import errno
import io
import os
import uuid

import fsspec
import numpy as np
import pytest

from dori_utils.core import store as store_module
from dori_utils.core.store import Store


def squares(calls):
    """A compute_many that notes what it was asked."""

    def compute_many(configs):
        calls.append([config["n"] for config in configs])
        return [{"square": np.array(config["n"] ** 2), "row": np.arange(config["n"])} for config in configs]

    return compute_many


def test_a_finished_case_is_not_computed_again(tmp_path):
    config = {"model": "0123abcd", "seeds": [0, 1], "guidance_scale": 7.5}
    first = Store(tmp_path).fetch(config, lambda: {"scores": np.float32([[0.1, 0.9]]), "name": np.array("SSCD")})
    again = Store(tmp_path).fetch(config, lambda: pytest.fail("computed again"))
    assert again["scores"].dtype == np.float32
    np.testing.assert_array_equal(again["scores"], first["scores"])
    assert again["name"].item() == "SSCD"


def test_the_key_is_the_content_of_the_config_not_the_order_of_its_keys(tmp_path):
    store = Store(tmp_path)
    assert store.path({"a": 1, "b": (2, 3)}) == store.path({"b": [2, 3], "a": 1})
    assert store.path({"a": 1}) != store.path({"a": 2})
    assert store.path({"a": 1}) != store.path({"a": "1"})


def test_a_file_explains_itself_and_holds_no_pickle(tmp_path):
    store = Store(tmp_path)
    store.fetch({"n": 3}, lambda: {"x": np.ones(2)})
    with np.load(store.path({"n": 3}), allow_pickle=False) as file:
        assert file["__config__"].item() == '{"n":3}'


def test_map_computes_missing_cases_in_batches_and_keeps_the_order(tmp_path):
    store, calls = Store(tmp_path), []
    store.map([{"n": 2}], squares(calls))
    results = store.map([{"n": n} for n in (5, 2, 4, 3, 5)], squares(calls), batch_size=2, desc="squares")
    assert [int(result["square"]) for result in results] == [25, 4, 16, 9, 25]
    assert calls == [[2], [5, 4], [3]]


def test_what_another_process_has_saved_meanwhile_is_not_computed(tmp_path):
    store, asked = Store(tmp_path), []

    def compute(configs):
        asked.append([config["n"] for config in configs])
        if len(asked) == 1:
            Store(tmp_path).map([{"n": 2}, {"n": 4}, {"n": 5}], lambda configs: [{"x": -c["n"]} for c in configs], 3)
        return [{"x": config["n"]} for config in configs]

    found = store.map([{"n": n} for n in range(6)], compute, batch_size=2, progress=False)
    assert asked == [[0, 1], [3]]
    assert [int(case["x"]) for case in found] == [0, 1, -2, 3, -4, -5]


def test_deleting_one_file_recomputes_one_case(tmp_path):
    store, calls = Store(tmp_path), []
    configs = [{"n": n} for n in range(4)]
    store.map(configs, squares([]))
    store.path({"n": 2}).unlink()
    store.map(configs, squares(calls), batch_size=4)
    assert calls == [[2]]


def test_batches_before_an_interruption_are_kept(tmp_path):
    store, calls = Store(tmp_path), []

    def interrupted(configs):
        if configs[0]["n"] == 2:
            raise KeyboardInterrupt
        return squares(calls)(configs)

    configs = [{"n": n} for n in range(4)]
    with pytest.raises(KeyboardInterrupt):
        store.map(configs, interrupted, batch_size=2)
    store.map(configs, squares(calls), batch_size=2)
    assert calls == [[0, 1], [2, 3]]


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def damage_empty(path):
    path.write_bytes(b"")


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"\x93NUMPY") + 130] ^= 0xFF  # a byte of the first array
    path.write_bytes(content)


def damage_text(path):
    path.write_text("<html>not found</html>")


def damage_swap(path):
    other = Store(path.parent)
    other.fetch({"n": 99}, lambda: {"x": np.zeros(3)})
    os.replace(other.path({"n": 99}), path)


@pytest.mark.parametrize("damage", [damage_truncate, damage_empty, damage_flip, damage_text, damage_swap])
def test_a_damaged_file_is_named_and_computed_again(tmp_path, damage):
    store, config = Store(tmp_path), {"n": 1}
    store.fetch(config, lambda: {"x": np.arange(50.0)})
    damage(store.path(config))
    with pytest.warns(UserWarning, match=store.path(config).name):
        result = store.fetch(config, lambda: {"x": np.arange(50.0)})
    np.testing.assert_array_equal(result["x"], np.arange(50.0))
    store.fetch(config, lambda: pytest.fail("the repaired file is damaged too"))


def test_a_pickle_is_never_loaded(tmp_path):
    store, config = Store(tmp_path), {"n": 1}
    np.savez(store.path(config), __config__=np.array('{"n":1}'), x=np.array([{"a": 1}], dtype=object))
    with pytest.warns(UserWarning, match="damaged"):
        assert store.fetch(config, lambda: {"x": 7})["x"] == 7


def test_a_full_disk_gives_one_clear_error_and_no_half_written_file(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.fetch({"n": 1}, lambda: {"x": np.zeros(3)})

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(np, "savez", full)
        with pytest.raises(OSError, match="could not be saved.*No space left") as caught:
            store.fetch({"n": 2}, lambda: {"x": np.zeros(3)})
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [store.path({"n": 1})]
    store.fetch({"n": 1}, lambda: pytest.fail("lost"))


def test_a_crash_before_the_rename_leaves_no_case(tmp_path, monkeypatch):
    store = Store(tmp_path)
    with monkeypatch.context() as crash:
        crash.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.fetch({"n": 1}, lambda: {"x": np.zeros(3)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"seeds": range(3)}, r"config\['seeds'\] is a range"),
        ({"a": [1, {"b": np.float32(1)}]}, r"config\['a'\]\[1\]\['b'\] is a float32"),
        ({"a": float("nan")}, "nan"),
        ({1: "a"}, "key 1"),
        (["a"], "a dict, not a list"),
    ],
)
def test_a_config_that_is_not_json_is_refused_by_name(tmp_path, config, message):
    with pytest.raises(TypeError, match=message):
        Store(tmp_path).fetch(config, lambda: {})


def test_results_that_are_no_plain_arrays_are_refused(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(TypeError, match="'x' holds Python objects"):
        store.fetch({}, lambda: {"x": [object()]})
    with pytest.raises(TypeError, match="not a list"):
        store.fetch({}, lambda: [1])
    with pytest.raises(TypeError, match="cannot be named 'file'"):
        store.fetch({}, lambda: {"file": 1})
    with pytest.raises(ValueError, match="1 results for 2 configs"):
        store.map([{"n": 1}, {"n": 2}], lambda _: [{"x": 1}], batch_size=2)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["written beside and moved", "one PUT"])
def elsewhere(request, monkeypatch):
    """A store in memory that behaves as any file system does, or as an object store."""
    if request.param == "one PUT":
        monkeypatch.setattr(store_module, "OBJECT_STORES", {"memory"})
    return Store(f"memory://{uuid.uuid4().hex}/cases")


def names(store):
    files, folder = fsspec.core.url_to_fs(str(store))
    return sorted(name.rpartition("/")[2] for name in files.find(folder)) if files.exists(folder) else []


def test_a_store_elsewhere_keeps_cases_as_one_on_disk_does(elsewhere, tmp_path):
    calls, configs = [], [{"n": n} for n in range(3)]
    first = elsewhere.map(configs, squares(calls), batch_size=2)
    again = Store(str(elsewhere)).map(configs, squares(calls))
    assert calls == [[0, 1], [2]] and [int(result["square"]) for result in again] == [0, 1, 4]
    np.testing.assert_array_equal(first[2]["row"], again[2]["row"])
    on_disk = Store(tmp_path)
    on_disk.map(configs, squares([]))
    assert names(elsewhere) == sorted(path.name for path in tmp_path.iterdir())  # and no temporary file
    assert elsewhere.read({"n": 3}) is None


def fail_with(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_write_that_fails_elsewhere_leaves_nothing(elsewhere, monkeypatch):
    elsewhere.fetch({"n": 1}, lambda: {"x": np.zeros(3)})
    before = names(elsewhere)
    with monkeypatch.context() as full:
        full.setattr(type(fsspec.filesystem("memory")), "pipe_file", fail_with(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(OSError, match="could not be saved.*No space left"):
            elsewhere.fetch({"n": 2}, lambda: {"x": np.zeros(3)})
    assert names(elsewhere) == before and len(before) == 1
    elsewhere.fetch({"n": 1}, lambda: pytest.fail("lost"))


def test_a_crash_elsewhere_before_the_move_leaves_no_case(monkeypatch):
    store = Store(f"memory://{uuid.uuid4().hex}")
    with monkeypatch.context() as crash:
        crash.setattr(type(fsspec.filesystem("memory")), "mv", fail_with(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            store.fetch({"n": 1}, lambda: {"x": np.zeros(3)})
    assert names(store) == [] and store.read({"n": 1}) is None


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", "truncated", "pickle"])
def test_a_damaged_case_elsewhere_is_named_and_computed_again(elsewhere, content):
    files, config = fsspec.filesystem("memory"), {"n": 1}
    elsewhere.fetch(config, lambda: {"x": np.arange(50.0)})
    path = elsewhere.path(config)
    if content == "truncated":
        content = files.cat_file(path)[:-30]
    elif content == "pickle":
        buffer = io.BytesIO()
        np.savez(buffer, __config__=np.array('{"n":1}'), x=np.array([{"a": 1}], dtype=object))
        content = buffer.getvalue()
    files.pipe_file(path, content)
    with pytest.warns(UserWarning, match=path):
        result = elsewhere.fetch(config, lambda: {"x": np.arange(50.0)})
    np.testing.assert_array_equal(result["x"], np.arange(50.0))
    elsewhere.fetch(config, lambda: pytest.fail("the repaired file is damaged too"))


def test_a_file_url_is_a_folder(tmp_path):
    store = Store(f"file://{tmp_path}/cases")
    store.fetch({"n": 1}, lambda: {"x": 1})
    assert store.folder == tmp_path / "cases" and str(store) == str(tmp_path / "cases")
    assert Store(tmp_path / "cases").fetch({"n": 1}, lambda: pytest.fail("lost"))["x"] == 1


def test_what_needs_a_folder_says_that_a_store_elsewhere_has_none(elsewhere):
    with pytest.raises(ValueError, match="The store is at memory://.*Give it a Store on a disk"):
        elsewhere.folder / "training"


def test_a_url_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="No store can be at nowhere://x .*URL that fsspec knows"):
        Store("nowhere://x")
