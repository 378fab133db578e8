"""Batches of units that hurt, and jaxpo's answer to them in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxpo
from jaxpo.batch import role_id
from tests.oracles.units import Batch

UNITS, WIDTH = 8, 5
HEADS = ("score", "embed", "gate")  # what heads of the policy say


def make_batch(layout: tuple[str, ...], seed: int = 0, *, counts=False, extreme=False) -> Batch:
    """Ragged rows with holes, one of them empty and one full.

    Args:
      counts: units drawn 0, 1 or 2 times. extreme: some log-ratios are -40 or 40.
    """
    rng = np.random.default_rng(seed)
    r = max(len(layout), 1)
    b = UNITS * r if layout else 3 * UNITS
    mask = np.arange(WIDTH) < rng.integers(1, WIDTH + 1, b)[:, None]
    mask &= rng.random((b, WIDTH)) > 0.15
    mask[0], mask[r] = False, True
    logp = -rng.exponential(1.0, (b, WIDTH))

    def near() -> np.ndarray:
        gap = 0.5 * rng.normal(size=(b, WIDTH))
        gap = np.where(rng.random((b, WIDTH)) < 0.2, rng.choice([-40.0, 40.0], (b, WIDTH)), gap) if extreme else gap
        return logp + gap

    ref, prev, old = near(), near(), near()
    role = np.resize(np.array(layout or ("own", "own", "kl")), b)
    units = b // r
    count = rng.integers(0, 3, units) if counts else np.ones(units)
    extra = {
        "label": rng.integers(0, 2, b).astype(float),
        **{name: rng.random(b) for name in ("win", "pref_prob", "pref_opp")},
        **{name: rng.normal(size=b) for name in ("rm", "pref_score", "margin", "score", "reward")},
        **{name: rng.normal(size=(b, 3)) for name in ("rm_scores", "cand_scores", "adapter_logits", "obj_scores")},
        "gate": rng.normal(size=(b, 3)),
        "embed": rng.normal(size=(b, 6)),
        **{name: rng.uniform(0.5, 3, (b, WIDTH)) for name in ("severity", "relevance")},
        "segment": rng.integers(0, 4, (b, WIDTH)).astype(float),
    }
    hide = lambda x: np.where(mask, x, np.nan)  # noqa: E731
    return Batch(
        mask=mask,
        logp=hide(logp),
        ref=hide(ref),
        prev=hide(prev),
        logp_old=hide(old),
        count=np.repeat(count, r).astype(float),
        group=np.repeat(np.arange(units), r) if layout else np.resize([5, 5, 5, 9, 9, 2, 5], b) + np.arange(b) // 12,
        role=role,
        layout=layout,
        extra=extra,
    )


@functools.cache
def batches(layout: tuple[str, ...]) -> dict[str, Batch]:
    plain = make_batch(layout)
    return {
        "plain": plain,
        "counts": make_batch(layout, 1, counts=True),
        "extreme": make_batch(layout, 2, extreme=True),
        "nothing counted": plain_without(plain),
    }


def plain_without(batch: Batch) -> Batch:
    from dataclasses import replace

    return replace(batch, count=0 * batch.count)


def rollouts(batch: Batch) -> jaxpo.Rollouts:
    per_token = batch.mask.shape
    extra = {k: jnp.asarray(x) for k, x in batch.extra.items() if k not in HEADS and k != "reward"}
    return jaxpo.Rollouts(
        mask=jnp.asarray(batch.mask),
        count=jnp.asarray(batch.count),
        group=jnp.asarray(batch.group, jnp.int32),
        role=jnp.asarray([role_id(str(r)) for r in batch.role], jnp.int32),
        reward=jnp.asarray(batch.extra["reward"]),
        logp_old=jnp.asarray(batch.logp_old),
        slots={"ref": jnp.asarray(batch.ref), "prev": jnp.asarray(batch.prev), "soup": jnp.asarray(batch.prev)},
        extras={k: x for k, x in extra.items() if x.shape != per_token},
        token_extras={k: x for k, x in extra.items() if x.shape == per_token},
        layout=batch.layout,
    )


@functools.cache
def _compiled(name: str, settings: tuple):
    objective = jaxpo.make(name, **dict(settings))

    def loss(said, batch):
        return jaxpo.evaluate(objective, lambda _: jaxpo.TokenStats(**said), batch)[0]

    return objective, jax.jit(jax.value_and_grad(loss), compiler_options={"xla_backend_optimization_level": 0})


def layout_of(name: str, **settings) -> tuple[str, ...]:
    return jaxpo.make(name, **settings).layout


def evaluate(name: str, batch: Batch, into: tuple[str, ...] = ("logp",), **settings):
    """Loss and gradients by name of a registered objective, in float64."""
    with jax.enable_x64(True):
        _, value_and_grad = _compiled(name, tuple(sorted(settings.items())))
        said = {"logp": jnp.asarray(batch.logp), **{k: jnp.asarray(batch.extra[k]) for k in into if k != "logp"}}
        loss, grads = value_and_grad(said, rollouts(batch))
        assert loss.dtype == jnp.float64
        return float(loss), {k: np.asarray(grads[k]) for k in into}


def assert_same(actual, expected, rtol=1e-9, atol=1e-12) -> None:
    """Equal loss and gradients."""
    for k, grad in expected[1].items():
        np.testing.assert_allclose(actual[1][k], grad, rtol=rtol, atol=atol, err_msg=f"gradient in {k}")
    np.testing.assert_allclose(actual[0], expected[0], rtol=rtol, atol=atol, err_msg="loss")
