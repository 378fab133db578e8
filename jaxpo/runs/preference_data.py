"""The preferences of a run, as tokens in the form that its objective takes; and their prompts as a task."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts
from jaxpo.config.blocks import arguments_of
from jaxpo.config.resolved import Resolved
from jaxpo.fields import EDITS, NUMBERS, PAIR, VECTORS
from jaxpo.learning.needs import Form
from jaxpo.objectives import Objective
from jaxpo.tasks import Example, Task
from jaxpo.tasks.preferences import sets
from jaxpo.tasks.preferences.encode import TEMPLATES, Encoded, as_kind, encode, units, widths
from jaxpo.tasks.preferences.records import BadRow, Row
from jaxpo.tasks.preferences.sets import PreferenceSet
from jaxpo.tasks.preferences.traces import Tracer, tracer_of
from jaxpo.tasks.workers import attempt
from jaxpo.text.conversations import Said, key_of, plain_text
from jaxpo.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class Preferences:
    """Units to train on and held-out units, as tokens.

    form: the form that the objective takes.
    train: units to train on.
    test: held-out units.
    prompt_width: P, tokens of a prompt in a batch.
    width: T, tokens of an answer in a batch.
    pad_id: token id of the padding.
    report: counts of rows, as metrics.
    """

    form: Form
    train: Encoded
    test: Encoded
    prompt_width: int
    width: int
    pad_id: int
    report: dict[str, float]

    def units(self, indices: Sequence[int], seed: Sequence[int], *, held_out: bool = False) -> Rollouts:
        """The units with these indices, without the rows that the policy will sample itself. seed: seeds the rows."""
        source = self.test if held_out else self.train
        batch = units(
            [source[i] for i in indices],
            self.form.given,
            self.form.numbers,
            size=self.form.size if not self.form.layout else None,
            mismatched=self.form.mismatched,
            segments=self.form.segments,
            weights=self.form.weights,
            prompt_width=self.prompt_width,
            width=self.width,
            pad_id=self.pad_id,
            seed=seed,
        )
        return batch.replace(prompt=np.repeat(np.asarray(indices, np.int32), batch.rows // len(indices)))


def read(config: ConfigDict, task: Task | None) -> PreferenceSet | None:
    """Read or make the preference set of ``config.data``; None if it names none."""
    if config.data.name is None:
        return None
    parameters = sets.set_arguments(config.data.name)
    data = sets.build({"name": config.data.name, **arguments_of(config.data, parameters)}, task)
    return traced(data, tracer_of(config.trace)) if config.trace else data


def usable(data: PreferenceSet, tokenizer: Tokenizer) -> PreferenceSet:
    """The set without the rows that have no encoding or that the chat template refuses, which are counted.

    Where bad rows are errors the set stays as it is: whoever encodes it raises.

    Raises:
      ValueError: no row is left to train on.
    """
    if data.bad == "error":
        return data
    parts, report = [], Counter(data.report)
    for rows in (data.train, data.test):
        found = [encode([row], tokenizer, bad="drop") for row in rows]
        parts.append([row for row, (entries, _) in zip(rows, found, strict=True) if entries])
        for _, counts in found:
            report.update(counts)
    if not parts[0]:
        raise ValueError(f"{data.name}: no rows to train on: all {len(data.train)} were dropped")
    return data._replace(train=parts[0], test=parts[1], report=dict(report))


def traced(data: PreferenceSet, tracer: Tracer) -> PreferenceSet:
    """The set with tool calls after each answer, which ``tracer`` makes from the question and the answer.

    A row on which it fails is a bad row: an error, or left out and counted (``data.bad``).

    Raises:
      ValueError: it fails on a row of a set with ``bad="error"``, or on all rows.
    """
    sieve = sets.Sieve(data.bad)

    def of(row: Row) -> Row:
        question = plain_text(row.prompt)
        made = [attempt(tracer, (question, a.text)) for a in row.answers]
        for _, error in made:
            if error is not None:
                raise BadRow("trace", f"config.trace fails on the question {question!r:.60}: {error}")
        return row._replace(answers=tuple(a._replace(trace=t) for a, (t, _) in zip(row.answers, made, strict=True)))

    train, test = ([kept for row in rows for kept in sieve(of, data.name, row)] for rows in (data.train, data.test))
    if data.train and not train:
        raise ValueError(f"config.trace fails on all {len(data.train)} rows of {data.name}")
    dropped = {k: data.report.get(k, 0.0) + v for k, v in sieve.report().items()} if sieve.dropped else {}
    return data._replace(train=train, test=test, report={**data.report, **dropped})


def encoded(resolved: Resolved, data: PreferenceSet, tokenizer: Tokenizer) -> Preferences | None:
    """Encode the set in the form that the objective takes.

    Returns None if a judge tells what the objective needs to know of the policy's own answers; the data then give only
    the prompts.

    Raises:
      ValueError: the objective takes no preferences or another kind, a row is bad, or no row is left.
    """
    config, objective, form = resolved.config, resolved.objective, resolved.form
    if resolved.protocol.facts.judges and (form is None or set(form.numbers) & set(NUMBERS)):
        return None
    if form is None:
        raise ValueError(
            f"config.data.name: objective {config.objective.name!r} takes no preferences"
            + (f" of this kind: its unit is {objective.unit.layout}" if objective.unit.layout else "")
        )
    options = dict(
        roles=form.given,
        numbers=form.numbers,
        sizes=dict.fromkeys(VECTORS, config.heads.gate),
        weights=form.weights,
        prompt_width=config.rollout.prompt_width,
        width=config.sampling.max_new_tokens,
        bad=data.bad,
        templates=templates_of(objective, data),
    )
    parts, dropped = [], dict(data.report)
    for rows in (data.train, data.test):
        rows = as_kind(rows, data.kind, form.kind)
        check_weights(config, form, data.name, rows)
        part, report = encode(rows, tokenizer, **options)
        parts.append(part)
        dropped = {k: dropped.get(k, 0.0) + report.get(k, 0.0) for k in {**dropped, **report}}
    train, test = parts
    if not train:
        raise ValueError(f"{data.name}: no rows to train on: all {len(data.train)} were dropped")
    if form.segments and not any(t.segment and t.segment[-1] for entry in train for t in entry):
        raise ValueError(
            f"objective {config.objective.name!r} learns from traces of tool calls, and no answer of {data.name} has "
            "one: set config.trace, or give chosen_trace and rejected_trace"
        )
    most = max(map(len, [*train, *test]))
    if form.kind == "scored" and most > form.size:
        raise ValueError(
            f"{data.name} has up to {most} scored answers for a prompt: set config.rollout.responses to {most}, not "
            f"{form.size}"
        )
    width = widths([*train, *test])[0]
    shape = (config.rollout.prompt_width or width, config.sampling.max_new_tokens)
    return Preferences(form, train, test, *shape, tokenizer.pad_id, dropped)


def templates_of(objective: Objective, data: PreferenceSet) -> dict[str, str]:
    """The prompt templates that the objective's units need; ``ValueError`` if the data give one that is not needed."""
    layout = objective.unit.layout
    asked = {"draft_prompt": any("_given_" in r for r in layout), "rationale_prompt": "rationale" in layout}
    unused = [name for name in data.templates if not asked[name]]
    if unused:
        raise ValueError(f"config.data.{unused[0]} has no effect: the objective's units are {layout}")
    return {name: text for name, text in {**TEMPLATES, **data.templates}.items() if asked[name]}


def check_weights(config: ConfigDict, form: Form, name: str, rows: Sequence[Row]) -> None:
    """Raise ``ValueError`` if the objective weighs tokens and no row gives the weights."""
    for weight in form.weights if rows else ():
        if not any(weight in a.weights for row in rows for a in row.answers):
            raise ValueError(
                f"objective {config.objective.name!r} weighs tokens by {weight}, and no row of {name} gives it: "
                f'"{weight}": {{"revised": [["part of the answer", 2.5]]}}'
            )


def task_of(data: PreferenceSet) -> Task:
    """Make a task without a verifier from the prompts of a preference set.

    The preferred answers are its demonstrations; of an expert's edits, both the truth and the revision.
    """

    def examples(rows: Sequence[Row]) -> list[Example]:
        best = {}
        for row in rows:
            for place, answer in enumerate(preferred(row)):
                best.setdefault((key_of(row.prompt), place), (row.prompt, answer, {}, row.where))
        return [Example(i, *rest) for i, rest in enumerate(best.values())]

    def demonstrate(example: Example) -> Said:
        if example.answer is None:
            raise ValueError(f"{data.name} has no good answer to {plain_text(example.question)!r:.60} to demonstrate")
        return example.answer

    train, test = examples(data.train), examples(data.test or data.train)
    return Task(data.name, train, test, None, demonstrate, {})


def preferred(row: Row) -> list[Said | None]:
    """The best answers of a row: of an expert's edits the truth and the revision, of other rows one answer.

    That is the chosen answer, the one with the highest score, or the one with a good label (None for a bad label).
    """
    roles = {a.role for a in row.answers}
    if roles >= set(EDITS):
        return [row.answer(role).said for role in EDITS[:2]]
    if roles >= set(PAIR):
        return [row.answer("chosen").said]
    best = max(row.answers, key=lambda a: a.numbers.get("reward", a.numbers.get("label", 0.0)))
    return [best.said if "reward" in best.numbers or best.numbers.get("label", 0.0) > 0.5 else None]
