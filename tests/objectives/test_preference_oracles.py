"""Every objective of the preference cards against an independent float64 oracle: value and gradient to 1e-9."""

import pytest

import jaxpo
from tests.oracles import nash, preference, preference_multi, reward_models
from tests.oracles.preference_cases import assert_same, batches, evaluate, layout_of
from tests.oracles.units import value_and_grad

PLAIN = [
    ("dpo", {}),
    ("dpo", dict(beta=0.5, eps=0.2)),
    ("dpo", dict(eps=0.1, reference_free=True)),
    ("ipo", {}),
    ("ipo", dict(tau=0.5, normalize=False)),
    ("slic_hinge", {}),
    ("slic_hinge", dict(delta=3.0, lam=0.2, target="expert")),
    ("slic_hinge", dict(lam=0.0)),
    ("kto", {}),
    ("kto", dict(beta=0.7, lam_D=1.5, lam_U=0.5)),
    ("orpo", {}),
    ("orpo", dict(lam=0.7, include_prompt=True)),
    ("simpo", {}),
    ("simpo", dict(beta=2.5, gamma=1.375, eps=0.1)),
    ("cpo", {}),
    ("cpo", dict(beta=0.3, alpha=0.4, eps=0.2)),
    ("sppo", {}),
    ("sppo", dict(beta=0.1, half=False)),
    ("sppo", dict(beta=0.3, hard=True)),
    ("rso", {}),
    ("rso", dict(gamma=0.5, form="hinge-norm")),
    ("rso", dict(gamma=0.5, form="hinge")),
    ("rdpo", {}),
    ("rdpo", dict(beta=0.5, eps=0.3)),
    ("rpo", {}),
    ("rpo", dict(beta=0.3, eta=0.2, nll="token_mean")),
    *[("dpa_logic", dict(program=p)) for p in preference.RHO],
    ("dpa_logic", dict(program="uncpo", beta=0.5, link="square", use_ref=True)),
    ("dpa_logic", dict(program="orpo", beta=2.0, link="hinge")),
    ("dpa_logic", dict(link="log", length_norm=False, use_ref=True)),
    ("mpo_mixed", {}),
    ("mpo_mixed", dict(gap=0.3, beta=0.5)),
    ("srpo", {}),
    ("srpo", dict(beta=0.3, alpha=0.8, soft=True)),
    ("seppo", {}),
    ("seppo", dict(beta=0.5, flip=False)),
    ("rationale_dpo", {}),
    ("rationale_dpo", dict(beta=0.4, gamma=0.3)),
    ("rationale_dpo", dict(gamma=0.2, term="nll")),
    ("rationale_orpo", {}),
    ("rationale_orpo", dict(lam=0.5, gamma=0.3)),
    ("opa_dpo", {}),
    ("opa_dpo", dict(beta=0.4, c_g=0.7, c_v=0.6, c_ctx=0.5, c_a=0.8, a=0.3, rev_anchor_sign=-1)),
    ("opa_dpo", dict(beta=0.4, c_g=0.7, a=0.3, granularity="position", rev_anchor_sign=-1)),
    ("copg", {}),
    ("copg", dict(beta=0.02)),
    ("hypo", {}),
    ("hypo", dict(beta=0.4, lam=0.2, k=3)),
    ("hypo", dict(lam=0.2, k=1)),
    ("hypo", dict(lam=0.2, rloo=False)),
    ("mapl", {}, "score"),
    ("mapl", dict(a=0.3, b=0.6), "score"),
    ("mapl", dict(a=0.3, form="dpo", beta=0.5)),
    ("online_ipo", {}),
    ("online_ipo", dict(tau=0.3, form="expanded")),
    ("ipo_md", dict(tau=0.7)),
    ("nash_md", {}),
    ("nash_md", dict(tau=0.3, kl="token")),
    ("nash_ema", dict(tau=0.3)),
    ("nash_ema", dict(kl="token")),
    ("nash_mp", {}),
    ("nash_mp", dict(beta=0.3, eta=0.2)),
    ("egpo", {}),
    ("egpo", dict(beta=0.5, normalize=False)),
    ("inpo", {}),
    ("inpo", dict(eta=0.5, tau=0.4)),
    ("dno", {}),
    ("dno", dict(eta=0.3, scale=4.0)),
    ("dno", dict(eta=0.3, variant="prct")),
    ("gpo", {}),
    ("gpo", dict(beta=0.3)),
    ("bradley_terry_rm", {}, "score"),
    ("bradley_terry_rm", dict(margin=0.5, c=0.1, margins=True), "score"),
    ("gpm_rm", {}, "embed", "gate"),
    ("gpm_rm", dict(tau=1.0, gate=False, normalize=False), "embed"),
    ("themis", {}, "logp", "score"),
    ("themis", dict(rm_coef=2.0, observation=False), "logp", "score"),
    ("themis", dict(rationale=False), "logp", "score"),
    ("themis", dict(form="paper", alpha=0.5, beta=0.3, omega=0.7), "logp", "score"),
    ("rluf", {}, "score"),
    ("preference_orchestrator", {}, "gate"),
    ("preference_orchestrator", dict(T=0.5, normalize=False), "gate"),
]
HOME = {name: module for module in (preference, preference_multi, nash, reward_models) for name in vars(module)}


def _label(configuration) -> str:
    return configuration[0] + "".join(f"-{k}={v}" for k, v in configuration[1].items())


@pytest.mark.parametrize("configuration", PLAIN, ids=_label)
def test_loss_and_gradient_equal_the_oracle(configuration):
    name, settings, *into = configuration
    into = tuple(into) or ("logp",)
    for label, batch in batches(layout_of(name, **settings)).items():
        told = {"b_" if (name, k) == ("mapl", "b") else k: x for k, x in settings.items()}
        expected = value_and_grad(getattr(HOME[name], name), batch, into, **told)
        try:
            assert_same(evaluate(name, batch, into, **settings), expected)
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from None


FAMILY = {
    name
    for name in jaxpo.names()
    if jaxpo.registry.entry(name).factory.__module__.rsplit(".", 1)[1]
    in ("preference", "answers", "nash", "reward_models")
}


def test_every_objective_has_an_oracle():
    assert {name for name, *_ in PLAIN} == FAMILY
