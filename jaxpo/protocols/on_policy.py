"""Each iteration samples one batch of completions from the current policy."""

from jax import Array

from jaxpo.batch import Rollouts
from jaxpo.learning.state import Run
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.protocol import Protocol
from jaxpo.registry import register


def sample_once(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
    """Complete and reward the next prompts of the epoch: a batch of the run's shape."""
    run, indices = gather.draw(run, gather.prompts)
    return run, gather.reward(gather.generate(run.state.params, indices, key, gather.sampling(run)))


@register("protocol")
def on_policy() -> Protocol:
    """Each iteration samples one batch of completions from the current policy."""
    return Protocol(sample_once)
