"""How every program of this folder ends: an error is one line, and a signal ends it with a status of its own.

| status | meaning |
|---|---|
| 0 | finished |
| 1 | one line on standard error says what is wrong |
| 129, 130, 143 | stopped by SIGHUP, SIGINT (Ctrl-C) or SIGTERM before its end |
| 141 | whoever read the output has closed it |

An exception that is none of ours is a bug and keeps its traceback.
"""

import contextlib
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
GRACE = 10.0  # seconds to clean up after a signal that stops at once, before the process is left
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)


def program(main: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the ``main(argv=None)`` of a program, so that it ends as this file says.

    Raises:
      SystemExit: with a line for what was expected to go wrong, or with the status of a signal.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> Any:
        for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows its number
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        with signals_interrupt(at_once=argv is None) as seen:
            try:
                out = main(argv)
                sys.stdout.flush()
            except KeyboardInterrupt as stop:
                end(*interruption(stop), at_once=argv is None)
            except BrokenPipeError:
                with contextlib.suppress(OSError, ValueError):  # what is still to be flushed goes nowhere
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(128 + 13)
            except Exception as error:
                if (text := one_line(error)) is None:
                    raise
                sys.exit(f"error: {text}")
            if seen:  # the exception was lost, as in a destructor
                end(seen[0], "", at_once=False)
            return out

    return run


def unless_interrupt(before: Callable[[Any], None]) -> Callable[[Any], None]:
    """``before`` (a `sys.unraisablehook`), but silent about an interruption, which is not lost (see ``seen``)."""
    return lambda lost: None if isinstance(lost.exc_value, KeyboardInterrupt) else before(lost)


@contextlib.contextmanager
def signals_interrupt(*, at_once: bool) -> Iterator[list[int]]:
    """Let the `SIGNALS` raise ``KeyboardInterrupt(number)``; yields the list of those that came. Signals that are
    ignored (nohup) stay so. ``at_once``: if the process is still there after `GRACE`, it is left all the same."""
    seen: list[int] = []

    def stop(number: int, _: object) -> None:
        seen.append(number)
        if at_once and len(seen) == 1:
            timer = threading.Timer(GRACE, leave, (number,))
            timer.daemon = True
            timer.start()
        raise KeyboardInterrupt(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, stop) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    hook, sys.unraisablehook = sys.unraisablehook, unless_interrupt(sys.unraisablehook)
    try:
        yield seen
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(number: int) -> None:
    """End the process where what the signal raised was lost, or cleaning up takes too long."""
    with contextlib.suppress(OSError):
        os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def interruption(stop: KeyboardInterrupt) -> tuple[int, str]:
    """The number of the signal, and what the program says beside it."""
    number, *said = stop.args if stop.args and isinstance(stop.args[0], int) else (signal.SIGINT,)
    return int(number), str(said[0]) if said else ""


def end(number: int, said: str, *, at_once: bool) -> None:
    """Say which signal stopped the program, and leave with its status. ``at_once``: wait for no thread."""
    print(f"stopped by {signal.Signals(number).name}{': ' * bool(said)}{said}", file=sys.stderr, flush=True)
    if at_once:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(128 + number)
    sys.exit(128 + number)


def one_line(error: Exception) -> str | None:
    """What an expected error says, without control sequences; None for one that is a bug."""
    from jaxpo.parallel.distributed import FirstFailed
    from jaxpo.protocols.protocol import NothingLeft
    from jaxpo.runs.loop import Diverged
    from jaxpo.runs.memory import explained
    from jaxpo.text.terminal import printable

    error = explained(error) or error
    if not isinstance(error, (*EXPECTED, Diverged, NothingLeft, FirstFailed)):
        return None
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and text.startswith("[Errno"):
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return printable(re.sub(r"\s*\n\s*", " ", text))
