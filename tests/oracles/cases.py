"""`CASES` hold batches that hurt, and `evaluate` gives jaxpo's answer to them in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxpo
from jaxpo.fields import role_id
from jaxpo.primitives.selection import row_uniform
from tests.oracles import Case, Gradient

ROWS, WIDTH = 24, 6  # one shape everywhere, so that everything compiles once


def other_models(b: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What rewards made of other models' words read."""
    return {
        **{name: rng.normal(size=(b, 2)) for name in ("pos_ll", "neg_ll")},
        **{name: rng.normal(size=(b, 3)) for name in ("cand_scores", "adapter_logits", "obj_scores")},
        **{name: rng.normal(size=b) for name in ("rel_query", "rel_answer")},
        "open_ended": rng.integers(0, 2, b).astype(float),
        "num_words": rng.integers(1, 99, b).astype(float),
        "num_tri": rng.integers(0, 3, b) * 4.0,
        "uniq_tri": rng.integers(0, 3, b) * 1.0,
    }


UNEQUAL = (8, 4, 4, 2, 2, 2, 1, 1)


def make_case(seed: int, sizes=UNEQUAL, *, rewards="real", stale=0.3, extreme=False, counts=False, mixed=False) -> Case:
    """Ragged rows with holes, one of them empty, in shuffled groups of the given sizes.

    Args:
      rewards: "binary" or "real"; the first group of more than one row is constant.
      mixed: every group of more than one row holds both outcomes instead.
      stale: standard deviation of ``logp - logp_old``; extreme: some of them are -40 or 40.
      counts: rows drawn 0, 1 or 2 times.
    """
    rng = np.random.default_rng(seed)
    b = sum(sizes)
    length = rng.integers(1, WIDTH + 1, b)
    mask = np.arange(WIDTH) < length[:, None]
    mask &= rng.random((b, WIDTH)) > 0.15
    mask[0] = False
    mask[1] = True
    group = np.repeat(np.arange(len(sizes)) * 7 + 3, sizes)
    correct = (rng.random(b) < 0.5).astype(float)
    starts = np.cumsum((0, *sizes))[:-1]
    for start, size in zip(starts, sizes, strict=True):
        if mixed and size > 1:
            correct[start : start + 2] = 0, 1
    reward = correct.copy() if rewards == "binary" else rng.normal(size=b)
    if not mixed:
        i = next((i for i, size in enumerate(sizes) if size > 1), None)
        if i is not None:  # 0.1 is a number whose mean is not itself in floating point
            reward[starts[i] : starts[i] + sizes[i]], correct[starts[i] : starts[i] + sizes[i]] = 0.1, 1
    logp_old = -rng.exponential(1.5, (b, WIDTH))
    gap = stale * rng.normal(size=(b, WIDTH))
    if extreme:
        gap = np.where(rng.random((b, WIDTH)) < 0.3, rng.choice([-40.0, 40.0], (b, WIDTH)), gap)
    logp = logp_old + gap
    ref = logp + 0.5 * rng.normal(size=(b, WIDTH))
    if extreme:
        ref = np.where(rng.random((b, WIDTH)) < 0.2, logp + rng.choice([-40.0, 40.0], (b, WIDTH)), ref)
    count = rng.integers(0, 3, b).astype(float) if counts else np.ones(b)
    more = np.random.default_rng((seed, 1))
    case = Case(
        mask=mask,
        logp=logp,
        logp_old=logp_old,
        ref=ref,
        reward=reward,
        correct=correct,
        group=group,
        count=count,
        tokens=more.integers(0, 3, (b, WIDTH)),  # so few that answers agree at many positions
        entropy=more.exponential(0.7, (b, WIDTH)),
        entropy_old=more.exponential(0.7, (b, WIDTH)),
        extra={
            "rewards_multi": more.random((b, 3)).round(1),
            "reward_weights": np.random.default_rng((seed, 3)).choice([1.0, 0.5, 0.0, -0.7], (b, 3)),
            "tracker_value": more.random(b),
            "mc_value": more.random((b, WIDTH)),
            "logp_old_hot": logp_old + 0.2 * more.normal(size=(b, WIDTH)),
            "logp_old_cold": logp_old + 0.2 * more.normal(size=(b, WIDTH)),
            "log_proxy": np.where(more.random((b, WIDTH)) < 0.2, -np.inf, logp + more.exponential(0.5, (b, WIDTH))),
            "edge_adv": more.normal(size=b),
            "seed": more.integers(0, 2**32, b, dtype=np.uint32),
        },
    )
    case = case.replace(extra={**case.extra, "flawed": np.random.default_rng((seed, 4)).integers(0, 2, b) * 1.0})
    case = case.replace(extra={**case.extra, **other_models(b, np.random.default_rng((seed, 2)))})
    case = case.take(rng.permutation(b))
    hidden = ("logp", "logp_old", "ref", "entropy", "entropy_old")
    case = case.replace(**{name: np.where(case.mask, getattr(case, name), np.nan) for name in hidden})
    per_token = {k: np.where(case.mask, x, np.nan) for k, x in case.extra.items() if x.shape == mask.shape}
    return case.replace(extra={**case.extra, **per_token})


CASES = {
    "K=1": make_case(0, (1,) * 24),
    "K=2": make_case(1, (2,) * 12, rewards="binary"),
    "K=4": make_case(2, (4,) * 6),
    "K=8": make_case(3, (8,) * 3, rewards="binary"),
    "unequal groups": make_case(4),
    "counts": make_case(5, counts=True),
    "extreme ratios": make_case(6, rewards="binary", extreme=True),
    "extreme ratios and counts": make_case(7, extreme=True, counts=True),
    "nothing counted": make_case(8).replace(count=np.zeros(ROWS)),
}

NO_COUNTS = [name for name, case in CASES.items() if (case.count == 1).all()]


def with_experts(case: Case, seed: int = 0, share: float = 0.3) -> Case:
    """Some rows were written by somebody else (role ``expert``), whose ``logp_old`` nobody may read."""
    rng = np.random.default_rng(seed)
    expert = rng.random(len(case.reward)) < share
    prob = np.where(case.mask, rng.uniform(0.05, 1, case.mask.shape), np.nan)
    more = dict(token_adv=np.where(case.mask, rng.normal(size=case.mask.shape), np.nan))
    extra = dict(**more, role=np.where(expert, role_id("expert"), role_id("own")), expert_prob=prob)
    return case.replace(logp_old=np.where(expert[:, None], np.nan, case.logp_old), extra={**case.extra, **extra})


EXPERT_CASES = {name: with_experts(case, seed) for seed, (name, case) in enumerate(CASES.items())}
EXPERT_CASES |= {
    "no expert rows": with_experts(CASES["unequal groups"], share=0.0),
    "only expert rows": with_experts(CASES["unequal groups"], share=1.1),
}


def unit_rewards(case: Case) -> Case:
    """Rewards in [0, 1]."""
    return case.replace(reward=1 / (1 + np.exp(-case.reward)))


UNIT_CASES = {name: unit_rewards(case) for name, case in CASES.items()}


def on_policy(case: Case) -> Case:
    return case.replace(logp_old=case.logp)


def rollouts(case: Case) -> jaxpo.Rollouts:
    per_token = case.mask.shape
    extra = {k: jnp.asarray(x) for k, x in case.extra.items()}
    seed, role = extra.pop("seed", None), extra.pop("role", None)
    extra.pop("log_proxy", None)
    return jaxpo.Rollouts(
        tokens=jnp.asarray(case.tokens, jnp.int32),
        mask=jnp.asarray(case.mask),
        reward=jnp.asarray(case.reward),
        correct=jnp.asarray(case.correct),
        group=jnp.asarray(case.group, jnp.int32),
        seed=None if seed is None else seed.astype(jnp.uint32),
        role=None if role is None else role.astype(jnp.int32),
        logp_old=jnp.asarray(case.logp_old),
        entropy_old=jnp.asarray(case.entropy_old),
        logp_ref=jnp.asarray(case.ref),
        count=jnp.asarray(case.count),
        per_row={k: x for k, x in extra.items() if x.shape != per_token},
        per_token={k: x for k, x in extra.items() if x.shape == per_token},
    )


COMPILE_FAST = {"xla_backend_optimization_level": 0}  # tiny arrays: compiling is all that takes time


@functools.cache
def _value_and_grad(name: str, hyperparameters: tuple):
    objective = jaxpo.make(name, **dict(hyperparameters))

    def loss(logp, entropy, derived, batch, state):
        stats = jaxpo.TokenStats(logp=logp, entropy=entropy, derived=derived)
        return jaxpo.evaluate(objective, lambda _: stats, batch, state)[0]

    return objective, jax.jit(jax.value_and_grad(loss), compiler_options=COMPILE_FAST)


def _state(objective: jaxpo.Objective, memory: dict | None, iteration: int):
    """Before the given iteration of a run, remembering ``memory``."""
    state = objective.init()
    new = {k: jnp.asarray(x, jnp.float64) for k, x in (memory or {}).items()}
    return state.replace(
        iteration=jnp.asarray(iteration - 1, jnp.int32),
        memory={**{k: x.astype(jnp.float64) for k, x in state.memory.items()}, **new},
    )


def evaluate(name: str, case: Case, *, memory=None, iteration=0, **hyperparameters) -> Gradient:
    """Loss and gradient in log-prob of a registered objective, in float64, in the given iteration of a run."""
    with jax.enable_x64(True):
        objective, value_and_grad = _value_and_grad(name, tuple(sorted(hyperparameters.items())))
        state = _state(objective, memory, iteration)
        derived = {"log_proxy": jnp.asarray(case.extra["log_proxy"])} if "log_proxy" in case.extra else {}
        loss, grad = value_and_grad(jnp.asarray(case.logp), jnp.asarray(case.entropy), derived, rollouts(case), state)
        assert loss.dtype == grad.dtype == jnp.float64
        return float(loss), np.asarray(grad)


@functools.cache
def _prepare(name: str, hyperparameters: tuple):
    objective = jaxpo.make(name, **dict(hyperparameters))
    return objective, jax.jit(objective.prepare, compiler_options=COMPILE_FAST)


def prepared(name: str, case: Case, *, memory=None, iteration=0, **hyperparameters) -> jaxpo.Rollouts:
    """What ``prepare`` of a registered objective makes of the batch, in float64 (numpy)."""
    with jax.enable_x64(True):
        objective, prepare = _prepare(name, tuple(sorted(hyperparameters.items())))
        return jax.tree.map(np.asarray, prepare(rollouts(case), _state(objective, memory, iteration))[0])


def assert_same(actual: Gradient, expected: Gradient, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Equal loss and gradient."""
    np.testing.assert_allclose(actual[1], expected[1], rtol=rtol, atol=atol, err_msg="gradient")
    np.testing.assert_allclose(actual[0], expected[0], rtol=rtol, atol=atol, err_msg="loss")


def assert_equals_oracle(oracles, configuration: tuple[str, dict], cases=CASES, rtol: float = 1e-9) -> None:
    """An objective equals the function of its name in a module of oracles, on all cases."""
    name, hyperparameters = configuration
    for label, case in cases.items():
        expected = getattr(oracles, name)(case, **hyperparameters)
        try:
            assert_same(evaluate(name, case, **hyperparameters), expected, rtol=rtol)
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from None


def priorities(case: Case, stream: int, shape: tuple = ()) -> np.ndarray:
    """What the implementation draws for the rows' seeds."""
    with jax.enable_x64(True):
        return np.asarray(row_uniform(jnp.asarray(case.extra["seed"], jnp.uint32), shape, stream=stream))
