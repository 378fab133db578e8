"""Advantages: what a reward becomes, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxpo.primitives import advantages
from tests.oracles import Case, groups
from tests.oracles.cases import CASES, COMPILE_FAST

GROUP = {
    f"{name} {' '.join(options.values())}": (name, options)
    for singleton in ("zero", "raw")
    for name, options in [
        ("group_normalized", dict(scale="group", singleton=singleton)),
        ("group_normalized", dict(scale="batch", singleton=singleton)),
        ("group_normalized", dict(scale="none", singleton=singleton)),
        ("leave_one_out", dict(singleton=singleton)),
    ]
}


def _all(reward, group, count) -> dict[str, jax.Array]:
    """Every advantage there is."""
    out = {key: getattr(advantages, name)(reward, group, count, **options) for key, (name, options) in GROUP.items()}
    out["group_centered"] = advantages.group_centered(reward, group, count)
    out["batch_centered"] = advantages.batch_centered(reward, count)
    out["batch_standardized"] = advantages.batch_standardized(reward, count, adv_eps=0.0)
    return out


_compiled = jax.jit(_all, compiler_options=COMPILE_FAST)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def every_advantage(case: Case) -> dict[str, np.ndarray]:
    return jax.tree.map(
        np.asarray, _compiled(jnp.asarray(case.reward), jnp.asarray(case.group), jnp.asarray(case.count))
    )


@pytest.mark.parametrize("case", ("K=1", "K=2", "unequal groups", "counts"))
@pytest.mark.parametrize("key", GROUP)
def test_group_advantages_equal_the_oracle(key, case):
    case, (name, options) = CASES[case], GROUP[key]
    oracle = {"group_normalized": groups.group_advantage, "leave_one_out": groups.leave_one_out}[name]
    expected, actual = oracle(case, case.reward, **options), every_advantage(case)[key]
    for b in case.rows():
        assert actual[b] == pytest.approx(expected[b], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("k", (2, 4, 8))
def test_leave_one_out_is_k_over_k_minus_1_times_centred(k):
    adv = every_advantage(CASES[f"K={k}"])
    np.testing.assert_allclose(adv["leave_one_out zero"], k / (k - 1) * adv["group_centered"], atol=1e-12)


@pytest.mark.parametrize("key", [key for key in GROUP if key.endswith("zero")])
def test_counted_advantages_sum_to_zero_in_each_group(key):
    case = CASES["counts"]
    adv = every_advantage(case)[key] * case.count
    for g in np.unique(case.group):
        assert abs(adv[case.group == g].sum()) < 1e-9


@pytest.mark.parametrize("reward", (0.1, 0.7, 1e6 + 0.1))
@pytest.mark.parametrize(
    "key", [*(key for key in GROUP if key.endswith("zero")), "batch_centered", "batch_standardized"]
)
def test_equal_rewards_give_exactly_zero(key, reward):
    case = CASES["counts"]
    assert (every_advantage(case.replace(reward=np.full_like(case.reward, reward)))[key] == 0).all()


def test_group_ids_may_be_any_integers_in_any_order():
    case = CASES["unequal groups"]
    renamed = case.replace(group=-100 * (case.group % 11) + case.group // 11)
    assert len(np.unique(renamed.group)) == len(np.unique(case.group))
    before, after = every_advantage(case), every_advantage(renamed)
    for key in GROUP:
        np.testing.assert_array_equal(before[key], after[key])


def test_a_row_of_count_zero_changes_no_other_row():
    case = CASES["counts"]
    absent = case.count == 0
    before, after = every_advantage(case), every_advantage(case.replace(reward=np.where(absent, 1e9, case.reward)))
    for key in before:
        np.testing.assert_array_equal(before[key][~absent], after[key][~absent])


def test_batch_standardized_has_mean_zero_and_sample_variance_one_over_counted_rows():
    case = CASES["counts"]
    adv = every_advantage(case)["batch_standardized"][case.rows()]
    assert abs(adv.mean()) < 1e-12 and adv.var(ddof=1) == pytest.approx(1, rel=1e-12)


def test_no_gradient_flows_through_an_advantage():
    case = CASES["counts"]
    args = jnp.asarray(case.group), jnp.asarray(case.count)
    total = jax.jit(jax.grad(lambda reward: sum(x.sum() for x in _all(reward, *args).values())))
    grad = total(jnp.asarray(case.reward))
    assert (grad == 0).all()


@pytest.mark.parametrize("a, b", [(0, 0), (0, 3.5), (2, 0), (0.5, 0.25), (9.9, 10.1), (300, 20), (4000, 9000)])
def test_beta_log_density_is_that_of_scipy(a, b):
    p = np.array([1e-9, 0.01, 0.3, 0.4999, 0.7, 0.99, 1 - 1e-9])
    with jax.enable_x64(True):
        ours = advantages.beta_log_density(jnp.asarray(p), jnp.asarray(float(a)), jnp.asarray(float(b)))
    np.testing.assert_allclose(ours, scipy.stats.beta.logpdf(p, a + 1, b + 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", (1e3, 1e5, 1e7))
def test_a_peaked_beta_is_the_same_in_float32(n):
    """Near its mode, where ``log B`` is a difference of numbers of the size of n log n."""
    mode = 0.375
    p = np.float32(mode) + np.float32(0.25 / np.sqrt(n)) * np.arange(-4, 5, dtype=np.float32)
    with jax.enable_x64(True):
        exact = advantages.beta_log_density(*map(jnp.asarray, (p.astype(float), n * mode, n * (1 - mode))))
    ours = advantages.beta_log_density(*(jnp.asarray(x, jnp.float32) for x in (p, n * mode, n * (1 - mode))))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact, atol=2e-3)


def test_groups_of_one_success_rate_have_one_weight_in_float32():
    """Their Beta is a peak: the weight is 1 / its density at the mode, sqrt(2 pi v), whatever the precision."""
    reward, group = np.tile([1.0, 0, 0, 1, 1, 0, 1, 0], 6), np.repeat(np.arange(6), 8)
    with jax.enable_x64(True):
        exact = advantages.beta_normalized(jnp.asarray(reward), jnp.asarray(group), jnp.ones(48))
    ours = advantages.beta_normalized(jnp.asarray(reward, jnp.float32), jnp.asarray(group), jnp.ones(48, jnp.float32))
    np.testing.assert_allclose(ours, exact, rtol=1e-4)
    assert np.abs(exact).max() > 0
