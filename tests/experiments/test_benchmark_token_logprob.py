"""The benchmark of the vocabulary projection: its forms do the same work, and its bars are the ones stated."""

import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import token_logprob as benchmark
from jaxpo.kernels.token_logprob.plan import Blocks
from tests.oracles.cases import COMPILE_FAST


def test_prints_forms_and_bars(tmp_path, capsys):
    file = tmp_path / "figures.json"
    record = benchmark.main(["--tokens=16", "--width=4", "--vocab=128", "--repeats=1", f"--json={file}"])
    assert json.loads(file.read_text()) == record and set(record["forms"]) == set(benchmark.forms(Blocks(1, 1)))
    assert all(0 < r["wall_s"] < 100 and r["all_mib"] > r["temp_mib"] > 0 for r in record["forms"].values())
    assert "three products" in capsys.readouterr().out


def test_the_forms_do_the_same_work():
    args = benchmark.arrays(16, 4, 128)
    forms = benchmark.forms(Blocks(16, 128))
    results = [jax.jit(forms[name], compiler_options=COMPILE_FAST)(*args) for name in list(forms)[:3]]
    for other in results[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), results[0], other)


def test_bars_by_hand():
    def seconds(x):
        return {"wall_s": x, "cpu_s": 2 * x, "temp_mib": 16.0}

    found = benchmark.bars(
        {"token_logprob": seconds(9.0), "naive": seconds(18.0), "naive, checkpointed": seconds(36.0)}
        | {"three products": seconds(6.0), "softmax passes": seconds(1.0)}
    )
    assert found["wall_s/needed"] == found["cpu_s/needed"] == pytest.approx(1.0)
    assert found["cpu_s/naive"] == 0.5 and found["wall_s/naive, checkpointed"] == 0.25 and found["temp_mib"] == 16


def test_a_vocabulary_that_the_block_does_not_divide():
    with pytest.raises(SystemExit, match="--vocab=40000 is not a multiple of the block, 512"):
        benchmark.main(["--tokens=4096", "--vocab=40000"])
