"""The run's configuration: its fields and defaults, how names fill in their own fields, and every check that needs no
compilation.

A config file has ``get_config()``; it starts from `default` and sets what differs. Blocks with a ``name`` (objective,
task, optimizer, schedule,
tokenizer) hold the arguments of what they name: `fill` adds their defaults *before* flags are parsed, so that
``--config.objective.name=dapo --config.objective.eps_high=0.3`` works and a misspelt field fails with the nearest one.
"""

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxpo import registry
from jaxpo.objectives import Objective, Protocol, make
from jaxpo.parallel import AXES
from jaxpo.policy import lora
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.families import config_from_hf
from jaxpo.policy.hf import read_config
from jaxpo.registry import unknown
from jaxpo.rollout.sampling import SamplingOptions
from jaxpo.rollout.sampling import validate as validate_sampling
from jaxpo.tasks.base import task_arguments
from jaxpo.tasks.preferences import set_arguments
from jaxpo.training import protocols  # noqa: F401 (imported for its registrations)
from jaxpo.training.needs import JUDGED
from jaxpo.training.optimizers import optimizer_arguments, schedule_arguments

EMPTY = inspect.Parameter.empty


def tokenizer_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """Arguments of a tokenizer block; ``characters`` takes its alphabet from the task."""
    if name == "characters":
        return {}
    if name == "pretrained":

        def pretrained(path: str, chat_template: bool = True): ...

        return inspect.signature(pretrained).parameters
    if name == "integers":

        def integers(base: int = 10): ...

        return inspect.signature(integers).parameters
    raise ValueError(unknown("tokenizer", name, ("characters", "integers", "pretrained")))


def judge_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """Arguments of a judge (`jaxpo.training.judges`): P(one beats another) is ``sig(scale (their scores' gap))``."""

    def verifier(scale: float | None = None): ...  # None: the higher score wins

    def function(path: str, scale: float | None = None): ...  # "module:function"

    def model(path: str, scale: float | None = None): ...  # a run directory; None = 1

    def follow_ups(path: str, file: str, between: str = "\n", scale: float | None = None): ...  # a run, a JSON file

    def models(
        paths: tuple = (), weights: tuple | None = None, adapter: str | None = None, scale: float | None = None
    ): ...  # run directories

    judges = {f.__name__: f for f in (verifier, function, model, models, follow_ups)}
    if name not in judges:
        raise ValueError(unknown("judge", name, judges))
    return inspect.signature(judges[name]).parameters


def policy_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """Arguments of the policy block: every field of a transformer made here; for a pretrained one, which has its shape
    from its own files, where they are and how to compute."""
    if name == "transformer":
        parameters = inspect.signature(TransformerConfig).parameters
        return {field: p for field, p in parameters.items() if field != "vocab_size"}
    if name == "pretrained":

        def pretrained(
            path: str,  # a folder with config.json and safetensors, or a GGUF file
            dtype: str = "float32",
            param_dtype: str = "float32",
            scan_layers: bool = True,
            remat: str = "none",
            attention: str = "auto",
        ): ...

        return inspect.signature(pretrained).parameters
    raise ValueError(unknown("policy", name, ("transformer", "pretrained")))


def optional_name(arguments: Any) -> Any:
    """Arguments of a block whose name may be None, which takes none."""
    return lambda name: {} if name is None else arguments(name)


# path of a named block -> the arguments that its name takes
NAMED = {
    "objective": lambda name: registry.entry(name).parameters,
    "task": optional_name(task_arguments),
    "data": optional_name(set_arguments),
    "judge": judge_arguments,
    "tokenizer": tokenizer_arguments,
    "policy": policy_arguments,
    "optimizer": optimizer_arguments,
    "optimizer.schedule": schedule_arguments,
    "warm_start.optimizer": optimizer_arguments,
    "warm_start.optimizer.schedule": schedule_arguments,
}
OWN = {
    "optimizer": ("learning_rate", "clip_norm", "schedule"),
    "warm_start.optimizer": ("learning_rate", "clip_norm", "schedule"),
}


def _optimizer(learning_rate: float) -> ConfigDict:
    return ConfigDict(
        dict(
            name="adamw",
            learning_rate=learning_rate,
            clip_norm=config_dict.placeholder(float),
            schedule=dict(name="constant", warmup_steps=0),
        )
    )


def default() -> ConfigDict:
    """Every field of a run, with its default. Units: steps are iterations (one rollout batch each) unless said
    otherwise."""
    optional = config_dict.placeholder
    return ConfigDict(
        dict(
            seed=0,  # of parameters, prompt order and sampling; the task has its own
            steps=100,  # iterations of reinforcement learning
            task=dict(name="toy"),  # None = none: the prompts are those of data, and nothing verifies answers
            data=dict(name=optional(str)),  # preferences: "jsonl", "datasets" or "task" (made of the task's answers)
            trace=optional(
                str
            ),  # "module:function" of (question, answer): tool calls that a reward model reads after it
            judge=dict(name="verifier"),  # of the policy's own answers, where a protocol compares them
            tokenizer=dict(name="characters"),
            policy=dict(name="transformer"),  # made here, or "pretrained"
            lora=dict(rank=0, alpha=32.0, targets=lora.TARGETS),  # adapters beside a pretrained policy; rank 0 = none
            heads=dict(embed=optional(int), gate=optional(int)),  # sizes of the heads that the objective asks for
            init_from=optional(str),  # run directory whose last checkpoint the parameters come from
            soup=dict(
                of=(), alpha=0.5
            ),  # two run directories; slot "soup" = alpha of the first, the rest of the second
            objective=dict(name="grpo"),
            optimizer=_optimizer(1e-4),
            rollout=dict(
                prompts=32,  # prompts per iteration
                responses=8,  # completions of each
                prompt_width=optional(int),  # None = the longest prompt; longer ones are dropped and counted
                scan_layers=False,  # one compiled layer for all when decoding: deep models compile in a minute
                # The mesh that samples, over the same devices; parameters are moved onto it before. All None = the mesh
                # that trains; else data = the rest, if not given, and the other axes 1.
                mesh={axis: optional(int) for axis in AXES},
            ),
            sampling=dict(
                max_new_tokens=32,
                temperature=1.0,
                top_k=optional(int),
                top_p=optional(float),
                min_p=optional(float),
                stop=(),
            ),
            training=dict(
                epochs=1,  # passes over a rollout batch
                minibatches=1,  # optimizer steps per pass
                microbatches=1,  # slices per optimizer step: memory only, the result is the same
                packing=False,  # short completions share rows (`jaxpo.policy.packing`): the result is the same
                offload_reference=False,  # the reference waits in the host's memory while it does not score
            ),
            policy_temperature=1.0,  # at which the trainer scores
            warm_start=dict(
                steps=0,  # optimizer steps of supervised training before; 0 = none
                batch=128,  # demonstrations per step
                microbatches=1,  # slices per step: memory only
                drop_last=0.0,  # share of demonstrations that lose their last character (an imperfect demonstrator)
                optimizer=_optimizer(1e-3),
            ),
            evaluation=dict(
                every=20,  # iterations; the first and the last are always evaluated
                prompts=256,  # test prompts at most
                pass_at=(1, 4, 8),  # k of pass@k before and after; () = none
                samples=8,
            ),  # completions per prompt for pass@k
            checkpoint=dict(
                every=50,  # iterations
                keep=2,  # the last ones
                keep_best=optional(str),  # and the one with the highest eval/greedy, eval/reward or eval/accuracy
                directory=optional(str),  # a bucket (gs://...) or a folder; None = WORKDIR/checkpoints
            ),
            mesh=dict(data=-1, fsdp=1, expert=1, context=1, tensor=1),  # see docs/scaling.md
            protocol=dict(name=optional(str)),  # how data is gathered; None = as the objective says
            logging=dict(tensorboard=False, wandb_project=optional(str), samples=8, plot_seconds=20.0),
            nonfinite_patience=5,  # consecutive skipped steps before the run stops
            compilation_cache=optional(str),
        )
    )  # folder; None = the user's cache folder


# ---- filling and flags


def block_of(config: ConfigDict, path: str) -> ConfigDict:
    for part in path.split("."):
        config = config[part]
    return config


def _value(parameter: inspect.Parameter) -> Any:
    """The default as a config value: None keeps its type, so that a flag can give it a number."""
    if parameter.default is not None and parameter.default is not EMPTY:
        return parameter.default
    options = (
        typing.get_args(parameter.annotation)
        if isinstance(parameter.annotation, types.UnionType)
        else (parameter.annotation,)
    )
    kinds = [k for k in (typing.get_origin(k) or k for k in options) if k in (bool, int, float, str, tuple)]
    return config_dict.placeholder(kinds[0] if kinds else object)


def _check_fields(config: ConfigDict, known: ConfigDict, path: str = "") -> None:
    """``ValueError`` for a field that no run has; named blocks are checked where their names are."""
    for field, value in config.items():
        if field not in known:
            raise ValueError(unknown(f"field of config{path}", field, known))
        if isinstance(value, ConfigDict) and f"{path}.{field}"[1:] not in (*NAMED, "protocol"):
            _check_fields(value, known[field], f"{path}.{field}")


def fill(config: ConfigDict) -> ConfigDict:
    """Add to every named block the arguments it lacks, with their defaults.

    Hyperparameters that are a share of the generation budget (``L_const``, ``max_len``, ...) get it from
    ``sampling.max_new_tokens``.

    Raises:
      ValueError: an unknown name or argument (with the nearest), or a required argument that nothing gives.
    """
    _check_fields(config, default())
    with config.unlocked():
        for path, arguments in NAMED.items():
            block = block_of(config, path)
            parameters = dict(arguments(block.name))
            variadic = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            parameters = {k: p for k, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
            own = ("name", *OWN.get(path, ()))
            for field in block:
                if field not in own and field not in parameters and not variadic:
                    raise ValueError(unknown(f"field of config.{path} ({block.name})", field, [*own, *parameters]))
            row = registry.entry(block.name) if path == "objective" else None
            of_run = row.of_run(config.sampling.max_new_tokens, config.steps) if row else {}
            for name, parameter in parameters.items():
                if name in of_run and block.get(name) is None:
                    block[name] = of_run[name]
                elif name not in block:
                    block[name] = _value(parameter)
        _fill_protocol(config)
    return config


def _fill_protocol(config: ConfigDict) -> None:
    """The protocol's own options; those that the objective's hyperparameters set are not asked for again."""
    block, objective = config.protocol, objective_of(config)
    name = protocol_name(config, objective)
    parameters = registry.entry(name, "protocol").parameters
    taken = objective.protocol_options if name == objective.protocol else {}
    for field in block:
        if field in taken:
            raise ValueError(f"config.protocol.{field} is set by config.objective.{field} ({config.objective.name})")
        if field != "name" and field not in parameters:
            raise ValueError(unknown(f"field of config.protocol ({name})", field, ["name", *parameters]))
    for field, parameter in parameters.items():
        if field not in block and field not in taken:
            block[field] = _value(parameter)


def protocol_name(config: ConfigDict, objective: Objective) -> str:
    """The protocol that the config names, or the objective; otherwise preferences come from ``config.data``, or from
    a judge if the objective cannot do without."""
    if config.protocol.name or objective.protocol != "on_policy":
        return config.protocol.name or objective.protocol
    if config.data.name:
        return "preference_data"
    return "judged" if objective.layout or objective.needs & JUDGED else "on_policy"


def protocol_of(config: ConfigDict) -> Protocol:
    """The protocol of a filled config: its own options, and those that the objective sets."""
    objective = objective_of(config)
    name = protocol_name(config, objective)
    parameters = registry.entry(name, "protocol").parameters
    taken = dict(objective.protocol_options) if name == objective.protocol else {}
    given = arguments_of(config.protocol, parameters)
    registry.check_arguments(f"protocol {name!r}", given, parameters)
    return make(name, "protocol", **{**given, **taken})


def arguments_of(block: ConfigDict, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The fields of a block without its name, and without unset fields whose default is not None."""
    out = {k: v for k, v in block.items() if k != "name"}
    return {
        k: v.to_dict() if isinstance(v, ConfigDict) else v
        for k, v in out.items()
        if v is not None or k not in parameters or parameters[k].default is None
    }


def objective_of(config: ConfigDict) -> Objective:
    """The objective that the config names."""
    return make(
        config.objective.name, **arguments_of(config.objective, registry.entry(config.objective.name).parameters)
    )


def transformer_of(config: ConfigDict, vocab_size: int = 1) -> TransformerConfig:
    """The policy of a filled config; ``vocab_size`` is that of one made here, a pretrained one has its own."""
    parameters = policy_arguments(config.policy.name)
    fields = arguments_of(config.policy, parameters)
    registry.check_arguments(f"policy {config.policy.name!r}", fields, parameters)
    if config.policy.name == "pretrained":
        return config_from_hf(read_config(fields.pop("path")), **fields)
    return TransformerConfig(vocab_size=vocab_size, **fields)


def sampling_of(config: ConfigDict, eos_ids: Sequence[int] = (), stop_table: Any = None) -> SamplingOptions:
    """The validated `SamplingOptions` of a run."""
    fields = {k: v for k, v in config.sampling.items() if k != "stop"}
    return validate_sampling(SamplingOptions(**fields, eos_ids=tuple(eos_ids), stop_table=stop_table))


def rows_per_prompt(config: ConfigDict, objective: Objective) -> int:
    """Rows that an iteration trains on for each of its prompts (or units of data)."""
    responses, protocol = config.rollout.responses, protocol_of(config)
    return protocol.rows(objective, responses) if protocol.rows else responses
