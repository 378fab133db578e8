"""Aggregations: the weight of every token, and that any split of a batch adds up to the batch."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.primitives import aggregation
from tests.oracles import Case, aggregate
from tests.oracles.cases import CASES, COMPILE_FAST

L_CONST = 13.0
ALL = {**aggregation.PER_TOKEN, **{name: fn(L_CONST) for name, fn in aggregation.WITH_CONSTANT.items()}}
WITH_ORACLE = ("token_mean", "seq_mean", "seq_sum", "seq_sum_const", "sum_const")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.partial(jax.jit, compiler_options=COMPILE_FAST)
def _weights(mask, count, group) -> dict[str, jax.Array]:
    """Every aggregation there is, compiled once."""
    return {name: fn(mask, count, SimpleNamespace(group=group)) for name, fn in ALL.items()}


def _weight(name: str, case: Case) -> np.ndarray:
    return np.asarray(_weights(jnp.asarray(case.mask), jnp.asarray(case.count), jnp.asarray(case.group))[name])


@pytest.mark.parametrize("case", ("unequal groups", "counts", "nothing counted"))
@pytest.mark.parametrize("name", WITH_ORACLE)
def test_weights_equal_the_oracle(name, case):
    """The gradient of an aggregated term of slope 1 is the weight itself."""
    case = CASES[case]
    _, expected = aggregate(case, name, lambda b, t: (0.0, 1.0), L_CONST)
    np.testing.assert_allclose(_weight(name, case), expected, rtol=1e-12)


def test_group_mean_is_a_mean_over_groups_of_means_over_rows():
    case, expected = CASES["counts"], np.zeros(CASES["counts"].mask.shape)
    rows = case.rows()
    groups = {case.group[b] for b in rows}
    for b in rows:
        size = sum(case.group[j] == case.group[b] for j in rows)
        for t in case.positions(b):
            expected[b, t] += 1 / len(groups) / size / len(case.positions(b))
    np.testing.assert_allclose(_weight("group_mean", case), expected, rtol=1e-12)


def test_unit_mean_weighs_every_counted_row_the_same():
    case = CASES["counts"]
    weight = aggregation.unit_mean(jnp.ones((len(case.count), 1)), jnp.asarray(case.count), None)
    np.testing.assert_allclose(weight[:, 0], case.count / case.count.sum(), rtol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch_and_an_uncounted_one_weigh_exactly_nothing(name):
    case = CASES["unequal groups"]
    assert (_weight(name, case.replace(mask=np.zeros_like(case.mask))) == 0).all()
    assert (_weight(name, CASES["nothing counted"]) == 0).all()


@pytest.mark.parametrize("name", ALL)
def test_padding_changes_no_weight(name):
    case = CASES["counts"]
    wider = np.pad(case.mask, ((0, 3), (0, 4)))
    padded = SimpleNamespace(mask=wider, count=np.pad(case.count, (0, 3)), group=np.append(case.group, [900, 901, 902]))
    weight = _weight(name, padded)
    np.testing.assert_array_equal(weight[:-3, :-4], _weight(name, case))
    assert (weight[-3:] == 0).all() and (weight[:, -4:] == 0).all()


def test_means_weigh_one_in_all_when_no_row_is_empty():
    case = CASES["counts"]
    case = case.replace(count=case.count * case.mask.any(1))
    for name in ("token_mean", "seq_mean", "group_mean"):
        assert _weight(name, case).sum() == pytest.approx(1, rel=1e-12)


def test_an_empty_row_still_counts_among_the_rows():
    case = CASES["unequal groups"]
    empty = ~case.mask.any(1)
    assert _weight("seq_mean", case).sum() == pytest.approx(1 - empty.mean(), rel=1e-12)


@pytest.mark.parametrize("name", aggregation.WITH_CONSTANT)
@pytest.mark.parametrize("bad", (0, -1, None))
def test_l_const_must_be_positive(name, bad):
    with pytest.raises(ValueError, match="L_const"):
        aggregation.WITH_CONSTANT[name](bad)
