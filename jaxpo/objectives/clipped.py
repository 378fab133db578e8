"""What several published objectives share: how their hyperparameters are read."""

from typing import Any

from jaxpo.arguments import AboveOne, NonNegative, Positive, PositiveOrInfinite, when
from jaxpo.objectives.grammar.base import Objective
from jaxpo.objectives.grammar.parts import Advantage
from jaxpo.objectives.grammar.policy_gradient import policy_gradient
from jaxpo.objectives.parts import aggregation_of, ratios, regularizers, surrogates
from jaxpo.primitives.aggregation import OVER_ROWS, EmptyRows

EMPTY_WHEN = {"empty_rows": when(agg=OVER_ROWS)}


def eps_pair(
    eps: Positive | None, eps_low: Positive, eps_high: Positive, default: tuple[float, float]
) -> tuple[float, float]:
    """``eps`` sets both clip ranges; together with one of them it would hide a contradiction."""
    if eps is None:
        return eps_low, eps_high
    if (eps_low, eps_high) != default:
        raise ValueError("give either eps (both sides) or eps_low and eps_high, not both")
    return eps, eps


def clipped_tokens(
    advantage: Advantage,
    eps: tuple[float, float],
    *,
    agg: str,
    L_const: Positive | None = None,  # noqa: N803
    empty_rows: EmptyRows = "count",
    dual_clip: AboveOne | None = None,
    beta: NonNegative = 0.0,
    log_ratio_clip: PositiveOrInfinite = 20.0,
    **options: Any,
) -> Objective:
    """PPO's clipped surrogate on token ratios, with any advantage, and ``beta k3`` to the reference: GRPO's frame.

    Args:
      options: passed on to `policy_gradient`."""
    return policy_gradient(
        advantage=advantage,
        ratio=ratios.token(log_ratio_clip),
        surrogate=surrogates.clipped(*eps, dual_clip),
        regularizers=[(beta, regularizers.kl_to_reference("k3"))],
        aggregate=aggregation_of(agg, L_const, empty_rows),
        **options,
    )
