"""How a race gathers preferences: pairs of a right and a wrong answer to its task's training prompts, the same for all
objectives of pairs; a share of their labels is wrong."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxpo.batch import Rollouts, take
from jaxpo.objectives import Objective
from jaxpo.policy import heads
from jaxpo.tasks.records import PAIR
from jaxpo.tasks.units import encode, units
from jaxpo.tasks.verified_preferences import verified_pairs
from jaxpo.training.arena import Arena, Draws, Rules, Surroundings
from jaxpo.training.functions import TrainState


def in_pairs(rules: Rules) -> Rules:
    """The rules of as many rows, two an answered prompt.

    Raises:
      ValueError: rows that do not make pairs."""
    rows = rules.prompts * rules.responses
    if rows % (2 * rules.minibatches):
        raise ValueError(f"{rows} rows of an iteration are not {rules.minibatches} minibatches of pairs")
    return replace(rules, prompts=rows // 2, responses=2)


def unfit_for_pairs(objective: Objective, rules: Rules) -> str:
    """Why a race cannot run an objective of units; "" if it can."""
    if objective.layout != PAIR:
        return f"learns from units {objective.layout}; a race has pairs {PAIR}"
    if asked := sorted(objective.wants.intersection(heads.NAMES)):
        return f"trains a {asked[0]} head: it is no objective of a policy"
    given = {"role", "group", "count", "mask", "seed", "prompt", "logp_old", "entropy_old", "logp_ref"}
    if lacking := sorted(objective.needs - given):
        return f"needs {', '.join(lacking)}, which the pairs of a race have not"
    try:
        in_pairs(rules)
    except ValueError as error:
        return str(error)
    return ""


class Offline:
    """Pairs instead of samples: every seed draws its own of the same set, in every iteration; nothing is generated."""

    def __init__(self, arena: Arena, rules: Rules):
        self.arena, self.sampled, self.idle = arena, 0, 0
        data = pairs_of(arena.where, rules.flipped)
        self.size = data.rows // len(PAIR)

        def drawn(which: jax.Array) -> Rollouts:
            rows = (which[:, None] * len(PAIR) + jnp.arange(len(PAIR))).reshape(-1)
            batch = take(data, rows, shared_prompt=len(PAIR))
            return batch.replace(group=jnp.repeat(jnp.arange(len(which)), len(PAIR)))

        self.draw = jax.jit(jax.vmap(drawn))

    def collect(self, state: TrainState, draws: Draws) -> Rollouts:
        """Scored pairs [S, B, ...], chosen and rejected in turn."""
        batch = self.draw(draws.prompt % self.size).replace(seed=draws.seed)
        return self.arena.look(state.params, batch)

    def after(self, state: TrainState, batch: Rollouts) -> None:
        """As of `jaxpo.training.gathering.Together`."""


def pairs_of(where: Surroundings, flipped: float) -> Rollouts:
    """All training pairs of a race's task, of the race's widths.

    Raises:
      ValueError: the task has no answers, or one that is too long."""
    data = verified_pairs(where.task, flipped=flipped)
    width = dict(prompt_width=where.train.tokens.shape[1], width=where.max_new_tokens)
    # A wrong answer may be a little longer than any right one: such a pair is left out.
    encoded, _ = encode(data.train, where.tokenizer, roles=PAIR, bad="drop", **width)
    return jax.tree.map(jnp.asarray, units(encoded, PAIR, **width, pad_id=where.tokenizer.pad_id))
