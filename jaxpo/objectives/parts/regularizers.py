"""Regularizers: ``fn(stats, batch, state) -> [B, T]``, a penalty that a coefficient multiplies."""

import jax.numpy as jnp
from jax import Array

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.kernels.policy_surrogate.core import KL
from jaxpo.metrics import Mean, Metrics
from jaxpo.objectives.grammar.base import State, per_token
from jaxpo.objectives.grammar.parts import Part
from jaxpo.objectives.parts.surrogates import PEEK, tokens_of, unused
from jaxpo.primitives import ratios, regularizers, selection, surrogates
from jaxpo.primitives.advantages import choice
from jaxpo.primitives.aggregation import positive, token_mean
from jaxpo.primitives.numerics import ratio_or_zero
from jaxpo.registry import register, unknown


def check_estimators(*names: str | None) -> None:
    """Raise ``ValueError`` for a KL estimator that does not exist."""
    for name in names:
        if name is not None and name not in regularizers.KL_ESTIMATORS:
            raise ValueError(unknown("KL estimator", name, regularizers.KL_ESTIMATORS))


@register("regularizer", id="kl_estimators", source="Schulman 2020; DeepSeekMath, arXiv:2402.03300, eq. 4")
@register("regularizer", source="Schulman 2020; DeepSeekMath, arXiv:2402.03300, eq. 4")
def kl_to_reference(
    estimator: str = "k3", gradient: str | None = None, is_weighted: bool = False, log_ratio_clip: float = 20.0
) -> Part:
    """KL penalty to ``logp_ref``: value of ``estimator``, gradient of ``gradient`` (None = the same).

    Args:
      is_weighted: multiply by the differentiable ratio to ``logp_old`` (with k3: the exact reverse-KL gradient
        off-policy)."""
    check_estimators(estimator, gradient)
    unused("log_ratio_clip", log_ratio_clip, 20.0, is_weighted, "is_weighted=True")

    def fn(stats: TokenStats, b: Rollouts, s: State) -> Array:
        r = None
        if is_weighted:
            r = jnp.exp(ratios.token_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip))
        return regularizers.kl_penalty(stats.logp, b.get("logp_ref"), estimator, gradient, r)

    plain = estimator in KL and not is_weighted and gradient in (None, estimator)
    kernel = (lambda b: dict(kl=estimator, logp_ref=b.get("logp_ref"))) if plain else None
    return Part(fn, frozenset({"logp_ref"}), name="kl_ref", kernel=kernel)


@register("regularizer", source="REC, arXiv:2509.24203")
def kl_to_old(estimator: str = "k2", gradient: str | None = None, scale: float = 1.0) -> Part:
    """``scale`` times a KL estimate to ``logp_old`` (k2 = half the squared log-ratio), not clamped but for k3."""
    check_estimators(estimator, gradient)
    return Part(
        lambda stats, b, s: scale * regularizers.kl_penalty(stats.logp, b.logp_old, estimator, gradient), name="kl_old"
    )


@register("regularizer", id="ppo_outer_loop", source="arXiv:2603.06009 (the loss is our rendering)")
@register("regularizer", source="arXiv:2603.06009 (the loss is our rendering)")
def proximal(log_ratio_clip: float = 20.0) -> Part:
    """``r - 1 - log r``: the sample form of ``KL(pi_old || pi)``, which holds the policy near the old one."""

    def fn(stats: TokenStats, b: Rollouts, s: State) -> Array:
        x = ratios.token_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip)
        return regularizers.proximal(x)

    return Part(fn, name="proximal")


@register("regularizer")
def entropy() -> Part:
    """``-H``: with a positive coefficient a bonus for entropy."""
    return Part(lambda stats, b, s: -stats.entropy, wants=frozenset({"entropy"}), name="entropy")


@register("regularizer", source="REC, arXiv:2509.24203")
def forward_kl() -> Part:
    """``-logp`` of the sampled tokens: KL from what was sampled to the policy, up to a constant."""
    return Part(lambda stats, b, s: -stats.logp, name="forward_kl")


@register("regularizer", source="R2VPO, arXiv:2601.03320 (reconstructed from the abstract)")
def r2vpo(lam0: float = 0.1, delta: float = 0.02, lr_dual: float = 0.1, log_ratio_clip: float = 5.0) -> Part:
    """``lam ((r - 1)^2 - delta)``; after each step ``lam <- max(0, lam + lr_dual (mean (r-1)^2 - delta))``,
    remembered in the state. Token level, around 1, projected ascent and all defaults are assumed."""
    for name, value in (("lam0", lam0), ("lr_dual", lr_dual)):
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{name} must not be negative, not {value}")
    positive("delta", delta)

    def excess(stats: TokenStats, b: Rollouts) -> Array:
        x = ratios.token_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip)
        return regularizers.ratio_variance(x, delta)

    def metrics(stats: TokenStats, b: Rollouts, s: State) -> Metrics:
        tokens = tokens_of(b)
        return {"ratio/excess": Mean.of(excess(stats, b), tokens), "r2vpo/lam": Mean.of(s.memory["lam"], tokens)}

    def update(state: State, b: Rollouts, report: Metrics) -> State:
        measured = report["ratio/excess"]
        step = lr_dual * ratio_or_zero(measured.total, measured.weight)
        return state.replace(memory={**state.memory, "lam": jnp.maximum(0.0, state.memory["lam"] + step)})

    return Part(
        lambda stats, b, s: s.memory["lam"] * excess(stats, b),
        name="ratio_variance",
        memory={"lam": jnp.asarray(lam0, jnp.float32)},
        metrics=metrics,
        update=update,
    )


@register("regularizer", source="arXiv:2505.22617; verl kl_cov")
def kl_cov(ratio: float = 2e-3) -> Part:
    """``|logp - logp_old|`` at the ``max(1, int(ratio N))`` tokens of largest covariance between A and ``logp``, mean
    over all tokens."""

    def weigh(b: Rollouts, s: State, peek: TokenStats) -> Rollouts:
        weight = tokens_of(b)
        cov = surrogates.covariance(peek.logp, jnp.broadcast_to(per_token(b.adv), weight.shape), weight)
        picked = selection.largest(cov, weight, jnp.maximum(jnp.floor(ratio * weight.sum()), 1))
        return b.with_token(kl_cov_picked=ratio_or_zero(picked, weight))

    def fn(stats: TokenStats, b: Rollouts, s: State) -> Array:
        return b.per_token["kl_cov_picked"] * regularizers.kl_estimate(stats.logp, b.logp_old, "abs")

    return Part(fn, peeks=PEEK, weigh=weigh, name="kl_cov", aggregate=token_mean)


@register("regularizer", source="Lp-Reg, arXiv:2510.03222; code of CarlanLark/Lp-Reg-dev")
def lp_reg(form: str = "released", rho: float = 0.01, kappa: float = 0.02) -> Part:
    """Keeps alive the improbable tokens of failed answers that are no noise: those that survive ``pi > kappa max pi``.

    Args:
      form: "released": of the tokens with A < 0 the ``int(rho n)`` least probable (none if that is 1 or less) which
        are less probable than their proxy get k3 to the proxy, by the sampled token, clamped to ±10. "paper": of
        *all* tokens the ``max(1, int(rho N))`` least probable, if A < 0 and they survive, get the full ``KL(proxy ||
        pi)``; the proxy is that of the current policy, the paper's on-policy case."""
    choice("form", form, ("released", "paper"))
    positive("rho", rho), positive("kappa", kappa)
    paper = form == "paper"

    def weigh(b: Rollouts, s: State, peek: TokenStats) -> Rollouts:
        everything, proxy = tokens_of(b), peek.derived["log_proxy"]
        failed = jnp.broadcast_to(per_token(b.adv), everything.shape) < 0
        weight = everything if paper else everything * failed
        k = jnp.floor(rho * weight.sum())
        k = jnp.maximum(k, 1) if paper else jnp.where(k <= 1, 0, k)
        picked = ratio_or_zero(selection.smallest(peek.logp, weight, k), weight)
        alive = jnp.isfinite(proxy) if paper else peek.logp < proxy
        share = jnp.where(failed & alive, picked, 0)
        return b.with_token(protected=share, log_proxy=proxy)

    def fn(stats: TokenStats, b: Rollouts, s: State) -> Array:
        share = b.per_token["protected"]
        if paper:
            return share * stats.derived["proxy_kl"]
        return share * regularizers.toward(stats.logp, jnp.where(share > 0, b.per_token["log_proxy"], -jnp.inf))

    derived = {"log_proxy": lambda logits, tokens: regularizers.min_p_log_proxy(logits, tokens, kappa=kappa)}
    if paper:
        derived["proxy_kl"] = lambda logits, tokens: regularizers.forward_kl_to_proxy(logits, tokens, kappa=kappa)
    return Part(
        fn,
        wants=frozenset({"proxy_kl"}) if paper else frozenset(),
        peeks=PEEK | {"log_proxy"},
        weigh=weigh,
        name="lp_reg",
        aggregate=token_mean,
        derived=derived,
    )
