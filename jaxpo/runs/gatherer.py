"""The gatherer and the stage of a run: the calls of a protocol, on the run's compiled functions and mesh."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.learning import references
from jaxpo.learning.programs import packed
from jaxpo.learning.state import Run, TrainState
from jaxpo.parallel import moved_bytes, shardings
from jaxpo.parallel.distributed import to_host
from jaxpo.policy.transformer import Params
from jaxpo.protocols.gatherer import Gatherer, Sampler, Verdict, Watch
from jaxpo.protocols.rows import as_scored, in_a_column, labelled
from jaxpo.rollout import SamplingOptions
from jaxpo.runs.iteration import Stage, score_references
from jaxpo.runs.judges.judge import make_judge
from jaxpo.runs.questions import Judged
from jaxpo.runs.workspace import Workspace, shard_count
from jaxpo.tasks.base import Score


def prompt_order(seed: int, position: int, n: int, size: int) -> np.ndarray:
    """Indices of the prompts at ``position .. position + n``: each epoch is a permutation drawn from (seed, epoch)."""
    epochs = range(position // size, (position + n - 1) // size + 1)
    order = np.concatenate([np.random.default_rng((seed, e)).permutation(size) for e in epochs])
    start = position - epochs[0] * size
    return order[start : start + n]


def make_gatherer(workspace: Workspace, watch: Watch) -> Gatherer:
    """The calls that a protocol may make in this run."""
    config, questions = workspace.config, workspace.questions
    compare = partial(compared, make_judge(workspace), watch)
    return Gatherer(
        objective=workspace.objective,
        train=questions.train,
        prompts=config.rollout.prompts,
        responses=config.rollout.responses,
        width=config.sampling.max_new_tokens,
        options=workspace.sampling,
        sampler=make_sampler(workspace, watch),
        order=lambda position, n, size: prompt_order(config.seed, position, n, size),
        verify=partial(verified, workspace, watch, compare),
        compare=compare,
        demonstrate=questions.demonstrations,
        codec=questions.codec,
        adapt=workspace.protocol.sampler,
        preferences=workspace.preferences,
        watch=watch,
        failures=questions.failures,
    )


def make_stage(workspace: Workspace, watch: Watch) -> Stage:
    """What an iteration of this run is made of."""
    return Stage(
        objective=workspace.objective,
        protocol=workspace.protocol,
        steps=workspace.resolved.optimizer_steps,
        score=lambda params, batch: workspace.score(params, as_scored(batch)),
        prepare=workspace.programs.prepare,
        update=workspace.programs.update,
        put=workspace.put,
        pack=partial(pack, workspace),
        watch=watch,
        others={name: partial(scored_by, workspace, name) for name in workspace.models},
    )


def scored_by(workspace: Workspace, name: str, batch: Rollouts) -> TokenStats:
    """What a model beside the policy says of rows."""
    return workspace.score_other(name, as_scored(batch))


def pack(workspace: Workspace, batch: Rollouts, rows: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """The packing of a step's rows, and the share of the rows that is then computed."""
    slices = workspace.config.training.microbatches
    plan = packed(workspace.config, workspace.mesh, batch, slices, rows)
    if not plan:
        return {}, {}
    return plan, {"packing/share": plan["bins"] / (len(rows) // (slices * shard_count(workspace)))}


def make_sampler(workspace: Workspace, watch: Watch) -> Sampler:
    """Sampling and scoring on the run's mesh."""
    programs, train, responses = workspace.programs, workspace.questions.train, workspace.config.rollout.responses

    def there(params: Params) -> Params:
        """The parameters where they sample; what was moved is noted."""
        moved = programs.sampler_params(params)
        if programs.reshard:
            where = jax.tree.map(lambda x: x.sharding, moved)
            watch.add("reshard/bytes", moved_bytes(moved, shardings(moved, workspace.mesh), where))
        return moved

    def generate(
        params: Params, indices: np.ndarray, key: Array, options: SamplingOptions, partner: Params | None, share: float
    ) -> Rollouts:
        tokens, length = workspace.put((train.tokens[indices], train.length[indices]))
        draw_key, seed_key = jax.random.split(key)
        mixed = {} if partner is None else dict(partner=there(partner), share=np.float32(share))
        out = programs.generate(there(params), tokens, length, draw_key, options, responses=responses, **mixed)
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
        rows = workspace.put((tokens, length, budget))
        return programs.complete(there(params), *rows, key, options, responses=responses)

    def score(params: Params, rollouts: Rollouts) -> TokenStats:
        return workspace.score(params, workspace.put(as_scored(rollouts)))

    def noise(run: Run, rollouts: Rollouts, halves: np.ndarray) -> dict[str, Array]:
        return programs.noise(run.state, rollouts, halves)

    return Sampler(generate, complete, score, noise, shapes=partial(scored_shapes, workspace))


def scored_shapes(workspace: Workspace) -> Rollouts:
    """The shapes of a batch that is generated, judged and scored."""
    resolved, train = workspace.resolved, workspace.questions.train
    stage, first = make_stage(workspace, Watch()), np.zeros(workspace.config.rollout.prompts, np.int32)

    def whole(key: Array) -> Rollouts:
        params = workspace.init_params(key)
        frozen = references.held(resolved.references, resolved.protocol.facts.references, params, None)
        run = Run(TrainState(params, None, resolved.objective.init()), frozen)
        out = workspace.programs.generate(
            workspace.programs.sampler_params(params),
            *(train.tokens[first], train.length[first], key, workspace.sampling),
            responses=workspace.config.rollout.responses,
        )
        out = labelled(out, first, jax.random.bits(key, (out.rows,)))
        rewarded = dict(reward=out.count, correct=out.count, **columns(workspace, out.count, None))
        return score_references(stage, run, out.replace(**rewarded))

    return jax.eval_shape(whole, jax.random.key(0))


def compared(judge: Callable[..., Verdict], watch: Watch, *asked: Any) -> Verdict:
    """The judge's verdict; prompts on which it failed are counted."""
    verdict = judge(*asked)
    if verdict.errors:
        watch.add("judge/errors", sum(error is not None for error in verdict.errors))
    return verdict


def verified(workspace: Workspace, watch: Watch, compare: Any, rollouts: Rollouts) -> Rollouts:
    """The rollouts with what the verifier says of them, and with the judge's scores as rewards if one is named.

    Rows of which every reward abstains are left out: their count becomes 0."""
    questions, given = workspace.questions, {}
    if questions.task.score:
        examples = [questions.train.examples[i] for i in to_host(rollouts.prompt)]
        judged = questions.judged(examples, rollouts)
        rewards, correct, errors, abstained = judged.table.T.astype(np.float32)
        watch.add("reward/errors", int(errors.sum()))
        note_parts(watch, judged.scores)
        given = dict(reward=rewards, correct=correct, **columns(workspace, rewards, judged))
        if abstained.any() and workspace.config.judge.name == "verifier":
            watch.add("reward/abstained", int(abstained.sum()))
            count = np.ones(rollouts.rows) if rollouts.count is None else to_host(rollouts.count)
            given["count"] = (count * (1 - abstained)).astype(np.float32)
    if workspace.config.judge.name != "verifier":
        if given:  # what the judge is a stand-in for
            watch.notes["reward/verified"] = float(given["reward"].mean())
        scores = compare(questions.train.examples, rollouts).scores.reshape(-1).astype(np.float32)
        given |= dict(reward=scores, **in_a_column(scores, workspace.objective.asks.needs))
    return rollouts.replace(**given)


def note_parts(watch: Watch, scores: Sequence[Score]) -> None:
    """Add what each reward said to the metrics ``reward/<name>/mean`` and ``reward/<name>/count``, over this process's
    rows of the iteration."""
    for name in dict.fromkeys(name for score in scores for name in score.parts):
        told = [score.parts[name] for score in scores if isinstance(score.parts.get(name), float)]
        before = watch.notes.get(f"reward/{name}/count", 0)
        watch.add(f"reward/{name}/count", len(told))
        if told:
            total = watch.notes.get(f"reward/{name}/mean", 0.0) * before + sum(told)
            watch.notes[f"reward/{name}/mean"] = total / (before + len(told))


def columns(workspace: Workspace, reward: Any, judged: Judged | None) -> dict[str, Any]:
    """The rewards one by one [B, R] and their weights, 0 where one abstained or failed, if the objective reads them.

    ``judged``: what they said; None = only the shapes matter."""
    needs, weights = workspace.objective.asks.needs, workspace.questions.rewards
    if not weights or "rewards_multi" not in needs:
        return in_a_column(reward, needs)
    if judged is None:
        return {
            name: reward[:, None] * np.ones(len(weights), np.float32) for name in ("rewards_multi", "reward_weights")
        }
    given = np.asarray(list(weights.values())) * judged.gave
    return dict(rewards_multi=judged.parts.astype(np.float32), reward_weights=given.astype(np.float32))
