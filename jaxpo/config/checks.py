"""Everything that can be wrong with a config, before anything is compiled."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

from ml_collections import ConfigDict

from jaxpo.arguments import Count, Domain, NonNegative, Positive, Share, Whole, check
from jaxpo.config.blocks import block_of
from jaxpo.config.fields import default
from jaxpo.config.resolved import Resolved
from jaxpo.learning.needs import is_reward_model
from jaxpo.learning.optimizers import make_optimizer
from jaxpo.learning.references import SCORED
from jaxpo.parallel import AXES, POSITIONS, ROWS, TOKENS
from jaxpo.parallel.mesh import mesh_shape, reshaped_sizes
from jaxpo.policy import lora
from jaxpo.policy.config import TransformerConfig
from jaxpo.registry import unknown

FOLDERS = "a model folder, a GGUF file or a run directory"
WHOLE = (
    *("rollout.prompts", "rollout.responses"),
    *("training.epochs", "training.minibatches", "training.microbatches"),
    *("evaluation.every", "evaluation.prompts", "evaluation.samples"),
    *("checkpoint.every", "checkpoint.keep"),
    *("warm_start.batch", "warm_start.microbatches"),
    *("sampling.max_new_tokens", "nonfinite_patience"),
)
DOMAINS = {
    **dict.fromkeys(WHOLE, Whole),
    **dict.fromkeys(("steps", "warm_start.steps", "logging.samples", "lora.rank"), Count),
    "seed": Annotated[int, Domain(0, 2**32 - 1, whole=True)],  # numpy and jax take 32 bits
    "rollout.prompt_width": Whole | None,
    "logging.plot_seconds": NonNegative,
    "imports": tuple[str, ...],
    "lora.alpha": Positive,
    "policy_temperature": Positive | None,
    **dict.fromkeys(("warm_start.drop_last", "soup.alpha"), Share),
    "evaluation.pass_at": tuple[Whole, ...],
}
MOST_SAMPLES = 1_000_000  # of a prompt, in an evaluation


def check_fields(config: ConfigDict) -> None:
    """Check the numbers of a config that need nothing else.

    Raises:
      ValueError: naming the field and its value.
    """
    for path, domain in DOMAINS.items():
        check(f"config.{path}", block_of(config, path), domain)
    if config.evaluation.pass_at and max(config.evaluation.pass_at) > config.evaluation.samples:
        raise ValueError(
            f"config.evaluation.pass_at asks for pass@{max(config.evaluation.pass_at)}, which takes at least as many "
            f"samples; config.evaluation.samples is {config.evaluation.samples}"
        )
    if config.evaluation.samples > MOST_SAMPLES:
        raise ValueError(
            f"config.evaluation.samples {config.evaluation.samples:,}: so many completions of each prompt take days; "
            f"the most is {MOST_SAMPLES:,}"
        )
    if not all(isinstance(text, str) and text for text in config.sampling.stop):
        raise ValueError(f"config.sampling.stop must hold texts that are not empty, not {tuple(config.sampling.stop)}")
    lora.check(max(config.lora.rank, 1), config.lora.targets)
    if len(config.soup.of) not in (0, 2):
        raise ValueError(f"config.soup.of must name two run directories, or none, not {tuple(config.soup.of)}")


def check_resolved(resolved: Resolved, policy: TransformerConfig, devices: int) -> None:
    """Check what depends on the objective, the protocol, the policy's shape or the number of devices.

    Raises:
      ValueError: naming the field, its value and what would do.
    """
    config, objective = resolved.config, resolved.objective
    _check_lora(config, policy)
    _check_optimizers(resolved)
    _check_division(resolved, policy, devices)
    _check_offload(resolved)
    _check_models(resolved)
    _check_critic(resolved)
    _check_responses(resolved)
    _check_checkpoint(config)
    _check_judge(resolved)
    if objective.unit.layout and resolved.protocol.facts.rows is None:
        raise ValueError(
            f"objective {config.objective.name!r} learns from units {objective.unit.layout}, which rollouts of "
            "single completions are not: set config.data.name, or config.protocol.name to judged"
        )
    if config.trace and (config.data.name is None or not is_reward_model(objective)):
        raise ValueError(
            "config.trace has no effect: only reward models read tool calls after the answers of config.data"
        )
    if config.task.name is None and config.data.name in (None, "task"):
        raise ValueError("config.task.name is None: set config.data.name to jsonl or datasets, whose prompts are used")


def _check_optimizers(resolved: Resolved) -> None:
    """That each can be made, and that one of its own is given only to parameters that the objective trains apart."""
    config, trained = resolved.config, {*resolved.objective.trains.values()}
    make_optimizer(config.optimizer.to_dict(), max(config.steps, 1))
    make_optimizer(config.warm_start.optimizer.to_dict(), max(config.warm_start.steps, 1), "warm_start.optimizer")
    for label, block in config.optimizers.items():
        field = f"config.optimizers.{label}"
        if block.name is None and block.to_dict() != default().optimizers[label].to_dict():
            raise ValueError(f"{field} has no effect without a name: set {field}.name")
        if block.name is not None and label not in trained:
            raise ValueError(f"{field} has no effect: no term of objective {config.objective.name!r} trains a {label}")
        if block.name is not None:
            make_optimizer(block.to_dict(), max(config.steps, 1), field.removeprefix("config."))


def _check_judge(resolved: Resolved) -> None:
    """A judge compares answers, or its scores are the rewards; where answers come from data it has nothing to say."""
    config, facts, form = resolved.config, resolved.protocol.facts, resolved.form
    compares, rewards = facts.judges, facts.rows is None
    if compares and form and form.mismatched and config.rollout.prompts < 2:
        raise ValueError(
            "config.rollout.prompts must be at least 2: the objective compares with the answers to other prompts"
        )
    given, name = config.judge.name != "verifier", resolved.protocol_name
    if (given and not (compares or rewards)) or (config.judge.scale is not None and not compares):
        field = "config.judge" if given and not rewards else "config.judge.scale"
        raise ValueError(f"{field} has no effect with protocol {name!r}, which compares no answers")
    if config.task.name is None and (compares or rewards) and not given:
        raise ValueError("config.task.name is None, so nothing verifies answers: set config.judge.name")


def _check_lora(config: ConfigDict, policy: TransformerConfig) -> None:
    if config.lora.rank == 0:
        return
    lora.check(config.lora.rank, config.lora.targets, experts=policy.experts is not None)
    if config.lora.path and config.init_from:
        raise ValueError("config.lora.path and config.init_from both give the first adapters: set one of them to None")
    if config.policy.name != "pretrained":
        raise ValueError(
            f"config.lora.rank {config.lora.rank} trains adapters beside frozen weights: set config.policy.name to "
            "pretrained, or the rank to 0"
        )


def _check_offload(resolved: Resolved) -> None:
    config = resolved.config
    if not config.training.offload_reference:
        return
    if not resolved.references:
        raise ValueError(
            f"config.training.offload_reference has no effect: objective {config.objective.name} uses no reference "
            "policy; set it to False"
        )
    if others := [n for n in (*resolved.references, *resolved.protocol.facts.references) if n != "ref"]:
        raise ValueError(
            f"config.training.offload_reference is for a reference that stays as it is; {config.objective.name} also "
            f"has the reference {others[0]!r}: set it to False"
        )
    if resolved.protocol.facts.references.get("ref"):
        raise ValueError(
            f"config.training.offload_reference is for a reference that stays as it is; {config.objective.name} renews "
            "its reference during the run: set it to False"
        )
    if config.lora.rank:
        raise ValueError(
            "config.training.offload_reference has no effect with config.lora.rank: the reference is the frozen "
            "weights themselves; set it to False"
        )


def _check_models(resolved: Resolved) -> None:
    """A model beside the policy has a path exactly where the objective needs it."""
    config, name = resolved.config, resolved.config.objective.name
    for model, path in config.references.items():
        needed = model in resolved.models
        if path is not None and not needed:
            field = SCORED[model].gives or f"logp_{model}"
            raise ValueError(f"config.references.{model} has no effect: objective {name!r} needs no {field}")
        if path is None and needed:
            raise ValueError(
                f"config.references.{model} is None, but objective {name!r} needs the model: set it to "
                + ("a run directory of train_reward" if SCORED[model].gives == "model_score" else FOLDERS)
            )


def _check_critic(resolved: Resolved) -> None:
    """Protocols that move or go back to whole parameters would leave a critic of its own behind."""
    moved = [name for name in resolved.protocol.facts.references if name not in ("ref", "prev")]
    if resolved.config.critic.path is not None and moved:
        raise ValueError(
            f"config.critic.path: protocol {resolved.protocol_name!r} moves the policy by its reference {moved[0]!r}, "
            "and a critic of its own would stay behind: leave config.critic.path out"
        )


def _check_responses(resolved: Resolved) -> None:
    """An objective that compares the answers to a prompt has several to compare."""
    config, least = resolved.config, resolved.objective.asks.responses
    if resolved.protocol.facts.rows is None and config.rollout.responses < least:
        raise ValueError(
            f"config.rollout.responses must be at least {least}, not {config.rollout.responses}: objective "
            f"{config.objective.name!r} compares the answers to a prompt with each other, and one alone has advantage 0"
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


def _check_division(resolved: Resolved, policy: TransformerConfig, devices: int) -> None:
    config, objective = resolved.config, resolved.objective
    mesh = dict(zip(AXES, mesh_shape(config.mesh, devices), strict=True))
    shards, row_axes = (math.prod(mesh[axis] for axis in ROWS), " * ".join(f"mesh.{axis}" for axis in ROWS))
    prompts, responses = config.rollout.prompts, resolved.rows_per_prompt
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
    check_mesh("mesh", mesh, policy)
    _check_rows("mesh", mesh, prompts, ROWS if sampling else TOKENS)
    if sampling:
        other = dict(zip(AXES, mesh_shape(sampling, devices, "rollout.mesh"), strict=True))
        check_mesh("rollout.mesh", other, policy)
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


def check_mesh(field: str, mesh: Mapping[str, int], policy: TransformerConfig, of: str = "config.policy") -> None:
    """That the axes of a mesh divide the sizes of a model; ``of``: what messages call it.

    Raises:
      ValueError: naming both."""
    for size in ("heads", "kv_heads", "mlp_width"):
        if getattr(policy, size) % mesh["tensor"]:
            raise ValueError(
                f"config.{field}.tensor {mesh['tensor']} does not divide {of}.{size} {getattr(policy, size)}"
            )
    if policy.width % mesh["fsdp"]:
        raise ValueError(f"config.{field}.fsdp {mesh['fsdp']} does not divide {of}.width {policy.width}")
    if mesh["expert"] > 1 and policy.experts is None:
        raise ValueError(f"config.{field}.expert {mesh['expert']} has no effect: {of} has no experts; set it to 1")
    if mesh["expert"] > 1 and policy.experts % mesh["expert"]:
        raise ValueError(
            f"config.{field}.expert {mesh['expert']} does not divide {of}.experts {policy.experts}: choose "
            f"one of {_divisors(policy.experts)}"
        )


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
