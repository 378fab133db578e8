"""PPO's iteration seen as one noisy step of an outer optimizer: how to measure it, and how to scale it."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxpo.arguments import Positive, Whole
from jaxpo.batch import Rollouts
from jaxpo.learning.state import Run
from jaxpo.parallel.distributed import to_host
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.on_policy import sample_once
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.registry import register

SOURCE = "arXiv:2603.06009"


@register("protocol", source=SOURCE)
def ppo_outer_loop(gradient_noise: bool = True, log_ratio_clip: Positive = 20.0) -> Protocol:
    """Sample on policy, and report how far the iteration moved the policy as metrics.

    ``outer/kl``: KL(anchor || new), the token mean of ``r - 1 - log r``. The anchor is the policy before the iteration.
    ``outer/return``: mean reward of the rollouts, which the anchor sampled.
    ``outer/return_new``: the new policy's mean reward, estimated from the same rollouts with self-normalised weights of
    whole sequences.
    ``outer/effective_rows``: how many rows that estimate is worth.
    ``outer/noise``: variance of the full-batch gradient ``|g1 - g2|^2 / 4`` over its square ``|(g1 + g2) / 2|^2``; g1
    and g2 are the gradients of the two half-batches before the first step.
    ``outer/gradient_cosine``: the cosine between g1 and g2.

    Args:
      gradient_noise: False saves a forward and a backward pass in each iteration.
      log_ratio_clip: bound of log-ratios.
    """

    def before(run: Run, gather: Gatherer, rollouts: Rollouts) -> tuple[Run, Rollouts]:
        for name, value in gather.noise(run, rollouts).items():
            gather.note(f"outer/{name}", float(value))
        return run, rollouts

    def after(run: Run, gather: Gatherer, rollouts: Rollouts) -> Run:
        new = to_host(gather.score(run.state.params, rollouts).logp)
        for name, value in outer_step(to_host(rollouts), new, log_ratio_clip).items():
            gather.note(f"outer/{name}", value)
        return run

    def check(config: ConfigDict) -> None:
        if gradient_noise and config.rollout.prompts % 2:
            raise ValueError(
                f"config.rollout.prompts {config.rollout.prompts} cannot be halved to measure the gradient's noise: "
                "make it even, or set config.protocol.gradient_noise to False"
            )

    return Protocol(sample_once, before=before if gradient_noise else None, after=after, facts=Facts(check=check))


def outer_step(rollouts: Rollouts, new: np.ndarray, log_ratio_clip: float) -> dict[str, float]:
    """KL to the anchor and estimated returns, from log-probs [B, T] under the new policy.

    The anchor's log-probs are ``logp_old``; if the loop did not score it, those that the sampler recorded.
    """
    anchor = rollouts.logp_old
    if anchor is None:
        anchor = rollouts.per_token.get("logp_sampler", rollouts.logp_beh)
    count = np.asarray(rollouts.count)
    mask = (np.asarray(rollouts.mask) > 0) & (count > 0)[:, None]
    x = np.clip(np.where(mask, new - np.asarray(anchor), 0), -log_ratio_clip, log_ratio_clip)
    tokens = mask * count[:, None]
    total = np.clip(x.sum(1), -log_ratio_clip, log_ratio_clip)
    weight = count * np.exp(total - total.max())
    reward = np.asarray(rollouts.reward)

    def mean(value: np.ndarray, weight: np.ndarray) -> float:
        return float((value * weight).sum() / max(weight.sum(), 1e-30))

    return {
        "kl": mean(np.exp(x) - 1 - x, tokens),
        "return": mean(reward, count),
        "return_new": mean(reward, weight),
        "effective_rows": float(weight.sum() ** 2 / max((weight**2).sum(), 1e-30)),
    }


@register("diagnostic", id="ppo_outer_loop", source=SOURCE)
def co_scaling(
    scale: Whole, prompts: Whole = 32, minibatches: Whole = 1, epochs: Whole = 1, learning_rate: Positive = 1e-4
) -> dict[str, Any]:
    """The recipe against stagnation: take ``scale`` times the rollouts, in ``scale`` times the minibatches.

    Minibatch size, learning rate and epochs stay. A larger minibatch with a rescaled learning rate would change the
    inner problem instead. First test for stagnation: lower the learning rate by a factor of about 5. If progress
    resumes, the outer step was too large for its noise, and more rollouts help; otherwise look for a loss of
    plasticity.

    Args:
      scale: factor of the rollouts.
      prompts, minibatches, epochs, learning_rate: the settings of the run that stagnates.

    Returns:
      config fields of the larger run by path, and ``prompts_per_minibatch`` and ``optimizer_steps`` of an iteration.
    """
    if prompts % minibatches:
        raise ValueError(f"minibatches {minibatches} does not divide prompts {prompts}")
    return {
        "rollout.prompts": prompts * scale,
        "training.minibatches": minibatches * scale,
        "training.epochs": epochs,
        "optimizer.learning_rate": learning_rate,
        "prompts_per_minibatch": prompts // minibatches,
        "optimizer_steps": minibatches * scale * epochs,
    }
