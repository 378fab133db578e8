"""DAPO's overlong penalty and its filter of solved and failed groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.primitives.shaping import mixed_groups, overlong_penalty
from tests.oracles import group_relative
from tests.oracles.cases import CASES

_mixed_groups = jax.jit(mixed_groups)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("max_len,buffer,penalty", ((20480, 4096, 1.0), (10, 4, 0.5), (7, 7, 2.0), (5, 1, 1.0)))
def test_overlong_penalty_equals_the_oracle_at_every_length(max_len, buffer, penalty):
    lengths = np.unique(
        np.r_[0:12, max_len - buffer - 1 : max_len - buffer + 3, max_len - 1 : max_len + 3, 2 * max_len]
    )
    expected = [group_relative.overlong_penalty(int(n), max_len, buffer, penalty) for n in lengths]
    actual = overlong_penalty(jnp.asarray(lengths), max_len=max_len, buffer=buffer, penalty=penalty)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_overlong_penalty_is_the_whole_penalty_at_max_len_and_no_more_beyond():
    at, beyond, free = overlong_penalty(jnp.array([20, 99, 15]), max_len=20, buffer=5, penalty=3.0)
    assert (at, beyond, free) == (-3, -3, 0)


def test_overlong_penalty_refuses_a_buffer_longer_than_max_len():
    with pytest.raises(ValueError, match="buffer 8 is longer than max_len 5"):
        overlong_penalty(jnp.array([1]), max_len=5, buffer=8)


@pytest.mark.parametrize("case", ("K=1", "K=2", "K=8", "unequal groups", "counts"))
def test_mixed_groups_equals_the_oracle(case):
    case = CASES[case]
    actual = np.asarray(_mixed_groups(jnp.asarray(case.correct), jnp.asarray(case.group), jnp.asarray(case.count)))
    rows = case.rows()
    np.testing.assert_array_equal(actual[rows], group_relative.dapo_keeps(case)[rows])
