"""Pairs of a right and a wrong answer, from a task with answers and a verifier; some can be mislabelled on purpose."""

import random
from collections.abc import Iterator, Sequence

from jaxpo.arguments import Share, Whole, check
from jaxpo.fields import PAIR
from jaxpo.tasks.base import Example, Task
from jaxpo.tasks.preferences.records import Answer, Row
from jaxpo.tasks.preferences.sets import PreferenceSet, Sieve, finish, templates
from jaxpo.text.conversations import plain_answer, plain_text

TRIES = 64  # wrong answers to try for an example before giving up


def verified_pairs(
    task: Task,
    size: int | None = None,
    test_size: int | None = None,
    flipped: float = 0.0,
    seed: int = 0,
    bad: str = "error",
    draft_prompt: str | None = None,
) -> PreferenceSet:
    """Pair a right answer with a wrong one for every example of a task, as its verifier judges them.

    A wrong answer is the right one with an error in it (a character left out, doubled, replaced or swapped with its
    neighbor), or another example's answer; the verifier must refuse it. Exactly ``round(flipped * n)`` of the n
    training pairs, drawn by the seed, get their labels exchanged. Test examples make the held-out pairs, whose labels
    are never exchanged.

    Args:
      task: a task with answers and a verifier.
      size: the most training pairs; None = one for every example.
      test_size: the most held-out pairs; None = one for every example.
      flipped: share of training pairs whose labels are exchanged, in [0, 1].
      seed: seeds the wrong answers and the choice of flipped pairs.
      bad: what to do with pairs that are too long as tokens: "error", or "drop" (leave them out and count them).
      draft_prompt: as for `jaxpo.tasks.preferences.sets.jsonl`.

    Raises:
      ValueError: the task has no answers to demonstrate, ``flipped`` is outside [0, 1], the verifier refuses a right
        answer, or no wrong answer to an example is found.
    """
    if task.demonstrate is None:
        raise ValueError(f"task {task.name} has no answers to make pairs from")
    check("flipped", flipped, Share)
    check("size", size, Whole | None)
    check("test_size", test_size, Whole | None)
    train = pairs(task, task.train[:size], seed, "train")
    test = pairs(task, task.test[:test_size], seed, "test")
    wrong = set(random.Random(f"{seed}:flipped").sample(range(len(train)), round(flipped * len(train))))
    train = [exchanged(row) if i in wrong else row for i, row in enumerate(train)]
    report = {"data/flipped": len(wrong) / len(train)}
    data = finish(task.name, "pair", train, test, report)
    return data._replace(bad=Sieve(bad).bad, templates=templates(draft_prompt=draft_prompt))


def pairs(task: Task, examples: Sequence[Example], seed: int, part: str) -> list[Row]:
    """Make a pair for each example. Each call of the verifier covers all examples that still lack a wrong answer."""
    right = [plain_answer(task.demonstrate(e)) for e in examples]
    refused = [(e, score) for e, score in zip(examples, task.score(examples, right), strict=True) if not score.correct]
    if refused:
        example, score = refused[0]
        why, question = f": {score.error}" if score.error else "", plain_text(example.question)
        raise ValueError(f"task {task.name}: its verifier refuses its own answer to {question!r:.60}{why}")
    proposals = [wrong_answers(right, i, random.Random(f"{seed}:{part}:{i}")) for i in range(len(examples))]
    wrong: dict[int, str] = {}
    for _ in range(TRIES):
        left = [i for i in range(len(examples)) if i not in wrong]
        if not left:
            break
        texts = [next(proposals[i]) for i in left]
        scores = task.score([examples[i] for i in left], texts)
        wrong |= {i: t for i, t, s in zip(left, texts, scores, strict=True) if not s.correct and s.error is None}
    missing = [e for i, e in enumerate(examples) if i not in wrong]
    if missing:
        question = plain_text(missing[0].question)
        raise ValueError(f"task {task.name}: {TRIES} answers to {question!r:.60} were all right, so none is preferred")
    return [
        Row(e.question, tuple(Answer(role, text) for role, text in zip(PAIR, (right[i], wrong[i]), strict=True)), part)
        for i, e in enumerate(examples)
    ]


def wrong_answers(right: Sequence[str], i: int, rng: random.Random) -> Iterator[str]:
    """Endless non-empty answers that differ from ``right[i]``."""
    text, others = right[i], sorted(set("".join(right)))
    while True:
        at = rng.randrange(len(text)) if text else 0
        match rng.choice(("other", "drop", "double", "replace", "exchange")):
            case "other":
                new = right[rng.randrange(len(right))]
            case "drop":
                new = text[:at] + text[at + 1 :]
            case "double":
                new = text[: at + 1] + text[at:]
            case "replace":
                new = text[:at] + rng.choice(others) + text[at + 1 :]
            case "exchange":
                new = text[:at] + text[at + 1 : at + 2] + text[at : at + 1] + text[at + 2 :]
        if new != text and new.strip():
            yield new


def exchanged(row: Row) -> Row:
    """The pair with its labels exchanged."""
    chosen, rejected = row.answers
    return row._replace(answers=(rejected._replace(role=PAIR[0]), chosen._replace(role=PAIR[1])))
