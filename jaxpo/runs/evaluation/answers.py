"""Accuracy with error bars: greedy decoding and unbiased pass@k."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxpo.batch import Rollouts, take
from jaxpo.parallel.distributed import to_host
from jaxpo.policy.transformer import Params
from jaxpo.protocols.gatherer import Prompts
from jaxpo.rollout import SamplingOptions
from jaxpo.runs.workspace import Workspace, shard_count
from jaxpo.tasks.base import Score
from jaxpo.text.conversations import as_json

Z95 = 1.959963984540054


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Estimate, without bias, the chance that at least one of k samples is right (arXiv:2107.03374, eq. 1).

    ``1 - C(n - c, k) / C(n, k)`` from n samples, c of them correct.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n samples, and there are {n}")
    return 1.0 - math.prod((n - correct - i) / (n - i) for i in range(k))


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The 95% Wilson interval of the share ``successes / n``."""
    p, z2 = successes / n, Z95**2
    middle, half = (p + z2 / (2 * n)) / (1 + z2 / n), Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean over prompts and its 95% interval (normal; Wilson if all values are 0 or all are 1), inside [0, 1]."""
    x = np.asarray(values, np.float64)
    if len(x) and x.min() == x.max() and x[0] in (0, 1):
        return float(x[0]), *wilson(int(x.sum()), len(x))
    half = Z95 * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else 0.0
    return float(x.mean()), max(0.0, float(x.mean() - half)), min(1.0, float(x.mean() + half))


def complete(
    workspace: Workspace,
    params: Params,
    prompts: Prompts,
    options: SamplingOptions,
    key: Array,
    *,
    responses: int = 1,
    chunk: int | None = None,
) -> Iterator[tuple[np.ndarray, Rollouts]]:
    """Generate completions of all prompts, in chunks of one shape.

    Yields (indices of the chunk's prompts, their rollouts in NumPy).
    """
    params = workspace.programs.sampler_params(params)
    chunk = chunk or min(len(prompts), workspace.config.rollout.prompts * workspace.config.rollout.responses)
    chunk = -(-chunk // shard_count(workspace)) * shard_count(workspace)
    for i, start in enumerate(range(0, len(prompts), chunk)):
        real = np.arange(start, min(start + chunk, len(prompts)))
        rows = np.concatenate([real, np.zeros(chunk - len(real), np.int64)])  # the last chunk is filled up, then cut
        arrays = workspace.put((prompts.tokens[rows], prompts.length[rows]))
        out = workspace.programs.generate(params, *arrays, jax.random.fold_in(key, i), options, responses=responses)
        kept = np.arange(len(real) * responses)
        yield real, take(to_host(out), kept, shared_prompt=responses)


def greedy(workspace: Workspace, params: Params, prompts: Prompts) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure greedy accuracy; return metrics and every decoded sample.

    The metrics are ``eval/greedy`` with its Wilson interval (``_lo``, ``_hi``), ``eval/reward`` and ``eval/errors``,
    and ``eval/reward/<name>/mean`` of each reward. If
    nothing verifies answers, there are no metrics, and only the samples of the first chunk.
    """
    options = workspace.sampling.replace(greedy=True, temperature=1.0, top_k=None, top_p=None, min_p=None)
    samples, scores, verdicts = [], [], np.zeros((0, 3))
    for indices, rollouts in complete(workspace, params, prompts, options, jax.random.key(0)):
        examples, texts = [prompts.examples[i] for i in indices], workspace.questions.texts(rollouts)
        if workspace.task.score is None:
            pairs = zip(examples, texts, strict=True)
            return {}, [dict(question=as_json(e.question), answer=e.answer, completion=t) for e, t in pairs]
        judged = workspace.questions.judged(examples, rollouts)
        verdicts, scores = np.concatenate([verdicts, judged.table[:, :3]]), scores + judged.scores
        told = dict(zip(judged.own.tolist(), map(details, judged.scores), strict=True))
        samples += [
            dict(question=as_json(e.question), answer=e.answer, completion=t, reward=float(r), correct=bool(c))
            | told.get(i, {})
            for i, (e, t, (r, c, *_)) in enumerate(zip(examples, texts, judged.table, strict=True))
        ]
    rewards, correct, errors = verdicts.T
    right = int(correct.sum())
    low, high = wilson(right, len(correct))
    return {
        "eval/greedy": right / len(correct),
        "eval/greedy_lo": low,
        "eval/greedy_hi": high,
        "eval/reward": float(rewards.mean()),
        "eval/errors": float(errors.sum()),
        **part_means(scores),
    }, samples


def details(score: Score) -> dict[str, Any]:
    """What samples say beside the reward: its parts where there are several, and why there is no verdict."""
    parts = {name: part if isinstance(part, float) else None for name, part in score.parts.items()}
    return ({"rewards": parts} if len(parts) > 1 else {}) | ({"error": str(score.error)} if score.error else {})


def part_means(scores: Sequence[Score]) -> dict[str, float]:
    """``eval/reward/<name>/mean`` of each reward of the task, over this process's rows, where it said something."""
    names = dict.fromkeys(name for score in scores for name in score.parts)
    told = {n: [s.parts[n] for s in scores if isinstance(s.parts.get(n), float)] for n in names}
    return {f"eval/reward/{name}/mean": float(np.mean(values)) for name, values in told.items() if values}


def sampled(
    workspace: Workspace, params: Params, prompts: Prompts, key: Array, *, samples: int, ks: Sequence[int]
) -> dict[str, float]:
    """Measure ``eval/pass@k`` for each k, with its 95% interval over prompts.

    It uses ``samples`` completions of each prompt at the run's sampling settings.
    """
    responses = workspace.config.rollout.responses
    right = np.zeros(len(prompts), np.int64)
    drawn = 0
    for round_ in range(-(-samples // responses)):
        use = min(responses, samples - drawn)
        for indices, rollouts in complete(
            workspace,
            params,
            prompts,
            workspace.sampling,
            jax.random.fold_in(key, round_),
            responses=responses,
            chunk=workspace.config.rollout.prompts,
        ):
            examples = [prompts.examples[i] for i in np.repeat(indices, responses)]
            correct = workspace.questions.verdicts(examples, rollouts)[:, 1].astype(np.int64)
            right[indices] += correct.reshape(-1, responses)[:, :use].sum(1)
        drawn += use
    out = {}
    for k in ks:
        out[f"eval/pass@{k}"], out[f"eval/pass@{k}_lo"], out[f"eval/pass@{k}_hi"] = mean_interval(
            [pass_at_k(samples, c, k) for c in right.tolist()]
        )
    return out
