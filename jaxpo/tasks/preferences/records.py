"""Records of preferences, as files hold them: a prompt, its answers, and numbers about the answers.

There are four kinds of rows:

  pair      {"prompt", "chosen", "rejected"}         answers chosen, rejected, and any other role that is a field
  label     {"prompt", "completion", "label"}        one answer "own" with the number label (true, false, or in [0, 1])
  scored    {"prompt", "completions", "scores"}      K answers "own" with the number reward
  edited    {"prompt", "truth", "revised",           the ground truth, an expert's revision of the model's own answer,
             "original", "corrupted_prompt"}         that answer, and a prompt without what they rest on (OPA-DPO)

A prompt is a text or a list of messages (`jaxpo.text.conversations`). Messages need the chat template of the tokenizer;
so do the fields ``tools``, ``documents`` and ``chat_template_kwargs``, its arguments. ``system`` is a system message
before the prompt. An answer is a text or one message of the assistant; calls of tools that a reward model reads follow
it as ``"chosen_trace": [["tool", "2+2"], ...]``. Answers may also be whole conversations: then the beginning that they
share is the prompt, and a prompt beside them must be the same. An answer of any other role may have its own prompt:
``{"prompt", "completion"}``.

A pair may have the numbers in ``jaxpo.fields.NUMBERS``: one for the pair (``"pref_prob": 0.8``, a soft preference for
chosen), or one for each answer (``"win": {"chosen": 0.7, "rejected": 0.4}`` or ``"win_chosen": 0.7, ...``). A list of
numbers (``VECTORS``: ``"rm_scores": [0.2, -1.0]``, from M reward models) belongs to the preferred answer.

Token weights (``WEIGHTS``) are given by role, as spans of the answer's text with a weight, in the order of the text:
``"severity": {"revised": [["in Rome", 2.5]], "original": [["in Oslo", 2.5]]}``. Other tokens have weight 1.
"""

import math
import numbers as numbers_lib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxpo.fields import EDITS, NUMBERS, PAIR, ROLES, SHARES, VECTORS, WEIGHTS
from jaxpo.registry import unknown
from jaxpo.tasks.preferences.traces import Trace, check_trace
from jaxpo.text import conversations
from jaxpo.text.conversations import Conversation, Message, Said, check_text, key_of

Prompt = str | tuple[Message, ...] | Conversation
NOTHING: Mapping[str, Any] = MappingProxyType({})
ARGUMENTS = ("tools", "documents")  # columns that are arguments of the chat template
ASKED = ("prompt", "system", *ARGUMENTS, "chat_template_kwargs")
KINDS = {
    "pair": PAIR,
    "label": ("completion", "label"),
    "scored": ("completions", "scores"),
    "edited": (*EDITS, "corrupted_prompt"),
}
Number = float | tuple[float, ...]
OTHER_ROLES = frozenset(ROLES) - {*PAIR}
NO_NUMBERS: Mapping[str, Number] = {}  # of most answers: one object for all of them
Spans = tuple[tuple[str, float], ...]  # parts of a text in the order in which they occur, each with its weight


class Answer(NamedTuple):
    """An answer of a row.

    Attributes:
      role: one of ``jaxpo.fields.ROLES``.
      text: the answer itself; of a message, its content.
      numbers: what is known of it, by name.
      prompt: its own prompt; None = the row's.
      trace: the tool calls after it (`jaxpo.tasks.preferences.traces`).
      weights: weighted spans of its text, by name.
      message: the assistant's message, if it has more than content (``tool_calls``, ``reasoning_content``).
    """

    role: str
    text: str
    numbers: Mapping[str, Number] = NO_NUMBERS
    prompt: Prompt | None = None
    trace: Trace = ()
    weights: Mapping[str, Spans] = {}
    message: Message | None = None

    @property
    def said(self) -> Said:
        """The answer as a chat template takes it."""
        return self.text if self.message is None else self.message


class Row(NamedTuple):
    """A prompt with its answers. ``where``: the place in the file, for messages."""

    prompt: Prompt
    answers: tuple[Answer, ...]
    where: str = ""

    def answer(self, role: str) -> Answer:
        """The first answer of a role; `BadRow` if there is none."""
        for answer in self.answers:
            if answer.role == role:
                return answer
        raise BadRow("missing_field", f"there is no answer {role!r}: {unknown('role', role, roles_of(self))}")


class BadRow(ValueError):
    """A row that cannot be used. ``reason``: the name under which dropped rows are counted."""

    def __init__(self, reason: str, message: str):
        self.reason = reason
        super().__init__(message)


def roles_of(row: Row) -> list[str]:
    """The roles of a row's answers."""
    return [a.role for a in row.answers]


# ---- one record


def row_of(record: Any, fields: Mapping[str, str], kind: str | None = None) -> Row:
    """Turn a record of a file into a row.

    Args:
      fields: our name of a field -> the file's name, where they differ.
      kind: the kind that the earlier rows have; None = any.

    Raises:
      BadRow: the row cannot be used.
    """
    if not isinstance(record, Mapping):
        raise BadRow("wrong_type", f"a JSON object is expected, found {type(record).__name__}")
    record = {**record, **{ours: record[theirs] for ours, theirs in fields.items() if theirs in record}}
    try:
        own = kind_of(record)
        if kind is not None and own != kind:
            raise BadRow("another_kind", f"this row has the fields of a {own!r} row, earlier rows are {kind!r} rows")
        for field in KINDS[own]:
            required(record, field)
        row = {"pair": pair_row, "label": label_row, "scored": scored_row, "edited": edited_row}[own](record)
    except BadRow as bad:
        theirs = [f"{ours!r} is {theirs!r} in the file" for ours, theirs in fields.items() if repr(ours) in str(bad)]
        raise BadRow(bad.reason, f"{bad} ({', '.join(theirs)})" if theirs else str(bad)) from None
    check_answers(row, own)
    return row


def kind_of(record: Mapping[str, Any]) -> str:
    """The first kind that shares a field with the record; `BadRow` if none does. Null fields count if no others do."""
    for there in (lambda f: record.get(f) is not None, lambda f: f in record):
        for kind, fields in KINDS.items():
            if any(there(f) for f in fields):
                return kind
    wanted = " or ".join("prompt, " + ", ".join(fields) for fields in KINDS.values())
    raise BadRow("missing_field", f"a row has the fields {wanted}; this one has {', '.join(record) or 'none'}")


@cache
def columns(kind: str) -> frozenset[str]:
    """Every field that a row of this kind may have."""
    roles = {"pair": ROLES, "edited": EDITS}.get(kind, ())
    named = {"pair": (*NUMBERS, *VECTORS), "edited": (*NUMBERS, *VECTORS, *WEIGHTS)}.get(kind, ())
    traces = (f"{role}_trace" for role in roles if kind == "pair")
    return frozenset({*ASKED, *KINDS[kind], *roles, *named, *(f"{n}_{r}" for n in named for r in roles), *traces})


def unread(record: Mapping[str, Any], fields: Mapping[str, str], kind: str) -> list[str]:
    """The columns of a record that say something and that no row of this kind has."""
    read = columns(kind) | {*fields.values()}
    return [name for name, value in record.items() if name not in read and value is not None]


# ---- prompts and answers


def prompt_of(value: Any, beside: Mapping[str, Any] = NOTHING, field: str = "prompt") -> Prompt:
    """The prompt, a text or messages; `BadRow` for anything else.

    Args:
      value: what the row gives.
      beside: the row, of which ``system`` and the arguments of the chat template are read.
      field: for messages about the value.
    """
    system, arguments = beside.get("system"), arguments_of(beside)
    if isinstance(value, str):
        checked(check_text, value, field)
        if not value.strip():
            raise BadRow("empty_prompt", f"field {field!r} is empty")
        if not system and not arguments:
            return value
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else messages_of(value, field)
    if messages[-1]["role"] == "assistant":
        raise BadRow("wrong_type", f"field {field!r}: its last message is the assistant's: there is nothing to answer")
    if system and messages[0]["role"] == "system":
        raise BadRow("wrong_type", f"field 'system' is given, but field {field!r} has a system message, too")
    if system:
        messages = (*messages_of([{"role": "system", "content": system}], "system"), *messages)
    return Conversation(tuple(messages), arguments) if arguments else tuple(messages)


def arguments_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the chat template that a row has, as lists and dictionaries or as JSON; `BadRow` for others."""
    out = {}
    for name in (*ARGUMENTS, "chat_template_kwargs"):
        value = record.get(name) or None
        if value is None:
            continue
        value = checked(lambda x: conversations.from_text(x, "its value is a text"), value, name)
        if not value:
            continue
        if name in ARGUMENTS and not (isinstance(value, list | tuple) and all(isinstance(x, Mapping) for x in value)):
            raise BadRow("wrong_type", f"field {name!r} must be a list of objects, found {value!r:.60}")
        if name not in ARGUMENTS and not isinstance(value, Mapping):
            raise BadRow("wrong_type", f"field {name!r} must be an object, found {value!r:.60}")
        for text in conversations.strings(value):
            checked(check_text, text, name)
        out |= {name: list(value)} if name in ARGUMENTS else value
    return out


def checked(check: Callable[[Any], Any], value: Any, field: str) -> Any:
    """What a check returns; `BadRow` that names the field where it raises ``ValueError``."""
    try:
        return check(value)
    except ValueError as error:
        raise BadRow("wrong_type", f"field {field!r}: {error}") from None


def messages_of(value: Any, field: str) -> tuple[Message, ...]:
    """The messages of a non-empty list; `BadRow` for anything else."""
    if value is None:
        raise BadRow("missing_field", f"field {field!r} is null")
    return tuple(checked(conversations.messages_of, value, field))


def answer_of(role: str, value: Any, field: str, **known: Any) -> Answer:
    """The answer that a field holds: a text, or one message of the assistant; `BadRow` for anything else.

    known: the answer's other attributes.
    """
    if isinstance(value, str):
        text, message = checked(check_text, value, field), None
    else:
        messages = messages_of(value, field)
        if [m["role"] for m in messages] != ["assistant"]:
            roles = ", ".join(m["role"] for m in messages)
            raise BadRow("wrong_type", f"field {field!r} must be one message of the assistant, found {roles}")
        (message,) = messages
        text, message = message["content"], message if message.keys() > {"role", "content"} else None
    if not text.strip() and message is None:
        raise BadRow("empty_answer", f"field {field!r} is an empty answer")
    return Answer(role, text, message=message, **known)


def apart(record: Mapping[str, Any], answers: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The prompt of a record, and its answers without the prompt where they are whole conversations.

    Args:
      answers: name of a field -> what it holds.

    Raises:
      BadRow: there is no prompt, or the conversations begin in another way than the prompt, or each in its own way.
    """
    talks = {f: messages_of(v, f) for f, v in answers.items() if isinstance(v, list | tuple)}
    whole = {f: talk for f, talk in talks.items() if len(talk) > 1}
    prompt = record.get("prompt")
    if not whole:
        return required(record, "prompt"), dict(answers)
    if prompt is None:
        if len(whole) < len(answers):
            lone = next(f for f in answers if f not in whole)
            raise BadRow("missing_field", f"field 'prompt' is missing, and field {lone!r} is an answer alone")
        prompt = common_beginning(list(whole.values()))
        if not prompt:
            names = " and ".join(whole)
            raise BadRow("missing_field", f"field 'prompt' is missing, and {names} begin with different messages")
        return prompt, {f: talk[len(prompt) :] for f, talk in whole.items()}
    beginnings = {f: talk[:-1] for f, talk in whole.items()}
    asked = next(iter(beginnings.values()))
    for field, beginning in beginnings.items():
        if not asks_the_same(prompt, beginning) or key_of(beginning) != key_of(asked):
            raise BadRow(
                "wrong_type",
                f"field 'prompt' is {prompt!r:.40}, and field {field!r} is a conversation that begins otherwise (its "
                f"question is {beginning[-1]['content']!r:.40}): leave out the prompt, or give the answer alone",
            )
    return asked, {**answers, **{f: talk[-1:] for f, talk in whole.items()}}


def common_beginning(talks: Sequence[tuple[Message, ...]]) -> tuple[Message, ...]:
    """The messages with which all conversations begin, without the last one of any."""
    most = min(map(len, talks)) - 1
    same = next((i for i in range(most) if any(t[i] != talks[0][i] for t in talks)), most)
    return talks[0][:same]


def asks_the_same(prompt: Any, beginning: tuple[Message, ...]) -> bool:
    """Whether a conversation begins with the prompt: its messages, or the user's text as the last of them."""
    if isinstance(prompt, str):
        last = beginning[-1]
        return last["role"] == "user" and last["content"].strip() == prompt.strip()
    return messages_of(prompt, "prompt") == beginning


def number_of(value: Any, name: str) -> float:
    """The value as a finite number, in [0, 1] if the field is a share; `BadRow` otherwise."""
    if not isinstance(value, numbers_lib.Real) or not math.isfinite(value):
        raise BadRow("wrong_type", f"field {name!r} must be a finite number, found {value!r}")
    if name in SHARES and not 0 <= value <= 1:
        raise BadRow("out_of_range", f"field {name!r} must lie in [0, 1], found {value!r}")
    return float(value)


def pair_row(record: Mapping[str, Any]) -> Row:
    """The answers chosen and rejected, and those of any other role in the record, with their numbers."""
    roles = [*PAIR]
    if not record.keys().isdisjoint(OTHER_ROLES):
        roles += [r for r in ROLES if r in OTHER_ROLES and record.get(r) is not None]
    value, given = apart(record, {role: record[role] for role in roles})
    prompt, answers = prompt_of(value, record), []
    for role in roles:
        value, known = given[role], dict(numbers=numbers_of(record, role), trace=trace_of(record, role))
        if isinstance(value, Mapping) and "role" not in value:
            own, value = (required(value, f, f"field {role!r}: ") for f in ("prompt", "completion"))
            # Such a prompt may be empty: ORPO's NLL over prompt and answer takes both as one text.
            known["prompt"] = own and prompt_of(own, record, f"prompt of {role}")
        answers.append(answer_of(role, value, role, **known))
    return Row(prompt, tuple(answers))


@cache
def numbered(role: str) -> frozenset[str]:
    """The fields that may hold a number of the answer with this role."""
    return frozenset(field for name in (*NUMBERS, *VECTORS) for field in (name, f"{name}_{role}"))


def numbers_of(record: Mapping[str, Any], role: str) -> dict[str, float]:
    """The numbers of the answer with this role: given for the whole pair, or for the role alone."""
    if record.keys().isdisjoint(numbered(role)):
        return NO_NUMBERS
    out = {}
    for name in NUMBERS:
        value = record.get(name)
        value = value.get(role) if isinstance(value, Mapping) else value
        value = record.get(f"{name}_{role}") if value is None else value
        if value is not None:
            out[name] = number_of(value, name)
    for name in VECTORS:
        value = record.get(name)
        value = value.get(role) if isinstance(value, Mapping) else value if role == PAIR[0] else None
        value = record.get(f"{name}_{role}") if value is None else value
        if value is not None:
            out[name] = vector_of(value, name)
    return out


def vector_of(value: Any, name: str) -> tuple[float, ...]:
    """The value as a tuple of finite numbers; `BadRow` otherwise."""
    if not isinstance(value, list | tuple) or not value:
        raise BadRow("wrong_type", f"field {name!r} must be a list of numbers, found {value!r:.60}")
    return tuple(number_of(x, f"{name}[{i}]") for i, x in enumerate(value))


def trace_of(record: Mapping[str, Any], role: str) -> Trace:
    """The tool calls after the answer of a role, from the field ``<role>_trace``; () if it is absent."""
    value = record.get(f"{role}_trace")
    try:
        return () if value is None else tuple((kind, check_text(text)) for kind, text in check_trace(value))
    except ValueError as error:
        raise BadRow("wrong_type", f"field '{role}_trace': {error}") from None


def label_row(record: Mapping[str, Any]) -> Row:
    """One answer with its label."""
    prompt, given = apart(record, {"completion": record["completion"]})
    numbers = {"label": number_of(record["label"], "label")}
    return Row(prompt_of(prompt, record), (answer_of("own", given["completion"], "completion", numbers=numbers),))


def scored_row(record: Mapping[str, Any]) -> Row:
    """K answers, each with its score as the number reward."""
    texts, scores = record["completions"], record["scores"]
    if not isinstance(texts, list | tuple) or not isinstance(scores, list | tuple) or len(texts) != len(scores):
        raise BadRow("wrong_type", "fields 'completions' and 'scores' must be lists of one length")
    prompt, given = apart(record, {f"completions[{i}]": text for i, text in enumerate(texts)})
    answers = [
        answer_of("own", text, field, numbers={"reward": number_of(score, f"scores[{i}]")})
        for i, ((field, text), score) in enumerate(zip(given.items(), scores, strict=True))
    ]
    return Row(prompt_of(prompt, record), tuple(answers))


def edited_row(record: Mapping[str, Any]) -> Row:
    """The ground truth, the expert's revision and the model's own answer; and again the first two, after the corrupted
    prompt.
    """
    value, given = apart(record, {role: record[role] for role in EDITS})
    prompt = prompt_of(value, record)
    corrupted = prompt_of(required(record, "corrupted_prompt"), record, "corrupted_prompt")
    for name in WEIGHTS:
        if isinstance(record.get(name), Mapping) and (odd := sorted(record[name].keys() - set(EDITS))):
            raise BadRow("wrong_type", f"field {name!r}: {unknown('answer', odd[0], EDITS)}")
    answers = []
    for role in EDITS:
        answer = answer_of(role, given[role], role, numbers=numbers_of(record, role))
        spans = {name: spans_of(record, name, role, answer.text) for name in WEIGHTS}
        answers.append(answer._replace(weights={name: s for name, s in spans.items() if s is not None}))
    degraded = [a._replace(role=f"{a.role}_corrupted", prompt=corrupted) for a in answers if a.role != "original"]
    return Row(prompt, (*answers, *degraded))


def spans_of(record: Mapping[str, Any], name: str, role: str, text: str) -> Spans | None:
    """The weighted parts of a role's answer; None if the record gives none, `BadRow` if one does not occur in it."""
    value = record.get(name)
    value = value.get(role) if isinstance(value, Mapping) else None
    value = record.get(f"{name}_{role}") if value is None else value
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(s, list | tuple) and len(s) == 2 for s in value):
        raise BadRow("wrong_type", f"field {name!r} of {role!r} must be a list of [text, weight], found {value!r:.60}")
    spans = tuple((part, number_of(weight, name)) for part, weight in value)
    if any(weight < 0 for _, weight in spans):
        raise BadRow("out_of_range", f"field {name!r} of {role!r}: a weight is negative")
    place(text, spans, f"{name!r} of {role!r}")
    return spans


def place(text: str, spans: Spans, what: str) -> list[tuple[int, int, float]]:
    """Find (start, end, weight) of each span in the text, searching after the one before.

    Raises `BadRow` if a span does not occur there.
    """
    out, at = [], 0
    for part, weight in spans:
        start = text.find(part, at) if isinstance(part, str) and part else -1
        if start < 0:
            raise BadRow("no_such_span", f"field {what}: {part!r:.40} does not occur in {text[at:]!r:.60}")
        at = start + len(part)
        out.append((start, at, weight))
    return out


def required(record: Mapping[str, Any], field: str, where: str = "") -> Any:
    """A field of a record; `BadRow` that begins with ``where`` if it is missing or null."""
    if field not in record:
        raise BadRow("missing_field", f"{where}field {field!r} is missing: {unknown('field', field, record)}")
    if record[field] is None:
        raise BadRow("missing_field", f"{where}field {field!r} is null")
    return record[field]


def check_answers(row: Row, kind: str) -> None:
    """Raise `BadRow` if nothing can be learned: both answers of a pair are equal, or all scored answers are."""
    roles = (EDITS[0], EDITS[2]) if kind == "edited" else PAIR
    compared = [a for a in row.answers if kind == "scored" or a.role in roles]
    if kind != "label" and len({a.text if a.message is None else key_of([a.message]) for a in compared}) < 2:
        raise BadRow("equal_answers", f"the answers are equal ({compared[0].text[:40]!r}): nothing is preferred")
