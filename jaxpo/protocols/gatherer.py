"""The `Gatherer`: what a protocol calls to draw prompts and to complete, judge and score them.

The loop and a race give protocols the same class, with another `Sampler`, order of prompts and verifier.
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
from jaxpo.parallel.distributed import from_rows, own_rows, to_host
from jaxpo.policy.transformer import Params
from jaxpo.primitives.preference_data import ranker_reward
from jaxpo.protocols.rows import in_batches
from jaxpo.rollout.sampling import SamplingOptions, validate
from jaxpo.tasks import Example
from jaxpo.tasks.failures import Failures
from jaxpo.tasks.workers import attempt
from jaxpo.text.conversations import Question


class Verdict(NamedTuple):
    """The judge's scores of K answers to each of G prompts.

    scores: [G, K] score of each answer.
    wins: [G, K, K] probability that the first answer beats the second; 1/2 on the diagonal.
    log_odds: [G, K, K] log-odds of ``wins``, unbounded, from a judge that computes them; None = from ``wins``.
    errors: [G] why the judge failed on the prompt (its answers then count as equally good), or None; () = on none.
    """

    scores: np.ndarray
    wins: np.ndarray
    errors: Sequence[str | None] = ()
    log_odds: np.ndarray | None = None

    @property
    def preference(self) -> np.ndarray:
        """[G, K, K] the log-odds that the first answer beats the second. Of a judge that gives probabilities alone,
        these are clipped to [1e-6, 1 - 1e-6] first, so that the log-odds are finite."""
        return np.asarray(ranker_reward(self.wins) if self.log_odds is None else self.log_odds)


class Codec(NamedTuple):
    """Between tokens and texts.

    read: (rollouts) -> the texts of the completions.
    ask: (examples, questions) -> the tokens of other questions about these examples.
    answer: (example, text) -> the tokens of an answer, with its end.
    """

    read: Callable[[Rollouts], Sequence[str]]
    ask: Callable[[Sequence[Example], Sequence[Question]], list[list[int]]]
    answer: Callable[[Example, str], list[int]]


@dataclass(frozen=True)
class Prompts:
    """Tokenized prompts.

    examples: ``examples[i]`` belongs to row i.
    tokens: [n, P], left-padded.
    length: [n] number of tokens.
    """

    examples: Sequence[Example]
    tokens: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, indices: np.ndarray) -> "Prompts":
        """The prompts with these indices."""
        return Prompts([self.examples[i] for i in indices], self.tokens[indices], self.length[indices])


class Sampler(NamedTuple):
    """The functions that sample and score rows.

    generate: (params, indices, key, options, partner, share) -> labelled rollouts without rewards.
    complete: (params, tokens, length, budget, key, options, responses) -> `Rollouts` of one batch of rows.
    score: (params, rollouts) -> the policy's `TokenStats` of them.
    noise: (run, rollouts, halves) -> numbers that compare the gradients of two half-batches; None = not available.
    shapes: () -> the shapes of a batch after it is generated, judged and scored; None = not available.
    """

    generate: Callable[..., Rollouts]
    complete: Callable[..., Rollouts]
    score: Callable[[Params, Rollouts], TokenStats]
    noise: Callable[..., dict[str, Array]] | None = None
    shapes: Callable[[], Rollouts] | None = None


@dataclass(frozen=True)
class Watch:
    """Collects times, metrics and messages of an iteration.

    say: shows a message to the user.
    seconds: wall time by phase.
    notes: metrics of the iteration.
    """

    say: Callable[[str], None] = print
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    notes: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the ``with`` block to a phase. An error in it gets a note that names the phase."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            error.add_note(f"phase: {name}")
            raise
        self.seconds[name] += time.perf_counter() - start

    def add(self, name: str, value: float) -> None:
        """Add to a metric of the iteration."""
        self.notes[name] = self.notes.get(name, 0) + value


@dataclass(frozen=True)
class Gatherer:
    """The functions that a protocol may call, and the sizes of the run.

    objective: the objective that is trained.
    train: the training prompts.
    prompts: number of prompts in an iteration.
    responses: number of completions of a prompt.
    width: T, the most tokens of a completion.
    options: the configured sampling options.
    sampler: samples and scores rows.
    order: (position, n, size) -> the indices of the next n of ``size`` prompts or units.
    verify: (rollouts) -> the rollouts with reward and correct.
    compare: (examples, *columns of rollouts) -> the verdict of ``config.judge`` on answers to the same prompts.
    demonstrate: (indices, drop_last, seed) -> the task's own answers to these training prompts, one each.
    codec: between tokens and texts.
    failures: where errors of the user's functions are told.
    adapt: the protocol's ``sampler``: (options, objective state) -> options; None = as configured.
    preferences: the run's preference data; None = the run has none.
    watch: collects times, metrics and messages.
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
    demonstrate: Callable[..., Rollouts]
    codec: Codec
    adapt: Callable[[SamplingOptions, State], SamplingOptions] | None = None
    preferences: Any = None
    watch: Watch = field(default_factory=Watch)
    failures: Failures = field(default_factory=Failures)

    @property
    def size(self) -> int:
        """Number of training prompts."""
        return len(self.train)

    @property
    def prompt_width(self) -> int:
        """P, the width of the padded prompts."""
        return self.train.tokens.shape[1]

    # ---- drawing prompts and data

    def draw(self, run: Run, n: int) -> tuple[Run, np.ndarray]:
        """Draw the next n training prompts: the advanced run, and their indices."""
        return advance(run, position=run.position + n), self.order(run.position, n, len(self.train))

    def draw_units(self, run: Run, n: int) -> tuple[Run, np.ndarray]:
        """Draw the next n units of preference data: the advanced run, and their indices."""
        return advance(run, position=run.position + n), self.order(run.position, n, len(self.preferences.train))

    def encoded(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens [n, P] of training prompts, left-padded, and their lengths [n]."""
        return self.train.tokens[indices], self.train.length[indices]

    def demonstrations(self, indices: np.ndarray, drop_last: float = 0.0, seed: int = 0) -> Rollouts:
        """The task's own answers to these training prompts (NumPy), one each; a share ``drop_last`` of them lacks the
        last character."""
        return self.demonstrate(indices, drop_last, seed).replace(prompt=indices)

    def texts(self, rollouts: Rollouts) -> list[str]:
        """The completions as text, without special tokens and cut before a stop string."""
        return list(self.codec.read(to_host(Rollouts(tokens=rollouts.tokens, mask=rollouts.mask))))

    def rewritten(
        self, rows: np.ndarray, width: int, write: Callable[[int], Question | None], field: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Other questions in place of training prompts: tokens [n, width], left-padded, and lengths [n]; 0 = there is
        none, or it is longer. Each process writes its share, and every process gets all.

        Args:
          rows: [n] indices of the training prompts.
          write: (i) -> the question for ``rows[i]``, or None.
          field: of the config, which says how questions are written.

        Raises:
          ValueError: a question has no encoding, or the chat template refuses it; the line names ``field``."""
        own = own_rows(rows)
        questions = [write(i) for i in own]
        there = [i for i, q in enumerate(questions) if q is not None]
        try:
            examples = [self.train.examples[rows[own[i]]] for i in there]
            ids = self.codec.ask(examples, [questions[i] for i in there])
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
        tokens, length = np.zeros((len(own), width)), np.zeros(len(own))
        for i, x in zip(there, ids, strict=True):
            if len(x) <= width:
                tokens[i, width - len(x) :], length[i] = x, len(x)
        return tuple(from_rows(x, own, len(rows)).astype(np.int32) for x in (tokens, length))

    def call(self, what: str, function: Callable[..., Any], calls: Sequence[tuple]) -> list[Any]:
        """What a function of the user gives for each call; None where it failed.

        Raises:
          NoVerdict: it failed on every call."""
        outcomes = [attempt(function, call) for call in calls]
        errors = [o.error for o in outcomes]
        self.failures.tell(what, errors)
        failed = sum(e is not None for e in errors)
        self.watch.add(f"{what.split()[0]}/errors", failed)
        self.failures.check_any(what, failed, len(calls))
        return [o.value for o in outcomes]

    # ---- sampling

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
        """Sample completions of training prompts, without rewards. Compiled for each number of indices.

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
        """Continue any left-padded tokens [n, P + T] by at most ``budget`` [n] new tokens each. Returns rollouts
        (NumPy). n may be any number: the rows go through in batches of ``prompts``."""

        def batch(i: int, *rows: np.ndarray) -> Rollouts:
            return self.sampler.complete(params, *rows, jax.random.fold_in(key, i), options, responses)

        with self.watch.phase("generate"):
            return in_batches(batch, self.prompts, responses, tokens, length, budget)

    # ---- rewards, verdicts and scores

    def reward(self, rollouts: Rollouts) -> Rollouts:
        """Add reward and correct to the rollouts, from the text of the completions and from ``prompt``."""
        with self.watch.phase("reward"):
            return self.verify(rollouts)

    def judge(self, *columns: Rollouts) -> Verdict:
        """Let ``config.judge`` compare answers to the same prompts, from one or several generated batches."""
        with self.watch.phase("reward"):
            return self.compare(self.train.examples, *columns)

    def score(self, params: Params, rollouts: Rollouts) -> TokenStats:
        """Score the rollouts under a policy: log-probs and other statistics of each token."""
        with self.watch.phase("score"):
            return jax.block_until_ready(self.sampler.score(params, rollouts))

    def noise(self, run: Run, rollouts: Rollouts) -> dict[str, Array]:
        """Compare the gradients of two half-batches before any step (`jaxpo.learning.programs.gradient_noise`)."""
        if self.sampler.noise is None:
            raise ValueError("a race does not measure the gradient's noise; train the objective with train_rl")
        groups = np.arange(rollouts.rows, dtype=np.int32).reshape(-1, rollouts.shared_prompt)
        halves = np.stack([groups[::2].reshape(-1), groups[1::2].reshape(-1)])
        with self.watch.phase("noise"):
            return jax.block_until_ready(self.sampler.noise(run, rollouts, halves))

    def scored(self) -> Rollouts:
        """The shapes of a batch after it is generated, judged and scored, as ``before`` gets it."""
        if self.sampler.shapes is None:
            raise ValueError("a race does not mix batches; train the objective with train_rl")
        return self.sampler.shapes()

    def note(self, name: str, value: float) -> None:
        """Record a metric of this iteration."""
        self.watch.notes[name] = value

    def say(self, text: str) -> None:
        """Show a message to the user."""
        self.watch.say(text)
