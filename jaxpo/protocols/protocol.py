"""The `Protocol`: it gathers data and may move weights, around the compiled functions of a run."""

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
    """Facts about a protocol that the loop, the planner and the checks read.

    provides: fields of the batch that it adds.
    rows: (objective, responses) -> the number of rows that it makes for each prompt; None = ``responses``.
    references: references that it keeps or moves, with their options (`jaxpo.learning.references`).
    compiles: by compiled function, how many shapes it calls it with besides those of every run.
    stale: its batches hold rows of earlier policies, so ``logp_old`` is always scored.
    judges: it asks ``config.judge`` about the policy's own answers.
    room: (T) -> tokens by which the prompts of its rows are longer than those of the data; None = none.
    check: (config) raises ``ValueError`` if it cannot run with the config, before anything is compiled.
    """

    provides: frozenset[str] = frozenset()
    rows: Callable[[Objective, int], int] | None = None
    references: Mapping[str, Mapping[str, Any]] = NONE
    compiles: Mapping[str, int] = NONE
    stale: bool = False
    judges: bool = False
    room: Callable[[int], int] | None = None
    check: Callable[[ConfigDict], None] | None = None


class Protocol(NamedTuple):
    """Host-side hooks of an iteration, which gather data and move weights. None = nothing to do.

    collect: (run, gather, key) -> (run, rollouts). It may call the gatherer any number of times, with fixed shapes.
    before: (run, gather, rollouts) -> (run, rollouts). Called after scoring, before the first gradient.
    after: (run, gather, rollouts as prepared) -> run. Called after the last optimizer step.
    init: (run, gather, key) -> run. Called at the start of a run, not when a run is resumed.
    tables: (gather) -> the protocol's memory at the start (``run.tables``): pytrees of NumPy arrays by name, which are
      checkpointed.
    sampler: (options, objective state) -> the sampling options of this iteration.
    facts: what the loop, the planner and the checks read.
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
