"""A task: examples to train and test on, a verifier, and, where the task has answers, demonstrations.

Everything here is plain Python on the host, so that processes that must not load jax can import it.
"""

import inspect
import random
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxpo.arguments import Share, check, domain_of
from jaxpo.registry import OWN, check_arguments, names, register_later, unknown
from jaxpo.registry import entry as registered
from jaxpo.tasks.user_functions import as_number, locate
from jaxpo.text.conversations import Question, Said, key_of


@dataclass(frozen=True)
class Example:
    """One prompt.

    Attributes:
      index: its place in the set: ``task.train[e.index] == e`` (likewise for test).
      question: what to answer: a text, or a conversation (`jaxpo.text.conversations`).
      answer: the right answer, if it is known; an assistant's message where it has more than content.
      entry: data for the verifier.
      where: its place in a file, for messages.
    """

    index: int
    question: Question
    answer: Said | None
    entry: Mapping[str, Any]
    where: str = ""


class Completion(str):
    """The text of a completion.

    ids: its token ids, with the one that ended it; None where an answer comes as text alone.
    """

    ids: list[int] | None = None


@dataclass(frozen=True)
class Score:
    """The verdict on one completion.

    Attributes:
      reward: the number to train on.
      correct: whether the completion counts as right.
      error: why there is no verdict: the verifier raised, timed out or returned nonsense. Errors are counted apart.
      parts: what each reward of the task said: a number, None if it abstained, or the error that it ended with.
    """

    reward: float
    correct: bool
    error: str | None = None
    parts: Mapping[str, float | str | None] = field(default_factory=dict, compare=False)

    @property
    def abstained(self) -> bool:
        """Whether no reward had anything to say."""
        return bool(self.parts) and all(part is None for part in self.parts.values())


@dataclass(frozen=True)
class Task:
    """A task, ready to run.

    Attributes:
      name: for logs.
      train: examples to train on.
      test: examples to evaluate on; none of their questions occurs in ``train``.
      score: ``(examples, completions) -> scores``, one decoded completion and one ``Score`` for each example, in order;
        ``None`` when nothing verifies answers.
      demonstrate: gives a correct completion of an example; ``None`` when the task has no answers.
      report: metrics of the data, found while building (``train/size``, ``train/removed``, ``test/unseen_share``, ...).
      rewards: names and weights of the rewards that add up to a score's ``reward``; each is one of its ``parts``.
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    score: Callable[[Sequence[Example], Sequence[str]], list[Score]] | None
    demonstrate: Callable[[Example], Said] | None
    report: Mapping[str, float]
    rewards: Mapping[str, float] = field(default_factory=dict)


# Where the factories live; a factory is imported when it is asked for. To add a task of your own:
# @jaxpo.registry.register("task").
TASKS = {
    # One task by three names: what is read depends on the path.
    "jsonl": "jaxpo.tasks.jsonl:jsonl",
    "datasets": "jaxpo.tasks.jsonl:jsonl",
    "hub": "jaxpo.tasks.jsonl:jsonl",
    "marketplace": "jaxpo.tasks.marketplace:marketplace",
    "reasoning_gym": "jaxpo.tasks.reasoning_gym:reasoning_gym",
    "toy": "jaxpo.tasks.toy:toy",
}
register_later("task", TASKS)


def build(config: Mapping[str, Any]) -> Task:
    """Build the task that ``config`` describes: ``{"name": "reasoning_gym", "dataset": "spell_backward", ...}``.

    Raises:
      ValueError: no name, an unknown name or argument (with the nearest one), or a required argument is missing. Raised
        before any example is made.
    """
    if "name" not in config:
        raise ValueError(f"task: field 'name' is missing; known: {', '.join(_choices())}")
    arguments = {k: v for k, v in config.items() if k != "name"}
    name, parameters = config["name"], task_arguments(config["name"])
    plain = {k: p for k, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    # A factory with **options checks them itself: only it knows which ones exist.
    given = arguments if len(plain) == len(parameters) else plain.keys() & arguments.keys()
    check_arguments(f"task {name!r}", given, plain)
    return _factory(name)(**arguments)


def task_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """The arguments of the task called ``name``; ``ValueError`` with the nearest names if there is none."""
    return inspect.signature(_factory(name)).parameters


def _choices() -> list[str]:
    return sorted({*TASKS, *names("task")})


def _factory(name: str) -> Callable[..., Task]:
    if name not in _choices():
        raise ValueError(unknown("task", name, _choices()) + OWN)
    return locate(TASKS[name]) if name in TASKS else registered(name, "task").factory


def split(
    train: Sequence[Example], test: Sequence[Example]
) -> tuple[Sequence[Example], Sequence[Example], dict[str, float]]:
    """Remove from ``train`` every example whose question occurs in ``test``, renumber both sets, and report.

    Questions are compared as text: in a small task, different seeds or files can still give the same question.

    Returns:
      train, test, and a report: sizes, ``train/removed``, ``test/unseen_share`` (of the sets returned),
      ``test/distinct_share`` (a test set with repeated questions tells less than its size suggests).

    Raises:
      ValueError: a set is empty, or nothing is left of ``train``.
    """
    held_out = {key_of(e.question) for e in test}
    kept = places_without(train, held_out)
    if not len(test) or not len(kept):
        raise ValueError(
            f"nothing to {'train' if len(test) else 'test'} on: {len(train)} training items, {len(test)} test "
            f"items, {len(train) - len(kept)} training items removed because their question is in the "
            "test set"
        )
    report = {
        "train/size": float(len(kept)),
        "test/size": float(len(test)),
        "train/removed": float(len(train) - len(kept)),
        "test/unseen_share": 1.0,
        "test/distinct_share": len(held_out) / len(test),
    }
    return taken(train, kept), taken(test, range(len(test))), report


def taken(examples: Sequence[Example], chosen: Sequence[int]) -> Sequence[Example]:
    """The examples at these places, numbered anew."""
    if isinstance(examples, Examples):
        return examples.taken(chosen)
    return [replace(examples[at], index=i) for i, at in enumerate(chosen)]


class Examples(Sequence):
    """Examples that are made when they are asked for, so that a million of them take little memory.

    Args:
      make: (place in the source, index) -> example.
      keys: a hash of the question of each example, [n].
      places: the place of each example in the source, [n]; None = 0, 1, ...
      columns: the names of the fields that entries have.
    """

    def __init__(
        self,
        make: Callable[[int, int], Example],
        keys: Sequence[int],
        places: Sequence[int] | None = None,
        columns: Collection[str] = (),
    ):
        self._make, self.keys, self.columns = make, keys, columns
        self._places = range(len(keys)) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int | slice) -> Any:
        chosen = range(len(self))[i]
        return [self[j] for j in chosen] if isinstance(i, slice) else self._make(self._places[chosen], chosen)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Sequence) and len(self) == len(other)
        return same and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None

    def taken(self, chosen: Sequence[int]) -> "Examples":
        """The examples at these places, numbered anew."""
        keys, places = (array("q", map(x.__getitem__, chosen)) for x in (self.keys, self._places))
        return Examples(self._make, keys, places, self.columns)


def columns_of(examples: Sequence[Example]) -> set[str]:
    """The names of the fields that some entry has."""
    if isinstance(examples, Examples):
        return {*examples.columns}
    return {column for e in examples for column in e.entry}


def places_without(examples: Sequence[Example], questions: Collection[str]) -> Sequence[int]:
    """The places of the examples whose question is none of ``questions`` (`key_of`)."""
    if not isinstance(examples, Examples):
        return [i for i, e in enumerate(examples) if key_of(e.question) not in questions]
    hashes = set(map(hash, questions))
    same = [i for i, key in enumerate(examples.keys) if key in hashes]  # by their hash: these few are compared as text
    held = {i for i in same if key_of(examples[i].question) in questions}
    return array("q", (i for i in range(len(examples)) if i not in held))


def verdict(value: Any, error: str | None, partial_credit: bool) -> Score:
    """Turn the result of a verifier, a number in [0, 1] or an error, into a score."""
    if error is not None:
        return Score(0.0, False, error)
    domain = domain_of(Share)
    try:
        number = as_number(value)
    except ValueError:
        number = None
    if number not in domain:
        return Score(0.0, False, f"the verifier returned {value!r}, not {domain.says}")
    correct = number == 1
    return Score(number if partial_credit else float(correct), correct)


def imperfect(
    demonstrate: Callable[[Example], Said], drop_last: float = 0.6, seed: int = 0
) -> Callable[[Example], Said]:
    """A demonstrator that makes mistakes, as data from the web do: it omits the last character of some answers.

    Which examples are spoiled depends on ``(example.index, seed)`` alone: a run can be repeated, and a spoiled example
    stays spoiled when it is shown again.

    Args:
      demonstrate: the correct demonstrator.
      drop_last: share of examples whose demonstration loses its last character, in [0, 1].
      seed: selects which examples are spoiled.
    """
    check("drop_last", drop_last, Share)

    def spoiled(example: Example) -> Said:
        answer = demonstrate(example)
        # A string seeds by its hash digest: the same in every process, unlike hash().
        if random.Random(f"{seed}:{example.index}").random() >= drop_last:
            return answer
        return answer[:-1] if isinstance(answer, str) else {**answer, "content": answer["content"][:-1]}

    return spoiled
