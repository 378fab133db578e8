"""The state of a run: what an optimizer step changes, and everything else that a checkpoint holds."""

from dataclasses import dataclass, field, replace
from typing import Any

from flax import struct

from jaxpo.objectives import State
from jaxpo.policy.transformer import Params


@struct.dataclass
class TrainState:
    """The state that an optimizer step changes.

    params: trained parameters.
    opt_state: state of the optimizer.
    objective: state of the objective.
    """

    params: Params
    opt_state: Any
    objective: State


@dataclass(frozen=True)
class Run:
    """Everything that changes during a run, and that a checkpoint holds.

    state: parameters, optimizer and objective state.
    references: parameters of frozen models by name (`jaxpo.learning.references`).
    tables: memory of the protocol and of the evaluation, pytrees of NumPy arrays by name.
    iteration: number of finished iterations.
    position: number of prompts drawn so far.
    """

    state: TrainState
    references: dict[str, Params] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    iteration: int = 0
    position: int = 0


def advance(run: Run, **changes: Any) -> Run:
    """A copy of ``run`` with some of its fields changed."""
    return replace(run, **changes)
