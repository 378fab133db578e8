"""``experiments.evaluate``, ``sample``, ``train_sft``, ``train_rl`` as commands: what they print, write and refuse."""

import json
import re
import shutil

import jax
import pytest

from experiments import evaluate, sample, train_rl, train_sft
from jaxpo.protocols.protocol import NothingLeft
from jaxpo.runs import train
from jaxpo.runs.loop import Diverged
from jaxpo.storage.checkpoint import finished_steps
from tests.runs import tiny


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return tiny.finished(tmp_path_factory.getbasetemp())


def fails(main, arguments, message):
    """With one line, and status 1."""
    with pytest.raises(SystemExit, match=message) as error:
        main(arguments)
    assert "\n" not in str(error.value) and str(error.value).startswith("error: ")


# ---- evaluate -------------------------------------------------------------------------------------------------------


def test_evaluate_prints_and_writes_what_the_run_measured(finished, tmp_path, capsys):
    evaluate.main([f"--run={finished.path}", "--k=1,4", "--samples=4", f"--json={tmp_path / 'numbers.json'}"])
    out = capsys.readouterr().out
    after = finished.result.after
    assert "checkpoint 4, 5 test prompts, toy" in " ".join(out.split()) and "95% interval" in out
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("│")}
    assert (
        f"{after['eval/greedy']:.4f}" in rows["greedy"]
        and f"[{after['eval/greedy_lo']:.4f}, {after['eval/greedy_hi']:.4f}]" in rows["greedy"]
    )
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert (
        numbers["step"] == 4
        and numbers["eval/greedy"] == after["eval/greedy"]
        and {"eval/pass@1", "eval/pass@4_hi"} < numbers.keys()
    )


def test_evaluate_another_checkpoint_and_fewer_prompts(finished, capsys):
    evaluate.main([f"--run={finished.path}", "--step=2", "--k=", "--prompts=3"])
    out = capsys.readouterr().out
    assert "checkpoint 2, 3 test prompts" in " ".join(out.split()) and "pass@" not in out


def test_evaluate_draws_by_its_seed(finished, tmp_path, capsys):
    numbers = []
    for seed in (0, 0, 1, 2, 3):
        evaluate.main(
            [f"--run={finished.path}", "--k=1,3", "--samples=11", f"--seed={seed}", f"--json={tmp_path / 'x.json'}"]
        )
        numbers.append(json.loads((tmp_path / "x.json").read_text())["eval/pass@1"])
    assert numbers[0] == numbers[1] and len(set(numbers)) > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    (
        ([], "--run=DIRECTORY is required"),
        (["--run={run}x"], "unknown run directory '.*runx': did you mean '.*run'"),
        (["--run={run}", "--step=3"], "has no checkpoint 3; it has: 2, 4"),
        (["--run={run}", "--k=16", "--samples=8"], "pass@16"),
        (["--run={run}", "--k=0"], "pass_at must be a tuple .each a whole number of at least 1."),
        (["--run={run}", "--k=one"], "--k"),
        (["--run={run}", "--samples=0"], "samples must be a whole number of at least 1"),
        (["--run={run}", "--prompts=-1"], "prompts must be a whole number of at least 1"),
        (["--run={run}", "--sample=3"], "unknown flag '--sample': did you mean '--samples'"),
        (["--run={run}", "--config.seed=3"], "--config"),
        (["--run={run}", "--json=/nowhere/x.json"], "--json"),
    ),
)
def test_evaluate_errors(finished, flags, message):
    fails(evaluate.main, [flag.format(run=finished.path) for flag in flags], message)


# ---- sample ---------------------------------------------------------------------------------------------------------


def shown(out):
    """{prompt: [completion]} as printed."""
    blocks = [block.splitlines() for block in out.strip().split("\n\n")]
    return {
        lines[0]: [line.strip() for line in lines[1:]]
        for lines in blocks
        if lines and not lines[0].startswith("compiled")
    }


def test_sample_prints_completions_of_typed_prompts(finished, capsys):
    sample.main([f"--run={finished.path}", "--prompt=12", "--prompt=3", "--n=3"])
    found = shown(capsys.readouterr().out.split("s\n", 1)[1])
    assert list(found) == ["12", "3"] and all(len(texts) == 3 for texts in found.values())
    assert all(
        re.fullmatch(r"[0-3=]{0,3}( ?\[cut at the length limit\])?", text) for texts in found.values() for text in texts
    )


def test_greedy_samples_are_those_of_the_evaluation(finished, capsys):
    rows = [row for row in tiny.lines(finished.path / "samples.jsonl") if row["step"] == 4]
    sample.main([f"--run={finished.path}", "--greedy", *[f"--prompt={row['question']}" for row in rows]])
    found = shown(capsys.readouterr().out.split("s\n", 1)[1])
    for row in rows:
        (text,) = found[row["question"]]
        assert text.removesuffix("[cut at the length limit]").strip() == row["completion"]


def test_sample_and_evaluate_on_as_many_devices_as_there_are(finished, capsys):
    """A run of one device, opened where there are eight: neither the prompt nor the five test items divide."""
    with tiny.quick(devices=8):
        sample.main([f"--run={finished.path}", "--greedy", "--prompt=12"])
        evaluate.main([f"--run={finished.path}", "--k="])
    assert f"{finished.result.after['eval/greedy']:.4f}" in capsys.readouterr().out


def test_a_run_whose_batch_does_not_divide_over_the_devices_can_be_opened(finished, tmp_path, capsys):
    run = tiny.run(
        tiny.warm(finished, {"objective": {"name": "reinforce"}, "steps": 0, "rollout.prompts": 3}), tmp_path / "run"
    )
    with tiny.quick(devices=2):
        sample.main([f"--run={run.path}", "--greedy", "--prompt=12", "--prompt=21"])
    assert "12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    (
        (["--run={run}"], '--run=DIRECTORY and at least one --prompt="..." are required'),
        (["--prompt=12"], "--run=DIRECTORY"),
        (["--run={run}x", "--prompt=12"], "unknown run directory '.*runx': did you mean"),
        (["--run={run}", "--prompt=12x"], "character 'x' of '12x=' is not in the alphabet"),
        (["--run={run}", "--prompt=12", "--n=0"], "--n"),
        (["--run={run}", "--prompt=12", "--n=2", "--greedy"], "--n has no effect with --greedy"),
        (["--run={run}", "--prompt=12", "--temperature=0"], "temperature must be a positive number"),
        (["--run={run}", "--prompt=12", "--temperature=0.5", "--greedy"], "temperature.* no effect"),
        (["--run={run}", "--prompt=12", "--step=1"], "has no checkpoint 1; it has: 2, 4"),
        (["--run={run}", "--promt=12"], "unknown flag '--promt'"),
    ),
)
def test_sample_errors(finished, flags, message):
    fails(sample.main, [flag.format(run=finished.path) for flag in flags], message)


# ---- train ----------------------------------------------------------------------------------------------------------


def flags(workdir):
    """A tiny run whose programs are kept where those of the other tests are."""
    cache = jax.config.jax_compilation_cache_dir
    return [f"--config={tiny.FILE}", f"--workdir={workdir}", f"--config.compilation_cache={cache}"]


def test_train_sft_then_train_rl_from_it(finished, tmp_path, capsys):
    train_sft.main(flags(tmp_path / "sft"))
    assert finished_steps(tmp_path / "sft" / "checkpoints") == [0]
    lines = tiny.untimed(tmp_path / "sft" / "metrics.jsonl")
    assert lines == tiny.untimed(finished.path / "metrics.jsonl")[: len(lines)] and "eval/pass@4" in lines[-1]
    train_rl.main([*flags(tmp_path / "rl"), f"--config.init_from={tmp_path / 'sft'}", "--config.warm_start.steps=0"])
    assert tiny.trained(tmp_path / "rl") == tiny.trained(finished.path)  # as if it had begun with the warm start itself
    assert "before and after 4 iterations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("main", "more", "message"),
    (
        (train_rl.main, ["--workdir="], "--workdir=DIRECTORY is required"),
        (train_rl.main, ["--workdri=x"], "unknown flag '--workdri': did you mean '--workdir'"),
        (train_rl.main, ["--config.objective.name=grop"], "unknown objective 'grop': did you mean 'grpo'"),
        (train_rl.main, ["--config.training.microbatches=5"], "config.training.microbatches 5 does not divide"),
        (train_rl.main, ["--workdir={run}"], "is not empty; continue its run with --resume"),
        (train_rl.main, ["--config.init_from=nowhere"], "nowhere"),
        (train_rl.main, ["--config.init_from={run}", "--config.policy.width=32"], "holds parameters of another shape"),
        (train_rl.main, ["--resume=maybe"], "resume"),
        (
            train_rl.main,
            ["--config.task.name=jsonl", "--config.task.path=/nowhere.jsonl", "--config.task.test_size=3"],
            "/nowhere.jsonl",
        ),
        (train_sft.main, ["--workdir="], "--workdir=DIRECTORY is required"),
        (train_sft.main, ["--config.warm_start.steps=0"], "config.warm_start.steps is 0: there is nothing to train"),
        (train_sft.main, ["--workdir={run}"], "is not empty"),
        (
            train_sft.main,
            ["--config.sampling.max_new_tokens=2"],
            "config.sampling.max_new_tokens 2 is too short for demonstrations of 3 tokens",
        ),
    ),
)
def test_training_errors(finished, tmp_path, main, more, message):
    fails(main, [*flags(tmp_path / "run"), *[flag.format(run=finished.path) for flag in more]], message)


@pytest.mark.parametrize(
    ("main", "error"),
    (
        (train_rl.main, Diverged("diverged")),
        (train_rl.main, NothingLeft("solved")),
        (train_rl.main, FloatingPointError("the warm start")),
        (train_rl.main, ModuleNotFoundError("wandb: not installed")),
        (train_sft.main, FloatingPointError("the warm start")),
    ),
)
def test_what_stops_a_run_is_one_line(tmp_path, monkeypatch, main, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(train, "train_rl", fail)
    fails(main, flags(tmp_path / "run"), str(error))


@pytest.mark.slow
def test_a_warm_start_that_blows_up_is_one_line(tmp_path):
    more = ["--config.warm_start.optimizer.learning_rate=1e30"]
    fails(train_rl.main, [*flags(tmp_path / "run"), *more], "lower config.warm_start.optimizer.learning_rate")


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ("--config.policy.width=32", "shape"),
        ("--config.objective.name=dapo", "references/ref"),
        ("--config.seed=1", "config.seed is 1, but the run .* has seed 0"),
    ),
)
def test_resuming_with_a_config_that_does_not_fit_leaves_the_run_as_it_was(finished, tmp_path, change, message):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    fails(train_rl.main, [*flags(run), "--resume", change], message)
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before
