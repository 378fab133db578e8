"""Advantages: what a reward becomes, row by row."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.primitives import advantages
from tests.oracles import group_relative
from tests.oracles.cases import CASES

CHOICES = [("group_normalized", dict(scale=scale, singleton=singleton)) for scale in ("group", "batch", "none") for singleton in ("zero", "raw")]
CHOICES += [("leave_one_out", dict(singleton=singleton)) for singleton in ("zero", "raw")]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def _advantage(name: str, reward, group, count, **options) -> np.ndarray:
    return np.asarray(getattr(advantages, name)(jnp.asarray(reward), jnp.asarray(group), jnp.asarray(count), **options))


@pytest.mark.parametrize("case", ("K=1", "K=2", "unequal groups", "counts"))
@pytest.mark.parametrize("name,options", CHOICES, ids=str)
def test_group_advantages_equal_the_oracle(name, options, case):
    case = CASES[case]
    oracle = {"group_normalized": group_relative.group_advantage, "leave_one_out": group_relative.leave_one_out}[name]
    expected = oracle(case, case.reward, **options)
    actual = _advantage(name, case.reward, case.group, case.count, **options)
    for b in case.rows():
        assert actual[b] == pytest.approx(expected[b], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("k", (2, 4, 8))
def test_leave_one_out_is_k_over_k_minus_1_times_centred(k):
    case = CASES[f"K={k}"]
    centred = _advantage("group_centered", case.reward, case.group, case.count)
    np.testing.assert_allclose(_advantage("leave_one_out", case.reward, case.group, case.count), k / (k - 1) * centred, atol=1e-12)


@pytest.mark.parametrize("name,options", [c for c in CHOICES if c[1]["singleton"] == "zero"], ids=str)
def test_counted_advantages_sum_to_zero_in_each_group(name, options):
    case = CASES["counts"]
    adv = _advantage(name, case.reward, case.group, case.count, **options) * case.count
    for g in np.unique(case.group):
        assert abs(adv[case.group == g].sum()) < 1e-9


@pytest.mark.parametrize("reward", (0.1, 0.7, 1e6 + 0.1))
@pytest.mark.parametrize("name,options", [*CHOICES, ("batch_centered", {})], ids=str)
def test_equal_rewards_give_exactly_zero(name, options, reward):
    args = [jnp.full(7, reward), jnp.array([5, 5, -2, 5, -2, -2, -2]), jnp.array([1.0, 1, 2, 1, 1, 0, 1])]
    args = args if name != "batch_centered" else [args[0], args[2]]
    assert (np.asarray(getattr(advantages, name)(*args, **options)) == 0).all()


def test_group_ids_may_be_any_integers_in_any_order():
    case = CASES["unequal groups"]
    renamed = -100 * (case.group % 11) + case.group // 11
    assert len(np.unique(renamed)) == len(np.unique(case.group))
    np.testing.assert_array_equal(*[_advantage("group_normalized", case.reward, g, case.count) for g in (case.group, renamed)])


def test_a_row_of_count_zero_changes_no_other_row():
    case = CASES["counts"]
    absent = case.count == 0
    other = np.where(absent, 1e9, case.reward)
    for name in ("group_normalized", "leave_one_out"):
        np.testing.assert_array_equal(*[_advantage(name, r, case.group, case.count)[~absent] for r in (case.reward, other)])


def test_batch_standardized_has_mean_zero_and_sample_variance_one_over_counted_rows():
    case = CASES["counts"]
    adv = np.asarray(advantages.batch_standardized(jnp.asarray(case.reward), jnp.asarray(case.count), adv_eps=0.0))[case.rows()]
    assert abs(adv.mean()) < 1e-12 and adv.var(ddof=1) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("name,options", CHOICES, ids=str)
def test_no_gradient_flows_through_an_advantage(name, options):
    case = CASES["counts"]
    args = jnp.asarray(case.group), jnp.asarray(case.count)
    grad = jax.grad(lambda reward: getattr(advantages, name)(reward, *args, **options).sum())(jnp.asarray(case.reward))
    assert (grad == 0).all()
