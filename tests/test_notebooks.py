"""All notebooks run from first to last; at three denoising steps, so their numbers mean nothing here.

Once on the testbed, and all but the first, which is about the testbed, on a tiny SD 1.x of random weights, with nothing
changed but their parameters: so they run on Stable Diffusion, too.
"""

import os
from dataclasses import replace

import pytest

from dori_utils.core.hub import TESTBED
from dori_utils.nemo_statistics import collect_statistics
from dori_utils.presets import PRESETS
from tools import book

NOTEBOOKS = sorted(path.stem for path in (TESTBED.parent / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """One for all workers of pytest-xdist, so that a notebook finds what another has left in the cache."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_runs_twice_and_writes_its_committed_figures(notebook, shared_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DORI_CACHE", str(shared_folder / "cache"))
    written = []
    for run in ("first", "second"):
        monkeypatch.setenv("DORI_FIGURES", str(tmp_path / run))
        assert book.main([notebook, "--output", str(tmp_path / "executed"), "-p", "PRESET", "smoke"]) == 0
        written.append({path.name: path.read_bytes() for path in (tmp_path / run).iterdir()})
    committed = {path.name for path in (TESTBED.parent / "figures").glob(f"{notebook[:2]}_*")}
    assert committed and written[0].keys() == committed
    assert not [name for name in committed if written[0][name] != written[1][name]], "no change that git would see"


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS[1:])
def test_a_notebook_runs_on_another_model(notebook, shared_folder, tmp_path, sd1, sd1_folder, write_data, monkeypatch):
    data = tmp_path / "data"
    _, captions = write_data(data, sd1_folder.name)
    statistics = collect_statistics(sd1, captions, PRESETS["smoke"].nemo, progress=False)
    statistics = replace(
        statistics, tau=-1.0
    )  # else a model of random weights has memorized none, and NeMo nothing to do
    statistics.save(data / sd1_folder.name / "nemo_statistics.safetensors")
    monkeypatch.setenv("DORI_DATA", str(data))
    monkeypatch.setenv("DORI_CACHE", str(shared_folder / "cache of sd1"))
    monkeypatch.setenv("DORI_FIGURES", str(tmp_path / "figures"))
    parameters = ("-p", "MODEL", str(sd1_folder), "-p", "PRESET", "smoke")
    assert book.main([notebook, "--output", str(tmp_path / "executed"), *parameters]) == 0
    committed = {path.name for path in (TESTBED.parent / "figures").glob(f"{notebook[:2]}_*")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == committed
