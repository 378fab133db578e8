"""Checkpoints of a whole training state by orbax: written in the background, restored bit for bit on any mesh.

A checkpoint is a directory named after its step. It holds the arrays of a pytree under flat names ("params/head/w"),
sharded (tensorstore, OCDBT), and the manifest (`jaxpo.storage.manifest`), which is written last. If the manifest does
not match the files bit for bit, the checkpoint is damaged: the one before it is restored, and a warning says which
checkpoint is damaged, why, and which is taken instead.

With several processes (``jax.distributed``) every process has to make every call, on a directory that all of them see.
"""

import json
import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxpo.arguments import Whole, check
from jaxpo.registry import unknown
from jaxpo.storage import manifest
from jaxpo.storage.manifest import DamagedCheckpoint, Tree, describe, is_key, is_stored, named_leaves
from jaxpo.storage.paths import located

_TMP, _DAMAGED = ".orbax-checkpoint-tmp", ".damaged"  # suffixes of directories that are not checkpoints


def _says_something_new(line: logging.LogRecord) -> bool:
    """Orbax logs dozens of lines a save, and the whole traceback of an error that it raises again; asyncio logs the
    exceptions of the parts of that save which nobody waited for."""
    if line.name == "asyncio":
        return "never retrieved" not in line.getMessage()
    return "/orbax/" not in line.pathname or (line.levelno >= logging.WARNING and not line.exc_info)


def _unless_late(before: Callable[[Any], None]) -> Callable[[Any], None]:
    """``before``, but silent where a part of a failed save ends after its event loop: the save itself is an error."""

    def hook(lost: Any) -> None:
        if not (isinstance(lost.exc_value, RuntimeError) and str(lost.exc_value) == "Event loop is closed"):
            before(lost)

    return hook


for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(_says_something_new)
sys.unraisablehook = _unless_late(sys.unraisablehook)  # what tensorstore's threads call


class Restored(NamedTuple):
    """A checkpoint that was read.

    tree: the restored pytree.
    position: what else a resumed run has to know.
    step: the step of the checkpoint.
    manifest: its whole manifest (metrics, config, leaves, ...).
    passed: later steps that are damaged.
    """

    tree: Tree
    position: dict[str, Any]
    step: int
    manifest: dict[str, Any]
    passed: list[int]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they are kept, created if it is missing; a local path or one that etils.epath can write
        (gs://...).
      keep: how many finished checkpoints stay; the oldest are deleted first. ``save``, ``wait`` and ``close`` delete
        them, so there can be one more for a while.
      best: name of a metric. The checkpoint with its highest value stays too (of equal ones, the later).
      config: hash of the run's config, kept in the manifests.
      origin: what the run is trained on, as JSON values (`jaxpo.runs.kept`), kept in the manifests.
    """

    def __init__(
        self,
        directory: str,
        keep: int = 3,
        *,
        best: str | None = None,
        config: str = "",
        origin: Mapping[str, Any] | None = None,
    ):
        check("keep", keep, Whole)
        self.directory, self.keep, self.best, self.config = located(directory).absolute(), keep, best, config
        self.origin = dict(origin or {})
        self.directory.mkdir(parents=True, exist_ok=True)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return finished_steps(self.directory)

    def latest(self) -> int | None:
        """The last finished step; None if there is none."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, tree: Tree, position: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Copy ``tree`` to the host and write it in the background. If an earlier save is still being written, wait for
        it first.

        Args:
          step: names the checkpoint; an older checkpoint of this step, whole or half written, is replaced.
          tree: pytree of arrays, PRNG keys (typed or raw) and Python scalars. It may be donated once this returns.
          position: what else a resumed run has to know, as JSON values.
          metrics: ``best`` is chosen by these; a checkpoint without that metric is never the best.

        Raises:
          ValueError: ``step`` is before the latest checkpoint; see ``discard_after``.
          TypeError: a leaf, or a value in ``position``, cannot be saved.
          OSError: the earlier save could not be written.
        """
        self.wait()
        if (latest := self.latest()) is not None and step < latest:
            raise ValueError(
                f"step: {step} comes before the latest checkpoint, {latest}, in {self.directory}; "
                f"call discard_after({step}) if the run has gone back"
            )
        leaves, arrays = {}, {}
        for name, (path, leaf) in named_leaves(tree).items():
            leaves[name] = {"path": manifest.keys_of_path(path), **describe(name, leaf)}
            if is_stored(leaves[name]):
                arrays[name] = _to_orbax(leaf)
        for name, checksum in manifest.checksums(arrays).items():
            leaves[name]["checksum"] = checksum
        content = dict(
            step=step,
            config=self.config,
            origin=self.origin,
            position=dict(position),
            metrics=dict(metrics or {}),
            leaves=leaves,
        )
        try:
            json.dumps(content)
        except TypeError as error:
            raise TypeError(f"position: {error}; it must hold only JSON values") from None
        folder = self.directory / str(step)
        self._delete(folder)  # a half-written checkpoint, or one to be replaced
        _together(f"checkpoint {step}")  # no process starts to write before it is deleted
        if arrays:  # orbax refuses an empty item
            self._orbax.save(folder, args=ocp.args.Composite(arrays=ocp.args.PyTreeSave(arrays)))
        self._pending = self._thread.submit(self._publish, folder, content)

    def _publish(self, folder: epath.Path, content: dict[str, Any]) -> None:
        self._orbax.wait_until_finished()  # the files of all processes are written
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            manifest.write(folder, {**content, "files": manifest.sizes(folder)})

    def wait(self) -> None:
        """Wait until nothing is being written any more, then delete old checkpoints.

        Raises:
          OSError: a checkpoint could not be written (for example, the disk is full).
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:
                raise OSError(
                    f"a checkpoint could not be written to {self.directory}: {_one_line(error)}; the last whole one is "
                    f"{self.latest()}: make room there, or see to its permissions, and go on with --resume"
                ) from error
            _together("checkpoint written")
        self._prune()

    def _prune(self) -> None:
        if jax.process_index() != 0:
            return
        steps = self.steps()
        for step in set(steps[: -self.keep]) - {self._best(steps)}:
            self._delete(self.directory / str(step))
        for left in self.directory.iterdir():  # left by a killed process, as nothing is being written now
            if left.name.endswith(_TMP) or (left.name.isdecimal() and not _is_finished(left)):
                self._delete(left)

    def _best(self, steps: list[int]) -> int | None:
        values = {}
        for step in steps if self.best else ():
            try:
                values[step] = manifest.read(self.directory / str(step))["metrics"][self.best]
            except (DamagedCheckpoint, KeyError):  # without a readable metric it cannot be the best
                continue
        return max(values, key=lambda step: (values[step], step), default=None)

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, when a run continues from ``step``."""
        self.wait()
        for later in self.steps():
            if later > step:
                self._delete(self.directory / str(later))
        _together("later ones discarded")

    def set_aside(self, steps: Sequence[int]) -> None:
        """Rename damaged checkpoints to ``STEP.damaged``, so that the run can write these steps again."""
        for step in steps if jax.process_index() == 0 else ():
            folder = self.directory / str(step)
            if not _is_finished(folder):  # a kill left it half written
                self._delete(folder)
            else:
                self._delete(folder.with_name(folder.name + _DAMAGED))
                folder.rename(folder.with_name(folder.name + _DAMAGED))
        _together("damaged ones set aside")

    def restore(self, template: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """The tree and position of the checkpoint ``step`` (None = the latest whole one): see `restore` below."""
        self.wait()
        return restore(self.directory, template, step)[:2]

    def close(self, *, wait: bool = True) -> None:
        """Wait for the last save, and release the threads even if it could not be written. Without ``wait`` the save
        under way is left to itself."""
        if not wait:
            self._thread.shutdown(wait=False, cancel_futures=True)
            return
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _delete(self, folder: epath.Path) -> None:
        if jax.process_index() == 0 and folder.exists():
            (folder / manifest.NAME).unlink(missing_ok=True)  # first: a kill in the middle leaves no checkpoint
            folder.rmtree()


def finished_steps(directory: str) -> list[int]:
    """Ascending steps of the finished checkpoints in ``directory``, without those that a kill left half written."""
    folder = located(directory)
    return [step for step in _steps(folder) if _is_finished(folder / str(step))]


def all_steps(directory: str) -> list[int]:
    """Ascending steps that have a folder in ``directory``, finished, half written or set aside as damaged."""
    folder = located(directory)
    names = [path.name.removesuffix(_DAMAGED) for path in folder.iterdir()] if folder.exists() else []
    return sorted({int(name) for name in names if name.isdecimal()})


def restore(
    directory: str, template: Tree, step: int | None = None, *, report: Callable[[str], None] | None = None
) -> Restored:
    """Restore a checkpoint in the structure of ``template`` and on its devices, and verify that every bit is as it was
    saved.

    Args:
      template: pytree of arrays or jax.ShapeDtypeStruct. A leaf with a sharding is restored with that sharding, from
        whatever mesh it was saved. A leaf without one (or an uncommitted array) comes back uncommitted. NumPy arrays
        come back as NumPy arrays, Python scalars as Python scalars.
      step: which checkpoint; None = the latest whole one.
      report: called with a line for each damaged checkpoint that is passed over: the reason, and which checkpoint is
        taken instead. By default the first process prints it to standard error.

    Raises:
      FileNotFoundError: there is no such finished checkpoint, or none that is whole.
      DamagedCheckpoint: the given ``step`` is not whole.
      ValueError: a leaf is missing, left over, or of another shape or dtype than in the template (it is named).
    """
    wanted = named_leaves(template)

    def load(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
        content = _agreed(lambda: manifest.read(folder))
        described = {name: describe(name, leaf) for name, (_, leaf) in wanted.items()}
        manifest.compare(folder, content["leaves"], described)
        return _read(folder, content["leaves"], {name: leaf for name, (_, leaf) in wanted.items()}), content

    (found, content), passed = _first_whole(located(directory).absolute(), step, load, report)
    tree = jax.tree.unflatten(jax.tree.structure(template), [found[name] for name in wanted])
    return Restored(tree, content["position"], content["step"], content, passed)


def restore_params(
    directory: str,
    step: int | None = None,
    *,
    name: str = "params",
    shardings: Tree = None,
    without: Collection[tuple[str, ...]] = (),
) -> tuple[dict, dict[str, Any]]:
    """Restore the parameters of a checkpoint without a template, for evaluation.

    Args:
      directory: the directory of the run's checkpoints.
      step: which checkpoint; None = the latest whole one.
      name: the entry of the saved tree to read; nothing else is read.
      shardings: a tree with the sharding of each leaf; None = on the default device.
      without: leaves whose path begins with one of these are not read, such as ``("params", "heads", "score")``.

    Returns:
      A nested dict of arrays (lists come back as dicts with integer keys) and the position.

    Raises:
      FileNotFoundError, DamagedCheckpoint: as in `restore`.
      KeyError: the saved tree has no entry ``name``.
      ValueError: ``shardings`` and the checkpoint have different leaves (one is named).
    """
    placed = {f"{name}/{key}": x for key, (_, x) in named_leaves(shardings).items()}

    def load(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
        content = _agreed(lambda: manifest.read(folder))
        leaves = {key: leaf for key, leaf in content["leaves"].items() if leaf["path"][:1] == [name]}
        left_out = {key for key, leaf in leaves.items() if any(tuple(leaf["path"][: len(p)]) == p for p in without)}
        leaves = {key: leaf for key, leaf in leaves.items() if key not in left_out}
        if not leaves:
            entries = {str(leaf["path"][0]) for leaf in content["leaves"].values() if leaf["path"]}
            raise KeyError(f"checkpoint {folder}: {unknown('entry', name, entries)}")
        if wrong := sorted(placed.keys() ^ leaves.keys()) if placed else []:
            raise ValueError(f"checkpoint {folder} belongs to another model: only one of the two has {wrong[0]}")
        templates = {key: manifest.template_of(leaf, placed.get(key)) for key, leaf in leaves.items()}
        return _read(folder, leaves, templates), content

    (arrays, content), _ = _first_whole(located(directory).absolute(), step, load, None)
    tree: dict = {}
    for key, value in arrays.items():
        node, path = tree, content["leaves"][key]["path"]
        for entry in path[:-1]:
            node = node.setdefault(entry, {})
        node[path[-1]] = value
    return tree[name], content["position"]


def saved_paths(directory: str, step: int | None = None) -> set[tuple[str, ...]]:
    """The paths of the leaves in a checkpoint, such as ``("params", "heads", "score", "weight")``.

    Raises:
      FileNotFoundError, DamagedCheckpoint: as in `restore`."""

    def load(folder: epath.Path) -> set[tuple[str, ...]]:
        content = _agreed(lambda: manifest.read(folder))
        return {tuple(map(str, leaf["path"])) for leaf in content["leaves"].values()}

    return _first_whole(located(directory).absolute(), step, load, None)[0]


def saved_origin(directory: str, step: int | None = None) -> dict[str, Any]:
    """What the run of a checkpoint was trained on, as its manifest says.

    Raises:
      FileNotFoundError, DamagedCheckpoint: as in `restore`."""

    def load(folder: epath.Path) -> dict[str, Any]:
        return _agreed(lambda: manifest.read(folder)).get("origin", {})

    # Damaged checkpoints are told about by whoever reads their arrays.
    return _first_whole(located(directory).absolute(), step, load, lambda line: None)[0]


# ---- which checkpoint


def _steps(directory: epath.Path) -> list[int]:
    """Ascending steps that have a directory, finished or not."""
    there = directory.iterdir() if directory.exists() else ()
    return sorted(int(path.name) for path in there if path.name.isdecimal())


def _is_finished(folder: epath.Path) -> bool:
    return (folder / manifest.NAME).exists()


def _first_whole(
    directory: epath.Path, step: int | None, load: Callable[[epath.Path], Any], report: Callable[[str], None] | None
) -> tuple[Any, list[int]]:
    """``load`` of the step, or of the last whole checkpoint; and the damaged steps after it."""
    if step is not None:
        if step not in _steps(directory):
            finished = finished_steps(directory)
            nearest = f"; the nearest is {min(finished, key=lambda x: abs(x - step))}" if finished else ""
            raise FileNotFoundError(f"no finished checkpoint of step {step} in {directory}{nearest}")
        try:
            return load(directory / str(step)), []
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(f"checkpoint {directory}/{step} is damaged: {error}") from None
    passed: dict[int, str] = {}
    for candidate in reversed(_steps(directory)):
        try:
            found = load(directory / str(candidate))
        except DamagedCheckpoint as error:
            passed[candidate] = f"checkpoint {directory}/{candidate} is damaged: {error}"
            continue
        for line in passed.values() if jax.process_index() == 0 else ():
            line = f"WARNING: {line}. Taking checkpoint {directory}/{candidate} instead"
            report(line) if report else print(line, file=sys.stderr, flush=True)
        return found, list(passed)
    raise FileNotFoundError("; ".join([f"no finished checkpoint in {directory}", *passed.values()]))


# ---- reading


def _together(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _agreed(read: Callable[[], Any]) -> Any:
    """``read()``. If it fails in any process, all of them raise ``DamagedCheckpoint``."""
    found, error = None, None
    try:
        found = read()
    except Exception as failure:  # damaged bits can raise anything in a decoder
        error = failure
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.process_allgather(np.array(failed)).any())
    if failed:
        raise DamagedCheckpoint(_one_line(error) if error else "another process could not read it") from error
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _to_orbax(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)  # a copy: the caller may change its array
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    # Orbax does not take an array that every process has a copy of (an optimizer's step count) as a distributed one.
    return np.asarray(leaf) if jax.process_count() > 1 and leaf.is_fully_addressable else leaf


def _read(folder: epath.Path, saved: Mapping[str, Mapping], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Read {name: leaf} for the ``wanted`` templates, and check shape, dtype and checksum against ``saved``."""
    stored = {name: leaf for name, leaf in wanted.items() if is_stored(saved[name])}
    arrays: dict[str, Any] = {}
    if stored:
        how = {name: _restore_args(leaf) for name, leaf in stored.items()}
        items = {name: 0 for name in stored}
        args = ocp.args.PyTreeRestore(item=items, restore_args=how, partial_restore=True)
        # Not with a Checkpointer: its barriers would wait forever for a process that could not read.
        arrays = _agreed(lambda: ocp.PyTreeCheckpointHandler().restore(folder / "arrays", args=args))
    for name, checksum in manifest.checksums(arrays).items():
        if checksum != saved[name]["checksum"]:
            raise DamagedCheckpoint(f"{name} has checksum {checksum}; {saved[name]['checksum']} was written")
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
    if is_key(template):
        value = jax.random.wrap_key_data(value, impl=saved["dtype"].removeprefix(manifest.KEY))
    if (read := describe(name, value)) != {"shape": saved["shape"], "dtype": saved["dtype"]}:
        raise DamagedCheckpoint(
            f"{name} was saved as {saved['dtype']} {saved['shape']} and read as {read['dtype']} {read['shape']}"
        )
    return value
