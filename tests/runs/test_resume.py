"""A run that was stopped or killed goes on as if nothing had happened: the same parameters, prompts and samples."""

import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxpo.runs import loop
from jaxpo.storage.checkpoint import Checkpoints, finished_steps, restore_params
from jaxpo.storage.manifest import config_hash, differences, is_fixed
from jaxpo.storage.rundir import read_metrics
from tests.runs import tiny


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

    save, iteration = Checkpoints.save, loop.timed_iteration

    def crash(self, step, *args):
        if step == 2:
            raise OSError("no space left on device")
        save(self, step, *args)

    def terminated(session, run):
        if run.iteration == 2:
            signal.raise_signal(signal.SIGTERM)
        return iteration(session, run)

    with patch.context() as p, pytest.raises(OSError, match="no space left"):
        p.setattr(Checkpoints, "save", crash)
        tiny.run(tiny.config(), directory)
    note("crashed", None)
    with patch.context() as p:
        p.setattr(loop, "timed_iteration", terminated)
        note("terminated", tiny.run(tiny.config(), directory, resume=True))
    note("ended", tiny.run(tiny.config(), directory, resume=True))
    note("again", tiny.run(tiny.config(), directory, resume=True))
    return parts


def test_parameters_optimizer_and_objective_are_the_same_bit_for_bit(finished, resumed):
    tiny.assert_same_params(resumed["ended"].result.params, finished.result.params)
    for name in ("params", "opt_state", "objective", "references"):
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
    iteration = loop.timed_iteration

    def terminated(*args):
        run, metrics = iteration(*args)
        signal.raise_signal(signal.SIGTERM)
        return run, metrics | {"step/nonfinite": 1.0}

    monkeypatch.setattr(loop, "timed_iteration", terminated)
    run = tiny.run(tiny.warm(finished, {"objective": {"name": "reinforce"}, "steps": 3}), tmp_path / "run")
    assert "stopped by SIGTERM after iteration 1, saved" in run.printed
    assert finished_steps(run.path / "checkpoints")[-1] == 1


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "4" / "manifest.json").write_text("{}")
    run = tiny.run(tiny.config({"logging.samples": 4}), tmp_path / "run", resume=True)
    assert "4 is damaged: manifest.json is not readable. Taking checkpoint" in run.printed
    assert "resumed at iteration 2 from" in run.printed and run.drawn == finished.drawn[2:]
    tiny.assert_same_params(run.result.params, finished.result.params)
    assert tiny.trained(run.path) == tiny.trained(finished.path)
    assert finished_steps(run.path / "checkpoints") == [2, 4] and (run.path / "checkpoints" / "4.damaged").is_dir()
    assert "another config" not in run.printed  # what is logged does not matter


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy.width": 32}, "config.policy.width is 32, but the run in .* has 16 and goes on with that"),
        ({"policy.rope_theta": 5.0}, "config.policy.rope_theta is 5.0, but the run"),  # of the same shape
        ({"objective": {"name": "rloo"}}, "config.objective.name is 'rloo', but the run in .* has 'grpo'.*init_from"),
        ({"tokenizer": {"name": "characters"}}, "config.tokenizer.base is None, but"),
        ({"seed": 1}, "config.seed is 1, but the run that is to be resumed has seed 0"),
    ],
)
def test_another_model_is_refused_and_nothing_is_touched(finished, tmp_path, changes, message):
    shutil.copytree(finished.path, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        tiny.run(tiny.config(changes), tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_the_checkpoints_of_a_run_carry_what_the_best_is_chosen_by(finished, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    changes = {"checkpoint.keep_best": "eval/greedy", "checkpoint.keep": 1, "checkpoint.directory": str(elsewhere)}
    config = tiny.warm(finished, {"steps": 4, "evaluation.every": 1, "checkpoint.every": 1, **changes})
    with pytest.MonkeyPatch.context() as patch:
        greedy, whole = iter((0.2, 0.6, 0.4, 0.0)), loop.evaluate_greedy
        patch.setattr(loop, "evaluate_greedy", lambda *a, **k: whole(*a, **k) | {"eval/greedy": next(greedy)})
        tiny.run(config, tmp_path / "run")
    assert finished_steps(elsewhere) == [2, 4] and not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(FileExistsError, match="elsewhere holds checkpoint 4; go on with --resume"):
        tiny.run(config, tmp_path / "other")


@pytest.mark.parametrize(
    ("field", "fixed"),
    [
        ("policy.width", True),
        ("policy.remat", False),
        ("policy", True),
        ("objective.name", True),
        ("objective.eps", False),
        ("tokenizer.chat_template", True),
        ("lora.alpha", True),
        ("optimizer.learning_rate", False),
    ],
)
def test_fields_that_must_stay(field, fixed):
    assert is_fixed(field) is fixed


def test_a_moved_file_is_no_other_config():
    """What a run finds at a place is known by its hash."""
    old = {"task": {"name": "jsonl", "path": "a", "test_path": "b"}, "policy": {"path": "c"}, "judge": {"path": "d"}}
    new = {"task": {"name": "jsonl", "path": "A", "test_path": "B"}, "policy": {"path": "C"}, "judge": {"path": "D"}}
    assert differences(old, new) == [("judge.path", "d", "D")]
    assert config_hash(ConfigDict(old | {"judge": {}})) == config_hash(ConfigDict(new | {"judge": {}}))


def test_a_changed_config_is_told_field_by_field(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    run = tiny.run(tiny.config({"optimizer.learning_rate": 2e-3}), tmp_path / "run", resume=True)
    assert "WARNING: the run goes on with another config: config.optimizer.learning_rate: 0.001 -> 0.002" in run.printed


def test_no_room_for_the_checkpoints_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10_000))
    with pytest.raises(OSError, match=r"a checkpoint takes .* GB and 2 of them stay .* 1e-05 GB are free: make room"):
        tiny.run(tiny.config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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


def caught(checkpoints, moment):
    """Whether a checkpoint is being written, or is written and has no manifest yet; any time will do for the rest."""
    names = os.listdir(checkpoints)
    if moment == "writing":
        return any(".orbax-checkpoint-tmp" in name for name in names)
    if moment == "before the manifest":
        return any(name.isdecimal() and not (checkpoints / name / "manifest.json").exists() for name in names)
    return True


@pytest.mark.slow
def test_a_run_killed_20_times_ends_as_if_it_had_not_been(tmp_path):
    """In the warm start, at any time of an iteration (generation, reward, update), while a checkpoint is written."""
    whole, killed, cache = tmp_path / "whole", tmp_path / "killed", tmp_path / "cache"
    end(start(whole, cache))
    rng, moments, caught_in = random.Random(0), ("any", "writing", "before the manifest"), collections.Counter()
    for kill, step in enumerate([-50, *sorted(rng.sample(range(1, 136), 19))]):
        process = start(killed, cache, *(["--resume"] if killed.exists() else []))
        wait_for(process, killed, step)
        moment, until = moments[kill % 3] if step > 0 else "any", time.monotonic() + 5
        if moment == "any":
            time.sleep(rng.uniform(0, 0.2))
        while not (hit := caught(killed / "checkpoints", moment)) and time.monotonic() < until:
            assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "killed too late to mean anything"
        assert max(finished_steps(killed / "checkpoints"), default=0) < 150, "killed too late to mean anything"
        caught_in[moment] += hit
    assert caught_in["any"] >= 7 and caught_in["writing"] >= 2, caught_in
    printed = end(start(killed, cache, "--resume"))
    assert "resumed at iteration" in printed
    for name in ("params", "opt_state", "objective", "references"):
        ours, position = restore_params(killed / "checkpoints", name=name)
        theirs, expected = restore_params(whole / "checkpoints", name=name)
        tiny.assert_same_params(ours, theirs)
        assert position == expected and position["iteration"] == 150
    # Every iteration is there once, with the prompts, rewards and losses of the uninterrupted run.
    assert tiny.trained(killed) == tiny.trained(whole)
    assert [line["step"] for line in tiny.trained(killed)] == list(range(1, 151))
    assert tiny.lines(killed / "samples.jsonl") == tiny.lines(whole / "samples.jsonl")
    assert tiny.untimed(killed / "metrics.jsonl") == tiny.untimed(whole / "metrics.jsonl")
    assert not [name for name in os.listdir(killed / "checkpoints") if not name.isdecimal()]


def asked_to_stop(process, number):
    """What it printed; its exit status says which signal stopped it, and it shows no traceback."""
    process.send_signal(number)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode in (128 + number, -number) and "Traceback" not in printed, printed  # to a shell the same
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
def test_a_signal_ends_the_process_with_a_status_of_its_own(tmp_path, number):
    workdir = tmp_path / "run"
    process = start(workdir, tmp_path / "cache")
    wait_for(process, workdir, 3)
    printed = asked_to_stop(process, number)
    steps, last = finished_steps(workdir / "checkpoints"), tiny.trained(workdir)[-1]["step"]
    assert f"stopped by {number.name} after iteration {last}, saved" in printed and steps[-1] == last < 150
    assert not [name for name in os.listdir(workdir / "checkpoints") if not name.isdecimal()]


@pytest.mark.slow
def test_ctrl_c_at_ten_moments_loses_nothing(tmp_path):
    """While the program starts, in the warm start, in evaluations and iterations; each time the run goes on."""
    workdir, cache, rng = tmp_path / "run", tmp_path / "cache", random.Random(0)
    for moment in (None, None, None, -50, -10, 0, 0, 3, 20, 60):
        process = start(workdir, cache, "--resume")
        if moment is None:
            time.sleep(rng.uniform(3, 8))  # before that Python itself starts
        else:
            wait_for(process, workdir, moment)
        printed = asked_to_stop(process, signal.SIGINT)
        assert "stopped by SIGINT" in printed or process.returncode == -signal.SIGINT  # before Python has begun
    assert finished_steps(workdir / "checkpoints")[-1] >= 60
    end(start(workdir, cache, "--resume"))
    assert [line["step"] for line in tiny.trained(workdir)] == list(range(1, 151))


@pytest.mark.slow
def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    workdir = tmp_path / "run"
    first = start(workdir, tmp_path / "cache", "--config.steps=400")
    wait_for(first, workdir, 3)
    second = start(workdir, tmp_path / "cache", "--resume")
    printed, _ = second.communicate(timeout=100)
    assert second.returncode == 1 and "is in use: process" in printed and printed.count("\n") == 1
    assert len(read_metrics(workdir)["step"]) and first.poll() is None  # a reader is not refused
    first.send_signal(signal.SIGKILL)
    first.communicate()
    end(start(workdir, tmp_path / "cache", "--resume"))  # the lock of a process that is gone


@pytest.mark.slow
@pytest.mark.parametrize("moment", ("warm start", "evaluation"))
def test_sigterm_before_the_first_iteration_ends_the_process_with_status_143(tmp_path, moment):
    workdir = tmp_path / "run"
    process = start(workdir, tmp_path / "cache")
    wait_for(process, workdir, -50 if moment == "warm start" else 0)
    asked_to_stop(process, signal.SIGTERM)
