"""Tools of protocols without a policy: a test says what it expects to be called."""

from typing import Any

from jaxpo.protocols.protocol import Tools


def fake(**given: Any) -> Tools:
    """Tools with the given fields; the others fail when they are called."""

    def unexpected(name: str):
        def fail(*args: Any, **kwargs: Any):
            raise AssertionError(f"tools.{name} was not expected to be called")

        return fail

    return Tools(**{name: given.get(name, unexpected(name)) for name in Tools._fields})
