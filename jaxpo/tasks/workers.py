"""Verifiers in worker processes, with a wall-clock limit per item.

A verifier that hangs (``9**9**9**9`` in a symbolic parser) holds the interpreter's lock, so no thread or Python signal
handler can end it: only a process can be killed. The workers are fresh interpreters, as with multiprocessing's "spawn",
because jax does not survive a fork. They are started without multiprocessing because that would import the parent's
main module, and jax with it, into each of them.

A worker is a process group of its own that dies whole, and it is confined (`jaxpo.tasks.confined`): limits of memory,
processes and files, an environment without keys, no network, one folder to write to. Its replies are data: numbers,
texts, lists, and nothing that loading could run.

This file is also the program that a worker runs; it imports the standard library only.
"""

import contextlib
import functools
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from jaxpo.arguments import Positive, Whole, check
from jaxpo.tasks import confined

TIMEOUT = 5.0  # seconds for one item, unless the caller says otherwise
STARTUP = 120.0  # seconds for a worker to import what it needs, on a machine that may be busy
REPLY = 64 << 20  # bytes of the longest reply


class Failure(str):
    """An error in a line.

    traceback: the whole of it, from the user's own code on; "" if there is none (a call that took too long, say).
    """

    traceback: str = ""


class Outcome(NamedTuple):
    """The value of a call, or the error that it ended with."""

    value: Any
    error: Failure | None


def failure(line: str, trace: str = "") -> Failure:
    """A `Failure` with its traceback."""
    out = Failure(line)
    out.traceback = trace
    return out


def call_by_names(function: Callable, arguments: dict[str, Any]) -> Any:
    """``function(**arguments)``, for pools, which pass arguments by place."""
    return function(**arguments)


def attempt(function: Callable, call: Sequence[Any]) -> Outcome:
    """Run ``function(*call)`` in this process, without a time limit; an exception becomes the outcome's ``error``."""
    try:
        return Outcome(function(*call), None)
    except Exception as error:
        return Outcome(None, failure(_describe(error), _trace(error)))


def runner(
    function: Callable,
    *,
    isolate: bool,
    timeout: float | None = None,
    workers: int | None = None,
    prepare: Callable[[], Any] | None = None,
) -> Callable[[Sequence[tuple]], list[Outcome]]:
    """Choose how to run a verifier.

    It runs in worker processes if it may hang (``isolate``) or if a ``timeout`` or a number of ``workers`` is given.
    """
    if not isolate and timeout is None and workers is None:
        return lambda calls: [attempt(function, call) for call in calls]
    return WorkerPool(
        function,
        workers=default_workers() if workers is None else workers,
        timeout=TIMEOUT if timeout is None else timeout,
        prepare=prepare,
    ).map


def default_workers() -> int:
    """Half of the processors, at most 16: generation and training need the rest."""
    return max(1, min(16, (os.cpu_count() or 1) // 2))


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    pipe: Connection
    folder: str  # where it may write
    received: bytearray = field(default_factory=bytearray)  # of a reply that is not whole yet
    ready: bool = False  # its imports are done
    item: int | None = None  # what it works on
    deadline: float = float("inf")


class WorkerPool:
    """Call one function in worker processes: ``WorkerPool(f, timeout=5).map([(a, b), (c, d)])``.

    A call that takes longer than the limit is killed with its worker, and with all that it has started, and becomes an
    error. So does a call whose worker dies. The other calls go on, and a new worker replaces the old one; it also
    replaces one whose call leaves processes behind. Workers start with the first ``map``, stay for
    the next ones, and end with ``close``, with the pool itself, or with this process. Any thread may use the pool;
    calls of ``map`` wait for each other.

    Args:
      function: importable by name from a module (no lambda, not from ``__main__``), or a ``functools.partial`` of one.
      workers: how many processes.
      timeout: seconds of wall clock for one call.
      prepare: called once in every new worker, outside the time limit; for slow imports.

    Raises:
      ValueError: a function cannot be sent to another process, or ``workers`` or ``timeout`` is not positive.
    """

    def __init__(
        self,
        function: Callable,
        *,
        workers: int = 2,
        timeout: float = TIMEOUT,
        prepare: Callable[[], Any] | None = None,
    ):
        self._payload = _importable(function), _importable(prepare)
        self._count, self._timeout = check("workers", workers, Whole), float(check("timeout", timeout, Positive))
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _end, self._workers)  # also runs when the interpreter exits

    def map(self, calls: Sequence[tuple]) -> list[Outcome]:
        """The outcome of ``function(*call)`` for every call, in order.

        Raises:
          RuntimeError: a worker could not start (the message says why).
        """
        with self._lock:
            try:
                return self._map(list(calls))
            except BaseException:  # late replies would be read as replies to the next map
                _end(self._workers)
                raise

    def close(self) -> None:
        """End the worker processes; a later ``map`` starts new ones."""
        with self._lock:
            _end(self._workers)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _map(self, calls: list[tuple]) -> list[Outcome]:
        done: dict[int, Outcome] = {}
        waiting = deque(range(len(calls)))
        while len(done) < len(calls):
            while len(self._workers) < min(self._count, len(calls) - len(done)):
                self._workers.append(self._start())
            for worker in list(self._workers):
                if worker.ready and worker.item is None and waiting:
                    self._give(worker, waiting, calls)
            active = [w for w in self._workers if w.item is not None or not w.ready]
            first = min((w.deadline for w in active), default=0.0)
            spoken = set(wait([w.pipe for w in active], max(0.0, first - time.monotonic())))
            for worker in active:
                if worker.pipe in spoken:
                    self._receive(worker, done)
                elif time.monotonic() >= worker.deadline:
                    if not worker.ready:
                        raise RuntimeError(f"a worker process did not start within {STARTUP:g} s")
                    done[worker.item] = Outcome(None, failure(f"timed out after {self._timeout:g} s"))
                    self._drop(worker)
        return [done[i] for i in range(len(calls))]

    def _start(self) -> _Worker:
        pipe, theirs = Pipe()
        folder = tempfile.mkdtemp(prefix="jaxpo-worker-")
        # -P keeps this file's folder off the path: its modules must not hide libraries of the same name. A new session:
        # Ctrl-C and a SIGTERM to the group reach the main process only. A verifier that imports jax must not take the
        # TPU.
        process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", __file__, str(theirs.fileno()), folder],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what a completion prints belongs on nobody's terminal
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=confined.environment(os.environ, folder),
        )
        theirs.close()
        pipe.send((list(sys.path), *self._payload, self._timeout))
        return _Worker(process, pipe, folder, deadline=time.monotonic() + STARTUP)

    def _give(self, worker: _Worker, waiting: deque[int], calls: list[tuple]) -> None:
        try:
            worker.pipe.send((waiting[0], calls[waiting[0]]))
        except OSError:  # it died while idle (the machine ran out of memory, say): nothing is lost
            self._drop(worker)
            return
        worker.item, worker.deadline = waiting.popleft(), time.monotonic() + self._timeout

    def _receive(self, worker: _Worker, done: dict[int, Outcome]) -> None:
        try:
            if (whole := _received(worker)) is None:
                return
            reply = loaded(whole)
            if worker.ready and reply[0] != worker.item:
                raise ValueError("it answers another item")
        except Exception as error:  # it has died, or sends what no worker of ours sends
            self._drop(worker)
            died = f"the worker process died (exit code {worker.process.returncode})"
            if not isinstance(error, EOFError | ConnectionError):
                died = f"the worker process sent no readable reply ({_describe(error)})"
            if not worker.ready:
                raise RuntimeError(f"{died} while it started") from None
            done[worker.item] = Outcome(None, failure(died))
            return
        if not worker.ready:
            if reply is not None:
                raise RuntimeError(f"a worker process could not load the function: {reply}")
            worker.ready = True
        else:
            _, value, error, trace, left = reply
            done[worker.item] = Outcome(value, None if error is None else failure(error, trace))
            if left:
                self._drop(worker)
        worker.item, worker.deadline = None, float("inf")

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        _end([worker])


def _end(workers: list[_Worker]) -> None:
    """Kill the processes with all that they started, and empty the list. They hold no state, so nothing is lost."""
    while workers:
        worker = workers.pop()
        started = _descendants(worker.process.pid)  # now: later they are no longer its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        for pid in {*started, *_started_in(worker.folder)}:  # such as left the group
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        worker.pipe.close()
        shutil.rmtree(worker.folder, ignore_errors=True)


def _descendants(pid: int) -> list[int]:
    """The children of a process and theirs; [] where the system does not tell (no /proc).

    A process that is just being replaced by another program (exec) has no environment for a moment, so `_started_in`
    alone would miss it."""
    children: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                children.setdefault(int(file.read().rpartition(b")")[2].split()[1]), []).append(int(name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def _started_in(folder: str) -> list[int]:
    """The processes whose environment names a worker's folder; [] where the system does not tell (no /proc)."""
    sign, found = f"TMPDIR={folder}\0".encode(), []
    with contextlib.suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if sign in file.read():
                    found.append(int(name))
    return found


def _received(worker: _Worker) -> bytes | None:
    """The next reply; None if it is not whole yet. It reads what is there and never waits: a process that may run
    anything can also begin a reply and not end it.

    Raises:
      EOFError: the worker has closed its end.
      OSError: the reply is too long."""
    part = os.read(worker.pipe.fileno(), 1 << 20)
    if not part:
        raise EOFError
    worker.received += part
    length = int.from_bytes(worker.received[:4], "big", signed=True)  # as `Connection` sends it
    if not 0 <= length <= REPLY:
        raise OSError(f"it is longer than {REPLY >> 20} MiB")
    if len(worker.received) < 4 + length or len(worker.received) < 4:
        return None
    whole = bytes(worker.received[4 : 4 + length])
    del worker.received[: 4 + length]
    return whole


class _Data(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is neither a number, a text, nor a list or dict of them")


def loaded(reply: bytes) -> Any:
    """The data in a reply. What is unpickled here was written by a process that may run anything, so no class is
    loaded.

    Raises:
      pickle.UnpicklingError: it holds something else than numbers, texts, lists, tuples and dicts."""
    return _Data(io.BytesIO(reply)).load()


def _dumped(item: int, value: Any, error: str | None, trace: str) -> bytes:
    """The reply of a worker to an item; a number of numpy is sent as Python's."""
    left = hasattr(os, "WNOHANG") and confined.children()
    if value is not None and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    try:
        loaded(reply := pickle.dumps((item, value, error, trace, left)))
    except Exception as problem:
        reply = pickle.dumps((item, None, f"the result cannot be sent back: {_describe(problem)}", "", left))
    return reply


def _importable(function: Callable | None) -> bytes:
    """The function as bytes that another process can load."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    if getattr(inner, "__module__", None) == "__main__":
        raise ValueError(f"{name} is defined in the main program, which workers do not import: move it to a module")
    try:
        return pickle.dumps(function)
    except Exception as error:
        raise ValueError(f"{name} cannot be sent to a worker: define it at the top of a module ({error})") from error


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")[:500]


def _trace(error: BaseException) -> str:
    """The traceback without the frames of this file, which called the user's function."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))[-8000:]


def _serve(pipe: Connection, folder: str) -> None:
    """The worker's side: confine itself, load the function, then answer calls until the other end closes."""
    try:
        path, payload, preparation, timeout = pipe.recv()
        sys.path[:] = path
        confined.confine(folder)
        function, prepare = pickle.loads(payload), pickle.loads(preparation)
        if prepare is not None:
            prepare()
    except BaseException as error:
        pipe.send(_describe(error))
        return
    pipe.send(None)
    worker = os.getpid()
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            os.killpg(0, signal.SIGKILL)  # with whatever it has started
        # The parent keeps the time. If it is killed meanwhile, the kernel ends this process too, even inside C code.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)
        item, arguments = pickle.loads(call)
        try:
            reply = (function(*arguments), None, "")
        except BaseException as error:  # such as exit() in an evaluated text, or math-verify's own time-out
            reply = (None, _describe(error), _trace(error))
        if os.getpid() != worker:  # the function has forked, and this is the child: only the worker may reply
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(_dumped(item, *reply))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2])
