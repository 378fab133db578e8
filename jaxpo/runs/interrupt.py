"""End a run cleanly on SIGTERM."""

import signal

from jaxpo.parallel.distributed import anywhere


class Interrupt:
    """Catch SIGTERM: the run finishes the current iteration, saves it, and exits."""

    def __init__(self):
        self.here = False

    def asked(self) -> bool:
        """Whether any process got SIGTERM; all processes must call this."""
        return anywhere(self.here)

    def __enter__(self) -> "Interrupt":
        def ask(*_: object) -> None:
            self.here = True

        try:
            self._before = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # not in the main thread (as in a notebook): leave the signals as they are
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
