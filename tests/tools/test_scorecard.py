"""The scorecard measures, compares, and keeps what was not measured this time."""

import json

import pytest

from tools import scorecard
from tools.scorecard import Bar


@pytest.fixture
def bars(monkeypatch, tmp_path):
    bars = (Bar("fast", "<=", 1.0, lambda: 0.25), Bar("good", ">=", 0.9, lambda: (0.5, "n = 3")))
    monkeypatch.setattr(scorecard, "BARS", bars)
    monkeypatch.setenv("DORI_FIGURES", str(tmp_path))
    return tmp_path / "scorecard.json"


def test_a_bar_that_is_missed_stays_visible_as_short(bars, capsys):
    assert scorecard.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "holds" in lines[0] and "SHORT" in lines[1] and "n = 3" in lines[1]
    results = json.loads(bars.read_text())
    assert [(r["name"], r["value"], r["bound"], r["holds"]) for r in results] == [
        ("fast", 0.25, "<= 1", True),
        ("good", 0.5, ">= 0.9", False),
    ]
    assert all(r["command"] and r["date"] for r in results)


def test_measuring_one_keeps_the_others(bars, monkeypatch):
    scorecard.main([])
    monkeypatch.setattr(scorecard, "BARS", (Bar("fast", "<=", 1.0, lambda: 2.0), scorecard.BARS[1]))
    scorecard.main(["fast"])
    assert [(r["value"], r["holds"]) for r in json.loads(bars.read_text())] == [(2.0, False), (0.5, False)]


def test_an_unknown_bar_is_refused(bars, capsys):
    assert scorecard.main(["nothing"]) == 1
    assert "fast; good" in capsys.readouterr().err and not bars.exists()


def test_a_bar_that_fails_loses_none_before_it(bars, monkeypatch):
    monkeypatch.setattr(scorecard, "BARS", (scorecard.BARS[0], Bar("broken", "<=", 1.0, lambda: 1 / 0)))
    with pytest.raises(ZeroDivisionError):
        scorecard.main([])
    assert [r["name"] for r in json.loads(bars.read_text())] == ["fast"]


def test_the_committed_scorecard_has_every_bar():
    results = json.loads((scorecard.TESTBED.parent / "figures" / "scorecard.json").read_text())
    timed_by_themselves = {"fast tests, s", "whole suite, s"}  # this test runs inside them
    assert {bar.name for bar in scorecard.BARS} - {r["name"] for r in results} <= timed_by_themselves
