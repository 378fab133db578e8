"""The loss of a real policy with its logits made once: what the training step gets from it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import Rollouts
from jaxpo.kernels.token_logprob import plan
from jaxpo.learning.step import accumulate
from jaxpo.metrics import results
from jaxpo.objectives import make
from jaxpo.parallel import make_mesh, rows_over_mesh
from jaxpo.policy import lora
from jaxpo.policy.loss import policy_loss
from jaxpo.policy.stats import policy_of
from jaxpo.policy.transformer import TransformerConfig, build, init
from tests.oracles.cases import COMPILE_FAST

B, P, T, K = 16, 2, 3, 4
MODEL = build(TransformerConfig(vocab_size=13, width=8, layers=1, heads=2, mlp_width=16, final_softcap=0.5))
WANTS = frozenset({"logp", "entropy"})


def rollouts():
    rng = np.random.default_rng(0)
    tokens = rng.integers(13, size=(B, P + T)).astype(np.int32)
    tokens[:, :P] = np.repeat(tokens[::K, :P], K, 0)
    mask = np.float32(np.arange(T) < rng.integers(1, T + 1, B)[:, None])
    logp = np.float32(-rng.random((B, T)) - 2)
    return jax.tree.map(
        jnp.asarray,
        Rollouts(
            tokens=tokens,
            mask=mask,
            shared_prompt=K,
            group=np.repeat(np.arange(B // K), K),
            reward=np.float32(rng.integers(2, size=B)),
            correct=np.float32(rng.integers(2, size=B)),
            logp_old=logp,
            per_token={"logp_ref": logp + np.float32(rng.normal(size=(B, T)))},
        ),
    )


def gradient_of(objective, batch, fused, microbatches=1):
    """Loss, metrics and gradient."""

    @partial(jax.jit, compiler_options=COMPILE_FAST)
    def run(params, batch):
        prepared, state = objective.prepare(batch, objective.init())
        weighed = objective.weigh(prepared, state, None)
        apply = policy_of(MODEL, wants=WANTS, temperature=0.8)
        value, grads, report = accumulate(
            objective, apply, params, weighed, state, microbatches=microbatches, fused=fused
        )
        return value, results(report), grads

    return run(init(MODEL.config, jax.random.key(0)), batch)


@pytest.fixture
def small_budget(monkeypatch):
    """Slices of two rows: with them a plan for an accelerator cuts what these tests have."""
    monkeypatch.setattr(plan, "TOKENS_AT_ONCE", (2 * T, 2 * T))


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


@pytest.mark.usefixtures("small_budget")
@pytest.mark.parametrize(
    ("name", "options", "microbatches"),
    [
        ("grpo", {}, 1),
        ("grpo", {}, 2),
        ("gspo", {}, 1),
        ("policy_gradient", dict(surrogate="clipped", regularizers="0.01 * entropy"), 1),
    ],
    ids=str,
)
def test_loss_gradient_and_metrics_are_those_of_two_passes(name, options, microbatches):
    objective = make(name, **options)
    fused = partial(policy_loss, MODEL, wants=WANTS, temperature=0.8, platform="gpu")
    got, want = (gradient_of(objective, rollouts(), f, microbatches) for f in (fused, None))
    assert_same(got, want)
    text = str(jax.make_jaxpr(lambda p: fused(p, rollouts(), lambda s, b: (s.logp.sum(), {}))[0])(
        init(MODEL.config, jax.random.key(0))))  # fmt: skip
    assert f"length={B // 2}" in text, "eight slices of two rows"


@pytest.mark.usefixtures("small_budget")
@pytest.mark.parametrize("sizes", [(4, 1, 2), (2, 4, 1), (1, 2, 4)], ids=str)
def test_on_a_mesh(sizes):
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    fused = partial(policy_loss, MODEL, wants=WANTS, temperature=0.8, platform="gpu", mesh=mesh)
    got = gradient_of(make("grpo"), rows_over_mesh(rollouts(), mesh), fused)
    assert_same(got, gradient_of(make("grpo"), rollouts(), None))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_units_are_not_cut(platform, small_budget, caplog):
    """Where slices would cut a unit, and on a CPU, the whole batch is one slice."""
    seen = []

    def loss(stats, batch):
        seen.append(batch.rows)
        return stats.logp.sum(), {"rows": jnp.float32(batch.rows)}

    params = init(MODEL.config, jax.random.key(0))
    with caplog.at_level("INFO"):
        aux = policy_loss(MODEL, params, rollouts(), loss, unit=K, platform=platform)[1]
    assert set(seen) == {B} and aux["rows"].shape == (1,)
    assert f"no slices of {K} rows for {platform}" in caplog.text


def test_derived_statistics_are_not_given():
    with pytest.raises(ValueError, match="unknown policy statistic 'entrop'"):
        policy_loss(MODEL, None, rollouts(), lambda s, b: (0.0, {}), wants=frozenset({"entrop"}))


def test_a_loss_may_not_ask_about_another_batch():
    objective = make("grpo")
    other = rollouts()
    asking = objective._replace(loss=lambda policy, batch, state: objective.loss(lambda b: policy(other), batch, state))
    with pytest.raises(ValueError, match="only about the slice"):
        gradient_of(asking, rollouts(), None)


@pytest.mark.usefixtures("small_budget")
def test_adapters_beside_a_frozen_policy():
    """The head is a constant: of its products only that of dhidden is made, from the logits that are there."""
    base = init(MODEL.config, jax.random.key(0))
    adapters = lora.init(base, jax.random.key(1), rank=2, targets=("wq", "w_down"))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    batch = rollouts()

    def loss(stats, part):
        return jnp.sum(part.mask * part.reward[:, None] * jnp.exp(stats.logp)), {}

    def whole(platform, base, x):
        options = dict(wants=WANTS, temperature=0.8, platform=platform)
        return policy_loss(MODEL, lora.attach(base, x, 0.5), batch, loss, **options)[0]

    def gradient(platform):
        return jax.jit(jax.value_and_grad(partial(whole, platform), 1), compiler_options=COMPILE_FAST)

    def table_gradients(argnums):
        text = str(jax.make_jaxpr(jax.grad(partial(whole, "gpu"), argnums))(base, adapters))
        return text.count(f"f32[{MODEL.config.vocab_size},{MODEL.config.width}] = dot_general")

    assert_same(gradient("gpu")(base, adapters), gradient("cpu")(base, adapters))
    assert (table_gradients(1), table_gradients((0, 1))) == (0, 1)
