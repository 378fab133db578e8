"""Several processes are one run: they find each other, feed and judge their own rows, and write one checkpoint."""

import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpo.parallel import make_mesh
from jaxpo.parallel.distributed import (
    from_environment,
    from_rows,
    join,
    join_by_flags,
    own_rows,
    report_to,
    take_rows,
    to_host,
    wait_for_all,
)
from jaxpo.storage.checkpoint import restore_params
from tests.runs import tiny


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(command, process, devices=4, **environment):
    env = {**tiny.environment(), "JAX_NUM_CPU_DEVICES": str(devices), **environment}
    out = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *command, *process], cwd=tiny.ROOT, env=env, **out)


# What gloo says of its connections. Its threads write over each other, so a line may hold a part of a message.
GLOO = re.compile(r"^(.*(Gloo|peer ranks|connected).*|[ \d]*)\n", re.MULTILINE)


def end(processes, seconds):
    """(standard output without gloo's own lines, standard error) of each; they end with status 0."""
    try:
        printed = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, printed, strict=True):
        assert process.returncode == 0, out + err
    return [(GLOO.sub("", out), err) for out, err in printed]


TWO = textwrap.dedent("""
    import sys, jax, jax.numpy as jnp, numpy as np
    from jaxpo.parallel.distributed import *
    assert join(*(sys.argv[1], 2, int(sys.argv[2])), timeout=60) == 2
    from etils import epath
    from jax.sharding import NamedSharding, PartitionSpec as P
    from jaxpo.batch import Pairs, concatenate
    from jaxpo.objectives.grammar.checks import check_range
    from jaxpo.parallel import make_mesh, rows_over_mesh
    from jaxpo.storage.checkpoint import Checkpoints, restore

    mesh, me, directory = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), jax.process_index(), epath.Path(sys.argv[3])
    x = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    y = rows_over_mesh(x, mesh)
    rows = own_rows(y)
    assert rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]][me] and own_rows(x).tolist() == rows.tolist()
    np.testing.assert_array_equal(take_rows(y, rows), x[rows])
    np.testing.assert_array_equal(to_host({"y": y})["y"], x)
    pairs = rows_over_mesh(Pairs([[1]] * 4, [[2]] * 4, [[3]] * 4), mesh)          # roles lie on both processes
    assert concatenate([pairs, pairs]).rows == 16
    check_range("reward", y[:, 0], (0, 1), pairs, "outside, but nobody can read it here")
    rewards = from_rows(np.array([[1 / (3 + row), -0.0] for row in rows]), rows, 8)
    np.testing.assert_array_equal(rewards[:, 0], 1 / (3 + np.arange(8.0)))       # to the bit: jax would round to 32
    assert anywhere(me == 1) and not anywhere(False)
    assert from_first(lambda: {"step": 3 + me}) == {"step": 3}
    assert on_first(lambda: me) == (None if me else 0)
    try:
        from_first(lambda: 1 / (0 if me == 0 else 1))
    except (ZeroDivisionError, RuntimeError) as error:
        assert "division by zero" in str(error) and isinstance(error, RuntimeError) == (me == 1)
    else:
        raise AssertionError("the failure of process 0 was lost")
    try:
        check_shared(directory / str(me))
    except ValueError as error:
        assert "process 1 does not see" in str(error), error
    else:
        raise AssertionError("folders of their own passed for a shared one")
    check_shared(directory)

    where = {"w": NamedSharding(mesh, P("fsdp", "data")), "b": NamedSharding(mesh, P())}
    tree = {"params": {"w": place(np.arange(64.0, dtype=np.float32).reshape(8, 8), where["w"]),
                       "b": place(np.ones(5, np.float32), where["b"])}, "table": np.arange(5)}
    checkpoints = Checkpoints(directory / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, tree, {"iteration": step})
    checkpoints.wait()
    if me == 0:                                                                  # a bit flips
        file = max((f for f in (directory / "checkpoints/2/arrays/d").iterdir()), key=lambda f: f.stat().length)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    check_shared(directory)
    found = restore(directory / "checkpoints", {**tree, "table": np.zeros(5, int)})
    assert found.step == 1 and found.passed == [2], found
    np.testing.assert_array_equal(to_host(found.tree["params"]["w"]), np.arange(64.0).reshape(8, 8))
    np.testing.assert_array_equal(found.tree["table"], np.arange(5))
    checkpoints.set_aside(found.passed)
    checkpoints.close()
    print("done")
""")


def test_two_processes_of_four_devices(tmp_path):
    at = f"127.0.0.1:{free_port()}"
    printed = end([start(["-c", TWO, at], [str(i), str(tmp_path)]) for i in range(2)], 120)
    assert [out for out, _ in printed] == ["done\n"] * 2
    assert "2 is damaged" in printed[0][1] and "damaged" not in printed[1][1]  # the first one says so
    params, position = restore_params(tmp_path / "checkpoints")  # one process reads what two have written
    assert position == {"iteration": 1}
    np.testing.assert_array_equal(params["w"], np.arange(64.0).reshape(8, 8))


RUN = ["-m", "experiments.train_rl", f"--config={tiny.FILE}", "--config.steps=2", "--config.warm_start.steps=10"]
RUN += ["--config.task.partial_credit=True", "--config.evaluation.pass_at=()"]
RUN += ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


def assert_same_metrics(two, one):
    two, one = (tiny.untimed(path / "metrics.jsonl") for path in (two, one))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-6), (ours["step"], name)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    at, cache = f"127.0.0.1:{free_port()}", f"--config.compilation_cache={tmp_path / 'cache'}"
    flags = [f"--workdir={tmp_path / 'two'}", f"--coordinator={at}", "--processes=2"]
    printed = end([start([*RUN, cache, *flags], [f"--process={i}"]) for i in range(2)], 900)
    assert "before and after 2 iterations" in printed[0][0] and printed[1][0] == ""  # one process prints
    end([start([*RUN, cache, f"--workdir={tmp_path / 'one'}"], [], devices=8)], 900)
    assert_same_metrics(tmp_path / "two", tmp_path / "one")
    samples = [tiny.lines(tmp_path / name / "samples.jsonl") for name in ("two", "one")]
    assert samples[0] == samples[1]
    a, b = (restore_params(tmp_path / name / "checkpoints", name="params")[0] for name in ("two", "one"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)
    # One process goes on from what two with eight have written.
    end([start([*RUN, cache, f"--workdir={tmp_path / 'two'}"], ["--resume", "--config.steps=3"], devices=8)], 900)
    assert restore_params(tmp_path / "two" / "checkpoints")[1]["iteration"] == 3


PAIRS = [
    "-m",
    "experiments.train_preference",
    f"--config={tiny.FILE}",
    "--config.steps=2",
    "--config.warm_start.steps=10",
]
PAIRS += ["--config.objective.name=dpo", "--config.evaluation.pass_at=()", "--config.evaluation.every=1"]
PAIRS += ["--config.sampling.max_new_tokens=4", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
OFFLINE = ["--config.data.name=task"]
REWARD = [*OFFLINE, "--config.objective.name=bradley_terry_rm", "--config.warm_start.steps=0"]
MODEL = ["--config.judge.name=model", "--config.judge.path={judge}"]
ONLINE = ["--config.judge.name=function", "--config.judge.path=tests.parallel.test_distributed:longer"]


def longer(questions, answers):
    """A judge by the lengths of answers, which says how many prompts it was asked about."""
    with open(f"{os.environ['SEEN']}/{jax.process_count()}-{jax.process_index()}", "a") as file:
        file.write(f"{len(questions)} ")
    return [[len(text) + text.count("1") / 8 for text in row] for row in answers]


@pytest.mark.slow
@pytest.mark.parametrize("flags", (OFFLINE, ONLINE, MODEL, REWARD), ids=("offline", "online", "model", "reward"))
def test_two_processes_learn_preferences_as_one_does(flags, tmp_path):
    at, cache = f"127.0.0.1:{free_port()}", f"--config.compilation_cache={tmp_path / 'cache'}"
    program = ["-m", "experiments.train_reward", *PAIRS[2:]] if flags is REWARD else PAIRS
    command, seen = (
        [*program, *(flag.format(judge=tmp_path / "judge") for flag in flags), cache],
        {"SEEN": str(tmp_path)},
    )
    if flags is MODEL:
        changes = {"objective": {"name": "gpm_rm"}, "data": {"name": "task"}, "warm_start.steps": 0}
        with tiny.quick():
            tiny.run(tiny.config(changes | {"sampling.max_new_tokens": 4, "steps": 2}), tmp_path / "judge")
    two = [f"--workdir={tmp_path / 'two'}", f"--coordinator={at}", "--processes=2"]
    end([start([*command, *two], [f"--process={i}"], **seen) for i in range(2)], 280)
    end([start([*command, f"--workdir={tmp_path / 'one'}"], [], devices=8, **seen)], 280)
    assert_same_metrics(tmp_path / "two", tmp_path / "one")
    a, b = (restore_params(tmp_path / name / "checkpoints", name="params")[0] for name in ("two", "one"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)
    if flags is ONLINE:  # each asks about its own half of the prompts
        asked = {name: (tmp_path / name).read_text().split() for name in ("2-0", "2-1", "1-0")}
        assert asked == {"2-0": ["4"] * 2, "2-1": ["4"] * 2, "1-0": ["8"] * 2}


# ---- who takes part


def test_a_process_that_never_joins_is_named():
    port, late = free_port(), []

    def other():
        with pytest.raises(TimeoutError, match=r"process 0 at 127.0.0.1:\d+ gave up"):
            report_to("127.0.0.1", port, 4, 2, 30)
        late.append(2)

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(TimeoutError, match=rf"after 1.5 s process 1, 3 of 4 has not joined 127.0.0.1:{port}: see"):
        wait_for_all("127.0.0.1", port, 4, 0, 1.5)
    thread.join()
    assert late == [2]


def test_a_first_process_that_is_not_there_is_named():
    with pytest.raises(TimeoutError, match=r"process 1: no answer from process 0 at 127.0.0.1:\d+ in 0.5 s"):
        report_to("127.0.0.1", free_port(), 2, 1, 0.5)


def roll_call(port, processes, timeout=5.0):
    """The first process's part in a thread; what it ended with is in the list."""
    ended = []

    def first():
        try:
            ended.append(wait_for_all("127.0.0.1", port, processes, 0, timeout))
        except OSError as error:
            ended.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    return thread, ended


def connected(port):
    until = time.monotonic() + 5
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_what_does_not_know_the_nonce_is_not_counted():
    port = free_port()
    thread, ended = roll_call(port, 2)
    for said in (b"1\n", b"GET / HTTP/1.1\n\n", b"0123 1 2\n", b"\xff\xfe\n", b"x" * 1000, b""):
        with connected(port) as stranger:
            stranger.sendall(said)
    assert thread.is_alive()
    report_to("127.0.0.1", port, 2, 1, 5)
    thread.join()
    assert ended == [None]


def test_wrong_numbers_are_refused_and_named_on_both_sides():
    port = free_port()
    thread, ended = roll_call(port, 3, 2.0)
    with pytest.raises(ValueError, match="process 1 was started with --processes=2, process 0 with --processes=3"):
        report_to("127.0.0.1", port, 2, 1, 5)
    second = threading.Thread(target=lambda: pytest.raises(TimeoutError, report_to, "127.0.0.1", port, 3, 2, 5))
    second.start()
    time.sleep(0.5)
    with pytest.raises(ValueError, match="two processes were started with --process=2"):
        report_to("127.0.0.1", port, 3, 2, 5)
    second.join()
    thread.join()
    assert "process 1 of 3 has not joined" in str(ended[0]) and "--processes=2, process 0 with" in str(ended[0])


def test_the_roll_call_listens_on_the_coordinators_address_alone():
    port = free_port()
    thread, _ = roll_call(port, 2, 1.0)
    connected(port).close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=1)
    thread.join()


@pytest.mark.parametrize(
    ("host", "message"),
    (
        ("192.0.2.1", "it is no address of this host"),
        ("no-such-host.invalid", "unknown host"),
        ("127.0.0.1", "another port"),
    ),
)
def test_an_address_that_cannot_be_listened_on_is_one_line(host, message):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match=message):
        wait_for_all(host, taken.getsockname()[1], 2, 0, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes=2", "--process=0"], "--coordinator= --processes=2 --process=0: all three are needed"),
        (["--coordinator=here", "--processes=2", "--process=0"], "the first one as host:port"),
        (["--coordinator=here:1", "--processes=2", "--process=2"], "--process=2 must be from 0 to 1"),
        (["--coordinator=here:1", "--processes=2"], "--process=-1 must be from 0 to 1"),
        (["--processes=two"], "--processes=two must be a number: how many processes the run has"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        join_by_flags(flags)


def test_alone_without_flags_or_environment():
    assert join() == 1 and join_by_flags(["--workdir=a", "--resume"]) == 1


SLURM = dict(
    SLURM_JOB_ID="7", SLURM_STEP_NODELIST="tpu[003-010]", SLURM_NTASKS="8", SLURM_PROCID="3", SLURM_LOCALID="0"
)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="2"), ("a:1", 4, 2)),
        (SLURM, ("tpu003:61447", 8, 3)),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, ("", 1, 0)),
        ({}, ("", 1, 0)),
    ],
)
def test_environment(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert from_environment() == expected


def test_alone_all_rows_are_ones_own():
    x = np.arange(16.0).reshape(8, 2)
    y = jax.device_put(x, NamedSharding(make_mesh(), PartitionSpec("data")))
    for z in (x, y):
        rows = own_rows(z)
        assert rows.tolist() == list(range(8))
        np.testing.assert_array_equal(take_rows(z, rows[2:5]), x[2:5])
        np.testing.assert_array_equal(to_host(z), x)
    np.testing.assert_array_equal(from_rows(x, np.arange(8), 8), x)
