"""What an objective asks the loop for: fields of its batches, references, heads of the policy, preferences."""

from collections.abc import Collection
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from jaxpo.batch import MissingField, Rollouts, compared
from jaxpo.fields import EDITS, GIVEN, LOOP, PAIR, VECTORS, WEIGHTS, missing
from jaxpo.learning.references import GIVEN_BY, SCORED
from jaxpo.objectives import Objective, State
from jaxpo.policy import heads
from jaxpo.registry import unknown

JUDGING = frozenset({"score", "embed", "gate"})  # what a reward or preference model says of a whole answer
EMBED = 8  # numbers of an embedding, unless config.heads.embed says otherwise


class Form(NamedTuple):
    """In which form an objective takes preferences.

    kind: of rows (`jaxpo.tasks.preferences.records.KINDS`). layout: roles of a unit; () = answers as they are.
    numbers: that each answer must have. size: rows of a unit. mismatched: half of them are other prompts' answers
    (KTO). segments: tokens say whether they belong to an answer or to tool calls after it. weights: that tokens have.
    """

    kind: str
    layout: tuple[str, ...]
    numbers: tuple[str, ...]
    size: int
    mismatched: bool = False
    segments: bool = False
    weights: tuple[str, ...] = ()

    @property
    def given(self) -> tuple[str, ...]:
        """The roles of a unit that data have; the policy samples the others."""
        return tuple(role for role in self.layout if role != "own")


def form_of(objective: Objective, responses: int) -> Form | None:
    """The form in which the objective takes preferences; None if it takes none. ``responses``: scored answers a
    prompt."""
    numbers, weights = (tuple(sorted(objective.asks.needs & set(of))) for of in (GIVEN, WEIGHTS))
    if objective.unit.layout:
        kinds = [
            kind for kind, roles in (("pair", PAIR), ("edited", EDITS)) if set(roles) <= set(objective.unit.layout)
        ]
        segments, size = "segment" in objective.asks.needs, len(objective.unit.layout)
        return Form(kinds[0], objective.unit.layout, numbers, size, False, segments, weights) if kinds else None
    if "label" in objective.asks.needs:
        mismatched = "role" in objective.asks.needs
        return Form("label", (), numbers, 1 + mismatched, mismatched)
    if {"reward", "group"} <= objective.asks.needs:
        return Form("scored", (), numbers, responses)
    return Form("pair", PAIR[:1], numbers, 1) if objective.asks.needs & set(VECTORS) else None


def references_of(objective: Objective, provides: Collection[str] = ()) -> list[str]:
    """The references that the objective needs to score a batch (``ref`` = the policy at the start of the run).

    Args:
      provides: fields that its protocol adds to a batch.

    Raises:
      ValueError: it needs a field that neither the loop nor its protocol provides; the message says who would give it.
    """
    provided = LOOP | {f"logp_{name}" for name in objective.asks.derived} | {*provides}
    lacking = sorted(objective.asks.needs - provided)
    if other := [name for name in lacking if name not in GIVEN_BY]:
        raise ValueError(
            f"the objective needs {', '.join(other)} ({missing(other[0])}); the training loop provides "
            f"{', '.join(sorted(provided))} and {', '.join(GIVEN_BY)}"
        )
    found = [GIVEN_BY[name] for name in lacking]
    return found + [name for name in copies_of(objective) if name not in found]


def compared_of(objective: Objective) -> frozenset[str]:
    """The other models with which the objective's statistics compare the policy: another model, or a copy of the policy
    that stays as it is during an iteration.

    Raises:
      ValueError: any other name."""
    asks, models = objective.asks, [name for name, r in SCORED.items() if r.gives is None and not r.each_step]
    named = compared(asks.derived, asks.wants | asks.peeks | derived_needs(objective))
    if wrong := sorted(named.difference(models)):
        raise ValueError(f"a statistic of two models: {unknown('other model', wrong[0], models)}")
    return frozenset(named)


def copies_of(objective: Objective) -> list[str]:
    """The references of `compared_of` that are copies of the policy."""
    return sorted(name for name in compared_of(objective) if not SCORED[name].model)


def models_of(objective: Objective, references: Collection[str]) -> list[str]:
    """The references of the objective that are models of their own, not copies of the policy: those of `references_of`,
    and those that its statistics compare the policy with."""
    known = compared_of(objective).union(references)
    return [name for name, reference in SCORED.items() if reference.model and name in known]


def must_score(objective: Objective, batch: Rollouts, state: State) -> bool:
    """Whether ``prepare`` or ``weigh`` read what only a scoring pass gives. If they do not, the first optimizer step
    is its own old policy."""
    if objective.asks.peeks:
        return True
    try:
        jax.eval_shape(lambda b, s: objective.weigh(*objective.prepare(b, s), None), batch, state)
    except MissingField as missing:
        if missing.field not in (
            "logp_old",
            "entropy_old",
            "value_old",
            *(f"logp_{name}" for name in objective.asks.derived),
        ):
            raise
        return True
    return False


def derived_needs(objective: Objective) -> frozenset[str]:
    """Derived statistics that the objective needs of the old policy, as ``logp_<name>``; "value", as ``value_old``."""
    derived = frozenset(name for name in objective.asks.derived if f"logp_{name}" in objective.asks.needs)
    return derived | ({"value"} if "value_old" in objective.asks.needs else set())


def is_reward_model(objective: Objective) -> bool:
    """Whether the objective trains a judge of pairs of answers rather than a policy."""
    return bool(objective.asks.wants & {"score", "embed"})


def heads_of(objective: Objective, sizes: ConfigDict) -> dict[str, tuple[int, ...]]:
    """The shapes of the heads besides that of the vocabulary that the objective asks for, by ``config.heads``.

    Raises:
      ValueError: a size that nothing reads, that is missing, or that does not go with another one."""
    wanted = objective.asks.wants | objective.asks.peeks | derived_needs(objective)
    asked = [name for name in heads.NAMES if name in wanted]
    for name in ("embed", "gate"):
        if sizes[name] is not None and name not in asked:
            raise ValueError(f"config.heads.{name} is {sizes[name]}, but the objective asks for no {name} head")
    embed, gate = EMBED if sizes.embed is None else sizes.embed, sizes.gate
    if "embed" in asked and (embed < 2 or embed % 2):
        raise ValueError(f"config.heads.embed must be an even number of at least 2, not {embed}")
    if "gate" in asked and "embed" in asked and gate not in (None, embed // 2):
        raise ValueError(f"config.heads.gate is {gate}, but there is one for each two of config.heads.embed {embed}")
    if "gate" in asked and "embed" not in asked and (gate is None or gate < 1):
        raise ValueError("config.heads.gate is required: the number of reward models that the prompt weighs")
    shapes = {"value": (), "score": (), "embed": (embed,), "gate": (gate or embed // 2,)}
    return {name: shapes[name] for name in asked}
