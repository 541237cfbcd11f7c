"""Cache: what was computed once is kept, under a key that is made of everything that it was made of.

`kept` for one result, `kept_each` for many alike. Whoever calls them writes no key: it is what the result is called and
the fingerprints of all that it is given.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass

import numpy as np
import torch
from PIL import Image

from dori_utils import __version__
from dori_utils.core.hashes import current_hash
from dori_utils.core.pictures import to_rgb


def kept(store, what: str, compute: Callable, **inputs) -> dict:
    """A result from the store, or `compute(**inputs)`: the key is what it is, and all that it is given.

    So nothing that the result depends on can be missing from the key, as long as `compute` uses its arguments alone;
    tests/test_notebook_keys.py sees to that.

    Args:
        what: a name, such as "NeMo's decisions".
        compute: a function that returns a dict of named arrays.
        inputs: whatever `key_of` knows.
    """
    return store.fetch(_key(what, inputs), lambda: compute(**inputs))


def kept_each(
    store, what: str, cases: list[dict], compute: Callable, *, batch_size=1, progress=False, **shared
) -> list:
    """The results of many cases, each with a key of its own; computes the missing ones.

    Args:
        cases: dicts of what each of them depends on, by name.
        compute: a function of the numbers of some cases that returns their results, dicts of named arrays.
        batch_size: cases that are computed together.
        shared: what all of them depend on.
    """
    common = _key(what, shared)
    keys = [common | {name: key_of(value) for name, value in case.items()} for case in cases]
    numbers = {id(key): number for number, key in enumerate(keys)}

    def compute_missing(missing: list[dict]) -> list[dict]:
        return compute([numbers[id(key)] for key in missing])

    return store.map(keys, compute_missing, batch_size=batch_size, desc=what, progress=progress)


def _key(what: str, inputs: dict) -> dict:
    return {"what": what, "dori_utils": __version__, **{name: key_of(value) for name, value in inputs.items()}}


def key_of(value):
    """What stands for a value in a key: itself if JSON has it, else a fingerprint of all of it.

    Of a sequence that draws its items when they are asked for, its length, its first and its last item.

    Raises:
        TypeError: a value of a kind of which no key is known.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | int | float):
        return value if value != math.inf else "infinity"
    if isinstance(value, dict):
        return {name: key_of(item) for name, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [key_of(item) for item in value]
    if isinstance(value, Image.Image):
        return key_of(np.array(to_rgb(value)))
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().contiguous().numpy()  # half precision is told by its numbers
    if isinstance(value, np.ndarray):
        return hashlib.sha256(f"{value.dtype} {value.shape}".encode() + value.tobytes()).hexdigest()[:32]
    if hasattr(value, "unet"):  # a pipeline
        return {"model": current_hash(value), **beside_weights(value)}
    if hasattr(value, "fingerprint"):  # an edit, statistics, an SSCD, a CLIP
        return value.fingerprint() if callable(value.fingerprint) else value.fingerprint
    if is_dataclass(value):
        return {"of": f"{type(value).__module__}.{type(value).__name__}"} | {
            f.name: key_of(getattr(value, f.name)) for f in fields(value)
        }
    if isinstance(value, Sequence):
        return [len(value), *(key_of(value[index]) for index in range(0, len(value), max(1, len(value) - 1)))]
    raise TypeError(f"A {type(value).__name__} cannot be part of a key: give what it is made of.")


def beside_weights(pipe) -> dict:
    """What else of a pipeline its generations depend on: the sampler, the latents' scale, which token a word is."""
    settings = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    scheduler = f"{type(pipe.scheduler).__name__} {sorted(settings.items())}"
    tokens = hashlib.sha256(repr(sorted(pipe.tokenizer.get_vocab().items())).encode())
    scale = {name: pipe.vae.config.get(name) for name in ("scaling_factor", "shift_factor")}
    return {"scheduler": scheduler, "latents": scale, "tokens": tokens.hexdigest()[:16]}
