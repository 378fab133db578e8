"""One table of everything that is chosen by name: objectives, and the parts they are made of.

``register`` puts a factory in the table under its function name and a kind; ``make`` calls it with hyperparameters.
Names and hyperparameters that do not exist fail with the nearest ones that do, so that a misspelt config never trains
something else. The table fills itself: the first question about a kind imports the modules of ``HOMES``.

A factory states the domain of a hyperparameter in its annotation; see `jaxpo.arguments`. Every call checks it, whether
it comes from `make`, from a config or from Python.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxpo import arguments
from jaxpo.arguments import When, has_effect

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
    "term",
    "tokenizer",
    "judge",
    "policy",
    "preference_set",
    "verifier",
)
# Modules whose import registers the entries of a kind.
HOMES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("objective", "aggregation", "term"), ("jaxpo.objectives",)),
    **dict.fromkeys(("advantage", "ratio", "surrogate", "regularizer"), ("jaxpo.objectives",)),
    **dict.fromkeys(("reward", "filter", "correction"), ("jaxpo.objectives",)),
    **dict.fromkeys(("protocol", "sampler"), ("jaxpo.protocols",)),
    "diagnostic": ("jaxpo.objectives", "jaxpo.protocols"),
    "task": ("jaxpo.tasks",),
    "judge": ("jaxpo.runs.judges.judge",),
    "tokenizer": ("jaxpo.text.tokenizers",),
    "policy": ("jaxpo.policy.named",),
    "verifier": ("jaxpo.tasks.rewards",),
}
PARTS = ("advantage", "ratio", "surrogate", "regularizer", "reward", "filter", "correction")
CHECKED = ("objective", *PARTS)  # their numbers must be finite, also where they state no domain


class Entry(NamedTuple):
    """A row of the table.

    kind, id: what it is, and the name that users type.
    factory: makes it from hyperparameters.
    source: the paper and its arXiv id.
    budget: hyperparameters that a run fills in: a share of its generation budget, or "steps", its number of iterations.
    """

    kind: str
    id: str
    factory: Callable[..., Any]
    source: str
    budget: Mapping[str, float | str]

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Hyperparameters with plain annotations (``float``, ``int | None``); ``domains`` has the others."""
        return inspect.signature(self.factory).parameters

    @property
    def defaults(self) -> dict[str, Any]:
        """Hyperparameters with their defaults; ``None`` for those that have to be given."""
        return {name: None if p.default is p.empty else p.default for name, p in self.parameters.items()}

    @property
    def domains(self) -> Mapping[str, Any]:
        """Annotations that say which values a hyperparameter may have."""
        return getattr(self.factory, "domains", {})

    @property
    def settings(self) -> Mapping[str, When | tuple[When, ...]]:
        """Where a hyperparameter has an effect, for those that do not always have one."""
        return getattr(self.factory, "settings", {})

    def of_run(
        self, max_new_tokens: int | None, steps: int | None, given: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The hyperparameters of ``budget`` in a run with so many tokens and iterations.

        Whole numbers, at least 1, where they are declared so. Without those that follow what is None, and without
        those that have no effect beside the hyperparameters ``given``."""
        facts = {
            name: (steps, 1) if share == "steps" else (max_new_tokens, share) for name, share in self.budget.items()
        }
        values = {name: share * fact for name, (fact, share) in facts.items() if fact is not None}
        whole = {name for name in values if int in arguments.alternatives(self.parameters[name].annotation)}
        values = {name: max(1, round(value)) if name in whole else value for name, value in values.items()}
        others = {**self.defaults, **values, **(given or {})}
        return {n: x for n, x in values.items() if n not in self.settings or has_effect(self.settings[n], others)}


_TABLE: dict[tuple[str, str], Entry] = {}
_LATER: dict[tuple[str, str], str] = {}


OWN = "; if it is of your own, name its module in config.imports (in a race: --imports)"


LONGEST = 1000  # characters of a name in a message; names in files may have any length


def unknown(what: str, name: str, choices: Iterable[str]) -> str:
    """The message for a ``name`` that is none of the ``choices``: the nearest ones first, then the rest."""
    choices, name = sorted(choices), name[:LONGEST] if isinstance(name, str) else name
    near = difflib.get_close_matches(str(name), choices, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"unknown {what} {name!r}: {hint}known: {', '.join(choices) or 'none'}"


def register(
    kind: str = "objective",
    *,
    id: str | None = None,
    source: str = "",
    budget: Mapping[str, float | str] | None = None,
    when: Mapping[str, When | tuple[When, ...]] | None = None,
) -> Callable[[Callable], Callable]:
    """Decorator: enter a factory in the table.

    Args:
      kind: one of ``KINDS``.
      id: the name users type; the function's own name by default.
      source: paper and arXiv id, printed by ``describe`` and the docs.
      budget: hyperparameters whose default in a *run* is a share of the generation budget (``{"L_const": 1.0}``) or
        its number of iterations (``{"total": "steps"}``).
      when: the setting in which a hyperparameter has an effect; elsewhere a value other than its default is an error:
        ``{"adv_eps": when(scale=("group", "batch"))}``.

    Returns:
      the factory, which checks its arguments; a factory that states no domain comes back as it is.

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
        if not hasattr(factory, "domains") and (kind in CHECKED or when or _states_a_domain(factory)):
            stamp = (lambda part: _stamped(part, factory.__name__)) if kind in PARTS else (lambda made: made)
            factory = arguments.checked(factory, name, settings=when or {}, returns=stamp)
        _TABLE[kind, name] = Entry(kind, name, factory, source, dict(budget or {}))
        return factory

    return enter


def register_later(kind: str, homes: Mapping[str, str]) -> None:
    """Enter factories by their places (``"module:function"``), which are imported when they are asked for."""
    _LATER.update({(kind, name): place for name, place in homes.items()})


def _states_a_domain(factory: Callable) -> bool:
    """Whether an annotation says more than a plain type."""
    annotations = [p.annotation for p in inspect.signature(factory).parameters.values()]
    return any(arguments.plain(x) != x for x in annotations)


def _stamped(part: Any, name: str) -> Any:
    """A part that bears its factory's name: what is composed of it can say what it is made of."""
    return part._replace(id=name) if hasattr(part, "_replace") else part


def _fill(kind: str) -> None:
    """Import what registers the entries of a kind."""
    for module in HOMES.get(kind, ()):
        importlib.import_module(module)


def names(kind: str = "objective") -> list[str]:
    """Sorted ids of a kind."""
    if kind not in KINDS:
        raise ValueError(unknown("kind", kind, KINDS))
    _fill(kind)
    return sorted({name for k, name in (*_TABLE, *_LATER) if k == kind})


def kinds_of(name: str) -> list[str]:
    """The kinds under which ``name`` is registered."""
    return [kind for kind in KINDS if name in names(kind)]


def entry(name: str, kind: str = "objective") -> Entry:
    """The table's row for ``name``.

    Raises:
      ValueError: there is none; the message gives the kinds that have the name, or else the nearest names."""
    if name not in names(kind):
        kinds = [k for k in KINDS if (k, name) in _TABLE or (k, name) in _LATER]  # of what is loaded
        if kinds:
            calls = " or ".join(f"make({name!r}, {k!r})" if k != "objective" else f"make({name!r})" for k in kinds)
            raise ValueError(f"unknown {kind} {name!r}: it is {' and '.join(map(_article, kinds))}: {calls}")
        raise ValueError(unknown(kind, name, names(kind)) + OWN)
    if (kind, name) not in _TABLE:
        module, function = _LATER[kind, name].split(":")
        factory = getattr(importlib.import_module(module), function)
        _TABLE.setdefault((kind, name), Entry(kind, name, factory, "", {}))  # the import may have registered it
    return _TABLE[kind, name]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


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
    limits = "".join(f"\n  {name}: {arguments.says(x)}" for name, x in row.domains.items() if arguments.plain(x) != x)
    limits = f"\n\nDomains:{limits}" if limits else ""
    return f"{row.kind} {row.id}({settings}){source}\n\n{inspect.getdoc(row.factory) or ''}{limits}\n"
