"""Preference sets: which answers people, verifiers or models prefer, from files or made from a task.

A set is a list of `records.Row`: a prompt and its answers, from JSON lines or a folder of Hugging Face ``datasets``
(the records' fields: `jaxpo.tasks.preferences.records`), or made of a task's right and wrong answers.

`build(config, task)` reads or makes a set. `jaxpo.tasks.preferences.encode`: ``as_kind(rows, have, want)`` turns pairs
into labelled or scored answers and scored answers into pairs, ``encode(rows, tokenizer, ...)`` makes tokens of them,
and ``units(encoded, layout, numbers)`` the `Rollouts` of those: units of consecutive rows in the order of ``layout``.
"""

import importlib
import inspect
import json
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
from jaxpo.tasks.preferences.records import BadRow, Prompt, Row, row_of

BAD = ("error", "drop")
# Prompts that hold answers, and what their templates name besides {prompt}.
PLACES = {"draft_prompt": ("draft",), "rationale_prompt": ("chosen", "rejected")}


class PreferenceSet(NamedTuple):
    """Rows to train on and rows held out; no prompt is in both. ``kind`` is a key of ``KINDS``; ``report`` holds counts
    as metrics: ``data/size``, ``data/held_out``, ``data/dropped`` and ``data/dropped/<reason>``, ``data/flipped``.
    ``bad`` says what is to be done with rows that turn out bad as tokens; ``templates`` (keys of ``PLACES``), how
    prompts that hold answers are made of the row's, where the defaults of `encode` will not do."""

    name: str
    kind: str
    train: list[Row]
    test: list[Row]
    report: dict[str, float]
    bad: str = "error"
    templates: Mapping[str, str] = {}


class Sieve:
    """Lets good rows pass; a bad one is an error (``bad="error"``) or counted in ``dropped`` by its reason ("drop").

    Raises:
      ValueError: ``bad`` is neither.
    """

    def __init__(self, bad: str):
        if bad not in BAD:
            raise ValueError(unknown("bad, what is done with bad rows", bad, BAD))
        self.bad, self.dropped = bad, Counter()

    def __call__(self, f: Callable[[Any], Any], where: str, x: Any) -> list[Any]:
        """``[f(x)]``, or ``[]`` for a bad one; ``ValueError`` with ``where`` if that is an error."""
        try:
            return [f(x)]
        except BadRow as row:
            if self.bad == "error":
                raise ValueError(f"{where}: {row} (bad='drop' leaves such rows out and counts them)") from row
            self.dropped[row.reason] += 1
            return []

    def report(self) -> dict[str, float]:
        """Counts as metrics."""
        by_reason = {f"data/dropped/{reason}": float(n) for reason, n in sorted(self.dropped.items())}
        return {"data/dropped": float(self.dropped.total()), **by_reason}


# ---- sets

# Where the factories live: config.data.name.
SETS = {
    "jsonl": "jaxpo.tasks.preferences.sets:jsonl",
    "datasets": "jaxpo.tasks.preferences.sets:datasets",
    "task": "jaxpo.tasks.preferences.verified:verified_pairs",
}


def set_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """The arguments of the preference sets called ``name``, without the task; ``ValueError`` if there are none."""
    if name not in SETS:
        raise ValueError(unknown("preference set", name, SETS))
    parameters = inspect.signature(locate(SETS[name])).parameters
    return {field: p for field, p in parameters.items() if field != "task"}


def build(config: Mapping[str, Any], task: Task | None) -> PreferenceSet:
    """The preference set that ``config`` describes: ``{"name": "jsonl", "path": "pairs.jsonl"}``.

    Args:
      task: what ``{"name": "task"}`` makes its pairs of.

    Raises:
      ValueError: an unknown name or argument (with the nearest), a required one that is absent, or no task to make
        pairs of.
    """
    arguments = {k: v for k, v in config.items() if k != "name"}
    check_arguments(f"preference set {config['name']!r}", arguments, set_arguments(config["name"]))
    factory = locate(SETS[config["name"]])
    if "task" not in inspect.signature(factory).parameters:
        return factory(**arguments)
    if task is None:
        raise ValueError("config.data.name is 'task', but config.task.name names none to make pairs of")
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
) -> PreferenceSet:
    """A preference set from a file with one JSON object a line.

    Args:
      path: rows to train on. test_path: rows held out; or
      test_size: how many prompts are held out of ``path``, drawn by ``seed``. Neither = nothing is held out.
      bad: "error", or "drop": rows that cannot be used are left out, counted and reported.
      fields: our name of a field -> the file's: ``{"prompt": "question"}``.
      draft_prompt: the prompt of an answer that improves on a draft (SRPO), of {prompt} and {draft}; rationale_prompt:
        that of a rationale without a prompt of its own, of {prompt}, {chosen} and {rejected}. None = those of
        `jaxpo.tasks.preferences.encode`.

    Raises:
      ValueError: a bad row (names file, line and field), or no row left. FileNotFoundError: no such file.
    """

    def records(file: str | os.PathLike) -> Iterable[tuple[str, Any]]:
        for number, line in enumerate(Path(file).read_bytes().splitlines(), start=1):
            if line.strip():
                yield f"{file}:{number}", line

    sources = [records(p) for p in (path, test_path) if p is not None]
    data = from_records(Path(path).name, sources, parsed, test_size, seed, bad, fields)
    return data._replace(templates=templates(draft_prompt=draft_prompt, rationale_prompt=rationale_prompt))


def templates(**given: str | None) -> dict[str, str]:
    """Those that are given; ``ValueError`` for one that leaves a place out."""
    for name, template in given.items():
        absent = [p for p in PLACES[name] if template is not None and f"{{{p}}}" not in template]
        if absent:
            raise ValueError(f"config.data.{name} {template!r} does not say where {{{absent[0]}}} goes")
    return {name: template for name, template in given.items() if template is not None}


def parsed(line: bytes) -> Any:
    """The object of a line of JSON; `BadRow` if it is none."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise BadRow("not_json", f"not JSON: {error}") from error


def datasets(
    path: str | os.PathLike,
    split: str | None = None,
    test_split: str | None = None,
    test_size: int | None = None,
    seed: int = 0,
    bad: str = "error",
    fields: Mapping[str, str] | None = None,
    draft_prompt: str | None = None,
    rationale_prompt: str | None = None,
) -> PreferenceSet:
    """A preference set from a folder that ``datasets.Dataset.save_to_disk`` or that of a ``DatasetDict`` wrote.

    Args:
      split, test_split: of a DatasetDict: which part is trained on, and which is held out. The rest as of `jsonl`.

    Raises:
      ModuleNotFoundError: the library ``datasets`` is not installed. ValueError: a split that does not exist, splits
        of a folder that has none, a bad row. FileNotFoundError: no such folder.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path} is no folder of a data set")
    try:
        library = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} is a data set of the library 'datasets', which is not installed: pip install 'jaxpo[datasets]' "
            "or write the rows as JSON lines and set config.data.name to jsonl"
        ) from None
    held = library.load_from_disk(str(path))
    parts = held if isinstance(held, Mapping) else None
    if parts is None and (split or test_split):
        raise ValueError(f"{path} has no splits: leave split and test_split out")
    chosen = [split or "train", *([test_split] if test_split else [])] if parts is not None else []
    for name in chosen:
        if name not in parts:
            raise ValueError(f"{path}: {unknown('split', name, parts)}")

    def records(part: Any, name: str) -> Iterable[tuple[str, Any]]:
        return ((f"{path}{name}:{number}", record) for number, record in enumerate(part, start=1))

    sources = [records(held, "")] if parts is None else [records(parts[name], f"[{name}]") for name in chosen]
    data = from_records(Path(path).name, sources, lambda record: record, test_size, seed, bad, fields)
    return data._replace(templates=templates(draft_prompt=draft_prompt, rationale_prompt=rationale_prompt))


def from_records(
    name: str,
    sources: Sequence[Iterable[tuple[str, Any]]],
    parse: Callable[[Any], Any],
    test_size: int | None = None,
    seed: int = 0,
    bad: str = "error",
    fields: Mapping[str, str] | None = None,
) -> PreferenceSet:
    """A preference set of records with where they are from: rows to train on, and perhaps rows that are held out."""
    sieve, kind, parts = Sieve(bad), None, []
    if check("test_size", test_size, Whole | None) is not None and len(sources) > 1:
        raise ValueError("give held-out rows or test_size, not both")
    for source in sources:
        rows: list[Row] = []
        for where, record in source:
            known = kind  # bound now
            for row in sieve(lambda x, known=known: row_of(parse(x), fields or {}, known), where, record):
                kind = kind or kind_of_row(row)
                rows.append(row._replace(where=where))
        parts.append(rows)
    train = parts[0]
    test = parts[1] if len(parts) > 1 else hold_out(train, test_size or 0, seed)
    return finish(name, kind or "pair", train, test, sieve.report())._replace(bad=bad)


def kind_of_row(row: Row) -> str:
    """The key of `jaxpo.tasks.preferences.records.KINDS` that says what a row is."""
    first = row.answers[0]
    if first.role == EDITS[0]:
        return "edited"
    return "scored" if "reward" in first.numbers else "label" if "label" in first.numbers else "pair"


def hold_out(rows: Sequence[Row], size: int, seed: int) -> list[Row]:
    """The rows of ``size`` prompts drawn by the seed."""
    prompts = list(dict.fromkeys(key_of(row.prompt) for row in rows))
    if size >= len(prompts) and size:
        raise ValueError(f"test_size={size} leaves nothing to train on: there are {len(prompts)} different prompts")
    drawn = set(random.Random(seed).sample(prompts, size))
    return [row for row in rows if key_of(row.prompt) in drawn]


def key_of(prompt: Prompt) -> str:
    """A prompt as a text that is equal for equal prompts."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def finish(name: str, kind: str, train: list[Row], test: list[Row], report: Mapping[str, float]) -> PreferenceSet:
    """The set, without training rows whose prompt is held out; ``ValueError`` if nothing is left."""
    held_out = {key_of(row.prompt) for row in test}
    kept = [row for row in train if key_of(row.prompt) not in held_out]
    if not kept:
        dropped = f", {report['data/dropped']:g} dropped as bad" if report.get("data/dropped") else ""
        raise ValueError(
            f"{name}: no rows to train on ({len(train)} read{dropped}, {len(train)} with held-out prompts)"
        )
    sizes = {"data/size": float(len(kept)), "data/held_out": float(len(test))}
    return PreferenceSet(name, kind, kept, test, {**sizes, **report})
