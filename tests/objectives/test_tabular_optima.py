"""Offline losses and Nash learning stop at their optima on a matrix game.

Answers have one token, expectations are exact (a row's count is its probability), gradients are those in the logits of
a tabular policy.
"""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

import jaxpo
from jaxpo.primitives.preferences import geometric_mixture
from tests.oracles.preference_cases import evaluate
from tests.oracles.units import Batch

A = 4
RNG = np.random.default_rng(0)
NOISE = RNG.random((A, A))
P = 0.5 + (NOISE - NOISE.T) / 2  # P[i, j] = P(i beats j)
BEATS = [(i, j) for i in range(A) for j in range(A)]


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


REF, POLICY, CENTER, OTHER = (log_softmax(x) for x in RNG.normal(size=(4, A)))


def nash(tau: float) -> np.ndarray:
    """Log-probs of the equilibrium ``pi ~ ref exp(P(. beats pi)/tau)``, by damped iteration."""
    log_pi = REF
    for _ in range(20_000):
        log_pi = log_softmax(0.98 * log_pi + 0.02 * (REF + P @ np.exp(log_pi) / tau))
    np.testing.assert_allclose(log_pi, log_softmax(REF + P @ np.exp(log_pi) / tau), atol=1e-12)
    return log_pi


def gradient(name: str, log_pi: np.ndarray, weight: np.ndarray, prev: np.ndarray = CENTER, *, extra: dict, **settings):
    """Expected gradient in the logits over answers [A] or pairs of answers [A, A] of the given probabilities."""
    pairs = weight.ndim == 2
    rows = np.array(BEATS if pairs else [[i] for i in range(A)])
    flat = rows.reshape(-1)
    batch = Batch(
        mask=np.ones((len(flat), 1), bool),
        logp=log_pi[flat][:, None],
        ref=REF[flat][:, None],
        prev=prev[flat][:, None],
        logp_old=prev[flat][:, None],
        count=np.repeat(weight.reshape(-1), rows.shape[1]),
        group=np.arange(len(flat)) if pairs else np.zeros(len(flat), int),
        role=np.resize(["chosen", "rejected"] if pairs else ["own"], len(flat)),
        layout=jaxpo.make(name, **settings).unit.layout,
        extra={"reward": np.zeros(len(flat)), **{k: np.asarray(x, float).reshape(-1) for k, x in extra.items()}},
    )
    slopes = evaluate(name, batch, **settings)[1]["logp"][:, 0]
    return slopes @ (np.eye(A)[flat] - np.exp(log_pi))


def per_answer(x: np.ndarray) -> np.ndarray:
    """A number of every answer, at the rows of all pairs."""
    return np.array([[x[i], x[j]] for i, j in BEATS])


UNIFORM = np.full((A, A), 1 / A**2)


def both(p: np.ndarray) -> np.ndarray:
    return np.outer(p, p)


# ---- offline: the closed-form optimum is where the expected gradient vanishes --------------------------------------

MU = RNG.dirichlet(np.ones(A))  # who wrote the answers
REWARD = RNG.normal(size=A)
WINS = 1 / (1 + np.exp(REWARD[None] - REWARD[:, None]))  # Bradley-Terry


def tilted(reward: np.ndarray, beta: float) -> np.ndarray:
    return log_softmax(REF + reward / beta)


@pytest.mark.parametrize(
    ("name", "settings", "labels"),
    [
        ("dpo", {}, WINS),
        ("rso", {"gamma": 0.7}, WINS),
        ("rdpo", {"eps": 0.3}, 0.7 * WINS + 0.3 * WINS.T),  # the labels it sees are flipped, its optimum is not
        ("dpo", {"eps": 0.3}, WINS),  # smoothing, by contrast, shrinks the margins
    ],
    ids=("dpo", "rso", "rdpo of flipped labels", "dpo with smoothing"),
)
def test_optimum_of_logistic_losses_of_bradley_terry_labels(name, settings, labels):
    beta = 0.7
    settings = settings if name == "rso" else {"beta": beta, **settings}
    grad = gradient(name, tilted(REWARD, beta), both(MU) * labels, extra={}, **settings)
    assert (np.abs(grad).max() < 1e-12) == (settings.get("eps", 0) == 0 or name == "rdpo")


def test_ipo_stops_at_its_optimum_of_any_labels():
    tau = 0.7
    solved = tilted(P @ MU, tau)
    grad = gradient("ipo", solved, both(MU) * P, extra={}, tau=tau, normalize=False)
    np.testing.assert_allclose(grad, 0, atol=1e-12)


def test_rpo_is_the_best_answer_to_its_own_adversarial_reward():
    """``min_r BT(r) + eta (max_pi E_pi r - beta KL(pi || ref) - E_chosen r)``, and pi the maximum of it."""
    beta, eta = 0.7, 0.2
    labelled = both(MU) * WINS / (both(MU) * WINS).sum()
    chosen = labelled.sum(1)

    def adversary(r: np.ndarray) -> float:
        fit = (labelled * np.logaddexp(0, r[None] - r[:, None])).sum()
        return fit + eta * (beta * logsumexp(REF + r / beta) - chosen @ r)

    found = minimize(adversary, np.zeros(A), method="BFGS", options={"gtol": 1e-7})
    assert np.abs(gradient("rpo", tilted(found.x, beta), labelled, extra={}, beta=beta, eta=eta)).max() < 1e-6
    plain = gradient("rpo", tilted(REWARD, beta), labelled, extra={}, beta=beta, eta=eta)
    assert np.abs(plain).max() > 1e-3


@pytest.mark.parametrize("drawn", ([1, 1, 1, 1], [3, 1, 2, 1], [1, 7, 1, 2]))
def test_copg_stops_at_its_optimum_of_answers_from_anywhere(drawn):
    beta, extra = 0.7, {"reward": REWARD}
    np.testing.assert_allclose(
        gradient("copg", tilted(REWARD, beta), np.array(drawn, float), extra=extra, beta=beta), 0, atol=1e-12
    )
    assert np.abs(gradient("copg", REF, np.array(drawn, float), extra=extra, beta=beta)).max() > 1e-3


# ---- Nash ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", (0.3, 1.0))
def test_online_ipo_nash_md_nash_mp_egpo_and_inpo_stop_at_the_equilibrium(tau):
    log_pi = nash(tau)
    pi, win = np.exp(log_pi), P @ np.exp(log_pi)
    labelled = both(pi) * P  # pairs of samples, the winner first
    found = {
        "online_ipo": gradient("online_ipo", log_pi, both(pi), extra={"pref_prob": np.repeat(P, 2)}, tau=tau),
        "nash_md": gradient("nash_md", log_pi, pi, extra={"pref_opp": win}, tau=tau),
        "nash_mp": gradient("nash_mp", log_pi, pi, log_pi, extra={"pref_opp": win}, beta=tau),
        "egpo": gradient("egpo", log_pi, UNIFORM, extra={"win": per_answer(win)}, beta=tau),
        "inpo": gradient("inpo", log_pi, labelled, log_pi, extra={}, eta=2 * tau, tau=tau),
    }
    for name, grad in found.items():
        np.testing.assert_allclose(grad, 0, atol=1e-10, err_msg=name)
    away = gradient("nash_md", POLICY, np.exp(POLICY), extra={"pref_opp": P @ np.exp(POLICY)}, tau=tau)
    assert np.abs(away).max() > 1e-3


def test_ipo_md_stops_where_the_mixture_is_an_equilibrium():
    tau, beta = 0.7, 0.25
    mixed = nash(tau / (1 - beta))
    log_pi = log_softmax(REF + P @ np.exp(mixed) / tau)
    np.testing.assert_allclose(geometric_mixture(log_pi, REF, beta), mixed, atol=1e-6)
    grad = gradient("ipo_md", log_pi, both(np.exp(mixed)), extra={"pref_prob": np.repeat(P, 2)}, tau=tau)
    np.testing.assert_allclose(grad, 0, atol=1e-10)


def test_nash_md_stops_where_the_mixture_is_an_equilibrium():
    tau, eta = 0.4, 0.5
    log_pi = REF
    for _ in range(2000):
        mixed = log_softmax((1 - eta * tau) * log_pi + eta * tau * REF)
        log_pi = log_softmax(mixed + eta * P @ np.exp(mixed))
    np.testing.assert_allclose(mixed, nash(tau / (1 - eta * tau)), atol=1e-9)


def stage_objective(theta: np.ndarray, opponent: np.ndarray, beta: float, eta: float) -> complex:
    """``(1/beta) P(q beats pi) + KL(pi || ref) + (1/eta) KL(pi || pi_k)``"""
    log_pi = theta - np.log(np.exp(theta).sum())
    pi = np.exp(log_pi)
    return np.exp(opponent) @ P @ pi / beta + pi @ (log_pi - REF) + pi @ (log_pi - CENTER) / eta


def numerical(theta: np.ndarray, *arguments) -> np.ndarray:
    steps = 1e-30j * np.eye(A)
    return np.array([stage_objective(theta + h, *arguments).imag / 1e-30 for h in steps])


def test_nash_mp_follows_the_gradient_of_its_stage():
    beta, eta = 0.3, 0.5
    win = P @ np.exp(OTHER)
    grad = gradient("nash_mp", POLICY, np.exp(POLICY), extra={"pref_opp": win}, beta=beta, eta=eta)
    np.testing.assert_allclose(grad, beta * numerical(POLICY, OTHER, beta, eta), atol=1e-12)
    k = eta / (1 + eta)
    solved = log_softmax((1 - k) * CENTER + k * (REF + win / beta))
    np.testing.assert_allclose(numerical(solved, OTHER, beta, eta), 0, atol=1e-12)
    at = gradient("nash_mp", solved, np.exp(solved), extra={"pref_opp": win}, beta=beta, eta=eta)
    np.testing.assert_allclose(at, 0, atol=1e-12)


def test_egpo_of_uniform_pairs_is_the_tabular_update():
    beta, eta = 0.3, 0.5
    win = P @ np.exp(OTHER)
    grad = gradient("egpo", POLICY, UNIFORM, extra={"win": per_answer(win)}, beta=beta)
    stepped = POLICY - eta * beta * A / 4 * grad
    tabular = (1 - eta * beta) * POLICY + eta * beta * (REF + win / beta)
    np.testing.assert_allclose(log_softmax(stepped), log_softmax(tabular), atol=1e-12)
