"""jit that counts: a run compiles each function a bounded number of times, and says so when it compiles one again."""

import time
from collections.abc import Callable
from typing import Any

import jax


class Compiled:
    """``jax.jit(f, **options)`` under a name.

    Attributes:
      name: what the messages call it. traces: times it was traced (one per combination of shapes and static arguments).
      seconds: spent in calls that traced, i.e. tracing and compiling.
    """

    def __init__(
        self,
        name: str,
        f: Callable[..., Any],
        *,
        report: Callable[[str], None] = print,
        expected: int = 1,
        **options: Any,
    ):
        self.name, self.traces, self.seconds, self._report, self._expected = name, 0, 0.0, report, expected

        def traced(*args: Any, **kwargs: Any) -> Any:
            self.traces += 1
            return f(*args, **kwargs)

        self._jit = jax.jit(traced, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, start = self.traces, time.perf_counter()
        out = self._jit(*args, **kwargs)
        if self.traces > before:
            seconds = time.perf_counter() - start
            self.seconds += seconds
            again = (
                ""
                if self.traces <= self._expected
                else f" AGAIN ({self.traces} times now, {self._expected} expected): {shapes(args)}"
            )
            self._report(f"compiled {self.name} in {seconds:.1f} s{again}")
        return out

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """The lowered computation, for inspection."""
        return self._jit.lower(*args, **kwargs)


def shapes(args: Any) -> str:
    """The distinct shapes of a call's arrays, for a message."""
    return ", ".join(sorted({f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(args) if hasattr(x, "shape")}))
