"""Shapes and options that nobody thought of, drawn by hypothesis: every implementation against the naive form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels import test_policy_surrogate as surrogate
from tests.kernels.test_token_logprob_tpu import ALL, assert_close, exact, problem, run
from tests.oracles.cases import COMPILE_FAST

# The same examples in every run: what fails here fails for everybody.
drawn = partial(settings, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
PALLAS = {"pallas_tpu": 128, "pallas_gpu": 32}  # least block of the vocabulary


def run_interpreted(impl, arrays, options, **statics):
    given = {"interpret": True} if impl == "pallas_gpu" else {}  # `run` says it for TPUs
    step = partial(run.__wrapped__, impl=impl, **statics, **given)
    return jax.jit(step, compiler_options=COMPILE_FAST)(arrays, options)


@pytest.mark.parametrize("impl", ["xla", *PALLAS])
def test_token_logprob(impl):
    @drawn(max_examples=6)
    @given(
        n=st.integers(1, 70),
        d=st.integers(1, 40),
        v=st.integers(1, 400),
        options=st.fixed_dictionaries(
            dict(bias=st.booleans(), masked=st.sampled_from([0.0, 0.6]), d_q=st.sampled_from([0, 3]))
        ),
        softcap=st.sampled_from([None, 2.5]),
        blocks=st.none() | st.tuples(st.sampled_from([16, 32]), st.sampled_from([1, 2])),
        want=st.sets(st.sampled_from(ALL), min_size=1),
        seed=st.integers(0, 2**16),
    )
    def check(n, d, v, options, softcap, blocks, want, seed):
        arrays, options = problem(n, d, v, **options, seed=seed)
        if blocks is not None:
            blocks = blocks[0], blocks[1] * PALLAS.get(impl, 50)
        want = tuple(sorted(want)) + ("kl_to",) * ("kl_to" in options)
        statics = dict(want=want, softcap=softcap, block_sizes=blocks)
        assert_close(run_interpreted(impl, arrays, options, **statics), exact(arrays, options, **statics), 5e-5)

    check()


@pytest.mark.parametrize("impl", ["pallas_tpu", "pallas_gpu"])
def test_policy_surrogate(impl):
    @drawn(max_examples=5)
    @given(
        shape=st.tuples(st.integers(1, 140), st.integers(1, 600)),
        options=st.sampled_from([dict(), dict(dual=1.5), dict(kl="k1"), dict(form="detached", kl="k3")]),
        bounds=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def check(shape, options, bounds, seed):
        x, rng = surrogate.tokens(*shape, seed=seed), np.random.default_rng(seed)
        low, high = (jnp.float32(at + 0.1 * rng.random(shape)) if bounds else at for at in (0.8, 1.2))
        interpreted = {**surrogate.IMPLS, "pallas_gpu": {"interpret": True}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(surrogate, "IMPLS", interpreted)
            got = surrogate.run(x, low, high, impl=impl, **options)
        want = surrogate.run(x, low, high, **options)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

    check()
