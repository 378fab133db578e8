"""Sizes of the mesh's axes."""

import jax
import pytest
from jax.sharding import AxisType

from jaxpo.parallel import AXES, make_mesh
from jaxpo.parallel.mesh import mesh_shape


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, None),
        ({"data": -1}, (8, 1, 1, 1, 1)),
        ({"data": 8}, (8, 1, 1, 1, 1)),
        ({"fsdp": -1}, (1, 8, 1, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 1, 1, 2)),
        ({"tensor": 4, "data": 2}, (2, 1, 1, 1, 4)),
        ({"expert": 2, "context": -1}, (1, 1, 2, 4, 1)),
        ({"data": 8, "fsdp": -1}, (8, 1, 1, 1, 1)),
    ],
    ids=str,
)
def test_shape(sizes, shape):
    if shape is None:
        assert mesh_shape(sizes, 1) == (1, 1, 1, 1, 1)
    else:
        assert mesh_shape(sizes, 8) == shape
        assert tuple(make_mesh(sizes).shape.items()) == tuple(zip(AXES, shape, strict=True))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 2}, "mesh.model does not exist; axes: data, fsdp, expert, context, tensor"),
        ({"fsdp": 0}, r"mesh.fsdp must be -1 \(the rest\) or at least 1, not 0"),
        ({"tensor": -2}, "mesh.tensor must be -1"),
        ({"data": -1, "fsdp": -1}, "only one axis of the mesh may be -1"),
        ({"data": 2}, "does not fit 8 devices: the product of its axes must be 8"),
        ({"data": -1, "tensor": 3}, "does not fit 8 devices"),
        ({"data": -1, "tensor": 16}, "does not fit 8 devices"),
        ({}, "does not fit 8 devices"),
    ],
    ids=str,
)
def test_errors_name_the_axis(sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh_shape(sizes, 8)


def test_make_mesh():
    mesh = make_mesh()
    assert mesh.axis_names == AXES and tuple(mesh.shape.values()) == (8, 1, 1, 1, 1)
    assert mesh.axis_types == (AxisType.Auto,) * len(AXES)  # the compiler places arrays; jax's own default is Explicit
    one = make_mesh(devices=jax.devices()[3:4])
    assert one.size == 1 and list(one.devices.flat) == jax.devices()[3:4]
