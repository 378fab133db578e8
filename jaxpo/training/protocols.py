"""How data is gathered: host-side hooks around the jitted functions (`jaxpo.objectives.Protocol`)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpo.batch import Rollouts, concatenate, take
from jaxpo.objectives import Protocol
from jaxpo.policy.transformer import Params
from jaxpo.primitives.aggregation import positive
from jaxpo.primitives.shaping import mixed_groups
from jaxpo.registry import register

if TYPE_CHECKING:
    from jaxpo.training.workspace import TrainState


@dataclass(frozen=True)
class Run:
    """Everything that changes during a run; what a checkpoint holds.

    state: parameters, optimizer and objective state. slots: parameters of frozen companions by name. tables: a
      protocol's own memory (a pytree).
    iteration: finished ones. position: prompts drawn so far.
    """

    state: "TrainState"
    slots: dict[str, Params] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    iteration: int = 0
    position: int = 0


class Tools(NamedTuple):
    """What a protocol may call. Shapes are those of the run: ``prompts`` prompts, ``responses`` completions of each."""

    prompts: int
    draw: Callable[[Run, int], tuple[Run, np.ndarray]]  # indices of the next n training prompts
    generate: Callable[..., Rollouts]  # (params, indices, key, options=None): on the mesh, without rewards
    reward: Callable[[Rollouts], Rollouts]  # adds reward and correct; the errors of verifiers are counted


def _collect_once(run: Run, tools: Tools, key: Array) -> tuple[Run, Rollouts]:
    run, indices = tools.draw(run, tools.prompts)
    return run, tools.reward(tools.generate(run.state.params, indices, key))


@register("protocol")
def on_policy() -> Protocol:
    """One batch of completions from the current policy an iteration."""
    return Protocol(
        init=lambda run: run,
        collect=_collect_once,
        before=lambda run, tools, rollouts: (run, rollouts),
        after=lambda run, tools, rollouts: run,
        sampler=lambda state: None,
    )


class NothingLeft(RuntimeError):
    """Dynamic sampling found too few groups with mixed outcomes."""


@register("protocol", id="dapo", source="DAPO, arXiv:2503.14476")
@register("protocol", source="DAPO, arXiv:2503.14476")
def dynamic_sampling(max_batches: int = 10) -> Protocol:
    """Generate until as many groups with mixed outcomes are there as an iteration trains on; the others are never
    trained on.

    Batches keep the run's shape, so nothing is compiled again. Kept groups beyond the number wanted are dropped.

    Raises:
      NothingLeft: (from ``collect``) not enough after ``max_batches`` batches, with the number found.
    """
    positive("config.protocol.max_batches", max_batches)

    def collect(run: Run, tools: Tools, key: Array) -> tuple[Run, Rollouts]:
        kept, found = [], 0
        for i in range(max_batches):
            run, rollouts = _collect_once(run, tools, jax.random.fold_in(key, i))
            mixed = np.asarray(mixed_groups(rollouts.correct, rollouts.group, jnp.ones(rollouts.rows)))
            responses = rollouts.shared_prompt
            groups = np.flatnonzero(mixed.reshape(-1, responses)[:, 0])[: tools.prompts - found]
            rows = (groups[:, None] * responses + np.arange(responses)).reshape(-1)
            part = take(jax.tree.map(np.asarray, rollouts), rows, shared_prompt=responses)
            kept.append(part.replace(group=part.group + i * tools.prompts))
            found += len(groups)
            if found == tools.prompts:
                batch = concatenate(kept)
                batches = np.full(batch.rows, i + 1, np.float32)
                return run, batch.replace(extras={**batch.extras, "generation_batches": batches})
        raise NothingLeft(
            f"dynamic sampling found {found} of {tools.prompts} groups with mixed outcomes in {max_batches} "
            "batches: the task is (nearly) "
            "solved or unsolved; stop here, take harder prompts, or raise config.protocol.max_batches"
        )

    return on_policy()._replace(collect=collect)


def advance(run: Run, **changes: Any) -> Run:
    """``run`` with some of its fields changed."""
    return replace(run, **changes)


@register("protocol", source="arXiv:2603.06009")
def ppo_outer_loop() -> Protocol:
    """TODO"""
    return on_policy()
