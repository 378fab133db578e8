"""One writer for a folder: a file in it says who writes there. Readers do not ask.

The file names the host, the process and when that process started. A lock is stale if its process is gone, or if its
number belongs to a process that started at another time; it is then taken over. Of another host nothing can be known.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NAME = ".writer.lock"


class Locked(OSError):
    """Another process writes to the folder."""


def me() -> dict[str, str | int]:
    """Host, number and start of this process, and since when it holds the lock."""
    pid = os.getpid()
    return dict(host=socket.gethostname(), pid=pid, start=started(pid) or "", since=time.strftime("%Y-%m-%d %H:%M:%S"))


def started(pid: int) -> str | None:
    """When a process of this host started, as text to be compared; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        asked = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return asked.stdout.strip() or None
    return None if fields[0] == "Z" else f"{boot} {fields[19]}"  # the 22nd field of /proc/PID/stat


def check_free(folder: Path) -> None:
    """Raise `Locked` if a process that may be alive writes to ``folder``."""
    held = _read(folder / NAME)
    if held is None or _stale(held):
        return
    who = f"process {held['pid']} on {held['host']} has written to it since {held['since']}"
    if held["host"] == socket.gethostname():
        raise Locked(f"{folder} is in use: {who}; wait for it, stop it, or choose another folder")
    raise Locked(f"{folder} is in use: {who}; if that process is gone, remove the lock: rm '{folder / NAME}'")


def take(folder: Path) -> None:
    """Take the lock of ``folder``, which is there.

    Raises:
      Locked: another process has it.
    """
    path, mine = folder / NAME, folder / f"{NAME}.{os.getpid()}.{time.time_ns()}"
    mine.write_text(json.dumps(me()))
    try:
        for _ in range(100):
            check_free(folder)
            with contextlib.suppress(FileExistsError):
                os.link(mine, path)  # makes the whole file at once, or fails
                return
            _remove_stale(path)
        raise Locked(f"{folder}: the lock could not be taken; remove it: rm '{path}'")
    finally:
        mine.unlink(missing_ok=True)


def release(folder: Path) -> None:
    """Give back the lock of ``folder``, if it is this process's."""
    held = _read(folder / NAME)
    if held and (held["host"], held["pid"]) == (socket.gethostname(), os.getpid()):
        (folder / NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The lock of ``folder`` during the ``with`` block. Raises like `take`."""
    take(folder)
    try:
        yield
    finally:
        release(folder)


def _remove_stale(path: Path) -> None:
    """Move a stale lock away. If another process took it over in the meantime, put that one's back."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.stale")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        held = _read(aside)
        if held is not None and not _stale(held):
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _read(path: Path) -> dict | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        held = json.loads(text)
        return {"host": str(held["host"]), "pid": int(held["pid"]), "start": held["start"], "since": held["since"]}
    except (ValueError, KeyError, TypeError):
        raise Locked(f"{path} is not readable as a lock; if nothing writes there, remove it: rm '{path}'") from None


def _stale(held: dict) -> bool:
    return held["host"] == socket.gethostname() and started(held["pid"]) != held["start"]
