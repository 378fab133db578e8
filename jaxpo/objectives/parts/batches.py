"""Parts that edit the batch before advantages or after them: filters and selections (shares of rows or tokens to keep),
reward shaping, and corrections of the gap between sampler and trainer."""

import jax.numpy as jnp
from jax import Array

from jaxpo.batch import Rollouts
from jaxpo.objectives.grammar.base import State, per_token
from jaxpo.objectives.grammar.parts import Part
from jaxpo.objectives.parts.regularizers import check_estimators
from jaxpo.objectives.parts.surrogates import tokens_of
from jaxpo.primitives import mismatch, selection, shaping
from jaxpo.primitives.advantages import choice
from jaxpo.primitives.aggregation import positive
from jaxpo.primitives.grouping import group_size
from jaxpo.primitives.numerics import promote, ratio_or_zero
from jaxpo.registry import register

# ---- reward shaping -----------------------------------------------------------------------------------------------


@register("reward", source="RLOO, arXiv:2402.14740")
def kl_in_reward(beta: float = 0.05) -> Part:
    """``reward - beta sum_t (logp_old - logp_ref)``: the k1 estimate on the rollout's own log-probs, a constant."""

    def fn(b: Rollouts, s: State) -> Array:
        difference = jnp.where(b.mask > 0, promote(b.get("logp_old")) - promote(b.get("logp_ref")), 0)
        return b.reward - beta * difference.sum(-1)

    return Part(fn, frozenset({"reward", "logp_old", "logp_ref"}))


@register("reward", source="DAPO, arXiv:2503.14476, eq. 13", budget={"max_len": 1.0, "buffer": 0.2})
def overlong(max_len: int = 20480, buffer: int = 4096, penalty: float = 1.0) -> Part:
    """``reward + p(length)``; see `jaxpo.primitives.shaping.overlong_penalty`."""
    return Part(
        lambda b, s: b.reward + shaping.overlong_penalty(b.lengths, max_len=max_len, buffer=buffer, penalty=penalty),
        frozenset({"reward"}),
    )


# ---- filters: (batch, state) -> [B] share to keep -----------------------------------------------------------------


@register("filter", id="dapo", source="DAPO, arXiv:2503.14476")
@register("filter", source="DAPO, arXiv:2503.14476")
def mixed_groups() -> Part:
    """Keep groups whose ``correct`` is neither all 0 nor all 1 (and groups of one row)."""
    return Part(
        lambda b, s: promote(shaping.mixed_groups(b.get("correct"), b.group, b.count)), frozenset({"correct", "group"})
    )


@register("filter", source="DAPO, arXiv:2503.14476")
def not_truncated() -> Part:
    """Leave out rows that the length limit ended (overlong filtering)."""
    return Part(lambda b, s: promote(b.get("truncated") == 0), frozenset({"truncated"}))


@register("filter", source="PODS, arXiv:2504.13818")
def max_variance(keep: float = 0.5) -> Part:
    """Keep the ``max(1, round(keep K))`` responses to each prompt whose rewards vary most."""
    share("keep", keep)

    def fn(b: Rollouts, s: State) -> Array:
        n = jnp.maximum(jnp.round(keep * group_size(b.group, b.count)), 1)
        return ratio_or_zero(selection.max_variance(b.reward, b.group, b.count, n), promote(b.count))

    return Part(fn, frozenset({"reward", "group"}))


@register("filter")
def random_rows(keep: float = 0.5) -> Part:
    """Keep ``max(1, round(keep K))`` responses to each prompt, drawn by the rows' seeds."""
    share("keep", keep)

    def fn(b: Rollouts, s: State) -> Array:
        n = jnp.maximum(jnp.round(keep * group_size(b.group, b.count)), 1)
        before = selection.before_in_group(selection.row_uniform(b.get("seed"), stream=3), b.group, b.count)
        return ratio_or_zero(jnp.clip(n - before, 0, promote(b.count)), promote(b.count))

    return Part(fn, frozenset({"seed", "group"}))


@register("filter")
def rejection(estimator: str = "k1", level: str = "geometric", bound: float = 0.1, low: float | None = None) -> Part:
    """Leave out rows on which sampler and trainer disagree: keep those whose ``logp_beh`` and ``logp_old`` have a k1,
    k2 or k3 estimate of at most ``bound`` (and at least ``low``), by sum ("sequence") or mean ("geometric") over the
    row."""
    check_estimators(estimator)
    choice("level", level, ("sequence", "geometric"))

    def fn(b: Rollouts, s: State) -> Array:
        return promote(mismatch.kept(b.get("logp_old"), b.get("logp_beh"), b.mask, estimator, level, bound, low))

    return Part(fn, frozenset({"logp_old", "logp_beh"}))


# ---- filters that see the advantage (``batch.adv``): [B] of rows or [B, T] of tokens -------------------------------


@register("filter", source="D3S, arXiv:2509.22115 (reconstructed from secondary summaries)", budget={"total": "steps"})
def d3s_rows(first: float = 0.5, last: float = 1.0, total: int = 1, level: str = "cross") -> Part:
    """Keep the rows whose advantages vary most: a share of ``first`` at iteration 0 that goes to ``last`` at ``total
    - 1``.

    Args:
      level: "cross": one choice over the batch; "within": in each group."""
    share("first", first), share("last", last)
    choice("level", level, ("cross", "within"))

    def fn(b: Rollouts, s: State) -> Array:
        group = b.group if level == "within" else jnp.zeros_like(b.group)
        n = jnp.maximum(jnp.round(scheduled(first, last, total, s) * group_size(group, b.count)), 1)
        return ratio_or_zero(selection.max_variance(b.adv, group, b.count, n), promote(b.count))

    return Part(fn, frozenset({"group"}) if level == "within" else frozenset(), per="row", sees_advantage=True)


@register(
    "filter",
    id="d3s",
    source="D3S, arXiv:2509.22115 (reconstructed from secondary summaries)",
    budget={"total": "steps"},
)
def d3s_tokens(first: float = 0.2, last: float = 1.0, total: int = 1) -> Part:
    """Keep the tokens of largest ``|A| H`` (``entropy_old``) among those that are left: a share that goes from
    ``first`` to ``last``."""
    share("first", first), share("last", last)

    def fn(b: Rollouts, s: State) -> Array:
        weight = tokens_of(b)
        score = jnp.where(weight > 0, jnp.abs(per_token(b.adv)) * promote(b.get("entropy_old")), 0)
        k = jnp.maximum(jnp.round(scheduled(first, last, total, s) * weight.sum()), 1)
        return ratio_or_zero(selection.largest(score, weight, k), weight)

    return Part(fn, frozenset({"entropy_old"}), per="token", sees_advantage=True)


def scheduled(first: float, last: float, total: int, state: State) -> Array:
    """``(1 - p) first + p last``, ``p`` the share of ``total`` iterations that is over."""
    p = jnp.clip(state.iteration / jnp.maximum(total - 1, 1), 0, 1)
    return (1 - p) * first + p * last


def share(name: str, value: float) -> None:
    """Raise ``ValueError`` unless a number is in (0, 1]."""
    if isinstance(value, int | float) and not 0 < value <= 1:
        raise ValueError(f"{name} is a share in (0, 1], not {value}")


# ---- corrections: (batch, state) -> constant factor [B, T] or [B] -------------------------------------------------

BOTH = frozenset({"logp_old", "logp_beh"})


def _log_weight(b: Rollouts, level: str) -> Array:
    return mismatch.log_weight(b.get("logp_old"), b.get("logp_beh"), b.mask, level)


@register("correction", source="arXiv:2110.00641; TIS, Yao et al. 2025")
def truncated_weight(level: str = "token", cap: float = 2.0) -> Part:
    """``min(pi_old / pi_beh, cap)`` of the token, the whole "sequence", or its "geometric" mean."""
    choice("level", level, mismatch.LEVELS)
    positive("cap", cap)
    return Part(
        lambda b, s: mismatch.truncated(_log_weight(b, level), cap), BOTH, per="token" if level == "token" else "row"
    )


@register("correction", source="arXiv:2510.18855 (IcePop)")
def masked_weight(level: str = "token", low: float = 0.5, high: float = 2.0) -> Part:
    """``pi_old / pi_beh`` within [low, high], 0 outside (the tokens stay in the denominator)."""
    choice("level", level, mismatch.LEVELS)
    positive("high", high)
    return Part(
        lambda b, s: mismatch.masked(_log_weight(b, level), low, high), BOTH, per="token" if level == "token" else "row"
    )


@register("correction")
def token_rejection(estimator: str = "k1", bound: float = 0.5, low: float | None = None) -> Part:
    """Leave out tokens on which sampler and trainer disagree (they leave the denominator): keep those whose k1, k2 or
    k3 estimate is at most ``bound`` (and at least ``low``)."""
    check_estimators(estimator)

    def kept(b: Rollouts, s: State) -> Array:
        return promote(mismatch.kept(b.get("logp_old"), b.get("logp_beh"), b.mask, estimator, "token", bound, low))

    return Part(lambda b, s: jnp.ones_like(promote(b.mask)), BOTH, per="token", tokens=kept)
