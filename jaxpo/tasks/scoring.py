"""The rewards of a task: functions with weights, each asked by the names of its parameters, added up to one number.

A reward gets what it asks for by name:

  completion       the text of the completion
  completion_ids   its token ids, with the one that ended it
  answer           the right answer, as text
  question         the text that was asked; of a conversation, its last message
  prompt           the question as the data have it: a text or a list of messages
  messages         the same, always as a list of messages
  any other name   the column of the data with this name

``**kwargs`` gets all of them. A parameter that config sets, as an option of the reward, keeps that value; one with a
default keeps it for rows without such a column. A function whose two parameters have names that mean nothing here is
called with (completion, answer).

A function with a parameter ``completions`` is called once for a whole batch: every argument is then a list, a value a
row (``prompts`` is another name of ``prompt``), and so is what it returns.

A reward returns a finite number, None (it abstains: the others decide), or a dictionary of names and such values, whose
sum counts; each name has its own curve.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from jaxpo.registry import unknown
from jaxpo.tasks.base import Example, Score, columns_of
from jaxpo.tasks.rewards import Reward, make_reward, may_hang, option_names, preparation
from jaxpo.tasks.user_functions import as_number, name_of, signature_of
from jaxpo.tasks.workers import Failure, Outcome, call_by_names, failure, runner
from jaxpo.text.conversations import plain_text

Message = Mapping[str, Any]
Part = float | Failure | None  # a number, an error, or None = it abstained
Parts = dict[str, Part]
PAIR = ("completion", "answer")


def messages_of(example: Example) -> list[Message]:
    """The prompt as messages."""
    asked = example.question
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else [dict(m) for m in asked]


def ids_of(text: str) -> list[int]:
    """The token ids of a completion; ``ValueError`` for an answer that is a text alone."""
    ids = getattr(text, "ids", None)
    if ids is None:
        raise ValueError("a reward that asks for completion_ids judges completions of the policy, not texts of data")
    return ids


GIVEN: dict[str, Callable[[Example, str], Any]] = {
    "completion": lambda example, text: str.__str__(text),
    "completion_ids": lambda example, text: ids_of(text),
    "answer": lambda example, text: example.answer,
    "question": lambda example, text: messages_of(example)[-1].get("content"),
    "prompt": lambda example, text: example.question,
    "messages": lambda example, text: messages_of(example),
}
BATCH = {"completions": "completion", "prompts": "prompt"}


class Asked(NamedTuple):
    """How a reward function is called.

    names: the arguments that it must get by name.
    optional: those that it gets if a row has them.
    rest: whether it gets everything else too.
    batch: whether it is called once for all rows.
    by_place: whether it is called with (completion, answer) instead.
    """

    names: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    rest: bool = False
    batch: bool = False
    by_place: bool = False


class Choice(NamedTuple):
    """One of the rewards that a config names.

    name: of its curve.
    reward: a registered name, a "module:function" or a function.
    function: the same with its options filled in.
    weights: by part: that of the reward itself under its name, or those of its dictionary under name/part.
    field: names it in messages.
    """

    name: str
    reward: str | Reward
    function: Callable
    weights: Mapping[str, float]
    field: str

    @property
    def split(self) -> bool:
        """Whether each part of the dictionary that it returns has a weight of its own."""
        return self.name not in self.weights

    @property
    def options(self) -> Mapping[str, Any]:
        """The options that were given."""
        return getattr(self.function, "keywords", {})


def choices(
    reward: str | Reward,
    rewards: Mapping[str, Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    own: Iterable[str] = (),
) -> list[Choice]:
    """The rewards that a task's arguments name; the first one says whether a completion is correct.

    Args:
      reward: the deciding reward.
      rewards: name -> ``weight`` (1; or part -> weight), ``reward`` (None = that of this name), and options of it. The
        name of the deciding reward gives its weight, and more of its options.
      options: of the deciding reward.
      own: the task's other arguments, which a message about an unknown option names too.

    Raises:
      ValueError: an unknown name or option (with the nearest), or a weight that is no number.
    """
    blocks = {name: _block(name, block) for name, block in (rewards or {}).items()}
    name = name_of_reward(reward)
    block, options = blocks.pop(name, {}), options or {}
    if twice := [k for k in options if k in block and block[k] != options[k]]:
        raise ValueError(f"config.task.{twice[0]} and config.task.rewards.{name}.{twice[0]} differ: set one of them")
    out = [_choice(name, {**block, **options, "reward": reward}, "config.task.reward", own)]
    out += [_choice(k, block, f"config.task.rewards.{k}", ("reward", "weight")) for k, block in blocks.items()]
    weights_of(out)
    return out


def name_of_reward(reward: str | Reward) -> str:
    """The name that a reward has in curves: the registered one, or that of the function."""
    return str(reward).rpartition(":")[2] if isinstance(reward, str) else name_of(reward)


def _block(name: str, block: Any) -> dict[str, Any]:
    if not hasattr(block, "items"):
        raise ValueError(f"config.task.rewards.{name} must hold weight and options of the reward, not {block!r}")
    return {k: v for k, v in block.items() if v is not None}


def _choice(name: str, block: Mapping[str, Any], field: str, own: Iterable[str] = ()) -> Choice:
    options = {k: v for k, v in block.items() if k not in ("reward", "weight")}
    reward, weight = block.get("reward", name), block.get("weight", 1.0)
    known = option_names(reward, field)
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"option of reward {reward!r} ({field})", option, [*own, *known]))
    parts = {f"{name}/{k}": w for k, w in weight.items()} if hasattr(weight, "items") else {name: weight}
    for part, w in parts.items():
        try:
            parts[part] = as_number(w)
        except ValueError:
            raise ValueError(f"{field}: the weight of {part} must be a finite number, not {w!r}") from None
    return Choice(name, reward, make_reward(reward, field=field, **options), parts, field)


# ---- what a function asks for


def asked_by(function: Callable, columns: Iterable[str], field: str) -> Asked:
    """What a reward function asks for.

    Args:
      function: the reward, its options filled in by `functools.partial`.
      columns: names of the columns of the data.
      field: names the reward in messages.

    Raises:
      ValueError: it asks for something that is not there, with the nearest name, or for nothing.
    """
    signature = signature_of(function)
    if signature is None:
        return Asked(by_place=True)
    said = f"{field}: {name_of(function)}{signature}"
    parameters = {n: p for n, p in signature.parameters.items() if n not in getattr(function, "keywords", {})}
    kinds = {n: p.kind for n, p in parameters.items()}
    varied = [n for n, p in parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [n for n, p in parameters.items() if p.default is p.empty and n not in varied]
    batch, rest = "completions" in parameters, any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {*GIVEN, *columns, *(BATCH if batch else ())}
    strange = [n for n in required if n not in known]
    hidden = [n for n in required if kinds[n] is kinds[n].POSITIONAL_ONLY]
    misspelt = [n for n in strange if difflib.get_close_matches(n, known, n=1, cutoff=0.75)]
    pair = len(required) == 2 and all(kinds[n] is not kinds[n].KEYWORD_ONLY for n in required)
    if (pair and (hidden or strange) and not misspelt) or (not required and varied and not rest):
        return Asked(by_place=True)
    if hidden or strange:
        raise ValueError(
            f"{said} asks for {(strange or hidden)[0]!r}: it must take (completion, answer), or ask for what a reward "
            f"can have by name; {unknown('name', (strange or hidden)[0], known)}"
        )
    if not rest and not known & {*parameters}:
        raise ValueError(f"{said} asks for nothing that a reward can have: {', '.join(sorted(known))}")
    return Asked(tuple(required), tuple(n for n in parameters if n in known and n not in required), rest, batch)


def check_columns(asked: Asked, rows: Callable[[], Iterable[Example]], field: str) -> None:
    """Raise ``ValueError`` for a row without a column that a reward asks for."""
    for name in asked.names:
        if name in GIVEN or name in BATCH:
            continue
        lacking = [e.question for e in rows() if name not in e.entry]
        if lacking:
            raise ValueError(
                f"{field} asks for the column {name!r}, which {len(lacking)} of {sum(1 for _ in rows())} rows lack, "
                f"the first with the question {plain_text(lacking[0])[:60]!r}"
            )


def arguments(asked: Asked, example: Example, text: str) -> dict[str, Any]:
    """The arguments of one call, by name; ``ValueError`` for token ids where there are none."""
    if asked.by_place:
        return {name: GIVEN[name](example, text) for name in PAIR}
    columns = {k: v for k, v in example.entry.items() if k not in GIVEN}
    names = [*asked.names, *(n for n in asked.optional if n in GIVEN or n in BATCH or n in columns)]
    if asked.rest:
        several = {"completion": "completions", "prompt": "prompts"} if asked.batch else {}
        unread = () if getattr(text, "ids", None) is not None else ("completion_ids",)
        names += [several.get(n, n) for n in (*GIVEN, *columns) if n not in (*names, *unread)]
    out = {}
    for name in names:
        source = BATCH.get(name, name) if asked.batch else name
        out[name] = GIVEN[source](example, text) if source in GIVEN else columns[source]
    return out


# ---- asking


Judge = Callable[[Sequence[Example], Sequence[str]], list[Parts]]


def make_judge(
    choice: Choice, sets: Sequence[Sequence[Example]], timeout: float | None = None, workers: int | None = None
) -> Judge:
    """Make ``(examples, completions) -> what the reward says of each, by part``.

    Args:
      choice: the reward.
      sets: the rows to train and to test on, whose columns it may ask for.
      timeout, workers: see `jaxpo.tasks.workers.runner`.

    Raises:
      ValueError: the function asks for what the data do not have.
    """
    rows = partial(chain.from_iterable, sets)
    asked = asked_by(choice.function, set().union(*map(columns_of, sets)), choice.field)
    check_columns(asked, rows, choice.field)
    prepare, isolate = preparation(choice.reward), may_hang(choice.reward, choice.function)
    called = choice.function if asked.by_place else partial(call_by_names, choice.function)
    run = runner(called, isolate=isolate, timeout=timeout, workers=workers, prepare=prepare)

    def judge(rows: Sequence[Example], texts: Sequence[str]) -> list[Parts]:
        calls: list[dict[str, Any] | Failure] = []
        for example, text in zip(rows, texts, strict=True):
            try:
                calls.append(arguments(asked, example, text))
            except ValueError as error:
                calls.append(failure(f"ValueError: {error}"))
        good = [call for call in calls if not isinstance(call, Failure)]
        said = iter(ask(asked, run, good))
        return [parts_of(choice, Outcome(None, c) if isinstance(c, Failure) else next(said)) for c in calls]

    return judge


def ask(asked: Asked, run: Callable[[Sequence[tuple]], list[Outcome]], rows: list[dict[str, Any]]) -> list[Outcome]:
    """What the function returned for each row."""
    if not asked.batch or not rows:
        return run([tuple(row.values()) if asked.by_place else (row,) for row in rows])
    names = dict.fromkeys(name for row in rows for name in row)
    [(values, error)] = run([({name: [row.get(name) for row in rows] for name in names},)])
    listed = hasattr(values, "__len__") and not isinstance(values, str | Mapping) and len(values) == len(rows)
    if error is None and not listed:
        error = failure(f"it returned {values!r:.80}, and not a list with a value for each of {len(rows)} rows")
    return [Outcome(None, error)] * len(rows) if error else [Outcome(value, None) for value in values]


def parts_of(choice: Choice, outcome: Outcome) -> Parts:
    """What a call came to, by part; every part that has a weight is there."""
    value, error = outcome
    try:
        if error is not None or value is None:
            return dict.fromkeys(choice.weights, error)
        if isinstance(value, Mapping):
            return _of_dictionary(choice, value)
        if choice.split:
            raise ValueError(f"it returned {value!r:.80}, and not a dictionary of {', '.join(choice.weights)}")
        return {choice.name: as_number(value)}
    except ValueError as wrong:
        return dict.fromkeys(choice.weights, failure(str(wrong)))


def _of_dictionary(choice: Choice, said: Mapping[Any, Any]) -> Parts:
    out: Parts = {}
    for key, value in said.items():
        try:
            out[f"{choice.name}/{key}"] = None if value is None else as_number(value)
        except ValueError as wrong:
            raise ValueError(f"{key!r}: {wrong}") from None
    if not choice.split:
        numbers = [value for value in out.values() if value is not None]
        return {choice.name: math.fsum(numbers) if numbers else None, **out}
    for name in out:
        if name not in choice.weights:
            raise ValueError(f"its part has no weight: {unknown('part', name, choice.weights)}")
    return {**dict.fromkeys(choice.weights), **out}


def make_score(chosen: Sequence[Choice], judges: Sequence[Judge]) -> Callable[..., list[Score]]:
    """Make the ``score`` of a task: the weighted sum of what its rewards say, without those that abstain or fail."""
    weights = weights_of(chosen)

    def one(said: Parts) -> Score:
        errors = [(name, part) for name, part in said.items() if isinstance(part, Failure)]
        error = None
        if errors:
            name, line = errors[0]
            error = failure(f"{name}: {line}", line.traceback) if len(weights) > 1 else line
        reward = math.fsum(w * said[n] for n, w in weights.items() if isinstance(said[n], float))
        return Score(reward, correct(chosen[0], said), error, said)

    def score(examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        told = [judge(examples, texts) for judge in judges]
        return [one({name: part for parts in row for name, part in parts.items()}) for row in zip(*told, strict=True)]

    return score


def weights_of(chosen: Sequence[Choice]) -> dict[str, float]:
    """The weight of each part of all rewards.

    Raises:
      ValueError: two rewards have the same name."""
    out: dict[str, float] = {}
    for choice in chosen:
        if taken := out.keys() & choice.weights.keys():
            raise ValueError(f"{choice.field}: another reward is called {min(taken)!r} too: give it another name")
        out |= choice.weights
    return out


def correct(first: Choice, said: Parts) -> bool:
    """Whether the deciding reward is 1; where it returns a dictionary, its part ``correct`` if there is one."""
    part = said.get(f"{first.name}/correct", said.get(first.name))
    return isinstance(part, float) and part == 1
