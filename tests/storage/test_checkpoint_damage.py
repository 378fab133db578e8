"""A checkpoint that is not bit for bit what was saved is never used: the one before it is, and it is said."""

import json
import random
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpo.parallel import make_mesh
from jaxpo.storage import manifest
from jaxpo.storage.checkpoint import Checkpoints, DamagedCheckpoint, finished_steps, restore, restore_params


def tree_of(step: int) -> dict:
    w = jax.random.normal(jax.random.key(step), (64, 32))
    return {"params": {"w": w, "b": w[0].astype(jnp.bfloat16)}, "key": jax.random.key(step), "table": np.arange(9) / 7}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with checkpoints 1 and 2."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(step, tree_of(step), {"iteration": step})
    checkpoints.close()
    return directory


@pytest.fixture
def copy(two, tmp_path):
    shutil.copytree(two, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def data_file(directory):
    """The largest file of checkpoint 2: where the arrays are."""
    return max((p for p in (directory / "2").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path, byte, bit=3):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def flip_data(directory):
    flip(data_file(directory), data_file(directory).stat().st_size // 2)


def flip_position(directory):
    path = directory / "2" / manifest.NAME
    path.write_text(path.read_text().replace('"iteration": 2', '"iteration": 3'))


def garble_manifest(directory):
    path = directory / "2" / manifest.NAME
    path.write_text(path.read_text()[:-40])


def truncate(directory):
    path = data_file(directory)
    path.write_bytes(path.read_bytes()[:-7])


def remove_file(directory):
    data_file(directory).unlink()


def remove_manifest(directory):
    (directory / "2" / manifest.NAME).unlink()


def empty(directory):
    shutil.rmtree(directory / "2")
    (directory / "2").mkdir()


def cast(directory):
    """Other arrays under the same manifest, as it would be had orbax cast them."""
    tree = tree_of(2)
    arrays = {"params/w": tree["params"]["w"].astype(jnp.bfloat16), "params/b": tree["params"]["b"]}
    arrays |= {"key": jax.random.key_data(tree["key"]), "table": tree["table"]}
    shutil.rmtree(directory / "2" / "arrays")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
        orbax.save(directory / "cast", args=ocp.args.Composite(arrays=ocp.args.PyTreeSave(arrays)))
    shutil.move(directory / "cast" / "arrays", directory / "2" / "arrays")
    shutil.rmtree(directory / "cast")
    folder = Checkpoints(directory).directory / "2"
    content = json.loads((folder / manifest.NAME).read_text())
    del content["sha256"]
    manifest.write(folder, {**content, "files": manifest.sizes(folder)})


DAMAGE = {
    flip_data: r"damaged: .+",
    flip_position: "manifest.json is not as it was written",
    garble_manifest: "manifest.json is not readable",
    truncate: r"has \d+ bytes; \d+ were written",
    remove_file: "is missing",
    remove_manifest: "no manifest.json: it was never finished",
    empty: "no manifest.json: it was never finished",
    cast: r"params/w has checksum \w{16}; \w{16} was written",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_the_one_before_a_damaged_one_is_taken_loudly(copy, capsys, damage):
    damage(copy)
    found = restore(copy, tree_of(0))
    assert found.step == 1 and found.position == {"iteration": 1} and found.passed == [2]
    jax.tree.map(np.testing.assert_array_equal, found.tree["params"], tree_of(1)["params"])
    said = capsys.readouterr().err
    assert said.startswith(f"WARNING: checkpoint {copy}/2 is damaged: ")
    assert said.endswith(f"Taking checkpoint {copy}/1 instead\n") and said.count("\n") == 1
    with pytest.raises(DamagedCheckpoint, match=DAMAGE[damage]):
        restore(copy, tree_of(0), 2)
    params, position = restore_params(copy)
    assert position == {"iteration": 1} and params["w"].dtype == jnp.float32
    # The run goes on from 1, and writes 2 again. What was finished and is damaged is kept aside.
    kept = ["2.damaged"] if 2 in finished_steps(copy) else []
    checkpoints = Checkpoints(copy)
    checkpoints.set_aside(found.passed)
    checkpoints.save(2, tree_of(2), {"iteration": 2})
    checkpoints.close()
    assert restore(copy, tree_of(0)).step == 2
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2", *kept]


@pytest.mark.parametrize("name", ("99999", "0"))
def test_a_renamed_checkpoint_is_not_taken_for_another_step(copy, capsys, name):
    (copy / "2").rename(copy / name)
    assert restore(copy, tree_of(1)).step == 1
    with pytest.raises(DamagedCheckpoint, match="holds step 2: call the folder 2 again"):
        restore(copy, tree_of(1), int(name))
    shutil.rmtree(copy / "1")
    with pytest.raises(FileNotFoundError, match="holds step 2"):
        restore(copy, tree_of(1))


def test_any_flipped_bit_is_noticed_or_meant_nothing(copy):
    """In every file that orbax wrote, at random places."""
    rng, whole, noticed = random.Random(0), tree_of(2), 0
    files = sorted(path for path in (copy / "2").rglob("*") if path.is_file() and path.stat().st_size)
    for path in rng.choices(files, [path.stat().st_size for path in files], k=25):
        before = path.read_bytes()
        flip(path, rng.randrange(len(before)), rng.randrange(8))
        found = restore(copy, whole, report=lambda line: None)
        if found.step == 2:
            jax.tree.map(np.testing.assert_array_equal, found.tree["params"], whole["params"])
            assert found.position == {"iteration": 2}
        noticed += found.step == 1
        path.write_bytes(before)
    assert noticed >= 15


def test_nothing_whole_is_an_error_that_names_them_all(copy):
    flip_position(copy)
    (copy / "1" / manifest.NAME).unlink()
    with pytest.raises(FileNotFoundError, match="no finished checkpoint in .*/2 is damaged: .*/1 is damaged"):
        restore(copy, tree_of(0))


def test_eight_two_and_one_device(tmp_path):
    tree, specs = tree_of(5)["params"], {"w": PartitionSpec("fsdp", "tensor"), "b": PartitionSpec("tensor")}
    meshes = [
        make_mesh({"fsdp": 4, "tensor": 2}, jax.devices()),
        make_mesh({"fsdp": 1, "tensor": 2}, jax.devices()[5:7]),
        make_mesh({"data": 1}, jax.devices()[3:4]),
        make_mesh({"data": 2, "fsdp": 1, "tensor": 4}, jax.devices()),
    ]
    checkpoints, sums = Checkpoints(tmp_path, keep=9), set()
    for step, mesh in enumerate(meshes):
        where = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        if step:
            tree = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[k]) for k, x in tree.items()}
            tree, _ = checkpoints.restore(tree)
        tree = jax.device_put(tree, where)
        assert tree["w"].sharding == where["w"] and len(tree["w"].sharding.device_set) == mesh.size
        jax.tree.map(np.testing.assert_array_equal, tree, tree_of(5)["params"])
        checkpoints.save(step, tree, {})
        checkpoints.wait()
        leaves = manifest.read(checkpoints.directory / str(step))["leaves"]
        sums.add((leaves["w"]["checksum"], leaves["b"]["checksum"]))
    checkpoints.close()
    assert len(sums) == 1  # whatever the mesh


def test_checksums_notice_every_change_of_one_element():
    x = np.zeros((5, 7), np.float32)

    def of(x):
        return manifest.checksums({"x": x})["x"]

    changed = [x]
    for bit in (0, 9, 23, 31):  # 31: from 0 to -0
        for at in ((0, 0), (2, 3), (4, 6)):
            other = x.copy()
            other.view(np.uint32)[at] ^= 1 << bit
            changed.append(other)
    swapped = np.arange(35, dtype=np.float32).reshape(5, 7)
    changed += [swapped, swapped[::-1], swapped[:, ::-1], x.astype(np.float64), np.arange(35.0).reshape(5, 7)]
    assert len({of(y) for y in changed}) == len(changed)
    assert of(jnp.asarray(swapped)) == of(swapped)


def test_the_best_stays_besides_the_last(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, best="eval/greedy")
    kept = []
    for step, value in enumerate((0.5, 0.9, 0.2, 0.9, None, 0.1, 0.3), 1):
        checkpoints.save(step, {"x": jnp.zeros(3)}, {}, {} if value is None else {"eval/greedy": value})
        checkpoints.wait()
        kept.append(checkpoints.steps())
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [4, 5], [4, 5, 6], [4, 6, 7]]
    checkpoints.close()


def test_a_full_disk_is_told_and_loses_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree_of(1), {})
    checkpoints.wait()
    big = {"x": jax.random.normal(jax.random.key(0), (300_000,))}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, limit[1])
    )  # no file may be larger: writes fail as on a full disk
    try:
        with pytest.raises(OSError, match=r"could not be written to .*the last whole one is 1: make room"):
            checkpoints.save(2, big, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert restore(tmp_path, tree_of(0)).step == 1
    checkpoints.save(2, big, {})  # there is room again
    checkpoints.close()
    assert finished_steps(tmp_path) == [1, 2]
