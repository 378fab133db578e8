"""Exact enumeration shows what the estimators estimate.

A tabular policy over 3 tokens writes answers of at most 3, and every answer is visited: an "expected gradient" here is
the sum over all groups of answers of probability times the gradient of the loss. There is no sampling error.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from jaxpo.primitives.regularizers import kl_estimate, kl_penalty
from tests.oracles.cases import COMPILE_FAST

VOCABULARY, LENGTH, END = 3, 3, 2


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def _answers() -> list[tuple[int, ...]]:
    """Every answer: it ends with END, or is LENGTH long."""
    done, open_ = [], [()]
    while open_:
        longer = [prefix + (token,) for prefix in open_ for token in range(VOCABULARY)]
        done += [y for y in longer if y[-1] == END or len(y) == LENGTH]
        open_ = [y for y in longer if y[-1] != END and len(y) < LENGTH]
    return done


ANSWERS = _answers()
CONTEXTS = sorted({y[:t] for y in ANSWERS for t in range(len(y))}, key=lambda c: (len(c), c))
MASK = np.array([[t < len(y) for t in range(LENGTH)] for y in ANSWERS])
AT = np.array([[CONTEXTS.index(y[:t]) if t < len(y) else 0 for t in range(LENGTH)] for y in ANSWERS])
TOKEN = np.array([[y[t] if t < len(y) else 0 for t in range(LENGTH)] for y in ANSWERS])

_rng = np.random.default_rng(0)
LOGITS, LOGITS_REF, LOGITS_BEHAVIOUR = [1.2 * _rng.normal(size=(len(CONTEXTS), VOCABULARY)) for _ in range(3)]
REAL = _rng.normal(size=len(ANSWERS))
BINARY = np.array([float(sum(y) % 3 == 0) for y in ANSWERS])


def log_probs(logits):
    """[answers, LENGTH] log-prob of every token of every answer (0 after its end)."""
    return jnp.where(MASK, jax.nn.log_softmax(logits)[AT, TOKEN], 0)


def probabilities(logits):
    return jnp.exp(log_probs(logits).sum(-1))


_expected_reward_gradient = jax.jit(jax.grad(lambda logits, reward: probabilities(logits) @ reward))
_pull_back = jax.jit(lambda logits, cotangent: jax.vjp(log_probs, logits)[1](cotangent)[0])


def expected_reward_gradient(reward) -> np.ndarray:
    return np.asarray(_expected_reward_gradient(jnp.asarray(LOGITS), jnp.asarray(reward)))


def expected_step(name: str, k: int, reward, sampler=LOGITS, old=None, **hyperparameters) -> np.ndarray:
    """Minus the expected gradient of the loss in the logits, over groups of ``k`` answers drawn from ``sampler``.

    Ratios are measured from ``old``, the sampler unless it is given.
    """
    objective = jaxpo.make(name, **hyperparameters)
    old = sampler if old is None else old
    logp, logp_old, logp_beh, ref = [log_probs(jnp.asarray(x)) for x in (LOGITS, old, sampler, LOGITS_REF)]
    mask, reward = jnp.asarray(MASK), jnp.asarray(reward)

    def gradient(drawn):  # [k] answers -> d loss / d logp [k, LENGTH]
        batch = jaxpo.Rollouts(
            mask=mask[drawn],
            reward=reward[drawn],
            correct=reward[drawn] > 0,
            group=jnp.zeros(k, jnp.int32),
            logp_old=logp_old[drawn],
            logp_beh=logp_beh[drawn],
            logp_ref=ref[drawn],
        )
        return jax.grad(lambda x: jaxpo.evaluate(objective, lambda _: jaxpo.TokenStats(logp=x), batch)[0])(logp[drawn])

    groups = np.array(list(itertools.product(range(len(ANSWERS)), repeat=k)))
    weight = np.prod(np.asarray(probabilities(jnp.asarray(sampler)))[groups], -1)
    assert abs(weight.sum() - 1) < 1e-12
    gradients = np.asarray(jax.jit(jax.vmap(gradient), compiler_options=COMPILE_FAST)(jnp.asarray(groups)))
    by_answer = np.zeros(MASK.shape)
    np.add.at(by_answer, groups, weight[:, None, None] * gradients)
    return -np.asarray(_pull_back(jnp.asarray(LOGITS), jnp.asarray(by_answer)))


def same_direction(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine."""
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def how_biased(step: np.ndarray, gradient: np.ndarray) -> tuple[float, float]:
    """Cosine with the gradient of the expected reward, and by how much the step is longer."""
    return same_direction(step, gradient), float(np.linalg.norm(step) / np.linalg.norm(gradient))


# ---- policy gradients ----------------------------------------------------------------------------


def test_reinforce_with_seq_sum_is_the_gradient_of_the_expected_reward():
    np.testing.assert_allclose(
        expected_step("reinforce", 1, REAL, agg="seq_sum"), expected_reward_gradient(REAL), atol=1e-12
    )


@pytest.mark.parametrize("agg", ("token_mean", "seq_mean"))
def test_reinforce_with_a_mean_over_tokens_is_not_the_gradient_of_the_expected_reward(agg):
    assert same_direction(expected_step("reinforce", 1, REAL, agg=agg), expected_reward_gradient(REAL)) < 0.99


def test_reinforce_with_batch_mean_shrinks_the_gradient_by_k_minus_1_over_k():
    step = expected_step("reinforce", 2, REAL, agg="seq_sum", baseline="batch_mean")
    np.testing.assert_allclose(step, expected_reward_gradient(REAL) / 2, atol=1e-12)


@pytest.mark.parametrize("form", ("reinforce", "ppo"))
def test_rloo_is_the_gradient_of_the_expected_reward(form):
    np.testing.assert_allclose(
        expected_step("rloo", 2, REAL, beta=0.0, form=form), expected_reward_gradient(REAL), atol=1e-12
    )


def test_rloo_with_beta_is_the_gradient_of_the_reward_minus_the_reverse_kl():
    def value(logits):
        p, log_ratio = probabilities(logits), (log_probs(logits) - log_probs(LOGITS_REF)).sum(-1)
        return p @ REAL - 0.3 * p @ log_ratio

    np.testing.assert_allclose(
        expected_step("rloo", 2, REAL, beta=0.3), jax.grad(value)(jnp.asarray(LOGITS)), atol=1e-12
    )


def test_dr_grpo_is_the_gradient_of_the_expected_reward_up_to_constants():
    step = expected_step("dr_grpo", 2, REAL, L_const=5)
    np.testing.assert_allclose(step, (2 - 1) / 2 / 5 * expected_reward_gradient(REAL), atol=1e-12)


def _std_factor(k: int, p: float) -> float:
    """By how much dividing by the group std stretches the expected gradient of rewards that are 1 with probability p.

    S ~ Binomial(K, p) successes have variance ``S (K-S) / (K (K-1))``, which leaves
    ``E[sqrt(S (K-S))] sqrt(K-1) K^(-3/2) / (p (1-p))``.
    """
    spread = sum(math.comb(k, s) * p**s * (1 - p) ** (k - s) * math.sqrt(s * (k - s)) for s in range(k + 1))
    return spread * math.sqrt(k - 1) * k**-1.5 / (p * (1 - p))


@pytest.fixture(scope="module")
def grpo_on_binary_rewards() -> dict[int, np.ndarray]:
    with jax.enable_x64(True):
        return {k: expected_step("grpo", k, BINARY, beta=0.0, adv_eps=0.0, agg="seq_sum") for k in (2, 3)}


@pytest.mark.parametrize("k", (2, 3))
def test_grpo_std_stretches_the_gradient_of_binary_rewards_by_a_known_factor(grpo_on_binary_rewards, k):
    p = float(probabilities(jnp.asarray(LOGITS)) @ BINARY)
    assert 0.05 < p < 0.95
    factor = _std_factor(k, p)
    np.testing.assert_allclose(grpo_on_binary_rewards[k], factor * expected_reward_gradient(BINARY), atol=1e-12)
    assert abs(factor - (k - 1) / k) > 0.1  # (K-1)/K is what centring alone leaves


def test_grpo_std_weighs_hard_and_easy_prompts_more_than_even_ones():
    """The difficulty bias. With K = 2 the factor is 1/sqrt(2) for every prompt; with more answers it depends on p."""
    assert _std_factor(2, 0.05) == pytest.approx(_std_factor(2, 0.5)) == pytest.approx(1 / math.sqrt(2))
    assert _std_factor(8, 0.05) > 1.3 * _std_factor(8, 0.5)
    assert _std_factor(8, 0.95) == pytest.approx(_std_factor(8, 0.05))


def test_grpo_std_climbs_the_win_rate_of_real_rewards_with_two_answers():
    """The advantage of two answers is the sign of their difference over sqrt(2): the direction is not the reward's."""
    against = np.sign(REAL[:, None] - REAL[None]) @ np.asarray(probabilities(jnp.asarray(LOGITS)))
    step = expected_step("grpo", 2, REAL, beta=0.0, adv_eps=0.0, agg="seq_sum")
    np.testing.assert_allclose(step, expected_reward_gradient(against) / math.sqrt(2), atol=1e-12)
    assert same_direction(step, expected_reward_gradient(REAL)) < 0.99


# ---- advantages, on-policy: cosine and length of the expected step, seq_sum, four answers --------

UNIT = 1 / (1 + np.exp(-REAL))

ONE_GROUP = {  # the four answers are to one prompt
    "rloo: leave one out": ("rloo", dict(beta=0.0), 1),
    "dr_grpo: less the group mean": ("dr_grpo", dict(L_const=1.0), 3 / 4),
    "reinforce: less the batch mean": ("reinforce", dict(baseline="batch_mean"), 3 / 4),
    "asymre: a constant on top": ("asymre", {}, 3 / 4),
    "bnpo: one weight": ("bnpo", {}, 3 / 4),
    "canon: less the other half": ("canon", dict(mu=1.0), 1),
    "canon: less the own half": ("canon", dict(mu=0.0), 1 / 2),
    "grpo": ("grpo", dict(beta=0.0), (0.981, 4.393)),
    "a_grae": ("a_grae", {}, (0.972, 2.108)),
    "canon: halves by length": ("canon", dict(mu=1.0, metric="length"), (0.996, 1.202)),
    "opmd: log of the mean of exp": ("opmd", dict(baseline="logavgexp", tau=0.2), (0.997, 0.700)),
    "rec: negatives dropped": ("rec", dict(drop="balance", clip_mode="none"), (0.9997, 0.642)),
}
TWO_GROUPS = {  # two prompts with two answers each
    "rloo": ("rloo", dict(beta=0.0), 1),
    "dr_grpo": ("dr_grpo", dict(L_const=1.0), 1 / 2),
    "grpo": ("grpo", dict(beta=0.0), (0.960, 2.227)),
    "lite_ppo": ("lite_ppo", {}, (0.981, 2.929)),
    "bnpo": ("bnpo", {}, (0.984, 0.179)),
    "a_grae": ("a_grae", {}, (0.928, 1.025)),
}


def expected_directions(table: dict, groups: int, rewards: dict) -> dict[str, dict[str, np.ndarray]]:
    """Of every advantage of a table: the expected step of REINFORCE with it, by kind of reward.

    CANON's metric (entropy) is the answer's place, which says nothing of the answer: as good as random."""
    drawn = np.array(list(itertools.product(range(len(ANSWERS)), repeat=4)))
    weight = np.prod(np.asarray(probabilities(jnp.asarray(LOGITS)))[drawn], -1)
    logp, mask = log_probs(jnp.asarray(LOGITS)), jnp.asarray(MASK)
    objectives = {key: jaxpo.make(name, **options) for key, (name, options, _) in table.items()}

    def advantages(drawn, reward):
        batch = jaxpo.Rollouts(
            mask=mask[drawn],
            reward=reward[drawn],
            group=jnp.arange(4) // (4 // groups),
            logp_old=logp[drawn],
            entropy_old=jnp.broadcast_to(jnp.arange(4.0)[:, None], (4, LENGTH)),
            seed=jnp.arange(4, dtype=jnp.uint32),
        )
        return {key: x.prepare(batch, x.init())[0].adv for key, x in objectives.items()}

    def direction(adv):
        by_answer = np.zeros(len(ANSWERS))
        np.add.at(by_answer, drawn, weight[:, None] * adv / 4)
        return np.asarray(_pull_back(jnp.asarray(LOGITS), jnp.asarray(by_answer[:, None] * MASK)))

    compiled = jax.jit(jax.vmap(advantages, (0, None)), compiler_options=COMPILE_FAST)
    return {
        kind: {key: direction(np.asarray(x)) for key, x in compiled(jnp.asarray(drawn), jnp.asarray(r)).items()}
        for kind, r in rewards.items()
    }


@pytest.fixture(scope="module")
def steps() -> dict[int, dict[str, dict[str, np.ndarray]]]:
    """By number of groups, kind of reward and advantage."""
    with jax.enable_x64(True):
        rewards = {"real": UNIT, "binary": BINARY}
        return {n: expected_directions(table, n, rewards) for n, table in ((1, ONE_GROUP), (2, TWO_GROUPS))}


IN_ALL = [(key, n, table[key][2]) for n, table in ((1, ONE_GROUP), (2, TWO_GROUPS)) for key in table]


@pytest.mark.parametrize("kind", ("real", "binary"))
@pytest.mark.parametrize(("key", "groups", "factor"), [x for x in IN_ALL if isinstance(x[2], int | float)])
def test_advantage_is_unbiased_up_to_a_factor(steps, key, groups, factor, kind):
    reward = {"real": UNIT, "binary": BINARY}[kind]
    np.testing.assert_allclose(steps[groups][kind][key], factor * expected_reward_gradient(reward), atol=1e-12)


@pytest.mark.parametrize(("key", "groups", "size"), [x for x in IN_ALL if isinstance(x[2], tuple)])
def test_advantage_is_biased_by_so_much(steps, key, groups, size):
    found = how_biased(steps[groups]["real"][key], expected_reward_gradient(UNIT))
    assert found == pytest.approx(size, abs=6e-4) and found[0] < 0.9998


@pytest.mark.parametrize(
    ("key", "groups", "factor"),
    (
        ("grpo", 1, 1.455),
        ("a_grae", 1, 0.397),
        ("opmd: log of the mean of exp", 1, 0.473),
        ("rec: negatives dropped", 1, 0.559),
        ("grpo", 2, 1 / math.sqrt(2)),
        ("lite_ppo", 2, 0.970),
        ("bnpo", 2, 0.372),
        ("a_grae", 2, 0.200),
    ),
)
def test_on_binary_rewards_the_bias_is_one_of_length_alone(steps, key, groups, factor):
    """What compares rows by nothing but their rewards can only stretch the gradient: one prompt against another."""
    cosine, length = how_biased(steps[groups]["binary"][key], expected_reward_gradient(BINARY))
    assert cosine == pytest.approx(1, abs=1e-12) and length == pytest.approx(factor, abs=6e-4)


def test_canon_by_length_is_biased_on_binary_rewards_too(steps):
    """Which half an answer is compared with hangs on the answer."""
    found = how_biased(steps[1]["binary"]["canon: halves by length"], expected_reward_gradient(BINARY))
    assert found == pytest.approx((0.992, 1.160), abs=6e-4)


# ---- importance weights, off-policy: one answer, no baseline -------------------------------------

ALONE = dict(advantage="reward")
BY_TOKEN, BY_ROW = dict(ALONE, agg="seq_sum"), dict(ALONE, agg="seq_mean", ratio="sequence_sum")
HALFWAY = (LOGITS + LOGITS_BEHAVIOUR) / 2


def weighted(level: str, cap: float = 1e9) -> dict:
    """REINFORCE with the weight ``policy / sampler``: the policy is the one that ratios are measured from."""
    correction = f"truncated_weight(level='{level}', cap={cap})"
    return dict(BY_TOKEN, surrogate="log_prob", old=LOGITS, corrections=correction)


@pytest.mark.parametrize(
    "spelled",
    (
        dict(BY_ROW, surrogate="linear"),
        weighted("sequence"),
        dict(BY_ROW, surrogate="linear", old=HALFWAY, corrections="truncated_weight(level='sequence', cap=1e9)"),
    ),
    ids=("ratio of sequences", "weight of sequences", "decoupled: a weight to the old policy, a ratio from it"),
)
def test_policy_gradient_off_policy_is_exact_with_the_weight_of_the_whole_sequence(spelled):
    step = expected_step("policy_gradient", 1, REAL, LOGITS_BEHAVIOUR, **spelled)
    np.testing.assert_allclose(step, expected_reward_gradient(REAL), atol=1e-12)


OFF_POLICY = {
    "none at all: REINFORCE": (dict(BY_TOKEN, surrogate="log_prob"), (0.773, 1.114)),
    "ratio of tokens": (dict(BY_TOKEN, surrogate="linear"), (0.892, 1.122)),
    "weight of tokens": (weighted("token"), (0.892, 1.122)),
    "PPO": (dict(BY_TOKEN, surrogate="clipped"), (0.814, 1.117)),
    "CISPO": (dict(BY_TOKEN, surrogate="cispo"), (0.891, 1.085)),
    "GSPO, unclipped": (dict(BY_ROW, ratio="sequence", surrogate="linear"), (0.910, 0.703)),
    "ratio of sequences, clipped": (dict(BY_ROW, surrogate="clipped"), (0.904, 0.614)),
    "weight of sequences, truncated at 2": (weighted("sequence", 2.0), (0.959, 0.732)),
}


@pytest.mark.parametrize(("spelled", "size"), OFF_POLICY.values(), ids=OFF_POLICY)
def test_policy_gradient_off_policy_is_biased_by_so_much_with_any_other_weight(spelled, size):
    step = expected_step("policy_gradient", 1, REAL, LOGITS_BEHAVIOUR, **spelled)
    assert how_biased(step, expected_reward_gradient(REAL)) == pytest.approx(size, abs=6e-4)


# ---- KL estimators: values and gradients ---------------------------------------------------------


def kl(p_logits, q_logits):
    """[contexts] KL(p || q)."""
    p, q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return (jnp.exp(p) * (p - q)).sum(-1)


def expected_estimate(estimate, sampler=LOGITS) -> tuple[np.ndarray, np.ndarray]:
    """Mean over tokens drawn from ``sampler`` of ``estimate(logp, logp_ref, log q)`` and of its gradient in the logits.

    Per context. The draw is fixed: the gradient goes through logp only, as in a loss.
    """
    q = jax.nn.log_softmax(jnp.asarray(sampler))

    def value(logits):
        return (jnp.exp(q) * estimate(jax.nn.log_softmax(logits), jax.nn.log_softmax(jnp.asarray(LOGITS_REF)), q)).sum(
            -1
        )

    value_, gradient = jax.vjp(value, jnp.asarray(LOGITS))
    return np.asarray(value_), np.asarray(gradient(jnp.ones_like(value_))[0])


def reverse_kl(logits):
    return kl(logits, LOGITS_REF)


def forward_kl(logits):
    return kl(LOGITS_REF, logits)


def kl_gradient(of) -> np.ndarray:
    return np.asarray(jax.grad(lambda logits: of(logits).sum())(jnp.asarray(LOGITS)))


@pytest.mark.parametrize("estimator", ("k1", "k3"))
def test_kl_estimators_k1_and_k3_have_the_kl_as_their_mean(estimator):
    value, _ = expected_estimate(lambda logp, ref, q: kl_estimate(logp, ref, estimator))
    np.testing.assert_allclose(value, reverse_kl(jnp.asarray(LOGITS)), atol=1e-12)


def test_kl_estimators_k2_has_not_the_kl_as_its_mean():
    value, _ = expected_estimate(lambda logp, ref, q: kl_estimate(logp, ref, "k2"))
    assert np.abs(value - reverse_kl(jnp.asarray(LOGITS))).max() > 0.01


def test_kl_estimators_k2_is_accurate_to_second_order():
    """Halving the distance to the reference divides the error by about 8."""
    direction = jnp.asarray(LOGITS_REF - LOGITS)

    def error(step):
        here, ref = jax.nn.log_softmax(jnp.asarray(LOGITS)), jax.nn.log_softmax(LOGITS + step * direction)
        return jnp.abs((jnp.exp(here) * (kl_estimate(here, ref, "k2") - (here - ref))).sum(-1))

    np.testing.assert_allclose(error(1e-2) / error(5e-3), 8, rtol=0.2)


def test_kl_estimators_k1_as_a_loss_has_no_expected_gradient():
    _, gradient = expected_estimate(lambda logp, ref, q: kl_estimate(logp, ref, "k1"))
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


def test_kl_estimators_k2_as_a_loss_has_the_gradient_of_the_reverse_kl():
    _, gradient = expected_estimate(lambda logp, ref, q: kl_estimate(logp, ref, "k2"))
    np.testing.assert_allclose(gradient, kl_gradient(reverse_kl), atol=1e-12)


def test_kl_estimators_k3_as_a_loss_has_the_gradient_of_the_forward_kl():
    _, gradient = expected_estimate(lambda logp, ref, q: kl_estimate(logp, ref, "k3"))
    np.testing.assert_allclose(gradient, kl_gradient(forward_kl), atol=1e-12)
    assert np.abs(gradient - kl_gradient(reverse_kl)).max() > 0.01


def test_kl_estimators_k3_times_ratio_has_value_and_gradient_of_the_reverse_kl_off_policy():
    value, gradient = expected_estimate(
        lambda logp, ref, q: kl_penalty(logp, ref, "k3", ratio=jnp.exp(logp - q)), LOGITS_BEHAVIOUR
    )
    np.testing.assert_allclose(value, reverse_kl(jnp.asarray(LOGITS)), atol=1e-12)
    np.testing.assert_allclose(gradient, kl_gradient(reverse_kl), atol=1e-12)


@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
def test_kl_estimators_without_the_ratio_are_biased_off_policy(estimator):
    value, gradient = expected_estimate(lambda logp, ref, q: kl_estimate(logp, ref, estimator), LOGITS_BEHAVIOUR)
    assert np.abs(value - reverse_kl(jnp.asarray(LOGITS))).max() > 0.01
    for of in (reverse_kl, forward_kl):
        assert np.abs(gradient - kl_gradient(of)).max() > 0.01


def test_reinforce_with_k1_in_the_reward_has_the_gradient_of_the_reverse_kl():
    penalty = -np.asarray((log_probs(jnp.asarray(LOGITS)) - log_probs(jnp.asarray(LOGITS_REF))).sum(-1))

    def sequence_kl(logits):
        return probabilities(logits) @ (log_probs(logits) - log_probs(jnp.asarray(LOGITS_REF))).sum(-1)

    np.testing.assert_allclose(
        expected_step("reinforce", 1, penalty, agg="seq_sum"), -jax.grad(sequence_kl)(jnp.asarray(LOGITS)), atol=1e-12
    )


def visits(sampler) -> np.ndarray:
    """[contexts] how often an answer of ``sampler`` passes through a context."""
    out = np.zeros(len(CONTEXTS))
    np.add.at(
        out, AT[MASK], np.broadcast_to(np.asarray(probabilities(jnp.asarray(sampler)))[:, None], MASK.shape)[MASK]
    )
    return out


def test_grpo_kl_term_pulls_along_the_forward_kl_on_policy():
    step = expected_step("grpo", 1, np.zeros(len(ANSWERS)), beta=1.0, agg="seq_sum")
    np.testing.assert_allclose(step, -visits(LOGITS)[:, None] * kl_gradient(forward_kl), atol=1e-12)


def test_grpo_kl_is_makes_it_the_reverse_kl_also_off_policy():
    step = expected_step("grpo", 1, np.zeros(len(ANSWERS)), LOGITS_BEHAVIOUR, beta=1.0, agg="seq_sum", kl_is=True)
    np.testing.assert_allclose(step, -visits(LOGITS_BEHAVIOUR)[:, None] * kl_gradient(reverse_kl), atol=1e-12)
