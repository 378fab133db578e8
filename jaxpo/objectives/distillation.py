"""Objectives that pull the policy to a teacher, on the policy's own text or on the teacher's."""

from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax, nn

from jaxpo.arguments import NonNegative, Positive, PositiveOrInfinite, Share, Whole, when
from jaxpo.batch import Compared, Rollouts
from jaxpo.objectives.clipped import eps_pair
from jaxpo.objectives.grammar.base import Asks, Objective, State, Term, asks_of, from_terms
from jaxpo.objectives.grammar.parts import Advantage
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.parts import advantages, aggregation_of, ratios, surrogates
from jaxpo.primitives import divergences, token_advantages
from jaxpo.primitives.divergences import Divergence
from jaxpo.primitives.numerics import promote
from jaxpo.registry import register

LOGITS = ("full", "topk")
SAMPLED = when(mode="sampled")
OPD_WHEN = {
    "divergence": when(mode=LOGITS),
    "beta": when(mode=LOGITS, divergence="jsd"),
    "alpha": when(mode=LOGITS, divergence=("skew_kl", "skew_rkl")),
    "a": when(mode=LOGITS, divergence="f_alpha"),
    "temperature": when(mode=LOGITS),
    "k": when(mode="topk"),
    "tail": when(mode="topk"),
    "gamma": SAMPLED,
    "use_ratio": when(mode="sampled", rl=False),
    "rl": SAMPLED,
    **dict.fromkeys(("eps_low", "eps_high", "eps"), when(mode="sampled", rl=True)),
    "log_ratio_clip": (when(mode="sampled", use_ratio=True), when(mode="sampled", rl=True)),
}


@register(
    source="On-policy distillation: GKD, arXiv:2306.13649; MiniLLM, arXiv:2306.08543; DistiLLM, arXiv:2402.03898",
    budget={},
    when=OPD_WHEN,
)
def on_policy_distillation(
    mode: Literal["full", "topk", "sampled", "sequence"] = "full",
    divergence: Divergence = "reverse_kl",
    beta: Share = 0.5,
    alpha: Share = 0.1,
    a: float = 0.5,
    temperature: Positive = 1.0,
    k: Whole = 4,
    tail: bool = True,
    gamma: Share = 0.0,
    use_ratio: bool = False,
    rl: bool = False,
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    coef: NonNegative = 1.0,
    agg: str = "token_mean",
    L_const: Positive | None = None,  # noqa: N803
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Pull the policy Q to a teacher P of the same vocabulary; there is never a gradient through sampling.

    "full": ``coef`` times a divergence of the two at every token (`jaxpo.primitives.divergences`), from their logits
    slice by slice. "topk": the same on the most probable tokens. "sampled": ``-A logp``, ``A_t = coef (logp_teacher -
    logp_old) + gamma A_(t+1)``; on policy with gamma 0 its expected gradient is that of the reverse KL. "sequence":
    ``-coef logp`` of rows that the teacher wrote. Shapes: logp, logp_teacher [B, T].

    Args:
      beta: of jsd. alpha: of the skews. a: of f_alpha, neither 0 nor 1.
      temperature: of both, in the divergence.
      k: tokens of the support: the teacher's most probable ones (forward), the student's (reverse), both (others).
      tail: the rest of the probability is one more token; False: both are renormalized on the support.
      gamma: 0 = token level, 1 = the return of the sequence's reverse KL.
      use_ratio: ``-A r`` instead of ``-A logp``, unclipped.
      rl: add A to GRPO's advantage, in its clipped loss; needs rewards.
    """
    if isinstance(a, int | float) and a in (0, 1):
        raise ValueError(f"a = {a:g}: f_alpha is not defined at 0 and 1: take f_rkl or f_kl")
    aggregate = aggregation_of(agg, L_const)
    if mode == "sequence":
        return from_terms([Term("nll", lambda stats, b, s: -stats.logp, aggregate, coef=coef)])
    if mode == "sampled":
        return sampled(
            gamma, use_ratio, rl, eps_pair(eps, eps_low, eps_high, (0.2, 0.2)), coef, aggregate, log_ratio_clip
        )
    numbers = dict(beta=beta, alpha=alpha, a=a)
    fn = partial(divergence_of_logits, divergence=divergence, temperature=temperature, k=k if mode == "topk" else None)
    fn = partial(fn, tail=tail, **numbers)
    asks = Asks(wants=frozenset({"divergence"}), derived={"divergence": Compared(fn)})
    value = Term("divergence", lambda stats, b, s: stats.derived["divergence"], aggregate, coef=coef, asks=asks)
    return from_terms([value])


def divergence_of_logits(
    logits: Array,
    tokens: Array,
    teacher: Array,
    *,
    divergence: Divergence,
    temperature: float | Array,
    k: int | None,
    tail: bool,
    **numbers: float | Array,
) -> Array:
    """[n] the divergence of two models' logits [n, V]; on the most probable tokens alone with ``k``."""
    log_q, log_p = (nn.log_softmax(promote(x) / temperature) for x in (logits, teacher))
    if k is None or k >= logits.shape[-1]:
        return divergences.full(log_p, log_q, divergence, **numbers)
    support = lax.stop_gradient(divergences.support_of(log_p, log_q, divergence, k, numbers["beta"]))
    return divergences.on_support(log_p, log_q, support, divergence, tail=tail, **numbers)


def sampled(
    gamma: float, use_ratio: bool, rl: bool, eps: tuple[float, float], coef: float, aggregate: object, bound: float
) -> Objective:
    """The policy gradient of ``logp_teacher - logp_old``, alone or beside GRPO's advantage."""
    group = advantages.group_normalized()

    def fn(b: Rollouts, s: State) -> Array:
        gap = jnp.where(b.mask > 0, promote(b.get("logp_teacher")) - promote(b.get("logp_old")), 0)
        adv = token_advantages.returns_to_go(coef * gap, b.mask, gamma)
        return adv + group.fn(b, s)[:, None] if rl else adv

    asks = asks_of("logp_teacher", "logp_old")
    advantage = Advantage(fn, asks.merged(group.asks._replace(responses=1)) if rl else asks, per="token")
    surrogate = surrogates.clipped(*eps) if rl else surrogates.linear() if use_ratio else surrogates.log_prob()
    return policy_gradient(advantage=advantage, ratio=ratios.token(bound), surrogate=surrogate, aggregate=aggregate)
