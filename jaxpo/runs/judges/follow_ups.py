"""A judge that asks what a user would say next (FLR, arXiv:2409.13948): how likely a language model finds the words of
a happy user after an answer, rather than those of an unhappy one.

The words are those of a JSON file, by category of helpfulness:

  {"clarity": {"positive": ["Thanks, now I see."], "negative": ["What do you mean?"]}, ...}
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxpo.batch import Rollouts, from_sequences, pad
from jaxpo.learning.needs import is_reward_model
from jaxpo.parallel.distributed import to_host
from jaxpo.policy.transformer import Params
from jaxpo.primitives import shaping
from jaxpo.runs.restore import open_finished
from jaxpo.runs.workspace import Workspace, shard_count
from jaxpo.tasks import Example

STEP = 32  # widths are rounded up to this: few shapes are compiled
SIGNS = ("positive", "negative")
FollowUps = Mapping[str, Mapping[str, Sequence[str]]]


def read(file: str) -> FollowUps:
    """The follow-ups of a file.

    Raises:
      ValueError: no JSON, or a category without positive or negative texts. FileNotFoundError: no such file.
    """
    try:
        found = json.loads(Path(file).read_text())
    except ValueError as error:
        raise ValueError(f"config.judge.file {file}: not JSON: {error}") from error
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"config.judge.file {file}: categories with positive and negative follow-ups are expected")
    for category, signs in found.items():
        for sign in SIGNS:
            texts = signs.get(sign) if isinstance(signs, Mapping) else None
            if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t for t in texts):
                raise ValueError(f"config.judge.file {file}: category {category!r} has no list of {sign} texts")
    return found


def scorer(path: str, file: str, between: str) -> Callable[..., np.ndarray]:
    """``(examples [G], answers [G][K]) -> scores [G, K]``: the mean over categories of how much more likely, a token,
    the positive follow-ups are than the negative ones, each a mean over those of the category.

    Args:
      path: a run directory, whose policy is the scorer. file: of the follow-ups. between: the text between an answer
        and what follows, such as a chat template's beginning of a message of the user.

    Raises:
      ValueError: no such run, one of a reward model, or a file that holds no follow-ups.
    """
    follow_ups = read(file)
    workspace, params, _ = open_finished(path, examples=False)
    if is_reward_model(workspace.objective):
        raise ValueError(f"config.judge.path {path!r} holds a reward model, which does not say what comes next")
    texts = [t for signs in follow_ups.values() for sign in SIGNS for t in signs[sign]]
    ids = [workspace.tokenizer.encode(t) for t in texts]

    def scores(examples: Sequence[Example], answers: Sequence[Sequence[str]]) -> np.ndarray:
        columns = []
        for k in range(len(answers[0])):  # an answer of each prompt at a time
            heads = [
                workspace.tokenizer.encode(workspace.tokenizer.render(e.question) + row[k] + between)
                for e, row in zip(examples, answers, strict=True)
            ]
            columns.append(of_categories(follow_ups, likelihoods(workspace, params, heads, ids)))
        return np.stack(columns, 1)

    return scores


def of_categories(follow_ups: FollowUps, likelihood: np.ndarray) -> np.ndarray:
    """[B] the reward of the likelihoods [B, F] of all follow-ups in the order of the file."""
    sizes = [len(signs[sign]) for signs in follow_ups.values() for sign in SIGNS]
    means = np.stack([part.mean(1) for part in np.split(likelihood, np.cumsum(sizes)[:-1], 1)], 1)
    return np.asarray(shaping.followup_likelihood(means[:, ::2], means[:, 1::2]))


def likelihoods(
    workspace: Workspace, params: Params, heads: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]
) -> np.ndarray:
    """[B, F] mean log-prob of a token of each of F texts after each of B prompts."""
    rows = rows_of(heads, ids, workspace.tokenizer.pad_id)
    shards = shard_count(workspace)
    spread = pad(rows, rows=-(-rows.rows // (shards * len(ids))) * shards * len(ids))
    logp = to_host(workspace.programs.score_old(params, workspace.put(spread)).logp)[: rows.rows]
    return (np.where(rows.mask > 0, logp, 0).sum(1) / rows.mask.sum(1)).reshape(len(heads), len(ids))


def rows_of(heads: Sequence[Sequence[int]], ids: Sequence[Sequence[int]], pad_id: int) -> Rollouts:
    """Every text after every prompt; those of a prompt side by side."""
    p, t = (-(-max(map(len, x)) // STEP) * STEP for x in (heads, ids))
    prompts, texts = [head for head in heads for _ in ids], [text for _ in heads for text in ids]
    return from_sequences(prompts, texts, prompt_width=p, width=t, pad_id=pad_id, shared_prompt=len(ids))
