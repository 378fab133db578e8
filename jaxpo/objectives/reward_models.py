"""Reward and preference models: losses of scalar scores, of embeddings, of reactions and of traces of tool calls."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxpo.arguments import NONZERO, NonNegative, Positive, when
from jaxpo.batch import Rollouts, TokenStats
from jaxpo.fields import PAIR
from jaxpo.metrics import Mean, Metrics
from jaxpo.objectives.grammar.base import Asks, Hooks, Objective, State, Term, Unit, asks_of, from_terms
from jaxpo.objectives.grammar.units import Units, unit_term
from jaxpo.primitives import aggregation, preferences, shaping
from jaxpo.primitives.numerics import promote
from jaxpo.registry import register


def ranker(terms: Sequence[Term], margin: Callable[[Units], Array], asks: Asks) -> Objective:
    """`from_terms` over pairs with the share of pairs that the model orders as labelled, and its mean margin [N]."""

    def report(stats: TokenStats, batch: Rollouts, state: State) -> Metrics:
        z, count = margin(Units(stats, batch)), batch.unit(promote(batch.count))[:, 0]
        return {"preference/accuracy": Mean.of(z > 0, count), "preference/margin": Mean.of(z, count)}

    return from_terms(terms, asks=asks, hooks=Hooks(metrics=report), unit=Unit(PAIR))


def score_gap(units: Units) -> Array:
    """[N] score of the chosen answer minus that of the rejected one."""
    return units.score("chosen") - units.score("rejected")


@register(source="Bradley-Terry; InstructGPT, arXiv:2203.02155; margin: arXiv:2307.09288; centring: arXiv:2312.09244")
def bradley_terry_rm(margin: float = 0.0, c: NonNegative = 0.0, margins: bool = False) -> Objective:
    """Bradley-Terry reward model: ``-log sig(rm_w - rm_l - margin) + c (rm_w + rm_l)^2``, means over pairs.

    Shapes: score [B], rows in pairs chosen, rejected; margin [B] if margins.

    Args:
      margin: of all pairs. c: keeps scores around 0 (0.01); without it they mean nothing across prompts.
      margins: each pair has a margin of its own besides, on its first row."""

    def rank(units: Units, state: State) -> Array:
        own = units.get("margin") if margins else 0
        return preferences.logistic(score_gap(units) - margin - own)

    def center(units: Units, state: State) -> Array:
        return jnp.square(units.score("chosen") + units.score("rejected"))

    return ranker(
        [unit_term("preference", rank), unit_term("center", center, coef=c)],
        score_gap,
        asks_of(*(("margin",) if margins else ()), wants=("score",)),
    )


@register(source="GPM, arXiv:2410.02197; general-preference/general-preference-model")
def gpm_rm(tau: Positive = 0.1, gate: bool = True, normalize: bool = True) -> Objective:
    """General preference model: ``-log sig(s/tau)``, ``s = sum_l lambda_l (v_{2l} u_{2l+1} - v_{2l+1} u_{2l})`` of the
    embeddings v of the chosen and u of the rejected answer, ``lambda = k softmax(gate)``, a mean over pairs.

    Shapes: embed [B, 2k], gate [B, k] (of the prompt); rows in pairs chosen, rejected.

    Args:
      gate: False: lambda = 1. normalize: embeddings of unit length."""

    def score(v: Array, u: Array, logits: Array | None) -> Array:
        v, u = (preferences.unit_length(x) if normalize else x for x in (v, u))
        k = v.shape[-1] // 2
        return preferences.skew_score(v, u, k * jax.nn.softmax(logits) if gate else jnp.ones(k))

    def of_pairs(units: Units) -> Array:
        v, u = (units.of(units.stats.embed, role) for role in PAIR)
        return score(v, u, units.of(units.stats.gate, "chosen") if gate else None)

    def log_odds(stats: TokenStats) -> Array:
        v = stats.embed
        return score(v[:, None], v[None], stats.gate[:, None] if gate else None) / tau

    objective = ranker(
        [unit_term("preference", lambda units, state: preferences.logistic(of_pairs(units) / tau))],
        of_pairs,
        asks_of(wants=("embed", "gate") if gate else ("embed",)),
    )
    return objective._replace(log_odds=log_odds)


THEMIS_WHEN = {
    **dict.fromkeys(("rm_coef", "observation", "rationale"), when(form="released")),
    **dict.fromkeys(("alpha", "omega"), when(form="paper")),
    "beta": when(form="paper", alpha=NONZERO),
}


@register(source="Themis, arXiv:2310.01045; ernie-research/Tool-Augmented-Reward-Model", when=THEMIS_WHEN)
def themis(
    form: Literal["released", "paper"] = "released",
    rm_coef: NonNegative = 0.5,
    observation: bool = True,
    rationale: bool = True,
    alpha: NonNegative = 1.0,
    beta: NonNegative = 1.0,
    omega: NonNegative = 1.0,
) -> Objective:
    """Tool-augmented reward model: the language-model loss of a trace of tool calls and ``rm_coef`` times
    ``-log sig(rm_w - rm_l)`` after it.

    Shapes: logp, segment [B, T] (0 question or answer, 1 tool call, 2 observation, 3 rationale), score [B]; rows in
      pairs chosen, rejected.

    Args:
      form: "released": one mean over all trained tokens of both rows, plus rm_coef times the ranking loss; "paper":
        ranking loss ``+ alpha (NLL_tool + beta NLL_observation) + omega NLL_rationale``, a mean each (coefficients
        assumed).
      observation, rationale: whether those tokens are trained ("released"). alpha, beta, omega: of "paper"."""
    released = form == "released"

    def nll(name: str, kinds: tuple[int, ...], coef: float | Array) -> Term:
        def tokens(batch: Rollouts, state: State) -> Array:
            return promote(jnp.isin(batch.get("segment"), jnp.asarray(kinds)))

        return Term(name, lambda stats, batch, state: -stats.logp, tokens=tokens, coef=coef)

    if released:
        lm = [nll("lm", (1, *[2] * observation, *[3] * rationale), 1.0)]
    else:
        lm = [nll("tool", (1,), alpha), nll("observation", (2,), alpha * beta), nll("rationale", (3,), omega)]
    rank = unit_term(
        "preference", lambda units, state: preferences.logistic(score_gap(units)), coef=rm_coef if released else 1.0
    )
    return ranker([*lm, rank], score_gap, asks_of("segment", wants=("score",)))


@register(source="RLUF, arXiv:2505.14946 (reconstructed from the paper's text)")
def rluf() -> Objective:
    """P[Love]: ``-y log sig(s) - (1 - y) log sig(-s)`` of a binary reaction y, a mean over single responses; the
    reward of the same name mixes the model into others. Reconstructed from the paper's text.

    Shapes: score [B], label [B] (1 = loved)."""

    def value(stats: TokenStats, batch: Rollouts, state: State) -> Array:
        return preferences.binary_cross_entropy(stats.score, promote(batch.get("label")))

    def report(stats: TokenStats, batch: Rollouts, state: State) -> Metrics:
        right = (stats.score > 0) == (batch.get("label") > 0)
        return {"preference/accuracy": Mean.of(right, promote(batch.count))}

    term = Term("reaction", value, aggregation.unit_mean, per="row")
    return from_terms([term], asks=asks_of("label", wants=("score",)), hooks=Hooks(metrics=report))


@register(source="PRO, arXiv:2511.10656")
def preference_orchestrator(T: Positive = 1.0, normalize: bool = True) -> Objective:  # noqa: N803 (the card's name)
    """The adapter of Preference Orchestrator: ``KL(softmax(rm_scores/T) || softmax(gate))`` (direction assumed), a mean
    over preferred responses; the gate reads the prompt alone, so it learns which rewards matter for which prompt.

    Shapes: gate [B, M], rm_scores [B, M] (of the preferred response under M reward models).

    Args:
      T: temperature (assumed). normalize: scores to mean 0 and standard deviation 1 over the batch, model by model
        (assumed)."""

    def prepare(batch: Rollouts, state: State) -> tuple[Rollouts, State]:
        scores = promote(batch.get("rm_scores"))
        scores = shaping.standardized(scores, batch.count) if normalize else scores
        return batch.with_row(importance=jax.nn.softmax(scores / T)), state

    def value(stats: TokenStats, batch: Rollouts, state: State) -> Array:
        return preferences.categorical_kl(batch.get("importance"), stats.gate)

    term = Term("adapter", value, aggregation.unit_mean, per="row")
    return from_terms([term], asks=asks_of("rm_scores", wants=("gate",)), hooks=Hooks(prepare=prepare))
