"""Distillation equals its float64 oracles: divergences of logits, and the sampled form on batches that hurt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from jaxpo.objectives.distillation import divergence_of_logits
from jaxpo.primitives.divergences import NAMES
from tests.oracles import distillation, hybrid
from tests.oracles.cases import CASES, assert_same, evaluate
from tests.oracles.families import registered

RNG = np.random.default_rng(0)
N, V = 5, 7
STUDENT, TEACHER = 2 * RNG.normal(size=(N, V)), 2 * RNG.normal(size=(N, V))
TOKENS = RNG.integers(0, V, N)
DEFAULTS = dict(beta=0.5, alpha=0.1, a=0.5, temperature=1.0, tail=True, k=None)
FORMS = [
    *[(name, {}) for name in NAMES],
    *[("jsd", dict(beta=b)) for b in (0.0, 0.2, 1.0)],
    ("skew_kl", dict(alpha=0.7)),
    ("f_alpha", dict(a=-0.5)),
    ("f_alpha", dict(a=2.0)),
    ("forward_kl", dict(temperature=2.0)),
    *[(name, dict(k=k, tail=tail)) for name in NAMES for k, tail in ((3, True), (2, False), (V, True))],
    ("reverse_kl", dict(k=1)),
    ("jsd", dict(k=2, beta=0.0)),
    ("jsd", dict(k=2, beta=1.0, temperature=0.7)),
]


@pytest.mark.parametrize(("name", "options"), FORMS, ids=lambda x: str(x))
def test_a_divergence_of_logits_and_its_gradient(name, options):
    numbers = DEFAULTS | options

    def total(student):
        return divergence_of_logits(
            student, jnp.asarray(TOKENS), jnp.asarray(TEACHER), divergence=name, **numbers
        ).sum()

    with jax.enable_x64(True):
        value, grad = jax.value_and_grad(total)(jnp.asarray(STUDENT))
        grad = np.asarray(grad)
    expected = [distillation.of_logits(s, t, name, **numbers) for s, t in zip(STUDENT, TEACHER, strict=True)]
    np.testing.assert_allclose(float(value), sum(expected), rtol=1e-9)
    slopes = [distillation.gradient(s, t, name, **numbers) for s, t in zip(STUDENT, TEACHER, strict=True)]
    np.testing.assert_allclose(grad, slopes, rtol=1e-6, atol=1e-8)


SAMPLED = [
    {},
    dict(gamma=1.0, use_ratio=True, coef=0.5),
    dict(gamma=0.9, agg="seq_mean"),
    dict(rl=True, eps_low=0.1, eps_high=0.3, coef=0.3),
]


def with_teacher(case):
    rng = np.random.default_rng(5)
    teacher = np.where(case.mask, case.logp_old + rng.normal(0, 0.5, case.mask.shape), np.nan)
    return case.replace(extra={**case.extra, "logp_teacher": teacher})


@pytest.mark.parametrize("options", SAMPLED, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_sampled_form(name, options):
    case = with_teacher(CASES[name])
    got = evaluate("on_policy_distillation", case, mode="sampled", **options)
    assert_same(got, distillation.sampled(case, **options))


@pytest.mark.parametrize("name", CASES)
def test_the_sequence_form_is_sft(name):
    got = evaluate("on_policy_distillation", CASES[name], mode="sequence", coef=0.7, agg="seq_mean")
    loss, grad = hybrid.sft(CASES[name], agg="seq_mean")
    assert_same(got, (0.7 * loss, 0.7 * grad))


def test_the_loss_is_the_mean_of_the_divergence():
    case = CASES["counts"]
    values = np.where(case.mask, np.random.default_rng(1).random(case.mask.shape), np.nan)
    with jax.enable_x64(True):
        stats = jaxpo.TokenStats(logp=jnp.asarray(case.logp), derived={"divergence": jnp.asarray(values)})
        batch = jaxpo.Rollouts(mask=jnp.asarray(case.mask), count=jnp.asarray(case.count))
        loss = jaxpo.evaluate(jaxpo.make("on_policy_distillation", coef=2.0), lambda _: stats, batch)[0]
    weight = case.mask * case.count[:, None]
    np.testing.assert_allclose(float(loss), 2 * np.nansum(values * weight) / weight.sum(), rtol=1e-12)


def test_every_objective_of_the_family_is_compared():
    assert registered("distillation") == {"on_policy_distillation"}
