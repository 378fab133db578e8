"""Terms become a loss whose slices add up, and terms that make no sense are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import MissingField, Rollouts, TokenStats, complete
from jaxpo.learning.step import accumulate, score
from jaxpo.metrics import results
from jaxpo.objectives import Hooks, Term, asks_of, evaluate, from_terms, linearized, make, policy_gradient, preference
from jaxpo.objectives.grammar.base import is_off
from jaxpo.objectives.grammar.parts import Advantage, Filter, Shaping
from jaxpo.primitives import aggregation

B, T = 8, 5
RNG = np.random.default_rng(0)
LOGP = jnp.asarray(RNG.normal(-2, 0.5, (B, T)), jnp.float32)
MASK = jnp.asarray(np.arange(T) < np.array([5, 2, 3, 1, 4, 5, 0, 2])[:, None], jnp.float32)
COUNT = jnp.array([1, 1, 0, 1, 2, 1, 1, 1], jnp.float32)
PAIR = ("chosen", "rejected")


def rollouts(**fields) -> Rollouts:
    batch = Rollouts(
        mask=MASK,
        reward=jnp.arange(B, dtype=jnp.float32),
        group=jnp.arange(B) // 4,
        logp_ref=LOGP - 0.3,
        logp_old=LOGP + 0.1,
    )
    return batch.replace(**fields)


def pairs(**fields) -> Rollouts:
    return rollouts(layout=PAIR, role=jnp.array([7, 8] * (B // 2), jnp.int32), group=jnp.arange(B) // 2, **fields)


def nll(stats, batch, state):
    return -stats.logp


def square(stats, batch, state):
    return jnp.square(stats.logp)


def row_sum(stats, batch, state):
    return stats.logp.sum(-1)


def value_and_grad(objective, batch, logp=LOGP):
    def loss(logp):
        value, report = evaluate(objective, lambda _: TokenStats(logp=logp), batch)
        return value, results(report)

    (value, report), grad = jax.value_and_grad(loss, has_aux=True)(logp)
    return value, grad, report


def assert_close(a, b, rtol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol=1e-6), a, b)


# ---- terms --------------------------------------------------------------------------------------------------------


def test_from_terms_sums_coef_weight_value():
    objective = from_terms(
        [
            Term("nll", nll, aggregation.seq_mean),
            Term("square", square, coef=0.5),
            Term("rows", row_sum, aggregation.seq_mean, per="row", coef=-0.25),
        ]
    )
    batch = rollouts(count=COUNT)
    weighed = objective.weigh(*objective.prepare(batch, objective.init()), None)
    assert set(weighed.weights) == {"nll", "square", "rows"} and weighed.weights["rows"].shape == (B,)
    values = {"nll": -LOGP, "square": LOGP**2, "rows": (LOGP * MASK).sum(-1)}
    parts = {name: jnp.sum(weighed.weights[name] * values[name]) for name in values}
    loss, _, report = value_and_grad(objective, batch)
    assert_close(loss, parts["nll"] + 0.5 * parts["square"] - 0.25 * parts["rows"])
    assert_close({name: report[f"loss/{name}"] for name in parts}, parts)
    assert_close(report["loss"], loss)


def test_from_terms_takes_rows_and_tokens_out_of_the_denominators():
    """Filtered by ``rows`` and ``tokens`` the mean is over what is left; by a factor in the value it would not be."""
    first = jnp.arange(T) < jnp.full((B, 1), 2)
    term = Term("nll", nll, rows=lambda batch, state: batch.reward > 3, tokens=lambda batch, state: first)
    counted = MASK * first * (jnp.arange(B) > 3)[:, None] * COUNT[:, None]
    loss, grad, _ = value_and_grad(from_terms([term]), rollouts(count=COUNT))
    assert_close(loss, jnp.sum(-LOGP * counted) / counted.sum())
    assert_close(grad, -counted / counted.sum())


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            [Term("rows", row_sum, per="row")],
            "term 'rows' has one value a row, so aggregate must be seq_mean, group_mean or unit_mean",
        ),
        ([Term("rows", row_sum, aggregation.seq_sum, per="row")], "term 'rows' has one value a row"),
        ([Term("a", nll), Term("a", square)], "two terms of one name"),
        ([], "at least one term"),
        ([Term("a", nll, coef=0.0), Term("b", nll, coef=0)], "at least one term whose coefficient is not 0"),
    ],
)
def test_from_terms_refuses(terms, message):
    with pytest.raises(ValueError, match=message):
        from_terms(terms)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            Term("rows", row_sum),
            r"'rows' gave a value of shape \(8,\) where its weight has \(8, 5\); .*asks for \[B, T\]",
        ),
        (
            Term("nll", nll, aggregation.seq_mean, per="row"),
            r"'nll' gave a value of shape \(8, 5\) where its weight has \(8,\); .*asks for \[B\]",
        ),
    ],
)
def test_from_terms_refuses_a_value_of_the_other_kind(term, message):
    with pytest.raises(ValueError, match=message):
        evaluate(from_terms([term]), lambda _: TokenStats(logp=LOGP), rollouts())


def test_from_terms_takes_a_coef_that_is_a_function_of_the_state_and_gives_it_a_gradient():
    term = Term("nll", nll, coef=lambda state: state.memory["mu"] * (state.iteration + 2))
    scheduled = from_terms([term], hooks=Hooks(memory={"mu": jnp.float32(3)}))
    plain = evaluate(from_terms([Term("nll", nll)]), lambda _: TokenStats(logp=LOGP), rollouts())[0]
    assert_close(evaluate(scheduled, lambda _: TokenStats(logp=LOGP), rollouts())[0], 6 * plain)

    def of(coef):
        return evaluate(from_terms([Term("nll", nll, coef=coef)]), lambda _: TokenStats(logp=LOGP), rollouts())[0]

    assert_close(jax.grad(of)(0.7), plain)


# ---- a Python 0 removes a term, a traced 0 does not -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("coef", "off"),
    [
        (0, True),
        (0.0, True),
        (-0.0, True),
        (0.1, False),
        (np.zeros(()), False),
        (jnp.float32(0), False),
        (lambda state: 0.0, False),
    ],
)
def test_is_off_is_a_python_zero(coef, off):
    assert is_off(coef) is off


def test_grpo_with_beta_of_a_python_zero_has_neither_the_term_nor_its_need():
    with_kl, without = make("grpo"), make("grpo", beta=0)
    assert "logp_ref" in with_kl.asks.needs and "logp_ref" not in without.asks.needs
    bare = rollouts(logp_ref=None)
    assert "loss/kl_ref" not in value_and_grad(without, bare)[2]
    with pytest.raises(MissingField, match="no 'logp_ref'"):
        value_and_grad(with_kl, bare)


def test_grpo_with_beta_of_a_traced_zero_keeps_the_term():
    def run(beta):
        objective = make("grpo", beta=beta)
        assert "logp_ref" in objective.asks.needs
        return value_and_grad(objective, rollouts())

    value, grad, report = jax.vmap(run)(jnp.array([0.0, 0.04]))
    assert "loss/kl_ref" in report
    off, on = (value_and_grad(make("grpo", beta=beta), rollouts()) for beta in (0, 0.04))
    assert_close((value, grad), jax.tree.map(lambda *x: jnp.stack(x), off[:2], on[:2]))


@pytest.mark.parametrize(("name", "hyperparameter", "need"), [("rloo", "beta", "logp_ref"), ("dapo", "penalty", None)])
def test_shaping_is_off_by_a_python_zero_and_not_by_a_traced_one(name, hyperparameter, need):
    assert need not in make(name, **{hyperparameter: 0}).asks.needs

    def run(x):
        objective = make(name, **{hyperparameter: x})
        assert need is None or need in objective.asks.needs
        batch = rollouts(correct=jnp.arange(B) % 2 == 0)
        return value_and_grad(objective, batch)[:2]

    off = value_and_grad(make(name, **{hyperparameter: 0}), rollouts(correct=jnp.arange(B) % 2 == 0))[:2]
    assert_close(jax.vmap(run)(jnp.zeros(1)), jax.tree.map(lambda x: x[None], off))


# ---- linearized ---------------------------------------------------------------------------------------------------


def root(s):
    return jnp.sqrt(s + 0.1)


@pytest.mark.parametrize("aggregate", [aggregation.token_mean, aggregation.seq_mean, aggregation.group_mean])
def test_linearized_has_the_value_and_gradient_of_f_of_the_mean(aggregate):
    batch = rollouts(count=COUNT)  # with an empty row, so that the weights of seq_mean sum to less than 1
    weight = aggregate(MASK, COUNT, batch)
    got = value_and_grad(from_terms([linearized(Term("square", square, aggregate), root)]), batch)
    assert_close(got[:2], jax.value_and_grad(lambda logp: root(jnp.sum(weight * logp**2)))(LOGP))


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_linearized_under_microbatches_with_a_peek(n):
    objective = from_terms([linearized(Term("square", square), root), Term("nll", nll, coef=0.1)])
    assert objective.asks.peeks == {"logp"}
    batch, state = objective.prepare(rollouts(count=COUNT, per_row={"x": LOGP}), objective.init())

    def apply(params, part):
        return TokenStats(logp=params * part.per_row["x"])

    params = jnp.float32(1.3)
    peek = score(apply, params, batch, microbatches=n)
    batch = objective.weigh(batch, state, peek)
    value, grad, report = accumulate(objective, apply, params, batch, state, microbatches=n)
    weight = aggregation.token_mean(MASK, COUNT, batch)

    def plain(p):
        return root(jnp.sum(weight * (p * LOGP) ** 2)) - 0.1 * jnp.sum(weight * p * LOGP)

    assert_close((value, grad), jax.value_and_grad(plain)(params))
    assert_close(results(report)["loss/square"], root(jnp.sum(weight * (params * LOGP) ** 2)))


def test_linearized_without_a_peek_is_not_weighed():
    objective = from_terms([linearized(Term("square", square), root)])
    with pytest.raises(ValueError, match=r"peeks at \['logp'\] of the current policy before its weights are fixed"):
        objective.weigh(*objective.prepare(rollouts(), objective.init()), None)


def test_from_terms_lets_weigh_see_the_peek():
    """A bound that depends on the whole batch's current log-probs, decided before the pass."""

    def bound(batch, state, peek):
        highest = jnp.max(jnp.where(batch.mask > 0, peek.logp, -jnp.inf))
        return batch.replace(per_row={**batch.per_row, "bound": jnp.full(B, highest - 1)})

    def bounded(stats, batch, state):
        return -jnp.minimum(stats.logp, batch.per_row["bound"][:, None])

    objective = from_terms([Term("nll", bounded)], asks=asks_of(peeks=("logp",)), hooks=Hooks(weigh=bound))
    highest = jnp.max(jnp.where(MASK > 0, LOGP, -jnp.inf)) - 1
    value, grad, _ = value_and_grad(objective, rollouts())
    assert_close(value, jnp.sum(-jnp.minimum(LOGP, highest) * MASK) / MASK.sum())
    assert not np.any(np.where(LOGP > highest, grad, 0)), "the bound is a constant"


# ---- evaluate -----------------------------------------------------------------------------------------------------


def test_evaluate_has_the_gradient_and_the_metrics_of_reinforce():
    objective = make("reinforce", baseline="batch_mean")
    value, grad, report = value_and_grad(objective, rollouts(count=COUNT))
    reward = jnp.arange(B, dtype=jnp.float32)
    adv = reward - jnp.sum(reward * COUNT) / COUNT.sum()
    counted = MASK * COUNT[:, None]
    assert_close(grad, -adv[:, None] * counted / counted.sum())
    assert_close(value, jnp.sum(-adv[:, None] * LOGP * counted) / counted.sum())
    assert {
        "loss",
        "loss/policy",
        "reward/mean",
        "reward/std",
        "adv/mean",
        "adv/std",
        "ratio/mean",
        "ratio/max",
        "ratio/clip_frac",
        "kl/old_k3",
        "kl/ref_k3",
        "length/mean",
        "group/degenerate_frac",
    } <= set(report)


def test_evaluate_without_logp_old_compares_the_policy_with_itself():
    absent, present = (value_and_grad(make("grpo"), rollouts(logp_old=old)) for old in (None, LOGP))
    assert_close(absent[:2], present[:2])
    assert float(absent[2]["ratio/max"]) == 1 and float(absent[2]["ratio/clip_frac"]) == 0
    assert np.any(absent[1]), "ratio 1 still has a gradient"


def test_evaluate_goes_on_from_a_state():
    objective = from_terms([Term("nll", nll, coef=lambda state: state.iteration + 1.0)])
    state = objective.init()
    _, state = objective.prepare(rollouts(), state)
    first = evaluate(objective, lambda _: TokenStats(logp=LOGP), rollouts())[0]
    second = evaluate(objective, lambda _: TokenStats(logp=LOGP), rollouts(), state)[0]
    assert_close(second, 2 * first)


def test_evaluate_asks_for_what_is_needed_by_name():
    with pytest.raises(
        MissingField, match="the batch has no 'group', which this objective needs: .*The batch has: .*mask"
    ):
        evaluate(make("grpo", beta=0), lambda _: TokenStats(logp=LOGP), Rollouts(mask=MASK))


# ---- policy_gradient ----------------------------------------------------------------------------------------------


def test_policy_gradient_filters_before_it_shapes_and_takes_advantages_after():
    seen = []

    def keep(batch, state):
        seen.append(batch.reward)
        return batch.reward > 1

    def advantage(batch, state):
        seen.append((batch.reward, batch.count))
        return batch.reward

    objective = policy_gradient(
        advantage=Advantage(advantage, asks_of("reward")),
        ratio=make("token", "ratio"),
        surrogate=make("log_prob", "surrogate"),
        aggregate=aggregation.seq_mean,
        filters=[Filter(keep)],
        shaping=[Shaping(lambda b, s: b.reward * 10), Shaping(lambda b, s: b.reward + 1)],
    )
    batch, _ = objective.prepare(rollouts(), objective.init())
    np.testing.assert_array_equal(seen[0], np.arange(B))
    np.testing.assert_array_equal(seen[1][0], 10 * np.arange(B) + 1)
    np.testing.assert_array_equal(batch.count, np.arange(B) > 1)
    assert objective.asks.needs == {"reward"}


@pytest.mark.parametrize("field", ["reward", "logp"])
@pytest.mark.parametrize("name", ["reinforce", "rloo", "grpo"])
def test_a_row_that_does_not_count_cannot_poison_the_gradient(name, field):
    """A verifier that failed gives a reward of NaN: count 0 has to be enough (a weight of 0 is not: 0 * NaN)."""
    batch = rollouts(count=COUNT)
    if field == "reward":
        got = value_and_grad(make(name), batch.replace(reward=batch.reward.at[2].set(jnp.nan)))
    else:
        got = value_and_grad(make(name), batch, LOGP.at[2].set(jnp.nan))
    assert_close(got, value_and_grad(make(name), batch))


def test_policy_gradient_of_a_ratio_per_sequence_refuses_an_advantage_per_token():
    objective = policy_gradient(
        advantage=Advantage(lambda batch, state: jnp.ones((B, T))),
        ratio=make("sequence", "ratio"),
        surrogate=make("clipped", "surrogate"),
        aggregate=aggregation.seq_mean,
    )
    with pytest.raises(ValueError, match="a ratio per sequence needs an advantage per row"):
        value_and_grad(objective, rollouts())


# ---- preference ---------------------------------------------------------------------------------------------------


def log_sigmoid_loss(margin, batch):
    return -jax.nn.log_sigmoid(margin)


def written_dpo(logp, beta, reference, normalize, count):
    """DPO by hand (arXiv:2305.18290, eq. 7), pair by pair."""
    losses = []
    for i in range(0, B, 2):
        score = [jnp.sum((logp[j] - (LOGP[j] - 0.3 if reference else 0)) * MASK[j]) for j in (i, i + 1)]
        if normalize:
            score = [s / max(float(MASK[j].sum()), 1) for s, j in zip(score, (i, i + 1), strict=True)]
        losses.append(count[i] * -jnp.log(1 / (1 + jnp.exp(-beta * (score[0] - score[1])))))
    return sum(losses) / count[::2].sum()


@pytest.mark.parametrize("reference", ["ref", None])
@pytest.mark.parametrize("normalize", [False, True])
def test_preference_is_dpo(reference, normalize):
    objective = preference(log_sigmoid_loss, beta=0.4, reference=reference, normalize_length=normalize)
    assert objective.unit.layout == PAIR and ("logp_ref" in objective.asks.needs) is (reference == "ref")
    count = jnp.array([1, 1, 0, 0, 2, 2, 1, 1], jnp.float32)
    expected = jax.value_and_grad(written_dpo)(LOGP, 0.4, reference, normalize, count)
    value, grad, report = value_and_grad(objective, pairs(count=count))
    assert_close((value, grad), expected)
    assert {"logp/chosen", "logp/rejected", "preference/margin"} <= set(report)
    assert 0 <= float(report["preference/accuracy"]) <= 1


def test_preference_states_its_beta():
    """Where an answer's implied reward is ``beta sum_t (logp - logp_ref)``."""
    assert preference(log_sigmoid_loss, beta=0.4).beta == 0.4
    for other in (dict(beta=None), dict(reference=None), dict(reference="prev"), dict(normalize_length=True)):
        assert preference(log_sigmoid_loss, **{"beta": 0.4, **other}).beta is None
    plain, one = preference(log_sigmoid_loss), preference(log_sigmoid_loss, beta=1.0)
    assert_close(value_and_grad(plain, pairs())[:2], value_and_grad(one, pairs())[:2])


def test_preference_metrics_are_told_apart_by_role():
    report = value_and_grad(preference(log_sigmoid_loss, beta=0.4), pairs())[2]
    row = (LOGP * MASK).sum(-1)
    assert_close((report["logp/chosen"], report["logp/rejected"]), (row[::2].mean(), row[1::2].mean()))


def test_preference_refuses_another_layout():
    objective = preference(log_sigmoid_loss, beta=0.4)
    with pytest.raises(ValueError, match=r"Rollouts.layout is \(\); .*needs units of rows \('chosen', 'rejected'\)"):
        value_and_grad(objective, rollouts(role=jnp.zeros(B, jnp.int32)))
    with pytest.raises(ValueError, match="Rollouts.layout .*'rejected', 'chosen'"):
        value_and_grad(objective, pairs().replace(layout=PAIR[::-1]))


def test_preference_asks_for_roles():
    """Filled in as "own" by `complete`, they would leave logp/chosen and logp/rejected 0 without a word."""
    with pytest.raises(MissingField, match="no 'role'"):
        value_and_grad(preference(log_sigmoid_loss, beta=0.4), pairs().replace(role=None))


# ---- the clock ----------------------------------------------------------------------------------------------------


def test_from_terms_counts_iterations_and_steps():
    def count(state, batch, report):
        return state.replace(memory={"seen": state.memory["seen"] + 1})

    objective = from_terms([Term("nll", nll)], hooks=Hooks(memory={"seen": jnp.int32(0)}, update=count))
    state = objective.init()
    assert (int(state.iteration), int(state.step)) == (-1, 0)
    for i in range(2):
        batch, state = objective.prepare(rollouts(), state)
        for _ in range(3):
            state = objective.update(state, batch, {})
        assert (int(state.iteration), int(state.step), int(state.memory["seen"])) == (i, 3 * (i + 1), 3 * (i + 1))


def test_from_terms_completes_the_batch_in_prepare():
    objective = from_terms([Term("nll", nll)])
    batch, _ = objective.prepare(Rollouts(mask=MASK), objective.init())
    jax.tree.map(np.testing.assert_array_equal, batch, complete(Rollouts(mask=MASK)))
