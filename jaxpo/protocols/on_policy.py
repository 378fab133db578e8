"""One batch of completions from the current policy an iteration."""

from jax import Array

from jaxpo.batch import Rollouts
from jaxpo.learning.state import Run
from jaxpo.protocols.protocol import Protocol, Tools
from jaxpo.registry import register


def sample_once(run: Run, tools: Tools, key: Array) -> tuple[Run, Rollouts]:
    """The next prompts of the epoch, completed and judged: a batch of the run's shape."""
    run, indices = tools.draw(run, tools.prompts)
    return run, tools.reward(tools.generate(run.state.params, indices, key, tools.sampling(run)))


@register("protocol")
def on_policy() -> Protocol:
    """One batch of completions from the current policy an iteration."""
    return Protocol(sample_once)
