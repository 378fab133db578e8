"""The notebooks run from top to bottom, and what is stored in them is of a run without errors."""

import ast
import importlib
import json
import linecache
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest

OURS = ("jaxpo", "experiments", "configs")
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    """The code cells."""
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def test_there_are_notebooks():
    assert [p.stem for p in NOTEBOOKS] == [
        "1_prototype_a_loss",
        "2_landscape",
        "3_a_training_loop",
        "4_plan_a_pod_run",
        "5_nash",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_of_one_run_in_order(path):
    code = cells(path)
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [output for c in code for output in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert [o for o in outputs if "image/png" in o.get("data", ())]
    for cell in code:
        ast.parse("".join(cell["source"]))


def imported(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """The names that a program imports from this project, with what they name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
                yield alias.asname or alias.name, getattr(module, alias.name)
        for alias in node.names if isinstance(node, ast.Import) else ():
            top = alias.name.split(".")[0]
            if top in OURS:
                importlib.import_module(alias.name)
                yield alias.asname or top, sys.modules[alias.name if alias.asname else top]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_it_names_is_there(path):
    """Every function that a notebook takes from this project exists: the slow test runs the notebooks."""
    tree = ast.parse("\n".join("".join(c["source"]) for c in cells(path)))
    names = {name: thing for name, thing in imported(tree) if isinstance(thing, ModuleType)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            assert hasattr(names[node.value.id], node.attr), f"{node.value.id}.{node.attr} is not there"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_from_top_to_bottom(path):
    matplotlib.use("Agg")
    names = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
        for number, cell in enumerate(cells(path), 1):
            source, name = "".join(cell["source"]), f"<{path.stem}, cell {number}>"
            linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # for inspect and tracebacks
            exec(compile(source, name, "exec"), names)
    matplotlib.pyplot.close("all")
