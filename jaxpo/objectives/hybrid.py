"""Objectives that learn from demonstrations, alone or mixed with reinforcement learning."""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.arguments import NONZERO, Count, NonNegative, Positive, PositiveOrInfinite, Share, other_than, when
from jaxpo.batch import Rollouts, TokenStats
from jaxpo.metrics import Mean
from jaxpo.objectives.clipped import eps_pair
from jaxpo.objectives.grammar.base import (
    NO_HOOKS,
    Gathering,
    Hooks,
    Objective,
    State,
    Term,
    Unit,
    asks_of,
    from_terms,
    role,
)
from jaxpo.objectives.grammar.parts import Advantage, Surrogate
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.parts import advantages, aggregation_of, ratios, regularizers, surrogates
from jaxpo.primitives import aggregation, imitation
from jaxpo.primitives.advantages import Singleton
from jaxpo.primitives.imitation import Phi
from jaxpo.primitives.numerics import promote, ratio_or_zero
from jaxpo.registry import register


@register(source="standard maximum likelihood", budget={})
def sft(agg: str = "token_mean", L_const: Positive | None = None) -> Objective:  # noqa: N803
    """Supervised fine-tuning: ``-logp`` of the completion tokens, averaged over the whole batch.

    Shapes: logp [B, T]. Prompt tokens are never trained.

    Args:
      agg, L_const: "token_mean" (default), "seq_mean", or "seq_sum_const" with its constant.
    """
    return from_terms([Term("nll", lambda stats, batch, state: -stats.logp, aggregation_of(agg, L_const))])


LUFFY_WHEN = {
    "shaping": when(recorded=False),
    "gamma": when(shaping="p_div_p", recorded=False),
    "eps": when(clip=True),
    "adv_eps": when(use_std=True),
}


@register(source="LUFFY, arXiv:2504.14945; code of ElliottYan/LUFFY", budget={}, when=LUFFY_WHEN)
def luffy(
    shaping: Literal["p_div_p", "none"] = "p_div_p",
    gamma: Positive = 0.1,
    recorded: bool = False,
    clip: bool = False,
    eps: Positive = 0.2,
    use_std: bool = False,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    entropy_coef: NonNegative = 0.0,
    agg: str = "token_mean",
    L_const: Positive | None = None,  # noqa: N803
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Mixed-policy GRPO: own rows ``-r A``, expert rows ``-f(p) A`` with ``p = exp(logp)``, unclipped; A over own and
    expert rows of a prompt together.

    The expert's own probability is taken as 1, or as recorded. Shapes: logp [B, T]; reward, role [B].

    Args:
      shaping: ``f(p) = p / (p + gamma)`` ("p_div_p") or ``f(p) = p`` ("none").
      recorded: expert rows get ``-p / (q + 1e-6) A`` instead, q = expert_prob [B, T].
      clip, eps: PPO's clip on own rows; the released code has none.
      use_std: divide A by the group's std + adv_eps.
      entropy_coef: of an entropy bonus; 0.001 in the released script.
      agg, L_const: over the tokens of own and expert rows.
    """
    own = surrogates.clipped(eps, eps) if clip else surrogates.linear()
    expert = surrogates.shaped_probability(gamma if shaping == "p_div_p" else None)
    if recorded:
        expert = surrogates.expert_ratio()
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, "group" if use_std else "none", singleton=singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.by_role(own, expert=expert),
        regularizers=[(entropy_coef, regularizers.entropy())],
        aggregate=aggregation_of(agg, L_const),
        protocol=Gathering("demonstrations"),
    )


OWN, EXPERT = role("own"), role("expert")


@register(source="SRFT, arXiv:2506.19767; re-implementation in TsinghuaC3I/Unify-Post-Training")
def srft(
    c_sft: NonNegative = 0.5,
    c_rl: NonNegative = 0.1,
    success: float = 1.0,
    use_std: bool = True,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    agg: str = "token_mean",
    L_const: Positive | None = None,  # noqa: N803
) -> Objective:
    """Supervised Reinforcement Fine-Tuning: imitation and reinforcement in one stage, weighed by the row's entropy.

    ``token mean over expert rows of -c_sft exp(-H) logp``, plus over all rows: expert ``-A exp(logp)``, solved own rows
    ``-c_rl exp(H) logp``, other own rows ``+logp``. H is the mean entropy of the row under the current policy, a
    constant; A is over own and expert rows of a prompt together. Shapes: logp, entropy [B, T]; reward, role [B]. No
    ratio, no clip.

    Args:
      success: reward from which on an own row is solved.
      use_std: divide A by the group's std + adv_eps.
      agg, L_const: of the second part.
    """

    def entropy(stats: TokenStats, b: Rollouts) -> Array:
        on = promote(b.mask)
        return lax.stop_gradient(ratio_or_zero((stats.entropy * on).sum(-1), on.sum(-1)))[:, None]

    def of_own(x: Array, adv: Array, stats: TokenStats, b: Rollouts, s: State) -> Array:
        solved = (promote(b.reward) >= success)[:, None]
        return jnp.where(solved, -c_rl * jnp.exp(entropy(stats, b)), 1.0) * stats.logp

    wants = asks_of(wants=("entropy",))
    own = Surrogate(of_own, wants, per="token", uses_ratio=False, id="srft")
    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, "group" if use_std else "none", singleton=singleton),
        ratio=ratios.token(),
        surrogate=surrogates.by_role(own, expert=surrogates.shaped_probability(None)),
        aggregate=aggregation_of(agg, L_const),
        terms=[
            Term("sft", lambda stats, b, s: -c_sft * jnp.exp(-entropy(stats, b)) * stats.logp, rows=EXPERT, asks=wants)
        ],
        protocol=Gathering("demonstrations"),
    )


CHORD_WHEN = dict.fromkeys(("warmup", "decay", "peak", "valley"), when(mu=None))


@register(source="CHORD, arXiv:2508.11408; modelscope/Trinity-RFT chord_policy_loss", budget={}, when=CHORD_WHEN)
def chord(
    mu: Share | None = None,
    warmup: Count = 200,
    decay: Count = 400,
    peak: Share = 0.5,
    valley: Share = 0.02,
    phi: Phi = "p1mp",
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    agg: str = "token_mean",
    L_const: Positive | None = None,  # noqa: N803
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Controllable Harmonization of on- and off-policy RL: ``(1 - mu) L_RL + mu L_SFT``, mu by the iteration.

    L_RL is GRPO over own rows. L_SFT is the mean over expert rows of ``-sg(phi(p)) logp``, ``p = exp(logp)``. Shapes:
    logp [B, T]; reward, role [B].

    Args:
      mu: a number (0.1 in CHORD-phi) instead of the schedule.
      warmup, decay, peak, valley: mu rises to ``peak`` in ``warmup`` iterations, from 0, and falls along a cosine to
        ``valley`` in ``decay`` (`jaxpo.primitives.imitation.imitation_share`). CHORD-mu: 0, 200, 0.9, 0.05, no phi.
      phi: "p1mp": ``p (1 - p)``; "is": ``p``; "none": 1.
      agg, L_const: of both.
    """

    def share(state: State) -> Array:
        if mu is not None:
            return jnp.asarray(mu, jnp.result_type(float))
        return imitation.imitation_share(state.iteration, warmup=warmup, decay=decay, peak=peak, valley=valley)

    return mixed(
        share,
        lambda stats, b, s: -imitation.demonstrated_weight(stats.logp, phi=phi) * stats.logp,
        eps_pair(eps, eps_low, eps_high, (0.2, 0.2)),
        aggregation_of(agg, L_const),
        advantages.group_normalized(adv_eps, singleton=singleton),
        log_ratio_clip,
    )


def mixed(
    share: Callable[[State], Array],
    imitated: Callable[[TokenStats, Rollouts, State], Array],
    eps: tuple[Any, Any],
    aggregate: aggregation.Aggregation,
    advantage: Advantage,
    log_ratio_clip: Any,
    hooks: Hooks = NO_HOOKS,
    **more: Any,
) -> Objective:
    """``(1 - mu) L_RL + mu L_SFT``: the clipped surrogate over own rows, and a loss of expert rows; mu = ``share``."""

    def report(stats: TokenStats, b: Rollouts, s: State) -> dict[str, Any]:
        return {"imitation/mu": Mean.of(jnp.broadcast_to(share(s), b.count.shape), promote(b.count))}

    return policy_gradient(
        advantage=advantage,
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.clipped(*eps),
        aggregate=aggregate,
        rows=OWN,
        scale=lambda s: 1 - share(s),
        terms=[Term("sft", imitated, aggregate, rows=EXPERT, coef=share, hooks=Hooks(metrics=report).merged(hooks))],
        asks=asks_of("role"),
        protocol=Gathering("demonstrations"),
        **more,
    )


HPT_WHEN = {
    "eps": when(clip=True),
    "adv_eps": when(use_std=True),
    "L_const": when(rl_agg=tuple(aggregation.WITH_CONSTANT)),
}


@register(
    source="HPT, arXiv:2509.04419; code of TsinghuaC3I/Unify-Post-Training", budget={"L_const": 1.0}, when=HPT_WHEN
)
def hpt(
    gate: int = 0,
    rl_coef: NonNegative = 1.0,
    sft_coef: NonNegative = 1.0,
    success: float = 1.0,
    clip: bool = False,
    eps: Positive = 0.2,
    use_std: bool = False,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    rl_agg: str = "sum_const",
    L_const: Positive | None = 8192,  # noqa: N803
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Hybrid Post-Training: a prompt with more than ``gate`` solved own rows learns from its own rows alone, another
    one from its demonstrations alone.

    ``rl_coef L_RL + sft_coef L_SFT``: L_RL of ``-r A`` over the own rows that stay, A over these; L_SFT the token mean
    of ``-logp`` over the expert rows that stay. Shapes: logp [B, T]; reward, role [B].

    Args:
      gate: below 0, reinforcement alone; at least K, imitation alone.
      sft_coef: 0.3 for the paper's 1.5B model. success: reward from which on a row is solved.
      clip, eps: PPO's clip on own rows. use_std: divide A by the group's std + adv_eps.
      rl_agg, L_const: of L_RL; sums are over all rows, and not divided by their number.
    """
    own = surrogates.clipped(eps, eps) if clip else surrogates.linear()

    def gates(b: Rollouts) -> Rollouts:
        solved = imitation.successes(b.reward, b.group, b.count * OWN(b, None), success=success)
        return b.with_row(reinforced=promote(solved > gate))

    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps, "group" if use_std else "none", singleton=singleton),
        ratio=ratios.token(log_ratio_clip),
        surrogate=own,
        aggregate=aggregation_of(rl_agg, L_const if rl_agg in aggregation.WITH_CONSTANT else None),
        first=gates,
        rows=lambda b, s: OWN(b, s) * b.per_row["reinforced"],
        scale=rl_coef,
        terms=[
            Term(
                "sft",
                lambda stats, b, s: -stats.logp,
                rows=lambda b, s: EXPERT(b, s) * (1 - b.per_row["reinforced"]),
                coef=sft_coef,
                hooks=Hooks(metrics=lambda stats, b, s: {"imitation/reinforced": of_own(b, b.per_row["reinforced"])}),
            )
        ],
        asks=asks_of("role"),
        protocol=Gathering("demonstrations"),
    )


def of_own(b: Rollouts, x: Array) -> Mean:
    """The mean of a number a row over the policy's own rows, as a metric."""
    return Mean.of(x, promote(b.count) * OWN(b, None))


AHPO_WHEN = {"r_hat": when(static_coef=None), "success": when(static_coef=None), "adv_eps": when(use_std=True)}


@register(source="AHPO in MM-HELIX, arXiv:2510.08540 (clip range assumed)", budget={}, when=AHPO_WHEN)
def ahpo(
    r_hat: Count = 2,
    static_coef: NonNegative | None = None,
    success: float = 1.0,
    norm: Literal["separate", "shared"] = "separate",
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    use_std: bool = True,
    adv_eps: NonNegative = 1e-6,
    singleton: Singleton = "zero",
    agg: str = "token_mean",
    L_const: Positive | None = None,  # noqa: N803
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Adaptive Hybrid Policy Optimization: GRPO over own rows, plus ``-xi logp`` over all expert rows; xi = 1 for
    prompts of which fewer than ``r_hat`` own rows are solved, else 0.

    Shapes: logp [B, T]; reward, role [B]. Tokens of weight 0 stay in the denominator.

    Args:
      static_coef: replaces xi (the paper's ablation). success: reward from which on a row is solved.
      norm: "separate": each sum has its own mean; "shared": one mean over own and expert rows together (all tokens:
        assumed).
      use_std: divide A, over own rows, by the group's std + adv_eps.
    """
    aggregate, clipped = aggregation_of(agg, L_const), surrogates.clipped(*eps_pair(eps, eps_low, eps_high, (0.2, 0.2)))

    def gates(b: Rollouts) -> Rollouts:
        solved = imitation.successes(b.reward, b.group, b.count * OWN(b, None), success=success)
        xi = promote(solved < r_hat) if static_coef is None else jnp.full(b.rows, static_coef, jnp.result_type(float))
        return b.with_row(imitated=xi)

    def imitated(stats: TokenStats, b: Rollouts, s: State) -> Array:
        return -b.per_row["imitated"][:, None] * stats.logp

    advantage = advantages.group_normalized(adv_eps, "group" if use_std else "none", singleton=singleton)
    common = dict(first=gates, ratio=ratios.token(log_ratio_clip), aggregate=aggregate, asks=asks_of("role"))
    common |= dict(protocol=Gathering("demonstrations"))
    if norm == "separate":
        sft = Term("sft", imitated, aggregate, rows=EXPERT)
        return policy_gradient(advantage=advantage, surrogate=clipped, rows=OWN, terms=[sft], **common)
    expert = Surrogate(lambda x, adv, *seen: imitated(*seen), per="token", uses_ratio=False, id="gated_log_prob")
    both = surrogates.by_role(clipped, expert=expert)
    return policy_gradient(advantage=among_own(advantage), surrogate=both, **common)


def among_own(advantage: Advantage) -> Advantage:
    """An advantage whose statistics are of the policy's own rows alone; other rows get 0."""

    def fn(b: Rollouts, s: State) -> Array:
        own = promote(OWN(b, s))
        return own * advantage.fn(b.replace(count=b.count * own), s)

    return advantage._replace(fn=fn, asks=advantage.asks.merged(asks_of("role")))


TIERS = Hooks(metrics=lambda stats, b, s: {f"tier/{name}": of_own(b, b.per_row[name]) for name in ("hard", "middle")})
REINFORCED = ("beta_kl", "level", "eps_low", "eps_high", "eps", "adv_eps", "log_ratio_clip")
DYPO_WHEN = {"beta_gal": when(alpha=other_than(1)), **dict.fromkeys(REINFORCED, when(alpha=NONZERO))}


@register(source="DYPO, arXiv:2604.08926; an earlier commit of Tocci-Zhu/DYPO", when=DYPO_WHEN)
def dypo(
    alpha: Share = 0.5,
    beta_gal: Positive = 1.0,
    gamma_sft: NonNegative = 1.0,
    beta_kl: NonNegative = 0.0,
    level: Literal["sequence", "token"] = "sequence",
    sft_norm: Literal["sum", "mean"] = "sum",
    eps_low: Positive = 0.2,
    eps_high: Positive = 0.2,
    eps: Positive | None = None,
    fail: float = 0.0,
    success: float = 1.0,
    adv_eps: NonNegative = 1e-6,
    log_ratio_clip: PositiveOrInfinite = 20.0,
) -> Objective:
    """Dynamic Policy Optimization: the mean over prompts of imitation where all own rows fail (hard), nothing where all
    succeed (easy), and ``alpha L_G + (1 - alpha) L_GAL`` in between.

    Hard: ``gamma_sft`` times the mean over expert rows of ``-sum_t logp``. L_G: the mean over own rows of the clipped
    surrogate, plus ``beta_kl`` times the token mean of k3 to the reference. L_GAL: the mean over pairs of own rows (s,
    f) with reward_s > reward_f of ``-log sigmoid(beta_gal (d_s - d_f))``, ``d = sum_t (logp - logp_ref)``. Shapes:
    logp, logp_ref [B, T]; reward, role [B].

    Args:
      level: one ratio a row, ``exp(mean_t (logp - logp_old))`` ("sequence"), or one a token.
      sft_norm: "sum" over a row's tokens (paper), or their "mean".
      fail, success: rewards at or below, and at or above, which a row fails and succeeds.
    """
    low, high = eps_pair(eps, eps_low, eps_high, (0.2, 0.2))

    def tiered(b: Rollouts) -> Rollouts:
        hard, middle = imitation.tiers(b.reward, b.group, b.count * OWN(b, None), fail=fail, success=success)
        return b.with_row(hard=promote(hard), middle=promote(middle))

    def middle(b: Rollouts, s: State) -> Array:
        return OWN(b, s) * b.per_row["middle"]

    def aligned(stats: TokenStats, b: Rollouts, s: State) -> Array:
        drift = jnp.where(b.mask > 0, stats.logp - b.get("logp_ref"), 0).sum(-1)
        members = b.count * middle(b, s)
        return imitation.pairwise_preference(drift, b.reward, b.group, members, beta=beta_gal)

    def imitated(stats: TokenStats, b: Rollouts, s: State) -> Array:
        total = jnp.where(b.mask > 0, -stats.logp, 0).sum(-1)
        return total if sft_norm == "sum" else ratio_or_zero(total, b.lengths)

    return policy_gradient(
        advantage=advantages.group_normalized(adv_eps),
        ratio=ratios.sequence_mean(log_ratio_clip) if level == "sequence" else ratios.token(log_ratio_clip),
        surrogate=surrogates.clipped(low, high),
        regularizers=[(alpha * beta_kl, regularizers.kl_to_reference("k3"))],
        aggregate=aggregation.prompt_mean,
        first=tiered,
        rows=middle,
        scale=alpha,
        terms=[
            Term(
                "sft",
                imitated,
                aggregation.prompt_mean,
                rows=lambda b, s: EXPERT(b, s) * b.per_row["hard"],
                coef=gamma_sft,
                per="row",
                hooks=TIERS,
            ),
            Term(
                "gal", aligned, aggregation.prompt_sum, rows=middle, coef=1 - alpha, per="row", asks=asks_of("logp_ref")
            ),
        ],
        asks=asks_of("role"),
        unit=Unit(coupling="group"),
        protocol=Gathering("demonstrations"),
    )
