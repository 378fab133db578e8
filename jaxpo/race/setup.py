"""The parts that all objectives of a race share: task, policy, warm start, and a sampler and scorer for all seeds.

On the toy task, rewards are part of the compiled sampler; on other tasks, vmapped sampling alternates with verifiers on
the host. Arrays for all seeds have a leading axis of seeds S.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxpo.batch import Rollouts, TokenStats, take
from jaxpo.calls import parse_calls
from jaxpo.learning.optimizers import make_optimizer
from jaxpo.learning.step import optimizer_step, score
from jaxpo.objectives import make
from jaxpo.policy import stats, transformer
from jaxpo.policy.transformer import Model, Params
from jaxpo.protocols.gatherer import Prompts
from jaxpo.protocols.rows import as_scored
from jaxpo.race.rules import Rules, adam
from jaxpo.rollout import SamplingOptions, generate
from jaxpo.runs.memory import bytes_of, capacity, gigabytes
from jaxpo.runs.questions import Questions, pad_prompts, texts_of, tokenize
from jaxpo.tasks import Task, build
from jaxpo.tasks.base import task_arguments
from jaxpo.tasks.toy import ReverseDigits
from jaxpo.text.tokenizers import CharTokenizer, Tokenizer

ROOM = 2  # tokens by which a completion may be longer than the longest answer
# Small programs run as fast without the compiler's costliest passes, and compile in three quarters of the time.
QUICK = {"xla_backend_optimization_level": 1}
TASK_SIZES = {"train_size": 2000, "test_size": 200, "seed": 0}  # arguments of a task that has them
EVERYTHING = frozenset({"logp", "entropy"})


class Course(NamedTuple):
    """Task and policy of a race, before anything is compiled.

    questions: the task as tokens.
    game: the task's rewards as jax code; None if it has none.
    model: the model of the policy.
    """

    questions: Questions
    game: ReverseDigits | None
    model: Model


@dataclass(frozen=True)
class Setup:
    """The compiled parts that all contenders share.

    course: task and policy.
    start: [S, ...] parameters after the warm start.
    sample: (params, draws) -> `Rollouts` [S, B, ...] of all seeds, with rewards if they are part of the graph.
    score: (params, rows [S, B, ...]) -> `TokenStats` of all seeds.
    go_on: (params, tokens, length, budget, key, options, responses[, partner, share]) -> `Rollouts` of one seed.
    score_one: (params, rows) -> `TokenStats` of one seed.
    accuracy: (params) -> greedy accuracy [S] on the test prompts.
    seconds: time of the warm start, with compilation.
    """

    course: Course
    start: Params
    sample: Callable[[Params, "Draws"], Rollouts]
    score: Callable[[Params, Rollouts], TokenStats]
    go_on: Callable[..., Rollouts]
    score_one: Callable[[Params, Rollouts], TokenStats]
    accuracy: Callable[[Params], np.ndarray]
    seconds: float


def make_task(text: str) -> tuple[Task, Tokenizer, ReverseDigits | None]:
    """Build the task that ``text`` names; also its tokenizer, and its rewards as jax code (None if it has none)."""
    calls = parse_calls(text)
    if len(calls) != 1:
        raise ValueError(f"task: a race has exactly one, found {text!r}")
    _, name, given = calls[0]
    arguments = {k: v for k, v in TASK_SIZES.items() if k in task_arguments(name)} | given
    task = build({"name": name, **arguments})
    if name == "toy":
        game = ReverseDigits(**{f.name: arguments[f.name] for f in fields(ReverseDigits) if f.name in arguments})
        return task, game.tokenizer, game
    return task, CharTokenizer.from_texts(texts_of(task)), None


def make_course(rules: Rules) -> Course:
    """Build the task and the policy of a race.

    Raises:
      ValueError: the task does not exist, or its answers are missing or too long.
    """
    task, tokenizer, game = make_task(rules.task)
    budget = rules.max_new_tokens
    if task.demonstrate is not None:
        longest = max(len(tokenizer.turn(e.question, task.demonstrate(e)).answer) for e in task.train)
        budget = budget or longest + ROOM
        if longest > budget:
            raise ValueError(f"max_new_tokens {budget} is too short for answers of {longest} tokens")
    elif rules.warm_start or not budget:
        raise ValueError(f"task {task.name} has no answers to learn from: set warm_start=0 and max_new_tokens")
    tokens = [tokenize(examples, tokenizer, None) for examples in (task.train, task.test)]
    width = max(len(ids) for _, both in tokens for ids in both)
    train, test = (pad_prompts(examples, ids, width, tokenizer.pad_id) for examples, ids in tokens)
    model = transformer.build(transformer.TransformerConfig(tokenizer.vocab_size, rules.width, rules.layers))
    return Course(Questions(task, tokenizer, train, test, budget), game, model)


def check_seeds(course: Course, rules: Rules) -> None:
    """Raise ``ValueError`` if the parameters of all seeds, two moments of each and a gradient do not fit in memory."""
    one = bytes_of(jax.eval_shape(partial(transformer.init, course.model.config), jax.random.key(0)))
    there, what = capacity(jax.local_devices()[0])
    if 4 * one * rules.seeds > there:
        raise ValueError(
            f"seeds {rules.seeds:,}: policies of {gigabytes(one)} each, with optimizer and gradient, need "
            f"{gigabytes(4 * one * rules.seeds)} at once, and {what} is {gigabytes(there)}: lower --seeds (at most "
            f"{there // (4 * one):,}), --width or --layers"
        )


def set_up(rules: Rules) -> Setup:
    """Warm-start all seeds, and make the compiled samplers and scorers."""
    course, began = make_course(rules), time.perf_counter()
    questions, model = course.questions, course.model
    start = jax.block_until_ready(warm_start(course, rules))
    train_prompts, test_prompts = (
        (jnp.asarray(p.tokens), jnp.asarray(p.length)) for p in (questions.train, questions.test)
    )
    score_one = partial(score, stats.policy_of(model, wants=EVERYTHING))
    each_seed = jax.jit(jax.vmap(score_one), compiler_options=QUICK)
    one_seed = jax.jit(score_one, compiler_options=QUICK)
    draw = with_rewards(course, jax.vmap(partial(sample, course, rules.responses), (0, 0, None, None)))
    answer_test = with_rewards(course, jax.vmap(partial(answer, course), (0, None, None)))

    def accuracy(params: Params) -> np.ndarray:
        batch = verified(questions, questions.test, answer_test(params, *test_prompts))
        return np.asarray(batch.correct.mean(-1))

    go_on = partial(continued, course)
    return Setup(
        course,
        start,
        sample=lambda params, draws: draw(params, draws, *train_prompts),
        score=lambda params, batch: each_seed(params, as_scored(batch)),
        go_on=jax.jit(go_on, static_argnames="responses", compiler_options=QUICK),
        score_one=lambda params, batch: one_seed(params, as_scored(batch)),
        accuracy=accuracy,
        seconds=time.perf_counter() - began,
    )


def options_of(questions: Questions) -> SamplingOptions:
    """Plain sampling at temperature 1."""
    return SamplingOptions(questions.width, tuple(questions.tokenizer.eos_ids))


def sample(course: Course, responses: int, params: Params, draws: "Draws", tokens: Array, length: Array) -> Rollouts:
    """Sample completions of the drawn prompts, for one seed, with role, count, prompt and seed filled in."""
    i, questions = draws.prompt, course.questions
    options = dict(responses=responses, pad_id=questions.tokenizer.pad_id)
    key, how = draws.key, options_of(questions)
    out = generate(course.model, params, tokens[i], key, how, prompt_length=length[i], **options)
    own = dict(role=jnp.zeros(out.rows, jnp.int32), count=jnp.ones(out.rows))
    return out.replace(prompt=jnp.repeat(i, responses), seed=draws.seed, **own)


def answer(course: Course, params: Params, tokens: Array, length: Array) -> Rollouts:
    """Complete prompts greedily, for one seed."""
    greedy, pad_id = options_of(course.questions).replace(greedy=True), course.questions.tokenizer.pad_id
    key = jax.random.key(0)
    out = generate(course.model, params, tokens, key, greedy, prompt_length=length, pad_id=pad_id)
    return out.replace(prompt=jnp.arange(out.rows, dtype=jnp.int32))


def continued(
    course: Course,
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
    """Continue rows of tokens, for one seed."""
    given = dict(prompt_length=length, budget=budget, responses=responses, partner=partner, share=share)
    return generate(course.model, params, tokens, key, options, **given, pad_id=course.questions.tokenizer.pad_id)


def with_rewards(course: Course, sample: Callable[..., Rollouts]) -> Callable[..., Rollouts]:
    """Compile ``sample``; if the task has rewards as jax code, its result gets ``reward`` and ``correct``."""
    game = course.game

    def in_graph(*arguments: Any) -> Rollouts:
        batch = sample(*arguments)
        width = batch.tokens.shape[-1] - batch.mask.shape[-1]
        reward = jax.vmap(game.reward)(batch.tokens[..., :width], batch.tokens[..., width:], batch.mask)
        return batch.replace(reward=reward, correct=(reward == 1).astype(jnp.float32))

    return jax.jit(in_graph if game else sample, compiler_options=QUICK)


def verified(questions: Questions, prompts: Prompts, batch: Rollouts) -> Rollouts:
    """Add ``reward`` and ``correct`` by the task's verifier to a batch [..., B], unless it has them already."""
    if batch.reward is not None:
        return batch
    shape = batch.mask.shape[:-1]
    flat = Rollouts(*(np.asarray(x).reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask)))
    examples = [prompts.examples[i] for i in np.asarray(batch.prompt).reshape(-1)]
    reward, correct, _ = questions.verdicts(examples, flat).astype(np.float32).T
    return batch.replace(reward=reward.reshape(shape), correct=correct.reshape(shape))


def warm_start(course: Course, rules: Rules) -> Params:
    """Random parameters [S, ...] after ``rules.warm_start`` supervised steps, all in one compiled program."""
    model, objective, questions = course.model, make("sft"), course.questions
    apply = stats.policy_of(model, wants=objective.asks.wants)
    optimizer = make_optimizer(adam(rules.warm_learning_rate).to_dict(), max(rules.warm_start, 1))

    def train(params: Params, rows: Array, data: Rollouts) -> Params:
        batch, memory = objective.prepare(data, objective.init())

        def step(carry: tuple[Any, ...], rows: Array) -> tuple[tuple[Any, ...], None]:
            return optimizer_step(objective, apply, optimizer, *carry, take(batch, rows))[:3], None

        return lax.scan(step, (params, optimizer.init(params), memory), rows)[0][0]

    init = jax.jit(
        lambda key: transformer.init(model.config, key), compiler_options={"xla_backend_optimization_level": 0}
    )
    params = [init(jax.random.key(seed)) for seed in range(rules.seeds)]
    params = jax.tree.map(lambda *x: jnp.stack(x), *params)
    if not rules.warm_start:
        return params
    data = questions.demonstrations(np.arange(len(questions.train)), rules.drop_last)
    data = jax.tree.map(jnp.asarray, data)
    shape = rules.warm_start, rules.warm_batch
    rows = [np.random.default_rng(seed).integers(data.rows, size=shape) for seed in range(rules.seeds)]
    return jax.jit(jax.vmap(train, (0, 0, None)), compiler_options=QUICK)(params, np.stack(rows), data)


class Draws(NamedTuple):
    """The random numbers of an iteration for every seed, a function of seed and iteration alone.

    They are drawn on the host, since compiling this code would take seconds.

    prompt: [S, G] indices of the prompts.
    seed: [S, B] seeds of the rows.
    key: [S] keys for sampling.
    rows: [S, steps, R] rows of each optimizer step.
    """

    prompt: np.ndarray
    seed: np.ndarray
    key: Array
    rows: np.ndarray


def draws(rules: Rules, prompts: int, iteration: int) -> Draws:
    """Draw the `Draws` of an iteration from ``prompts`` training prompts; an optimizer step sees whole groups."""
    out = []
    for seed in range(rules.seeds):
        rng = np.random.default_rng((seed, iteration))
        prompt = rng.integers(prompts, size=rules.prompts, dtype=np.int32)
        bits = rng.integers(2**32, size=rules.prompts * rules.responses, dtype=np.uint32)
        groups = np.stack([rng.permutation(rules.prompts) for _ in range(rules.epochs)])
        groups = groups.reshape(rules.epochs * rules.minibatches, -1, 1)
        rows = groups * rules.responses + np.arange(rules.responses)
        out.append((prompt, bits, np.int64(rng.integers(2**31)), rows.reshape(len(groups), -1).astype(np.int32)))
    prompt, bits, key, rows = map(np.stack, zip(*out, strict=True))
    return Draws(prompt, bits, jax.vmap(jax.random.key)(key), rows)
