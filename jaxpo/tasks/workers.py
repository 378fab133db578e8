"""Verifiers in worker processes, with a wall-clock limit per item.

A verifier that hangs (``9**9**9**9`` in a symbolic parser) holds the interpreter's lock, so no thread or Python signal
handler can end it: only a process can be killed. The workers are fresh interpreters, as with multiprocessing's "spawn",
because jax does not survive a fork. They are started without multiprocessing because that would import the parent's
main module, and jax with it, into each of them.

This file is also the program that a worker runs; it imports the standard library only.
"""

import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from jaxpo.arguments import Positive, Whole, check

TIMEOUT = 5.0  # seconds for one item, unless the caller says otherwise
STARTUP = 120.0  # seconds for a worker to import what it needs, on a machine that may be busy


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
    ready: bool = False  # its imports are done
    item: int | None = None  # what it works on
    deadline: float = float("inf")


class WorkerPool:
    """Call one function in worker processes: ``WorkerPool(f, timeout=5).map([(a, b), (c, d)])``.

    A call that takes longer than the limit is killed with its worker and becomes an error. So does a call whose worker
    dies. The other calls go on, and a new worker replaces the old one. Workers start with the first ``map``, stay for
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
        # -P keeps this file's folder off the path: its modules must not hide libraries of the same name. A new session:
        # Ctrl-C and a SIGTERM to the group reach the main process only. A verifier that imports jax must not take the
        # TPU.
        process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", __file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        theirs.close()
        pipe.send((list(sys.path), *self._payload, self._timeout))
        return _Worker(process, pipe, deadline=time.monotonic() + STARTUP)

    def _give(self, worker: _Worker, waiting: deque[int], calls: list[tuple]) -> None:
        try:
            worker.pipe.send(calls[waiting[0]])
        except OSError:  # it died while idle (the machine ran out of memory, say): nothing is lost
            self._drop(worker)
            return
        worker.item, worker.deadline = waiting.popleft(), time.monotonic() + self._timeout

    def _receive(self, worker: _Worker, done: dict[int, Outcome]) -> None:
        try:
            reply = worker.pipe.recv()
        except (EOFError, OSError):
            self._drop(worker)
            died = f"the worker process died (exit code {worker.process.returncode})"
            if not worker.ready:
                raise RuntimeError(f"{died} while it started") from None
            done[worker.item] = Outcome(None, failure(died))
            return
        if not worker.ready:
            if reply is not None:
                raise RuntimeError(f"a worker process could not load the function: {reply}")
            worker.ready = True
        else:
            value, *error = reply
            done[worker.item] = Outcome(value, failure(*error) if error else None)
        worker.item, worker.deadline = None, float("inf")

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        _end([worker])


def _end(workers: list[_Worker]) -> None:
    """Kill the processes and empty the list. They hold no state, so nothing is lost."""
    while workers:
        worker = workers.pop()
        worker.process.kill()
        worker.process.wait()
        worker.pipe.close()


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


def _serve(pipe: Connection) -> None:
    """The worker's side: load the function, then answer calls until the other end closes."""
    try:
        path, payload, preparation, timeout = pipe.recv()
        sys.path[:] = path
        function, prepare = pickle.loads(payload), pickle.loads(preparation)
        if prepare is not None:
            prepare()
    except BaseException as error:
        pipe.send(_describe(error))
        return
    pipe.send(None)
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        # The parent keeps the time. If it is killed meanwhile, the kernel ends this process too, even inside C code.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)
        try:
            reply = (function(*pickle.loads(call)),)
        except BaseException as error:  # such as exit() in an evaluated text, or math-verify's own time-out
            reply = (None, _describe(error), _trace(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            pipe.send(reply)
        except Exception as error:  # user code: pickling it may raise anything
            pipe.send((None, f"the result cannot be sent back: {_describe(error)}", ""))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
