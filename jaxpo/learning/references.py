"""Frozen companions of the policy: one table from the name of a slot to what it holds and how it moves.

A slot lies beside the policy in ``Run.slots``, on the same devices, and is checkpointed with it. Where an objective
needs ``logp_<slot>`` the loop holds the slot and scores every batch with it; a protocol may keep further ones, and say
how they move: ``keeps``, name -> options of the slot. At the start all of them are one copy of the policy.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpo.objectives import Objective
from jaxpo.primitives import preferences
from jaxpo.registry import check_arguments, unknown

Params = Any
Keeps = Mapping[str, Mapping[str, Any]]
blended = jax.jit(preferences.blend)
copied = partial(jax.tree.map, jnp.copy)


def stays(slot: Params, policy: Params, iteration: int) -> Params:
    """The slot does not move by itself."""
    return slot


def kept(slot: Params, policy: Params, iteration: int, every: int | None = None) -> Params:
    """As it is, or the policy at the start of the round, which lasts ``every`` iterations."""
    return slot if every is None else renewed(slot, policy, iteration, every)


def renewed(slot: Params, policy: Params, iteration: int, every: int = 1) -> Params:
    """The policy at the start of the round, which lasts ``every`` iterations."""
    return copied(policy) if iteration % every == 0 else slot


def averaged(slot: Params, policy: Params, iteration: int, b: float = 0.999) -> Params:
    """``theta_bar <- (1 - b) theta + b theta_bar`` after every optimizer step (Nash-EMA, arXiv:2312.00886)."""
    return blended(policy, slot, b)


def ringed(slot: Params, policy: Params, iteration: int, size: int = 7, every: int = 30) -> Params:
    """``size`` checkpoints of the policy by their place: the first stays, of the others the oldest is replaced every
    ``every`` iterations (SePPO, arXiv:2410.05255)."""
    if iteration % every:
        return slot
    place = 1 + (iteration // every - 1) % (size - 1)
    return {**slot, str(place): copied(policy)}


class Companion(NamedTuple):
    """What a slot holds, and ``update(slot, policy, iteration, **options)``: the slot after so many iterations, or
    with ``each_step`` after one more optimizer step."""

    what: str
    update: Callable[..., Params]
    each_step: bool = False

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        return dict(list(inspect.signature(self.update).parameters.items())[3:])


# Those that an objective may need the log-probs of ...
COMPANIONS: Mapping[str, Companion] = {
    "ref": Companion("the policy at the start of the run", kept),
    "prev": Companion("the policy at the start of the round", renewed),
    "ema": Companion("an average of past policies", averaged, each_step=True),
    "soup": Companion("the average of two models (config.soup)", stays),
}
# ... and those that protocols keep.
KEPT: Mapping[str, Companion] = {
    **COMPANIONS,
    "pool": Companion("a ring of past policies", ringed),
    "center": Companion("parameters and optimizer state that a protocol goes back to", stays),
    "half": Companion("the policy after half a step", stays),
    "hat": Companion("the latest iterate before it was extrapolated", stays),
}


def check(objective: Objective, keeps: Keeps) -> None:
    """``ValueError`` for a companion that does not exist, an option of it that does not, or one without effect."""
    for name, options in keeps.items():
        if name not in KEPT:
            raise ValueError(unknown("frozen companion", name, KEPT))
        check_arguments(f"companion {name!r}", options, KEPT[name].options)
        if name in ("prev", "ref") and options and f"logp_{name}" not in objective.asks.needs:
            raise ValueError(f"config.protocol.{name}_every has no effect: this objective does not need logp_{name}")


def held(needed: list[str], keeps: Keeps, policy: Params, opt_state: Any) -> dict[str, Any]:
    """The slots of a run at its start, made of the policy (of arrays or of shapes)."""
    out: dict[str, Any] = dict.fromkeys([*needed, *keeps], policy)
    if "pool" in out:
        out["pool"] = {str(i): policy for i in range(option(keeps, "pool", "size"))}
    if "center" in out:
        out["center"] = {"params": policy, "opt_state": opt_state}
    return out


def option(keeps: Keeps, name: str, field: str) -> Any:
    """The protocol's option of a companion, or its default."""
    return keeps.get(name, {}).get(field, KEPT[name].options[field].default)


def stored(keeps: Keeps, iteration: int) -> int:
    """How many checkpoints the pool has taken up after so many iterations, the first one among them."""
    return min(1 + iteration // option(keeps, "pool", "every"), option(keeps, "pool", "size"))


def moved(slots: Mapping[str, Any], keeps: Keeps, policy: Params, iteration: int | None = None) -> dict[str, Any]:
    """All slots after ``iteration`` finished iterations; None = after an optimizer step in the midst of one."""

    def one(name: str, slot: Any) -> Any:
        companion = KEPT[name]
        if companion.each_step != (iteration is None):
            return slot
        return companion.update(slot, policy, iteration, **keeps.get(name, {}))

    return {name: one(name, slot) for name, slot in slots.items()}


def each_step(slots: Iterable[str]) -> bool:
    """Whether one of the slots moves after every optimizer step."""
    return any(KEPT[name].each_step for name in slots)


def scored(objective: Objective, slots: Mapping[str, Any]) -> dict[str, Params]:
    """The slots that the objective needs the log-probs of."""
    return {name: slot for name, slot in slots.items() if f"logp_{name}" in objective.asks.needs}
