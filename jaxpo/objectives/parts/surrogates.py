"""Surrogates: ``fn(log_ratio, adv, stats, batch, state) -> value`` of the ratio's shape."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.objectives.grammar.base import State, per_token
from jaxpo.objectives.grammar.parts import Part
from jaxpo.primitives import ratios, selection, surrogates, token_advantages
from jaxpo.primitives.advantages import choice
from jaxpo.primitives.aggregation import positive
from jaxpo.primitives.numerics import promote
from jaxpo.registry import register

PEEK = frozenset({"logp"})


def ranges(eps_low: float, eps_high: float, dual_clip: float | None = None) -> tuple[float, float]:
    """Ratio bounds ``(1 - eps_low, 1 + eps_high)`` of valid clip ranges."""
    positive("eps_low", eps_low), positive("eps_high", eps_high)
    if isinstance(dual_clip, int | float) and dual_clip <= 1:
        raise ValueError(f"dual_clip is a ratio above 1, not {dual_clip}")
    return 1 - eps_low, 1 + eps_high


def tokens_of(b: Rollouts) -> Array:
    """[B, T] multiplicity of every token."""
    return promote(b.mask) * promote(b.count)[:, None]


@register("surrogate", source="PPO, arXiv:1707.06347")
def clipped(eps_low: float = 0.2, eps_high: float = 0.2, dual_clip: float | None = None) -> Part:
    """``-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)``, optionally dual-clipped at ``dual_clip`` for A < 0."""
    low, high = ranges(eps_low, eps_high, dual_clip)
    return Part(
        lambda x, adv, stats, b, s: surrogates.clipped(jnp.exp(x), adv, low, high, dual_clip),
        clipped=lambda x, adv, stats, b, s: surrogates.is_clipped(jnp.exp(x), adv, low, high, dual_clip),
        kernel=clipped_kernel(dual_clip, lambda b: (low, high)),
    )


def clipped_kernel(
    dual_clip: float | None, bounds: Callable[[Rollouts], tuple[Any, Any]]
) -> Callable[[Rollouts], dict[str, Any]] | None:
    """The clipped surrogate as the kernel has it, whose bounds are arrays and whose dual clip is compiled in."""
    if isinstance(dual_clip, Array):
        return None
    return lambda b: dict(zip(("low", "high"), bounds(b), strict=True), form="clipped", dual=dual_clip)


@register("surrogate")
def linear() -> Part:
    """``-r A``, unclipped."""
    return Part(
        lambda x, adv, stats, b, s: surrogates.linear(jnp.exp(x), adv),
        kernel=clipped_kernel(None, lambda b: (0, jnp.inf)),
    )


@register("surrogate", source="Williams 1992")
def log_prob() -> Part:
    """``-A logp`` per token: REINFORCE, without a ratio."""
    return Part(lambda x, adv, stats, b, s: surrogates.log_prob(stats.logp, adv), per="token", uses_ratio=False)


@register("surrogate", source="MiniMax-M1, arXiv:2506.13585")
def cispo(eps_low: float = 1.0, eps_high: float = 4.0) -> Part:
    """``-sg(clip(r, 1 - eps_low, 1 + eps_high)) A logp``: no token loses its gradient. ``eps_high = 4`` caps the
    ratio at 5."""
    low, high = ranges(eps_low, eps_high)
    return Part(
        lambda x, adv, stats, b, s: surrogates.detached_weight(jnp.clip(jnp.exp(x), low, high), adv, stats.logp),
        per="token",
        kernel=lambda b: dict(form="detached", low=low, high=high),
    )


@register("surrogate", source="REC, arXiv:2509.24203")
def rec(
    clip_mode: str = "one-side",
    weight: str = "none",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    ring_low: float = 0.6,
    ring_high: float = 2.0,
    temp: float = 1.0,
) -> Part:
    """``-sg(A w M) logp``: REINFORCE under a binary mask M and a weight w, both constant.

    Args:
      clip_mode: "none", "one-side", "two-side", "ring" (`jaxpo.primitives.surrogates.clip_mask`), or "gspo-one-side":
        the one-side test on the ratio of the row's mean.
      weight: "none", "importance_sampling" (r) or "advantage" (``exp(A / temp)``).
    """
    modes = (*surrogates.CLIP_MODES, "gspo-one-side")
    choice("clip_mode", clip_mode, modes)
    choice("weight", weight, ("none", "importance_sampling", "advantage"))
    unused("ring_low", ring_low, 0.6, clip_mode == "ring", "clip_mode='ring'")
    unused("ring_high", ring_high, 2.0, clip_mode == "ring", "clip_mode='ring'")
    unused("temp", temp, 1.0, weight == "advantage", "weight='advantage'")
    for name, eps in (("eps_low", eps_low), ("eps_high", eps_high)):
        unused(name, eps, 0.2, clip_mode != "none", "a clip_mode other than 'none'")
    ranges(eps_low, eps_high)

    def mask(x: Array, adv: Array, b: Rollouts, stats: TokenStats) -> Array:
        mode = clip_mode.removeprefix("gspo-")
        if mode != clip_mode:
            x = per_token(ratios.sequence_mean_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=20.0))
            x = jnp.broadcast_to(jnp.maximum(x, -20.0), adv.shape)
        return surrogates.clip_mask(
            jnp.exp(lax.stop_gradient(x)), adv, mode, eps_low=eps_low, eps_high=eps_high, ring_low=ring_low,
            ring_high=ring_high,
        )  # fmt: skip

    def fn(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        w = {
            "none": lambda: jnp.ones_like(x),
            "importance_sampling": lambda: jnp.exp(x),
            "advantage": lambda: jnp.exp(adv / temp),
        }[weight]()
        return surrogates.detached_weight(w * mask(x, adv, b, stats), adv, stats.logp)

    looks = clip_mode not in ("none", "gspo-one-side") or weight == "importance_sampling"
    return Part(fn, per="token", uses_ratio=looks, clipped=lambda x, adv, stats, b, s: ~mask(x, adv, b, stats))


@register("surrogate", source="MHPO, arXiv:2603.16929")
def mhpo(k_pos: float = 1.5, lam_pos: float = 1.0, k_neg: float = 2.0, lam_neg: float = 0.8) -> Part:
    """``-exp(psi - sg(zeta)) A`` of a bounded log-ratio psi, zeta its Weibull hazard (reconstructed from secondary
    transcriptions of the paper)."""
    numbers = dict(k_pos=k_pos, lam_pos=lam_pos, k_neg=k_neg, lam_neg=lam_neg)
    for name, value in numbers.items():
        positive(name, value)
    return Part(lambda x, adv, stats, b, s: surrogates.linear(jnp.exp(x - surrogates.hazard(x, **numbers)), adv))


@register("surrogate", source="Kimi k1.5, arXiv:2501.12599")
def squared_residual(tau: float = 1.0) -> Part:
    """``(A - tau Delta)^2`` per row, ``Delta = sum_t (logp - logp_old)``, not clamped."""
    positive("tau", tau)

    def fn(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        drift = ratios.sequence_sum_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=jnp.inf)
        return surrogates.squared_residual(drift, adv, tau)

    return Part(fn, per="row")


@register("surrogate", source="BAPO, arXiv:2510.18927; code of WooooDyy/BAPO")
def bapo(
    mode: str = "official",
    target: float | None = None,
    low0: float | None = None,
    low_max: float | None = None,
    low_step: float | None = None,
    high0: float | None = None,
    high_max: float | None = None,
    high_step: float | None = None,
    dual_clip: float = 3.0,
    log_ratio_clip: float = 20.0,
) -> Part:
    """The clipped surrogate with bounds (ratio values) searched anew for every optimizer batch, so that tokens of
    positive advantage carry ``target`` of the weight.

    Args:
      mode: "official": ``P/N >= target``, the lower bound is raised first; "paper": ``P/(P+N) >= target`` weighted by
        the old probabilities, the upper bound first. None elsewhere = the mode's own number: official 1.0, 0.6→0.8 by
        0.05, 1.2→2.0 by 0.05; paper 0.4, 0.6→0.9 by 0.02, 1.2→3.0 by 0.05."""
    choice("mode", mode, ("official", "paper"))
    paper = mode == "paper"
    defaults = (0.4, 0.6, 0.9, 0.02, 1.2, 3.0, 0.05) if paper else (1.0, 0.6, 0.8, 0.05, 1.2, 2.0, 0.05)
    given = (target, low0, low_max, low_step, high0, high_max, high_step)
    target, *bounds = [d if x is None else x for x, d in zip(given, defaults, strict=True)]
    low, high = ((start, top, step) for start, top, step in (bounds[:3], bounds[3:]))
    for name, (start, top, step) in (("low", low), ("high", high)):
        positive(f"{name}_step", step)
        if isinstance(start, int | float) and isinstance(top, int | float) and top < start:
            raise ValueError(f"{name}_max {top} is below {name}0 {start}")
    ranges(0.2, 0.2, dual_clip)

    def weigh(b: Rollouts, s: State, peek: TokenStats) -> Rollouts:
        r = jnp.exp(ratios.token_log_ratio(peek.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip))
        weight = tokens_of(b)
        if paper:
            weight = weight * jnp.exp(b.logp_old)
        cl, ch = surrogates.balanced_bounds(
            r, jnp.broadcast_to(per_token(b.adv), r.shape), weight, target=target, low=low, high=high,
            low_first=not paper, share=paper,
        )  # fmt: skip
        return b.with_row(clip_low=jnp.full(b.rows, cl), clip_high=jnp.full(b.rows, ch))

    def at(b: Rollouts) -> tuple[Array, Array]:
        return b.per_row["clip_low"][:, None], b.per_row["clip_high"][:, None]

    return Part(
        lambda x, adv, stats, b, s: surrogates.clipped(jnp.exp(x), adv, *at(b), dual_clip),
        peeks=PEEK,
        per="token",
        weigh=weigh,
        clipped=lambda x, adv, stats, b, s: surrogates.is_clipped(jnp.exp(x), adv, *at(b), dual_clip),
        kernel=clipped_kernel(dual_clip, lambda b: tuple(jnp.broadcast_to(x, b.mask.shape) for x in at(b))),
    )


@register("surrogate", source="HAPO, arXiv:2509.16591; code of starriver030515/HAPO")
def hapo(
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    rho: float = 0.8,
    redistribution: float = 1.0,
    clip_strength: float = 1.0,
    sign: str = "intended",
    dual_clip: float = 10.0,
) -> Part:
    """The clipped surrogate with bounds and advantages that follow the entropy signal ``h`` of each token of the
    rollout.

    ``eL = eps_low (1 - clip_strength h)`` for h <= 0, ``eH = eps_high (1 + clip_strength h)`` for h > 0; A becomes
    ``A (1 + redistribution h)`` where h > 0 and r is outside ``(1 - eL/2, 1 + eH/2)``, or h <= 0 and r inside.

    Args:
      rho: quantile of the log-entropy that separates high from low. sign: "official" reproduces the released code, in
        which h is never negative."""
    ranges(eps_low, eps_high, dual_clip)
    choice("sign", sign, ("intended", "official"))
    names = ("q", "s", "high", "low")

    def weigh(b: Rollouts, s: State, peek: TokenStats | None) -> Rollouts:
        h, numbers = token_advantages.entropy_signal(
            b.get("entropy_old"), tokens_of(b), rho=rho, official=sign == "official"
        )
        per_row = {f"hapo_{n}": jnp.full(b.rows, numbers[n]) for n in names}
        return b.with_row(**per_row).with_token(hapo_h=h)

    def bounds(b: Rollouts) -> tuple[Array, Array, Array]:
        h = b.per_token["hapo_h"]
        el = eps_low * jnp.where(h <= 0, 1 - clip_strength * h, 1)
        return h, el, eps_high * jnp.where(h > 0, 1 + clip_strength * h, 1)

    def moved(x: Array, adv: Array, b: Rollouts) -> Array:
        h, el, eh = bounds(b)
        r = jnp.exp(lax.stop_gradient(x))
        inside = (r > 1 - el / 2) & (r < 1 + eh / 2)
        return jnp.where(jnp.where(h > 0, ~inside, inside), adv * (1 + redistribution * h), adv)

    def apply(f, x: Array, adv: Array, b: Rollouts) -> Array:
        _, el, eh = bounds(b)
        return f(jnp.exp(x), moved(x, adv, b), 1 - el, 1 + eh, dual_clip)

    def update(state: State, b: Rollouts, report) -> State:
        seen = jnp.any(tokens_of(b) > 0)
        new = {n: jnp.where(seen, b.per_row[f"hapo_{n}"][0].astype(jnp.float32), state.memory[n]) for n in names}
        return state.replace(memory={**state.memory, **new})

    return Part(
        lambda x, adv, stats, b, s: apply(surrogates.clipped, x, adv, b),
        needs=frozenset({"entropy_old"}),
        per="token",
        weigh=weigh,
        clipped=lambda x, adv, stats, b, s: apply(surrogates.is_clipped, x, adv, b),
        memory={n: jnp.float32(0) for n in names},
        update=update,
    )


@register("surrogate", source="arXiv:2505.22617; verl clip_cov")
def clip_cov(
    ratio: float = 2e-4,
    lb: float = 1.0,
    ub: float = 5.0,
    eps_low: float = 1.0,
    eps_high: float = 1.0,
    log_ratio_clip: float = 20.0,
) -> Part:
    """The clipped surrogate, 0 at a few tokens of high covariance between A and ``logp``: of those with ``lb < cov <
    ub`` that are not clipped, ``max(int(ratio N), 1)`` drawn at random by the rows' seeds. They stay in the
    denominator."""
    low, high = ranges(eps_low, eps_high)

    def weigh(b: Rollouts, s: State, peek: TokenStats) -> Rollouts:
        weight = tokens_of(b)
        adv = jnp.broadcast_to(per_token(b.adv), weight.shape)
        cov = surrogates.covariance(peek.logp, adv, weight)
        r = jnp.exp(ratios.token_log_ratio(peek.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip))
        candidate = (cov > lb) & (cov < ub) & ~surrogates.is_clipped(r, adv, low, high)
        n = jnp.maximum(jnp.floor(ratio * weight.sum()), 1)
        priority = selection.row_uniform(b.get("seed"), (b.width,), stream=2)
        dropped = selection.smallest(priority, weight * candidate, n)
        kept = 1 - jnp.where(weight > 0, dropped / jnp.where(weight > 0, weight, 1), 0)
        return b.with_token(covariance_kept=kept)

    def fn(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        return b.per_token["covariance_kept"] * surrogates.clipped(jnp.exp(x), adv, low, high)

    def cut(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        return surrogates.is_clipped(jnp.exp(x), adv, low, high) | (b.per_token["covariance_kept"] == 0)

    return Part(fn, frozenset({"seed"}), peeks=PEEK, per="token", weigh=weigh, clipped=cut)


@register("surrogate", source="Lp-Reg, arXiv:2510.03222")
def capped(U: float = 10.0) -> Part:  # noqa: N803 (the cards' name)
    """``-min(r, U) A``: no lower clip, and none of the sign of A."""
    positive("U", U)
    return Part(
        lambda x, adv, stats, b, s: surrogates.capped(jnp.exp(x), adv, U),
        clipped=lambda x, adv, stats, b, s: jnp.exp(x) > U,
    )


@register("surrogate", source="Lp-Reg, arXiv:2510.03222; code of CarlanLark/Lp-Reg-dev")
def clipped_but_protected(eps_low: float = 0.2, eps_high: float = 0.2) -> Part:
    """The clipped surrogate, unclipped (``-r A``) at the tokens that the regularizer ``lp_reg`` protects."""
    low, high = ranges(eps_low, eps_high)

    def fn(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        r = jnp.exp(x)
        share = b.per_token["protected"]
        return share * surrogates.linear(r, adv) + (1 - share) * surrogates.clipped(r, adv, low, high)

    def cut(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        return surrogates.is_clipped(jnp.exp(x), adv, low, high) & (b.per_token["protected"] == 0)

    return Part(fn, per="token", requires="lp_reg", clipped=cut)


def unused(name: str, value: object, default: object, used: bool, where: str) -> None:
    """Raise ``ValueError`` for a hyperparameter that was changed where it has no effect."""
    if not used and isinstance(value, int | float | str | None) and value != default:
        raise ValueError(f"{name} has no effect here; it belongs to {where}")
