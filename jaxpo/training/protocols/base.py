"""What a protocol works with (`Run`, `Tools`), and those that only sample: on policy, dynamic sampling, HAPO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts, TokenStats, take
from jaxpo.objectives import Objective, Protocol
from jaxpo.objectives.base import State
from jaxpo.parallel.distributed import to_host
from jaxpo.policy.transformer import Params
from jaxpo.primitives.aggregation import positive
from jaxpo.primitives.shaping import mixed_groups
from jaxpo.registry import register
from jaxpo.rollout.sampling import EntropyTemperature, SamplingOptions

if TYPE_CHECKING:
    from jaxpo.training.functions import TrainState


@dataclass(frozen=True)
class Run:
    """Everything that changes during a run; what a checkpoint holds.

    state: parameters, optimizer and objective state. slots: parameters of frozen companions by name. tables: a
      protocol's own memory (pytrees of NumPy arrays by name).
    iteration: finished ones. position: prompts drawn so far.
    """

    state: "TrainState"
    slots: dict[str, Params] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    iteration: int = 0
    position: int = 0


class Verdict(NamedTuple):
    """What a judge says of K answers to each of G prompts: scores [G, K], and wins [G, K, K], the probability that the
    first beats the second (1/2 on the diagonal)."""

    scores: np.ndarray
    wins: np.ndarray


class Tools(NamedTuple):
    """What a protocol may call, and the run's sizes.

    prompts, responses: of an iteration. size: training prompts there are. prompt_width, width: P and T.
    draw(run, n) -> (run, indices of the next n training prompts).
    encoded(indices) -> their tokens [n, P], left-padded, and lengths [n].
    sampling(run) -> the options to sample with now.
    generate(params, indices, key, options=None, partner=None, share=0) -> rollouts without rewards, on the mesh; None =
      the configured options. With a ``partner`` they are samples of the geometric mixture ``params^(1 - share)
      partner^share``. Compiled for each number of indices.
    complete(params, tokens [n, P + T], length [n], budget [n], key, options, responses) -> rollouts (NumPy) that go on
      from any left-padded tokens, within so many of T new ones; any n, in batches of ``prompts``.
    scored() -> the shapes of a batch that is generated, judged and scored, as ``before`` gets it.
    reward(rollouts) -> with reward and correct, judged by the completions' text and ``prompt``.
    score(params, rollouts) -> what the policy says of them.
    noise(run, rollouts) -> the gradients of two half-batches before any step (`Workspace.noise`).
    note(name, value): a metric of this iteration. say(text): a message to who watches.
    preferences: the run's preference data; None = it has none.
    draw_units(run, n) -> (run, places of the next n units of the data).
    judge(*columns) -> what ``config.judge`` says of answers to the same prompts, of one or several generated batches.
    objective: what is trained.
    demonstrations(indices) -> the task's own answers to these training prompts (NumPy), one each.
    """

    prompts: int
    responses: int
    size: int
    prompt_width: int
    width: int
    draw: Callable[[Run, int], tuple[Run, np.ndarray]]
    encoded: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    sampling: Callable[[Run], SamplingOptions]
    generate: Callable[..., Rollouts]
    complete: Callable[..., Rollouts]
    scored: Callable[[], Rollouts]
    reward: Callable[[Rollouts], Rollouts]
    score: Callable[[Params, Rollouts], TokenStats]
    noise: Callable[[Run, Rollouts], dict[str, Array]]
    note: Callable[[str, float], None]
    say: Callable[[str], None]
    preferences: Any = None
    draw_units: Callable[[Run, int], tuple[Run, np.ndarray]] | None = None
    judge: Callable[..., Verdict] | None = None
    objective: Objective | None = None
    demonstrations: Callable[[np.ndarray], Rollouts] | None = None


def advance(run: Run, **changes: Any) -> Run:
    """``run`` with some of its fields changed."""
    return replace(run, **changes)


def with_rows(table: np.ndarray, at: np.ndarray | int, rows: np.ndarray | int) -> np.ndarray:
    """A copy of the table with other rows at ``at``."""
    out = table.copy()
    out[at] = rows
    return out


def stacked(parts: Sequence[Rollouts]) -> Rollouts:
    """The rows of NumPy batches of one structure, however many each has: on the host, where no shape is compiled."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def in_batches(
    complete: Callable[..., Rollouts],
    size: int,
    responses: int,
    tokens: np.ndarray,
    length: np.ndarray,
    budget: np.ndarray,
) -> Rollouts:
    """``responses`` completions of each of n rows, by ``complete(i, tokens, length, budget)`` of ``size`` rows at a
    time: the last batch is filled up with rows of budget 0, and cut."""
    parts = []
    for i, start in enumerate(range(0, len(tokens), size)):
        kept = min(size, len(tokens) - start)
        rows = start + np.minimum(np.arange(size), kept - 1)
        left = np.where(np.arange(size) < kept, budget[rows], 0).astype(np.int32)
        out = to_host(complete(i, tokens[rows], length[rows], left))
        parts.append(take(out, np.arange(kept * responses), shared_prompt=responses))
    return stacked(parts)


def sample_once(run: Run, tools: Tools, key: Array) -> tuple[Run, Rollouts]:
    """The next prompts of the epoch, completed and judged: a batch of the run's shape."""
    run, indices = tools.draw(run, tools.prompts)
    return run, tools.reward(tools.generate(run.state.params, indices, key, tools.sampling(run)))


@register("protocol")
def on_policy() -> Protocol:
    """One batch of completions from the current policy an iteration."""
    return Protocol(sample_once)


class NothingLeft(RuntimeError):
    """Dynamic sampling found too few groups with mixed outcomes."""


@register("protocol", id="dapo", source="DAPO, arXiv:2503.14476")
@register("protocol", source="DAPO, arXiv:2503.14476")
def dynamic_sampling(max_batches: int = 10) -> Protocol:
    """Generate until as many groups with mixed outcomes are there as an iteration trains on; the others are never
    trained on.

    Batches keep the run's shape, so nothing is compiled again. Kept groups beyond the number wanted are dropped.

    Raises:
      NothingLeft: (from ``collect``) not enough after ``max_batches`` batches, with the number found.
    """
    positive("config.protocol.max_batches", max_batches)

    def collect(run: Run, tools: Tools, key: Array) -> tuple[Run, Rollouts]:
        kept, found = [], 0
        for i in range(max_batches):
            run, rollouts = sample_once(run, tools, jax.random.fold_in(key, i))
            rollouts = to_host(rollouts)
            mixed = np.asarray(mixed_groups(rollouts.correct, rollouts.group, jnp.ones(rollouts.rows)))
            responses = rollouts.shared_prompt
            groups = np.flatnonzero(mixed.reshape(-1, responses)[:, 0])[: tools.prompts - found]
            rows = (groups[:, None] * responses + np.arange(responses)).reshape(-1)
            part = take(rollouts, rows, shared_prompt=responses)
            kept.append(part.replace(group=part.group + i * tools.prompts))
            found += len(groups)
            if found == tools.prompts:
                tools.note("dynamic_sampling/batches", i + 1)
                return run, stacked(kept)
        raise NothingLeft(
            f"dynamic sampling found {found} of {tools.prompts} groups with mixed outcomes in {max_batches} "
            "batches: the task is (nearly) "
            "solved or unsolved; stop here, take harder prompts, or raise config.protocol.max_batches"
        )

    return Protocol(collect)


SIGNAL = ("q", "s", "high", "low")  # what the objective `hapo` remembers of a batch's entropies


@register("sampler", id="hapo", source="HAPO, arXiv:2509.16591; code of starriver030515/HAPO")
def entropy_temperature(
    state: State,
    tau: float = 0.05,
    T0: float = 1.0,  # noqa: N803 (the card's name)
    official: bool = False,
) -> EntropyTemperature:
    """A temperature for each token by what the objective `hapo` remembers of the previous batch's entropies.

    Raises:
      ValueError: ``state`` is that of another objective.
    """
    absent = [name for name in SIGNAL if name not in state.memory]
    if absent:
        raise ValueError(
            f"protocol 'hapo' reads {', '.join(absent)} from the objective's memory, which is that of hapo: "
            "set config.objective.name to hapo, or config.protocol.name to dapo"
        )
    # Host numbers, so that what is compiled does not hang on where the state lives.
    numbers = {name: np.float32(state.memory[name]) for name in SIGNAL}
    return EntropyTemperature(np.float32(T0), np.float32(tau), numbers, official)


@register("protocol", source="HAPO, arXiv:2509.16591; code of starriver030515/HAPO")
def hapo(tau: float = 0.05, T0: float = 1.0, official: bool = False, max_batches: int = 10) -> Protocol:  # noqa: N803 (the card's name)
    """Dynamic sampling at a temperature for each token, ``T = T0 (1 + tau clip(h, -1, 1))``: h is the place of the
    entropy of what may come next (at T0) among those of the previous optimizer batch, as the objective ``hapo``
    remembers them; T0 before the first. Evaluation samples as configured.

    Args:
      tau: 0.05 in the code, 0.1 in the paper. official: the sign of the release, in which h is never negative.
      max_batches: as in `dynamic_sampling`.
    """
    positive("T0", T0)
    if not 0 <= tau < 1:
        raise ValueError(f"tau must be in [0, 1), or temperatures reach 0; it is {tau}")

    def sampler(options: SamplingOptions, state: State) -> SamplingOptions:
        return options.replace(adaptive=entropy_temperature(state, tau, T0, official))

    def check(config: ConfigDict) -> None:
        if config.sampling.temperature != 1:
            raise ValueError(
                f"config.sampling.temperature must be 1 with protocol 'hapo', not {config.sampling.temperature}: "
                "set the base temperature by config.objective.T0"
            )

    return dynamic_sampling(max_batches)._replace(sampler=sampler, check=check, compiles={"generate": 1})
