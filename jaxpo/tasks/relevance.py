"""The regularized relevance reward of R^3 (arXiv:2402.03469), from the texts of questions, answers and completions."""

from collections.abc import Sequence
from typing import Any

from jaxpo.tasks.user_functions import locate


def relevance(
    completions: Sequence[str],
    question: Sequence[str],
    answer: Sequence[str | None],
    open_ended: Sequence[Any] | None = None,
    *,
    embed: str | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
) -> list[float]:
    """``<e(question), e(completion)> words/100 rep`` of an open-ended question, and
    ``(scale <e(answer), e(completion)> + shift) rep`` of another; ``rep`` is the share of distinct trigrams of words,
    1 below three words (`jaxpo.primitives.shaping.relevance` is the same of arrays).

    Args:
      open_ended: a column of the data. Without it, a question is open-ended if it has no answer.
      embed: ``"module:function"`` of a list of n texts that gives their embeddings e [n, D], such as a dense
        retriever's.
      scale, shift: of the relevance to the answer.

    Raises:
      ValueError: ``embed`` gives no finite numbers [n, D], or a question that is not open-ended has no answer.
    """
    free = [a is None for a in answer] if open_ended is None else [bool(o) for o in open_ended]
    if lacking := [q for q, a, o in zip(question, answer, free, strict=True) if a is None and not o]:
        raise ValueError(f"the question {lacking[0][:60]!r} is not open-ended and has no answer")
    beside = [q if o else a for q, a, o in zip(question, answer, free, strict=True)]
    near = inner_products(embed, completions, beside)
    return [
        float(r * len(text.split()) / 100 if o else scale * r + shift) * repetition(text)
        for r, o, text in zip(near, free, completions, strict=True)
    ]


def inner_products(embed: str | None, completions: Sequence[str], beside: Sequence[str]) -> list[float]:
    """``<e(completion), e(text beside it)>`` of each pair; ``ValueError`` if ``embed`` gives something else than
    embeddings."""
    import numpy as np  # here: workers of other rewards load without it

    texts = [*completions, *beside]
    out = np.asarray(locate(embed, "embed of reward 'relevance'")(texts), np.float64)
    if out.ndim != 2 or len(out) != len(texts) or not np.isfinite(out).all():
        raise ValueError(f"embed {embed} must give finite numbers [{len(texts)}, D]; it gave an array {out.shape}")
    return [float(product) for product in np.einsum("nd,nd->n", *np.split(out, 2))]


def repetition(text: str) -> float:
    """The share of distinct ones among the trigrams of words; 1 if there are none."""
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len({*trigrams}) / len(trigrams) if trigrams else 1.0
