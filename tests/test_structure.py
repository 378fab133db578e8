"""The shape of the package: no circles, no folder that is the house, few long functions and few wide records."""

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.test_packaging import imports_of, sources, within

LONG, WIDE = 60, 16  # lines of a function without its docstring; fields of a record


def graph() -> dict[str, set[str]]:
    """Which module imports which, at any depth."""
    files = {module: path for path, module in sources("jaxpo", "kernels")}
    names = set(files)
    return {m: {within(name, names) for name in imports_of(path, m)} - {None, m} for m, path in files.items()}


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; [] = there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return lines - (first.end_lineno - first.lineno + 1 if documented else 0)


def nodes(kind: type) -> list[tuple[str, ast.AST]]:
    """Every node of a kind in the package and the kernels, with the name of its module."""
    trees = [(module, ast.parse(path.read_text())) for path, module in sources("jaxpo", "kernels")]
    return [(module, node) for module, tree in trees for node in ast.walk(tree) if isinstance(node, kind)]


def test_no_modules_import_each_other_in_a_circle():
    assert circle(graph()) == []


@pytest.mark.parametrize(("imports", "found"), (({"a": {"b"}, "b": {"a"}}, True), ({"a": {"b"}, "b": set()}, False)))
def test_a_circle_is_found(imports, found):
    assert bool(circle(imports)) is found


def test_no_folder_holds_a_quarter_of_the_package():
    lines = Counter()
    for path, module in sources("jaxpo"):
        lines[module.split(".")[1] if "." in module else ""] += len(path.read_text().splitlines())
    folder, largest = lines.most_common(1)[0]
    assert largest < 0.25 * lines.total(), f"jaxpo/{folder} has {largest} of {lines.total()} lines"


def test_functions_fit_on_a_screen():
    long = {f"{module}.{node.name}": body_lines(node) for module, node in nodes(ast.FunctionDef)}
    long = {name: lines for name, lines in long.items() if lines > LONG}
    assert len(long) <= 5, long


def test_records_have_few_fields():
    wide = {}
    for module, node in nodes(ast.ClassDef):
        fields = sum(
            isinstance(x, ast.AnnAssign) and not ast.unparse(x.annotation).startswith("ClassVar") for x in node.body
        )
        if fields > WIDE:
            wide[f"{module}.{node.name}"] = fields
    assert len(wide) <= 3, wide


def reads_of_hyperparameters(tree: ast.AST) -> list[str]:
    """What code reads of ``config.objective`` besides its name: hyperparameters, or all of it."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "objective"
        and isinstance(node.ctx, ast.Load)
        and ast.unparse(node.value).split(".")[-1] == "config"
    ]
    return [ast.unparse(parents[x]) for x in blocks if getattr(parents[x], "attr", None) != "name"]


def test_hyperparameters_are_read_by_objectives_alone():
    """Whoever else wants to know something asks the `Objective`, which says it whatever its hyperparameters are
    called."""
    read = {module: reads_of_hyperparameters(ast.parse(path.read_text())) for path, module in sources("jaxpo")}
    assert [module for module, found in read.items() if found] == ["jaxpo.config.fill"]  # it makes the objective


def test_a_read_of_a_hyperparameter_is_found():
    for code in ("of.config.objective.beta", "f(config.objective)", "config.objective.get('tau')"):
        assert reads_of_hyperparameters(ast.parse(code))
    assert not reads_of_hyperparameters(ast.parse("config.objective = name(config.objective.name, run.objective.asks)"))
