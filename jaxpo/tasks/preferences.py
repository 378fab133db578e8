"""Preference sets: which answers people, verifiers or models prefer, from files or made from a task.

A set is a list of `Row`: a prompt and its answers. An `Answer` has a role of `jaxpo.batch.ROLES`, its text and what is
known of it as numbers. There are three kinds of rows, in JSON lines or in a folder of Hugging Face ``datasets``:

  pair      {"prompt", "chosen", "rejected"}         answers chosen, rejected, and any other role that is a field
  label     {"prompt", "completion", "label"}        one answer "own" with the number label (true, false, or in [0, 1])
  scored    {"prompt", "completions", "scores"}      K answers "own" with the number reward

A prompt is a text or a list of messages ``{"role", "content"}``, which need the chat template of the tokenizer; an
answer a text or one assistant message, tool calls after it ``"chosen_trace": [["tool", "2+2"], ...]``. Without "prompt"
chosen and rejected are whole conversations with a common beginning. An answer of a further role may bring a prompt of
its own: ``{"prompt", "completion"}``. Of numbers a pair may have those of ``NUMBERS``: one for the pair
(``"pref_prob": 0.8``, a soft preference for chosen), or one an answer (``"win": {"chosen": 0.7, "rejected": 0.4}`` or
``"win_chosen": 0.7, ...``).

`build(config, task)` reads or makes a set. `jaxpo.tasks.units`: ``as_kind(rows, have, want)`` turns pairs into labelled
or scored answers and scored answers into pairs, ``encode(rows, tokenizer, ...)`` makes tokens of them, and
``units(encoded, layout, numbers)`` the `Rollouts` of those: units of consecutive rows in the order of ``layout``.
"""

import importlib
import inspect
import json
import math
import numbers as numbers_lib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpo.batch import ROLES
from jaxpo.registry import check_arguments, unknown
from jaxpo.tasks.base import Task, check_sizes, locate
from jaxpo.tasks.traces import Trace, check_trace

PAIR = ("chosen", "rejected")
Prompt = str | tuple[Mapping[str, str], ...]
NUMBERS = ("pref_prob", "margin", "win", "rm", "pref_score")  # what a file may say of a pair or of its answers
SHARES = ("pref_prob", "win", "label")  # those that must lie in [0, 1]
KINDS = {"pair": ("chosen", "rejected"), "label": ("completion", "label"), "scored": ("completions", "scores")}
BAD = ("error", "drop")


class Answer(NamedTuple):
    """An answer of a row. ``prompt``: its own, if it has not the row's. ``numbers``: what is known of it, by name.
    ``trace``: of tool calls after it (`jaxpo.tasks.traces`)."""

    role: str
    text: str
    numbers: Mapping[str, float] = {}
    prompt: Prompt | None = None
    trace: Trace = ()


class Row(NamedTuple):
    """A prompt with its answers; ``where`` it comes from, for messages."""

    prompt: Prompt
    answers: tuple[Answer, ...]
    where: str = ""

    def answer(self, role: str) -> Answer:
        """The first answer of a role; `BadRow` without one."""
        for answer in self.answers:
            if answer.role == role:
                return answer
        raise BadRow("missing_field", f"there is no answer {role!r}: {unknown('role', role, roles_of(self))}")


class PreferenceSet(NamedTuple):
    """Rows to train on and rows held out; no prompt is in both. ``kind`` is a key of ``KINDS``; ``report`` holds counts
    as metrics: ``data/size``, ``data/held_out``, ``data/dropped`` and ``data/dropped/<reason>``, ``data/flipped``.
    ``bad`` says what is to be done with rows that turn out bad as tokens."""

    name: str
    kind: str
    train: list[Row]
    test: list[Row]
    report: dict[str, float]
    bad: str = "error"


class BadRow(ValueError):
    """A row that cannot be used; ``reason`` is what it is counted under when such rows are dropped."""

    def __init__(self, reason: str, message: str):
        self.reason = reason
        super().__init__(message)


def roles_of(row: Row) -> list[str]:
    """The roles of a row's answers."""
    return [a.role for a in row.answers]


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


# ---- one record


def row_of(record: Any, fields: Mapping[str, str], kind: str | None = None) -> Row:
    """The row that a record (of a file) holds.

    Args:
      fields: our name of a field -> the file's, where they differ. kind: that of the rows before; None = any.

    Raises:
      BadRow: whatever makes it useless.
    """
    if not isinstance(record, Mapping):
        raise BadRow("wrong_type", f"a JSON object is expected, found {type(record).__name__}")
    record = {**record, **{ours: record[theirs] for ours, theirs in fields.items() if theirs in record}}
    own = kind_of(record)
    if kind is not None and own != kind:
        raise BadRow("another_kind", f"the rows before have the fields of a {kind!r} row, this one of a {own!r} row")
    absent = [f for f in KINDS[own] if record.get(f) is None]
    if absent:
        raise BadRow("missing_field", f"field {absent[0]!r} is missing: {unknown('field', absent[0], record)}")
    row = {"pair": pair_row, "label": label_row, "scored": scored_row}[own](record)
    check_answers(row, own)
    return row


def kind_of(record: Mapping[str, Any]) -> str:
    """The kind of which a record has a field; `BadRow` if of none."""
    for kind, fields in KINDS.items():
        if any(record.get(f) is not None for f in fields):
            return kind
    wanted = " or ".join("prompt, " + ", ".join(fields) for fields in KINDS.values())
    raise BadRow("missing_field", f"a row has the fields {wanted}; this one has {', '.join(record) or 'none'}")


def prompt_of(value: Any) -> Prompt:
    """A text, or messages; `BadRow` for anything else."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty_prompt", "field 'prompt' is empty")
        return value
    messages = messages_of(value, "prompt")
    if messages[-1]["role"] == "assistant":
        raise BadRow("wrong_type", "field 'prompt': its last message is the assistant's, so there is nothing to answer")
    return messages


def messages_of(value: Any, field: str) -> tuple[Mapping[str, str], ...]:
    """A non-empty list of messages; `BadRow` for anything else."""

    def good(m: Any) -> bool:
        return isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)

    if not isinstance(value, list | tuple) or not value or not all(map(good, value)):
        shown = repr(value)[:60]
        raise BadRow(
            "wrong_type", f'field {field!r} must be a text or a list of {{"role", "content"}} messages, found {shown}'
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def text_of(value: Any, field: str) -> str:
    """The text of an answer: a string, or one message of the assistant; `BadRow` for anything else."""
    if not isinstance(value, str):
        messages = messages_of(value, field)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            roles = ", ".join(m["role"] for m in messages)
            raise BadRow("wrong_type", f"field {field!r} must be one message of the assistant, found {roles}")
        value = messages[0]["content"]
    if not value.strip():
        raise BadRow("empty_answer", f"field {field!r} is an empty answer")
    return value


def number_of(value: Any, name: str) -> float:
    """A finite number, in [0, 1] where it is a share; `BadRow` otherwise."""
    if not isinstance(value, numbers_lib.Real) or not math.isfinite(value):
        raise BadRow("wrong_type", f"field {name!r} must be a finite number, found {value!r}")
    if name in SHARES and not 0 <= value <= 1:
        raise BadRow("out_of_range", f"field {name!r} must lie in [0, 1], found {value!r}")
    return float(value)


def pair_row(record: Mapping[str, Any]) -> Row:
    """Answers chosen, rejected and of all further roles among the fields, with their numbers."""
    record = with_prompt(record)
    prompt = prompt_of(record["prompt"])
    roles = [*PAIR, *(r for r in ROLES if r not in PAIR and record.get(r) is not None)]
    answers = []
    for role in roles:
        value, own = record[role], None
        if isinstance(value, Mapping):
            absent = [f for f in ("prompt", "completion") if f not in value]
            if absent:
                raise BadRow("missing_field", f"field {role!r}: {absent[0]!r} is missing")
            value, own = value["completion"], prompt_of(value["prompt"])
        answers.append(Answer(role, text_of(value, role), numbers_of(record, role), own, trace_of(record, role)))
    return Row(prompt, tuple(answers))


def with_prompt(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record itself, or, without a prompt, one whose prompt is what its two conversations begin with."""
    if record.get("prompt") is not None:
        return record
    if any(isinstance(record[role], str) for role in PAIR):
        raise BadRow("missing_field", f"field 'prompt' is missing: {unknown('field', 'prompt', record)}")
    chosen, rejected = (messages_of(record[role], role) for role in PAIR)
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    if not same:
        raise BadRow("missing_field", "field 'prompt' is missing, and chosen and rejected do not begin alike")
    return {**record, "prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def numbers_of(record: Mapping[str, Any], role: str) -> dict[str, float]:
    """What a record says of the answer of a role: a number of the whole pair, or that of the role."""
    out = {}
    for name in NUMBERS:
        value = record.get(name)
        value = value.get(role) if isinstance(value, Mapping) else value
        value = record.get(f"{name}_{role}") if value is None else value
        if value is not None:
            out[name] = number_of(value, name)
    return out


def trace_of(record: Mapping[str, Any], role: str) -> Trace:
    """The tool calls after the answer of a role, from the field ``<role>_trace``; () without it."""
    value = record.get(f"{role}_trace")
    try:
        return () if value is None else check_trace(value)
    except ValueError as error:
        raise BadRow("wrong_type", f"field '{role}_trace': {error}") from None


def label_row(record: Mapping[str, Any]) -> Row:
    """One answer with its label."""
    prompt = prompt_of(required(record, "prompt"))
    answer = Answer("own", text_of(record["completion"], "completion"), {"label": number_of(record["label"], "label")})
    return Row(prompt, (answer,))


def scored_row(record: Mapping[str, Any]) -> Row:
    """K answers, each with its score as the number reward."""
    prompt, texts, scores = prompt_of(required(record, "prompt")), record["completions"], record["scores"]
    if not isinstance(texts, list | tuple) or not isinstance(scores, list | tuple) or len(texts) != len(scores):
        raise BadRow("wrong_type", "fields 'completions' and 'scores' must be lists of one length")
    answers = [
        Answer("own", text_of(text, f"completions[{i}]"), {"reward": number_of(score, f"scores[{i}]")})
        for i, (text, score) in enumerate(zip(texts, scores, strict=True))
    ]
    return Row(prompt, tuple(answers))


def required(record: Mapping[str, Any], field: str) -> Any:
    """The field of a record; `BadRow` without it."""
    if record.get(field) is None:
        raise BadRow("missing_field", f"field {field!r} is missing: {unknown('field', field, record)}")
    return record[field]


def check_answers(row: Row, kind: str) -> None:
    """`BadRow` for answers that nothing can be learned from: those of a pair are equal, or all scored ones are."""
    compared = [a.text for a in row.answers if kind == "scored" or a.role in PAIR]
    if kind != "label" and len(set(compared)) < 2:
        raise BadRow("equal_answers", f"the answers are equal ({compared[0][:40]!r}): nothing is preferred")


# ---- sets

# Where the factories live: config.data.name.
SETS = {
    "jsonl": "jaxpo.tasks.preferences:jsonl",
    "datasets": "jaxpo.tasks.preferences:datasets",
    "task": "jaxpo.tasks.verified_preferences:verified_pairs",
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
) -> PreferenceSet:
    """A preference set from a file with one JSON object a line.

    Args:
      path: rows to train on. test_path: rows held out; or
      test_size: how many prompts are held out of ``path``, drawn by ``seed``. Neither = nothing is held out.
      bad: "error", or "drop": rows that cannot be used are left out, counted and reported.
      fields: our name of a field -> the file's: ``{"prompt": "question"}``.

    Raises:
      ValueError: a bad row (names file, line and field), or no row left. FileNotFoundError: no such file.
    """

    def records(file: str | os.PathLike) -> Iterable[tuple[str, Any]]:
        for number, line in enumerate(Path(file).read_bytes().splitlines(), start=1):
            if line.strip():
                yield f"{file}:{number}", line

    sources = [records(p) for p in (path, test_path) if p is not None]
    return from_records(Path(path).name, sources, parsed, test_size, seed, bad, fields)


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
    return from_records(Path(path).name, sources, lambda record: record, test_size, seed, bad, fields)


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
    if test_size is not None:
        if len(sources) > 1:
            raise ValueError("give held-out rows or test_size, not both")
        check_sizes(test_size=test_size)
    for source in sources:
        rows: list[Row] = []
        for where, record in source:
            known = kind  # bound now
            for row in sieve(lambda x, known=known: row_of(parse(x), fields or {}, known), where, record):
                kind = kind or ("scored" if "reward" in row.answers[0].numbers else None)
                kind = kind or ("label" if "label" in row.answers[0].numbers else "pair")
                rows.append(row._replace(where=where))
        parts.append(rows)
    train = parts[0]
    test = parts[1] if len(parts) > 1 else hold_out(train, test_size or 0, seed)
    return finish(name, kind or "pair", train, test, sieve.report())._replace(bad=bad)


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
