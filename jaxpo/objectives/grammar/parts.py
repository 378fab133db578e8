"""The interchangeable parts of a policy gradient."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from jax import Array

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.metrics import Metrics
from jaxpo.objectives.grammar.base import NONE, State, Statistic
from jaxpo.primitives import aggregation


class Part(NamedTuple):
    """An interchangeable part of a policy gradient: a function of the batch, what it asks for, and its hooks.

    fn: what the kind of part says (see `policy_gradient`). needs, wants, peeks, derived, rewards: as in `Objective`.
    per: whether it has (a surrogate: needs) one value a "token" or a "row"; None = it does not matter, or is not known.
    prepare: (batch, state) -> batch, once per rollout batch, after filters and shaping: writes what the part keeps.
    weigh: (batch, state, peek) -> batch, once per optimizer batch: bounds and selections.
    current: (adv, stats, batch, state) -> adv, of an advantage that hangs on the current policy, row by row (detached).
    tokens: (batch, state) -> [B, T] tokens (shares in [0, 1]) that stay in the denominator of the policy term.
    clipped: of a surrogate, ``fn``'s arguments -> which tokens lose their gradient.
    kernel: batch -> the options of `jaxpo.kernels.policy_surrogate` that say the same as ``fn``; None = none do.
    aggregate: of a regularizer; None = as the policy term. outer: of a regularizer, see `linearized`.
    sees_advantage: of a filter. uses_ratio: of a surrogate. requires: id of a regularizer that it does not work
      without.
    id: its name in the registry.
    memory, update, metrics: its entries of ``State.memory``, how they move after a step, and what it reports.
    """

    fn: Callable[..., Any]
    needs: frozenset[str] = frozenset()
    wants: frozenset[str] = frozenset()
    peeks: frozenset[str] = frozenset()
    per: Literal["token", "row"] | None = None
    clipped: Callable[..., Array] | None = None
    kernel: Callable[[Rollouts], Mapping[str, Any]] | None = None
    aggregate: aggregation.Aggregation | None = None
    outer: Callable[[Array], Array] | None = None
    name: str = ""
    prepare: Callable[[Rollouts, State], Rollouts] | None = None
    weigh: Callable[[Rollouts, State, TokenStats | None], Rollouts] | None = None
    current: Callable[..., Array] | None = None
    tokens: Callable[[Rollouts, State], Array] | None = None
    memory: Mapping[str, Any] = NONE
    update: Callable[[State, Rollouts, Metrics], State] | None = None
    metrics: Callable[[TokenStats, Rollouts, State], Metrics] | None = None
    derived: Mapping[str, Statistic] = NONE
    rewards: tuple[float, float] | None = None
    sees_advantage: bool = False
    uses_ratio: bool = True
    requires: str | None = None
    id: str = ""
