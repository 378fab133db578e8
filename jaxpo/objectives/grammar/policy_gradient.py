"""How published policy gradients are put together: interchangeable parts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.kernels.policy_surrogate.api import best, policy_surrogate
from jaxpo.metrics import Mean, Metrics
from jaxpo.objectives.grammar.base import (
    NO_HOOKS,
    NOTHING,
    ON_POLICY,
    SINGLE_ROWS,
    Asks,
    Gathering,
    Hooks,
    Objective,
    State,
    Term,
    Unit,
    from_terms,
    is_off,
    per_token,
)
from jaxpo.objectives.grammar.parts import Advantage, Correction, Filter, Part, Ratio, Regularizer, Shaping, Surrogate
from jaxpo.objectives.grammar.standard_metrics import sampled, sampled_tokens
from jaxpo.primitives import aggregation, grouping
from jaxpo.primitives.numerics import promote

Rows = Callable[[Rollouts, State], Array]


class Parts(NamedTuple):
    """The parts of one policy gradient, sorted by when they act.

    filters: choose rows before the advantage.
    selections: filters that see the advantage.
    rows: members of the policy term and of the advantage's statistics; None = all.
    first: what is written before everything else.
    """

    advantage: Advantage
    ratio: Ratio
    surrogate: Surrogate
    regularizers: tuple[tuple[Any, Regularizer], ...]
    filters: tuple[Filter, ...]
    selections: tuple[Filter, ...]
    shaping: tuple[Shaping, ...]
    corrections: tuple[Correction, ...]
    rows: Rows | None
    first: Callable[[Rollouts], Rollouts] | None = None

    @property
    def of_the_policy_term(self) -> list[Part]:
        """Every part but the regularizers, which are terms of their own."""
        main = [self.advantage, self.surrogate, self.ratio]
        return [*main, *self.filters, *self.selections, *self.shaping, *self.corrections]

    @property
    def leave_tokens(self) -> list[Callable[[Rollouts, State], Array]]:
        """What says which tokens stay in the denominators of the policy term."""
        kept = [p.tokens for p in (self.advantage, *self.corrections) if p.tokens]
        return [*kept, _selected] if any(p.per == "token" for p in self.selections) else kept


def policy_gradient(
    *,
    advantage: Advantage,
    surrogate: Surrogate,
    ratio: Ratio,
    aggregate: aggregation.Aggregation,
    regularizers: Sequence[tuple[Any, Regularizer]] = (),
    filters: Sequence[Filter] = (),
    shaping: Sequence[Shaping] = (),
    corrections: Sequence[Correction] = (),
    terms: Sequence[Term] = (),
    rows: Rows | None = None,
    first: Callable[[Rollouts], Rollouts] | None = None,
    scale: float | Array | Callable[[State], Array] = 1.0,
    asks: Asks = NOTHING,
    unit: Unit = SINGLE_ROWS,
    protocol: Gathering = ON_POLICY,
) -> Objective:
    """Compose a policy-gradient objective: *advantage x ratio x surrogate x regularizers x
    aggregation*, and more terms.

    ``jaxpo.objectives.grammar.parts`` says what each kind of part computes.

    Args:
      aggregate: weights of the policy term, and of regularizers that do not bring their own.
      regularizers: pairs (coefficient, part); a Python 0 removes its term and what it asks for.
      filters: see the unshaped reward, but for those that see the advantage.
      shaping: new rewards, applied in turn after the filters.
      terms: more terms, beside the policy's and the regularizers'.
      rows: (batch, state) -> [B] rows that count in the denominators of the policy term and the regularizers; they
        alone are members of the groups that the advantage compares, and they alone are filtered. None = all rows.
      first: batch -> batch, once per rollout batch and before everything else: fields that ``rows`` reads.
      scale: factor of the policy term, perhaps a function of the state.
      asks: besides those of the parts and terms. unit, protocol: as in `Objective`.

    Raises:
      ValueError: parts that do not go together, with the reason."""
    parts = Parts(
        advantage,
        ratio,
        surrogate,
        tuple((coef, part) for coef, part in regularizers if not is_off(coef)),
        tuple(p for p in filters if not p.sees_advantage),
        tuple(p for p in filters if p.sees_advantage),
        tuple(shaping),
        tuple(corrections),
        rows,
        first,
    )
    check_parts(parts)
    inner = NO_HOOKS.merged(*[p.hooks for p in parts.of_the_policy_term])
    hooks = Hooks(metrics=partial(term_metrics, parts)).merged(inner)
    hooks = hooks._replace(prepare=partial(prepare, parts, inner.prepare))
    return from_terms(
        [
            policy_term(parts, aggregate, scale),
            *[regularizer_term(parts, aggregate, coef, p) for coef, p in parts.regularizers],
            *terms,
        ],
        asks=asks.merged(asks_of_parts(parts)),
        hooks=hooks,
        one_pass=partial(one_pass, parts),
        unit=unit,
        protocol=protocol,
        made_of=made_of(parts, aggregate),
    )


def asks_of_parts(parts: Parts) -> Asks:
    """What the parts of the policy term ask for. A reward that the first shaping replaces is not read, but by
    filters."""
    asks = NOTHING.merged(*[p.asks for p in parts.of_the_policy_term])
    if parts.shaping and parts.shaping[0].replaces and not any("reward" in p.asks.needs for p in parts.filters):
        return asks._replace(needs=asks.needs - {"reward"})
    return asks


def policy_term(parts: Parts, aggregate: aggregation.Aggregation, scale: Any) -> Term:
    """The term of the surrogate."""
    return Term(
        "policy",
        partial(policy_value, parts),
        aggregate,
        rows=parts.rows,
        tokens=partial(kept_tokens, parts) if parts.leave_tokens else None,
        coef=scale,
        per="row" if parts.ratio.per == "row" else "token",
    )


def regularizer_term(parts: Parts, aggregate: aggregation.Aggregation, coef: Any, part: Regularizer) -> Term:
    """The term of a regularizer and its coefficient, of the same rows."""
    return Term(
        part.name,
        part.fn,
        part.aggregate or aggregate,
        rows=parts.rows,
        coef=coef,
        per=part.per or "token",
        outer=part.outer,
        asks=part.asks,
        hooks=part.hooks,
    )


# ---- before the pass ----------------------------------------------------------------------------------------------


def prepare(parts: Parts, write: Callable | None, batch: Rollouts, state: State) -> tuple[Rollouts, State]:
    """Filters, shaping, what parts write (``write``), advantage, selections: in this order."""
    batch = parts.first(batch) if parts.first else batch
    if batch.reward is not None:
        degenerate = grouping.group_constant(batch.reward, batch.group, members(parts, batch, state).count)
        batch = batch.with_row(degenerate=promote(degenerate))
    for part in parts.filters:
        batch = batch.replace(count=batch.count * kept_share(parts, part, batch, state))
    for part in parts.shaping:
        batch = batch.replace(reward=part.fn(batch, state))
    count, batch = batch.count, members(parts, batch, state)
    if write:
        batch, state = write(batch, state)
    adv = promote(parts.advantage.fn(batch, state))
    counts = batch.count > 0 if adv.ndim == 1 else (batch.mask > 0) & (batch.count > 0)[:, None]
    batch = batch.replace(adv=jnp.where(counts, adv, 0), count=count)
    for part in parts.selections:
        kept = kept_share(parts, part, batch, state)
        if part.per == "token":
            batch = batch.with_token(selected=kept)
        else:
            batch = batch.replace(count=batch.count * kept)
    return batch, state


def members(parts: Parts, batch: Rollouts, state: State) -> Rollouts:
    """The batch with count 0 in rows outside the policy term."""
    return batch if parts.rows is None else batch.replace(count=batch.count * parts.rows(batch, state))


def kept_share(parts: Parts, part: Filter, batch: Rollouts, state: State) -> Array:
    """[B] or [B, T] what a filter keeps of its members; other rows stay as they are."""
    kept = part.fn(members(parts, batch, state), state)
    if parts.rows is None:
        return kept
    inside = parts.rows(batch, state) > 0
    return jnp.where(inside if kept.ndim == 1 else inside[:, None], kept, 1)


def kept_tokens(parts: Parts, batch: Rollouts, state: State) -> Array:
    """[B, T] shares of tokens in the denominators of the policy term."""
    kept = promote(batch.mask > 0)
    for tokens in parts.leave_tokens:
        kept = kept * tokens(batch, state)
    return kept


def _selected(batch: Rollouts, state: State) -> Array:
    return batch.per_token["selected"]


# ---- in the pass --------------------------------------------------------------------------------------------------


def arguments(parts: Parts, stats: TokenStats, batch: Rollouts, state: State) -> tuple[Any, ...]:
    """The arguments of the surrogate: log-ratio and advantage of one shape, statistics, batch, state."""
    log_ratio, adv = parts.ratio.fn(stats, batch), batch.adv
    if parts.rows is not None:  # what others wrote may hold anything as ``logp_old``
        inside = parts.rows(batch, state) > 0
        log_ratio = jnp.where(per_token(inside) if log_ratio.ndim == 2 else inside, log_ratio, 0)
    if parts.advantage.current:
        adv = lax.stop_gradient(parts.advantage.current(adv, stats, batch, state))
    adv = per_token(adv) if log_ratio.ndim == 2 else adv
    if adv.ndim != log_ratio.ndim:
        raise ValueError(
            "a ratio per sequence needs an advantage per row [B]; this advantage gives one per token [B, T]"
        )
    return log_ratio, jnp.broadcast_to(adv, log_ratio.shape), stats, batch, state


def policy_value(parts: Parts, stats: TokenStats, batch: Rollouts, state: State) -> Array:
    """The surrogate, times the corrections."""
    return corrected(parts, parts.surrogate.fn(*arguments(parts, stats, batch, state)), batch, state)


def corrected(parts: Parts, x: Array, batch: Rollouts, state: State) -> Array:
    """``x`` times the factors of the corrections."""
    for part in parts.corrections:
        factor = lax.stop_gradient(part.fn(batch, state))
        x = x * (per_token(factor) if x.ndim == 2 else factor)
    return x


def term_metrics(parts: Parts, stats: TokenStats, batch: Rollouts, state: State) -> Metrics:
    """How many tokens (or rows) of the policy term are clipped, and its unclipped surrogate."""
    rows, on = promote(members(parts, batch, state).count), promote(batch.mask)
    weight = on * rows[:, None] * sampled_tokens(batch)
    if parts.ratio.per == "row":
        weight = rows * sampled(batch) * (on.sum(-1) > 0)
    of_surrogate = arguments(parts, stats, batch, state)
    clipped = parts.surrogate.clipped
    return {
        "ratio/clip_frac": Mean.of(clipped(*of_surrogate) if clipped else jnp.zeros_like(weight), weight),
        # The losses of detached weights mean nothing; this can be compared.
        "surrogate": Mean.of(jnp.exp(of_surrogate[0]) * of_surrogate[1], weight),
    }


def surrogate_kernel(dtype: Any) -> Callable[..., Any] | None:
    """`jaxpo.kernels.policy_surrogate`, where it has a form of its own for this platform; None = the compiler fuses the
    composed primitives just as well."""
    return None if best(dtype) == "xla" else policy_surrogate


def one_pass(parts: Parts, stats: TokenStats, batch: Rollouts, state: State) -> tuple[dict[str, Array], Metrics]:
    """The policy term, a KL term and their metrics from one kernel, where it has them all; otherwise nothing."""
    run = surrogate_kernel(stats.logp.dtype)
    if run is None or parts.rows is not None or not (parts.ratio.kernel and parts.surrogate.kernel):
        return {}, {}
    adv = arguments(parts, stats, batch, state)[1]
    count = promote(batch.mask) * promote(batch.count)[:, None] * sampled_tokens(batch)
    weight = corrected(parts, batch.weights["policy"], batch, state)
    penalty = next((p for _, p in parts.regularizers if p.kernel), None)
    options = {**parts.ratio.kernel(batch), **parts.surrogate.kernel(batch)}
    if penalty:
        options |= {**penalty.kernel(batch), "kl_weight": batch.weights[penalty.name]}
    sums = run(stats.logp, batch.logp_old, adv, weight, count, **options)
    terms = {"policy": sums.policy} | ({penalty.name: sums.kl} if penalty else {})
    means = {"ratio/clip_frac": sums.clipped, "surrogate": sums.surrogate, "kl/old_k3": sums.kl_old}
    means |= {"kl/ref_k3": sums.kl_ref} if penalty else {}
    return terms, {name: Mean(x, sums.tokens) for name, x in means.items()}


# ---- what goes together -------------------------------------------------------------------------------------------


def made_of(parts: Parts, aggregate: aggregation.Aggregation) -> dict[str, tuple[str, ...]]:
    """Names of the parts by kind."""
    return dict(
        advantage=(parts.advantage.id,),
        ratio=(parts.ratio.id,) if parts.surrogate.uses_ratio else (),
        surrogate=(parts.surrogate.id,),
        regularizer=tuple(p.id for _, p in parts.regularizers),
        aggregation=(aggregate.__name__,),
        filter=tuple(p.id for p in [*parts.filters, *parts.selections]),
        reward=tuple(p.id for p in parts.shaping),
        correction=tuple(p.id for p in parts.corrections),
    )


def check_parts(parts: Parts) -> None:
    """Raise ``ValueError`` for parts that mean nothing together, with the reason."""
    ratio, advantage, surrogate = parts.ratio, parts.advantage, parts.surrogate
    if ratio.per == "row":
        whole = f"the ratio {ratio.id or 'given'} has one value a row"
        if advantage.per == "token":
            raise ValueError(f"{whole}, and the advantage {advantage.id} one a token: take the ratio sequence_token")
        if surrogate.per == "token":
            raise ValueError(
                f"{whole}, and the surrogate {surrogate.id} works on tokens: take the ratio sequence_token"
            )
        if parts.leave_tokens:
            raise ValueError(f"{whole}, so no token can be left out of it: take the ratio sequence_token")
        for part in parts.corrections:
            if part.per == "token":
                raise ValueError(f"{whole}, and the correction {part.id} one a token: take level sequence or geometric")
    elif surrogate.per == "row":
        raise ValueError(f"the surrogate {surrogate.id} is one number a row: take the ratio sequence_sum")
    if surrogate.requires and surrogate.requires not in [p.id for _, p in parts.regularizers]:
        raise ValueError(
            f"the surrogate {surrogate.id} spares the tokens that the regularizer {surrogate.requires} picks: add it"
        )
