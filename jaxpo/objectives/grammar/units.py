"""Objectives of units: rows that belong together (chosen and rejected, a third answer, K samples) and one value for
all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.fields import PAIR, role_id
from jaxpo.metrics import Mean, Metrics
from jaxpo.objectives.grammar.base import Objective, State, Term, from_terms
from jaxpo.primitives import aggregation
from jaxpo.primitives.numerics import promote

# What the log-ratio of an answer is taken to: a slot, slots with their shares, or nothing.
Reference = str | Mapping[str, float | Array] | None


class Units(NamedTuple):
    """What a policy says of N units of rows, by the role of a row (of a role that occurs several times, the
    first)."""

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
    """[B, T] ``logp`` minus the log-prob under a slot, a blend of slots, or nothing."""
    shares = {reference: 1.0} if isinstance(reference, str) else reference or {}
    return stats.logp - sum(share * batch.get(f"logp_{slot}") for slot, share in shares.items())


def slots_of(reference: Reference) -> frozenset[str]:
    """Fields that the log-ratio to a reference needs."""
    return frozenset(f"logp_{slot}" for slot in ([reference] if isinstance(reference, str) else reference or ()))


def unit_term(name: str, value: Callable[[Units, State], Array], **options: Any) -> Term:
    """A term with one value [N] a unit, averaged over units; ``options`` as of `Term`."""

    def rows(stats: TokenStats, batch: Rollouts, state: State) -> Array:
        return jnp.repeat(value(Units(stats, batch), state), max(len(batch.layout), 1))

    return Term(name, rows, aggregation.unit_mean, per="row", **options)


def nll_term(
    role: str = "chosen", aggregate: aggregation.Aggregation = aggregation.token_mean, coef: float | Array = 1.0
) -> Term:
    """``-logp`` of the tokens of one role, averaged over those alone."""
    return Term(
        "nll",
        lambda stats, batch, state: -stats.logp,
        aggregate,
        rows=lambda batch, state: batch.role == role_id(role),
        coef=coef,
    )


def unit_objective(
    terms: Sequence[Term],
    *,
    margin: Callable[[Units], Array],
    layout: tuple[str, ...] = PAIR,
    needs: Sequence[str] = (),
    **options: Any,
) -> Objective:
    """`from_terms` with what every objective of pairs reports: the share of pairs whose ``margin`` [N] is above 0, its
    mean, and the log-prob of each role's answers and, with a reference, how far that has drifted from it."""

    def report(stats: TokenStats, batch: Rollouts, state: State) -> Metrics:
        z, count = margin(Units(stats, batch)), batch.unit(promote(batch.count))[:, 0]
        row, rows = stats.logp.sum(-1), promote(batch.count)
        by_role = {f"logp/{r}": Mean.of(row, rows * (batch.role == role_id(r))) for r in dict.fromkeys(layout)}
        if "logp_ref" in batch.per_token:
            moved = log_ratios(stats, batch, "ref").sum(-1)
            by_role |= {f"drift/{r}": Mean.of(moved, rows * (batch.role == role_id(r))) for r in dict.fromkeys(layout)}
        return {"preference/accuracy": Mean.of(z > 0, count), "preference/margin": Mean.of(z, count), **by_role}

    return from_terms(terms, metrics=report, needs={"role", *needs}, layout=layout, **options)


def preference(
    link: Callable[[Array, Units], Array],
    *,
    beta: float | Array = 1.0,
    reference: Reference = "ref",
    normalize_length: bool = False,
    layout: tuple[str, ...] = PAIR,
    terms: Sequence[Term] = (),
    needs: Sequence[str] = (),
    rows: Callable[[Rollouts, State], Array] | None = None,
    **options: Any,
) -> Objective:
    """Compose a direct-alignment objective: ``mean over pairs of link(beta (s_chosen - s_rejected))``, and more terms.

    ``s = sum_t (logp - logp_<reference>)`` of a row, or its mean over tokens with ``normalize_length``.

    Args:
      link: ``(margin [N], units) -> loss [N]``, e.g. ``-log_sigmoid`` for DPO (arXiv:2305.18290, eq. 7).
      reference: a slot, a blend of slots by their shares, or None: log-probs as they are.
      layout: roles of a unit's rows; must hold "chosen" and "rejected".
      rows: (batch, state) -> [B] which units the mean is over (the same number on every row of a unit).
      options: passed on to `from_terms`."""

    def margin(units: Units) -> Array:
        w, l = (units.log_ratio(role, reference) for role in PAIR)  # noqa: E741
        if normalize_length:
            w, l = (s / units.length(role) for s, role in zip((w, l), PAIR, strict=True))  # noqa: E741
        return beta * (w - l)

    main = unit_term("preference", lambda units, state: link(margin(units), units), rows=rows)
    return unit_objective([main, *terms], margin=margin, layout=layout, needs={*slots_of(reference), *needs}, **options)
