"""Frozen models beside the policy: one table from the name of a reference to what it holds and how it moves.

A reference lies in ``Run.references``, on the same devices as the policy, and is checkpointed with it. Where an
objective needs ``logp_<name>``, or ``model_score`` of a reward model, the loop holds the reference and scores every
batch with it. A protocol may keep further ones and say how they move: ``keeps``, name -> options. At the start they
share one copy of the policy.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpo.learning.trainable import policy_alone
from jaxpo.objectives import Objective
from jaxpo.policy.transformer import Params
from jaxpo.primitives import preferences
from jaxpo.registry import check_arguments, unknown

Keeps = Mapping[str, Mapping[str, Any]]
blended = jax.jit(preferences.blend)
copied = partial(jax.tree.map, jnp.copy)


def stays(frozen: Params, policy: Params, iteration: int) -> Params:
    """Frozen for the whole run."""
    return frozen


def kept(frozen: Params, policy: Params, iteration: int, every: int | None = None) -> Params:
    """Frozen; with ``every``, replaced by the current policy every so many iterations."""
    return frozen if every is None else renewed(frozen, policy, iteration, every)


def renewed(frozen: Params, policy: Params, iteration: int, every: int = 1) -> Params:
    """Replaced by the current policy every so many iterations."""
    return copied(policy) if iteration % every == 0 else frozen


def averaged(frozen: Params, policy: Params, iteration: int, b: float = 0.999) -> Params:
    """``theta_bar <- (1 - b) theta + b theta_bar`` after every optimizer step (Nash-EMA, arXiv:2312.00886)."""
    return blended(policy, frozen, b)


def ringed(frozen: Params, policy: Params, iteration: int, size: int = 7, every: int = 30) -> Params:
    """``size`` checkpoints of the policy by their place. The first stays; the oldest other one is replaced every
    ``every`` iterations (SePPO, arXiv:2410.05255)."""
    if iteration % every:
        return frozen
    place = 1 + (iteration // every - 1) % (size - 1)
    return {**frozen, str(place): copied(policy)}


class Reference(NamedTuple):
    """What a reference holds and how it moves.

    says: what it holds.
    update: (reference, policy, iteration, **options) -> the reference after so many iterations.
    each_step: whether ``update`` runs after every optimizer step instead.
    model: whether it is a model of its own, loaded from a path, and no copy of the policy.
    gives: the field of a batch that scoring with it gives; None = ``logp_<name>``.
    """

    says: str
    update: Callable[..., Params]
    each_step: bool = False
    model: bool = False
    gives: str | None = None

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        return dict(list(inspect.signature(self.update).parameters.items())[3:])


# Objectives may need what these say of a batch ...
SCORED: Mapping[str, Reference] = {
    "ref": Reference("the policy at the start of the run", kept),
    "prev": Reference("the policy at the start of the round", renewed),
    "ema": Reference("an average of past policies", averaged, each_step=True),
    "soup": Reference("the average of two models (config.soup)", stays),
    "teacher": Reference("another model (config.references.teacher)", stays, model=True),
    "reward_model": Reference("a reward model (config.references)", stays, model=True, gives="model_score"),
}
GIVEN_BY: Mapping[str, str] = {r.gives or f"logp_{name}": name for name, r in SCORED.items()}  # field -> reference
# ... and protocols keep these besides.
REFERENCES: Mapping[str, Reference] = {
    **SCORED,
    "pool": Reference("a ring of past policies", ringed),
    "center": Reference("parameters and optimizer state that a protocol goes back to", stays),
    "half": Reference("the policy after half a step", stays),
    "hat": Reference("the latest iterate before it was extrapolated", stays),
}


def check(objective: Objective, keeps: Keeps) -> None:
    """``ValueError`` for a reference or an option that does not exist, or an option without effect."""
    for name, options in keeps.items():
        if name not in REFERENCES:
            raise ValueError(unknown("reference", name, REFERENCES))
        check_arguments(f"reference {name!r}", options, REFERENCES[name].options)
        if name in ("prev", "ref") and options and f"logp_{name}" not in objective.asks.needs:
            raise ValueError(f"config.protocol.{name}_every has no effect: this objective does not need logp_{name}")


def held(needed: Iterable[str], keeps: Keeps, policy: Params, opt_state: Any) -> dict[str, Any]:
    """The references of a run at its start that are made of the policy (of arrays or of shapes)."""
    alone = policy_alone(policy)
    out: dict[str, Any] = dict.fromkeys([n for n in (*needed, *keeps) if not REFERENCES[n].model], alone)
    if "pool" in out:
        out["pool"] = {str(i): alone for i in range(option(keeps, "pool", "size"))}
    if "center" in out:
        out["center"] = {"params": policy, "opt_state": opt_state}
    return out


def option(keeps: Keeps, name: str, field: str) -> Any:
    """A protocol's option of a reference, or its default."""
    return keeps.get(name, {}).get(field, REFERENCES[name].options[field].default)


def stored(keeps: Keeps, iteration: int) -> int:
    """How many checkpoints the pool holds after so many iterations, the first one among them."""
    return min(1 + iteration // option(keeps, "pool", "every"), option(keeps, "pool", "size"))


def moved(references: Mapping[str, Any], keeps: Keeps, policy: Params, iteration: int | None = None) -> dict[str, Any]:
    """All references after ``iteration`` finished iterations; None = after an optimizer step within one."""
    policy = policy_alone(policy)

    def one(name: str, frozen: Any) -> Any:
        reference = REFERENCES[name]
        if reference.each_step != (iteration is None):
            return frozen
        return reference.update(frozen, policy, iteration, **keeps.get(name, {}))

    return {name: one(name, frozen) for name, frozen in references.items()}


def scored(objective: Objective, references: Mapping[str, Any], compared: Collection[str] = ()) -> dict[str, Params]:
    """The references whose log-probs the objective needs, or with which it compares the policy."""
    asked = {name for name in references if f"logp_{name}" in objective.asks.needs}.union(compared)
    return {name: frozen for name, frozen in references.items() if name in asked}
