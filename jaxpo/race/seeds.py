"""How a race gathers rollouts: for all seeds at once, or seed after seed by an objective's own protocol.

Either way ``collect(state, draws) -> (state, batch [S, B, ...])`` comes before the optimizer steps of an iteration and
``after(state, batch, path) -> state`` behind them: protocols may move the weights. The path is the parameters after
each optimizer step, [S, steps, ...], for who is ``watchful``: companions that move with each of them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts, TokenStats, logps
from jaxpo.fields import JUDGED
from jaxpo.learning import references
from jaxpo.learning.needs import slots_of
from jaxpo.learning.state import Run, TrainState, advance
from jaxpo.learning.step import score
from jaxpo.objectives import Objective
from jaxpo.policy import stats
from jaxpo.policy.transformer import Params
from jaxpo.protocols.on_policy import sample_once
from jaxpo.protocols.protocol import NothingLeft, Protocol, Tools, Verdict
from jaxpo.protocols.rows import in_batches
from jaxpo.race.pairs import in_units, race_preferences
from jaxpo.race.setup import QUICK, Arena, Draws, Rules, demonstrations, judge, texts
from jaxpo.registry import make
from jaxpo.rollout import SamplingOptions, generate
from jaxpo.runs.gatherer import as_scored, labelled
from jaxpo.runs.judges.judge import verified


class Together:
    """All seeds sample at once from their policies, in the compiled sampler of the race."""

    watchful = False

    def __init__(self, arena: Arena, rules: Rules):
        self.arena, self.rules, self.sampled, self.idle = arena, rules, 0, 0

    def collect(self, state: TrainState, draws: Draws) -> tuple[TrainState, Rollouts]:
        """The state as it is, and judged and scored rollouts."""
        self.sampled += self.rules.seeds * self.rules.prompts * self.rules.responses
        return state, self.arena.collect(state.params, draws)

    def after(self, state: TrainState, batch: Rollouts, path: Params | None) -> TrainState:
        """The state as it is."""
        return state


class ByProtocol:
    """Each seed gathers by the protocol, with tools of its own; the updates are still those of all seeds at once.

    sampled: completions so far, of all seeds. idle: iterations in which a seed found nothing to train on.
    """

    def __init__(self, objective: Objective, protocol: Protocol, arena: Arena, rules: Rules, state: TrainState):
        self.objective, self.protocol, self.arena, self.rules = objective, protocol, arena, rules
        self.sampled = self.idle = 0
        self.preferences = race_preferences(objective, arena.where, rules) if reads_data(protocol) else None
        compiled = single(arena)
        self.tools = [self._tools(seed, *compiled) for seed in range(rules.seeds)]
        self.runs = []
        for seed, tools in enumerate(self.tools):
            own = one(state, seed)
            slots = references.held(slots_of(objective, protocol.provides), protocol.keeps, own.params, own.opt_state)
            run = Run(own, slots, protocol.tables(tools) if protocol.tables else {})
            self.runs.append(protocol.init(run, tools, self._key(seed, 0)) if protocol.init else run)
        self.watchful = references.each_step(self.runs[0].slots)

    def _key(self, seed: int, iteration: int) -> Array:
        return jax.random.fold_in(jax.random.key(seed), iteration)

    def collect(self, state: TrainState, draws: Draws) -> tuple[TrainState, Rollouts]:
        """The state from which the protocol goes on, and judged and scored rollouts."""
        batches = []
        for seed, tools in enumerate(self.tools):
            run = advance(self.runs[seed], state=one(state, seed))
            key = self._key(seed, run.iteration + 1)  # the first one is that of the protocol's start
            try:
                self.runs[seed], batch = self.protocol.collect(run, tools, key)
            except NothingLeft:  # nothing to train on: the optimizer steps are skipped
                self.idle += 1
                self.runs[seed], batch = sample_once(run, tools, key)
                batch = batch.replace(count=np.zeros(batch.rows, np.float32))
            batch = self._scored(self.runs[seed], tools, batch)
            batches.append(jax.tree.map(np.asarray, batch))
        state = together([run.state for run in self.runs])
        batch = jax.tree.map(lambda *x: np.stack(x), *batches)
        seen = self.arena.look(state.params, batch)
        return state, self._before(seen.with_token(**batch.per_token))

    def _scored(self, run: Run, tools: Tools, batch: Rollouts) -> Rollouts:
        """With the log-probs under the frozen companions that the objective needs."""
        needed = references.scored(self.objective, run.slots)
        said = {name: tools.score(slot, batch).logp for name, slot in needed.items()}
        return batch.with_token(**logps(said))

    def _before(self, batch: Rollouts) -> Rollouts:
        """What the protocol makes of the scored batch."""
        if self.protocol.before is None:
            return batch
        made = [self.protocol.before(run, self.tools[i], one(batch, i)) for i, run in enumerate(self.runs)]
        self.runs = [run for run, _ in made]
        return together([part for _, part in made])

    def after(self, state: TrainState, batch: Rollouts, path: Params | None) -> TrainState:
        """The state in which the protocol leaves the iteration; companions move."""
        paths = [steps_of(path, seed) for seed in range(self.rules.seeds)]
        for seed, tools in enumerate(self.tools):
            slots = self.runs[seed].slots
            for params in paths[seed]:
                slots = references.moved(slots, self.protocol.keeps, params)
            run = advance(self.runs[seed], state=one(state, seed), slots=slots)
            run = self.protocol.after(run, tools, one(batch, seed)) if self.protocol.after else run
            slots = references.moved(run.slots, self.protocol.keeps, run.state.params, run.iteration + 1)
            self.runs[seed] = advance(run, slots=slots, iteration=run.iteration + 1)
        return together([run.state for run in self.runs])

    def _tools(self, seed: int, go_on: Callable[..., Rollouts], policy: Callable[..., TokenStats]) -> Tools:
        where, rules, protocol = self.arena.where, self.rules, self.protocol
        plain = SamplingOptions(where.max_new_tokens, tuple(where.tokenizer.eos_ids))
        train = where.train

        def draw(run: Run, n: int) -> tuple[Run, np.ndarray]:
            rng = np.random.default_rng((seed, run.position))
            return advance(run, position=run.position + n), rng.integers(len(train), size=n, dtype=np.int32)

        def draw_units(run: Run, n: int) -> tuple[Run, np.ndarray]:
            rng = np.random.default_rng((seed, run.position))
            return advance(run, position=run.position + n), rng.integers(len(self.preferences.train), size=n)

        def sampling(run: Run) -> SamplingOptions:
            return protocol.sampler(plain, run.state.objective) if protocol.sampler else plain

        def generate(
            params: Params,
            indices: np.ndarray,
            key: Array,
            options: SamplingOptions | None = None,
            partner: Params | None = None,
            share: float = 0.0,
        ) -> Rollouts:
            draw_key, seed_key = jax.random.split(key)
            tokens, length = train.tokens[indices], train.length[indices]
            mixed = {} if partner is None else dict(partner=partner, share=np.float32(share))
            out = go_on(params, tokens, length, None, draw_key, options or plain, rules.responses, **mixed)
            self.sampled += out.rows
            return labelled(out, indices, np.asarray(jax.random.bits(seed_key, (out.rows,))))

        def complete(
            params: Params,
            tokens: np.ndarray,
            length: np.ndarray,
            budget: np.ndarray,
            key: Array,
            options: SamplingOptions,
            responses: int,
        ) -> Rollouts:
            def batch(i: int, *rows: np.ndarray) -> Rollouts:
                return go_on(params, *rows, jax.random.fold_in(key, i), options, responses)

            self.sampled += len(tokens) * responses
            return in_batches(batch, rules.prompts, responses, tokens, length, budget)

        def compared(*columns: Rollouts) -> Verdict:
            at = np.asarray(columns[0].prompt)[:: columns[0].shared_prompt]
            answers = [np.array(texts(where, c), object).reshape(len(at), -1) for c in columns]
            return verified(where.task, None, [train.examples[i] for i in at], np.concatenate(answers, 1).tolist())

        def teacher(indices: np.ndarray) -> Rollouts:
            if where.task.demonstrate is None:
                raise ValueError(f"task {where.task.name} has no answers to demonstrate")
            end = where.tokenizer.eos_ids[0]
            answers = [[*where.tokenizer.encode(where.task.demonstrate(train.examples[i])), end] for i in indices]
            return demonstrations(where, indices, answers).replace(prompt=indices)

        def nothing(*_: Any) -> None:
            """A race has no metrics but its own, and tells nothing else."""

        def absent(*_: Any) -> Any:
            raise ValueError("a race neither measures the gradient's noise nor mixes batches; train it with train_rl")

        return Tools(
            prompts=rules.prompts,
            responses=rules.responses,
            size=len(train),
            prompt_width=train.tokens.shape[1],
            width=where.max_new_tokens,
            draw=draw,
            encoded=lambda indices: (train.tokens[indices], train.length[indices]),
            sampling=sampling,
            generate=generate,
            complete=complete,
            reward=lambda rollouts: judge(where, train, rollouts),
            score=policy,
            noise=absent,
            scored=absent,
            note=nothing,
            say=nothing,
            preferences=self.preferences,
            draw_units=draw_units,
            judge=compared,
            demonstrations=teacher,
            objective=self.objective,
        )


@jax.jit
def one(tree: Any, seed: int) -> Any:
    """The leaves of one seed."""
    return jax.tree.map(lambda x: x[seed], tree)


@jax.jit
def together(trees: list[Any]) -> Any:
    """The leaves of all seeds, [S, ...]."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def steps_of(path: Params | None, seed: int) -> list[Params]:
    """The parameters of one seed after each optimizer step; [] if nobody watches."""
    steps = [] if path is None else range(jax.tree.leaves(path)[0].shape[1])
    return [jax.tree.map(lambda x, i=i: x[seed, i], path) for i in steps]


def single(arena: Arena) -> tuple[Callable[..., Rollouts], Callable[..., TokenStats]]:
    """Sampler and scorer of one seed, compiled when they are first called."""
    model, pad_id = arena.where.model, arena.where.tokenizer.pad_id
    policy = stats.policy_of(model, wants=frozenset({"logp", "entropy"}))

    @partial(jax.jit, static_argnames="responses", compiler_options=QUICK)
    def go_on(
        params: Params,
        tokens: Array,
        length: Array,
        budget: Array | None,
        key: Array,
        options: SamplingOptions,
        responses: int,
        partner: Params | None = None,
        share: Array | None = None,
    ) -> Rollouts:
        given = dict(prompt_length=length, budget=budget, responses=responses, partner=partner, share=share)
        return generate(model, params, tokens, key, options, **given, pad_id=pad_id)

    @partial(jax.jit, compiler_options=QUICK)
    def scored(params: Params, batch: Rollouts) -> TokenStats:
        return score(policy, params, batch)

    return go_on, lambda params, batch: scored(params, as_scored(batch))


def protocol_of(objective: Objective) -> Protocol | None:
    """The protocol by which an objective gathers; None if that is plain sampling. An objective that names none reads
    pairs, or is told by a judge of its own answers, if it asks for what only those know.

    Raises:
      ValueError: it trains on batches of earlier iterations, which a race does not keep.
    """
    name = objective.protocol.name
    if name == "on_policy" and objective.asks.needs & {*JUDGED - {"label"}, "logp_prev"}:
        name = "judged"
    elif name == "on_policy" and (objective.unit.layout or "label" in objective.asks.needs):
        name = "preference_data"
    protocol = make(name, "protocol", **objective.protocol.options)
    if protocol.stale and protocol.tables:
        raise ValueError(f"protocol {name!r} trains on earlier batches; a race has only fresh ones")
    return None if protocol.collect is sample_once and not protocol.sampler else protocol


def reads_data(protocol: Protocol | None) -> bool:
    """Whether its units are those of preference data: it makes rows of its own, and no judge speaks."""
    return protocol is not None and protocol.rows is not None and not protocol.judges


def shape(objective: Objective, protocol: Protocol | None, rules: Rules) -> Rules:
    """The rules in the shape that the protocol accepts: as many rows in units of data; as many completions, of one
    prompt each if it has to be.

    Raises:
      ValueError: it accepts neither.
    """
    if protocol is None:
        return rules
    size = protocol.rows(objective, rules.responses) if protocol.rows else None
    if reads_data(protocol):
        rules = in_units(rules, size)
    alone = replace(rules, prompts=rules.prompts * rules.responses, responses=1)
    reasons = [refusal(protocol, r) for r in ([rules] if protocol.rows else [rules, alone])]
    if all(reasons):
        raise ValueError(reasons[0])
    return alone if reasons[0] else rules


def refusal(protocol: Protocol, rules: Rules) -> str:
    """Why the protocol does not run by the rules; "" if it does."""
    rollout = dict(prompts=rules.prompts, responses=rules.responses)
    config = dict(rollout=rollout, sampling=dict(temperature=1.0), steps=rules.steps, judge=dict(name="verifier"))
    try:
        if protocol.check:
            protocol.check(ConfigDict(config))
    except ValueError as error:
        return str(error)
    return ""
