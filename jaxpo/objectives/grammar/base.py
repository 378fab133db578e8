"""Defines `Objective`, and composes one of terms (`from_terms`).

A loss is ``sum_k coef_k sum(weight_k * value_k)``: ``weigh`` fixes every weight once on the whole optimizer batch,
``loss`` only multiplies and adds. Losses of any split into slices therefore add up to the loss, exactly, whatever the
aggregation."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jaxpo.batch import Rollouts, Statistic, TokenStats, complete, validate_stats
from jaxpo.fields import role_id
from jaxpo.metrics import Metrics, Sum
from jaxpo.objectives.grammar.checks import check_numbers, check_prepared, check_rewards, marked, marked_after
from jaxpo.objectives.grammar.standard_metrics import per_token, standard_metrics
from jaxpo.primitives import aggregation
from jaxpo.primitives.numerics import promote, ratio_or_zero

__all__ = ["check_rewards", "per_token", "standard_metrics"]  # besides what is defined here

Policy = Callable[[Rollouts], TokenStats]
NONE: Mapping[str, Any] = MappingProxyType({})


@struct.dataclass
class State:
    """An objective's memory: a clock, and whatever else it has to remember (a pytree, checkpointed).

    iteration: index of the current rollout batch (-1 before the first ``prepare``). step: optimizer steps taken.
    """

    iteration: Array
    step: Array
    memory: Any = struct.field(default_factory=dict)


class Asks(NamedTuple):
    """Data that an objective, a term or a part asks for.

    needs: fields that the batch must have.
    wants: statistics of the policy under gradient.
    peeks: statistics of the current policy on the whole optimizer batch, without gradient, for ``weigh``.
    derived: statistics that the policy computes from its logits slice by slice, by name; ``wants``, ``peeks`` or (of
      the old policy, as ``logp_<name>``) ``needs`` may name them: nothing of the size of the vocabulary is ever stored.
      A `jaxpo.batch.Compared` also reads the logits of another model.
    rewards: the range in which rewards must lie; None = any number.
    responses: answers to a prompt that it compares, at least; with fewer it learns nothing.
    """

    needs: frozenset[str] = frozenset()
    wants: frozenset[str] = frozenset()
    peeks: frozenset[str] = frozenset()
    derived: Mapping[str, Statistic] = NONE
    rewards: tuple[float, float] | None = None
    responses: int = 1

    def merged(self, *others: "Asks") -> "Asks":
        """Everything that these ask for together; rewards must lie in all of their ranges.

        Raises:
          ValueError: two different statistics have one name, or no reward lies in all ranges."""
        asks = [self, *others]
        ranges = [a.rewards for a in asks if a.rewards is not None]
        rewards = (max(low for low, _ in ranges), min(high for _, high in ranges)) if ranges else None
        if rewards is not None and not rewards[0] < rewards[1]:
            raise ValueError(f"no reward lies in all of the ranges {', '.join(map(str, ranges))}")
        return Asks(
            *(frozenset().union(*[getattr(a, name) for a in asks]) for name in ("needs", "wants", "peeks")),
            derived=_joined("Asks.derived", [a.derived for a in asks]),
            rewards=rewards,
            responses=max(a.responses for a in asks),
        )


def asks_of(*needs: str, wants: tuple[str, ...] = (), peeks: tuple[str, ...] = (), **more: Any) -> Asks:
    """`Asks` by names of fields: ``asks_of("reward", "group", wants=("entropy",))``."""
    return Asks(frozenset(needs), frozenset(wants), frozenset(peeks), **more)


class Hooks(NamedTuple):
    """Functions that an objective, a term or a part runs beside its value.

    memory: its entries of ``State.memory`` at the start.
    prepare: (batch, state) -> (batch, state), once per rollout batch.
    weigh: (batch, state, peek) -> batch, once per optimizer batch, before the weights are fixed: bounds, selections.
    update: (state, batch, metrics) -> state, after each optimizer step.
    metrics: (stats, batch, state) -> what it reports of a slice.
    """

    memory: Mapping[str, Any] = NONE
    prepare: Callable[[Rollouts, State], tuple[Rollouts, State]] | None = None
    weigh: Callable[[Rollouts, State, TokenStats | None], Rollouts] | None = None
    update: Callable[[State, Rollouts, Metrics], State] | None = None
    metrics: Callable[[TokenStats, Rollouts, State], Metrics] | None = None

    def merged(self, *others: "Hooks") -> "Hooks":
        """These hooks, one after the other.

        Raises:
          ValueError: two of them keep something else under one name in ``State.memory``."""
        hooks = [self, *others]
        steps = {name: [f for h in hooks if (f := getattr(h, name)) is not None] for name in Hooks._fields[1:]}
        chains = dict(prepare=_prepared, weigh=_weighed, update=_updated, metrics=_reported)
        return Hooks(
            _joined("Hooks.memory", [h.memory for h in hooks]),
            **{n: fs[0] if len(fs) == 1 else partial(chains[n], fs) for n, fs in steps.items() if fs},
        )


def _joined(what: str, tables: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    joined: dict[str, Any] = {}
    for table in tables:
        for name, x in table.items():
            if joined.setdefault(name, x) is not x:
                raise ValueError(f"two parts have different things under the name {name!r} ({what})")
    return joined or NONE


def _prepared(steps: Sequence[Callable], batch: Rollouts, state: State) -> tuple[Rollouts, State]:
    for step in steps:
        batch, state = step(batch, state)
    return batch, state


def _weighed(steps: Sequence[Callable], batch: Rollouts, state: State, peek: TokenStats | None) -> Rollouts:
    for step in steps:
        batch = step(batch, state, peek)
    return batch


def _updated(steps: Sequence[Callable], state: State, batch: Rollouts, report: Metrics) -> State:
    for step in steps:
        state = step(state, batch, report)
    return state


def _reported(steps: Sequence[Callable], stats: TokenStats, batch: Rollouts, state: State) -> Metrics:
    return {name: x for step in steps for name, x in step(stats, batch, state).items()}


class Unit(NamedTuple):
    """Rows that belong together.

    layout: roles of the consecutive rows of a unit; () = a row is a unit.
    coupling: what one call of ``loss`` must see together: a "row" (a unit), or a whole "group".
    """

    layout: tuple[str, ...] = ()
    coupling: Literal["row", "group"] = "row"


class Gathering(NamedTuple):
    """How an objective's data is gathered.

    name: a registered protocol.
    options: those of its options that the objective sets.
    references: how references move, with their options (`jaxpo.learning.references`), under any protocol that does not
      say otherwise.
    """

    name: str = "on_policy"
    options: Mapping[str, Any] = NONE
    references: Mapping[str, Mapping[str, Any]] = NONE


class Objective(NamedTuple):
    """A loss to minimize, as pure, jittable, vmappable functions.

    init: () -> the state at the start.
    prepare: (batch, state) -> (batch, state), once per rollout batch, without gradient.
    weigh: (batch, state, peek) -> batch, once per optimizer batch, without gradient: fixes every weight.
    loss: (policy, batch, state) -> (loss, metrics) of a slice; slices add up.
    update: (state, batch, metrics) -> state, after each optimizer step.
    asks: fields and statistics.
    unit: rows that belong together.
    protocol: how its data is gathered.
    made_of: its parts by kind, where it is composed of parts.
    trains: for each term (and each array in ``Rollouts.weights``) the label of the parameters that it moves; a term
      that is not named moves the "policy".
    beta: strength of the KL regularization, where a loss of pairs has one: an answer's implied reward is ``beta
      sum_t (logp - logp_ref)``. None = the loss implies no such reward.
    log_odds: (stats of K answers to one prompt) -> [K, K], the log-odds that the answer of a row beats that of a
      column, if the objective trains a model of preferences without scores.
    """

    init: Callable[[], State]
    prepare: Callable[[Rollouts, State], tuple[Rollouts, State]]
    weigh: Callable[[Rollouts, State, TokenStats | None], Rollouts]
    loss: Callable[[Policy, Rollouts, State], tuple[Array, Metrics]]
    update: Callable[[State, Rollouts, Metrics], State]
    asks: Asks = Asks()
    unit: Unit = Unit()
    protocol: Gathering = Gathering()
    made_of: Mapping[str, tuple[str, ...]] = NONE
    trains: Mapping[str, str] = NONE
    beta: float | Array | None = None
    log_odds: Callable[[TokenStats], Array] | None = None


class Term(NamedTuple):
    """One summand of a loss.

    name: of its weight and its metric.
    value: (stats, batch, state) -> [B, T], or [B] when ``per`` is "row". Never multiplied by mask or count: the
      weight holds them.
    aggregate: (mask, count, batch) -> weight; see `jaxpo.primitives.aggregation`.
    rows: (batch, state) -> [B], the rows that count in its denominators, besides mask and count.
    tokens: (batch, state) -> [B, T], the tokens that count in its denominators.
    coef: number, traced scalar or function of the state; multiplies in ``loss``, never inside the weight.
    per: whether it has one value a "token" or a "row".
    outer: set by `linearized`.
    asks: what it needs of the batch and wants of the policy.
    hooks: what it does beside.
    trains: label of the parameters that it moves: "policy", or "critic".
    """

    name: str
    value: Callable[[TokenStats, Rollouts, State], Array]
    aggregate: aggregation.Aggregation = aggregation.token_mean
    rows: Callable[[Rollouts, State], Array] | None = None
    tokens: Callable[[Rollouts, State], Array] | None = None
    coef: float | Array | Callable[[State], Array] = 1.0
    per: Literal["token", "row"] = "token"
    outer: Callable[[Array], Array] | None = None
    asks: Asks = Asks()
    hooks: Hooks = Hooks()
    trains: str = "policy"


NOTHING, NO_HOOKS, SINGLE_ROWS, ON_POLICY = Asks(), Hooks(), Unit(), Gathering()


def is_off(coef: Any) -> bool:
    """A Python 0 removes its term (and what the term asks for); a traced 0 does not."""
    return isinstance(coef, int | float) and coef == 0


def role(*names: str) -> Callable[[Rollouts, State], Array]:
    """(batch, state) -> [B] which rows have one of these roles: ``rows=role("own")``.

    Raises:
      ValueError: a role that does not exist."""
    ids = tuple(role_id(name) for name in names)
    return lambda batch, state: jnp.isin(batch.role, jnp.asarray(ids))


def linearized(term: Term, f: Callable[[Array], Array]) -> Term:
    """The term ``f(S)`` of a batch mean ``S = sum(weight * value)``, e.g. a square root or a distance to a target.

    ``S`` is peeked at before the pass (detached); then ``(f(S_peek) - f'(S_peek) S_peek) / sum(weight) + f'(S_peek)
    value`` per token has the exact value and gradient of ``f(S)`` and still is a sum over slices, whatever the
    aggregation and however many rows are empty."""
    return term._replace(outer=f)


class Plan(NamedTuple):
    """The arguments of `from_terms`, checked and merged."""

    terms: tuple[Term, ...]
    asks: Asks
    hooks: Hooks
    one_pass: Callable[[TokenStats, Rollouts, State], tuple[Mapping[str, Array], Metrics]] | None
    unit: Unit


def from_terms(
    terms: Sequence[Term],
    *,
    asks: Asks = NOTHING,
    hooks: Hooks = NO_HOOKS,
    one_pass: Callable[[TokenStats, Rollouts, State], tuple[Mapping[str, Array], Metrics]] | None = None,
    unit: Unit = SINGLE_ROWS,
    protocol: Gathering = ON_POLICY,
    made_of: Mapping[str, tuple[str, ...]] = NONE,
) -> Objective:
    """Derive an `Objective` from its terms.

    Args:
      terms: the summands; those whose ``coef`` is a Python 0 are dropped.
      asks, hooks: besides those of the terms; the hooks run before those of the terms.
      one_pass: (stats, batch, state) -> (term -> ``sum(weight * value)``, metrics) of the terms, perhaps none, that a
        kernel computes together; the same as those terms and metrics say.
      unit, protocol, made_of: as in `Objective`.

    Raises:
      ValueError: no terms, two of one name, or a value per row with an aggregation over tokens.
    """
    terms = tuple(t for t in terms if not is_off(t.coef))
    _check_terms(terms)
    asks = asks.merged(*[t.asks for t in terms], Asks(wants=frozenset({"logp"})))
    if any(t.outer for t in terms):
        asks = asks.merged(Asks(peeks=frozenset({"logp"})))
    plan = Plan(terms, asks, hooks.merged(*[t.hooks for t in terms]), one_pass, unit)
    return Objective(
        init=partial(_init, plan),
        prepare=partial(_prepare, plan),
        weigh=partial(_weigh, plan),
        loss=partial(_loss, plan),
        update=partial(_update, plan),
        asks=asks,
        unit=unit,
        protocol=protocol,
        made_of=made_of,
        trains={name: t.trains for t in terms for name in _weights_of(t)} if _labels(terms) else NONE,
    )


def _labels(terms: Sequence[Term]) -> bool:
    """Whether some term moves other parameters than the policy's."""
    return any(t.trains != "policy" for t in terms)


def _weights_of(t: Term) -> tuple[str, ...]:
    """Names of the weights that ``weigh`` writes for a term."""
    return (t.name, f"{t.name}/center", f"{t.name}/total") if t.outer else (t.name,)


def _check_terms(terms: Sequence[Term]) -> None:
    if not terms:
        raise ValueError("an objective needs at least one term whose coefficient is not 0")
    if len({t.name for t in terms}) < len(terms):
        raise ValueError(f"two terms of one name in {[t.name for t in terms]}")
    for t in terms:
        if t.per == "row" and not aggregation.is_per_row(t.aggregate):
            raise ValueError(
                f"term {t.name!r} has one value a row, so aggregate must be seq_mean, group_mean or unit_mean: "
                "a mean over tokens would weigh rows by a length the value does not have"
            )


def _init(plan: Plan) -> State:
    return State(jnp.asarray(-1, jnp.int32), jnp.asarray(0, jnp.int32), dict(plan.hooks.memory))


def _prepare(plan: Plan, batch: Rollouts, state: State) -> tuple[Rollouts, State]:
    for name in sorted(plan.asks.needs):  # before `complete`, which would fill in some of them
        batch.get(name)
    check_numbers(plan.asks.needs, plan.asks.rewards, batch)
    batch, state = complete(batch), state.replace(iteration=state.iteration + 1)
    if plan.unit.layout and batch.layout != plan.unit.layout:
        raise ValueError(f"Rollouts.layout is {batch.layout}; this objective needs units of rows {plan.unit.layout}")
    batch = given = marked(batch, plan.asks.needs)
    if plan.hooks.prepare:
        batch, state = plan.hooks.prepare(batch, state)
        batch = marked_after(batch, given)
        check_prepared(batch, given)
    return lax.stop_gradient((batch, state))


def _weigh(plan: Plan, batch: Rollouts, state: State, peek: TokenStats | None) -> Rollouts:
    peeks = plan.asks.peeks
    if peeks and peek is None:
        raise ValueError(f"this objective peeks at {sorted(peeks)} of the current policy before its weights are fixed")
    clean = batch
    if peek is not None:
        peek, clean = _sanitize(validate_stats(peek, batch, peeks), batch)
    batch = plan.hooks.weigh(clean, state, peek) if plan.hooks.weigh else batch
    weights = {t.name: _weight(t, batch, state) for t in plan.terms}
    for t in plan.terms:
        if t.outer:
            center = _weighted_sum(t.value(peek, clean, state), weights[t.name])
            weights[f"{t.name}/center"] = jnp.full(batch.rows, center)
            weights[f"{t.name}/total"] = jnp.full(batch.rows, weights[t.name].sum())
    return lax.stop_gradient(batch.replace(weights={**batch.weights, **weights}))


def _loss(plan: Plan, policy: Policy, batch: Rollouts, state: State) -> tuple[Array, Metrics]:
    stats = validate_stats(policy(batch), batch, plan.asks.wants)
    stats, batch = _sanitize(stats, lax.stop_gradient(batch))
    total, parts = jnp.zeros((), stats.logp.dtype), {}
    known, means = plan.one_pass(stats, batch, state) if plan.one_pass else ({}, {})
    for t in plan.terms:
        part = known.get(t.name)
        if part is None:
            part = _weighted_sum(_value(t, stats, batch, state), batch.weights[t.name])
        total = total + (t.coef(state) if callable(t.coef) else t.coef) * part
        parts[f"loss/{t.name}"] = Sum(lax.stop_gradient(part))
    extra = plan.hooks.metrics(stats, batch, state) if plan.hooks.metrics else {}
    report = {"loss": Sum(total), **parts, **standard_metrics(stats, batch), **extra, **means}
    return total, lax.stop_gradient(report)


def _update(plan: Plan, state: State, batch: Rollouts, report: Metrics) -> State:
    state = state.replace(step=state.step + 1)
    return plan.hooks.update(state, batch, report) if plan.hooks.update else state


def _weight(t: Term, batch: Rollouts, state: State) -> Array:
    """[B, T] weight of a term's tokens, or [B] of its rows."""
    mask = promote(batch.mask)
    if t.tokens is not None:
        mask = mask * t.tokens(batch, state)
    count = promote(batch.count)
    if t.rows is not None:
        count = count * t.rows(batch, state)
    if t.per == "row":  # a row is a sequence of one token: its value; an empty row has none
        return t.aggregate(jnp.any(mask > 0, -1, keepdims=True), count, batch)[:, 0]
    return t.aggregate(mask, count, batch)


def _value(t: Term, stats: TokenStats, batch: Rollouts, state: State) -> Array:
    value = t.value(stats, batch, state)
    weight = batch.weights[t.name]
    if value.shape != weight.shape:
        raise ValueError(
            f"term {t.name!r} gave a value of shape {value.shape} where its weight has {weight.shape}; "
            f"per={t.per!r} asks for {'[B]' if t.per == 'row' else '[B, T]'}"
        )
    if t.outer is None:
        return value
    center, total = (batch.weights[f"{t.name}/{x}"][0].astype(value.dtype) for x in ("center", "total"))
    f, slope = jax.value_and_grad(t.outer)(center)
    return ratio_or_zero(f - slope * center, total) + slope * value


def _weighted_sum(value: Array, weight: Array) -> Array:
    """``sum(weight * value)`` in at least float32, blind to values of weight 0 (0 * inf would be NaN)."""
    value = promote(value)
    return jnp.sum(jnp.where(weight != 0, value, 0) * weight.astype(value.dtype))


def clean(batch: Rollouts, x: Array | None) -> Array | None:
    """``x`` [B, T, ...] in at least float32, and 0 at masked positions and in rows that do not count: they may hold
    anything."""
    if x is None:
        return None
    counts = (batch.mask > 0) & (batch.count > 0)[:, None]
    return jnp.where(counts.reshape(*counts.shape, *[1] * (x.ndim - 2)), promote(x), 0)


def clean_rows(batch: Rollouts, x: Array | None) -> Array | None:
    """``x`` [B, ...] in at least float32, and 0 in rows that do not count."""
    if x is None:
        return None
    return jnp.where((batch.count > 0).reshape(-1, *[1] * (x.ndim - 1)), promote(x), 0)


def _sanitize(stats: TokenStats, batch: Rollouts) -> tuple[TokenStats, Rollouts]:
    """Clean what the policy and the batch say of tokens, before any exp. Without ``logp_old`` the policy is the one
    that is compared with."""
    stats = stats.replace(
        **{f: clean(batch, getattr(stats, f)) for f in ("logp", "entropy", "value")},
        **{f: clean_rows(batch, getattr(stats, f)) for f in ("score", "embed", "gate")},
        derived={name: clean(batch, x) for name, x in stats.derived.items()},
    )
    old = clean(batch, batch.logp_old) if batch.logp_old is not None else lax.stop_gradient(stats.logp)
    batch = batch.replace(
        logp_old=old,
        logp_beh=clean(batch, batch.logp_beh),
        entropy_old=clean(batch, batch.entropy_old),
        value_old=clean(batch, batch.value_old),
        per_token={
            k: clean(batch, x) if k.startswith("logp_") and k != "logp_sampler" else x
            for k, x in batch.per_token.items()
        },
    )
    return stats, batch


def evaluate(
    objective: Objective, policy: Policy, batch: Rollouts, state: State | None = None
) -> tuple[Array, Metrics]:
    """``prepare -> peek -> weigh -> loss`` on one batch: all a notebook needs.

    >>> loss, metrics = evaluate(make("grpo", beta=0), lambda batch: TokenStats(logp=my_logp), batch)

    ``jax.grad`` of it with respect to what the policy closes over is the gradient that the training loop would take.
    """
    batch, state = objective.prepare(batch, objective.init() if state is None else state)
    peek = lax.stop_gradient(policy(batch)) if objective.asks.peeks else None
    return objective.loss(policy, objective.weigh(batch, state, peek), state)
