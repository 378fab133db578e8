"""Objectives of units: rows that belong together (chosen and rejected, a third answer, K samples) and one value for
all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.fields import PAIR, role_id
from jaxpo.metrics import Mean, Metrics
from jaxpo.objectives.grammar.base import (
    NO_HOOKS,
    NOTHING,
    ON_POLICY,
    Asks,
    Gathering,
    Hooks,
    Objective,
    State,
    Term,
    Unit,
    asks_of,
    from_terms,
)
from jaxpo.objectives.grammar.base import role as of_role
from jaxpo.primitives import aggregation
from jaxpo.primitives.numerics import promote

# What the log-ratio of an answer is taken to: a reference, references with their shares, or nothing.
Reference = str | Mapping[str, float | Array] | None


class Units(NamedTuple):
    """N units of rows, by the role of a row (of a role that occurs several times, the first).

    stats: what the policy says of the rows.
    batch: the rows.
    """

    stats: TokenStats
    batch: Rollouts

    def of(self, x: Array, role: str) -> Array:
        """[N, ...] the rows of ``role`` of an array [B, ...]."""
        return self.batch.unit(x)[:, self.batch.layout.index(role)]

    def logp(self, role: str) -> Array:
        """[N] log-prob of the answer: the sum over its tokens."""
        return self.of(self.stats.logp.sum(-1), role)

    def log_ratio(self, role: str, reference: Reference = "ref") -> Array:
        """[N] log-prob minus that under the reference."""
        return self.of(log_ratios(self.stats, self.batch, reference).sum(-1), role)

    def length(self, role: str) -> Array:
        """[N] tokens of the answer, at least 1."""
        return self.of(jnp.maximum(self.batch.lengths, 1), role)

    def score(self, role: str) -> Array:
        """[N] what the score head says of the answer."""
        return self.of(self.stats.score, role)

    def get(self, name: str, role: str | None = None) -> Array:
        """[N, ...] a field of the batch at the rows of ``role``; without one, a number of the whole unit, which its
        first row holds."""
        return promote(self.of(self.batch.get(name), self.batch.layout[0] if role is None else role))


def log_ratios(stats: TokenStats, batch: Rollouts, reference: Reference) -> Array:
    """[B, T] ``logp`` minus the log-prob under a reference, a blend of references, or nothing."""
    shares = {reference: 1.0} if isinstance(reference, str) else reference or {}
    return stats.logp - sum(share * batch.get(f"logp_{name}") for name, share in shares.items())


def fields_of(reference: Reference) -> frozenset[str]:
    """Fields that the log-ratio to a reference needs."""
    return frozenset(f"logp_{name}" for name in ([reference] if isinstance(reference, str) else reference or ()))


def unit_term(name: str, value: Callable[[Units, State], Array], **options: Any) -> Term:
    """A term with one value [N] a unit, averaged over units; ``options`` as of `Term`."""

    def rows(stats: TokenStats, batch: Rollouts, state: State) -> Array:
        return jnp.repeat(value(Units(stats, batch), state), max(len(batch.layout), 1))

    return Term(name, rows, aggregation.unit_mean, per="row", **options)


def nll_term(
    role: str = "chosen", aggregate: aggregation.Aggregation = aggregation.token_mean, coef: float | Array = 1.0
) -> Term:
    """``-logp`` of the tokens of one role, averaged over those alone."""
    return Term("nll", lambda stats, batch, state: -stats.logp, aggregate, rows=of_role(role), coef=coef)


def unit_objective(
    terms: Sequence[Term],
    *,
    margin: Callable[[Units], Array],
    layout: tuple[str, ...] = PAIR,
    asks: Asks = NOTHING,
    hooks: Hooks = NO_HOOKS,
    protocol: Gathering = ON_POLICY,
) -> Objective:
    """Compose an objective of units, with what every objective of pairs reports: the share of pairs whose ``margin``
    [N] is above 0, its mean, and the log-prob of each role's answers and, with a reference, how far that has drifted
    from it.

    Args:
      layout: roles of a unit's rows. asks, hooks: besides those of the terms."""

    def report(stats: TokenStats, batch: Rollouts, state: State) -> Metrics:
        z, count = margin(Units(stats, batch)), batch.unit(promote(batch.count))[:, 0]
        row, rows = stats.logp.sum(-1), promote(batch.count)
        by_role = {f"logp/{r}": Mean.of(row, rows * (batch.role == role_id(r))) for r in dict.fromkeys(layout)}
        if "logp_ref" in batch.per_token:
            moved = log_ratios(stats, batch, "ref").sum(-1)
            by_role |= {f"drift/{r}": Mean.of(moved, rows * (batch.role == role_id(r))) for r in dict.fromkeys(layout)}
        return {"preference/accuracy": Mean.of(z > 0, count), "preference/margin": Mean.of(z, count), **by_role}

    return from_terms(
        terms,
        asks=asks.merged(asks_of("role")),
        hooks=hooks.merged(Hooks(metrics=report)),
        unit=Unit(layout),
        protocol=protocol,
    )


def preference(
    link: Callable[[Array, Units], Array],
    *,
    beta: float | Array | None = None,
    reference: Reference = "ref",
    normalize_length: bool = False,
    layout: tuple[str, ...] = PAIR,
    terms: Sequence[Term] = (),
    rows: Callable[[Rollouts, State], Array] | None = None,
    asks: Asks = NOTHING,
    hooks: Hooks = NO_HOOKS,
    protocol: Gathering = ON_POLICY,
) -> Objective:
    """Compose a direct-alignment objective: ``mean over pairs of link(beta (s_chosen - s_rejected))``, and more terms.

    ``s = sum_t (logp - logp_<reference>)`` of a row, or its mean over tokens with ``normalize_length``.

    Args:
      beta: strength of the KL regularization, also the objective's `Objective.beta` where ``s`` is ``sum_t (logp -
        logp_ref)``; None = the margin is ``s_chosen - s_rejected``.
      link: ``(margin [N], units) -> loss [N]``, e.g. ``-log_sigmoid`` for DPO (arXiv:2305.18290, eq. 7).
      reference: a name, a blend of names by their shares, or None: log-probs as they are.
      layout: roles of a unit's rows; must hold "chosen" and "rejected".
      rows: (batch, state) -> [B] which units the mean is over (the same number on every row of a unit).
      asks, hooks: what the link asks for and does, besides the terms."""

    def margin(units: Units) -> Array:
        w, l = (units.log_ratio(role, reference) for role in PAIR)  # noqa: E741
        if normalize_length:
            w, l = (s / units.length(role) for s, role in zip((w, l), PAIR, strict=True))  # noqa: E741
        return w - l if beta is None else beta * (w - l)

    main = unit_term("preference", lambda units, state: link(margin(units), units), rows=rows)
    asks = asks.merged(asks_of(*fields_of(reference)))
    objective = unit_objective([main, *terms], margin=margin, layout=layout, asks=asks, hooks=hooks, protocol=protocol)
    return objective._replace(beta=beta if reference == "ref" and not normalize_length else None)
