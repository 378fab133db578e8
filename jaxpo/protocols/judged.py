"""The policy's own answers, compared by a judge: pairs, win rates, games against an opponent."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jaxpo.batch import Rollouts, take
from jaxpo.fields import JUDGED, PAIR, role_id
from jaxpo.learning.needs import form_of
from jaxpo.learning.state import Run
from jaxpo.objectives import Objective
from jaxpo.parallel.distributed import to_host
from jaxpo.primitives import preference_data as rules
from jaxpo.primitives.advantages import choice
from jaxpo.protocols.gatherer import Gatherer, Verdict
from jaxpo.protocols.preference_data import rounds
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.protocols.rows import stacked
from jaxpo.registry import register

RULES = ("best_worst", "random", "adjacent")
OF_OPPONENTS = {"win", "pref_opp", "pref_score"}  # what only answers of an opponent change
SOFT = {"pref_prob", "win"}  # who reads these takes pairs as they come; others want the better answer first
Chosen = tuple[np.ndarray, np.ndarray, np.ndarray]  # places i, j [G, pairs] of answers, and whether the pair counts


class Source(NamedTuple):
    """Who answers. ``params``: of the run. partner, share: slot and exponent of a geometric mixture. plain: at
    temperature 1 and uncut, whatever the config's sampling."""

    params: Callable[[Run], Any] = lambda run: run.state.params
    partner: str | None = None
    share: float = 0.0
    plain: bool = False


POLICY = Source()


def share_in_unit(name: str, value: float) -> float:
    """``value`` if it lies in [0, 1]; ``ValueError`` with the name otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], not {value!r}")
    return value


# ---- which answers become pairs


def pick(rule: str, verdict: Verdict, k: int, key: Array) -> tuple[np.ndarray, np.ndarray]:
    """Places (i, j) [G, pairs] of two answers among the first ``k`` to each prompt."""
    scores = np.asarray(verdict.scores)[:, :k]
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
    """The better answer first; a pair counts if its scores are more than ``margin`` apart and the judge is not
    even."""
    g = np.arange(len(i))[:, None]
    p, gap = verdict.wins[g, i, j], np.abs(verdict.scores[g, i] - verdict.scores[g, j])
    swap = p < 0.5
    return np.where(swap, j, i), np.where(swap, i, j), (p != 0.5) & (gap > margin)


def answer_fields(verdict: Verdict, k: int) -> dict[str, np.ndarray]:
    """What the judge says of each of the first ``k`` answers [G, k]: ``win``, its mean win probability against the
    opponent's answers, or against all k (itself at 1/2, as in SPPO); ``pref_opp``, the same without itself; their mean
    logit ``pref_score``; ``rm``, its score."""
    wins, total = np.asarray(verdict.wins), verdict.wins.shape[1]
    against = wins[:, :k, k:] if total > k else wins[:, :k, :k]
    logits = np.asarray(rules.ranker_reward(against))
    win = against.mean(-1)
    alone = (against.sum(-1) - 0.5) / max(k - 1, 1) if total == k else win
    return dict(win=win, pref_opp=alone, pref_score=logits.mean(-1), rm=np.asarray(verdict.scores)[:, :k])


def arranged(objective: Objective, own: Rollouts, verdict: Verdict, chosen: Chosen | None) -> Rollouts:
    """Rows (NumPy) for the objective: all answers, or with a layout of pairs the chosen ones side by side."""
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
        role=np.tile(np.array([role_id(r) for r in PAIR], np.int32), g * i.shape[1]),
        count=batch.count * np.repeat(counts.reshape(-1), 2).astype(np.float32),
        per_row={**batch.per_row, **{name: x for name, x in twice.items() if name in objective.asks.needs}},
    )


def labels(verdict: Verdict, k: int, threshold: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which of the first ``k`` answers are good [G, k], and of which that is known: those of a score above the
    threshold, of all; without one, those that beat the others (the opponent's, if there is one) with a mean probability
    above 1/2, and an answer that is even with them is neither good nor bad."""
    if threshold is not None:
        good = np.asarray(verdict.scores)[:, :k] > threshold
        return good, np.ones_like(good)
    p = answer_fields(verdict, k)["pref_opp"]
    return p > 0.5, p != 0.5


def with_labels(own: Rollouts, good: np.ndarray, known: np.ndarray, mismatched: bool) -> Rollouts:
    """Rows (NumPy) with their labels, of count 0 where that is not known; ``mismatched``: after each row one of role
    "kl", the previous prompt's answer to this prompt (KTO), which nobody has sampled: ``logp_beh`` is left out."""
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


# ---- protocols


def compared(
    own: Source = POLICY,
    opponent: Source | None = None,
    *,
    pairs: str | None = None,
    unasked: str = "best_worst",
    margin: float = 0.0,
    threshold: float | None = None,
    keeps: Mapping[str, Mapping[str, Any]] | None = None,
    choose: Callable[[Verdict, int, Array], tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None,
    count: Callable[[int], int] | None = None,
) -> Protocol:
    """K answers to each prompt by ``own``, as many by an ``opponent``; the judge compares them, and rules make rows.

    Args:
      pairs, margin: for objectives of pairs, as of `judged` (unasked: of ``pairs=None``); threshold: for those of
        labels. keeps: of the protocol.
      choose: (verdict, K, key) -> (i, j, there): other pairs. count: K -> pairs a prompt, of ``choose``.
    """
    rule = unasked if pairs is None else pairs
    choice("pairs", rule, RULES)

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        run, indices = gather.draw(run, gather.prompts)
        keys = jax.random.split(key, 3)
        columns = [sampled(run, gather, who, indices, k) for who, k in zip((own, opponent), keys, strict=False) if who]
        verdict, k = gather.judge(*columns), gather.responses
        gather.note("judge/score", float(verdict.scores[:, :k].mean()))
        if opponent:
            gather.note("judge/win", float(verdict.wins[:, :k, k:].mean()))
        chosen = None
        if gather.objective.unit.layout:
            i, j, there = choose(verdict, k, keys[2]) if choose else (*pick(rule, verdict, k, keys[2]), True)
            soft = gather.objective.asks.needs & SOFT
            chosen = (i, j, there & (i != j)) if soft else ordered(verdict, i, j, margin)
            chosen = (*chosen[:2], chosen[2] & there)
            gather.note("judge/kept", float(chosen[2].mean()))
        batch = arranged(gather.objective, columns[0], verdict, chosen)
        if "label" not in gather.objective.asks.needs:
            return run, batch
        good, known = labels(verdict, k, threshold)
        gather.note("judge/good", float(good[known].mean()) if known.any() else 0.0)
        gather.note("judge/kept", float(known.mean()))
        return run, with_labels(batch, good, known, form_of(gather.objective, k).mismatched)

    def rows(objective: Objective, responses: int) -> int:
        if objective.unit.layout not in ((), PAIR):
            raise ValueError(
                f"the objective learns from units {objective.unit.layout}, which a judge does not make of the policy's "
                "own answers: set config.data.name, and config.protocol.name to preference_data"
            )
        if threshold is not None and "label" not in objective.asks.needs:
            raise ValueError("config.protocol.label_threshold has no effect: the objective reads no labels")
        if opponent and not objective.asks.needs & OF_OPPONENTS:
            raise ValueError(
                "this protocol judges answers against those of an opponent, and the objective reads nothing of that "
                f"({', '.join(sorted(OF_OPPONENTS))}): set config.protocol.name to judged"
            )
        if not objective.unit.layout and (pairs is not None or margin):
            field = "margin" if pairs is None else "pairs"
            raise ValueError(f"config.protocol.{field} has no effect: the objective learns from single answers")
        if choose and not objective.unit.layout:
            raise ValueError("this protocol makes pairs, and the objective learns from single answers: choose judged")
        if not objective.unit.layout:
            return form_of(objective, responses).size * responses if "label" in objective.asks.needs else responses
        each = count(responses) if count else responses // 2 if rule == "adjacent" else 1
        return len(objective.unit.layout) * each

    def check(config: Any) -> None:
        least = 2 if opponent is None else 1
        if config.rollout.responses < least:
            raise ValueError(f"config.rollout.responses must be at least {least}: answers are compared with each other")

    facts = Facts(
        provides=JUDGED,
        rows=rows,
        references=keeps or {},
        compiles={"generate": int(opponent is not None or own.partner is not None), "score": 1},
        judges=True,
        check=check,
    )
    return Protocol(collect, facts=facts)


def sampled(run: Run, gather: Gatherer, who: Source, indices: np.ndarray, key: Array) -> Rollouts:
    """Answers (NumPy) of a source."""
    options = gather.sampling(run)
    if who.plain:
        options = options.replace(temperature=1.0, top_k=None, top_p=None, min_p=None)
    mixed = dict(partner=run.references[who.partner], share=who.share) if who.partner else {}
    return to_host(gather.generate(who.params(run), indices, key, options, **mixed))


@register("protocol", source="online DPO, arXiv:2402.04792; best against worst: arXiv:2310.05344")
def judged(
    pairs: str | None = None,
    margin: float = 0.0,
    label_threshold: float | None = None,
    prev_every: int | None = None,
    ref_every: int | None = None,
) -> Protocol:
    """K answers of the policy to each prompt, compared by ``config.judge``.

    Args:
      pairs: which answers become pairs: "best_worst" by score (None), "random" two, or "adjacent": the first and the
        second, the third and the fourth, ... Objectives that read pref_prob or win take them in this order, others
        the better one first, if the judge is not even.
      margin: pairs whose scores are at most so far apart do not count.
      label_threshold: for objectives of labels (KTO): answers of a score above it are good. None: those that beat the
        other answers to the prompt with a mean probability above 1/2; of even ones nothing is learned.
      prev_every, ref_every: as of `preference_data`.
    """
    return compared(pairs=pairs, margin=margin, threshold=label_threshold, keeps=rounds(prev_every, ref_every))


@register("protocol", source="IPO-MD, arXiv:2403.08635")
def ipo_md(beta: float = 0.125, pairs: str | None = None) -> Protocol:
    """Pairs of answers from the geometric mixture ``pi^(1 - beta) ref^beta``, token by token. pairs: None = random."""
    return compared(Source(partner="ref", share=share_in_unit("beta", beta)), pairs=pairs, unasked="random")


@register("protocol", source="Nash-MD-PG, arXiv:2312.00886")
def nash_md(mixture: float = 0.125) -> Protocol:
    """Answers of the policy against as many of the geometric mixture ``pi^(1 - mixture) ref^mixture``."""
    return compared(opponent=Source(partner="ref", share=share_in_unit("mixture", mixture)))


@register("protocol", source="Nash-EMA-PG, arXiv:2312.00886")
def nash_ema(b: float = 0.999) -> Protocol:
    """Answers of the policy against as many of ``theta_bar <- (1 - b) theta + b theta_bar``."""
    keeps = {"ema": {"b": share_in_unit("b", b)}}
    return compared(opponent=Source(lambda run: run.references["ema"]), keeps=keeps)


@register("sampler", id="rso_sampler", source="RSO, arXiv:2309.06657")
def rso_sampler(scores: np.ndarray, key: Array, beta: float = 0.5, n: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Places [G, n] of candidates of scores [G, C] that rejection sampling accepts, in the order of acceptance, and
    whether there is one (`jaxpo.primitives.preference_data.rejection_sample`)."""
    c = scores.shape[1]
    draws = jax.random.uniform(key, (len(scores), n * c))
    accept = jax.vmap(lambda reward, u: rules.rejection_sample(reward, u, beta=beta, n=n)[0])
    places = np.asarray(accept(np.asarray(scores, np.float32), draws))
    return np.maximum(places, 0), places >= 0


@register("protocol", source="RSO, arXiv:2309.06657")
def rso(beta: float = 0.5, n: int = 8) -> Protocol:
    """Of the K = ``config.rollout.responses`` answers of the policy to a prompt (64 in the paper) rejection sampling
    accepts ``n``, as if they came from the policy tilted by ``exp(score/beta)``; they make n/2 disjoint pairs.

    Args:
      beta: of the sampling; the loss has its own.
    """
    if not isinstance(n, int) or n < 2 or n % 2:
        raise ValueError(f"n must be an even number of at least 2, not {n!r}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta!r}")

    def choose(verdict: Verdict, k: int, key: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        places, there = rso_sampler(verdict.scores[:, :k], key, beta, n)
        return places[:, ::2], places[:, 1::2], there[:, ::2] & there[:, 1::2]

    protocol = compared(choose=choose, count=lambda responses: n // 2)

    def check(config: Any) -> None:
        if config.rollout.responses < n:
            raise ValueError(f"config.rollout.responses {config.rollout.responses} are the candidates for n = {n}")

    return protocol.where(check=check)
