"""One program in several processes: how they find each other, and how data passes between them.

Every process runs the same code on the same config. Arrays on the mesh are global. Data on the host (prompts, rewards,
keys, tables of a protocol) are the same in every process, so that all make the same decisions. Each process feeds and
judges only its own rows, and only the first process writes and prints.

With one process nothing here communicates.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

T = TypeVar("T")


class FirstFailed(RuntimeError):
    """The first process could not do what all of them wait for; it raises the error itself."""


TIMEOUT = 300.0  # seconds for all processes to join


# ---- joining


def join(coordinator: str = "", processes: int = 0, process: int = -1, *, timeout: float = TIMEOUT) -> int:
    """Join the other processes of the run, before jax is used. Returns the number of processes.

    Without arguments the environment names the processes: Cloud TPU, GKE, SLURM and Open MPI as jax finds them, or
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. If it names none, this process is alone.

    Args:
      coordinator: host:port of the first process, which listens there.
      processes: how many processes the run has.
      process: which one this is, from 0.
      timeout: seconds to wait for all of them.

    Raises:
      ValueError: some of the three arguments are missing, or do not fit together.
      TimeoutError: a process did not join in time (it is named).
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
    # If a process is missing, jax would end this one without saying which is missing.
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
    """`join` with the `FLAGS` of a command line. Call it before the rest of the command line is read, which uses jax.

    Raises:
      ValueError, TimeoutError: as in `join`; also ``ValueError`` if a flag is not a number.
    """
    given = dict(arg.removeprefix("--").split("=", 1) for arg in argv if arg.startswith("--") and "=" in arg)
    values = {}
    for name, (default, text) in FLAGS.items():
        try:
            values[name] = type(default)(given.get(name, default))
        except ValueError:
            raise ValueError(f"--{name}={given[name]} must be a number: {text}") from None
    timeout = values.pop("join_seconds")
    return join(**values, timeout=timeout)


def from_environment(timeout: float = TIMEOUT) -> tuple[str, int, int]:
    """Coordinator, number of processes and index of this process; ("", 1, 0) if the environment names none."""
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


GREETING = "jaxpo roll call"
PATIENCE = 2.0  # seconds that a connection has for its greeting


def wait_for_all(host: str, port: int, processes: int, process: int, timeout: float) -> None:
    """The first process's part of the roll call, on the coordinator's address alone: wait until every other process has
    connected, returned the number that it was sent (a nonce: whatever else connects does not know what to do with it),
    and told which one of how many it is.

    Raises:
      TimeoutError: names the processes that are missing, and those that were refused.
      OSError: the address is not one of this host, or is in use.
    """
    deadline, there, refused = time.monotonic() + timeout, {}, {}
    with contextlib.ExitStack() as open_, _listening(host, port) as server:
        while len(there) < processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection = open_.enter_context(server.accept()[0])
                number, wrong = _greeted(connection, processes, there)
            except OSError:  # of time, or of a connection that was closed
                if time.monotonic() < deadline:
                    continue  # something else connected, and did not answer
                missing = sorted(set(range(1, processes)) - set(there))
                raise TimeoutError(
                    f"after {timeout:g} s process {', '.join(map(str, missing))} of {processes} has not joined "
                    f"{host}:{port}: see whether it was started there, with the same --processes, and reaches this host"
                    + "".join(f"; refused: {why}" for why in refused.values())
                ) from None
            if wrong:
                refused[wrong] = wrong
                continue
            if number is not None:
                there[number] = connection
        for connection in there.values():
            connection.sendall(b"all\n")


def _listening(host: str, port: int) -> socket.socket:
    """A socket on this address and no other of the host."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, reuse_port=False)
    except OSError as error:
        if (error.errno or 0) < 0:  # of the look-up of its name
            raise OSError(f"--coordinator={host}:{port}: unknown host") from None
        why = {errno.EADDRNOTAVAIL: "it is no address of this host, where process 0 runs"}
        why[errno.EADDRINUSE] = "something else listens there; choose another port"
        raise OSError(f"--coordinator={host}:{port}: {why.get(error.errno, error.strerror)}") from None


def _greeted(
    connection: socket.socket, processes: int, there: Mapping[int, socket.socket]
) -> tuple[int | None, str | None]:
    """The number of the process that connected (None = it is none of ours), and why it is refused (None = it is not).
    It is told so itself."""
    nonce = secrets.token_hex(16)
    connection.settimeout(PATIENCE)
    connection.sendall(f"{GREETING} {nonce}\n".encode())
    said = _line(connection).split()
    if len(said) != 3 or said[0] != nonce or not (said[1].isdecimal() and said[2].isdecimal()):
        return None, None
    number, of = int(said[1]), int(said[2])
    wrong = None
    if of != processes:
        wrong = f"process {number} was started with --processes={of}, process 0 with --processes={processes}"
    elif not 1 <= number < processes:
        wrong = f"--process={number} must be from 1 to {processes - 1}"
    elif number in there and _alive(there[number]):
        wrong = f"two processes were started with --process={number}"
    if wrong:
        connection.sendall(f"no {wrong}\n".encode())
    return number, wrong


def _alive(connection: socket.socket) -> bool:
    """Whether the other end, which has nothing more to say, still listens."""
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.settimeout(PATIENCE)


def _line(connection: socket.socket) -> str:
    """A line of at most 400 characters; what came of it, if the other end closes."""
    got = b""
    while not got.endswith(b"\n") and len(got) < 400 and (part := connection.recv(1)):
        got += part
    return got.decode("ascii", "replace").strip()


def report_to(host: str, port: int, processes: int, process: int, timeout: float) -> None:
    """The other processes' part of the roll call: send the own number to the first, and wait until all have joined.

    Raises:
      TimeoutError: the first process does not answer, or gave up because another process is missing.
      ValueError: the first process refuses this one: another --processes, or a number that is taken.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), port), timeout=5) as connection:
                greeting, _, nonce = _line(connection).rpartition(" ")
                if greeting != GREETING:
                    raise OSError("what listens there is not process 0 of a run")
                connection.sendall(f"{nonce} {process} {processes}\n".encode())
                connection.settimeout(max(deadline + 5 - time.monotonic(), 1))
                answer = _line(connection)
        except OSError as error:
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"process {process}: no answer from process 0 at {host}:{port} in {timeout:g} s ({error}): see "
                    "whether it was started, and whether this address is the one of its host"
                ) from None
            time.sleep(0.2)
            continue
        if answer == "all":
            return
        if answer.startswith("no "):
            raise ValueError(f"process 0 at {host}:{port} refuses this process: {answer.removeprefix('no ')}")
        raise TimeoutError(f"process 0 at {host}:{port} gave up: another process is missing, its message names it")


# ---- common decisions


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def most(number: int) -> int:
    """The largest ``number`` of all processes; all of them have to call this."""
    return int(multihost_utils.process_allgather(np.array(number)).max()) if jax.process_count() > 1 else number


def anywhere(flag: bool) -> bool:
    """Whether ``flag`` is True in any process; all processes have to call this."""
    return bool(most(int(flag)))


def from_first(compute: Callable[[], T]) -> T:
    """Run ``compute()`` in the first process, and return its result (which must fit into JSON) in all processes.

    Raises:
      FirstFailed: it failed in the first process, which itself raises the original error.
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
        raise FirstFailed(f"process 0 failed: {answer['error']}")
    return answer["value"]


def on_first(make: Callable[[], T]) -> T | None:
    """``make()`` in the first process, None in the others, which wait until it is done. Raises like `from_first`."""
    made: list[T] = []
    from_first(lambda: made.append(make()))
    return made[0] if made else None


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Hide what the other processes print; their exceptions are still raised."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


# ---- between host and mesh


def place(tree: Any, sharding: Sharding) -> Any:
    """Put arrays onto the devices of ``sharding``. Arrays on the host must be the same in every process; each process
    feeds the parts of its own devices."""

    def one(x: Any) -> jax.Array:
        if jax.process_count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def to_host(tree: Any) -> Any:
    """Copy arrays to NumPy, whole in every process."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(one, tree)


def own_rows(x: Any) -> np.ndarray:
    """Indices of the rows of ``x`` [B, ...] that this process works on. Every row belongs to one process.

    A sharded row belongs to the first process that has it on its devices. Rows that every process has (NumPy arrays)
    are divided equally.
    """
    owner = np.arange(x.shape[0]) * jax.process_count() // x.shape[0]
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        owner = np.full(x.shape[0], jax.process_count())
        for device, index in x.sharding.devices_indices_map(x.shape).items():
            owner[index[0]] = np.minimum(owner[index[0]], device.process_index)
    return np.flatnonzero(owner == jax.process_index())


def take_rows(x: Any, rows: np.ndarray) -> np.ndarray:
    """Copy rows of ``x`` [B, ...] from this process's devices to NumPy, without communication."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)[rows]
    whole = np.zeros(x.shape, x.dtype)
    for shard in x.addressable_shards:
        whole[shard.index] = shard.data
    return whole[rows]


def from_rows(values: np.ndarray, rows: np.ndarray, total: int) -> np.ndarray:
    """Gather float64 [total, ...] in every process, exact to the bit: each gives the ``values`` of its `own_rows`."""
    whole = np.zeros((total, *values.shape[1:]), np.float64)
    whole[rows] = values
    if jax.process_count() == 1:
        return whole
    bits = multihost_utils.process_allgather(whole.view(np.uint32))  # jax would round 64 bits; rows of others are 0
    return np.asarray(bits).sum(0, dtype=np.uint32).view(np.float64)


def check_shared(directory: Any) -> None:
    """Check that all processes see ``directory`` (an epath.Path), where they will write together.

    Raises:
      ValueError: names the processes that do not.
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
