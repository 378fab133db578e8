"""Who decides between answers: a verifier, a function of the user's, or a trained reward or preference model.

A judge looks at all answers to a prompt at once and gives a `Verdict`; ``config.judge`` names it. It is registered as a
factory of its options that returns ``(workspace) -> opinion``, and an opinion is ``(examples [G], answers [G][K]) ->
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
from jaxpo.runs.questions import Answers, Opinion
from jaxpo.runs.restore import open_finished
from jaxpo.runs.workspace import Workspace, shard_count
from jaxpo.tasks import Example, Task
from jaxpo.tasks.base import locate
from jaxpo.tasks.preferences.encode import with_trace
from jaxpo.text.tokenizers import question_of

STEP = 32  # widths of what a model judges are rounded up to this: few shapes are compiled
ON_MESH = ("model", "models", "follow_ups")  # judges that compute on it


Judge = Callable[[Workspace], Opinion]


def make_judge(workspace: Workspace) -> Callable[..., Verdict]:
    """``(examples, *columns) -> Verdict`` of the judge that the config names. ``columns``: batches with answers to the
    same prompts in the same order; their answers stand side by side.

    Raises:
      ValueError: the run has no verifier, or what is named is no judge.
    """
    block = workspace.config.judge
    opinion = made(block, "judge")(workspace)
    return partial(workspace.questions.compare, opinion, whole=block.name in ON_MESH)


@register("judge")
def verifier(scale: float | None = None) -> Judge:
    """The task's rewards are the scores.

    Args:
      scale: ``P(i beats j) = sig(scale (s_i - s_j))``; None: the higher score wins.
    """
    return lambda workspace: partial(verified, workspace.task, scale)


@register("judge")
def function(path: str, scale: float | None = None) -> Judge:
    """A function ``"module:function"`` of (questions [G], answers [G][K]) gives scores [G, K], or win probabilities
    [G, K, K]. scale: as of `verifier`."""
    return lambda workspace: partial(by_function, path, scale)


@register("judge")
def model(path: str, scale: float | None = None) -> Judge:
    """The run directory of ``experiments.train_reward``: scores of its score head, or preferences of its embeddings.
    scale: as of `verifier`; None = 1."""
    return lambda workspace: by_model(path, scale, characters(workspace))


@register("judge")
def models(
    paths: tuple = (), weights: tuple | None = None, adapter: str | None = None, scale: float | None = None
) -> Judge:
    """Several run directories of reward models: a sum of their scores by ``weights`` (RLUF), or by what the run
    ``adapter`` gives to each prompt (Preference Orchestrator). scale: as of `verifier`."""
    return lambda workspace: by_models(tuple(paths), weights, adapter, scale, characters(workspace))


@register("judge", id="follow_ups")
def what_comes_next(path: str, file: str, between: str = "\n", scale: float | None = None) -> Judge:
    """The run directory of a language model: how likely it finds what a happy user says next
    (`jaxpo.runs.judges.follow_ups`). scale: as of `verifier`."""

    def judge(workspace: Workspace) -> Opinion:
        scores = follow_ups.scorer(path, file, between)
        return lambda examples, answers: of_scores(scores(examples, answers), scale)

    return judge


def of_scores(scores: np.ndarray, scale: float | None) -> Verdict:
    """``P(i beats j) = sig(scale (s_i - s_j))``; without a scale the higher score wins, equal ones are even."""
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("the judge's scores are not finite")
    if scale is None:
        return Verdict(scores, (1 + np.sign(scores[:, :, None] - scores[:, None, :])) / 2)
    return Verdict(scores, np.asarray(preference_data.win_matrix(scale * scores)))


def of_wins(wins: np.ndarray) -> Verdict:
    """An answer's score is its mean win probability against the answers to its prompt, itself among them (SPPO)."""
    wins = np.asarray(wins, np.float64)
    if not ((wins >= 0) & (wins <= 1)).all():
        raise ValueError("the judge's win probabilities must lie in [0, 1]")
    return Verdict(wins.mean(-1), wins)


def verified(task: Task, scale: float | None, examples: Sequence[Example], answers: Answers) -> Verdict:
    """By the task's rewards."""
    if task.score is None:
        raise ValueError(
            "config.judge.name is 'verifier', but nothing verifies answers: set config.task.name or a judge"
        )
    flat = [text for row in answers for text in row]
    scores = task.score([e for e, row in zip(examples, answers, strict=True) for _ in row], flat)
    return of_scores(np.array([s.reward for s in scores]).reshape(len(answers), -1), scale)


def by_function(path: str, scale: float | None, examples: Sequence[Example], answers: Answers) -> Verdict:
    """By a function of the user's."""
    said = np.asarray(locate(path)([e.question for e in examples], answers), np.float64)
    shape = (len(answers), len(answers[0]))
    if said.shape == shape:
        return of_scores(said, scale)
    if said.shape != (*shape, shape[1]):
        raise ValueError(f"config.judge.path {path!r} gave an array {said.shape}: scores {shape} or wins are expected")
    return of_wins(said)


def characters(workspace: Workspace) -> list[str]:
    """Every character that a prompt contains or the tokenizer can produce."""
    questions = workspace.questions
    examples = [e for prompts in (questions.train, questions.test) for e in prompts.examples]
    tokens = (workspace.tokenizer.decode([i]) for i in range(workspace.tokenizer.vocab_size))
    return sorted({c for e in examples for c in question_of(e.question)}.union(*tokens))


def by_model(path: str, scale: float | None, characters: Sequence[str] = ()) -> Opinion:
    """By a trained model: its score head, or its embeddings and gate (general preference model).

    Raises:
      ValueError: no run directory, not of such a model, or one that cannot read all of these ``characters``.
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
                "it with a tokenizer that has all of its characters"
            ) from None

    def judge(examples: Sequence[Example], answers: Answers) -> Verdict:
        return of_stats(
            workspace, heads_say(workspace, params, examples, answers), (len(answers), len(answers[0])), scale
        )

    return judge


def by_models(
    paths: tuple[str, ...],
    weights: Sequence[float] | None,
    adapter: str | None,
    scale: float | None,
    characters: Sequence[str] = (),
) -> Opinion:
    """By the sum of the scores of M trained models, weighed by fixed numbers, or by the gate of a finished run of
    `preference_orchestrator`, prompt by prompt: what the rewards ``rluf`` and ``preference_orchestrator`` say."""
    if not paths or (weights is None) == (adapter is None):
        raise ValueError("config.judge: name the models in paths, and give either their weights or an adapter")
    models = [by_model(path, None, characters) for path in paths]
    if adapter is None:
        if len(weights) != len(paths):
            raise ValueError(f"config.judge.weights {tuple(weights)} are not one for each of {len(paths)} paths")
        reward = make("rluf", "reward", weights=tuple(weights))
    else:
        workspace, params, _ = open_finished(adapter, examples=False)
        if workspace.objective.asks.wants & JUDGING != {"gate"}:
            raise ValueError(
                f"config.judge.adapter {adapter!r} is no run of preference_orchestrator: it has no such gate"
            )
        if workspace.config.heads.gate != len(paths):
            raise ValueError(
                f"config.judge.adapter weighs {workspace.config.heads.gate} models, not {len(paths)} of paths"
            )
        reward = make("preference_orchestrator", "reward")

    def judge(examples: Sequence[Example], answers: Answers) -> Verdict:
        scores = np.stack([model(examples, answers).scores for model in models], -1)
        flat, k = scores.reshape(-1, len(paths)), scores.shape[1]
        said = {"obj_scores": flat}
        if adapter is not None:  # the gate reads the prompt alone, whatever is answered
            gate = heads_say(workspace, params, examples, [[""]] * len(examples)).gate
            said = {"cand_scores": flat, "adapter_logits": np.repeat(gate, k, 0)}
        batch = Rollouts(mask=np.ones((len(flat), 1)), **said)
        return of_scores(np.asarray(reward.fn(batch, None)).reshape(-1, k), scale)

    return judge


def heads_say(workspace: Workspace, params: Params, examples: Sequence[Example], answers: Answers) -> TokenStats:
    """What the heads say of K answers to each of G prompts: rows [G K] (NumPy)."""
    rows = rows_of(workspace, examples, answers)
    spread = pad(rows, rows=-(-rows.rows // shard_count(workspace)) * shard_count(workspace))
    stats = to_host(workspace.programs.score_heads(params, workspace.put(spread)))
    return jax.tree.map(lambda x: x[: rows.rows], stats)


def of_stats(workspace: Workspace, stats: TokenStats, shape: tuple[int, int], scale: float | None = None) -> Verdict:
    """Of what the heads of a reward model say of K answers to each of G prompts: ``shape`` is (G, K), rows in that
    order. The score of a model of labels (`rluf`) is the probability of a good one."""
    if "score" in workspace.objective.asks.wants:
        score = np.asarray(stats.score, np.float64).reshape(shape)
        score = 1 / (1 + np.exp(-score)) if "label" in workspace.objective.asks.needs else score
        return of_scores(score, 1.0 if scale is None else scale)
    by_prompt = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), stats)
    return of_wins(np.asarray(jax.vmap(workspace.objective.wins)(by_prompt)))


def rows_of(workspace: Workspace, examples: Sequence[Example], answers: Answers) -> Rollouts:
    """Questions and answers, and the tool calls of its trace, in the model's own tokens."""
    tokenizer = workspace.tokenizer
    questions = [tokenizer.encode(tokenizer.render(e.question)) for e in examples]
    tracer = locate(workspace.config.trace) if workspace.config.trace else lambda question, answer: ()
    texts = [
        with_trace(tokenizer, text, tracer(question_of(e.question), text))[0]
        for e, row in zip(examples, answers, strict=True)
        for text in row
    ]
    prompts = [q for q, row in zip(questions, answers, strict=True) for _ in row]
    p, t = (-(-max(map(len, x)) // STEP) * STEP for x in (prompts, texts))
    return from_sequences(prompts, texts, prompt_width=p, width=t, pad_id=tokenizer.pad_id)
