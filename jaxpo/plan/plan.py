"""What a run needs on chips that are not there: its steps compiled for them, with bytes, transfers and a roofline."""

import copy
import math
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxpo.config.resolve import resolve
from jaxpo.config.resolved import Resolved
from jaxpo.kernels.chips import Chip
from jaxpo.parallel import make_mesh
from jaxpo.parallel.offload import is_on_host
from jaxpo.plan import operations, program, roofline, topology
from jaxpo.plan.topology import Topology
from jaxpo.plan.trace import Data, Planned, Step, data_of, trace_run
from jaxpo.runs.memory import gigabytes

Say = Callable[[str], None]


@dataclass(frozen=True)
class StepPlan:
    """A compiled step. Bytes and times are of one chip and one call.

    times: calls per iteration. memory: bytes by what they hold; their sum is the peak. host: bytes that wait in the
    host's memory; fetched: bytes that come from there. operations: of all chips;
    useful: of those, what is left without recomputation. seconds: of each term of the roofline. error: why the compiler
    refused it; buffers: the largest, then.
    """

    name: str
    times: int
    compile_seconds: float
    memory: dict[str, float] = field(default_factory=dict)
    host: float = 0.0
    fetched: float = 0.0
    operations: float = 0.0
    useful: float = 0.0
    hbm: float = 0.0
    collectives: list[program.Collective] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    endless: int = 0
    error: str | None = None
    buffers: list[str] = field(default_factory=list)

    @property
    def peak(self) -> float:
        """Bytes that a chip must hold while the step runs, what waits beside it included."""
        return sum(self.memory.values())

    @property
    def time(self) -> float:
        """Seconds of a call: the largest term."""
        return max(self.seconds.values(), default=0.0)


@dataclass(frozen=True)
class Plan:
    """A config on a slice. mesh: its axes. tokens: that an iteration samples (or, if it does not, trains on) at most.
    iterations: of the run."""

    topology: Topology
    mesh: dict[str, int]
    microbatches: int
    remat: str
    max_new_tokens: int
    tokens: int
    iterations: int
    steps: list[StepPlan]

    @property
    def chip(self) -> Chip:
        return self.topology.chip

    @property
    def fits(self) -> bool:
        """Whether every step compiles, and finds room beside what waits in memory."""
        return all(step.error is None and step.peak <= self.chip.hbm for step in self.steps)

    @property
    def seconds(self) -> float:
        """Of an iteration, at the least; the host's share (rewards) is not in it."""
        return sum(step.times * step.time for step in self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Of ``tokens``, with every completion at its full length."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def utilization(self) -> float:
        """MFU: useful operations of an iteration over what the chips could do in its time."""
        useful = sum(step.times * step.useful for step in self.steps)
        return useful / (self.seconds * self.topology.size * self.chip.flops) if self.seconds else 0.0

    @property
    def chip_hours(self) -> float:
        """Of the whole run."""
        return self.iterations * self.seconds * self.topology.size / 3600

    def to_dict(self, price: float | None = None) -> dict[str, Any]:
        """For JSON. Units: bytes, seconds, operations; ``price`` of a chip-hour, in any currency."""
        steps = [
            asdict(step)
            | dict(
                collectives=[c._asdict() for c in step.collectives],
                peak=step.peak,
                time=step.time,
                bound=roofline.bound(step.seconds) if step.seconds else None,
            )
            for step in self.steps
        ]
        return dict(
            topology=self.topology.name,
            chips=self.topology.size,
            cloud=self.topology.cloud,
            chip=self.chip._asdict(),
            mesh=self.mesh,
            microbatches=self.microbatches,
            remat=self.remat,
            max_new_tokens=self.max_new_tokens,
            steps=steps,
            fits=self.fits,
            seconds=self.seconds,
            tokens_per_second=self.tokens_per_second,
            utilization=self.utilization,
            iterations=self.iterations,
            chip_hours=self.chip_hours,
            cost=None if price is None else price * self.chip_hours,
        )


def make_plan(
    config: ConfigDict,
    slice_: Topology,
    *,
    data: Data | None = None,
    only: Collection[str] | None = None,
    known: Mapping[str, StepPlan] = MappingProxyType({}),
    say: Say = print,
) -> Plan:
    """Compile every step of a config for a slice.

    Args:
      data: what the shapes take from the run's data, if known. only: names of steps; None = all. known: steps that
        need not be compiled again. say: where progress goes.

    Raises:
      ValueError: a config that does not divide over the slice, or whose state is more than all its chips hold.
      ModuleNotFoundError: libtpu is not installed.
    """
    mesh = make_mesh(config.mesh, topology.devices(slice_))
    resolved = resolve(config, mesh.size)
    data = data or data_of(resolved)
    planned = trace_run(resolved, mesh, data)
    check_state(planned.state, slice_)
    plain = trace_run(without_remat(resolved), mesh, data).steps
    steps = []
    for step, other in zip(planned.steps, plain, strict=True):
        if step.name in known:
            steps.append(known[step.name])
        elif only is None or step.name in only:
            useful = operations.count(other.trace().jaxpr, loop=other.loop)
            steps.append(plan_step(step, planned, config, mesh, slice_.chip, useful, say))
    rollout, sampling = config.rollout, config.sampling
    of_prompt = rollout.responses if resolved.samples else resolved.rows_per_prompt
    return Plan(
        topology=slice_,
        mesh=dict(mesh.shape),
        microbatches=config.training.microbatches,
        remat=config.policy.remat,
        max_new_tokens=sampling.max_new_tokens,
        tokens=rollout.prompts * of_prompt * sampling.max_new_tokens,
        iterations=config.steps,
        steps=steps,
    )


def check_state(state: Mapping[str, Any], slice_: Topology) -> None:
    """Raise ``ValueError`` if the state of a run is more than all chips hold: no mesh and no lever makes it fit."""
    sizes = {
        name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "dtype") and not is_on_host(x))
        for name, tree in state.items()
    }
    there = slice_.size * slice_.chip.hbm
    if sum(sizes.values()) > there:
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in sizes.items() if size)
        raise ValueError(
            f"config.policy: the state of the run takes {gigabytes(sum(sizes.values()))} ({parts}), and the "
            f"{slice_.size} chips of {slice_.name} hold {gigabytes(there)} in all: take a larger --topology, make "
            "config.policy smaller (width, layers), or train adapters (config.lora.rank)"
        )


def without_remat(resolved: Resolved) -> Resolved:
    """The same run with every activation stored: what it computes is what it needs to."""
    plain = copy.deepcopy(resolved.config)
    plain.policy.remat = "none"
    return replace(resolved, config=plain)


def plan_step(
    step: Step, planned: Planned, config: ConfigDict, mesh: jax.sharding.Mesh, chip: Chip, useful: float, say: Say
) -> StepPlan:
    """Compile one step and read what it needs."""
    traced = step.trace()
    counted = operations.count(traced.jaxpr, loop=step.loop)
    start = time.perf_counter()
    try:
        with jax.set_mesh(step.mesh):
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        message, buffers = refusal(str(error))
        if "RESOURCE_EXHAUSTED" in str(error) and not buffers:  # it does not always list them
            arrays = operations.largest(traced.jaxpr)
            buffers = [f"{n / 2**30:.2f} GiB over all chips: {what}" for n, what in arrays]
        say(f"{step.name}: refused by the compiler")
        return StepPlan(
            step.name, step.times, time.perf_counter() - start, operations=counted, error=message, buffers=buffers
        )
    spent = time.perf_counter() - start
    say(f"{step.name}: compiled in {spent:.0f} s")
    moved = program.traffic(compiled.as_text(), mesh.size, loop=step.loop[-1] if step.loop else None)
    passes = config.training.minibatches * config.training.microbatches  # each scores a slice of the rows
    fetched = passes * shard_bytes(step.arguments, host=True)
    work = roofline.Work(counted / mesh.size, moved.hbm, sum(c.bytes for c in moved.collectives), fetched)
    return StepPlan(
        name=step.name,
        times=step.times,
        compile_seconds=spent,
        memory=memory_of(step, planned, config, mesh, compiled.memory_analysis()),
        host=shard_bytes(planned.state, host=True),
        fetched=fetched,
        operations=counted,
        useful=useful,
        hbm=moved.hbm,
        collectives=moved.collectives,
        seconds=roofline.seconds(work, chip),
        endless=moved.endless,
    )


def shard_bytes(tree: Any, *, host: bool = False) -> int:
    """Bytes of a tree of placed shapes on one device, or, of those that lie there, in its ``host``'s memory."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "sharding") and is_on_host(x) == host]
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)


def cache_bytes(planned: Planned, config: ConfigDict, devices: int) -> int:
    """Keys and values of one chip's rows and heads while it samples: ``2 L KV d (B (T - 1) + G P)`` numbers, cut over
    all axes of the mesh: heads over tensor, rows over the others."""
    c, rollout = planned.model.config, config.rollout
    prompts = rollout.prompts * planned.data.prompt_width
    own = rollout.prompts * rollout.responses * max(config.sampling.max_new_tokens - 1, 1)
    numbers = 2 * c.layers * c.kv_heads * c.head_dim * (own + prompts)
    return numbers * jnp.dtype(c.dtype).itemsize // devices


def memory_of(step: Step, planned: Planned, config: ConfigDict, mesh: jax.sharding.Mesh, stats: Any) -> dict:
    """Bytes of a chip by what they hold, what waits for its turn beside the step included.

    ``cache`` is what the rules give a chip; the compiler counts it among its temporaries, and ``temporaries`` is the
    rest of them: gradients, activations, copies of parameters in the computation's dtype.
    """
    state = {name: shard_bytes(tree) for name, tree in planned.state.items()}
    given = sum(state[name] for name in step.state)
    cache = min(cache_bytes(planned, config, mesh.size), stats.temp_size_in_bytes) if step.name == "rollout" else 0
    references = sum(size for name, size in state.items() if name not in ("params", "opt_state", "base", "sampler"))
    return dict(
        parameters=state["params"] + state.get("base", 0),
        optimizer=state["opt_state"],
        reference=references,
        sampler=state["sampler"] if "sampler" in step.state else 0,
        batch=max(stats.argument_size_in_bytes - given, 0),
        cache=cache,
        temporaries=stats.temp_size_in_bytes - cache,
        results=max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0),
        program=stats.generated_code_size_in_bytes,
    )


def refusal(message: str) -> tuple[str, list[str]]:
    """The compiler's sentence, and the largest buffers where memory is what it lacks and it lists them, a line each:
    size, shape, origin."""
    lines = message.splitlines()
    sentence = next((line for line in lines if "RESOURCE_EXHAUSTED" in line), lines[0]).removeprefix(
        "RESOURCE_EXHAUSTED: "
    )
    buffers = []
    for block in re.split(r"\n\s*\d+\. (?=Size: )", message)[1:]:
        fields = dict(re.findall(r"(Size|Operator|Shape): ([^\n]*)", block))
        where = re.search(r'op_name="([^"]*)"', fields.get("Operator", ""))
        shape = re.sub(r"\{.*", "", fields.get("Shape", ""))
        buffers.append(" ".join(filter(None, [fields["Size"], shape, where and where[1]])))
    return sentence, buffers
