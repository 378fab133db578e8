"""Every option is live where it is declared to be, and refused where it is not.

Hyperparameters, their domains and the settings in which they have an effect (``when``) are read off the registry. Each
is tried at another value, in the default form and in every form that a choice or a switch gives: where it is declared
to have an effect, something must change; where it is declared to have none, it must be refused. A new option that
changes nothing fails here; one that shows only beside other settings needs a line in ``BESIDE``.
"""

import functools

import jax
import numpy as np
import pytest

import jaxpo
from jaxpo import testing
from jaxpo.arguments import alternatives, choices_of, domain_of, has_effect, plain
from jaxpo.batch import Compared
from jaxpo.registry import entry
from jaxpo.testing.cases import bigram, parameters

BUDGET = {"max_len": 5, "buffer": 3, "L_const": 4.0, "total": 3}  # what a run would fill in

# Another value, where half of the default (or 0.3), or one less, would be refused or would not show.
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
    "interval": 2,
    "log_ratio_clip": 0.5,
    "low0": 0.7,
    "low_max": 0.75,
    "low_step": 0.07,
    "max_len": 4,
    "max_new_tokens": 5,
    "mu_period": 3,
    "ratio": 0.3,
    "rho": 0.5,
    "steps": 3,
    "target": 0.2,
    ("adora", "correct_score"): -0.5,
    ("ahpo", "static_coef"): 0.5,
    ("chord", "mu"): 0.3,
    ("hpt", "gate"): -1,
    ("hpt", "rl_agg"): "token_mean",
    ("sequence_mean", "log_ratio_clip"): 0.01,
    ("nash_mp", "eta"): 0.1,
    ("orpo_chi2", "c"): 0.1,
    ("rdpo", "eps"): 0.3,
    ("rluf", "weights"): (0.2, 0.3, 0.5),
    ("rso_reward", "clip"): 0.3,
    ("bnpo", "max"): 2.0,
    ("bnpo", "min"): -1.0,
    ("dcpo_distribution", "H0"): 0.05,
    ("lp_reg", "rho"): 0.8,
    ("lp_reg", "tau"): 0.1,
    ("nonzero_advantage", "at_least"): 0.5,
    ("dcpo_distribution", "threshold"): -0.5,
    ("gspo", "log_ratio_clip"): 0.01,
    ("gspo_token", "log_ratio_clip"): 0.01,
    ("sequence", "log_ratio_clip"): 0.01,
    ("grpo", "clip"): 0.3,
    ("group_normalized", "clip"): 0.3,
    ("gtpo", "entropy_threshold"): 0.1,
    ("rejection", "low"): 0.01,
    ("rejection", "bound"): 0.0,
    ("rec", "log_ratio_clip"): 0.05,
    ("simpo", "gamma"): 0.2,
    ("token_rejection", "low"): 0.0,
    ("token_rejection", "bound"): 0.0,
    ("masked_weight", "low"): 0.999,
    ("masked_weight", "high"): 1.001,
    ("truncated_weight", "cap"): 1.0,
    ("dpa_logic", "program"): "TT FF / TF",
    ("policy_gradient", "advantage"): "rloo",
    ("policy_gradient", "agg"): "seq_mean",
    ("policy_gradient", "ratio"): "bounded",
    ("policy_gradient", "surrogate"): "cispo",
    ("policy_gradient", "regularizers"): "0.1 * kl_to_reference",
    ("policy_gradient", "filters"): "not_truncated",
    ("policy_gradient", "shaping"): "kl_in_reward",
    ("policy_gradient", "corrections"): "truncated_weight",
}

# Settings beside which an option shows on the example.
BESIDE = {
    "L_const": {"agg": "seq_sum_const", "L_const": 4.0},
    **{("bapo", option): {"target": 0.0} for option in ("low0", "high0")},
    **{("bapo", option): {"target": 1e9} for option in ("low_max", "high_max")},
    ("bapo", "high_step"): {"target": 0.8},
    ("bapo", "low_step"): {"mode": "paper", "target": 1.0},
    ("canon", "mu_period"): {"mu_schedule": "cosine", "mu_period": 2},
    **{("chord", option): {"warmup": 0, "decay": 4} for option in ("decay", "valley")},
    ("hpt", "singleton"): {"gate": -1},
    ("rft", "select"): {"threshold": -0.5},
    ("on_policy_distillation", "divergence"): {"divergence": "f_tvd"},  # f_rkl is reverse_kl by another name
    **{("on_policy_distillation", x): {"mode": "sampled", "rl": True} for x in ("eps_low", "eps_high", "eps")},
    ("on_policy_distillation", "log_ratio_clip"): {"mode": "sampled", "rl": True},
    ("clip_cov", "lb"): {"ratio": 0.5},
    ("clip_cov", "ub"): {"ratio": 0.5},
    ("policy_gradient", "max_new_tokens"): {"shaping": "overlong"},
    ("policy_gradient", "steps"): {"filters": "d3s_rows"},
    ("slic_hinge", "delta"): {"delta": 20.0},
    **{("lp_reg", option): {"rho": 0.8} for option in ("beta", "form", "kappa", "tau")},
    **{(name, "empty_rows"): {"agg": "seq_mean"} for name in ("cispo", "reinforce")},
    ("lp_reg", "proxy"): {"form": "paper", "rho": 0.8},
}
WITH = {
    "seq_sum_const": {"L_const": 4.0},
    "sum_const": {"L_const": 4.0},
    "cosine": {"mu_period": 2},
    "best": {"threshold": 1.0},
}  # of a choice
AGGREGATIONS = ("token_mean", "seq_mean", "seq_sum", "seq_sum_const")

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
    **dict.fromkeys(
        ("gspo", "gspo_token", "sequence", "sequence_mean", "sequence_sum", "sequence_token"), {"agg": "seq_mean"}
    ),
    "squared_residual": {"ratio": "sequence_sum", "agg": "seq_mean"},
    "clipped_but_protected": {"regularizers": "lp_reg(rho=0.5)"},
    "gtpo": {"ratio": "on_policy"},
    "nonzero_advantage": {},
}
# The choice that the default, None, stands for.
STANDS_FOR = {("kl_to_reference", "gradient"): "k3", ("kl_to_old", "gradient"): "k2"}


def entries() -> list[tuple[str, str]]:
    """(kind, name) of every objective, and of every part under one of its names."""
    found = [("objective", name) for name in jaxpo.names()]
    for kind in SLOT:
        found += [(kind, name) for name in {entry(name, kind).factory: name for name in jaxpo.names(kind)}.values()]
    return found


def options() -> list[tuple[str, str, str]]:
    """(kind, name, option) of every objective, and of every part unless the objective of its name has the option."""
    found = []
    for kind, name in entries():
        own = entry(name).parameters if kind != "objective" and name in jaxpo.names() else ()
        found += [(kind, name, option) for option in entry(name, kind).parameters if option not in own]
    return found


def of(table: dict, name: str, option: str):
    """What a table says of an option: of the one of this name, or of all that have it."""
    return table.get((name, option), table.get(option))


def filled(kind: str, name: str, given: dict) -> dict:
    """The settings, with what a run would fill in."""
    row = entry(name, kind)
    settings = {**row.defaults, **given}
    budget = {n: BUDGET[n] for n in row.budget if n in BUDGET}
    return {n: x for n, x in budget.items() if is_live(kind, name, n, settings | budget)} | given


def is_live(kind: str, name: str, option: str, settings: dict) -> bool:
    """Whether an option is declared to have an effect among all settings."""
    row = entry(name, kind)
    return option not in row.settings or has_effect(row.settings[option], {**row.defaults, **settings})


def build(kind: str, name: str, given: dict) -> jaxpo.Objective:
    """The objective with these settings, or one that holds the part with them."""
    given = filled(kind, name, given)
    if kind == "objective":
        return jaxpo.make(name, **given)
    part = f"{name}({', '.join(f'{k}={x!r}' for k, x in given.items())})"
    return jaxpo.make("policy_gradient", **{SLOT[kind]: part}, **AROUND.get(name, {}))


def others(kind: str, name: str, option: str, given: dict) -> list[dict]:
    """Settings that change the option."""
    row = entry(name, kind)
    now = {**row.defaults, **filled(kind, name, given)}[option]
    stated = of(OTHER, name, option)
    choices = AGGREGATIONS if option == "agg" and name != "policy_gradient" else choices_of(row.domains.get(option))
    if choices:
        now = STANDS_FOR.get((name, option)) if now is None else now
        found = [{option: x} | WITH.get(x, {}) for x in choices if x != now and x is not None]
        return [x for x in found if set(x) <= set(row.parameters)]
    if isinstance(now, bool):
        return [{option: not now}]
    if stated is not None and stated != now:
        return [{option: stated}]
    assert isinstance(now, int | float), f"no other value of {option} of {name} is known: add one to OTHER"
    return [{option: max(now - 1, 1) if plain(row.domains[option]) is int and now > 1 else now / 2 or 0.3}]


def forms(kind: str, name: str) -> list[dict]:
    """The default form, one for each other choice, switch, and coefficient of 0 that others look at."""
    row, found = entry(name, kind), [{}]
    for option, annotation in row.domains.items():
        if choices_of(annotation) or plain(annotation) is bool:
            found += others(kind, name, option, {})
    looked_at = {n for x in row.settings.values() for s in (x if type(x) is tuple else (x,)) for n in s.conditions}
    numeric = [n for n in looked_at if domain_of(row.domains.get(n)) is not None and 0 in domain_of(row.domains[n])]
    return found + [{n: 0} for n in sorted(numeric)]


# ---- what an objective does -----------------------------------------------------------------------


@functools.cache
def outcome(kind: str, name: str, given: tuple) -> tuple[str, dict[str, np.ndarray]]:
    """How data is gathered, and everything that is computed in a step: mild and bold ratios, in the second
    iteration."""
    objective = build(kind, name, dict(given))
    params, start = parameters(), testing.example(objective)
    stats = bigram(objective, objective.asks.wants | objective.asks.peeks, params, start)
    before = start.tokens[:, start.prompt_width - 1 : -1]
    flat = params["table"][before].reshape(-1, params["table"].shape[1]), start.completions.reshape(-1)
    own = {name: f for name, f in objective.asks.derived.items() if not isinstance(f, Compared)}
    found: dict[str, object] = {name: f(*flat) for name, f in own.items()}
    if objective.asks.rewards is not None:  # the same rewards in every range: a wider one would show nothing else
        start = start.replace(reward=testing.example(build(kind, name, {})).reward)
    if not start.layout:  # groups of one row, whoever wrote it, and a row without tokens
        start = start.replace(group=start.group.at[-2:].set([1001, 1000]), mask=start.mask.at[-3].set(0))
    for stale in (1.0, 5.0):
        batch = start.replace(logp_old=stats.logp + stale * (start.logp_old - stats.logp))
        state = objective.init()
        batch, state = objective.prepare(batch, state.replace(iteration=state.iteration + 1))
        batch = objective.weigh(batch, state, stats)
        (loss, report), grads = jax.value_and_grad(
            lambda s, batch=batch, state=state: objective.loss(lambda _: s, batch, state), has_aux=True
        )(stats)
        memory = objective.update(state, batch, report).memory
        found[f"{stale}"] = (batch.adv, batch.count, batch.weights, loss, grads, memory, batch.per_row, batch.per_token)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    return repr(sorted(objective.protocol.options.items())), arrays


def differ(kind: str, name: str, one: dict, other: dict) -> bool:
    """Whether two settings do different things."""
    a, b = (outcome(kind, name, tuple(sorted(x.items()))) for x in (one, other))
    return a[0] != b[0] or set(a[1]) != set(b[1]) or any(not same(a[1][k], b[1][k]) for k in a[1])


def same(x: np.ndarray, y: np.ndarray) -> bool:
    return x.shape == y.shape and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")


# ---- the tests ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Few optimizations: everything is small."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


FEW = ("grpo", "dapo", "rec", "dpo")
CASES = [
    pytest.param(kind, name, option, marks=() if kind == "objective" and name in FEW else pytest.mark.contracts)
    for kind, name, option in options()
]


@pytest.mark.filterwarnings("ignore:gspo_token with agg")
@pytest.mark.parametrize(("kind", "name", "option"), CASES)
def test_every_option_is_live(kind, name, option):
    row, given = entry(name, kind), of(BESIDE, name, option) or {}
    given = given if set(given) <= set(row.parameters) else {}
    if not is_live(kind, name, option, given):  # the first form in which it is declared to be
        given = next(form for form in forms(kind, name) if is_live(kind, name, option, form))
    for other in others(kind, name, option, given):
        assert differ(kind, name, given, given | other), f"{name}({given}): {other} changes nothing"


@pytest.mark.filterwarnings("ignore:gspo_token with agg")
@pytest.mark.parametrize(("kind", "name"), entries())
def test_options_declared_dead_are_refused_in_every_form(kind, name):
    for form in forms(kind, name):
        for option in entry(name, kind).settings:
            if option in form or is_live(kind, name, option, form):
                continue
            for other in others(kind, name, option, form):
                with pytest.raises(ValueError, match="has no effect with"):
                    entry(name, kind).factory(**{**filled(kind, name, form), **other})


@pytest.mark.contracts
@pytest.mark.filterwarnings("ignore:gspo_token with agg")
@pytest.mark.parametrize(("kind", "name"), entries())
def test_numbers_are_live_in_every_form(kind, name):
    row, silent = entry(name, kind), []
    for form in forms(kind, name)[1:]:
        for option, annotation in row.domains.items():
            number = domain_of(alternatives(annotation)[0]) is not None
            if not number or option in form or row.defaults[option] is None:
                continue
            if not is_live(kind, name, option, form):
                continue
            given = {n: x for n, x in (of(BESIDE, name, option) or {}).items() if n in row.parameters} | form
            for other in others(kind, name, option, given):
                try:
                    changed = differ(kind, name, given, given | other)
                except ValueError:  # of parts or settings that do not go together
                    continue
                if not changed:
                    silent.append(f"{name}({given}): {other} changes nothing")
    assert not silent, silent
