"""Memory: what a run needs at the least is compared with what there is before anything is compiled, and running out of
it names the step and what would help."""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxpo.config.blocks import block_of
from jaxpo.parallel.offload import is_on_host
from jaxpo.policy.config import TransformerConfig

# phase of a run (`jaxpo.protocols.gatherer.Watch.phase`) -> what the docs call it, and what lowers its memory
STEPS = {
    "generate": (
        "rollout",
        ("rollout.prompts", "rollout.responses", "sampling.max_new_tokens", "rollout.prompt_width"),
    ),
    "score": ("scoring", ("training.microbatches", "rollout.prompts", "sampling.max_new_tokens")),
    "update": ("update", ("training.microbatches", "policy.remat", "sampling.max_new_tokens", "rollout.prompt_width")),
    "evaluate": ("evaluation", ("rollout.prompts", "rollout.responses", "sampling.max_new_tokens")),
    "warm start": ("warm start", ("warm_start.microbatches", "warm_start.batch", "policy.remat")),
    "checkpoint": ("checkpoint", ("checkpoint.keep",)),
}
RAISED = ("training.microbatches", "warm_start.microbatches")  # a larger number needs less memory
SIZES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
NOTE = "phase: "


def host_memory() -> tuple[int, str]:
    """Bytes that this process may have on the host, and what sets the limit."""
    found = [(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "the host's memory")]
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            found.append((limit, "the limit of ulimit -v"))
    with contextlib.suppress(OSError, ValueError):
        found.append((int(Path("/sys/fs/cgroup/memory.max").read_text()), "the limit of the control group"))
    return min(found)


def capacity(device: jax.Device) -> tuple[int, str]:
    """Bytes of a device's memory, and what that memory is. Devices on the CPU share the host's."""
    if device.platform == "cpu":
        size, what = host_memory()
        return size // max(len(jax.devices()) // jax.process_count(), 1), what
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return (int(limit), f"the memory of {device.device_kind}") if limit else (2**63, "unknown memory")


def bytes_of(tree: Any, *, host: bool = False) -> int:
    """Bytes of a tree of arrays or shapes on one device (or, with ``host``, those that wait in the host's memory)."""

    def one(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        if not hasattr(leaf, "dtype") or (sharding is not None and is_on_host(leaf)) is not host:
            return 0
        shape = leaf.shape if sharding is None else sharding.shard_shape(tuple(leaf.shape))
        size = leaf.dtype.itemsize if hasattr(leaf.dtype, "itemsize") else 8
        return math.prod(shape) * size

    return sum(map(one, jax.tree.leaves(tree)))


def cache_bytes(model: TransformerConfig, prompts: int, width: int, responses: int, new: int) -> int:
    """Bytes of the keys and values of a rollout at the least: each prompt's once, and those of every completion."""
    heads = model.kv_heads or model.heads
    head = model.head_dim or model.width // model.heads
    tokens = prompts * (width + responses * new)
    return 2 * model.layers * heads * head * jax.numpy.dtype(model.dtype).itemsize * tokens


def gigabytes(n: float) -> str:
    """Bytes as text, in GB."""
    return f"{n / 1e9:.3g} GB"


def check_state(tree: Any) -> int:
    """That parameters, optimizer and references (a tree of shapes as `jaxpo.runs.restore.template` gives) fit beside
    one gradient. Returns their bytes on a device.

    Raises:
      ValueError: they do not; the sizes and the fields to change are named.
    """
    held, gradient = bytes_of(tree), bytes_of(tree["params"])
    there, what = capacity(jax.local_devices()[0])
    if held + gradient > there:
        parts = {"parameters": "params", "optimizer": "opt_state", "references": "references"}
        sizes = ", ".join(f"{name} {gigabytes(bytes_of(tree[key]))}" for name, key in parts.items() if key in tree)
        raise ValueError(
            f"config.policy: the run needs at least {gigabytes(held + gradient)} on each device ({sizes}, gradient "
            f"{gigabytes(gradient)}), and {what} is {gigabytes(there)} a device: make config.policy smaller "
            "(width, layers), spread it over more devices (config.mesh.fsdp), or train adapters (config.lora.rank)"
        )
    return held


def check_rollout(
    model: TransformerConfig,
    prompts: int,
    width: int,
    responses: int,
    new: int,
    *,
    shards: int = 1,
    beside: int = 0,
    fields: str = "config.rollout.prompts, config.rollout.responses, config.sampling.max_new_tokens",
    note: str = "",
) -> None:
    """That the keys and values of a rollout fit.

    Args:
      model: shape of the policy.
      prompts, width: number of prompts, and tokens of each.
      responses, new: completions of each prompt, and tokens of each completion.
      shards: devices that the rows are spread over. beside: bytes on a device that are taken.
      fields: what decides the numbers. note: more to say.

    Raises:
      ValueError: they do not; the sizes and the fields to change are named.
    """
    needed = cache_bytes(model, prompts, width, responses, new) // shards
    there, what = capacity(jax.local_devices()[0])
    if needed + beside > there:
        raise ValueError(
            f"a rollout of {prompts:,} prompts of {width:,} tokens, with {responses:,} completions each of {new:,} "
            f"tokens, needs {gigabytes(needed)} for keys and values on each device"
            + (f" beside {gigabytes(beside)} of parameters and optimizer" if beside else "")
            + f", and {what} is {gigabytes(there)} a device: lower {fields}{note}"
        )


def explained(error: BaseException, config: ConfigDict | None = None) -> MemoryError | None:
    """For an error of a device or host that ran out of memory: one that names the step, the sizes and the fields that
    help (with their values in ``config``). None for any other error."""
    text = str(error)
    of_device = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in text
    if not of_device and (not isinstance(error, MemoryError) or "out of memory" in text):
        return None
    phases = [note.removeprefix(NOTE) for note in getattr(error, "__notes__", ()) if note.startswith(NOTE)]
    known = [phase for phase in phases if phase in STEPS]
    step, fields = STEPS[known[-1]] if known else ("", STEPS["generate"][1])
    asked = _asked(text)
    there, what = capacity(jax.local_devices()[0])
    return MemoryError(
        f"out of memory{f' in the {step}' if step else ''}: {f'{gigabytes(asked)} more were' if asked else 'more was'} "
        f"asked for, and {what} is {gigabytes(there)} a device: {'; '.join(_lever(field, config) for field in fields)} "
        "(docs/scaling.md, Memory levers)"
    )


def _asked(text: str) -> float:
    """The bytes that a message of XLA or NumPy says were asked for; 0 = it does not say."""
    found = re.search(r"(?:allocat\w*|allocate) ([\d.]+) ?([KMGT]?)(i?)B", text, re.IGNORECASE)
    found = found or re.search(r"allocating ([\d.]+)()() bytes", text)
    return float(found[1]) * SIZES[found[2].lower()] if found else 0.0


def _lever(field: str, config: ConfigDict | None) -> str:
    if field == "policy.remat":
        return 'set config.policy.remat to "full"'
    verb = "raise" if field in RAISED else "lower"
    try:
        now = "" if config is None else f" ({block_of(config, field)})"
    except (KeyError, AttributeError):
        now = ""
    return f"{verb} config.{field}{now}"


@contextlib.contextmanager
def out_of_memory_explained(config: ConfigDict) -> Iterator[None]:
    """Raise what `explained` makes of an error of the ``with`` block."""
    try:
        yield
    except Exception as error:
        if (better := explained(error, config)) is None:
            raise
        raise better from error
