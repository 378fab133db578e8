"""`Compiled` counts what jit compiles, and says so when it compiles again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpo.learning.compiled import Compiled, shapes


def test_a_second_shape_is_announced():
    said = []
    f = Compiled("square", lambda x: x * x, report=said.append)
    assert f(jnp.arange(3.0)).tolist() == [0, 1, 4]
    f(jnp.ones(3))
    assert (
        f.compilations == 1 and len(said) == 1 and said[0].startswith("compiled square in ") and "AGAIN" not in said[0]
    )
    seconds = f.seconds
    f(jnp.ones((2, 2)))
    assert f.compilations == 2 and f.seconds > seconds > 0
    assert said[1].endswith("AGAIN (2 times now, 1 expected): float32[2, 2]")


def test_as_many_as_expected_are_no_news():
    said = []
    f = Compiled("double", lambda x, *, fast: 2 * x, report=said.append, expected=2, static_argnames="fast")
    for fast in (True, False, True, False):
        f(jnp.ones(2), fast=fast)
    assert f.compilations == 2 and not any("AGAIN" in text for text in said)
    f(jnp.ones(2, jnp.int32), fast=True)
    assert f.compilations == 3 and "3 times now, 2 expected" in said[2]


def test_the_same_shapes_placed_otherwise_are_announced():
    said, mesh = [], jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    f = Compiled("half", lambda x: x / 2, report=said.append)
    for spec in (PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")):
        f(jax.device_put(jnp.ones(4), NamedSharding(mesh, spec)))
    assert f.compilations == 2 and "AGAIN" in said[1]


def test_options_go_to_jit():
    f = Compiled("add", lambda x: x + 1, report=lambda text: None, donate_argnums=0)
    x = jnp.ones(3)
    f(x)
    assert x.is_deleted()
    assert "stablehlo" in f.lower(jnp.ones(3)).as_text() and f.compilations == 1


def test_bound_arguments_come_first_and_are_no_constants():
    weights = jnp.ones(1000)
    f = Compiled("weigh", lambda w, x: w * x, report=lambda text: None, bound=(weights,))
    assert jnp.array_equal(f(2.0), 2 * weights)
    assert f.lower(2.0).as_text().count("tensor<1000xf32>") and "dense" not in f.lower(2.0).as_text()


def test_an_error_while_tracing_comes_through():
    f = Compiled("broken", lambda x: x.reshape(7), report=lambda text: None)
    with pytest.raises(TypeError, match="reshape"):
        f(jnp.ones(3))


def test_shapes_of_a_call():
    args = (
        {"a": np.zeros((2, 3), np.int32), "b": [jnp.ones(2), jnp.ones(2)], "c": 5},
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    assert shapes(args) == "float32[2], float32[], int32[2, 3]"
