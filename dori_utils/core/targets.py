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

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from PIL import Image

from dori_utils.core.hub import BUNDLED, TESTBED
from dori_utils.core.pictures import open_picture, suffixes, to_rgb
from dori_utils.core.prompt_lists import PROMPT_LISTS, _check_name, _read_prompts
from dori_utils.core.tables import first_empty_row, read_table


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


def _to_target(row):
    """A table row with the image as PNG bytes ("image") or as a file ("file")."""
    source = io.BytesIO(row["image"]) if row.get("image") else row.get("file")
    where = row.get("file") or "targets.parquet"
    image = open_picture(source, f"of target {row['id']} in {where}") if source else None
    duplicates = row.get("duplicates")
    duplicates = None if pd.isna(duplicates) else int(duplicates)
    return Target(row["id"], row["prompt"], image, row["kind"], duplicates)
