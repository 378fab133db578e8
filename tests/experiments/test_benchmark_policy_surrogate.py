"""The benchmark of the one-pass surrogate: both of its forms do the same work."""

import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import policy_surrogate as benchmark


def test_both_forms_do_the_same_work():
    x = benchmark.arrays(6, 40)
    one, other = (jax.jit(jax.value_and_grad(f, has_aux=True))(x["logp"], x) for f in benchmark.FORMS.values())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "figures.json"
    record = benchmark.main(["--rows=4", "--width=8", "--repeats=1", f"--json={file}"])
    assert json.loads(file.read_text()) == record and record["share"] > 0
    assert "composed primitives" in capsys.readouterr().out


def test_an_unknown_flag():
    with pytest.raises(SystemExit, match="did you mean '--rows'"):
        benchmark.main(["--row=4"])
