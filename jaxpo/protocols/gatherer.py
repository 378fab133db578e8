"""What a protocol may call: prompts are drawn, completed, judged and scored by a `Gatherer`.

The loop and a race hand protocols the same class; they differ in the `Sampler`, the order of prompts and the verifier.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.learning.state import Run, advance
from jaxpo.objectives import Objective, State
from jaxpo.policy.transformer import Params
from jaxpo.protocols.rows import in_batches
from jaxpo.rollout.sampling import SamplingOptions, validate
from jaxpo.tasks import Example


class Verdict(NamedTuple):
    """What a judge says of K answers to each of G prompts.

    scores: [G, K].
    wins: [G, K, K], the probability that the first beats the second; 1/2 on the diagonal.
    """

    scores: np.ndarray
    wins: np.ndarray


@dataclass(frozen=True)
class Prompts:
    """Tokenized prompts: tokens [n, P] left-padded, length [n]; ``examples[i]`` belongs to row i."""

    examples: Sequence[Example]
    tokens: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, indices: np.ndarray) -> "Prompts":
        """The prompts with these indices."""
        return Prompts([self.examples[i] for i in indices], self.tokens[indices], self.length[indices])


class Sampler(NamedTuple):
    """How rows are sampled and scored, whatever they are compiled for.

    generate: (params, indices, key, options, partner, share) -> labelled rollouts without rewards.
    complete: (params, tokens, length, budget, key, options, responses) -> `Rollouts` of one batch of rows.
    score: (params, rollouts) -> what the policy says of them.
    noise: (run, rollouts, halves) -> the gradients of two half-batches, as numbers.
    shapes: () -> the shapes of a batch that is generated, judged and scored.
    """

    generate: Callable[..., Rollouts]
    complete: Callable[..., Rollouts]
    score: Callable[[Params, Rollouts], TokenStats]
    noise: Callable[..., dict[str, Array]] | None = None
    shapes: Callable[[], Rollouts] | None = None


@dataclass(frozen=True)
class Watch:
    """Where an iteration tells what it did.

    seconds: wall time by phase.
    notes: metrics of the iteration.
    say: messages to who watches.
    """

    say: Callable[[str], None] = print
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    notes: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def add(self, name: str, value: float) -> None:
        """Adds to a metric of the iteration."""
        self.notes[name] = self.notes.get(name, 0) + value


@dataclass(frozen=True)
class Gatherer:
    """What a protocol may call, and the sizes of the run.

    objective: what is trained.
    train: the training prompts.
    prompts: prompts of an iteration.
    responses: completions of a prompt.
    width: T, tokens of a completion.
    options: the configured sampling options.
    adapt: the protocol's ``sampler``: options that follow what the objective remembers; None = as configured.
    sampler: how rows are sampled and scored.
    order: (position, n, size) -> the indices of the next n of ``size`` prompts or units.
    verify: (rollouts) -> rollouts with reward and correct.
    compare: (examples, *columns of rollouts) -> what ``config.judge`` says of answers to the same prompts.
    demonstrate: (indices) -> the task's own answers to these training prompts, one each.
    preferences: the run's preference data; None = it has none.
    watch: where it tells what it did.
    """

    objective: Objective
    train: Prompts
    prompts: int
    responses: int
    width: int
    options: SamplingOptions
    sampler: Sampler
    order: Callable[[int, int, int], np.ndarray]
    verify: Callable[[Rollouts], Rollouts]
    compare: Callable[..., Verdict]
    demonstrate: Callable[[np.ndarray], Rollouts]
    adapt: Callable[[SamplingOptions, State], SamplingOptions] | None = None
    preferences: Any = None
    watch: Watch = field(default_factory=Watch)

    @property
    def size(self) -> int:
        """Training prompts that there are."""
        return len(self.train)

    @property
    def prompt_width(self) -> int:
        """P."""
        return self.train.tokens.shape[1]

    # ---- what is gathered

    def draw(self, run: Run, n: int) -> tuple[Run, np.ndarray]:
        """The indices of the next n training prompts."""
        return advance(run, position=run.position + n), self.order(run.position, n, len(self.train))

    def draw_units(self, run: Run, n: int) -> tuple[Run, np.ndarray]:
        """The places of the next n units of preference data."""
        return advance(run, position=run.position + n), self.order(run.position, n, len(self.preferences.train))

    def encoded(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens [n, P] of training prompts, left-padded, and their lengths [n]."""
        return self.train.tokens[indices], self.train.length[indices]

    def demonstrations(self, indices: np.ndarray) -> Rollouts:
        """The task's own answers to these training prompts (NumPy), one each."""
        return self.demonstrate(indices).replace(prompt=indices)

    # ---- what is sampled

    def sampling(self, run: Run) -> SamplingOptions:
        """The options to sample with now."""
        return validate(self.adapt(self.options, run.state.objective)) if self.adapt else self.options

    def generate(
        self,
        params: Params,
        indices: np.ndarray,
        key: Array,
        options: SamplingOptions | None = None,
        partner: Params | None = None,
        share: float = 0.0,
    ) -> Rollouts:
        """Completions of training prompts, without rewards. Compiled for each number of indices.

        Args:
          options: None = the configured ones.
          partner, share: sample from the geometric mixture ``params^(1 - share) partner^share``.
        """
        with self.watch.phase("generate"):
            out = self.sampler.generate(params, indices, key, options or self.options, partner, share)
            return jax.block_until_ready(out)

    def complete(
        self,
        params: Params,
        tokens: np.ndarray,
        length: np.ndarray,
        budget: np.ndarray,
        key: Array,
        options: SamplingOptions,
        responses: int,
    ) -> Rollouts:
        """Rollouts (NumPy) that go on from any left-padded tokens [n, P + T], each within ``budget`` [n] new tokens;
        any n, in batches of ``prompts``."""

        def batch(i: int, *rows: np.ndarray) -> Rollouts:
            return self.sampler.complete(params, *rows, jax.random.fold_in(key, i), options, responses)

        with self.watch.phase("generate"):
            return in_batches(batch, self.prompts, responses, tokens, length, budget)

    # ---- what is said of it

    def reward(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts with reward and correct, by the text of the completions and ``prompt``."""
        with self.watch.phase("reward"):
            return self.verify(rollouts)

    def judge(self, *columns: Rollouts) -> Verdict:
        """What ``config.judge`` says of answers to the same prompts, of one or several generated batches."""
        with self.watch.phase("reward"):
            return self.compare(self.train.examples, *columns)

    def score(self, params: Params, rollouts: Rollouts) -> TokenStats:
        """What a policy says of the rollouts."""
        with self.watch.phase("score"):
            return jax.block_until_ready(self.sampler.score(params, rollouts))

    def noise(self, run: Run, rollouts: Rollouts) -> dict[str, Array]:
        """The gradients of two half-batches before any step, as numbers (`jaxpo.learning.programs.gradient_noise`)."""
        if self.sampler.noise is None:
            raise ValueError("a race does not measure the gradient's noise; train the objective with train_rl")
        groups = np.arange(rollouts.rows, dtype=np.int32).reshape(-1, rollouts.shared_prompt)
        halves = np.stack([groups[::2].reshape(-1), groups[1::2].reshape(-1)])
        with self.watch.phase("noise"):
            return jax.block_until_ready(self.sampler.noise(run, rollouts, halves))

    def scored(self) -> Rollouts:
        """The shapes of a batch that is generated, judged and scored, as ``before`` gets it."""
        if self.sampler.shapes is None:
            raise ValueError("a race does not mix batches; train the objective with train_rl")
        return self.sampler.shapes()

    def note(self, name: str, value: float) -> None:
        """A metric of this iteration."""
        self.watch.notes[name] = value

    def say(self, text: str) -> None:
        """A message to who watches."""
        self.watch.say(text)
