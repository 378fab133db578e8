"""Imitation beside reinforcement: which rows are imitated, and how much a demonstrated token weighs."""

from typing import Literal

import jax.numpy as jnp
from jax import Array, lax, nn
from jax.ops import segment_max, segment_min

from jaxpo.arguments import choice
from jaxpo.primitives.grouping import group_constant, group_size, group_sum, segments
from jaxpo.primitives.numerics import clamp, promote, ratio_or_zero

Select = Literal["correct", "first_correct", "best"]
Phi = Literal["p1mp", "is", "none"]


def selected(reward: Array, group: Array, count: Array, *, select: Select = "correct", threshold: float = 1.0) -> Array:
    """[B] share of each row that rejection sampling keeps (RFT, arXiv:2308.01825; RAFT, arXiv:2304.06767).

    Args:
      select: "correct": all rows with ``reward >= threshold``; "first_correct": the first of them of each prompt;
        "best": of each prompt the row of the highest reward, the first of equal ones. Of a row that was drawn several
        times, the last two keep one copy."""
    choice("select", select, ("correct", "first_correct", "best"))
    reward, drawn = promote(reward), jnp.asarray(count) > 0
    if select == "correct":
        return promote((reward >= threshold) & drawn)
    ids, n = segments(group), reward.shape[0]
    if select == "first_correct":
        fits = (reward >= threshold) & drawn
    else:
        fits = (reward >= segment_max(jnp.where(drawn, reward, -jnp.inf), ids, num_segments=n)[ids]) & drawn
    place = jnp.arange(n)
    first = segment_min(jnp.where(fits, place, n), ids, num_segments=n)[ids]
    return jnp.where(fits & (place == first), jnp.minimum(1, ratio_or_zero(jnp.ones(n), promote(count))), 0)


def successes(reward: Array, group: Array, members: Array, *, success: float = 1.0) -> Array:
    """[B] how many ``members`` [B] (multiplicities) of the row's prompt have a reward of at least ``success``."""
    return group_sum((promote(reward) >= success) * members, group)


def demonstrated_weight(logp: Array, *, phi: Phi = "p1mp") -> Array:
    """Constant weight of a demonstrated token of probability p: ``p (1 - p)``, ``p`` ("is") or 1 ("none") (CHORD,
    arXiv:2508.11408)."""
    choice("phi", phi, ("p1mp", "is", "none"))
    p = jnp.exp(promote(logp))
    return lax.stop_gradient({"p1mp": p * -jnp.expm1(promote(logp)), "is": p, "none": jnp.ones_like(p)}[phi])


def imitation_share(step: Array, *, warmup: int, decay: int, peak: float, valley: float) -> Array:
    """``mu(step)``: ``peak step / warmup`` up to ``warmup``, then a cosine from ``peak`` to ``valley`` over ``decay``
    steps, then ``valley`` (CHORD, arXiv:2508.11408; code of modelscope/Trinity-RFT)."""
    step = jnp.asarray(step, jnp.result_type(float))
    rising = peak * step / max(warmup, 1)
    falling = valley + (peak - valley) * 0.5 * (1 + jnp.cos(jnp.pi * (step - warmup) / max(decay, 1)))
    return jnp.where(step < warmup, rising, jnp.where(step >= warmup + decay, valley, falling))


def tiers(reward: Array, group: Array, own: Array, *, fail: float = 0.0, success: float = 1.0) -> tuple[Array, Array]:
    """(hard, middle), [B] bool each (DYPO, arXiv:2604.08926). A prompt is hard if it has own rows and all their rewards
    are at most ``fail``. Otherwise it is easy if it has no own rows, all rewards are at least ``success``, or all are
    equal. Else it is in the middle.

    Args:
      own: [B] multiplicity of the policy's own rows; 0 for the others."""
    reward = promote(reward)
    there = group_size(group, own) > 0
    hard = there & (group_sum((reward > fail) * own, group) == 0)
    easy = (group_sum((reward < success) * own, group) == 0) | group_constant(reward, group, own)
    return hard, there & ~hard & ~easy


def pairwise_preference(
    margin: Array, reward: Array, group: Array, members: Array, *, beta: float | Array = 1.0
) -> Array:
    """[B] of each row b: ``sum_f -log sigmoid(beta (margin_b - margin_f)) / n`` over the rows f of its group with a
    lower reward; n is the number of such pairs of the group, so the sum over its rows is the mean over its pairs
    (DYPO's group alignment loss, arXiv:2604.08926).

    Args:
      margin: [B] ``sum_t (logp - logp_ref)``. members: [B] multiplicity of the rows that are compared."""
    reward, members = promote(reward), promote(members)
    alike = (group[:, None] == group) & (reward[:, None] > reward)
    pairs = jnp.where(alike, members[:, None] * members, 0)
    n = group_sum(pairs.sum(1), group)
    each = jnp.where(alike, -nn.log_sigmoid(beta * jnp.where(alike, margin[:, None] - margin, 0)), 0)
    return ratio_or_zero((each * jnp.where(alike, members, 0)).sum(1), n)


def straight_through_floor(x: Array, floor: float) -> Array:
    """``max(x, floor)`` with the gradient of x everywhere."""
    return x + lax.stop_gradient(jnp.maximum(x, floor) - x)


def negative_aware(
    log_ratio: Array,
    reward: Array,
    q: Array,
    *,
    neg_weight: float = 1.0,
    clamp_pos: float = 0.0,
    clamp_neg: float = 1.0,
    bound: float = 10.0,
) -> Array:
    """``c pos + (1 - c) neg_weight neg`` with ``pos = -log floor(R, clamp_pos)``, ``neg = -log floor((1 - q R) / (1 -
    q), clamp_neg)``, ``R = exp(min(log_ratio, bound))`` (NFT, arXiv:2505.18116). The floors pass the gradient on.

    Args:
      reward: c in [0, 1]. q: success rate of the prompt in (0, 1). Both have the shape of ``log_ratio``."""
    x = clamp(log_ratio, high=bound)
    ratio, unfloored = jnp.exp(x), isinstance(clamp_pos, int | float) and clamp_pos == 0
    positive = -x if unfloored else -jnp.log(straight_through_floor(ratio, clamp_pos))
    negative = -jnp.log(straight_through_floor((1 - q * ratio) / (1 - q), clamp_neg))
    return reward * positive + (1 - reward) * neg_weight * negative


def flaw_detection_reward(verdict: Array, truth: Array, step: Array, true_step: Array, steps: Array) -> Array:
    """[n] reward of a generative reward model that looks for flawed solutions: 1 for the right verdict, -1 for the
    wrong one; less ``|step - true_step| / steps`` if it rightly says "flawed" (FAPO, arXiv:2510.22543).

    Args:
      verdict, truth: whether the solution is said to be flawed, and is.
      step, true_step: index of the first wrong step as said, and as it is. steps: how many there are; a said step
        outside ``[0, steps)`` makes a verdict "flawed" wrong."""
    verdict, truth = jnp.asarray(verdict, bool), jnp.asarray(truth, bool)
    inside = (step >= 0) & (step < steps)
    right = (verdict == truth) & (inside | ~verdict)
    distance = jnp.where(verdict & truth & inside, ratio_or_zero(jnp.abs(step - true_step), promote(steps)), 0)
    return jnp.where(right, 1.0, -1.0) - distance
