"""All notebooks run from first to last; at three denoising steps, so their numbers mean nothing here."""

import pytest

from dori_utils import book
from dori_utils.models import TESTBED

NOTEBOOKS = TESTBED.parent / "notebooks"


@pytest.mark.slow
def test_notebooks_run_and_write_every_committed_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("DORI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DORI_FIGURES", str(tmp_path / "figures"))
    assert book.main(["--output", str(tmp_path / "executed"), "-p", "PRESET", "smoke"]) == 0
    committed = {path.name for path in (TESTBED.parent / "figures").glob("0*")}
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert written == committed
