"""One batch of completions from the current policy an iteration."""

from jax import Array

from jaxpo.batch import Rollouts
from jaxpo.learning.state import Run
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.protocol import Protocol
from jaxpo.registry import register


def sample_once(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
    """The next prompts of the epoch, completed and judged: a batch of the run's shape."""
    run, indices = gather.draw(run, gather.prompts)
    return run, gather.reward(gather.generate(run.state.params, indices, key, gather.sampling(run)))


@register("protocol")
def on_policy() -> Protocol:
    """One batch of completions from the current policy an iteration."""
    return Protocol(sample_once)
