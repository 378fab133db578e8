"""Preference games on a matrix: their equilibria, how exploitable a policy is, and the tabular iterations that Nash
learning approximates.

``P[n, n]`` holds P(i beats j), so ``P + P^T = 1``. Policies are log-probs [n]. A game is symmetric, so one policy plays
both sides. A regularized game subtracts ``tau KL(. || ref)`` from each player:
``J(pi, q) = pi P q - tau KL(pi || ref) + tau KL(q || ref)``. ``tau`` has the unit of P, and the step size ``eta`` has
the inverse unit."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy.optimize import linprog

from jaxpo.arguments import positive
from jaxpo.primitives.numerics import promote
from jaxpo.primitives.preferences import categorical_kl


def check_game(P: Array) -> Array:  # noqa: N803 (the card's name)
    """Check ``P``, and return it in at least float32. The values of a traced ``P`` are not checked.

    Raises:
      ValueError: it is not square, not in [0, 1], or P + P^T is not 1."""
    P = promote(P)  # noqa: N806
    if P.ndim != 2 or P.shape[0] != P.shape[1]:
        raise ValueError(f"P is a square matrix, P[i, j] = P(i beats j), not of shape {P.shape}")
    if not isinstance(P, jax.core.Tracer):
        off = float(jnp.abs(P + P.T - 1).max())
        if not off <= 1e-5:
            raise ValueError(f"P[i, j] + P[j, i] must be 1: P is off by up to {off:.3g}")
        if not bool(((P >= 0) & (P <= 1)).all()):
            raise ValueError(f"P[i, j] is a probability, in [0, 1]: P has {float(P.min()):.3g} to {float(P.max()):.3g}")
    return P


def rock_paper_scissors(strength: float = 0.5) -> Array:
    """[3, 3] each answer beats the one before it with probability ``1/2 + strength``."""
    cycle = jnp.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return 0.5 + strength * cycle


# ---- equilibria ---------------------------------------------------------------------------------------------------


def best_response(opponent: Array, P: Array, log_ref: Array, tau: Array | float) -> Array:  # noqa: N803
    """[n] log-probs of ``ref exp(P opponent / tau)``: the best response to ``opponent`` [n] (probabilities) in the
    regularized game."""
    return jax.nn.log_softmax(log_ref + P @ opponent / tau)


def equilibrium(P: Array, log_ref: Array, tau: Array | float, *, steps: int = 100) -> Array:  # noqa: N803
    """[n] log-probs of the one policy that is its own `best_response`: the Nash equilibrium of the regularized game.
    NaN if ``steps`` are too few.

    Uses Newton's method on ``best_response(pi) - pi`` with a line search; tau falls to its value over the first three
    quarters of the steps. The Jacobian is ``A S / tau - 1`` with A antisymmetric and S a covariance. Its eigenvalues
    are ``i x - 1``, so it is never singular."""
    P, tau = check_game(P), positive("tau", tau)  # noqa: N806

    def residual(log_pi: Array, tau: Array | float) -> Array:
        return best_response(jnp.exp(log_pi), P, log_ref, tau) - log_pi

    lengths = 0.5 ** jnp.arange(16)

    def newton(log_pi: Array, tau: Array) -> tuple[Array, None]:
        step = jnp.linalg.solve(jax.jacfwd(residual)(log_pi, tau), residual(log_pi, tau))
        tried = jax.nn.log_softmax(log_pi - lengths[:, None] * step)
        left = jnp.abs(jax.vmap(residual, (0, None))(tried, tau)).sum(-1)
        return tried[jnp.argmin(left)], None

    falling = jnp.linspace(1, 0, max(1, 3 * steps // 4))
    taus = tau * jnp.maximum(1 / tau, 1) ** jnp.pad(falling, (0, steps - falling.shape[0]))
    log_pi, _ = lax.scan(newton, jax.nn.log_softmax(promote(log_ref)), taus)
    tolerance = 1e3 * jnp.finfo(log_pi.dtype).eps * (1 + 1 / tau)
    return jnp.where(jnp.abs(residual(log_pi, tau)).max() < tolerance, log_pi, jnp.nan)


def maximin(P: Array) -> np.ndarray:  # noqa: N803
    """[n] probabilities of an equilibrium of the game without regularization, by linear programming on the host.

    It is the ``pi`` whose worst win rate ``min_j (pi P)_j`` is largest, which is 1/2. If there are several, one of
    them."""
    game = np.asarray(check_game(P), np.float64)
    n = len(game)
    found = linprog(
        np.append(np.zeros(n), -1.0),  # the value, to be maximized
        A_ub=np.hstack([-game.T, np.ones((n, 1))]),
        b_ub=np.zeros(n),
        A_eq=np.append(np.ones(n), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, 1)] * n + [(None, None)],
    )
    return found.x[:n] / found.x[:n].sum()


# ---- distance to an equilibrium -----------------------------------------------------------------------------------


def exploitability(log_pi: Array, P: Array) -> Array:  # noqa: N803
    """[...] ``max_i P(i beats pi) - 1/2`` of policies [..., n]: by how much the best answer wins more than half of its
    games against them; 0 at an equilibrium. The duality gap of both players is twice that."""
    return jnp.max(jnp.exp(log_pi) @ P.T, -1) - 0.5


def regularized_exploitability(log_pi: Array, P: Array, log_ref: Array, tau: Array | float) -> Array:  # noqa: N803
    """[...] ``max_q J(q, pi)`` of policies [..., n] in the regularized game: ``tau log sum ref exp(P pi / tau) - 1/2 +
    tau KL(pi || ref)``; 0 only at the `equilibrium`. The duality gap is twice that."""
    pi = jnp.exp(log_pi)
    best = tau * jax.nn.logsumexp(log_ref + pi @ P.T / tau, axis=-1)
    return best - 0.5 + tau * categorical_kl(pi, jnp.broadcast_to(log_ref, pi.shape))


def linear_rate(values: Array) -> Array:
    """Slope of ``log values`` [steps] over the step, by least squares: values fall like ``exp(slope step)``."""
    values = jnp.log(promote(values))
    step = jnp.arange(values.shape[0]) - (values.shape[0] - 1) / 2
    return step @ values / (step @ step)


# ---- iterations: they return every iterate [steps + 1, n], the start first ----------------------------------------


def mirror_step(
    log_pi: Array,
    opponent: Array,
    P: Array,  # noqa: N803
    log_ref: Array | float = 0.0,
    *,
    tau: Array | float = 0.0,
    eta: Array | float,
) -> Array:
    """[n] log-probs of ``pi^(1 - eta tau) ref^(eta tau) exp(eta P opponent)``: a step of magnetic mirror descent
    against ``opponent`` [n] (probabilities), which pulls to the reference. With ``tau`` 0 it is a step of
    multiplicative weights.

    A proximal step on the whole regularized objective, ``argmax J - KL(pi || pi_t) / eta0``, is this step with
    ``eta = eta0 / (1 + eta0 tau)``."""
    return jax.nn.log_softmax((1 - eta * tau) * log_pi + eta * (tau * log_ref + P @ opponent))


def iterates(rule: Callable[[Array, Array, Array], Array], start: Array, eta: Array | float, steps: int) -> Array:
    """[steps + 1, n] the iterates of ``pi_{t+1} = rule(pi_t, pi_{t-1}, eta_t)``, where ``pi_{-1}`` is the start too.
    ``eta`` is one number, or one for each step."""

    def step(carry: tuple[Array, Array], eta: Array) -> tuple[tuple[Array, Array], Array]:
        now, before = carry
        new = rule(now, before, eta)
        return (new, now), new

    start = jax.nn.log_softmax(promote(start))
    etas = jnp.broadcast_to(jnp.asarray(eta, start.dtype), (steps,))
    return jnp.concatenate([start[None], lax.scan(step, (start, start), etas)[1]])


def mirror_descent(
    P: Array,  # noqa: N803
    log_ref: Array,
    start: Array,
    *,
    tau: Array | float = 0.0,
    eta: Array | float,
    steps: int,
) -> Array:
    """Self-play: each step is a `mirror_step` against the policy itself. Without regularization the iterates circle
    away from an equilibrium and only their mean approaches it, ``exploitability <= log n / (eta steps) + eta / 8``."""
    game = check_game(P)
    return iterates(
        lambda now, _, eta: mirror_step(now, jnp.exp(now), game, log_ref, tau=tau, eta=eta), start, eta, steps
    )


def nash_md(
    P: Array,  # noqa: N803
    log_ref: Array,
    start: Array,
    *,
    tau: Array | float,
    eta: Array | float,
    steps: int,
) -> Array:
    """Nash-MD (arXiv:2312.00886): each step is ``mix exp(eta P mix)``, from and against the mixture ``mix = pi^(1 - eta
    tau) ref^(eta tau)``.

    With ``eta_t = 2 / (tau (t + 2))``, ``KL(pi* || pi_t) <= 8 / (tau^2 (t + 1))``. With a constant eta the *mixture*
    converges, to the equilibrium for ``tau / (1 - eta tau)``."""
    game = check_game(P)

    def rule(now: Array, _: Array, eta: Array) -> Array:
        mixture = jax.nn.log_softmax((1 - eta * tau) * now + eta * tau * log_ref)
        return mirror_step(mixture, jnp.exp(mixture), game, eta=eta)

    return iterates(rule, start, eta, steps)


def optimistic(
    P: Array,  # noqa: N803
    log_ref: Array,
    start: Array,
    *,
    tau: Array | float = 0.0,
    eta: Array | float,
    steps: int,
) -> Array:
    """Optimistic mirror descent (OMWU): each step is a `mirror_step` against the extrapolated policy ``2 pi_t -
    pi_{t-1}``. The last iterate converges even without regularization. A step costs one product with P."""
    game = check_game(P)
    return iterates(
        lambda now, before, eta: mirror_step(now, 2 * jnp.exp(now) - jnp.exp(before), game, log_ref, tau=tau, eta=eta),
        start,
        eta,
        steps,
    )


def extragradient(
    P: Array,  # noqa: N803
    log_ref: Array,
    start: Array,
    *,
    tau: Array | float = 0.0,
    eta: Array | float,
    steps: int,
) -> Array:
    """Mirror-prox: a half step against the policy itself, then a full step from the same point against the half step.

    This is EGPO (arXiv:2503.08942). With ``tau = beta`` and ``eta = k / beta``, ``k = eta_mp / (1 + eta_mp)``, it is
    Nash-MP (arXiv:2505.19731); for its ``eta_mp = 2 beta``, ``KL(pi* || pi_t) <= (1 + 2 beta)^-t KL(pi* || pi_0)``."""
    game = check_game(P)

    def rule(now: Array, _: Array, eta: Array) -> Array:
        half = mirror_step(now, jnp.exp(now), game, log_ref, tau=tau, eta=eta)
        return mirror_step(now, jnp.exp(half), game, log_ref, tau=tau, eta=eta)

    return iterates(rule, start, eta, steps)


# ---- a reward model fitted to the game ----------------------------------------------------------------------------


def fitted_rewards(P: Array, written_by: Array, *, steps: int = 30) -> Array:  # noqa: N803
    """[n] rewards of the Bradley-Terry model that fits the game best, ``argmin E[-P_ij log sig(r_i - r_j)]``, by
    Newton's method. DPO's optimum is ``ref exp(r / beta)``.

    Args:
      written_by: [n] probabilities (all positive) that the answers of a pair are drawn with; the mean reward under them
        is 0."""
    game, mu = check_game(P), promote(written_by)
    pairs = mu[:, None] * mu

    def newton(_: int, r: Array) -> Array:
        believed = jax.nn.sigmoid(r[:, None] - r)
        gradient = (pairs * (believed - game)).sum(-1)
        weight = pairs * believed * (1 - believed)
        laplacian = jnp.diag(weight.sum(-1)) - weight
        # Rewards are defined up to a constant: the outer product keeps their mean.
        return r - jnp.linalg.solve(laplacian + jnp.outer(mu, mu), gradient)

    return lax.fori_loop(0, steps, newton, jnp.zeros_like(mu))
