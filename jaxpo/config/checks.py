"""Everything that can be wrong with a config, before anything is compiled."""

import math
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from jaxpo.config.blocks import block_of
from jaxpo.config.fill import fill
from jaxpo.config.resolve import objective_of, protocol_name, protocol_of, rows_per_prompt, sampling_of, transformer_of
from jaxpo.learning.needs import form_of, is_reward_model, slots_of
from jaxpo.learning.optimizers import make_optimizer
from jaxpo.objectives import Objective
from jaxpo.parallel import AXES, POSITIONS, ROWS, TOKENS
from jaxpo.parallel.mesh import mesh_shape, reshaped_sizes
from jaxpo.policy import lora
from jaxpo.policy.config import TransformerConfig
from jaxpo.protocols.protocol import Protocol
from jaxpo.registry import unknown


def validate(config: ConfigDict, devices: int) -> ConfigDict:
    """Everything that can be wrong before anything is compiled.

    Raises:
      ValueError: naming the field, its value and what would do.
    """

    def positive(*paths: str) -> None:
        for path in paths:
            value = block_of(config, path)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"config.{path} must be a whole number of at least 1, not {value!r}")

    positive(
        "rollout.prompts",
        "rollout.responses",
        "training.epochs",
        "training.minibatches",
        "training.microbatches",
        "evaluation.every",
        "evaluation.prompts",
        "evaluation.samples",
        "checkpoint.every",
        "checkpoint.keep",
        "warm_start.batch",
        "warm_start.microbatches",
        "sampling.max_new_tokens",
        "nonfinite_patience",
    )
    for path in ("steps", "warm_start.steps"):
        if block_of(config, path) < 0:
            raise ValueError(f"config.{path} must not be negative, not {block_of(config, path)}")
    for path in ("seed", "logging.samples"):
        if block_of(config, path) < 0:
            raise ValueError(f"config.{path} must not be negative, not {block_of(config, path)}")
    if not config.policy_temperature > 0:
        raise ValueError(f"config.policy_temperature must be positive, not {config.policy_temperature}")
    if any(k < 1 for k in config.evaluation.pass_at):
        raise ValueError(f"config.evaluation.pass_at holds k of at least 1, not {config.evaluation.pass_at}")
    fill(config)
    objective, protocol = objective_of(config), protocol_of(config)
    if protocol.check:
        protocol.check(config)
    sampling_of(config)
    policy = transformer_of(config)
    _check_lora(config, policy)
    make_optimizer(config.optimizer.to_dict(), max(config.steps, 1))
    make_optimizer(config.warm_start.optimizer.to_dict(), max(config.warm_start.steps, 1))
    if config.sampling.temperature != 1 and not isinstance(config.sampling.temperature, int | float):
        raise ValueError(f"config.sampling.temperature must be a number, not {config.sampling.temperature!r}")
    _check_division(config, objective, policy, devices)
    _check_offload(config, objective, protocol)
    _check_checkpoint(config)
    if len(config.soup.of) not in (0, 2) or not 0 <= config.soup.alpha <= 1:
        raise ValueError(
            f"config.soup.of names two run directories and config.soup.alpha the share in [0, 1] of the first, not "
            f"{tuple(config.soup.of)} and {config.soup.alpha}"
        )
    _check_judge(config, objective, protocol)
    if config.trace and (config.data.name is None or not is_reward_model(objective)):
        raise ValueError(
            "config.trace has no effect: only reward models read tool calls after the answers of config.data"
        )
    if config.task.name is None and config.data.name in (None, "task"):
        raise ValueError("config.task.name is None: set config.data.name to jsonl or datasets, whose prompts are used")
    if not 0 <= config.warm_start.drop_last <= 1:
        raise ValueError(f"config.warm_start.drop_last is a share in [0, 1], not {config.warm_start.drop_last}")
    if config.evaluation.pass_at and max(config.evaluation.pass_at) > config.evaluation.samples:
        raise ValueError(
            f"config.evaluation.pass_at asks for pass@{max(config.evaluation.pass_at)}, which takes at least as many "
            f"samples; config.evaluation.samples is {config.evaluation.samples}"
        )
    return config


def _check_judge(config: ConfigDict, objective: Objective, protocol: Protocol) -> None:
    """A judge compares answers, or its scores are the rewards; where answers come from data it has nothing to say."""
    compares = protocol.judges
    rewards = protocol.rows is None
    form = form_of(objective, config.rollout.responses)
    if compares and form and form.mismatched and config.rollout.prompts < 2:
        raise ValueError(
            "config.rollout.prompts must be at least 2: the objective compares with the answers to other prompts"
        )
    given, name = config.judge.name != "verifier", protocol_name(config, objective)
    if (given and not (compares or rewards)) or (config.judge.scale is not None and not compares):
        field = "config.judge" if given and not rewards else "config.judge.scale"
        raise ValueError(f"{field} has no effect with protocol {name!r}, which compares no answers")
    if config.task.name is None and (compares or rewards) and not given:
        raise ValueError("config.task.name is None, so nothing verifies answers: set config.judge.name")


def _check_lora(config: ConfigDict, policy: TransformerConfig) -> None:
    if config.lora.rank == 0:
        return
    lora.check(config.lora.rank, config.lora.targets, experts=policy.experts is not None)
    if config.policy.name != "pretrained":
        raise ValueError(
            f"config.lora.rank {config.lora.rank} trains adapters beside frozen weights: set config.policy.name to "
            "pretrained, or the rank to 0"
        )
    if not config.lora.alpha > 0:
        raise ValueError(f"config.lora.alpha must be positive, not {config.lora.alpha}")


def _check_offload(config: ConfigDict, objective: Objective, protocol: Protocol) -> None:
    if not config.training.offload_reference:
        return
    if not slots_of(objective, protocol.provides):
        raise ValueError(
            f"config.training.offload_reference has no effect: objective {config.objective.name} uses no reference "
            "policy; set it to False"
        )
    if others := [name for name in (*slots_of(objective, protocol.provides), *protocol.keeps) if name != "ref"]:
        raise ValueError(
            f"config.training.offload_reference is for a reference that stays as it is; {config.objective.name} also "
            f"has the companion {others[0]!r}: set it to False"
        )
    if config.lora.rank:
        raise ValueError(
            "config.training.offload_reference has no effect with config.lora.rank: the reference is the frozen "
            "weights themselves; set it to False"
        )


def _check_checkpoint(config: ConfigDict) -> None:
    best, judges = config.checkpoint.keep_best, ("eval/greedy", "eval/reward", "eval/accuracy")
    if best is not None and best not in judges:
        raise ValueError(unknown("config.checkpoint.keep_best", best, judges))
    if best is not None and config.checkpoint.every % config.evaluation.every:
        raise ValueError(
            f"config.checkpoint.keep_best: config.checkpoint.every {config.checkpoint.every} must be a multiple of "
            f"config.evaluation.every {config.evaluation.every}, or a checkpoint would have no {best} to be judged by"
        )


def _check_division(config: ConfigDict, objective: Objective, policy: TransformerConfig, devices: int) -> None:
    mesh = dict(zip(AXES, mesh_shape(config.mesh, devices), strict=True))
    shards, row_axes = (math.prod(mesh[axis] for axis in ROWS), " * ".join(f"mesh.{axis}" for axis in ROWS))
    prompts, responses = config.rollout.prompts, rows_per_prompt(config, objective)
    minibatches, microbatches = config.training.minibatches, config.training.microbatches
    if prompts % minibatches:
        raise ValueError(
            f"config.training.minibatches {minibatches} does not divide config.rollout.prompts {prompts}: "
            f"choose one of {_divisors(prompts)}"
        )
    rows = prompts // minibatches * responses
    if rows % microbatches:
        raise ValueError(
            f"config.training.microbatches {microbatches} does not divide the {rows} rows of a minibatch "
            f"(rollout.prompts / training.minibatches * rollout.responses): choose one of {_divisors(rows)}"
        )
    if objective.unit.layout and prompts // minibatches % microbatches:
        raise ValueError(
            f"config.training.microbatches {microbatches} would cut units of {len(objective.unit.layout)} rows: choose "
            f"one of {_divisors(prompts // minibatches)}"
        )
    if rows // microbatches % shards:
        raise ValueError(
            f"the {rows // microbatches} rows of a microbatch do not divide over {row_axes} = {shards}: "
            "change config.rollout.prompts, config.rollout.responses or config.training.microbatches"
        )
    if config.training.packing and rows // microbatches == shards:
        raise ValueError(
            "config.training.packing has no effect: each device has one row in a microbatch; lower "
            f"config.training.microbatches {microbatches} or set it to False"
        )
    if config.training.packing and mesh[POSITIONS] > 1:
        raise ValueError(
            f"config.training.packing has no form for config.mesh.{POSITIONS} {mesh[POSITIONS]}: set it to False"
        )
    demonstrations, parts = config.warm_start.batch, config.warm_start.microbatches
    if config.warm_start.steps and demonstrations % (parts * shards):
        raise ValueError(
            f"config.warm_start.batch {demonstrations} does not divide into config.warm_start.microbatches {parts} "
            f"times {row_axes} = {shards}"
        )
    if objective.unit.coupling == "group" and prompts // minibatches % microbatches:
        raise ValueError(
            f"config.training.microbatches {microbatches} would cut groups that {config.objective.name} must "
            "see whole: "
            f"choose one of {_divisors(prompts // minibatches)}"
        )
    sampling = reshaped_sizes(config.rollout.mesh)
    _check_mesh("mesh", mesh, policy)
    _check_rows("mesh", mesh, prompts, ROWS if sampling else TOKENS)
    if sampling:
        other = dict(zip(AXES, mesh_shape(sampling, devices, "rollout.mesh"), strict=True))
        _check_mesh("rollout.mesh", other, policy)
        _check_rows("rollout.mesh", other, prompts, TOKENS)


def _check_rows(field: str, mesh: Mapping[str, int], prompts: int, axes: Sequence[str]) -> None:
    """That every device has prompts: those over ``axes`` of it, of which a rollout decodes on all."""
    axes = [axis for axis in axes if mesh[axis] > 1 or axis in ("data", "fsdp")]
    shards = math.prod(mesh[axis] for axis in axes)
    if prompts % shards:
        raise ValueError(
            f"config.rollout.prompts {prompts} does not divide over "
            f"{' * '.join(f'{field}.{axis}' for axis in axes)} = {shards}: choose {-(-prompts // shards) * shards}, or "
            f"a smaller axis of config.{field}"
        )


def _check_mesh(field: str, mesh: Mapping[str, int], policy: TransformerConfig) -> None:
    for size in ("heads", "kv_heads", "mlp_width"):
        if getattr(policy, size) % mesh["tensor"]:
            raise ValueError(
                f"config.{field}.tensor {mesh['tensor']} does not divide config.policy.{size} {getattr(policy, size)}"
            )
    if policy.width % mesh["fsdp"]:
        raise ValueError(f"config.{field}.fsdp {mesh['fsdp']} does not divide config.policy.width {policy.width}")
    if mesh["expert"] > 1 and policy.experts is None:
        raise ValueError(
            f"config.{field}.expert {mesh['expert']} has no effect: config.policy has no experts; set it to 1"
        )
    if mesh["expert"] > 1 and policy.experts % mesh["expert"]:
        raise ValueError(
            f"config.{field}.expert {mesh['expert']} does not divide config.policy.experts {policy.experts}: choose "
            f"one of {_divisors(policy.experts)}"
        )


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
