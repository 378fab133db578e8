"""The directory of a run, and the progress that it shows.

    config.json     the config as resolved when the run started
    metrics.jsonl   a JSON object a step: {"step": 3, "time": 12.5, "loss": ...}
    samples.jsonl   decoded samples: {"step": 3, ...}
    failures.txt    the first tracebacks of rewards and judges that failed (jaxpo.tasks.failures)
    events.*        the metrics for TensorBoard, if asked for
    curves.png      drawn from metrics.jsonl by jaxpo.storage.plots
    checkpoints/    written by jaxpo.storage.checkpoint
    tokenizer.json, model/, data/
                    what the run began with, kept by jaxpo.runs.kept

With several processes only the first one makes a `RunDirectory`; the others have an `Elsewhere`.
"""

import contextlib
import functools
import importlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from jaxpo.files import read_json
from jaxpo.storage import lock
from jaxpo.storage.paths import local
from jaxpo.text.terminal import printable

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
RESERVED = ("step", "time", "nonfinite")  # fields of a metrics line that are not metrics


class RunDirectory:
    """Writes the files of one run, as the only one who does (`jaxpo.storage.lock`). A line is in its file when the call
    returns.

    Args:
      workdir: the directory, created if it is missing.
      tensorboard: write TensorBoard events too.
      wandb: arguments of ``wandb.init`` (project, name, ...) to log there too, or None. A resumed run continues there.
      resume_step: the step of the checkpoint that the run continues from. Lines of later steps, and a line that a kill
        left incomplete, are removed, so that each step occurs once.

    Raises:
      FileExistsError: the directory is not empty and ``resume_step`` is None.
      FileNotFoundError: ``resume_step`` is given, but there is no directory to resume.
      ModuleNotFoundError: tensorboardX or wandb is asked for, but not installed.
      Locked: another process writes there.
      OSError: a file cannot be written, or wandb does not start.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        tensorboard: bool = False,
        wandb: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ):
        writer = _import("tensorboardX", "tensorboard") if tensorboard else None
        wandb_module = _import("wandb", "wandb") if wandb is not None else None
        self.path = local(workdir, "workdir")
        _check_workdir(self.path, resume_step)
        self.path.mkdir(parents=True, exist_ok=True)
        lock.take(self.path)
        try:
            self._open(writer, wandb_module, wandb, resume_step)
        except BaseException:
            lock.release(self.path)
            raise

    def _open(
        self,
        writer: ModuleType | None,
        wandb_module: ModuleType | None,
        wandb: Mapping[str, Any] | None,
        resume_step: int | None,
    ) -> None:
        earlier = 0.0
        if resume_step is not None:
            for name in (METRICS, SAMPLES):
                _cut_lines(self.path / name, resume_step)
            earlier = max((line.get("time", 0.0) for line in _lines(self.path / METRICS, lenient=True)), default=0.0)
        self._start = time.monotonic() - earlier
        purge = None if resume_step is None else resume_step + 1
        self._tensorboard = writer.SummaryWriter(str(self.path), purge_step=purge) if writer else None
        self._wandb = _start_wandb(wandb_module, self, wandb) if wandb_module else None
        self._metrics, self._samples = (open(self.path / name, "ab", buffering=0) for name in (METRICS, SAMPLES))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step.

        Args:
          step: the optimizer step or iteration that they belong to.
          metrics: name → a number or a 0-d array. NaN and infinities become null, and their names are listed under
            "nonfinite". "time" is added: seconds that the run has taken, without the breaks between resumes.

        Raises:
          TypeError: a value is not a single number.
          ValueError: a name is in ``RESERVED``.
        """
        values = {name: _number(name, value) for name, value in metrics.items()}
        if taken := [name for name in RESERVED if name in values]:
            raise ValueError(f"metric {taken[0]!r}: the run directory writes a field of that name itself")
        line = {"step": int(step), "time": round(time.monotonic() - self._start, 3), **values}
        self._append(self._metrics, _json_line(line))
        if self._tensorboard:
            with harmless("TensorBoard"):
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, int(step))
                self._tensorboard.flush()
        if self._wandb:
            with harmless("wandb"):
                self._wandb.log(values, step=int(step))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append decoded samples, a line each: the step and the fields of the row (prompt, completion, reward, ...)."""
        for row in rows:
            self._append(self._samples, _json_line({"step": int(step), **row}))

    def save_json(self, name: str, obj: Any) -> None:
        """Write ``obj`` to the file ``name``. The file always has the old content or the new one, never a part."""
        text = json.dumps(obj, indent=2, default=_plain)
        with _named(self.path / name):
            write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def close(self) -> None:
        """Close the files, TensorBoard and wandb, and give back the lock."""
        self._metrics.close()
        self._samples.close()
        if self._tensorboard:
            with harmless("TensorBoard"):
                self._tensorboard.close()
        if self._wandb:
            with harmless("wandb"):
                self._wandb.finish()
        lock.release(self.path)

    def _append(self, file: IO[bytes], line: str) -> None:
        with _named(Path(file.name)):
            _write_whole(file, line.encode())


class Elsewhere:
    """Stands in for a `RunDirectory` in a process that writes nothing."""

    def __init__(self, workdir: str | os.PathLike):
        self.path = Path(workdir)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """The first process writes them."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The first process writes them."""

    def close(self) -> None:
        """Nothing is open."""


def read_metrics(workdir: str | os.PathLike, *, lenient: bool = False) -> dict[str, np.ndarray]:
    """The metrics of a run as columns.

    Args:
      lenient: leave out lines that are not those of a step, and say so once, as a run does that goes on.

    Returns:
      {name: float64[n]} and "step" (int64[n]), with an entry for every step that was written; nan if a step lacks the
      metric or its value was not finite. Lines of the same step are merged; the later one wins.

    Raises:
      FileNotFoundError: there is no metrics.jsonl in ``workdir``.
      ValueError: a line is not that of a step (it is named).
    """
    path = local(workdir, "workdir") / METRICS
    if not path.exists():
        raise FileNotFoundError(f"{workdir} has no {METRICS}: not the directory of a run")
    rows: dict[int, dict] = {}
    for line in _lines(path, lenient=lenient):
        rows.setdefault(line.pop("step"), {}).update(line)
    names = dict.fromkeys(name for row in rows.values() for name in row if name != "nonfinite")
    columns = {"step": np.array(list(rows), np.int64)}
    for name in names:
        values = (row.get(name) for row in rows.values())
        columns[name] = np.array([x if isinstance(x, int | float) else None for x in values], np.float64)  # None: nan
    return columns


@contextlib.contextmanager
def harmless(what: str) -> Iterator[None]:
    """Let the ``with`` block fail without ending the run: the first time, a warning says which of the run's extras
    (a picture, a tracker) is missing and why."""
    try:
        yield
    except Exception as error:
        say_once(f"WARNING: {what} could not be written; the run goes on without it: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """The kind and text of an error, on one line."""
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])


@functools.cache
def say_once(text: str) -> None:
    """Print a line to standard error, unless it was printed before."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an ``OSError`` of the block name the file, and what would help."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} could not be written: {error.strerror or error}: make room there, or see to its permissions, and "
            "go on with --resume from the last checkpoint"
        ) from error


def _write_whole(file: IO[bytes], line: bytes) -> None:
    """Append a line. If there is no room for all of it, none of it stays."""
    start, done = file.seek(0, os.SEEK_END), 0
    try:
        while done < len(line):
            done += file.write(line[done:])
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(start)
        raise


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let ``write`` fill a temporary file next to ``path``, then rename it: readers see the old or the new file."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        os.chmod(temporary, 0o644)  # only the owner may read a file of mkstemp
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class Progress:
    """A live progress bar with chosen metrics and the time left. Use it as a context manager.

    If ``file`` is not a terminal (a log file, a test), it prints a plain line every ``every`` steps instead.

    Args:
      total: steps of the whole run.
      initial: steps that were done before the run was resumed.
      metrics: label → name of a metric, or several names; the first one that a step has is shown.
      every: steps between plain lines.
      file: where it is shown; None = standard error.
    """

    METRICS: Mapping[str, str | tuple[str, ...]] = {
        "reward": "reward/mean",
        "acc": "preference/accuracy",
        "margin": "preference/margin",
        "kl": ("kl/ref_k3", "kl/old_k3"),
        "entropy": "entropy",
        "tok/s": "time/tokens_per_s",
    }

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        metrics: Mapping[str, str | tuple[str, ...]] = METRICS,
        every: int = 10,
        file: IO[str] | None = None,
    ):
        self.total, self.initial, self.step, self.every = total, initial, initial, every
        self._file = file or sys.stderr
        self._names = {label: (names,) if isinstance(names, str) else names for label, names in metrics.items()}
        self._shown: dict[str, float] = {}
        self._start = time.monotonic()
        self._bar = (
            tqdm(
                total=total,
                initial=initial,
                file=self._file,
                dynamic_ncols=True,
                unit="step",
                bar_format="{n_fmt}/{total_fmt} {bar:20} {elapsed}<{remaining}{postfix}",
            )
            if self._file.isatty()
            else None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def update(self, metrics: Mapping[str, float], steps: int = 1) -> None:
        """Advance by ``steps`` and show the chosen ``metrics``; a metric that is missing keeps its last value."""
        before, self.step = self.step, self.step + steps
        for label, names in self._names.items():
            if present := [name for name in names if name in metrics]:
                self._shown[label] = float(metrics[present[0]])
        text = "  ".join(f"{label} {_short(value)}" for label, value in self._shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(steps)
        elif self.step // self.every > before // self.every or self.step >= self.total:
            elapsed = time.monotonic() - self._start
            left = elapsed / (self.step - self.initial) * (self.total - self.step)
            times = f"{tqdm.format_interval(elapsed)}<{tqdm.format_interval(left)}"
            print(f"step {self.step}/{self.total}  {times}  {text}".rstrip(), file=self._file, flush=True)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._file)
        else:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Stop updating the bar; it stays on the screen."""
        if self._bar is not None:
            self._bar.close()


def closing_table(
    title: str, rows: Sequence[Sequence[str]], *, columns: Sequence[str] = (), file: IO[str] | None = None
) -> None:
    """Print a table with the results of the run (accuracy before and after, pass@k, where the time went).

    Args:
      title: printed above the table.
      rows: cells of each row, the same number in every row; the first cell is the name of the row.
      columns: headings, as many as a row has cells; none by default.
      file: where it is printed; None = standard output.

    Raises:
      ValueError: rows and headings have different lengths.
    """
    width = len(columns) or len(rows[0])
    if wrong := [row for row in rows if len(row) != width]:
        raise ValueError(f"rows: {tuple(wrong[0])} has {len(wrong[0])} cells where {width} are expected")
    table = Table(title=_plain_text(title), title_justify="left", title_style="bold", show_header=bool(columns))
    for index in range(width):
        heading = _plain_text(columns[index] if columns else "")
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_plain_text, row))
    Console(file=file).print(table)


def _plain_text(text: str) -> Text:
    """Text that is shown as it is: without markup, which a name may hold, and without control sequences."""
    return Text(printable(text))


# ---- lines and values


def _number(name: str, value: Any) -> float:
    if isinstance(value, str) or not hasattr(value, "__float__") or np.ndim(value):
        raise TypeError(f"metric {name!r}: expected one number, not {type(value).__name__} of shape {np.shape(value)}")
    return float(value)


def _plain(value: Any) -> Any:
    """Convert values that JSON does not know: arrays, NumPy scalars and paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is not JSON-able")


def _json_line(fields: Mapping[str, Any]) -> str:
    """One line of strict JSON. Fields that are NaN or infinite become null and are listed under "nonfinite"."""
    fields = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in fields.items()}
    lost = [name for name, value in fields.items() if isinstance(value, float) and not math.isfinite(value)]
    fields |= dict.fromkeys(lost) | ({"nonfinite": lost} if lost else {})
    return json.dumps(fields, allow_nan=False, default=_plain, ensure_ascii=False) + "\n"


def _lines(path: Path, *, lenient: bool) -> Iterator[dict]:
    """The objects of a JSON-lines file that have a step. Other lines are an error, or told once where ``lenient``. The
    last line may be incomplete (after a kill, or while it is written)."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    foreign = []
    for number, line in enumerate(lines, 1):
        if (found := _object(line)) is not None:
            yield found
        elif line.strip() and number < len(lines):
            foreign.append(number)
            if not lenient:
                raise ValueError(f"{path}, line {number}: not JSON with a whole number as its step")
    if foreign:
        say_once(f"WARNING: {path}: line {foreign[0]} is not the line of a step; such lines are left out")


def _object(line: bytes) -> dict | None:
    """The object of a line; None if it is not one that has a whole number as its step."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and type(found.get("step")) is int else None


def _cut_lines(path: Path, step: int) -> None:
    """Remove the lines of later steps, and a last one that is incomplete. Foreign lines stay as they are."""
    if path.exists():
        whole = path.read_bytes().split(b"\n")[:-1]
        kept = [line for line in whole if (found := _object(line)) is None or found["step"] <= step]
        with _named(path):
            write_atomically(path, lambda file: file.write(b"".join(line + b"\n" for line in kept)))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _check_workdir(path: Path, resume_step: int | None) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"workdir: {path} is a file")
    if path.is_dir():
        lock.check_free(path)
    used = path.is_dir() and any(not found.name.startswith(lock.NAME) for found in path.iterdir())
    if used and resume_step is None:
        raise FileExistsError(f"workdir: {path} is not empty; continue its run with --resume or choose another one")
    if resume_step is not None and not used:
        raise FileNotFoundError(f"workdir: no run to resume in {path}")


def _import(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{extra}: {module} is not installed; pip install 'jaxpo[{extra}]'") from error


def _start_wandb(module: ModuleType, run: RunDirectory, options: Mapping[str, Any]) -> Any:
    kept = run.path / "wandb.json"  # holds the id, so that a resumed run continues there
    known = read_json(kept) if kept.exists() else {}
    try:
        started = module.init(dir=str(run.path), resume="allow", **{**known, **options})
    except Exception as error:  # of its network, account or settings: dozens of kinds
        raise OSError(
            f"wandb did not start: {one_line(error)}; log in, set WANDB_MODE=offline, or unset "
            "config.logging.wandb_project"
        ) from error
    run.save_json(kept.name, {"id": started.id})
    return started
