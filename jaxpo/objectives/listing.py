"""The reference of everything registered, in markdown: ``docs/objectives.md`` is what `reference` returns."""

import inspect
import re
import sys

from jaxpo.arguments import choices_of
from jaxpo.batch import compared
from jaxpo.fields import FIELDS
from jaxpo.objectives.grammar.base import Objective
from jaxpo.objectives.precision import bound_of
from jaxpo.registry import Entry, entry, make, names

PART_KINDS = (
    "advantage",
    "ratio",
    "surrogate",
    "regularizer",
    "aggregation",
    "filter",
    "reward",
    "correction",
    "term",
    "diagnostic",
    "sampler",
    "protocol",
)
HERE = ("jaxpo.objectives", "jaxpo.primitives", "jaxpo.protocols")  # what else is registered is a user's own
INTRODUCTION = """# Objectives

Written by `python -m jaxpo.objectives docs docs/objectives.md` from the registry; a test fails when they differ.

A policy-gradient objective is *advantage × ratio × surrogate × regularizers × aggregation*, with filters and shaping
before and corrections of the gap between sampler and trainer beside it. Any of them is trained with by name
(`--config.objective.name=gspo --config.objective.eps_high=5e-4`), and any sensible combination of parts without code:

```
--config.objective.name=policy_gradient --config.objective.advantage=bnpo --config.objective.ratio=sequence \\
    --config.objective.agg=seq_mean --config.objective.regularizers="0.04 * kl_to_reference(estimator='k2')"
```

The tables below are sorted by family. Their columns: the file of the objective; the protocol that gathers its data
(none: on policy); the frozen references under which it needs log-probs (`ref` = `logp_ref`); and who may give the other
fields that it needs, where the training loop does not give them by itself.

A preference objective (`dpo`, `simpo`, ..., `opa_dpo`, the Nash methods, reward models) is one number for a *unit* of
consecutive rows: `layout` names their roles (chosen, rejected, and third answers where it has them), the policy scores
them like any other rows, and what a judge says of an answer is a field of the batch: `win`, `pref_prob`, `pref_opp` and
`label` in [0, 1], `rm`, `pref_score`, `margin`; a number of the whole unit is read from its first row. One of its own
is a link of the margin:

```python
jaxpo.preference(lambda z, units: -jax.nn.log_sigmoid(z), beta=0.1)  # DPO
```

`python -m jaxpo.objectives describe gtpo` prints one entry with all of its docstring.
"""


def first_paragraph(row: Entry) -> str:
    """The first paragraph of the docstring, on one line."""
    return " ".join((inspect.getdoc(row.factory) or "").split("\n\n")[0].split())


def listing(kind: str) -> str:
    """A line for every name of a kind."""
    width = max(map(len, names(kind)), default=0)
    return "\n".join(f"  {name:{width}}  {first_paragraph(entry(name, kind))}" for name in names(kind))


def example(name: str) -> Objective:
    """The objective with its defaults; hyperparameters that a run fills in get 1."""
    row = entry(name)
    return make(name, **{key: 1 for key in row.budget if row.defaults[key] is None})


def settings(row: Entry) -> str:
    """Hyperparameters with their defaults and choices; those that a run fills in say from what."""
    said = []
    for name, default in row.defaults.items():
        share = row.budget.get(name)
        if share is not None:
            default = "the run's steps" if share == "steps" else f"{share:g} x the generation budget"
        others = [repr(x) for x in choices_of(row.domains.get(name)) if x != default]
        choices = f" (or {', '.join(others)})" if others else ""
        said.append(f"`{name}` = {default if share is not None else repr(default)}{choices}")
    return ", ".join(said) or "none"


def composition(objective: Objective) -> str:
    """What it is made of, by kind of part."""
    return (
        "; ".join(f"{kind} `{' + '.join(parts)}`" for kind, parts in objective.made_of.items() if parts)
        or "its own terms"
    )


def references(objective: Objective) -> list[str]:
    """Names of the frozen references under which it needs log-probs, or with which it compares the policy."""
    asked = {n for n in objective.asks.needs if n in FIELDS and FIELDS[n].givers == ("reference",)}
    return sorted({n.removeprefix("logp_") for n in asked} | compared(objective.asks.derived, objective.asks.derived))


def sources(objective: Objective) -> dict[str, tuple[str, ...]]:
    """Who may give each field that it needs, for those that the training loop does not give by itself."""
    asked = {n: FIELDS[n].givers for n in sorted(objective.asks.needs) if n in FIELDS}
    return {n: givers for n, givers in asked.items() if not {"loop", "reference"} & set(givers)}


def data(objective: Objective) -> str:
    """Units and fields that data, a judge, a protocol or the user have to give."""
    layout = list(dict.fromkeys(objective.unit.layout))
    units = [f"units of {', '.join(layout)}"] if layout else []
    return "; ".join([*units, *[f"`{name}`: {' or '.join(givers)}" for name, givers in sources(objective).items()]])


def section(name: str) -> str:
    """Markdown of one objective."""
    row, objective = entry(name), example(name)
    asks = [f"`{n}`" for n in sorted(objective.asks.needs)]
    current = sorted(objective.asks.wants - {"logp"}) + [f"{n} (peek)" for n in sorted(objective.asks.peeks)]
    lines = [
        f"### `{name}`",
        first_paragraph(row),
        f"- source: {row.source}",
        f"- made of: {composition(objective)}",
        f"- needs: {', '.join(asks) or 'nothing'}"
        + (f"; of the current policy {', '.join(current)}" if current else ""),
        *([f"- protocol: `{objective.protocol.name}`"] if objective.protocol.name != "on_policy" else []),
        *(["- rewards in [{:g}, {:g}]".format(*objective.asks.rewards)] if objective.asks.rewards else []),
        f"- hyperparameters: {settings(row)}",
        f"- in float32: within {bound_of(name).error:g} of float64 ([measured](float32.md))",
    ]
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def families() -> dict[str, list[str]]:
    """Names of the objectives by the module that defines them; those that a user registered are left out."""
    found: dict[str, list[str]] = {}
    for name in names():
        module = entry(name).factory.__module__
        if module.startswith(HERE):
            found.setdefault(module, []).append(name)
    return dict(sorted(found.items()))


def family(module: str, members: list[str]) -> str:
    """Markdown of the table of a family."""
    about = " ".join((inspect.getdoc(sys.modules[module]) or "").split("\n\n")[0].split())
    file = module.replace(".", "/") + ".py"
    lines = [f"## {module.rsplit('.', 1)[-1]}", "", about, ""]
    lines += ["| objective | in a line | file | protocol | references | data |", "|---|---|---|---|---|---|"]
    for name in members:
        objective = example(name)
        protocol = f"`{objective.protocol.name}`" if objective.protocol.name != "on_policy" else ""
        cells = [first_paragraph(entry(name)), f"[{file.rsplit('/', 1)[-1]}](../{file})", protocol]
        cells += [", ".join(references(objective)), data(objective)]
        lines.append(f"| [`{name}`](#{name}) | {' | '.join(map(cell, cells))} |")
    return "\n".join(lines)


def table(kind: str) -> str:
    """Markdown of the parts of a kind."""
    rows = [entry(name, kind) for name in names(kind)]
    rows = [r for r in rows if r.factory.__module__.startswith(HERE)]
    lines = [f"| `{r.id}` | {cell(first_paragraph(r))} | {cell(settings(r))} | {cell(r.source)} |" for r in rows]
    return "\n".join(["| name | what it is | options | source |", "|---|---|---|---|", *lines])


def cell(text: str) -> str:
    """Text that a table's cell can hold."""
    return re.sub(r"\|", r"\\|", text)


def reference() -> str:
    """The whole of ``docs/objectives.md``."""
    tables = [family(module, members) for module, members in families().items()]
    sections = ["## One by one", *[section(name) for members in families().values() for name in sorted(members)]]
    parts = [f"## Parts: {kind}\n\n{table(kind)}" for kind in PART_KINDS]
    return "\n\n".join([INTRODUCTION.rstrip(), *tables, *sections, *parts]) + "\n"
