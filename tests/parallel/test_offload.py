"""A reference policy that waits in the memory of the host: the same numbers, and fewer bytes on the device."""

import jax
import numpy as np
import pytest

from jaxpo.batch import Rollouts
from jaxpo.config import checks
from jaxpo.config.resolve import resolve
from jaxpo.parallel import make_mesh, offload
from jaxpo.plan import trace
from jaxpo.plan.plan import memory_of, shard_bytes
from jaxpo.runs import workspace
from tests.runs import tiny

OFFLOADED = {"training.offload_reference": True}


def test_a_layer_is_fetched_when_it_is_used():
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
    tree = {"blocks": {"wq": jax.numpy.arange(2 * 4 * 2 * 2.0).reshape(2, 4, 2, 2)}}
    held = offload.to_host_memory(tree, mesh)
    assert offload.is_on_host(held["blocks"]["wq"])
    assert held["blocks"]["wq"].sharding.spec == offload.shardings(tree, mesh)["blocks"]["wq"].spec

    @jax.jit
    def total(tree, x):
        def layer(x, w):
            assert jax.typeof(w).memory_space == jax.memory.Space.Host
            return x + offload.fetched(w).sum(), None

        return jax.lax.scan(layer, x, tree["blocks"]["wq"])[0]

    assert total(held, 0.0) == tree["blocks"]["wq"].sum()


def test_devices_without_such_a_memory_are_refused(monkeypatch):
    class Memory:
        kind = "device"

    class Device:
        device_kind = "abacus"

        def addressable_memories(self):
            return [Memory()]

    class Mesh:
        local_devices = [Device()]

    with pytest.raises(ValueError, match="config.training.offload_reference: abacus has no memory 'pinned_host'"):
        offload.check_host_memory(Mesh())


def test_where_there_is_nothing_to_offload():
    with pytest.raises(ValueError, match="no effect: objective grpo uses no reference"):
        resolve(tiny.config(OFFLOADED | {"objective.beta": 0.0}), 1)
    resolved = resolve(tiny.config(OFFLOADED), 1)
    resolved.config.lora.rank = 2
    with pytest.raises(ValueError, match="with config.lora"):
        checks._check_offload(resolved)


@pytest.mark.slow
def test_the_losses_are_those_of_a_run_that_keeps_it_and_of_one_that_was_resumed(tmp_path):
    short = {"warm_start.steps": 2, "training.epochs": 1, "evaluation.pass_at": ()}
    short |= {"optimizer.learning_rate": 0.03, "objective.beta": 1.0}
    with tiny.quick():
        kept = tiny.run(tiny.config({**short, "steps": 2}), tmp_path / "kept")
        tiny.run(tiny.config({**short, **OFFLOADED, "steps": 1}), tmp_path / "parts")
        parts = tiny.run(tiny.config({**short, **OFFLOADED, "steps": 2}), tmp_path / "parts", resume=True)
    assert "resumed at iteration 1" in parts.printed and "AGAIN" not in parts.printed
    a, b = (tiny.trained(run.path) for run in (kept, parts))
    assert len(a) == len(b) == 2 and a[1]["kl/ref_k3"] > 1e-4
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        np.testing.assert_allclose([x[k] for k in x], [y[k] for k in x], rtol=1e-5, atol=1e-6)


def test_it_scores_as_the_policy_that_it_is_a_copy_of():
    """On a mesh; and its bytes are the host's."""
    sizes = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}
    with tiny.quick(devices=4):
        run = workspace.setup(tiny.config(sizes | OFFLOADED), report=lambda message: None)
        params = run.init_params(jax.random.key(0))
        held = run.reference(params)
        assert all(offload.is_on_host(x) for x in jax.tree.leaves(held))
        tokens = np.arange(32 * (run.questions.train.tokens.shape[1] + 3), dtype=np.int32).reshape(32, -1) % 4
        batch = run.put(Rollouts(tokens=tokens, mask=np.ones((32, 3), np.float32), shared_prompt=4))
        np.testing.assert_array_equal(run.score(held, batch).logp, run.score(params, batch).logp)
        assert run.programs.score_old.compilations == 2


def test_the_plan_counts_its_bytes_to_the_host():
    class Stats:
        temp_size_in_bytes = argument_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = 0
        generated_code_size_in_bytes = 0

    mesh = make_mesh(dict(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    memory, steps = {}, {}
    for name, changes in dict(kept={}, offloaded=OFFLOADED).items():
        run = resolve(tiny.config({"mesh.fsdp": 2, "mesh.tensor": 2, **changes}), 4)
        of_run = trace.trace_run(run, mesh, trace.data_of(run))
        steps[name] = {step.name: step.times for step in of_run.steps}
        memory[name] = (
            memory_of(of_run.steps[-1], of_run, run.config, mesh, Stats),
            shard_bytes(of_run.state, host=True),
        )
    assert steps["kept"] == {"rollout": 1, "scoring": 2, "update": 4}
    assert steps["offloaded"] == {"rollout": 1, "reference": 1, "scoring": 1, "update": 4}
    (kept, none), (offloaded, held) = memory["kept"], memory["offloaded"]
    assert none == 0 and held == kept["reference"] == kept["parameters"] and offloaded["reference"] == 0
    assert sum(offloaded.values()) == sum(kept.values()) - held
