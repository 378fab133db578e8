"""Combinations of parts by name equal the published objectives that they spell, or are refused with the reason."""

import itertools

import jax
import numpy as np
import pytest

import jaxpo
from jaxpo.objectives.grammar.parts import Part
from jaxpo.registry import entry, names
from jaxpo.testing import case as example_case
from jaxpo.testing import direct
from tests.oracles.cases import CASES, assert_same, evaluate

SPELLED = [
    ("grpo", {}, dict(agg="seq_mean", regularizers="0.04 * kl_to_reference")),
    ("grpo", dict(beta=0.0, dual_clip=3.0, agg="token_mean"), dict(surrogate="clipped(dual_clip=3.0)")),
    ("dr_grpo", dict(L_const=6.0), dict(advantage="group_normalized(scale='none')", agg="seq_sum_const(L_const=6.0)")),
    ("gspo", {}, dict(ratio="sequence", surrogate="clipped(eps_low=3e-4, eps_high=4e-4)", agg="seq_mean")),
    ("cispo", {}, dict(surrogate="cispo")),
    ("mhpo", {}, dict(ratio="bounded", surrogate="mhpo", agg="seq_mean")),
    ("gtpo", {}, dict(advantage="gtpo", ratio="on_policy", surrogate="linear", agg="seq_mean")),
    ("kl_cov", {}, dict(surrogate="linear", regularizers="1.0 * kl_cov")),
    ("lp_reg", dict(rho=0.2), dict(surrogate="clipped_but_protected", regularizers="lp_reg(rho=0.2)")),
    (
        "dapo",
        dict(max_len=5, buffer=3),
        dict(surrogate="clipped(eps_high=0.28)", filters="mixed_groups", shaping="overlong(max_len=5, buffer=3)"),
    ),
    (
        "opmd",
        dict(form="kimi"),
        dict(advantage="opmd", ratio="sequence_sum", surrogate="squared_residual", agg="seq_mean"),
    ),
]


@pytest.mark.parametrize(("name", "hyperparameters", "spelled"), SPELLED, ids=lambda x: x if isinstance(x, str) else "")
def test_policy_gradient_equals_the_published_objective_that_it_spells(name, hyperparameters, spelled):
    for label in ("unequal groups", "extreme ratios and counts"):
        expected = evaluate(name, CASES[label], **hyperparameters)
        assert_same(evaluate("policy_gradient", CASES[label], **spelled), expected)


def test_policy_gradient_takes_what_scales_with_the_run_from_it():
    spelled = dict(advantage="adora", agg="seq_mean")
    given = evaluate("policy_gradient", CASES["K=8"], **spelled, max_new_tokens=5)
    assert_same(given, evaluate("adora", CASES["K=8"], max_len=5.0, beta=0.0))
    assert_same(evaluate("policy_gradient", CASES["K=8"], **spelled), evaluate("adora", CASES["K=8"], beta=0.0))


@pytest.mark.parametrize(
    ("spelled", "message"),
    (
        (dict(ratio="sequence"), "one value a row, so aggregate must be seq_mean"),
        (dict(ratio="sequence", agg="seq_mean", surrogate="cispo"), "cispo works on tokens"),
        (dict(ratio="sequence", agg="seq_mean", advantage="reinforce_pp"), "advantage reinforce_pp one a token"),
        (dict(ratio="sequence", agg="seq_mean", advantage="spo_segment"), "spo_segment one a token"),
        (dict(ratio="sequence", agg="seq_mean", filters="d3s"), "no token can be left out"),
        (
            dict(ratio="sequence", agg="seq_mean", corrections="truncated_weight"),
            "correction truncated_weight one a token",
        ),
        (dict(ratio="sequence", agg="seq_mean", surrogate="log_prob"), "looks at no ratio"),
        (dict(ratio="sequence_token"), "take agg='seq_mean'"),
        (dict(surrogate="squared_residual"), "take the ratio sequence_sum"),
        (dict(surrogate="clipped_but_protected"), "the regularizer lp_reg picks: add it"),
        (dict(advantage="asymre", filters="mixed_groups"), "would remove them"),
        (dict(advantage="gtpo"), "takes ratio='on_policy'"),
        (dict(advantage="bnppo"), "unknown advantage 'bnppo': did you mean 'bnpo'"),
        (dict(surrogate="clipped(eps_hihg=0.3)"), "'eps_hihg': did you mean 'eps_high'"),
        (dict(surrogate="clipped(0.3)"), "every option named"),
        (dict(surrogate="clipped, cispo"), "surrogate takes one part"),
        (dict(surrogate="clipped("), "is not a list of names or calls"),
        (dict(surrogate="clipped(eps_high=open('x'))"), "options are plain values"),
        (dict(regularizers="beta * entropy"), "a coefficient must be a number"),
        (dict(filters="0.5 * mixed_groups"), "a filter has no coefficient"),
        (dict(agg="seq_sum_const"), "seq_sum_const. needs L_const"),
    ),
    ids=str,
)
def test_policy_gradient_refuses_what_means_nothing_with_the_reason(spelled, message):
    with pytest.raises(ValueError, match=message):
        jaxpo.make("policy_gradient", **spelled)


@pytest.mark.slow
def test_policy_gradient_of_every_combination_is_finite_or_refused():
    """Every advantage x ratio x surrogate x aggregation, on the contracts' example; a part of them by its gradient."""
    kinds = ("advantage", "ratio", "surrogate")
    distinct = {kind: {entry(n, kind).factory: n for n in names(kind)}.values() for kind in kinds}
    built, refused = [], 0
    for combination in itertools.product(*distinct.values(), ("token_mean", "seq_mean")):
        spelled = dict(zip((*kinds, "agg"), combination, strict=True), max_new_tokens=6, steps=10)
        try:
            built.append((spelled, jaxpo.make("policy_gradient", **spelled)))
        except ValueError:
            refused += 1
    assert len(built) > 500 and refused > 500
    for spelled, objective in built[:: len(built) // 12]:
        case = example_case(objective)
        out = jax.jit(direct, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
        value = out(Frozen(objective), case.stats, case.batch)
        assert np.isfinite(value.loss) and any(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(value.grads[0])), (
            spelled
        )


class Frozen(jaxpo.Objective):
    """An objective that is its own static argument."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __new__(cls, objective):
        return super().__new__(cls, *objective)


def test_parts_bear_their_names():
    for kind in ("advantage", "ratio", "surrogate", "regularizer", "filter", "reward", "correction"):
        for name in names(kind):
            row = entry(name, kind)
            part = row.factory(**{k: 5 for k in row.budget if row.defaults[k] is None})
            assert isinstance(part, Part) and part.id == row.factory.__name__
