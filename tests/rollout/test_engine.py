"""Cached decoding against the uncached policy, and the bookkeeping of rows that end.

Compiling is what takes the time: all tests share one small policy, 24 rows, and as few options as possible
(temperature, truncations and stop tables are data of a compiled function).
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import validate
from jaxpo.parallel import make_mesh, rows_over_mesh, shardings
from jaxpo.policy.stats import completion_hidden, token_stats
from jaxpo.policy.transformer import Model, TransformerConfig, build, init
from jaxpo.primitives.preferences import geometric_mixture
from jaxpo.rollout import SamplingOptions, engine, generate
from jaxpo.rollout.stopping import stop_table
from jaxpo.text.tokenizers import CharTokenizer
from tests.oracles import sampling as oracle
from tests.oracles.cases import COMPILE_FAST
from tests.oracles.transformer import log_softmax

V, G, K, P, T = 12, 8, 3, 5, 8
PAD, EOS = 1, (1, 4)  # the pad id is one of the ids that end a row, so that nothing can be read off ids
CONFIG = TransformerConfig(vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24)
MODEL = build(CONFIG)
LENGTH = np.array([5, 1, 3, 5, 2, 4, 5, 1], np.int32)
ANY = SamplingOptions(T, EOS)
STOP = ["abb", "bab", "cc", "ca", "ed", "fg"]
CHARACTERS = CharTokenizer("abcdefghi").token_bytes()
PIECES = [b"", b"", b"a", b"b", b"ab", b"ba", b"bcc", b"dfgd", b"c", b"e", b"aba", b"f"]
STATES = len(stop_table(STOP, PIECES))  # of the strings alone, so the same for both vocabularies


@cache
def params():
    rng = np.random.default_rng(0)

    def draw(x):
        return jnp.asarray(rng.normal(x.ndim < 2, 0.4, x.shape), x.dtype)  # norms about 1, matrices about 0

    return jax.tree.map(draw, jax.eval_shape(partial(init, CONFIG), jax.random.key(0)))


def prompts(width=P, fill=7):
    """[G, width], left-padded with ``fill``."""
    rng, out = np.random.default_rng(1), np.full((G, width), fill, np.int32)
    for row, n in zip(out, LENGTH, strict=True):
        row[width - n :] = rng.integers(0, V, n)
    return out


@partial(jax.jit, static_argnames=("responses", "model", "layout"), compiler_options=COMPILE_FAST)
def run(
    params, prompts, length, seed, options, policy_temperature=1.0, *, budget=None, responses=K, model=MODEL, layout=()
):
    return generate(
        model,
        params,
        prompts,
        jax.random.key(seed),
        options,
        prompt_length=length,
        budget=budget,
        responses=responses,
        policy_temperature=policy_temperature,
        **{"pad_id": PAD, **dict(layout)},
    )


@partial(jax.jit, compiler_options=COMPILE_FAST)
def uncached(params, rollouts, policy_temperature=1.0):
    """The trainer's log-probs [B, T] and logits [B, T, V] of given tokens, without any cache."""
    logits = MODEL.logits(params, completion_hidden(MODEL, params, rollouts))
    return token_stats(MODEL, params, rollouts, temperature=policy_temperature).logp, logits


def sample_rows(seed=0, options=ANY, **kwargs):
    return run(params(), prompts(), LENGTH, seed, options, **kwargs)


def each_row_its_prompt(seed, options, **kwargs):
    """The same rows, but every prompt is prefilled K times."""
    return run(params(), np.repeat(prompts(), K, 0), np.repeat(LENGTH, K), seed, options, responses=1, **kwargs)


class Counting(Model):
    """A model that counts how often tokens are embedded: once for the prompts, then once for each step of the loop."""

    calls: list[int] = []

    def embed(self, params, tokens):
        jax.debug.callback(lambda: Counting.calls.append(1))
        return Model.embed(self, params, tokens)


def count_steps(seed, table):
    """Rollouts of the counting model, and how many steps its loop took."""
    Counting.calls.clear()
    out = each_row_its_prompt(seed, ANY.replace(stop_table=jnp.asarray(table)), model=Counting(*MODEL))
    jax.block_until_ready(out)
    jax.effects_barrier()
    return out, len(Counting.calls) - 1


def check_ends(rollouts, ended):
    """Check mask, truncated, tokens and log-probs; ``ended`` [B, T]: this token ended the row. Returns the lengths."""
    tokens, mask = np.asarray(rollouts.completions), np.asarray(rollouts.mask)
    length = np.where(ended.any(-1), ended.argmax(-1) + 1, T)
    np.testing.assert_array_equal(mask, np.arange(T) < length[:, None])
    np.testing.assert_array_equal(rollouts.truncated, ~ended.any(-1))
    assert (tokens[mask == 0] == PAD).all()
    for logp in (rollouts.logp_beh, *rollouts.per_token.values()):
        assert (np.asarray(logp)[mask == 0] == 0).all() and (np.asarray(logp) <= 0).all() and np.isfinite(logp).all()
    return length


def ended_by_id(rollouts, ids=EOS):
    """[B, T] whether token t is an end; read only up to the first, so pads that look like one do not matter."""
    return np.isin(np.asarray(rollouts.completions), ids)


# --- the geometric mixture of two policies ----------------------------------------------------------------------------


@cache
def partner():
    return jax.tree.map(lambda x: x[::-1] if x.ndim > 1 and x.shape[0] > 2 else x, params())


@partial(jax.jit, static_argnames="scan_layers", compiler_options=COMPILE_FAST)
def mixed(params, partner, share, scan_layers=False):
    options = dict(prompt_length=LENGTH, responses=K, pad_id=PAD, scan_layers=scan_layers)
    return generate(MODEL, params, prompts(), jax.random.key(3), ANY, partner=partner, share=share, **options)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_tokens_of_a_mixture_are_drawn_from_it_and_the_policy_alone_is_recorded_too(share):
    out = mixed(params(), partner(), share)
    (own, logits), (_, other) = uncached(params(), out), uncached(partner(), out)
    mask = np.asarray(out.mask)
    mixture = geometric_mixture(logits, other, share)
    drawn = np.take_along_axis(np.asarray(mixture), np.asarray(out.completions)[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.asarray(out.logp_beh) * mask, drawn * mask, atol=2e-4)
    np.testing.assert_allclose(np.asarray(out.per_token["logp_sampler"]) * mask, np.asarray(own) * mask, atol=2e-4)
    alone = sample_rows(3) if share == 0 else run(partner(), prompts(), LENGTH, 3, ANY) if share == 1 else None
    if alone is not None:
        np.testing.assert_array_equal(out.tokens, alone.tokens)


# --- log-probs --------------------------------------------------------------------------------------------------------


def test_the_fields_of_the_batch():
    out = sample_rows()
    validate(out)
    np.testing.assert_array_equal(out.tokens[:, :P], np.repeat(prompts(), K, 0))
    np.testing.assert_array_equal(out.prompt_length, np.repeat(LENGTH, K))
    np.testing.assert_array_equal(out.group, np.repeat(np.arange(G), K))
    assert out.shared_prompt == K and out.width == T and out.prompt_width == P
    assert out.logp_beh.dtype == out.mask.dtype == out.truncated.dtype == jnp.float32 and out.tokens.dtype == jnp.int32
    rows = np.asarray(out.completions).reshape(G, K, T)
    assert (rows[:, 0] == rows[:, 1]).all(-1).mean() < 0.5  # the K responses are different draws


@pytest.mark.parametrize(("temperature", "policy_temperature"), [(1.0, 1.0), (0.7, 1.0), (1.4, 0.8)])
def test_cached_log_probs_equal_uncached(temperature, policy_temperature):
    out = sample_rows(1, ANY.replace(temperature=temperature), policy_temperature=policy_temperature)
    trainer, logits = uncached(params(), out, policy_temperature)
    mask, ids = np.asarray(out.mask), np.asarray(out.completions)[..., None]
    np.testing.assert_allclose(out.per_token["logp_sampler"], trainer * mask, atol=1e-4)
    sampled_from = np.take_along_axis(log_softmax(np.asarray(logits, np.float64) / temperature), ids, -1)[..., 0]
    np.testing.assert_allclose(out.logp_beh, sampled_from * mask, atol=1e-4)


def test_truncated_log_probs():
    truncation = dict(top_k=6, top_p=0.87, min_p=0.06)
    out = sample_rows(2, ANY.replace(temperature=1.5, **truncation))
    trainer, logits = uncached(params(), out)
    mask = np.asarray(out.mask)
    np.testing.assert_allclose(out.per_token["logp_sampler"], trainer * mask, atol=1e-4)
    for b, t in zip(*np.nonzero(mask), strict=True):
        expected = oracle.log_probs(np.asarray(logits[b, t]) / np.float32(1.5), **truncation)
        np.testing.assert_allclose(out.logp_beh[b, t], expected[out.completions[b, t]], atol=1e-4)
    assert np.abs(out.logp_beh - out.per_token["logp_sampler"]).max() > 0.1


def test_sharing_a_prompt_changes_nothing():
    shared, (apart, _) = sample_rows(3), count_steps(3, np.zeros((STATES, V), np.int32))
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    np.testing.assert_allclose(shared.logp_beh, apart.logp_beh, atol=1e-5)
    assert apart.shared_prompt == 1
    trainer, _ = uncached(params(), apart)
    np.testing.assert_allclose(apart.per_token["logp_sampler"], trainer * apart.mask, atol=1e-4)


def test_greedy_takes_the_argmax_of_the_full_forward_pass_at_every_step():
    out = each_row_its_prompt(0, SamplingOptions(T, EOS, greedy=True))
    trainer, logits = uncached(params(), out)
    # Each position was scored after the very tokens that precede it, so this is the step-by-step argmax by induction.
    mask = np.asarray(out.mask) == 1
    np.testing.assert_array_equal(np.asarray(out.completions)[mask], np.asarray(logits).argmax(-1)[mask])
    check_ends(out, ended_by_id(out))
    assert (np.asarray(out.logp_beh) == 0).all()
    np.testing.assert_allclose(out.per_token["logp_sampler"], trainer * out.mask, atol=1e-4)
    first = np.asarray(out.tokens).reshape(G, K, -1)
    assert (first == first[:, :1]).all()  # the same prompt, the same answer


def test_the_plain_policy_is_recorded_once_and_bfloat16_gives_float32_log_probs():
    model = build(TransformerConfig(**{**CONFIG.__dict__, "dtype": "bfloat16"}))
    sample = jax.jit(
        lambda p: generate(model, p, prompts(), jax.random.key(5), ANY, prompt_length=LENGTH, responses=K, pad_id=PAD),
        compiler_options=COMPILE_FAST,
    )
    out = sample(params())
    assert out.per_token == {} and out.logp_beh.dtype == jnp.float32
    check_ends(out, ended_by_id(out))
    trainer, _ = uncached(params(), out)  # in float32
    gap = np.abs(out.logp_beh - trainer * out.mask)
    assert 1e-4 < gap.max() < 0.3 and gap.mean() < 0.03


# --- ends -------------------------------------------------------------------------------------------------------------


def test_ends_are_kept_in_the_mask_and_the_limit_truncates():
    lengths, last_tokens = [], []
    for seed in range(8):
        out = sample_rows(seed)
        length = check_ends(out, ended_by_id(out))
        lengths += length.tolist()
        last_tokens += np.asarray(out.completions)[np.arange(G * K), length - 1].tolist()
    ended = np.isin(last_tokens, EOS)
    assert set(EOS) <= set(last_tokens)  # each of the ids ended a row
    assert (ended & (np.array(lengths) == T)).any()  # an end on the last position: not truncated (check_ends)
    assert (~ended).any() and 1 in lengths
    assert (np.array(lengths)[~ended] == T).all()


def ended_by_text(rollouts, token_bytes):
    ended = np.zeros((rollouts.rows, T), bool)
    for row, ids in enumerate(np.asarray(rollouts.completions).tolist()):
        text = b""
        for t, i in enumerate(ids):
            text = text + token_bytes[i] if token_bytes[i] else b""
            ended[row, t] = i in EOS or any(s.encode() in text for s in STOP)
    return ended


@pytest.mark.parametrize("token_bytes", [CHARACTERS, PIECES], ids=["characters", "pieces"])
def test_stop_strings_end_the_row_on_the_token_that_completes_them(token_bytes):
    assert len(token_bytes) == V
    by_text = at_limit = 0
    for seed in range(25):
        out, steps = count_steps(seed, stop_table(STOP, token_bytes))
        ended = ended_by_text(out, token_bytes)
        length = check_ends(out, ended)
        assert steps == length.max() - 1  # the loop stops with the last row
        last = np.asarray(out.completions)[np.arange(G * K), length - 1]
        stopped = ended.any(-1) & ~np.isin(last, EOS)
        by_text, at_limit = by_text + stopped.sum(), at_limit + (stopped & (length == T)).sum()
    assert by_text > 40 and at_limit > 0
    trainer, _ = uncached(params(), out)
    np.testing.assert_allclose(out.per_token["logp_sampler"], trainer * out.mask, atol=1e-4)


def test_the_loop_stops_when_every_row_has_ended():
    out, steps = count_steps(0, np.full((STATES, V), STATES - 1, np.int32))  # any token stops
    assert steps == 0
    check_ends(out, np.arange(T) >= np.zeros((G * K, 1)))
    out, steps = count_steps(0, np.zeros((STATES, V), np.int32))  # no token stops
    assert steps == check_ends(out, ended_by_id(out)).max() - 1 == T - 1


def test_one_new_token():
    out, longer = sample_rows(4, ANY.replace(max_new_tokens=1)), sample_rows(4)
    _, logits = uncached(params(), longer)
    token = np.asarray(out.completions)
    assert token.shape == out.mask.shape == (G * K, 1) and (np.asarray(out.mask) == 1).all()
    np.testing.assert_array_equal(out.truncated, ~np.isin(token[:, 0], EOS))
    first = np.take_along_axis(log_softmax(np.asarray(logits[:, 0], np.float64)), token, -1)
    np.testing.assert_allclose(out.logp_beh, first, atol=1e-4)


# --- what must not matter ---------------------------------------------------------------------------------------------


def test_the_key_decides():
    a, b, c = sample_rows(6), sample_rows(6), sample_rows(7)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert (np.asarray(a.completions) != np.asarray(c.completions)).any(-1).mean() > 0.8


def test_padding_of_the_prompts_does_not_matter():
    narrow, wide = sample_rows(8), run(params(), prompts(P + 3, fill=2), LENGTH, 8, ANY)
    np.testing.assert_array_equal(narrow.completions, wide.completions)
    np.testing.assert_allclose(narrow.logp_beh, wide.logp_beh, atol=1e-5)
    np.testing.assert_array_equal(narrow.mask, wide.mask)


@pytest.mark.parametrize("scan_layers", (False, True))
def test_eight_devices_sample_what_one_samples(scan_layers):
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params(), shardings(params(), mesh))
    layout, model = (("scan_layers", scan_layers),), MODEL._replace(mesh=mesh)
    out = run(placed, *rows_over_mesh((prompts(), LENGTH), mesh), 9, ANY, layout=layout, model=model)
    one = sample_rows(9)
    assert len(out.tokens.sharding.device_set) == 8
    np.testing.assert_array_equal(out.tokens, one.tokens)
    np.testing.assert_allclose(out.logp_beh, one.logp_beh, atol=1e-5)
    np.testing.assert_array_equal(out.truncated, one.truncated)


def test_scanned_layers_sample_what_unrolled_ones_do():
    """Of unequal layers too: local and global attention, each with its own positions."""
    config = dataclasses.replace(CONFIG, window=3, local_layers=(1,), local_rope_theta=100.0)
    for model in (MODEL, build(config)):
        scanned = sample_rows(9, model=model, layout=(("scan_layers", True),))
        unrolled = sample_rows(9, model=model)
        np.testing.assert_array_equal(scanned.tokens, unrolled.tokens)
        np.testing.assert_allclose(scanned.logp_beh, unrolled.logp_beh, atol=1e-6)


@pytest.mark.parametrize("scan_layers", (False, True))
@pytest.mark.parametrize("fields", ({}, dict(window=3, attention_softcap=2.0)), ids=["plain", "window"])
def test_a_long_cache_is_read_in_parts(scan_layers, fields, monkeypatch):
    """As far as it is filled; what does not divide into parts is padded. A window leaves whole parts behind it."""
    model, layout = build(dataclasses.replace(CONFIG, **fields)), (("scan_layers", scan_layers), ("pad_id", 2))
    whole = sample_rows(9, model=model)
    monkeypatch.setattr(engine, "POSITIONS_AT_ONCE", 2)
    in_parts = sample_rows(9, model=model, layout=layout)  # another pad id: compiled anew
    np.testing.assert_array_equal(in_parts.mask, whole.mask)
    np.testing.assert_array_equal(in_parts.completions, np.where(whole.mask > 0, whole.completions, 2))
    np.testing.assert_allclose(in_parts.logp_beh, whole.logp_beh, atol=1e-6)


def test_trips_of_the_loops():
    assert engine.decode_trips(1) == (1,) and engine.decode_trips(1025) == (1024,)
    assert engine.decode_trips(1026) == (1025, 1026 / 1025)
    assert engine.decode_trips(8193) == (8192, 4.5)


def test_a_budget_cuts_the_rows_of_each_prompt():
    """With the same uniforms a row is the beginning of the row without a budget; it is truncated if that went on."""
    budget = np.array([0, 1, 2, 3, 5, T, T + 3, 4], np.int32)
    whole, cut = sample_rows(options=ANY), sample_rows(options=ANY, budget=budget)
    kept = np.asarray(whole.mask) * (np.arange(T) < np.repeat(budget, K)[:, None])
    np.testing.assert_array_equal(cut.mask, kept)
    np.testing.assert_array_equal(cut.completions, np.where(kept > 0, whole.completions, PAD))
    np.testing.assert_allclose(cut.logp_beh, whole.logp_beh * kept, atol=1e-6)
    shorter = kept.sum(-1) < np.asarray(whole.mask).sum(-1)
    np.testing.assert_array_equal(cut.truncated, np.maximum(whole.truncated, shorter))
    assert 0 < shorter.sum() < len(shorter)
