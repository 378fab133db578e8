"""A run that was stopped or killed goes on as if nothing had happened: the same parameters, prompts and samples."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxpo.training import loop
from jaxpo.training.checkpoint import Checkpoints, finished_steps, restore_params
from jaxpo.training.rundir import read_metrics
from tests.training import tiny


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return tiny.finished(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def resumed(finished, tmp_path_factory):
    """The same run in four parts, by name: it crashes while it saves checkpoint 2; goes on from checkpoint 0 until
    SIGTERM in iteration 3; goes on to its end; and is asked to go on once more. ``lines``: metrics and samples after
    each part."""
    directory = tmp_path_factory.mktemp("resumed") / "run"
    parts, patch = {"lines": {}}, pytest.MonkeyPatch()

    def note(name, part):
        parts[name] = part
        parts["lines"][name] = [tiny.untimed(directory / file) for file in ("metrics.jsonl", "samples.jsonl")]

    save, iterate = Checkpoints.save, loop.iterate

    def crash(self, step, *args):
        if step == 2:
            raise OSError("no space left on device")
        save(self, step, *args)

    def terminated(session, run, key):
        if run.iteration == 2:
            signal.raise_signal(signal.SIGTERM)
        return iterate(session, run, key)

    with patch.context() as p, pytest.raises(OSError, match="no space left"):
        p.setattr(Checkpoints, "save", crash)
        tiny.run(tiny.config(), directory)
    note("crashed", None)
    with patch.context() as p:
        p.setattr(loop, "iterate", terminated)
        note("terminated", tiny.run(tiny.config(), directory, resume=True))
    note("ended", tiny.run(tiny.config(), directory, resume=True))
    note("again", tiny.run(tiny.config(), directory, resume=True))
    return parts


def test_parameters_optimizer_and_objective_are_the_same_bit_for_bit(finished, resumed):
    tiny.assert_same_params(resumed["ended"].result.params, finished.result.params)
    for name in ("params", "opt_state", "objective", "slots"):
        ours, position = restore_params(resumed["ended"].path / "checkpoints", name=name)
        theirs, expected = restore_params(finished.path / "checkpoints", name=name)
        tiny.assert_same_params(ours, theirs)
        assert position == expected


def test_prompts_come_in_the_same_order(finished, resumed):
    assert resumed["terminated"].drawn == finished.drawn[:3]  # from checkpoint 0
    assert resumed["ended"].drawn == finished.drawn[3:]


def test_each_iteration_is_in_the_metrics_once(finished, resumed):
    steps = {
        name: [line["step"] for line in metrics if "loss" in line] for name, (metrics, _) in resumed["lines"].items()
    }
    assert steps == {"crashed": [1, 2], "terminated": [1, 2, 3], "ended": [1, 2, 3, 4], "again": [1, 2, 3, 4]}
    assert [line for line in resumed["lines"]["ended"][0] if "loss" in line] == tiny.trained(finished.path)


def test_all_metrics_and_samples_are_those_of_an_uninterrupted_run(finished, resumed):
    metrics, samples = resumed["lines"]["ended"]
    assert metrics == tiny.untimed(finished.path / "metrics.jsonl")
    assert samples == tiny.untimed(finished.path / "samples.jsonl")


def test_the_evaluations_before_and_after_are_those_of_an_uninterrupted_run(finished, resumed):
    assert resumed["ended"].result.after == finished.result.after
    assert {k: v for k, v in resumed["ended"].result.before.items() if not np.isnan(v)} == finished.result.before


def test_sigterm_saves_and_ends_cleanly(resumed):
    part = resumed["terminated"]
    assert part.result.iteration == 3 and part.result.after == {}
    assert "stopped by SIGTERM after iteration 3, saved; go on with --resume" in part.printed
    assert "resumed at iteration 3" in resumed["ended"].printed
    assert not any("eval/pass@1" in line for line in resumed["lines"]["terminated"][0] if line["step"] > 0)


def test_a_finished_run_has_nothing_left_to_do(resumed):
    assert resumed["again"].result.iteration == 4
    tiny.assert_same_params(resumed["again"].result.params, resumed["ended"].result.params)
    assert resumed["lines"]["again"] == resumed["lines"]["ended"]
    assert "finished" in resumed["again"].printed


@pytest.mark.parametrize("exists", (False, True))
def test_resume_starts_afresh_where_there_is_no_run(finished, tmp_path, exists):
    if exists:
        (tmp_path / "run").mkdir()
    run = tiny.run(tiny.warm(finished, {"objective": {"name": "reinforce"}, "steps": 0}), tmp_path / "run", resume=True)
    assert "resumed" not in run.printed and finished_steps(run.path / "checkpoints") == [0]


def test_sigterm_while_steps_are_skipped_loses_nothing(finished, tmp_path, monkeypatch):
    """What the run says it has saved is there."""
    iterate = loop.iterate

    def terminated(*args):
        run, metrics = iterate(*args)
        signal.raise_signal(signal.SIGTERM)
        return run, metrics | {"step/nonfinite": 1.0}

    monkeypatch.setattr(loop, "iterate", terminated)
    run = tiny.run(tiny.warm(finished, {"objective": {"name": "reinforce"}, "steps": 3}), tmp_path / "run")
    assert "stopped by SIGTERM after iteration 1, saved" in run.printed
    assert finished_steps(run.path / "checkpoints")[-1] == 1


# ---- in processes of their own --------------------------------------------------------------------------------------


def start(workdir, cache, *flags):
    command = [
        sys.executable,
        "-m",
        "experiments.train_rl",
        f"--config={tiny.FILE}",
        f"--workdir={workdir}",
        f"--config.compilation_cache={cache}",
        "--config.steps=150",
        "--config.evaluation.every=10",
        "--config.checkpoint.every=4",
        *flags,
    ]
    return subprocess.Popen(
        command, cwd=tiny.ROOT, env=tiny.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(process, workdir, step):
    """Until the metrics have reached ``step``; fails if the process ends before."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if (workdir / "metrics.jsonl").exists() and read_metrics(workdir)["step"].max(initial=-1000) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"step {step} was not reached in 300 s:\n{process.communicate()[0]}")


def end(process):
    """What it printed; its exit status is 0."""
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    return printed


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    whole, killed, cache = tmp_path / "whole", tmp_path / "killed", tmp_path / "cache"
    end(start(whole, cache))
    for step in (-50, 3, 13, 42, 90):  # the first one in the warm start
        process = start(killed, cache, *(["--resume"] if killed.exists() else []))
        wait_for(process, killed, step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert max(finished_steps(killed / "checkpoints"), default=0) < 150, "killed too late to mean anything"
    printed = end(start(killed, cache, "--resume"))
    assert "resumed at iteration" in printed
    for name in ("params", "opt_state", "objective", "slots"):
        ours, position = restore_params(killed / "checkpoints", name=name)
        theirs, expected = restore_params(whole / "checkpoints", name=name)
        tiny.assert_same_params(ours, theirs)
        assert position == expected and position["iteration"] == 150
    assert tiny.trained(killed) == tiny.trained(whole)
    assert [line["step"] for line in tiny.trained(killed)] == list(range(1, 151))
    assert tiny.lines(killed / "samples.jsonl") == tiny.lines(whole / "samples.jsonl")
    assert tiny.untimed(killed / "metrics.jsonl") == tiny.untimed(whole / "metrics.jsonl")


@pytest.mark.slow
def test_sigterm_ends_the_process_with_status_0(tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, tmp_path / "cache")
    wait_for(process, workdir, 3)
    process.send_signal(signal.SIGTERM)
    printed = end(process)
    steps, last = finished_steps(workdir / "checkpoints"), tiny.trained(workdir)[-1]["step"]
    assert f"stopped by SIGTERM after iteration {last}, saved" in printed and steps[-1] == last < 150
    assert not [name for name in os.listdir(workdir / "checkpoints") if not name.isdecimal()]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ("warm start", "evaluation"))
def test_sigterm_before_the_first_iteration_ends_the_process_with_status_0(tmp_path, moment):
    workdir = tmp_path / "run"
    process = start(workdir, tmp_path / "cache")
    wait_for(process, workdir, -50 if moment == "warm start" else 0)
    process.send_signal(signal.SIGTERM)
    end(process)
