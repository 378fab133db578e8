"""Prompts and answers from data: files of JSON lines, JSON, CSV or Parquet, folders, and data sets of the hub."""

import inspect
import os
import random
from array import array
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpo.arguments import Positive, Whole
from jaxpo.registry import register, unknown
from jaxpo.tasks.base import Example, Examples, Task
from jaxpo.tasks.base import split as separated
from jaxpo.tasks.preferences.records import prompt_of
from jaxpo.tasks.rewards import Reward, check_answer, present
from jaxpo.tasks.rows import Rows, Unreadable, read_rows
from jaxpo.tasks.scoring import choices, make_judge, make_score, weights_of
from jaxpo.text.conversations import Question, check_text, key_of


@register("task")
def jsonl(
    path: str | os.PathLike,
    test_path: str | os.PathLike | None = None,
    test_size: Whole | None = None,
    seed: int = 0,
    question_field: str = "question",
    answer_field: str = "answer",
    demonstration_field: str | None = None,
    reward: str | Reward = "exact",
    rewards: Mapping[str, Mapping[str, Any]] | None = None,
    split: str | None = None,
    test_split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    system: str | None = None,
    timeout: Positive | None = None,
    workers: Whole | None = None,
    **reward_options: Any,
) -> Task:
    """A task from rows with questions and answers: ``jsonl("train.jsonl", "test.jsonl", reward="numeric")``.

    All columns of a row are in ``example.entry``.

    Training items whose question occurs in the test set are removed; the report says how many.

    Args:
      path: the training items: a file, a folder or a hub id (`jaxpo.tasks.rows`).
      test_path: the test items, likewise. Give one of this, ``test_split`` and ``test_size``. If none is given, the
        split "test" of ``path`` holds them.
      test_size: how many questions to take out of ``path`` for testing, drawn by ``seed``.
      seed: seed of that draw.
      question_field, answer_field: columns. A question is a text or a list of messages, an answer a string or a number.
        ``answer_field=""``: there are no answers, for a reward that needs none.
      demonstration_field: field with a worked solution to imitate; by default a demonstration is made from the answer.
      reward: says whether a completion is correct: ``exact``, ``numeric``, ``regex``, ``math``,
        ``"module:function"``, or a function from an importable module. Its completions are correct where it gives 1.
        `jaxpo.tasks.scoring` says what a function may ask for and return.
      rewards: more rewards, which are added to it: name -> ``weight`` (1), ``reward`` (that of this name) and its
        options. Under its own name ``reward`` has its weight here.
      split, test_split: splits of ``path`` (None = "train") with training and test items.
      subset: its subset, where it has several.
      revision: branch, tag or commit hash of a hub id.
      system: a system message, put before every question that has none of its own.
      timeout, workers: seconds for one verdict and number of worker processes. ``exact``, ``numeric``, ``length`` and
        ``format`` by tags run in this process unless one of the two is given; all others run in workers, with 5 s by
        default.
      **reward_options: passed to ``reward`` (``extract``, ``tolerance``, ``pattern``, ``ignore_case``, ...).

    Raises:
      ValueError: unknown reward or option (with the nearest), a bad line (names file, line and field), several of
        ``test_path``, ``test_split`` and ``test_size`` or none, or no training item left.
      FileNotFoundError: a file that does not exist.
    """
    own = [name for name in inspect.signature(jsonl).parameters if name != "reward_options"]
    chosen = choices(reward, rewards, reward_options, own)
    decides, options = chosen[0].reward, chosen[0].options
    if len([x for x in (test_path, test_split, test_size) if x is not None]) > 1:
        raise ValueError("give exactly one of test_path, test_split and test_size, to say which items are held out")
    if seed and test_size is None:
        raise ValueError(f"seed={seed!r} has no effect without test_size, whose test items it draws")
    path = path if revision is None else f"{path}@{revision}"
    columns = Columns(question_field, answer_field, demonstration_field, system)
    check = partial(check_answer, decides, **options)
    rest = read_examples(read_rows(path, split, subset), columns, check)
    if test_size is not None:
        test, rest = hold_out(rest, test_size, seed, path)
    elif test_path is not None:
        test = read_examples(read_rows(test_path), columns, check)
    else:
        test = read_examples(rows_for_testing(path, test_split, subset), columns, check)
    train, test, report = separated(rest, test)
    score = make_score(chosen, [make_judge(choice, (train, test), timeout, workers) for choice in chosen])

    def demonstrate(example: Example) -> str:
        if demonstration_field is not None:
            return example.entry[demonstration_field]
        return present(example.answer, options.get("extract", "text"))

    # A pattern, or an answer that only the user's own function understands, is not a text to imitate.
    writable = demonstration_field is not None or answer_field and decides in ("exact", "numeric", "math")
    name, weights = f"jsonl/{Path(path).name}", weights_of(chosen)
    report |= {f"reward/{n}/weight": w for n, w in weights.items()} if len(weights) > 1 else {}
    return Task(name, train, test, score, demonstrate if writable else None, report, weights)


class Columns(NamedTuple):
    """Where the parts of an example stand in a record, and the system message."""

    question: str
    answer: str
    demonstration: str | None
    system: str | None


def rows_for_testing(path: Any, test_split: str | None, subset: str | None) -> Rows:
    """The rows of a source's split for testing; ``ValueError`` if nothing says which items are held out."""
    try:
        return read_rows(path, test_split or "test", subset)
    except ValueError as error:
        if test_split is not None:
            raise
        raise ValueError(
            f"give exactly one of test_path, test_split and test_size, to say which items are held out ({error})"
        ) from None


def read_examples(rows: Rows, columns: Columns, check: Callable[[str], None]) -> Examples:
    """Check every row and return the examples, each made anew when it is asked for.

    Raises:
      ValueError: a bad row; the line names file, line and field.
    """
    keys, found = array("q"), set()
    for name, unit, number, record in rows.places():
        try:
            check_record(record, columns)
            if columns.answer:
                in_field(columns.answer, check, str(record[columns.answer]))
            keys.append(hash(key_of(question_in(record, columns))))
            found.update(record)
        except ValueError as error:
            raise ValueError(f"{name}, {unit} {number}: {error}") from error
    if not keys:
        raise ValueError(f"{rows.name}: no items")
    return Examples(lambda place, index: example_of(rows, place, columns, index), keys, columns=found)


def check_record(record: Mapping[str, Any], columns: Columns) -> None:
    """Raise ``ValueError`` for a record without a text, number or messages where they must be."""
    if isinstance(record, Unreadable):
        raise record
    if not isinstance(record, Mapping):
        raise ValueError(f"a JSON object is expected, found {type(record).__name__}")
    for field in filter(None, columns[:3]):
        if field not in record:
            raise ValueError(f"field {field!r} is missing: {unknown('field', field, record)}")
        value = record[field]
        if field == columns.question and isinstance(value, list | tuple | Mapping):
            continue
        allowed = (str, int, float) if field == columns.answer else (str,)
        if not isinstance(value, allowed) or isinstance(value, bool) or value == "":
            kinds = "a string or a number" if field == columns.answer else "a string"
            also = "; a list of messages will do too" * (field == columns.question and not isinstance(value, str))
            raise ValueError(f"field {field!r} must be {kinds}, not empty, found {value!r:.200}{also}")
        in_field(field, check_text, str(value))


def in_field(field: str, f: Callable[[Any], Any], value: Any) -> Any:
    """``f(value)``; an error names the field."""
    try:
        return f(value)
    except ValueError as error:
        raise ValueError(f"field {field!r}: {error}") from error


def question_in(record: Mapping[str, Any], columns: Columns) -> Question:
    """The question of a record (`jaxpo.tasks.preferences.records.prompt_of`), with the system message that the task
    adds where the record has none."""
    value = record[columns.question]
    first = value[0] if isinstance(value, list | tuple) and value else value
    own = record.get("system") or isinstance(first, Mapping) and first.get("role") == "system"
    beside = record if own or columns.system is None else {**record, "system": columns.system}
    return prompt_of(value, beside, columns.question)


def example_of(rows: Rows, place: int, columns: Columns, index: int) -> Example:
    """The example of a row that has been checked."""
    record = rows.at(place)
    answer = str(record[columns.answer]) if columns.answer else None
    return Example(index, question_in(record, columns), answer, record, rows.place(place))


def hold_out(examples: Examples, size: int, seed: int, path: Any) -> tuple[Examples, Examples]:
    """Draw ``size`` distinct questions (their first occurrences) for testing; return them and all other examples."""
    first = np.sort(np.unique(np.asarray(examples.keys), return_index=True)[1])
    if size >= len(first):
        raise ValueError(f"test_size={size} leaves nothing to train on: {path} has {len(first)} different questions")
    drawn = first[sorted(random.Random(seed).sample(range(len(first)), size))].tolist()
    chosen = set(drawn)
    rest = array("q", (i for i in range(len(examples)) if i not in chosen))
    return examples.taken(drawn), examples.taken(rest)
