"""Sampling on another mesh than training: parameters are moved, nothing that is sampled changes."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

from jaxpo.config.resolve import resolve
from jaxpo.parallel import lay_out, make_mesh, moved_bytes, reshaped, shardings
from jaxpo.parallel.sharding import spec_of
from jaxpo.policy.stats import token_stats
from jaxpo.protocols.rows import as_scored
from jaxpo.runs.workspace import setup
from tests.runs import tiny

FSDP, TENSOR = {"mesh": dict(data=1, fsdp=8, tensor=1)}, {"rollout.mesh.tensor": 2, "rollout.mesh.fsdp": 2}


@pytest.fixture(autouse=True, scope="module")
def eight():
    with tiny.quick(devices=8):
        yield


def sampled(workspace, params):
    arrays = workspace.put((workspace.questions.train.tokens[:8], workspace.questions.train.length[:8]))
    return workspace.programs.generate(
        workspace.programs.sampler_params(params), *arrays, jax.random.key(1), workspace.sampling, responses=4
    )


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_another_mesh_samples_the_same(dtype):
    options = {"policy.dtype": dtype, "rollout.scan_layers": True}
    plain, moved = (setup(tiny.config({**FSDP, **options, **other})) for other in ({}, TENSOR))
    params = plain.init_params(jax.random.key(0))
    assert plain.programs.sampler_params(params) is params and moved.programs.compiled == ()
    there = moved.programs.sampler_params(params)
    assert there["blocks"]["wq"].sharding.spec == Spec(None, "fsdp", "tensor")
    assert dict(there["blocks"]["wq"].sharding.mesh.shape) == dict(moved.mesh.shape) | dict(data=2, fsdp=2, tensor=2)
    assert {x.dtype.name for x in jax.tree.leaves(there)} == {"float32", dtype}  # norms stay as they are
    ours, theirs = sampled(moved, params), sampled(plain, params)
    assert ours.tokens.sharding.is_equivalent_to(
        theirs.tokens.sharding, 2
    )  # rows are handed back to the mesh that trains
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.logp_beh, theirs.logp_beh, atol=1e-5 if dtype == "float32" else 0.02)
    trained = token_stats(plain.model, params, as_scored(ours)).logp
    np.testing.assert_allclose(trained * ours.mask, ours.logp_beh, atol=1e-5 if dtype == "float32" else 0.05)


@pytest.mark.slow
def test_a_run_on_two_meshes(tmp_path):
    """One whole run, evaluation and protocol included; its layout is compiled once and its bytes are reported."""
    short = {"steps": 1, "warm_start.steps": 2, "evaluation.pass_at": (), **FSDP}
    finished = [
        tiny.run(tiny.config({**short, **other}), tmp_path / name) for name, other in (("a", {}), ("b", TENSOR))
    ]
    lines = [tiny.trained(f.path)[-1] for f in finished]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], abs=1e-5)
    assert lines[0]["reward/mean"] == lines[1]["reward/mean"] and lines[0]["grad_norm"] == pytest.approx(
        lines[1]["grad_norm"], rel=1e-3
    )
    assert "reshard/bytes" not in lines[0] and lines[1]["reshard/bytes"] > 0
    assert "compiled reshard in" in finished[1].printed and "AGAIN" not in finished[1].printed


def test_no_array_is_brought_together_on_the_way(capfd):
    """Not even for a moment: an array that is a fifth of a model would not fit a chip."""
    mesh = make_mesh(dict(fsdp=8))
    tree = {
        "blocks": {
            "wq": jax.ShapeDtypeStruct((2, 64, 4, 4), np.float32),
            "wo": jax.ShapeDtypeStruct((2, 4, 4, 64), np.float32),
        }
    }
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh))
    for sizes in (dict(tensor=4), dict(tensor=2), dict(fsdp=2, tensor=2), dict(data=4, fsdp=2)):
        text = jax.jit(partial(lay_out, mesh=reshaped(mesh, sizes))).lower(placed).compile().as_text()
        assert "f32[2,64,4,4]" not in text and "f32[2,4,4,64]" not in text, sizes
    assert "rematerialization" not in capfd.readouterr().err


def test_moved_bytes():
    mesh = make_mesh(dict(fsdp=8))
    tree = {
        "blocks": {"wq": jax.ShapeDtypeStruct((2, 16, 4, 4), np.float32)},
        "final_norm": jax.ShapeDtypeStruct((16,), np.float32),
    }
    old, new = shardings(tree, mesh), shardings(tree, reshaped(mesh, dict(tensor=4)))
    # a device holds 2 of 16 rows of 4 heads, and is to hold all rows of one head
    assert moved_bytes(tree, old, new) == 4 * (2 * 16 * 1 * 4 - 2 * 2 * 1 * 4)
    assert moved_bytes(tree, old, old) == 0


def test_sizes():
    mesh = make_mesh(dict(fsdp=8))
    assert reshaped(mesh, dict(data=None, tensor=None)) is mesh
    other = reshaped(mesh, dict(tensor=2))
    assert (other.shape["data"], other.shape["fsdp"], other.shape["tensor"]) == (4, 1, 2)
    assert list(other.devices.flat) == list(mesh.devices.flat)
    assert spec_of("blocks/wq/weight", (2, 16, 4, 4), mesh) == Spec(None, "fsdp", "tensor", None)  # beside an adapter


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"rollout.mesh.tensor": 3}, "rollout.mesh .*'tensor': 3.* does not fit 8 devices"),
        ({"rollout.mesh.tensor": 4}, "config.rollout.mesh.tensor 4 does not divide config.policy.heads 2"),
        ({"rollout.mesh.fsdp": 0}, "rollout.mesh.fsdp must be -1 .the rest. or at least 1, not 0"),
        (
            {"rollout.mesh.tensor": 1, "rollout.prompts": 4, "mesh": dict(data=1, fsdp=4, tensor=2)},
            "config.rollout.prompts 4 does not divide over rollout.mesh.data . rollout.mesh.fsdp = 8",
        ),
    ),
    ids=("devices", "heads", "zero", "prompts"),
)
def test_what_does_not_divide(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(tiny.config({**FSDP, **changes}), 8)
