"""What notebooks keep in the store is kept under all that it depends on: no old answer to a new question.

A key written by hand forgets things. So notebooks call `Lab.kept`, whose key is everything that the function is
given, and that function has nothing but what it is given.
"""

import ast
import symtable

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from dori_utils import wanda
from dori_utils.core.cache import kept
from dori_utils.core.edits import Edit
from dori_utils.core.hub import TESTBED
from dori_utils.core.models import load_pipeline
from dori_utils.core.sscd import SSCD
from dori_utils.core.store import Store
from dori_utils.core.targets import Target
from dori_utils.nemo_statistics import Statistics


def code_of(path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


NOTEBOOKS = {path.stem[:2]: code_of(path) for path in sorted((TESTBED.parent / "notebooks").glob("*.ipynb"))}


def own_variables(code: str, function: str) -> set[str]:
    """Variables of a notebook that one of its functions reads, itself or through others that it calls."""
    notebook = symtable.symtable(code, "notebook", "exec")
    functions = {table.get_name(): table for table in notebook.get_children() if table.get_type() == "function"}
    read, seen, todo = set(), set(), [function]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for other in globals_of(functions[name]) & set(notebook.get_identifiers()):
            symbol = notebook.lookup(other)
            if other in functions:
                todo.append(other)
            elif symbol.is_assigned() and not symbol.is_imported():
                read.add(other)
    return read


def globals_of(table) -> set[str]:
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
    return own.union(*(globals_of(child) for child in table.get_children()))


def kept_functions(code: str) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [ast.unparse(call.args[1]) for call in calls if getattr(call.func, "attr", None) == "kept"]


@pytest.mark.parametrize("number", sorted(NOTEBOOKS))
def test_no_notebook_writes_a_key_by_hand(number):
    assert "store.fetch(" not in NOTEBOOKS[number] and "store.map(" not in NOTEBOOKS[number]


@pytest.mark.parametrize("number", [number for number, code in NOTEBOOKS.items() if kept_functions(code)])
def test_what_a_notebook_keeps_depends_on_nothing_but_what_it_is_given(number):
    code = NOTEBOOKS[number]
    assert {name: own_variables(code, name) for name in kept_functions(code)} == dict.fromkeys(
        kept_functions(code), set()
    )


def test_a_variable_is_found_where_a_function_reads_it_itself_or_through_another():
    code = """
import numpy as np
targets, edit = [1], 2
def direct(n): return [np.sum(targets) for _ in range(n)]
def through(n): return direct(n)
def clean(targets): return {"edit": sum(t for t in targets)}
"""
    assert own_variables(code, "direct") == own_variables(code, "through") == {"targets"}
    assert own_variables(code, "clean") == set()


def test_a_kept_result_is_computed_once_and_again_for_any_other_input(tmp_path, tiny_testbed):
    store, image, other = Store(tmp_path), Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "red")
    name = "unet.conv_in.weight"
    inputs = {
        "pipe": [tiny_testbed],
        "targets": [
            [Target("a", "cat", image, "VM")],
            [Target("a", "cat", other, "VM")],
            [Target("a", "dog", image, "VM")],
        ],
        "config": [wanda.Config(), wanda.Config(sparsity=0.5)],
        "embeds": [torch.zeros(2), torch.zeros(1, 2), torch.ones(2)],
        "images": [{"near": [image]}, {"near": [other]}, {"far": [image]}],
        "edit": [
            Edit("NeMo", "m", masks={name: torch.tensor([True])}),
            Edit("NeMo", "m", masks={name: torch.tensor([False])}),
        ],
        "statistics": [Statistics({"l": torch.zeros(1)}, {"l": torch.ones(1)}, tau, "m") for tau in (0.5, 0.6)],
        "sscd": [SSCD("one", None), SSCD("two", None)],
        "seeds": [range(2), range(3)],
        "layer": ["down", "up", None, 1, 0.5],
    }
    calls = []

    def compute(**given):
        calls.append(given)
        return {"number": np.array(len(calls))}

    first = {key: values[0] for key, values in inputs.items()}
    variants = [first] + [first | {key: value} for key, values in inputs.items() for value in values[1:]]
    numbers = [int(kept(store, "a test", compute, **variant)["number"]) for variant in variants]
    assert numbers == list(range(1, len(variants) + 1))
    assert [int(kept(store, "a test", compute, **variant)["number"]) for variant in variants] == numbers
    assert int(kept(store, "another", compute, **first)["number"]) == len(variants) + 1


def test_a_kept_result_changes_with_the_weights_and_the_scheduler_of_the_pipeline(tmp_path, tiny_testbed_folder):
    pipe, store, calls = load_pipeline(tiny_testbed_folder, device="cpu"), Store(tmp_path), []

    def compute(pipe):
        calls.append(pipe)
        return {"number": np.array(len(calls))}

    def number():
        return int(kept(store, "a test", compute, pipe=pipe)["number"])

    assert number() == number() == 1
    steps = pipe.scheduler.config.num_train_timesteps
    pipe.scheduler.register_to_config(num_train_timesteps=steps + 1)
    assert number() == 2
    pipe.scheduler.register_to_config(num_train_timesteps=steps)
    assert number() == 1
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] += 1
    assert number() == 3


def test_an_input_of_which_no_key_is_known_is_refused_before_anything_is_computed(tmp_path):
    with pytest.raises(TypeError, match="A set cannot be part of a key"):
        kept(Store(tmp_path), "a test", pytest.fail, names={"a"})
