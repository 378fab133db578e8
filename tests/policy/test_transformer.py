"""The decoder against numpy, and everything that must not change what it computes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import from_sequences
from jaxpo.policy.stats import completion_hidden, token_stats
from jaxpo.policy.transformer import TransformerConfig, build, init, parameter_count
from tests.oracles import transformer as oracle
from tests.oracles.cases import COMPILE_FAST

BASE = dict(vocab_size=13, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24)
# Every feature of the families, in two models
LOCAL = dict(window=2, local_layers=(1,), local_rope_theta=7.0, rope_scaling=("llama3", 4.0, 1.0, 4.0, 12))
NORMS = dict(norm_plus_one=True, post_norms=True, qk_norm=True, qkv_bias=True, embedding_scaled=True)
CAPS = dict(attention_softcap=1.5, final_softcap=2.5, query_scalar=3.0, activation="gelu_tanh")
LIKE_GEMMA = dict(**LOCAL, **NORMS, **CAPS, rope_theta=60.0)
MIXTURE = dict(experts=4, experts_per_token=2, window=3, rope_scaling=("linear", 2.0), tied=False, mlp_width=8)
PROMPTS, COMPLETIONS = ((3, 5, 7), (1,)), ((2, 4, 6, 8), (9, 10, 11, 12))


def params_of(config, seed=0):
    """Random parameters of the right shapes, without compiling ``init``; norms are not 1 and logits not flat."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        x = rng.normal(size=shape.shape)
        x = 1 + x / 5 if "norm" in jax.tree_util.keystr(path) else x / np.sqrt(shape.shape[-1])
        return jnp.asarray(x, shape.dtype)

    return jax.tree.map_with_path(draw, jax.eval_shape(partial(init, config), jax.random.key(0)))


def batch_of():
    return jax.tree.map(jnp.asarray, from_sequences(PROMPTS, COMPLETIONS))


@partial(jax.jit, static_argnums=0, compiler_options=COMPILE_FAST)
def logits_of(config, params, batch):
    model = build(config)
    return model.logits(params, completion_hidden(model, params, batch))


@partial(jax.jit, static_argnums=0, compiler_options=COMPILE_FAST)
def value_and_grad(config, params, batch):
    def loss(params):
        stats = token_stats(build(config), params, batch)
        return jnp.sum(stats.logp * jnp.cos(jnp.arange(batch.width))) + stats.entropy.sum()

    return jax.value_and_grad(loss)(params)


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map_with_path(
        lambda path, x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)),
        a,
        b,
    )


# --- the mathematics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {},
        dict(tied=False, heads=6, kv_heads=3, head_dim=2, mlp_width=None, rope_theta=50.0, norm_eps=1e-2, layers=1),
        LIKE_GEMMA,
        MIXTURE,
        dict(MIXTURE, norm_topk=True),
    ],
    ids=["tied", "untied", "like Gemma", "mixture", "mixture that adds up to 1"],
)
def test_logits_equal_numpy(shape):
    config = TransformerConfig(**{**BASE, **shape})
    params, got = params_of(config), logits_of(config, params_of(config), batch_of())
    assert got.dtype == np.float32
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        expected = oracle.logits(config, params, [*prompt, *completion])[len(prompt) - 1 : -1]
        np.testing.assert_allclose(got[row], expected, rtol=2e-5, atol=2e-5)


def test_causality():
    config = TransformerConfig(**BASE)
    params, batch = params_of(config), batch_of()
    before, p = np.asarray(logits_of(config, params, batch)), batch.prompt_width
    for t in range(batch.width):
        other = np.array(batch.tokens)
        other[:, p + t] = (other[:, p + t] + 1) % config.vocab_size
        after = np.asarray(logits_of(config, params, batch.replace(tokens=jnp.asarray(other))))
        np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])
        assert (np.abs(after[:, t + 1 :] - before[:, t + 1 :]).max(-1) > 1e-3).all()  # and every later position sees it


# --- forms of the same function ---------------------------------------------------------------------------------------


def test_grouped_queries_equal_repeated_keys_and_values():
    grouped, full = TransformerConfig(**BASE), TransformerConfig(**{**BASE, "kv_heads": 4})
    params = params_of(grouped)
    blocks = {k: jnp.repeat(v, 2, axis=2) if k in ("wk", "wv") else v for k, v in params["blocks"].items()}
    np.testing.assert_allclose(
        logits_of(grouped, params, batch_of()), logits_of(full, {**params, "blocks": blocks}, batch_of()), atol=1e-5
    )


FORMS = [dict(scan_layers=False, remat="dots"), dict(remat="full")]


@pytest.mark.parametrize(
    ("model", "form"), [({}, FORMS[0]), ({}, FORMS[1]), (LIKE_GEMMA, FORMS[0]), (MIXTURE, FORMS[0])]
)
def test_scan_and_remat_change_neither_value_nor_gradient(model, form):
    config = TransformerConfig(**BASE | model | form)
    value, grad = value_and_grad(config, params_of(config), batch_of())
    expected = scanned(**model)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    assert_trees_close(grad, expected[1], atol=1e-5)


def scanned(**fields):
    config = TransformerConfig(**BASE | fields)
    return value_and_grad(config, params_of(config), batch_of())


@pytest.mark.parametrize("model", [{}, LIKE_GEMMA, MIXTURE], ids=["plain", "like Gemma", "mixture"])
def test_every_parameter_has_a_gradient(model):
    for path, g in jax.tree_util.tree_leaves_with_path(scanned(**model)[1]):
        assert np.isfinite(g).all() and np.abs(g).max() > 1e-4, jax.tree_util.keystr(path)
        if "blocks" in jax.tree_util.keystr(path):
            assert (np.abs(g).reshape(len(g), -1).max(-1) > 1e-4).all(), f"a layer of {jax.tree_util.keystr(path)}"


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits():
    config, exact = TransformerConfig(**BASE, dtype="bfloat16", param_dtype="bfloat16"), TransformerConfig(**BASE)
    params = params_of(config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert build(config).embed(params, jnp.arange(3)).dtype == jnp.bfloat16
    got, expected = (
        logits_of(config, params, batch_of()),
        logits_of(exact, jax.tree.map(lambda x: x.astype("float32"), params), batch_of()),
    )
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=0.05 * np.abs(expected).max())
    assert np.abs(got - expected).max() > 1e-4  # it did not compute in float32


def test_float32_parameters_under_bfloat16_are_master_weights():
    """Their gradients are float32, and steps too small for bfloat16 add up in them."""
    config = TransformerConfig(**BASE, dtype="bfloat16")
    params = start = jax.tree.map(np.asarray, params_of(config))
    for _ in range(3):
        _, grad = value_and_grad(config, params, batch_of())
        assert {x.dtype for x in jax.tree.leaves(grad)} == {jnp.dtype("float32")}
        params = jax.tree.map(lambda p, g: p - np.float32(1e-6) * np.sign(g), params, grad)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, start)
    assert all(2e-6 < x < 4e-6 for x in jax.tree.leaves(moved))
    low = start["blocks"]["w_in"].astype("bfloat16")
    step = np.sign(grad["blocks"]["w_in"]).astype(low.dtype) * low.dtype.type(1e-6)
    assert np.mean(low == low - step) > 0.9  # there they would be lost


# --- parameters and configuration -------------------------------------------------------------------------------------

draw = jax.jit(partial(init, TransformerConfig(**BASE, tied=False)), compiler_options=COMPILE_FAST)


def test_parameters_are_a_plain_dict_of_arrays():
    params = draw(jax.random.key(0))

    def check(tree):
        for name, x in tree.items():
            assert type(name) is str
            assert type(x) is dict or isinstance(x, jax.Array), type(x)
            if type(x) is dict:
                check(x)

    assert type(params) is dict
    check(params)
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert shapes == {
        "embedding": (13, 16),
        "head": (13, 16),
        "final_norm": (16,),
        "blocks": {
            "attn_norm": (2, 16),
            "mlp_norm": (2, 16),
            "wq": (2, 16, 4, 4),
            "wk": (2, 16, 2, 4),
            "wv": (2, 16, 2, 4),
            "wo": (2, 4, 4, 16),
            "w_in": (2, 16, 2, 24),
            "w_down": (2, 24, 16),
        },
    }
    assert parameter_count(params) == sum(x.size for x in jax.tree.leaves(params)) == 4336


def test_init_is_a_function_of_the_key_and_layers_differ():
    a, b, c = (draw(jax.random.key(s)) for s in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(a["embedding"], c["embedding"]) and not np.array_equal(a["embedding"], a["head"])
    assert not np.array_equal(a["blocks"]["wq"][0], a["blocks"]["wq"][1])
    assert not np.array_equal(a["blocks"]["w_in"][:, :, 0], a["blocks"]["w_in"][:, :, 1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(vocab_size=0), "policy.vocab_size must be a whole number of at least 1, not 0"),
        (dict(width=-16), "policy.width must be a whole number of at least 1, not -16"),
        (dict(layers=0), "policy.layers must be a whole number of at least 1, not 0"),
        (dict(heads=0, kv_heads=None), "policy.heads must be a whole number of at least 1, not 0"),
        (dict(kv_heads=0), "policy.kv_heads must be a whole number of at least 1 or None, not 0"),
        (dict(window=0), "policy.window must be a whole number of at least 1 or None, not 0"),
        (dict(final_softcap=0.0), "policy.final_softcap must be a positive number or None, not 0.0"),
        (dict(activation="gelu"), "unknown policy.activation 'gelu': did you mean 'gelu_tanh' or 'silu'"),
        (dict(rope_scaling=("longrope", 2.0)), "unknown policy.rope_scaling 'longrope'"),
        (dict(rope_scaling=("llama3", 2.0)), "policy.rope_scaling 'llama3' takes 4 numbers, not 1"),
        (dict(local_layers=(0,)), "policy.local_layers has no effect without policy.window"),
        (dict(window=2, local_layers=(2,)), "policy.local_layers .2,. must be layers of 0 .. 1"),
        (dict(window=2, local_rope_theta=5.0), "policy.local_rope_theta has no effect without policy.local_layers"),
        (dict(experts=4), "policy.experts and policy.experts_per_token must be given together"),
        (dict(experts=2, experts_per_token=3), "policy.experts_per_token 3 is more than policy.experts 2"),
        (dict(norm_topk=True), "policy.norm_topk has no effect without policy.experts"),
        (dict(kv_heads=3), "policy.kv_heads 3 does not divide policy.heads 4"),
        (dict(head_dim=3), "policy.head_dim 3 must be even"),
        (dict(head_dim=0), "policy.head_dim must be a whole number of at least 1 or None, not 0"),
        (dict(mlp_width=0), "policy.mlp_width must be a whole number of at least 1 or None, not 0"),
        (dict(dtype="float16"), "policy.dtype must be float32 or bfloat16, not 'float16'"),
        (dict(remat="ful"), "unknown policy.remat 'ful': did you mean 'full'"),
        (dict(param_dtype="int8"), "policy.param_dtype must be float32 or bfloat16, not 'int8'"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_configuration_errors_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**BASE, **fields})


def test_configuration_defaults():
    config = TransformerConfig(vocab_size=5, width=64, heads=8)
    assert (config.kv_heads, config.head_dim, config.mlp_width) == (8, 8, 168)
    assert hash(config) == hash(TransformerConfig(vocab_size=5, width=64, heads=8))  # usable as a static argument
