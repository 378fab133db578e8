"""`registered` lists the objectives of a family, the module of jaxpo.objectives that registers them."""

import jaxpo
from jaxpo.registry import entry


def family(name: str) -> str:
    module = entry(name).factory.__module__.removeprefix("jaxpo.objectives.").split(".")[0]
    return module


def registered(of: str) -> set[str]:
    """The objectives of a family."""
    return {name for name in jaxpo.names() if family(name) == of}


def label(configuration: tuple) -> str:
    """What a test of ``(id, hyperparameters, ...)`` is called."""
    return configuration[0] + "".join(f"-{k}={x}" for k, x in configuration[1].items())
