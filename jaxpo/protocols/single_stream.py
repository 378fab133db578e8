"""One response to each prompt; its baseline is a value of the prompt that is kept across batches."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.arguments import Count, OpenShare, Positive, PositiveShare
from jaxpo.batch import Rollouts
from jaxpo.learning.state import Run, advance
from jaxpo.objectives.grammar.base import check_rewards
from jaxpo.parallel.distributed import to_host
from jaxpo.primitives import trackers
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.protocols.rows import with_rows
from jaxpo.registry import register


@register("sampler", id="spo_single_stream", source="SPO (Tencent), arXiv:2509.13232")
def prioritized(floor: Positive = 0.05) -> Callable[[Array, int, Array], np.ndarray]:
    """``(values v [N], n, key) -> indices [n]``: draw prompts without replacement, with weights ``sqrt(v (1 - v)) +
    floor``."""

    def sample(value: Array, n: int, key: Array) -> np.ndarray:
        weight = trackers.prompt_weights(value, floor=floor)
        return np.asarray(jax.random.choice(key, len(weight), (n,), replace=False, p=weight / weight.sum()), np.int32)

    return sample


class Tracking(NamedTuple):
    """How prompts are drawn, and how fast their values forget the past: the options of `spo_single_stream`.

    draw: (values [N], n, key) -> indices [n] of prompts.
    """

    n0: int
    d_half: float
    rho_min: float
    rho_max: float
    draw: Callable[[Array, int, Array], np.ndarray]


@register("protocol", source="SPO (Tencent), arXiv:2509.13232; verl-recipe spo")
def spo_single_stream(
    n0: Count = 8,
    d_half: Positive = 0.06,
    rho_min: OpenShare = 0.875,
    rho_max: PositiveShare = 0.96,
    floor: Positive = 0.05,
) -> Protocol:
    """Draw prompts without replacement, with weights ``sqrt(v (1 - v)) + floor``, and sample one response to each. The
    value ``v = alpha/(alpha + beta)`` of each prompt goes into the batch as ``tracker_value`` [B], and is updated after
    the iteration.

    Tables, for n training prompts: alpha, beta [n]; tokens, mask [n, T] of the latest response, and its logp [n, T]
    under the policy right after it was trained on; seen [n]. After an iteration ``D`` = mean over the *previous*
    response's tokens of ``|logp - logp_now|`` (0 on the first visit), ``rho = clip(2^(-D/d_half), rho_min, rho_max)``,
    ``alpha <- rho alpha + reward``, ``beta <- rho beta + 1 - reward``.

    Args:
      n0: offline samples of every prompt before the first iteration; 0 = none (v = 1/2).
      d_half, rho_min, rho_max: how fast the past is forgotten.
      floor: the least weight of a prompt.
    """
    if rho_min > rho_max:
        raise ValueError(f"rho_max must be at least rho_min, not {rho_max} beside {rho_min}")
    how = Tracking(n0, d_half, rho_min, rho_max, prioritized(floor))
    facts = Facts(provides=frozenset({"tracker_value"}), check=check)
    hooks = dict(after=partial(after, how), init=partial(init, how), tables=tables)
    return Protocol(partial(collect, how), **hooks, facts=facts)


def tables(gather: Gatherer) -> dict[str, np.ndarray]:
    """The tables at the start: every value 1/2, no response seen."""
    n, t = gather.size, gather.width
    if n < gather.prompts:
        raise ValueError(
            f"config.rollout.prompts {gather.prompts} is more than the {n} training prompts; protocol "
            "'spo_single_stream' draws them without replacement"
        )
    response = dict(tokens=np.zeros((n, t), np.int32), mask=np.zeros((n, t), np.float32))
    response["logp"] = np.zeros((n, t), np.float32)
    half = np.full(n, 0.5, np.float32)
    return dict(alpha=half, beta=half.copy(), seen=np.zeros(n, np.float32), **response)


def sample(run: Run, gather: Gatherer, indices: np.ndarray, key: Array) -> Rollouts:
    """Sample completions and reward them; the rewards must lie in [0, 1]."""
    rollouts = gather.reward(gather.generate(run.state.params, indices, key, gather.sampling(run)))
    check_rewards((0.0, 1.0), rollouts)
    return rollouts


def init(how: Tracking, run: Run, gather: Gatherer, key: Array) -> Run:
    """Estimate the values of all prompts from ``n0`` offline samples of each."""
    n0 = how.n0
    if n0 == 0:
        return run
    every = np.repeat(np.arange(gather.size), n0)
    batches = -(-len(every) // gather.prompts)
    rows = np.resize(every, (batches, gather.prompts))  # filled up from the first prompts, and cut
    gather.say(f"offline samples: {n0} of each of {gather.size} prompts, in {batches} batches")
    rewards = [sample(run, gather, part, jax.random.fold_in(key, i)).reward for i, part in enumerate(rows)]
    successes = np.concatenate([np.asarray(r) for r in rewards])[: len(every)].reshape(-1, n0).sum(1)
    gather.say(f"offline samples: mean reward {successes.mean() / n0:.3f}")
    alpha, beta = jax.tree.map(np.asarray, trackers.tracker_init(successes, n0, rho_min=how.rho_min))
    return advance(run, tables={**run.tables, "alpha": alpha, "beta": beta})


def collect(how: Tracking, run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
    """Draw prompts and sample one response to each; the batch holds the prompts' values."""
    draw_key, key = jax.random.split(key)
    value = trackers.tracker_value(run.tables["alpha"], run.tables["beta"])
    indices = how.draw(value, gather.prompts, draw_key)
    rollouts = sample(run, gather, indices, key)
    known = dict(tracker_value=np.asarray(value)[indices], tracker_reward=rollouts.reward)  # before any shaping
    return advance(run, position=run.position + gather.prompts), rollouts.replace(**known)


def after(how: Tracking, run: Run, gather: Gatherer, rollouts: Rollouts) -> Run:
    """Update the values of the prompts, and keep the responses."""
    rollouts, params = to_host(rollouts), run.state.params
    at, now = rollouts.prompt, {"tokens": rollouts.completions, "mask": rollouts.mask}
    now["logp"] = to_host(gather.score(params, rollouts).logp)
    drift = drift_of(run.tables, at, gather, params, rollouts)
    rho = trackers.forgetting(drift, d_half=how.d_half, rho_min=how.rho_min, rho_max=how.rho_max)
    old = run.tables["alpha"][at], run.tables["beta"][at]
    alpha, beta = trackers.tracker_update(*old, rollouts.get("tracker_reward"), rho)
    new = {**now, "alpha": np.asarray(alpha), "beta": np.asarray(beta), "seen": np.ones(len(at), np.float32)}
    gather.note("tracker/value", float(trackers.tracker_value(alpha, beta).mean()))
    gather.note("tracker/drift", float(drift.mean()))
    gather.note("tracker/rho", float(rho.mean()))
    return advance(run, tables={name: with_rows(x, at, new[name]) for name, x in run.tables.items()})


def check(config: ConfigDict) -> None:
    """Raise ``ValueError`` for more than one response to a prompt."""
    if config.rollout.responses != 1:
        raise ValueError(
            f"config.rollout.responses must be 1 with protocol 'spo_single_stream', not {config.rollout.responses}"
        )


def drift_of(tables: dict[str, Any], at: np.ndarray, gather: Gatherer, params: Any, rollouts: Rollouts) -> np.ndarray:
    """[B] mean of ``|logp_then - logp_now|`` over the tokens of each prompt's previous response; 0 without one."""
    if not tables["seen"][at].any():
        return np.zeros(len(at), np.float32)
    mask = tables["mask"][at]
    prompts = rollouts.tokens[:, : rollouts.prompt_width]
    previous = rollouts.replace(tokens=np.concatenate([prompts, tables["tokens"][at]], 1), mask=mask)
    gap = np.abs(to_host(gather.score(params, previous).logp) - tables["logp"][at])
    return np.where(mask > 0, gap, 0).sum(1) / np.maximum(mask.sum(1), 1)
