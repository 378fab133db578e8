"""The objectives of preferences refuse settings that make no sense and labels that are no probabilities."""

import numpy as np
import pytest

import jaxpo
from tests.oracles.preference_cases import batch_of, rollouts, with_extra


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dpo", dict(eps=1.2), r"eps must be a number in \[0, 1\), not 1.2"),
        ("rdpo", dict(eps=0.5), r"eps must be a number in \[0, 0.5\), not 0.5"),
        ("ipo", dict(tau=0.0), "tau must be a positive number, not 0.0"),
        ("slic_hinge", dict(lam=0.0, target="expert"), "target has no effect with lam=0.0"),
        ("rso", dict(form="hinge-nrom"), "form must be one of sigmoid-norm, hinge-norm, hinge, not 'hinge-nrom'"),
        ("dpa_logic", dict(program="TT / "), "unknown program 'TT / '"),
        ("dpa_logic", dict(program="TT / TX"), "unknown program 'TT / TX'"),
        ("inpo", dict(eta=0.1, tau=0.2), "tau must be at most eta = 0.1, not 0.2"),
        ("dno", dict(variant="prct", scale=2.0), "scale has no effect with variant='prct'"),
        ("mapl", dict(beta=0.3), "beta has no effect with form='rm'; it belongs to form='dpo'"),
        ("themis", dict(alpha=0.5), "alpha has no effect with .*; it belongs to form='paper'"),
        ("themis", dict(form="paper", rationale=False), "rationale has no effect with form='paper'"),
        ("hypo", dict(k=0), "k must be a whole number of at least 1, not 0"),
        ("opa_dpo", dict(c_a=0.0, rev_anchor_sign=-1), "rev_anchor_sign has no effect with c_a=0.0"),
        ("opa_dpo", dict(rev_anchor_sign=0), "rev_anchor_sign must be one of 1, -1, not 0"),
    ],
)
def test_what_makes_no_sense_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        jaxpo.make(name, **settings)


@pytest.mark.parametrize("value", (1.2, np.nan))
@pytest.mark.parametrize(("name", "field"), [("sppo", "win"), ("online_ipo", "pref_prob"), ("kto", "label")])
def test_labels_are_probabilities(name, field, value):
    batch = with_extra(batch_of(name), **{field: value})
    message = rf"a {field} of 1.2 is outside \[0, 1\], it is a probability or a label"
    with pytest.raises(ValueError, match=rf"the {field} of row \d+ is nan" if np.isnan(value) else message):
        jaxpo.make(name).prepare(rollouts(batch), jaxpo.make(name).init())
