"""One table of everything that is chosen by name: objectives, and the parts they are made of.

``register`` puts a factory in the table under its function name and a kind; ``make`` calls it with hyperparameters.
Names and hyperparameters that do not exist fail with the nearest ones that do, so that a misspelt config never trains
something else."""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

KINDS = (
    "objective",
    "advantage",
    "ratio",
    "surrogate",
    "regularizer",
    "aggregation",
    "reward",
    "filter",
    "correction",
    "sampler",
    "protocol",
    "estimator",
    "metric",
    "diagnostic",
    "optimizer",
    "schedule",
    "task",
    "tokenizer",
    "judge",
    "policy",
)
HOMES = {"judge": ("jaxpo.runs.judges.judge",), "protocol": ("jaxpo.protocols",), "sampler": ("jaxpo.protocols",)}
PARTS = ("advantage", "ratio", "surrogate", "regularizer", "reward", "filter", "correction")


class Entry(NamedTuple):
    """A row of the table. ``budget`` maps hyperparameters to the share of the generation budget that a run gives
    them, or to "steps": its number of iterations."""

    kind: str
    id: str
    factory: Callable[..., Any]
    source: str
    budget: Mapping[str, float | str]

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.factory).parameters

    @property
    def defaults(self) -> dict[str, Any]:
        """Hyperparameters with their defaults; ``None`` for those that have to be given."""
        return {name: None if p.default is p.empty else p.default for name, p in self.parameters.items()}

    def of_run(self, max_new_tokens: int | None, steps: int | None) -> dict[str, Any]:
        """The hyperparameters of ``budget`` in a run with so many tokens and iterations; without those that follow
        what is None. Whole numbers, at least 1, where they are declared so."""
        facts = {
            name: (steps, 1) if share == "steps" else (max_new_tokens, share) for name, share in self.budget.items()
        }
        values = {name: share * fact for name, (fact, share) in facts.items() if fact is not None}
        whole = {name for name in values if self.parameters[name].annotation is int}
        return {name: max(1, round(value)) if name in whole else value for name, value in values.items()}


_TABLE: dict[tuple[str, str], Entry] = {}


def unknown(what: str, name: str, choices: Iterable[str]) -> str:
    """The message for a ``name`` that is none of the ``choices``: the nearest ones first, then the rest."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(name), choices, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"unknown {what} {name!r}: {hint}known: {', '.join(choices) or 'none'}"


def register(
    kind: str = "objective", *, id: str | None = None, source: str = "", budget: Mapping[str, float | str] | None = None
) -> Callable[[Callable], Callable]:
    """Decorator: enter a factory in the table.

    Args:
      kind: one of ``KINDS``.
      id: the name users type; the function's own name by default.
      source: paper and arXiv id, printed by ``describe`` and the docs.
      budget: hyperparameters whose default in a *run* is a share of the generation budget (``{"L_const": 1.0}``) or
        its number of iterations (``{"total": "steps"}``).

    Raises:
      ValueError: unknown kind, or a name that is taken by another factory."""
    if kind not in KINDS:
        raise ValueError(unknown("kind", kind, KINDS))

    def enter(factory: Callable) -> Callable:
        name = id or factory.__name__
        taken = _TABLE.get((kind, name))
        # The same definition may be entered again (a notebook cell run twice); another one may not take its place.
        if taken and (taken.factory.__module__, taken.factory.__qualname__) != (
            factory.__module__,
            factory.__qualname__,
        ):
            raise ValueError(
                f"{kind} {name!r} is already registered by {taken.factory.__module__}.{taken.factory.__qualname__}"
            )
        if kind in PARTS and not hasattr(factory, "stamped"):
            factory = _stamped(factory)
        _TABLE[kind, name] = Entry(kind, name, factory, source, dict(budget or {}))
        return factory

    return enter


def _stamped(factory: Callable) -> Callable:
    """The factory of a part, whose parts bear its name: what is composed of them can say what it is made of."""

    @functools.wraps(factory)
    def stamped(*args: Any, **kwargs: Any) -> Any:
        part = factory(*args, **kwargs)
        return part._replace(id=factory.__name__) if hasattr(part, "_replace") else part

    stamped.stamped = True
    return stamped


def names(kind: str = "objective") -> list[str]:
    """Sorted ids of a kind."""
    if kind not in KINDS:
        raise ValueError(unknown("kind", kind, KINDS))
    return sorted(name for k, name in _TABLE if k == kind)


def kinds_of(name: str) -> list[str]:
    """The kinds under which ``name`` is registered."""
    return [kind for kind in KINDS if (kind, name) in _TABLE]


def entry(name: str, kind: str = "objective") -> Entry:
    """The table's row for ``name``; ``ValueError`` with the nearest names if there is none."""
    for module in HOMES.get(kind, ()):
        importlib.import_module(module)
    if (kind, name) not in _TABLE:
        raise ValueError(unknown(kind, name, names(kind)))
    return _TABLE[kind, name]


def check_arguments(what: str, given: Iterable[str], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Raise ``ValueError`` for a hyperparameter that does not exist (nearest names) or a required one that is
    absent."""
    given = set(given)
    for name in sorted(given - set(parameters)):
        raise ValueError(unknown(f"hyperparameter of {what}", name, parameters))
    absent = [n for n, p in parameters.items() if p.default is p.empty and n not in given]
    if absent:
        raise ValueError(f"{what} needs {', '.join(absent)}")


def make(name: str, kind: str = "objective", /, **hyperparameters: Any) -> Any:
    """Build what is registered as ``name``: ``make("grpo", eps_high=0.28)``.

    Raises:
      ValueError: unknown name or hyperparameter (with the nearest), or a required one missing.
    """
    row = entry(name, kind)
    check_arguments(f"{kind} {name!r}", hyperparameters, row.parameters)
    return row.factory(**hyperparameters)


def describe(name: str, kind: str = "objective") -> str:
    """What the table knows of ``name``: source, docstring, hyperparameters and defaults."""
    row = entry(name, kind)
    settings = ", ".join(str(p) for p in row.parameters.values())
    source = f"\nSource: {row.source}" if row.source else ""
    return f"{row.kind} {row.id}({settings}){source}\n\n{inspect.getdoc(row.factory) or ''}\n"
