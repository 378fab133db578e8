"""Objectives that learn from demonstrations, alone or mixed with reinforcement learning."""

from jaxpo.arguments import Positive
from jaxpo.objectives.grammar.base import Objective, Term, from_terms
from jaxpo.objectives.parts import aggregation_of
from jaxpo.registry import register


@register(source="standard maximum likelihood", budget={})
def sft(agg: str = "token_mean", L_const: Positive | None = None) -> Objective:  # noqa: N803
    """Supervised fine-tuning: ``-logp`` of the completion tokens, averaged over the whole batch.

    Shapes: logp [B, T]. Prompt tokens are never trained.

    Args:
      agg, L_const: "token_mean" (default), "seq_mean", or "seq_sum_const" with its constant.
    """
    return from_terms([Term("nll", lambda stats, batch, state: -stats.logp, aggregation_of(agg, L_const))])
