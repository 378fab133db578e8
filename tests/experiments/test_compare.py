"""``python -m experiments.compare``: the table, the picture, and what it says of a wrong path."""

import pytest

from experiments.compare import labels, main
from jaxpo.storage.rundir import RunDirectory


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for name, gain in (("grpo", 0.01), ("dapo", 0.02)):
        run = RunDirectory(f"runs/{name}")
        for step in range(30):
            accuracy = {"eval/greedy": step / 50} if step % 10 == 5 else {}
            run.write(step, {"reward/mean": gain * step, **accuracy})
        run.close()
    RunDirectory("runs/empty").close()


def test_table_and_picture(runs, capsys):
    main(["runs/grpo", "runs/dapo/", "runs/empty", "--out=both.png"])
    out = capsys.readouterr().out
    rows = {line.split()[1]: line.split()[3::2] for line in out.splitlines() if line.startswith("│")}
    assert rows["grpo"] == ["0.245", "0.245", "0.100", "0.500", "29", "0:00:00"]
    assert rows["dapo"][:2] == ["0.490", "0.490"]
    assert rows["empty"] == ["–", "–", "–", "–", "0", "0:00:00"]
    assert "curves: both.png" in out
    with open("both.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_runs_of_pairs(runs, capsys):
    pairs = RunDirectory("runs/dpo")
    for step in (0, 10):
        pairs.write(step, {"eval/accuracy": 0.5 + step / 40})
    pairs.close()
    main(["runs/grpo", "runs/dpo"])
    out = capsys.readouterr().out
    assert "pairs: held-out ones in the right order" in " ".join(out.split())
    rows = {line.split()[1]: line.split()[3::2] for line in out.splitlines() if line.startswith("│")}
    assert rows["grpo"] == ["0.245", "0.245", "0.100", "0.500", "–", "–", "29", "0:00:00"]
    assert rows["dpo"] == ["–", "–", "–", "–", "0.500", "0.750", "10", "0:00:00"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/grpo", "runs/dap"], "unknown run directory 'runs/dap': did you mean 'runs/dapo'"),
        (["elsewhere/grpo"], "unknown run directory 'elsewhere/grpo': did you mean 'runs/grpo'"),
        (["runs"], "unknown run directory 'runs'"),
        (["runs/grpo", "./runs/grpo"], "the same directory is given twice"),
        (["runs/grpo", "--out=both.pdf"], "--out: both.pdf has to be a .png"),
        (["runs/grpo", "--out=nowhere/both.png"], "--out: nowhere/both.png"),
    ],
)
def test_errors_are_one_line(runs, arguments, message):
    with pytest.raises(SystemExit, match=message) as error:
        main(arguments)
    assert "\n" not in str(error.value)


def test_labels_are_as_long_as_needed():
    assert labels(["runs/a", "runs/b/"]) == ["a", "b"]
    assert labels(["x/seed0/a", "x/seed1/a"]) == ["seed0/a", "seed1/a"]
