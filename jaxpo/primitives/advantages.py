"""Advantages: rewards [B] to constants that weigh the tokens of a row. Nothing here carries a gradient."""

from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.primitives.grouping import group_constant, group_mean, group_size, group_std, weighted_std
from jaxpo.primitives.numerics import promote, ratio_or_zero

Singleton = Literal["zero", "raw"]
Scale = Literal["group", "batch", "none"]


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` naming the option unless ``value`` is one of its ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def batch_centered(reward: Array, count: Array) -> Array:
    """``A_i = reward_i - mean over the counted rows`` [B] (REINFORCE with a batch baseline); exactly 0 if all are the
    same."""
    return group_centered(reward, jnp.zeros(reward.shape[0], jnp.int32), count)


def group_centered(reward: Array, group: Array, count: Array, *, singleton: Singleton = "zero") -> Array:
    """``A_i = reward_i - mean of its group`` [B]; exactly 0 in a constant group.

    Args:
      singleton: what a group of one row gets: "zero" (consistent with centring) or "raw" (the reward itself, as
        verl does).
    """
    choice("singleton", singleton, ("zero", "raw"))
    reward = promote(reward)
    centered = jnp.where(group_constant(reward, group, count), 0, reward - group_mean(reward, group, count))
    if singleton == "raw":
        centered = jnp.where(group_size(group, count) == 1, reward, centered)
    return lax.stop_gradient(centered)


def group_normalized(
    reward: Array,
    group: Array,
    count: Array,
    *,
    scale: Scale = "group",
    adv_eps: float = 1e-6,
    ddof: int = 1,
    singleton: Singleton = "zero",
) -> Array:
    """``A_i = (reward_i - group mean) / (std + adv_eps)`` [B]  (GRPO, arXiv:2402.03300, eq. 3 outcome supervision).

    Args:
      scale: the std of the row's "group", of the whole "batch" (Lite PPO), or "none" (Dr. GRPO).
      ddof: 1 = sample std, 0 = population std.
      singleton: "zero", or "raw" = the undivided reward of a group of one row.
    """
    choice("scale", scale, ("group", "batch", "none"))
    centered = group_centered(reward, group, count, singleton=singleton)
    if scale == "none":
        return centered
    std = group_std(reward, group, count, ddof) if scale == "group" else weighted_std(reward, count, ddof)
    scaled = ratio_or_zero(centered, std + adv_eps)
    return lax.stop_gradient(jnp.where(group_size(group, count) == 1, centered, scaled))


def leave_one_out(reward: Array, group: Array, count: Array, *, singleton: Singleton = "zero") -> Array:
    """``A_i = reward_i - mean of the *other* rows of its group = K/(K-1) (reward_i - group mean)`` [B]  (RLOO,
    arXiv:2402.14740)."""
    size = group_size(group, count)
    centered = group_centered(reward, group, count, singleton=singleton)
    return lax.stop_gradient(jnp.where(size > 1, centered * ratio_or_zero(size, size - 1), centered))


def batch_standardized(adv: Array, count: Array, *, adv_eps: float = 1e-4, ddof: int = 1) -> Array:
    """``(A - mean) / (std + adv_eps)`` over the counted rows of the batch [B]; 0 when all are the same."""
    std = weighted_std(adv, count, ddof)
    return lax.stop_gradient(jnp.where(std == 0, 0, ratio_or_zero(batch_centered(adv, count), std + adv_eps)))
