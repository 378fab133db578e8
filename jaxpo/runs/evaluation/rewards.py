"""How good a reward or preference model is: accuracy and calibration on held-out pairs.

A calibrated model is right as often as it is sure: among pairs where it gives one answer a probability of winning of
about 0.8, that answer should win about 80 %. ``reliability.json`` and ``reliability.png`` in the run directory show
this bin by bin.
"""

from typing import Any

import numpy as np

from jaxpo.fields import PAIR
from jaxpo.parallel.distributed import to_host
from jaxpo.policy.transformer import Params
from jaxpo.primitives import preference_diagnostics as diagnostics
from jaxpo.protocols.rows import as_scored
from jaxpo.runs.evaluation.answers import wilson
from jaxpo.runs.evaluation.pairs import chunks
from jaxpo.runs.judges.judge import verdict_of_stats
from jaxpo.runs.workspace import Workspace

BINS = 10


def stated(workspace: Workspace, params: Params) -> tuple[np.ndarray, np.ndarray]:
    """The model's probabilities on held-out data, and the known outcomes: two arrays [N].

    For pairs: the probability that the chosen answer beats the rejected one, and pref_prob if the data give it,
    otherwise 1. For labelled answers: the probability of a good label, and the label.
    """
    form, said = workspace.preferences.form, []
    w, l = (form.layout.index(role) for role in PAIR) if form.layout else (0, 0)  # noqa: E741
    for real, batch in chunks(workspace):
        stats = to_host(workspace.programs.score_heads(params, as_scored(batch)))
        if form.layout:
            p = verdict_of_stats(workspace, stats, (batch.rows // form.size, form.size)).wins[:, w, l]
        else:
            p = 1 / (1 + np.exp(-np.asarray(stats.score, np.float64)))
        said.append(p[: len(real)])
    known, default = ("pref_prob", 1.0) if form.layout else ("label", None)
    outcome = [entry[w].numbers.get(known, default) for entry in workspace.preferences.test]
    return np.concatenate(said), np.asarray(outcome, np.float64)


def calibration(p: np.ndarray, outcome: np.ndarray) -> tuple[dict[str, float], dict[str, Any]]:
    """Compute metrics of calibration, and the bins of the reliability plot.

    eval/accuracy: share of pairs ordered as labelled, with its Wilson interval (``_lo``, ``_hi``).
    eval/confidence: mean ``max(p, 1 - p)``.
    eval/ece: expected calibration error over 10 bins from 1/2 to 1.
    eval/brier: mean ``(p - outcome)^2``.
    """
    confidence, right = diagnostics.confident(p, outcome)
    accuracy = float(np.mean(right))
    low, high = wilson(accuracy * len(p), len(p))
    bins = zip(("confidence", "accuracy", "share"), diagnostics.reliability(confidence, right, BINS), strict=True)
    metrics = {
        "eval/accuracy": accuracy,
        "eval/accuracy_lo": low,
        "eval/accuracy_hi": high,
        "eval/confidence": float(np.mean(confidence)),
        "eval/ece": float(diagnostics.expected_calibration_error(confidence, right, BINS)),
        "eval/brier": float(np.mean((p - outcome) ** 2)),
    }
    return metrics, {"pairs": len(p), **{name: np.asarray(x).tolist() for name, x in bins}}
