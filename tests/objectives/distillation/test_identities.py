"""The identities of distillation, and its sampled form by enumeration of all sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

import jaxpo
from jaxpo.primitives import divergences
from jaxpo.primitives.divergences import NAMES

RNG = np.random.default_rng(0)
LOG_P, LOG_Q = (np.asarray(nn.log_softmax(jnp.asarray(RNG.normal(size=(20, 6))))) for _ in range(2))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def of(name, log_p=LOG_P, log_q=LOG_Q, **numbers):
    p, q = (jnp.asarray(x, jnp.float64) for x in (log_p, log_q))
    return np.asarray(divergences.full(nn.log_softmax(p), nn.log_softmax(q), name, **numbers))


def test_js_is_jsd_of_a_half_and_its_ends_are_the_two_kls():
    np.testing.assert_allclose(of("f_js"), of("jsd", beta=0.5), rtol=1e-12)
    e = 1e-6
    np.testing.assert_allclose(of("jsd", beta=e) / e, of("forward_kl"), rtol=1e-4)
    np.testing.assert_allclose(of("jsd", beta=1 - e) / e, of("reverse_kl"), rtol=1e-4)
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        np.testing.assert_array_equal(of("jsd", beta=beta), of(name))


def test_skews_end_at_the_kl_and_at_nothing():
    for skew, kl in (("skew_kl", "forward_kl"), ("skew_rkl", "reverse_kl")):
        np.testing.assert_allclose(of(skew, alpha=0.0), of(kl), rtol=1e-12)
        np.testing.assert_allclose(of(skew, alpha=1.0), 0, atol=1e-15)


def test_the_gradient_of_forward_kl_is_the_difference_of_the_distributions():
    logits, temperature = jnp.asarray(RNG.normal(size=(4, 6))), 1.7

    def total(z):
        return divergences.full(
            jnp.asarray(LOG_P[:4], jnp.float64), nn.log_softmax(z / temperature), "forward_kl"
        ).sum()

    q, p = nn.softmax(logits / temperature), jnp.exp(jnp.asarray(LOG_P[:4], jnp.float64))
    np.testing.assert_allclose(jax.grad(total)(logits), (q - p / p.sum(-1, keepdims=True)) / temperature, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_like_its_teacher_has_neither_loss_nor_gradient(name):
    logits = jnp.asarray(LOG_P, jnp.float64)

    def total(z):
        return divergences.full(nn.log_softmax(logits), nn.log_softmax(z), name).sum()

    value, grad = jax.value_and_grad(total)(logits)
    assert abs(float(value)) < 1e-12
    np.testing.assert_allclose(grad, 0, atol=1e-12)


def test_a_tail_loses_what_the_kl_knows_of_the_rest():
    p, q = (nn.log_softmax(jnp.asarray(x, jnp.float64)) for x in (LOG_P, LOG_Q))
    for name in ("forward_kl", "reverse_kl"):
        for k in range(1, 6):
            support = divergences.support_of(p, q, name, k)
            assert (divergences.on_support(p, q, support, name) <= of(name) + 1e-12).all()
        whole = divergences.on_support(p, q, jnp.ones_like(p, bool), name)
        np.testing.assert_allclose(whole, of(name), rtol=1e-12)


def test_ties_go_to_the_lower_id():
    assert divergences.top(jnp.zeros((1, 4)), 2).tolist() == [[True, True, False, False]]


def test_the_sampled_form_has_the_gradient_of_the_reverse_kl():
    """All 27 sequences of 3 tokens from a vocabulary of 3, each weighed by its probability under the student."""
    length, v = 3, 3
    contexts = [c for n in range(length) for c in itertools.product(range(v), repeat=n)]
    place = {c: i for i, c in enumerate(contexts)}
    theta, teacher = (jnp.asarray(np.random.default_rng(s).normal(size=(len(contexts), v))) for s in (1, 2))
    sequences = list(itertools.product(range(v), repeat=length))
    rows = np.array([[place[s[:t]] for t in range(length)] for s in sequences])
    tokens = np.array(sequences)

    def logps(table):
        return jnp.take_along_axis(nn.log_softmax(table)[rows], tokens[..., None], -1)[..., 0]

    probability = jnp.exp(logps(theta).sum(-1))

    def loss(table):
        """The expectation of the sampled loss: each row counts as often as it is drawn."""
        now = logps(table)
        batch = jaxpo.Rollouts(
            mask=jnp.ones(rows.shape), count=probability, logp_old=logps(theta), logp_teacher=logps(teacher)
        )
        objective = jaxpo.make("on_policy_distillation", mode="sampled", agg="seq_sum")
        return jaxpo.evaluate(objective, lambda _: jaxpo.TokenStats(logp=now), batch)[0]

    def exact(table):
        """The reverse KL at every context, weighed by how likely the student is to get there (a constant)."""
        reach = jnp.stack([jnp.exp(jnp.concatenate([jnp.zeros((len(rows), 1)), logps(theta).cumsum(-1)[:, :-1]], -1))])
        kl = divergences.full(nn.log_softmax(teacher), nn.log_softmax(table), "reverse_kl")
        seen, total = set(), 0.0
        for i, row in enumerate(rows):
            for t, c in enumerate(row.tolist()):
                if c not in seen:
                    seen.add(c)
                    total += reach[0, i, t] * kl[c]
        return total

    np.testing.assert_allclose(jax.grad(loss)(theta), jax.grad(exact)(theta), rtol=1e-9, atol=1e-12)
