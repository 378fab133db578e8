"""A judge compares the policy's own answers: who answers, which answers become pairs, and which rows they become."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.arguments import choice
from jaxpo.batch import Rollouts, roles_of, take
from jaxpo.fields import JUDGED, PAIR, role_id
from jaxpo.learning.needs import form_of
from jaxpo.learning.state import Run
from jaxpo.objectives import Objective
from jaxpo.parallel.distributed import to_host
from jaxpo.primitives import preference_data as rules
from jaxpo.protocols.gatherer import Gatherer, Verdict
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.protocols.rows import stacked

RULES = ("best_worst", "random", "adjacent")
OF_OPPONENTS = {"win", "pref_opp", "pref_score"}  # fields that an opponent's answers change
# Objectives that read these take pairs in any order; others need the better answer first.
SOFT = {"pref_prob", "win", "pref_score"}
Chosen = tuple[np.ndarray, np.ndarray, np.ndarray]  # indices i, j [G, pairs] of answers, and whether the pair counts


class Source(NamedTuple):
    """A model that answers.

    params: (run) -> its parameters.
    partner: a reference; answers then come from the geometric mixture ``params^(1 - share) partner^share``.
    share: the exponent of the mixture.
    plain: sample at temperature 1 without top-k, top-p and min-p, whatever ``config.sampling`` says.
    """

    params: Callable[[Run], Any] = lambda run: run.state.params
    partner: str | None = None
    share: float = 0.0
    plain: bool = False


POLICY = Source()


class Comparison(NamedTuple):
    """Who answers, and how the judge's verdict becomes rows.

    own: gives the answers that are trained on.
    opponent: gives the answers that they are compared with; None = they are compared with each other.
    pairs: the rule that picks pairs (``RULES``); None = ``unasked``.
    unasked: the rule when ``pairs`` is None.
    margin: a pair does not count if its scores differ by at most this much.
    threshold: an answer is good if its score is above this; None = if it beats the others.
    choose: (verdict, K, key) -> (i, j, there): picks the pairs in place of a rule.
    count: K -> how many pairs ``choose`` picks for a prompt.
    """

    own: Source = POLICY
    opponent: Source | None = None
    pairs: str | None = None
    unasked: str = "best_worst"
    margin: float = 0.0
    threshold: float | None = None
    choose: Callable[[Verdict, int, Array], Chosen] | None = None
    count: Callable[[int], int] | None = None

    @property
    def rule(self) -> str:
        return self.unasked if self.pairs is None else self.pairs


def compared(comparison: Comparison, references: Mapping[str, Mapping[str, Any]] | None = None) -> Protocol:
    """The protocol of a comparison: sample K answers to each prompt (and K of the opponent), judge them, make rows."""
    choice("pairs", comparison.rule, RULES)
    mixes = comparison.opponent is not None or comparison.own.partner is not None
    facts = Facts(
        provides=JUDGED,
        rows=partial(rows, comparison),
        references=references or {},
        compiles={"generate": int(mixes), "score": 1},
        judges=True,
        check=partial(check, comparison),
    )
    return Protocol(partial(collect, comparison), facts=facts)


def collect(c: Comparison, run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
    """Sample answers to the next prompts, judge them, and return them as rows for the objective."""
    run, indices = gather.draw(run, gather.prompts)
    keys = jax.random.split(key, 3)
    columns = [sampled(run, gather, who, indices, k) for who, k in zip((c.own, c.opponent), keys, strict=False) if who]
    verdict, k, needs = gather.judge(*columns), gather.responses, gather.objective.asks.needs
    gather.note("judge/score", float(verdict.scores[:, :k].mean()))
    if c.opponent:
        gather.note("judge/win", float(verdict.wins[:, :k, k:].mean()))
    chosen = None
    if gather.objective.unit.layout:
        chosen = pairs_of(c, verdict, k, keys[2], needs=needs)
        gather.note("judge/kept", float(chosen[2].mean()))
    batch = arranged(gather.objective, columns[0], verdict, chosen)
    if "label" not in needs:
        return run, batch
    good, known = labels(verdict, k, c.threshold)
    gather.note("judge/good", float(good[known].mean()) if known.any() else 0.0)
    gather.note("judge/kept", float(known.mean()))
    return run, with_labels(batch, good, known, form_of(gather.objective, k).mismatched)


def pairs_of(c: Comparison, verdict: Verdict, k: int, key: Array, *, needs: Collection[str]) -> Chosen:
    """The pairs of a comparison: in any order for an objective that needs one of ``SOFT``, otherwise the better answer
    first. The best answer of an objective that needs pref_score has the highest one (GPO)."""
    soft = bool(SOFT.intersection(needs))
    by = answer_fields(verdict, k)["pref_score"] if "pref_score" in needs else None
    i, j, there = c.choose(verdict, k, key) if c.choose else (*pick(c.rule, verdict, k, key, by=by), True)
    i, j, counts = (i, j, i != j) if soft else ordered(verdict, i, j, c.margin)
    return i, j, counts & there


def rows(c: Comparison, objective: Objective, responses: int) -> int:
    """The number of rows that a comparison makes for each prompt.

    Raises:
      ValueError: the objective learns from other units, or an option has no effect on it.
    """
    layout, needs = objective.unit.layout, objective.asks.needs
    if layout not in ((), PAIR):
        raise ValueError(
            f"the objective learns from units {layout}, which a judge does not make from the policy's own answers: set "
            "config.data.name, and set config.protocol.name to preference_data"
        )
    if c.threshold is not None and "label" not in needs:
        raise ValueError("config.protocol.label_threshold has no effect: the objective reads no labels")
    if c.opponent and not needs & OF_OPPONENTS:
        raise ValueError(
            "this protocol judges answers against an opponent's answers, but the objective reads nothing of that "
            f"({', '.join(sorted(OF_OPPONENTS))}): set config.protocol.name to judged"
        )
    if not layout and (c.pairs is not None or c.margin):
        field = "margin" if c.pairs is None else "pairs"
        raise ValueError(f"config.protocol.{field} has no effect: the objective learns from single answers")
    if c.margin and SOFT & needs:
        raise ValueError(
            "config.protocol.margin has no effect: the objective learns from what the judge says of a pair, whichever "
            "answer is better"
        )
    if c.choose and not layout:
        raise ValueError(
            "this protocol makes pairs, but the objective learns from single answers: choose protocol 'judged'"
        )
    if not layout:
        return form_of(objective, responses).size * responses if "label" in needs else responses
    each = c.count(responses) if c.count else responses // 2 if c.rule == "adjacent" else 1
    return len(layout) * each


def check(c: Comparison, config: ConfigDict) -> None:
    """Raise ``ValueError`` if there are too few answers to compare."""
    least = 2 if c.opponent is None else 1
    if config.rollout.responses < least:
        raise ValueError(f"config.rollout.responses must be at least {least}: answers are compared with each other")


def sampled(run: Run, gather: Gatherer, who: Source, indices: np.ndarray, key: Array) -> Rollouts:
    """Sample answers (NumPy) from a source."""
    options = gather.sampling(run)
    if who.plain:
        options = options.replace(temperature=1.0, top_k=None, top_p=None, min_p=None)
    mixed = dict(partner=run.references[who.partner], share=who.share) if who.partner else {}
    return to_host(gather.generate(who.params(run), indices, key, options, **mixed))


# ---- which answers become pairs


def pick(
    rule: str, verdict: Verdict, k: int, key: Array, *, by: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pick pairs among the first ``k`` answers to each prompt: their indices (i, j), [G, pairs] each.

    Args:
      by: [G, k] what makes an answer the best or the worst; None = the judge's scores.
    """
    scores = np.asarray(verdict.scores)[:, :k] if by is None else by
    if rule == "best_worst":
        best, worst, _ = rules.best_and_worst(scores)
        return np.asarray(best)[:, None], np.asarray(worst)[:, None]
    if rule == "adjacent":
        places = np.broadcast_to(np.arange(k // 2 * 2), (len(scores), k // 2 * 2))
    else:
        keys = jax.random.split(key, len(scores))
        places = np.asarray(jax.vmap(lambda one: jax.random.permutation(one, k)[:2])(keys))
    return places[:, ::2], places[:, 1::2]


def ordered(verdict: Verdict, i: np.ndarray, j: np.ndarray, margin: float) -> Chosen:
    """Put the better answer of each pair first. A pair counts if its scores differ by more than ``margin`` and the
    judge prefers one of the two."""
    g = np.arange(len(i))[:, None]
    p, gap = verdict.wins[g, i, j], np.abs(verdict.scores[g, i] - verdict.scores[g, j])
    swap = p < 0.5
    return np.where(swap, j, i), np.where(swap, i, j), (p != 0.5) & (gap > margin)


def answer_fields(verdict: Verdict, k: int) -> dict[str, np.ndarray]:
    """Fields of the judge for each of the first ``k`` answers, [G, k] each.

    win: mean probability to beat the opponent's answers; without an opponent, all k answers (itself at 1/2, like SPPO).
    pref_opp: the same, but without itself.
    pref_score: mean log-odds of the probabilities that ``win`` averages (GPO: the mean of s/tau, itself at 0).
    rm: score.
    """
    wins, total = np.asarray(verdict.wins), verdict.wins.shape[1]
    others = slice(k, None) if total > k else slice(k)
    against, odds = wins[:, :k, others], verdict.preference[:, :k, others]
    win = against.mean(-1)
    alone = (against.sum(-1) - 0.5) / max(k - 1, 1) if total == k else win
    return dict(win=win, pref_opp=alone, pref_score=odds.mean(-1), rm=np.asarray(verdict.scores)[:, :k])


def arranged(objective: Objective, own: Rollouts, verdict: Verdict, chosen: Chosen | None) -> Rollouts:
    """Rows (NumPy) for the objective: all answers, or the chosen pairs side by side."""
    k = own.shared_prompt
    fields = {name: x.astype(np.float32) for name, x in answer_fields(verdict, k).items()}
    own = own.replace(reward=fields["rm"].reshape(-1))
    wanted = {name: x.reshape(-1) for name, x in fields.items() if name in objective.asks.needs}
    own = own.with_row(**wanted)
    if chosen is None:
        return own
    i, j, counts = chosen
    prompts, g = np.arange(len(i))[:, None], len(i)
    order = np.stack([prompts * k + i, prompts * k + j], -1).reshape(-1)
    pairs = {
        "pref_prob": verdict.wins[prompts, i, j],
        "margin": verdict.scores[prompts, i] - verdict.scores[prompts, j],
    }
    batch = take(own, order, shared_prompt=2 * i.shape[1])
    twice = {name: np.repeat(x.reshape(-1), 2).astype(np.float32) for name, x in pairs.items()}
    return batch.replace(
        layout=PAIR,
        role=roles_of(PAIR, g * i.shape[1]),
        count=batch.count * np.repeat(counts.reshape(-1), 2).astype(np.float32),
        per_row={**batch.per_row, **{name: x for name, x in twice.items() if name in objective.asks.needs}},
    )


def labels(verdict: Verdict, k: int, threshold: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(good, known), [G, k] each: which of the first ``k`` answers are good, and for which of them this is known.

    With a threshold, an answer is good if its score is above it, and this is always known. Without one, an answer is
    good if it beats the others (the opponent's, if there is one) with a mean probability above 1/2; at exactly 1/2 it
    is neither good nor bad.
    """
    if threshold is not None:
        good = np.asarray(verdict.scores)[:, :k] > threshold
        return good, np.ones_like(good)
    p = answer_fields(verdict, k)["pref_opp"]
    return p > 0.5, p != 0.5


def with_labels(own: Rollouts, good: np.ndarray, known: np.ndarray, mismatched: bool) -> Rollouts:
    """Rows (NumPy) with labels; a row whose label is not known gets count 0.

    With ``mismatched``, each row is followed by a row of role "kl": this prompt with an answer to the previous prompt
    (KTO). Nobody sampled such a row, so ``logp_beh`` is left out.
    """
    label, k = good.reshape(-1).astype(np.float32), own.shared_prompt
    own = own.replace(label=label, count=own.count * known.reshape(-1).astype(np.float32), logp_beh=None)
    if not mismatched:
        return own
    other = np.roll(np.arange(own.rows), k)
    completions = np.asarray(own.tokens)[other, own.prompt_width :]
    kl = take(own, other).replace(
        tokens=np.concatenate([np.asarray(own.tokens)[:, : own.prompt_width], completions], 1),
        prompt_length=own.prompt_length,
        prompt=own.prompt,
        group=own.group,
        seed=own.seed,
        role=np.full(own.rows, role_id("kl"), np.int32),
        count=np.ones(own.rows, np.float32),
        per_row={name: np.zeros_like(x) for name, x in own.per_row.items()},
    )
    both = stacked([own.replace(shared_prompt=1), kl])
    order = np.stack([np.arange(own.rows), own.rows + np.arange(own.rows)], 1).reshape(-1)
    return take(both, order, shared_prompt=2 * k)
