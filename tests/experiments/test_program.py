"""How programs end: one line for what was expected to go wrong, a traceback for a bug, a status for a signal."""

import os
import signal
import subprocess
import sys

import pytest

from experiments import (
    compare,
    evaluate,
    export,
    noise_study,
    plan,
    race,
    sample,
    score_pairs,
    train_preference,
    train_reward,
    train_rl,
    train_sft,
)
from experiments.program import SIGNALS, one_line, program
from jaxpo.parallel import host
from jaxpo.protocols.protocol import NothingLeft
from jaxpo.runs.loop import Diverged
from tests.runs import tiny

PROGRAMS = (
    *(compare, evaluate, export, noise_study, plan, race, sample, score_pairs),
    *(train_preference, train_reward, train_rl, train_sft),
)


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


def raising(error):
    @program
    def main(argv=None):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "said"),
    (
        (ValueError("a field"), "a field"),
        (ValueError("two\n  lines, \x1b[31mred"), r"two lines, \x1b[31mred"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "a.json: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ModuleNotFoundError("gs:// needs gcsfs"), "gs:// needs gcsfs"),
        (Diverged("diverged"), "diverged"),
        (NothingLeft("solved"), "solved"),
        (MemoryError(), "out of memory: more was asked for"),
    ),
)
def test_an_expected_error_is_one_line_and_status_1(error, said):
    with pytest.raises(SystemExit) as end:
        raising(error)([])
    assert str(end.value.code).startswith(f"error: {said}") and "\n" not in end.value.code


@pytest.mark.parametrize("error", (KeyError("x"), TypeError("x"), AssertionError(), RuntimeError("x")))
def test_a_bug_keeps_its_traceback(error):
    assert one_line(error) is None
    with pytest.raises(type(error)):
        raising(error)([])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_program_with_its_own_status(number, capsys):
    before = signal.getsignal(number)

    @program
    def main(argv=None):
        signal.raise_signal(number)

    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 128 + number and capsys.readouterr().err == f"stopped by {number.name}\n"
    assert signal.getsignal(number) is before


def test_a_signal_that_was_swallowed_still_gives_the_status():
    @program
    def main(argv=None):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            pass

    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 143


def test_whoever_closes_the_output_gets_no_traceback():
    with pytest.raises(SystemExit) as end:
        raising(BrokenPipeError())([])
    assert end.value.code == 141


@pytest.mark.parametrize("module", PROGRAMS, ids=lambda module: module.__name__)
def test_help_is_status_0_on_standard_output(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and not err
    assert module.__doc__.split("\n")[0] in " ".join(out.split()) and "--" in out


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    (
        ("cuda", AssertionError(), r"JAX_PLATFORMS=cuda, but .* \(jax has no plugin .*\): pip install -e '.\[cuda\]'"),
        ("tpu", RuntimeError("no\nchip (set JAX_PLATFORMS='' to ...)"), r"\(no chip\): pip install -e '.\[tpu\]'"),
        ("mars", RuntimeError("Unknown backend"), r"JAX_PLATFORMS=mars, .* set it to another, e.g. cpu, or unset it"),
    ),
)
def test_a_platform_that_is_not_there_is_one_line(monkeypatch, asked, error, message):
    def fail():
        raise error

    monkeypatch.setattr(host.jax, "devices", fail)
    monkeypatch.setattr(type(host.jax.config), "jax_platforms", asked, raising=False)
    with pytest.raises(ValueError, match=message):
        host.open_devices()


def test_what_libtpu_says_where_nothing_is_wrong_is_not_shown(capfd, monkeypatch):
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: True)
    with host.quiet_libtpu():
        os.write(2, b"Failed to find host bounds for accelerator type\nE0000 00:00:1 4667 common_lib.cc:554] x\n")
        os.write(2, b"something else\n")
    assert capfd.readouterr().err == "something else\n"


def test_a_table_of_what_may_be_typed_ends_in_one_line(tmp_path, monkeypatch):
    """Before any work, and with nothing written."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("")
    config, run = f"--config={tiny.FILE}", f"--workdir={tmp_path / 'run'}"
    table = (
        (train_rl, [config, "--workdir=gs://bucket/run"], "set config.checkpoint.directory to it"),
        (train_rl, [config, run, "--config.checkpoint.directory=ftp://x/y"], "unknown kind of address 'ftp'"),
        (train_rl, [config, f"--workdir={tmp_path / 'file'}"], "is a file, where a folder is to be"),
        (train_rl, [config, f"--workdir={tmp_path / 'file' / 'run'}"], "is a file, where a folder is to be"),
        (train_rl, [config, "--workdir=~nobody-of-this-name/a"], "no home folder of nobody-of-this-name"),
        (train_rl, [config, run, "--config.sampling.max_new_tokens=1000000000"], "keys and values"),
        (train_sft, [config, run, "--config.policy.width=100000000"], "config.policy: the run needs at least"),
        (evaluate, ["--run=~/runs/a"], f"unknown run directory '{tmp_path}/home/runs/a'"),
        (evaluate, ["--run=gs://bucket/run"], "is no local folder"),
        (sample, ["--run=~/runs/a", "--prompt=1"], f"unknown run directory '{tmp_path}/home/runs/a'"),
        (export, ["--workdir=~/runs/a", "--out=gs://b/x"], "is no local folder"),
        (race, [f"--out={tmp_path / 'file'}"], "is a file"),
        (race, ["--seeds=100000000", f"--out={tmp_path / 'race'}"], "seeds 100,000,000"),
        (score_pairs, ["--pairs=~/p", "--judge=x", "--out=~/o"], f"unknown data file '{tmp_path}/home/p'"),
    )
    for module, arguments, said in table:
        with pytest.raises(SystemExit) as end:
            module.main(arguments)
        text = str(end.value.code)
        assert text.startswith("error: ") and "\n" not in text and said in text, (arguments, text)
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "home"}  # in home: the cache of compiled programs
    assert not (tmp_path / "home" / "runs").exists()


# ---- in processes of their own


def ended(command, **environment):
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tiny.ROOT,
        env={**tiny.environment(), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("platform", ("cuda", "tpu"))
def test_a_process_without_its_platform_prints_one_line(tmp_path, platform):
    flags = [f"--config={tiny.FILE}", f"--workdir={tmp_path / 'run'}"]
    status, out, err = ended(["experiments.train_rl", *flags], JAX_PLATFORMS=platform)
    assert status == 1 and not out and err.count("\n") == 1
    assert err.startswith(f"error: JAX_PLATFORMS={platform}, but no such device can be used here")


@pytest.mark.slow
def test_a_run_that_ulimit_has_no_room_for_ends_in_one_line(tmp_path):
    flags = [f"--config={tiny.FILE}", f"--workdir={tmp_path / 'run'}", "--config.warm_start.steps=0"]
    flags += ["--config.policy.width=512", "--config.rollout.prompts=80000"]
    command = " ".join([sys.executable, "-m", "experiments.train_rl", *flags])
    done = subprocess.run(
        f"ulimit -v 8000000; exec {command}",
        shell=True,
        cwd=tiny.ROOT,
        env=tiny.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert all(x in done.stderr for x in ("error: ", "GB", "ulimit -v", "rollout.prompts")), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting takes root")
def test_the_one_line_about_a_full_disk_is_the_last(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", small], check=False)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        flags = [f"--config={tiny.FILE}", f"--workdir={small / 'run'}", "--config.checkpoint.every=1"]
        status, _, err = ended(["experiments.train_rl", *flags, f"--config.compilation_cache={tmp_path / 'cache'}"])
        assert status == 1 and "Traceback" not in err and "never retrieved" not in err, err
        assert err.splitlines()[-1].startswith("error: ") and "go on with --resume" in err.splitlines()[-1]
    finally:
        subprocess.run(["umount", small], check=True)
