"""What every objective of a race gets alike."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ml_collections import ConfigDict, config_dict

from jaxpo.arguments import Count, Positive, Share, Whole, check_record
from jaxpo.config.fields import default
from jaxpo.config.resolve import resolve
from jaxpo.config.resolved import Resolved
from jaxpo.fields import FIELDS, JUDGED, PAIR
from jaxpo.learning.needs import Form, copies_of, form_of, is_reward_model, models_of
from jaxpo.learning.references import GIVEN_BY
from jaxpo.objectives import Objective, make
from jaxpo.protocols.preference_data import rows as rows_of_unit


@dataclass(frozen=True)
class Rules:
    """What every objective of a race gets alike.

    task: name, or name and arguments as in Python: ``toy(digits=4)``.
    seeds: of parameters, prompts and sampling.
    steps: iterations, each of ``prompts`` prompts with ``responses`` completions and ``epochs * minibatches`` optimizer
      steps.
    evaluations: points of the learning curve after the start.
    warm_start: supervised steps before all, on ``warm_batch`` demonstrations each, of which a share ``drop_last`` lacks
      its last character: an imperfect demonstrator, as web data is.
    max_new_tokens: generation budget; 0 = the longest right answer and two more.
    width, layers: of the policy.
    flipped: share of preference pairs whose label is wrong, for objectives of pairs.
    """

    task: str = "toy"
    seeds: Whole = 5
    steps: Whole = 60
    prompts: Whole = 16
    responses: Whole = 8
    epochs: Whole = 1
    minibatches: Whole = 4
    learning_rate: Positive = 3e-4
    evaluations: Whole = 12
    warm_start: Count = 120
    warm_batch: Whole = 64
    drop_last: Share = 0.6
    warm_learning_rate: Positive = 3e-3
    max_new_tokens: Count = 0
    width: Whole = 32
    layers: Whole = 2
    flipped: Share = 0.0

    def __post_init__(self):
        check_record(self)
        if self.prompts % self.minibatches:
            raise ValueError(f"minibatches {self.minibatches} does not divide prompts {self.prompts}")

    @property
    def points(self) -> list[int]:
        """Iterations after which accuracy is measured; 0 is the start."""
        return sorted({round(x) for x in np.linspace(0, self.steps, self.evaluations + 1)})


def adam(learning_rate: float) -> ConfigDict:
    """The optimizer block of every contender, and of the warm start."""
    schedule = dict(name="constant", warmup_steps=0)
    return ConfigDict(dict(name="adam", learning_rate=learning_rate, clip_norm=1.0, schedule=schedule))


def config_of(rules: Rules, label: str, max_new_tokens: int) -> ConfigDict:
    """The config of a run by these rules."""
    config = default()
    config.steps = rules.steps
    config.objective = ConfigDict(dict(name=label))
    config.policy.update(width=rules.width, layers=rules.layers)
    config.sampling.max_new_tokens = max_new_tokens
    config.rollout.update(prompts=rules.prompts, responses=rules.responses)
    config.training.update(epochs=rules.epochs, minibatches=rules.minibatches)
    config.optimizer, config.warm_start.optimizer = adam(rules.learning_rate), adam(rules.warm_learning_rate)
    config.warm_start.update(steps=rules.warm_start, batch=rules.warm_batch, drop_last=rules.drop_last)
    return config


def resolved_by(rules: Rules, label: str, objective: Objective, max_new_tokens: int) -> Resolved:
    """The run of an objective by the rules, in the shape that its protocol accepts: as many rows in units of data, or
    as many completions of one prompt each.

    Raises:
      ValueError: why a race cannot run the objective.
    """
    if is_reward_model(objective):
        raise ValueError("trains a judge of answers, and a race compares policies by their own answers")
    scored = [name for name in GIVEN_BY if name in objective.asks.needs and FIELDS[name].givers == ("reference",)]
    if models := models_of(objective, [GIVEN_BY[name] for name in scored]):
        raise ValueError(f"needs the model {', '.join(models)} beside the policy, and a race has none")

    if copies := copies_of(objective):
        raise ValueError(f"compares the policy with its copy {', '.join(copies)}, and a race gives it log-probs alone")

    def attempt(rules: Rules, **changes: Any) -> Resolved:
        config = config_of(rules, label, max_new_tokens)
        config.data = ConfigDict(changes.get("data", dict(name=config_dict.placeholder(str))))
        return resolve(config, 1, objective=objective)

    if reads_data(objective):
        check_pairs(objective, form_of(objective, rules.responses))
        return attempt(in_units(rules, rows_of_unit(objective, rules.responses)), data=dict(name="task"))
    alone = replace(rules, prompts=rules.prompts * rules.responses, responses=1)
    try:
        return attempt(rules)
    except ValueError as error:
        try:
            return attempt(alone)
        except ValueError:
            raise error from None


def reads_data(objective: Objective) -> bool:
    """Whether the objective learns from the task's pairs. What only a judge knows is asked of the policy's answers."""
    if objective.protocol.name != "on_policy":
        facts = make(objective.protocol.name, "protocol", **objective.protocol.options).facts
        return facts.rows is not None and not facts.judges
    needs = objective.asks.needs
    judged = needs & {*JUDGED - {"label"}, "logp_prev"}
    return not judged and bool(objective.unit.layout or "label" in needs)


def in_units(rules: Rules, size: int) -> Rules:
    """The rules of as many rows, ``size`` of them a unit of data.

    Raises:
      ValueError: rows that do not make units."""
    rows = rules.prompts * rules.responses
    if rows % (size * rules.minibatches):
        raise ValueError(f"{rows} rows of an iteration are not {rules.minibatches} minibatches of units of {size} rows")
    return replace(rules, prompts=rows // size, responses=size)


def check_fit(resolved: Resolved) -> None:
    """``ValueError`` for what a race does not have: earlier batches, rewards nobody asks for, models from elsewhere."""
    objective, protocol = resolved.objective, resolved.protocol
    if protocol.facts.stale and protocol.tables:
        raise ValueError(f"protocol {resolved.protocol_name!r} trains on earlier batches; a race has only fresh ones")
    if "rewards_multi" in objective.asks.needs:
        raise ValueError("normalizes several rewards, and the task of a race has one")
    if protocol.facts.rows is None and not objective.asks.needs & {"reward", "correct", "edge_adv"}:
        raise ValueError("does not ask for rewards: it would imitate its own completions")
    if "soup" in resolved.references:
        raise ValueError("needs logp_soup, log-probs of a model that a race does not have")


def check_pairs(objective: Objective, form: Form | None) -> None:
    """``ValueError`` for an objective that asks for more than a race's pairs have: other answers, or numbers."""
    if form is None or not set(form.given) <= set(PAIR):
        raise ValueError(f"learns from units {objective.unit.layout}; a race has pairs {PAIR}")
    lacking = [*(set(form.numbers) - {"label"}), *(["tool calls"] if form.segments else [])]
    if lacking:
        raise ValueError(f"needs {', '.join(sorted(lacking))}, which the pairs of a race have not")
