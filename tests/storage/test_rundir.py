"""A run directory loses nothing, keeps each step once, and says what is wrong."""

import errno
import io
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.storage.rundir import Progress, RunDirectory, closing_table, read_metrics


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_written_at_once_and_read_as_columns(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "a")
    run.write(0, {"loss": jnp.float32(0.5), "reward/mean": np.float64(0.25)})
    run.write(1, {"loss": float("nan"), "grad_norm": jnp.inf, "eval/greedy": 1})
    run.write(1, {"eval/pass@8": True})  # of the same step: another line, the same row
    written = lines(run.path / "metrics.jsonl")  # before close: it is there when write returns
    assert list(written[0]) == ["step", "time", "loss", "reward/mean"]
    assert written[1]["loss"] is None and written[1]["grad_norm"] is None
    assert written[1]["nonfinite"] == ["loss", "grad_norm"] and "nonfinite" not in written[0]
    assert written[1]["time"] >= written[0]["time"] >= 0
    columns = read_metrics(run.path)
    assert columns["step"].tolist() == [0, 1] and columns["step"].dtype == np.int64
    np.testing.assert_array_equal(columns["loss"], [0.5, np.nan])
    np.testing.assert_array_equal(columns["eval/pass@8"], [np.nan, 1.0])
    assert set(columns) == {"step", "time", "loss", "reward/mean", "grad_norm", "eval/greedy", "eval/pass@8"}
    run.close()


@pytest.mark.parametrize("value", ["0.5", None, np.zeros(1), jnp.zeros((2, 2)), [1.0]])
def test_a_metric_is_one_number(tmp_path, value):
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(TypeError, match="metric 'loss': expected one number"):
        run.write(0, {"reward/mean": 1.0, "loss": value})
    with pytest.raises(ValueError, match="metric 'time'"):
        run.write(0, {"time": 1.0})
    run.close()
    assert lines(tmp_path / "run" / "metrics.jsonl") == []


def test_samples_and_json(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.samples(3, [{"prompt": "a→b", "reward": np.float32(0.5), "tokens": np.arange(2)}, {"reward": float("nan")}])
    assert lines(run.path / "samples.jsonl") == [
        {"step": 3, "prompt": "a→b", "reward": 0.5, "tokens": [0, 1]},
        {"step": 3, "reward": None, "nonfinite": ["reward"]},
    ]
    run.save_json("config.json", {"seed": 1, "path": tmp_path, "clip": float("inf")})
    with pytest.raises(TypeError, match="set is not JSON-able"):
        run.save_json("config.json", {"seed": {1}})
    config = json.loads((run.path / "config.json").read_text())
    assert config == {"seed": 1, "path": str(tmp_path), "clip": float("inf")}
    run.close()
    assert {path.name for path in run.path.iterdir()} == {"metrics.jsonl", "samples.jsonl", "config.json"}
    run.close()


def test_a_used_directory_wants_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume in"):
        RunDirectory(tmp_path / "run", resume_step=1)
    RunDirectory(tmp_path / "run").close()
    with pytest.raises(FileExistsError, match="not empty.*--resume"):
        RunDirectory(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        RunDirectory(tmp_path / "file")


def test_resume_has_each_step_once(tmp_path):
    run = RunDirectory(tmp_path)
    for step in range(6):
        run.write(step, {"loss": step})
        run.samples(step, [{"text": f"{step}a"}, {"text": f"{step}b"}])
    run.close()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"time": ', '"time": 10'))
    with open(metrics, "a") as file:
        file.write('{"step": 3, "ti')  # as SIGKILL leaves it
    assert read_metrics(tmp_path)["step"].tolist() == [0, 1, 2, 3, 4, 5]

    run = RunDirectory(tmp_path, resume_step=3)
    assert [line["step"] for line in lines(metrics)] == [0, 1, 2, 3]
    run.write(4, {"loss": -4.0})
    run.samples(4, [{"text": "4c"}])
    run.close()
    columns = read_metrics(tmp_path)
    assert columns["step"].tolist() == [0, 1, 2, 3, 4] and columns["loss"].tolist() == [0, 1, 2, 3, -4]
    assert columns["time"][-1] >= columns["time"][-2] >= 10  # the clock goes on where it stopped
    assert [line["text"] for line in lines(tmp_path / "samples.jsonl")][-3:] == ["3a", "3b", "4c"]

    metrics.write_text('{"step": 0, "time": 0.0}\n{"st\n{"step": 2, "time": 0.0}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: not JSON"):
        read_metrics(tmp_path)


def test_foreign_lines_end_no_run_and_stay_where_they_are(tmp_path, capsys):
    run = RunDirectory(tmp_path)
    run.write(1, {"loss": 1.0})
    run.close()
    foreign = ["# a note", "5", '{"no": "step"}', '{"step": "three"}', "[" * 100_000]
    metrics = tmp_path / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write("\n".join(foreign) + '\n{"step": 2, "time": 2.0, "loss": "high"}\n{"step": 3, "ti')
    for _ in range(2):
        columns = read_metrics(tmp_path, lenient=True)
    assert columns["step"].tolist() == [1, 2] and np.isnan(columns["loss"][1])
    assert capsys.readouterr().err.count("line 2 is not the line of a step") == 1
    RunDirectory(tmp_path, resume_step=1).close()
    assert metrics.read_text().splitlines()[1:] == foreign


class Full:
    """A file on a disk with room for ``room`` bytes more."""

    def __init__(self, file, room):
        self.file, self.room, self.name = file, room, file.name

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = self.file.write(data[: self.room])
        self.room -= done
        return done

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_names_the_file_and_leaves_no_part_of_a_line(tmp_path):
    run = RunDirectory(tmp_path)
    run.write(1, {"loss": 1.0})
    run._metrics = Full(run._metrics, 10)
    with pytest.raises(OSError, match=r"metrics.jsonl could not be written: No space left on device: make room there"):
        run.write(2, {"loss": 2.0})
    run.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1]


def test_a_tracker_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    class Broken:
        def __getattr__(self, name):
            def fail(*_, **__):
                raise ConnectionError(f"{name}\nfailed")

            return fail

    run = RunDirectory(tmp_path)
    run._tensorboard, run._wandb = Broken(), Broken()
    for step in (1, 2):
        run.write(step, {"loss": 1.0})
    run.close()
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    err = capsys.readouterr().err.splitlines()
    assert "WARNING: wandb could not be written; the run goes on without it: ConnectionError: log failed" in err
    assert len(err) == len(set(err)) == 4  # writing and closing of both, once each


def test_read_metrics_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no metrics.jsonl"):
        read_metrics(tmp_path)


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboardX")
    run = RunDirectory(tmp_path / "run", tensorboard=True)
    run.write(2, {"reward/mean": 0.5})
    run.close()
    events = next((tmp_path / "run").glob("events.*"))
    assert b"reward/mean" in events.read_bytes()


@pytest.mark.parametrize(("option", "extra"), [({"tensorboard": True}, "tensorboard"), ({"wandb": {}}, "wandb")])
def test_missing_extras_are_named(tmp_path, monkeypatch, option, extra):
    for module in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)  # what importing something absent sees
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'jaxpo\[{extra}\]'"):
        RunDirectory(tmp_path / "run", **option)
    assert not (tmp_path / "run").exists()


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        id="r1", log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resume_step in (None, 0):
        directory = RunDirectory(tmp_path / "run", wandb={"project": "p"}, resume_step=resume_step)
        directory.write(0, {"loss": 1.0})
        directory.close()
    path = str(tmp_path / "run")
    rest = [(0, {"loss": 1.0}), "finish"]
    assert calls == [
        {"dir": path, "resume": "allow", "project": "p"},
        *rest,
        {"dir": path, "resume": "allow", "project": "p", "id": "r1"},
        *rest,
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_prints_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with Progress(25, initial=3, every=10, file=out) as progress:
        for step in range(3, 25):
            progress.update({"reward/mean": step / 100, "kl/old_k3": 1e-5, "time/tokens_per_s": 12345.6, "other": 1})
        progress.print("done")
    text = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in text] == ["step 10/25", "step 20/25", "step 25/25", "done"]
    assert "reward 0.09" in text[0] and "kl 1e-05" in text[0] and "tok/s 12,346" in text[0] and "<" in text[0]


def test_progress_bar_on_a_terminal():
    out = Terminal()
    with Progress(5, initial=2, metrics={"kl": ("kl/ref_k3", "kl/old_k3")}, file=out) as progress:
        progress.update({"kl/old_k3": 0.5, "kl/ref_k3": 0.25})
        progress.print("saved a checkpoint")
        progress.update({}, steps=2)
    text = out.getvalue()
    assert "2/5" in text and "5/5" in text and "kl 0.25" in text
    assert "\rsaved a checkpoint\n" in text


def test_closing_table():
    out = io.StringIO()
    rows = [("accuracy", "0.11", "0.75"), ("pass@8", "0.5", "0.9")]
    closing_table("Result", rows, columns=("", "before", "after"), file=out)
    assert all(word in out.getvalue() for word in ("Result", "before", "0.75", "pass@8"))
    closing_table("Time", [("generate", "61 %")], file=out)
    with pytest.raises(ValueError, match="'a'.* has 1 cells where 2"):
        closing_table("Time", [("generate", "61 %"), ("a",)], file=out)
