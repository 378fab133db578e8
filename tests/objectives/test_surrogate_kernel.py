"""The one-pass kernel changes nothing in the objectives whose surrogate is a form of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.kernels.policy_surrogate.api import policy_surrogate
from jaxpo.objectives import evaluate, make
from jaxpo.objectives.grammar import policy_gradient
from jaxpo.testing.cases import case, same, train

COVERED = {"grpo", "dapo", "dr_grpo", "cispo", "bapo", "kl_cov", "lite_ppo", "reinforce_pp", "spo_single_stream"}
KERNELS = dict(
    interpreted=partial(policy_surrogate, impl="pallas_tpu", interpret=True),
    plain=partial(policy_surrogate, impl="xla"),
)


def counted(kernel, monkeypatch):
    """Take ``kernel`` where one may be taken; returns the list of calls."""
    calls = []

    def run(*args, **options):
        calls.append(options)
        return kernel(*args, **options)

    monkeypatch.setattr(policy_gradient, "surrogate_kernel", lambda dtype: run)
    return calls


@pytest.mark.parametrize("name", sorted(COVERED))
def test_surrogate_kernel_is_taken(name, monkeypatch):
    calls = counted(KERNELS["plain"], monkeypatch)
    x = case(name)
    jax.eval_shape(partial(train, x.objective), x.params, x.batch)
    assert len(calls) == 1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {}),
        ("bapo", {}),
        ("cispo", {}),
        ("kl_cov", {}),
        ("dapo", {}),
        (
            "policy_gradient",
            dict(surrogate="clipped(dual_clip=1.5)", regularizers="kl_to_reference(estimator='k2') + 0.1 * entropy"),
        ),
        (
            "policy_gradient",
            dict(surrogate="clipped", ratio="token(log_ratio_clip=0.1)", corrections="truncated_weight"),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_surrogate_kernel_keeps_loss_gradient_and_metrics(name, options, kernel, monkeypatch):
    x = case(name, **options)
    want = train(x.objective, x.params, x.batch)
    calls = counted(KERNELS[kernel], monkeypatch)
    got = train(x.objective, x.params, x.batch)
    assert calls
    same("with the kernel", got, want, 2e-6)


def test_grpo_penalty_trains_with_the_kernel(monkeypatch):
    """A cotangent flows into the policy through the added KL, by the kernel as without it."""
    calls = counted(KERNELS["interpreted"], monkeypatch)
    x = case("grpo")
    grads = []
    for beta in (0.04, 0.4):
        objective = make("grpo", beta=beta)
        batch = x.batch.replace(reward=jnp.zeros_like(x.batch.reward))  # no advantage: the penalty alone
        f = lambda logp: evaluate(objective, lambda b: x.stats.replace(logp=logp), batch)[0]  # noqa: B023,E731
        grads.append(np.asarray(jax.grad(f)(x.stats.logp)))
    assert len(calls) == 2 and np.abs(grads[0]).max() > 0
    np.testing.assert_allclose(grads[1], 10 * grads[0], rtol=1e-5)


def test_gspo_policy_gradient_and_bapo_are_composed_where_the_kernel_cannot_say_it(monkeypatch):
    """A ratio of whole rows, a straight-through penalty, and a traced dual clip, which it would have to compile in."""
    calls = counted(KERNELS["plain"], monkeypatch)
    x = case("gspo")
    train(x.objective, x.params, x.batch)
    assert not calls
    straight = "kl_to_reference(estimator='k1', gradient='k2')"
    y = case("policy_gradient", surrogate="clipped(dual_clip=2.0)", regularizers=straight)
    train(y.objective, y.params, y.batch)
    assert len(calls) == 1 and "kl" not in calls[0] and calls[0]["dual"] == 2.0
    z = case("bapo")
    jax.eval_shape(lambda c: train(make("bapo", dual_clip=c), z.params, z.batch), 3.0)
    assert len(calls) == 1


def test_surrogate_kernel_is_not_taken_on_cpus():
    assert policy_gradient.surrogate_kernel(jnp.float32) is None
