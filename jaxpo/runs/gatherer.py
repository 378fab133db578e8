"""What the loop lends a protocol: the calls by which it draws prompts, samples, rewards and scores."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax import Array

from jaxpo.batch import Rollouts, TokenStats, logps
from jaxpo.learning import references
from jaxpo.learning.needs import must_score, slots_of
from jaxpo.learning.programs import packed
from jaxpo.learning.references import held
from jaxpo.learning.state import Run, TrainState, advance
from jaxpo.parallel import moved_bytes, shardings
from jaxpo.parallel.distributed import to_host
from jaxpo.policy.transformer import Params
from jaxpo.protocols.protocol import Tools, Verdict
from jaxpo.protocols.rows import in_batches
from jaxpo.rollout.sampling import SamplingOptions
from jaxpo.rollout.sampling import validate as validate_sampling
from jaxpo.runs.judges.judge import make_judge
from jaxpo.runs.warm_start import demonstrations
from jaxpo.runs.workspace import Workspace, judge


class Clock:
    """Wall seconds by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def prompt_order(seed: int, position: int, n: int, size: int) -> np.ndarray:
    """Indices of the prompts at ``position .. position + n``: each epoch is a permutation drawn from (seed, epoch)."""
    epochs = range(position // size, (position + n - 1) // size + 1)
    order = np.concatenate([np.random.default_rng((seed, e)).permutation(size) for e in epochs])
    start = position - epochs[0] * size
    return order[start : start + n]


def make_tools(workspace: Workspace, clock: Clock, notes: dict[str, float], say: Callable[[str], None]) -> Tools:
    """The calls that a protocol may make; ``notes`` collects the metrics of an iteration."""
    config, prompts, protocol = workspace.config, workspace.train, workspace.protocol
    size = config.rollout.prompts

    def draw(run: Run, n: int) -> tuple[Run, np.ndarray]:
        return advance(run, position=run.position + n), prompt_order(config.seed, run.position, n, len(prompts))

    def draw_units(run: Run, n: int) -> tuple[Run, np.ndarray]:
        size = len(workspace.preferences.train)
        return advance(run, position=run.position + n), prompt_order(config.seed, run.position, n, size)

    verdict = make_judge(workspace)

    def judged(*columns: Rollouts) -> Verdict:
        with clock.phase("reward"):
            return verdict(prompts.examples, *columns)

    def encoded(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return prompts.tokens[indices], prompts.length[indices]

    def sampling(run: Run) -> SamplingOptions:
        options = workspace.sampling
        return validate_sampling(protocol.sampler(options, run.state.objective)) if protocol.sampler else options

    def sampler_params(params: Params) -> Params:
        there = workspace.sampler_params(params)
        if workspace.reshard:
            where = jax.tree.map(lambda x: x.sharding, there)
            moved = moved_bytes(there, shardings(there, workspace.mesh), where)
            notes["reshard/bytes"] = notes.get("reshard/bytes", 0) + moved
        return there

    def generate(
        params: Params,
        indices: np.ndarray,
        key: Array,
        options: SamplingOptions | None = None,
        partner: Params | None = None,
        share: float = 0.0,
    ) -> Rollouts:
        with clock.phase("generate"):
            responses = config.rollout.responses
            tokens, length = workspace.put(encoded(indices))
            draw_key, seed_key = jax.random.split(key)
            options, mixed = options or workspace.sampling, {}
            if partner is not None:
                mixed = dict(partner=sampler_params(partner), share=np.float32(share))
            sampler = sampler_params(params)
            out = workspace.generate(sampler, tokens, length, draw_key, options, responses=responses, **mixed)
            seeds = np.asarray(jax.random.bits(seed_key, (out.rows,)))
            return jax.block_until_ready(labelled(out, indices, seeds))

    def complete(
        params: Params,
        tokens: np.ndarray,
        length: np.ndarray,
        budget: np.ndarray,
        key: Array,
        options: SamplingOptions,
        responses: int,
    ) -> Rollouts:
        params = sampler_params(params)

        def batch(i: int, *rows: np.ndarray) -> Rollouts:
            draw_key = jax.random.fold_in(key, i)
            return workspace.complete(params, *workspace.put(rows), draw_key, options, responses=responses)

        with clock.phase("generate"):
            return in_batches(batch, size, responses, tokens, length, budget)

    def scored() -> Rollouts:
        def whole(key: Array) -> Rollouts:
            params, first = workspace.init_params(key), np.zeros(size, np.int32)
            slots = held(slots_of(workspace.objective, protocol.provides), protocol.keeps, params, None)
            run = Run(TrainState(params, None, workspace.objective.init()), slots)
            responses = config.rollout.responses
            sampler = workspace.sampler_params(params)
            out = workspace.generate(sampler, *encoded(first), key, workspace.sampling, responses=responses)
            out = labelled(out, first, jax.random.bits(key, (out.rows,)))
            return score_companions(workspace, run, out.replace(reward=out.count, correct=out.count))

        return jax.eval_shape(whole, jax.random.key(0))

    def reward(rollouts: Rollouts) -> Rollouts:
        with clock.phase("reward"):
            given = {}
            if workspace.task.score:
                examples = [prompts.examples[i] for i in to_host(rollouts.prompt)]
                rewards, correct, errors = judge(workspace, examples, rollouts).T
                notes["reward/errors"] = notes.get("reward/errors", 0) + int(errors.sum())
                given = dict(reward=rewards.astype(np.float32), correct=correct.astype(np.float32))
            if config.judge.name != "verifier":
                if given:  # what the judge is a stand-in for
                    notes["reward/verified"] = float(given["reward"].mean())
                given["reward"] = verdict(prompts.examples, rollouts).scores.reshape(-1).astype(np.float32)
            return rollouts.replace(**given)

    def score(params: Params, rollouts: Rollouts) -> TokenStats:
        with clock.phase("score"):
            return jax.block_until_ready(score_packed(workspace, params, workspace.put(as_scored(rollouts))))

    def noise(run: Run, rollouts: Rollouts) -> dict[str, Array]:
        groups = np.arange(rollouts.rows, dtype=np.int32).reshape(-1, rollouts.shared_prompt)
        halves = np.stack([groups[::2].reshape(-1), groups[1::2].reshape(-1)])
        with clock.phase("noise"):
            return jax.block_until_ready(workspace.noise(run.state, rollouts, halves))

    return Tools(
        prompts=size,
        responses=config.rollout.responses,
        size=len(prompts),
        prompt_width=prompts.tokens.shape[1],
        width=config.sampling.max_new_tokens,
        draw=draw,
        encoded=encoded,
        sampling=sampling,
        generate=generate,
        complete=complete,
        scored=scored,
        reward=reward,
        score=score,
        noise=noise,
        note=notes.__setitem__,
        say=say,
        preferences=workspace.preferences,
        draw_units=draw_units,
        judge=judged,
        objective=workspace.objective,
        demonstrations=lambda indices: demonstrations(workspace, indices).replace(prompt=indices),
    )


def labelled(out: Rollouts, indices: np.ndarray, seeds: np.ndarray | Array) -> Rollouts:
    """Generated rows with what the loop knows of them: the prompts' ``indices`` [n], a seed each."""
    return out.replace(
        prompt=np.repeat(indices, out.shared_prompt).astype(np.int32),
        seed=seeds,
        role=np.zeros(out.rows, np.int32),
        count=np.ones(out.rows, np.float32),
    )


def as_scored(batch: Rollouts) -> Rollouts:
    """What a policy reads of a batch, and nothing else: every scoring pass is one compiled function."""
    return Rollouts(
        tokens=batch.tokens, mask=batch.mask, prompt_length=batch.prompt_length, shared_prompt=batch.shared_prompt
    )


def score_packed(workspace: Workspace, params: Params, seen: Rollouts) -> TokenStats:
    """What the policy says of rows on the mesh, packed if the run packs."""
    slices = workspace.config.training.minibatches * workspace.config.training.microbatches
    return workspace.score(params, seen, **packed(workspace.config, workspace.mesh, seen, slices))


def score_companions(workspace: Workspace, run: Run, batch: Rollouts) -> Rollouts:
    """Attach ``logp_old`` (unless the first optimizer step is its own old policy) and ``logp_<slot>``."""
    seen, slots = as_scored(batch), references.scored(workspace.objective, run.slots)
    said = {name: score_packed(workspace, p, seen).logp for name, p in slots.items()}
    scored = batch.with_token(**logps(said))
    always = workspace.protocol.stale or workspace.optimizer_steps() > 1
    if always or must_score(workspace.objective, scored, run.state.objective):
        old = score_packed(workspace, run.state.params, seen)
        constants = dict(logp_old=old.logp, entropy_old=old.entropy, value_old=old.value)
        scored = scored.replace(**constants).with_token(**logps(old.derived))
    return scored
