"""How the seeds of a race gather and learn: `jaxpo.runs.iteration` on runs with a leading axis of seeds.

Where the protocol only samples, all seeds sample at once in one compiled function (`Together`). Any other protocol
gathers seed after seed, with a gatherer for each (`InTurn`). The optimizer steps are those of all seeds at once either
way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpo.batch import Rollouts, TokenStats, take
from jaxpo.config.resolved import Resolved
from jaxpo.learning import references
from jaxpo.learning.needs import derived_needs
from jaxpo.learning.programs import optimizer_of
from jaxpo.learning.state import Run, TrainState, advance
from jaxpo.learning.step import optimizer_step, score
from jaxpo.objectives import Objective
from jaxpo.policy import heads, stats
from jaxpo.policy.transformer import Model, Params
from jaxpo.protocols.gatherer import Gatherer, Sampler, Watch
from jaxpo.protocols.on_policy import sample_once
from jaxpo.protocols.protocol import NothingLeft
from jaxpo.protocols.rows import as_scored, labelled
from jaxpo.race.rules import Rules, reads_data
from jaxpo.race.setup import EVERYTHING, QUICK, Course, Draws, Setup, draws, options_of, verified
from jaxpo.rollout import SamplingOptions
from jaxpo.runs.iteration import Stage, finish, gather, iterate, learn, score_references
from jaxpo.runs.judges.judge import verified as by_the_task
from jaxpo.runs.preference_data import Preferences
from jaxpo.tasks.preferences.encode import as_kind, encode
from jaxpo.tasks.preferences.verified import verified_pairs


@jax.jit
def one(tree: Any, seed: int) -> Any:
    """The leaves of one seed."""
    return jax.tree.map(lambda x: x[seed], tree)


@jax.jit
def together(trees: list[Any]) -> Any:
    """The leaves of all seeds, [S, ...]."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def steps_of(draws: Draws, batch: Rollouts) -> list[np.ndarray]:
    """The rows [S, R] of each optimizer step of an iteration."""
    return [draws.rows[:, step] for step in range(draws.rows.shape[1])]


class Together:
    """All seeds sample at once, and nothing else is gathered.

    run: with a leading axis of seeds.
    sampled: completions so far, of all seeds.
    idle: 0; a plain sampler always finds something to train on.
    """

    def __init__(self, resolved: Resolved, setup: Setup, rules: Rules):
        self.rules, self.sampled, self.idle = rules, 0, 0
        self.stage = all_seeds(resolved, setup)
        state = first_state(resolved, setup)
        self.run = Run(state, held(resolved, state))
        questions = setup.course.questions

        def order(position: int, n: int, size: int) -> np.ndarray:
            return draws(rules, size, position // n).prompt

        def generate(params: Params, indices: np.ndarray, drawn: Draws, *_: Any) -> Rollouts:
            self.sampled += indices.size * rules.responses
            return setup.sample(params, drawn)

        self.gatherer = gatherer_of(resolved, setup.course, Sampler(generate, absent, setup.score), order)
        self.questions = questions

    @property
    def params(self) -> Params:
        """[S, ...] the current parameters."""
        return self.run.state.params

    def iterate(self, drawn: Draws) -> tuple[int, float | None]:
        """One iteration of all seeds: optimizer steps that were not finite, and the mean reward."""
        rewards: list[Array] = []

        def noted(batch: Rollouts) -> Rollouts:
            rewards.append(batch.reward.mean())
            return batch

        stage = self.stage._replace(put=noted)
        self.run, steps = iterate(stage, self.gatherer, self.run, drawn, partial(steps_of, drawn))
        return not_finite(steps), float(rewards[0])


class InTurn:
    """Each seed gathers by the protocol, with a gatherer of its own.

    runs: one a seed.
    sampled: completions so far, of all seeds.
    idle: iterations in which a seed found nothing to train on.
    """

    def __init__(self, resolved: Resolved, setup: Setup, rules: Rules):
        self.resolved, self.setup, self.rules = resolved, setup, rules
        self.sampled = self.idle = 0
        self.all = all_seeds(resolved, setup)
        one_seed = scorer(resolved, setup, jax.jit, setup.score_one)
        self.each = self.all._replace(objective=resolved.objective, score=one_seed)
        pairs = race_preferences(resolved, setup.course, rules) if reads_data(resolved.objective) else None
        self.gatherers = [self._gatherer(seed, pairs) for seed in range(rules.seeds)]
        state = first_state(resolved, setup)
        self.runs = [self._begin(seed, one(state, seed)) for seed in range(rules.seeds)]

    @property
    def params(self) -> Params:
        """[S, ...] the current parameters."""
        return together([run.state.params for run in self.runs])

    def iterate(self, drawn: Draws) -> tuple[int, float | None]:
        """One iteration of all seeds: optimizer steps that were not finite, and the mean reward."""
        batches = [jax.tree.map(np.asarray, self._gather(seed)) for seed in range(self.rules.seeds)]
        batch = jax.tree.map(lambda *x: np.stack(x), *batches)
        states, references = (together([getattr(run, name) for run in self.runs]) for name in ("state", "references"))
        whole = Run(states, references, iteration=self.runs[0].iteration)
        whole, batch, steps = learn(self.all, whole, batch, partial(steps_of, drawn))
        for seed, run in enumerate(self.runs):
            run = advance(run, state=one(whole.state, seed), references=one(whole.references, seed))
            self.runs[seed] = finish(self.each, self.gatherers[seed], run, one(batch, seed))
        return not_finite(steps), None if batch.reward is None else float(batch.reward.mean())

    def _begin(self, seed: int, state: TrainState) -> Run:
        protocol, gatherer = self.resolved.protocol, self.gatherers[seed]
        tables = protocol.tables(gatherer) if protocol.tables else {}
        run = Run(state, held(self.resolved, state), tables)
        return protocol.init(run, gatherer, self._key(seed, 0)) if protocol.init else run

    def _key(self, seed: int, iteration: int) -> Array:
        return jax.random.fold_in(jax.random.key(seed), iteration)

    def _gather(self, seed: int) -> Rollouts:
        run, gatherer = self.runs[seed], self.gatherers[seed]
        key = self._key(seed, run.iteration + 1)  # the first one is that of the protocol's start
        try:
            self.runs[seed], batch = gather(self.each, gatherer, run, key)
        except NothingLeft:  # nothing to train on: the optimizer steps are skipped
            self.idle += 1
            run, batch = sample_once(run, gatherer, key)
            batch = score_references(self.each, run, batch.replace(count=np.zeros(batch.rows, np.float32)))
            self.runs[seed] = run
        return batch

    def _gatherer(self, seed: int, pairs: Preferences | None) -> Gatherer:
        train, responses = self.setup.course.questions.train, self.resolved.config.rollout.responses

        def order(position: int, n: int, size: int) -> np.ndarray:
            return np.random.default_rng((seed, position)).integers(size, size=n, dtype=np.int32)

        def generate(
            params: Params, indices: np.ndarray, key: Array, options: SamplingOptions, partner: Any, share: float
        ) -> Rollouts:
            draw_key, seed_key = jax.random.split(key)
            mixed = {} if partner is None else dict(partner=partner, share=np.float32(share))
            rows = train.tokens[indices], train.length[indices], None
            out = self.setup.go_on(params, *rows, draw_key, options, responses, **mixed)
            self.sampled += out.rows
            return labelled(out, indices, np.asarray(jax.random.bits(seed_key, (out.rows,))))

        def complete(
            params: Params, tokens: Any, length: Any, budget: Any, key: Array, options: SamplingOptions, n: int
        ) -> Rollouts:
            self.sampled += int((budget > 0).sum()) * n  # rows of budget 0 fill a batch up
            return self.setup.go_on(params, tokens, length, budget, key, options, n)

        sampler = Sampler(generate, complete, self.setup.score_one)
        return gatherer_of(self.resolved, self.setup.course, sampler, order, pairs)


# ---- what both are made of


def contest(resolved: Resolved, setup: Setup, rules: Rules) -> Together | InTurn:
    """The seeds of a contender, ready to iterate."""
    return (Together if only_samples(resolved) else InTurn)(resolved, setup, rules)


def only_samples(resolved: Resolved) -> bool:
    """Whether the protocol is plain sampling. What it measures besides is left out of a race."""
    return resolved.protocol.collect is sample_once and not resolved.protocol.sampler


def absent(*_: Any) -> Any:
    """All seeds at once sample completions of prompts and nothing else."""
    raise ValueError("this protocol gathers seed after seed")


def not_finite(steps: list[dict[str, Array]]) -> int:
    """Optimizer steps of all seeds that were skipped since they were not finite."""
    return int(sum(float(step["step/nonfinite"].sum()) for step in steps))


def gatherer_of(
    resolved: Resolved,
    course: Course,
    sampler: Sampler,
    order: Callable[[int, int, int], np.ndarray],
    pairs: Preferences | None = None,
) -> Gatherer:
    """The calls that a protocol may make in a race; it tells nobody anything."""
    questions, rollout = course.questions, resolved.config.rollout
    return Gatherer(
        objective=resolved.objective,
        train=questions.train,
        prompts=rollout.prompts,
        responses=rollout.responses,
        width=questions.width,
        options=options_of(questions),
        sampler=sampler,
        order=order,
        verify=partial(verified, questions, questions.train),
        compare=partial(questions.compare, partial(by_the_task, questions.task, None)),
        demonstrate=questions.demonstrations,
        codec=questions.codec,
        adapt=resolved.protocol.sampler,
        preferences=pairs,
        watch=Watch(say=lambda text: None),
    )


def held(resolved: Resolved, state: TrainState) -> dict[str, Params]:
    """The references of a contender at its start: copies, since steps donate what they get."""
    keeps = resolved.protocol.facts.references
    return references.copied(references.held(resolved.references, keeps, state.params, state.opt_state))


def first_state(resolved: Resolved, setup: Setup) -> TrainState:
    """The state of all seeds at the start, with the heads that the objective asks for."""
    params, objective = setup.start, resolved.objective
    seeds = jax.tree.leaves(params)[0].shape[0]
    if resolved.heads:
        width = setup.course.model.config.width
        made = [heads.init(width, resolved.heads, jax.random.key(seed)) for seed in range(seeds)]
        params = {**params, **together(made)}
    memory = jax.tree.map(lambda x: jnp.broadcast_to(x, (seeds, *jnp.shape(x))), objective.init())
    params = jax.tree.map(jnp.copy, params)  # steps donate what they get, and the start is everybody's
    return TrainState(params, jax.vmap(optimizer_of(resolved.config, objective).init)(params), memory)


def all_seeds(resolved: Resolved, setup: Setup) -> Stage:
    """The stage of all seeds at once; a protocol that only samples has no further say."""
    protocol, objective = resolved.protocol, resolved.objective
    vmapped = objective._replace(prepare=jax.vmap(objective.prepare), weigh=jax.vmap(objective.weigh))
    return Stage(
        objective=vmapped,
        protocol=protocol._replace(before=None, after=None) if only_samples(resolved) else protocol,
        steps=resolved.optimizer_steps,
        score=scorer(resolved, setup, lambda f, **options: jax.jit(jax.vmap(f), **options), setup.score),
        prepare=jax.jit(vmapped.prepare, compiler_options=QUICK),
        update=make_update(objective, setup.course.model, resolved),
    )


def scorer(
    resolved: Resolved, setup: Setup, compiled: Callable[..., Any], plain: Callable[..., TokenStats]
) -> Callable[[Params, Rollouts], TokenStats]:
    """``(params, batch) -> TokenStats``: the scorer that all contenders share, or one of its own if the objective asks
    for more of the old policy than log-probs and entropies."""
    more, derived = derived_needs(resolved.objective), resolved.objective.asks.derived
    if not more:
        return plain
    policy = stats.policy_of(setup.course.model, wants=EVERYTHING | more, derived=derived)
    scored = compiled(partial(score, policy), compiler_options=QUICK)
    return lambda params, batch: scored(params, as_scored(batch))


def make_update(objective: Objective, model: Model, resolved: Resolved) -> Callable[..., Any]:
    """``(state, batch, rows, fresh) -> (state, metrics)``: one optimizer step of all seeds."""
    asks, optimizer = objective.asks, optimizer_of(resolved.config, objective)
    apply = stats.policy_of(model, wants=asks.wants | {"entropy"}, derived=asks.derived)
    peeked = stats.policy_of(model, wants=asks.peeks | EVERYTHING, derived=asks.derived)

    def step(fresh: bool, state: TrainState, batch: Rollouts, rows: Array) -> tuple[TrainState, dict[str, Array]]:
        part = take(batch, rows, shared_prompt=batch.shared_prompt)
        before = state.params, state.opt_state, state.objective
        *new, out = optimizer_step(objective, apply, optimizer, *before, part, fresh=fresh, peeked=peeked)
        return TrainState(*new), out

    def all_steps(state: TrainState, batch: Rollouts, rows: Array, fresh: bool = False) -> Any:
        return jax.vmap(partial(step, fresh))(state, batch, rows)

    return jax.jit(all_steps, static_argnames="fresh", donate_argnums=0, compiler_options=QUICK)


def race_preferences(resolved: Resolved, course: Course, rules: Rules) -> Preferences:
    """Pairs of a right and a wrong answer to the task's training prompts, in the form that the objective takes; a share
    of their labels is wrong.

    Raises:
      ValueError: the task has no answers."""
    questions, form = course.questions, resolved.form
    data = verified_pairs(questions.task, flipped=rules.flipped)
    width = dict(prompt_width=questions.train.tokens.shape[1], width=questions.width)
    rows = as_kind(data.train, data.kind, form.kind)
    # A wrong answer may be a little longer than any right one: such a pair is left out.
    train, _ = encode(rows, questions.tokenizer, roles=form.given, numbers=form.numbers, bad="drop", **width)
    return Preferences(form, train, [], **width, pad_id=questions.tokenizer.pad_id, report=data.report)
