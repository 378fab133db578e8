"""The configs of SmolLM2 on the 98 MB model: `make slow` after `make smollm2`."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxpo.storage.rundir import read_metrics
from tests.policy.models import path_or_skip
from tests.policy.test_hf import MEASURE

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path():
    return path_or_skip()


def in_a_process(*arguments: str) -> str:
    """What ``python ARGUMENTS`` prints, on one device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    run = [sys.executable, *arguments]
    return subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell the peak")
def test_memory_of_loading(path, dtype):
    """At most 1.3 times the model in the dtype it is loaded in, and one tensor."""
    size, peak, largest = map(int, in_a_process("-c", MEASURE, str(path), dtype).split())
    print(f"{dtype}: model {size:,} bytes, peak {peak / size:.2f} of it, one tensor {largest:,}")
    assert 0.9 * size < peak <= 1.3 * size + largest, (peak / size, size, largest)


def test_reward_of_held_out_questions_rises(tmp_path):
    """By at least 0.15: the mean reward of sampled answers, over questions that were never trained on."""
    path_or_skip()
    in_a_process("-m", "experiments.train_rl", "--config=configs/grpo_smollm2.py", f"--workdir={tmp_path / 'run'}")
    metrics = read_metrics(tmp_path / "run")
    held_out = metrics["eval/pass@1"][np.isfinite(metrics["eval/pass@1"])]
    reward = metrics["reward/mean"][np.isfinite(metrics["reward/mean"])]
    print(f"held out {held_out[0]:.3f} -> {held_out[-1]:.3f}")
    print(f"trained on, five iterations each: {reward[:5].mean():.3f} -> {reward[-5:].mean():.3f}")
    assert 0.2 <= held_out[0] <= 0.6
    assert held_out[-1] >= held_out[0] + 0.15


def test_pairs_it_has_not_seen_are_ordered_right(tmp_path):
    """configs/dpo_smollm2.py, ten iterations: from none to over seven of ten by the implicit reward."""
    path_or_skip()
    flags = ["--config=configs/dpo_smollm2.py", "--config.steps=10", f"--workdir={tmp_path / 'run'}"]
    in_a_process("-m", "experiments.train_preference", *flags)
    metrics = read_metrics(tmp_path / "run")
    right, ranked = (metrics[f"eval/{name}"] for name in ("accuracy", "ranking_accuracy"))
    right, ranked = right[np.isfinite(right)], ranked[np.isfinite(ranked)]
    print(f"ordered right {right[-1]:.3f}, by likelihood {ranked[0]:.3f} -> {ranked[-1]:.3f}")
    assert right[0] == 0 and right[-1] > 0.7 and ranked[-1] > ranked[0]
