"""Tables: a CSV as a user has it, and pairs of picture and caption."""

import csv
import json
from pathlib import Path

import pandas as pd


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
