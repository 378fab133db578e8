"""Checkpoints come back bit for bit, whole or not at all, on any mesh."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpo.storage.checkpoint import Checkpoints, finished_steps, restore_params


def make_tree(seed: int = 0) -> dict:
    key = jax.random.key(seed)
    blocks = {i: {"w": jax.random.normal(key, (8, 4), dtype)} for i, dtype in enumerate((jnp.float32, jnp.bfloat16))}
    params = {
        "blocks": blocks,
        "head": [jnp.arange(6, dtype=jnp.int32), jnp.array([0.1, -0.0, jnp.nan, jnp.inf])],
        "empty": {},
        "bits": jnp.array([2**32 - 1], jnp.uint32),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.0, 1.0, 9)))
    return {
        "params": params,
        "optimizer": optimizer.init(params["blocks"]),
        "objective": {},
        "keys": (key, jax.random.split(key, 3), jax.random.PRNGKey(seed), jax.random.key(seed, impl="rbg")),
        "host": {
            "count": 3,
            "rate": 0.1,
            "on": True,
            "name": "a",
            "f64": np.array(1 / 3),
            "scalar": np.float32(2),
            "none": jnp.zeros((0, 3)),
            "nothing": None,
        },
    }


def raw(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y) and getattr(x, "dtype", None) == getattr(y, "dtype", None)
        assert raw(x).shape == raw(y).shape and raw(x).tobytes() == raw(y).tobytes()


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, tree)


def test_everything_comes_back_bit_for_bit(tmp_path):
    checkpoints, tree = Checkpoints(tmp_path), make_tree()
    assert checkpoints.latest() is None and checkpoints.steps() == []
    position = {"step": 7, "data": {"epoch": 1, "order": [3, 1]}, "rate": 0.1}
    checkpoints.save(7, tree, position)
    checkpoints.wait()
    for template in (make_tree(seed=1), abstract(tree)):
        restored, at = checkpoints.restore(template)
        assert_same(restored, tree)
        assert at == position
    # Uncommitted stays uncommitted: such a leaf joins arrays of any mesh.
    assert not jax.tree.leaves(restored["params"])[0].committed
    checkpoints.close()

    params, at = restore_params(tmp_path)
    assert at == position and set(params) == {"blocks", "head", "bits"}
    assert_same(params["blocks"], tree["params"]["blocks"])
    assert_same(list(params["head"].values()), tree["params"]["head"])
    with pytest.raises(KeyError, match="did you mean 'optimizer'"):
        restore_params(tmp_path, name="optimiser")


def test_tree_may_be_donated_and_overwritten_after_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    device, host = jnp.arange(2_000_000, dtype=jnp.float32), np.arange(5)
    checkpoints.save(1, {"device": device, "host": host}, {})
    jax.block_until_ready(jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(device))
    host[:] = -1
    tree, _ = checkpoints.restore({"device": jax.ShapeDtypeStruct((2_000_000,), jnp.float32), "host": host})
    np.testing.assert_array_equal(tree["device"], np.arange(2_000_000, dtype=np.float32))
    np.testing.assert_array_equal(tree["host"], np.arange(5))
    checkpoints.close()


def test_keeps_the_last_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10, 11):
        checkpoints.save(step, {"x": jnp.full(2, step)}, {"step": step})
    checkpoints.wait()
    assert checkpoints.steps() == [10, 11] and checkpoints.latest() == 11
    checkpoints.save(11, {"x": jnp.full(2, -11)}, {})  # the same step again: replaced
    assert checkpoints.restore({"x": jnp.zeros(2, jnp.int32)})[0]["x"].tolist() == [-11, -11]
    with pytest.raises(ValueError, match=r"10 comes before the latest checkpoint, 11,.*discard_after\(10\)"):
        checkpoints.save(10, {"x": jnp.zeros(2)}, {})
    with pytest.raises(FileNotFoundError, match="step 9 .*nearest is 10"):
        checkpoints.restore({"x": jnp.zeros(2, jnp.int32)}, step=9)
    checkpoints.discard_after(10)
    assert checkpoints.steps() == [10] and {path.name for path in tmp_path.iterdir()} == {"10"}
    checkpoints.close()
    with pytest.raises(ValueError, match="keep must be a whole number of at least 1, not 0"):
        Checkpoints(tmp_path, keep=0)


def test_torn_directories_are_no_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        checkpoints.restore({})
    checkpoints.save(1, {"x": jnp.ones(3)}, {})
    checkpoints.wait()
    (tmp_path / "2").mkdir()  # empty
    shutil.copytree(tmp_path / "1", tmp_path / "3")
    (tmp_path / "3" / "manifest.json").unlink()
    shutil.copytree(tmp_path / "1", tmp_path / "4.orbax-checkpoint-tmp")  # as a kill leaves it
    assert checkpoints.steps() == [1] == finished_steps(tmp_path)
    for step in (2, 3, 4):
        checkpoints.save(step, {"x": jnp.full(3, step)}, {})
    checkpoints.close()
    assert finished_steps(tmp_path) == [2, 3, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3", "4"}
    assert restore_params(tmp_path, 3, name="x")[0].tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            {"a": {"w": jnp.zeros((2, 4)), "b": jnp.zeros(3)}, "n": 1},
            r"a/w was saved with shape \[2, 3\], .* has \[2, 4\]",
        ),
        ({"a": {"w": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(3)}, "n": 1}, "a/w .* dtype float32, .* bfloat16"),
        ({"a": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}, "n": 1.0}, "n was .* dtype python int, .* python float"),
        (
            {"a": {"w": jnp.zeros((2, 3)), "b": jax.random.split(jax.random.key(0), 3)}, "n": 1},
            "a/b was .* key threefry",
        ),
        ({"a": {"w": jnp.zeros((2, 3)), "c": jnp.zeros(3)}, "n": 1}, "unknown leaf 'a/c': did you mean 'a/b'"),
        ({"a": {"w": jnp.zeros((2, 3))}, "n": 1}, "that the template lacks: unknown leaf 'a/b'"),
    ],
)
def test_mismatch_names_the_leaf(mismatch_directory, template, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(mismatch_directory).restore(template)


@pytest.fixture(scope="module")
def mismatch_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(directory)
    checkpoints.save(0, {"a": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}, "n": 1}, {})
    checkpoints.close()
    return directory


def test_what_cannot_be_saved_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(TypeError, match="a/f: a leaf of type function"):
        checkpoints.save(1, {"a": {"f": lambda: 0}}, {})
    with pytest.raises(TypeError, match="position: .*set"):
        checkpoints.save(1, {"x": jnp.zeros(2)}, {"seen": {1, 2}})
    with pytest.raises(ValueError, match="a/b: two leaves"):
        checkpoints.save(1, {"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(2)}}, {})
    checkpoints.close()
    assert finished_steps(tmp_path) == []


OTHER_MESH = textwrap.dedent("""
    import os, signal, sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    import jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from jaxpo.storage.checkpoint import Checkpoints

    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    on = lambda *spec: NamedSharding(mesh, P(*spec))
    template = {"w": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=on("fsdp", "data")),
                "key": jax.ShapeDtypeStruct((8,), jax.random.key(0).dtype, sharding=on("fsdp")),
                "count": jnp.zeros((), jnp.int32)}
    checkpoints = Checkpoints(sys.argv[1])
    tree, position = checkpoints.restore(template)
    assert position == {"step": 1}
    assert tree["w"].sharding == template["w"].sharding and len(tree["w"].sharding.device_set) == 8
    assert tree["key"].sharding.is_equivalent_to(template["key"].sharding, 1), tree["key"].sharding
    jax.jit(lambda t: t["w"] * t["count"])(tree)                  # an uncommitted leaf goes with those on the mesh
    checkpoints.save(2, tree, {"step": 2})
    checkpoints.wait()
    checkpoints.save(3, {"big": jnp.ones((8_000_000,))}, {"step": 3})
    os.kill(os.getpid(), signal.SIGKILL)                          # while step 3 is being written
""")


def test_other_mesh_and_sigkill_while_saving(tmp_path):
    one = jax.devices()[0]
    tree = jax.device_put(
        {
            "w": jax.random.normal(jax.random.key(1), (8, 4), jnp.bfloat16),
            "key": jax.random.split(jax.random.key(2), 8),
            "count": jnp.array(5, jnp.int32),
        },
        one,
    )
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree, {"step": 1})
    checkpoints.wait()
    child = subprocess.run([sys.executable, "-c", OTHER_MESH, tmp_path], capture_output=True, text=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert checkpoints.steps() == [1, 2]
    back, position = checkpoints.restore(tree)  # eight devices to one
    assert position == {"step": 2} and back["w"].devices() == {one}
    assert_same(back, tree)
    checkpoints.save(3, tree, {"step": 3})  # the killed step succeeds when tried again
    checkpoints.close()
    assert finished_steps(tmp_path) == [1, 2, 3]
    assert json.loads((tmp_path / "3" / "manifest.json").read_text())["position"] == {"step": 3}
    assert not [path for path in tmp_path.iterdir() if not path.name.isdecimal()]
