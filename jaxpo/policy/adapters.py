"""Adapters of ``peft`` in and out: adapter_config.json and adapter_model.safetensors, and ours (`jaxpo.policy.lora`).

found = read_adapter("path/to/adapter")                       # its rank, alpha and targets
adapters = load_adapter("path/to/adapter", config)
write_adapter(params, config, "path/to/new", alpha=found.alpha, base="path/to/model")
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxpo.policy import lora, transformer
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.families import BLOCK, MLP, Slot, tensors
from jaxpo.policy.hf import new_folder
from jaxpo.policy.transformer import Params
from jaxpo.registry import unknown

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings that we read, and those that say nothing about what the adapter computes. Of every other one only a value
# that switches it off is known.
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights")
IDLE = (
    *("peft_version", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"),
    *("target_modules", "exclude_modules", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
    *("layers_pattern", "ensure_weight_tying"),
)
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # ways to begin that leave the base as it is


class Adapter(NamedTuple):
    """What an adapter is: its rank, its alpha (of the scale alpha / rank), and the matrices that it belongs to."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


def modules_of(target: str) -> tuple[str, ...]:
    """The modules of Hugging Face that one of our matrices is: ("gate_proj", "up_proj") of ``w_in``."""
    return tuple(name for name, _ in MLP[target]) if target in MLP else (BLOCK[target][0].split(".")[-2],)


def read_adapter(folder: str | Path) -> Adapter:
    """The rank, alpha and targets of the adapter in a folder; its numbers are not read.

    Raises:
      ValueError: there is none, it is of another kind than LoRA, has a setting that changes what it computes in a way
        that is not known here, or adapts other modules.
    """
    settings = _settings(Path(folder))
    modules = {name.removeprefix(PREFIX).split(".")[-3] for name in _names(Path(folder))}
    known = {module: target for target in lora.TARGETS for module in modules_of(target)}
    for module in sorted(modules):
        if module not in known:
            raise ValueError(f"{folder}: " + unknown("adapted module", module, known))
    targets = tuple(target for target in lora.TARGETS if {*modules_of(target)} & modules)
    for target in targets:
        if absent := {*modules_of(target)} - modules:
            raise ValueError(
                f"{folder} adapts {', '.join({*modules_of(target)} & modules)} without {', '.join(absent)}: here both "
                "have an adapter or none"
            )
    rank = settings["r"]
    return Adapter(rank, settings["lora_alpha"] * (rank**0.5 if settings.get("use_rslora") else 1.0), targets)


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    if not file.is_file():
        raise ValueError(f"{folder} has no {SETTINGS}: it is not the folder of an adapter of peft")
    try:
        settings = json.loads(file.read_text())
        kind, rank, alpha = (settings[name] for name in ("peft_type", "r", "lora_alpha"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not one of peft's: {type(error).__name__}: {error}") from None
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type {kind!r} is not known; LORA is")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        raise ValueError(f"{file}: r {rank!r} and lora_alpha {alpha!r} must be positive numbers")
    if (start := settings.get("init_lora_weights")) not in PLAIN_STARTS:
        raise ValueError(
            f"{file}: init_lora_weights {start!r} changes the frozen weights too: convert it with peft "
            "(path_initial_model_for_weight_conversion)"
        )
    others = {k: v for k, v in settings.items() if k not in (*READ, *IDLE)}
    others |= {"bias": settings["bias"]} if settings.get("bias", "none") != "none" else {}
    if on := sorted(name for name, value in others.items() if value):
        raise ValueError(f"{file}: {on[0]}={settings[on[0]]!r} is not known here: only plain LoRA is")
    return settings


def _names(folder: Path) -> list[str]:
    """The tensors of an adapter, all of which are a ``lora_A`` or ``lora_B``."""
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: save the adapter with save_pretrained of peft")
    try:
        with safe_open(folder / WEIGHTS, "numpy") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is truncated or no safetensors file ({error}): fetch it again") from None
    for name in names:
        if not name.startswith(PREFIX) or not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(f"{folder / WEIGHTS}: tensor {name} has no place in a LoRA adapter of a language model")
    return names


def _places(config: TransformerConfig, targets: tuple[str, ...]) -> list[tuple[str, Slot]]:
    """(module, slot of its matrix) of every adapted matrix."""
    slots = [slot for slot in tensors(config) if slot.path[0] == "blocks" and slot.path[1] in targets]
    return [(PREFIX + slot.name.removesuffix(".weight"), slot) for slot in slots]


def _parts(adapter: Mapping[str, Any], slot: Slot) -> tuple[Any, Any]:
    """The views a [in ..., r] and b [r, out ...] of the matrix of a slot."""
    layer, *rest = (at for at in slot.index if not isinstance(at, slice))
    a, b = adapter["a"][layer], adapter["b"][layer]
    return (a[..., rest[0], :], b[:, rest[0]]) if rest else (a, b)


def load_adapter(folder: str | Path, config: TransformerConfig) -> Params:
    """The adapters in a folder, in float32, for a model of the shape ``config``.

    Raises:
      ValueError: as of `read_adapter`, or a tensor is missing, left over or of another shape.
    """
    found, folder = read_adapter(folder), Path(folder)
    shapes = _shapes(config, found)
    own = {name: {x: np.zeros(shape, np.float32) for x, shape in ab.items()} for name, ab in shapes.items()}
    there = set(_names(folder))
    with safe_open(folder / WEIGHTS, "numpy") as file:
        for module, slot in _places(config, found.targets):
            for letter, ours in zip("AB", _parts(own[slot.path[1]], slot), strict=True):
                name = f"{module}.lora_{letter}.weight"
                flat = (-1, found.rank) if letter == "A" else (found.rank, -1)
                shape = list(ours.reshape(flat).T.shape)
                if name not in there:
                    raise ValueError(f"{folder / WEIGHTS}: tensor {name} is missing: it adapts another model")
                if (given := list(file.get_slice(name).get_shape())) != shape:
                    raise ValueError(f"{folder / WEIGHTS}: tensor {name} is {given}, this model and r make it {shape}")
                ours[...] = file.get_tensor(name).astype(np.float32).T.reshape(ours.shape)
                there.remove(name)
    if there:
        first = sorted(there)[0]
        raise ValueError(f"{folder / WEIGHTS}: tensor {first} has no place in this model ({len(there)} such)")
    return {"blocks": {name: {x: jnp.asarray(array) for x, array in ab.items()} for name, ab in own.items()}}


def _shapes(config: TransformerConfig, adapter: Adapter) -> dict[str, dict[str, tuple[int, ...]]]:
    def made() -> Params:
        return lora.init(transformer.init(config, jax.random.key(0)), jax.random.key(0), **how)

    how = dict(rank=adapter.rank, targets=adapter.targets)
    return jax.tree.map(lambda x: x.shape, jax.eval_shape(made)["blocks"])


def write_adapter(
    params: Params,
    config: TransformerConfig,
    directory: str | Path,
    *,
    alpha: float,
    base: str,
    head: str | None = None,
) -> None:
    """Write adapters as a folder that ``peft`` loads, in float32.

    Args:
      params: adapters, and heads if ``head`` is given.
      config: the shape of the model that they belong to.
      alpha: of the scale alpha / rank.
      base: the model that they belong to, for the reader.
      head: the head of one number that takes the place of the vocabulary's (``score``); None = a language model.

    Raises:
      FileExistsError: ``directory`` exists already.
    """
    blocks = jax.tree.map(lambda x: np.asarray(x, np.float32), params["blocks"])
    targets = tuple(name for name in lora.TARGETS if name in blocks)
    rank = blocks[targets[0]]["a"].shape[-1]
    arrays = {}
    for module, slot in _places(config, targets):
        a, b = _parts(blocks[slot.path[1]], slot)
        arrays[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, rank).T)
        arrays[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.reshape(rank, -1).T)
    settings = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=alpha,
        target_modules=[module for target in targets for module in modules_of(target)],
        modules_to_save=None if head is None else ["score"],
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=False,
        use_rslora=False,
        init_lora_weights=True,
        inference_mode=True,
    )
    if head is not None:
        arrays[f"{PREFIX}score.weight"] = np.asarray(params["heads"][head]["weight"], np.float32)[None]
    with new_folder(Path(directory)) as folder:
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        save_file(arrays, folder / WEIGHTS, {"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)
