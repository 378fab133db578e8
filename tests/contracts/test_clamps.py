"""A clamp cuts what it bounds, in every objective: at it and beyond the gradient is exactly 0.

The clamp of a log-ratio guards ``exp``: strictly inside it changes nothing, at it and beyond the ratio no longer moves,
and neither does anything that is made of the ratio. A bound of the ratio (PPO's clip, the dual clip, a cap) is another
thing: a ratio exactly at the bound still belongs to the range and has its gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from jaxpo import testing
from jaxpo.fields import role_id
from jaxpo.kernels.policy_surrogate import core, reference
from jaxpo.primitives import imitation, preferences, ratios, regularizers, surrogates, values
from jaxpo.registry import entry

C = 2.0**-4  # within every clip range, so that nothing but the clamp cuts
CLAMPED = [name for name in jaxpo.names() if "log_ratio_clip" in entry(name).parameters]

# Settings without the terms that have no ratio in them: those of other clamps, or of none by their papers.
ALONE = {
    "grpo": dict(beta=0.0),
    "adora": dict(beta=0.0),
    "rloo": dict(form="ppo", beta=0.0),
    "reinforce_pp": dict(kl_coef=0.0),
    "kl_cov": dict(coef=0.0),
    "lp_reg": dict(form="paper", beta=0.0),
    **dict.fromkeys(("gspo", "gspo_token"), dict(eps=0.2)),
    "clip_cov": dict(lb=1e6, ub=1e7),
    "dypo": dict(alpha=1.0),
    "on_policy_distillation": dict(mode="sampled", use_ratio=True),
}
MORE = [
    ("d3s", dict(base="gspo", eps_low=0.2, eps_high=0.2)),
    ("dypo", dict(alpha=1.0, level="token")),
    ("grpo", dict(beta=0.0, dual_clip=2.0, agg="token_mean")),
    ("policy_gradient", dict(ratio=f"sequence_sum(log_ratio_clip={C})", agg="seq_mean")),
    (
        "policy_gradient",
        dict(
            ratio=f"token(log_ratio_clip={C})", surrogate="linear", regularizers=f"1.0 * proximal(log_ratio_clip={C})"
        ),
    ),
]
# The ratio is a constant weight of these, or only looked at: nothing moves through it, inside or outside.
CONSTANT = ("cispo", "rec")


def is_bounded_from_above_only(name: str, options: dict) -> bool:
    """Whether the log-ratio is a mean over the row."""
    return name in ("gspo", "gspo_token") or options.get("base") == "gspo"


def gradient(name: str, shift: float, **options) -> np.ndarray:
    """[B, 1] d loss / d logp where every token's log-ratio is ``shift`` and rows have one token, so that sums and
    means over a row are the token's; of the policy's own rows and tokens: those of experts have no ratio."""
    if "log_ratio_clip" in entry(name).parameters:
        options["log_ratio_clip"] = C
    case = testing.case(name, **options)
    batch = case.batch.replace(mask=jnp.zeros_like(case.batch.mask).at[:, 0].set(1))
    batch = batch.replace(logp_old=jnp.full_like(batch.logp_old, -2.0))
    batch = batch.with_token(logp_ref=jnp.full_like(batch.logp_old, -2.5), off_mask=jnp.zeros_like(batch.mask))
    stats = case.stats.replace(logp=batch.logp_old + shift)

    def loss(logp):
        return jaxpo.evaluate(case.objective, lambda _: stats.replace(logp=logp), batch)[0]

    grad = np.asarray(jax.grad(loss)(stats.logp))
    assert not grad[:, 1:].any()
    return np.where(batch.role[:, None] == role_id("own"), grad[:, :1], 0)


CASES = [(name, ALONE.get(name, {})) for name in CLAMPED if name not in CONSTANT] + MORE


# Before each commit those of some kinds; the tier of the contracts has the others.
FAST = ("grpo", "gspo_token", "d3s", "rloo", "policy_gradient")


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*x, marks=() if x[0] in FAST else pytest.mark.contracts, id=str(x)) for x in CASES],
)
def test_at_the_clamp_of_a_log_ratio_and_beyond_there_is_no_gradient(name, options):
    one_sided = is_bounded_from_above_only(name, options)
    for sign in (1, -1):
        assert np.abs(gradient(name, sign * C / 2, **options)).max() > 1e-6, "no gradient inside"
        if sign > 0 or not one_sided:
            for beyond in (C, 1.5 * C):
                assert not gradient(name, sign * beyond, **options).any(), f"log-ratio {sign * beyond}"
        else:
            assert gradient(name, -C, **options).any()


@pytest.mark.parametrize("name", CONSTANT)
def test_where_the_ratio_is_a_constant_the_clamp_bounds_a_constant(name):
    """No gradient goes through the ratio: that of ``logp`` is the same right and left of the clamp."""
    inside, at, beyond = (gradient(name, x) for x in (C - 1e-6, C, 2 * C))
    assert np.abs(inside).max() > 1e-6
    np.testing.assert_allclose(at, inside, rtol=1e-4)
    np.testing.assert_array_equal(beyond, at)


def slopes(f, *points: float) -> list[float]:
    return [float(jax.grad(f)(jnp.float32(x))) for x in points]


def test_the_clamps_of_other_terms_cut_at_them_and_beyond():
    def k3(d):
        return regularizers.kl_estimate(d, 0.0, "k3")

    assert slopes(k3, 20.0, 21.0, -20.0, -21.0) == [0, 0, 0, 0] and 0 not in slopes(k3, 19.5, -19.5)

    target = jnp.float32(-1.0)
    pull = regularizers.toward
    at = float(np.expm1(2.0) - 2.0)  # k3 of a gap of 2
    assert slopes(lambda x: pull(x, target, clip=at), -3.5, -3.0) == [0, 0]
    assert slopes(lambda x: pull(x, target, clip=at), -2.9)[0] < 0

    def nft(x):
        return imitation.negative_aware(x, jnp.float32(1.0), jnp.float32(0.5))

    assert slopes(nft, 10.0, 11.0) == [0, 0] and slopes(nft, 9.5, -30.0) == [-1, -1], "from above only"

    for f in (preferences.log_odds, lambda a: preferences.log_model_count_ratio(a, jnp.float32(-1.0), "orpo")):
        assert slopes(f, preferences.HIGHEST, 0.0, 1.0) == [0, 0, 0] and slopes(f, -0.5)[0] > 0


def test_a_ratio_at_a_bound_still_has_its_gradient():
    """Of PPO's clip, the dual clip, the cap and the clipped value: as `is_clipped` and the kernels say."""

    def of(adv, **bounds):
        given = dict(low=0.8, high=1.2) | bounds
        return lambda r: surrogates.clipped(r, jnp.float32(adv), *given.values())

    up, beyond = np.nextafter(np.float32(1.2), np.float32(2)), np.nextafter(np.float32(0.8), np.float32(0))
    assert slopes(of(1.0), 1.2, up, 0.8, beyond) == [-1, 0, -1, -1]
    assert slopes(of(-1.0), 1.2, up, 0.8, beyond) == [1, 1, 1, 0]
    assert slopes(of(-1.0, dual=3.0), 3.0, 3.5) == [1, 0]
    assert slopes(lambda r: surrogates.capped(r, jnp.float32(2.0), 10.0), 10.0, 10.5) == [-2, 0]

    def value(v, returns):
        return values.clipped_square(v, jnp.float32(1.0), jnp.float32(returns), 0.5)

    assert slopes(lambda v: value(v, 0.0), 1.5, 2.0) == [1.5, 2.0], "the clipped value is nearer to 0"
    assert slopes(lambda v: value(v, 5.0), 1.5, 2.0) == [-3.5, 0.0], "the clipped value is farther from 5"


@pytest.mark.parametrize("dual", (None, 3.0))
def test_the_kernels_cut_where_the_primitives_do(dual):
    """The arithmetic of the kernels, the naive form with JAX's derivative, and the primitives, at every bound."""
    settings = core.Settings("clipped", dual, 20.0, "k3")
    logp = jnp.asarray([[0.0, 0.5, -0.5, 20.0, -20.0, 25.0, np.log(3.0), 1.0]], jnp.float32)
    r = jnp.exp(logp)
    for adv in (1.0, -1.0):
        zero = jnp.zeros_like(logp)
        bounds = dict(low=jnp.where(logp == -0.5, r, 0.8), high=jnp.where(logp == 0.5, r, 1.2))
        x = core.Tokens(logp, zero, zero + adv, zero + 1, zero + 1, **bounds, logp_ref=zero, kl_weight=zero + 1)
        _, slope, slope_kl = core.token(settings, x)
        naive = jax.grad(lambda y, x=x: reference.policy_surrogate(settings, x._replace(logp=y)).policy)(logp)
        naive_kl = jax.grad(lambda y, x=x: reference.policy_surrogate(settings, x._replace(logp=y)).kl)(logp)
        np.testing.assert_allclose(slope, naive, rtol=1e-6)
        np.testing.assert_allclose(slope_kl, naive_kl, rtol=1e-5)

        def ours(y, adv=adv, zero=zero, bounds=bounds):
            ratio = jnp.exp(ratios.token_log_ratio(y, zero, zero + 1))
            return surrogates.clipped(ratio, zero + adv, **bounds, dual=dual).sum()

        np.testing.assert_allclose(slope, jax.grad(ours)(logp), rtol=1e-6)
        assert slope[0, 1 if adv > 0 else 2] != 0


def test_every_objective_with_a_clamp_is_here():
    assert {name for name, _ in CASES} | set(CONSTANT) == {*CLAMPED, "policy_gradient"}
