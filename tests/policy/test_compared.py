"""Statistics of two models: the policy's logits and another model's, slice by slice, against float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpo import testing
from jaxpo.batch import Compared, Rollouts
from jaxpo.learning.step import optimizer_step, score
from jaxpo.objectives import Asks, Term, asks_of, from_terms
from jaxpo.parallel import make_mesh
from jaxpo.policy import packing
from jaxpo.policy.stats import Other, derived_stats, head_of, policy_of, token_stats
from jaxpo.policy.transformer import TransformerConfig, build, init
from tests.oracles.transformer import log_softmax

B, P, T, V = 8, 3, 4, 13
LENGTHS = np.array([4, 1, 2, 1, 3, 1, 1, 2])
POLICY = build(TransformerConfig(vocab_size=V, width=16, layers=1, heads=2))
TEACHER = build(TransformerConfig(vocab_size=V, width=24, layers=1, heads=4, tied=False, final_softcap=3.0))
TEMPERATURE = 0.7


def full_kl(logits, tokens, other):
    """KL(policy || other model) [n]."""
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    return jnp.sum(jnp.exp(p) * (p - q), -1)


KL = Compared(full_kl)


@cache
def params():
    """Of the policy and of the teacher."""
    keys = jax.random.split(jax.random.key(0))
    return tuple(jax.tree.map(lambda x: 3 * x, init(m.config, k)) for m, k in zip((POLICY, TEACHER), keys, strict=True))


def batch_of():
    rng = np.random.default_rng(0)
    prompts = np.repeat(rng.integers(1, V, (B // 2, P)), 2, 0)
    tokens = np.concatenate([prompts, rng.integers(1, V, (B, T))], 1).astype(np.int32)
    mask = (np.arange(T) < LENGTHS[:, None]).astype(np.float32)
    given = dict(tokens=tokens, mask=mask, prompt_length=np.full(B, P, np.int32), shared_prompt=2)
    return jax.tree.map(jnp.asarray, Rollouts(**given))


@cache
def scored():
    """The batch with what the teacher says of it."""
    batch = batch_of()
    hears = policy_of(TEACHER, wants=frozenset({"logp", "hidden"}), temperature=TEMPERATURE)
    said = jax.jit(partial(score, hears, microbatches=2))(params()[1], batch)
    assert said.derived["hidden"].shape == (B, T, 24)
    return batch.with_token(hidden_teacher=said.derived["hidden"], logp_teacher=said.logp)


def policy(mesh=None, bins=0):
    """What a run makes of the statistic."""
    others = {"teacher": head_of(Other(TEACHER, params()[1]))}
    options = dict(derived={"kl": KL}, temperature=TEMPERATURE, mesh=mesh, bins=bins)
    return policy_of(POLICY, wants=frozenset({"kl", "entropy"}), others=others, **options)


@pytest.mark.parametrize(("slices", "rows"), [(1, V), (6, V), (6, V - 3)])
def test_value_and_gradient_are_those_of_float64(slices, rows):
    """In ``slices`` parts; the teacher's vocabulary may be cut to fewer rows. It gets no gradient."""
    rng, n, (own, other) = np.random.default_rng(1), 11, params()
    weight, tokens = rng.normal(size=n), rng.integers(0, rows, n)
    hidden, theirs = (rng.normal(size=(n, m.config.width)).astype(np.float32) for m in (POLICY, TEACHER))
    config = TransformerConfig(**{**TEACHER.config.__dict__, "vocab_size": rows})
    head = {"head": other["head"][:rows]}

    def loss(x, table, y, head):
        theirs = {"teacher": (Other(build(config), head), y)}
        at_once = (V + rows) * -(-n // slices)
        options = dict(temperature=TEMPERATURE, logits_at_once=at_once, theirs=theirs)
        out = derived_stats(POLICY, {"embedding": table}, x, jnp.asarray(tokens), {"kl": KL}, **options)["kl"]
        return jnp.sum(weight * out), out

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    given = hidden, own["embedding"], theirs, head
    (dx, dtable, dy, dhead), kl = grad(*given)
    x, table, y, u = (np.asarray(a, np.float64) for a in (*given[:3], head["head"]))
    p = log_softmax((x @ table.T / TEMPERATURE)[:, :rows])
    q = log_softmax(3.0 * np.tanh(y @ u.T / 3.0) / TEMPERATURE)
    expected = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-5)
    dz = weight[:, None] * np.exp(p) * (p - q - expected[:, None]) / TEMPERATURE
    np.testing.assert_allclose(dx, dz @ table[:rows], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dtable[:rows], dz.T @ x, rtol=1e-4, atol=1e-4)
    assert not dtable[rows:].any() and not dy.any() and not dhead["head"].any()
    assert kl.max() > 0.1


def test_log_probs_of_the_same_pass():
    """The teacher's log-probs follow from its hidden states and its head, as the slices use them."""
    batch, other = scored(), params()[1]
    p = log_softmax(np.asarray(TEACHER.logits(other, batch.per_token["hidden_teacher"]), np.float64) / TEMPERATURE)
    logp = np.take_along_axis(p, np.asarray(batch.completions)[..., None], -1)[..., 0]
    np.testing.assert_allclose(batch.get("logp_teacher"), logp, rtol=1e-5, atol=1e-5)


def distillation():
    """The mean KL to the teacher, with a look at the KL of the whole batch."""

    def value(stats, batch, state):
        return stats.derived["kl"] + 0.1 * batch.get("logp_teacher") * stats.logp

    asks = Asks(wants=frozenset({"kl"}), peeks=frozenset({"kl"}), derived={"kl": KL})
    return from_terms([Term("kl", value, asks=asks)], asks=asks_of("logp_teacher"))


@cache
def stepped(microbatches):
    objective, optimizer = distillation(), optax.sgd(0.1)
    own = params()[0]

    @jax.jit
    def step(own, batch):
        batch, state = objective.prepare(batch, objective.init())
        options = dict(microbatches=microbatches)
        return optimizer_step(objective, policy(), optimizer, own, optimizer.init(own), state, batch, **options)

    new, *_, metrics = step(own, scored())
    return jax.tree.map(lambda a, b: np.asarray(a - b), new, own), metrics


def test_a_step_does_not_depend_on_microbatches():
    (a, said), (b, also) = stepped(1), stepped(2)
    assert said["loss"] > 0.05 and said["grad_norm"] > 1e-2
    for name in said:
        np.testing.assert_allclose(said[name], also[name], rtol=1e-5, atol=1e-6, err_msg=name)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), a, b)


def loss_of(apply, batch):
    def loss(own):
        kl = apply(own, batch).derived["kl"]
        return jnp.sum(jnp.where(batch.mask > 0, jnp.sin(kl), 0))

    return jax.jit(jax.value_and_grad(loss))(params()[0])


@pytest.mark.parametrize("kind", ["packed", "data", "tensor", "packed and data"])
def test_packed_rows_and_meshes_change_nothing(kind):
    plain, batch = loss_of(policy(), scored()), scored()
    axes = {"data": {"data": 2, "fsdp": 2}, "tensor": {"data": 2, "tensor": 2}, "packed and data": {"data": 2}}.get(
        kind
    )
    size = int(np.prod([*axes.values()])) if axes else 1
    mesh = make_mesh(dict(data=1) | axes, jax.devices()[:size]) if axes else None
    bins = 0
    if "packed" in kind:
        lanes = axes["data"] if axes else 1
        plan, bins = packing.plan(LENGTHS, np.full(B, P), T, P, lanes)
        assert bins < B // lanes
        batch = batch.with_row(**{packing.PLAN: jnp.asarray(plan)})
    value, grad = loss_of(policy(mesh, bins), batch)
    np.testing.assert_allclose(value, plain[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), grad, plain[1])


def test_hidden_states_of_packed_rows_are_those_of_rows():
    plan, bins = packing.plan(LENGTHS, np.full(B, P), T, P, 1)
    batch = batch_of().with_row(**{packing.PLAN: jnp.asarray(plan)})
    given = token_stats(TEACHER, params()[1], batch, wants=frozenset({"hidden"}), bins=bins).derived["hidden"]
    inside = np.asarray(batch.mask)[..., None] > 0
    np.testing.assert_allclose(
        np.where(inside, given, 0), np.where(inside, scored().per_token["hidden_teacher"], 0), atol=2e-5
    )


def test_what_is_missing_is_named():
    apply, own = policy(), params()[0]
    with pytest.raises(
        ValueError, match="compares the policy with the model 'teacher', but the batch has no 'hidden_t"
    ):
        apply(own, batch_of())
    with pytest.raises(ValueError, match="but its head is not given: .*in a run config.references.teacher gives both"):
        token_stats(POLICY, own, scored(), wants=frozenset({"kl"}), derived={"kl": KL})


def test_the_contracts_hold_for_an_objective_that_compares():
    objective = distillation()
    stats = testing.bigram(objective, frozenset({"kl", "logp"}), testing.parameters(), testing.example(objective))
    assert (stats.derived["kl"] > 0).all()
