"""How runs end: asked to stop, at a second signal, with another writer, before the first iteration, and diverged."""

import contextlib
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate, export, sample, train_rl
from jaxpo.learning.state import advance
from jaxpo.runs import loop, restore, train
from jaxpo.runs.interrupt import Interrupt
from jaxpo.storage import lock
from jaxpo.storage.checkpoint import finished_steps
from jaxpo.storage.rundir import RunDirectory
from tests.runs import tiny


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return tiny.finished(tmp_path_factory.getbasetemp())


def short(finished, changes=None):
    return tiny.warm(finished, {"objective": {"name": "reinforce"}, "steps": 3, **(changes or {})})


@pytest.fixture
def at(monkeypatch):
    """Call something at the start of an iteration: ``at(2, call)``."""
    iteration = loop.timed_iteration

    def when(number, call):
        def called(session, run):
            if run.iteration == number - 1:
                call()
            return iteration(session, run)

        monkeypatch.setattr(loop, "timed_iteration", called)

    return when


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
def test_the_first_signal_finishes_the_iteration_and_saves_it(finished, tmp_path, at, number):
    at(2, lambda: signal.raise_signal(number))
    run = tiny.run(short(finished), tmp_path / "run")
    assert run.result.stopped == number and run.result.iteration == 2
    assert f"stopped by {number.name} after iteration 2, saved; go on with --resume" in run.printed
    assert finished_steps(tmp_path / "run" / "checkpoints")[-1] == 2
    assert not (tmp_path / "run" / lock.NAME).exists()


def test_a_signal_in_the_last_iteration_is_not_swallowed(finished, tmp_path, at):
    at(3, lambda: signal.raise_signal(signal.SIGTERM))
    part = tiny.run(short(finished), tmp_path / "run")
    assert part.result.stopped == signal.SIGTERM and part.result.after == {}
    rest = tiny.run(short(finished), tmp_path / "run", resume=True)
    assert rest.result.stopped == 0 and "eval/greedy" in rest.result.after


def test_the_second_signal_stops_at_once(finished, tmp_path, at):
    at(2, lambda: [signal.raise_signal(n) for n in (signal.SIGTERM, signal.SIGHUP)])
    with pytest.raises(KeyboardInterrupt) as stop:
        tiny.run(short(finished), tmp_path / "run")
    number, said = stop.value.args
    assert number == signal.SIGHUP and said.endswith("checkpoints/0; go on with --resume")
    assert not (tmp_path / "run" / lock.NAME).exists()
    at(99, None)
    assert tiny.run(short(finished), tmp_path / "run", resume=True).result.iteration == 3


def test_a_second_signal_that_was_swallowed_is_raised_again():
    with Interrupt() as interrupt:
        assert interrupt.asked() == 0
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked() == signal.SIGINT
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupt.asked()


def test_signals_that_are_ignored_stay_so():
    """As nohup asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert interrupt.asked() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def flags(workdir):
    cache = jax.config.jax_compilation_cache_dir
    return [f"--config={tiny.FILE}", f"--workdir={workdir}", f"--config.compilation_cache={cache}"]


@pytest.mark.parametrize(("number", "status"), ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)))
def test_an_unfinished_run_never_ends_with_status_0(tmp_path, monkeypatch, number, status):
    class Stopped:
        stopped = number

    monkeypatch.setattr(train, "train_rl", lambda *_, **__: Stopped)
    with pytest.raises(SystemExit) as end:
        train_rl.main(flags(tmp_path / "run"))
    assert end.value.code == status


@pytest.mark.parametrize("resume", (False, True))
def test_a_second_writer_is_refused_before_work(finished, tmp_path, resume, monkeypatch):
    shutil.copytree(finished.path, tmp_path / "run")
    (tmp_path / "run" / lock.NAME).write_text(json.dumps({**lock.me(), "host": "elsewhere", "pid": 7}))
    monkeypatch.setattr(train, "setup", None)  # nothing is built
    with pytest.raises(lock.Locked, match="is in use: process 7 on elsewhere"):
        tiny.run(short(finished), tmp_path / "run", resume=resume)
    evaluate.main([f"--run={tmp_path / 'run'}", "--k="])  # readers are not refused


# ---- a run that has not finished an iteration


@pytest.mark.parametrize("resume", (False, True))
def test_a_run_of_checkpoint_0_alone_begins_again_in_its_folder(finished, tmp_path, at, monkeypatch, resume):
    def no_memory():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8887535600 bytes.")

    wide = tiny.config({"policy.width": 32, "warm_start.steps": 0, "steps": 1, "evaluation.pass_at": ()})
    with monkeypatch.context() as patch:
        at(1, no_memory)
        with pytest.raises(MemoryError, match="out of memory"):
            tiny.run(wide, tmp_path / "run")
        patch.undo()
    assert finished_steps(tmp_path / "run" / "checkpoints") == [0]
    at(99, no_memory)
    run = tiny.run(short(finished, {"steps": 1}), tmp_path / "run", resume=resume)
    assert "holds a run that has not finished an iteration: it begins again" in run.printed
    assert finished_steps(tmp_path / "run" / "checkpoints") == [0, 1]
    assert [line["step"] for line in tiny.lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 1]


def test_what_was_finished_is_never_begun_again(finished, tmp_path):
    """Neither a run of supervised training, whose checkpoint 0 is its result, nor one with iterations in its logs."""
    config = short(finished)
    run = RunDirectory(tmp_path)
    run.save_json("config.json", config.to_dict())
    run.write(0, {"eval/greedy": 0.5})
    assert restore.begins_again(str(tmp_path), config)
    run.write(1, {"loss": 0.5})
    run.close()
    assert not restore.begins_again(str(tmp_path), config)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "checkpoints" / "4.damaged").mkdir(parents=True)
    assert not restore.begins_again(str(tmp_path), config)
    shutil.rmtree(tmp_path / "checkpoints")
    assert restore.begins_again(str(tmp_path), config)
    assert not restore.begins_again(str(tmp_path), tiny.config({"checkpoint.directory": "/elsewhere"}))
    (tmp_path / "config.json").write_text(json.dumps({"steps": 0}))
    assert not restore.begins_again(str(tmp_path), config)


# ---- parameters that are not finite


def test_a_state_that_is_not_finite_is_not_saved(finished, tmp_path, monkeypatch):
    iteration = loop.timed_iteration

    def diverges(session, run):
        run, metrics = iteration(session, run)
        if run.iteration == 2:
            params = {**run.state.params, "embedding": run.state.params["embedding"].at[0, 0].set(jnp.nan)}
            run = advance(run, state=run.state.replace(params=params))
        return run, metrics

    monkeypatch.setattr(loop, "timed_iteration", diverges)
    message = r"params/embedding holds NaN .* after iteration 2, .* the last good checkpoint is .*checkpoints/1; lower"
    with pytest.raises(loop.Diverged, match=message):
        tiny.run(short(finished, {"checkpoint.every": 1}), tmp_path / "run")
    assert finished_steps(tmp_path / "run" / "checkpoints") == [0, 1]


@pytest.fixture(scope="module")
def poisoned(finished, tmp_path_factory):
    """A run whose checkpoint holds NaN, as an older version or another program has written it."""
    path = tmp_path_factory.mktemp("poisoned") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "check_finite", lambda params, *_: params)
        patch.setattr(loop, "not_finite", lambda tree: [])
        load = restore.load_params

        def poison(*args, **options):
            params, step = load(*args, **options)
            return {**params, "final_norm": jax.tree.map(lambda x: x * np.nan, params["final_norm"])}, step

        patch.setattr(restore, "load_params", poison)
        tiny.run(short(finished, {"steps": 0}), path)
    return path


def refuses(main, arguments):
    with pytest.raises(SystemExit, match=r"^error: .*run, checkpoint 0: final_norm.* hold NaN or infinite values"):
        main(arguments)


def test_nan_weights_are_refused_unless_asked_for(finished, poisoned, tmp_path, capsys):
    for main, more in ((evaluate.main, ["--k="]), (sample.main, ["--prompt=12"])):
        refuses(main, [f"--run={poisoned}", *more])
        main([f"--run={poisoned}", *more, "--nonfinite"])
    refuses(export.main, [f"--workdir={poisoned}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    export.main([f"--workdir={poisoned}", f"--out={tmp_path / 'out'}", "--nonfinite"])
    assert (tmp_path / "out" / "config.json").exists()
    with pytest.raises(ValueError, match="final_norm.* hold NaN"):
        tiny.run(short(finished, {"init_from": str(poisoned)}), tmp_path / "run")


def test_a_picture_that_cannot_be_drawn_ends_no_run(finished, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(loop, "plot_curves", fail)
    run = tiny.run(short(finished, {"steps": 1, "logging.plot_seconds": 0.0}), tmp_path / "run")
    assert run.result.iteration == 1
    text = "WARNING: curves.png could not be written; the run goes on without it: RuntimeError: no fonts"
    assert run.printed.count(text) <= 1
