"""Prompt lists that others have published, and their images, as far as these are still online."""

import csv
import hashlib
import io
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import requests
from PIL import Image

from dori_utils.core.bars import tqdm
from dori_utils.core.pictures import to_rgb

NEMO_URL = (
    "https://raw.githubusercontent.com/ml-research/localizing_memorization_in_diffusion_models/"
    "c8de0c620ec511cdb9e937905d1503cd9758910b/prompts"
)

MIN_SIDE = 16  # pixels; hosts answer for a lost image with a 1 x 1 one
MAX_BYTES = 64 * 2**20  # of one file; nobody's answer may fill the memory


@dataclass(frozen=True)
class PromptList:
    """A published list of prompts: its file, checksum, and kind (None: the file's own `type` column says)."""

    file: str
    sha256: str
    kind: str | None = None


PROMPT_LISTS = {
    "sd14": (
        PromptList(
            "memorized_laion_prompts.csv",
            "0b527a5965dc463e7a3e0d234ff7fd5489b1a76869c456dbb209dc753cb4af25",
        ),
        PromptList(
            "unmemorized_laion_prompts.csv",
            "f453b418cc157864baacbf68d97447273feac41e8066b2ead6b307bf795988e1",
            kind="control",
        ),
    )
}


def download_targets(
    name,
    folder,
    *,
    base_url=NEMO_URL,
    images=True,
    workers=16,
    attempts=3,
    backoff=1.0,
    timeout=20.0,
    progress=True,
):
    """Download a prompt list and its images, for `load_targets(name, folder=folder)`.

    What is there already is kept, so a second call resumes, and tries the missing images again. An image counts when
    it decodes; a host that answers with a picture of an error message passes: look at what you got.

    Args:
        name: a key of `PROMPT_LISTS`.
        folder: written to: the lists as published, `images/`, and `dead_images.csv`.
        base_url: where the lists are; default: NeMo's repository, at a fixed commit.
        images: False fetches the prompts only.
        workers: images fetched at the same time.
        attempts: tries for each file; only what may pass is tried again (no connection, timeout, server error, 429,
            a body that is cut off).
        backoff: seconds before the second try; doubles with each further one.
        timeout: seconds without an answer after which a try has failed.
        progress: show a progress bar.

    Returns:
        DataFrame (id, url, reason) of the images that cannot be had, also written to `dead_images.csv`.

    Raises:
        OSError: a list cannot be had or is not the published one, or the disk does not take a file.
    """
    _check_name(name, known=list(PROMPT_LISTS))
    folder = Path(folder)
    image_folder = folder / "images"
    image_folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.rglob("*.part"):  # left by a process that was killed
        stale.unlink()

    def get(url):
        return _get(url, attempts=attempts, backoff=backoff, timeout=timeout)

    for prompt_list in PROMPT_LISTS[name]:
        _download_list(prompt_list, folder, base_url, get)
    table = _read_prompts(name, folder)
    wanted = table[table["file"].isna()][["id", "url"]] if images else table[:0][["id", "url"]]
    pool = ThreadPoolExecutor(workers)
    try:
        reasons = pool.map(lambda row: _download_image(*row, image_folder, get), wanted.itertuples(index=False))
        reasons = list(tqdm(reasons, total=len(wanted), desc="images", disable=not progress))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C: finish what is under way, start nothing more
    dead = wanted.assign(reason=reasons).dropna(subset="reason").reset_index(drop=True)
    if images:
        _write_atomically(folder / "dead_images.csv", dead.to_csv(index=False).encode())
    return dead


def _check_name(name, known):
    if name not in known:
        raise ValueError(f"Unknown targets {name!r}. Known: {', '.join(known)}.")


def _read_prompts(name, folder):
    """A downloaded prompt list, with columns id, prompt, kind, url, file (of the image, None if it is not there)."""
    if folder is None:
        raise ValueError(f"load_targets({name!r}) needs folder=..., the one given to download_targets.")
    files = {path.stem: path for path in Path(folder, "images").glob("*")}
    tables = []
    for prompt_list in PROMPT_LISTS[name]:
        table = _read_list(prompt_list, Path(folder), name)
        kind = prompt_list.kind or table["type"]
        ids = name + "-" + (prompt_list.kind or table["type"].str.lower()) + "-" + table["Index"]
        tables.append(pd.DataFrame({"id": ids, "prompt": table["Caption"], "kind": kind, "url": table["URL"]}))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(file=[files.get(id) for id in table["id"]])


def _read_list(prompt_list, folder, name):
    path = folder / prompt_list.file
    if not path.is_file():
        raise FileNotFoundError(f"No {path}. Get it with download_targets({name!r}, {str(folder)!r}).")
    data = path.read_bytes()
    if _sha256(data) != prompt_list.sha256:
        raise OSError(
            f"{path} is not the published list (its SHA-256 is {_sha256(data)}). Delete it and call "
            f"download_targets({name!r}, {str(folder)!r})."
        )
    rows = csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""), delimiter=";")
    return pd.DataFrame(list(rows))


def _download_list(prompt_list, folder, base_url, get):
    path, url = folder / prompt_list.file, f"{base_url.rstrip('/')}/{prompt_list.file}"
    if path.is_file() and _sha256(path.read_bytes()) == prompt_list.sha256:
        return
    try:
        data = get(url)
    except requests.RequestException as error:
        raise OSError(f"Cannot download {url}: {_reason(error)}. Check the network and call again.") from error
    if _sha256(data) != prompt_list.sha256:
        raise OSError(
            f"{url} is not the published list: its SHA-256 is {_sha256(data)}, not {prompt_list.sha256}. Nothing was "
            "written; call again, or give a base_url that has the original."
        )
    _write_atomically(path, data)


def _download_image(id, url, folder, get):
    """Fetch one image; None, or the reason why it cannot be had."""
    try:
        data = get(url)
        suffix = _image_format(data)
    except (requests.RequestException, ValueError) as error:
        return _reason(error)
    _write_atomically(folder / f"{id}.{suffix}", data)
    return None


def _get(url, *, attempts, backoff, timeout):
    """The complete body of a URL."""
    headers = {"User-Agent": "Mozilla/5.0 (compatible; dori_utils)"}
    for attempt in range(1, attempts + 1):
        try:
            with requests.get(url, timeout=timeout, headers=headers, stream=True) as response:
                response.raise_for_status()
                return _body(response)
        except requests.RequestException as error:
            if attempt == attempts or not _may_pass(error):
                raise
        time.sleep(backoff * 2 ** (attempt - 1))


def _body(response):
    data = bytearray()
    for chunk in response.iter_content(2**16):  # raises if the body is shorter than announced
        data += chunk
        if len(data) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
    return bytes(data)


def _may_pass(error):
    if isinstance(error, requests.HTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    transient = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    return isinstance(error, transient)


def _reason(error):
    """What went wrong, short enough for a cell of a table."""
    if isinstance(error, requests.HTTPError):
        return f"HTTP {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.RequestException):
        return f"{type(error).__name__}: {error}"[:200]
    return str(error)


def _image_format(data):
    """The format ("jpeg", "png", ...) of an image that really decodes."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            to_rgb(image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, EOFError, ... by format
        raise ValueError(f"not an image: {str(error) or type(error).__name__}") from error
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"only {image.width} x {image.height} pixels")
    return image.format.lower()


def _write_atomically(path, data):
    """The whole file or none: written beside its place, then moved there."""
    part = path.with_name(f"{path.name}.{threading.get_ident()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _sha256(data):
    return hashlib.sha256(data).hexdigest()
