"""The kinds of part that a policy gradient is made of, and `reads`, which makes a part of a primitive.

Every part has five fields; the docstring of its kind describes the others.

fn: computes it; the docstring of its kind gives the arguments.
asks: data that it asks for.
hooks: functions that it runs beside.
per: whether it has one value a "token" or a "row"; None = it does not matter, or is not known.
id: its name in the registry.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.objectives.grammar.base import Asks, Hooks, State, asks_of
from jaxpo.primitives import aggregation

__all__ = ["asks_of"]  # beside the kinds of part, for what defines parts

Per = Literal["token", "row"] | None
KernelOptions = Callable[[Rollouts], Mapping[str, Any]]


class Advantage(NamedTuple):
    """The worth of an answer. ``fn(batch, state) -> [B] or [B, T]``; rows of count 0 are no members of its groups.

    current: (adv, stats, batch, state) -> adv, of one that follows the current policy, row by row (detached).
    tokens: (batch, state) -> [B, T] shares of tokens that stay in the denominators of the policy term.
    """

    fn: Callable[[Rollouts, State], Array]
    asks: Asks = Asks()
    hooks: Hooks = Hooks()
    per: Per = None
    current: Callable[[Array, TokenStats, Rollouts, State], Array] | None = None
    tokens: Callable[[Rollouts, State], Array] | None = None
    id: str = ""


class Ratio(NamedTuple):
    """The distance that the policy has moved. ``fn(stats, batch) -> log-ratio`` [B, T], or [B] when ``per`` is "row".

    kernel: batch -> options with which `jaxpo.kernels.policy_surrogate` computes the same; None = it cannot.
    """

    fn: Callable[[TokenStats, Rollouts], Array]
    asks: Asks = Asks()
    hooks: Hooks = Hooks()
    per: Per = None
    kernel: KernelOptions | None = None
    id: str = ""


OfSurrogate = Callable[[Array, Array, TokenStats, Rollouts, State], Array]


class Surrogate(NamedTuple):
    """The loss of a token or a row. ``fn(log_ratio, adv, stats, batch, state) -> value`` of the shape of the log-ratio.

    clipped: of ``fn``'s arguments -> the tokens (or rows) that lose their gradient.
    kernel: batch -> options with which `jaxpo.kernels.policy_surrogate` computes the same; None = it cannot.
    uses_ratio: False if ``fn`` ignores the log-ratio.
    requires: id of a regularizer without which it means nothing.
    """

    fn: OfSurrogate
    asks: Asks = Asks()
    hooks: Hooks = Hooks()
    per: Per = None
    clipped: OfSurrogate | None = None
    kernel: KernelOptions | None = None
    uses_ratio: bool = True
    requires: str | None = None
    id: str = ""


class Regularizer(NamedTuple):
    """A penalty that a coefficient multiplies. ``fn(stats, batch, state) -> [B, T]``, or [B] when ``per`` is "row".

    name: of its term.
    aggregate: None = that of the policy term.
    outer: see `jaxpo.objectives.grammar.base.linearized`.
    kernel: batch -> options with which `jaxpo.kernels.policy_surrogate` computes the same; None = it cannot.
    """

    fn: Callable[[TokenStats, Rollouts, State], Array]
    asks: Asks = Asks()
    hooks: Hooks = Hooks()
    per: Per = None
    name: str = ""
    aggregate: aggregation.Aggregation | None = None
    outer: Callable[[Array], Array] | None = None
    kernel: KernelOptions | None = None
    id: str = ""


class Filter(NamedTuple):
    """A choice of rows to train on. ``fn(batch, state) -> [B]`` share of each row to keep; 0 leaves every denominator.

    sees_advantage: it comes after the advantage (``batch.adv``), which is not computed anew; ``fn`` may then give
      shares of tokens [B, T] (``per`` "token"), which leave the denominators of the policy term.
    """

    fn: Callable[[Rollouts, State], Array]
    asks: Asks = Asks()
    hooks: Hooks = Hooks()
    per: Per = None
    sees_advantage: bool = False
    id: str = ""


class Shaping(NamedTuple):
    """A new reward. ``fn(batch, state) -> [B]``.

    replaces: ``fn`` does not read the reward before it.
    """

    fn: Callable[[Rollouts, State], Array]
    asks: Asks = Asks()
    hooks: Hooks = Hooks()
    per: Per = None
    replaces: bool = False
    id: str = ""


class Correction(NamedTuple):
    """A constant factor of the policy term, for the gap between sampler and trainer. ``fn(batch, state) -> [B, T] or
    [B]``.

    tokens: (batch, state) -> [B, T] shares of tokens that stay in the denominators of the policy term.
    """

    fn: Callable[[Rollouts, State], Array]
    asks: Asks = Asks()
    hooks: Hooks = Hooks()
    per: Per = None
    tokens: Callable[[Rollouts, State], Array] | None = None
    id: str = ""


Part = Advantage | Ratio | Surrogate | Regularizer | Filter | Shaping | Correction


class Reading(NamedTuple):
    """A primitive bound to the batch: the first two fields of a part, ``Advantage(*reads(...))``."""

    fn: Callable[..., Array]
    asks: Asks


GIVEN = ("count", "mask", "role", "prompt", "adv", "lengths", "ratio", "log_ratio")  # needs of no batch
STATISTICS = ("logp", "entropy", "value", "score")


def reads(primitive: Callable[..., Array], *names: str, **hyperparameters: Any) -> Reading:
    """Bind a primitive's positional arguments to what bears their names, and derive the needs.

    ``Advantage(*reads(advantages.leave_one_out, singleton="raw"))`` calls ``leave_one_out(reward, group, count,
    singleton="raw")`` with the fields of the batch, and needs reward and group. Names are those of batch fields, of
    statistics of the policy (``logp``, ``entropy``), ``lengths``, and in a surrogate ``ratio``, ``log_ratio`` and
    ``adv``. Beside ``logp`` there always is a ``logp_old``: the policy's own where the batch has none.

    Args:
      primitive: arrays in, array out.
      names: what to pass, in order, where the primitive's own parameter names are others.
      hyperparameters: passed on by name."""
    if not names:
        parameters = inspect.signature(primitive).parameters.values()
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
        names = tuple(p.name for p in positional if p.name not in hyperparameters)

    def fn(*arguments: Any) -> Array:
        stats = next((x for x in arguments if isinstance(x, TokenStats)), None)
        batch = next(x for x in arguments if isinstance(x, Rollouts))
        log_ratio, adv = arguments[:2] if len(arguments) == 5 else (None, batch.adv)  # of a surrogate
        known = {"log_ratio": log_ratio, "adv": adv, "lengths": batch.lengths}
        if stats is not None:
            known |= {name: getattr(stats, name) for name in STATISTICS}
        if "ratio" in names:
            known["ratio"] = jnp.exp(log_ratio)
        return primitive(*[known[n] if n in known else batch.get(n) for n in names], **hyperparameters)

    there = {*GIVEN, *STATISTICS, *(("logp_old",) if "logp" in names else ())}
    wants = frozenset(names) & frozenset(STATISTICS[1:])
    return Reading(fn, Asks(needs=frozenset(names) - there, wants=wants))
