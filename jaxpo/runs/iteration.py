"""One iteration: gather, score, prepare, optimizer steps. The loop and races run this code; the planner traces it."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jaxpo.batch import Rollouts, TokenStats, logps
from jaxpo.learning import references
from jaxpo.learning.needs import copies_of, must_score
from jaxpo.learning.state import Run, advance
from jaxpo.objectives import Objective
from jaxpo.objectives.grammar.checks import check_numbers, check_prepared
from jaxpo.policy.stats import HIDDEN, hidden_field
from jaxpo.policy.transformer import Params
from jaxpo.protocols.gatherer import Gatherer, Watch
from jaxpo.protocols.protocol import Protocol

Order = Callable[[Rollouts], Iterable[np.ndarray]]  # the rows of each optimizer step of a prepared batch


def unpacked(batch: Rollouts, rows: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows are not packed: no further arguments of a step, and no metrics."""
    return {}, {}


class Stage(NamedTuple):
    """What an iteration is made of.

    objective: what is minimized.
    protocol: how data is gathered.
    steps: optimizer steps of an iteration.
    score: (params, rows as a policy reads them) -> what the policy says of them.
    prepare: (batch, objective state) -> (batch, objective state).
    update: (train state, batch, rows, fresh, **packing) -> (train state, metrics); also given ``copies``, the
      references by name that are copies of the policy with which the objective compares it, if there are any.
    put: arrays [B, ...] to where they are computed with.
    pack: (batch, rows) -> further arguments of ``update``, and metrics.
    watch: where time is told.
    others: name -> what a model beside the policy says of rows (`jaxpo.learning.references`, ``model``).
    """

    objective: Objective
    protocol: Protocol
    steps: int
    score: Callable[[Params, Rollouts], TokenStats]
    prepare: Callable[..., Any]
    update: Callable[..., Any]
    put: Callable[[Any], Any] = lambda tree: tree
    pack: Callable[[Rollouts, np.ndarray], tuple[dict[str, Any], dict[str, Any]]] = unpacked
    watch: Watch = Watch()
    others: Mapping[str, Callable[[Rollouts], TokenStats]] = MappingProxyType({})


def gather(stage: Stage, gatherer: Gatherer, run: Run, key: Array) -> tuple[Run, Rollouts]:
    """Collect an iteration's rows by the protocol and score them."""
    run, rollouts = stage.protocol.collect(run, gatherer, key)
    asks = stage.objective.asks
    check_numbers(asks.needs, asks.rewards, rollouts, where=f"iteration {run.iteration}: ")
    with stage.watch.phase("score"):
        batch = score_references(stage, run, stage.put(rollouts))
    if stage.protocol.before:
        run, batch = stage.protocol.before(run, gatherer, batch)
        batch = stage.put(batch)
    return run, batch


def score_references(stage: Stage, run: Run, batch: Rollouts) -> Rollouts:
    """Attach the log-probs under the references, the hidden states of models that the policy is compared with, and what
    the old policy says unless the first optimizer step is its own old policy."""
    for name, ask in stage.others.items():
        batch = with_said(batch, name, ask(batch), stage.objective)
    copies, scored = copies_of(stage.objective), batch
    for name, params in references.scored(stage.objective, run.references, copies).items():
        said = stage.score(params, batch)
        scored = with_said(scored, name, said if name in copies else said.replace(derived={}), stage.objective)
    always = stage.protocol.facts.stale or stage.steps > 1
    if always or must_score(stage.objective, scored, run.state.objective):
        old = stage.score(run.state.params, batch)
        constants = dict(logp_old=old.logp, entropy_old=old.entropy, value_old=old.value)
        derived = {name: x for name, x in old.derived.items() if name != HIDDEN}
        scored = scored.replace(**constants).with_token(**logps(derived))
    return scored


def with_said(batch: Rollouts, name: str, told: TokenStats, objective: Objective) -> Rollouts:
    """The batch with what the objective reads of the model ``name``: its score, its log-probs or its hidden states."""
    if told.score is not None:
        return batch.with_row(model_score=told.score)
    needed = f"logp_{name}" in objective.asks.needs
    hidden = {hidden_field(name): told.derived[HIDDEN]} if HIDDEN in told.derived else {}
    return batch.with_token(**hidden, **(logps({name: told.logp}) if needed else {}))


def learn(stage: Stage, run: Run, batch: Rollouts, order: Order) -> tuple[Run, Rollouts, list[dict[str, Array]]]:
    """Prepare a scored batch and take the optimizer steps of an iteration; the metrics of each."""
    with stage.watch.phase("score"):
        given, (batch, memory) = batch, stage.prepare(batch, run.state.objective)
        jax.block_until_ready(batch)
    check_prepared(batch, given, where=f"iteration {run.iteration}: ")
    with stage.watch.phase("update"):
        state, frozen, steps = run.state.replace(objective=memory), run.references, []
        copies = {name: run.references[name] for name in copies_of(stage.objective)}
        theirs = dict(copies=copies) if copies else {}
        peeks = bool(stage.objective.asks.peeks) and not stage.protocol.facts.stale
        for rows in order(batch):
            packing, notes = stage.pack(batch, rows)
            state, out = stage.update(state, batch, rows, fresh=not steps and peeks, **theirs, **packing)
            frozen = references.moved(frozen, stage.protocol.facts.references, state.params)
            steps.append(out | notes)
        jax.block_until_ready(state.params)
    return advance(run, state=state, references=frozen), batch, steps


def finish(stage: Stage, gatherer: Gatherer, run: Run, batch: Rollouts) -> Run:
    """The protocol's last word on an iteration; then references move."""
    if stage.protocol.after:
        run = stage.protocol.after(run, gatherer, batch)
    keeps = stage.protocol.facts.references
    frozen = references.moved(run.references, keeps, run.state.params, run.iteration + 1)
    return advance(run, iteration=run.iteration + 1, references=frozen)


def iterate(stage: Stage, gatherer: Gatherer, run: Run, key: Array, order: Order) -> tuple[Run, list[dict[str, Array]]]:
    """One iteration; the metrics of its optimizer steps."""
    run, batch = gather(stage, gatherer, run, key)
    run, batch, steps = learn(stage, run, batch, order)
    return finish(stage, gatherer, run, batch), steps
