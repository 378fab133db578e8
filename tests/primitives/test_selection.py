"""Choosing some of many: shares of the k smallest, places, subsets of largest variance, draws by seed."""

import itertools

import jax
import numpy as np
import pytest

from jaxpo.primitives import selection

smallest, largest, kth_smallest = map(jax.jit, (selection.smallest, selection.largest, selection.kth_smallest))
max_variance, before_in_group = jax.jit(selection.max_variance), jax.jit(selection.before_in_group)
row_uniform = jax.jit(selection.row_uniform, static_argnames=("shape", "stream"))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def chosen_copies(x, weight, k, sign=1) -> np.ndarray:
    """The same by sorting the copies one by one, ties to the lowest index."""
    copies = [i for i, w in enumerate(weight) for _ in range(int(w))]
    picked = sorted(copies, key=lambda i: (sign * x[i], i))[: max(int(k), 0)]
    return np.bincount(picked, minlength=len(x)).astype(float)


VALUES = {
    "apart": np.array([0.3, -2.0, 5.0, 1.0, -0.1, 7.5, -9.0]),
    "tied": np.array([1.0, 0.0, 1.0, 1.0, -0.0, 2.0, 1.0]),
    "equal": np.full(7, -3.5),
    "extreme": np.array([1e300, -1e300, np.inf, -np.inf, 1e-300, -1e-300, 0.0]),
}
WEIGHTS = {"each once": np.ones(7), "counts": np.array([2.0, 0, 1, 3, 1, 0, 2])}


@pytest.mark.parametrize("k", (-1, 0, 1, 2, 4, 6, 7, 9, 100))
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("values", VALUES)
def test_smallest_and_largest_are_what_sorting_the_copies_gives(values, weights, k):
    x, weight = VALUES[values], WEIGHTS[weights]
    np.testing.assert_array_equal(smallest(x, weight, float(k)), chosen_copies(x, weight, k))
    np.testing.assert_array_equal(largest(x, weight, float(k)), chosen_copies(x, weight, k, -1))


@pytest.mark.parametrize("values", VALUES)
def test_kth_smallest_is_the_value_at_that_place_among_the_copies(values):
    x, weight = VALUES[values], WEIGHTS["counts"]
    ordered = np.sort(np.repeat(x, weight.astype(int)))
    assert [float(kth_smallest(x, weight, float(k))) for k in range(1, 10)] == ordered.tolist()


def test_they_work_on_tokens_and_in_float32():
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    out = np.asarray(smallest(x, np.ones((4, 5), np.float32), 7.0))
    assert out.shape == (4, 5) and out.sum() == 7 and x[out > 0].max() < x[out == 0].min()


def test_before_in_group_counts_the_copies_that_come_first():
    x, group = np.array([3.0, 1, 3, 2, 1, 0]), np.array([0, 0, 0, 0, 1, 1])
    count = np.array([1.0, 2, 1, 0, 1, 3])
    assert np.asarray(before_in_group(x, group, count)).tolist() == [2, 0, 3, 2, 3, 0]


# ---- max_variance --------------------------------------------------------------------------------


def best_variance(x, n) -> float:
    return max(np.var([x[i] for i in subset]) for subset in itertools.combinations(range(len(x)), n))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", (1, 2, 3, 5))
def test_max_variance_of_each_group_is_the_best_by_brute_force(n, seed):
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat([4, -1], (7, 5)))
    x = rng.normal(size=12)
    out = np.asarray(max_variance(x, group, np.ones(12), np.full(12, float(n))))
    for g in (4, -1):
        rows = group == g
        assert out[rows].sum() == n and set(out) <= {0, 1}
        np.testing.assert_allclose(np.var(x[rows & (out > 0)]), best_variance(x[rows], n), atol=1e-12)


def test_max_variance_counts_copies():
    x, count = np.array([0.0, 10.0, 4.0, 5.0]), np.array([3.0, 1, 2, 2])
    copies = np.repeat(x, count.astype(int))
    for n in range(1, 9):
        out = np.asarray(max_variance(x, np.zeros(4, int), count, np.full(4, float(n))))
        assert out.sum() == n and (out <= count).all()
        np.testing.assert_allclose(np.var(np.repeat(x, out.astype(int))), best_variance(copies, n), atol=1e-12)


def test_max_variance_takes_the_lowest_indices_of_equal_values_and_all_rows_when_asked_for_more():
    x, group, count = np.array([1.0, 0, 1, 0, 1]), np.zeros(5, int), np.ones(5)
    assert np.asarray(max_variance(x, group, count, np.full(5, 2.0))).tolist() == [1, 1, 0, 0, 0]
    assert np.asarray(max_variance(x, group, count, np.full(5, 4.0))).tolist() == [1, 1, 1, 1, 0]
    assert np.asarray(max_variance(x, group, count, np.full(5, 99.0))).tolist() == [1, 1, 1, 1, 1]
    assert np.asarray(max_variance(np.ones(5), group, count, np.full(5, 2.0))).tolist() == [1, 1, 0, 0, 0]


# ---- draws ---------------------------------------------------------------------------------------

SEEDS = np.random.default_rng(0).integers(0, 2**32, 400, dtype=np.uint32)


def test_draws_of_a_row_hang_on_its_seed_alone():
    draws = np.asarray(row_uniform(SEEDS, (5,), stream=3))
    order = np.random.default_rng(1).permutation(400)
    np.testing.assert_array_equal(row_uniform(SEEDS[order], (5,), stream=3), draws[order])
    padded = np.concatenate([SEEDS[:300], np.zeros(100, np.uint32)])
    np.testing.assert_array_equal(row_uniform(padded, (5,), stream=3)[:300], draws[:300])


def test_draws_are_uniform_and_differ_from_row_to_row_token_to_token_and_stream_to_stream():
    draws = np.asarray(row_uniform(SEEDS, (5,), stream=3))
    assert len(np.unique(draws)) == draws.size and (draws >= 0).all() and (draws < 1).all()
    assert abs(draws.mean() - 1 / 2) < 0.03 and abs(draws.var() - 1 / 12) < 0.01
    other = np.asarray(row_uniform(SEEDS, (5,), stream=4))
    assert abs(np.corrcoef(draws.ravel(), other.ravel())[0, 1]) < 0.1


def test_draws_at_a_place_do_not_change_with_the_width():
    """A batch that is padded to more tokens drops the same ones."""
    narrow, wide = [np.asarray(row_uniform(SEEDS, (w,), stream=3)) for w in (5, 8)]
    np.testing.assert_array_equal(wide[:, :5], narrow)
