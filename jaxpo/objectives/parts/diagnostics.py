"""Diagnostics: what preference training achieved, and where a loss moves probability."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import Array

from jaxpo.arguments import OpenShare, Positive
from jaxpo.batch import Rollouts, TokenStats
from jaxpo.fields import PAIR
from jaxpo.metrics import Mean, Metrics
from jaxpo.objectives.grammar.units import Units
from jaxpo.primitives import preference_diagnostics
from jaxpo.primitives.numerics import promote
from jaxpo.registry import register


@register("diagnostic", source="arXiv:2405.19534; angie-chen55/pref-learning-ranking-acc")
def dpo_ranking_accuracy(
    beta: Positive = 0.1, pref_prob: OpenShare | None = 0.75, normalized: bool = False
) -> Callable[[TokenStats, Rollouts], Metrics]:
    """Of a batch of pairs with ``logp_ref``: the shares that the policy ranks right, that it classifies right relative
    to the reference, that the idealized optimum would rank right, and the mean difficulty ``ref_l - ref_w``.

    Args:
      beta: 0.01 to 10. pref_prob: share of annotators who prefer the chosen answer; None: the batch says, as pref_prob
        [B].
      normalized: the policy ranks by averages over tokens. The other three compare sequence sums all the same: they are
        statements about the optimum of DPO, which knows no lengths."""

    def measure(stats: TokenStats, batch: Rollouts) -> Metrics:
        stats = stats.replace(logp=jnp.where(batch.mask > 0, promote(stats.logp), 0))
        ref = jnp.where(batch.mask > 0, promote(batch.get("logp_ref")), 0)
        units, old = Units(stats, batch), Units(stats.replace(logp=ref), batch)
        (w, l), (ref_w, ref_l) = ([u.logp(role) for role in PAIR] for u in (units, old))  # noqa: E741
        length_w, length_l = [units.length(role) if normalized else 1 for role in PAIR]
        p = units.get("pref_prob") if pref_prob is None else jnp.full(w.shape, pref_prob)
        count = jnp.ones_like(w) if batch.count is None else batch.unit(promote(batch.count))[:, 0]
        values = {
            "ranking_accuracy": preference_diagnostics.ranking_accuracy(w / length_w, l / length_l),
            "reward_accuracy": preference_diagnostics.reward_accuracy(w - ref_w, l - ref_l),
            "idealized_accuracy": preference_diagnostics.idealized_accuracy(ref_w, ref_l, p, beta),
            "difficulty": preference_diagnostics.difficulty(ref_w, ref_l),
        }
        return {f"preference/{name}": Mean.of(x, count) for name, x in values.items()}

    return measure


@register("diagnostic", source="arXiv:2404.14367; arXiv:2405.08448")
def mode_seeking(direction: Literal["forward", "reverse"] = "reverse") -> Callable[[Array, Array], Array]:
    """``(logits, target_logits) -> gradient`` [..., V] of a categorical policy towards a target: "forward" KL(q || p)
    covers modes (SFT, best-of-N, reward-weighted regression), "reverse" KL(p || q) seeks them (on-policy RL, or any
    loss with a negative gradient: DPO, IPO, CoPG). If good answers are improbable, sample on-policy or use a negative
    gradient; compare methods at equal KL to the reference, not at equal steps."""
    return (
        preference_diagnostics.forward_kl_gradient
        if direction == "forward"
        else preference_diagnostics.reverse_kl_gradient
    )
