"""`batches` holds units of rows that hurt, and `evaluate` gives jaxpo's answer to them in float64."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import jaxpo
from jaxpo.batch import role_id
from tests.oracles.units import Batch, value_and_grad

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
        logp_ref=jnp.asarray(batch.ref),
        logp_prev=jnp.asarray(batch.prev),
        logp_soup=jnp.asarray(batch.prev),
        per_row={k: x for k, x in extra.items() if x.shape != per_token},
        per_token={k: x for k, x in extra.items() if x.shape == per_token},
        layout=batch.layout,
    )


@functools.cache
def _compiled(name: str, settings: tuple):
    objective = jaxpo.make(name, **dict(settings))

    def loss(said, batch):
        return jaxpo.evaluate(objective, lambda _: jaxpo.TokenStats(**said), batch)[0]

    return objective, jax.jit(jax.value_and_grad(loss), compiler_options={"xla_backend_optimization_level": 0})


def layout_of(name: str, **settings) -> tuple[str, ...]:
    return jaxpo.make(name, **settings).unit.layout


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


def assert_equals_oracle(oracles, configuration: tuple) -> None:
    """An objective equals the function of its name in a module of oracles, in all it is differentiated in."""
    name, settings, *into = configuration
    into = tuple(into) or ("logp",)
    for label, batch in batches(layout_of(name, **settings)).items():
        told = {"b_" if k == "b" else k: x for k, x in settings.items()}  # b is the batch
        expected = value_and_grad(getattr(oracles, name), batch, into, **told)
        try:
            assert_same(evaluate(name, batch, into, **settings), expected)
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from None


# ---- for identities ------------------------------------------------------------------------------------------------

LOG2 = np.log(2)
N = UNITS


def batch_of(name: str, seed: int = 5, **settings) -> Batch:
    return make_batch(jaxpo.make(name, **settings).unit.layout, seed)


def loss(name: str, batch: Batch, into=("logp",), **settings) -> float:
    return evaluate(name, batch, into, **settings)[0]


def slopes(name: str, batch: Batch, role: str | None = None, **settings) -> np.ndarray:
    """The gradient in the log-prob of whole answers: that of any of their tokens, which is the same (0 of an empty
    answer)."""
    grad = evaluate(name, batch, **settings)[1]["logp"]
    low, high = (f(np.where(batch.mask, grad, g), 1) for f, g in ((np.min, np.inf), (np.max, -np.inf)))
    some = batch.mask.any(1)
    np.testing.assert_allclose(low[some], high[some], rtol=1e-12, atol=1e-15)
    out = np.where(some, high, 0)
    return out if role is None else out[batch.rows(role)]


def at_reference(batch: Batch) -> Batch:
    return replace(batch, ref=batch.logp, prev=batch.logp, logp_old=batch.logp)


def swapped(batch: Batch) -> Batch:
    """The answers of every pair the other way round."""
    order = np.arange(len(batch.mask)).reshape(-1, 2)[:, ::-1].reshape(-1)
    names = ("mask", "logp", "ref", "prev", "logp_old")
    return replace(
        batch, **{n: getattr(batch, n)[order] for n in names}, extra={k: x[order] for k, x in batch.extra.items()}
    )


def with_extra(batch: Batch, **extra) -> Batch:
    b = len(batch.mask)
    return replace(
        batch, extra={**batch.extra, **{k: np.broadcast_to(np.asarray(x, float), b) for k, x in extra.items()}}
    )


def some(batch: Batch, role: str) -> np.ndarray:
    """[N] which answers are not empty."""
    return batch.mask.any(1)[batch.rows(role)]


def margin(batch: Batch) -> np.ndarray:
    return batch.D("chosen") - batch.D("rejected")


PAIRS = make_batch(("chosen", "rejected"), 5)
SAME = at_reference(PAIRS)
GROUPS = make_batch((), 5)


def close(a, b, **tolerance):
    np.testing.assert_allclose(a, b, **{"rtol": 1e-9, "atol": 1e-12, **tolerance})


def same_gradient(one, other, factor: float = 1.0):
    """Of two (name, batch, settings): the first is ``factor`` times the second."""
    a, b = (evaluate(name, batch, **settings)[1]["logp"] for name, batch, settings in (one, other))
    close(a, factor * b)
