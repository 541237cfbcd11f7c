"""Hashes: which weights are these? An edit, NeMo's statistics and every kept result belong to one model.

Hashing a large model takes seconds, and while an edit is applied the hash of the model beneath it cannot be computed at
all. So whoever works with a pipeline does it within `with known(pipe):`, where each hash is computed once.
"""

import hashlib
import inspect
import threading
import weakref
from contextlib import contextmanager

import torch

WEIGHTS = ("unet", "text_encoder", "vae")

_TODAYS_HASH = {}  # hash over the names that transformers before 5.6 gave → `model_hash`, of what was hashed so far
_KNOWN = weakref.WeakKeyDictionary()  # U-Net → what is known of it within `known`


class _Known:
    def __init__(self):
        self.lock = threading.RLock()
        self.depth = 0  # of `known`
        self.base = self.now = None  # hashes: without the edits that are applied, and with them
        self.edits = self.trained = 0  # how many are applied; whether weights move


def model_hash(pipe):
    """Fingerprint of a pipeline's weights: 16 hex characters, the same on every device.

    SHA-256 over name, dtype, shape and bytes of every weight of U-Net, text encoder and VAE. Any change to any
    weight changes it; the scheduler and the tokenizer are not part of it. Nor is the prefix text_model. of a text
    encoder's names, which transformers dropped in 5.6, nor position_ids, which are no weights.
    """
    digests = {"": hashlib.sha256()}  # what text encoder's names begin with → digest
    for part in WEIGHTS:
        weights = getattr(pipe, part).state_dict()
        if part == "text_encoder":
            digests["text_model."] = digests[""].copy()
            weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
        for name, tensor in sorted(weights.items()):
            if name.endswith("position_ids"):
                continue
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            for prefix, digest in digests.items():
                own = prefix if part == "text_encoder" else ""
                digest.update(f"{part}.{own}{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(content)
    found, former = (digest.hexdigest()[:16] for digest in digests.values())
    _TODAYS_HASH[former] = found
    return found


def todays_hash(model):
    """`model_hash` of the model that a file names by its hash, which may be one over the names of transformers < 5.6.

    The latter is recognized of every model that this process has hashed; any other hash comes back as it is.
    """
    return _TODAYS_HASH.get(model, model)


@contextmanager
def known(pipe):
    """Within it the weights of a pipeline are this thread's affair, and neither of its hashes is computed twice.

    Raises:
        RuntimeError: they are another thread's, which may have an edit in them. To wait could take for ever, if that
            one waits for this.
    """
    state = _KNOWN.setdefault(pipe.unet, _Known())
    if not state.lock.acquire(blocking=False):
        raise RuntimeError(
            "Another thread is at work with this pipeline and may have an edit in its weights: wait until it is done, "
            "or load the model once more for this one."
        )
    state.depth += 1
    try:
        yield
    finally:
        state.depth -= 1
        if not state.depth:
            state.base = state.now = None
        state.lock.release()


@contextmanager
def changing(pipe, trained=False):
    """`known`, for whoever puts other weights into a pipeline and its own back at the end; yields `base_hash`.

    trained: they go on changing.
    """
    with known(pipe):
        base, state = base_hash(pipe), _KNOWN[pipe.unet]
        outer, state.now = state.now, None
        state.edits += 1
        state.trained += trained
        try:
            yield base
        finally:
            state.edits -= 1
            state.trained -= trained
            state.now = outer


def base_hash(pipe):
    """`model_hash` of the pipeline as it is without the edits that are applied at the moment."""
    state = _KNOWN.get(pipe.unet)
    if state is None or not state.depth:
        return model_hash(pipe)
    if state.base is None:  # and so no edit is applied
        state.base = model_hash(pipe)
    return state.base


def current_hash(pipe):
    """`model_hash` of the pipeline as it is now, edits that are applied included."""
    state = _KNOWN.get(pipe.unet)
    if state is None or not state.depth or state.trained:
        return model_hash(pipe)
    if not state.edits:
        return base_hash(pipe)
    if state.now is None:
        state.now = model_hash(pipe)
    return state.now


def differing_settings(own, other, ignored=()):
    """Names of the settings in which two models or schedulers of diffusers differ, of those that their class has.

    Whoever saves one may note more in its config, such as an average's decay. 8 and [8, 8, 8, 8] are the same setting.
    """
    names = [name for name in inspect.signature(type(own).__init__).parameters if name in own.config]
    ours, theirs = ({name: _plain(part.config.get(name)) for name in names} for part in (own, other))
    return [name for name in names if name not in ignored and ours[name] != theirs[name]]


def _plain(setting):
    setting = list(setting) if isinstance(setting, list | tuple) else setting
    return setting[0] if isinstance(setting, list) and setting and setting == setting[:1] * len(setting) else setting
