"""Turn rows of preferences into batches: convert between kinds, encode as tokens, and lay out units of rows."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxpo.batch import Rollouts, from_sequences
from jaxpo.fields import PAIR, role_id
from jaxpo.primitives import preference_data
from jaxpo.registry import unknown
from jaxpo.tasks.preferences.records import KINDS, Answer, BadRow, Number, Prompt, Row, place
from jaxpo.tasks.preferences.sets import Sieve
from jaxpo.tasks.preferences.traces import KINDS as SEGMENTS
from jaxpo.tasks.preferences.traces import Trace
from jaxpo.text.conversations import conversation_of, text_said
from jaxpo.text.tokenizers import Tokenizer

NONE: Mapping[str, Any] = MappingProxyType({})
# Prompts that hold a draft (for roles like chosen_given_rejected) or both answers (for a rationale).
TEMPLATES = {
    "draft_prompt": "{prompt}\n\nDraft: {draft}\n\nBetter:",
    "rationale_prompt": "{prompt}\n\nA: {chosen}\n\nB: {rejected}\n\nWhy is A better?",
}


class Tokens(NamedTuple):
    """An answer and its prompt as tokens.

    Attributes:
      role: the answer's role.
      prompt: token ids of the prompt.
      answer: token ids of the answer, with the one that ends it.
      numbers: what is known of the answer, by name.
      segment: the segment of each answer token: 0, or a value of `jaxpo.tasks.preferences.traces.KINDS`.
      weights: weights of the answer tokens, by name.
    """

    role: str
    prompt: list[int]
    answer: list[int]
    numbers: Mapping[str, Number]
    segment: Sequence[int] = ()
    weights: Mapping[str, Sequence[float]] = {}


Encoded = list[tuple[Tokens, ...]]  # one entry for each row


# ---- kinds


def as_kind(rows: Sequence[Row], have: str, want: str) -> list[Row]:
    """Convert rows to another kind (`jaxpo.tasks.preferences.records.KINDS`).

    A pair becomes two labelled answers (1, 0) or two scored answers (1, 0). Scored answers become the pair of the best
    and the worst (the first one in a tie), with their scores as ``rm`` and the difference as ``margin``. In a row of an
    expert's edits the ground truth becomes chosen and the model's own answer rejected.

    Raises:
      ValueError: labelled answers cannot become another kind (nothing says which two to compare), and no other kind can
        become an expert's edits.
    """
    if want not in KINDS:
        raise ValueError(unknown("kind of preferences", want, KINDS))
    if have == want:
        return list(rows)
    if have == "label":
        raise ValueError(
            f"the data are labelled answers, and this objective needs {want!r} rows: choose an objective of "
            "labels, such as kto, or data with " + " and ".join(KINDS[want])
        )
    if want == "edited":
        raise ValueError(f"the data are {have!r} rows, and this objective needs the fields {', '.join(KINDS[want])}")
    if have == "edited":
        return as_kind([truth_against_own(row) for row in rows], "pair", want)
    if want == "label":
        pairs = rows if have == "pair" else as_kind(rows, have, "pair")
        return [
            row._replace(answers=(row.answer(role)._replace(role="own", numbers={"label": label}),))
            for row in pairs
            for role, label in zip(PAIR, (1.0, 0.0), strict=True)
        ]
    return [best_against_worst(row) if want == "pair" else both_scored(row) for row in rows]


def best_against_worst(row: Row) -> Row:
    """The pair of the answers with the highest and the lowest score."""
    scores = [a.numbers["reward"] for a in row.answers]
    best, worst, _ = preference_data.best_and_worst(np.asarray([scores], np.float64))
    gap = max(scores) - min(scores)
    if not gap:
        raise ValueError(f"{row.where}: all scores are {scores[0]:g}: no answer is preferred")
    return row._replace(
        answers=tuple(
            row.answers[int(at[0])]._replace(role=role, numbers={"rm": scores[int(at[0])], "margin": gap})
            for role, at in zip(PAIR, (best, worst), strict=True)
        )
    )


def truth_against_own(row: Row) -> Row:
    """The pair of the ground truth and the model's own answer."""
    both = ((role, row.answer(of)) for role, of in zip(PAIR, ("truth", "original"), strict=True))
    return row._replace(answers=tuple(a._replace(role=role, weights={}) for role, a in both))


def both_scored(row: Row) -> Row:
    """Chosen and rejected as two scored answers."""
    scores = zip(PAIR, (1.0, 0.0), strict=True)
    own = (row.answer(role)._replace(role="own", numbers={"reward": r}, trace=()) for role, r in scores)
    return row._replace(answers=tuple(own))


# ---- tokens


def encode(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    roles: Sequence[str] = (),
    numbers: Sequence[str] = (),
    sizes: Mapping[str, int] = NONE,
    weights: Sequence[str] = (),
    prompt_width: int | None = None,
    width: int | None = None,
    bad: str = "error",
    templates: Mapping[str, str] = NONE,
) -> tuple[Encoded, dict[str, float]]:
    """Encode rows as tokens; also return counts of the dropped rows (`Sieve.report`).

    The tokenizer writes a prompt and its answer once (`jaxpo.text.tokenizers.Tokenizer.turn`): messages by the chat
    template, which also says where the answer begins and how it ends.

    Args:
      roles: the roles of a unit; () = the roles of each row. If a row lacks a role ``A_given_B``, its answer A is used,
        after a prompt that holds its answer B. A rationale without its own prompt follows a prompt that holds both
        answers.
      numbers: names of the numbers that every answer must have.
      sizes: the length of each number that is a list, by name.
      weights: names of token weights to encode. Tokens in a weighted span get its weight, other tokens 1.
      prompt_width: the most tokens of a prompt; None = any number.
      width: the most tokens of an answer; None = any number.
      bad: what to do with a bad row: "error" or "drop" (`jaxpo.tasks.preferences.sets`).
      templates: templates for prompts that hold answers, instead of ``TEMPLATES``.

    Raises:
      ValueError: with ``bad="error"``, a row that is too long, lacks a role or a number, has no encoding, is refused by
        the chat template, or has answers that are equal as tokens.
    """
    sieve, out = Sieve(bad), []
    pieces = tokenizer.token_bytes() if weights else ()
    of_answer = partial(encode_answer, tokenizer=tokenizer, weights=dict.fromkeys(weights, pieces))
    known = partial(check_known, numbers=numbers, sizes=sizes, prompt_width=prompt_width, width=width)
    templates = {**TEMPLATES, **templates}
    for row in rows:
        out += sieve(lambda row: encode_row(row, roles, templates, of_answer, known), row.where, row)
    return out, sieve.report()


def encode_row(
    row: Row,
    roles: Sequence[str],
    templates: Mapping[str, str],
    encode_answer: Callable[[Row, Answer], Tokens],
    check: Callable[[Tokens], None],
) -> tuple[Tokens, ...]:
    """Encode the answers of one row in the order of ``roles``; `BadRow` for the errors that `encode` lists."""
    out = tuple(encode_answer(row, a) for a in ([with_role(row, r, templates) for r in roles] or row.answers))
    for tokens in out:
        check(tokens)
    pair = [t.answer for t in out if t.role in PAIR]
    if len(pair) == 2 and pair[0] == pair[1]:
        raise BadRow("equal_answers", "the answers are equal as tokens: nothing is preferred")
    return out


def encode_answer(row: Row, answer: Answer, tokenizer: Tokenizer, weights: Mapping[str, Sequence[bytes]]) -> Tokens:
    """Encode an answer and its prompt; ``weights``: name of a weight -> the bytes of each token id."""
    try:
        turn = tokenizer.turn(row.prompt if answer.prompt is None else answer.prompt, answer.said)
        ids, segment = with_trace(tokenizer, turn.answer, answer.trace)
    except ValueError as error:
        raise BadRow("not_encodable", str(error)) from error
    of_tokens = {
        name: token_weights(answer, name, turn.answer[:-1], pieces, len(ids)) for name, pieces in weights.items()
    }
    return Tokens(answer.role, turn.prompt, ids, answer.numbers, segment, of_tokens)


def token_weights(answer: Answer, name: str, ids: Sequence[int], pieces: Sequence[bytes], size: int) -> np.ndarray:
    """The weights [size] of an answer's tokens.

    A token that shares a byte with a span gets the span's weight (the later span's, if it touches two); others get 1.

    Args:
      ids: tokens of the answer, without its end: the first of the ``size`` tokens.
      pieces: the bytes of each token id.
    """
    out, text = np.ones(size), answer.text
    spans = place(text, answer.weights.get(name, ()), name)
    if not spans:
        return out
    lengths = np.array([len(pieces[i]) for i in ids])
    # The template may write something before the text, and leave out the space around it.
    ahead = b"".join(pieces[i] for i in ids).rfind(text.strip().encode())
    if ahead < 0:
        raise BadRow("not_encodable", f"the tokens of {text!r:.60} do not decode to it, so its spans cannot be found")
    ahead -= len(text.encode()) - len(text.lstrip().encode())
    ends = np.cumsum(lengths) - ahead
    for start, end, weight in spans:
        first, last = len(text[:start].encode()), len(text[:end].encode())
        out[: len(ids)][(ends > first) & (ends - lengths < last)] = weight
    return out


def check_known(
    tokens: Tokens, numbers: Sequence[str], sizes: Mapping[str, int], prompt_width: int | None, width: int | None
) -> None:
    """Raise `BadRow` if an answer lacks a number, has a list of the wrong length, or it or its prompt is too long."""
    absent = [name for name in numbers if name not in tokens.numbers]
    if absent:
        have = ", ".join(tokens.numbers) or "no numbers"
        raise BadRow("missing_field", f"the {tokens.role} answer has no {absent[0]!r}, only {have}")
    for name in sizes.keys() & set(numbers):
        found = len(tokens.numbers[name])
        if found != sizes[name]:
            raise BadRow(
                "wrong_size", f"the {tokens.role} answer has {found} {name}, but config.heads.gate is {sizes[name]}"
            )
    for what, ids, limit, field in (
        ("prompt", tokens.prompt, prompt_width, "rollout.prompt_width"),
        ("answer", tokens.answer, width, "sampling.max_new_tokens"),
    ):
        if limit is not None and len(ids) > limit:
            raise BadRow(f"{what}_too_long", f"the {what} has {len(ids)} tokens; the limit {field} is {limit}")


def with_trace(tokenizer: Tokenizer, answer: Sequence[int], trace: Trace = ()) -> tuple[list[int], list[int]]:
    """Tokens of an answer and of the tool calls after it, and the segment of each token.

    The answer ends as it is; the whole trace ends with the first end-of-sequence id.
    """
    ids, segment = list(answer), [0] * len(answer)
    for i, (kind, part) in enumerate(trace):
        more = tokenizer.encode(part)
        more = [*more, tokenizer.eos_ids[0]] if i == len(trace) - 1 else more
        ids, segment = [*ids, *more], [*segment, *[SEGMENTS[kind]] * len(more)]
    return ids, segment


def with_role(row: Row, role: str, templates: Mapping[str, str] = TEMPLATES) -> Answer:
    """The row's answer of a role; for ``A_given_B``, answer A after a prompt that holds answer B."""
    own = [a for a in row.answers if a.role == role]
    if role == "rationale" and own and own[0].prompt is None:
        texts = {name: told(row.answer(name)) for name in PAIR}
        return own[0]._replace(prompt=filled(row.prompt, templates["rationale_prompt"], texts))
    if own or "_given_" not in role:
        return own[0] if own else row.answer(role)
    answer, draft = (row.answer(name) for name in role.split("_given_"))
    return answer._replace(role=role, prompt=filled(row.prompt, templates["draft_prompt"], {"draft": told(draft)}))


def told(answer: Answer) -> str:
    """The text of an answer that a prompt holds; `BadRow` if there is more to the answer."""
    try:
        return text_said(answer.said)
    except ValueError as error:
        raise BadRow("not_encodable", f"the {answer.role} answer stands in a prompt: {error}") from None


def filled(prompt: Prompt, template: str, texts: Mapping[str, str]) -> Prompt:
    """Fill each {place} of the template with its text, and {prompt} with the prompt (or its last message)."""
    if isinstance(prompt, str):
        return re.sub(r"\{(\w+)\}", lambda found: {"prompt": prompt, **texts}.get(found[1], found[0]), template)
    talk = conversation_of(prompt)
    last = {**talk.messages[-1], "content": filled(talk.messages[-1]["content"], template, texts)}
    messages = (*talk.messages[:-1], last)
    return replace(talk, messages=messages) if talk.arguments else messages


# ---- batches


def unit_size(encoded: Encoded) -> int:
    """The number of rows of a unit: the most answers that any entry has."""
    return max(map(len, encoded))


def units(
    encoded: Sequence[tuple[Tokens, ...]],
    layout: Sequence[str] = (),
    numbers: Sequence[str] = (),
    *,
    size: int | None = None,
    mismatched: bool = False,
    segments: bool = False,
    weights: Sequence[str] = (),
    prompt_width: int | None = None,
    width: int | None = None,
    pad_id: int = 0,
    seed: int = 0,
) -> Rollouts:
    """Lay out entries as `Rollouts` (NumPy): N units of R consecutive rows.

    ``group`` is the unit, ``prompt`` its index in ``encoded``.

    Args:
      encoded: entries from `encode`.
      layout: the roles of a unit, which every entry must have; () = the answers of each entry, filled up to ``size``
        with rows of count 0.
      numbers: names of numbers to put into ``per_row`` as [B], lists as [B, M] ("reward" into its own field). Rows
        without them get 0.
      size: rows of a unit; None = the most answers of any entry.
      mismatched: after each row, add one of role "kl": the previous entry's answer after this prompt (KTO). Needs one
        answer in each entry, and at least two entries.
      segments: put the tokens' segments into ``per_token`` as "segment" [B, T].
      weights: names of token weights to put into ``per_token``, too.
      prompt_width: P; None = the longest prompt.
      width: T; None = the longest answer.
      pad_id: token id of the padding.
      seed: seeds the rows' seeds.

    Raises:
      ValueError: an entry lacks a role of the layout or has more answers than ``size``, or ``mismatched`` has no other
        answer to take.
    """
    entries = [tuple(in_layout(entry, layout)) if layout else tuple(entry) for entry in encoded]
    if mismatched:
        if len(entries) < 2 or any(len(e) != 1 for e in entries):
            raise ValueError(f"mismatched answers need at least two entries of one answer each, not {len(entries)}")
        entries = [
            (e[0], e[0]._replace(role="kl", answer=entries[i - 1][0].answer, numbers={})) for i, e in enumerate(entries)
        ]
    size = unit_size(entries) if size is None else size
    if unit_size(entries) > size:
        raise ValueError(f"an entry of {unit_size(entries)} answers does not fit into a unit of {size} rows")
    whole = [[*e, *[e[-1]._replace(answer=[], numbers={}, segment=())] * (size - len(e))] for e in entries]
    rows, n = [t for unit in whole for t in unit], len(entries)
    shared = size if all(t.prompt == unit[0].prompt for unit in whole for t in unit) else 1
    values = {name: np.array([t.numbers.get(name, 0.0) for t in rows], np.float32) for name in numbers}
    tables = {name: token_table([t.weights.get(name, ()) for t in rows], width, np.float32) for name in weights}
    if segments:
        tables["segment"] = token_table([t.segment for t in rows], width, np.int32)
    batch = from_sequences(
        [t.prompt for t in rows],
        [t.answer for t in rows],
        prompt_width=prompt_width,
        width=width,
        pad_id=pad_id,
        role=np.array([role_id(t.role) for t in rows], np.int32),
        group=np.repeat(np.arange(n, dtype=np.int32), size),
        prompt=np.repeat(np.arange(n, dtype=np.int32), size),
        count=np.array([float(bool(t.answer)) for t in rows], np.float32),
        seed=np.random.default_rng(seed).integers(0, 2**32, len(rows), np.uint32),
        reward=values.pop("reward", None),
        per_row=values,
        per_token=tables,
        layout=tuple(layout),
        shared_prompt=shared,
    )
    return batch


def token_table(rows: Sequence[Sequence[float]], width: int | None, dtype: Any) -> np.ndarray:
    """A table [B, T] with one number for each token, 0 after the last one."""
    table = np.zeros((len(rows), max(map(len, rows)) if width is None else width), dtype)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def in_layout(entry: Sequence[Tokens], layout: Sequence[str]) -> list[Tokens]:
    """The answers of an entry in the order of the layout; a repeated role takes the next answer of that role."""
    left, out = list(entry), []
    for role in layout:
        found = [t for t in left if t.role == role]
        if not found:
            raise ValueError(
                f"layout {tuple(layout)} needs an answer {role!r}; the entry has {[t.role for t in entry]}"
            )
        left.remove(found[0])
        out.append(found[0])
    return out


def widths(encoded: Sequence[tuple[Tokens, ...]]) -> tuple[int, int]:
    """The lengths in tokens of the longest prompt and the longest answer."""
    tokens = [t for entry in encoded for t in entry]
    return max(len(t.prompt) for t in tokens), max(len(t.answer) for t in tokens)
