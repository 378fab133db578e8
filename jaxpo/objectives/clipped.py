"""What several published objectives share: how their hyperparameters are read."""

from typing import Any

from jaxpo.objectives.grammar.base import Objective
from jaxpo.objectives.grammar.parts import Part
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.parts import aggregation_of, ratios, regularizers, surrogates


def eps_pair(eps: float | None, eps_low: float, eps_high: float, default: tuple[float, float]) -> tuple[float, float]:
    """``eps`` sets both clip ranges; together with one of them it would hide a contradiction."""
    if eps is None:
        return eps_low, eps_high
    if (eps_low, eps_high) != default:
        raise ValueError("give either eps (both sides) or eps_low and eps_high, not both")
    return eps, eps


def clipped_tokens(
    advantage: Part,
    eps: tuple[float, float],
    *,
    agg: str,
    L_const: float | None = None,  # noqa: N803
    dual_clip: float | None = None,
    beta: float = 0.0,
    log_ratio_clip: float = 20.0,
    **options: Any,
) -> Objective:
    """PPO's clipped surrogate on token ratios, with any advantage, and ``beta k3`` to the reference: GRPO's frame."""
    return policy_gradient(
        advantage=advantage,
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.clipped(*eps, dual_clip),
        regularizers=[(beta, regularizers.kl_to_reference("k3"))],
        aggregate=aggregation_of(agg, L_const),
        **options,
    )
