"""Store: finished cases on disk. What is there is not computed again; what is half done does not exist.

A case is a config (what was asked, as JSON) and its result (named arrays). It lives in one .npz file that is named
after a hash of the config and holds the config too, so deleting one file recomputes one case, and a folder explains
itself. Put everything into the config that the result depends on: the hash of the model, its sampling settings, the
name of the SSCD weights. Files are written beside their place and renamed, so a crash or a full disk leaves either the
whole case or none. No pickle is written or read.

The folder may also be elsewhere: a URL that fsspec knows, such as s3://bucket/folder. An object store takes a file
whole or not at all; any other place has it written beside and moved, as here.

The idea of one result file for each case is from ROME's experiments (Meng et al., 2022).
"""

import hashlib
import io
import json
import math
import os
import uuid
import warnings
import zipfile
import zlib
from pathlib import Path

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from dori_utils.core.bars import tqdm
from dori_utils.core.folders import ROOT

CONFIG = "__config__"
RESERVED = (CONFIG, "file", "allow_pickle")  # the last two are arguments of np.savez
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"}  # fsspec's names: a PUT is atomic there
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, NotImplementedError)


class Store:
    """Cases in one folder, which is made when the first case is saved.

    Args:
        folder: a path, or an fsspec URL, such as s3://bucket/folder (which needs the package s3fs).

    Raises:
        ValueError: a URL of a kind that fsspec does not know, or whose package is not installed.
    """

    def __init__(self, folder):
        self._root, self._files = _located(folder)

    def __str__(self):
        return str(self._root) if self._files is None else self._files.unstrip_protocol(self._root)

    @property
    def folder(self):
        """The folder of a store on a disk.

        Raises:
            ValueError: the store is elsewhere, and so has none.
        """
        if self._files is not None:
            raise ValueError(
                f"The store is at {self}, not in a folder of this machine, which this needs: training, for one, keeps "
                "its work in progress there. Give it a Store on a disk."
            )
        return self._root

    def path(self, config):
        """The file that holds, or would hold, the case of this config: a `Path`; a text if the store is elsewhere."""
        name = f"{hashlib.sha256(canonical_json(config).encode()).hexdigest()[:32]}.npz"
        return self._root / name if self._files is None else f"{self._root}/{name}"

    def read(self, config):
        """The result of a case, as `fetch` gives it; None if there is none, or (with a warning) if it is damaged."""
        path = self.path(config)
        try:
            with self._opened(path) as file, np.load(file, allow_pickle=False) as content:
                arrays = {name: content[name] for name in content.files}
            if arrays.pop(CONFIG).item() != canonical_json(config):
                raise ValueError("it holds the case of another config")
        except FileNotFoundError:
            return None
        except DAMAGED as error:
            warnings.warn(f"Stored case {path} is damaged ({error}); it is computed again.", stacklevel=2)
            return None
        return arrays

    def fetch(self, config, compute):
        """The case's result, from disk or from `compute()`.

        Args:
            config: dict of JSON values; tuples count as lists.
            compute: a function without arguments that returns a dict of named arrays.

        Returns:
            dict of named arrays.

        Raises:
            TypeError: config is not JSON, or the result is not a dict of arrays of numbers, booleans or text.
            OSError: the result could not be saved, for example on a full disk; nothing half-written is left.
        """
        return self.map([config], lambda _: [compute()], progress=False)[0]

    def map(self, configs, compute_many, batch_size=1, desc=None, progress=True):
        """The results of many cases, in the order of `configs`; computes only missing ones, and saves batch by batch.

        Args:
            configs: list of dicts, see `fetch`.
            compute_many: list of configs to list of results; gets up to `batch_size` missing ones at a time.
            batch_size: cases that are computed together.
            desc: what the progress bar says.
            progress: show a progress bar while there is something to compute.
        """
        configs = list(configs)
        paths = [self.path(config) for config in configs]
        by_path = dict(zip(paths, configs, strict=True))  # a config that comes twice is one case
        results = {path: self.read(config) for path, config in by_path.items()}
        missing = [path for path, result in results.items() if result is None]
        done = len(results) - len(missing)
        with tqdm(total=len(results), initial=done, desc=desc, disable=not (progress and missing)) as bar:
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                if start:  # that took a while: another process may have been here
                    results |= {path: self.read(by_path[path]) for path in batch}
                wanted = [path for path in batch if results[path] is None]
                computed = compute_many([by_path[path] for path in wanted]) if wanted else []
                if len(computed) != len(wanted):
                    raise ValueError(f"compute_many returned {len(computed)} results for {len(wanted)} configs.")
                for path, result in zip(wanted, computed, strict=True):
                    results[path] = self._write(by_path[path], result)
                bar.update(len(batch))
        return [dict(results[path]) for path in paths]

    def _opened(self, path):
        return open(path, "rb") if self._files is None else io.BytesIO(self._files.cat_file(path))

    def _write(self, config, result):
        """Save a result and return it as arrays, just as reading the file would."""
        path, arrays = self.path(config), _arrays(result)
        named = arrays | {CONFIG: np.array(canonical_json(config))}
        try:
            if self._files is None:
                _write_to_disk(path, named)
            else:
                _write_elsewhere(self._files, path, named)
        except OSError as error:
            raise OSError(
                error.errno,
                f"A finished case could not be saved ({error.strerror or error}). Free some space or check the "
                "folder's permissions and run again: all cases before this one are kept",
                str(path),
            ) from error
        return arrays


def default_store():
    """The store of notebooks and scorecard: the environment variable DORI_CACHE, else cache/ in the repository."""
    return Store(os.environ.get("DORI_CACHE") or ROOT / "cache")


def data_folder():
    """Where downloaded things are looked for: the environment variable DORI_DATA, else data/ in the repository."""
    return Path(os.environ.get("DORI_DATA") or ROOT / "data")


def canonical_json(config):
    """The one JSON text of a config: sorted keys, no spaces, and nothing that is not JSON.

    Raises:
        TypeError: says which value is not JSON.
    """
    if not isinstance(config, dict):
        raise TypeError(f"A config is a dict, not a {type(config).__name__}.")
    _check_json(config, "config")
    return json.dumps(config, sort_keys=True, separators=(",", ":"))


def _check_json(value, where):
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: JSON keys are text.")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    elif value is not None and not isinstance(value, str | int | float):  # bool is an int
        raise TypeError(
            f"{where} is a {type(value).__name__}, which is not JSON: give text, a number, a list or a hash of it."
        )
    elif isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{where} is {value}, which JSON has no number for.")


def _located(folder):
    """A folder as `Path` and None; of one elsewhere the path as its file system has it, and that file system."""
    if "://" not in os.fspath(folder):
        return Path(folder), None
    try:
        files, path = fsspec.core.url_to_fs(folder)
    except (ValueError, ImportError) as error:
        raise ValueError(f"No store can be at {folder} ({error}). Give a folder or a URL that fsspec knows.") from error
    return (Path(path), None) if isinstance(files, LocalFileSystem) else (path.rstrip("/"), files)


def _write_to_disk(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_elsewhere(files, path, arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    protocols = {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)
    if protocols & OBJECT_STORES:
        files.pipe_file(path, buffer.getvalue())
        return
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
    files.makedirs(folder, exist_ok=True)
    try:
        files.pipe_file(temporary, buffer.getvalue())
        files.mv(temporary, path)
    finally:
        if files.exists(temporary):
            files.rm_file(temporary)


def _arrays(result):
    if not isinstance(result, dict):
        raise TypeError(f"A result is a dict of named arrays, not a {type(result).__name__}.")
    arrays = {name: np.asarray(value) for name, value in result.items()}
    for name, array in arrays.items():
        if name in RESERVED:
            raise TypeError(f"A result cannot be named {name!r}: choose another name.")
        if array.dtype.hasobject:
            raise TypeError(f"Result {name!r} holds Python objects: give arrays of numbers, booleans or text.")
    return arrays
