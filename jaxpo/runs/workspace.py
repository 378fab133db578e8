"""Everything a run computes with, built once from its config: task, tokenizer, mesh, policy, objective, compiled
functions."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts
from jaxpo.config import checks
from jaxpo.config.resolve import microbatch_rows, objective_of, protocol_of, sampling_of, transformer_of
from jaxpo.learning import references
from jaxpo.learning.compiled import Compiled
from jaxpo.learning.needs import heads_of, slots_of
from jaxpo.learning.programs import compile_functions, init_state, optimizer_of, several
from jaxpo.learning.state import TrainState
from jaxpo.learning.trainable import lora_scale, random_params
from jaxpo.objectives import Objective
from jaxpo.parallel import TOKENS, make_mesh, replicated, reshaped, rows_over_mesh, shardings
from jaxpo.parallel.distributed import from_rows, own_rows, place, take_rows
from jaxpo.parallel.host import keep_freed_memory
from jaxpo.parallel.offload import check_host_memory, host_shardings, to_host_memory
from jaxpo.policy import hf, lora, transformer
from jaxpo.policy.transformer import Model, Params
from jaxpo.protocols.protocol import Protocol
from jaxpo.rollout import SamplingOptions
from jaxpo.rollout.stopping import stop_table
from jaxpo.runs import preference_data
from jaxpo.runs.preference_data import templates_of
from jaxpo.tasks import Example, Task, build
from jaxpo.tasks.preferences.encode import filled
from jaxpo.tasks.preferences.records import Row
from jaxpo.tasks.preferences.sets import PLACES, PreferenceSet
from jaxpo.text.tokenizers import (
    CharTokenizer,
    IntegerTokenizer,
    PretrainedTokenizer,
    Tokenizer,
    from_json,
    question_of,
)

BLANK = [Example(0, "", None, {})]
NOTHING = Task("nothing", BLANK, BLANK, None, None, {})  # of a workspace without examples


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts of a set of examples: tokens [n, P] left-padded, length [n]; ``examples[i]`` belongs to row
    i."""

    examples: Sequence[Example]
    tokens: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class Workspace:
    """The fixed surroundings of a run. ``step`` and the other `Compiled` functions hold no state."""

    config: ConfigDict
    task: Task
    tokenizer: Tokenizer
    mesh: Mesh
    model: Model
    base: Params | None  # frozen weights that adapters are trained beside; None = everything is trained
    objective: Objective
    protocol: Protocol
    sampling: SamplingOptions
    train: Prompts
    test: Prompts
    preferences: preference_data.Preferences | None
    report: dict[str, float]
    reshard: Compiled | None  # params -> as another mesh samples with them; None = the one that trains samples
    generate: Compiled  # (sampler's params, tokens, length, key, options, responses[, partner, share]) -> Rollouts
    score: Compiled  # (params, batch, plan, bins) -> TokenStats
    prepare: Compiled  # (batch, state) -> (batch, state)
    step: Compiled  # (train state, batch, rows, plan, fresh, bins) -> (train state, metrics)
    # of some protocols only:
    complete: Compiled  # (sampler's params, tokens, length, budget, key, options, responses) -> Rollouts
    noise: Compiled  # (train state, batch, halves) -> the gradients of two half-batches, as numbers
    measure: Compiled  # (params, batch, objective state) -> its metrics on held-out units, to be merged
    opinion: Compiled  # (params, batch) -> what the heads of a reward model say of its rows, without log-probs

    @property
    def compiled(self) -> tuple[Compiled, ...]:
        """The functions that this run has compiled."""
        every = self.reshard, self.generate, self.score, self.prepare, self.step, self.complete, self.noise
        every += (self.measure, self.opinion)
        return tuple(f for f in every if f is not None and f.compilations)

    def sampler_params(self, params: Params) -> Params:
        """The parameters as ``generate`` and ``complete`` take them."""
        return params if self.reshard is None else self.reshard(params)

    def optimizer_steps(self) -> int:
        """Optimizer steps of one iteration."""
        return self.config.training.epochs * self.config.training.minibatches

    def init_params(self, key: Array) -> Params:
        """Parameters to train, random ones, made where they will live: with LoRA adapters only, and always the heads
        that the objective asks for."""
        init = partial(random_params, self.config, self.model, self.objective)
        return jax.jit(init, out_shardings=shardings(jax.eval_shape(init, key), self.mesh))(key)

    def companion(self, params: Params) -> Params:
        """A frozen copy of the parameters, where such copies lie."""
        if self.config.training.offload_reference:
            return to_host_memory(params, self.mesh)
        return jax.tree.map(jnp.copy, params)

    def companion_shardings(self, params: Params) -> Any:
        """Where the arrays of `companion` lie."""
        return (host_shardings if self.config.training.offload_reference else shardings)(params, self.mesh)

    def whole(self, params: Params) -> Params:
        """The parameters of a plain policy: adapters added to the weights they belong to."""
        if self.base is None:
            return params
        return jax.jit(partial(lora.merge, scale=lora_scale(self.config)))(self.base, params)

    def init_state(self, params: Params) -> TrainState:
        """Optimizer and objective state for ``params``."""
        return init_state(params, optimizer_of(self.config), self.objective, self.mesh)

    def put(self, tree: Any) -> Any:
        """Arrays [B, ...] onto the mesh, rows spread over it."""
        return rows_over_mesh(tree, self.mesh)

    def put_whole(self, tree: Any) -> Any:
        """Arrays onto every device of the mesh."""
        return place(tree, replicated(self.mesh))

    def texts(self, rollouts: Rollouts) -> list[str]:
        """The completions as text, without special tokens and cut before a stop string."""
        completions, mask = np.asarray(rollouts.completions), np.asarray(rollouts.mask)
        texts = [self.tokenizer.decode(row[m > 0].tolist()) for row, m in zip(completions, mask, strict=True)]
        for stop in self.config.sampling.stop:
            texts = [text.split(stop)[0] for text in texts]
        return texts


def judge(workspace: Workspace, examples: Sequence[Example], rollouts: Rollouts) -> np.ndarray:
    """reward, correct and error (0 or 1) [B, 3] of the rows, which answer ``examples`` [B]. Each process judges rows of
    its own; all get the whole."""
    rows = own_rows(rollouts.tokens)
    said = Rollouts(tokens=rollouts.tokens, mask=rollouts.mask, truncated=rollouts.truncated)
    own = jax.tree.map(lambda x: take_rows(x, rows), said)
    scores = workspace.task.score([examples[i] for i in rows], workspace.texts(own)) if len(rows) else []
    values = np.array([(s.reward, s.correct, s.error is not None) for s in scores], np.float64).reshape(-1, 3)
    return from_rows(values, rows, rollouts.rows)


def prepare_process(cache: str | None) -> None:
    """Settings of the process that a run wants: compiled programs are kept between runs, freed memory on the CPU too.

    Args:
      cache: folder of the compiled programs; None = the user's cache folder.
    """
    path = cache or os.path.join(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "jaxpo", "compiled")
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if jax.default_backend() == "cpu":
        keep_freed_memory()


def texts_of(row: Row) -> list[str]:
    """The texts of a row: of its prompts, its answers, and the tool calls after them."""
    prompts = [row.prompt, *(answer.prompt for answer in row.answers if answer.prompt)]
    answers = [text for answer in row.answers for text in (answer.text, *(part for _, part in answer.trace))]
    return [*map(question_of, prompts), *answers]


def make_tokenizer(config: ConfigDict, task: Task, data: PreferenceSet | None = None) -> Tokenizer:
    """The tokenizer that the config names; characters are those of the run that ``config.init_from`` names, whose
    parameters know them by their numbers, or come from the task's questions and answers, and from data.

    Raises:
      ValueError: the run has a tokenizer of another kind."""
    match config.tokenizer.name:
        case "characters" if config.init_from and (held := Path(config.init_from) / "tokenizer.json").is_file():
            tokenizer = from_json(json.loads(held.read_text()))
            if not isinstance(tokenizer, CharTokenizer):
                raise ValueError(
                    f"config.tokenizer.name is 'characters', and config.init_from {config.init_from!r} has another "
                    "tokenizer: name that"
                )
            return tokenizer
        case "characters":
            texts = [text for e in (*task.train, *task.test) for text in (question_of(e.question), e.answer or "")]
            rows = [] if data is None else [*data.train, *data.test]
            texts += [text for row in rows for text in texts_of(row)]
            used = {} if data is None else templates_of(objective_of(config), data)
            texts += [filled("", text, dict.fromkeys(PLACES[name], "")) for name, text in used.items()]
            return CharTokenizer.from_texts(texts)
        case "integers":
            return IntegerTokenizer(config.tokenizer.base)
        case "pretrained":
            return PretrainedTokenizer(config.tokenizer.path, config.tokenizer.chat_template)


def unused_ids(model: Model, tokenizer: Tokenizer, *, most: int = 512) -> int:
    """How many of the model's ids are no token: the rows that a pretrained model's tables are padded with.

    Raises:
      ValueError: the tokenizer has more tokens than the model, or so many fewer that it is another model's.
    """
    unused = model.config.vocab_size - tokenizer.vocab_size
    if not 0 <= unused < most:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the policy {model.config.vocab_size}: set "
            "config.tokenizer.name to pretrained and its path to the model's own"
        )
    return unused


def tokenize(
    examples: Sequence[Example], tokenizer: Tokenizer, width: int | None
) -> tuple[list[Example], list[list[int]]]:
    """The examples whose prompt has at most ``width`` tokens (None = any), and those prompts."""
    ids = [tokenizer.encode(tokenizer.render(e.question)) for e in examples]
    kept = [i for i, x in enumerate(ids) if width is None or len(x) <= width]
    return [examples[i] for i in kept], [ids[i] for i in kept]


def pad_prompts(examples: Sequence[Example], ids: Sequence[Sequence[int]], width: int, pad_id: int) -> Prompts:
    """Left-pad to ``width``."""
    tokens = np.full((len(ids), width), pad_id, np.int32)
    for row, x in zip(tokens, ids, strict=True):
        row[width - len(x) :] = x
    return Prompts(examples, tokens, np.array([len(x) for x in ids], np.int32))


def examples_of(config: ConfigDict) -> tuple[Task, PreferenceSet | None]:
    """The task and the preference set that the config names; a set alone makes a task of its prompts."""
    task = build({k: v for k, v in config.task.items() if v is not None}) if config.task.name else None
    data = preference_data.read(config, task)
    return task or preference_data.task_of(data), data


def setup(
    config: ConfigDict,
    *,
    tokenizer: Tokenizer | None = None,
    examples: bool = True,
    report: Callable[[str], None] = print,
) -> Workspace:
    """Build the workspace of a validated config.

    Args:
      tokenizer: instead of the config's (the one that a run directory holds), which needs ``examples``.
      examples: of the config's task and data; False = none are read or made, for what only samples, judges or exports.
      report: where messages about compilation go.

    Raises:
      ValueError: whatever `jaxpo.config.checks.validate` refuses, no prompt short enough, or an objective whose
        needs this loop cannot meet.
    """
    checks.validate(config, len(jax.devices()))
    objective, protocol = objective_of(config), protocol_of(config)
    slots_of(objective, protocol.provides)
    heads_of(objective, config.heads)
    references.check(objective, protocol.keeps)
    if objective.unit.layout and protocol.rows is None:
        raise ValueError(
            f"objective {config.objective.name!r} learns from units {objective.unit.layout}, which rollouts of "
            "single completions are not: set config.data.name, or config.protocol.name to judged"
        )
    task, data = examples_of(config) if examples else (NOTHING, None)
    tokenizer = tokenizer or make_tokenizer(config, task, data)
    mesh = make_mesh(config.mesh)
    if config.training.offload_reference:
        check_host_memory(mesh)
    limit = config.rollout.prompt_width
    (train, train_ids), (test, test_ids) = (
        tokenize(task.train, tokenizer, limit),
        tokenize(task.test[: config.evaluation.prompts], tokenizer, limit),
    )
    if not train or not test:
        raise ValueError(
            f"config.rollout.prompt_width {limit} is shorter than every {'test' if train else 'training'} prompt"
        )
    width = limit or max(map(len, [*train_ids, *test_ids]))
    dropped = len(task.train) - len(train) + min(len(task.test), config.evaluation.prompts) - len(test)
    pairs = None
    if data is not None:
        pairs = preference_data.encoded(config, objective, data, tokenizer, protocol.judges)
    model = transformer.build(transformer_of(config, tokenizer.vocab_size), several(mesh))
    unused = unused_ids(model, tokenizer)
    base = hf.load(hf.open_source(config.policy.path), model.config, mesh) if config.lora.rank else None
    table = None
    if config.sampling.stop:
        table = jnp.asarray(stop_table(config.sampling.stop, [*tokenizer.token_bytes(), *[b""] * unused]))
    return Workspace(
        config=config,
        task=task,
        tokenizer=tokenizer,
        mesh=mesh,
        model=model,
        base=base,
        objective=objective,
        protocol=protocol,
        sampling=sampling_of(config, tokenizer.eos_ids, table),
        train=pad_prompts(train, train_ids, width, tokenizer.pad_id),
        test=pad_prompts(test, test_ids, width, tokenizer.pad_id),
        preferences=pairs,
        report={**task.report, "prompts/dropped": float(dropped), **(pairs.report if pairs else {})},
        **compile_functions(
            config, mesh, model, objective, protocol.compiles, microbatch_rows(config), tokenizer.pad_id, report, base
        ),
    )


def shard_count(workspace: Workspace) -> int:
    """Prompts of any rollout must be a multiple of this."""
    meshes = workspace.mesh, reshaped(workspace.mesh, workspace.config.rollout.mesh)
    return math.lcm(*(math.prod(mesh.shape[axis] for axis in TOKENS) for mesh in meshes))
