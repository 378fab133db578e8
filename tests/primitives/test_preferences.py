"""Links, truth tables, samplers, rewards and diagnostics of preferences, against plain Python in float64."""

import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from jaxpo import make
from jaxpo.batch import Pairs, Rollouts, TokenStats
from jaxpo.metrics import results
from jaxpo.primitives import preference_data as data
from jaxpo.primitives import preference_diagnostics as diagnostics
from jaxpo.primitives import preferences, regularizers, shaping


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


RNG = np.random.default_rng(0)


def close(a, b, **tolerance):
    np.testing.assert_allclose(a, b, **{"rtol": 1e-9, "atol": 1e-12, **tolerance})


# ---- links and odds -----------------------------------------------------------------------------------------------


def test_hinge_has_no_gradient_at_its_kink():
    close(jax.grad(lambda z: preferences.hinge(z, 1.0))(1.0), 0)
    close(jax.grad(lambda z: preferences.hinge(z, 1.0))(0.999), -1)


@pytest.mark.parametrize("a", (-1e-9, -1e-5, -0.3, -math.log(2), -0.8, -40.0, -700.0))
def test_log1mexp(a):
    close(preferences.log1mexp(jnp.float64(a)), math.log(-math.expm1(a)), rtol=1e-14)
    close(jax.grad(preferences.log1mexp)(jnp.float64(a)), math.exp(a) / math.expm1(a), rtol=1e-12)


def test_log_odds_is_clamped():
    assert np.isfinite(preferences.log_odds(jnp.array([0.0, 3.0]))).all()
    close(preferences.log_odds(jnp.log(0.8)), math.log(4))


def test_a_world_in_neither_set_is_conditioned_away_and_one_in_both_does_not_matter_alone():
    w, l = jnp.log(0.7), jnp.log(0.2)  # noqa: E741
    close(preferences.log_model_count_ratio(w, l, "TF / FT"), math.log(0.7 * 0.8 / (0.3 * 0.2)))
    close(preferences.log_model_count_ratio(w, l, "TF TT / FT TT"), math.log((0.56 + 0.14) / (0.06 + 0.14)))


# ---- iterates and mixtures ----------------------------------------------------------------------------------------


def test_the_mixture_goes_from_the_policy_to_the_reference():
    a, b = RNG.normal(size=(2, 3, 5))
    close(preferences.geometric_mixture(a, b, 0.0), jax.nn.log_softmax(a))
    close(preferences.geometric_mixture(a, b, 1.0), jax.nn.log_softmax(b))
    p = np.exp(0.875 * a + 0.125 * b)
    close(preferences.geometric_mixture(a, b, 0.125), np.log(p / p.sum(-1, keepdims=True)))


def test_averages_of_weights():
    old, new = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
    for b, expected in ((0.0, 0.0), (1.0, 1.0), (0.25, 0.25)):  # EMA: the new weights, the old ones, between
        close(preferences.blend(new, old, b)["w"], expected)
    close(preferences.blend(old, old, 0.5)["w"], 1)  # the soup of two identical models
    close(preferences.blend({"w": jnp.full(2, 3.0)}, old, 0.0)["w"], 3)  # alpha = 1: the first model


def test_extrapolation():
    new, prev = RNG.normal(size=(2, 4))
    close(preferences.extrapolate(new, prev, 0.0), new)
    close(preferences.extrapolate(new, new, 0.7), new)
    logits = preferences.extrapolate(new, prev, 0.3)
    log_probs = preferences.extrapolate(jax.nn.log_softmax(new), jax.nn.log_softmax(prev), 0.3)
    close(jax.nn.log_softmax(logits), jax.nn.log_softmax(log_probs))


# ---- the rejection sampler ----------------------------------------------------------------------------------------


def listing(rewards, uniforms, beta, n, texts=None):
    """The sampler as the card tells it."""
    texts = list(range(len(rewards))) if texts is None else texts
    place, reward = {}, {}
    for i, (text, r) in enumerate(zip(texts, rewards, strict=True)):
        place.setdefault(text, i)
        reward[text] = r
    left, accepted, draws = list(place), [], iter(uniforms)
    while len(accepted) < min(n, len(place)):
        highest, taken = max(reward[t] for t in left), []
        for t in left:
            if next(draws) < math.exp((reward[t] - highest) / beta):
                taken.append(t)
                accepted.append(t)
                if len(accepted) == min(n, len(place)):
                    break
        left = [t for t in left if t not in taken]
    return [place[t] for t in accepted]


@pytest.mark.parametrize("texts", (None, [0, 1, 0, 2, 3, 1, 4]))
def test_rejection_sampler(texts):
    sample = jax.jit(data.rejection_sample, static_argnames=("n",))
    rng = random.Random(0)
    for n, beta in ((1, 0.5), (3, 0.5), (7, 0.2), (7, 3.0)):
        rewards, uniforms = [rng.gauss(0, 1) for _ in range(7)], [rng.random() for _ in range(7 * n)]
        text = None if texts is None else jnp.array(texts)
        index, k = sample(jnp.array(rewards), jnp.array(uniforms), beta=beta, n=n, text=text)
        expected = listing(rewards, uniforms, beta, n, texts)
        assert index[:k].tolist() == expected and (index[k:] == -1).all()


def test_rejection_sampler_cold_and_hot():
    rewards, uniforms = jnp.array(RNG.normal(size=6)), jnp.array(RNG.random(18))
    cold, _ = data.rejection_sample(rewards, uniforms, beta=1e-6, n=3)
    assert cold.tolist() == np.argsort(-rewards)[:3].tolist()
    hot, _ = data.rejection_sample(rewards, uniforms, beta=1e9, n=3)
    assert hot.tolist() == [0, 1, 2]


def test_rejection_sampler_wants_enough_draws():
    with pytest.raises(ValueError, match=r"uniforms must have shape \(12,\) = n x candidates, not \(5,\)"):
        data.rejection_sample(jnp.zeros(6), jnp.zeros(5), beta=1.0, n=2)


def test_ranker_reward():
    close(jax.nn.sigmoid(data.ranker_reward(jnp.array([0.2, 0.9]))), [0.2, 0.9])
    assert np.isfinite(data.ranker_reward(jnp.array([0.0, 1.0]))).all()


# ---- pair rules ---------------------------------------------------------------------------------------------------


def test_best_and_worst():
    best, worst, kept = data.best_and_worst(jnp.array([[1.0, 3.0, 2.0], [1.0, 1.0, 1.0]]))
    assert best.tolist() == [1, 0] and worst.tolist() == [0, 0] and kept.tolist() == [True, False]
    assert not data.best_and_worst(jnp.ones((2, 1)))[2].any()
    assert not data.best_and_worst(jnp.array([[0.0, 0.5]]), margin=0.5)[2].any()


def test_win_matrix():
    P = data.win_matrix(jnp.array([0.0, 1.0, -1.0]))  # noqa: N806
    close(jnp.diag(P), 0.5), close(P + P.T, 1), close(P[1, 0], 1 / (1 + math.exp(-1)))


def test_graded_pairs():
    scores, teacher = jnp.array([6.0, 5.0, 4.0, 3.0]), jnp.array([True, False, False, False])
    pairs = data.graded_pairs(scores, teacher)
    assert pairs.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    options = dict(positive=4.0, teacher_gap=3.0, own_gap=2.0)
    pairs = data.graded_pairs(scores, teacher, jnp.array([False, True, False, False]), **options)
    # The second repeats itself: rejected against all that are good enough, and never chosen.
    assert pairs.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_weights_of_edits():
    close(data.severity_weight(jnp.arange(5)), [1, 2.5, 2, 1.5, 1])
    close(data.relevance_weight(jnp.array([1, 0])), [3, 1])


def test_easy_pairs_part_the_data():
    assert data.easy_pairs(jnp.array([1.0, 0.0, 3.0]), jnp.array([0.5, 2.0, 2.0]), gap=1.0).tolist() == [0, 1, 0]


def test_true_utility():
    satisfies = jnp.array([[1, 1, 0]] * 5)
    cost = jnp.array([[4.0, 2.0, 1.0]] * 5)
    close(data.true_utility(jnp.array([-1, 0, 1, 2, 1]), satisfies.at[4].set(0), cost), [0, 0.5, 1, -1, -1])
    close(data.normalized_rating(jnp.array([1, 3, 5])), [-1, 0, 1])


# ---- rewards ------------------------------------------------------------------------------------------------------


def shaped(name: str, **fields) -> np.ndarray:
    options = fields.pop("options", {})
    batch = Rollouts(mask=jnp.ones((2, 3)), reward=jnp.array([1.0, 2.0]), per_row=fields)
    return make(name, "reward", **options).fn(batch, None)


def test_flr():
    pos, neg = jnp.asarray(RNG.normal(size=(2, 2, 3)))
    close(shaped("flr", pos_ll=pos, neg_ll=neg), (pos - neg).mean(1))
    close(shaped("flr", pos_ll=neg, neg_ll=pos), -shaped("flr", pos_ll=pos, neg_ll=neg))
    moved = jnp.array([5.0, 0.0, -1.0])
    close(shaped("flr", pos_ll=pos + moved, neg_ll=neg + moved), shaped("flr", pos_ll=pos, neg_ll=neg))


def test_relevance():
    fields = dict(rel_query=[0.8, 0.8], rel_answer=[0.3, 0.3], open_ended=[1, 0], num_words=[50, 50])
    fields = {k: jnp.asarray(x) for k, x in {**fields, "num_tri": [8, 8], "uniq_tri": [6, 6]}.items()}
    base = shaped("relevance_reward_r3", **fields)
    close(base, [0.8 * 0.5 * 0.75, 0.3 * 0.75])
    longer = shaped("relevance_reward_r3", **fields | {"num_words": jnp.array([100, 100])})
    close(longer, [2 * base[0], base[1]])  # only open-ended questions reward length
    close(shaped("relevance_reward_r3", **fields | {"rel_query": jnp.zeros(2)})[1], base[1])
    short = shaped("relevance_reward_r3", **fields | {"num_tri": jnp.zeros(2), "uniq_tri": jnp.zeros(2)})
    close(short, [0.4, 0.3])  # no trigram: no repetition
    close(shaped("relevance_reward_r3", options=dict(scale=2.0, shift=0.1), **fields)[1], 0.7 * 0.75)


def test_orchestrated_reward():
    scores = jnp.asarray(RNG.normal(size=(2, 3)))
    close(shaped("preference_orchestrator", adapter_logits=jnp.zeros((2, 3)), cand_scores=scores), scores.mean(1))
    close(shaped("preference_orchestrator", adapter_logits=jnp.ones((2, 1)), cand_scores=scores[:, :1]), scores[:, 0])


def test_rluf_reward():
    scores = jnp.asarray(RNG.normal(size=(2, 3)))
    close(shaped("rluf", options=dict(weights=(0.0, 1.0, 0.0)), obj_scores=scores), scores[:, 1])
    with pytest.raises(ValueError, match="weights has 3 numbers for the 2 columns of obj_scores"):
        shaped("rluf", obj_scores=scores[:, :2])


def test_rso_reward():
    rho = jnp.array([0.2, 1.0])
    close(jax.nn.sigmoid(shaped("rso_reward", pref_opp=rho)), [0.2, 1 - 1e-6])
    close(jax.nn.sigmoid(shaped("rso_reward", pref_opp=rho, options=dict(clip=0.3))), [0.3, 0.7])


def test_rlhs_reward():
    close(shaped("rlhs", likert=jnp.array([1, 4])), [-1, 0.5])
    fields = dict(
        choice=jnp.array([1.0, -1.0]), satisfies=jnp.array([[1, 1], [0, 1]]), cost=jnp.array([[1, 4], [2, 2]])
    )
    close(shaped("rlhs", options=dict(form="utility"), **fields), [0.25, 0])
    with pytest.raises(ValueError, match="form must be one of rating, utility"):
        make("rlhs", "reward", form="hindsight")


def test_salsa_reward():
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    batch = Rollouts(
        mask=mask,
        reward=jnp.array([1.0, 2.0]),
        logp_old=jnp.full((2, 3), -1.0),
        per_token={"logp_soup": jnp.full((2, 3), -3.0)},
    )
    close(make("salsa", "reward", kl_coef=0.1).fn(batch, None), [1 - 0.4, 2 - 0.2])
    same = batch.replace(logp_soup=batch.logp_old, logp_ref=batch.per_token["logp_soup"])
    close(make("salsa", "reward").fn(same, None), same.reward)
    plain = make("kl_in_reward", "reward", beta=0.01).fn(same, None)  # alpha = 1: the soup is the reference
    close(make("salsa", "reward").fn(batch, None), plain)


def test_standardized():
    x = jnp.array([[1.0, 5.0], [3.0, 5.0], [9.0, 5.0]])
    close(shaping.standardized(x, jnp.array([1, 1, 0])), [[-1, 0], [1, 0], [7, 0]])


# ---- the chi-square penalty ---------------------------------------------------------------------------------------


def penalty(kind: str, logp, ref, mask):
    objective = jaxpo.make("policy_gradient", regularizers=f"0.5 * orpo_chi2(kind={kind!r})", advantage="reward")
    batch = Rollouts(mask=mask, reward=jnp.zeros(len(mask)), logp_ref=ref, group=jnp.zeros(len(mask), jnp.int32))
    return jaxpo.evaluate(objective, lambda _: TokenStats(logp=logp), batch)[0]


@pytest.mark.parametrize("kind", ("sqrt_chi2", "chi2", "kl"))
def test_orpo_chi2(kind):
    mask = jnp.asarray(RNG.random((4, 5)) < 0.7, float)
    logp = jnp.asarray(RNG.normal(size=(4, 5)))
    ref = jnp.asarray(logp + RNG.normal(size=(4, 5)))
    R = ((logp - ref) * mask).sum(1)  # noqa: N806
    chi2, kl = float(jnp.mean(jnp.exp(R) + jnp.exp(-R) - 2)), float(jnp.mean(R + jnp.exp(-R) - 1))
    assert chi2 >= kl >= 0
    value, grad = jax.value_and_grad(lambda x: penalty(kind, x, ref, mask))(logp)
    slope = (jnp.exp(R) - jnp.exp(-R)) / 4 if kind != "kl" else (1 - jnp.exp(-R)) / 4
    root = 1 / (2 * math.sqrt(chi2)) if kind == "sqrt_chi2" else 1
    close(value, 0.5 * {"sqrt_chi2": math.sqrt(chi2), "chi2": chi2, "kl": kl}[kind])
    close(grad, 0.5 * root * slope[:, None] * mask)
    value, grad = jax.value_and_grad(lambda x: penalty(kind, x, logp, mask))(logp)
    close(value, 0.5 * 1e-2 if kind == "sqrt_chi2" else 0), close(grad, 0)


def test_chi2_is_linear_in_its_tails():
    e = regularizers.linear_tailed_expm1
    close(e(jnp.array([2.0, 12.0]), 10.0), [math.expm1(2), math.exp(10) * 3 - 1])
    close(jax.grad(lambda x: e(x, 10.0))(50.0), math.exp(10))


def test_occupancy_penalties():
    d = jnp.asarray(RNG.normal(1, 0.3, 200))
    x = np.expm1(np.asarray(d))
    close(regularizers.occupancy_penalty(d, "kl"), d)
    close(regularizers.occupancy_penalty(d, "chi2"), x)
    close(regularizers.occupancy_penalty(d, "sqrt_chi2"), x / math.sqrt(np.sort(x)[2:-2].mean()))
    close(regularizers.occupancy_penalty(-d, "sqrt_chi2"), np.expm1(-np.asarray(d)))  # no positive mean: as it is
    close(regularizers.occupancy_penalty(d, "tv"), np.sign(d))
    with pytest.raises(ValueError, match="kind must be one of kl, chi2, sqrt_chi2, tv, not 'chi'"):
        regularizers.occupancy_penalty(d, "chi")


def test_the_discriminator_finds_the_log_ratio():
    p, q = 0.7, 0.2  # of one state under policy and base
    slope = jax.grad(lambda d: p * regularizers.discriminator_loss(d, 1) + q * regularizers.discriminator_loss(d, 0))
    close(slope(jnp.log(p / q)), 0)


# ---- diagnostics --------------------------------------------------------------------------------------------------

W, L, REF_W, REF_L = jnp.asarray(-RNG.exponential(3, (4, 50)))


def test_idealized_accuracy_between_reference_and_labels():
    p = jnp.asarray(RNG.random(50))
    close(diagnostics.idealized_accuracy(REF_W, REF_L, p, 1e12), diagnostics.ranking_accuracy(REF_W, REF_L))
    close(diagnostics.idealized_accuracy(REF_W, REF_L, p, 1e-9), p > 0.5)
    assert np.isfinite(diagnostics.idealized_accuracy(REF_W, REF_L, jnp.ones(50), 0.1)).all()


def test_a_pair_is_ranked_right_iff_its_loss_is_below_the_threshold():
    beta = 0.3
    loss = preferences.logistic(beta * ((W - REF_W) - (L - REF_L)))
    right = loss < diagnostics.loss_to_rank_right(REF_W, REF_L, beta)
    assert (right == (diagnostics.ranking_accuracy(W, L) > 0)).all() and 0 < right.sum() < 50


@pytest.mark.parametrize("normalized", (False, True))
def test_ranking_diagnostic(normalized):
    batch = Pairs([[1], [1]], [[2, 3], [2]], [[4], [5, 6, 7]])
    logp = jnp.array([[-1.0, -1, 9], [-1.5, 9, 9], [-2, 9, 9], [-1, -1, -1]])
    batch = batch.replace(logp_ref=jnp.full((4, 3), -1.0), pref_prob=jnp.array([0.9, 0, 0.4, 0]))
    measure = make("dpo_ranking_accuracy", "diagnostic", beta=1.0, pref_prob=None, normalized=normalized)
    said = results(measure(TokenStats(logp=logp), batch))
    expected = dict(ranking_accuracy=0.5, reward_accuracy=0.5, idealized_accuracy=1.0, difficulty=-0.5)
    if normalized:
        expected |= dict(ranking_accuracy=0.5)  # of averages; the others compare sums, as the card has them
    assert {k.removeprefix("preference/"): float(x) for k, x in said.items()} == pytest.approx(expected)


def test_only_the_ranking_reads_lengths():
    batch = Pairs([[1], [1]], [[2, 3], [2]], [[4], [5, 6, 7]])
    logp = jnp.array([[-1.0, -2, 9], [-2, 9, 9], [-2, 9, 9], [-1, -1, -1]])  # means: other signs than sums
    batch = batch.replace(logp_ref=jnp.array([[-1.0, -1, 9], [-3, 9, 9], [-2, 9, 9], [-1, -1, -1]]))
    measure = make("dpo_ranking_accuracy", "diagnostic", beta=1e9, normalized=True)
    said = {k.removeprefix("preference/"): float(x) for k, x in results(measure(TokenStats(logp=logp), batch)).items()}
    expected = dict(ranking_accuracy=0.5, reward_accuracy=0.0, idealized_accuracy=1.0, difficulty=-1.0)
    assert said == pytest.approx(expected)
    flipped = logp.at[1].set(jnp.array([-1.4, 9, 9]))  # -1.5 < -1.4 on average
    said = results(measure(TokenStats(logp=flipped), batch))
    assert float(said["preference/ranking_accuracy"]) == 0.0


def test_mode_gradients():
    logits, target = RNG.normal(size=(2, 5))
    q = np.exp(target) / np.exp(target).sum()

    def kl(a, b):
        return jnp.sum(jnp.exp(a) * (a - b))

    for direction, loss in (
        ("forward", lambda x: kl(jnp.log(q), jax.nn.log_softmax(x))),
        ("reverse", lambda x: kl(jax.nn.log_softmax(x), jnp.log(q))),
    ):
        gradient = make("mode_seeking", "diagnostic", direction=direction)
        close(gradient(logits, target), jax.grad(loss)(logits))
        close(gradient(target, target), 0)
    empty = np.array([-60.0, 0, 0, 0, 0])
    close(diagnostics.reverse_kl_gradient(empty, target)[0], 0)
    close(diagnostics.forward_kl_gradient(empty, target)[0], -q[0])
