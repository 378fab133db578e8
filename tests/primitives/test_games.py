"""Games on a matrix, against numpy: equilibria, exploitability, and how fast the iterations of Nash learning fall."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.primitives import games


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def game_of(seed: int, n: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P, log-probs of a reference and of a start."""
    rng = np.random.default_rng(seed)
    noise = rng.random((n, n))
    return 0.5 + (noise - noise.T) / 2, log_softmax(rng.normal(size=n)), log_softmax(rng.normal(size=n))


GAMES = [game_of(0, 3), game_of(2)]
RPS = 0.5 + 0.5 * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
SKEWED = log_softmax(np.log([0.7, 0.2, 0.1]))
EVEN = np.full(3, -np.log(3))


def damped(P: np.ndarray, ref: np.ndarray, tau: float) -> np.ndarray:
    """The regularised equilibrium by a slow iteration that converges for small enough steps."""
    step, log_pi = 0.5 * tau**2, ref
    for _ in range(int(40 / step)):
        log_pi = log_softmax((1 - step) * log_pi + step * (ref + P @ np.exp(log_pi) / tau))
    return log_pi


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.sum(np.exp(p) * (p - q), -1)


# ---- equilibria ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("tau", (0.15, 1.0))
def test_equilibrium_is_where_a_slow_iteration_ends(game, tau):
    P, ref, _ = game
    found = np.asarray(games.equilibrium(P, ref, tau))
    np.testing.assert_allclose(found, log_softmax(ref + P @ np.exp(found) / tau), atol=1e-11)
    np.testing.assert_allclose(found, damped(P, ref, tau), atol=1e-9)
    np.testing.assert_allclose(games.regularized_exploitability(found, P, ref, tau), 0, atol=1e-13)


def test_equilibrium_of_little_regularisation_is_the_games_own():
    P, ref, _ = GAMES[1]
    plain = games.maximin(P)
    close = np.exp(games.equilibrium(P, ref, 1e-4))
    np.testing.assert_allclose(close, plain, atol=2e-3)
    assert games.exploitability(games.equilibrium(P, ref, 1e-4), P) < 1e-3


def test_equilibrium_says_so_when_its_steps_are_too_few():
    P, ref, _ = GAMES[1]
    assert np.isnan(games.equilibrium(P, ref, 1e-3, steps=1)).all()


def test_maximin_of_rock_paper_scissors_and_of_a_biased_one():
    np.testing.assert_allclose(games.maximin(games.rock_paper_scissors()), 1 / 3, atol=1e-9)
    a, b, c = 0.1, 0.2, 0.3  # 1 beats 0 by a, 2 beats 1 by b, 0 beats 2 by c: the equilibrium is (b, c, a) / sum
    P = 0.5 + np.array([[0, -a, c], [a, 0, -b], [-c, b, 0]])
    np.testing.assert_allclose(games.maximin(P), np.array([b, c, a]) / (a + b + c), atol=1e-9)


@pytest.mark.parametrize("game", GAMES)
def test_nobody_exploits_the_maximin_policy(game):
    P, _, start = game
    pi = games.maximin(P)
    assert pi.min() >= 0 and abs(pi.sum() - 1) < 1e-12
    assert (pi @ P).min() > 0.5 - 1e-9
    assert games.exploitability(start, P) == pytest.approx(max(np.eye(len(P)) @ P @ np.exp(start)) - 0.5, abs=1e-14)


def test_exploitability_of_pure_answers():
    np.testing.assert_allclose(games.exploitability(jnp.log(jnp.eye(3) + 1e-300), RPS), 0.5, atol=1e-12)


def test_regularised_exploitability_is_the_gain_of_the_best_response():
    P, ref, start = GAMES[1]
    tau = 0.4
    best = np.asarray(games.best_response(np.exp(start), P, ref, tau))

    def game(p, q):
        return np.exp(p) @ P @ np.exp(q) - 0.5 - tau * kl(p, ref) + tau * kl(q, ref)

    gain = games.regularized_exploitability(np.stack([start, ref]), P, ref, tau)
    assert gain[0] == pytest.approx(game(best, start), abs=1e-14)
    rng = np.random.default_rng(0)
    others = log_softmax(best + rng.normal(size=(50, len(ref))))
    assert max(game(q, start) for q in others) < gain[0]


@pytest.mark.parametrize(
    ("P", "message"),
    [
        (np.full((2, 3), 0.5), "square"),
        (np.full((2, 2), 0.6), "must be 1"),
        (np.array([[0.5, 1.2], [-0.2, 0.5]]), "in \\[0, 1\\]"),
        (np.full((2, 2), np.nan), "must be 1"),
    ],
)
def test_what_is_no_game_is_refused(P, message):
    with pytest.raises(ValueError, match=message):
        games.maximin(P)


def test_equilibrium_needs_regularisation():
    with pytest.raises(ValueError, match="tau must be a positive number"):
        games.equilibrium(RPS, EVEN, 0.0)


# ---- iterations: the updates of the papers, line by line ----------------------------------------------------------


def papers_update(name: str, P, ref, now, before, tau, eta) -> np.ndarray:
    win = lambda pi: P @ np.exp(pi)  # noqa: E731
    match name:
        case "mirror_descent":
            return log_softmax((1 - eta * tau) * now + eta * tau * (ref + win(now) / tau))
        case "nash_md":
            mix = log_softmax((1 - eta * tau) * now + eta * tau * ref)
            return log_softmax(mix + eta * win(mix))
        case "optimistic":
            return log_softmax((1 - eta * tau) * now + eta * tau * ref + eta * (2 * win(now) - win(before)))
        case "extragradient":
            half = log_softmax((1 - eta * tau) * now + eta * tau * (ref + win(now) / tau))
            return log_softmax((1 - eta * tau) * now + eta * tau * (ref + win(half) / tau))


@pytest.mark.parametrize("name", ("mirror_descent", "nash_md", "optimistic", "extragradient"))
def test_iterations_are_the_papers(name):
    P, ref, start = GAMES[1]
    tau, eta, steps = 0.3, 0.7, 6
    found = getattr(games, name)(P, ref, start, tau=tau, eta=eta, steps=steps)
    assert found.shape == (steps + 1, len(ref))
    before = now = start
    for row in found[1:]:
        before, now = now, papers_update(name, P, ref, now, before, tau, eta)
        np.testing.assert_allclose(row, now, atol=1e-12)


def test_extragradient_is_the_proximal_stages_of_nash_mp():
    P, ref, start = GAMES[1]
    beta, eta = 0.3, 0.6
    k = eta / (1 + eta)

    def stage(opponent):
        return log_softmax((1 - k) * start + k * (ref + P @ np.exp(opponent) / beta))

    found = games.extragradient(P, ref, start, tau=beta, eta=k / beta, steps=1)[1]
    np.testing.assert_allclose(found, stage(stage(start)), atol=1e-12)


def test_a_step_for_each_iteration():
    P, ref, start = GAMES[1]
    etas = np.array([0.1, 0.5, 1.0])
    found = games.nash_md(P, ref, start, tau=0.3, eta=etas, steps=3)
    now = start
    for row, eta in zip(found[1:], etas, strict=True):
        now = papers_update("nash_md", P, ref, now, now, 0.3, eta)
        np.testing.assert_allclose(row, now, atol=1e-12)


# ---- rates --------------------------------------------------------------------------------------------------------


def extragradient_slope(P, ref, tau, eta) -> float:
    """By which ``log KL`` to the equilibrium falls in a step at last: twice the log of the spectral radius of the
    update linearised there, ``(1 - s) + s M (1 - s + s M)`` with ``s = eta tau`` and M the Jacobian of the best
    response."""
    log_pi = np.asarray(games.equilibrium(P, ref, tau))
    pi = np.exp(log_pi)
    center = np.eye(len(pi)) - pi[None]  # log-probs as far as they differ from their mean under pi
    M = center @ P @ np.diag(pi) @ center / tau
    s, one = eta * tau, center
    update = (1 - s) * one + s * M @ ((1 - s) * one + s * M)
    return 2 * np.log(np.abs(np.linalg.eigvals(update)).max())


@pytest.mark.parametrize("game", [*GAMES, (RPS, SKEWED, log_softmax(np.log([0.05, 0.05, 0.9])))])
@pytest.mark.parametrize("beta", (0.1, 0.3))
def test_nash_mp_falls_at_the_stated_rate_from_the_first_step_to_the_last(game, beta):
    P, ref, start = game
    k = 2 * beta / (1 + 2 * beta)
    steps = int(20 / beta / 2)
    found = np.asarray(games.extragradient(P, ref, start, tau=beta, eta=k / beta, steps=steps))
    gap = kl(np.asarray(games.equilibrium(P, ref, beta)), found)
    stated = (1 + 2 * beta) ** -np.arange(steps + 1.0)
    assert (gap <= gap[0] * stated * (1 + 1e-9) + 1e-13).all()
    tail = gap[(gap < 1e-4) & (gap > 1e-11)]
    assert len(tail) > 5
    measured = games.linear_rate(tail)
    assert measured <= -np.log1p(2 * beta)
    assert measured == pytest.approx(extragradient_slope(P, ref, beta, k / beta), rel=0.15)


@pytest.mark.parametrize("game", GAMES)
def test_egpo_falls_linearly_and_its_exploitability_with_it(game):
    P, ref, start = game
    tau, eta, steps = 0.2, 1.0, 120
    found = games.extragradient(P, ref, start, tau=tau, eta=eta, steps=steps)
    gap = kl(np.asarray(games.equilibrium(P, ref, tau)), np.asarray(found))
    assert (gap <= gap[0] * (1 - eta * tau) ** np.arange(steps + 1.0) * (1 + 1e-9) + 1e-13).all()
    gain = np.asarray(games.regularized_exploitability(found, P, ref, tau))
    assert gain[-1] < 1e-9 < gain[0]
    falling = gain[(gain > 1e-10) & (gain < 1e-3)]
    assert games.linear_rate(falling) < np.log(1 - eta * tau)


@pytest.mark.parametrize("game", [*GAMES, (RPS, SKEWED, SKEWED)])
def test_nash_md_falls_as_one_over_the_steps(game):
    P, ref, _ = game
    tau, steps = 0.3, 2000
    eta = 2 / (tau * (np.arange(steps) + 2))
    found = np.asarray(games.nash_md(P, ref, ref, tau=tau, eta=eta, steps=steps))
    gap = kl(np.asarray(games.equilibrium(P, ref, tau)), found)
    t = np.arange(1, steps + 1)
    assert (gap[1:] <= 8 / (tau**2 * (t + 1))).all()
    assert gap[-1] < 0.02 * gap[20]


@pytest.mark.parametrize("game", [*GAMES, (RPS, EVEN, SKEWED)])
def test_self_play_circles_away_while_its_mean_is_bounded_and_optimism_converges(game):
    P, ref, start = game
    eta, steps = 0.5, 4000
    circling = np.asarray(games.mirror_descent(P, ref, np.full(len(P), -np.log(len(P))), eta=eta, steps=steps))
    mean = np.log(np.exp(circling[:-1]).mean(0))
    assert games.exploitability(mean, P) <= np.log(len(P)) / (eta * steps) + eta / 8
    last = games.optimistic(P, ref, start, eta=1.0, steps=steps)[-1]
    assert games.exploitability(last, P) < 1e-3


def test_on_rock_paper_scissors_optimism_converges_linearly_and_self_play_leaves():
    options = dict(eta=1.0, steps=400)
    start = log_softmax(np.log([0.4, 0.35, 0.25]))
    away = games.exploitability(games.mirror_descent(RPS, EVEN, start, **options), RPS)
    assert away[-50:].min() > away[0]
    gap = kl(EVEN, np.asarray(games.optimistic(RPS, EVEN, SKEWED, **options)))
    # e' = e + eta M (2 e - e_before): the larger root of z^2 - (1 + 2 i x) z + i x = 0, x = eta / sqrt(12)
    root = np.abs(np.roots([1, -1 - 2j / np.sqrt(12), 1j / np.sqrt(12)])).max()
    assert games.linear_rate(gap[(gap < 1e-4) & (gap > 1e-11)]) == pytest.approx(2 * np.log(root), rel=0.02)


# ---- the reward model's view --------------------------------------------------------------------------------------


def test_rewards_fitted_to_a_game_that_has_them():
    r = np.array([0.3, -1.2, 2.0, 0.1])
    mu = np.array([0.4, 0.3, 0.2, 0.1])
    P = 1 / (1 + np.exp(r[None] - r[:, None]))
    np.testing.assert_allclose(games.fitted_rewards(P, mu), r - mu @ r, atol=1e-10)


def test_rewards_fitted_to_a_cycle_depend_on_who_wrote_the_answers():
    np.testing.assert_allclose(games.fitted_rewards(RPS, np.full(3, 1 / 3)), 0, atol=1e-12)
    mu = np.array([0.8, 0.1, 0.1])
    r = np.asarray(games.fitted_rewards(RPS, mu))
    believed = 1 / (1 + np.exp(r[None] - r[:, None]))
    np.testing.assert_allclose((mu * (believed - RPS)).sum(-1), 0, atol=1e-10)
    assert r.argmax() == 1  # most answers are rocks, and paper wraps them


def test_linear_rate_is_the_slope():
    assert games.linear_rate(3 * 0.7 ** np.arange(10.0)) == pytest.approx(np.log(0.7))
