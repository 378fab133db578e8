"""End a run cleanly when it is asked to stop."""

import contextlib
import os
import signal
from types import FrameType

from jaxpo.parallel.distributed import most

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupt:
    """Catch Ctrl-C (SIGINT), SIGTERM and SIGHUP. At the first one the run finishes the current iteration, saves it and
    ends. The second one raises ``KeyboardInterrupt(number)`` at once.

    number: the first signal that this process got; 0 = none.
    second: the second one.
    """

    def __init__(self) -> None:
        self.number = self.second = 0
        self._before: dict[int, object] = {}

    def asked(self) -> int:
        """The signal that any process got (the largest number); 0 = none. All processes must call this."""
        if self.second:  # what was raised was lost, as in a destructor
            raise KeyboardInterrupt(self.second)
        return most(self.number)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            self.second = number
            if callable(before := self._before.get(number)):  # of the program, or Python's own
                before(number, frame)
            raise KeyboardInterrupt(number)
        self.number = number
        line = (
            f"\n{signal.Signals(number).name}: the iteration under way is finished and saved; once more stops at once\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, line.encode())  # print may be what was interrupted

    def __enter__(self) -> "Interrupt":
        with contextlib.suppress(
            ValueError
        ):  # not in the main thread (as in a notebook): leave the signals as they are
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks for
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
