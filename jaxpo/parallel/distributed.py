"""Several processes, one program: how they find each other, and how data passes between them.

Every process runs the same code on the same config. Arrays on the mesh are global; what lies on the host (prompts,
rewards, keys, tables of a protocol) is the same in every process, so that all decide alike. Each process feeds and
judges rows of its own only, and the first one alone writes and prints.

With one process nothing here communicates.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

T = TypeVar("T")
TIMEOUT = 300.0  # seconds for all processes to join


# ---- joining


def join(coordinator: str = "", processes: int = 0, process: int = -1, *, timeout: float = TIMEOUT) -> int:
    """Join the other processes of the run, before jax is used; how many there are.

    Without arguments the environment says who they are: Cloud TPU, GKE, SLURM and Open MPI as jax finds them, or
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. If it says nothing, this process is alone.

    Args:
      coordinator: host:port of the first process, which listens there.
      processes: how many; process: which one this is, from 0. timeout: seconds.

    Raises:
      ValueError: some of the three arguments are missing, or do not fit.
      TimeoutError: a process did not come in time (it is named).
    """
    if not coordinator and not processes and process < 0:
        coordinator, processes, process = from_environment(timeout)
    if processes <= 1 and not coordinator:
        return 1
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or processes < 1:
        raise ValueError(
            f"--coordinator={coordinator} --processes={processes} --process={process}: all three are needed, the first "
            "one as host:port of process 0"
        )
    if not 0 <= process < processes:
        raise ValueError(f"--process={process} must be from 0 to {processes - 1} with --processes={processes}")
    # jax ends the process from within when one is missing, without a word on which.
    (wait_for_all if process == 0 else report_to)(host, int(port), processes, process, timeout)
    jax.distributed.initialize(coordinator, processes, process, initialization_timeout=int(max(timeout, 30)))
    return processes


FLAGS: dict[str, tuple[Any, str]] = {
    "coordinator": ("", "host:port of process 0, where the environment does not say it (docs/scaling.md)"),
    "processes": (0, "how many processes the run has"),
    "process": (-1, "which one this is, from 0"),
    "join_seconds": (TIMEOUT, "how long to wait for all of them"),
}


def join_by_flags(argv: Sequence[str]) -> int:
    """`join` as the `FLAGS` of a command line say: before anything else is read of it, as most of it uses jax.

    Raises:
      ValueError, TimeoutError: as of `join`; a flag that is no number.
    """
    given = dict(arg.removeprefix("--").split("=", 1) for arg in argv if arg.startswith("--") and "=" in arg)
    values = {}
    for name, (default, text) in FLAGS.items():
        try:
            values[name] = type(default)(given.get(name, default))
        except ValueError:
            raise ValueError(f"--{name}={given[name]}: it is a number, {text}") from None
    timeout = values.pop("join_seconds")
    return join(**values, timeout=timeout)


def from_environment(timeout: float = TIMEOUT) -> tuple[str, int, int]:
    """Coordinator, number of processes and index of this one; ("", 1, 0) where the environment names none."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() itself asks

    named = [os.environ.get(f"JAX_{name}") for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")]
    if all(named):
        coordinator, processes, process = named
    else:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout))
        coordinator, processes, process = found[:3]
    if processes is None or int(processes) <= 1:
        return "", 1, 0
    return str(coordinator), int(processes), int(process)


def wait_for_all(host: str, port: int, processes: int, process: int, timeout: float) -> None:
    """The first process's side of the roll call: every other one connects and says its number.

    Raises:
      TimeoutError: naming those that are missing.
    """
    deadline, there = time.monotonic() + timeout, {}
    with contextlib.ExitStack() as open_, socket.create_server(("", port), reuse_port=False) as server:
        while len(there) < processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection = open_.enter_context(server.accept()[0])
                connection.settimeout(5)
                there[int(connection.recv(16))] = connection
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # something else connected, and said nothing
                missing = sorted(set(range(1, processes)) - set(there))
                raise TimeoutError(
                    f"after {timeout:g} s process {', '.join(map(str, missing))} of {processes} has not joined "
                    f"{host}:{port}: see whether it was started there, with the same --processes, and reaches this host"
                ) from None
            except ValueError:
                continue
        for connection in there.values():
            connection.sendall(b"all")


def report_to(host: str, port: int, processes: int, process: int, timeout: float) -> None:
    """The side of the others: say who one is, and wait until all are there.

    Raises:
      TimeoutError: the first process does not answer, or gave up because another one is missing.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.sendall(str(process).encode())
                connection.settimeout(max(deadline + 5 - time.monotonic(), 1))
                if connection.recv(3) == b"all":
                    return
            raise TimeoutError(f"process 0 at {host}:{port} gave up: another process is missing, its message names it")
        except OSError as error:
            if isinstance(error, TimeoutError) and "gave up" in str(error):
                raise
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"process {process}: no answer from process 0 at {host}:{port} in {timeout:g} s ({error}): see "
                    "whether it was started, and whether this address is the one of its host"
                ) from None
            time.sleep(0.2)


# ---- deciding alike


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def anywhere(flag: bool) -> bool:
    """Whether ``flag`` is set in any process; all have to ask."""
    return bool(multihost_utils.process_allgather(np.array(flag)).any()) if jax.process_count() > 1 else flag


def from_first(compute: Callable[[], T]) -> T:
    """What ``compute()`` gives in the first process (JSON can hold it), in all of them.

    Raises:
      RuntimeError: it failed there; the first process itself raises its own error.
    """
    if jax.process_count() == 1:
        return compute()
    answer, failure = {}, None
    if is_first():
        try:
            answer = {"value": compute()}
        except Exception as error:
            answer, failure = {"error": f"{type(error).__name__}: {error}"}, error
    text = json.dumps(answer).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(text), np.int32)))
    buffer = np.frombuffer(text.ljust(size)[:size], np.uint8)
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8)))
    if failure:
        raise failure
    if "error" in answer:
        raise RuntimeError(f"process 0 failed: {answer['error']}")
    return answer["value"]


def on_first(make: Callable[[], T]) -> T | None:
    """``make()`` in the first process, None in the others, which go on when it is done; failures as of `from_first`."""
    made: list[T] = []
    from_first(lambda: made.append(make()))
    return made[0] if made else None


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Nothing that the other processes print is seen; their errors are."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


# ---- between host and mesh


def place(tree: Any, sharding: Sharding) -> Any:
    """Arrays onto the devices of ``sharding``. Those on the host are the same in every process, which feeds from them
    what lies on its own devices."""

    def one(x: Any) -> jax.Array:
        if jax.process_count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def to_host(tree: Any) -> Any:
    """Arrays as NumPy's, whole in every process."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(one, tree)


def own_rows(x: Any) -> np.ndarray:
    """Indices of the rows of ``x`` [B, ...] that this process sees to: every row is one process's.

    It is the first one that has the row on its devices; of what every process has (NumPy's), an equal share.
    """
    owner = np.arange(x.shape[0]) * jax.process_count() // x.shape[0]
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        owner = np.full(x.shape[0], jax.process_count())
        for device, index in x.sharding.devices_indices_map(x.shape).items():
            owner[index[0]] = np.minimum(owner[index[0]], device.process_index)
    return np.flatnonzero(owner == jax.process_index())


def take_rows(x: Any, rows: np.ndarray) -> np.ndarray:
    """Rows of ``x`` [B, ...] that lie on this process's devices, as NumPy's: nothing is communicated."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)[rows]
    whole = np.zeros(x.shape, x.dtype)
    for shard in x.addressable_shards:
        whole[shard.index] = shard.data
    return whole[rows]


def from_rows(values: np.ndarray, rows: np.ndarray, total: int) -> np.ndarray:
    """float64 [total, ...], the same in every process: each gives the ``values`` of its `own_rows`, to the bit."""
    whole = np.zeros((total, *values.shape[1:]), np.float64)
    whole[rows] = values
    if jax.process_count() == 1:
        return whole
    bits = multihost_utils.process_allgather(whole.view(np.uint32))  # jax would round 64 bits; others' bits are 0
    return np.asarray(bits).sum(0, dtype=np.uint32).view(np.float64)


def check_shared(directory: Any) -> None:
    """That all processes see ``directory`` (an epath.Path), where they are going to write together.

    Raises:
      ValueError: naming those that do not.
    """
    if jax.process_count() == 1:
        return

    def leave() -> str:
        directory.mkdir(parents=True, exist_ok=True)
        mark = directory / f".seen-{os.getpid()}-{time.time_ns()}"
        mark.write_text("")
        return mark.name

    mark = directory / from_first(leave)
    there = multihost_utils.process_allgather(np.array(mark.exists()))
    if is_first():
        mark.unlink()
    if not there.all():
        raise ValueError(
            f"process {', '.join(map(str, np.flatnonzero(~there)))} does not see {directory} of process 0: set "
            "config.checkpoint.directory to a bucket, or to a folder that all hosts share"
        )
