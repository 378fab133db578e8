"""Prompts and answers from JSON lines."""

import inspect
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpo.arguments import Positive, Whole
from jaxpo.registry import register, unknown
from jaxpo.tasks.base import Example, Task, split
from jaxpo.tasks.rewards import Reward, check_answer, present
from jaxpo.tasks.scoring import choices, make_judge, make_score, weights_of


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
    timeout: Positive | None = None,
    workers: Whole | None = None,
    **reward_options: Any,
) -> Task:
    """A task from a file with one JSON object a line: ``jsonl("train.jsonl", "test.jsonl", reward="numeric")``.

    Training items whose question occurs in the test set are removed; the report says how many.

    Args:
      path: the training items.
      test_path: the test items. Give either this or ``test_size``.
      test_size: how many questions to take out of ``path`` for testing, drawn by ``seed``.
      seed: seed of that draw.
      question_field, answer_field: field names in the objects. A question is a string, an answer a string or a number.
      demonstration_field: field with a worked solution to imitate; by default a demonstration is made from the answer.
      reward: says whether a completion is correct: ``exact``, ``numeric``, ``regex``, ``math``,
        ``"module:function"``, or a function from an importable module. Its completions are correct where it gives 1.
        `jaxpo.tasks.scoring` says what a function may ask for and return.
      rewards: more rewards, which are added to it: name -> ``weight`` (1), ``reward`` (that of this name) and its
        options. Under its own name ``reward`` has its weight here.
      timeout, workers: seconds for one verdict and number of worker processes. ``exact``, ``numeric``, ``length`` and
        ``format`` by tags run in this process unless one of the two is given; all others run in workers, with 5 s by
        default.
      **reward_options: passed to ``reward`` (``extract``, ``tolerance``, ``pattern``, ``ignore_case``, ...).

    Raises:
      ValueError: unknown reward or option (with the nearest), a bad line (names file, line and field), both or none of
        ``test_path`` and ``test_size``, or no training item left.
      FileNotFoundError: a file that does not exist.
    """
    own = [name for name in inspect.signature(jsonl).parameters if name != "reward_options"]
    chosen = choices(reward, rewards, reward_options, own)
    decides, options = chosen[0].reward, chosen[0].options
    if (test_path is None) == (test_size is None):
        raise ValueError("give exactly one of test_path and test_size, to say which items are held out")
    fields = [f for f in (question_field, answer_field, demonstration_field) if f is not None]
    if test_path is not None:
        if seed:
            raise ValueError(f"seed={seed!r} has no effect with test_path: it draws the test items of test_size")
        test, rest = (_read(p, fields, decides, options) for p in (test_path, path))
    else:
        test, rest = _hold_out(_read(path, fields, decides, options), test_size, seed, path)
    train, test, report = split(rest, test)
    score = make_score(chosen, [make_judge(choice, [*train, *test], timeout, workers) for choice in chosen])

    def demonstrate(example: Example) -> str:
        if demonstration_field is not None:
            return example.entry[demonstration_field]
        return present(example.answer, options.get("extract", "text"))

    # A pattern, or an answer that only the user's own function understands, is not a text to imitate.
    writable = demonstration_field is not None or decides in ("exact", "numeric", "math")
    name, weights = f"jsonl/{Path(path).name}", weights_of(chosen)
    report |= {f"reward/{n}/weight": w for n, w in weights.items()} if len(weights) > 1 else {}
    return Task(name, train, test, score, demonstrate if writable else None, report, weights)


def _read(
    path: str | os.PathLike, fields: list[str], reward: str | Reward, options: Mapping[str, Any]
) -> list[Example]:
    """Read the examples of a file, without blank lines. ``fields``: question, answer and, if wanted, demonstration."""
    examples = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a JSON object is expected, found {type(record).__name__}")
        for position, field in enumerate(fields):
            if field not in record:
                raise ValueError(f"{where}: field {field!r} is missing: {unknown('field', field, record)}")
            value, allowed = record[field], (str, int, float) if position == 1 else (str,)
            if not isinstance(value, allowed) or isinstance(value, bool) or value == "":
                raise ValueError(
                    f"{where}: field {field!r} must be a string{' or a number' * (position == 1)}, not "
                    f"empty, found {value!r}"
                )
        question, answer = record[fields[0]], str(record[fields[1]])
        try:
            check_answer(reward, answer, **options)
        except ValueError as error:
            raise ValueError(f"{where}: field {fields[1]!r}: {error}") from error
        examples.append(Example(len(examples), question, answer, record))
    if not examples:
        raise ValueError(f"{path}: no items")
    return examples


def _hold_out(
    examples: list[Example], size: int, seed: int, path: str | os.PathLike
) -> tuple[list[Example], list[Example]]:
    """Draw ``size`` distinct questions (their first occurrences) for testing; return them and all other examples."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.question, example)
    if size >= len(first):
        raise ValueError(f"test_size={size} leaves nothing to train on: {path} has {len(first)} different questions")
    drawn = {e.index for e in random.Random(seed).sample(list(first.values()), size)}
    return [e for e in examples if e.index in drawn], [e for e in examples if e.index not in drawn]
