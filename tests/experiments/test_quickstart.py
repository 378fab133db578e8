"""The quickstart's promise, run in full: the command that prints the before/after pairs of three seeds."""

import pytest

from experiments.benchmarks import quickstart


@pytest.mark.slow
def test_the_quickstart_gains_25_points_for_each_of_three_seeds(tmp_path, capsys):
    rows = quickstart.main(["--seeds=3", f"--keep={tmp_path}"])
    with capsys.disabled():
        print()
        for row in rows:
            print(f"seed {row['seed']}: greedy {row['before']:.3f} -> {row['after']:.3f} in {row['seconds']:.0f} s")
    assert len(rows) == 3
    for row in rows:
        assert row["unseen_share"] == 1
        assert row["after"] - row["before"] >= 0.25
