"""pass@k against enumeration, intervals against published numbers, and evaluation in chunks that do not divide."""

import itertools
import math
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxpo.batch import Rollouts
from jaxpo.parallel import make_mesh
from jaxpo.protocols.gatherer import Prompts
from jaxpo.rollout import SamplingOptions
from jaxpo.runs.evaluation import answers
from jaxpo.runs.questions import Questions
from jaxpo.tasks import Example, Score


@pytest.mark.parametrize("n", (1, 4, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert answers.pass_at_k(n, correct, k) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow():
    exact = 1 - math.comb(9_000, 5_000) / math.comb(10_000, 5_000)
    assert answers.pass_at_k(10_000, 1_000, 5_000) == pytest.approx(exact)
    assert answers.pass_at_k(10_000, 1, 1) == pytest.approx(1e-4)


@pytest.mark.parametrize("k", (0, 5))
def test_pass_at_k_needs_that_many_samples(k):
    with pytest.raises(ValueError, match=f"pass@{k} needs 1 <= k <= n samples, and there are 4"):
        answers.pass_at_k(4, 1, k)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    (  # Newcombe 1998, Statistics in Medicine 17, table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ),
)
def test_wilson_interval(successes, n, low, high):
    assert answers.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert answers.wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_mean_interval():
    mean, low, high = answers.mean_interval([0.2, 0.4, 0.6, 0.8])
    half = 1.959964 * math.sqrt(0.2 / 3) / 2  # ddof 1, over the root of 4
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-6)
    assert answers.mean_interval([0.0, 1.0])[1:] == (0.0, 1.0)  # stays inside [0, 1]


def test_an_interval_of_equal_values_is_not_certainty():
    """Three prompts that all fail do not prove that every prompt fails."""
    for value, others in ((0.0, 2), (1.0, 1)):
        interval = answers.mean_interval([value] * 3)
        assert abs(interval[others] - value) > 0.1


# ---- on a policy that numbers its answers ----------------------------------------------------------------------------


class Numbered(Questions):
    """Completions read as "prompt response"."""

    def texts(self, rollouts):
        return [f"{i} {j}" for i, j in np.asarray(rollouts.tokens)]


@pytest.fixture
def workspace():
    """13 prompts "0".."12" of one token; response j of prompt i is the token j, and right when j < i % 5.
    ``calls``: what was asked of the sampler and of the verifier."""
    calls, mesh = (
        types.SimpleNamespace(options=[], rows=[], scored=[]),
        make_mesh({"data": 4, "fsdp": 1, "tensor": 1}, jax.devices()[:4]),
    )

    def generate(params, tokens, length, key, options, responses):
        calls.options.append(options)
        calls.rows.append(len(tokens))
        prompts, response = np.repeat(tokens, responses, 0), np.tile(np.arange(responses), len(tokens))
        return Rollouts(tokens=np.concatenate([prompts, response[:, None]], 1), mask=np.ones(prompts.shape))

    def score(examples, texts):
        calls.scored += zip([e.index for e in examples], texts, strict=True)
        pairs = [tuple(map(int, text.split())) for text in texts]
        assert [i for i, _ in pairs] == [e.index for e in examples]
        right = [j < i % 5 for i, j in pairs]
        return [Score(float(r), r, None if i else "broken verifier") for r, (i, _) in zip(right, pairs, strict=True)]

    config = ConfigDict(dict(rollout=dict(prompts=4, responses=2, mesh={})))
    task = types.SimpleNamespace(score=score)
    return types.SimpleNamespace(
        programs=types.SimpleNamespace(generate=generate, sampler_params=lambda params: params),
        config=config,
        mesh=mesh,
        put=lambda x: x,
        questions=Numbered(task, None, None, None, 1),
        task=task,
        sampling=SamplingOptions(1, temperature=0.7, top_k=3, top_p=0.9, min_p=0.1),
        calls=calls,
    )


@pytest.fixture
def prompts():
    return Prompts(
        [Example(i, str(i), str(i), {}) for i in range(13)],
        np.arange(13, dtype=np.int32)[:, None],
        np.ones(13, np.int32),
    )


def test_greedy_sees_every_prompt_once_in_chunks_of_one_shape(workspace, prompts):
    metrics, samples = answers.greedy(workspace, None, prompts)
    assert workspace.calls.rows == [8, 8]  # prompts * responses, 3 of the last 8 are filler
    assert workspace.calls.scored == [(i, f"{i} 0") for i in range(13)]
    right = sum(i % 5 > 0 for i in range(13))
    assert metrics["eval/greedy"] == metrics["eval/reward"] == right / 13 and metrics["eval/errors"] == 1
    assert (metrics["eval/greedy_lo"], metrics["eval/greedy_hi"]) == answers.wilson(right, 13)
    assert (
        samples[7] == {"question": "7", "answer": "7", "completion": "7 0", "reward": 1.0, "correct": True}
        and len(samples) == 13
    )


def test_greedy_is_greedy_whatever_the_run_samples_with(workspace, prompts):
    answers.greedy(workspace, None, prompts)
    for options in workspace.calls.options:
        assert (options.greedy, options.temperature, options.top_k, options.top_p, options.min_p) == (
            True,
            1.0,
            None,
            None,
            None,
        )


def test_few_prompts_are_filled_up_to_the_mesh(workspace, prompts):
    few = Prompts(prompts.examples[:2], prompts.tokens[:2], prompts.length[:2])
    assert answers.greedy(workspace, None, few)[0]["eval/greedy"] == 0.5
    assert workspace.calls.rows == [4]  # the rows of 4 devices


@pytest.mark.parametrize("samples", (1, 2, 4))
def test_pass_at_k_of_sampled_completions(workspace, prompts, samples):
    metrics = answers.sampled(workspace, None, prompts, jax.random.key(0), samples=samples, ks=range(1, samples + 1))
    assert set(workspace.calls.rows) == {4} and all(
        options is workspace.sampling for options in workspace.calls.options
    )
    for k in range(1, samples + 1):  # 2 responses a call: each half of 4 is right as often
        right = [min(i % 5, 2, samples) * max(1, samples // 2) for i in range(13)]
        values = [answers.pass_at_k(samples, c, k) for c in right]
        assert metrics[f"eval/pass@{k}"] == pytest.approx(np.mean(values))
        assert metrics[f"eval/pass@{k}_lo"] <= metrics[f"eval/pass@{k}"] <= metrics[f"eval/pass@{k}_hi"]


def test_samples_that_responses_do_not_divide(workspace, prompts):
    metrics = answers.sampled(workspace, None, prompts, jax.random.key(0), samples=3, ks=(1,))
    right = [min(i % 5, 2) + min(i % 5, 1) for i in range(13)]  # two, then the first of two
    assert metrics["eval/pass@1"] == pytest.approx(np.mean(right) / 3)


def test_rounds_and_chunks_draw_from_different_keys(workspace, prompts):
    keys, generate = [], workspace.programs.generate
    workspace.programs.generate = lambda params, tokens, length, key, *args, **kwargs: (
        keys.append(tuple(jax.random.key_data(key).tolist())),
        generate(params, tokens, length, key, *args, **kwargs),
    )[1]
    answers.sampled(workspace, None, prompts, jax.random.key(0), samples=4, ks=(1,))
    assert len(keys) == 2 * 4 == len(set(keys))
