"""Expert rows beside the policy's own: each prompt's answers are joined by demonstrations."""

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.arguments import Count, Share, Whole
from jaxpo.batch import Rollouts
from jaxpo.fields import role_id
from jaxpo.learning.state import Run
from jaxpo.parallel.distributed import to_host
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.protocols.rows import side_by_side
from jaxpo.registry import register


@register("protocol", source="LUFFY, arXiv:2504.14945: 7 answers and 1 demonstration for each prompt")
def demonstrations(experts: Whole = 1, drop_last: Share = 0.0, seed: Count = 0) -> Protocol:
    """Sample K - ``experts`` answers to each prompt, K = ``config.rollout.responses``, and add the task's own answer to
    their group, with role ``expert``. The verifier rewards all rows.

    Metric ``expert/reward``: mean reward of the demonstrations.

    Args:
      experts: rows of the demonstration, which is repeated.
      drop_last: share of the demonstrations that lack their last character, as in ``config.warm_start``: an imperfect
        demonstrator.
      seed: says which ones.
    """

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        run, indices = gather.draw(run, gather.prompts)
        draw_key, seed_key = jax.random.split(key)
        own = rewarded_samples(run, gather, indices, draw_key, gather.responses - experts)
        shown = rewarded_demonstrations(gather, np.repeat(indices, experts), own, drop_last, seed)
        gather.note("expert/reward", float(shown.reward.mean()))
        return run, side_by_side([own, shown], [gather.responses - experts, experts], seed_key)

    def init(run: Run, gather: Gatherer, key: Array) -> Run:
        gather.demonstrations(np.arange(gather.size))  # what is wrong with one is told before anything is compiled
        return run

    def check(config: ConfigDict) -> None:
        if experts >= config.rollout.responses:
            raise ValueError(
                f"config.protocol.experts {experts} of config.rollout.responses {config.rollout.responses}: at least "
                "one answer must be the policy's own"
            )

    return Protocol(collect, init=init, facts=Facts(compiles={"complete": 1}, check=check))


def rewarded_samples(run: Run, gather: Gatherer, indices: np.ndarray, key: Array, responses: int) -> Rollouts:
    """``responses`` answers of the policy to each prompt (NumPy), with rewards."""
    prompts, length = gather.encoded(indices)
    budget = np.full(len(indices), gather.width, np.int32)
    out = gather.complete(run.state.params, prompts, length, budget, key, gather.sampling(run), responses)
    own = dict(prompt=np.repeat(indices, responses).astype(np.int32), role=np.zeros(out.rows, np.int32))
    return to_host(gather.reward(out.replace(**own)))


def rewarded_demonstrations(
    gather: Gatherer, indices: np.ndarray, like: Rollouts, drop_last: float = 0.0, seed: int = 0
) -> Rollouts:
    """The task's own answers to these prompts, with rewards, role ``expert``, and the fields of ``like``."""
    shown = gather.demonstrations(indices, drop_last, seed)
    mask = np.asarray(shown.mask, np.float32)
    rows = Rollouts(
        tokens=np.asarray(shown.tokens, np.int32),
        mask=mask,
        prompt_length=np.asarray(shown.prompt_length, np.int32),
        prompt=indices.astype(np.int32),
        role=np.full(len(indices), role_id("expert"), np.int32),
        group=np.zeros(len(indices), np.int32),
        truncated=np.zeros(len(indices), np.float32),
        logp_beh=np.zeros_like(mask),
        per_token={name: np.zeros_like(mask) for name in like.per_token},
    )
    return to_host(gather.reward(rows))
