"""What changes during a run: the training state, and everything else that a checkpoint holds."""

from dataclasses import dataclass, field, replace
from typing import Any

from flax import struct

from jaxpo.objectives import State
from jaxpo.policy.transformer import Params


@struct.dataclass
class TrainState:
    """What an optimizer step changes: parameters, optimizer state, and what the objective remembers."""

    params: Params
    opt_state: Any
    objective: State


@dataclass(frozen=True)
class Run:
    """Everything that changes during a run; what a checkpoint holds.

    state: parameters, optimizer and objective state.
    references: parameters of frozen models by name (`jaxpo.learning.references`).
    tables: a protocol's own memory, pytrees of NumPy arrays by name.
    iteration: finished ones.
    position: prompts drawn so far.
    """

    state: TrainState
    references: dict[str, Params] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    iteration: int = 0
    position: int = 0


def advance(run: Run, **changes: Any) -> Run:
    """``run`` with some of its fields changed."""
    return replace(run, **changes)
