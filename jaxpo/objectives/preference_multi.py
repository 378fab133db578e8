"""Alignment from more than one pair of answers: rationales, in-context revisions, expert edits, samples with scores."""

from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from jaxpo.arguments import NONZERO, NonNegative, Positive, Share, Whole, other_than, when
from jaxpo.batch import Rollouts, TokenStats
from jaxpo.fields import EDITS, PAIR
from jaxpo.objectives.grammar.base import Gathering, Objective, State, Term, Unit, asks_of, from_terms, is_off
from jaxpo.objectives.grammar.units import Units, log_ratios, nll_term, preference, unit_objective, unit_term
from jaxpo.objectives.preference import log_odds_ratio
from jaxpo.primitives import aggregation, grouping, preferences
from jaxpo.primitives.numerics import promote, ratio_or_zero
from jaxpo.registry import register

REVISIONS = ("chosen_given_rejected", "rejected_given_chosen", "chosen_given_chosen", "rejected_given_rejected")


@register(source="SRPO, arXiv:2406.01660 (derived from its min-max objective; weights and scale are assumed)")
def srpo(beta: NonNegative = 0.01, alpha: Share = 0.5, soft: bool = False) -> Objective:
    """Self-Improving Robust Preference Optimization: ``(1 - alpha) joint + alpha improver`` with ``D(a|b)`` the
    log-ratio of answer a when the prompt holds the draft b, ``t = 2 p - 1``:

    joint = ``1/4 (t - beta (D(w|l) - D(l|w) + D_w - D_l))^2``, improver = ``1/2 (t/2 - beta (D(w|l) - D(l|l)))^2 + 1/2
    (t/2 - beta (D(w|w) - D(l|w)))^2``, means over pairs. Reconstructed from the paper's text: alpha and beta are
    assumed.

    Shapes: logp, logp_ref [B, T], rows in units of chosen, rejected, chosen_given_rejected, rejected_given_chosen,
      chosen_given_chosen, rejected_given_rejected; pref_prob [B] if soft.

    Args:
      soft: p is pref_prob of the unit's first row; otherwise 1."""

    def target(units: Units) -> Array | float:
        return 2 * units.get("pref_prob") - 1 if soft else 1.0

    def joint(units: Units, state: State) -> Array:
        w_l, l_w = (units.log_ratio(role) for role in REVISIONS[:2])
        gap = units.log_ratio("chosen") - units.log_ratio("rejected")
        return preferences.squared(beta * (w_l - l_w + gap), target(units)) / 4

    def improver(units: Units, state: State) -> Array:
        w_l, l_w, w_w, l_l = (units.log_ratio(role) for role in REVISIONS)
        return sum(preferences.squared(beta * gap, target(units) / 2) for gap in (w_l - l_l, w_w - l_w)) / 2

    return unit_objective(
        [unit_term("joint", joint, coef=1 - alpha), unit_term("improver", improver, coef=alpha)],
        margin=lambda units: beta * (units.log_ratio("chosen") - units.log_ratio("rejected")),
        layout=(*PAIR, *REVISIONS),
        asks=asks_of("logp_ref", *(("pref_prob",) if soft else ())),
    )


@register(source="SePPO, arXiv:2410.05255 (for diffusion; its form for language models is ours)")
def seppo(beta: NonNegative = 0.1, flip: bool = True) -> Objective:
    """Semi-Policy Preference Optimization: ``-log sig(beta (D_w - sign D_s))``, a mean over pairs of an answer w that
    is known to be good and a sample s of an earlier checkpoint, which is the reference; ``sign = -1`` where
    ``D_w < 0``: there the checkpoint explains the good answer better, and its sample counts as another winner.

    Shapes: logp, logp_ref [B, T], rows in pairs chosen (w), rejected (s).

    Args:
      flip: False: sign = 1 always, which is DPO. beta: assumed."""

    def margin(units: Units) -> Array:
        w, s = (units.log_ratio(role) for role in PAIR)
        sign = jnp.where(lax.stop_gradient(w) < 0, -1.0, 1.0) if flip else 1.0
        return beta * (w - sign * s)

    value = unit_term("preference", lambda units, state: preferences.logistic(margin(units)))
    return unit_objective([value], margin=margin, asks=asks_of("logp_ref"), protocol=Gathering("seppo"))


@register(source="RDPO, arXiv:2407.14477; reds-lab/preference-learning-with-rationales")
def rationale_dpo(
    beta: NonNegative = 0.1, gamma: NonNegative = 0.001, term: Literal["logsigmoid", "nll"] = "logsigmoid"
) -> Objective:
    """DPO with rationales: ``-log sig(beta (D_w - D_l)) - log sig(gamma logp_rat)``, a mean over pairs; the rationale
    says why w is preferred, its prompt holds both answers.

    Shapes: logp, logp_ref [B, T], rows in units of chosen, rejected, rationale.

    Args:
      gamma: the published command's. term: "logsigmoid" (as released; at small gamma half the weight of the other), or
        "nll": ``-gamma logp_rat``."""

    def rationale(units: Units, state: State) -> Array:
        z = gamma * units.logp("rationale")
        return preferences.logistic(z) if term == "logsigmoid" else -z

    return preference(
        lambda z, units: preferences.logistic(z),
        beta=beta,
        layout=(*PAIR, "rationale"),
        terms=[unit_term("rationale", rationale)],
    )


@register(source="RORPO, arXiv:2407.14477; reds-lab/preference-learning-with-rationales")
def rationale_orpo(lam: NonNegative = 0.1, gamma: NonNegative = 1.0) -> Objective:
    """ORPO with rationales: the loss of `orpo` ``- gamma logp_rat/len_rat``, a mean over pairs.

    Shapes: logp [B, T], rows in units of chosen, rejected, rationale."""

    def rationale(units: Units, state: State) -> Array:
        return -units.logp("rationale") / units.length("rationale")

    return unit_objective(
        [
            nll_term(),
            unit_term("odds_ratio", lambda units, state: preferences.logistic(log_odds_ratio(units)), coef=lam),
            unit_term("rationale", rationale, coef=gamma),
        ],
        margin=log_odds_ratio,
        layout=(*PAIR, "rationale"),
    )


def token_ratios(units: Units, role: str, weight: str = "", of: str = "") -> tuple[Array, Array]:
    """``logp - logp_ref`` [N, T] of the tokens of a role, times a field of the batch at the rows of a role (its own by
    default), and where those tokens are."""
    d, mask = (units.of(x, role) for x in (log_ratios(units.stats, units.batch, "ref"), units.batch.mask > 0))
    if weight:
        at = of or role
        d = d * jnp.where(units.of(units.batch.mask > 0, at), units.get(weight, at), 0)
    return d, mask


EDITED = (*EDITS, "truth_corrupted", "revised_corrupted")


OPA_WHEN = {
    "c_ctx": (when(c_g=NONZERO), when(c_v=NONZERO)),
    "a": when(c_a=NONZERO),
    "rev_anchor_sign": when(c_a=NONZERO),
}


@register(source="OPA-DPO, arXiv:2501.09695; zhyang2226/OPA-DPO", when=OPA_WHEN)
def opa_dpo(
    beta: NonNegative = 0.1,
    c_g: NonNegative = 1.0,
    c_v: NonNegative = 1.0,
    c_ctx: NonNegative = 0.2,
    c_a: NonNegative = 1.0,
    a: float = 0.0,
    granularity: Literal["sequence", "position"] = "sequence",
    rev_anchor_sign: Literal[1, -1] = 1,
) -> Objective:
    """On-Policy Alignment DPO: ``c_g L(g, o) + c_v L(sev v, sev o) + c_ctx (c_g L(g, gc) + c_v L(rel v, rel vc)) + c_a
    anchors``, ``L(x, y) = -log sig(beta (S_x - S_y))``, ``S`` the (weighted) sum of ``logp -
    logp_ref``, of the ground truth g, the expert's revision v, the model's own answer o, and of g and v in a corrupted
    context; anchors ``-2 log sig(beta S_g - a) - 2 log sig(beta S_v - a)``. Means over units.

    Shapes: logp, logp_ref [B, T], rows in units of truth, revised, original, truth_corrupted, revised_corrupted;
      severity [B, T] (weights of the tokens of v and o), relevance [B, T] (of v).

    Args:
      granularity: "position": every log-sigmoid token by token, a mean over the positions below the longer answer.
      rev_anchor_sign: -1: the revision's anchor pushes down. "position" and -1 are the released trainer."""

    def loss(x: Array, mask: Array, shift: float | Array = 0.0, sign: int = 1) -> Array:
        if granularity == "sequence":
            return preferences.logistic(sign * (beta * x.sum(-1) - shift))
        each = jnp.where(mask, preferences.logistic(sign * (beta * x - shift)), 0)
        return ratio_or_zero(each.sum(-1), promote(mask).sum(-1))

    def against(one: tuple[Array, Array], other: tuple[Array, Array]) -> Array:
        return loss(one[0] - other[0], one[1] | other[1])

    def anchors(units: Units, state: State) -> Array:
        truth, revised = (token_ratios(units, role) for role in EDITS[:2])
        return 2 * (loss(*truth, a) + loss(*revised, a, rev_anchor_sign))

    def pair(name: str, one: str, other: str, coef: float | Array, weight: str = "", of: str = "") -> Term:
        def value(units: Units, state: State) -> Array:
            return against(token_ratios(units, one, weight), token_ratios(units, other, weight, of))

        return unit_term(name, value, coef=coef)

    terms = [
        pair("truth", "truth", "original", c_g),
        pair("revised", "revised", "original", c_v, "severity"),
        pair("truth_context", "truth", "truth_corrupted", c_ctx * c_g),
        pair("revised_context", "revised", "revised_corrupted", c_ctx * c_v, "relevance", of="revised"),
        unit_term("anchor", anchors, coef=c_a),
    ]
    weights = [] if is_off(c_v) else ["severity"] if is_off(c_ctx) else ["severity", "relevance"]
    return unit_objective(
        terms,
        margin=lambda units: beta * (units.log_ratio("truth") - units.log_ratio("original")),
        layout=EDITED,
        asks=asks_of("logp_ref", *weights),
    )


@register(source="CoPG, arXiv:2406.19185")
def copg(beta: Positive = 0.1) -> Objective:
    """Contrastive Policy Gradient: ``1/(K-1) sum_{i<j} ((beta/2) (d_i - d_j)^2 - (r_i - r_j)(d_i - d_j))`` over the K
    scored responses to a prompt, from any source, ``d = sum_t (logp - logp_ref)``; a mean over prompts (one of a single
    response gives 0).

    Shapes: logp, logp_ref [B, T], reward, group [B].

    Args:
      beta: 0.01 to 0.1 (assumed)."""

    def value(stats: TokenStats, b: Rollouts, state: State) -> Array:
        d, r = log_ratios(stats, b, "ref").sum(-1), promote(b.reward)
        means = [grouping.group_mean(x, b.group, b.count) for x in (d, r)]
        return preferences.contrastive_share(d, r, *means, grouping.group_size(b.group, b.count), beta)

    def one_group(batch: Rollouts, state: State) -> Array:
        return ratio_or_zero(jnp.ones_like(promote(batch.count)), grouping.group_size(batch.group, batch.count))

    return from_terms(
        [Term("preference", value, aggregation.unit_mean, rows=one_group, per="row")],
        asks=asks_of("logp_ref", "reward", "group"),
        unit=Unit(coupling="group"),
    )


HYPO_WHEN = {"rloo": when(k=other_than(1), lam=NONZERO)}


@register(source="HyPO, arXiv:2406.01462 (reconstructed from the paper's text)", when=HYPO_WHEN)
def hypo(beta: NonNegative = 0.1, lam: NonNegative = 1e-4, k: Whole = 2, rloo: bool = True) -> Objective:
    """Hybrid Preference Optimization: DPO on offline pairs ``+ lam mean_b sg(D_b - base_b) logp_b`` over k fresh
    samples of each prompt, whose expected gradient is that of KL(pi || ref). Reconstructed from the paper's text: lam,
    beta and k are assumed.

    Shapes: logp, logp_ref [B, T], rows in units of chosen, rejected and k times own (samples of the current policy).

    Args:
      rloo: base is the mean D of the prompt's other samples (0 for k = 1); False: 0."""

    def kl(units: Units, state: State) -> Array:
        drift = units.batch.unit(log_ratios(units.stats, units.batch, "ref").sum(-1))[:, 2:]
        base = preferences.leave_one_out_mean(drift) if rloo else 0
        logp = units.batch.unit(units.stats.logp.sum(-1))[:, 2:]
        return (lax.stop_gradient(drift - base) * logp).mean(-1)

    return preference(
        lambda z, units: preferences.logistic(z),
        beta=beta,
        layout=(*PAIR, *["own"] * k),
        terms=[unit_term("kl", kl, coef=lam)],
    )


@register(source="MAPL, arXiv:2505.12845 (reconstructed from the paper's text)", when={"beta": when(form="dpo")})
def mapl(
    a: NonNegative = 1.0, b: NonNegative = 1.0, form: Literal["rm", "dpo"] = "rm", beta: NonNegative = 0.1
) -> Objective:
    """Multi-level Aware Preference Learning: ``-log sig(s_w - s_l) - a log sig(s(x_w, y) - s(x_l, y)) - b log
    sig((s_multi_w - s_multi_l) - (s_w - s_l))``, a mean over units: of one answer y the prompt that it satisfies is
    preferred, and instructions that only w meets must widen the gap. Reconstructed from the paper's text: the third
    term, a and b are assumed.

    Shapes: score [B], or logp, logp_ref [B, T]; rows in units of chosen, rejected, matching (y after x_w), violating (y
      after x_l), multi_chosen, multi_rejected.

    Args:
      form: "rm": s is the score head; "dpo": ``s = beta sum_t (logp - logp_ref)``."""

    def gap(units: Units, one: str, other: str) -> Array:
        if form == "rm":
            return units.score(one) - units.score(other)
        return beta * (units.log_ratio(one) - units.log_ratio(other))

    def inter(units: Units, state: State) -> Array:
        return preferences.logistic(gap(units, "multi_chosen", "multi_rejected") - gap(units, *PAIR))

    return unit_objective(
        [
            unit_term("preference", lambda units, state: preferences.logistic(gap(units, *PAIR))),
            unit_term("intra", lambda u, state: preferences.logistic(gap(u, "matching", "violating")), coef=a),
            unit_term("inter", inter, coef=b),
        ],
        margin=lambda units: gap(units, *PAIR),
        layout=(*PAIR, "matching", "violating", "multi_chosen", "multi_rejected"),
        asks=asks_of("logp_ref") if form == "dpo" else asks_of(wants=("score",)),
    )
