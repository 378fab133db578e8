"""Checkpoints of a whole training state by orbax: written in the background, restored bit for bit on any mesh.

A checkpoint is a directory named after its step. It holds the arrays of a pytree under flat names ("params/head/w") and
a manifest: the shape and dtype of every leaf, and the ``position`` (data position, step, ...: what JSON can hold).
Orbax alone takes an empty directory for a checkpoint and casts dtypes without a word; the manifest is there to notice.

With several processes (``jax.distributed``) all of them have to make every call.
"""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxpo.registry import unknown

Tree = Any
_SCALARS = {kind.__name__: kind for kind in (bool, int, float, str)}  # leaves that live in the manifest itself
_TMP, _DELETED = ".orbax-checkpoint-tmp", ".deleted"  # endings of directories that are no checkpoints
_KEY = "key "  # dtype of a typed key: this and its kind

# Orbax logs dozens of lines a save through absl's logger; its warnings and errors still come through.
logging.getLogger("absl").addFilter(lambda line: line.levelno >= logging.WARNING or "/orbax/" not in line.pathname)


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they are kept, made if it is missing; a local path or one that etils.epath writes (gs://...).
      keep: how many finished ones stay; the oldest go first. ``save``, ``wait`` and ``close`` prune, so there can be
        one more for a while.
    """

    def __init__(self, directory: str, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep: {keep} checkpoints; at least 1 has to stay")
        self.directory, self.keep = epath.Path(directory).absolute(), keep
        self.directory.mkdir(parents=True, exist_ok=True)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return finished_steps(self.directory)

    def latest(self) -> int | None:
        """The last finished step, None if there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, tree: Tree, position: Mapping[str, Any]) -> None:
        """Copy ``tree`` to the host and write it in the background; a save still under way is waited for first.

        Args:
          step: names the checkpoint; a checkpoint of this step, whole or torn, is replaced.
          tree: pytree of arrays, PRNG keys (typed or raw) and Python scalars. It may be donated once this returns.
          position: what else a resumed run has to know, JSON-able.

        Raises:
          ValueError: ``step`` is before the latest checkpoint's; see ``discard_after``.
          TypeError: a leaf, or something in ``position``, that cannot be saved.
        """
        self.wait()
        if (latest := self.latest()) is not None and step < latest:
            raise ValueError(
                f"step: {step} comes before the latest checkpoint, {latest}, in {self.directory}; "
                f"call discard_after({step}) if the run has gone back"
            )
        leaves, arrays = {}, {}
        for path, leaf in _named_leaves(tree).values():
            name = _name(path)
            leaves[name] = {"path": [_key(entry) for entry in path], **_describe(name, leaf)}
            if _is_stored(leaves[name]):
                arrays[name] = _to_orbax(leaf)
        manifest = {"position": dict(position), "leaves": leaves}
        try:
            json.dumps(manifest)
        except TypeError as error:
            raise TypeError(f"position: {error}; it has to be JSON-able") from None
        items = {"manifest": ocp.args.JsonSave(manifest)}
        if arrays:  # orbax refuses an empty item
            items["arrays"] = ocp.args.PyTreeSave(arrays)
        self._delete(self.directory / str(step))  # a torn one, or one to be replaced
        multihost_utils.sync_global_devices(f"checkpoint {step}")  # no process starts before that is done
        self._orbax.save(self.directory / str(step), args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Return once nothing is being written any more; errors of the background save are raised here."""
        self._orbax.wait_until_finished()
        for step in self.steps()[: -self.keep]:
            self._delete(self.directory / str(step))
        for left in self.directory.iterdir():  # of a killed process: nothing is under way
            if left.name.endswith((_TMP, _DELETED)):
                self._delete(left)

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: a run that resumes from ``step`` leaves that continuation behind."""
        self._orbax.wait_until_finished()
        for later in self.steps():
            if later > step:
                self._delete(self.directory / str(later))

    def restore(self, template: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """The tree and position of a checkpoint, in the structure of ``template`` and on its devices.

        Args:
          template: pytree of arrays or jax.ShapeDtypeStruct. A leaf with a sharding is restored with it, whatever mesh
            it was saved from; one without (or an uncommitted array) comes back uncommitted. NumPy arrays come back as
            NumPy arrays, Python scalars as such.
          step: which one; the latest by default.

        Raises:
          FileNotFoundError: there is no such finished checkpoint.
          ValueError: a leaf is missing, left over, or of another shape or dtype than in the template (it is named).
        """
        self._orbax.wait_until_finished()
        check(self.directory, template, step)
        path, manifest = _open(self.directory, step)
        wanted = _named_leaves(template)
        found = _read(self._orbax, path, manifest["leaves"], {name: leaf for name, (_, leaf) in wanted.items()})
        return jax.tree.unflatten(jax.tree.structure(template), [found[name] for name in wanted]), manifest["position"]

    def close(self) -> None:
        """Wait for the last save and release orbax's threads."""
        self.wait()
        self._orbax.close()

    def _delete(self, path: epath.Path) -> None:
        # Renamed first: a kill in the middle of the removal must not leave a checkpoint with some of its files.
        if jax.process_index() != 0 or not path.exists():
            return
        if not path.name.endswith((_TMP, _DELETED)):
            path = path.rename(path.with_name(path.name + _DELETED))
        path.rmtree()


def finished_steps(directory: str) -> list[int]:
    """Ascending steps of the whole checkpoints in ``directory``; what a kill left half written is none."""
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and _is_finished(path))


def check(directory: str, template: Tree, step: int | None = None) -> dict[str, Any]:
    """Whether a checkpoint (the latest) could be restored into ``template``, from its manifest alone; its position.

    Raises:
      FileNotFoundError, ValueError: as ``Checkpoints.restore``.
    """
    path, manifest = _open(epath.Path(directory).absolute(), step)
    wanted = {name: _describe(name, leaf) for name, (_, leaf) in _named_leaves(template).items()}
    _check(path, manifest["leaves"], wanted)
    return manifest["position"]


def restore_params(directory: str, step: int | None = None, *, name: str = "params") -> tuple[dict, dict[str, Any]]:
    """The parameters of a checkpoint without a template: for evaluation.

    Args:
      directory: of the run's checkpoints.
      step: which one; the latest by default.
      name: the entry of the saved tree to read; nothing else is read.

    Returns:
      A nested dict of arrays on the default device (lists come back as dicts with integer keys) and the position.

    Raises:
      FileNotFoundError: there is no such finished checkpoint.
      KeyError: the saved tree has no entry ``name``.
    """
    path, manifest = _open(epath.Path(directory).absolute(), step)
    leaves = {key: leaf for key, leaf in manifest["leaves"].items() if leaf["path"][:1] == [name]}
    if not leaves:
        entries = {str(leaf["path"][0]) for leaf in manifest["leaves"].values() if leaf["path"]}
        raise KeyError(f"checkpoint {path}: {unknown('entry', name, entries)}")
    orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    arrays = _read(orbax, path, leaves, {key: _template(leaf) for key, leaf in leaves.items()})
    orbax.close()
    tree: dict = {}
    for key, leaf in leaves.items():
        node = tree
        for entry in leaf["path"][:-1]:
            node = node.setdefault(entry, {})
        node[leaf["path"][-1]] = arrays[key]
    return tree[name], manifest["position"]


# ---- leaves: names, descriptions, and what orbax can hold


def _key(entry: Any) -> str | int:
    for attribute in ("key", "idx", "name"):  # DictKey, SequenceKey, GetAttrKey
        if hasattr(entry, attribute):
            key = getattr(entry, attribute)
            return key if isinstance(key, int) else str(key)
    return str(entry)


def _name(path: tuple) -> str:
    return "/".join(str(_key(entry)) for entry in path) or "."


def _named_leaves(tree: Tree) -> dict[str, tuple[tuple, Any]]:
    """{name: (key path, leaf)} in the order of jax.tree.leaves."""
    named: dict[str, tuple[tuple, Any]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if _name(path) in named:
            raise ValueError(f"{_name(path)}: two leaves of the tree have this name")
        named[_name(path)] = path, leaf
    return named


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _dtype_name(x: Any) -> str:
    if not _is_key(x):
        return str(x.dtype)
    names: list[str] = []  # key_impl takes arrays only: trace it
    jax.eval_shape(lambda key: names.append(str(jax.random.key_impl(key))), jax.ShapeDtypeStruct(x.shape, x.dtype))
    return _KEY + names[0]


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    """Shape and dtype of a leaf as the manifest has them; the value too if it is a Python scalar."""
    if type(leaf) in _SCALARS.values():
        return {"shape": [], "dtype": f"python {type(leaf).__name__}", "value": leaf}
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape") or leaf.dtype == object:
        raise TypeError(
            f"{name}: a leaf of type {type(leaf).__name__} cannot be saved; "
            f"arrays, PRNG keys and {', '.join(_SCALARS)} can"
        )
    return {"shape": list(leaf.shape), "dtype": _dtype_name(leaf)}


def _is_stored(leaf: Mapping[str, Any]) -> bool:
    """Whether orbax holds the leaf: not Python scalars, and not arrays of size zero, which it refuses."""
    return "value" not in leaf and math.prod(leaf["shape"]) > 0


def _to_orbax(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)  # a copy: the caller may write into its own
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    # What every process has a copy of (an optimizer's step count) is no distributed array to orbax.
    return np.asarray(leaf) if jax.process_count() > 1 and leaf.is_fully_addressable else leaf


def _template(leaf: Mapping[str, Any]) -> Any:
    if "value" in leaf:
        return leaf["value"]
    if leaf["dtype"].startswith(_KEY):
        dtype = jax.eval_shape(lambda: jax.random.key(0, impl=leaf["dtype"].removeprefix(_KEY))).dtype
    else:
        dtype = jnp.dtype(leaf["dtype"])
    return jax.ShapeDtypeStruct(tuple(leaf["shape"]), dtype)


# ---- reading


def _is_finished(path: epath.Path) -> bool:
    return (path / "manifest" / "metadata").exists() and ocp.utils.is_checkpoint_finalized(path)


def _open(directory: epath.Path, step: int | None) -> tuple[epath.Path, dict[str, Any]]:
    steps = finished_steps(directory)
    if not steps:
        raise FileNotFoundError(f"no finished checkpoint in {directory}")
    if step is not None and step not in steps:
        nearest = min(steps, key=lambda other: abs(other - step))
        raise FileNotFoundError(f"no finished checkpoint of step {step} in {directory}; the nearest is {nearest}")
    path = directory / str(steps[-1] if step is None else step)
    return path, json.loads((path / "manifest" / "metadata").read_text())


def _check(path: epath.Path, saved: Mapping[str, Mapping], wanted: Mapping[str, Mapping]) -> None:
    for name in wanted:
        if name not in saved:
            raise ValueError(f"checkpoint {path}: {unknown('leaf', name, set(saved) - set(wanted))}")
    for name in saved:
        if name not in wanted:
            raise ValueError(
                f"checkpoint {path} has a leaf that the template lacks: "
                f"{unknown('leaf', name, set(wanted) - set(saved))}"
            )
    for name, leaf in wanted.items():
        for what in ("shape", "dtype"):
            if leaf[what] != saved[name][what]:
                raise ValueError(
                    f"checkpoint {path}: {name} was saved with {what} {saved[name][what]}, "
                    f"the template has {leaf[what]}"
                )


def _read(orbax: Any, path: epath.Path, saved: Mapping[str, Mapping], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """{name: leaf} of the ``wanted`` templates, each of the shape and dtype that ``saved`` says."""
    stored = {name: leaf for name, leaf in wanted.items() if _is_stored(saved[name])}
    arrays = {}
    if stored:
        how = {name: _restore_args(leaf) for name, leaf in stored.items()}
        arrays = orbax.restore(
            path,
            args=ocp.args.Composite(
                arrays=ocp.args.PyTreeRestore(item={name: 0 for name in stored}, restore_args=how, partial_restore=True)
            ),
        )["arrays"]
    return {name: _from_orbax(name, arrays.get(name), leaf, saved[name]) for name, leaf in wanted.items()}


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    # An uncommitted array goes wherever a computation needs it. Restored onto the device that it happens to be on, it
    # would be refused beside arrays of a mesh.
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = _sharding(leaf)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding)


def _from_orbax(name: str, value: Any, template: Any, saved: Mapping[str, Any]) -> Any:
    if "value" in saved:
        return saved["value"]
    if value is None:  # of size zero
        value = np.zeros(template.shape, jnp.dtype(saved["dtype"]))
    if not isinstance(template, jax.Array | jax.ShapeDtypeStruct):
        return value[()] if isinstance(template, np.generic) else value
    value = jnp.asarray(value) if _sharding(template) is None else jax.device_put(value, _sharding(template))
    if _is_key(template):
        value = jax.random.wrap_key_data(value, impl=saved["dtype"].removeprefix(_KEY))
    if (read := _describe(name, value)) != {"shape": saved["shape"], "dtype": saved["dtype"]}:
        raise ValueError(f"{name}: saved as {saved['dtype']} {saved['shape']}, read as {read['dtype']} {read['shape']}")
    return value
