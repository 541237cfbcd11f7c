"""README's tables are those of figures/, and its commands, as those of the other documents, work as printed."""

import importlib.util
import re
import shlex

import pandas as pd
import pytest

from dori_utils.cli import main as command
from tools import book, readme
from tools.scorecard import BARS


@pytest.mark.parametrize("document", readme.SECTIONS, ids=lambda path: str(path.relative_to(readme.ROOT)))
def test_the_tables_of_a_document_are_those_of_the_figures(document):
    text = document.read_text()
    assert readme.filled(text, readme.SECTIONS[document]) == text, "run `python -m tools.readme`"


def test_numbers_come_from_the_files_and_lost_marks_are_an_error():
    text = readme.README.read_text()
    other = re.sub(r"\d\.\d\d (?=± )", "7.77 ", text, count=1)
    assert other != text and readme.filled(other) == text
    with pytest.raises(ValueError, match="<!-- dori -->"):
        readme.filled(text.replace("<!-- dori -->", ""))


def test_under_the_first_picture_a_copy_is_what_scores_above_the_line(monkeypatch):
    scores = {("original", "none"): 0.9, ("NeMo", "none"): 0.2, ("NeMo", "DoRI"): 0.702, ("Wanda", "none"): 0.1}
    scores[("Wanda", "DoRI")] = 0.698
    rows = [{"mitigation": m, "attack": a, "seed": 0, "sscd": score} for (m, a), score in scores.items()]
    rows += [row | {"seed": 1, "sscd": 1 - row["sscd"]} for row in rows]  # the picture is of the first seed
    monkeypatch.setattr(readme, "_read", lambda name: pd.DataFrame(rows))
    assert readme.idea().endswith(
        "its prompt 0.90 (a copy); pruned with NeMo, its prompt 0.20 and a trigger 0.70 (a copy); "
        "pruned with Wanda, its prompt 0.10 and a trigger 0.70."
    )


DOCUMENTS = ["README.md", "docs/cluster.md", "testbed/README.md"]
COMMAND = re.compile(r"\bpython -m ((?:dori_utils|tools)\b[\w.]*)([^\n;&|]*)")


def code_of(name):
    """All code of a document, blocks and inline, one command a line, without comments."""
    text = (readme.ROOT / name).read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    code = [*(block.replace("\\\n", " ") for block in blocks), *(" ".join(code.split()) for code in inline)]
    return re.sub("(^| )# .*", "", "\n".join(code), flags=re.MULTILINE)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_of_the_package_can_be_typed_as_printed(name):
    commands = COMMAND.findall(code_of(name))
    assert commands
    for module, arguments in commands:
        words = shlex.split(arguments)
        if module == "dori_utils":
            assert words[0] in ("audit", "sweep", "download")
            command._parse([word for word in words if word != "--help"] + ["--out", "x"] * (words[-1] == "--help"))
        else:
            assert importlib.util.find_spec(module) is not None
            assert not words or module == "tools.scorecard"
            assert all(any(bar.name.startswith(word) for bar in BARS) for word in words)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_make_command_has_a_target_and_notebooks_that_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", (readme.ROOT / "Makefile").read_text(), re.MULTILINE))
    for target, arguments in re.findall(r'\bmake ([a-z-]+)(?: ARGS="([^"]*)")?', code_of(name)):
        assert target in targets
        options = book._parse(shlex.split(arguments))
        assert book.find_notebooks(options.folder, options.notebooks)


def test_python_is_the_one_with_the_package_before_the_first_command_that_needs_it():
    code = code_of("README.md")
    assert code.index("make install") < code.index(". .venv/bin/activate") < code.index("python -m dori_utils")
