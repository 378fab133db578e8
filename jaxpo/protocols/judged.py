"""Protocols in which a judge compares the policy's own answers: pairs, win rates, games against an opponent."""

from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.arguments import NonNegative, Positive, Share, Whole
from jaxpo.primitives import preference_data
from jaxpo.protocols.comparisons import Comparison, Source, compared
from jaxpo.protocols.gatherer import Verdict
from jaxpo.protocols.preference_data import rounds
from jaxpo.protocols.protocol import Protocol
from jaxpo.registry import register

Rule = Literal["best_worst", "random", "adjacent"]


@register("protocol", source="online DPO, arXiv:2402.04792; best against worst: arXiv:2310.05344")
def judged(
    pairs: Rule | None = None,
    margin: NonNegative = 0.0,
    label_threshold: float | None = None,
    prev_every: Whole | None = None,
    ref_every: Whole | None = None,
) -> Protocol:
    """K answers of the policy to each prompt, compared by ``config.judge``.

    Args:
      pairs: which answers become pairs: "best_worst" by score (None), "random" two, or "adjacent": the first and the
        second, the third and the fourth, ... Objectives that read pref_prob or win take them in this order, others
        the better one first, if the judge is not even.
      margin: pairs whose scores are at most so far apart do not count.
      label_threshold: for objectives of labels (KTO): answers of a score above it are good. None: those that beat the
        other answers to the prompt with a mean probability above 1/2; of even ones nothing is learned.
      prev_every, ref_every: as of `preference_data`.
    """
    return compared(Comparison(pairs=pairs, margin=margin, threshold=label_threshold), rounds(prev_every, ref_every))


@register("protocol", source="IPO-MD, arXiv:2403.08635")
def ipo_md(beta: Share = 0.125, pairs: Rule | None = None) -> Protocol:
    """Pairs of answers from the geometric mixture ``pi^(1 - beta) ref^beta``, token by token. pairs: None = random."""
    return compared(Comparison(Source(partner="ref", share=beta), pairs=pairs, unasked="random"))


@register("protocol", source="Nash-MD-PG, arXiv:2312.00886")
def nash_md(mixture: Share = 0.125) -> Protocol:
    """Answers of the policy against as many of the geometric mixture ``pi^(1 - mixture) ref^mixture``."""
    return compared(Comparison(opponent=Source(partner="ref", share=mixture)))


@register("protocol", source="Nash-EMA-PG, arXiv:2312.00886")
def nash_ema(b: Share = 0.999) -> Protocol:
    """Answers of the policy against as many of ``theta_bar <- (1 - b) theta + b theta_bar``."""
    return compared(Comparison(opponent=Source(lambda run: run.references["ema"])), {"ema": {"b": b}})


@register("sampler", source="RSO, arXiv:2309.06657")
def rso_sampler(beta: Positive = 0.5, n: Whole = 8) -> Callable[[np.ndarray, Array], tuple[np.ndarray, np.ndarray]]:
    """Rejection sampling: ``(scores [G, C], key) -> (places [G, n], there [G, n])``.

    places: candidates in the order of acceptance (`jaxpo.primitives.preference_data.rejection_sample`); there: whether
    there is one.
    """

    def sample(scores: np.ndarray, key: Array) -> tuple[np.ndarray, np.ndarray]:
        draws = jax.random.uniform(key, (len(scores), n * scores.shape[1]))
        accept = jax.vmap(lambda reward, u: preference_data.rejection_sample(reward, u, beta=beta, n=n)[0])
        places = np.asarray(accept(np.asarray(scores, np.float32), draws))
        return np.maximum(places, 0), places >= 0

    return sample


@register("protocol", source="RSO, arXiv:2309.06657")
def rso(beta: Positive = 0.5, n: Whole = 8) -> Protocol:
    """Of the K = ``config.rollout.responses`` answers of the policy to a prompt (64 in the paper) rejection sampling
    accepts ``n``, as if they came from the policy tilted by ``exp(score/beta)``; they make n/2 disjoint pairs.

    Args:
      beta: of the sampling; the loss has its own.
      n: an even number.
    """
    if n % 2:
        raise ValueError(f"n must be an even number of at least 2, not {n!r}")
    accepted = rso_sampler(beta, n)

    def choose(verdict: Verdict, k: int, key: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        places, there = accepted(verdict.scores[:, :k], key)
        return places[:, ::2], places[:, 1::2], there[:, ::2] & there[:, 1::2]

    def check(config: ConfigDict) -> None:
        if config.rollout.responses < n:
            raise ValueError(f"config.rollout.responses {config.rollout.responses} are the candidates for n = {n}")

    return compared(Comparison(choose=choose, count=lambda responses: n // 2)).where(check=check)
