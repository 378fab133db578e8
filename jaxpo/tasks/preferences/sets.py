"""Preference sets: which answers people, verifiers or models prefer, read from files or made from a task.

A set is a list of `records.Row`: a prompt and its answers. They come from the rows of a file, a folder or a data set of
the hub (fields: `jaxpo.tasks.preferences.records`), or from a task's right and wrong answers.

`build(config, task)` reads or makes a set. In `jaxpo.tasks.preferences.encode`, ``as_kind(rows, have, want)`` turns
pairs into labelled or scored answers and scored answers into pairs; ``encode(rows, tokenizer, ...)`` encodes them as
tokens; ``units(encoded, layout, numbers)`` makes `Rollouts`: units of consecutive rows in the order of ``layout``.
"""

import inspect
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpo.arguments import Whole, check
from jaxpo.fields import EDITS
from jaxpo.registry import check_arguments, unknown
from jaxpo.tasks.base import Task, locate
from jaxpo.tasks.preferences.records import KINDS, BadRow, Row, columns, row_of, unread
from jaxpo.tasks.rows import Rows, Unreadable, read_rows
from jaxpo.text.conversations import key_of

BAD = ("error", "drop")
# Templates of prompts that hold answers -> the places they must have besides {prompt}.
PLACES = {"draft_prompt": ("draft",), "rationale_prompt": ("chosen", "rejected")}


FIELDS_OF_ROWS = sorted(set().union(*map(columns, KINDS)))


class PreferenceSet(NamedTuple):
    """Rows to train on and held-out rows; no prompt is in both.

    Attributes:
      name: for messages.
      kind: a key of ``KINDS``.
      train: rows to train on.
      test: held-out rows.
      report: counts as metrics: ``data/size``, ``data/held_out``, ``data/dropped``, ``data/dropped/<reason>``,
        ``data/flipped``.
      bad: what to do with rows that turn out bad as tokens: "error" or "drop".
      templates: templates of prompts that hold answers (keys of ``PLACES``), instead of the defaults of `encode`.
      unread: columns of the data that nothing reads.
    """

    name: str
    kind: str
    train: list[Row]
    test: list[Row]
    report: dict[str, float]
    bad: str = "error"
    templates: Mapping[str, str] = {}
    unread: tuple[str, ...] = ()


class Sieve:
    """Pass good rows; for a bad row raise an error (``bad="error"``) or count it in ``dropped`` (``"drop"``).

    Raises:
      ValueError: ``bad`` is neither.
    """

    def __init__(self, bad: str):
        if bad not in BAD:
            raise ValueError(unknown("bad, what is done with bad rows", bad, BAD))
        self.bad, self.dropped = bad, Counter()

    def __call__(self, f: Callable[[Any], Any], where: str, x: Any) -> list[Any]:
        """Return ``[f(x)]``, or ``[]`` for a bad row; ``bad="error"`` raises ``ValueError`` that names ``where``."""
        try:
            return [f(x)]
        except BadRow as row:
            if self.bad == "error":
                raise ValueError(f"{where}: {row} (bad='drop' leaves such rows out and counts them)") from row
            self.dropped[row.reason] += 1
            return []

    def report(self) -> dict[str, float]:
        """The counts as metrics."""
        by_reason = {f"data/dropped/{reason}": float(n) for reason, n in sorted(self.dropped.items())}
        return {"data/dropped": float(self.dropped.total()), **by_reason}


# ---- sets

# config.data.name -> the place of its factory.
SETS = {
    "jsonl": "jaxpo.tasks.preferences.sets:jsonl",
    "datasets": "jaxpo.tasks.preferences.sets:jsonl",
    "hub": "jaxpo.tasks.preferences.sets:jsonl",
    "task": "jaxpo.tasks.preferences.verified:verified_pairs",
}


def set_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """The arguments of the preference set called ``name``, without the task; ``ValueError`` for an unknown name."""
    if name not in SETS:
        raise ValueError(unknown("preference set", name, SETS))
    parameters = inspect.signature(locate(SETS[name])).parameters
    return {field: p for field, p in parameters.items() if field != "task"}


def build(config: Mapping[str, Any], task: Task | None) -> PreferenceSet:
    """Build the preference set that ``config`` describes: ``{"name": "jsonl", "path": "pairs.jsonl"}``.

    Args:
      task: the task from which ``{"name": "task"}`` makes pairs.

    Raises:
      ValueError: an unknown name or argument (with the nearest), a missing required argument, or no task to make pairs
        from.
    """
    arguments = {k: v for k, v in config.items() if k != "name"}
    check_arguments(f"preference set {config['name']!r}", arguments, set_arguments(config["name"]))
    factory = locate(SETS[config["name"]])
    if "task" not in inspect.signature(factory).parameters:
        return factory(**arguments)
    if task is None:
        raise ValueError("config.data.name is 'task', but config.task.name names no task to make pairs from")
    return factory(task, **arguments)


def jsonl(
    path: str | os.PathLike,
    test_path: str | os.PathLike | None = None,
    test_size: int | None = None,
    seed: int = 0,
    bad: str = "error",
    fields: Mapping[str, str] | None = None,
    draft_prompt: str | None = None,
    rationale_prompt: str | None = None,
    split: str | None = None,
    test_split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> PreferenceSet:
    """A preference set from the rows of a file, a folder or a hub id (`jaxpo.tasks.rows`).

    Args:
      path: rows to train on.
      test_path: held-out rows. Give this, ``test_split``, ``test_size`` or none (nothing is held out).
      test_size: how many prompts of ``path`` to hold out.
      seed: seeds the draw of those prompts.
      bad: what to do with rows that cannot be used: "error", or "drop" (leave them out, count and report them).
      fields: our name of a field -> the file's: ``{"prompt": "question"}``.
      draft_prompt: template with {prompt} and {draft}: the prompt of an answer that improves on a draft (SRPO).
      rationale_prompt: template with {prompt}, {chosen} and {rejected}: the prompt of a rationale that has none. For
        both templates, None = the default in `jaxpo.tasks.preferences.encode`.
      split, test_split: splits of ``path`` (None = "train") to train on and to hold out.
      subset: its subset, where it has several.
      revision: branch, tag or commit hash of a hub id.

    Raises:
      ValueError: a bad row (names file, line and field), no such split or subset, or no row left.
      FileNotFoundError: no such file or folder.
      ModuleNotFoundError: a format whose library is not installed.
    """
    if fields is not None and not isinstance(fields, Mapping):
        raise ValueError(f"fields must be a dictionary, our name of a field -> the file's, not {fields!r}")
    if test_path is not None and test_split is not None:
        raise ValueError("give test_path or test_split, not both")
    path = path if revision is None else f"{path}@{revision}"
    sources = [read_rows(path, split, subset)]
    sources += [] if test_path is None else [read_rows(test_path)]
    sources += [] if test_split is None else [read_rows(path, test_split, subset)]
    data = from_records(Path(path).name, [records(rows) for rows in sources], test_size, seed, bad, fields)
    return data._replace(templates=templates(draft_prompt=draft_prompt, rationale_prompt=rationale_prompt))


datasets = jsonl  # config.data.name datasets and hub: what is read depends on the path


def records(rows: Rows) -> Iterable[tuple[str, Any]]:
    """(place, record) of every row; an `Unreadable` stands for one that is none."""
    return ((f"{name}:{number}", record) for name, _, number, record in rows.places())


def templates(**given: str | None) -> dict[str, str]:
    """The given templates, without None; ``ValueError`` if one leaves out a place of ``PLACES``."""
    for name, template in given.items():
        absent = [p for p in PLACES[name] if template is not None and f"{{{p}}}" not in template]
        if absent:
            raise ValueError(f"config.data.{name} {template!r} does not say where {{{absent[0]}}} goes")
    return {name: template for name, template in given.items() if template is not None}


def readable(record: Any) -> Any:
    """The record itself; `BadRow` if it could not be read."""
    if isinstance(record, Unreadable):
        raise BadRow("not_json", str(record))
    return record


def from_records(
    name: str,
    sources: Sequence[Iterable[tuple[str, Any]]],
    test_size: int | None = None,
    seed: int = 0,
    bad: str = "error",
    fields: Mapping[str, str] | None = None,
) -> PreferenceSet:
    """A preference set from one or two sources of (place, record): rows to train on, and rows to hold out."""
    sieve, kind, parts, left = Sieve(bad), None, [], {}
    for field in fields or {}:
        if field not in FIELDS_OF_ROWS:
            raise ValueError(unknown("field of config.data.fields", field, FIELDS_OF_ROWS))
    if check("test_size", test_size, Whole | None) is not None and len(sources) > 1:
        raise ValueError("give held-out rows or test_size, not both")
    if fields is not None and not isinstance(fields, Mapping):
        raise ValueError(f"fields must map our names to the file's, as in {{'prompt': 'question'}}, not {fields!r}")
    if seed and not test_size:
        raise ValueError(f"seed={seed!r} has no effect without test_size: it draws the rows that test_size holds out")
    for source in sources:
        rows: list[Row] = []
        for where, record in source:
            known = kind  # a copy for the lambda
            for row, seen in sieve(lambda x, known=known: read(readable(x), fields or {}, known), where, record):
                kind = kind or kind_of_row(row)
                left |= dict.fromkeys(unread(seen, fields or {}, kind))
                rows.append(row._replace(where=where))
        parts.append(rows)
    train = parts[0]
    test = parts[1] if len(parts) > 1 else hold_out(train, test_size or 0, seed)
    return finish(name, kind or "pair", train, test, sieve.report())._replace(bad=bad, unread=tuple(left))


def read(record: Any, fields: Mapping[str, str], kind: str | None) -> tuple[Row, Any]:
    """A row (`jaxpo.tasks.preferences.records.row_of`), beside the record it was read from."""
    return row_of(record, fields, kind), record


def kind_of_row(row: Row) -> str:
    """The kind of a row: a key of `jaxpo.tasks.preferences.records.KINDS`."""
    first = row.answers[0]
    if first.role == EDITS[0]:
        return "edited"
    return "scored" if "reward" in first.numbers else "label" if "label" in first.numbers else "pair"


def hold_out(rows: Sequence[Row], size: int, seed: int) -> list[Row]:
    """The rows of ``size`` prompts, drawn by the seed."""
    prompts = list(dict.fromkeys(key_of(row.prompt) for row in rows))
    if size >= len(prompts) and size:
        raise ValueError(f"test_size={size} leaves nothing to train on: there are {len(prompts)} different prompts")
    drawn = set(random.Random(seed).sample(prompts, size))
    return [row for row in rows if key_of(row.prompt) in drawn]


def finish(name: str, kind: str, train: list[Row], test: list[Row], report: Mapping[str, float]) -> PreferenceSet:
    """The finished set, without training rows whose prompt is held out; ``ValueError`` if nothing is left."""
    held_out = {key_of(row.prompt) for row in test}
    kept = [row for row in train if key_of(row.prompt) not in held_out]
    if not kept:
        dropped = f", {report['data/dropped']:g} dropped as bad" if report.get("data/dropped") else ""
        raise ValueError(
            f"{name}: no rows to train on ({len(train)} read{dropped}, {len(train)} with held-out prompts)"
        )
    sizes = {"data/size": float(len(kept)), "data/held_out": float(len(test))}
    return PreferenceSet(name, kind, kept, test, {**sizes, **report})
