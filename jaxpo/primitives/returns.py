"""Returns and advantages of tokens [B, T] from values. Nothing here carries a gradient. Masked positions are skipped:
they add no reward, no value and no discount."""

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.primitives.numerics import promote


def gae(
    token_reward: Array, value: Array, mask: Array, gamma: float | Array = 1.0, lam: float | Array = 0.95
) -> tuple[Array, Array]:
    """(advantages, returns) [B, T] (generalized advantage estimation, arXiv:1506.02438).

    ``delta_i = rho_i + gamma V_(i+1) - V_i``, ``A_i = delta_i + gamma lam A_(i+1)`` over the masked positions of a row
    (0 after the last), ``returns = A + V``; both are 0 at masked positions.

    Args:
      token_reward: [B, T] reward of each token.
      value: [B, T] value of the state in which the token is drawn.
      mask: [B, T].
    """
    on = mask > 0
    reward, value = jnp.where(on, promote(token_reward), 0), jnp.where(on, promote(value), 0)

    def back(later: tuple[Array, Array], here: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_adv, next_value = later
        rho, v, there = here
        adv = rho + gamma * next_value - v + gamma * lam * next_adv
        return (jnp.where(there, adv, next_adv), jnp.where(there, v, next_value)), jnp.where(there, adv, 0)

    start = 0 * reward[:, 0], 0 * value[:, 0]
    adv = lax.scan(back, start, (reward.T, value.T, on.T), reverse=True)[1].T
    return lax.stop_gradient(adv), lax.stop_gradient(jnp.where(on, adv + value, 0))
