"""The manifest of a checkpoint: shape, dtype and checksum of every leaf. Written last, it finishes the checkpoint.

Orbax alone accepts an empty directory as a checkpoint, restores a flipped bit as it is, and casts dtypes silently.
``manifest.json`` detects this. It holds shape, dtype and checksum of every leaf, the size of every file, a hash of the
config, and a hash of itself.

The checksum of a leaf is a sum over its elements. With x_i the bits of element i (in row-major order of the whole
array), it is ``sum_i mix(x_i + c1 * i) mod 2^32`` and a second such sum with another mix, where mix is a bijection of
32 bits (the finalizer of MurmurHash3). The order of a sum does not matter: every device adds up its own shard in the
compiled function, and these sums are added across devices and hosts. So any mesh gives the same number, without a copy
to the host. A change of one element is always detected, since the mix is one to one; changes of several elements are
detected with probability 1 - 2^-64. (Positions count modulo 2^32.)
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array, lax
from ml_collections import ConfigDict

from jaxpo.parallel.offload import fetched
from jaxpo.registry import unknown

Tree = Any
NAME = "manifest.json"
SCALARS = {kind.__name__: kind for kind in (bool, int, float, str)}  # leaves that are stored in the manifest itself
KEY = "key "  # the dtype of a typed PRNG key is this, followed by its implementation
# Config fields that may change when a run is resumed: where it computes and what it reports.
WHERE = ("mesh", "checkpoint", "logging", "evaluation", "compilation_cache")
# Where a run found what it keeps a copy or a hash of: "policy.path", "task.test_path".
PLACE = re.compile(r"(policy|tokenizer|task|data|lora)\.(\w+_)?path")
# Fields that must stay, as the seed must: with another value it would be another run. FREE ones of these only say how
# to compute.
FIXED = ("policy", "lora", "tokenizer", "objective.name", "protocol.name")
FREE = tuple(f"policy.{name}" for name in ("dtype", "scan_layers", "remat", "attention"))


class DamagedCheckpoint(ValueError):
    """A checkpoint is not whole, or its bits have changed since it was saved."""


# ---- leaves: names and descriptions


def _key(entry: Any) -> str | int:
    for attribute in ("key", "idx", "name"):  # DictKey, SequenceKey, GetAttrKey
        if hasattr(entry, attribute):
            key = getattr(entry, attribute)
            return key if isinstance(key, int) else str(key)
    return str(entry)


def keys_of_path(path: tuple) -> list[str | int]:
    """The path of a leaf as JSON values."""
    return [_key(entry) for entry in path]


def named_leaves(tree: Tree) -> dict[str, tuple[tuple, Any]]:
    """{name ("params/head/w"): (key path, leaf)} in the order of jax.tree.leaves.

    Raises:
      ValueError: two leaves have the same name.
    """
    named: dict[str, tuple[tuple, Any]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(map(str, keys_of_path(path))) or "."
        if name in named:
            raise ValueError(f"{name}: two leaves of the tree have this name")
        named[name] = path, leaf
    return named


def is_key(x: Any) -> bool:
    """Whether x is an array of typed PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _dtype_name(x: Any) -> str:
    if not is_key(x):
        return str(x.dtype)
    names: list[str] = []  # key_impl takes arrays only: trace it
    jax.eval_shape(lambda key: names.append(str(jax.random.key_impl(key))), jax.ShapeDtypeStruct(x.shape, x.dtype))
    return KEY + names[0]


def describe(name: str, leaf: Any) -> dict[str, Any]:
    """Shape and dtype of a leaf in the form of the manifest, and the value of a Python scalar.

    Raises:
      TypeError: it is neither an array nor a scalar.
    """
    if type(leaf) in SCALARS.values():
        return {"shape": [], "dtype": f"python {type(leaf).__name__}", "value": leaf}
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape") or leaf.dtype == object:
        raise TypeError(
            f"{name}: a leaf of type {type(leaf).__name__} cannot be saved; "
            f"arrays, PRNG keys and {', '.join(SCALARS)} can"
        )
    return {"shape": list(leaf.shape), "dtype": _dtype_name(leaf)}


def is_stored(leaf: Mapping[str, Any]) -> bool:
    """Whether the leaf is in the files: Python scalars are not, nor are arrays of size zero, which orbax refuses."""
    return "value" not in leaf and math.prod(leaf["shape"]) > 0


def template_of(leaf: Mapping[str, Any], sharding: jax.sharding.Sharding | None = None) -> Any:
    """A `jax.ShapeDtypeStruct` for a leaf of the manifest; for a Python scalar, the scalar itself."""
    if "value" in leaf:
        return leaf["value"]
    if leaf["dtype"].startswith(KEY):
        dtype = jax.eval_shape(lambda: jax.random.key(0, impl=leaf["dtype"].removeprefix(KEY))).dtype
    else:
        dtype = jnp.dtype(leaf["dtype"])
    return jax.ShapeDtypeStruct(tuple(leaf["shape"]), dtype, sharding=sharding)


def compare(where: Any, saved: Mapping[str, Mapping], wanted: Mapping[str, Mapping]) -> None:
    """Check that a checkpoint has the leaves of a template.

    Raises:
      ValueError: a leaf is missing, left over, or of another shape or dtype (it is named).
    """
    for name in wanted:
        if name not in saved:
            raise ValueError(f"checkpoint {where}: {unknown('leaf', name, set(saved) - set(wanted))}")
    for name in saved:
        if name not in wanted:
            raise ValueError(
                f"checkpoint {where} has a leaf that the template lacks: "
                f"{unknown('leaf', name, set(wanted) - set(saved))}"
            )
    for name, leaf in wanted.items():
        for what in ("shape", "dtype"):
            if leaf[what] != saved[name][what]:
                raise ValueError(
                    f"checkpoint {where}: {name} was saved with {what} {saved[name][what]}, "
                    f"the template has {leaf[what]}"
                )


# ---- checksums


def _mix(x: Array) -> Array:
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13), (1, 16)):
        x = (x ^ (x >> shift)) * jnp.uint32(multiplier)
    return x


@jax.jit
def _sums(x: Array) -> tuple[Array, Array]:
    x = fetched(x)
    if is_key(x):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(x.dtype.itemsize, 4) * 8}")).astype(jnp.uint32)
    at, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        at = at + lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    one = _mix(bits + at * jnp.uint32(0x9E3779B9))
    two = _mix((bits ^ jnp.uint32(0x5BD1E995)) * jnp.uint32(0x27D4EB2F) + at * jnp.uint32(0x165667B1))
    return one.sum(dtype=jnp.uint32), two.sum(dtype=jnp.uint32)


def checksums(arrays: Mapping[str, Any]) -> dict[str, str]:
    """{name: 16 hexadecimal digits} for NumPy arrays, or arrays sharded over any mesh, also of several hosts.

    With several processes every process has to make the call, and all get the same result.
    """
    sums = {}
    for name, x in arrays.items():
        if not isinstance(x, jax.Array):  # jax would cast 64 bits away
            x = np.ascontiguousarray(x).reshape(np.shape(x))
            x = x[..., None].view(np.uint32) if x.dtype.itemsize == 8 else x
        # One after the other: on CPUs, programs that communicate between processes must run in the same order.
        sums[name] = "".join(f"{int(part):08x}" for part in jax.device_get(_sums(x)))
    return sums


# ---- the config


def config_hash(config: ConfigDict) -> str:
    """A hash of a config without the fields in `WHERE` and without places."""
    return _hash(_flat(config.to_dict()))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of every field in which two configs differ, but for `WHERE` and places."""
    old, new = _flat(old), _flat(new)
    fields = sorted({*old, *new})
    return [(f, old.get(f), new.get(f)) for f in fields if _json(old.get(f)) != _json(new.get(f))]


def is_fixed(field: str) -> bool:
    """Whether a field must have the value that it had when the run began."""
    return field not in FREE and any(f"{field}.".startswith(f"{fixed}.") for fixed in FIXED)


def _flat(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"a.b": value} of the fields that say what is computed."""
    out = {}
    for name, value in config.items():
        field = f"{path}{name}"
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{field}.") if field not in WHERE else {}
        elif field not in WHERE and not PLACE.fullmatch(field):
            out[field] = value
    return out


def _json(content: Any) -> str:
    return json.dumps(content, sort_keys=True, default=str)  # a config may hold objects


def _hash(content: Any) -> str:
    return hashlib.sha256(_json(content).encode()).hexdigest()


# ---- the file


def sizes(folder: epath.Path) -> dict[str, int]:
    """{path below ``folder``: bytes} of its files, without the manifest."""

    def below(place: epath.Path) -> Iterator[epath.Path]:
        for path in place.iterdir():  # epath refuses "**"
            yield from below(path) if path.is_dir() else (path,)

    files = (path for path in below(folder) if not path.name.startswith(NAME))
    return {str(path.relative_to(folder)): path.stat().length for path in files}


def write(folder: epath.Path, content: Mapping[str, Any]) -> None:
    """Write the manifest, which makes ``folder`` a checkpoint. A kill never leaves a part of it."""
    text = _json({**content, "sha256": _hash(content)})
    if "://" in str(folder):  # an object store shows an object only when its upload is complete
        (folder / NAME).write_text(text)
        return
    temporary = folder / f"{NAME}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)
    for directory in (folder, folder.parent):  # flush the directory entries too
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read(folder: epath.Path) -> dict[str, Any]:
    """Read the manifest in ``folder``, and check it and the sizes of the files.

    Raises:
      DamagedCheckpoint: there is no manifest, it has changed, it is of another step than the folder's name says, or
        files are missing or of another size.
    """
    if not (folder / NAME).exists():
        raise DamagedCheckpoint(f"no {NAME}: it was never finished")
    try:
        content = json.loads((folder / NAME).read_text())
        written = content.pop("sha256")
    except (ValueError, KeyError, AttributeError):
        raise DamagedCheckpoint(f"{NAME} is not readable") from None
    if written != _hash(content):
        raise DamagedCheckpoint(f"{NAME} is not as it was written")
    if folder.name.isdecimal() and content.get("step", int(folder.name)) != int(folder.name):
        raise DamagedCheckpoint(f"it holds step {content['step']}: call the folder {content['step']} again")
    there = sizes(folder)
    for path, size in content["files"].items():
        if there.get(path) != size:
            found = f"has {there[path]} bytes" if path in there else "is missing"
            raise DamagedCheckpoint(f"{path} {found}; {size} were written")
    return content
