"""The notebook runner: order, parameters, the kernel's Python and folder, and what a failure says."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tools import book

PATIENCE = 600  # seconds: no test waits so long, unless something is broken
LIGHT = ["ipykernel.kernelapp", "matplotlib.pyplot"]  # torch and the rest take seconds, and only one test is about them


@pytest.fixture(autouse=True)
def _kernels_with_less_to_import(monkeypatch):
    monkeypatch.setattr(book, "PRELOADED", LIGHT)
    for name in ("DORI_FIGURES", "OMP_NUM_THREADS"):  # which the book sets: as it was, at the end
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


def _write(folder, name, *sources, parameters=None, **about):
    cells = [new_markdown_cell("# A title"), *(new_code_cell(source) for source in sources)]
    if parameters:
        cells.insert(1, new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}} | about
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / name)
    return folder / name


def _run(folder, *arguments, kernels=1):
    arguments = [*arguments, "--kernels", str(kernels)]
    return book.main([*arguments, "--folder", str(folder), "--output", str(folder.parent / "build")])


def test_notebooks_run_in_order_and_a_table_of_seconds_follows(folder, capsys):
    _write(folder, "01_second.ipynb", "print(open('first.txt').read())", minutes=50)
    _write(folder, "00_first.ipynb", "open('first.txt', 'w').write('from the first')", minutes=10)
    before = (folder / "00_first.ipynb").read_bytes()

    assert _run(folder) == 0

    executed = nbformat.read(folder.parent / "build" / "01_second.ipynb", as_version=4)
    assert executed.cells[1].outputs[0].text == "from the first\n"
    assert (folder / "00_first.ipynb").read_bytes() == before, "the committed notebook stays without outputs"
    printed = capsys.readouterr()
    names, seconds = zip(*(line.split()[:2] for line in printed.out.splitlines()), strict=True)
    assert names == ("00_first", "01_second", "all")
    assert float(seconds[0]) + float(seconds[1]) <= float(seconds[2]) + 0.151  # three numbers, each within 0.05
    assert "1/2 00_first, about 10 min, in all 60 min left" in printed.err
    assert re.search(r"00_first: \d+\.\d min", printed.err)
    assert "2/2 01_second, about " in printed.err and "in all 60" not in printed.err.split("2/2")[1]


@pytest.mark.slow
def test_two_notebooks_run_at_a_time_on_half_of_the_cores_each(folder, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    meet = "import os, time\nopen('{0}', 'w')\nwhile not os.path.exists('{1}'): time.sleep(0.05)"
    threads = "import os\nprint(os.environ['OMP_NUM_THREADS'], os.getcwd())"
    _write(folder, "00.ipynb", meet.format("a", "b"), threads)
    _write(folder, "01.ipynb", meet.format("b", "a"), threads)
    assert _run(folder, kernels=2) == 0
    for name in ("00.ipynb", "01.ipynb"):
        cells = nbformat.read(folder.parent / "build" / name, as_version=4).cells
        assert cells[-1].outputs[0].text == f"{max(1, os.cpu_count() // 2)} {folder}\n"


@pytest.mark.slow
def test_a_notebook_waits_for_what_it_needs_and_the_longest_way_comes_first(folder, capsys):
    append = "open('order.txt', 'a').write('{} ')"
    wait = "import os, time\nwhile not (os.path.exists('order.txt') and open('order.txt').read()): time.sleep(0.05)"
    _write(folder, "00.ipynb", wait, append.format("00"), minutes=1)
    _write(folder, "01.ipynb", append.format("01"), minutes=1, needs=["00"])
    _write(folder, "02.ipynb", append.format("02"), minutes=5, needs=["00", "09"])  # 09 is not among those that run
    _write(folder, "03.ipynb", append.format("03"), minutes=2)
    assert _run(folder, kernels=2) == 0
    order = (folder / "order.txt").read_text().split()
    assert order[:2] == ["03", "00"] and sorted(order[2:]) == ["01", "02"]
    printed = capsys.readouterr().err
    assert all(begun in printed for begun in ("1/4 00", "2/4 03", "3/4 02", "4/4 01"))


@pytest.mark.slow
def test_after_a_failure_what_runs_is_waited_for_and_nothing_else_begins(folder, capsys, monkeypatch):
    write = book.tqdm.write

    def noted(text, **options):
        write(text, **options)
        (folder / "said.txt").touch()

    monkeypatch.setattr(book.tqdm, "write", noted)
    until_said = "import os, time\nfor _ in range(6000):\n    time.sleep(0.1 * (not os.path.exists('said.txt')))"
    _write(folder, "00_fails.ipynb", "1 / 0")
    _write(folder, "01_slow.ipynb", until_said, "open('slow.txt', 'w')")
    _write(folder, "02_next.ipynb", "open('ran.txt', 'w')")
    assert _run(folder, kernels=2) == 1
    message = capsys.readouterr().err
    assert "00_fails failed; waiting for 01_slow" in message and "ZeroDivisionError" in message
    assert (folder / "slow.txt").exists() and not (folder / "ran.txt").exists()


def test_time_left_is_by_the_notebooks_own_word_and_the_speed_so_far():
    assert book.time_left(20, 50, 10, 300.0) == ", about 10 min, in all 25 min left"
    assert book.time_left(20, 50, 10, 300.0, kernels=2) == ", about 10 min, in all 12 min left"
    assert book.time_left(45, 50, 10, 600.0, kernels=2) == ", about 45 min, in all 45 min left", "the one is all"
    assert book.time_left(0, 0, 0, 4.0) == ""


@pytest.mark.slow
def test_the_kernel_is_this_python_whatever_is_registered_as_python3(folder, tmp_path, monkeypatch):
    registered = tmp_path / "jupyter" / "kernels" / "python3"
    registered.mkdir(parents=True)
    spec = {"argv": ["no-such-python", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (registered / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = _write(folder, "00.ipynb", "import sys, os\nprint(sys.executable)\nprint(os.getcwd())")

    book.run_notebook(notebook, tmp_path / "executed.ipynb", progress=False)

    executable, cwd = nbformat.read(tmp_path / "executed.ipynb", as_version=4).cells[1].outputs[0].text.splitlines()
    assert Path(executable).samefile(sys.executable)
    assert Path(cwd) == folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere kernels are started by a command")
def test_kernels_have_the_modules_imported_and_nothing_of_each_other(folder, tmp_path):
    ask = "import sys\nprint('torch' in sys.modules, 'sticky' in vars(sys))\nsys.sticky = True"
    draw = "import matplotlib.pyplot as plt\nfig = plt.figure()\nplt.plot([1, 2])"
    for name in ("00.ipynb", "01.ipynb"):
        _write(folder, name, ask, draw)
    command = [sys.executable, "-m", "tools.book", "--folder", str(folder), "--output", str(tmp_path / "build")]
    subprocess.run([*command, "--kernels", "1"], cwd=book.ROOT, check=True, capture_output=True)
    for name in ("00.ipynb", "01.ipynb"):
        _, asked, drawn = nbformat.read(tmp_path / "build" / name, as_version=4).cells
        assert asked.outputs[0].text == "True False\n"
        assert any("image/png" in output.get("data", {}) for output in drawn.outputs), "matplotlib's inline backend"


@pytest.mark.slow
def test_a_notebook_may_use_more_than_one_process(folder):
    others = "assert os.getpid() not in Parallel(2)(delayed(os.getpid)() for _ in range(4))"
    _write(folder, "00.ipynb", "import os\nfrom joblib import Parallel, delayed", others)
    assert _run(folder) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere kernels are started by a command")
def test_a_kernel_ends_when_the_book_is_killed(folder, tmp_path):
    begun = tmp_path / "begun"
    wait = f"import os, time\nopen({str(begun)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    _write(folder, "00.ipynb", wait)
    process = _book_in_a_process(folder, tmp_path / "build", stderr=subprocess.DEVNULL)
    _until(lambda: begun.exists() and begun.read_text())
    process.kill()
    process.wait()
    _until(lambda: not Path(f"/proc/{begun.read_text()}").exists())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere kernels are started by a command")
def test_ctrl_c_stops_both_kernels_and_says_that_it_goes_on_from_the_cache(folder, tmp_path):
    wait = "import os, time\nopen('{0}', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    for name in ("00", "01"):
        _write(folder, f"{name}.ipynb", wait.format(name))
    terminal = {"start_new_session": True, "stderr": subprocess.PIPE, "text": True}
    process = _book_in_a_process(folder, tmp_path / "build", **terminal)
    begun = [folder / "00", folder / "01"]
    _until(lambda: all(file.exists() and file.read_text() for file in begun))
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "goes on from there" in printed and "Traceback" not in printed
    _until(lambda: not any(Path(f"/proc/{file.read_text()}").exists() for file in begun))


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_of_kernels_that_makes_no_sense_is_refused(folder, number, capsys):
    with pytest.raises(SystemExit):
        _run(folder, kernels=number)
    assert "--kernels" in capsys.readouterr().err


def _book_in_a_process(folder, output, **options):
    heeds = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # not so under `nohup ... &`
    light = f"{heeds}; from dori_utils import book; book.PRELOADED = {LIGHT}; sys.exit(book.main())"
    command = [sys.executable, "-c", light, "--folder", str(folder), "--output", str(output)]
    return subprocess.Popen(command, cwd=book.ROOT, **options)


def _until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def test_parameters_reach_the_notebooks_that_declare_them_as_python_values(folder):
    _write(folder, "00.ipynb", "print(MODEL, STEPS + 1)", parameters='MODEL = "testbed"\nSTEPS = 50')
    _write(folder, "01.ipynb", "print(MODEL)", parameters='MODEL = "testbed"')

    assert _run(folder, "-p", "MODEL", "sd14", "-p", "STEPS", "9") == 0

    printed = [
        nbformat.read(folder.parent / "build" / name, as_version=4).cells[-1].outputs[0].text
        for name in ("00.ipynb", "01.ipynb")
    ]
    assert printed == ["sd14 10\n", "sd14\n"]


SAY_WHERE = "import os\nprint(*(os.environ.get(f'DORI_{name}') for name in ('FIGURES', 'CACHE', 'DATA')))"


def _said(folder):
    return nbformat.read(folder.parent / "build" / "00.ipynb", as_version=4).cells[-1].outputs[0].text.split()


@pytest.mark.slow
def test_only_the_repositorys_own_notebooks_as_they_are_write_committed_figures(folder, monkeypatch, capsys):
    monkeypatch.setattr(book, "ROOT", folder.parent)
    _write(folder, "00.ipynb", SAY_WHERE, parameters='PRESET = "testbed"')
    for arguments, expected in (
        ((), "figures"),
        (("-p", "PRESET", "smoke"), "build/figures"),
        (("--folder", str(folder.parent / "mine")), "build/figures"),
    ):
        shutil.copytree(folder, folder.parent / "mine", dirs_exist_ok=True)
        monkeypatch.delenv("DORI_FIGURES", raising=False)
        assert book.main(["--output", str(folder.parent / "build"), *arguments]) == 0
        assert _said(folder)[0] == str(folder.parent / expected)
        assert f"Figures are in {folder.parent / expected}." in capsys.readouterr().err


def test_folders_in_the_environment_are_meant_from_where_the_book_is_called(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DORI_FIGURES", "build/sd14")
    monkeypatch.setenv("DORI_DATA", "data")
    monkeypatch.setenv("DORI_CACHE", "s3://bucket/cases")
    _write(folder, "00.ipynb", SAY_WHERE, parameters='PRESET = "testbed"')
    assert _run(folder, "-p", "PRESET", "smoke") == 0
    assert _said(folder) == [str(tmp_path / "build/sd14"), "s3://bucket/cases", str(tmp_path / "data")]


def test_a_bar_in_a_notebook_leaves_nothing_in_its_executed_copy(folder):
    bar = "from dori_utils.core.bars import tqdm\nfor _ in tqdm(range(3), mininterval=0):\n    pass"
    _write(folder, "00.ipynb", bar, bar + "\nprint('words')")
    assert _run(folder) == 0
    first, second = nbformat.read(folder.parent / "build" / "00.ipynb", as_version=4).cells[1:]
    assert [(output.name, output.text.strip()) for output in first.outputs] in ([], [("stdout", "")])
    assert [(output.name, output.text) for output in second.outputs] == [("stdout", "words\n")]


def test_a_parameter_that_no_notebook_declares_is_refused_before_anything_runs(folder, capsys):
    _write(folder, "00.ipynb", "open('ran.txt', 'w')", parameters='MODEL = "testbed"')
    assert _run(folder, "-p", "MODLE", "sd14") == 1
    assert "no notebook has a parameter MODLE; there are: MODEL" in capsys.readouterr().err
    assert not (folder / "ran.txt").exists()


def test_a_failing_cell_stops_the_book_and_is_named_with_its_traceback(folder, capsys):
    _write(folder, "00_fails.ipynb", "x = 1", "def divide():\n    return x / 0\n\ndivide()", "print('never')")
    _write(folder, "01_next.ipynb", "open('ran.txt', 'w')")

    assert _run(folder) == 1

    message = capsys.readouterr().err
    assert "00_fails.ipynb failed in cell [2]:" in message
    assert "ZeroDivisionError: division by zero" in message and "return x / 0" in message
    assert "\x1b" not in message.split("failed in cell")[1], "no colour codes in the log"
    assert not (folder / "ran.txt").exists()
    executed = nbformat.read(folder.parent / "build" / "00_fails.ipynb", as_version=4)
    assert any(output.output_type == "error" for cell in executed.cells for output in cell.get("outputs", []))


def test_a_kernel_that_dies_is_named_with_its_cell(folder, capsys):
    _write(folder, "00_dies.ipynb", "x = 1", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "x = 2")
    assert _run(folder) == 1
    assert "00_dies.ipynb failed in cell [2]:\n\nits Python process died. Out of memory?" in capsys.readouterr().err


def test_a_beginning_chooses_notebooks_and_an_unknown_one_lists_what_there_is(folder, capsys):
    first, second = _write(folder, "00_start.ipynb"), _write(folder, "01_detection.ipynb")
    assert book.find_notebooks(folder, []) == [first, second]
    assert book.find_notebooks(folder, ["01"]) == [second]
    assert _run(folder, "07") == 1
    assert f"no notebook 07*.ipynb in {folder}; there are: 00_start, 01_detection" in capsys.readouterr().err


def test_a_folder_without_notebooks_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are: none"):
        book.find_notebooks(tmp_path, [])


@pytest.mark.parametrize(
    ("text", "value"), [("8", 8), ("1e-3", 0.001), ("None", None), ("[1, 2]", [1, 2]), ("sd14", "sd14"), ("a b", "a b")]
)
def test_values_on_the_command_line_are_python_where_they_can_be(text, value):
    assert book._value(text) == value
