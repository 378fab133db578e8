"""SIGTERM asks a run for a clean end."""

import signal

from jaxpo.parallel.distributed import anywhere


class Interrupt:
    """SIGTERM asks for a clean end: the iteration under way is finished, saved, and the run exits."""

    def __init__(self):
        self.here = False

    def asked(self) -> bool:
        """Whether any process was asked; all of them have to call."""
        return anywhere(self.here)

    def __enter__(self) -> "Interrupt":
        def ask(*_: object) -> None:
            self.here = True

        try:
            self._before = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # not in the main thread (a notebook's executor): the caller keeps its own signals
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
