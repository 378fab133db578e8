"""A judge that asks what a user would say next (FLR, arXiv:2409.13948).

It scores an answer by how much more likely a language model finds the reply of a happy user than of an unhappy one.
A JSON file gives the replies (follow-ups) by category of helpfulness:

  {"clarity": {"positive": ["Thanks, now I see."], "negative": ["What do you mean?"]}, ...}
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxpo.batch import Rollouts, from_sequences, pad
from jaxpo.files import read_json
from jaxpo.learning.needs import is_reward_model
from jaxpo.parallel.distributed import to_host
from jaxpo.policy.transformer import Params
from jaxpo.primitives import shaping
from jaxpo.runs.questions import as_told
from jaxpo.runs.restore import open_finished
from jaxpo.runs.workspace import Workspace, shard_count
from jaxpo.tasks import Example
from jaxpo.text.control import Markup

STEP = 32  # widths are rounded up to multiples of this, so that few shapes are compiled
SIGNS = ("positive", "negative")
FollowUps = Mapping[str, Mapping[str, Sequence[str]]]


def read(file: str) -> FollowUps:
    """Read the follow-ups of a file.

    Raises:
      ValueError: not JSON, or a category without positive or negative texts.
      FileNotFoundError: no such file.
    """
    try:
        found = read_json(file)
    except ValueError as error:
        raise ValueError(f"config.judge.file: {error}") from None
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"config.judge.file {file} must hold categories with positive and negative follow-ups")
    for category, signs in found.items():
        for sign in SIGNS:
            texts = signs.get(sign) if isinstance(signs, Mapping) else None
            if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t for t in texts):
                raise ValueError(f"config.judge.file {file}: category {category!r} has no list of {sign} texts")
    return found


def scorer(path: str, file: str, between: str) -> Callable[..., np.ndarray]:
    """Make ``(examples [G], answers [G][K]) -> scores [G, K]`` from a language model and its follow-ups.

    The score is a mean over categories: the mean log-prob per token of the category's positive follow-ups, minus that
    of its negative ones.

    Args:
      path: a run directory; its policy is the language model.
      file: the file of follow-ups.
      between: the text between an answer and a follow-up, such as the end of the answer and the start of a user
        message in a chat template; its control tokens are meant.

    Raises:
      ValueError: no such run, a run of a reward model, or a file without follow-ups.
    """
    follow_ups = read(file)
    workspace, params, _ = open_finished(path, examples=False)
    if is_reward_model(workspace.objective):
        raise ValueError(f"config.judge.path {path!r} holds a reward model, which cannot predict what comes next")
    texts = [t for signs in follow_ups.values() for sign in SIGNS for t in signs[sign]]
    ids = [workspace.tokenizer.encode(t) for t in texts]
    then = workspace.tokenizer.encode(Markup(between))

    def scores(examples: Sequence[Example], answers: Sequence[Sequence[str]]) -> np.ndarray:
        columns = []
        for k in range(len(answers[0])):  # answer k of every prompt at once
            turns = [as_told(workspace.tokenizer, e, row[k]) for e, row in zip(examples, answers, strict=True)]
            heads = [[*turn.prompt, *turn.answer[:-1], *then] for turn in turns]
            columns.append(of_categories(follow_ups, likelihoods(workspace, params, heads, ids)))
        return np.stack(columns, 1)

    return scores


def of_categories(follow_ups: FollowUps, likelihood: np.ndarray) -> np.ndarray:
    """The rewards [B], from the likelihoods [B, F] of all follow-ups in the order of the file."""
    sizes = [len(signs[sign]) for signs in follow_ups.values() for sign in SIGNS]
    means = np.stack([part.mean(1) for part in np.split(likelihood, np.cumsum(sizes)[:-1], 1)], 1)
    return np.asarray(shaping.followup_likelihood(means[:, ::2], means[:, 1::2]))


def likelihoods(
    workspace: Workspace, params: Params, heads: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]
) -> np.ndarray:
    """The mean log-prob per token [B, F] of each of F texts after each of B prompts."""
    rows = rows_of(heads, ids, workspace.tokenizer.pad_id)
    shards = shard_count(workspace)
    spread = pad(rows, rows=-(-rows.rows // (shards * len(ids))) * shards * len(ids))
    logp = to_host(workspace.programs.score_old(params, workspace.put(spread)).logp)[: rows.rows]
    return (np.where(rows.mask > 0, logp, 0).sum(1) / rows.mask.sum(1)).reshape(len(heads), len(ids))


def rows_of(heads: Sequence[Sequence[int]], ids: Sequence[Sequence[int]], pad_id: int) -> Rollouts:
    """Rows with every text after every prompt; the rows of one prompt are consecutive."""
    p, t = (-(-max(map(len, x)) // STEP) * STEP for x in (heads, ids))
    prompts, texts = [head for head in heads for _ in ids], [text for _ in heads for text in ids]
    return from_sequences(prompts, texts, prompt_width=p, width=t, pad_id=pad_id, shared_prompt=len(ids))
