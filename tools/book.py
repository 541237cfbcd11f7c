"""The notebooks as a book: runs them from first to last. `make figures` calls this.

    python -m tools.book                                    # every notebook, two at a time
    python -m tools.book --kernels 1                        # one after another, in order
    python -m tools.book 01 03                              # two of them
    python -m tools.book 01 -p MODEL sd14 -p PRESET paper   # other values for the cell tagged `parameters`

The testbed's notebooks run two at a time, each on half of the cores. The U-Net gains little from that (of two cores a
sixth on a Xeon, nothing on an AMD EPYC), but whatever has one thread anyway, loading, drawing, looking into the cache,
does: most of a run whose results are all there. What a notebook needs (a list in its metadata, beside the `minutes`
that it takes so) is through before it begins. Of two that want the same training one trains (`cached.cached_training`),
and what the other has saved before a further batch is not computed again (`Store.map`); what both begin at the same
moment, both compute.

A notebook runs as it does in JupyterLab: in a fresh kernel, with notebooks/ as its working directory. Its executed
copy, saved after each cell, goes to build/notebooks/, which git ignores. The figures of this repository's notebooks go
to figures/, which README shows; with other parameters (-p), and those of notebooks of one's own, to build/figures/; and
all of them to the folder in the environment variable DORI_FIGURES, if there is one (`plots.save_figure`).

papermill does the work: it knows parameters, progress and how to keep a notebook that failed. Two things are stricter
here: the kernel is the Python that runs this module, never one that the user registered under the same name; and a
parameter that no notebook declares is an error.

Importing takes longer than a notebook whose results are all in the cache. So on Linux a kernel is a fork of a process
that has imported `PRELOADED` and done nothing else (multiprocessing's forkserver).
"""

import argparse
import ast
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import nbformat
import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.provisioning import LocalProvisioner
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError, strip_color
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
TRACEBACK_LINES = 12
START_SECONDS = 600  # for a kernel to answer: the first one imports all of `PRELOADED`, on a machine that may be busy
# Without tqdm's own guess: cells take between no time and half an hour.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
PRELOADED = [
    "tools.book",  # which a fork imports once more, as its parent's main module
    *("ipykernel.kernelapp", "matplotlib.pyplot", "pandas", "sklearn.manifold"),
    *("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "transformers.models.clip.modeling_clip"),
    *(
        "dori_utils.evaluation",
        "dori_utils.locality",
        "dori_utils.plots",
        "dori_utils.cli.report",
        "dori_utils.widgets",
    ),
]


class NotebookError(RuntimeError):
    """A notebook that did not run to its end: which one, which cell, why."""


class ThisPython(AsyncKernelManager):
    """A kernel of the Python that runs this module, whichever kernels are registered on the machine."""

    transport_encryption = "auto"  # where the kernel can; otherwise it warns on the terminal, in the middle of the bar

    def __init__(self, **options):
        super().__init__(**options)
        if sys.platform == "linux":
            self.provisioner = ForkedKernel(kernel_spec=self.kernel_spec, parent=self)

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())


class ForkedKernel(LocalProvisioner):
    """Has `ThisPython` start kernels as forks of a process with `PRELOADED`, instead of by a command."""

    async def launch_kernel(self, cmd, **kwargs):
        # Otherwise transformers warns on the terminal when it is imported, in the middle of the bar.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        arguments = (self.parent.connection_file, kwargs.get("cwd") or os.getcwd(), kwargs["env"])
        self.process = _LikePopen(context.Process(target=_serve, args=arguments, daemon=True))
        self.pid = self.process.pid
        return self.connection_info


class _LikePopen:
    """A started `multiprocessing.Process` as LocalProvisioner wants it: with the methods of `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, process):
        process.start()
        self.process, self.pid = process, process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    terminate = kill


def _serve(connection_file, folder, environment):
    import matplotlib
    from ipykernel.kernelapp import IPKernelApp
    from tqdm import tqdm

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # What ipykernel puts into the environment, for whoever imports matplotlib after that.
    matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
    tqdm.set_lock(threading.RLock())  # its own has a semaphore, which is left behind when a kernel is killed
    multiprocessing.current_process().daemon = False  # else joblib would not use more than one process
    threading.Thread(target=_end_with_the_book, daemon=True).start()
    no_terminal = f"--IPKernelApp.parent_handle={os.getppid()}"  # otherwise it says on it how to connect to this kernel
    IPKernelApp.launch_instance(["-f", connection_file, no_terminal])


def _end_with_the_book():
    multiprocessing.parent_process().join()
    os._exit(1)


def find_notebooks(folder: Path, beginnings: list[str]) -> list[Path]:
    """The notebooks in `folder`, in the order of their names; if there are `beginnings`, those that begin with one.

    Raises:
        FileNotFoundError: there are none, or none with one of the beginnings.
    """
    notebooks = sorted(folder.glob("*.ipynb"))
    for beginning in beginnings or [""]:
        if not any(notebook.name.startswith(beginning) for notebook in notebooks):
            names = ", ".join(notebook.stem for notebook in notebooks) or "none"
            raise FileNotFoundError(f"no notebook {beginning}*.ipynb in {folder}; there are: {names}")
    return [notebook for notebook in notebooks if notebook.name.startswith(tuple(beginnings or [""]))]


def share_out(parameters: dict, notebooks: list[Path]) -> list[dict]:
    """For each notebook those of the `parameters` that its cell tagged `parameters` declares.

    Raises:
        ValueError: a parameter that none of the notebooks declares.
    """
    declared = [papermill.inspect_notebook(notebook) if parameters else {} for notebook in notebooks]
    known = set().union(*declared)
    if unknown := sorted(set(parameters) - known):
        raise ValueError(f"no notebook has a parameter {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    return [{name: parameters[name] for name in names if name in parameters} for names in declared]


def run_notebook(notebook: Path, output: Path, parameters: dict | None = None, progress: dict | bool = True) -> float:
    """Executes one notebook into `output` and returns the seconds it took.

    Args:
        notebook: left as it is.
        output: where its executed copy goes, also when it fails.
        parameters: values for its cell tagged `parameters`.
        progress: False, or tqdm's options for the bar over cells.

    Raises:
        NotebookError: a cell raised, or the kernel died.
    """
    start = time.perf_counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            notebook.resolve(),
            output.resolve(),
            parameters,
            kernel_name="python3",
            kernel_manager_class=ThisPython,
            start_timeout=START_SECONDS,
            coalesce_streams=True,  # of a progress bar only its last state, as in JupyterLab
            shutdown_kernel="immediate",  # gracefully, it is interrupted first, and reports that as an error
            # Not `cwd`, for which papermill changes this process's own folder, that of the other notebook as well.
            resources={"metadata": {"path": str(notebook.resolve().parent)}},
            progress_bar=progress,
        )
    except PapermillExecutionError as error:
        number, reason = error.exec_count, _last_lines(error)
    except DeadKernelError:
        number, reason = _code_cells_begun(output), "its Python process died. Out of memory?"
    else:
        return time.perf_counter() - start
    raise NotebookError(f"{notebook.name} failed in cell [{number}]:\n\n{reason}\n\nThe notebook so far: {output}")


def _last_lines(error: PapermillExecutionError) -> str:
    lines = strip_color("\n".join(error.traceback)).splitlines()
    return "\n".join(lines[-TRACEBACK_LINES:]) or f"{error.ename}: {error.evalue}"


def _code_cells_begun(executed: Path) -> int:
    cells = nbformat.read(executed, as_version=4).cells
    return sum(cell.cell_type == "code" and bool(cell.metadata.papermill.start_time) for cell in cells)


def run_book(notebooks: list[Path], output: Path, parameters: dict | None = None, kernels: int = 1) -> dict[str, float]:
    """Executes the notebooks, a bar for each, and returns seconds by notebook.

    Args:
        kernels: so many at a time, the one from which the most minutes of work follow first; one at a time, in order.

    Raises:
        NotebookError: one failed. No other begins then; those that are running are waited for.
    """
    shares = dict(zip(notebooks, share_out(parameters or {}, notebooks), strict=True))
    about = {notebook: nbformat.read(notebook, as_version=4).metadata for notebook in notebooks}
    needs = {n: [m for m in notebooks if m.name.startswith(tuple(about[n].get("needs", ())))] for n in notebooks}
    minutes = {notebook: about[notebook].get("minutes", 0) for notebook in notebooks}
    waiting, running, lines, seconds = list(notebooks), {}, {}, {}  # lines: on the terminal, of those that are running
    if kernels > 1:
        waiting.sort(key=lambda notebook: -_minutes_from(notebook, minutes, needs))
    with ThreadPoolExecutor(kernels) as pool:
        while waiting or running:
            ready = [n for n in waiting if all(needed in seconds for needed in needs[n])]
            for notebook in ready[: kernels - len(running)]:
                rest = sum(minutes[n] for n in notebooks if n not in seconds)
                done = sum(minutes[n] for n in seconds)
                left = time_left(minutes[notebook], rest, done, sum(seconds.values()), kernels)
                number = len(seconds) + len(running) + 1
                lines[notebook] = min(set(range(kernels)) - set(lines.values()))
                progress = {"desc": f"{number}/{len(notebooks)} {notebook.stem}{left}", "bar_format": BAR}
                progress |= {"position": lines[notebook], "leave": False}
                place = output / notebook.name
                running[pool.submit(run_notebook, notebook, place, shares[notebook], progress)] = notebook
                waiting.remove(notebook)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                notebook = running.pop(future)
                del lines[notebook]
                if future.exception() and running:
                    others = " and ".join(other.stem for other in running.values())
                    tqdm.write(f"{notebook.stem} failed; waiting for {others}", file=sys.stderr)
                seconds[notebook] = future.result()
                tqdm.write(f"{notebook.stem}: {seconds[notebook] / 60:.1f} min", file=sys.stderr)
    return {notebook.stem: seconds[notebook] for notebook in notebooks}


def _minutes_from(notebook: Path, minutes: dict[Path, float], needs: dict[Path, list[Path]]) -> float:
    """Minutes of a notebook and of the longest way from it through those that need it."""
    ways = [_minutes_from(later, minutes, needs) for later in needs if notebook in needs[later]]
    return minutes[notebook] + max(ways, default=0)


def time_left(minutes: float, rest: float, done: float, seconds: float, kernels: int = 1) -> str:
    """Text for the bar: minutes for this notebook and in all, or nothing if no notebook says how long it takes.

    Args:
        minutes: of this notebook's first run, by its own word.
        rest: those of all notebooks that are not through, this one and running ones among them.
        done: those of the notebooks that are through,
        seconds: and what these took: this machine's speed, and how much it had in its cache.
        kernels: notebooks at a time.
    """
    speed = seconds / 60 / done if done else 1.0
    left = max(speed * minutes, speed * rest / kernels)
    return f", about {speed * minutes:.0f} min, in all {left:.0f} min left" if rest else ""


def _value(text: str):
    """'8' → 8, 'None' → None, '[1, 2]' → [1, 2]; what is no Python value is text: 'sd14' → 'sd14'."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of notebooks: give 1 or more")
    return int(text)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.book", description="Runs the notebooks in order.")
    parser.add_argument("notebooks", nargs="*", help="beginnings of their names, such as 01; by default all of them")
    values = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    parser.add_argument("-p", dest="parameters", **values, help="a value for the cells tagged `parameters`; repeatable")
    parser.add_argument("--folder", type=Path, default=ROOT / "notebooks", help="where the notebooks are")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "notebooks", help="where executed copies go")
    kernels = "notebooks at a time; by default two, and one if the parameters name a MODEL, which may be large"
    parser.add_argument("--kernels", type=_count, help=kernels)
    return parser.parse_args(arguments)


def _settle_folders(as_committed: bool):
    """Where kernels put figures; and folders in the environment as they are meant here, not in notebooks/."""
    if not os.environ.get("DORI_FIGURES"):
        os.environ["DORI_FIGURES"] = str(ROOT / ("figures" if as_committed else "build/figures"))
    for name in ("DORI_FIGURES", "DORI_CACHE", "DORI_DATA", "DORI_SSCD"):
        place = os.environ.get(name)
        if place and "://" not in place:  # a store may be at a URL
            os.environ[name] = str(Path(place).expanduser().resolve())


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    parameters = {name: _value(text) for name, text in options.parameters}
    start, cores = time.perf_counter(), os.cpu_count() or 1
    kernels = options.kernels or (1 if "MODEL" in parameters else min(2, cores))
    try:
        notebooks = find_notebooks(options.folder, options.notebooks)
        kernels = min(kernels, len(notebooks))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // kernels)))  # torch's threads in a kernel
        _settle_folders(as_committed=not parameters and options.folder.resolve() == ROOT / "notebooks")
        seconds = run_book(notebooks, options.output, parameters, kernels)
    except (NotebookError, FileNotFoundError, ValueError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. What was computed is in the cache: the same command goes on from there.", file=sys.stderr)
        return 130
    print(f"Figures are in {os.environ['DORI_FIGURES']}.", file=sys.stderr)
    for name, value in (seconds | {"all": time.perf_counter() - start}).items():
        print(f"{name:<40} {value:8.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
