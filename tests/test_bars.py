"""Bars: text in one line that a notebook loses with the work that it was about; on a terminal the outermost stays."""

import ast
import types
from pathlib import Path

import pytest

from dori_utils.core import bars

PACKAGE = Path(bars.__file__).parent


def _nested():
    for _ in bars.tqdm(range(2), desc="outer, with a longer name", mininterval=0):
        for _ in bars.tqdm(range(3), desc="inner", mininterval=0):
            pass


@pytest.fixture
def in_notebook(monkeypatch):
    monkeypatch.setattr("IPython.get_ipython", lambda: types.SimpleNamespace(kernel=True))
    assert bars.in_notebook()


def test_in_a_notebook_bars_take_one_line_of_standard_output_and_leave_nothing(in_notebook, capsys):
    _nested()
    printed, red = capsys.readouterr()
    states = printed.split("\r")
    assert red == "" and not {"\n", "\x1b"} & set(printed)
    assert any("inner: 100%|" in state for state in states) and any("50%|" in state for state in states)
    assert len({len(state) for state in states if "%|" in state}) == 1, "one covers the other"
    assert states[-1].strip() == states[-2].strip() == "", "the line is empty in the end"


def test_in_a_notebook_a_bar_whose_work_failed_does_not_silence_the_next_ones(in_notebook, capsys):
    kept = bars.tqdm(range(3), desc="failed", mininterval=0)  # as a traceback keeps it
    next(iter(kept))
    _nested()
    assert "inner: 100%|" in capsys.readouterr().out


def test_elsewhere_the_outermost_bar_stays_on_standard_error(capsys):
    assert not bars.in_notebook()
    _nested()
    printed, red = capsys.readouterr()
    assert printed == ""
    last = red.replace("\x1b[A", "").replace("\n", "\r").split("\r")
    assert "outer, with a longer name: 100%|" in [state for state in last if state.strip()][-1]


def test_no_module_has_bars_of_its_own():
    """But book, whose bars are on the terminal that called it, and have papermill's beside them."""
    for path in PACKAGE.rglob("*.py"):
        names = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        own = [node.module for node in names if node.module and node.module.split(".")[0] == "tqdm" and not node.level]
        assert not own or path.name in ("bars.py", "book.py"), path
