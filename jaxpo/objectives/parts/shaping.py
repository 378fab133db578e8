"""Rewards: ``fn(batch, state) -> [B]``, a new reward of the batch's fields."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxpo.arguments import NONZERO, Domain, NonNegative, Positive, Whole, number, when
from jaxpo.batch import Rollouts
from jaxpo.objectives.grammar.base import State, is_off
from jaxpo.objectives.grammar.parts import Shaping, asks_of, reads
from jaxpo.primitives import preference_data, shaping
from jaxpo.primitives.numerics import promote
from jaxpo.registry import register

# ---- edits of the reward ------------------------------------------------------------------------------------------


@register("reward", source="RLOO, arXiv:2402.14740")
def kl_in_reward(beta: NonNegative = 0.05) -> Shaping:
    """``reward - beta sum_t (logp_old - logp_ref)``: the k1 estimate on the rollout's own log-probs, a constant."""
    return less_kl(beta, "logp_ref")


@register("reward", source="SALSA, arXiv:2411.01798 (coefficients assumed)")
def salsa(kl_coef: NonNegative = 0.01) -> Shaping:
    """``reward - kl_coef sum_t (logp_old - logp_soup)``: the reference is an average of two SFT models
    (`jaxpo.primitives.preferences.blend`)."""
    return less_kl(kl_coef, "logp_soup")


def less_kl(coef: float | Array, reference: str) -> Shaping:
    """``reward - coef sum_t (logp_old - reference)``."""
    return Shaping(*reads(shaping.less_drift, "reward", "logp_old", reference, "mask", coef=coef))


@register("reward", source="GHPO, arXiv:2507.10628; code of hkgc-1/GHPO")
def accuracy_and_format(w_acc: NonNegative = 1.0, w_fmt: NonNegative = 0.5) -> Shaping:
    """``w_acc r_1 + w_fmt (r_2 + ...)`` of ``rewards_multi`` [B, R]: the first reward is of accuracy, the others of
    form. With ``w_fmt=0`` it is ``w_acc reward``. A reward whose weight in ``reward_weights`` [B, R] is 0 was not given
    and counts as 0.

    Raises:
      ValueError: there is no reward of form, and w_fmt is not 0."""
    if is_off(w_fmt):
        return Shaping(lambda b, s: w_acc * promote(b.reward), asks_of("reward"))

    def fn(b: Rollouts, s: State) -> Array:
        rewards = jnp.where(b.get("reward_weights") != 0, promote(b.get("rewards_multi")), 0)
        if rewards.shape[1] == 1:
            raise ValueError(
                f"w_fmt = {w_fmt} weighs rewards of form, and the task has one reward alone: give it a second one "
                "(config.task.rewards, accuracy first), or set w_fmt=0"
            )
        return w_acc * rewards[:, 0] + w_fmt * rewards[:, 1:].sum(1)

    return Shaping(fn, asks_of("rewards_multi", "reward_weights"), replaces=True)


@register("reward", source="FAPO, arXiv:2510.22543; recipe/fapo of volcengine/verl")
def less_flawed(lam: NonNegative = 1.0) -> Shaping:
    """1 if the answer is correct, else -1; less ``lam`` if it is correct and flawed."""

    def fn(b: Rollouts, s: State) -> Array:
        right = promote(b.correct) > 0
        return jnp.where(right, 1.0, -1.0) - lam * (right & (b.get("flawed") > 0))

    return Shaping(fn, asks_of("correct", "flawed"), replaces=True)


@register("reward", source="The Policy Cliff, arXiv:2507.20150")
def weighted_sum() -> Shaping:
    """``sum_k reward_weights_k rewards_multi_k`` [B]; a reward of weight 0 may hold anything."""

    def fn(b: Rollouts, s: State) -> Array:
        weight = promote(b.get("reward_weights"))
        return jnp.where(weight != 0, weight * b.get("rewards_multi"), 0).sum(1)

    return Shaping(fn, asks_of("rewards_multi", "reward_weights"), replaces=True)


OVERLONG_WHEN = {"max_len": when(penalty=NONZERO), "buffer": when(penalty=NONZERO)}


@register("reward", source="DAPO, arXiv:2503.14476, eq. 13", budget={"max_len": 1.0, "buffer": 0.2}, when=OVERLONG_WHEN)
def overlong(max_len: Whole = 20480, buffer: Whole = 4096, penalty: NonNegative = 1.0) -> Shaping:
    """``reward + p(length)``; see `jaxpo.primitives.shaping.overlong_penalty`."""
    number("buffer", buffer, Domain(1, max_len, whole=True))
    fall, _ = reads(shaping.overlong_penalty, "lengths", max_len=max_len, buffer=buffer, penalty=penalty)
    return Shaping(lambda b, s: b.reward + fall(b, s), asks_of("reward"))


# ---- rewards made of other models' words --------------------------------------------------------------------------


@register("reward", source="FLR, arXiv:2409.13948 (aggregation assumed)")
def flr() -> Shaping:
    """Follow-up likelihood: the mean over sub-categories of ``pos_ll - neg_ll`` [B, C], how likely a happy rather than
    an unhappy user's next words are."""
    return Shaping(*reads(shaping.followup_likelihood))


R3 = ("rel_query", "rel_answer", "open_ended", "num_words", "num_tri", "uniq_tri")


@register("reward", source="R^3, arXiv:2402.03469")
def relevance_reward_r3(scale: float = 1.0, shift: float = 0.0) -> Shaping:
    """Regularized relevance: ``rel_query num_words/100 rep`` of an open-ended question,
    ``(scale rel_answer + shift) rep`` of another, ``rep = uniq_tri/num_tri``; all [B]. The rescaling is assumed to be
    the identity by default.

    A batch of your own has these numbers as fields. In a run, the reward ``relevance`` of the task computes the same
    from texts (docs/rewards.md)."""

    def fn(b: Rollouts, s: State) -> Array:
        fields = {name: promote(b.get(name)) for name in R3}
        return shaping.relevance(**fields | {"rel_answer": scale * fields["rel_answer"] + shift})

    return Shaping(fn, asks_of(*R3))


@register("reward", source="PRO, arXiv:2511.10656")
def preference_orchestrator() -> Shaping:
    """``sum_m softmax(adapter_logits)_m cand_scores_m`` of M reward models [B, M], weighed by the prompt's adapter."""

    def fn(b: Rollouts, s: State) -> Array:
        return jnp.sum(jax.nn.softmax(promote(b.get("adapter_logits"))) * promote(b.get("cand_scores")), -1)

    return Shaping(fn, asks_of("adapter_logits", "cand_scores"))


@register("reward", source="RLUF, arXiv:2505.14946 (weights assumed)")
def rluf(weights: tuple[float, ...] = (0.45, 0.45, 0.1)) -> Shaping:
    """``sum_m weights_m obj_scores_m`` [B, M]: helpfulness, safety, P[Love]; love 0 is the baseline, 0.1 moderate, 0.3
    aggressive."""

    def fn(b: Rollouts, s: State) -> Array:
        scores = promote(b.get("obj_scores"))
        if scores.shape[-1] != len(weights):
            raise ValueError(f"weights has {len(weights)} numbers for the {scores.shape[-1]} columns of obj_scores")
        return scores @ jnp.asarray(weights, scores.dtype)

    return Shaping(fn, asks_of("obj_scores"))


@register("reward", source="RSO, arXiv:2309.06657")
def rso_reward(clip: Positive = 1e-6) -> Shaping:
    """``logit(pref_opp)`` [B], the probability that an answer beats a random one of the SFT policy, as a pairwise
    ranker says it, clipped to [clip, 1 - clip]."""
    number("clip", clip, Domain(0, 0.5, "()"))
    return Shaping(*reads(preference_data.ranker_reward, "pref_opp", clip=clip))


@register("reward", source="RLHS, arXiv:2501.08617")
def rlhs(form: Literal["rating", "utility"] = "rating") -> Shaping:
    """What a simulated user says once the consequences of a decision are known: "rating" ``(likert - 3)/2`` [B] of
    ratings 1 to 5, or "utility", the true one: 0 where choice [B] is -1 (none), -1 where the chosen option violates the
    requirement, else the lowest cost among satisfying options over the cost paid, of satisfies, cost [B, options]."""
    if form == "rating":
        return Shaping(*reads(preference_data.normalized_rating))
    return Shaping(*reads(preference_data.true_utility))
