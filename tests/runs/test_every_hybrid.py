"""Every objective with demonstrations, hints, repaired or chosen answers is trained, resumed and planned."""

import jax
import numpy as np
import pytest

from jaxpo.config.resolve import resolve
from jaxpo.objectives import make
from jaxpo.parallel import make_mesh
from jaxpo.plan import trace
from jaxpo.registry import entry, names
from tests.runs import tiny

MODULES = ("hybrid", "successes", "unified", "guidance")
ALL = [name for name in names() if entry(name).factory.__module__ in [f"jaxpo.objectives.{m}" for m in MODULES]]
OBJECTIVE = {"ghpo": {"w_fmt": 0}, "rft": {"select": "best"}, "upge": {"method": "luffy_off"}}
PROTOCOL = {
    "critique_grpo": {"request": "{answer}{critique}", "critique": "tests.protocols.test_hints:critic"},
    "fapo": {"genrm": "tests.protocols.test_hints:finds_flaws"},
    "ghpo": {"sentence": ""},
    "nft": {"max_batches": 99},
    "scope": {"separator": ""},
}
TRAINED = [name for name in ALL if name not in ("sft", "policy_cliff")]  # `sft` warms up; a task with rewards is below
FEW = [n if n in ("chord", "ghpo") else pytest.param(n, marks=pytest.mark.slow) for n in TRAINED]


def changes(name):
    own = OBJECTIVE.get(name, {})
    protocol = {"name": make(name, **own).protocol.name, **PROTOCOL.get(name, {})}
    return {
        "objective": {"name": name, **own},
        "protocol": protocol,
        "evaluation.every": 9,
        "evaluation.pass_at": (),
        "checkpoint.every": 9,
        "steps": 3,
    }


@pytest.mark.parametrize("name", FEW)
def test_it_trains_and_resumes_to_the_bit(name, tmp_path):
    with tiny.quick():
        whole, _ = tiny.stopped_and_resumed(changes(name), tmp_path, 2, tiny.SAVED[:3])
    losses = [m["loss"] for m in tiny.trained(whole.path)]
    assert len(losses) == 3 and np.isfinite(losses).all()


@pytest.mark.parametrize("name", FEW)
def test_it_is_planned(name):
    resolved = resolve(tiny.config(changes(name)), 1)
    planned = trace.trace_run(resolved, make_mesh(resolved.config.mesh, jax.devices()[:1]), trace.data_of(resolved))
    assert {"rollout", "update"} <= {step.name for step in planned.steps}
