"""What is installed is what the checkout holds, and imports point downwards only."""

import ast
import contextlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from unittest import mock

import pytest

import jaxpo
import jaxpo.kernels

ROOT = Path(__file__).parents[1]

# A module may import its own layer and the layers before it. The longest matching name decides.
LAYERS = (
    {"jaxpo.registry", "jaxpo.metrics", "jaxpo.fields", "jaxpo.arguments", "jaxpo.batch", "jaxpo.calls"}
    | {"jaxpo.files", "jaxpo.hub"},
    {"jaxpo.primitives", "jaxpo.kernels", "jaxpo.parallel", "jaxpo.text"},
    {"jaxpo.objectives", "jaxpo.policy", "jaxpo.tasks", "jaxpo.storage"},
    {"jaxpo.rollout"},
    {"jaxpo.learning"},
    {"jaxpo.protocols", "jaxpo.testing"},
    {"jaxpo.config"},
    {"jaxpo.runs"},
    {"jaxpo.race", "jaxpo.plan"},
    {"jaxpo", "jaxpo.objectives.__main__"},
    {"experiments", "configs"},
)
# Never, though the order would allow it.
FORBIDDEN = (
    ("jaxpo.objectives", "jaxpo.policy"),
    ("jaxpo.policy", "jaxpo.tasks"),
    ("jaxpo.tasks", "jaxpo.policy"),
    ("jaxpo.race", "jaxpo.runs.loop"),
    ("jaxpo.race", "jaxpo.runs.train"),
)
# Stricter than their layer: all that these may import of the project.
ONLY = {"jaxpo.primitives": {"jaxpo.primitives", "jaxpo.arguments"}, "jaxpo.kernels": {"jaxpo.kernels", "jaxpo.batch"}}
OURS = ("jaxpo", "kernels", "experiments", "configs", "tests")
# Packages whose import has another name, of extras that need not be installed here.
DISTRIBUTED_AS = {"tunix": "google-tunix"}


def sources(*folders: str) -> Iterator[tuple[Path, str]]:
    """Every Python file of the folders, with the name it is imported by."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            yield path, ".".join(("jaxpo", *parts) if folder == "kernels" else parts)


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names that a module's code imports, at any depth: ``a.b.c`` for ``from a.b import c``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def imports_of(path: Path, module: str) -> set[str]:
    return set(imported(ast.parse(path.read_text()), module, path.name == "__init__.py"))


def within(name: str, packages: set[str]) -> str | None:
    """The longest of ``packages`` that holds ``name``."""
    return max((p for p in packages if name == p or name.startswith(p + ".")), key=len, default=None)


def layer(name: str) -> int:
    known = within(name, set().union(*LAYERS))
    return next(i for i, names in enumerate(LAYERS) if known in names)


def upward(module: str, names: set[str]) -> list[str]:
    """The imports of ``module`` among ``names`` that do not point downwards."""
    strict = within(module, set(ONLY))
    return [
        name
        for name in sorted(names)
        if name.split(".")[0] in OURS
        and (
            name.startswith(("tests", "kernels"))
            or layer(name) > layer(module)
            or strict
            and not within(name, ONLY[strict])
            or any(within(module, {a}) and within(name, {b}) for a, b in FORBIDDEN)
        )
    ]


def setup_arguments() -> dict:
    """What setup.py hands to setuptools."""
    with contextlib.chdir(ROOT), mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def run(module: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    """``python -m module arguments``, its output and errors together as text."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def distribution(requirement: str) -> str:
    """``ML_Collections>=1.0`` -> ``ml-collections``."""
    return re.sub("[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import kernels.token_logprob", {"kernels.token_logprob"}),
        ("def f():\n    from kernels import x", {"kernels.x"}),
        ("from . import a\nfrom ..batch import Rollouts", {"jaxpo.objectives.a", "jaxpo.batch.Rollouts"}),
        ("importlib.import_module('kernels.a')", {"kernels.a"}),
    ],
)
def test_imports_are_found(code, names):
    assert set(imported(ast.parse(code), "jaxpo.objectives.nash", is_package=False)) == names


@pytest.mark.parametrize(
    ("module", "name", "allowed"),
    [
        ("jaxpo.primitives.ratios", "jaxpo.primitives.numerics.promote", True),
        ("jaxpo.primitives.ratios", "jaxpo.batch.Rollouts", False),
        ("jaxpo.kernels.token_logprob.api", "jaxpo.batch", True),
        ("jaxpo.kernels.token_logprob.api", "jaxpo.primitives", False),
        ("jaxpo.objectives.grammar.base", "jaxpo.kernels.token_logprob", True),
        ("jaxpo.objectives.grammar.base", "jaxpo.learning.step", False),
        ("jaxpo.objectives.grpo", "jaxpo.policy.transformer", False),
        ("jaxpo.protocols.judged", "jaxpo.config.resolve", False),
        ("jaxpo.runs.loop", "experiments.train_rl", False),
        ("jaxpo.runs.loop", "jaxpo.make", False),
        ("experiments.train_rl", "jaxpo.make", True),
    ],
)
def test_direction_of_an_import(module, name, allowed):
    assert (upward(module, {name}) == []) is allowed


def test_dependencies_point_downwards():
    wrong = {
        module: names
        for path, module in sources("jaxpo", "kernels", "experiments", "configs")
        if (names := upward(module, imports_of(path, module)))
    }
    assert not wrong, f"imports that point upwards (the order is LAYERS of this file): {wrong}"


def test_every_module_has_a_layer():
    # The package itself is the top layer of the library, so a new module would pass unseen as part of it.
    named = set().union(*LAYERS) - {"jaxpo"}
    lost = [module for path, module in sources("jaxpo", "kernels") if module != "jaxpo" and not within(module, named)]
    assert not lost, f"give these a place in LAYERS: {lost}"


def test_nothing_imports_kernels_by_their_folder():
    # `import kernels` would load every module a second time beside jaxpo.kernels.
    wrong = [
        str(path.relative_to(ROOT))
        for path, module in sources(*OURS)
        if any(within(name, {"kernels"}) for name in imports_of(path, module))
    ]
    assert not wrong, f"write jaxpo.kernels in {wrong}"


def test_kernels_are_a_subpackage():
    assert Path(jaxpo.kernels.__file__) == ROOT / "kernels/__init__.py"


def test_every_folder_is_a_package():
    """A folder without ``__init__.py`` works in the checkout and is missing from the wheel."""
    folders = {
        module if path.name == "__init__.py" else module.rpartition(".")[0]
        for path, module in sources("jaxpo", "kernels")
    }
    assert set(setup_arguments()["packages"]) == folders


def test_a_checkout_that_is_not_installed_says_what_to_do():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import jaxpo"
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    last = ran.stderr.strip().splitlines()[-1]
    assert ran.returncode and "found but not installed: in its checkout, call: pip install" in last


def test_version_has_one_source():
    assert setup_arguments()["version"] == jaxpo.__version__
    assert not re.search(r"^version\s*=", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_torch_is_asked_for_by_parity_and_bench_only():
    arguments = setup_arguments()
    asking = {
        extra
        for extra, names in arguments["extras_require"].items()
        if {"torch", "trl", "google-tunix"} & set(map(distribution, names))
    }
    assert asking == {"parity", "bench"}
    assert not {"torch", "trl"} & set(map(distribution, arguments["install_requires"]))


def test_every_import_is_declared():
    """A package that only comes along with another one may be gone with its next release."""
    arguments = setup_arguments()
    declared = set(map(distribution, sum(arguments["extras_require"].values(), arguments["install_requires"])))
    declared.add("jaxlib")  # jax's own other half
    providers = packages_distributions()
    wrong = {
        (module, name)
        for path, module in sources(*OURS)
        for name in {n.split(".")[0] for n in imports_of(path, module)}
        if name not in (*OURS, *sys.stdlib_module_names)
        and not declared & set(map(distribution, providers.get(name, [DISTRIBUTED_AS.get(name, name)])))
    }
    assert not wrong, f"add to install_requires or an extra of setup.py: {sorted(wrong)}"


def test_ruff_finds_nothing():
    check = run("ruff", "check", "--quiet", "--output-format=concise", ROOT)
    assert check.returncode == 0, check.stdout


def test_examples_of_contributing_run(tmp_path):
    # In a process of its own: they register an objective and a task.
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    program = tmp_path / "examples.py"
    program.write_text(
        "\n".join(
            [
                *blocks,
                "import jaxpo",
                "jaxpo.make('my_objective', eps=0.3)",
                "task = doubling()",
                "assert task.score(task.test, [e.answer for e in task.test])[0].correct",
            ]
        )
    )
    done = subprocess.run(
        [sys.executable, program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_wheel_holds_everything_that_is_imported(tmp_path):
    # From a copy: a build leaves folders behind, and a stale one would go into the wheel.
    source, site = tmp_path / "source", tmp_path / "site"
    for folder in ("jaxpo", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    # Without isolation, so that the test needs no package index.
    build = run("build", "--wheel", "--no-isolation", "--outdir", tmp_path, source)
    assert build.returncode == 0, build.stdout
    (wheel,) = tmp_path.glob(f"jaxpo-{jaxpo.__version__}-*.whl")
    install = run("pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    assert install.returncode == 0, install.stdout

    installed = {str(path.relative_to(site)) for path in site.rglob("*.py")}
    expected = {
        f"{module.replace('.', '/')}{'/__init__' if path.name == '__init__.py' else ''}.py"
        for path, module in sources("jaxpo", "kernels")
    }
    assert installed == expected
    assert (site / "jaxpo/py.typed").exists()

    # Outside the checkout, whose jaxpo/ would win; every module, so that none leans on the checkout.
    modules = sorted(module for _, module in sources("jaxpo", "kernels"))
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    assert importlib.import_module(name).__file__.startswith(sys.argv[1]), name\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, site, *modules],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"},
    )
