"""Everything a run computes with, built once from its resolved config."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpo.config.resolve import resolve
from jaxpo.config.resolved import Resolved
from jaxpo.files import read_json
from jaxpo.learning.programs import Computation, Programs, compile_programs, init_state, optimizer_of, packed, several
from jaxpo.learning.state import TrainState
from jaxpo.learning.trainable import lora_scale, random_params
from jaxpo.objectives import Objective
from jaxpo.parallel import TOKENS, make_mesh, replicated, reshaped, rows_over_mesh, shardings
from jaxpo.parallel.distributed import place
from jaxpo.parallel.host import keep_freed_memory
from jaxpo.parallel.offload import check_host_memory, host_shardings, to_host_memory
from jaxpo.policy import hf, lora, transformer
from jaxpo.policy.stats import Other
from jaxpo.policy.transformer import Model, Params
from jaxpo.protocols.protocol import Protocol
from jaxpo.rollout import SamplingOptions
from jaxpo.rollout.stopping import stop_table
from jaxpo.runs import preference_data
from jaxpo.runs.preference_data import templates_of
from jaxpo.runs.questions import Questions, pad_prompts, texts_of, tokenize
from jaxpo.tasks import Example, Task, build
from jaxpo.tasks.preferences.encode import filled
from jaxpo.tasks.preferences.records import Row
from jaxpo.tasks.preferences.sets import PLACES, PreferenceSet
from jaxpo.text.tokenizers import CharTokenizer, Tokenizer, from_json, question_of

BLANK = [Example(0, "", None, {})]
LoadModels = Callable[[Resolved, Tokenizer, Mesh], Mapping[str, Other]]
NOTHING = Task("nothing", BLANK, BLANK, None, None, {})  # of a workspace without examples


@dataclass(frozen=True)
class Workspace:
    """The fixed surroundings of a run.

    resolved: the config and what it names.
    questions: the task as tokens.
    preferences: preference data as tokens; None = there are none.
    mesh: that trains.
    model: the policy's.
    base: frozen weights that adapters are trained beside; None = everything is trained.
    sampling: the configured sampling options.
    programs: the compiled functions.
    report: what was found while building, as metrics.
    models: models beside the policy that the objective needs, by name.
    """

    resolved: Resolved
    questions: Questions
    preferences: preference_data.Preferences | None
    mesh: Mesh
    model: Model
    base: Params | None
    sampling: SamplingOptions
    programs: Programs
    report: dict[str, float]
    models: Mapping[str, Other] = field(default_factory=dict)

    @property
    def config(self) -> ConfigDict:
        return self.resolved.config

    @property
    def objective(self) -> Objective:
        return self.resolved.objective

    @property
    def protocol(self) -> Protocol:
        return self.resolved.protocol

    @property
    def task(self) -> Task:
        return self.questions.task

    @property
    def tokenizer(self) -> Tokenizer:
        return self.questions.tokenizer

    def init_params(self, key: Array) -> Params:
        """Random parameters to train, made where they will live: with LoRA adapters only, and always the heads that the
        objective asks for."""
        init = partial(random_params, self.config, self.model, self.resolved.heads)
        return jax.jit(init, out_shardings=shardings(jax.eval_shape(init, key), self.mesh))(key)

    def reference(self, params: Params) -> Params:
        """A frozen copy of the parameters, where such copies lie."""
        if self.config.training.offload_reference:
            return to_host_memory(params, self.mesh)
        return jax.tree.map(jnp.copy, params)

    def reference_shardings(self, params: Params) -> Any:
        """Where the arrays of `reference` lie."""
        return (host_shardings if self.config.training.offload_reference else shardings)(params, self.mesh)

    def whole(self, params: Params) -> Params:
        """The parameters of a plain policy: adapters added to the weights they belong to."""
        if self.base is None:
            return params
        return jax.jit(partial(lora.merge, scale=lora_scale(self.config)))(self.base, params)

    def init_state(self, params: Params) -> TrainState:
        """Optimizer and objective state for ``params``."""
        return init_state(params, optimizer_of(self.config, self.objective), self.objective, self.mesh)

    def put(self, tree: Any) -> Any:
        """Arrays [B, ...] onto the mesh, rows spread over it."""
        return rows_over_mesh(tree, self.mesh)

    def put_whole(self, tree: Any) -> Any:
        """Arrays onto every device of the mesh."""
        return place(tree, replicated(self.mesh))

    def score(self, params: Params, seen: Any) -> Any:
        """What the policy says of rows on the mesh (`jaxpo.protocols.rows.as_scored`), packed if the run packs."""
        return self.programs.score_old(params, seen, **self.packed(seen))

    def score_other(self, name: str, seen: Any) -> Any:
        """What the model ``name`` beside the policy says of rows on the mesh, packed if the run packs."""
        return self.programs.score_others[name](self.models[name].params, seen, **self.packed(seen))

    def packed(self, seen: Any) -> dict[str, Any]:
        """How rows are packed that are scored."""
        slices = self.config.training.minibatches * self.config.training.microbatches
        return packed(self.config, self.mesh, seen, slices)


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


def texts_of_row(row: Row) -> list[str]:
    """The texts of a row: of its prompts, its answers, and the tool calls after them."""
    prompts = [row.prompt, *(answer.prompt for answer in row.answers if answer.prompt)]
    answers = [text for answer in row.answers for text in (answer.text, *(part for _, part in answer.trace))]
    return [*map(question_of, prompts), *answers]


def make_tokenizer(resolved: Resolved, task: Task, data: PreferenceSet | None = None) -> Tokenizer:
    """The tokenizer that the config names.

    Characters are those of the run that ``config.init_from`` names, whose parameters know them by their numbers, or
    come from the task's questions, answers and demonstrations, and from data.

    Raises:
      ValueError: the run has a tokenizer of another kind."""
    config = resolved.config
    held = Path(config.init_from) / "tokenizer.json" if config.init_from else None
    if config.tokenizer.name == "characters" and held and held.is_file():
        tokenizer = from_json(read_json(held))
        if not isinstance(tokenizer, CharTokenizer):
            raise ValueError(
                f"config.tokenizer.name is 'characters', and config.init_from {config.init_from!r} has another "
                "tokenizer: name that"
            )
        return tokenizer

    def texts() -> list[str]:
        out = texts_of(task)
        if data is not None:
            out += [text for row in (*data.train, *data.test) for text in texts_of_row(row)]
            templates = templates_of(resolved.objective, data).items()
            out += [filled("", text, dict.fromkeys(PLACES[name], "")) for name, text in templates]
        return out

    return resolved.tokenizer(texts)


def unused_ids(model: Model, tokenizer: Tokenizer, *, most: int = 512) -> int:
    """Vocabulary rows that no token uses: padding of a pretrained embedding.

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


def examples_of(config: ConfigDict) -> tuple[Task, PreferenceSet | None]:
    """The task and the preference set that the config names; a set alone makes a task of its prompts."""
    task = build({k: v for k, v in config.task.items() if v is not None}) if config.task.name else None
    data = preference_data.read(config, task)
    return task or preference_data.task_of(data), data


def questions_of(config: ConfigDict, task: Task, tokenizer: Tokenizer) -> tuple[Questions, int]:
    """The task as tokens, and how many prompts were dropped because they are too long.

    Raises:
      ValueError: no prompt is short enough."""
    limit, test_examples = config.rollout.prompt_width, task.test[: config.evaluation.prompts]
    train, train_ids = tokenize(task.train, tokenizer, limit)
    test, test_ids = tokenize(test_examples, tokenizer, limit)
    if not train or not test:
        raise ValueError(
            f"config.rollout.prompt_width {limit} is shorter than every {'test' if train else 'training'} prompt"
        )
    width = limit or max(map(len, [*train_ids, *test_ids]))
    prompts = [pad_prompts(*x, width, tokenizer.pad_id) for x in ((train, train_ids), (test, test_ids))]
    dropped = len(task.train) - len(train) + len(test_examples) - len(test)
    return Questions(task, tokenizer, *prompts, config.sampling.max_new_tokens, tuple(config.sampling.stop)), dropped


def setup(
    config: ConfigDict,
    *,
    tokenizer: Tokenizer | None = None,
    examples: bool = True,
    check: Callable[[Resolved], None] | None = None,
    load_models: LoadModels | None = None,
    report: Callable[[str], None] = print,
) -> Workspace:
    """Resolve a config and build its workspace.

    Args:
      tokenizer: instead of the config's (the one that a run directory holds), which needs ``examples``.
      examples: of the config's task and data; False = none are read or made, for what only samples, judges or exports.
      check: raises ``ValueError`` for a run that another program is for, before anything is read.
      load_models: gives the models beside the policy (`jaxpo.runs.models.load_models`); None = there are none, as for
        what does not train.
      report: where messages about compilation go.

    Raises:
      ValueError: whatever `jaxpo.config.resolve.resolve` refuses, or no prompt short enough.
    """
    resolved = resolve(config, len(jax.devices()))
    if check:
        check(resolved)
    objective, facts = resolved.objective, resolved.protocol.facts
    task, data = examples_of(config) if examples else (NOTHING, None)
    tokenizer = tokenizer or make_tokenizer(resolved, task, data)
    mesh = make_mesh(config.mesh)
    if config.training.offload_reference:
        check_host_memory(mesh)
    questions, dropped = questions_of(config, task, tokenizer)
    pairs = None if data is None else preference_data.encoded(resolved, data, tokenizer)
    model = transformer.build(resolved.transformer(tokenizer.vocab_size), several(mesh))
    unused = unused_ids(model, tokenizer)
    base = hf.load(hf.open_source(config.policy.path), model.config, mesh) if config.lora.rank else None
    table = None
    if config.sampling.stop:
        table = jnp.asarray(stop_table(config.sampling.stop, [*tokenizer.token_bytes(), *[b""] * unused]))
    models = load_models(resolved, tokenizer, mesh) if load_models else {}
    of = Computation(config, mesh, model, objective, tokenizer.pad_id, resolved.microbatch_rows, base, models)
    return Workspace(
        resolved=resolved,
        questions=questions,
        preferences=pairs,
        mesh=mesh,
        model=model,
        base=base,
        sampling=resolved.sampling(tokenizer.eos_ids, table),
        programs=compile_programs(of, facts.compiles, report),
        report={**task.report, "prompts/dropped": float(dropped), **(pairs.report if pairs else {})},
        models=models,
    )


def shard_count(workspace: Workspace) -> int:
    """Prompts of any rollout must be a multiple of this."""
    meshes = workspace.mesh, reshaped(workspace.mesh, workspace.config.rollout.mesh)
    return math.lcm(*(math.prod(mesh.shape[axis] for axis in TOKENS) for mesh in meshes))
