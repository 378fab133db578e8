"""Every hyperparameter of each objective and every option of each part changes what is computed.

The batches have everything. Hyperparameters are read off the registry and tried at another value of their type (a
string at each of its choices). A new one that has no effect fails here; one that acts only beside another needs a line
in ``BESIDE``.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from jaxpo import testing
from jaxpo.objectives.grammar import base
from jaxpo.primitives import grouping, selection, token_advantages
from jaxpo.registry import entry
from tests.oracles.cases import make_case, rollouts

BUDGET = {"max_len": 5, "buffer": 3, "L_const": 4.0, "total": 3}  # what a run would fill in

# Another value, where half of the default (or 0.3), one less, or "not" is refused or would not show.
OTHER = {
    "L_const": 3.0,
    "adv_eps": 0.1,
    "beta": 0.3,
    "dual_clip": 1.5,
    "eps": 0.1,
    "eps_high": 0.9,
    "eps_low": 0.6,
    "guard": 0.5,
    "high0": 1.3,
    "high_max": 1.7,
    "high_step": 0.25,
    "log_ratio_clip": 1.0,
    "low0": 0.7,
    "low_max": 0.75,
    "low_step": 0.07,
    "max_new_tokens": 5,
    "mu_period": 3,
    "ratio": 0.3,
    "rho": 0.5,
    "steps": 3,
    "target": 0.2,
    ("dpa_logic", "program"): "TT FF / TF",
    ("nash_mp", "eta"): 0.1,
    ("orpo_chi2", "c"): 0.1,
    ("rdpo", "eps"): 0.3,
    ("opa_dpo", "rev_anchor_sign"): -1,
    ("slic_hinge", "target"): "expert",
    ("rluf", "weights"): (0.2, 0.3, 0.5),
    ("rso_reward", "clip"): 0.3,
    ("bnpo", "max"): 2.0,
    ("bnpo", "min"): -1.0,
    ("dcpo_distribution", "H0"): 0.05,
    ("dcpo_distribution", "threshold"): 0.5,
    ("kl_to_old", "gradient"): "k3",
    ("kl_to_reference", "gradient"): "k2",
    ("rec", "log_ratio_clip"): 0.1,
    ("rejection", "low"): -0.1,
    ("token_rejection", "low"): -0.1,
    ("policy_gradient", "advantage"): "rloo",
    ("policy_gradient", "agg"): "seq_mean",
    ("policy_gradient", "ratio"): "bounded",
    ("policy_gradient", "surrogate"): "cispo",
    ("policy_gradient", "regularizers"): "0.1 * kl_to_reference",
    ("policy_gradient", "filters"): "mixed_groups",
    ("policy_gradient", "shaping"): "kl_in_reward",
    ("policy_gradient", "corrections"): "truncated_weight",
}

# What an option belongs to: it is compared beside these settings, and without them refused or live all the same.
BESIDE = {
    "L_const": {"agg": "seq_sum_const", "L_const": 4.0},
    **{("bapo", option): {"target": 0.0} for option in ("low0", "high0")},
    **{("bapo", option): {"target": 1e9} for option in ("low_max", "high_max")},
    ("bapo", "high_step"): {"target": 0.28},
    ("bapo", "low_step"): {"mode": "paper", "target": 1.0},
    ("canon", "mu_period"): {"mu_schedule": "cosine", "mu_period": 2},
    ("clip_cov", "lb"): {"ratio": 0.5},
    ("clip_cov", "ub"): {"ratio": 0.5},
    ("kl_to_reference", "log_ratio_clip"): {"is_weighted": True},
    ("lp_reg", "U"): {"form": "paper"},
    ("opmd", "coef"): {"form": "surrogate"},
    ("policy_gradient", "max_new_tokens"): {"shaping": "overlong"},
    ("policy_gradient", "steps"): {"filters": "d3s_rows"},
    ("rec", "coef"): {"regularizer": "k2"},
    ("rec", "ring_high"): {"clip_mode": "ring"},
    ("rec", "ring_low"): {"clip_mode": "ring"},
    ("rec", "temp"): {"weight": "advantage"},
    ("reinforce_pp", "kl_estimator"): {"variant": "baseline"},
    ("reinforce_pp", "singleton"): {"variant": "baseline"},
    ("dno", "scale"): {"eta": 0.2},
    ("mapl", "beta"): {"form": "dpo"},
    ("slic_hinge", "delta"): {"delta": 20.0},
    **{("themis", option): {"form": "paper"} for option in ("alpha", "beta", "omega")},
    **{("lp_reg", option): {"rho": 0.5} for option in ("beta", "form", "kappa")},
    **{("rloo", option): {"form": "ppo"} for option in ("eps", "eps_low", "eps_high", "log_ratio_clip")},
}
WITH = {"seq_sum_const": {"L_const": 4.0}, "sum_const": {"L_const": 4.0}, "cosine": {"mu_period": 3}}  # of a choice

SLOT = {
    "advantage": "advantage",
    "ratio": "ratio",
    "surrogate": "surrogate",
    "regularizer": "regularizers",
    "aggregation": "agg",
    "filter": "filters",
    "reward": "shaping",
    "correction": "corrections",
}
AROUND = {  # parts that do not go with the default ones
    **dict.fromkeys(("gspo", "gspo_token", "sequence", "sequence_sum", "sequence_token"), {"agg": "seq_mean"}),
    "squared_residual": {"ratio": "sequence_sum", "agg": "seq_mean"},
    "clipped_but_protected": {"regularizers": "lp_reg(rho=0.5)"},
}


def options() -> list[tuple[str, str, str]]:
    """(kind, name, option) of every objective, and of every part unless the objective of its name has the option."""
    found = [("objective", name, option) for name in jaxpo.names() for option in entry(name).parameters]
    for kind in SLOT:
        for name in {entry(name, kind).factory: name for name in jaxpo.names(kind)}.values():
            own = entry(name).parameters if name in jaxpo.names() else ()
            found += [(kind, name, option) for option in entry(name, kind).parameters if option not in own]
    return found


def of(table: dict, name: str, option: str):
    """What a table says of an option: of the one of this name, or of all that have it."""
    return table.get((name, option), table.get(option))


def beside(kind: str, name: str, option: str) -> dict:
    """Settings beside which the option is tried."""
    given = of(BESIDE, name, option) or {}
    return given if set(given) <= set(entry(name, kind).parameters) else {}


def settings(kind: str, name: str, given: dict) -> dict:
    return {option: BUDGET[option] for option in entry(name, kind).budget if option in BUDGET} | given


def build(kind: str, name: str, given: dict) -> jaxpo.Objective:
    """The objective with these settings, or one that holds the part with them."""
    given = settings(kind, name, given)
    if kind == "objective":
        return jaxpo.make(name, **given)
    part = f"{name}({', '.join(f'{k}={x!r}' for k, x in given.items())})"
    return jaxpo.make("policy_gradient", **{SLOT[kind]: part}, **AROUND.get(name, {}))


def choices(kind: str, name: str, option: str) -> list[str]:
    """The values that a string option takes, from the message that refuses another one."""
    with pytest.raises(ValueError) as refused:
        build(kind, name, beside(kind, name, option) | {option: "?"})
    said = re.search(r"(?:must be(?: one of)?|known:) (.+?)(?:, not '\?'|$)", str(refused.value))
    assert said, f"{name} refuses {option}='?' without its choices: {refused.value}"
    return re.split(r", | or ", said[1])


def others(kind: str, name: str, option: str) -> list[dict]:
    """Settings that change the option."""
    row = entry(name, kind)
    default = settings(kind, name, beside(kind, name, option)).get(option, row.defaults[option])
    given = of(OTHER, name, option)
    if given is not None:
        return [{option: given}]
    if isinstance(default, str):
        found = [{option: x} | WITH.get(x, {}) for x in choices(kind, name, option) if x != default]
        return [x for x in found if set(x) <= set(row.parameters)]
    assert default is not None, f"no other value of {option} is known: add one to OTHER"
    if isinstance(default, bool):
        return [{option: not default}]
    return [{option: default - 1 if isinstance(default, int) else default / 2 or 0.3}]


# ---- batches in which everything happens ---------------------------------------------------------

COMPILED = (
    (grouping, "segments"),
    (grouping, "group_sum"),
    (selection, "_kth"),
    (selection, "max_variance"),
    (token_advantages, "shared_runs"),
)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """In float64, with few optimizations and no common metrics; loops, compiled anew by eager calls, compiled once."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        before = jax.config.values["jax_disable_most_optimizations"]
        jax.config.update("jax_disable_most_optimizations", True)
        patch.setattr(base, "standard_metrics", lambda stats, batch: {})
        for module, name in COMPILED:
            patch.setattr(module, name, jax.jit(getattr(module, name)))
        yield
        jax.config.update("jax_disable_most_optimizations", before)


CASES = (
    make_case(7, stale=1.5, counts=True, mixed=True),  # groups of 1 to 8 rows drawn 0 to 2 times, bold ratios
    make_case(3, (4,) * 6, stale=0.3),  # equal groups, one of them solved
)


@functools.cache
def example(i: int) -> tuple[jaxpo.Rollouts, jax.Array, jax.Array]:
    """A case's batch under a policy over 3 tokens: the batch, the policy's logits [B T, 3] and its log-probs."""
    case = CASES[i]
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=(case.mask.size, 3)))
    logp = jax.nn.log_softmax(logits)[jnp.arange(case.mask.size), case.tokens.reshape(-1)].reshape(case.mask.shape)
    old, ref = [np.where(case.mask, logp - (case.logp - x), 0) for x in (case.logp_old, case.ref)]
    beh = np.where(case.mask, old + rng.normal(size=old.shape), 0)
    batch = rollouts(case.replace(logp=logp, logp_old=old, ref=ref))
    truncated = jnp.asarray(case.mask.sum(1) > 4)
    return batch.replace(logp_beh=jnp.asarray(beh), truncated=truncated), logits, logp


@functools.cache
def prepared(kind: str, name: str, given: tuple, i: int):
    """An objective, what it makes of a batch in the second of three iterations, its state, and the policy's word."""
    objective = build(kind, name, dict(given))
    batch, logits, logp = example(i)
    if objective.unit.layout or not objective.asks.needs <= set(batch.fields()) | {
        f"logp_{n}" for n in objective.asks.derived
    }:
        return on_its_own_example(objective)
    if objective.asks.rewards:
        batch = batch.replace(reward=jax.nn.sigmoid(batch.reward))
    derived = {n: f(logits, batch.tokens.reshape(-1)).reshape(logp.shape) for n, f in objective.asks.derived.items()}
    needed = {n: x for n, x in derived.items() if f"logp_{n}" in objective.asks.needs}
    batch = batch.with_token(**{f"logp_{k}": x for k, x in needed.items()})
    state = objective.init()
    batch, state = objective.prepare(batch, state.replace(iteration=state.iteration + 1))
    return objective, batch, state, jaxpo.TokenStats(logp=logp, entropy=batch.entropy_old, derived=derived)


def on_its_own_example(objective: jaxpo.Objective):
    """`prepared` for an objective that asks for units of rows, or for what other models say of them."""
    batch, params = testing.example(objective), testing.parameters()
    stats = testing.bigram(objective, objective.asks.wants | objective.asks.peeks, params, batch)
    batch, state = objective.prepare(batch, objective.init())
    return objective, batch, state, stats


def before(*what):
    """What an objective does before any gradient: how data is gathered, advantages, what it derives from logits."""
    objective, batch, _, stats = prepared(*what)
    gathered = {k: hash(v) for k, v in objective.protocol.options.items()}
    return gathered, batch.adv, batch.count, stats.derived


@functools.cache
def after(*what):
    """What it does in a step: the loss, the weights, and what it remembers."""
    objective, batch, state, stats = prepared(*what)
    batch = objective.weigh(batch, state, stats)
    loss, report = objective.loss(lambda _: stats, batch, state)
    return loss, batch.weights, objective.update(state, batch, report).memory


def gradient(*what):
    """What it does with the policy's log-probs."""
    objective, batch, state, stats = prepared(*what)
    batch = objective.weigh(batch, state, stats)
    return jax.grad(lambda stats: objective.loss(lambda _: stats, batch, state)[0])(stats)


def differ(kind: str, name: str, one: dict, other: dict) -> bool:
    """Whether two settings do different things."""
    settings = [tuple(sorted(x.items())) for x in (one, other)]
    for see, i in itertools.product((before, after, gradient), range(len(CASES))):
        a, b = [jax.tree.flatten(see(kind, name, x, i)) for x in settings]
        if a[1] != b[1] or any(np.shape(x) != np.shape(y) for x, y in zip(a[0], b[0], strict=True)):
            return True
        if not all(np.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(a[0], b[0], strict=True)):
            return True
    return False


# ---- the tests -----------------------------------------------------------------------------------

OPTIONS = options()


def labels(options: list) -> list[str]:
    return [f"{name}-{option}-{kind}" for kind, name, option in options]


@pytest.mark.filterwarnings("ignore:gspo_token with agg")
@pytest.mark.parametrize(("kind", "name", "option"), OPTIONS, ids=labels(OPTIONS))
def test_every_option_is_live(kind, name, option):
    given = beside(kind, name, option)
    for other in others(kind, name, option):
        assert differ(kind, name, given, given | other), f"{name}({given}): {other} changes nothing"


MODES = [
    (kind, name, option)
    for kind, name, option in OPTIONS
    if any(isinstance(x, str | bool) for x in beside(kind, name, option).values())
    and option not in entry(name, kind).budget
    # Official BAPO takes a low_step, though its lower bound ends at low0 or low_max whatever the step.
    and (name, option) != ("bapo", "low_step")
]


@pytest.mark.parametrize(("kind", "name", "option"), MODES, ids=labels(MODES))
def test_an_option_of_one_mode_is_refused_in_the_others_or_live(kind, name, option):
    for other in others(kind, name, option):
        try:
            changed = differ(kind, name, {}, other)
        except ValueError as refused:
            assert option in str(refused)
        else:
            assert changed, f"{other} is taken and has no effect: refuse it"
