"""Regularizers: ``fn(stats, batch, state) -> [B, T]``, a penalty that a coefficient multiplies."""

from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import Array

from jaxpo.arguments import NonNegative, OpenShare, Positive, PositiveOrInfinite, PositiveShare, Share, when
from jaxpo.batch import Compared, Rollouts, TokenStats
from jaxpo.kernels.policy_surrogate.core import KL
from jaxpo.metrics import Mean, Metrics
from jaxpo.objectives.grammar.base import Hooks, State, clean, per_token
from jaxpo.objectives.grammar.parts import Regularizer, asks_of, reads
from jaxpo.objectives.grammar.units import log_ratios
from jaxpo.objectives.parts.surrogates import PEEK, tokens_of
from jaxpo.primitives import aggregation, gaussians, ratios, regularizers, selection, surrogates
from jaxpo.primitives.numerics import ratio_or_zero
from jaxpo.primitives.regularizers import Estimator
from jaxpo.registry import register


@register("regularizer", id="kl_estimators", source="Schulman 2020; DeepSeekMath, arXiv:2402.03300, eq. 4")
@register(
    "regularizer",
    source="Schulman 2020; DeepSeekMath, arXiv:2402.03300, eq. 4",
    when={"log_ratio_clip": when(is_weighted=True)},
)
def kl_to_reference(
    estimator: Estimator = "k3",
    gradient: Estimator | None = None,
    is_weighted: bool = False,
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Regularizer:
    """KL penalty to ``logp_ref``: value of ``estimator``, gradient of ``gradient`` (None = the same).

    Args:
      is_weighted: multiply by the differentiable ratio to ``logp_old`` (with k3: the exact reverse-KL gradient
        off-policy)."""

    def fn(stats: TokenStats, b: Rollouts, s: State) -> Array:
        r = None
        if is_weighted:
            r = jnp.exp(ratios.token_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip))
        return regularizers.kl_penalty(stats.logp, b.get("logp_ref"), estimator, gradient, r)

    plain = estimator in KL and not is_weighted and gradient in (None, estimator)
    kernel = (lambda b: dict(kl=estimator, logp_ref=b.get("logp_ref"))) if plain else None
    return Regularizer(fn, asks_of("logp_ref"), name="kl_ref", kernel=kernel)


@register("regularizer", source="REC, arXiv:2509.24203")
def kl_to_old(estimator: Estimator = "k2", gradient: Estimator | None = None, scale: NonNegative = 1.0) -> Regularizer:
    """``scale`` times a KL estimate to ``logp_old`` (k2 = half the squared log-ratio), not clamped but for k3."""
    fn, asks = reads(regularizers.kl_penalty, "logp", "logp_old", value=estimator, gradient=gradient)
    return Regularizer(lambda stats, b, s: scale * fn(stats, b, s), asks, name="kl_old")


@register("regularizer", id="ppo_outer_loop", source="arXiv:2603.06009 (the loss is our rendering)")
@register("regularizer", source="arXiv:2603.06009 (the loss is our rendering)")
def proximal(log_ratio_clip: PositiveOrInfinite = 20.0) -> Regularizer:
    """``r - 1 - log r``: the sample form of ``KL(pi_old || pi)``, which holds the policy near the old one."""

    def fn(stats: TokenStats, b: Rollouts, s: State) -> Array:
        x = ratios.token_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip)
        return regularizers.proximal(x)

    return Regularizer(fn, name="proximal")


@register("regularizer")
def entropy() -> Regularizer:
    """``-H``: with a positive coefficient a bonus for entropy."""
    return Regularizer(lambda stats, b, s: -stats.entropy, asks_of(wants=("entropy",)), name="entropy")


@register("regularizer", source="REC, arXiv:2509.24203")
def forward_kl() -> Regularizer:
    """``-logp`` of the sampled tokens: KL from what was sampled to the policy, up to a constant."""
    return Regularizer(lambda stats, b, s: -stats.logp, name="forward_kl")


@register("regularizer", source="R2VPO, arXiv:2601.03320 (reconstructed from the abstract)")
def r2vpo(
    lam0: NonNegative = 0.1, delta: Positive = 0.02, lr_dual: NonNegative = 0.1, log_ratio_clip: Positive = 5.0
) -> Regularizer:
    """``lam ((r - 1)^2 - delta)``; after each step ``lam <- max(0, lam + lr_dual (mean (r-1)^2 - delta))``,
    remembered in the state. Token level, around 1, projected ascent and all defaults are assumed."""

    def excess(stats: TokenStats, b: Rollouts) -> Array:
        x = ratios.token_log_ratio(stats.logp, b.logp_old, b.mask, log_ratio_clip=log_ratio_clip)
        return regularizers.ratio_variance(x, delta)

    def metrics(stats: TokenStats, b: Rollouts, s: State) -> Metrics:
        tokens = tokens_of(b)
        return {"ratio/excess": Mean.of(excess(stats, b), tokens), "r2vpo/lam": Mean.of(s.memory["lam"], tokens)}

    def update(state: State, b: Rollouts, report: Metrics) -> State:
        measured = report["ratio/excess"]
        step = lr_dual * ratio_or_zero(measured.total, measured.weight)
        lam = state.memory["lam"]
        return state.replace(memory={**state.memory, "lam": jnp.maximum(0.0, lam + step).astype(lam.dtype)})

    return Regularizer(
        lambda stats, b, s: s.memory["lam"] * excess(stats, b),
        hooks=Hooks(memory={"lam": jnp.asarray(lam0, jnp.result_type(float))}, metrics=metrics, update=update),
        name="ratio_variance",
    )


@register("regularizer", source="arXiv:2505.22617; verl kl_cov")
def kl_cov(ratio: Share = 2e-3) -> Regularizer:
    """``|logp - logp_old|`` at the ``max(1, int(ratio N))`` tokens of largest covariance between A and ``logp``, mean
    over all tokens."""

    def weigh(b: Rollouts, s: State, peek: TokenStats) -> Rollouts:
        weight = tokens_of(b)
        cov = surrogates.covariance(peek.logp, jnp.broadcast_to(per_token(b.adv), weight.shape), weight)
        picked = selection.largest(cov, weight, jnp.maximum(jnp.floor(ratio * weight.sum()), 1))
        return b.with_token(kl_cov_picked=ratio_or_zero(picked, weight))

    def fn(stats: TokenStats, b: Rollouts, s: State) -> Array:
        return b.per_token["kl_cov_picked"] * regularizers.kl_estimate(stats.logp, b.logp_old, "abs")

    return Regularizer(fn, PEEK, Hooks(weigh=weigh), name="kl_cov", aggregate=aggregation.token_mean)


Proxy = Literal["current", "old"]


@register(
    "regularizer",
    source="Lp-Reg, arXiv:2510.03222; code of CarlanLark/Lp-Reg-dev",
    when={"kappa": when(tau=None), "proxy": when(form="paper")},
)
def lp_reg(
    form: Literal["released", "paper"] = "released",
    rho: PositiveShare = 0.01,
    kappa: OpenShare = 0.02,
    tau: OpenShare | None = None,
    proxy: Proxy = "current",
) -> Regularizer:
    """Keeps alive the improbable tokens of failed answers that are no noise: those that survive ``pi > kappa max pi``.

    Args:
      form: "released": of the tokens with A < 0 the ``int(rho n)`` least probable (none if that is 1 or less) which
        are less probable than their proxy get k3 to the proxy, by the sampled token, clamped to ±10. "paper": of
        *all* tokens the ``max(1, int(rho N))`` least probable, if A < 0 and they survive, get the full ``KL(proxy ||
        pi)``.
      tau: those survive with ``pi > tau`` instead; none may, and then there is no proxy.
      proxy: made of the "current" policy, or of the "old" one at the start of the iteration."""
    paper, old = form == "paper", proxy == "old"
    threshold = dict(kappa=kappa, tau=tau)

    def weigh(b: Rollouts, s: State, peek: TokenStats) -> Rollouts:
        everything, target = tokens_of(b), peek.derived["log_proxy"]
        failed = jnp.broadcast_to(per_token(b.adv), everything.shape) < 0
        weight = everything if paper else everything * failed
        k = jnp.floor(rho * weight.sum())
        k = jnp.maximum(k, 1) if paper else jnp.where(k <= 1, 0, k)
        picked = ratio_or_zero(selection.smallest(peek.logp, weight, k), weight)
        share = jnp.where(failed & jnp.isfinite(target), picked, 0)
        return b.with_token(protected=share, log_proxy=target)

    def fn(stats: TokenStats, b: Rollouts, s: State) -> Array:
        share = b.per_token["protected"]
        if paper:
            return share * stats.derived["proxy_kl"]
        return share * regularizers.toward(stats.logp, jnp.where(share > 0, b.per_token["log_proxy"], -jnp.inf))

    # Whether a token is less probable than its proxy is told by what was cut, and not by the rounding of log-probs.
    derived = {"log_proxy": partial(regularizers.log_proxy_at, **threshold, above=not paper)}
    if paper:
        derived["proxy_kl"] = lambda logits, tokens, of=None: regularizers.forward_kl_to_proxy(logits, of, **threshold)
    if old:
        at, kl = derived["log_proxy"], derived["proxy_kl"]
        derived["log_proxy"] = Compared(lambda logits, tokens, of: at(of, tokens), "prev")
        derived["proxy_kl"] = Compared(kl, "prev")
    asks = asks_of(wants=("proxy_kl",) if paper else (), peeks=("logp", "log_proxy"), derived=derived)
    return Regularizer(fn, asks, Hooks(weigh=weigh), name="lp_reg", aggregate=aggregation.token_mean)


@register("regularizer", source="arXiv:2403.03185; cassidylaidlaw/llm_optimization")
def orpo_chi2(kind: Literal["sqrt_chi2", "chi2", "kl"] = "sqrt_chi2", c: Positive = 10.0) -> Regularizer:
    """A divergence of whole responses to the reference, ``R = sum_t (logp - logp_ref)``, ``e(R) = exp(R) - 1`` linear
    above c: "chi2" ``mean_b (e(R) + e(-R))``, "sqrt_chi2" ``sqrt(max(chi2, 1e-4))``, "kl" ``mean_b (R + e(-R))``. The
    published coefficient is 8e-4."""
    form = "kl" if kind == "kl" else "chi2"

    def fn(stats: TokenStats, b: Rollouts, s: State) -> Array:
        return regularizers.response_divergence(log_ratios(stats, b, "ref").sum(-1), form, c=c)

    return Regularizer(
        fn,
        asks_of("logp_ref"),
        per="row",
        name="response_divergence",
        aggregate=aggregation.seq_mean,
        outer=regularizers.sqrt_above if kind == "sqrt_chi2" else None,
    )


@register("regularizer", source="Flow-GRPO, arXiv:2505.05470")
def gaussian_kl(form: Literal["code", "paper"] = "code") -> Regularizer:
    """``mean_D (mean - mean_ref)^2 / (2 sigma^2)`` of each step of a chain [B, T]: KL of two Gaussians of one variance.

    Shapes: the policy's ``mean`` [B, T, D] (in ``TokenStats.derived``); mean_ref [B, T, D], sigma, sqrt_dt [B, T].

    Args:
      form: "paper" divides by ``2 sigma^2 dt``; the released "code" leaves out dt."""

    def fn(stats: TokenStats, b: Rollouts, s: State) -> Array:
        scale = b.get("sigma") if form == "code" else b.get("sigma") * b.get("sqrt_dt")
        return gaussians.kl(stats.derived["mean"], clean(b, b.get("mean_ref")), clean(b, scale))

    needs = ("mean_ref", "sigma", *(("sqrt_dt",) if form == "paper" else ()))
    return Regularizer(fn, asks_of(*needs, wants=("mean",)), name="kl_gaussian")
