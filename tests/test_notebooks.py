"""All notebooks run from first to last; at three denoising steps, so their numbers mean nothing here."""

import os

import pytest

from dori_utils import book
from dori_utils.models import TESTBED

NOTEBOOKS = sorted(path.stem for path in (TESTBED.parent / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """One for all workers of pytest-xdist, so that a notebook finds what another has left in the cache."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_runs_and_writes_its_committed_figures(notebook, shared_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DORI_CACHE", str(shared_folder / "cache"))
    monkeypatch.setenv("DORI_FIGURES", str(tmp_path / "figures"))
    assert book.main([notebook, "--output", str(tmp_path / "executed"), "-p", "PRESET", "smoke"]) == 0
    committed = {path.name for path in (TESTBED.parent / "figures").glob(f"{notebook[:2]}_*")}
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert committed and written == committed
