"""jit that counts compilations and reports each one, with a warning when a function is compiled again."""

import time
from collections.abc import Callable
from typing import Any

import jax

_compilations = [0]  # number of compilations in this process, by the backend or from its cache


def _listen(event: str, duration: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations[0] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


class Compiled:
    """``jax.jit(f, **options)`` with a name; calls put ``bound`` before the other arguments.

    Attributes:
      name: its name in messages.
      compilations: number of calls that compiled: one for each combination of shapes, static arguments and *placement*
        (the same shapes placed differently on the devices compile again; counting traces would not show that).
      seconds: time of the calls that compiled.
    """

    def __init__(
        self,
        name: str,
        f: Callable[..., Any],
        *,
        report: Callable[[str], None] = print,
        expected: int = 1,
        bound: tuple[Any, ...] = (),
        **options: Any,
    ):
        self.name, self.compilations, self.seconds = name, 0, 0.0
        self._jit, self._report, self._expected, self._bound = jax.jit(f, **options), report, expected, bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, start = _compilations[0], time.perf_counter()
        out = self._jit(*self._bound, *args, **kwargs)
        if _compilations[0] > before:
            seconds = time.perf_counter() - start
            self.compilations, self.seconds = self.compilations + 1, self.seconds + seconds
            again = (
                ""
                if self.compilations <= self._expected
                else f" AGAIN ({self.compilations} times now, {self._expected} expected): {shapes((args, kwargs))}"
            )
            self._report(f"compiled {self.name} in {seconds:.1f} s{again}")
        return out

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """The traced computation: it has the jaxpr, and can be lowered and compiled."""
        return self._jit.trace(*self._bound, *args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """The lowered computation, for inspection."""
        return self._jit.lower(*self._bound, *args, **kwargs)


def shapes(args: Any) -> str:
    """The distinct shapes of a call's arrays, for a message."""
    return ", ".join(sorted({f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(args) if hasattr(x, "shape")}))
