"""The grammar is open: hybrids, critics and chains are compositions of ten lines. Each is compared with plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.fields import role_id
from jaxpo.metrics import results
from jaxpo.objectives import Asks, Hooks, State, Term, evaluate, make, policy_gradient, reads, role
from jaxpo.objectives.grammar.parts import Advantage
from jaxpo.objectives.parts import advantages, critics, filters, ratios, regularizers, surrogates
from jaxpo.primitives import aggregation, returns
from jaxpo.primitives.aggregation import token_mean

B, T, D = 8, 5, 3
RNG = np.random.default_rng(0)
MASK = (np.arange(T) < np.array([5, 3, 4, 1, 5, 2, 4, 3])[:, None]).astype(float)
MASK[0, 1] = 0  # a hole
LOGP = np.where(MASK > 0, RNG.normal(-1.5, 0.6, (B, T)), 0)
OLD = np.where(MASK > 0, LOGP + RNG.normal(0, 0.4, (B, T)), 0)
REF = np.where(MASK > 0, LOGP + RNG.normal(0, 0.4, (B, T)), 0)
REWARD = np.array([1.0, 0, 0, 1, 0, 0.5, 1, 1])
GROUP = np.repeat([0, 1], 4)
EXPERT = np.array([0, 0, 0, 1, 0, 0, 0, 1], bool)
ROLE = np.where(EXPERT, role_id("expert"), role_id("own")).astype(np.int32)
VALUE_OLD, VALUE = RNG.normal(size=(B, T)), RNG.normal(size=(B, T))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def rollouts(**fields) -> Rollouts:
    given = dict(mask=MASK, reward=REWARD, group=GROUP, logp_old=OLD, logp_ref=REF, value_old=VALUE_OLD, role=ROLE)
    return Rollouts(**{name: jnp.asarray(x) for name, x in {**given, **fields}.items() if x is not None})


def value_and_grad(objective, batch=None, state=None, **stats):
    """Loss, gradients in the statistics and metrics."""
    stats = {name: jnp.asarray(x) for name, x in {"logp": LOGP, **stats}.items()}

    def loss(stats):
        known = {n: x for n, x in stats.items() if n in TokenStats.__dataclass_fields__}
        derived = {n: x for n, x in stats.items() if n not in known}
        value, report = evaluate(
            objective, lambda _: TokenStats(**known, derived=derived), rollouts() if batch is None else batch, state
        )
        return value, results(report)

    (value, report), grads = jax.value_and_grad(loss, has_aux=True)(stats)
    return float(value), jax.tree.map(np.asarray, grads), report


def centered(reward, members=None):
    """Reward minus the mean of the members of its group; 0 for the others."""
    members = np.ones(len(reward), bool) if members is None else members
    out = np.zeros(len(reward))
    for g in np.unique(GROUP):
        inside = (g == GROUP) & members
        out[inside] = reward[inside] - reward[inside].mean()
    return out


def clip_surrogate(r, adv, eps):
    return -np.minimum(r * adv, np.clip(r, 1 - eps, 1 + eps) * adv)


def clip_slope(r, adv, eps):
    """Derivative of the clipped surrogate in the log-ratio."""
    return np.where(((adv > 0) & (r > 1 + eps)) | ((adv < 0) & (r < 1 - eps)), 0, -r * adv)


# ---- luffy ----------------------------------------------------------------------------------------


def luffy(gamma=0.1, clip=False, eps=0.2, use_std=False, singleton="zero"):
    """GRPO over own and expert rows together; on expert rows the ratio is ``f(p) = p / (p + gamma)``, unclipped.

    Shapes: logp [B, T], reward, role [B]."""
    own = surrogates.clipped(eps, eps) if clip else surrogates.linear()
    return policy_gradient(
        advantage=advantages.group_normalized(scale="group" if use_std else "none", singleton=singleton),
        ratio=ratios.token(),
        surrogate=surrogates.by_role(own, expert=surrogates.shaped_probability(gamma)),
        aggregate=token_mean,
    )


@pytest.mark.parametrize("clip", (False, True))
@pytest.mark.parametrize("gamma", (0.1, 2.0))
def test_luffy(clip, gamma):
    adv, p, r = centered(REWARD)[:, None], np.exp(LOGP), np.exp(LOGP - OLD)
    own = clip_surrogate(r, adv, 0.2) if clip else -r * adv
    slope = clip_slope(r, adv, 0.2) if clip else -r * adv
    each = np.where(EXPERT[:, None], -p / (p + gamma) * adv, own) * MASK
    grad = np.where(EXPERT[:, None], -adv * p * gamma / (p + gamma) ** 2, slope) * MASK
    loss, grads, report = value_and_grad(luffy(gamma, clip))
    np.testing.assert_allclose(loss, each.sum() / MASK.sum(), rtol=1e-12)
    np.testing.assert_allclose(grads["logp"], grad / MASK.sum(), rtol=1e-10, atol=1e-14)
    own_tokens = (MASK * ~EXPERT[:, None]).sum()
    outside = ((adv > 0) & (r > 1.2)) | ((adv < 0) & (r < 0.8))
    cut = (outside * MASK * ~EXPERT[:, None]).sum() / own_tokens if clip else 0
    np.testing.assert_allclose(report["ratio/clip_frac"], cut, rtol=1e-6)
    np.testing.assert_allclose(report["ratio/mean"], (r * MASK * ~EXPERT[:, None]).sum() / own_tokens, rtol=1e-6)


def test_rows_of_experts_may_hold_anything_as_logp_old():
    loss, grads, _ = value_and_grad(luffy())
    strange = np.where(EXPERT[:, None], np.nan, OLD)
    again, more, _ = value_and_grad(luffy(), rollouts(logp_old=strange))
    assert again == loss
    np.testing.assert_array_equal(more["logp"], grads["logp"])


def test_by_role_needs_roles_and_names_a_wrong_one():
    assert luffy().asks.needs == {"reward", "group", "role"}
    with pytest.raises(ValueError, match="expret.*did you mean 'expert'"):
        surrogates.by_role(surrogates.linear(), expret=surrogates.linear())
    with pytest.raises(ValueError, match="at least one role"):
        surrogates.by_role(surrogates.linear())
    with pytest.raises(ValueError, match="tokens and of rows"):
        surrogates.by_role(surrogates.squared_residual(), expert=surrogates.shaped_probability())
    assert luffy().made_of["surrogate"] == ("by_role(linear, expert=shaped_probability)",)


# ---- ppo ------------------------------------------------------------------------------------------


def ppo(eps_low=0.2, eps_high=0.2, dual_clip=None, eps_v=0.2, c_v=0.1, c_e=0.0, gamma=1.0, lam=0.95, kl_coef=0.0):
    """PPO with a critic. Shapes: logp, value_old [B, T], reward [B]."""
    return policy_gradient(
        advantage=advantages.gae(gamma, lam, kl_coef),
        ratio=ratios.token(),
        surrogate=surrogates.clipped(eps_low, eps_high, dual_clip),
        aggregate=token_mean,
        regularizers=[(c_e, regularizers.entropy())],
        terms=[critics.clipped_value(eps_v, coef=c_v)],
    )


def gae(token_reward, value, gamma, lam):
    adv = np.zeros((B, T))
    for b in range(B):
        after, next_value = 0.0, 0.0
        for t in reversed(np.flatnonzero(MASK[b])):
            after = token_reward[b, t] + gamma * next_value - value[b, t] + gamma * lam * after
            adv[b, t], next_value = after, value[b, t]
    return adv, (adv + value) * MASK


def test_gae_of_the_card():
    adv, target = returns.gae(
        jnp.array([[0.0, 0, 0, 1]]), jnp.array([[0.5, 100.0, 0.6, 0.7]]), jnp.array([[1.0, 0, 1, 1]]), 1.0, 0.95
    )
    np.testing.assert_allclose(adv, [[0.46575, 0, 0.385, 0.3]], rtol=1e-12)
    np.testing.assert_allclose(target, [[0.96575, 0, 0.985, 1.0]], rtol=1e-12)


@pytest.mark.parametrize(("gamma", "kl_coef", "eps_v"), [(1.0, 0.0, 0.2), (0.9, 0.3, 0.2), (1.0, 0.0, None)])
def test_ppo(gamma, kl_coef, eps_v):
    last = np.array([np.flatnonzero(row)[-1] for row in MASK])
    rho = -kl_coef * (OLD - REF) * MASK
    rho[np.arange(B), last] += REWARD
    adv, target = gae(rho, VALUE_OLD, gamma, 0.95)
    r = np.exp(LOGP - OLD)
    policy = (clip_surrogate(r, adv, 0.2) * MASK).sum() / MASK.sum()
    near = np.clip(VALUE, VALUE_OLD - 0.2, VALUE_OLD + 0.2) if eps_v else VALUE
    plain, cut = np.square(VALUE - target), np.square(near - target)
    value = (np.maximum(plain, cut) / 2 * MASK).sum() / MASK.sum()
    inside = np.abs(VALUE - VALUE_OLD) < 0.2 if eps_v else np.ones_like(VALUE, bool)
    slope = np.where((plain >= cut) | inside, VALUE - target, 0)
    objective = ppo(gamma=gamma, kl_coef=kl_coef, eps_v=eps_v)
    loss, grads, report = value_and_grad(objective, value=VALUE)
    np.testing.assert_allclose(loss, policy + 0.1 * value, rtol=1e-10)
    np.testing.assert_allclose(grads["logp"], clip_slope(r, adv, 0.2) * MASK / MASK.sum(), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(grads["value"], 0.1 * slope * MASK / MASK.sum(), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(report["loss/value"], value, rtol=1e-6)


def test_what_ppo_asks_for_and_trains():
    assert ppo().asks == Asks(frozenset({"reward", "value_old"}), frozenset({"logp", "value"}))
    assert ppo(kl_coef=0.1).asks.needs == {"reward", "value_old", "logp_old", "logp_ref"}
    assert dict(ppo().trains) == {"policy": "policy", "value": "critic"}
    assert make("grpo").trains == {}
    batch, state = ppo().prepare(rollouts(), ppo().init())
    assert set(ppo().weigh(batch, state, None).weights) == set(ppo().trains)


# ---- flow_grpo ------------------------------------------------------------------------------------

MEAN, MEAN_REF = RNG.normal(size=(B, T, D)), RNG.normal(size=(B, T, D))
SIGMA, SQRT_DT = RNG.uniform(0.5, 1, (B, T)), RNG.uniform(0.1, 0.5, (B, T))


def flow_grpo(eps=1e-4, beta=0.04, adv_clip=5.0, std="batch", kl_form="code"):
    """GRPO of denoising chains: a row's tokens are its steps. Shapes: logp, sigma [B, T], mean_ref [B, T, D]."""
    return policy_gradient(
        advantage=advantages.group_normalized(1e-4, std, ddof=0, clip=adv_clip),
        ratio=ratios.token(jnp.inf),
        surrogate=surrogates.clipped(eps, eps),
        regularizers=[(beta, regularizers.gaussian_kl(kl_form))],
        filters=[filters.nonzero_advantage(1e-6)],
        aggregate=token_mean,
    )


@pytest.mark.parametrize("kl_form", ("code", "paper"))
def test_flow_grpo(kl_form):
    reward = np.array([1.0, 0, 0, 1, 0.5, 0.5, 0.5, 0.5])  # the second group has advantage 0 and leaves
    adv = np.clip(centered(reward) / (reward.std() + 1e-4), -1, 1)[:, None]
    kept = MASK * (np.abs(adv) > 1e-6)
    r = np.exp(LOGP - OLD)
    policy = (clip_surrogate(r, adv, 0.1) * kept).sum() / kept.sum()
    scale = SIGMA if kl_form == "code" else SIGMA * SQRT_DT
    kl = np.square(MEAN - MEAN_REF).mean(-1) / (2 * scale**2)
    ref = np.where(MASK[..., None] > 0, MEAN_REF, np.nan)  # at masked steps it may hold anything
    batch = rollouts(reward=reward, role=None).replace(
        per_token={k: jnp.asarray(x) for k, x in dict(mean_ref=ref, sigma=SIGMA, sqrt_dt=SQRT_DT).items()}
    )
    loss, grads, _ = value_and_grad(flow_grpo(0.1, 0.04, 1.0, kl_form=kl_form), batch, mean=MEAN)
    np.testing.assert_allclose(loss, policy + 0.04 * (kl * kept).sum() / kept.sum(), rtol=1e-10)
    expected = 0.04 * (MEAN - MEAN_REF) / D / scale[..., None] ** 2 * kept[..., None] / kept.sum()
    np.testing.assert_allclose(grads["mean"], expected, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(grads["logp"], clip_slope(r, adv, 0.1) * kept / kept.sum(), rtol=1e-9, atol=1e-14)


# ---- terms=, rows=, scale -------------------------------------------------------------------------


def chord(mu, **parts):
    """GRPO of the own rows and likelihood of the experts', weighed by a schedule."""
    return policy_gradient(
        advantage=advantages.group_normalized(scale="none"),
        ratio=ratios.token(),
        surrogate=surrogates.clipped(),
        aggregate=token_mean,
        rows=role("own"),
        scale=lambda state: 1 - mu(state),
        terms=[Term("sft", lambda stats, b, s: -stats.logp, rows=role("expert"), coef=mu)],
        **parts,
    )


def test_rows_are_the_denominator_and_the_members():
    own, r = ~EXPERT, np.exp(LOGP - OLD)
    adv = centered(REWARD, own)[:, None]
    tokens = MASK * own[:, None]
    policy = (clip_surrogate(r, adv, 0.2) * tokens).sum() / tokens.sum()
    experts = MASK * EXPERT[:, None]
    sft = -(LOGP * experts).sum() / experts.sum()
    for iteration, mu in ((0, 0.75), (2, 0.25)):
        objective = chord(lambda state: 0.75 - 0.25 * state.iteration)
        state = objective.init().replace(iteration=jnp.asarray(iteration - 1))
        loss, grads, report = value_and_grad(objective, state=state)
        np.testing.assert_allclose(loss, (1 - mu) * policy + mu * sft, rtol=1e-10)
        expected = (1 - mu) * clip_slope(r, adv, 0.2) * tokens / tokens.sum() - mu * experts / experts.sum()
        np.testing.assert_allclose(grads["logp"], expected, rtol=1e-9, atol=1e-14)
    changed = rollouts(reward=np.where(EXPERT, 100 * REWARD, REWARD))
    assert value_and_grad(objective, changed, state)[0] == pytest.approx(loss, rel=1e-12)


def test_filters_choose_among_the_rows_and_leave_the_others():
    correct = np.array([0.0, 0, 0, 1, 1, 0, 0, 1])  # the own answers of the first group have all failed
    objective = chord(lambda state: 0.5, filters=[filters.mixed_groups()])
    batch, state = objective.prepare(rollouts(correct=correct), objective.init())
    np.testing.assert_array_equal(batch.count, [0, 0, 0, 1, 1, 1, 1, 1])
    weights = objective.weigh(batch, state, None).weights
    assert not np.any(weights["policy"][np.asarray(EXPERT)]) and not np.any(weights["sft"][~EXPERT])
    assert weights["sft"].sum() == pytest.approx(1) and weights["policy"].sum() == pytest.approx(1)


def test_a_term_brings_its_asks_and_hooks():
    hooks = Hooks(
        memory={"seen": jnp.zeros(())},
        prepare=lambda b, s: (b.with_row(double=2 * b.reward), s),
        update=lambda s, b, report: s.replace(memory={"seen": s.memory["seen"] + 1}),
        metrics=lambda stats, b, s: {},
    )
    term = Term(
        "extra",
        lambda stats, b, s: b.get("double") * stats.logp.sum(-1),
        aggregation.seq_mean,
        per="row",
        asks=Asks(needs=frozenset({"correct"}), rewards=(0.0, 1.0)),
        hooks=hooks,
    )
    objective = policy_gradient(
        advantage=advantages.bnpo(-1.0, 0.75),
        ratio=ratios.token(),
        surrogate=surrogates.linear(),
        aggregate=token_mean,
        terms=[term],
    )
    assert "correct" in objective.asks.needs and objective.asks.rewards == (0.0, 0.75)
    assert set(objective.init().memory) == {"seen"}


def test_two_parts_cannot_share_a_memory():
    with pytest.raises(ValueError, match=r"two parts .*'lam' .*memory"):
        Hooks(memory={"lam": jnp.zeros(())}).merged(Hooks(memory={"lam": jnp.ones(())}))
    with pytest.raises(ValueError, match="no reward lies in all"):
        Asks(rewards=(0.0, 1.0)).merged(Asks(rewards=(2.0, 3.0)))


# ---- reads ----------------------------------------------------------------------------------------


def test_reads_binds_by_name_and_derives_needs():
    def primitive(reward, group, count, value_old, *, factor):
        return factor * reward + group + count + value_old.sum(-1)

    fn, asks = reads(primitive, factor=2.0)
    assert asks == Asks(frozenset({"reward", "group", "value_old"}))
    batch = rollouts(count=np.ones(B))
    np.testing.assert_allclose(fn(batch, None), 2 * REWARD + GROUP + 1 + VALUE_OLD.sum(-1))
    assert Advantage(*reads(primitive, factor=2.0)).asks == asks
    other, asks = reads(lambda x, y: x - y, "logp", "logp_ref")
    np.testing.assert_allclose(other(TokenStats(logp=jnp.asarray(LOGP)), batch), LOGP - REF)
    assert asks.needs == {"logp_ref"}
    assert ratios.sequence().asks == Asks() and regularizers.kl_to_old().asks == Asks()


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("name", ("grpo", "copg", "dapo"))
def test_a_reward_that_is_no_number_names_its_row(name, bad):
    objective = make(name)
    reward = np.where(np.arange(B) == 5, bad, REWARD)
    fields = dict(reward=reward, correct=REWARD)
    with pytest.raises(ValueError, match=rf"reward of row 5 is {bad:g}"):
        objective.prepare(rollouts(**fields), objective.init())
    objective.prepare(rollouts(**fields, count=np.where(np.arange(B) == 5, 0.0, 1.0)), objective.init())
    jax.eval_shape(objective.prepare, rollouts(**fields), objective.init())  # traced rewards pass


def test_what_a_policy_gives_is_checked():
    objective = ppo()
    with pytest.raises(ValueError, match=r"gives no 'value'.*TokenStats\(value="):
        evaluate(objective, lambda b: TokenStats(logp=jnp.asarray(LOGP)), rollouts())
    with pytest.raises(ValueError, match=r"TokenStats.logp has shape \(8, 4\)"):
        evaluate(make("grpo"), lambda b: TokenStats(logp=jnp.asarray(LOGP)[:, :4]), rollouts())
    peeking = make("kl_cov")
    batch, state = peeking.prepare(rollouts(), peeking.init())
    with pytest.raises(ValueError, match="gives no 'logp'"):
        peeking.weigh(batch, state, TokenStats(entropy=jnp.asarray(LOGP)))


def test_state_is_untouched_by_hooks_that_are_not_there():
    objective = ppo()
    batch, state = objective.prepare(rollouts(), objective.init())
    assert isinstance(state, State) and state.memory == {}
