"""Direct alignment: losses of pairs (chosen, rejected) and of labelled answers, on the policy's own log-probs."""

from collections.abc import Callable
from typing import Annotated, Literal

import jax.numpy as jnp
from jax import Array

from jaxpo.arguments import NONZERO, Domain, NonNegative, Positive, ShareBelowOne, Threshold, when
from jaxpo.batch import Rollouts, TokenStats
from jaxpo.fields import PAIR, role_id
from jaxpo.metrics import Mean, Metrics
from jaxpo.objectives.grammar.base import NOTHING, Asks, Gathering, Hooks, Objective, State, Term, asks_of, from_terms
from jaxpo.objectives.grammar.units import Units, log_ratios, nll_term, preference, unit_objective, unit_term
from jaxpo.primitives import aggregation, preference_data, preferences
from jaxpo.primitives.numerics import promote, ratio_or_zero
from jaxpo.registry import register

FlipRate = Annotated[float, Domain(0, 0.5, "[)")]


@register(source="DPO, arXiv:2305.18290, eq. 7; smoothing: cDPO, note by E. Mitchell, 2023; TRL DPOTrainer")
def dpo(beta: NonNegative = 0.1, eps: ShareBelowOne = 0.0, reference_free: bool = False) -> Objective:
    """Direct Preference Optimization: ``-(1 - eps) log sig(z) - eps log sig(-z)``, ``z = beta (D_w - D_l)``,
    ``D = sum_t (logp - logp_ref)``, a mean over pairs.

    Shapes: logp, logp_ref [B, T], rows in pairs chosen, rejected.

    Args:
      eps: label smoothing (cDPO: 0.05 to 0.2). reference_free: D = sum_t logp."""
    reference = None if reference_free else "ref"
    return preference(lambda z, units: preferences.logistic(z, eps), beta=beta, reference=reference)


@register(source="IPO, arXiv:2310.12036, eq. 17; TRL ipo")
def ipo(tau: Positive = 0.1, normalize: bool = True) -> Objective:
    """Identity Preference Optimization: ``(u - 1/(2 tau))^2``, ``u = D_w/len_w - D_l/len_l``, a mean over pairs.

    Shapes: logp, logp_ref [B, T], rows in pairs chosen, rejected.

    Args:
      normalize: False: ``u = D_w - D_l``, as the paper's equation reads; True is what its results were made with."""
    objective = preference(lambda u, units: preferences.squared(u, 1 / (2 * tau)), normalize_length=normalize)
    return objective if normalize else objective._replace(beta=tau)


@register(source="SLiC-HF, arXiv:2305.10425", when={"target": when(lam=NONZERO)})
def slic_hinge(
    delta: NonNegative = 1.0, lam: NonNegative = 0.5, target: Literal["chosen", "expert"] = "chosen"
) -> Objective:
    """Sequence Likelihood Calibration: ``max(0, delta - logp_w + logp_l) - lam logp_sft`` of sequence sums, a mean over
    pairs; no reference.

    Shapes: logp [B, T], rows in pairs chosen, rejected, or with the target as a third row.

    Args:
      lam: weight of the SFT target's likelihood (assumed; RSO drops it: 0).
      target: "chosen", or "expert": a third row of that role."""
    return preference(
        lambda h, units: preferences.hinge(h, delta),
        reference=None,
        layout=PAIR if target == "chosen" else (*PAIR, target),
        terms=[unit_term("sft", lambda units, state: -units.logp(target), coef=lam)],
    )


@register(source="KTO, arXiv:2402.01306; ContextualAI/HALOs; TRL KTOTrainer")
def kto(
    beta: NonNegative = 0.1,
    lam_D: NonNegative = 1.0,  # noqa: N803 (the card's names)
    lam_U: NonNegative = 1.0,  # noqa: N803
) -> Objective:
    """Kahneman-Tversky Optimization of unpaired labels: ``lam_D (1 - sig(beta (D - z0)))`` of a desirable answer,
    ``lam_U (1 - sig(beta (z0 - D)))`` of another; a mean over answers.

    ``z0 = max(0, mean D)`` over the rows of role "kl" (answers to other prompts) of the whole optimizer batch, without
    gradient; 0 without such rows, which train nothing.

    Shapes: logp, logp_ref [B, T], label [B] (1 = desirable), role [B].

    Args:
      lam_D, lam_U: keep lam_D n_D / (lam_U n_U) in [1, 4/3]."""

    def drift(stats: TokenStats, batch: Rollouts) -> Array:
        return log_ratios(stats, batch, "ref").sum(-1)

    def answers(batch: Rollouts, state: State) -> Array:
        return batch.role != role_id("kl")

    def anchor(batch: Rollouts, state: State, peek: TokenStats) -> Rollouts:
        count = promote(batch.count) * (batch.role == role_id("kl"))
        mean = ratio_or_zero(jnp.sum(drift(peek, batch) * count), count.sum())
        return batch.with_row(anchor=jnp.full(batch.rows, jnp.maximum(mean, 0)))

    def value(stats: TokenStats, batch: Rollouts, state: State) -> Array:
        return preferences.kahneman_tversky(
            drift(stats, batch), batch.get("anchor"), batch.get("label"), beta=beta, lam_D=lam_D, lam_U=lam_U
        )

    def report(stats: TokenStats, batch: Rollouts, state: State) -> Metrics:
        count, good = promote(batch.count) * answers(batch, state), promote(batch.get("label"))
        d = beta * drift(stats, batch)
        return {
            "preference/chosen": Mean.of(d, count * good),
            "preference/rejected": Mean.of(d, count * (1 - good)),
            "preference/anchor": Mean.of(batch.get("anchor"), count),
        }

    return from_terms(
        [Term("preference", value, aggregation.unit_mean, rows=answers, per="row")],
        asks=asks_of("logp_ref", "label", "role", peeks=("logp",)),
        hooks=Hooks(weigh=anchor, metrics=report),
    )


@register(source="ORPO, arXiv:2403.07691; xfactlab/orpo; TRL ORPOTrainer")
def orpo(lam: NonNegative = 0.1, include_prompt: bool = False) -> Objective:
    """Odds-Ratio Preference Optimization: ``NLL + lam mean(-log sig(log_odds(a_w) - log_odds(a_l)))``, with
    ``a = logp/len``, ``log_odds(a) = a - log(1 - e^a)``; NLL is the token mean over the chosen answers of the
    batch. No reference.

    Shapes: logp [B, T], rows in pairs chosen, rejected.

    Args:
      lam: TRL's beta. include_prompt: NLL over prompt and chosen answer, as the released code has it: the text of both
        is a third row of role "expert", with an empty prompt."""
    return unit_objective(
        [
            nll_term("expert" if include_prompt else "chosen"),
            unit_term("odds_ratio", lambda units, state: preferences.logistic(log_odds_ratio(units)), coef=lam),
        ],
        margin=log_odds_ratio,
        layout=(*PAIR, "expert") if include_prompt else PAIR,
    )


def log_odds_ratio(units: Units) -> Array:
    """[N] difference of the log-odds of length-averaged log-probs."""
    w, l = (preferences.log_odds(units.logp(role) / units.length(role)) for role in PAIR)  # noqa: E741
    return w - l


@register(source="SimPO, arXiv:2405.14734; princeton-nlp/SimPO; TRL CPOTrainer")
def simpo(beta: NonNegative = 2.0, gamma: float = 1.0, eps: ShareBelowOne = 0.0) -> Objective:
    """Simple Preference Optimization: ``-(1 - eps) log sig(z) - eps log sig(-z)``, ``z = beta (logp_w/len_w -
    logp_l/len_l) - gamma``, a mean over pairs; no reference.

    Shapes: logp [B, T], rows in pairs chosen, rejected.

    Args:
      gamma: the margin that is aimed at (a common setting: beta 2.5, gamma 1.375). eps: label smoothing."""
    return preference(
        lambda z, units: preferences.logistic(z - gamma, eps), beta=beta, reference=None, normalize_length=True
    )


@register(source="CPO, arXiv:2401.08417; fe1ixxu/ALMA; TRL CPOTrainer")
def cpo(beta: NonNegative = 0.1, alpha: NonNegative = 1.0, eps: ShareBelowOne = 0.0) -> Objective:
    """Contrastive Preference Optimization: ``-(1 - eps) log sig(z) - eps log sig(-z) + alpha NLL``,
    ``z = beta (logp_w - logp_l)``; NLL is the token mean over the chosen answers of the batch. No reference.

    Shapes: logp [B, T], rows in pairs chosen, rejected."""
    return preference(
        lambda z, units: preferences.logistic(z, eps), beta=beta, reference=None, terms=[nll_term(coef=alpha)]
    )


@register(source="SPPO, arXiv:2405.00675; uclaml/SPPO")
def sppo(beta: Positive = 0.001, half: bool = True, hard: bool = False) -> Objective:
    """Self-Play Preference Optimization: ``1/2 (D_w - (win_w - 1/2)/beta)^2`` and the same of l, a mean over pairs;
    ``D`` against the iterate at the start of the round, beta = 1/eta.

    Shapes: logp, logp_ref [B, T], rows in pairs chosen, rejected; win [B] in [0, 1], the rate at which the answer beats
      the iterate.

    A round is an iteration: the reference is renewed after each, unless ``config.protocol.ref_every`` says after how
    many.

    Args:
      half: False drops the 1/2 (TRL's sppo_hard). hard: win is 1 for the chosen and 0 for the rejected answer."""
    sure = dict(zip(PAIR, (1.0, 0.0), strict=True))

    def target(units: Units, role: str) -> Array:
        return ((sure[role] if hard else units.get("win", role)) - 0.5) / beta

    objective = regression(target, scale=0.5 if half else 1.0, asks=asks_of(*(() if hard else ("win",))))
    return objective._replace(protocol=Gathering(references={"ref": {"every": 1}}))


def regression(
    target: Callable[[Units, str], Array], *, reference: str = "ref", scale: float = 0.5, asks: Asks = NOTHING
) -> Objective:
    """``scale sum over both answers of (D - target)^2``, a mean over pairs; ``target(units, role) -> [N]``."""

    def value(units: Units, state: State) -> Array:
        return scale * sum(preferences.squared(units.log_ratio(r, reference), target(units, r)) for r in PAIR)

    return unit_objective(
        [unit_term("preference", value)],
        margin=lambda units: units.log_ratio("chosen", reference) - units.log_ratio("rejected", reference),
        asks=asks.merged(asks_of(f"logp_{reference}")),
    )


@register(source="RSO, arXiv:2309.06657")
def rso(gamma: NonNegative = 0.05, form: Literal["sigmoid-norm", "hinge-norm", "hinge"] = "sigmoid-norm") -> Objective:
    """The losses of Statistical Rejection Sampling Optimization on pairs of rejection-sampled answers, a mean over
    pairs.

    Shapes: logp, logp_ref [B, T], rows in pairs chosen, rejected. The sampler is
      `jaxpo.primitives.preference_data.rejection_sample`.

    Args:
      form: "sigmoid-norm": ``-log sig(gamma (D_w - D_l))``; "hinge-norm": ``max(0, 1 - gamma (D_w - D_l))`` (TRL's
        hinge); "hinge": the same of ``logp_w - logp_l``."""
    link = preferences.logistic if form == "sigmoid-norm" else preferences.hinge
    return preference(lambda z, units: link(z), beta=gamma, reference=None if form == "hinge" else "ref")


@register(source="rDPO, arXiv:2403.00409; TRL robust")
def rdpo(beta: NonNegative = 0.1, eps: FlipRate = 0.1) -> Objective:
    """Provably robust DPO: ``(-(1 - eps) log sig(z) + eps log sig(-z)) / (1 - 2 eps)``, ``z = beta (D_w - D_l)``: DPO's
    loss without bias from labels flipped with probability eps; unbounded below.

    Shapes: logp, logp_ref [B, T], rows in pairs chosen, rejected.

    Args:
      eps: rate of flipped labels, below 1/2."""
    return preference(lambda z, units: preferences.denoised_logistic(z, eps), beta=beta)


@register(source="RPO, arXiv:2405.16436; YSLIU627/Regularized-Preference-Optimization", when={"nll": when(eta=NONZERO)})
def rpo(
    beta: NonNegative = 0.05, eta: NonNegative = 0.005, nll: Literal["seq_sum", "token_mean"] = "seq_sum"
) -> Objective:
    """Regularized Preference Optimization, DPO and SFT: ``-log sig(beta (D_w - D_l)) - eta beta logp_w``, a mean over
    pairs.

    Shapes: logp, logp_ref [B, T], rows in pairs chosen, rejected.

    Args:
      nll: "seq_sum": the chosen answer's sequence sum, scaled by beta (the official code); "token_mean": ``eta`` times
        the token mean over the chosen answers (TRL): at equal eta about beta x length weaker."""
    sft = (
        unit_term("nll", lambda units, state: -beta * units.logp("chosen"), coef=eta)
        if nll == "seq_sum"
        else nll_term(coef=eta)
    )
    return preference(lambda z, units: preferences.logistic(z), beta=beta, terms=[sft])


@register(source="arXiv:2412.17696 (truth tables of uncpo, ccpo, cfunl, qfunl, funl and l5 are assumed)")
def dpa_logic(
    program: str = "cpo",
    beta: Positive = 1.0,
    link: Literal["log", "square", "hinge"] = "log",
    length_norm: bool = True,
    use_ref: bool = False,
) -> Objective:
    """Losses from the logic of direct alignment: ``rho = log(weight of the top worlds / weight of the bottom worlds)``
    over the truth table of (chosen, rejected), an answer being true with probability ``exp(logp/len)``; a mean over
    pairs of a link of rho. Reconstructed from the paper's text: some truth tables are assumed.

    Shapes: logp [B, T] (and logp_ref), rows in pairs chosen, rejected.

    Args:
      program: ce, ceunl, cpo, orpo, uncpo, ccpo, cfunl, qfunl, funl or l5, or two sets of worlds: ``"TF FF / FT"``.
      link: "log": ``-log sig(beta rho)``; "square": ``(rho - 1/(2 beta))^2``; "hinge": ``max(0, beta - rho)``.
      length_norm: False: probabilities of whole sequences. use_ref: rho minus the reference's rho."""
    preferences.worlds_of(program)

    def count(units: Units, logp: Array) -> Array:
        per = [units.length(role) if length_norm else 1 for role in PAIR]
        answers = (units.of(logp.sum(-1), role) / n for role, n in zip(PAIR, per, strict=True))
        return preferences.log_model_count_ratio(*answers, program)

    def rho(units: Units) -> Array:
        own = count(units, units.stats.logp)
        return own - count(units, units.batch.get("logp_ref")) if use_ref else own

    def value(units: Units, state: State) -> Array:
        x = rho(units)
        if link == "log":
            return preferences.logistic(beta * x)
        return preferences.squared(x, 1 / (2 * beta)) if link == "square" else preferences.hinge(x, beta)

    return unit_objective(
        [unit_term("preference", value)], margin=rho, asks=asks_of(*(("logp_ref",) if use_ref else ()))
    )


@register(source="MPO, arXiv:2403.19443, stage 1 (reconstructed from the paper's text)")
def mpo_mixed(gap: Threshold = 1.0, beta: NonNegative = 0.1) -> Objective:
    """Mixed Preference Optimization, stage 1: DPO averaged over the easy pairs, ``|rm_w - rm_l| > gap``, alone (0 if
    there are none). Reconstructed from the paper's text: the default gap is assumed; stage 2 is PPO on the prompts of
    the others with this model as reference.

    Shapes: logp, logp_ref [B, T], rows in pairs chosen, rejected; rm [B], a trained reward model's scores. Pairs that
      it orders against their label are kept (assumed)."""

    def easy(batch: Rollouts, state: State) -> Array:
        rm = batch.unit(batch.get("rm"))
        return jnp.repeat(promote(preference_data.easy_pairs(rm[:, 0], rm[:, 1], gap=gap)), len(PAIR))

    return preference(lambda z, units: preferences.logistic(z), beta=beta, rows=easy, asks=asks_of("rm"))
