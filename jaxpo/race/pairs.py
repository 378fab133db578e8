"""The preferences of a race: pairs of a right and a wrong answer to its task's training prompts, the same for all
objectives of data; a share of their labels is wrong."""

from dataclasses import replace

from jaxpo.fields import PAIR
from jaxpo.learning.needs import Form, form_of
from jaxpo.objectives import Objective
from jaxpo.race.setup import Rules, Surroundings
from jaxpo.runs.preference_data import Preferences
from jaxpo.tasks.preferences.encode import as_kind, encode
from jaxpo.tasks.preferences.verified import verified_pairs


def race_form(objective: Objective, rules: Rules) -> Form:
    """The form in which the objective takes a race's pairs.

    Raises:
      ValueError: it takes none, or asks for more than a race's pairs have: other answers, or numbers.
    """
    form = form_of(objective, rules.responses)
    if form is None or not set(form.given) <= set(PAIR):
        raise ValueError(f"learns from units {objective.unit.layout}; a race has pairs {PAIR}")
    lacking = [*(set(form.numbers) - {"label"}), *(["tool calls"] if form.segments else [])]
    if lacking:
        raise ValueError(f"needs {', '.join(sorted(lacking))}, which the pairs of a race have not")
    return form


def in_units(rules: Rules, size: int) -> Rules:
    """The rules of as many rows, ``size`` of them a unit of data.

    Raises:
      ValueError: rows that do not make units."""
    rows = rules.prompts * rules.responses
    if rows % (size * rules.minibatches):
        raise ValueError(f"{rows} rows of an iteration are not {rules.minibatches} minibatches of units of {size} rows")
    return replace(rules, prompts=rows // size, responses=size)


def race_preferences(objective: Objective, where: Surroundings, rules: Rules) -> Preferences:
    """All training pairs of a race's task in the form that the objective takes, of the race's widths.

    Raises:
      ValueError: the task has no answers, or what `race_form` refuses."""
    form = race_form(objective, rules)
    data = verified_pairs(where.task, flipped=rules.flipped)
    width = dict(prompt_width=where.train.tokens.shape[1], width=where.max_new_tokens)
    rows = as_kind(data.train, data.kind, form.kind)
    # A wrong answer may be a little longer than any right one: such a pair is left out.
    train, _ = encode(rows, where.tokenizer, roles=form.given, numbers=form.numbers, bad="drop", **width)
    return Preferences(form, train, [], **width, pad_id=where.tokenizer.pad_id, report=data.report)
