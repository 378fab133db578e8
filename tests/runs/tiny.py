"""A run that takes seconds, shared by the tests of the loop, of resuming and of the command line; a config file too."""

import contextlib
import functools
import io
import json
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts
from jaxpo.config.fields import default
from jaxpo.learning.state import TrainState
from jaxpo.parallel import rows_over_mesh
from jaxpo.runs import gatherer, loop, train
from jaxpo.storage.checkpoint import restore_params

DEVICES = jax.devices()
FILE = Path(__file__)
ROOT = FILE.parents[2]


def config(changes: Mapping[str, Any] | None = None) -> ConfigDict:
    """The tiny run, with ``changes`` by path; a dict takes the place of a whole named block."""
    out = default()
    out.task = ConfigDict(dict(name="toy", train_size=25, test_size=5, seed=0, digits=2, base=4))
    out.tokenizer = ConfigDict(dict(name="integers", base=4))
    out.policy.update(width=16, layers=1, heads=2)
    out.sampling.max_new_tokens = 3
    out.objective = ConfigDict(dict(name="grpo", beta=0.04))
    out.optimizer.learning_rate = 1e-3
    out.rollout.update(prompts=8, responses=4)
    out.training.update(epochs=2, minibatches=2)
    out.steps = 4
    out.warm_start.update(steps=60, batch=8)
    out.warm_start.optimizer.learning_rate = 1e-2
    out.evaluation.update(every=2, pass_at=(1, 4), samples=4)
    out.checkpoint.update(every=2, keep=2)
    out.logging.samples = 3
    for path, value in (changes or {}).items():
        *blocks, field = path.split(".")
        block = functools.reduce(lambda b, name: b[name], blocks, out)
        block[field] = ConfigDict(value) if isinstance(value, Mapping) else value
    return out


get_config = config


def warm(finished: "Finished", changes: Mapping[str, Any] | None = None) -> ConfigDict:
    """One optimizer step from the parameters that ``finished`` ended with: no warm start, greedy evaluation only."""
    one = {
        "steps": 1,
        "training.epochs": 1,
        "training.minibatches": 1,
        "evaluation.pass_at": (),
        "evaluation.every": 100,
    }
    return config({"init_from": str(finished.path), "warm_start.steps": 0} | one | dict(changes or {}))


class Finished(NamedTuple):
    """A run: its directory, what `train_rl` returned and printed (both streams), and the prompts that it drew."""

    path: Path
    result: train.Result
    printed: str
    drawn: list[list[int]]


def run(changed: ConfigDict, workdir: Path, **options: Any) -> Finished:
    """`train_rl` in a process whose settings are those of the tests."""
    drawn, printed, prompt_order = [], io.StringIO(), gatherer.prompt_order

    def recorded(*args: Any) -> np.ndarray:
        drawn.append(prompt_order(*args).tolist())
        return np.array(drawn[-1])

    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr(train, "prepare_process", lambda cache: None)
        patch.setattr(gatherer, "prompt_order", recorded)
        result = train.train_rl(changed, str(workdir), **options)
    return Finished(workdir, result, printed.getvalue(), drawn)


SAVED = ("params", "opt_state", "objective", "tables")


def stopped_and_resumed(
    changes: Mapping[str, Any], folder: Path, at: int, entries: tuple[str, ...] = SAVED
) -> tuple[Finished, Finished]:
    """A run, and the same run with SIGTERM in its iteration ``at`` and resumed. Both end with the same, bit for bit."""
    whole = run(config(changes), folder / "whole")
    iteration = loop.timed_iteration

    def terminated(session: Any, state: Any) -> Any:
        if state.iteration == at - 1:
            signal.raise_signal(signal.SIGTERM)
        return iteration(session, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "timed_iteration", terminated)
        assert run(config(changes), folder / "parts").result.iteration == at
    rest = run(config(changes), folder / "parts", resume=True)
    assert "AGAIN" not in whole.printed + rest.printed
    for name in entries:
        ours, position = restore_params(rest.path / "checkpoints", name=name)
        theirs, expected = restore_params(whole.path / "checkpoints", name=name)
        assert_same_params(ours, theirs)
        assert position == expected
    assert trained(rest.path) == trained(whole.path)
    return whole, rest


@functools.cache
def finished(directory: Path) -> Finished:
    """The tiny run, once a session if ``directory`` is the session's (`tmp_path_factory.getbasetemp()`)."""
    with quick():
        return run(config(), directory / "tiny" / "run")


@contextlib.contextmanager
def quick(devices: int = 1) -> Iterator[None]:
    """Few devices, and programs that compile in half the time and run slower; jax's options are put back."""
    cache = jax.config.jax_compilation_cache_dir
    options = {"jax_disable_most_optimizations": True, "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in (*options, "jax_compilation_cache_dir")}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as own:
        try:
            for name, value in (options | {"jax_compilation_cache_dir": cache or own}).items():
                jax.config.update(name, value)
            patch.setattr(jax, "devices", lambda *_: DEVICES[:devices])
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)


def update_arguments(update: Any, mesh: Mesh, length: np.ndarray) -> tuple[TrainState, Rollouts]:
    """Numbers for the update step that a planned run has: completions of given lengths [B], in groups of 4."""
    rng, t = np.random.default_rng(1), update.arguments[1].width

    def number(shape: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = rng.normal(size=shape.shape) / 2 if jax.numpy.issubdtype(shape.dtype, jax.numpy.floating) else 0
        return jax.device_put(np.broadcast_to(np.asarray(numbers, shape.dtype), shape.shape), shape.sharding)

    state, batch, _ = jax.tree.map(number, update.arguments)
    state = state.replace(opt_state=jax.tree.map(lambda x: 0 * x, state.opt_state))
    rows, p = len(length), batch.prompt_width
    prompts = np.repeat(rng.integers(0, 4, (rows // 4, p)), 4, 0)
    fields = dict(
        tokens=np.concatenate([prompts, rng.integers(0, 4, (rows, t))], 1),
        mask=np.arange(t) < length[:, None],
        reward=np.arange(rows) % 3,
        count=np.ones(rows),
        prompt_length=np.full(rows, p),
        group=np.arange(rows) // 4,
    )
    fields = {name: np.asarray(x, getattr(batch, name).dtype) for name, x in fields.items()}
    return state, batch.replace(**rows_over_mesh(fields, mesh))


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file without what differs from machine to machine."""
    return [
        {k: v for k, v in line.items() if not k.startswith("time") and k != "sft/tokens_per_s"} for line in lines(path)
    ]


def trained(path: Path) -> list[dict[str, Any]]:
    """The metrics lines of iterations: neither of the warm start nor of an evaluation alone."""
    return [line for line in untimed(path / "metrics.jsonl") if "loss" in line]


def environment() -> dict[str, str]:
    """Of a run in a process of its own, on one device."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}


def assert_same_params(a: Any, b: Any) -> None:
    """Bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
