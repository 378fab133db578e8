"""Protocols in which a judge compares the policy's own answers: pairs, win rates, games against an opponent."""

from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.arguments import NonNegative, Positive, Share, Whole
from jaxpo.primitives import preference_data
from jaxpo.protocols.comparisons import POLICY, Comparison, Source, compared
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
    """Sample K answers to each prompt from the policy, and let ``config.judge`` compare them.

    Args:
      pairs: which answers become pairs: "best_worst" (None), the best and the worst by score; "random", any two;
        "adjacent", the first and the second, the third and the fourth, and so on. Objectives that read pref_prob or win
        get a pair in this order. Others get the better answer first, and ties do not count.
      margin: a pair does not count if its scores differ by at most this much.
      label_threshold: for objectives that read labels (KTO): an answer is good if its score is above it. None: an
        answer is good if it beats the other answers to the prompt with a mean probability above 1/2; an answer at
        exactly 1/2 does not count.
      prev_every, ref_every: as in `preference_data`.
    """
    return compared(Comparison(pairs=pairs, margin=margin, threshold=label_threshold), rounds(prev_every, ref_every))


@register("protocol", source="IPO-MD, arXiv:2403.08635")
def ipo_md(beta: Share = 0.125, pairs: Rule | None = None) -> Protocol:
    """Sample pairs of answers from the geometric mixture ``pi^(1 - beta) ref^beta``, token by token.

    Args:
      pairs: as in `judged`; None = random.
    """
    return compared(Comparison(Source(partner="ref", share=beta), pairs=pairs, unasked="random"))


@register("protocol", source="Nash-MD-PG, arXiv:2312.00886")
def nash_md(mixture: Share = 0.125) -> Protocol:
    """Judge the policy's answers against as many of the geometric mixture ``pi^(1 - mixture) ref^mixture``."""
    return compared(Comparison(opponent=Source(partner="ref", share=mixture)))


@register("protocol", source="Nash-EMA-PG, arXiv:2312.00886")
def nash_ema(b: Share = 0.999) -> Protocol:
    """Judge the policy's answers against as many of the average ``theta_bar <- (1 - b) theta + b theta_bar``."""
    return compared(Comparison(opponent=Source(lambda run: run.references["ema"])), {"ema": {"b": b}})


@register("sampler", source="RSO, arXiv:2309.06657")
def rso_sampler(beta: Positive = 0.5, n: Whole = 8) -> Callable[[np.ndarray, Array], tuple[np.ndarray, np.ndarray]]:
    """Rejection sampling: ``(scores [G, C], key) -> (places [G, n], there [G, n])``.

    places: indices of the accepted candidates, in the order of acceptance
      (`jaxpo.primitives.preference_data.rejection_sample`).
    there: whether there is one.
    """

    def sample(scores: np.ndarray, key: Array) -> tuple[np.ndarray, np.ndarray]:
        draws = jax.random.uniform(key, (len(scores), n * scores.shape[1]))
        accept = jax.vmap(lambda reward, u: preference_data.rejection_sample(reward, u, beta=beta, n=n)[0])
        places = np.asarray(accept(np.asarray(scores, np.float32), draws))
        return np.maximum(places, 0), places >= 0

    return sample


def at_random(places: np.ndarray, there: np.ndarray, key: Array) -> tuple[np.ndarray, np.ndarray]:
    """(places, there), [G, n] each, in a random order of each prompt: those that are there come first."""
    order = np.argsort(np.where(there, np.asarray(jax.random.uniform(key, there.shape)), 2.0), -1)
    return np.take_along_axis(places, order, -1), np.take_along_axis(there, order, -1)


@register("protocol", source="RSO, arXiv:2309.06657")
def rso(beta: Positive = 0.5, n: Whole = 8, candidates: Literal["ref", "policy"] = "ref") -> Protocol:
    """Accept ``n`` of K = ``config.rollout.responses`` answers to a prompt (64 in the paper) by rejection sampling, as
    if they came from their model tilted by ``exp(score/beta)``; they make n/2 disjoint pairs at random. The better
    answer of a pair is the chosen one, and a tie does not count.

    Args:
      beta: temperature of the rejection sampling; the loss has its own beta.
      n: an even number.
      candidates: who answers: "ref", the policy at the start of the run (the paper's SFT policy), or the "policy".
    """
    if n % 2:
        raise ValueError(f"n must be an even number of at least 2, not {n!r}")
    accepted = rso_sampler(beta, n)

    def choose(verdict: Verdict, k: int, key: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        draw_key, pair_key = jax.random.split(key)
        places, there = at_random(*accepted(verdict.scores[:, :k], draw_key), pair_key)
        return places[:, ::2], places[:, 1::2], there[:, ::2] & there[:, 1::2]

    def check(config: ConfigDict) -> None:
        if config.rollout.responses < n:
            raise ValueError(
                f"config.rollout.responses {config.rollout.responses} must be at least config.protocol.n = {n}: the "
                "responses are the candidates"
            )
        if candidates == "ref" and config.training.offload_reference:
            raise ValueError(
                "config.training.offload_reference keeps the reference on the host, but the candidates of protocol "
                "'rso' are sampled from it: set it to False, or config.protocol.candidates to policy"
            )

    who = Source(lambda run: run.references["ref"]) if candidates == "ref" else POLICY
    keeps = {"ref": {}} if candidates == "ref" else {}
    return compared(Comparison(who, choose=choose, count=lambda responses: n // 2), keeps).where(check=check)
