"""Curves: any mixture of runs and missing metrics gives a picture, and matplotlib's global state is left alone."""

import subprocess
import sys
import threading

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from jaxpo.storage.plots import DEFAULT, Panel, plot_curves, smooth


def make_run(n: int = 120, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    run = {key: np.exp(rng.normal(size=n)) for panel in DEFAULT for key in panel.keys}
    accuracy = np.where(np.arange(n) % 10 == 0, 0.5, np.nan)
    return run | {
        "step": np.arange(n),
        "eval/greedy": accuracy,
        "eval/greedy_lo": accuracy - 0.1,
        "eval/greedy_hi": accuracy + 0.1,
    }


def test_several_runs(tmp_path):
    runs = {"a": make_run(), "b": make_run(70, seed=1), "nothing yet": {"step": np.arange(0)}}
    plot_curves(runs, tmp_path / "curves.png")
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[0] > 700 and picture.shape[1] > 1000 and picture.std() > 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]  # no temporary file is left


def test_only_panels_with_data_are_drawn(tmp_path):
    run = {"step": np.arange(3), "reward/mean": np.array([0.0, np.nan, 1.0]), "entropy": np.full(3, np.nan)}
    plot_curves({"a": run}, tmp_path / "one.png")
    plot_curves({"a": {"step": np.arange(0)}}, tmp_path / "none.png")
    plot_curves({"a": run}, tmp_path / "own.png", keys=["reward/mean", Panel("same", ("missing", "reward/mean"))])
    one, none, own = (imread(tmp_path / f"{name}.png") for name in ("one", "none", "own"))
    assert one.shape == none.shape and own.shape[1] == 2 * one.shape[1]
    assert (one != none).any()


@pytest.mark.parametrize("values", [np.zeros(200), np.full(200, 1e-9), np.array([0.0, 1e9] * 100), -np.ones(200)])
def test_awkward_values(tmp_path, values):
    run = {"step": np.arange(200), "grad_norm": values, "time/step": values, "reward/mean": values}
    plot_curves({"a": run}, tmp_path / "curves.png")


def test_global_state_is_left_alone_in_any_thread(tmp_path, recwarn):
    before = dict(matplotlib.rcParams)
    thread = threading.Thread(target=plot_curves, args=({"a": make_run(20)}, tmp_path / "curves.png"))
    thread.start()
    thread.join()
    assert (tmp_path / "curves.png").exists() and dict(matplotlib.rcParams) == before and not recwarn.list


def test_pyplot_is_not_imported():
    check = "import sys, jaxpo.storage.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_curves({}, tmp_path / "curves.png")
    with pytest.raises(ValueError, match="'a' has no column 'step'"):
        plot_curves({"a": {"loss": np.zeros(3)}}, tmp_path / "curves.png")


def test_smooth_keeps_constants_and_means():
    np.testing.assert_allclose(smooth(np.full(50, 3.0), 4.0), 3.0)
    noisy = np.random.default_rng(0).normal(size=500)
    assert smooth(noisy, 8.0).std() < 0.35 * noisy.std() and smooth(noisy, 8.0).shape == (500,)
