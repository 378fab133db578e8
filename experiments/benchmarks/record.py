"""The job that every system of the step benchmark does, and the record that its process prints of it.

One step of GRPO on a random policy: sample, score under the reference, one optimizer update over all rows at once.
Each system builds the same decoder (heads of 64, as many key as query heads, SwiGLU, tied embeddings, float32), gets
the same prompts, and generates exactly `new_tokens` tokens a row: its end-of-sequence id lies outside the vocabulary.

Only the standard library is imported here, so that the memory after a system's imports is its own.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

PHASES = ("generate", "reference", "update", "rest", "step")
HEAD_DIM = 64
PAD = 0
BETA = 0.04  # coefficient of the KL to the reference
LEARNING_RATE = 1e-5


@dataclasses.dataclass(frozen=True)
class Job:
    """Shape of the policy and of the batch; `steps` are timed, after `warmup` steps that are not."""

    vocab: int = 512
    prompts: int = 8
    generations: int = 8
    prompt_len: int = 32
    new_tokens: int = 64
    hidden: int = 256
    layers: int = 4
    steps: int = 3
    warmup: int = 1

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.vocab < 4:
            raise ValueError(f"vocab must be at least 4 (padding and a few words), got {self.vocab}")
        if self.generations < 2:
            raise ValueError("generations must be at least 2: GRPO compares the responses to one prompt")
        if self.hidden % HEAD_DIM:
            nearest = max(HEAD_DIM, round(self.hidden / HEAD_DIM) * HEAD_DIM)
            raise ValueError(f"hidden must be a multiple of the head size {HEAD_DIM}, got {self.hidden}; try {nearest}")

    @property
    def heads(self) -> int:
        """Query heads, and as many key-value heads."""
        return self.hidden // HEAD_DIM

    @property
    def mlp(self) -> int:
        """Inner width of SwiGLU: 8/3 of the hidden width, rounded up to a multiple of 16."""
        return -(-8 * self.hidden // (3 * 16)) * 16

    @property
    def rows(self) -> int:
        """Sequences a step."""
        return self.prompts * self.generations

    @property
    def eos(self) -> int:
        """An id that is never sampled, so that no row ends early."""
        return self.vocab

    def prompt_ids(self) -> list[list[list[int]]]:
        """The prompts of every step, warm-up included: [steps][prompts][prompt_len] ids, never the padding."""
        draw = random.Random(0)
        return [
            [[draw.randrange(1, self.vocab) for _ in range(self.prompt_len)] for _ in range(self.prompts)]
            for _ in range(self.warmup + self.steps)
        ]


def add_flags(parser: argparse.ArgumentParser, *, leave_out: Sequence[str] = ()) -> None:
    """Adds a flag of each field of `Job`, but those of `leave_out`."""
    for field in dataclasses.fields(Job):
        if field.name not in leave_out:
            parser.add_argument(f"--{field.name}", type=int, default=field.default, metavar="N")


def job_from_flags(description: str | None = None) -> Job:
    """The job that the command line of a system's process asks for."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add_flags(parser)
    try:
        return Job(**vars(parser.parse_args()))
    except ValueError as error:
        parser.error(str(error))


def reward(ids: Sequence[int]) -> float:
    """The share of even ids: varies between responses and costs nothing."""
    return sum(i % 2 == 0 for i in ids) / max(len(ids), 1)


def resident_mib() -> float:
    """Resident memory of this process in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Recorder:
    """Seconds and peak memory of each phase. Made right after a system's imports, before anything is built.

    A step runs from the end of the one before to `end_step`; what lies in no phase is its `rest`. CPU seconds are
    those of all threads of the process. Memory is what was resident beyond the imports while the phase ran, in the
    warm-up steps too, so compilation counts; freed memory that the allocator keeps counts in whichever phase runs.
    """

    def __init__(self, every: float = 0.005):
        self.imports_mib = resident_mib()
        self.loadavg = [os.getloadavg()[0]]
        self.gen_tokens = 0
        self.peak_mib = self.imports_mib
        self._phase_mib: dict[str, float] = {}
        self._steps: list[dict[str, dict[str, float]]] = []
        self._phases: dict[str, dict[str, float]] = {}
        self._open: tuple[str, tuple[float, float]] | None = None
        self._step_start = self._now()
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, args=(every,), daemon=True)
        self._sampler.start()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()

    @classmethod
    def _since(cls, start: tuple[float, float]) -> dict[str, float]:
        return {key: end - begin for key, begin, end in zip(("cpu_s", "wall_s"), start, cls._now(), strict=True)}

    def _sample(self, every: float) -> None:
        while not self._done.wait(every):
            mib, phase = resident_mib(), self._open[0] if self._open else "rest"
            self.peak_mib = max(self.peak_mib, mib)
            self._phase_mib[phase] = max(self._phase_mib.get(phase, 0.0), mib)

    def start(self, name: str) -> None:
        """Opens the phase `name`; phases do not nest."""
        if self._open:
            raise RuntimeError(f"phase {name!r} starts while {self._open[0]!r} is still open")
        self._open = (name, self._now())

    def stop(self) -> None:
        """Closes the open phase; a phase that runs twice in a step adds up."""
        name, start = self._open
        spent, before = self._since(start), self._phases.get(name, {})
        self._phases[name] = {key: value + before.get(key, 0.0) for key, value in spent.items()}
        self._open = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block as the phase `name`; the block must wait for its own results."""
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def end_step(self) -> None:
        """Closes a step, whose phases must be those of `PHASES`."""
        if set(self._phases) != {"generate", "reference", "update"}:
            raise RuntimeError(f"a step needs the phases generate, reference and update, got {sorted(self._phases)}")
        step = self._since(self._step_start)
        self._step_start = self._now()
        rest = {key: value - sum(spent[key] for spent in self._phases.values()) for key, value in step.items()}
        self._steps.append({**self._phases, "rest": rest, "step": step})
        self._phases = {}

    def print(self, system: str, job: Job, libraries: Sequence[str], params: int) -> None:
        """Prints the record as one line of JSON, the last of the process.

        `libraries` are the names of the distributions whose versions matter, `params` the parameters of the policy,
        `self.gen_tokens` the tokens generated in all steps so far.
        """
        self._done.set()
        self._sampler.join()
        if len(self._steps) != job.warmup + job.steps:
            raise RuntimeError(f"{system} did {len(self._steps)} steps instead of {job.warmup + job.steps}")
        timed = self._steps[job.warmup :]
        phases: dict[str, dict[str, float]] = {
            name: {key: statistics.median(step[name][key] for step in timed) for key in ("cpu_s", "wall_s")}
            for name in PHASES
        }
        for name in PHASES:
            mib = self.peak_mib if name == "step" else self._phase_mib.get(name, self.imports_mib)
            phases[name]["peak_mib"] = mib - self.imports_mib
        record: dict[str, Any] = {
            "system": system,
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in libraries},
            },
            "job": dataclasses.asdict(job),
            "params": params,
            "gen_tokens": self.gen_tokens / len(self._steps),
            "phases": phases,
            "step_cpu_s": [step["step"]["cpu_s"] for step in self._steps],
            "step_wall_s": [step["step"]["wall_s"] for step in self._steps],
            "memory_mib": {"imports": self.imports_mib, "peak": self.peak_mib},
            "threads": len(os.sched_getaffinity(0)),
            "loadavg": [*self.loadavg, os.getloadavg()[0]],
        }
        print(json.dumps(_rounded(record)), flush=True)


def _rounded(tree: Any) -> Any:
    """Numbers to 4 decimals: seconds to 0.1 ms."""
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_rounded(value) for value in tree]
    return round(tree, 4) if isinstance(tree, float) else tree
