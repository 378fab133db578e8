"""The preferences of a run: read or made, in the form that its objective takes, as tokens; tasks of prompts alone."""

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
from jaxpo.tasks.base import locate
from jaxpo.tasks.preferences import sets
from jaxpo.tasks.preferences.encode import TEMPLATES, Encoded, as_kind, encode, units, widths
from jaxpo.tasks.preferences.records import Row
from jaxpo.tasks.preferences.sets import PreferenceSet
from jaxpo.tasks.preferences.traces import Tracer, check_trace
from jaxpo.text.tokenizers import Tokenizer, question_of


@dataclass(frozen=True)
class Preferences:
    """Units to train on and units held out, with the shapes of their batches: P and T tokens."""

    form: Form
    train: Encoded
    test: Encoded
    prompt_width: int
    width: int
    pad_id: int
    report: dict[str, float]

    def units(self, indices: Sequence[int], seed: Sequence[int], *, held_out: bool = False) -> Rollouts:
        """The units at these places; of roles that the policy samples there are none. ``seed``: of the rows' seeds."""
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
    """The preference set of ``config.data``; None without one."""
    if config.data.name is None:
        return None
    parameters = sets.set_arguments(config.data.name)
    data = sets.build({"name": config.data.name, **arguments_of(config.data, parameters)}, task)
    return traced(data, locate(config.trace)) if config.trace else data


def traced(data: PreferenceSet, tracer: Tracer) -> PreferenceSet:
    """The set with the tool calls that ``tracer`` makes of each question and answer, after those answers."""

    def of(row: Row) -> Row:
        question = question_of(row.prompt)
        answers = (a._replace(trace=check_trace(tracer(question, a.text))) for a in row.answers)
        return row._replace(answers=tuple(answers))

    return data._replace(train=[of(row) for row in data.train], test=[of(row) for row in data.test])


def encoded(resolved: Resolved, data: PreferenceSet, tokenizer: Tokenizer) -> Preferences | None:
    """The set as tokens, in the form that the objective takes; None where a judge says of the policy's own answers what
    the objective asks, and the data give the prompts alone.

    Raises:
      ValueError: it takes no preferences or other ones, a bad row, or none is left.
    """
    config, objective, form = resolved.config, resolved.objective, resolved.form
    if resolved.protocol.facts.judges and (form is None or set(form.numbers) & set(NUMBERS)):
        return None
    if form is None:
        raise ValueError(
            f"config.data.name: objective {config.objective.name!r} takes no preferences"
            + (f" of this kind: a unit of it is {objective.unit.layout}" if objective.unit.layout else "")
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
            f"{data.name} has up to {most} scored answers a prompt: set config.rollout.responses to {most}, not "
            f"{form.size}"
        )
    width = widths([*train, *test])[0]
    shape = (config.rollout.prompt_width or width, config.sampling.max_new_tokens)
    return Preferences(form, train, test, *shape, tokenizer.pad_id, dropped)


def templates_of(objective: Objective, data: PreferenceSet) -> dict[str, str]:
    """The templates of prompts that the objective's units ask for; ``ValueError`` if the data have one of others."""
    layout = objective.unit.layout
    asked = {"draft_prompt": any("_given_" in r for r in layout), "rationale_prompt": "rationale" in layout}
    unused = [name for name in data.templates if not asked[name]]
    if unused:
        raise ValueError(f"config.data.{unused[0]} has no effect: the objective's units are {layout}")
    return {name: text for name, text in {**TEMPLATES, **data.templates}.items() if asked[name]}


def check_weights(config: ConfigDict, form: Form, name: str, rows: Sequence[Row]) -> None:
    """``ValueError`` for weights of tokens that not a single row gives."""
    for weight in form.weights if rows else ():
        if not any(weight in a.weights for row in rows for a in row.answers):
            raise ValueError(
                f"objective {config.objective.name!r} weighs tokens by {weight}, and no row of {name} gives it: "
                f'"{weight}": {{"revised": [["part of the answer", 2.5]]}}'
            )


def task_of(data: PreferenceSet) -> Task:
    """The prompts of a preference set as a task that nothing verifies; the preferred answers are demonstrations (of an
    expert's edits both, the truth and the revision)."""

    def examples(rows: Sequence[Row]) -> list[Example]:
        best = {}
        for row in rows:
            for place, answer in enumerate(preferred(row)):
                best.setdefault((sets.key_of(row.prompt), place), (row.prompt, answer))
        return [Example(i, prompt, answer, {}) for i, (prompt, answer) in enumerate(best.values())]

    def demonstrate(example: Example) -> str:
        if example.answer is None:
            raise ValueError(f"{data.name} has no good answer to {str(example.question)[:60]!r} to demonstrate")
        return example.answer

    train, test = examples(data.train), examples(data.test or data.train)
    return Task(data.name, train, test, None, demonstrate, {})


def preferred(row: Row) -> list[str | None]:
    """The best answer of a row: chosen, of the highest score, or with a good label, None if there is none; of an
    expert's edits the truth and the revision."""
    roles = {a.role for a in row.answers}
    if roles >= set(EDITS):
        return [row.answer(role).text for role in EDITS[:2]]
    if roles >= set(PAIR):
        return [row.answer("chosen").text]
    best = max(row.answers, key=lambda a: a.numbers.get("reward", a.numbers.get("label", 0.0)))
    return [best.text if "reward" in best.numbers or best.numbers.get("label", 0.0) > 0.5 else None]
