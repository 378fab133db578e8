"""`lp_reg` keeps its identities, and equals an oracle that makes the proxy of logits, in value and gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from jaxpo.batch import from_logits
from jaxpo.primitives.regularizers import forward_kl_to_proxy, log_prob_at, log_proxy_at
from tests.objectives.entropy.test_identities import CASE, advantage, unclipped
from tests.oracles import Case
from tests.oracles.cases import CASES, COMPILE_FAST, assert_same, evaluate, rollouts
from tests.oracles.lp_reg import lp_reg


def test_lp_reg_without_beta_and_without_ratios_above_its_cap_is_the_unclipped_surrogate():
    assert np.nanmax(np.exp(CASE.logp - CASE.logp_old)) < 10
    np.testing.assert_allclose(evaluate("lp_reg", CASE, form="paper", beta=0.0)[1], unclipped(CASE), atol=1e-12)
    with pytest.raises(ValueError, match="take grpo"):
        jaxpo.make("lp_reg", beta=0.0)


def test_lp_reg_caps_the_ratio_whatever_the_sign_of_the_advantage():
    capped = evaluate("lp_reg", CASE, form="paper", beta=0.0, U=1.1)[1]
    above = CASE.mask & (np.nan_to_num(CASE.logp - CASE.logp_old) > math.log(1.1)) & (advantage(CASE) != 0)
    assert (above & (advantage(CASE) > 0)).any() and (above & (advantage(CASE) < 0)).any()
    assert (capped[above] == 0).all()
    np.testing.assert_allclose(capped[~above], unclipped(CASE)[~above], atol=1e-12)


def test_lp_reg_touches_rows_of_negative_advantage_only():
    plain = evaluate("grpo", CASE, beta=0.0, agg="token_mean")[1]
    touched = np.abs(evaluate("lp_reg", CASE, rho=0.5)[1] - plain) > 1e-12
    assert 0 < touched.sum() < (CASE.mask & (advantage(CASE) < 0)).sum()
    assert (np.broadcast_to(advantage(CASE), touched.shape)[touched] < 0).all()


PEAKED = 2 * np.random.default_rng(0).normal(size=(5, 9))  # logits
log_proxy = jax.jit(log_proxy_at)
proxy_kl = jax.jit(jax.value_and_grad(lambda logits, kappa: forward_kl_to_proxy(logits, kappa=kappa).sum()))


def test_lp_reg_proxy_is_the_policy_itself_as_kappa_vanishes():
    with jax.enable_x64(True):
        logp = np.asarray(jax.nn.log_softmax(PEAKED))
        np.testing.assert_allclose(log_proxy(PEAKED, np.arange(5), kappa=1e-30), np.diag(logp), atol=1e-12)
        for x in proxy_kl(PEAKED, 1e-30):
            np.testing.assert_allclose(x, 0, atol=1e-12)
        value, grad = proxy_kl(PEAKED, 0.3)
        assert value > 0.1 and np.abs(grad).max() > 0.01


def test_lp_reg_forward_kl_is_minus_log_of_the_kept_mass_with_gradient_policy_minus_proxy():
    p = np.exp(PEAKED) / np.exp(PEAKED).sum(-1, keepdims=True)
    kept = p > 0.3 * p.max(-1, keepdims=True)
    mass = (p * kept).sum(-1, keepdims=True)
    with jax.enable_x64(True):
        value, grad = proxy_kl(PEAKED, 0.3)
        np.testing.assert_allclose(value, -np.log(mass).sum(), rtol=1e-12)
        np.testing.assert_allclose(grad, p - p * kept / mass, atol=1e-12)
        assert np.isneginf(log_proxy(PEAKED, PEAKED.argmin(-1), kappa=0.3)).all(), "the least probable are noise"


def of_logits(logits: np.ndarray, case: Case, of=None, **hyperparameters) -> tuple[float, np.ndarray]:
    """Loss, and gradient in the logits [B, T, V]; ``of``: logits of the old policy."""
    objective = jaxpo.make("lp_reg", **hyperparameters)

    def policy(logits, batch):
        flat = logits.reshape(-1, logits.shape[-1]), batch.tokens.reshape(-1)
        derived = {
            name: from_logits(f, *flat, old).reshape(batch.mask.shape) for name, f in objective.asks.derived.items()
        }
        return jaxpo.TokenStats(logp=log_prob_at(*flat, temperature=1.0).reshape(batch.mask.shape), derived=derived)

    def loss(logits, batch):
        return jaxpo.evaluate(objective, lambda b: policy(logits, b), batch)[0]

    with jax.enable_x64(True):
        old = None if of is None else {"prev": jnp.asarray(of).reshape(-1, of.shape[-1])}
        run = jax.jit(jax.value_and_grad(loss), compiler_options=COMPILE_FAST)
        value, grad = run(jnp.asarray(logits), rollouts(case))
        return float(value), np.asarray(grad)


def paper(logits: np.ndarray, case: Case, **hyperparameters) -> np.ndarray:
    """Gradient of form "paper" in the logits."""
    return of_logits(logits, case, form="paper", **hyperparameters)[1]


LOGITS = 1.5 * np.random.default_rng(1).normal(size=(*CASE.mask.shape, 3))
SAID = np.take_along_axis(np.log(np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)), CASE.tokens[..., None], -1)
SAID = CASE.replace(logp=SAID[..., 0], logp_old=SAID[..., 0] - (CASE.logp - CASE.logp_old))  # what LOGITS say


def test_lp_reg_paper_regularizer_and_its_gradient_vanish_with_kappa():
    plain = paper(LOGITS, SAID, beta=0.0)
    assert np.abs(plain).max() > 1e-3
    np.testing.assert_allclose(paper(LOGITS, SAID, beta=5.0, rho=0.5, kappa=1e-30), plain, atol=1e-12)


@pytest.mark.parametrize("rho", (0.6, 1e-9))
def test_lp_reg_paper_pulls_improbable_tokens_of_failed_answers_that_are_no_noise_to_the_proxy(rho):
    """With gradient ``beta (pi - proxy) / N`` in their logits; at least one token is looked at."""
    difference = paper(LOGITS, SAID, beta=0.7, rho=rho, kappa=0.1) - paper(LOGITS, SAID, beta=0.0)
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    kept = p > 0.1 * p.max(-1, keepdims=True)
    proxy = p * kept / (p * kept).sum(-1, keepdims=True)
    n, said = CASE.mask.sum(), np.where(CASE.mask, SAID.logp, np.inf)
    low = said <= np.sort(said, None)[max(1, int(rho * n)) - 1]
    alive = np.take_along_axis(kept, CASE.tokens[..., None], -1)[..., 0]
    touched = low & alive & (advantage(CASE) < 0)
    assert rho < 0.1 or 3 < touched.sum() < low.sum()
    np.testing.assert_allclose(difference, 0.7 / n * touched[..., None] * (p - proxy), atol=1e-12)


# ---- against the oracle --------------------------------------------------------------------------

V = 8


def with_logits(label: str, scale: float) -> tuple[Case, np.ndarray]:
    """A case, and logits [B, T, 8] whose log-probs of the drawn tokens lie around those of the old policy."""
    case, rng = CASES[label], np.random.default_rng(5)
    logits = scale * rng.normal(size=(*case.mask.shape, V))
    tokens = rng.integers(0, V, case.mask.shape)
    logp = np.take_along_axis(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), tokens[..., None], -1)[..., 0]
    return case.replace(tokens=tokens, logp_old=logp - (case.logp - case.logp_old)), logits


@pytest.mark.parametrize(
    "hyperparameters",
    (
        dict(rho=0.9),
        dict(rho=0.6, tau=0.05),
        dict(rho=0.8, tau=0.1, beta=0.3, eps_high=0.4),
        dict(form="paper", rho=0.7),
        dict(form="paper", rho=0.5, tau=0.05, U=1.3),
        dict(form="paper", rho=0.8, tau=0.1, beta=0.3, log_ratio_clip=5.0),
    ),
    ids=str,
)
def test_loss_and_gradient_equal_the_oracle_that_makes_the_proxy_of_logits(hyperparameters):
    shown = []
    for label in ("K=4", "unequal groups", "counts", "extreme ratios"):
        case, logits = with_logits(label, 1.5)
        expected = lp_reg(case, logits, **hyperparameters)
        assert_same(of_logits(logits, case, **hyperparameters), expected)
        shown.append(np.abs(expected[1] - lp_reg(case, logits, **{**hyperparameters, "beta": 0.01})[1]).max())
    assert max(shown) > 1e-4, "the regularizer does nothing"


@pytest.mark.parametrize("threshold", ({}, dict(tau=0.05)), ids=str)
def test_the_proxy_of_the_old_policy_is_that_of_the_paper_off_policy(threshold):
    """Tokens survive by the old policy, and the KL is taken from its proxy to the current policy."""
    options = dict(form="paper", rho=0.6, beta=0.7, **threshold)
    for label in ("K=4", "counts", "extreme ratios"):
        case, logits = with_logits(label, 1.5)
        old = logits + 0.8 * np.random.default_rng(7).normal(size=logits.shape)
        expected = lp_reg(case, logits, of=old, **options)
        assert_same(of_logits(logits, case, old, proxy="old", **options), expected)
        assert_same(of_logits(logits, case, logits, proxy="old", **options), lp_reg(case, logits, **options))
        assert label != "K=4" or np.abs(expected[1] - lp_reg(case, logits, **options)[1]).max() > 1e-3


@pytest.mark.parametrize("form", ("released", "paper"))
@pytest.mark.parametrize(
    ("scale", "threshold"),
    ((0.0, dict(tau=0.2)), (12.0, dict(tau=0.9)), (12.0, dict(kappa=0.9)), (0.0, dict(kappa=0.9)), (9.0, {})),
    ids=str,
)
def test_the_edges_of_the_proxy(form, scale, threshold):
    """No token above a fixed threshold (flat rows: no proxy, no penalty, all finite), rows in which only the top token
    survives, rows in which all do and tie."""
    case, logits = with_logits("K=4", scale)
    options = dict(form=form, rho=0.7, **threshold)
    loss, grad = of_logits(logits, case, **options)
    assert np.isfinite(loss) and np.isfinite(grad).all()
    assert_same((loss, grad), lp_reg(case, logits, **options))


def test_options_of_the_proxy():
    with pytest.raises(ValueError, match="kappa has no effect with tau=0.1"):
        jaxpo.make("lp_reg", tau=0.1, kappa=0.3)
    with pytest.raises(ValueError, match="tau has no effect with beta=0"):
        jaxpo.make("lp_reg", form="paper", beta=0.0, tau=0.1)
    with pytest.raises(ValueError, match="proxy has no effect with form='released'"):
        jaxpo.make("lp_reg", proxy="old")
    with pytest.raises(ValueError, match="kappa must be a number in"):
        jaxpo.make("lp_reg", kappa=1.0)
