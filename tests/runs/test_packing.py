"""Runs that pack short completions: the same metrics as without, with few programs."""

import jax
import numpy as np
import pytest

from jaxpo.batch import Rollouts
from jaxpo.config.resolve import resolve
from jaxpo.learning.programs import packed
from jaxpo.parallel import make_mesh
from jaxpo.plan import trace
from tests.runs import tiny

MESH = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}
SMALL = {"sampling.max_new_tokens": 32, "training.epochs": 1, "training.minibatches": 1, "training.microbatches": 2}


@pytest.mark.slow
def test_a_step_on_a_mesh_is_that_of_rows_one_by_one_in_fewer_bytes():
    """The run's own scoring and update, of two microbatches."""
    mesh, rng = make_mesh(dict(fsdp=2, tensor=2, data=1), jax.devices()[:4]), np.random.default_rng(0)
    length = rng.integers(1, 9, 32)
    length[[3, 17]] = 32
    out, temporaries = {}, {}
    for packs in (False, True):
        run = resolve(tiny.config(MESH | SMALL | {"training.packing": packs, "objective.beta": 0.1}), 4)
        of_run = trace.trace_run(run, mesh, trace.data_of(run))
        update = of_run.steps[-1]
        state, batch = tiny.update_arguments(update, mesh, length)
        plan = packed(run.config, mesh, batch, 2)
        assert bool(plan) == packs and (not packs or plan["bins"] <= 4)
        rows = np.arange(32, dtype=np.int32)
        traced = update.function.lower(state, batch, rows, fresh=False, **plan).compile()
        temporaries[packs] = traced.memory_analysis().temp_size_in_bytes
        score = of_run.steps[1].function(
            state.params,
            Rollouts(**{n: getattr(batch, n) for n in ("tokens", "mask", "prompt_length")}, shared_prompt=4),
            **plan,
        )
        new, metrics = update.function(state, batch, rows, fresh=False, **plan)
        out[packs] = (new.params, metrics, score.logp * batch.mask)
    a, b = out[False], out[True]
    np.testing.assert_allclose(a[2], b[2], rtol=1e-4, atol=1e-5)
    for name in a[1]:
        np.testing.assert_allclose(a[1][name], b[1][name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert a[1]["grad_norm"] > 0
    assert temporaries[True] < 0.7 * temporaries[False], temporaries


def test_a_plan_counts_the_longest_completions():
    run, mesh = resolve(tiny.config(SMALL | {"training.packing": True}), 1), make_mesh(dict(data=1), jax.devices()[:1])
    steps = trace.trace_run(run, mesh, trace.data_of(run)).steps
    assert [s.options.get("bins") for s in steps] == [None, 16, 16]


def test_a_row_alone_is_refused():
    config = tiny.config(SMALL | {"training.packing": True, "training.microbatches": 32})
    with pytest.raises(ValueError, match="config.training.packing has no effect: each device has one row"):
        resolve(config, 1)


@pytest.mark.slow
def test_a_run_that_packs_is_the_run_that_does_not(tmp_path):
    short = {"warm_start.steps": 20, "steps": 3, "sampling.max_new_tokens": 8, "training.minibatches": 2}
    with tiny.quick():
        plain, packs = (
            tiny.run(tiny.config(short | {"training.packing": on}), tmp_path / str(on)) for on in (False, True)
        )
    a, b = (tiny.trained(run.path) for run in (plain, packs))
    assert "AGAIN" not in packs.printed
    assert all(0 < line.pop("packing/share") <= 1 for line in b) and min(len(a), len(b)) == 3
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose([x[k] for k in x], [y[k] for k in x], rtol=1e-3, atol=1e-5)


PAIRS = {
    "data": {"name": "task", "flipped": 0.25, "seed": 3},
    "warm_start.steps": 0,
    "sampling.max_new_tokens": 12,
    "training.epochs": 1,
    "training.microbatches": 2,
    "rollout.responses": 2,
    "evaluation.pass_at": (),
}


PACKED = [("dpo", 1), ("dpo", 4), ("kto", 1), ("hypo", 1), ("bradley_terry_rm", 1), ("gpm_rm", 4), ("themis", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "devices"), PACKED)
def test_preferences_packed_are_those_that_are_not(objective, devices, tmp_path):
    """Training, and what is said of held-out units."""
    changes = PAIRS | {"objective": {"name": objective}} | (MESH if devices > 1 else {})
    if objective == "themis":
        changes |= {"trace": "jaxpo.tasks.preferences.traces:reverser", "sampling.max_new_tokens": 24}
    with tiny.quick(devices):
        plain, packs = (
            tiny.run(tiny.config(changes | {"training.packing": on}), tmp_path / str(on)) for on in (False, True)
        )
    assert "AGAIN" not in packs.printed
    a, b = (tiny.untimed(run.path / "metrics.jsonl") for run in (plain, packs))
    assert all(0 < line.pop("packing/share") <= 0.75 for line in b if "loss" in line) and len(a) == len(b) >= 5
    for x, y in zip(a, b, strict=True):
        # At the start the policy is the reference: margins are 0 but for rounding, and which are above 0 is chance.
        keys = [k for k in x if x["step"] or not k.endswith("accuracy")]
        np.testing.assert_allclose(
            [x[k] for k in keys], [y[k] for k in keys], rtol=1e-3, atol=1e-4, err_msg=str(x["step"])
        )
