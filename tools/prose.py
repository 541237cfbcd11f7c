"""Numbers in the prose of notebooks and README, filled from figures/*.csv by `python -m tools.prose`.

A number is followed by a comment that says where it comes from, which no reader of the rendered text sees:

    MR is 0.06 (0.01 to 0.28)<!-- 02_methods | mitigation=NeMo | {MR:.2f} ({MR low:.2f} to {MR high:.2f}) -->

that is: a table, the row (`column=value`, several with `;`), and a format of its columns. Where several rows fit, a
word before the format says which number of them is meant: min, max, mean, median, or count.
"""

import json
import re
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOURCE = re.compile(r"<!-- *([\w-]+) *\| *([^|>]*?) *\|(?: *(min|max|mean|median|count) *\|)? *([^|]+?) *-->")
NUMBER = r"(?:[-+]?[\d.,e-]*\d%?|\?)"  # "?" stands for a number that has never been filled


def filled(text: str, folder: Path = ROOT / "figures") -> str:
    """The text with the numbers as the tables have them now.

    Raises:
        ValueError: what stands before a comment is not in its format, or no row or several fit it.
    """
    parts, end = [], 0
    for source in SOURCE.finditer(text):
        name, rows, summary, template = source.groups()
        old = re.search(pattern(template) + r"\Z", text[end : source.start()])
        if old is None:
            before = text[max(end, source.start() - 40) : source.start()]
            raise ValueError(f"{before!r} does not end in a number of the format of {source.group()}")
        parts += [text[end : end + old.start()], value(folder / f"{name}.csv", rows, summary, template), source.group()]
        end = source.end()
    return "".join([*parts, text[end:]])


def pattern(template: str) -> str:
    """The regular expression that a text in this format fits, with any numbers."""
    return NUMBER.join(re.escape(part) for part in re.split(r"\{[^}]*\}", template))


def value(path: Path, rows: str, summary: str | None, template: str) -> str:
    """What the format gives of these rows of a table."""
    table = pd.read_csv(path, comment="#")
    for condition in filter(None, (part.strip() for part in rows.split(";"))):
        column, _, wanted = (part.strip() for part in condition.partition("="))
        table = table[[same(cell, wanted) for cell in table[column]]]
    if summary == "count":
        return template.format_map({"count": len(table)})
    if summary is not None and len(table):
        return template.format_map(table.select_dtypes("number").agg(summary).to_dict())
    if len(table) != 1:
        raise ValueError(f"{len(table)} rows of {path.name} have {rows!r}: name one, or min, max, mean, median, count.")
    return template.format_map(table.iloc[0].to_dict())


def same(cell, wanted: str) -> bool:
    return str(cell) == wanted or (isinstance(cell, int | float) and str(float(cell)) == wanted)


def refill(path: Path) -> str:
    """The content of a document with its numbers as they are now: of a notebook, those of its Markdown cells."""
    content = path.read_text()
    if path.suffix != ".ipynb":
        return filled(content)
    notebook = json.loads(content)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = filled("".join(cell["source"])).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for document in [ROOT / "README.md", ROOT / "testbed" / "README.md", *NOTEBOOKS]:
        document.write_text(refill(document))
