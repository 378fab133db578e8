"""Everything a run computes with, built once from its resolved config."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpo.config.paths import expand_paths
from jaxpo.config.resolve import resolve
from jaxpo.config.resolved import Resolved
from jaxpo.files import read_json
from jaxpo.learning.programs import Computation, Programs, compile_programs, init_state, optimizer_of, packed, several
from jaxpo.learning.state import TrainState
from jaxpo.learning.trainable import lora_scale, policy_alone, random_params
from jaxpo.objectives import Objective
from jaxpo.parallel import TOKENS, make_mesh, replicated, reshaped, rows_over_mesh, shardings
from jaxpo.parallel.distributed import place
from jaxpo.parallel.host import keep_freed_memory, open_devices
from jaxpo.parallel.offload import check_host_memory, host_shardings, to_host_memory
from jaxpo.policy import hf, lora, transformer
from jaxpo.policy.stats import Other
from jaxpo.policy.transformer import Model, Params
from jaxpo.protocols.protocol import Protocol
from jaxpo.rollout import SamplingOptions
from jaxpo.rollout.stopping import spelled, stop_table
from jaxpo.runs import preference_data
from jaxpo.runs.kept import fingerprint, origin_of
from jaxpo.runs.memory import gigabytes, host_memory
from jaxpo.runs.preference_data import templates_of
from jaxpo.runs.questions import Questions, pad_prompts, texts_of, tokenize
from jaxpo.tasks import Example, Task, build
from jaxpo.tasks.preferences.encode import filled
from jaxpo.tasks.preferences.records import Row
from jaxpo.tasks.preferences.sets import PLACES, PreferenceSet
from jaxpo.text.conversations import plain_text
from jaxpo.text.tokenizers import CharTokenizer, PretrainedTokenizer, Tokenizer, from_json

FAR_LONGER = 20  # times the usual length of a prompt
BLANK = [Example(0, "", None, {})]
NOTHING = Task("nothing", BLANK, BLANK, None, None, {})  # of a workspace without examples


class Critic(NamedTuple):
    """A critic of its own. load: its parameters at the start of a run."""

    model: Model
    load: Callable[[], Params]


class Models(NamedTuple):
    """Models of a run besides the policy.

    others: frozen ones, by name.
    critic: a critic of its own; None = it is a head on the policy, or there is none.
    """

    others: Mapping[str, Other]
    critic: Critic | None


LoadModels = Callable[[Resolved, Tokenizer, Mesh], Models]


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
    origin: hashes of what the run is trained on (`jaxpo.runs.kept`).
    models: frozen models beside the policy that the objective needs, by name.
    critic: a critic of its own.
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
    origin: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Other] = field(default_factory=dict)
    critic: Critic | None = None

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
        objective asks for, and a critic of its own."""
        critic = None if self.critic is None else self.critic.model.config
        init = partial(random_params, self.config, self.model, self.resolved.heads, critic=critic)
        return jax.jit(init, out_shardings=shardings(jax.eval_shape(init, key), self.mesh))(key)

    def reference(self, params: Params) -> Params:
        """A frozen copy of the policy's parameters, where such copies lie."""
        params = policy_alone(params)
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

    Raises:
      ValueError: the devices that JAX_PLATFORMS asks for are not there.
    """
    open_devices()
    path = cache or os.path.join(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "jaxpo", "compiled")
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if jax.default_backend() == "cpu":
        keep_freed_memory()


def texts_of_row(row: Row) -> list[str]:
    """The texts of a row: of its prompts, its answers, and the tool calls after them."""
    prompts = [row.prompt, *(answer.prompt for answer in row.answers if answer.prompt)]
    answers = [text for answer in row.answers for text in (answer.text, *(part for _, part in answer.trace))]
    return [*map(plain_text, prompts), *answers]


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


def within_table(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """The tokenizer beside a vocabulary table of so many rows.

    Rows that no token uses do no harm, nor do tokens beyond the table that no text has: a text with one cannot be
    encoded.

    Raises:
      ValueError: a pad or end token beyond the table, or so few tokens that the tokenizer is another model's.
    """
    beyond = [i for i in (tokenizer.pad_id, *tokenizer.eos_ids) if i >= rows]
    tokens = tokenizer.vocab_size
    too_few = rows - tokens >= 512 and 2 * tokens < rows
    if too_few or tokens > rows and not isinstance(tokenizer, PretrainedTokenizer):
        raise ValueError(
            f"the tokenizer has {tokens} tokens, the policy {rows}: set config.tokenizer.name to "
            "pretrained and its path to the model's own"
        )
    if beyond:
        raise ValueError(
            f"token {beyond[0]}, which pads or ends texts, is beyond the {rows} rows of the policy's vocabulary table: "
            "name another end with config.tokenizer.end, or take the model's own tokenizer"
        )
    return tokenizer if tokens <= rows else tokenizer.within(rows)


def examples_of(config: ConfigDict) -> tuple[Task, PreferenceSet | None]:
    """The task and the preference set that the config names; a set alone makes a task of its prompts."""
    given = {k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in config.task.items() if v is not None}
    task = build(given) if config.task.name else None
    data = preference_data.read(config, task)
    return task or preference_data.task_of(data), data


def longest(examples: Sequence[Example], ids: Sequence[Sequence[int]]) -> str:
    """Which prompt is the longest and where it is in the file, if it is far longer than the others; "" otherwise."""
    sizes = np.array([len(x) for x in ids])
    at, typical = int(sizes.argmax()), float(np.percentile(sizes, 99, method="lower"))
    typical = min(typical, float(np.median(sizes))) if len(sizes) < 100 else typical
    if sizes[at] < FAR_LONGER * typical:
        return ""
    text = plain_text(examples[at].question)
    return (
        f"the longest prompt ({sizes[at]:,} tokens, {sizes[at] / max(typical, 1):,.0f} times what is usual; it is item "
        f"{examples[at].index + 1} of its data and begins with {text[:40]!r}) widens all others: set "
        "config.rollout.prompt_width, and longer ones are dropped and counted"
    )


def far_longer(workspace: "Workspace") -> str:
    """What `longest` says of the training prompts of a run."""
    train = workspace.questions.train
    return longest(train.examples, [range(n) for n in train.length])


def check_width(width: int, examples: Sequence[Example], ids: Sequence[Sequence[int]]) -> None:
    """Raise ``ValueError`` if the prompts, padded to ``width``, do not fit into the host's memory."""
    there, what = host_memory()
    if (needed := 4 * width * len(ids)) > there:
        raise ValueError(
            f"{len(ids):,} prompts of {width:,} tokens each need {gigabytes(needed)}, and {what} is "
            f"{gigabytes(there)}: {longest(examples, ids) or 'lower config.rollout.prompt_width'}"
        )


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
    check_width(width, [*train, *test], [*train_ids, *test_ids])
    prompts = [pad_prompts(*x, width, tokenizer.pad_id) for x in ((train, train_ids), (test, test_ids))]
    dropped = len(task.train) - len(train) + len(test_examples) - len(test)
    sizes = config.sampling.max_new_tokens, tuple(config.sampling.stop)
    return Questions(task, tokenizer, *prompts, *sizes, rewards=task.rewards), dropped


def setup(
    config: ConfigDict,
    *,
    tokenizer: Tokenizer | None = None,
    examples: bool = True,
    check: Callable[[Resolved], None] | None = None,
    check_data: Callable[[Mapping[str, Any]], None] | None = None,
    load_models: LoadModels | None = None,
    report: Callable[[str], None] = print,
) -> Workspace:
    """Resolve a config and build its workspace.

    Args:
      tokenizer: instead of the config's (the one that a run directory holds), which needs ``examples``.
      examples: of the config's task and data; False = none are read or made, for what only samples, judges or exports.
      check: raises ``ValueError`` for a run that another program is for, before anything is read.
      check_data: raises ``ValueError`` for data of another run, by their `jaxpo.runs.kept.fingerprint`.
      load_models: gives the models beside the policy (`jaxpo.runs.models.load_models`); None = there are none, as for
        what does not train.
      report: where messages about compilation go.

    Raises:
      ValueError: whatever `jaxpo.config.resolve.resolve` refuses, or no prompt short enough.
    """
    tied = config.policy_temperature is None
    resolved = resolve(expand_paths(config), len(jax.devices()))
    if tied and (temperature := resolved.config.policy_temperature) != 1:
        report(
            f"the trainer scores at temperature {temperature:g}, that of config.sampling: "
            "config.policy_temperature is not set"
        )
    if check:
        check(resolved)
    objective, facts = resolved.objective, resolved.protocol.facts
    task, data = examples_of(config) if examples else (NOTHING, None)
    known = fingerprint(task, data) if examples else {}
    if check_data and examples:
        check_data(known)
    tokenizer = tokenizer or make_tokenizer(resolved, task, data)
    shape = resolved.transformer(tokenizer.vocab_size)
    tokenizer = within_table(tokenizer, shape.vocab_size)
    if data is not None:
        if data.unread:
            report(f"{data.name}: nothing reads the columns {', '.join(data.unread)}")
        data = preference_data.usable(data, tokenizer)
        task = task if config.task.name else preference_data.task_of(data)
    mesh = make_mesh(config.mesh)
    if config.training.offload_reference:
        check_host_memory(mesh)
    questions, dropped = questions_of(config, task, tokenizer)
    pairs = None if data is None else preference_data.encoded(resolved, data, tokenizer)
    model = transformer.build(shape, several(mesh))
    base = hf.load(hf.open_source(config.policy.path), model.config, mesh) if config.lora.rank else None
    table = None
    if config.sampling.stop:
        pieces = spelled(config.sampling.stop, tokenizer.token_bytes(), tokenizer.control)
        unused = [b""] * max(0, shape.vocab_size - len(pieces))
        table = jnp.asarray(stop_table(config.sampling.stop, [*pieces[: shape.vocab_size], *unused]))
    models, critic = load_models(resolved, tokenizer, mesh) if load_models else Models({}, None)
    rows, network = resolved.microbatch_rows, None if critic is None else critic.model
    of = Computation(config, mesh, model, objective, tokenizer.pad_id, rows, base, models, network)
    return Workspace(
        resolved=resolved,
        questions=questions,
        preferences=pairs,
        mesh=mesh,
        model=model,
        base=base,
        sampling=resolved.sampling(tokenizer.eos_ids, table),
        programs=compile_programs(of, facts.compiles, report),
        origin=origin_of(known, tokenizer, base),
        report={**task.report, "prompts/dropped": float(dropped), **(pairs.report if pairs else {})},
        models=models,
        critic=critic,
    )


def shard_count(workspace: Workspace) -> int:
    """Prompts of any rollout must be a multiple of this."""
    meshes = workspace.mesh, reshaped(workspace.mesh, workspace.config.rollout.mesh)
    return math.lcm(*(math.prod(mesh.shape[axis] for axis in TOKENS) for mesh in meshes))
