"""Sample until enough groups have mixed outcomes (DAPO), with a temperature for each token (HAPO)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.arguments import Positive, ShareBelowOne, Whole
from jaxpo.batch import Rollouts, take
from jaxpo.learning.state import Run
from jaxpo.objectives import State
from jaxpo.parallel.distributed import to_host
from jaxpo.primitives.shaping import mixed_groups
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.on_policy import sample_once
from jaxpo.protocols.protocol import NothingLeft, Protocol
from jaxpo.protocols.rows import stacked
from jaxpo.registry import register
from jaxpo.rollout.sampling import EntropyTemperature, SamplingOptions


@register("protocol", id="dapo", source="DAPO, arXiv:2503.14476")
@register("protocol", source="DAPO, arXiv:2503.14476")
def dynamic_sampling(max_batches: Whole = 10) -> Protocol:
    """Generate batches until there are enough groups with mixed outcomes for an iteration; drop the other groups.

    Batches keep the run's shape, so nothing is compiled again. Kept groups beyond the number wanted are dropped.

    Raises:
      NothingLeft: (from ``collect``) too few groups after ``max_batches`` batches; the error says how many.
    """

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        kept, found = [], 0
        for i in range(max_batches):
            run, rollouts = sample_once(run, gather, jax.random.fold_in(key, i))
            rollouts = to_host(rollouts)
            mixed = np.asarray(mixed_groups(rollouts.correct, rollouts.group, jnp.ones(rollouts.rows)))
            responses = rollouts.shared_prompt
            groups = np.flatnonzero(mixed.reshape(-1, responses)[:, 0])[: gather.prompts - found]
            rows = (groups[:, None] * responses + np.arange(responses)).reshape(-1)
            part = take(rollouts, rows, shared_prompt=responses)
            kept.append(part.replace(group=part.group + i * gather.prompts))
            found += len(groups)
            if found == gather.prompts:
                gather.note("dynamic_sampling/batches", i + 1)
                return run, stacked(kept)
        raise NothingLeft(
            f"dynamic sampling found {found} of {gather.prompts} groups with mixed outcomes in {max_batches} batches: "
            "the policy solves (nearly) all of the prompts or none; stop here, take harder or easier prompts, or raise "
            "config.protocol.max_batches"
        )

    return Protocol(collect)


SIGNAL = ("q", "s", "high", "low")  # numbers on a batch's entropies that the objective `hapo` remembers


@register("sampler", id="hapo", source="HAPO, arXiv:2509.16591; code of starriver030515/HAPO")
def entropy_temperature(
    tau: ShareBelowOne = 0.05,
    T0: Positive = 1.0,  # noqa: N803 (the card's name)
    official: bool = False,
) -> Callable[[SamplingOptions, State], SamplingOptions]:
    """``(options, objective state) -> options`` with a temperature for each token, which follows from the entropies of
    the previous batch that the objective `hapo` remembers.

    Raises:
      ValueError: (when called) the state belongs to another objective.
    """

    def sample(options: SamplingOptions, state: State) -> SamplingOptions:
        absent = [name for name in SIGNAL if name not in state.memory]
        if absent:
            raise ValueError(
                f"protocol 'hapo' reads {', '.join(absent)} from the memory of the objective hapo, and this objective "
                "has no such memory: set config.objective.name to hapo, or config.protocol.name to dapo"
            )
        # Host numbers, so that the compiled program does not depend on where the state lives.
        numbers = {name: np.float32(state.memory[name]) for name in SIGNAL}
        return options.replace(adaptive=EntropyTemperature(np.float32(T0), np.float32(tau), numbers, official))

    return sample


@register("protocol", source="HAPO, arXiv:2509.16591; code of starriver030515/HAPO")
def hapo(
    tau: ShareBelowOne = 0.05,
    T0: Positive = 1.0,  # noqa: N803 (the card's name)
    official: bool = False,
    max_batches: Whole = 10,
) -> Protocol:
    """Dynamic sampling with a temperature for each token, ``T = T0 (1 + tau clip(h, -1, 1))``. h compares the entropy
    of the next token (at T0) with the entropies of the previous optimizer batch, which the objective ``hapo``
    remembers; before the first batch T is T0. Evaluation samples as configured.

    Args:
      tau: 0.05 in the code, 0.1 in the paper.
      official: use the sign of the released code, in which h is never negative.
      max_batches: as in `dynamic_sampling`.
    """

    def check(config: ConfigDict) -> None:
        if config.sampling.temperature != 1:
            raise ValueError(
                f"config.sampling.temperature must be 1 with protocol 'hapo', not {config.sampling.temperature}: "
                "set the base temperature by config.objective.T0"
            )

    sampler = entropy_temperature(tau, T0, official)
    return dynamic_sampling(max_batches)._replace(sampler=sampler).where(check=check, compiles={"generate": 1})
