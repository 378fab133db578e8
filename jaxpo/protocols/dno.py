"""DNO-Prct: pairs whose grades differ clearly, some with the teacher's answer, and pairs of earlier rounds."""

from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.arguments import Count, Domain, Positive, Whole
from jaxpo.batch import Rollouts, roles_of, take
from jaxpo.fields import PAIR
from jaxpo.learning.state import Run, advance
from jaxpo.objectives import Objective
from jaxpo.primitives import preference_data as rules
from jaxpo.protocols.comparisons import POLICY, sampled
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.preference_data import rounds
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.protocols.rows import stacked, with_rows
from jaxpo.registry import register


@register("protocol", source="DNO-Prct, arXiv:2404.03715 (n-grams, pairs a prompt and the choice of pairs are assumed)")
def dno_prct(
    positive: float = 5.0,
    teacher_gap: Positive = 2.0,
    own_gap: Positive = 1.0,
    pairs: Whole = 4,
    old: Annotated[float, Domain(0, 0.5, "[)")] = 0.3,
    memory: Count = 2,
    ngram: Whole = 8,
    repeats: Annotated[int, Domain(2, whole=True)] = 3,
    prev_every: Whole | None = None,
) -> Protocol:
    """Train on pairs of answers whose grades differ clearly, and on such pairs of earlier rounds. A judge grades K
    answers of the policy to each prompt together with the teacher's answer, which is the prompt's demonstration.

    The chosen answer scores at least ``positive``. The rejected one scores less, by at least ``teacher_gap`` if the
    chosen answer is the teacher's, and by at least ``own_gap`` if it is the policy's own. Each prompt gives up to
    ``pairs`` such pairs, those with the widest gaps. If fewer than ``pairs`` times prompts are found, the rest of the
    batch does not count.

    Scores are compared as the judge gives them. The defaults are the paper's, for grades from 1 to 6; a verifier's
    rewards lie in [0, 1] and need other values (``positive=1``, gaps of 0.5).

    Tables: past, pairs as `Rollouts` with leaves [memory + 1, iterations of a round, rows]. Metrics: ``dno/fresh`` and
    ``dno/old``, their shares of the batch; ``dno/teacher``, share of fresh pairs whose chosen answer is the teacher's.

    Args:
      old: share of the batch that comes from the round before; the round before that gives half as much, and so on.
      memory: how many rounds back.
      ngram, repeats: an answer in which some ``ngram`` tokens in a row occur ``repeats`` times is never chosen, and may
        be rejected whatever its score (assumed).
      prev_every: iterations of a round, as in `preference_data`.
    """
    if bool(old) != bool(memory):
        raise ValueError(f"old = {old:g} and memory = {memory} contradict each other: set both to 0, or neither")
    choice = Choice(dict(positive=positive, teacher_gap=teacher_gap, own_gap=own_gap), pairs, ngram, repeats)
    past = Past(old, memory, prev_every or 1)

    def tables(gather: Gatherer) -> dict[str, Any]:
        shape = memory + 1, past.every, 2 * past.places(gather.prompts * pairs)[1]
        return {"past": blank(shape, gather.prompt_width, gather.width)} if memory else {}

    def rows(objective: Objective, responses: int) -> int:
        if objective.unit.layout != PAIR:
            raise ValueError(
                "protocol 'dno_prct' makes pairs, but a unit of the objective is "
                f"{objective.unit.layout or 'one answer'}"
            )
        return 2 * pairs

    facts = Facts(
        rows=rows,
        references=rounds(prev_every, None),
        check=partial(check, choice),
        compiles={"score": 2},
        stale=bool(memory),
        judges=True,
    )
    return Protocol(partial(collect, choice, past), tables=tables, facts=facts)


class Choice(NamedTuple):
    """Which answers become pairs.

    grades: positive, teacher_gap and own_gap, as in `dno_prct`.
    pairs: how many pairs of a prompt, at most.
    ngram: length of the token runs that are counted.
    repeats: an answer that contains some run this often is never chosen.
    """

    grades: dict[str, float]
    pairs: int
    ngram: int
    repeats: int

    def loops(self, answers: Rollouts) -> np.ndarray:
        """[rows] bool: the answer repeats itself."""
        rows = zip(answers.completions, answers.mask, strict=True)
        return np.array([repetitive(t[m > 0], self.ngram, self.repeats) for t, m in rows])


class Past(NamedTuple):
    """How many pairs come from earlier rounds.

    share: part of a batch that comes from the round before; the round before that gives half as much, and so on.
    rounds: how many rounds back.
    every: iterations of a round.
    """

    share: float
    rounds: int
    every: int

    def places(self, pairs: int) -> tuple[list[int], int]:
        """How many of the ``pairs`` of a batch come from each earlier round, and how many are fresh."""
        shares = [int(self.share * pairs / 2**i) for i in range(self.rounds)]
        return shares, pairs - sum(shares)


def collect(choice: Choice, past: Past, run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
    """Collect fresh pairs of the policy's and the teacher's answers, and pairs of earlier rounds."""
    run, indices = gather.draw(run, gather.prompts)
    own_key, key = jax.random.split(key)
    columns = sampled(run, gather, POLICY, indices, own_key), gather.demonstrations(indices)
    answers = stacked([bare(column) for column in columns])
    scores, k = np.asarray(gather.judge(*columns).scores), gather.responses
    own, teachers = np.split(np.arange(answers.rows), [gather.prompts * k])
    at = np.concatenate([own.reshape(-1, k), teachers[:, None]], 1)  # [G, K + 1] rows, the teacher's last
    i, j, there = graded(scores, choice.loops(answers)[at], choice.pairs, choice.grades)
    total = gather.prompts * choice.pairs
    shares, fresh = past.places(total)
    i, j, g, there = (x[:fresh] for x in best_first(i, j, there))
    new = take(answers, np.stack([at[g, i], at[g, j]], 1).reshape(-1))
    new = new.replace(count=np.repeat(there, 2).astype(np.float32))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    run, old = remembered(past, shares, run, new, rng)
    gather.note("judge/score", float(scores[:, :k].mean()))
    gather.note("dno/fresh", float(there.sum() / total))
    gather.note("dno/old", float(sum(p.count.sum() for p in old) / (2 * total)))
    gather.note("dno/teacher", float((i == k)[there].mean()) if there.any() else 0.0)
    return run, as_pairs(stacked([new, *old]), rng)


def remembered(
    past: Past, shares: list[int], run: Run, new: Rollouts, rng: np.random.Generator
) -> tuple[Run, list[Rollouts]]:
    """Store the new pairs, and draw pairs of earlier rounds."""
    if not past.rounds:
        return run, []
    now, table, size = divmod(run.iteration, past.every), run.tables["past"], past.rounds + 1
    old = [drawn(table, (now[0] - 1 - age) % size, n, rng) for age, n in enumerate(shares) if n]
    table = jax.tree.map(lambda x, rows: with_rows(x, (now[0] % size, now[1]), rows), table, new)
    return advance(run, tables={**run.tables, "past": table}), old


def check(choice: Choice, config: ConfigDict) -> None:
    """Raise ``ValueError`` if the judge cannot give such grades, or if there cannot be so many pairs."""
    positive = choice.grades["positive"]
    if config.judge.name == "verifier" and positive > 1:
        raise ValueError(
            f"config.protocol.positive {positive:g} is a grade from 1 to 6, a verifier's rewards lie in [0, 1]: set it "
            "to 1 and config.protocol.teacher_gap and own_gap to 0.5, or another config.judge.name"
        )
    k = config.rollout.responses
    if choice.pairs > k * (k + 1) // 2:
        most = k * (k + 1) // 2
        raise ValueError(f"config.protocol.pairs {choice.pairs}: {k + 1} answers make at most {most} pairs")


def blank(shape: tuple[int, ...], prompt_width: int, width: int) -> Rollouts:
    """Rows of count 0, leaves [*shape, ...]."""
    number = np.zeros(shape, np.int32)
    return Rollouts(
        tokens=np.zeros((*shape, prompt_width + width), np.int32),
        mask=np.zeros((*shape, width), np.float32),
        prompt_length=number,
        prompt=number,
        count=np.zeros(shape, np.float32),
    )


def bare(batch: Rollouts) -> Rollouts:
    """The answers alone (NumPy), without rewards, log-probs and the other fields."""
    return Rollouts(
        tokens=np.asarray(batch.tokens, np.int32),
        mask=np.asarray(batch.mask, np.float32),
        prompt_length=np.asarray(batch.prompt_length, np.int32),
        prompt=np.asarray(batch.prompt, np.int32),
        count=np.ones(batch.rows, np.float32),
    )


def repetitive(tokens: np.ndarray, n: int, times: int) -> bool:
    """Whether some ``n`` tokens in a row occur at least ``times`` times."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(grams) >= times and max(np.unique(grams, axis=0, return_counts=True)[1]) >= times


def graded(
    scores: np.ndarray, repeats: np.ndarray, pairs: int, grades: dict[str, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pick the pairs with the widest gaps among K + 1 answers to each prompt, the last of which is the teacher's.

    Returns:
      (i, j, there), [G, pairs] each: the indices of the chosen and the rejected answer, and whether there is such a
      pair (`jaxpo.primitives.preference_data.graded_pairs`). Widest gaps first, ties to the lowest indices.
    """
    g, k = scores.shape
    teacher = np.arange(k) == k - 1
    good = np.asarray(jax.vmap(lambda s, r: rules.graded_pairs(s, teacher, r, **grades))(scores, repeats)).reshape(
        g, -1
    )
    gap = (scores[:, :, None] - scores[:, None, :]).reshape(g, -1)
    order = np.argsort(np.where(good, -gap, np.inf), 1, kind="stable")[:, :pairs]
    return order // k, order % k, np.take_along_axis(good, order, 1)


def best_first(i: np.ndarray, j: np.ndarray, there: np.ndarray) -> list[np.ndarray]:
    """All pairs [G, pairs] in one row, as (i, j, prompt, there): the first pair of every prompt, then the second, and
    so on; places without a pair come last."""
    prompt = np.broadcast_to(np.arange(len(i))[:, None], i.shape)
    flat = [x.T.reshape(-1) for x in (i, j, prompt, there)]
    order = np.argsort(~flat[3], kind="stable")
    return [x[order] for x in flat]


def drawn(past: Rollouts, place: int, n: int, rng: np.random.Generator) -> Rollouts:
    """Draw ``n`` pairs of the round at ``place``, without replacement. If it has fewer, the rest does not count."""
    whole = jax.tree.map(lambda x: x[place].reshape(-1, *x.shape[3:]), past)
    order = rng.permutation(whole.rows // 2)
    order = order[np.argsort(whole.count[2 * order] == 0, kind="stable")][:n]
    return take(whole, (2 * order[:, None] + np.arange(2)).reshape(-1))


def as_pairs(batch: Rollouts, rng: np.random.Generator) -> Rollouts:
    """The rows as units: each two neighbors are a pair."""
    n = batch.rows
    return batch.replace(
        layout=PAIR,
        shared_prompt=2,
        role=roles_of(PAIR, n // 2),
        group=np.arange(n, dtype=np.int32) // 2,
        seed=rng.integers(0, 2**32, n, np.uint32),
    )
