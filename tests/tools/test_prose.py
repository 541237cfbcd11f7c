"""Numbers in prose are those of the tables that they name."""

import re

import pytest

from tools import prose

TABLE = (
    "# model: testbed\nmitigation,seed,MR,MR low,note\nnone,0,0.94,0.7,a\nNeMo,0,0.0625,0.01,b\nNeMo,1,0.125,0.02,c\n"
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "02_methods.csv").write_text(TABLE)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("02_methods | mitigation=none | {MR:.2f}", "0.94"),
        ("02_methods | mitigation=NeMo; seed=1 | {MR:.0%}", "12%"),
        ("02_methods | mitigation=NeMo; seed=0 | {MR:.2f} (from {MR low:.2f})", "0.06 (from 0.01)"),
        ("02_methods | mitigation=NeMo | max | {MR:.3f}", "0.125"),
        ("02_methods | | count | {count}", "3"),
        ("02_methods | mitigation=NeMo | count | {count}", "2"),
    ],
)
@pytest.mark.parametrize("before", ["?", "7.77", "-3%", "1,024"])
def test_a_number_is_filled_from_the_row_that_it_names(folder, source, number, before):
    template = source.rpartition("|")[2].strip()
    text = re.sub(r"\{[^}]*\}", before, template)
    again = prose.filled(f"It is {text}<!-- {source} -->, and 12 others.", folder)
    assert again == f"It is {number}<!-- {source} -->, and 12 others."
    assert prose.filled(again, folder) == again


def test_what_cannot_be_filled_is_an_error(folder):
    with pytest.raises(ValueError, match="2 rows of 02_methods.csv have 'mitigation=NeMo'"):
        prose.filled("It is 0.1<!-- 02_methods | mitigation=NeMo | {MR:.2f} -->", folder)
    with pytest.raises(ValueError, match="0 rows"):
        prose.filled("It is 0.1<!-- 02_methods | mitigation=ESD | {MR:.2f} -->", folder)
    with pytest.raises(ValueError, match="'It is high' does not end in a number"):
        prose.filled("It is high<!-- 02_methods | mitigation=none | {MR:.2f} -->", folder)
    with pytest.raises(FileNotFoundError):
        prose.filled("It is 0.1<!-- 02_other | | {MR:.2f} -->", folder)
    with pytest.raises(KeyError):
        prose.filled("It is 0.1<!-- 02_methods | mitigation=none | {SSCD:.2f} -->", folder)


@pytest.mark.parametrize("document", [prose.ROOT / "README.md", *prose.NOTEBOOKS], ids=lambda path: path.stem)
def test_the_numbers_of_a_document_are_those_of_the_tables(document):
    assert prose.refill(document) == document.read_text(), "run `python -m tools.prose`"
