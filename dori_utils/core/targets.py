"""Targets: the images to look for in a model, each with the prompt that may trigger it.

Three sources. `load_targets("testbed")` reads what the bundled model was trained on, with the number of times it saw
each image. `load_targets("sd14")` reads the prompts that Stable Diffusion v1.4 is known to have memorized, 500 of Wen
et al. (2024), found with the extraction of Webster (2023), and 500 that it has not; the lists are those of NeMo
(Hintersdorf et al., NeurIPS 2024). Their images live on the web, many no longer: `download_targets` fetches what is
left, once, and writes down what is gone and why. `read_targets` reads a table of one's own.

Kinds: "VM" verbatim-memorized and "TM" template-memorized prompts; "control" not memorized (in the testbed: never
trained on); only in the testbed, "ladder" images at rising duplication counts, "once" seen a single time, and "twin"
the images that the other of its two models has seen.
"""

import csv
import hashlib
import io
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import requests
from PIL import Image

from dori_utils.core.bars import tqdm
from dori_utils.core.models import BUNDLED, TESTBED
from dori_utils.core.pictures import open_picture, suffixes, to_rgb

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


@dataclass(frozen=True)
class Target:
    """An image to look for: `prompt` may trigger it, `duplicates` is how often training saw it (None: unknown).

    The image is what one sees of the one that is given, see `pictures.to_rgb`.
    """

    id: str
    prompt: str
    image: Image.Image | None = field(repr=False, compare=False)
    kind: str
    duplicates: int | None = None

    def __post_init__(self):
        if self.image is not None:
            object.__setattr__(self, "image", to_rgb(self.image))


def load_targets(name="testbed", *, kind=None, folder=None):
    """Load targets, of one kind or all.

    Args:
        name: "testbed" or "testbed-b", or a key of `PROMPT_LISTS`.
        kind: "VM", "TM", "ladder", "once", "control" or "twin"; default: all that there are.
        folder: where they are; for the testbed default the bundled model, else the folder given to `download_targets`.

    Returns:
        A list of `Target`, images RGB; an image that could not be downloaded is None.

    Raises:
        ValueError: an unknown name, or a kind that the source does not have.
        FileNotFoundError: nothing there yet, with the call that gets it.
        OSError: a table or image that cannot be read.
    """
    _check_name(name, known=[*BUNDLED, *PROMPT_LISTS])
    if name in BUNDLED:
        table = _read_parquet(Path(folder or TESTBED) / "targets.parquet", twin="B" if name == "testbed-b" else "A")
    else:
        table = _read_prompts(name, folder)
    if kind is not None:
        kinds = sorted(table["kind"].unique())
        if kind not in kinds:
            raise ValueError(f"{name} has no targets of kind {kind!r}; its kinds: {', '.join(kinds)}.")
        table = table[table["kind"] == kind]
    return [_to_target(row) for row in table.to_dict("records")]


def read_targets(path):
    """Targets of one's own: a CSV with the columns prompt and image, a file beside the table; or a folder of pictures.

    Optional columns: id (default: the image's file name), kind (default "target"), duplicates. A folder (without those
    in it) has captions in its metadata.csv or metadata.jsonl (file_name and text, as Hugging Face's imagefolder), or
    beside each picture in a .txt of the same name; other files may lie there too.

    Returns:
        A list of `Target`, images RGB.

    Raises:
        ValueError: a column or a value is missing, there are no rows, or two targets have one id.
        OSError: a table or image that is not there or cannot be read, or a picture in the folder without a caption.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    try:
        table = _folder_table(path) if path.is_dir() else read_table(path)
        if "duplicates" in table:
            table["duplicates"] = pd.to_numeric(table["duplicates"])
    except (ValueError, OSError) as error:
        advice = "Give a CSV (prompt,image), or a folder of pictures with captions."
        raise OSError(f"Cannot read the targets in {path} ({error}). {advice}") from error
    if missing := {"prompt", "image"} - set(table):
        raise ValueError(f"{path} has no column {' and no '.join(sorted(missing))}; it has {', '.join(table)}.")
    if table.empty:
        raise ValueError(f"{path} has no rows.")
    if row := first_empty_row(table, ["prompt", "image"]):
        raise ValueError(f"{path} has no prompt or no image in row {row}.")
    stems = table["image"].map(lambda name: Path(name).stem)
    ids = table["id"].fillna(stems) if "id" in table else stems
    if ids.duplicated().any():
        raise ValueError(f"{path} has the id {ids[ids.duplicated()].iloc[0]!r} twice.")
    kinds = table["kind"].fillna("target") if "kind" in table else "target"
    table = table.assign(id=ids, kind=kinds, file=[folder / name for name in table["image"]], image=None)
    return [_to_target(row) for row in table.to_dict("records")]


def _folder_table(folder):
    """Columns prompt and image, and whatever else its metadata has."""
    names = {"file_name": "image", "text": "prompt", "caption": "prompt"}
    kinds, files = suffixes(), sorted(file for file in folder.glob("[!.]*") if file.is_file())
    pictures = [file for file in files if file.suffix.lower() in kinds]
    for name, read in (("metadata.csv", read_table), ("metadata.jsonl", _read_json_lines)):
        if (folder / name).is_file():
            table = read(folder / name)
            if "text" in table:
                table = table.drop(columns=["caption", "prompt"], errors="ignore")  # else the renamed would be two
            table = table.rename(columns=names)
            listed = {Path(image) for image in table.get("image", pd.Series(dtype=str)).dropna()}
            if silent := [file.name for file in pictures if Path(file.name) not in listed]:
                raise ValueError(f"no caption of {silent[0]}: {name} does not name it")
            return table
    captions, pictured = {file.stem for file in files if file.suffix == ".txt"}, {file.stem for file in pictures}
    for file in files:
        if file.suffix != ".txt" and file.stem in captions - pictured:
            raise ValueError(f"{file.name} has a caption and is no kind of picture that is known: convert it to PNG")
    if not pictures:
        raise ValueError("no pictures in it")
    if silent := [file.name for file in pictures if file.stem not in captions]:
        raise ValueError(f"no caption of {silent[0]}: neither metadata.csv nor {Path(silent[0]).stem}.txt")
    prompts = [file.with_suffix(".txt").read_text(encoding="utf-8-sig").strip() or None for file in pictures]
    return pd.DataFrame({"prompt": prompts, "image": [file.name for file in pictures]})


def _read_json_lines(path):
    with path.open(encoding="utf-8-sig") as file:
        table = pd.DataFrame([json.loads(line) for line in file if line.strip()])
    texts = [name for name in ("id", "file_name", "image", "text", "caption", "prompt") if name in table]
    for name in texts:
        if table[name].map(lambda value: isinstance(value, list | dict)).any():
            raise ValueError(f"{name} in {path.name} must be one text, or one number, in each line")
    return table.assign(**{name: table[name].map(str, na_action="ignore") for name in texts})


def read_table(path):
    """A CSV as a DataFrame of texts: only an empty cell is missing, and NA, null and 1.0 are words like others.

    Not with pandas, which takes the surplus fields of a text with commas for an index, or drops them: half of a prompt
    would pass for the prompt.

    Raises:
        ValueError: a row has more or fewer fields than the header, it is no CSV, or no UTF-8.
        OSError: it is not there or cannot be read.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            rows = [row for row in lines if len(row) > 1 or "".join(row).strip()]
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num} of {path}: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty")
    header = rows.pop(0)
    named = [number for number, name in enumerate(header) if name]
    if len(named) != len({header[number] for number in named}):
        raise ValueError(f"{path} has a column twice: {', '.join(header)}")
    for number, row in enumerate(rows, start=1):
        # Only the first column may go without a name: pandas writes an index so. Elsewhere it is half of a text.
        if len(row) != len(header) or any(cell for name, cell in zip(header[1:], row[1:], strict=True) if not name):
            raise ValueError(
                f"row {number} of {path} has {len(row)} fields ({' | '.join(row)[:200]}) and the header has "
                f'{len(named)} ({", ".join(header)}). Put a text with commas in double quotes: "a cat, red"'
            )
    return pd.DataFrame([[row[number] or None for number in named] for row in rows], columns=[header[i] for i in named])


def first_empty_row(table, columns):
    """The number, from 1, of the first row without a word in one of the columns; None if there is none."""
    empty = table[columns].apply(lambda column: column.isna() | (column.str.strip() == "")).any(axis=1)
    return int(empty.argmax()) + 1 if empty.any() else None


def read_pairs(path):
    """(path of a picture, caption) of ordinary pictures, such as COCO's; the pictures are not opened.

    Args:
        path: a CSV with the columns image, a file beside the table, and caption (or prompt); or COCO's own
            captions_*.json, with the pictures in a folder that is named like its ending (val2014/), beside it or beside
            its folder annotations/: of each picture the first caption, in the order of the pictures' numbers.

    Raises:
        ValueError: no such columns, or no pairs.
        OSError: a table or a picture that is not there or cannot be read.
    """
    path = Path(path)
    try:
        pairs = _coco_pairs(path) if path.suffix == ".json" else _table_pairs(path)
    except (KeyError, TypeError, OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"Cannot read pairs from {path} ({error}). Give a CSV (image,caption) or COCO's captions_val2014.json."
        ) from error
    if not pairs:
        raise ValueError(f"{path} has no pairs of picture and caption.")
    if absent := [image for image, _ in pairs if not image.is_file()]:
        raise FileNotFoundError(
            f"{len(absent)} of the {len(pairs)} pictures of {path} are not there, such as {absent[0]}."
        )
    return pairs


def _table_pairs(path):
    table = read_table(path)
    captions = next((name for name in ("caption", "prompt") if name in table), None)
    if captions is None or "image" not in table:
        raise ValueError(f"its columns are {', '.join(table)}")
    if row := first_empty_row(table, [captions, "image"]):
        raise ValueError(f"no caption or no image in row {row}")
    return [(path.parent / image, caption) for image, caption in zip(table["image"], table[captions], strict=True)]


def _coco_pairs(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    captions = {}
    for annotation in content["annotations"]:
        if caption := annotation["caption"].strip():
            captions.setdefault(annotation["image_id"], caption)
    files = {image["id"]: image["file_name"] for image in content["images"]}
    name = path.stem.rpartition("_")[2]
    beside, above = path.parent / name, path.parent.parent / name  # the published archive has it in annotations/
    folder = above if path.parent.name == "annotations" and not beside.is_dir() else beside
    return [(folder / files[number], captions[number]) for number in sorted(files) if number in captions]


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


def _read_parquet(path, twin):
    """The testbed's table as its model A or B sees it, with columns id, prompt, kind, duplicates, image (PNG bytes)."""
    if not path.is_file():
        raise FileNotFoundError(f"No {path}. `python -m tools.training` makes it together with the model.")
    try:
        columns = ["id", "prompt", "list", "kind", "seen_a", "seen_b", "image"]
        table = pd.read_parquet(path, columns=columns)
    except Exception as error:
        raise OSError(f"Cannot read {path} ({error}). Restore it with `git checkout testbed`.") from error
    others = ~table["list"].isin([twin, "C"])
    table = table.assign(kind=table["kind"].mask(others, "twin"), duplicates=table[f"seen_{twin.lower()}"])
    own_first = table["list"].map({twin: 0, "C": 1}).fillna(2)
    return table.iloc[own_first.argsort(kind="stable")].reset_index(drop=True)


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


def _to_target(row):
    """A table row with the image as PNG bytes ("image") or as a file ("file")."""
    source = io.BytesIO(row["image"]) if row.get("image") else row.get("file")
    where = row.get("file") or "targets.parquet"
    image = open_picture(source, f"of target {row['id']} in {where}") if source else None
    duplicates = row.get("duplicates")
    duplicates = None if pd.isna(duplicates) else int(duplicates)
    return Target(row["id"], row["prompt"], image, row["kind"], duplicates)


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
