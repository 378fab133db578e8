"""Judges of answers: a verifier, the user's own function, or a trained reward or preference model.

A judge sees all answers to a prompt at once and gives a `Verdict`; ``config.judge`` names it. A judge is registered as
a function of its options that returns ``(workspace) -> opinion``; an opinion is ``(examples [G], answers [G][K]) ->
Verdict``.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from jaxpo.batch import Rollouts, TokenStats, from_sequences, pad
from jaxpo.config.resolved import made
from jaxpo.learning.needs import JUDGING, is_reward_model
from jaxpo.parallel.distributed import to_host
from jaxpo.policy.transformer import Params
from jaxpo.primitives import preference_data
from jaxpo.protocols.gatherer import Verdict
from jaxpo.registry import make, register
from jaxpo.runs.judges import follow_ups
from jaxpo.runs.questions import Answers, Opinion, as_told
from jaxpo.runs.restore import open_finished
from jaxpo.runs.workspace import Workspace, shard_count
from jaxpo.tasks import Example, Task
from jaxpo.tasks.base import Score
from jaxpo.tasks.preferences.encode import with_trace
from jaxpo.tasks.preferences.traces import tracer_of
from jaxpo.tasks.user_functions import check_places, locate
from jaxpo.tasks.workers import Failure, attempt, failure
from jaxpo.text.conversations import as_json, plain_answer, plain_text

STEP = 32  # widths of rows to judge are rounded up to multiples of this, so that few shapes are compiled
ON_MESH = ("model", "models", "follow_ups")  # judges that compute on the mesh


Judge = Callable[[Workspace], Opinion]


def make_judge(workspace: Workspace) -> Callable[..., Verdict]:
    """Make ``(examples, *columns) -> Verdict`` from the judge that the config names.

    ``columns`` are batches with answers to the same prompts in the same order; their answers are judged side by side.

    Raises:
      ValueError: the run has no verifier, or the name is not a judge.
    """
    block = workspace.config.judge
    opinion = made(block, "judge")(workspace)
    return partial(workspace.questions.compare, opinion, whole=block.name in ON_MESH)


@register("judge")
def verifier(scale: float | None = None) -> Judge:
    """Judge by the task's rewards as scores.

    Args:
      scale: ``P(i beats j) = sigmoid(scale (s_i - s_j))``; None = the higher score wins.
    """
    return lambda workspace: partial(by_verifier, workspace.task, scale)


@register("judge")
def function(path: str, scale: float | None = None) -> Judge:
    """Judge by a function of (questions [G], answers [G][K]) that gives scores [G, K] or win probabilities [G, K, K].

    If it raises, it is asked again about each prompt alone. Answers to a prompt on which it still fails count as
    equally good, and the metric ``judge/errors`` counts such prompts; a run stops if it fails on all.

    Args:
      path: ``"module:function"``.
      scale: as for `verifier`; for scores only.
    """
    field = "config.judge.path"
    asked = locate(path, field)
    check_places(asked, ("questions", "answers"), f"{field} {path!r}")
    return lambda workspace: partial(by_function, asked, scale)


@register("judge")
def model(path: str, scale: float | None = None) -> Judge:
    """Judge by a trained model: the scores of its score head, or the preferences of its embeddings.

    Args:
      path: a run directory of ``experiments.train_reward``.
      scale: as for `verifier`, but None = 1; for scores only.
    """
    return lambda workspace: by_model(path, scale, characters(workspace))


@register("judge")
def models(
    paths: tuple = (), weights: tuple | None = None, adapter: str | None = None, scale: float | None = None
) -> Judge:
    """Judge by a weighted sum of the scores of several reward models.

    Args:
      paths: run directories of the reward models.
      weights: one fixed weight for each model (RLUF). Give this or ``adapter``.
      adapter: run directory of a model that weighs them for each prompt (Preference Orchestrator).
      scale: as for `verifier`.
    """
    return lambda workspace: by_models(tuple(paths), weights, adapter, scale, characters(workspace))


@register("judge", id="follow_ups")
def by_follow_ups(path: str, file: str, between: str = "\n", scale: float | None = None) -> Judge:
    """Judge by how likely a language model finds the reply of a happy user (`jaxpo.runs.judges.follow_ups`).

    Args:
      path: run directory of the language model.
      file: the file of follow-ups.
      between: the text between an answer and a follow-up.
      scale: as for `verifier`.
    """

    def judge(workspace: Workspace) -> Opinion:
        scores = follow_ups.scorer(path, file, between)
        return lambda examples, answers: verdict_of_scores(scores(examples, answers), scale)

    return judge


def verdict_of_scores(scores: np.ndarray, scale: float | None) -> Verdict:
    """The verdict of scores: ``P(i beats j) = sigmoid(scale (s_i - s_j))``.

    Without a scale the higher score wins, and equal scores give 1/2.
    """
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("the judge's scores are not finite")
    if scale is None:
        return Verdict(scores, (1 + np.sign(scores[:, :, None] - scores[:, None, :])) / 2)
    gap = scale * (scores[:, :, None] - scores[:, None, :])
    return Verdict(scores, np.asarray(preference_data.win_matrix(scale * scores)), log_odds=gap)


def verdict_of_log_odds(log_odds: np.ndarray) -> Verdict:
    """The verdict of log-odds [G, K, K] that the first answer beats the second.

    An answer's score is its mean log-odds against all answers to its prompt, itself at 0 (GPO).
    """
    odds = np.asarray(log_odds, np.float64)
    if not np.isfinite(odds).all():
        raise ValueError("the judge's preference scores are not finite")
    return Verdict(odds.mean(-1), 1 / (1 + np.exp(-np.clip(odds, -700, 700))), log_odds=odds)


def verdict_of_wins(wins: np.ndarray) -> Verdict:
    """The verdict of win probabilities.

    An answer's score is its mean win probability against all answers to its prompt, itself included (SPPO).
    """
    wins = np.asarray(wins, np.float64)
    if not ((wins >= 0) & (wins <= 1)).all():
        raise ValueError("the judge's win probabilities must lie in [0, 1]")
    return Verdict(wins.mean(-1), wins)


def verified(task: Task, scale: float | None, examples: Sequence[Example], answers: Answers) -> Verdict:
    """Judge by the task's rewards."""
    return verdict_of_scores(np.array([[s.reward for s in row] for row in scores_of(task, examples, answers)]), scale)


def by_verifier(task: Task, scale: float | None, examples: Sequence[Example], answers: Answers) -> Verdict:
    """Judge by the task's rewards; prompts on all of whose answers they fail get a tie."""
    rows = scores_of(task, examples, answers)
    verdict = verdict_of_scores(np.array([[s.reward for s in row] for row in rows]), scale)
    errors = [next((s.error for s in row if s.error is not None), None) for row in rows]
    failed = np.array([all(s.error is not None for s in row) for row in rows])
    return verdict._replace(scores=np.where(failed[:, None], np.nan, verdict.scores), errors=errors)


def scores_of(task: Task, examples: Sequence[Example], answers: Answers) -> list[list[Score]]:
    """What the task's rewards say of K answers to each of G prompts: [G][K]."""
    if task.score is None:
        raise ValueError(
            "config.judge.name is 'verifier', but nothing verifies answers: set config.task.name or a judge"
        )
    flat, k = [text for row in answers for text in row], len(answers[0])
    scores = task.score([e for e, row in zip(examples, answers, strict=True) for _ in row], flat)
    return [scores[i : i + k] for i in range(0, len(scores), k)]


def by_function(asked: Callable, scale: float | None, examples: Sequence[Example], answers: Answers) -> Verdict:
    """Judge by the user's own function. Where it fails, it is asked about each prompt alone; prompts on which it still
    fails have NaN scores and a tie.

    Raises:
      ValueError: what it returns is never what a judge must return."""
    questions, k = [as_json(e.question) for e in examples], len(answers[0])
    whole = ask(asked, scale, questions, answers)
    if isinstance(whole, Verdict):
        return whole
    each = [ask(asked, scale, [q], [row]) for q, row in zip(questions, answers, strict=True)]
    errors = [None if isinstance(said, Verdict) else said for said in each]
    if all(error is not None and not error.traceback for error in errors):  # it did not raise
        raise ValueError(errors[0])
    tie = Verdict(np.full((1, k), np.nan), np.full((1, k, k), 0.5), log_odds=np.zeros((1, k, k)))
    each = [said if isinstance(said, Verdict) else tie for said in each]
    shown = errors if any(errors) else [whole, *errors[1:]]  # it failed once, and then did not
    odds = np.concatenate([v.preference for v in each])
    return Verdict(np.concatenate([v.scores for v in each]), np.concatenate([v.wins for v in each]), shown, odds)


def ask(asked: Callable, scale: float | None, questions: list, answers: Answers) -> Verdict | Failure:
    """The verdict of the user's own function, or why there is none."""
    said, error = attempt(asked, (questions, answers))
    if error is not None:
        return error
    shape = (len(answers), len(answers[0]))
    try:
        said = np.asarray(said, np.float64)
        if said.shape == shape:
            return verdict_of_scores(said, scale)
        if said.shape == (*shape, shape[1]):
            return verdict_of_wins(said)
    except (ValueError, TypeError) as wrong:  # ragged, no numbers, not finite
        return failure(f"config.judge.path: {wrong}")
    return failure(f"config.judge.path: it gave an array {said.shape}: scores {shape} or wins are expected")


def characters(workspace: Workspace) -> list[str]:
    """Every character that a prompt contains or the tokenizer can produce."""
    questions = workspace.questions
    examples = [e for prompts in (questions.train, questions.test) for e in prompts.examples]
    tokens = (workspace.tokenizer.decode([i]) for i in range(workspace.tokenizer.vocab_size))
    return sorted({c for e in examples for c in plain_text(e.question)}.union(*tokens))


def by_model(path: str, scale: float | None, characters: Sequence[str] = ()) -> Opinion:
    """Judge by a trained model: its score head, or its embeddings and gate (general preference model).

    Raises:
      ValueError: no run directory, a run of another kind of model, or a model that cannot read all ``characters``.
    """
    try:
        workspace, params, _ = open_finished(path, examples=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"config.judge.path: {error}") from None
    if not is_reward_model(workspace.objective):
        raise ValueError(
            f"config.judge.path {path!r} holds no reward or preference model: it has no score or embed head"
        )

    if "segment" in workspace.objective.asks.needs and not workspace.config.trace:
        raise ValueError(f"config.judge.path {path!r}: the model reads tool calls, and its config.trace makes none")
    for character in characters:
        try:
            workspace.tokenizer.encode(character)
        except ValueError as error:
            raise ValueError(
                f"config.judge.path {path!r}: the model cannot read what this run asks or may answer: {error}; train "
                "it with a tokenizer that has all of this run's characters"
            ) from None

    def judge(examples: Sequence[Example], answers: Answers) -> Verdict:
        return verdict_of_stats(
            workspace, score_heads(workspace, params, examples, answers), (len(answers), len(answers[0])), scale
        )

    return judge


def by_models(
    paths: tuple[str, ...],
    weights: Sequence[float] | None,
    adapter: str | None,
    scale: float | None,
    characters: Sequence[str] = (),
) -> Opinion:
    """Judge by a weighted sum of the scores of M trained models.

    The weights are fixed (reward ``rluf``), or the gate of a finished run of `preference_orchestrator` gives them for
    each prompt (reward ``preference_orchestrator``).
    """
    if not paths or (weights is None) == (adapter is None):
        raise ValueError("config.judge: name the models in paths, and give either their weights or an adapter")
    models = [by_model(path, None, characters) for path in paths]
    if adapter is None:
        if len(weights) != len(paths):
            raise ValueError(f"config.judge.weights {tuple(weights)} must hold a weight for each of {len(paths)} paths")
        reward = make("rluf", "reward", weights=tuple(weights))
    else:
        workspace, params, _ = open_finished(adapter, examples=False)
        if workspace.objective.asks.wants & JUDGING != {"gate"}:
            raise ValueError(
                f"config.judge.adapter {adapter!r} is not a run of preference_orchestrator: it lacks the gate"
            )
        if workspace.config.heads.gate != len(paths):
            raise ValueError(
                f"config.judge.adapter weighs {workspace.config.heads.gate} models, but paths names {len(paths)}"
            )
        reward = make("preference_orchestrator", "reward")

    def judge(examples: Sequence[Example], answers: Answers) -> Verdict:
        scores = np.stack([model(examples, answers).scores for model in models], -1)
        flat, k = scores.reshape(-1, len(paths)), scores.shape[1]
        said = {"obj_scores": flat}
        if adapter is not None:  # the gate reads the prompt alone, so the answer is empty
            gate = score_heads(workspace, params, examples, [[""]] * len(examples)).gate
            said = {"cand_scores": flat, "adapter_logits": np.repeat(gate, k, 0)}
        batch = Rollouts(mask=np.ones((len(flat), 1)), **said)
        return verdict_of_scores(np.asarray(reward.fn(batch, None)).reshape(-1, k), scale)

    return judge


def score_heads(workspace: Workspace, params: Params, examples: Sequence[Example], answers: Answers) -> TokenStats:
    """The outputs of the heads for K answers to each of G prompts: rows [G K] (NumPy)."""
    rows = rows_of(workspace, examples, answers)
    spread = pad(rows, rows=-(-rows.rows // shard_count(workspace)) * shard_count(workspace))
    stats = to_host(workspace.programs.score_heads(params, workspace.put(spread)))
    return jax.tree.map(lambda x: x[: rows.rows], stats)


def verdict_of_stats(
    workspace: Workspace, stats: TokenStats, shape: tuple[int, int], scale: float | None = None
) -> Verdict:
    """Turn the head outputs of a reward model into a verdict.

    Args:
      stats: head outputs for K answers to each of G prompts, rows in that order.
      shape: (G, K).
      scale: as for `verifier`; None = 1. Scores only.

    A model of labels (`rluf`) scores an answer by the probability of a good label.
    """
    if "score" in workspace.objective.asks.wants:
        score = np.asarray(stats.score, np.float64).reshape(shape)
        score = 1 / (1 + np.exp(-score)) if "label" in workspace.objective.asks.needs else score
        return verdict_of_scores(score, 1.0 if scale is None else scale)
    by_prompt = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), stats)
    return verdict_of_log_odds(np.asarray(jax.vmap(workspace.objective.log_odds)(by_prompt)))


def rows_of(workspace: Workspace, examples: Sequence[Example], answers: Answers) -> Rollouts:
    """Rows of questions and answers, with the tool calls of the model's trace, in the model's own tokens."""
    tokenizer = workspace.tokenizer
    tracer = tracer_of(workspace.config.trace) if workspace.config.trace else lambda question, answer: ()
    asked = [(e, answer) for e, row in zip(examples, answers, strict=True) for answer in row]
    turns = [as_told(tokenizer, e, answer) for e, answer in asked]
    traces = [attempt(tracer, (plain_text(e.question), plain_answer(answer))) for e, answer in asked]
    failures, errors = workspace.questions.failures, [error for _, error in traces]
    failures.tell("config.trace", errors)
    failures.check_any("config.trace", sum(error is not None for error in errors), len(errors))
    texts = [with_trace(tokenizer, t.answer, trace or ())[0] for t, (trace, _) in zip(turns, traces, strict=True)]
    prompts = [turn.prompt for turn in turns]
    p, t = (-(-max(map(len, x)) // STEP) * STEP for x in (prompts, texts))
    return from_sequences(prompts, texts, prompt_width=p, width=t, pad_id=tokenizer.pad_id)
