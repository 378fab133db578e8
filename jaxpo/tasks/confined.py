"""What a worker process may do: limits that it puts on itself before it loads a verifier.

A verifier may run what a model wrote, and a model that is trained against it finds every door. So a worker has a small
environment, limits of memory, processes and files, no network, and writes to one folder only. What a system does not
offer is left out: `confine` returns the names of what holds.

This module imports the standard library only.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping

MEMORY = 4 << 30  # bytes of address space of each process
FILE = 64 << 20  # bytes of one written file
OPEN_FILES = 256
PROCESSES = 64  # of the user beyond those that run already; the kernel does not hold root to it
KEPT = {"PATH", "HOME", "LANG", "LANGUAGE", "TZ", "USER", "LOGNAME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SYSTEMROOT"}
KEPT_PREFIXES = ("LC_", "PYTHON")
# One item is judged at a time in each worker: threads of linear algebra would only take memory.
SETTINGS = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # of unshare(2)
NO_NEW_PRIVILEGES, CHILD_SUBREAPER = 38, 36  # of prctl(2)
CREATE, ADD_RULE, RESTRICT = 444, 445, 446  # Landlock's system calls, the same on every architecture
# Landlock's rights that change files: write, remove, make (bits 1, 4 to 12), move (13), truncate (14).
WRITES = {1: 1 << 1 | sum(1 << bit for bit in range(4, 13)), 2: 1 << 13, 3: 1 << 14}
OF_A_FILE = 1 << 1 | 1 << 14  # those that a rule about a single file may name
TCP, SCOPES = 0b11, 0b11  # bind and connect; signals and abstract sockets


def environment(given: Mapping[str, str], folder: str) -> dict[str, str]:
    """The part of an environment that a verifier needs: search paths, home and language, and no keys.

    Args:
      given: the environment of this process.
      folder: where the worker may write, which becomes its folder of temporary files.
    """
    kept = {k: v for k, v in given.items() if k in KEPT or k.startswith(KEPT_PREFIXES)}
    return {**kept, **SETTINGS, "TMPDIR": folder}


def confine(folder: str) -> list[str]:
    """Limit this process and all that it starts, for good; return what holds: "limits", "network", "files", "signals".

    Args:
      folder: the only place to write to.
    """
    held = []
    if limited():
        held.append("limits")
    if sys.platform != "linux":
        return held
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans stay where `children` finds them
    if without_network(library):
        held.append("network")
    return held + landlocked(library, folder)


def limited() -> bool:
    """Set the limits of memory, files and processes; False where the system has none of them."""
    try:
        import resource
    except ImportError:
        return False
    wanted = dict(AS=MEMORY, FSIZE=FILE, NOFILE=OPEN_FILES, CORE=0)
    if running := processes():
        wanted["NPROC"] = running + PROCESSES
    for name, value in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            most = resource.getrlimit(kind)[1]
            value = value if most == resource.RLIM_INFINITY else min(value, most)
            with contextlib.suppress(ValueError, OSError):  # macOS takes no limit of address space
                resource.setrlimit(kind, (value, value))
    return True


def processes() -> int:
    """How many processes and threads this user has, as the kernel counts them; 0 where it does not say."""
    count, me = 0, os.getuid()
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if name.isdigit() and os.stat(f"/proc/{name}").st_uid == me:
                    count += len(os.listdir(f"/proc/{name}/task"))
    return count


def without_network(library: ctypes.CDLL) -> bool:
    """Move this process into a network of its own, in which there is nobody; False where that is not allowed."""
    if library.unshare(NEW_NETWORK) == 0:
        return True
    user, group = os.getuid(), os.getgid()
    if library.unshare(NEW_USER | NEW_NETWORK):
        return False
    for name, text in (("uid_map", f"{user} {user} 1"), ("setgroups", "deny"), ("gid_map", f"{group} {group} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def landlocked(library: ctypes.CDLL, folder: str) -> list[str]:
    """Forbid writing outside ``folder``, TCP, and signals to other processes, as far as the kernel's Landlock goes."""
    version = library.syscall(CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return []
    writes = sum(bits for since, bits in WRITES.items() if version >= since)
    rules = (ctypes.c_uint64 * 3)(writes, TCP if version >= 4 else 0, SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = library.syscall(CREATE, rules, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return []
    for path, rights in ((folder, writes), ("/dev/null", writes & OF_A_FILE)):
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = rights.to_bytes(8, sys.byteorder) + beneath.to_bytes(4, sys.byteorder)
        library.syscall(ADD_RULE, ruleset, 1, rule, 0)
        os.close(beneath)
    library.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    refused = library.syscall(RESTRICT, ruleset, 0)
    os.close(ruleset)
    if refused:
        return []
    return ["files", *(["signals"] if version >= 6 else [])]


def children() -> bool:
    """Whether this process has child processes that run; those that have ended are cleared away."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True
