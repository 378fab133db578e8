"""What an objective is (`Objective`), how data is gathered for it (`Protocol`), and how one is composed of terms.

A loss is ``sum_k coef_k sum(weight_k * value_k)``: ``weigh`` fixes every weight once on the whole optimizer batch,
``loss`` only multiplies and adds. Losses of any split into slices therefore add up to the loss, exactly, whatever the
aggregation."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from jaxpo.batch import Rollouts, TokenStats, complete
from jaxpo.fields import SHARES, role_id
from jaxpo.metrics import Max, Mean, Metrics, Moments, Sum
from jaxpo.primitives import aggregation, ratios, regularizers
from jaxpo.primitives.numerics import promote, ratio_or_zero

Policy = Callable[[Rollouts], TokenStats]
Statistic = Callable[[Array, Array], Array]  # (logits [N, V] at the policy's temperature, tokens [N]) -> [N]
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
    """What an objective, a term or a part asks for.

    needs: fields that the batch must have.
    wants: statistics of the policy under gradient.
    peeks: statistics of the current policy on the whole optimizer batch, without gradient, for ``weigh``.
    derived: statistics that the policy computes from its logits slice by slice, by name; ``wants``, ``peeks`` or (of
      the old policy, as ``logp_<name>``) ``needs`` may name them: nothing of the size of the vocabulary is ever stored.
    rewards: the range in which rewards must lie; None = any number.
    """

    needs: frozenset[str] = frozenset()
    wants: frozenset[str] = frozenset()
    peeks: frozenset[str] = frozenset()
    derived: Mapping[str, Statistic] = NONE
    rewards: tuple[float, float] | None = None


class Unit(NamedTuple):
    """Rows that belong together.

    layout: roles of the consecutive rows of a unit; () = a row is a unit.
    coupling: what one call of ``loss`` must see together: a "row" (a unit), or a whole "group".
    """

    layout: tuple[str, ...] = ()
    coupling: Literal["row", "group"] = "row"


class Gathering(NamedTuple):
    """How an objective's data is gathered: a registered protocol, and those of its options that the objective sets."""

    name: str = "on_policy"
    options: Mapping[str, Any] = NONE


class Objective(NamedTuple):
    """What is minimized: pure, jittable, vmappable functions.

    init: () -> the state at the start.
    prepare: (batch, state) -> (batch, state), once per rollout batch, without gradient.
    weigh: (batch, state, peek) -> batch, once per optimizer batch, without gradient: fixes every weight.
    loss: (policy, batch, state) -> (loss, metrics) of a slice; slices add up.
    update: (state, batch, metrics) -> state, after each optimizer step.
    asks: fields and statistics.
    unit: rows that belong together.
    protocol: how its data is gathered.
    made_of: its parts by kind, where it is composed of parts.
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


class Term(NamedTuple):
    """One summand of a loss.

    value: (stats, batch, state) -> [B, T], or [B] when ``per`` is "row". Never multiplied by mask or count: the
      weight holds them.
    aggregate: (mask, count, batch) -> weight; see `jaxpo.primitives.aggregation`.
    rows: (batch, state) -> [B], tokens: (batch, state) -> [B, T]: what counts in this term's denominators besides
      mask and count.
    coef: number, traced scalar or function of the state; multiplies in ``loss``, never inside the weight.
    outer: set by `linearized`."""

    name: str
    value: Callable[[TokenStats, Rollouts, State], Array]
    aggregate: aggregation.Aggregation = aggregation.token_mean
    rows: Callable[[Rollouts, State], Array] | None = None
    tokens: Callable[[Rollouts, State], Array] | None = None
    coef: float | Array | Callable[[State], Array] = 1.0
    per: Literal["token", "row"] = "token"
    outer: Callable[[Array], Array] | None = None


def is_off(coef: Any) -> bool:
    """A Python 0 removes its term (and what the term needs); a traced 0 does not."""
    return isinstance(coef, int | float) and coef == 0


def linearized(term: Term, f: Callable[[Array], Array]) -> Term:
    """The term ``f(S)`` of a batch mean ``S = sum(weight * value)``, e.g. a square root or a distance to a target.

    ``S`` is peeked at before the pass (detached); then ``(f(S_peek) - f'(S_peek) S_peek) / sum(weight) + f'(S_peek)
    value`` per token has the exact value and gradient of ``f(S)`` and still is a sum over slices, whatever the
    aggregation and however many rows are empty."""
    return term._replace(outer=f)


def from_terms(
    terms: Sequence[Term],
    *,
    prepare: Callable[[Rollouts, State], tuple[Rollouts, State]] | None = None,
    weigh: Callable[[Rollouts, State, TokenStats | None], Rollouts] | None = None,
    update: Callable[[State, Rollouts, Metrics], State] | None = None,
    metrics: Callable[[TokenStats, Rollouts, State], Metrics] | None = None,
    one_pass: Callable[[TokenStats, Rollouts, State], tuple[Mapping[str, Array], Metrics]] | None = None,
    memory: Any = None,
    needs: Sequence[str] = (),
    wants: Sequence[str] = ("logp",),
    peeks: Sequence[str] = (),
    coupling: Literal["row", "group"] = "row",
    layout: tuple[str, ...] = (),
    protocol: str = "on_policy",
    protocol_options: Mapping[str, Any] = NONE,
    derived: Mapping[str, Statistic] = NONE,
    rewards: tuple[float, float] | None = None,
    slots: Mapping[str, tuple[str, ...]] = NONE,
) -> Objective:
    """Derive an `Objective` from its terms.

    Args:
      terms: the summands; those whose ``coef`` is a Python 0 are dropped.
      prepare, weigh, update, metrics: hooks that run before the derived ones (``weigh`` before the weights are
        computed).
      one_pass: (stats, batch, state) -> (term -> ``sum(weight * value)``, metrics) of the terms, perhaps none, that a
        kernel computes together; the same as those terms and metrics say.
      memory: initial ``State.memory``.
      needs, wants, peeks, coupling, layout, protocol, protocol_options, derived, rewards, slots: as in `Objective`.

    Raises:
      ValueError: no terms, two of one name, or a value per row with an aggregation over tokens.
    """
    terms = [t for t in terms if not is_off(t.coef)]
    if not terms:
        raise ValueError("an objective needs at least one term whose coefficient is not 0")
    if len({t.name for t in terms}) < len(terms):
        raise ValueError(f"two terms of one name in {[t.name for t in terms]}")
    for t in terms:
        if t.per == "row" and t.aggregate not in aggregation.PER_ROW:
            raise ValueError(
                f"term {t.name!r} has one value a row, so aggregate must be seq_mean, group_mean or unit_mean: "
                "a mean over tokens would weigh rows by a length the value does not have"
            )
    if any(t.outer for t in terms):
        peeks = (*peeks, "logp")

    def init() -> State:
        return State(jnp.asarray(-1, jnp.int32), jnp.asarray(0, jnp.int32), {} if memory is None else memory)

    def prepare_batch(batch: Rollouts, state: State) -> tuple[Rollouts, State]:
        for name in sorted(frozenset(needs)):  # before `complete`, which would fill in some of them
            batch.get(name)
        check_rewards(rewards, batch)
        for name in sorted(SHARES.intersection(needs)):
            check_range(name, batch.get(name), (0, 1), batch, "it is a probability or a label")
        batch, state = complete(batch), state.replace(iteration=state.iteration + 1)
        if layout and batch.layout != layout:
            raise ValueError(f"Rollouts.layout is {batch.layout}; this objective needs units of rows {layout}")
        return lax.stop_gradient(prepare(batch, state) if prepare else (batch, state))

    def weigh_batch(batch: Rollouts, state: State, peek: TokenStats | None) -> Rollouts:
        if peeks and peek is None:
            raise ValueError(
                f"this objective peeks at {sorted(set(peeks))} of the current policy before its weights are fixed"
            )
        clean = batch
        if peek is not None:
            peek, clean = _sanitise(peek, batch)
        batch = weigh(clean, state, peek) if weigh else batch
        weights = {t.name: _weight(t, batch, state) for t in terms}
        for t in terms:
            if t.outer:
                center = _weighted_sum(t.value(peek, clean, state), weights[t.name])
                weights[f"{t.name}/center"] = jnp.full(batch.rows, center)
                weights[f"{t.name}/total"] = jnp.full(batch.rows, weights[t.name].sum())
        return lax.stop_gradient(batch.replace(weights={**batch.weights, **weights}))

    def loss(policy: Policy, batch: Rollouts, state: State) -> tuple[Array, Metrics]:
        stats, batch = _sanitise(policy(batch), lax.stop_gradient(batch))
        total, parts = jnp.zeros((), stats.logp.dtype), {}
        known, means = one_pass(stats, batch, state) if one_pass else ({}, {})
        for t in terms:
            part = known.get(t.name)
            if part is None:
                part = _weighted_sum(_value(t, stats, batch, state), batch.weights[t.name])
            total = total + (t.coef(state) if callable(t.coef) else t.coef) * part
            parts[f"loss/{t.name}"] = Sum(lax.stop_gradient(part))
        extra = metrics(stats, batch, state) if metrics else {}
        report = {"loss": Sum(total), **parts, **standard_metrics(stats, batch), **extra, **means}
        return total, lax.stop_gradient(report)

    def step(state: State, batch: Rollouts, report: Metrics) -> State:
        state = state.replace(step=state.step + 1)
        return update(state, batch, report) if update else state

    return Objective(
        init=init,
        prepare=prepare_batch,
        weigh=weigh_batch,
        loss=loss,
        update=step,
        asks=Asks(frozenset(needs), frozenset(wants) | {"logp"}, frozenset(peeks), derived, rewards),
        unit=Unit(layout, coupling),
        protocol=Gathering(protocol, protocol_options),
        made_of=slots,
    )


def check_rewards(allowed: tuple[float, float] | None, batch: Rollouts) -> None:
    """Raise ``ValueError`` for a reward outside the range that an objective is defined for. Traced rewards pass: the
    training loop looks at them before."""
    why = "the range this objective is defined for: scale the rewards, or say the range if the objective takes one"
    for reward in (batch.reward, batch.per_row.get("rewards_multi")):
        if allowed is not None and reward is not None:
            check_range("reward", reward, allowed, batch, why)


def check_range(name: str, x: Array, allowed: tuple[float, float], batch: Rollouts, why: str) -> None:
    """Raise ``ValueError`` naming a number of a counted row that is outside a range; traced arrays pass."""
    if isinstance(x, jax.core.Tracer):
        return
    low, high = allowed
    counted = np.ones(x.shape[0], bool) if batch.count is None else np.asarray(batch.count) > 0
    bad = (lambda x: x[~((x >= low) & (x <= high))])(np.asarray(x)[counted])
    if bad.size:
        raise ValueError(f"a {name} of {bad[0]:g} is outside [{low:g}, {high:g}], {why}")


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


def _sanitise(stats: TokenStats, batch: Rollouts) -> tuple[TokenStats, Rollouts]:
    """Float32 (at least), and 0 at masked positions and in rows that do not count, before any exp. Without
    ``logp_old`` the policy is the one that is compared with."""
    counts = (batch.mask > 0) & (batch.count > 0)[:, None]

    def clean(x: Array | None) -> Array | None:
        return None if x is None else jnp.where(counts, promote(x), 0)

    def clean_row(x: Array | None) -> Array | None:
        return None if x is None else jnp.where((batch.count > 0).reshape(-1, *[1] * (x.ndim - 1)), promote(x), 0)

    stats = stats.replace(
        **{f: clean(getattr(stats, f)) for f in ("logp", "entropy", "value")},
        **{f: clean_row(getattr(stats, f)) for f in ("score", "embed", "gate")},
        derived={name: clean(x) for name, x in stats.derived.items()},
    )
    old = clean(batch.logp_old) if batch.logp_old is not None else lax.stop_gradient(stats.logp)
    batch = batch.replace(
        logp_old=old,
        logp_beh=clean(batch.logp_beh),
        entropy_old=clean(batch.entropy_old),
        value_old=clean(batch.value_old),
        per_token={
            k: clean(x) if k.startswith("logp_") and k != "logp_sampler" else x for k, x in batch.per_token.items()
        },
    )
    return stats, batch


def per_token(x: Array) -> Array:
    """[B] -> [B, 1], so that it broadcasts over tokens; [B, T] as it is."""
    return x[:, None] if x.ndim == 1 else x


def standard_metrics(stats: TokenStats, batch: Rollouts) -> dict[str, Any]:
    """The metrics every objective reports under the same names (inputs sanitised).

    Of units of compared answers there is no ``kl``: the estimate is one for samples of the policy alone, and on given
    answers explodes; how far these have moved is ``drift``."""
    count = promote(batch.count)
    tokens = promote(batch.mask) * count[:, None]
    log_ratio = ratios.token_log_ratio(stats.logp, batch.logp_old, batch.mask)
    out: dict[str, Any] = {
        "ratio/mean": Mean.of(jnp.exp(log_ratio), tokens),
        "ratio/max": Max.of(jnp.exp(log_ratio), tokens),
        "length/mean": Mean.of(batch.lengths, count),
        "tokens": Sum(tokens.sum()),
    }
    if stats.entropy is not None:
        out["entropy"] = Mean.of(stats.entropy, tokens)
    if not batch.layout:
        past = {"old": batch.logp_old, "ref": batch.per_token.get("logp_ref")}
        kl = {k: regularizers.kl_estimate(stats.logp, x, "k3") for k, x in past.items() if x is not None}
        out |= {f"kl/{k}_k3": Mean.of(x, tokens) for k, x in kl.items()}
    if batch.reward is not None:
        out["reward"] = Moments.of(batch.reward, count)
    if batch.adv is not None:
        out["adv"] = Moments.of(jnp.broadcast_to(per_token(batch.adv), tokens.shape), tokens)
    if batch.truncated is not None:
        out["length/truncated_frac"] = Mean.of(batch.truncated, count)
    sampler = batch.per_token.get("logp_sampler", batch.logp_beh)
    if sampler is not None:  # ``logp_old`` is the trainer's word on the same tokens under the same parameters
        own = tokens * (batch.role == role_id("own"))[:, None]
        out["mismatch/logp_abs_max"] = Max.of(
            jnp.abs(batch.logp_old - jnp.where(batch.mask > 0, promote(sampler), 0)), own
        )
    if "degenerate" in batch.per_row:
        out["group/degenerate_frac"] = Mean.of(batch.per_row["degenerate"], count)
    return out


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
