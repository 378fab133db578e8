"""Surrogates: ``fn(log_ratio, adv, stats, batch, state) -> value`` of the ratio's shape."""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.arguments import AboveOne, NonNegative, Positive, PositiveOrInfinite, Share, Threshold, when
from jaxpo.batch import Rollouts, TokenStats
from jaxpo.fields import role_id
from jaxpo.objectives.grammar.base import Hooks, State, per_token
from jaxpo.objectives.grammar.parts import Surrogate, asks_of, reads
from jaxpo.primitives import ratios, selection, surrogates, token_advantages
from jaxpo.primitives.numerics import promote
from jaxpo.registry import register

PEEK = asks_of(peeks=("logp",))


def tokens_of(b: Rollouts) -> Array:
    """[B, T] multiplicity of every token."""
    return promote(b.mask) * promote(b.count)[:, None]


@register("surrogate", source="PPO, arXiv:1707.06347")
def clipped(eps_low: Positive = 0.2, eps_high: Positive = 0.2, dual_clip: AboveOne | None = None) -> Surrogate:
    """``-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)``, optionally dual-clipped at ``dual_clip`` for A < 0."""
    bounds = dict(low=1 - eps_low, high=1 + eps_high)
    return Surrogate(
        *reads(surrogates.clipped, **bounds, dual=dual_clip),
        clipped=reads(surrogates.is_clipped, **bounds, dual=dual_clip).fn,
        kernel=clipped_kernel(dual_clip, lambda b: tuple(bounds.values())),
    )


def clipped_kernel(
    dual_clip: float | None, bounds: Callable[[Rollouts], tuple[Any, Any]]
) -> Callable[[Rollouts], dict[str, Any]] | None:
    """The clipped surrogate as the kernel has it, whose bounds are arrays and whose dual clip is compiled in."""
    if isinstance(dual_clip, Array):
        return None
    return lambda b: dict(zip(("low", "high"), bounds(b), strict=True), form="clipped", dual=dual_clip)


@register("surrogate")
def linear() -> Surrogate:
    """``-r A``, unclipped."""
    return Surrogate(*reads(surrogates.linear), kernel=clipped_kernel(None, lambda b: (0, jnp.inf)))


@register("surrogate", source="Williams 1992")
def log_prob() -> Surrogate:
    """``-A logp`` per token: REINFORCE, without a ratio."""
    return Surrogate(*reads(surrogates.log_prob), per="token", uses_ratio=False)


@register("surrogate", source="LUFFY, arXiv:2504.14945; code of ElliottYan/LUFFY")
def shaped_probability(gamma: Positive | None = 0.1) -> Surrogate:
    """``-f(p) A`` with ``p = exp(logp)`` and ``f(p) = p / (p + gamma)``, unclipped: a ratio to an author whose own
    probability is taken as 1. For rows of other authors; see `by_role`.

    Args:
      gamma: where the gradient of f in logp is largest (1/4). None: ``f(p) = p``."""
    return Surrogate(*reads(surrogates.shaped_probability, gamma=gamma), per="token", uses_ratio=False)


@register("surrogate", source="LUFFY, arXiv:2504.14945")
def expert_ratio() -> Surrogate:
    """``-p / (q + 1e-6) A`` with ``p = exp(logp)`` and q = expert_prob [B, T], the probability that the row's author
    gave to the token. For rows of other authors; see `by_role`."""

    def fn(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        return surrogates.shaped_probability(stats.logp, adv, None) / (promote(b.get("expert_prob")) + 1e-6)

    return Surrogate(fn, asks_of("expert_prob"), per="token", uses_ratio=False)


def by_role(own: Surrogate, **others: Surrogate) -> Surrogate:
    """Another surrogate for the rows of some roles: ``by_role(clipped(), expert=shaped_probability())``.

    Rows of a role that is not named take ``own``, which sees a log-ratio of 0 at the other rows; only its rows are
    reported as clipped.

    Raises:
      ValueError: a role that does not exist, no role at all, or surrogates of tokens and of rows together."""
    if not others:
        raise ValueError("by_role takes a surrogate for at least one role: by_role(own, expert=...)")
    ids = {name: role_id(name) for name in others}
    everything = [own, *others.values()]
    kinds = {p.per for p in everything if p.per}
    if len(kinds) > 1:
        raise ValueError("by_role cannot mix surrogates of tokens and of rows")

    def at(b: Rollouts, name: str, x: Array) -> Array:
        here = b.role == ids[name]
        return here if x.ndim == 1 else here[:, None]

    def elsewhere(b: Rollouts, x: Array) -> Array:
        return ~jnp.any(jnp.stack([jnp.broadcast_to(at(b, name, x), x.shape) for name in others]), 0)

    def fn(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        value = own.fn(jnp.where(elsewhere(b, x), x, 0), adv, stats, b, s)
        for name, part in others.items():
            value = jnp.where(at(b, name, x), part.fn(x, adv, stats, b, s), value)
        return value

    def cut(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        return own.clipped(x, adv, stats, b, s) & elsewhere(b, x)

    return Surrogate(
        fn,
        asks_of("role").merged(*[p.asks for p in everything]),
        Hooks().merged(*[p.hooks for p in everything]),
        per=kinds.pop() if kinds else None,
        clipped=cut if own.clipped else None,
        uses_ratio=any(p.uses_ratio for p in everything),
        requires=next((p.requires for p in everything if p.requires), None),
        id=f"by_role({', '.join([own.id, *[f'{name}={p.id}' for name, p in others.items()]])})",
    )


def by_token(own: Surrogate, field: str, other: Surrogate) -> Surrogate:
    """Another surrogate for the tokens on which a field [B, T] is 1: ``by_token(clipped(), "off_mask",
    shaped_probability())``.

    ``own`` sees a log-ratio of 0 on them, and only its tokens are reported as clipped.

    Raises:
      ValueError: a surrogate of rows."""
    if "row" in (own.per, other.per):
        raise ValueError("by_token takes surrogates of tokens, not of rows")

    def there(b: Rollouts) -> Array:
        return b.get(field) > 0

    def fn(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        return jnp.where(there(b), other.fn(x, adv, stats, b, s), own.fn(jnp.where(there(b), 0, x), adv, stats, b, s))

    def cut(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        return own.clipped(x, adv, stats, b, s) & ~there(b)

    return Surrogate(
        fn,
        asks_of(field).merged(own.asks, other.asks),
        Hooks().merged(own.hooks, other.hooks),
        per="token",
        clipped=cut if own.clipped else None,
        uses_ratio=own.uses_ratio or other.uses_ratio,
        requires=own.requires or other.requires,
        id=f"by_token({own.id}, {field}={other.id})",
    )


@register("surrogate", source="MiniMax-M1, arXiv:2506.13585")
def cispo(eps_low: Positive = 1.0, eps_high: Positive = 4.0) -> Surrogate:
    """``-sg(clip(r, 1 - eps_low, 1 + eps_high)) A logp``: no token loses its gradient. ``eps_high = 4`` caps the
    ratio at 5."""
    bounds = dict(low=1 - eps_low, high=1 + eps_high)
    return Surrogate(
        *reads(surrogates.clipped_weight, **bounds), per="token", kernel=lambda b: dict(form="detached", **bounds)
    )


ClipMode = Literal["none", "one-side", "two-side", "ring", "gspo-one-side"]
RecWeight = Literal["none", "importance_sampling", "advantage"]
CLIPPING = ("one-side", "two-side", "ring", "gspo-one-side")
REC_WHEN = {
    "eps_low": when(clip_mode=CLIPPING),
    "eps_high": when(clip_mode=CLIPPING),
    "ring_low": when(clip_mode="ring"),
    "ring_high": when(clip_mode="ring"),
    "temp": when(weight="advantage"),
}


@register("surrogate", source="REC, arXiv:2509.24203", when=REC_WHEN)
def rec(
    clip_mode: ClipMode = "one-side",
    weight: RecWeight = "none",
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    ring_low: NonNegative = 0.6,
    ring_high: NonNegative = 2.0,
    temp: Positive = 1.0,
) -> Surrogate:
    """``-sg(A w M) logp``: REINFORCE under a binary mask M and a weight w, both constant.

    Args:
      clip_mode: "none", "one-side", "two-side", "ring" (`jaxpo.primitives.surrogates.clip_mask`), or "gspo-one-side":
        the one-side test on the ratio of the row's mean.
      weight: "none", "importance_sampling" (r) or "advantage" (``exp(A / temp)``).
    """

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
    return Surrogate(fn, per="token", uses_ratio=looks, clipped=lambda x, adv, stats, b, s: ~mask(x, adv, b, stats))


@register("surrogate", source="MHPO, arXiv:2603.16929")
def mhpo(k_pos: Positive = 1.5, lam_pos: Positive = 1.0, k_neg: Positive = 2.0, lam_neg: Positive = 0.8) -> Surrogate:
    """``-exp(psi - sg(zeta)) A`` of a bounded log-ratio psi, zeta its Weibull hazard (reconstructed from secondary
    transcriptions of the paper)."""
    numbers = dict(k_pos=k_pos, lam_pos=lam_pos, k_neg=k_neg, lam_neg=lam_neg)
    return Surrogate(lambda x, adv, stats, b, s: surrogates.linear(jnp.exp(x - surrogates.hazard(x, **numbers)), adv))


@register("surrogate", source="Kimi k1.5, arXiv:2501.12599")
def squared_residual(tau: Positive = 1.0) -> Surrogate:
    """``(A - tau Delta)^2`` per row, ``Delta = sum_t (logp - logp_old)``, not clamped."""

    def fn(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        drift = ratios.sequence_sum_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=jnp.inf)
        return surrogates.squared_residual(drift, adv, tau)

    return Surrogate(fn, per="row")


BAPO_DEFAULTS = {"official": (1.0, 0.6, 0.8, 0.05, 1.2, 2.0, 0.05), "paper": (0.4, 0.6, 0.9, 0.02, 1.2, 3.0, 0.05)}


# Raising the lower bound only adds to N: officially the search never ends between ``low0`` and ``low_max``.
@register("surrogate", source="BAPO, arXiv:2510.18927; code of WooooDyy/BAPO", when={"low_step": when(mode="paper")})
def bapo(
    mode: Literal["official", "paper"] = "official",
    target: NonNegative | None = None,
    low0: NonNegative | None = None,
    low_max: NonNegative | None = None,
    low_step: Positive | None = None,
    high0: Positive | None = None,
    high_max: Positive | None = None,
    high_step: Positive | None = None,
    dual_clip: AboveOne = 3.0,
    log_ratio_clip: Positive = 20.0,
) -> Surrogate:
    """The clipped surrogate with bounds (ratio values) searched anew for every optimizer batch, so that tokens of
    positive advantage carry ``target`` of the weight.

    Args:
      mode: "official": ``P/N >= target``, the lower bound is raised first; "paper": ``P/(P+N) >= target`` weighted by
        the old probabilities, the upper bound first. None elsewhere = the mode's own number: official 1.0, 0.6→0.8 by
        0.05, 1.2→2.0 by 0.05; paper 0.4, 0.6→0.9 by 0.02, 1.2→3.0 by 0.05."""
    paper = mode == "paper"
    given = (target, low0, low_max, low_step, high0, high_max, high_step)
    target, *bounds = [d if x is None else x for x, d in zip(given, BAPO_DEFAULTS[mode], strict=True)]
    low, high = ((start, top, step) for start, top, step in (bounds[:3], bounds[3:]))
    for name, (start, top, _) in (("low", low), ("high", high)):
        if isinstance(start, int | float) and isinstance(top, int | float) and top < start:
            raise ValueError(f"{name}_max {top} is below {name}0 {start}")

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

    return Surrogate(
        lambda x, adv, stats, b, s: surrogates.clipped(jnp.exp(x), adv, *at(b), dual_clip),
        PEEK,
        Hooks(weigh=weigh),
        per="token",
        clipped=lambda x, adv, stats, b, s: surrogates.is_clipped(jnp.exp(x), adv, *at(b), dual_clip),
        kernel=clipped_kernel(dual_clip, lambda b: tuple(jnp.broadcast_to(x, b.mask.shape) for x in at(b))),
    )


@register("surrogate", source="HAPO, arXiv:2509.16591; code of starriver030515/HAPO")
def hapo(
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.28,
    rho: Share = 0.8,
    redistribution: NonNegative = 1.0,
    clip_strength: NonNegative = 1.0,
    sign: Literal["intended", "official"] = "intended",
    dual_clip: AboveOne = 10.0,
) -> Surrogate:
    """The clipped surrogate with bounds and advantages that follow the entropy signal ``h`` of each token of the
    rollout.

    ``eL = eps_low (1 - clip_strength h)`` for h <= 0, ``eH = eps_high (1 + clip_strength h)`` for h > 0; A becomes
    ``A (1 + redistribution h)`` where h > 0 and r is outside ``(1 - eL/2, 1 + eH/2)``, or h <= 0 and r inside.

    Args:
      rho: quantile of the log-entropy that separates high from low. sign: "official" reproduces the released code, in
        which h is never negative."""
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

        def latest(n: str, old: Array) -> Array:
            return jnp.where(seen, b.per_row[f"hapo_{n}"][0].astype(old.dtype), old)

        return state.replace(memory={**state.memory, **{n: latest(n, state.memory[n]) for n in names}})

    return Surrogate(
        lambda x, adv, stats, b, s: apply(surrogates.clipped, x, adv, b),
        asks_of("entropy_old"),
        Hooks(memory={n: jnp.zeros(()) for n in names}, weigh=weigh, update=update),
        per="token",
        clipped=lambda x, adv, stats, b, s: apply(surrogates.is_clipped, x, adv, b),
    )


@register("surrogate", source="arXiv:2505.22617; verl clip_cov")
def clip_cov(
    ratio: Share = 2e-4,
    lb: Threshold = 1.0,
    ub: Threshold = 5.0,
    eps_low: Positive = 1.0,
    eps_high: Positive = 1.0,
    log_ratio_clip: Positive = 20.0,
) -> Surrogate:
    """The clipped surrogate, 0 at a few tokens of high covariance between A and ``logp``: of those with ``lb < cov <
    ub`` that are not clipped, ``max(int(ratio N), 1)`` drawn at random by the rows' seeds. They stay in the
    denominator."""
    low, high = 1 - eps_low, 1 + eps_high

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

    return Surrogate(fn, asks_of("seed", peeks=("logp",)), Hooks(weigh=weigh), per="token", clipped=cut)


@register("surrogate", source="Lp-Reg, arXiv:2510.03222")
def capped(U: PositiveOrInfinite = 10.0) -> Surrogate:  # noqa: N803 (the cards' name)
    """``-min(r, U) A``: no lower clip, and none of the sign of A."""
    return Surrogate(*reads(surrogates.capped, cap=U), clipped=lambda x, adv, stats, b, s: jnp.exp(x) > U)


@register("surrogate", source="Lp-Reg, arXiv:2510.03222; code of CarlanLark/Lp-Reg-dev")
def clipped_but_protected(eps_low: Positive = 0.2, eps_high: Positive = 0.2) -> Surrogate:
    """The clipped surrogate, unclipped (``-r A``) at the tokens that the regularizer ``lp_reg`` protects."""
    low, high = 1 - eps_low, 1 + eps_high

    def fn(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        r = jnp.exp(x)
        share = b.per_token["protected"]
        return share * surrogates.linear(r, adv) + (1 - share) * surrogates.clipped(r, adv, low, high)

    def cut(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        return surrogates.is_clipped(jnp.exp(x), adv, low, high) & (b.per_token["protected"] == 0)

    return Surrogate(fn, per="token", requires="lp_reg", clipped=cut)
