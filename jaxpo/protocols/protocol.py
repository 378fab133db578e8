"""What a protocol is: how data is gathered and weights are moved, around the compiled functions of a run."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import Array
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts
from jaxpo.learning.state import Run
from jaxpo.objectives import Objective, State
from jaxpo.objectives.grammar.base import NONE
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.rollout.sampling import SamplingOptions


class Facts(NamedTuple):
    """What the loop, the planner and the checks must know of a protocol.

    provides: fields of the batch that it adds.
    rows: (objective, responses) -> rows that it makes of a prompt; None = the responses.
    references: references that it keeps or moves, with their options (`jaxpo.learning.references`).
    compiles: shapes that it calls compiled functions with, besides those of every run, by function.
    stale: its batches hold rows of earlier policies, so ``logp_old`` is always scored.
    judges: it asks ``config.judge`` about the policy's own answers.
    check: (config) raises ``ValueError`` for a config that it cannot run with, before anything is compiled.
    """

    provides: frozenset[str] = frozenset()
    rows: Callable[[Objective, int], int] | None = None
    references: Mapping[str, Mapping[str, Any]] = NONE
    compiles: Mapping[str, int] = NONE
    stale: bool = False
    judges: bool = False
    check: Callable[[ConfigDict], None] | None = None


class Protocol(NamedTuple):
    """How data is gathered and weights are moved: host-side hooks of an iteration. None = nothing to do.

    collect: (run, gather, key) -> (run, rollouts): any number of calls of the gatherer, fixed shapes.
    before: (run, gather, rollouts) -> (run, rollouts), once they are scored; no gradient yet.
    after: (run, gather, rollouts as prepared) -> run, after the last optimizer step.
    init: (run, gather, key) -> run at the start; not called when a run is resumed.
    tables: (gather) -> pytrees of NumPy arrays by name, its memory at the start (``run.tables``), checkpointed.
    sampler: (options, objective state) -> the sampling options of this iteration.
    facts: what others must know of it.
    """

    collect: Callable[[Run, Gatherer, Array], tuple[Run, Rollouts]]
    before: Callable[[Run, Gatherer, Rollouts], tuple[Run, Rollouts]] | None = None
    after: Callable[[Run, Gatherer, Rollouts], Run] | None = None
    init: Callable[[Run, Gatherer, Array], Run] | None = None
    tables: Callable[[Gatherer], dict[str, Any]] | None = None
    sampler: Callable[[SamplingOptions, State], SamplingOptions] | None = None
    facts: Facts = Facts()

    def where(self, **facts: Any) -> "Protocol":
        """The protocol with some of its facts changed."""
        return self._replace(facts=self.facts._replace(**facts))


class NothingLeft(RuntimeError):
    """A protocol found nothing to train on."""
