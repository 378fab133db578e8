"""Nash learning: losses whose fixed point is the equilibrium ``pi* ~ ref exp(P(. beats pi*) / tau)``, from samples of
the policy and judged preferences. Who samples the opponent is the protocol's business, not the loss's."""

from collections.abc import Callable
from typing import Literal

from jax import Array, lax

from jaxpo.arguments import NonNegative, Positive, Share, when
from jaxpo.batch import Rollouts, TokenStats
from jaxpo.objectives.grammar.base import NOTHING, Asks, Gathering, Objective, State, Term, asks_of, from_terms
from jaxpo.objectives.grammar.units import Units, log_ratios, preference
from jaxpo.objectives.preference import regression
from jaxpo.primitives import aggregation, preferences
from jaxpo.primitives.numerics import promote
from jaxpo.registry import register


@register(source="Online IPO, arXiv:2403.08635; zhourunlong/EGPO")
def online_ipo(tau: Positive = 1.0, form: Literal["square", "expanded"] = "square") -> Objective:
    """Self-play IPO with soft labels: ``p (h - 1/(2 tau))^2 + (1 - p) (h + 1/(2 tau))^2``, ``h = D_w - D_l``, a mean
    over pairs of unordered samples of the policy.

    Shapes: logp, logp_ref [B, T], rows in pairs chosen (y), rejected (y'); pref_prob [B] in [0, 1], P(y beats y') on
      the pair's first row.

    Args:
      form: "expanded", as the paper implements it: ``p (-h0 + tau h^2) + (1 - p) (h0 + tau h^2)``, tau times the
        gradient, h0 = logp_w - logp_l."""
    return soft_ipo(tau, form, Gathering("judged", {"pairs": "random"}))


def soft_ipo(tau: float, form: str, protocol: Gathering) -> Objective:
    """The loss of `online_ipo`, with data from any protocol."""

    def link(h: Array, units: Units) -> Array:
        p = units.get("pref_prob")
        if form == "square":
            return preferences.soft_squared(h, p, tau)
        return preferences.soft_expanded(h, units.logp("chosen") - units.logp("rejected"), p, tau)

    return preference(link, asks=asks_of("pref_prob"), protocol=protocol)._replace(beta=tau)


@register(source="IPO-MD, arXiv:2403.08635")
def ipo_md(tau: Positive = 1.0, beta: Share = 0.125) -> Objective:
    """IPO with mirror-descent sampling: the expanded loss of `online_ipo`, of the policy's own log-probs of pairs that
    were sampled from the geometric mixture with the reference (`jaxpo.primitives.preferences.geometric_mixture`).

    Shapes: as of `online_ipo`; logp [B, T].

    Args:
      beta: the reference's exponent in the mixture, of the protocol."""
    return soft_ipo(tau, "expanded", Gathering("ipo_md", {"beta": beta}))


Level = Literal["sequence", "token"]
OfRows = Callable[[TokenStats, Rollouts], Array]  # [B]


def against_opponent(
    protocol: Gathering, *, pull: OfRows | None = None, penalty: OfRows | None = None, asks: Asks = NOTHING
) -> Objective:
    """``-mean_b sg(pref_opp - 1/2 - pull) sum_t logp + mean_b penalty``: the policy gradient of winning against an
    opponent; only the policy's own samples get a gradient.

    Args:
      protocol: samples the opponent. pull, penalty: (stats, batch) -> [B], 0 by default."""

    def value(stats: TokenStats, batch: Rollouts, state: State) -> Array:
        gain = promote(batch.get("pref_opp")) - 0.5
        gain = gain - pull(stats, batch) if pull else gain
        loss = -lax.stop_gradient(gain) * stats.logp.sum(-1)
        return loss + penalty(stats, batch) if penalty else loss

    term = Term("policy", value, aggregation.unit_mean, per="row")
    return from_terms([term], asks=asks.merged(asks_of("pref_opp", "logp_ref")), protocol=protocol)


@register(source="Nash-MD-PG, arXiv:2312.00886; TRL NashMDTrainer")
def nash_md(tau: NonNegative = 0.008, kl: Level = "sequence", mixture: Share = 0.125) -> Objective:
    """Policy gradient against the geometric mixture of policy and reference: ``-sg(pref_opp - 1/2 - tau D) sum_t
    logp``, ``D = sum_t (logp - logp_ref)``, a mean over responses y; the opponent's y' gets no gradient.

    Shapes: logp, logp_ref [B, T], pref_opp [B] = P(y beats its opponent's y') in [0, 1].

    Args:
      kl: "token" (TRL): ``-(pref_opp - 1/2) sum_t logp + tau sum_t sg(logp - logp_ref) logp``.
      mixture: the reference's exponent in the mixture, of the protocol."""
    return self_play(tau, kl, Gathering("nash_md", {"mixture": mixture}))


def self_play(tau: float, kl: Level, protocol: Gathering) -> Objective:
    """The loss of `nash_md`, whoever the opponent is."""
    if kl == "sequence":
        return against_opponent(protocol, pull=lambda stats, batch: tau * log_ratios(stats, batch, "ref").sum(-1))

    def penalty(stats: TokenStats, batch: Rollouts) -> Array:
        return tau * (lax.stop_gradient(log_ratios(stats, batch, "ref")) * stats.logp).sum(-1)

    return against_opponent(protocol, penalty=penalty)


@register(source="Nash-EMA-PG, arXiv:2312.00886")
def nash_ema(tau: NonNegative = 0.008, kl: Level = "sequence", b: Share = 0.999) -> Objective:
    """The loss of `nash_md` against samples of an average of past weights, ``theta_bar <- (1 - b) theta + b
    theta_bar``.

    Shapes: as of `nash_md`; logp, logp_ref [B, T], pref_opp [B].

    Args:
      b: of the average, of the protocol; it moves after every optimizer step."""
    return self_play(tau, kl, Gathering("nash_ema", {"b": b}))


@register(source="Nash Mirror Prox, arXiv:2505.19731 (the practical loop is reconstructed from the paper's text)")
def nash_mp(beta: Positive = 0.1, eta: Positive | None = None) -> Objective:
    """A step within a proximal stage of Nash Mirror Prox: ``-sg(pref_opp - 1/2 - beta D - (beta/eta) E) sum_t logp``,
    ``D`` against the reference, ``E`` against the stage's center, a mean over responses of the current policy.

    Shapes: logp, logp_ref, logp_old (the center's) [B, T], pref_opp [B] against the stage's opponent: the center in the
      first stage, the half-step policy in the second.

    Args:
      beta: strength of the reference (assumed). eta: step of the prox; 2 beta by default."""
    eta = 2 * beta if eta is None else eta

    def pull(stats: TokenStats, batch: Rollouts) -> Array:
        center = (stats.logp - batch.logp_old).sum(-1)
        return beta * log_ratios(stats, batch, "ref").sum(-1) + beta / eta * center

    return against_opponent(Gathering("nash_mp"), pull=pull, asks=asks_of("logp_old"))


@register(source="EGPO, arXiv:2503.08942; zhourunlong/EGPO")
def egpo(beta: Positive = 0.1, normalize: bool = True) -> Objective:
    """Extragradient Preference Optimization: ``(u - (win_w - win_l)/beta)^2``, ``u = D_w/len_w - D_l/len_l``, a mean
    over pairs (y, y') from a broad sampler, judged against a third sample y'' of the opponent.

    Shapes: logp, logp_ref [B, T], rows in pairs chosen (y), rejected (y'); win [B] = P(answer beats y'') in [0, 1].

    Args:
      normalize: False: ``u = D_w - D_l``, as in the theory."""

    def link(u: Array, units: Units) -> Array:
        return preferences.squared(u, (units.get("win", "chosen") - units.get("win", "rejected")) / beta)

    objective = preference(link, normalize_length=normalize, asks=asks_of("win"), protocol=Gathering("egpo"))
    return objective if normalize else objective._replace(beta=beta)


@register(source="INPO, arXiv:2407.00617")
def inpo(eta: Positive = 0.0075, tau: Positive = 0.0025) -> Objective:
    """Iterative Nash Policy Optimization: ``(H - 1/(2 eta))^2``, ``H = (logp_w - logp_l) - (tau/eta)(ref_w - ref_l) -
    (1 - tau/eta)(prev_w - prev_l)``, a mean over pairs; IPO anchored between the reference and the previous iterate.

    Shapes: logp, logp_ref, logp_prev [B, T], rows in pairs chosen, rejected.

    Args:
      eta: assumed. tau: tau/eta is 1/3; 0 < tau <= eta."""
    if isinstance(eta, int | float) and isinstance(tau, int | float) and tau > eta:
        raise ValueError(f"tau must be at most eta = {eta:g}, not {tau:g}")
    share = tau / eta
    return preference(
        lambda h, units: preferences.squared(h, 1 / (2 * eta)), reference={"ref": share, "prev": 1 - share}
    )


@register(source="DNO, arXiv:2404.03715", when={"scale": when(variant="soft")})
def dno(eta: Positive = 0.1, variant: Literal["soft", "prct"] = "soft", scale: Positive = 1.0) -> Objective:
    """Direct Nash Optimization: ``-t log sig(z) - (1 - t) log sig(-z)``, ``z = c eta ((logp - logp_prev)_w - (logp -
    logp_prev)_l)``, ``t = sig(c (win_w - win_l))``, a mean over pairs; c is ``scale``.

    Shapes: logp, logp_prev [B, T], rows in pairs chosen, rejected; win [B] in [0, 1], the rate against the previous
      iterate ("soft").

    Args:
      eta: assumed. variant: "prct": t = 1 and no win rates: DPO against the previous iterate.
      scale: sharpens the targets and scales z with them, so that the minimizer stays where it is."""
    if variant == "prct":
        return preference(lambda z, units: preferences.logistic(z), beta=eta, reference="prev")

    def link(z: Array, units: Units) -> Array:
        gap = units.get("win", "chosen") - units.get("win", "rejected")
        return preferences.soft_logistic(scale * z, scale * gap)

    return preference(link, beta=eta, reference="prev", asks=asks_of("win"))


@register(source="GPO, arXiv:2410.02197; general-preference/general-preference-model")
def gpo(beta: Positive = 0.001) -> Objective:
    """General Preference Optimization: ``1/2 (logp_w - prev_w - score_w/beta)^2`` and the same of l, a mean over pairs;
    the score of an answer is its mean preference score over the K samples of the previous iterate, divided by the
    preference model's tau.

    Shapes: logp, logp_prev [B, T], rows in pairs chosen, rejected (best and worst by score); pref_score [B]."""
    return regression(
        lambda units, role: units.get("pref_score", role) / beta, reference="prev", asks=asks_of("pref_score")
    )
