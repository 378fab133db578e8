"""The options that give memory for time: the same step, and a smaller program. Packing: test_packing.py; the reference
in the host's memory: tests/parallel/test_offload.py; fused attention: tests/policy/test_splash.py."""

import functools

import jax
import numpy as np
import pytest

from jaxpo.config.resolve import resolve
from jaxpo.parallel import make_mesh
from jaxpo.plan import trace
from tests.runs import tiny

BASE = {"policy.layers": 3, "sampling.max_new_tokens": 64, "training.epochs": 1, "training.minibatches": 1}
# option -> (without, with, what gets smaller, at most to which share)
OPTIONS = {
    "remat of all but products": ({}, {"policy.remat": "dots"}, "temporaries", 0.9),
    "microbatches": ({}, {"training.microbatches": 4}, "temporaries", 0.5),
    "remat": ({}, {"policy.remat": "full"}, "temporaries", 0.6),
    "scan over layers": ({"policy.scan_layers": False}, {}, "program", 0.85),
}


@functools.cache
def step(*changes):
    """Metrics and parameters after one update of the run's own compiled step, and the sizes of the program."""
    run, mesh = resolve(tiny.config(BASE | dict(changes)), 1), make_mesh(dict(data=1), jax.devices()[:1])
    update = trace.trace_run(run, mesh, trace.data_of(run)).steps[-1]
    state, batch = tiny.update_arguments(update, mesh, np.arange(32) % 64 + 1)
    arguments = state, batch, np.arange(32, dtype=np.int32)
    compiled = update.function.lower(*arguments, fresh=False).compile()
    sizes = dict(temporaries=compiled.memory_analysis().temp_size_in_bytes, program=len(compiled.as_text()))
    state, metrics = update.function(*arguments, fresh=False)
    return jax.device_get((metrics, state.params)), sizes


@pytest.mark.parametrize(
    "option", [name if name == "microbatches" else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
def test_an_option_changes_the_footprint_and_nothing_else(option):
    without, pulled, what, share = OPTIONS[option]
    (expected, before), (got, after) = step(*without.items()), step(*pulled.items())
    assert expected[0]["grad_norm"] > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
    assert after[what] < share * before[what], (before, after)
