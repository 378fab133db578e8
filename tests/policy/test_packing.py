"""Packed completions: the statistics, losses and gradients of the same rows one by one, at fewer tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import Rollouts
from jaxpo.parallel import make_mesh
from jaxpo.plan import operations
from jaxpo.policy import heads, packing, stats, transformer
from jaxpo.policy.config import TransformerConfig

B, P, T, K = 16, 5, 8, 4
LENGTHS = np.array([8, 1, 2, 3, 1, 1, 0, 2, 4, 2, 1, 1, 3, 1, 5, 1])
PROMPTS = np.repeat([5, 2, 1, 4], K)
SHAPES = {
    "plain": dict(),
    "gemma": dict(attention_softcap=9.0, window=3, local_layers=(0,), final_softcap=20.0, kv_heads=1),
    "experts": dict(experts=4, experts_per_token=2),
}
SLOW = pytest.param("experts", 1, marks=pytest.mark.slow)


def batch_of(lanes=1, prompts=PROMPTS):
    rng = np.random.default_rng(0)
    mask = (np.arange(T) < LENGTHS[:, None]).astype(np.float32)
    mask[0, 2] = 0  # a token that does not count, before ones that do
    of_prompt = np.repeat(rng.integers(1, 11, size=(B // K, P)), K, 0)
    tokens = np.concatenate([of_prompt, rng.integers(1, 11, size=(B, T))], 1).astype(np.int32)
    plan, bins = packing.plan(LENGTHS, prompts, T, P, lanes)
    given = dict(tokens=tokens, mask=mask, prompt_length=prompts.astype(np.int32), shared_prompt=K)
    return jax.tree.map(jnp.asarray, Rollouts(**given, per_row={packing.PLAN: plan})), bins


def model_of(**fields):
    config = TransformerConfig(vocab_size=11, width=16, layers=2, heads=2, **fields)
    own = heads.init(16, {"value": (), "score": (), "embed": (4,), "gate": (2,)}, jax.random.key(1))
    params = transformer.init(config, jax.random.key(0)) | own
    for i, head in enumerate(params["heads"].values()):
        head["weight"] = jax.random.normal(jax.random.key(i), head["weight"].shape)
    return transformer.build(config), jax.tree.map(lambda x: 2 * x, params)


@pytest.mark.parametrize(("case", "lanes"), [("plain", 4), ("gemma", 1), SLOW])
def test_statistics_and_gradients_are_those_of_rows_one_by_one(case, lanes):
    model, params = model_of(**SHAPES[case])
    batch, bins = batch_of(lanes)
    assert bins < B // lanes
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=1), jax.devices()[:4]) if lanes > 1 else None

    whole = LENGTHS > 0  # the state after the last token of none is nobody's

    def loss(params, bins, mesh):
        out = stats.token_stats(model, params, batch, wants=frozenset({"entropy", *heads.NAMES}), mesh=mesh, bins=bins)
        seen = [jnp.where(batch.mask > 0, x, 0) for x in (out.logp, out.entropy, out.value)]
        seen += [out.gate, *(jnp.where(there, x, 0) for there, x in ((whole, out.score), (whole[:, None], out.embed)))]
        return sum(jnp.sum(jnp.sin(x)) for x in seen), seen

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=(1, 2))
    (got, seen), (expected, one_by_one) = grad(params, bins, mesh), grad(params, 0, None)
    for a, b in zip(seen, one_by_one, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max()), got, expected)


def test_a_quarter_of_the_tokens_takes_about_a_quarter_of_the_operations():
    config = TransformerConfig(vocab_size=512, width=64, layers=2, heads=2)
    model, params = transformer.build(config), transformer.init(config, jax.random.key(0))
    t, length = 256, np.full(32, 64)
    plan, bins = packing.plan(length, np.full(32, 4), t, 4, 1)
    assert bins == 8
    mask = (np.arange(t) < 64).astype(np.float32) * np.ones((32, 1), np.float32)
    batch = Rollouts(tokens=np.ones((32, 4 + t), np.int32), mask=mask, per_row={packing.PLAN: plan}, shared_prompt=8)
    cost, held = {}, {}
    for n in (0, bins):
        f = jax.jit(jax.grad(lambda params, n=n: stats.token_stats(model, params, batch, bins=n).logp.sum()))
        cost[n] = operations.count(f.trace(params).jaxpr)
        held[n] = f.lower(params).compile().memory_analysis().temp_size_in_bytes
    assert cost[bins] < 0.3 * cost[0]
    assert held[bins] < 0.5 * held[0]


@pytest.mark.parametrize("seed", range(3))
def test_plans_hold_every_token_once(seed):
    rng = np.random.default_rng(seed)
    length, prompt = rng.integers(0, 33, 48), rng.integers(0, 9, 48)
    plan, bins = packing.plan(length, prompt, 32, 8, 4)
    assert bins <= 12
    for rows in np.split(np.arange(48), 4):
        for start, size, extent in (
            (1, length, 32),
            (2, np.where(length > 0, length + prompt, 0), packing.room(32, 8, 12, bins)),
        ):
            taken = np.zeros((bins, extent), int)
            for row in rows:
                taken[plan[row, 0], plan[row, start] : plan[row, start] + size[row]] += 1
                assert plan[row, start] + size[row] <= extent
            assert taken.max() <= 1 and taken.sum() == size[rows].sum()


def test_full_rows_have_a_bin_each_and_bins_come_in_eighths():
    assert packing.plan(np.full(8, 4), np.full(8, 2), 4, 2, 1)[1] == 8
    found = {packing.plan(np.full(64, n), np.full(64, 2), 64, 2, 1)[1] for n in range(65)}
    assert found <= {8 * eighth for eighth in range(1, 9)} and {8, 16, 64} <= found


def test_what_is_refused():
    model, params = model_of()
    batch, bins = batch_of()
    with pytest.raises(ValueError, match=r"Rollouts.per_row\['packing'\]"):
        stats.token_stats(model, params, batch.replace(per_row={}), bins=bins)
    with pytest.raises(ValueError, match="16 rows do not divide into 3 lanes"):
        packing.plan(LENGTHS, PROMPTS, T, P, 3)
