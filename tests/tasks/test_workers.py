"""Worker processes: time limits, deaths, reuse. ``eval`` serves as the function that may do anything."""

import contextlib
import functools
import math
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxpo.tasks import workers
from jaxpo.tasks.workers import Outcome, WorkerPool, attempt, runner

HANG_IN_C = "9**9**9**9"  # holds the interpreter's lock: no thread or signal handler of Python runs any more
HANG = "__import__('time').sleep(60)"
PID = "__import__('os').getpid()"


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(eval, workers=2, timeout=1.0) as pool:
        yield pool


def test_values_come_back_in_order(pool):
    assert pool.map([(f"{i} * {i}",) for i in range(50)]) == [Outcome(i * i, None) for i in range(50)]
    assert pool.map([]) == []


def test_exceptions_are_errors_of_their_item_only(pool):
    outcomes = pool.map([("1/0",), ("2",), ("exit()",), ("undefined",), ("lambda: 0",), ("3",)])
    assert [o.value for o in outcomes] == [None, 2, None, None, None, 3]
    errors = [o.error for o in outcomes]
    assert errors[0] == "ZeroDivisionError: division by zero"
    assert errors[2].startswith("SystemExit") and errors[3].startswith("NameError")
    assert errors[4].startswith("the result cannot be sent back")
    assert errors[1] is errors[5] is None


@pytest.mark.parametrize("hang", [HANG, HANG_IN_C])
def test_a_hung_item_is_killed_and_the_others_are_unharmed(pool, hang):
    pool.map([("0",)] * 2)  # start-up is not what is timed
    start = time.monotonic()
    outcomes = pool.map([("1",), (hang,), *[(str(i),) for i in range(20)]])
    assert time.monotonic() - start < 10
    assert outcomes[1] == Outcome(None, "timed out after 1 s")
    assert [o.value for o in outcomes[2:]] == list(range(20)) and outcomes[0].value == 1
    assert pool.map([("7",)]) == [Outcome(7, None)]


def test_a_worker_that_dies_is_an_error_and_is_replaced(pool):
    outcomes = pool.map([("__import__('os')._exit(3)",), ("5",), ("6",)])
    assert outcomes == [Outcome(None, "the worker process died (exit code 3)"), Outcome(5, None), Outcome(6, None)]


def test_a_worker_killed_while_idle_loses_no_item(pool):
    pid = pool.map([(PID,)])[0].value
    os.kill(pid, 9)
    while alive(pid):
        time.sleep(0.01)
    assert pool.map([("5",), ("6",), ("7",)]) == [Outcome(5, None), Outcome(6, None), Outcome(7, None)]


def test_workers_are_reused_and_end_with_close():
    pool = WorkerPool(eval, workers=1, timeout=5)
    first, second = pool.map([(PID,)])[0].value, pool.map([(PID,)])[0].value
    assert first == second != os.getpid()
    pool.close()
    assert not alive(first)
    third = pool.map([(PID,)])[0].value  # a closed pool starts again when used
    assert third != first
    del pool
    assert not alive(third)


def test_preparation_is_not_on_the_clock():
    with WorkerPool(eval, workers=1, timeout=0.5, prepare=functools.partial(time.sleep, 1.0)) as slow_start:
        assert slow_start.map([("1",)]) == [(1, None)]
    with (
        WorkerPool(eval, workers=1, prepare=functools.partial(int, "x")) as broken,
        pytest.raises(RuntimeError, match="could not load the function: ValueError: invalid literal"),
    ):
        broken.map([("1",)])


def test_it_works_from_other_threads_at_once(pool):
    results = {}

    def use(name):
        results[name] = [o.value for o in pool.map([(f"{name} + {i}",) for i in range(10)])]

    threads = [threading.Thread(target=use, args=(n,)) for n in (100, 200)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results == {n: [n + i for i in range(10)] for n in (100, 200)}


def test_workers_never_import_jax(pool):
    loaded = "[m in __import__('sys').modules for m in ('jax', 'numpy', 'jaxpo.tasks.rewards')]"
    assert pool.map([("__import__('jaxpo.tasks.rewards') and " + loaded,)])[0].value == [False, False, True]


def test_a_worker_function_may_still_use_all_of_jaxpo(pool):
    # The package's __init__ is put off, not left out.
    with WorkerPool(eval, workers=1, timeout=60) as slow:
        outcome = slow.map([("__import__('jaxpo').__version__",)])[0]
    import jaxpo

    assert outcome == Outcome(jaxpo.__version__, None)


def test_workers_end_when_the_main_process_is_killed():
    program = """
import os, signal
from jaxpo.tasks.workers import WorkerPool
pool = WorkerPool(eval, workers=1, timeout=1)
print(pool.map([("__import__('os').getpid()",)])[0].value, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_a_function_that_workers_cannot_load_is_refused():
    with pytest.raises(ValueError, match="cannot be sent to a worker"):
        WorkerPool(lambda: 0)
    with pytest.raises(ValueError, match="workers must be a whole number of at least 1, not 0"):
        WorkerPool(eval, workers=0)
    with pytest.raises(ValueError, match="timeout must be a positive number, not 0"):
        WorkerPool(eval, timeout=0)
    program = "def f(x): pass\nfrom jaxpo.tasks.workers import WorkerPool\nWorkerPool(f)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert "f is defined in the main program" in done.stderr


def test_a_runner_isolates_when_it_has_to():
    here = runner(eval, isolate=False)
    assert here([(PID,), ("1/0",)]) == [(os.getpid(), None), (None, "ZeroDivisionError: division by zero")]
    for away in (
        runner(eval, isolate=True),
        runner(eval, isolate=False, workers=1),
        runner(eval, isolate=False, timeout=20.0),
    ):
        assert away([(PID,)])[0].value != os.getpid()
    assert attempt(functools.partial(math.pow, 2), (3,)) == Outcome(8.0, None)


# ---- what a worker may do ------------------------------------------------------------------------------------------


def running(sign: str) -> list[int]:
    """The processes whose command line has a text in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if sign.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid() and alive(pid)]


def all_end(sign: str) -> bool:
    """Whether these processes end within seconds: a kill takes effect when the kernel gets to it."""
    end = time.monotonic() + 5
    while running(sign) and time.monotonic() < end:
        time.sleep(0.01)
    return not running(sign)


def value_of(pool, expression):
    (outcome,) = pool.map([(expression,)])
    return outcome


linux = pytest.mark.skipif(sys.platform != "linux", reason="what only Linux offers")
FIND = "int(__import__('sys').argv[1])"  # the pipe, as a completion can find it
CHILD = "__import__('subprocess').Popen(['sleep', '{}'], start_new_session={})"


def test_a_worker_has_no_key_of_the_environment(monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "secret")
    with WorkerPool(eval, workers=1) as fresh:
        seen = value_of(fresh, "dict(__import__('os').environ)").value
    assert "secret" not in seen.values() and {"PATH", "TMPDIR"} <= seen.keys()


@pytest.mark.parametrize(
    "expression",
    (
        "len(bytearray(10_000_000_000))",
        "[open('/dev/null') for i in range(10_000)] and 0",
        "__import__('os').write(__import__('os').open(__import__('tempfile').mkstemp()[1], 1), bytes(100 << 20))"
        " and __import__('os').stat('x')",
    ),
    ids=("memory", "open files", "written bytes"),
)
def test_a_worker_has_limits(pool, expression):
    outcome = value_of(pool, expression)
    assert outcome.value is None and re.match("MemoryError|OSError|FileNotFound|the worker process died", outcome.error)
    assert value_of(pool, "7") == Outcome(7, None)


@linux
def test_a_worker_reaches_no_network_and_signals_nobody(pool):
    connect = "__import__('socket').create_connection(('{}', {}), 1)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        for host, port in (("127.0.0.1", server.getsockname()[1]), ("192.0.2.1", 80)):
            assert "Error" in value_of(pool, connect.format(host, port)).error
    for what in ("getppid()", f"getpid() and {os.getpid()}"):
        outcome = value_of(pool, f"__import__('os').kill(__import__('os').{what}, 15)")
        assert outcome.error.startswith("PermissionError")


@linux
def test_a_worker_writes_to_its_own_folder_only(pool, tmp_path):
    assert value_of(pool, f"open('{tmp_path}/stolen', 'w')").error.startswith("PermissionError")
    assert value_of(pool, f"__import__('os').system('echo > {tmp_path}/stolen')").value != 0
    assert not list(tmp_path.iterdir())
    assert value_of(pool, "__import__('tempfile').TemporaryFile('w').write('abc')") == Outcome(3, None)


def test_folders_of_workers_are_removed():
    with WorkerPool(eval, workers=1) as one:
        folder = value_of(one, "__import__('tempfile').mkdtemp()").value
    assert not Path(folder).exists() and not Path(folder).parent.exists()


@pytest.mark.parametrize("session", (False, True))
def test_what_a_verifier_starts_ends_with_its_call(pool, session):
    number = f"9{os.getpid()}{int(session)}"
    assert value_of(pool, CHILD.format(number, session) + " and 1") == Outcome(1, None)
    assert value_of(pool, "7") == Outcome(7, None)
    assert all_end(number)


def test_what_a_hung_verifier_started_ends_with_it(pool):
    number = f"8{os.getpid()}"
    outcome = value_of(pool, f"({CHILD.format(number, True)}, {CHILD.format(number, False)}, {HANG})")
    assert outcome.error == "timed out after 1 s" and all_end(number)


def test_a_verifier_that_forks_gives_one_reply(pool):
    forks = "[__import__('os').fork() for i in range(3)] and 1"
    assert pool.map([(forks,), ("2",), ("3",), (forks,)]) == [Outcome(x, None) for x in (1, 2, 3, 1)]
    assert pool.map([(str(i),) for i in range(20)]) == [Outcome(i, None) for i in range(20)]


def test_a_reply_is_data_and_runs_nothing(pool, tmp_path):
    harmful = f"type('P', (), {{'__reduce__': lambda self: (open, ('{tmp_path}/made', 'w'))}})()"
    assert value_of(pool, harmful).error.startswith("the result cannot be sent back")
    reply = pickle.dumps(functools.partial(open, f"{tmp_path}/made", "w"))
    with pytest.raises(pickle.UnpicklingError, match="neither a number"):
        workers.loaded(reply)
    # A completion that finds the pipe and writes a reply of its own to it.
    forged = f"__import__('multiprocessing.connection').connection.Connection({FIND}).send_bytes({reply!r})"
    assert value_of(pool, forged).value is None
    assert value_of(pool, "7") == Outcome(7, None) and not list(tmp_path.iterdir())


@linux
@pytest.mark.parametrize(
    ("written", "error"),
    (
        (b"\0\0\1\0abc", "timed out after 1 s"),  # the beginning of a reply of 256 bytes
        (b"\0", "timed out after 1 s"),
        (b"\x7f\xff\xff\xff", "longer than 64 MiB"),
        (b"\xff\xff\xff\xff", "longer than 64 MiB"),
        (b"\0\0\0\3abc", "no readable reply"),
        (len(pickle.dumps((7, 1.0, None, False))).to_bytes(4) + pickle.dumps((7, 1.0, None, False)), "another item"),
    ),
)
def test_a_reply_that_a_completion_writes_itself_hangs_nothing(pool, written, error):
    hang = "__import__('signal').setitimer(0, 0), __import__('time').sleep(60)"
    outcome = value_of(pool, f"__import__('os').write({FIND}, {written!r}), {hang}")
    assert outcome.value is None and error in outcome.error
    assert value_of(pool, "7") == Outcome(7, None)


def test_a_long_reply_is_read_in_parts(pool):
    assert len(value_of(pool, "'x' * 10_000_000").value) == 10_000_000
    assert "longer than 64 MiB" in value_of(pool, "bytes(70_000_000)").error


def test_a_number_of_numpy_comes_back_as_a_number(pool):
    pytest.importorskip("numpy")
    with WorkerPool(eval, workers=1, timeout=60) as slow:
        outcome = value_of(slow, "__import__('numpy').float32(0.5)")
    assert outcome == Outcome(0.5, None) and type(outcome.value) is float
