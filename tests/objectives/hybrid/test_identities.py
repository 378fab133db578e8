"""`sft` keeps the identities of maximum likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from tests.oracles import hybrid
from tests.oracles.cases import CASES, ROWS, WIDTH, assert_same, evaluate, with_experts

VOCABULARY = 5


def test_sft_gradient_is_minus_mask_over_tokens():
    case = CASES["unequal groups"]
    _, grad = evaluate("sft", case)
    np.testing.assert_allclose(grad, -1.0 * case.mask / case.mask.sum(), atol=1e-15)


def test_sft_of_nothing_is_exactly_zero():
    case = CASES["unequal groups"]
    loss, grad = evaluate("sft", case.replace(mask=np.zeros_like(case.mask)))
    assert loss == 0 and (grad == 0).all()


@pytest.fixture(scope="module")
def from_logits():
    """Loss and gradient of sft in a policy's logits [B, T, V]; those logits, the demonstrated tokens, the mask."""
    rng = np.random.default_rng(0)
    mask = CASES["unequal groups"].mask
    logits, tokens = 2 * rng.normal(size=(ROWS, WIDTH, VOCABULARY)), rng.integers(0, VOCABULARY, (ROWS, WIDTH))

    def loss(logits):
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[..., None], -1)[..., 0]
        return jaxpo.evaluate(
            jaxpo.make("sft"), lambda _: jaxpo.TokenStats(logp=logp), jaxpo.Rollouts(mask=jnp.asarray(mask))
        )[0]

    with jax.enable_x64(True):
        value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits))
        return (float(value), np.asarray(grad)), logits, tokens, mask


def test_sft_gradient_in_the_logits_is_softmax_minus_onehot_over_tokens(from_logits):
    (_, grad), logits, tokens, mask = from_logits
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(grad, (softmax - np.eye(VOCABULARY)[tokens]) * mask[..., None] / mask.sum(), atol=1e-12)


def test_sft_is_the_forward_kl_to_a_onehot_teacher(from_logits):
    actual, logits, tokens, mask = from_logits
    assert_same(actual, hybrid.forward_kl_to_teacher(logits, np.eye(VOCABULARY)[tokens], mask))


def test_sft_equals_the_unified_estimator_in_its_sft_row():
    case = with_experts(CASES["counts"], share=1.1)
    assert_same(evaluate("sft", case), evaluate("upge", case, method="sft"))


def test_sft_equals_chord_with_mu_1_and_no_phi():
    case = CASES["counts"]
    case = with_experts(case, share=1.1)
    assert_same(evaluate("sft", case), evaluate("chord", case, mu=1.0, phi="none"))


def test_sft_equals_on_policy_distillation_of_whole_teacher_sequences():
    """Rows written by the teacher: the sequence-level form is their mean negative log-likelihood, over tokens."""
    case = CASES["unequal groups"]
    assert_same(evaluate("sft", case), (-case.logp[case.mask].mean(), -1.0 * case.mask / case.mask.sum()))
