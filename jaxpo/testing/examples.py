"""The example batch for checking contracts, and a small policy of two tables to score it."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpo.batch import Compared, Rollouts, TokenStats, complete, from_logits
from jaxpo.fields import FIELDS, role_id
from jaxpo.objectives import Objective

VOCABULARY, PROMPT, WIDTH, GROUP = 7, 3, 6, 4
ROWS = 48  # for units of 1, 2, 3, 4 or 6 rows: with one shape, operations compile once for all objectives


def example(objective: Objective, width: int = WIDTH, spread: float = 1.0) -> Rollouts:
    """A small batch with every field the objective may read: groups of 4 (or units), holes in the mask, no ties.

    Args:
      width: T; the lengths of answers go with it. spread: of the policy's logits and of how far log-probs of others are
        from its own; 1 is wild.

    Raises:
      ValueError: the objective needs a field that is not in `jaxpo.fields.FIELDS`; give `check` a batch that has it.
    """
    rng, unit = np.random.default_rng(0), max(len(objective.unit.layout), 1)
    b = ROWS if ROWS % unit == 0 else 8 * unit
    lengths = np.resize([6, 3, 5, 1, 4, 6, 2], b) * width // 6
    mask = (np.arange(width) < lengths[:, None]).astype(np.float32)
    mask[::3, 1] = 0  # a hole: a token that the policy did not sample

    def logp() -> np.ndarray:
        return rng.normal(-2, 0.5, (b, width)).astype(np.float32)

    asked = drawn(objective.asks.needs, b, width)
    group = np.arange(b, dtype=np.int32) // (GROUP if unit == 1 else unit)
    roles = [role_id(name) for name in roles_of(objective)]
    batch = Rollouts(
        tokens=rng.integers(0, VOCABULARY, (b, PROMPT + width)).astype(np.int32),
        mask=mask,
        prompt_length=rng.integers(1, PROMPT + 1, b).astype(np.int32),
        count=np.ones(b, np.float32),
        group=97 - 5 * group,
        role=np.resize(roles, b).astype(np.int32),
        prompt=group,
        seed=rng.integers(0, 2**32, b, dtype=np.uint32),
        reward=allowed(objective, rng.normal(size=b).astype(np.float32)),
        correct=np.resize([0, 1, 1, 0], b).astype(np.float32),
        truncated=(lengths == width).astype(np.float32),
        entropy_old=rng.uniform(0, 1, (b, width)).astype(np.float32),
        value_old=logp(),
        layout=objective.unit.layout,
    )
    # The first row, which `count_is_multiplicity` doubles, comes last when its group is sorted by entropy.
    batch.entropy_old[:] *= np.resize([0.1, 1, 0.4, 0.7], b)[:, None]
    batch = jax.tree.map(jnp.asarray, batch)
    slots = {n.removeprefix("logp_") for n in objective.asks.needs if n.startswith("logp_")} - {"old", "beh"}
    said = bigram(objective, frozenset({"logp"}), parameters(spread), batch).logp

    def near(x: Array, scale: float) -> Array:
        return x + jnp.asarray(rng.normal(0, spread * scale, x.shape), jnp.float32)

    old = near(said, 0.3)  # some ratios are clipped and some are not
    per_token = {n: x for n, x in asked.items() if FIELDS[n].home == "per_token"}
    return complete(
        batch.replace(
            logp_old=old,
            logp_beh=near(old, 0.01),
            per_row={n: x for n, x in asked.items() if n not in per_token},
            per_token={
                "logp_sampler": near(old, 0.01),
                **per_token,
                **{f"logp_{name}": near(said, 0.5) for name in sorted(slots | {"ref"})},
            },
        )
    )


def roles_of(objective: Objective) -> tuple[str, ...]:
    """The roles of consecutive rows: those of the unit, or of a group in which one row is not the policy's own."""
    if objective.unit.layout:
        return objective.unit.layout
    if "label" in objective.asks.needs:
        return ("own", "own", "own", "kl")
    return ("own", "own", "own", "expert") if "role" in objective.asks.needs else ("own",)


def drawn(needs: Collection[str], rows: int, width: int = WIDTH) -> dict[str, Array]:
    """Draw examples of the needed fields that are not attributes of `Rollouts`, as `jaxpo.fields.FIELDS` says.

    Raises:
      ValueError: a needed field is not in that table.
    """
    own = {"logp", *Rollouts.__dataclass_fields__}
    names = sorted(n for n in needs if n not in own and not n.startswith("logp_"))
    if strange := [n for n in names if n not in FIELDS]:
        raise ValueError(f"no example of {strange[0]!r}, which this objective needs: give check a batch that has it")
    examples = {n: FIELDS[n].example(np.random.default_rng(2 + i), rows, width) for i, n in enumerate(names)}
    return {n: jnp.asarray(x, jnp.float32) for n, x in examples.items()}


def parameters(spread: float = 1.0) -> dict[str, Array]:
    """Parameters of the policy `bigram`; with a smaller ``spread`` it is less sure."""
    rng = np.random.default_rng(1)
    shapes = {"table": (VOCABULARY, VOCABULARY), "head": (VOCABULARY,)}
    scale = {"table": 6 * spread, "head": 1}  # some tokens are almost certain, and some almost impossible
    return {name: jnp.asarray(scale[name] * rng.normal(size=x), jnp.float32) for name, x in shapes.items()}


def allowed(objective: Objective, reward: Array) -> Array:
    """Squash the rewards into the range that the objective allows; their order stays the same."""
    if objective.asks.rewards is None:
        return reward
    low, high = objective.asks.rewards
    return low + (high - low) / (1 + np.exp(-np.asarray(reward)))


def others_logits(before: Array) -> Array:
    """[..., V]: what a frozen model beside the policy says of a token, given the one before it."""
    table = np.random.default_rng(2).normal(size=(VOCABULARY, VOCABULARY))
    return jnp.asarray(3 * table, jnp.float32)[before]


def bigram(objective: Objective, wants: frozenset[str], params: dict[str, Array], batch: Rollouts) -> TokenStats:
    """A policy of two small tables: the previous token gives the logits of the next.

    It returns the statistics in ``wants``, with those that the objective derives from logits.
    """
    before = batch.tokens[:, batch.prompt_width - 1 : -1]
    logits = params["table"][before]
    logps = jax.nn.log_softmax(logits)
    value = params["head"][before]
    said = {
        "logp": jnp.take_along_axis(logps, batch.completions[..., None], -1)[..., 0],
        "logits": logits,
        "value": value,
        "entropy": -jnp.sum(jnp.exp(logps) * logps, -1),
        "score": jnp.sum(value * (batch.mask > 0), -1),
        "embed": jnp.sum(logits * (batch.mask > 0)[..., None], 1)[:, :4],
        "gate": logits[:, 0, :2],
    }
    flat, asked = (logits.reshape(-1, VOCABULARY), batch.completions.reshape(-1)), objective.asks.derived
    others = {f.other: others_logits(before).reshape(flat[0].shape) for f in asked.values() if isinstance(f, Compared)}
    derived = {n: from_logits(f, *flat, others).reshape(batch.mask.shape) for n, f in asked.items() if n in wants}
    if "mean" in wants:  # of a Gaussian step, [B, T, 3]
        derived["mean"] = logits[..., :3]
    return TokenStats(**{name: said[name] for name in wants - set(derived)}, derived=derived)
