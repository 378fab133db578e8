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
    assert json.loads(file.read_text()) == record and set(record["forms"]) == set(benchmark.forms(Blocks(1, 1), 1))
    assert all(0 < r["wall_s"] < 100 and r["all_mib"] > r["temp_mib"] > 0 for r in record["forms"].values())
    assert "three products" in capsys.readouterr().out


def test_the_forms_do_the_same_work():
    args = benchmark.arrays(16, 4, 128)
    forms = benchmark.forms(Blocks(16, 128), 4)
    results = [jax.jit(forms[name], compiler_options=COMPILE_FAST)(*args) for name in list(forms)[:4]]
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


@pytest.mark.parametrize("blocks", [Blocks(16, 32), Blocks(4, 128)], ids=["of the vocabulary", "of tokens"])
def test_the_products_are_those_of_the_whole(blocks):
    hidden, table, targets, g = benchmark.arrays(16, 4, 128)
    one, other = jax.jit(benchmark.products, static_argnums=0)(blocks, hidden, table, targets, g)
    dhidden, dtable = (one, other) if blocks.tokens == 16 else (other, one)
    z = hidden @ table.T
    np.testing.assert_allclose(dhidden.reshape(16, 4), z @ table, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dtable.reshape(128, 4), z.T @ hidden, rtol=1e-4, atol=1e-5)
    jax.eval_shape(lambda: benchmark.softmax_passes(blocks, hidden, table, targets, g))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vs=tlr"], "unknown --vs 'tlr': did you mean 'trl'"),
        (["--dtype=float16"], "unknown --dtype 'float16'"),
        (["--tokens=24"], "--tokens=24 is not a multiple of the 16 rows"),
        (
            ["--tokens=16", "--width=4", "--vocab=128", "--repeats=1", "--vs=trl", "--python=/nowhere"],
            "cannot run /nowhere",
        ),
    ],
    ids=str,
)
def test_flags_that_cannot_be_meant(flags, message):
    with pytest.raises(SystemExit, match=message):
        benchmark.main(flags)
