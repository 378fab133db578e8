"""Losses of a critic: terms that train the parameters labeled "critic"."""

from jax import Array

from jaxpo.arguments import NonNegative, Positive
from jaxpo.batch import Rollouts, TokenStats
from jaxpo.objectives.grammar.base import State, Term, clean
from jaxpo.objectives.grammar.parts import asks_of
from jaxpo.primitives import aggregation, values
from jaxpo.registry import register


@register("term", source="PPO, arXiv:1707.06347; verl compute_value_loss")
def clipped_value(eps_v: Positive | None = 0.2, coef: NonNegative = 0.1) -> Term:
    """``coef`` times half the squared error of the critic to ``returns``, mean over all tokens; the worse of the value
    and the value clipped to ``value_old ± eps_v``.

    ``returns`` [B, T] is what the advantage `jaxpo.objectives.parts.advantages.gae` writes. Shapes: value, value_old
    [B, T].

    Args:
      eps_v: None = no clip."""

    def value(stats: TokenStats, batch: Rollouts, state: State) -> Array:
        old = stats.value if eps_v is None else batch.value_old
        return values.clipped_square(stats.value, old, clean(batch, batch.get("returns")), eps_v)

    return Term(
        "value",
        value,
        aggregation.token_mean,
        coef=coef,
        asks=asks_of(*(() if eps_v is None else ("value_old",)), wants=("value",)),
        trains="critic",
    )
