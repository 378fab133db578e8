"""Gatherers without a policy: a test says what it expects to be called."""

from types import SimpleNamespace
from typing import Any


class Fake(SimpleNamespace):
    """What a test gives; everything else fails when it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"gather.{name} was not expected to be called")

        return fail


def fake(**given: Any) -> Fake:
    """A gatherer with the given attributes."""
    return Fake(**given)
