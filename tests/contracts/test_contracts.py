"""Every registered objective keeps every contract, and every contract notices an objective that breaks it."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest

import jaxpo
from jaxpo import testing
from jaxpo.batch import complete
from jaxpo.objectives import Hooks, Objective, Term, Unit, asks_of, from_terms, linearized, preference
from jaxpo.primitives import aggregation, grouping
from jaxpo.primitives.numerics import promote
from tests.test_open_grammar import flow_grpo, luffy, ppo

OPTIONAL = {
    "rloo": {"form": "ppo"},
    "reinforce": {"baseline": "batch_mean", "agg": "seq_mean"},
    "dr_grpo": {"singleton": "raw"},
    "grpo": {"scale": "batch", "dual_clip": 3.0, "kl_is": True, "agg": "group_mean"},
    "dapo": {"dual_clip": 10.0},
    "lp_reg": {"form": "paper", "proxy": "old", "rho": 0.3, "tau": 0.1},
    "sft": {"agg": "seq_sum_const", "L_const": 6.0},
    "policy_gradient": {"regularizers": "0.1 * orpo_chi2", "shaping": "salsa"},
    "orpo": {"include_prompt": True},
    "dpa_logic": {"program": "uncpo", "link": "square", "length_norm": False, "use_ref": True},
    "srpo": {"soft": True},
    "opa_dpo": {"granularity": "position", "rev_anchor_sign": -1},
    "hypo": {"k": 3},
    "mapl": {"form": "dpo"},
    "dno": {"variant": "prct"},
    "nash_md": {"kl": "token"},
    "bradley_terry_rm": {"margins": True},
    "themis": {"form": "paper"},
}


# Before each commit those of some kinds; the tier of the contracts has the others, one test an objective.
FAST = ("grpo", "dpo", "gpm_rm")


@pytest.mark.parametrize("name", jaxpo.names())
def test_documented(name):
    assert testing.check(name, contracts=[testing.documented]).checked


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.contracts) for n in jaxpo.names()]
)
def test_registered(name):
    report = testing.check(name)
    assert report.objective == name and len(report.checked) == len(testing.CONTRACTS) and not report.skipped


@pytest.mark.contracts
@pytest.mark.parametrize("name", OPTIONAL)
def test_registered_with_other_hyperparameters(name):
    assert not testing.check(name, **OPTIONAL[name]).skipped


@pytest.mark.contracts
@pytest.mark.parametrize("build", (luffy, ppo, flow_grpo))
def test_hybrids_critics_and_chains(build):
    assert not testing.check(build).skipped


def dpo(beta: float = 0.1) -> Objective:
    """Direct Preference Optimization. Shapes: logp [B, T]."""
    return preference(lambda margin, batch: -jax.nn.log_sigmoid(margin), beta=beta)


def everything(weight: float = 0.5) -> Objective:
    """One of every feature of the grammar. Shapes: logp [B, T]."""

    def relative(stats, batch, state):  # of its group, so that a slice has to hold whole groups
        row = stats.logp.sum(-1)
        return (row - grouping.group_mean(row, batch.group, batch.count)) * batch.reward

    def lower(batch, state, peek):  # a bound from the peek at the whole batch
        counted = promote(batch.mask * batch.count[:, None])
        mean = jnp.sum(jnp.where(counted > 0, promote(peek.entropy), 0) * counted) / jnp.maximum(counted.sum(), 1)
        return batch.replace(per_row={**batch.per_row, "bound": jnp.full(batch.rows, mean)})

    def fade(state, batch, report):
        return state.replace(memory={"coef": 0.9 * state.memory["coef"]})

    row = Term("relative", relative, aggregation.seq_mean, per="row")
    square = Term("square", lambda stats, batch, state: jnp.square(stats.logp))
    entropy = Term(
        "entropy",
        lambda stats, batch, state: -jnp.minimum(stats.entropy, batch.per_row["bound"][:, None]),
        coef=lambda state: weight * state.memory["coef"],
    )
    return from_terms(
        [row, linearized(square, lambda s: jnp.sqrt(s + 1e-3)), entropy],
        hooks=Hooks({"coef": jnp.float32(1)}, weigh=lower, update=fade),
        asks=asks_of("reward", wants=("logp", "entropy"), peeks=("entropy",)),
        unit=Unit(coupling="group"),
    )


@pytest.mark.parametrize("factory", [dpo, everything])
def test_of_a_users_own(factory):
    report = testing.check(factory)
    assert len(report.checked) == len(testing.CONTRACTS), report


# ---- every contract notices what it is for --------------------------------------------------------------------------


def nll(aggregate=aggregation.token_mean, value=lambda stats, batch, state: -stats.logp, **options) -> Objective:
    return from_terms([Term("nll", value, aggregate)], **options)


def changed_loss(change) -> Objective:
    """An objective that goes its own way, past what `from_terms` guards."""
    objective = nll()

    def prepare(batch, state):
        return complete(batch), state.replace(iteration=state.iteration + 1)

    def weigh(batch, state, peek):
        return batch.replace(weights={"nll": aggregation.token_mean(batch.mask, batch.count, batch)})

    def loss(policy, batch, state):
        value, report = objective.loss(policy, batch, state)
        return value + change(policy(batch), batch), report

    return objective._replace(prepare=prepare, weigh=weigh, loss=loss)


def not_traceable(eps: float = 0.1) -> Objective:
    return nll(value=lambda stats, batch, state: -stats.logp * (2 if eps > 0.11 else 1))


def no_shapes(eps: float = 0.1) -> Objective:
    """A docstring without them."""
    return nll()


def keeps_python_numbers(state, batch, report):
    return state.replace(memory={"calls": 1})


def sum_of_all(batch, state):
    return batch.replace(adv=batch.logp_beh.sum(-1)), state


def is_traced(stats, batch):
    return 0.01 * isinstance(batch.tokens, jax.core.Tracer)  # tokens carry no gradient, so nothing but jit traces them


def advantage(stats, batch, state):
    return -stats.logp * batch.adv[:, None]


BROKEN = {
    "overflow": ("finite_on_hostile_input", lambda: nll(value=lambda s, b, _: jnp.exp(4 * (s.logp - b.logp_old)))),
    "sums masked positions": ("finite_on_hostile_input", lambda: nll(value=advantage, hooks=Hooks(prepare=sum_of_all))),
    "a prepare of its own, which lets NaN pass": (
        "bad_numbers_are_refused",
        lambda: nll(asks=asks_of("reward"))._replace(
            prepare=lambda batch, state: (complete(batch), state.replace(iteration=state.iteration + 1))
        ),
    ),
    "divides by the width": (
        "padding_invariance",
        lambda: nll(lambda mask, count, b: mask * count[:, None] / mask.size),
    ),
    "later rows weigh more": (
        "permutation_equivariance",
        lambda: nll(value=lambda s, b, _: s.logp * jnp.arange(b.rows)[:, None]),
    ),
    "multiplicity is ignored": (
        "count_is_multiplicity",
        lambda: nll(lambda mask, count, b: mask * (count > 0)[:, None] / mask.sum()),
    ),
    "fillers count": ("count_is_multiplicity", lambda: nll(lambda mask, count, b: mask * count[:, None] / mask.sum())),
    "a mean over the slice": ("microbatch_invariance", lambda: nll(value=lambda s, b, _: s.logp * s.logp.mean())),
    "a group cut by slices": ("microbatch_invariance", lambda: everything()._replace(unit=Unit())),
    "more than it peeks at": (
        "evaluate_agrees_with_training",
        lambda: everything()._replace(asks=asks_of("reward", wants=("logp", "entropy"), peeks=("logp",))),
    ),
    "gradient into the reward": (
        "gradient_only_into_the_policy",
        lambda: changed_loss(lambda stats, batch: batch.reward.sum()),
    ),
    "gradient of masked tokens": (
        "masked_positions_get_no_gradient",
        lambda: changed_loss(lambda stats, batch: stats.logp.sum()),
    ),
    "no gradient at all": (
        "masked_positions_get_no_gradient",
        lambda: nll(value=lambda s, b, _: jax.lax.stop_gradient(s.logp)),
    ),
    "another loss under jit": ("jit_equals_eager", lambda: changed_loss(is_traced)),
    "a branch on a number": ("vmap_over_hyperparameters", lambda: not_traceable),
    "a mean in bfloat16": (
        "float32_accumulation",
        lambda: changed_loss(lambda stats, batch: (stats.logp * batch.mask).mean()),
    ),
    "cancels in float32": ("float32_agrees_with_float64", lambda: nll(value=lambda s, b, _: (1e7 - s.logp) - 1e7)),
    "a need not declared": ("needs_is_exact", lambda: nll(value=lambda s, b, _: s.logp - b.get("logp_ref"))),
    "a need without effect": ("needs_is_exact", lambda: nll(asks=asks_of("reward"))),
    "a clock that stands": (
        "state_survives_a_checkpoint",
        lambda: nll()._replace(update=lambda state, batch, report: state),
    ),
    "a state that changes its form": (
        "state_survives_a_checkpoint",
        lambda: nll(hooks=Hooks(update=keeps_python_numbers)),
    ),
    "no shapes": ("documented", lambda: no_shapes),
}


@pytest.mark.parametrize("why", BROKEN)
def test_broken(why):
    contract, build = BROKEN[why]
    with pytest.raises((AssertionError, TypeError, ValueError)):
        getattr(testing, contract)(testing.case(build()))


def test_every_contract_is_in_the_list():
    # A mesh and replicas cannot be broken by what an objective is able to write.
    unbreakable = {"mesh_invariance", "independent_replicas"}
    assert {contract for contract, _ in BROKEN.values()} | unbreakable == {c.__name__ for c in testing.CONTRACTS}


def test_check_lists_all_that_is_broken_with_numbers(monkeypatch):
    contracts = [testing.gradient_only_into_the_policy, testing.masked_positions_get_no_gradient, testing.documented]
    monkeypatch.setattr(testing, "CONTRACTS", contracts)
    bad = changed_loss(lambda stats, batch: stats.logp.sum() + 3 * batch.reward.sum())
    with pytest.raises(AssertionError, match="objective breaks 2 of 3 contracts") as error:
        testing.check(bad)
    assert "\n  gradient_only_into_the_policy: reward gets a gradient of 3" in str(error.value)
    assert "\n  masked_positions_get_no_gradient: logp has a gradient of 1" in str(error.value)


@pytest.mark.parametrize("name", ["dcpo_distribution", "hapo", "r2vpo"])
def test_what_is_remembered_is_float64_under_x64(name):
    with jax.enable_x64(True):
        case = testing.case(name)
        assert {x.dtype for x in case.objective.init().memory.values()} == {jnp.dtype(jnp.float64)}
        testing.state_survives_a_checkpoint(case)


def test_is_reached_from_the_package(monkeypatch):
    monkeypatch.delattr(jaxpo, "testing")
    assert jaxpo.testing is testing


@cache
def sft_case() -> testing.Case:
    return testing.case("sft")


def test_a_report_says_what_was_not_checked(monkeypatch):
    monkeypatch.setattr(testing, "CONTRACTS", [testing.documented, testing.gradient_only_into_the_policy])
    report = testing.check(sft_case().objective)
    assert report.skipped == {"documented": "it needs the function that builds the objective"}
    assert str(report).splitlines() == [
        "objective: 1 contracts kept",
        "  gradient_only_into_the_policy: 11 fields",
        "  documented: not checked, it needs the function that builds the objective",
    ]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("grppo",), {}, "unknown objective 'grppo': did you mean 'grpo'"),
        (
            ("grpo",),
            {"eps_hihg": 0.3},
            "unknown hyperparameter of objective 'grpo' 'eps_hihg': did you mean 'eps_high'",
        ),
        ((nll(),), {"eps": 1.0}, "eps: this objective is built already"),
        ((nll(asks=asks_of("difficulty")),), {}, "no example of 'difficulty', which this objective needs"),
    ],
)
def test_case_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        testing.case(*arguments, **options)


def test_a_batch_of_ones_own():
    objective = nll(value=lambda s, b, _: -s.logp * b.get("difficulty")[:, None], asks=asks_of("difficulty"))
    batch = testing.example(nll())
    batch = batch.replace(per_row={"difficulty": jnp.linspace(1, 2, batch.rows)})
    assert "needs difficulty" in testing.needs_is_exact(testing.case(objective, batch))


def test_the_example_has_no_ties_and_something_of_everything():
    batch = sft_case().batch
    assert len(set(batch.reward.tolist())) == batch.rows
    assert 0 < batch.truncated.sum() < batch.rows and (batch.lengths == 1).any()
    assert bool((grouping.group_constant(batch.correct, batch.group, batch.count) == 0).all())
    assert bool((batch.mask[:, 1:] > batch.mask[:, :-1]).any()), "no hole in the mask"
