"""Rewards made of other models' words, penalties against other references, and diagnostics of pairs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.fields import PAIR
from jaxpo.metrics import Mean, Metrics
from jaxpo.objectives.grammar.base import State
from jaxpo.objectives.grammar.parts import Part
from jaxpo.objectives.grammar.units import Units, log_ratios
from jaxpo.primitives import aggregation, preference_data, preference_diagnostics, regularizers, shaping
from jaxpo.primitives.advantages import choice
from jaxpo.primitives.numerics import promote
from jaxpo.registry import register

# ---- rewards: (batch, state) -> [B] -------------------------------------------------------------------------------


@register("reward", source="SALSA, arXiv:2411.01798 (coefficients assumed)")
def salsa(kl_coef: float = 0.01) -> Part:
    """``reward - kl_coef sum_t (logp_old - logp_soup)``: the reference is an average of two SFT models
    (`jaxpo.primitives.preferences.blend`)."""

    def fn(b: Rollouts, s: State) -> Array:
        difference = jnp.where(b.mask > 0, promote(b.get("logp_old")) - promote(b.get("logp_soup")), 0)
        return b.reward - kl_coef * difference.sum(-1)

    return Part(fn, frozenset({"reward", "logp_old", "logp_soup"}))


@register("reward", source="FLR, arXiv:2409.13948 (aggregation assumed)")
def flr() -> Part:
    """Follow-up likelihood: the mean over sub-categories of ``pos_ll - neg_ll`` [B, C], how likely a happy rather than
    an unhappy user's next words are."""
    return Part(
        lambda b, s: shaping.followup_likelihood(b.get("pos_ll"), b.get("neg_ll")), frozenset({"pos_ll", "neg_ll"})
    )


R3 = ("rel_query", "rel_answer", "open_ended", "num_words", "num_tri", "uniq_tri")


@register("reward", source="R^3, arXiv:2402.03469")
def relevance_reward_r3(scale: float = 1.0, shift: float = 0.0) -> Part:
    """Regularized relevance: ``rel_query num_words/100 rep`` of an open-ended question,
    ``(scale rel_answer + shift) rep`` of another, ``rep = uniq_tri/num_tri``; all [B]. The rescaling is assumed to be
    the identity by default."""

    def fn(b: Rollouts, s: State) -> Array:
        fields = {name: promote(b.get(name)) for name in R3}
        return shaping.relevance(**fields | {"rel_answer": scale * fields["rel_answer"] + shift})

    return Part(fn, frozenset(R3))


@register("reward", source="PRO, arXiv:2511.10656")
def preference_orchestrator() -> Part:
    """``sum_m softmax(adapter_logits)_m cand_scores_m`` of M reward models [B, M], weighed by the prompt's adapter."""

    def fn(b: Rollouts, s: State) -> Array:
        return jnp.sum(jax.nn.softmax(promote(b.get("adapter_logits"))) * promote(b.get("cand_scores")), -1)

    return Part(fn, frozenset({"adapter_logits", "cand_scores"}))


@register("reward", source="RLUF, arXiv:2505.14946 (weights assumed)")
def rluf(weights: tuple[float, ...] = (0.45, 0.45, 0.1)) -> Part:
    """``sum_m weights_m obj_scores_m`` [B, M]: helpfulness, safety, P[Love]; love 0 is the baseline, 0.1 moderate, 0.3
    aggressive."""

    def fn(b: Rollouts, s: State) -> Array:
        scores = promote(b.get("obj_scores"))
        if scores.shape[-1] != len(weights):
            raise ValueError(f"weights has {len(weights)} numbers for the {scores.shape[-1]} columns of obj_scores")
        return scores @ jnp.asarray(weights, scores.dtype)

    return Part(fn, frozenset({"obj_scores"}))


@register("reward", source="RSO, arXiv:2309.06657")
def rso_reward(clip: float = 1e-6) -> Part:
    """``logit(pref_opp)`` [B], the probability that an answer beats a random one of the SFT policy, as a pairwise
    ranker says it, clipped to [clip, 1 - clip]."""
    return Part(lambda b, s: preference_data.ranker_reward(b.get("pref_opp"), clip=clip), frozenset({"pref_opp"}))


@register("reward", source="RLHS, arXiv:2501.08617")
def rlhs(form: str = "rating") -> Part:
    """What a simulated user says once the consequences of a decision are known: "rating" ``(likert - 3)/2`` [B] of
    ratings 1 to 5, or "utility", the true one: 0 where choice [B] is -1 (none), -1 where the chosen option violates the
    requirement, else the lowest cost among satisfying options over the cost paid, of satisfies, cost [B, options]."""
    choice("form", form, ("rating", "utility"))
    if form == "rating":
        return Part(lambda b, s: preference_data.normalized_rating(b.get("likert")), frozenset({"likert"}))
    fields = ("choice", "satisfies", "cost")
    return Part(lambda b, s: preference_data.true_utility(*(b.get(name) for name in fields)), frozenset(fields))


# ---- a regularizer ------------------------------------------------------------------------------------------------


@register("regularizer", source="arXiv:2403.03185; cassidylaidlaw/llm_optimization")
def orpo_chi2(kind: str = "sqrt_chi2", c: float = 10.0) -> Part:
    """A divergence of whole responses to the reference, ``R = sum_t (logp - logp_ref)``, ``e(R) = exp(R) - 1`` linear
    above
    c: "chi2" ``mean_b (e(R) + e(-R))``, "sqrt_chi2" ``sqrt(max(chi2, 1e-4))``, "kl" ``mean_b (R + e(-R))``. The
    published coefficient is 8e-4."""
    choice("kind", kind, ("sqrt_chi2", "chi2", "kl"))

    def fn(stats: TokenStats, b: Rollouts, s: State) -> Array:
        return regularizers.response_divergence(
            log_ratios(stats, b, "ref").sum(-1), "kl" if kind == "kl" else "chi2", c=c
        )

    return Part(
        fn,
        frozenset({"logp_ref"}),
        per="row",
        name="response_divergence",
        aggregate=aggregation.seq_mean,
        outer=regularizers.sqrt_above if kind == "sqrt_chi2" else None,
    )


# ---- diagnostics: (stats, batch) -> metrics -----------------------------------------------------------------------


@register("diagnostic", source="arXiv:2405.19534; angie-chen55/pref-learning-ranking-acc")
def dpo_ranking_accuracy(
    beta: float = 0.1, pref_prob: float | None = 0.75, normalized: bool = False
) -> Callable[[TokenStats, Rollouts], Metrics]:
    """Of a batch of pairs with ``logp_ref``: the shares that the policy ranks right, that it classifies right relative
    to the reference, that the idealised optimum would rank right, and the mean difficulty ``ref_l - ref_w``.

    Args:
      beta: 0.01 to 10. pref_prob: share of annotators who prefer the chosen answer; None: the batch says, as pref_prob
        [B].
      normalized: averages over tokens instead of sequence sums."""

    def measure(stats: TokenStats, batch: Rollouts) -> Metrics:
        stats = stats.replace(logp=jnp.where(batch.mask > 0, promote(stats.logp), 0))
        ref = jnp.where(batch.mask > 0, promote(batch.get("logp_ref")), 0)
        units, old = Units(stats, batch), Units(stats.replace(logp=ref), batch)
        per = [units.length(role) if normalized else 1 for role in PAIR]
        (w, l), (ref_w, ref_l) = (  # noqa: E741
            [u.logp(role) / n for role, n in zip(PAIR, per, strict=True)] for u in (units, old)
        )
        p = units.get("pref_prob") if pref_prob is None else jnp.full(w.shape, pref_prob)
        count = jnp.ones_like(w) if batch.count is None else batch.unit(promote(batch.count))[:, 0]
        values = {
            "ranking_accuracy": preference_diagnostics.ranking_accuracy(w, l),
            "reward_accuracy": preference_diagnostics.reward_accuracy(w - ref_w, l - ref_l),
            "idealized_accuracy": preference_diagnostics.idealized_accuracy(ref_w, ref_l, p, beta),
            "difficulty": preference_diagnostics.difficulty(ref_w, ref_l),
        }
        return {f"preference/{name}": Mean.of(x, count) for name, x in values.items()}

    return measure


@register("diagnostic", source="arXiv:2404.14367; arXiv:2405.08448")
def mode_seeking(direction: str = "reverse") -> Callable[[Array, Array], Array]:
    """``(logits, target_logits) -> gradient`` [..., V] of a categorical policy towards a target: "forward" KL(q || p)
    covers modes (SFT, best-of-N, reward-weighted regression), "reverse" KL(p || q) seeks them (on-policy RL, or any
    loss with a
    negative gradient: DPO, IPO, CoPG). If good answers are improbable, sample on-policy or use a negative gradient;
    compare methods at equal KL to the reference, not at equal steps."""
    choice("direction", direction, ("forward", "reverse"))
    return (
        preference_diagnostics.forward_kl_gradient
        if direction == "forward"
        else preference_diagnostics.reverse_kl_gradient
    )
