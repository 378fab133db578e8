"""What all objectives of a race share: task, policy, warm start, and one sampler and scorer for all seeds at once.

On the toy task rewards are part of the compiled sampler; elsewhere vmapped sampling and verifiers on the host take
turns. Leaves have a leading axis of seeds S throughout.
"""

import ast
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxpo.batch import Demonstrations, Rollouts, take
from jaxpo.learning.optimizers import make_optimizer
from jaxpo.learning.step import optimizer_step, score
from jaxpo.objectives import make
from jaxpo.policy import stats, transformer
from jaxpo.policy.transformer import Model, Params
from jaxpo.rollout import SamplingOptions, generate
from jaxpo.runs.workspace import Prompts, pad_prompts, tokenize
from jaxpo.tasks import Task, build, imperfect
from jaxpo.tasks.base import task_arguments
from jaxpo.tasks.toy import ReverseDigits
from jaxpo.text.tokenizers import CharTokenizer, Tokenizer

ROOM = 2  # tokens that a completion may be longer than the longest answer
# Programs this small run as fast without the compiler's costliest passes, and compile in three quarters of the time.
QUICK = {"xla_backend_optimization_level": 1}
TASK_SIZES = {"train_size": 2000, "test_size": 200, "seed": 0}  # of a task that asks for them


@dataclass(frozen=True)
class Rules:
    """What every objective of a race gets alike.

    task: name, or name and arguments as in Python: ``toy(digits=4)``. seeds: of parameters, prompts and sampling.
    steps: iterations, each of ``prompts`` prompts with ``responses`` completions and ``epochs * minibatches`` optimizer
      steps.
    evaluations: points of the learning curve after the start.
    warm_start: supervised steps before all, on ``warm_batch`` demonstrations each, of which a share ``drop_last`` lacks
      its last character: an imperfect demonstrator, as web data is.
    max_new_tokens: generation budget; 0 = the longest right answer and two more. width, layers: of the policy.
    flipped: share of preference pairs whose label is wrong, for objectives of pairs.
    """

    task: str = "toy"
    seeds: int = 5
    steps: int = 60
    prompts: int = 16
    responses: int = 8
    epochs: int = 1
    minibatches: int = 4
    learning_rate: float = 3e-4
    evaluations: int = 12
    warm_start: int = 120
    warm_batch: int = 64
    drop_last: float = 0.6
    warm_learning_rate: float = 3e-3
    max_new_tokens: int = 0
    width: int = 32
    layers: int = 2
    flipped: float = 0.0

    def __post_init__(self):
        for f in fields(self):
            low = 0 if f.name in ("warm_start", "max_new_tokens") else 1
            if f.type is int and getattr(self, f.name) < low:
                raise ValueError(f"{f.name} must be at least {low}, not {getattr(self, f.name)}")
            if f.name.endswith("learning_rate") and not getattr(self, f.name) > 0:
                raise ValueError(f"{f.name} must be positive, not {getattr(self, f.name)}")
        for name in ("drop_last", "flipped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share in [0, 1], not {getattr(self, name)}")
        if self.prompts % self.minibatches:
            raise ValueError(f"minibatches {self.minibatches} does not divide prompts {self.prompts}")

    @property
    def points(self) -> list[int]:
        """Iterations after which accuracy is measured; 0 is the start."""
        return sorted({round(x) for x in np.linspace(0, self.steps, self.evaluations + 1)})


class Surroundings(NamedTuple):
    """Task and policy before anything is compiled. answers: token ids of the training examples' demonstrations, [] if
    the task has none. game: the task's rewards inside the graph, if it has them."""

    task: Task
    tokenizer: Tokenizer
    game: ReverseDigits | None
    train: Prompts
    test: Prompts
    answers: list[list[int]]
    model: Model
    max_new_tokens: int


class Arena(NamedTuple):
    """collect: (params, draws) -> `Rollouts` [S, B, ...] with rewards and scores. look: (params, rollouts [S, B, ...])
    -> the same, scored under these parameters and the first ones. accuracy: params -> [S], greedy, on the test prompts.
    start: parameters after the warm start. seconds: of the warm start, compilation included."""

    where: Surroundings
    start: Params
    collect: Callable[[Params, "Draws"], Rollouts]
    look: Callable[[Params, Rollouts], Rollouts]
    accuracy: Callable[[Params], np.ndarray]
    seconds: float


def parse_calls(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """``"grpo, grpo(eps_high=0.3)"`` as (label, name, arguments); values are Python literals.

    Raises:
      ValueError: anything but names and calls with keyword arguments that are literals.
    """
    out = []
    try:
        for item in ast.parse(f"({text},)", mode="eval").body.elts:
            call = item if isinstance(item, ast.Call) else ast.Call(item, [], [])
            if call.args:
                raise ValueError("arguments are given by name")
            arguments = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
            out.append((ast.unparse(item), call.func.id, arguments))
    except (SyntaxError, AttributeError, ValueError) as error:
        raise ValueError(f"{text!r} is no list like grpo,grpo(eps_high=0.3): {error}") from None
    return out


def make_task(text: str) -> tuple[Task, Tokenizer, ReverseDigits | None]:
    """The task that ``text`` names, its tokenizer, and the game whose rewards can be part of the graph."""
    calls = parse_calls(text)
    if len(calls) != 1:
        raise ValueError(f"task: a race has one, not {text!r}")
    _, name, given = calls[0]
    arguments = {k: v for k, v in TASK_SIZES.items() if k in task_arguments(name)} | given
    task = build({"name": name, **arguments})
    if name == "toy":
        game = ReverseDigits(**{f.name: arguments[f.name] for f in fields(ReverseDigits) if f.name in arguments})
        return task, game.tokenizer, game
    texts = [text for e in (*task.train, *task.test) for text in (e.question, e.answer or "")]
    return task, CharTokenizer.from_texts(texts), None


def survey(rules: Rules) -> Surroundings:
    """Task and policy of a race.

    Raises:
      ValueError: a task that does not exist, or one whose answers are missing or too long.
    """
    task, tokenizer, game = make_task(rules.task)
    answers, budget = [], rules.max_new_tokens
    if task.demonstrate is not None:
        demonstrate = imperfect(task.demonstrate, rules.drop_last) if rules.drop_last else task.demonstrate
        answers = [[*tokenizer.encode(demonstrate(e)), tokenizer.eos_ids[0]] for e in task.train]
        longest = max(len(tokenizer.encode(task.demonstrate(e))) + 1 for e in task.train)
        budget = budget or longest + ROOM
        if longest > budget:
            raise ValueError(f"max_new_tokens {budget} is too short for answers of {longest} tokens")
    elif rules.warm_start or not budget:
        raise ValueError(f"task {task.name} has no answers to learn from: set warm_start=0 and max_new_tokens")
    tokens = [tokenize(examples, tokenizer, None) for examples in (task.train, task.test)]
    width = max(len(ids) for _, both in tokens for ids in both)
    train, test = (pad_prompts(examples, ids, width, tokenizer.pad_id) for examples, ids in tokens)
    model = transformer.build(transformer.TransformerConfig(tokenizer.vocab_size, rules.width, rules.layers))
    return Surroundings(task, tokenizer, game, train, test, answers, model, budget)


def build_arena(rules: Rules) -> Arena:
    """Warm start of all seeds, and the compiled sampler and scorer."""
    where, began = survey(rules), time.perf_counter()
    model, budget, pad_id = where.model, where.max_new_tokens, where.tokenizer.pad_id
    policy = stats.policy_of(model, wants=frozenset({"logp", "entropy"}))
    sampled = SamplingOptions(budget, tuple(where.tokenizer.eos_ids))
    greedy = sampled.replace(greedy=True)
    start = jax.block_until_ready(warm_start(where, rules))
    questions, exam = ((jnp.asarray(p.tokens), jnp.asarray(p.length)) for p in (where.train, where.test))

    def sample(params: Params, draws: Draws, tokens: Array, length: Array) -> Rollouts:
        i, options = draws.prompt, dict(responses=rules.responses, pad_id=pad_id)
        out = generate(model, params, tokens[i], draws.key, sampled, prompt_length=length[i], **options)
        own = dict(role=jnp.zeros(out.rows, jnp.int32), count=jnp.ones(out.rows))
        return out.replace(prompt=jnp.repeat(i, rules.responses), seed=draws.seed, **own)

    def answer(params: Params, tokens: Array, length: Array) -> Rollouts:
        out = generate(model, params, tokens, jax.random.key(0), greedy, prompt_length=length, pad_id=pad_id)
        return out.replace(prompt=jnp.arange(out.rows, dtype=jnp.int32))

    def look_back(params: Params, first: Params, batch: Rollouts) -> Rollouts:
        old, ref = score(policy, params, batch), score(policy, first, batch)
        return batch.replace(logp_old=old.logp, entropy_old=old.entropy, logp_ref=ref.logp)

    look = jax.jit(jax.vmap(look_back), compiler_options=QUICK)
    draw = rated(where, jax.vmap(sample, (0, 0, None, None)), where.train)
    take_exam = rated(where, jax.vmap(answer, (0, None, None)), where.test)
    return Arena(
        where,
        start,
        lambda params, draws: look(params, start, draw(params, draws, *questions)),
        lambda params, batch: look(params, start, batch),
        lambda params: np.asarray(take_exam(params, *exam).correct.mean(-1)),
        time.perf_counter() - began,
    )


def rated(where: Surroundings, sample: Callable[..., Rollouts], prompts: Prompts) -> Callable[..., Rollouts]:
    """``sample``, compiled, with ``reward`` and ``correct`` of what it gives: in the graph if the task allows it."""
    game = where.game

    def in_graph(*arguments: Any) -> Rollouts:
        batch = sample(*arguments)
        width = batch.tokens.shape[-1] - batch.mask.shape[-1]
        reward = jax.vmap(game.reward)(batch.tokens[..., :width], batch.tokens[..., width:], batch.mask)
        return batch.replace(reward=reward, correct=(reward == 1).astype(jnp.float32))

    compiled = jax.jit(in_graph if game else sample, compiler_options=QUICK)
    return compiled if game else lambda *arguments: judge(where, prompts, compiled(*arguments))


def judge(where: Surroundings, prompts: Prompts, batch: Rollouts) -> Rollouts:
    """The batch [..., B] with ``reward`` and ``correct`` by the task's verifier, on the host."""
    shape = batch.mask.shape
    examples = [prompts.examples[i] for i in np.asarray(batch.prompt).reshape(-1)]
    scores = where.task.score(examples, texts(where, batch))
    reward, correct = (np.array([getattr(s, k) for s in scores], np.float32) for k in ("reward", "correct"))
    return batch.replace(reward=reward.reshape(shape[:-1]), correct=correct.reshape(shape[:-1]))


def texts(where: Surroundings, batch: Rollouts) -> list[str]:
    """The completions of rows [..., B] as text."""
    width, ids, mask = batch.mask.shape[-1], np.asarray(batch.tokens), np.asarray(batch.mask) > 0
    rows = zip(ids[..., -width:].reshape(-1, width), mask.reshape(-1, width), strict=True)
    return [where.tokenizer.decode(row[kept].tolist()) for row, kept in rows]


def warm_start(where: Surroundings, rules: Rules) -> Params:
    """Random parameters [S, ...] after ``rules.warm_start`` supervised steps, all in one compiled program."""
    model, objective = where.model, make("sft")
    apply = stats.policy_of(model, wants=objective.asks.wants)
    adam = dict(name="adam", learning_rate=rules.warm_learning_rate, clip_norm=1.0, schedule=dict(name="constant"))
    optimizer = make_optimizer(adam, max(rules.warm_start, 1))

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
    data = jax.tree.map(jnp.asarray, demonstrations(where, range(len(where.train)), where.answers))
    shape = rules.warm_start, rules.warm_batch
    rows = [np.random.default_rng(seed).integers(data.rows, size=shape) for seed in range(rules.seeds)]
    return jax.jit(jax.vmap(train, (0, 0, None)), compiler_options=QUICK)(params, np.stack(rows), data)


def demonstrations(where: Surroundings, indices: Iterable[int], answers: Sequence[list[int]]) -> Rollouts:
    """These answers to the training prompts of ``indices``."""
    train = where.train
    prompts = [train.tokens[i, train.tokens.shape[1] - train.length[i] :].tolist() for i in indices]
    size = dict(prompt_width=train.tokens.shape[1], width=where.max_new_tokens, pad_id=where.tokenizer.pad_id)
    return Demonstrations(prompts, answers, **size)


class Draws(NamedTuple):
    """What is random in an iteration, for every seed: a function of seed and iteration alone, drawn on the host (its
    code would cost seconds of compilation).

    prompt [S, G] indices, seed [S, B] of the rows, key [S] of the uniforms, rows [S, steps, R] of each optimizer step.
    """

    prompt: np.ndarray
    seed: np.ndarray
    key: Array
    rows: np.ndarray


def draws(rules: Rules, prompts: int, iteration: int) -> Draws:
    """The `Draws` of an iteration, out of ``prompts`` training prompts; an optimizer step sees whole groups."""
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
