"""Protocols that move the weights themselves: half steps, proximal stages, extrapolation between rounds."""

from typing import Any, Literal

import jax
from jax import Array

from jaxpo.arguments import ShareBelowOne, Whole
from jaxpo.batch import Rollouts
from jaxpo.learning.references import copied
from jaxpo.learning.state import Run, advance
from jaxpo.primitives import preferences
from jaxpo.protocols.comparisons import Comparison, Source, compared
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.judged import Rule, judged
from jaxpo.protocols.preference_data import preference_data
from jaxpo.protocols.protocol import Protocol
from jaxpo.registry import register

extrapolated = jax.jit(preferences.extrapolate)


def backed_up(run: Run) -> Run:
    """Copy the run's parameters and optimizer state into the slot "center"."""
    center = dict(params=copied(run.state.params), opt_state=copied(run.state.opt_state))
    return advance(run, references={**run.references, "center": center})


def gone_back(run: Run) -> Run:
    """Restore parameters and optimizer state from the slot "center" (copies, since a step donates its input)."""
    center = copied(run.references["center"])
    return advance(run, state=run.state.replace(**center))


@register("protocol", source="EGPO, arXiv:2503.08942; zhourunlong/EGPO")
def egpo(pairs: Rule | None = None) -> Protocol:
    """Extragradient: two iterations make a step. The first backs up weights and optimizer state, samples with
    ``theta_t`` and steps to ``theta_{t+1/2}``; the second samples with ``theta_{t+1/2}``, restores the backup, and
    steps from ``theta_t`` to ``theta_{t+1}``. The pairs are sampled as ``config.sampling`` says (the paper: temperature
    2, top-k 10), the opponent's answers at temperature 1.

    Args:
      pairs: as in `judged`; None = random.
    """
    comparison = Comparison(opponent=Source(plain=True), pairs=pairs, unasked="random")
    inner = compared(comparison, {"center": {}})

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        if run.iteration % 2 == 0:
            return inner.collect(backed_up(run), gather, key)
        run, batch = inner.collect(run, gather, key)
        return gone_back(run), batch

    def check(config: Any) -> None:
        if config.steps % 2:
            raise ValueError(
                f"config.steps must be even with protocol 'egpo', which takes two iterations a step, not {config.steps}"
            )
        inner.facts.check(config)

    return inner._replace(collect=collect).where(check=check)


@register("protocol", source="Nash Mirror Prox, arXiv:2505.19731 (stages of a few steps are assumed)")
def nash_mp(stage: Whole = 4) -> Protocol:
    """Mirror prox: a round has two stages of ``stage`` iterations, and both start from the center ``theta_k``. In the
    first stage the opponent is the center itself; the stage ends in ``theta_{k+1/2}``. The second stage restores the
    center's weights and optimizer state, and plays against ``theta_{k+1/2}``. ``logp_old`` is scored by the center.

    Args:
      stage: iterations of a stage (assumed: 1 to 10).
    """

    def opponent(run: Run) -> Any:
        first = run.iteration % (2 * stage) < stage
        return run.references["center"]["params"] if first else run.references["half"]

    inner = compared(Comparison(opponent=Source(opponent)), {"center": {}, "half": {}})

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        at = run.iteration % (2 * stage)
        if at == 0:
            run = backed_up(run)
        if at == stage:
            run = gone_back(advance(run, references={**run.references, "half": copied(run.state.params)}))
        return inner.collect(run, gather, key)

    def before(run: Run, gather: Gatherer, rollouts: Rollouts) -> tuple[Run, Rollouts]:
        center = gather.score(run.references["center"]["params"], rollouts)
        return run, rollouts.replace(logp_old=center.logp)

    def check(config: Any) -> None:
        if config.steps % (2 * stage):
            raise ValueError(
                f"config.steps must be a multiple of {2 * stage}, the iterations of a round of protocol 'nash_mp' with "
                f"stage = {stage}, not {config.steps}"
            )
        inner.facts.check(config)

    # ``logp_old`` comes from the center, not from the policy that the first optimizer step starts from.
    return inner._replace(collect=collect, before=before).where(check=check, stale=True)


@register("protocol", source="APO, arXiv:2410.06293 (reconstructed from the paper's text; alpha assumed)")
def apo_accelerated(
    alpha: ShareBelowOne = 0.3, iterations: Whole = 1, source: Literal["data", "judged"] = "data"
) -> Protocol:
    """Accelerated preference optimization: after every round the weights are extrapolated, ``pi_{t+1} = hat_{t+1} +
    alpha (hat_{t+1} - hat_t)``. This extrapolates the policies only where log-probs are linear in the weights.
    ``pi_{t+1}`` is the start and the reference of the next round. Reconstructed from the paper's text.

    Args:
      alpha: in [0, 1); 0 is iterative DPO.
      iterations: iterations of a round.
      source: where the pairs come from: "data" (`preference_data`) or "judged" (`judged`).
    """
    inner = preference_data() if source == "data" else judged()

    def after(run: Run, gather: Gatherer, rollouts: Rollouts) -> Run:
        if (run.iteration + 1) % iterations:
            return run
        hat = run.state.params
        policy = extrapolated(hat, run.references["hat"], alpha)
        frozen = {**run.references, "hat": copied(hat)}
        if "ref" in frozen:
            frozen["ref"] = copied(policy)
        return advance(run, state=run.state.replace(params=policy), references=frozen)

    return inner._replace(after=after).where(references={"hat": {}})
