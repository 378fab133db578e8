"""How published policy gradients are put together: interchangeable parts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.kernels.policy_surrogate.api import best, policy_surrogate
from jaxpo.metrics import Mean, Metrics
from jaxpo.objectives.grammar.base import Objective, State, Term, from_terms, is_off, per_token
from jaxpo.objectives.grammar.parts import Part
from jaxpo.primitives import aggregation, grouping
from jaxpo.primitives.numerics import promote


def policy_gradient(
    *,
    advantage: Part,
    surrogate: Part,
    ratio: Part,
    aggregate: aggregation.Aggregation,
    regularizers: Sequence[tuple[Any, Part]] = (),
    filters: Sequence[Part] = (),
    shaping: Sequence[Part] = (),
    corrections: Sequence[Part] = (),
    scale: float | Array = 1.0,
    needs: Sequence[str] = (),
    **options: Any,
) -> Objective:
    """Compose a policy-gradient objective: *advantage x ratio x surrogate x regularizers x aggregation*.

    Args:
      advantage: ``fn(batch, state) -> [B] or [B, T]``.
      surrogate: ``fn(log_ratio, adv, stats, batch, state) -> value``; ``clipped`` of the same arguments says which
        tokens are cut.
      ratio: ``fn(stats, batch) -> log-ratio`` [B, T], or [B] when ``per`` is "row".
      aggregate: weights of the policy term, and of regularizers that do not bring their own.
      regularizers: pairs (coefficient, part with ``fn(stats, batch, state) -> [B, T]``); a Python 0 removes its
        term and its needs.
      filters: ``fn(batch, state) -> [B]`` share of each row to keep (0 leaves every denominator). They see the
        unshaped reward; those with ``sees_advantage`` come after the advantage, which is not computed anew, and give
        shares of tokens [B, T], which leave the policy term's denominator, if ``per`` is "token".
      shaping: ``fn(batch, state) -> reward`` [B], applied in turn after the filters.
      corrections: ``fn(batch, state) -> [B, T] or [B]`` constant factors of the policy term, for the gap between the
        sampler and ``logp_old``; their ``tokens`` leave the denominator.
      scale: factor of the policy term. needs: fields besides those of the parts.
      options: passed on to `from_terms`.

    Raises:
      ValueError: parts that do not go together, with the reason."""
    regularizers = [(coef, part) for coef, part in regularizers if not is_off(coef)]
    parts = [advantage, surrogate, ratio, *filters, *shaping, *corrections, *[p for _, p in regularizers]]
    hooks = {name: [f for p in parts if (f := getattr(p, name))] for name in ("prepare", "weigh", "tokens", "metrics")}
    updates = [p.update for p in parts if p.update]
    selections = [p for p in filters if p.sees_advantage]
    filters = [p for p in filters if not p.sees_advantage]
    if any(p.per == "token" for p in selections):
        hooks["tokens"].append(lambda batch, state: batch.per_token["selected"])
    per_row = ratio.per == "row"
    _check_parts(advantage, ratio, surrogate, corrections, regularizers, bool(hooks["tokens"]))

    def prepare(batch: Rollouts, state: State) -> tuple[Rollouts, State]:
        if batch.reward is not None:
            degenerate = grouping.group_constant(batch.reward, batch.group, batch.count)
            batch = batch.with_row(degenerate=promote(degenerate))
        for keep in filters:
            batch = batch.replace(count=batch.count * keep.fn(batch, state))
        for shape in shaping:
            batch = batch.replace(reward=shape.fn(batch, state))
        for write in hooks["prepare"]:
            batch = write(batch, state)
        adv = promote(advantage.fn(batch, state))
        counts = batch.count > 0 if adv.ndim == 1 else (batch.mask > 0) & (batch.count > 0)[:, None]
        batch = batch.replace(adv=jnp.where(counts, adv, 0))
        for select in selections:
            kept = select.fn(batch, state)
            if select.per == "token":
                batch = batch.with_token(selected=kept)
            else:
                batch = batch.replace(count=batch.count * kept)
        return batch, state

    def weigh(batch: Rollouts, state: State, peek: TokenStats | None) -> Rollouts:
        for write in hooks["weigh"]:
            batch = write(batch, state, peek)
        return batch

    def arguments(stats: TokenStats, batch: Rollouts, state: State) -> tuple[Any, ...]:
        log_ratio, adv = ratio.fn(stats, batch), batch.adv
        if advantage.current:
            adv = lax.stop_gradient(advantage.current(adv, stats, batch, state))
        adv = per_token(adv) if log_ratio.ndim == 2 else adv
        if adv.ndim != log_ratio.ndim:
            raise ValueError(
                "a ratio per sequence needs an advantage per row [B]; this advantage gives one per token [B, T]"
            )
        return log_ratio, jnp.broadcast_to(adv, log_ratio.shape), stats, batch, state

    def value(stats: TokenStats, batch: Rollouts, state: State) -> Array:
        return corrected(surrogate.fn(*arguments(stats, batch, state)), batch, state)

    def corrected(x: Array, batch: Rollouts, state: State) -> Array:
        for correct in corrections:
            factor = lax.stop_gradient(correct.fn(batch, state))
            x = x * (per_token(factor) if x.ndim == 2 else factor)
        return x

    def one_pass(stats: TokenStats, batch: Rollouts, state: State) -> tuple[dict[str, Array], Metrics]:
        run = surrogate_kernel(stats.logp.dtype)
        if run is None or not (ratio.kernel and surrogate.kernel):
            return {}, {}
        adv, count = arguments(stats, batch, state)[1], promote(batch.mask) * promote(batch.count)[:, None]
        weight = corrected(batch.weights["policy"], batch, state)
        penalty = next((p for _, p in regularizers if p.kernel), None)
        options = {**ratio.kernel(batch), **surrogate.kernel(batch)}
        if penalty:
            options |= {**penalty.kernel(batch), "kl_weight": batch.weights[penalty.name]}
        sums = run(stats.logp, batch.logp_old, adv, weight, count, **options)
        terms = {"policy": sums.policy} | ({penalty.name: sums.kl} if penalty else {})
        means = {"ratio/clip_frac": sums.clipped, "surrogate": sums.surrogate, "kl/old_k3": sums.kl_old}
        means |= {"kl/ref_k3": sums.kl_ref} if penalty else {}
        return terms, {name: Mean(x, sums.tokens) for name, x in means.items()}

    def kept_tokens(batch: Rollouts, state: State) -> Array:
        kept = promote(batch.mask > 0)
        for tokens in hooks["tokens"]:
            kept = kept * tokens(batch, state)
        return kept

    def metrics(stats: TokenStats, batch: Rollouts, state: State) -> Metrics:
        count, weight = promote(batch.count), promote(batch.mask)
        weight = count * (weight.sum(-1) > 0) if per_row else weight * count[:, None]
        log_ratio, adv, *rest = arguments(stats, batch, state)
        cut = surrogate.clipped(log_ratio, adv, *rest) if surrogate.clipped else jnp.zeros_like(weight)
        out = {
            "ratio/clip_frac": Mean.of(cut, weight),
            "surrogate": Mean.of(jnp.exp(log_ratio) * adv, weight),  # the losses of detached weights mean nothing
        }
        for report in hooks["metrics"]:
            out |= report(stats, batch, state)
        return out

    def update(state: State, batch: Rollouts, report: Metrics) -> State:
        for move in updates:
            state = move(state, batch, report)
        return state

    terms = [
        Term(
            "policy",
            value,
            aggregate,
            tokens=kept_tokens if hooks["tokens"] else None,
            coef=scale,
            per="row" if per_row else "token",
        )
    ]
    terms += [
        Term(p.name, p.fn, p.aggregate or aggregate, coef=coef, per=p.per or "token", outer=p.outer)
        for coef, p in regularizers
    ]
    ranges = {p.rewards for p in parts if p.rewards}
    return from_terms(
        terms,
        prepare=prepare,
        weigh=weigh if hooks["weigh"] else None,
        update=update if updates else None,
        metrics=metrics,
        one_pass=one_pass,
        memory={name: x for p in parts for name, x in p.memory.items()},
        needs=frozenset(needs).union(*[p.needs for p in parts]),
        wants=frozenset({"logp"}).union(*[p.wants for p in parts]),
        peeks=frozenset().union(*[p.peeks for p in parts]),
        derived={name: f for p in parts for name, f in p.derived.items()},
        rewards=(max(r[0] for r in ranges), min(r[1] for r in ranges)) if ranges else None,
        slots=dict(
            advantage=(advantage.id,),
            ratio=(ratio.id,) if surrogate.uses_ratio else (),
            surrogate=(surrogate.id,),
            regularizer=tuple(p.id for _, p in regularizers),
            aggregation=(aggregate.__name__,),
            filter=tuple(p.id for p in [*filters, *selections]),
            reward=tuple(p.id for p in shaping),
            correction=tuple(p.id for p in corrections),
        ),
        **options,
    )


def surrogate_kernel(dtype: Any) -> Callable[..., Any] | None:
    """`jaxpo.kernels.policy_surrogate`, where it has a form of its own for this platform; None = the compiler fuses the
    composed primitives just as well."""
    return None if best(dtype) == "xla" else policy_surrogate


def _check_parts(
    advantage: Part,
    ratio: Part,
    surrogate: Part,
    corrections: Sequence[Part],
    regularizers: Sequence[tuple[Any, Part]],
    leaves_tokens: bool,
) -> None:
    """Raise ``ValueError`` for parts that mean nothing together, with the reason."""
    if ratio.per == "row":
        whole = f"the ratio {ratio.id or 'given'} has one value a row"
        if advantage.per == "token":
            raise ValueError(f"{whole}, and the advantage {advantage.id} one a token: take the ratio sequence_token")
        if surrogate.per == "token":
            raise ValueError(
                f"{whole}, and the surrogate {surrogate.id} works on tokens: take the ratio sequence_token"
            )
        if leaves_tokens:
            raise ValueError(f"{whole}, so no token can be left out of it: take the ratio sequence_token")
        for part in corrections:
            if part.per == "token":
                raise ValueError(f"{whole}, and the correction {part.id} one a token: take level sequence or geometric")
    elif surrogate.per == "row":
        raise ValueError(f"the surrogate {surrogate.id} is one number a row: take the ratio sequence_sum")
    if surrogate.requires and surrogate.requires not in [p.id for _, p in regularizers]:
        raise ValueError(
            f"the surrogate {surrogate.id} spares the tokens that the regularizer {surrogate.requires} picks: add it"
        )
