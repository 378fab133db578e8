"""The unified policy-gradient estimator: one token weight, from which other losses follow."""

from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.arguments import NonNegative, Positive, PositiveOrInfinite, when
from jaxpo.batch import Rollouts, TokenStats
from jaxpo.objectives.grammar.base import (
    Gathering,
    Hooks,
    Objective,
    State,
    Term,
    asks_of,
    clean,
    from_terms,
    per_token,
)
from jaxpo.objectives.grammar.parts import Advantage
from jaxpo.objectives.hybrid import EXPERT, OWN, among_own
from jaxpo.objectives.parts import advantages, aggregation_of
from jaxpo.primitives.advantages import Singleton
from jaxpo.primitives.numerics import promote
from jaxpo.primitives.surrogates import estimator_weight
from jaxpo.registry import register

Method = Literal["sft", "reinforce", "ppo", "grpo", "cispo", "gspo", "srft_off", "luffy_off"]
RATIO_METHODS, OFFLINE = ("ppo", "grpo", "cispo", "gspo"), ("sft", "srft_off", "luffy_off")
COMPARING = ("grpo", "cispo", "gspo", "srft_off", "luffy_off")
UPGE_WHEN = {
    "eps": when(method=RATIO_METHODS),
    "gamma": when(method="luffy_off"),
    "use_std": when(method=COMPARING),
    "singleton": when(method=COMPARING),
    "adv_eps": when(method=COMPARING, use_std=True),
    "log_ratio_clip": when(method=("ppo", "grpo", "gspo")),
}


@register(source="Unified View, arXiv:2509.04419; table of TsinghuaC3I/Unify-Post-Training", budget={}, when=UPGE_WHEN)
def upge(
    method: Method = "grpo",
    eps: Positive = 0.2,
    gamma: Positive = 0.1,
    use_std: bool = True,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    agg: str = "token_mean",
    L_const: Positive | None = None,  # noqa: N803
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """The unified policy-gradient estimator: ``-agg(sg(w) logp)``, ``w = stable A pi / pi_den``, of one of its rows.

    "sft": 1 on expert rows. "reinforce": 1 or -1 by ``reward > 0``. "ppo": r A with A = token_adv [B, T] where r is
    inside the clip; "grpo": the same with GRPO's A over own rows; "cispo": ``A clip(r)``; "gspo": one ratio a row.
    "srft_off": ``p A`` and "luffy_off": ``A gamma p / (p + gamma)^2`` on expert rows, A over own and expert rows. Other
    rows leave the denominator. Shapes: logp [B, T]; reward, role [B].

    Args:
      agg: take "seq_mean" for "gspo" to get the gradient of its sequence loss.
    """
    offline = method in OFFLINE
    used = EXPERT if offline else OWN
    advantage = advantages.group_normalized(adv_eps, "group" if use_std else "none", singleton=singleton)
    if method == "sft":
        advantage = Advantage(lambda b, s: jnp.ones_like(promote(b.count)))
    elif method == "reinforce":
        advantage = Advantage(lambda b, s: jnp.where(b.reward > 0, 1.0, -1.0), asks_of("reward"))
    elif method == "ppo":
        advantage = Advantage(lambda b, s: b.get("token_adv"), asks_of("token_adv"), per="token")
    elif not offline:
        advantage = among_own(advantage)

    def prepare(b: Rollouts, s: State) -> tuple[Rollouts, State]:
        rows = promote(used(b, s))
        if method == "sft":  # a batch without expert rows is all demonstrations
            rows = jnp.where((rows * b.count).sum() > 0, rows, 1.0)
        adv = per_token(promote(advantage.fn(b, s)))
        return b.with_row(used=rows).replace(adv=clean(b, jnp.broadcast_to(adv, b.mask.shape))), s

    def weighted(stats: TokenStats, b: Rollouts, s: State) -> Array:
        p = jnp.exp(stats.logp)
        if method in ("sft", "reinforce"):
            w = b.adv
        elif offline:
            w = b.adv * p * (1 if method == "srft_off" else gamma / jnp.square(p + gamma))
        else:
            w = estimator_weight(stats.logp, b.logp_old, b.mask, b.adv, method=method, eps=eps, bound=log_ratio_clip)
        w = jnp.where(b.per_row["used"][:, None] > 0, w, 0)  # what others wrote may hold anything as ``logp_old``
        return -lax.stop_gradient(w) * stats.logp

    return from_terms(
        [Term("policy", weighted, aggregation_of(agg, L_const), rows=lambda b, s: b.per_row["used"])],
        asks=advantage.asks.merged(asks_of("role")),
        hooks=Hooks(prepare=prepare),
        protocol=Gathering("demonstrations" if offline else "on_policy"),
    )
