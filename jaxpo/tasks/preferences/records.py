"""Records of preferences, as files hold them: a prompt, its answers, and numbers about the answers.

There are four kinds of rows:

  pair      {"prompt", "chosen", "rejected"}         answers chosen, rejected, and any other role that is a field
  label     {"prompt", "completion", "label"}        one answer "own" with the number label (true, false, or in [0, 1])
  scored    {"prompt", "completions", "scores"}      K answers "own" with the number reward
  edited    {"prompt", "truth", "revised",           the ground truth, an expert's revision of the model's own answer,
             "original", "corrupted_prompt"}         that answer, and a prompt without what they rest on (OPA-DPO)

A prompt is a text or a list of messages ``{"role", "content"}``. Messages need the chat template of the tokenizer. An
answer is a text or one assistant message; tool calls follow it as ``"chosen_trace": [["tool", "2+2"], ...]``. Without
"prompt", chosen and rejected are whole conversations with a common beginning. An answer of any other role may have its
own prompt: ``{"prompt", "completion"}``.

A pair may have the numbers in ``jaxpo.fields.NUMBERS``: one for the pair (``"pref_prob": 0.8``, a soft preference for
chosen), or one for each answer (``"win": {"chosen": 0.7, "rejected": 0.4}`` or ``"win_chosen": 0.7, ...``). A list of
numbers (``VECTORS``: ``"rm_scores": [0.2, -1.0]``, from M reward models) belongs to the preferred answer.

Token weights (``WEIGHTS``) are given by role, as spans of the answer's text with a weight, in the order of the text:
``"severity": {"revised": [["in Rome", 2.5]], "original": [["in Oslo", 2.5]]}``. Other tokens have weight 1.
"""

import math
import numbers as numbers_lib
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpo.fields import EDITS, NUMBERS, PAIR, ROLES, SHARES, VECTORS, WEIGHTS
from jaxpo.registry import unknown
from jaxpo.tasks.preferences.traces import Trace, check_trace

Prompt = str | tuple[Mapping[str, str], ...]
KINDS = {
    "pair": PAIR,
    "label": ("completion", "label"),
    "scored": ("completions", "scores"),
    "edited": (*EDITS, "corrupted_prompt"),
}
Number = float | tuple[float, ...]
Spans = tuple[tuple[str, float], ...]  # parts of a text in the order in which they occur, each with its weight


class Answer(NamedTuple):
    """An answer of a row.

    Attributes:
      role: one of ``jaxpo.fields.ROLES``.
      text: the answer itself.
      numbers: what is known of it, by name.
      prompt: its own prompt; None = the row's.
      trace: the tool calls after it (`jaxpo.tasks.preferences.traces`).
      weights: weighted spans of its text, by name.
    """

    role: str
    text: str
    numbers: Mapping[str, Number] = {}
    prompt: Prompt | None = None
    trace: Trace = ()
    weights: Mapping[str, Spans] = {}


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
    own = kind_of(record)
    if kind is not None and own != kind:
        raise BadRow("another_kind", f"this row has the fields of a {own!r} row, but earlier rows are {kind!r} rows")
    absent = [f for f in KINDS[own] if record.get(f) is None]
    if absent:
        raise BadRow("missing_field", f"field {absent[0]!r} is missing: {unknown('field', absent[0], record)}")
    row = {"pair": pair_row, "label": label_row, "scored": scored_row, "edited": edited_row}[own](record)
    check_answers(row, own)
    return row


def kind_of(record: Mapping[str, Any]) -> str:
    """The first kind that shares a field with the record; `BadRow` if none does."""
    for kind, fields in KINDS.items():
        if any(record.get(f) is not None for f in fields):
            return kind
    wanted = " or ".join("prompt, " + ", ".join(fields) for fields in KINDS.values())
    raise BadRow("missing_field", f"a row has the fields {wanted}; this one has {', '.join(record) or 'none'}")


def prompt_of(value: Any) -> Prompt:
    """The prompt, a text or messages; `BadRow` for anything else."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty_prompt", "field 'prompt' is empty")
        return value
    messages = messages_of(value, "prompt")
    if messages[-1]["role"] == "assistant":
        raise BadRow("wrong_type", "field 'prompt': its last message is the assistant's, so there is nothing to answer")
    return messages


def messages_of(value: Any, field: str) -> tuple[Mapping[str, str], ...]:
    """The messages of a non-empty list; `BadRow` for anything else."""

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
    """The value as a finite number, in [0, 1] if the field is a share; `BadRow` otherwise."""
    if not isinstance(value, numbers_lib.Real) or not math.isfinite(value):
        raise BadRow("wrong_type", f"field {name!r} must be a finite number, found {value!r}")
    if name in SHARES and not 0 <= value <= 1:
        raise BadRow("out_of_range", f"field {name!r} must lie in [0, 1], found {value!r}")
    return float(value)


def pair_row(record: Mapping[str, Any]) -> Row:
    """The answers chosen and rejected, and those of any other role in the record, with their numbers."""
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
            # Such a prompt may be empty: ORPO's NLL over prompt and answer takes both as one text.
            value, own = value["completion"], value["prompt"] and prompt_of(value["prompt"])
        answers.append(Answer(role, text_of(value, role), numbers_of(record, role), own, trace_of(record, role)))
    return Row(prompt, tuple(answers))


def with_prompt(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record; if it has no prompt, the common beginning of its two conversations becomes the prompt."""
    if record.get("prompt") is not None:
        return record
    if any(isinstance(record[role], str) for role in PAIR):
        raise BadRow("missing_field", f"field 'prompt' is missing: {unknown('field', 'prompt', record)}")
    chosen, rejected = (messages_of(record[role], role) for role in PAIR)
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    if not same:
        raise BadRow(
            "missing_field", "field 'prompt' is missing, and chosen and rejected begin with different messages"
        )
    return {**record, "prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def numbers_of(record: Mapping[str, Any], role: str) -> dict[str, float]:
    """The numbers of the answer with this role: given for the whole pair, or for the role alone."""
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


def edited_row(record: Mapping[str, Any]) -> Row:
    """The ground truth, the expert's revision and the model's own answer; and again the first two, after the corrupted
    prompt.
    """
    prompt, corrupted = (prompt_of(required(record, field)) for field in ("prompt", "corrupted_prompt"))
    for name in WEIGHTS:
        if isinstance(record.get(name), Mapping) and (odd := sorted(record[name].keys() - set(EDITS))):
            raise BadRow("wrong_type", f"field {name!r}: {unknown('answer', odd[0], EDITS)}")
    answers = []
    for role in EDITS:
        text = text_of(record[role], role)
        weights = {name: spans for name in WEIGHTS if (spans := spans_of(record, name, role, text)) is not None}
        answers.append(Answer(role, text, numbers_of(record, role), weights=weights))
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


def required(record: Mapping[str, Any], field: str) -> Any:
    """A field of a record; `BadRow` if it is missing."""
    if record.get(field) is None:
        raise BadRow("missing_field", f"field {field!r} is missing: {unknown('field', field, record)}")
    return record[field]


def check_answers(row: Row, kind: str) -> None:
    """Raise `BadRow` if nothing can be learned: both answers of a pair are equal, or all scored answers are."""
    roles = (EDITS[0], EDITS[2]) if kind == "edited" else PAIR
    compared = [a.text for a in row.answers if kind == "scored" or a.role in roles]
    if kind != "label" and len(set(compared)) < 2:
        raise BadRow("equal_answers", f"the answers are equal ({compared[0][:40]!r}): nothing is preferred")
