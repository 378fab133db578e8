"""Inverse CDF, truncation and validation: one call of each with many rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.rollout.sampling import EntropyTemperature, SamplingOptions, inverse_cdf, sample, truncate, validate
from tests.oracles import sampling as oracle
from tests.oracles.cases import COMPILE_FAST

ALMOST_ONE = np.float32(1 - 2**-24)  # the largest float32 below 1


run_truncate = jax.jit(truncate, compiler_options=COMPILE_FAST)
run_sample = jax.jit(sample, compiler_options=COMPILE_FAST)


@partial(jax.jit, static_argnames="block", compiler_options=COMPILE_FAST)
def draw(weight, u, block=256):
    return inverse_cdf(weight, weight.sum(-1), u, block=block)


@partial(jax.jit, static_argnames="block")
def draw_many(weight, u, block):
    """Indices for u [n, m] from one distribution [V], n at a time."""
    return jax.lax.map(
        lambda u: inverse_cdf(
            jnp.broadcast_to(weight, (*u.shape, weight.size)), jnp.broadcast_to(weight.sum(), u.shape), u, block=block
        ),
        u,
    )


# --- inverse CDF ------------------------------------------------------------------------------------------------------


def test_frequencies_by_chi_square():
    rng = np.random.default_rng(0)
    weight, n = rng.exponential(size=50).astype(np.float32), 1 << 16
    weight[[0, 7, 31, 49]] = 0
    u = jax.random.uniform(jax.random.key(0), (n // 64, 64))
    count = np.bincount(np.asarray(draw_many(weight, u, 16)).ravel(), minlength=50)
    positive = weight > 0
    assert (count[~positive] == 0).all()
    mean = n * weight[positive].astype(np.float64) / weight.sum(dtype=np.float64)
    chi2, freedom = ((count[positive] - mean) ** 2 / mean).sum(), positive.sum() - 1
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


def zero_heavy_rows(v, rows, rng):
    """Weights with long runs of zeros at either end and within, and one-hot rows."""
    weight = rng.exponential(size=(rows, v)) * 10.0 ** rng.integers(-6, 1, (rows, v))
    for row in weight:
        for _ in range(rng.integers(0, 4)):
            start, length = rng.integers(0, v), rng.integers(0, v)
            row[start : start + length] = 0
        if rng.random() < 0.2:
            row[: v // 2] = 0
        if not row.any() or rng.random() < 0.1:
            row[:] = 0
            row[rng.integers(v)] = 10.0 ** rng.integers(-20, 1)
    return weight.astype(np.float32)


@pytest.mark.parametrize(("v", "block"), [(1, 256), (97, 32), (300, 256), (1000, 16)])
def test_an_index_of_weight_zero_is_never_drawn(v, block):
    rng, rows = np.random.default_rng(v), 400
    weight = zero_heavy_rows(v, rows, rng)
    cdf = np.cumsum(weight.astype(np.float64), -1) / weight.sum(-1, keepdims=True, dtype=np.float64)
    boundary = cdf[np.arange(rows), rng.integers(0, v, rows)].astype(
        np.float32
    )  # where a token ends and a zero may begin
    for u in (
        np.zeros(rows),
        np.full(rows, ALMOST_ONE),
        np.full(rows, 2.0**-24),
        np.minimum(boundary, ALMOST_ONE),
        rng.random(rows),
    ):
        u = np.minimum(u.astype(np.float32), ALMOST_ONE)
        index = np.asarray(draw(weight, u, block=block))
        assert (0 <= index).all() and (index < v).all()
        at = np.arange(rows), index
        assert (weight[at] > 0).all()
        # and it is the right index up to rounding: cdf[i-1] <= u < cdf[i]
        assert (u <= cdf[at] + 1e-6).all() and (u >= cdf[at] - (weight[at] / weight.sum(-1)) - 1e-6).all()


def test_the_ends_of_the_unit_interval_are_the_first_and_last_possible_token():
    weight = np.zeros((1, 97), np.float32)
    weight[0, 5:80] = 1
    ends = [int(draw(weight, np.array([u], np.float32), block=32)[0]) for u in (0, ALMOST_ONE)]
    assert ends == [5, 79]


def test_improbable_tokens_keep_their_rate_in_a_large_vocabulary():
    v, n = 32771, 2048
    weight = np.full(v, 0.05 / (v - 3), np.float32)  # 95 % on three tokens, 1.5e-6 on each of the others
    weight[[0, 100, v - 1]] = 0.95 / 3
    p = weight.astype(np.float64) / weight.sum(dtype=np.float64)
    u = ((np.arange(n) + 0.5) / n).astype(np.float32)  # evenly spread: any count may be off by one only
    index = np.asarray(draw_many(weight, u.reshape(-1, 8), 128)).ravel()
    cuts = np.linspace(0, v, 33).astype(int)
    np.testing.assert_allclose(
        np.histogram(index, cuts)[0], [n * p[a:b].sum() for a, b in zip(cuts, cuts[1:], strict=False)], atol=1.01
    )
    cdf = np.cumsum(p)
    assert (u <= cdf[index] + 5e-7).all() and (
        u >= cdf[index] - p[index] - 5e-7
    ).all()  # each within float32 rounding of exact


# --- truncation -------------------------------------------------------------------------------------------------------


def random_logits(rows=40, v=30):
    rng = np.random.default_rng(1)
    z = 2 * rng.normal(size=(rows, v))
    z[::2] = np.round(z[::2]) + 0.0  # many ties; no -0.0, which sorts below 0.0
    z[1] = 0
    return z.astype(np.float32)


TRUNCATIONS = [
    dict(top_k=7),
    dict(top_k=99),
    dict(top_p=0.6180339),
    dict(top_p=1e-6),
    dict(min_p=0.1),
    dict(min_p=0.0),
    dict(min_p=1.0),
    dict(top_k=7, top_p=0.71),
    dict(top_k=9, top_p=0.83, min_p=0.2),
    dict(top_p=0.83, min_p=0.2),
]


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_truncate_equals_numpy(options):
    z = random_logits()
    got = np.asarray(run_truncate(z, SamplingOptions(max_new_tokens=1, **options)))
    for row, out in zip(z, got, strict=True):
        ids = oracle.kept(row, **options)
        assert np.flatnonzero(np.isfinite(out)).tolist() == ids
        np.testing.assert_array_equal(out[ids], row[ids])


def test_ties_go_to_the_lowest_ids():
    z = np.zeros((2, 30), np.float32)
    z[0, [1, 2, 4, 5]], z[1, 4:] = 1, -99
    kept = [np.flatnonzero(r > -np.inf).tolist() for r in np.asarray(run_truncate(z, SamplingOptions(1, top_k=3)))]
    assert kept == [[1, 2, 4], [0, 1, 2]]
    kept = np.asarray(run_truncate(z, SamplingOptions(1, top_p=0.5)))[1]  # exactly half: the second token completes it
    assert np.flatnonzero(kept > -np.inf).tolist() == [0, 1]


def test_top_p_of_one_keeps_everything():
    z = np.random.default_rng(0).normal(size=(4, 4096)).astype(np.float32) * 4
    dropped = ~np.isfinite(run_truncate(z, SamplingOptions(1, top_p=1.0)))
    assert dropped.sum(-1).tolist() == [0, 0, 0, 0]


def test_truncations_may_change_without_compiling_again():
    run = jax.jit(lambda *args: truncate(*args), compiler_options=COMPILE_FAST)  # a cache of its own
    for options in (SamplingOptions(1, top_p=0.71, min_p=0.2), SamplingOptions(1, top_p=0.3, min_p=0.05)):
        for row, out in zip(random_logits(), np.asarray(run(random_logits(), options)), strict=True):
            assert np.flatnonzero(np.isfinite(out)).tolist() == oracle.kept(
                row, top_p=options.top_p, min_p=options.min_p
            )
    assert run._cache_size() == 1


# --- sample -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "truncation", [{}, dict(top_k=5), dict(min_p=0.15), dict(top_k=8, top_p=0.9, min_p=0.05)], ids=str
)
def test_log_probs_are_those_of_the_distribution_sampled_from(truncation):
    rng, temperature, policy_temperature = np.random.default_rng(2), 0.7, 1.3
    z = np.concatenate([rng.normal(size=12), np.full(5, -40.0)]).astype(np.float32)
    expected = oracle.log_probs(z / np.float32(temperature), **truncation)
    plain = oracle.log_probs(z / np.float32(policy_temperature))
    u = ((np.arange(4096) + 0.5) / 4096).astype(np.float32)
    options = SamplingOptions(1, temperature=temperature, **truncation)
    token, logp, logp_policy = map(
        np.asarray, run_sample(np.tile(z, (4096, 1)), u, options, policy_temperature=policy_temperature)
    )
    np.testing.assert_allclose(logp, expected[token], atol=2e-6)
    np.testing.assert_allclose(logp_policy, plain[token], atol=2e-6)
    count = np.bincount(token, minlength=17)
    np.testing.assert_allclose(count / 4096, np.exp(expected), atol=1.1 / 4096)
    kept = sorted(set(token.tolist()))
    assert kept == [i for i in range(17) if expected[i] > np.log(2 / 4096)]  # everything but the five at e^-40
    by_token = {i: lp for i, lp in zip(token.tolist(), logp.tolist(), strict=True)}
    assert sum(np.exp(lp) for lp in by_token.values()) == pytest.approx(1, abs=1e-5)


def test_the_plain_policy_gives_one_log_prob():
    z, u, options = random_logits(), np.linspace(0, 0.999, 40, dtype=np.float32), SamplingOptions(1)
    run = jax.jit(lambda z, u: sample(z, u, options), compiler_options=COMPILE_FAST)  # a constant, so known to be plain
    token, logp, plain = map(np.asarray, run(z, u))
    np.testing.assert_array_equal(logp, plain)
    np.testing.assert_allclose(logp, [oracle.log_probs(row)[t] for row, t in zip(z, token, strict=True)], atol=2e-6)
    assert options.plain
    for other in (
        dict(temperature=0.5),
        dict(top_k=3),
        dict(top_p=0.5),
        dict(min_p=0.1),
        dict(greedy=True),
        dict(temperature=np.float32(1)),
    ):
        assert not SamplingOptions(1, **other).plain, other


def test_greedy_takes_the_lowest_of_the_most_probable():
    z = random_logits()
    token, logp, plain = map(
        np.asarray,
        run_sample(z, np.full(40, 0.999, np.float32), SamplingOptions(1, greedy=True), policy_temperature=2.0),
    )
    np.testing.assert_array_equal(token, z.argmax(-1))
    assert (logp == 0).all()
    np.testing.assert_allclose(
        plain, [oracle.log_probs(row / 2)[t] for row, t in zip(z, token, strict=True)], atol=2e-6
    )


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "sampling.max_new_tokens must be a whole number of at least 1, not 0"),
        (dict(max_new_tokens=-3), "sampling.max_new_tokens must be a whole number of at least 1, not -3"),
        (dict(temperature=0), "sampling.temperature must be a positive number, not 0"),
        (dict(temperature=-1.0), "sampling.temperature must be a positive number"),
        (dict(temperature=float("nan")), "sampling.temperature must be a positive number"),
        (dict(top_k=0), "sampling.top_k must be a whole number of at least 1 or None, not 0"),
        (dict(top_k=2.5), "sampling.top_k must be a whole number of at least 1 or None, not 2.5"),
        (dict(top_p=0.0), r"sampling.top_p must be a number in \(0, 1\] or None, not 0.0"),
        (dict(top_p=1.01), r"sampling.top_p must be a number in \(0, 1\] or None"),
        (dict(top_p=float("nan")), r"sampling.top_p must be a number in \(0, 1\] or None"),
        (dict(min_p=-0.1), r"sampling.min_p must be a number in \[0, 1\] or None, not -0.1"),
        (dict(min_p=2), r"sampling.min_p must be a number in \[0, 1\] or None"),
        (dict(greedy=True, temperature=0.5), "sampling.greedy .* have no effect"),
        (dict(greedy=True, top_k=2), "sampling.greedy .* have no effect"),
        (dict(greedy=True, top_p=0.5), "sampling.greedy .* have no effect"),
        (dict(greedy=True, min_p=0.5), "sampling.greedy .* have no effect"),
    ],
    ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_invalid_options_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        validate(SamplingOptions(**{"max_new_tokens": 4, **options}))


def test_valid_options_pass():
    for options in (
        dict(),
        dict(temperature=0.3, top_k=1, top_p=1.0, min_p=0),
        dict(greedy=True, eos_ids=(1, 2)),
        dict(min_p=1, top_p=1),
    ):
        given = SamplingOptions(max_new_tokens=1, **options)
        assert validate(given) is given


# --- a temperature for each token ------------------------------------------------------------------------------------


def numbers(q=0.0, s=0.0, high=0.0, low=0.0):
    return {name: np.float32(x) for name, x in dict(q=q, s=s, high=high, low=low).items()}


def test_before_any_batch_every_token_has_the_base_temperature():
    z = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    np.testing.assert_array_equal(EntropyTemperature(1.5, 0.1, numbers())(z), np.full(5, 1.5, np.float32))


@pytest.mark.parametrize("official", (False, True))
def test_the_temperature_follows_the_entropy(official):
    rng = np.random.default_rng(1)
    z = (rng.normal(size=(40, 9)) * rng.exponential(2, size=(40, 1))).astype(np.float32)
    z[0, 3:] = -np.inf
    base, slope, q, s, high, low = 1.3, 0.2, np.log(0.8), 0.7, 0.9, 1.5
    got = EntropyTemperature(base, slope, numbers(q, s, high, low), official)(z)
    for row, temperature in zip(z.astype(np.float64), np.asarray(got), strict=True):
        logp = oracle.log_probs(row / base)
        entropy = -sum(np.exp(x) * x for x in logp if np.isfinite(x))
        place = (np.log(max(entropy, 1e-8)) - q) / s
        h = place / high if place > 0 else (-place if official else place) / low
        assert temperature == pytest.approx(base * (1 + slope * np.clip(h, -1, 1)), rel=1e-5)
    assert np.ptp(np.asarray(got)) > base * slope / 2


def test_what_is_recorded_is_the_distribution_that_was_sampled_from():
    rng = np.random.default_rng(2)
    z, u = rng.normal(size=(30, 9)).astype(np.float32) * 3, rng.random(30).astype(np.float32)
    adaptive = EntropyTemperature(1.0, 0.5, numbers(np.log(0.8), 0.7, 0.9, 1.5))
    options = SamplingOptions(1, adaptive=adaptive)
    assert not options.plain
    token, logp, plain = map(np.asarray, run_sample(z, u, options))
    for row, i, sampled, policy, temperature in zip(z, token, logp, plain, np.asarray(adaptive(z)), strict=True):
        assert sampled == pytest.approx(oracle.log_probs(row / temperature)[i], abs=2e-6)
        assert policy == pytest.approx(oracle.log_probs(row)[i], abs=2e-6)


@pytest.mark.parametrize("other", ({"greedy": True}, {"temperature": 0.5}))
def test_it_excludes_other_temperatures(other):
    with pytest.raises(ValueError, match="sampling.adaptive sets the temperature of each token: it excludes"):
        validate(SamplingOptions(1, adaptive=EntropyTemperature(1.0, 0.1, numbers()), **other))
