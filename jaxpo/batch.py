"""The nouns: what a policy produced (`Rollouts`) and what a policy says of it (`TokenStats`).

Notation everywhere: B rows, P prompt positions (left-padded), T completion positions (right-padded), V vocabulary.
Absent is ``None``, never zeros. Masks come from lengths, never from token ids.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxpo.fields import ROLES, home_of, missing, role_id


class MissingField(ValueError):
    """A batch lacks the field ``field``, which an objective reads; the message says where it goes and who
    gives it."""

    def __init__(self, field: str, have: Sequence[str]):
        self.field = field
        super().__init__(
            f"the batch has no {field!r}, which this objective needs: {missing(field)}. The batch has: "
            f"{', '.join(sorted(have))}"
        )


@struct.dataclass
class TokenStats:
    """What a policy says of a batch. ``logp`` always; the rest only when asked for.

    logp, entropy, value: [B, T]; score: [B]; embed: [B, D]; gate: [B, M], a head on the prompt alone;
    logits: [B, T, V] (per slice only, never stored); derived: [B, T] by name, what an objective computes from the
    logits (`Asks.derived`).
    """

    logp: Array | None = None
    entropy: Array | None = None
    value: Array | None = None
    score: Array | None = None
    embed: Array | None = None
    gate: Array | None = None
    logits: Array | None = None
    topk: Any = None
    derived: dict[str, Array] = struct.field(default_factory=dict)


class Compared(NamedTuple):
    """A statistic of two models' logits (`Asks.derived`): the policy's, and a frozen other one's, which is constant.

    fn: (the policy's logits [n, V], tokens [n], the other model's logits [n, V]) -> [n]. Both are divided by the
      policy's temperature; V is the vocabulary rows that both have.
    other: name of the model (`jaxpo.learning.references`).

    ``Asks(wants={"kl"}, derived={"kl": Compared(full_kl)})`` is the full KL to the teacher.
    """

    fn: Callable[[Array, Array, Array], Array]
    other: str = "teacher"


# (logits [n, V] at the policy's temperature, tokens [n]) -> [n], or one of two models
Statistic = Callable[[Array, Array], Array] | Compared


def compared(derived: Mapping[str, Statistic], wants: Collection[str]) -> set[str]:
    """Names of the models that the statistics in ``wants`` compare the policy with."""
    return {f.other for name, f in derived.items() if name in wants and isinstance(f, Compared)}


def from_logits(statistic: Statistic, logits: Array, tokens: Array, others: Mapping[str, Array]) -> Array:
    """[n]: a statistic of logits [n, V] and tokens [n]; ``others``: logits [n, V'] of other models by name."""
    if not isinstance(statistic, Compared):
        return statistic(logits, tokens)
    theirs = jax.lax.stop_gradient(others[statistic.other])
    shared = min(logits.shape[-1], theirs.shape[-1])  # the tables of two models may be filled up by different numbers
    return statistic.fn(logits[:, :shared], tokens, theirs[:, :shared])


@struct.dataclass
class Rollouts:
    """Rows of prompt + completion with everything that is known of them.

    A field of `jaxpo.fields.FIELDS` is given by its name, also one that is no attribute: ``Rollouts(logp_ref=...)``,
    ``batch.replace(mc_value=...)``; it is then kept in ``per_token`` or ``per_row``, and ``get`` finds it.

    Attributes:
      tokens: [B, P+T] int, prompt left-padded, completion right-padded.
      mask: [B, T] 1 on tokens that the policy sampled (may have holes). Structural: filters never edit it.
      prompt_length: [B] real prompt tokens among the P; None = all P.
      count: [B] multiplicity of a row: 0 = filtered or filler (leaves every denominator), w = drawn w times.
      group: [B] rows that are compared with each other (same prompt); any integers.
      role: [B] index into ``ROLES``.
      prompt: [B] index of the prompt in its data set.
      seed: [B] uint32, fresh per row and step: the only source of randomness inside an objective.
      reward, correct, truncated: [B]; ``correct`` is the unshaped outcome.
      logp_old: [B, T] under the iterate at the start of the iteration, scored by the trainer. None = the policy being
        differentiated is that iterate.
      logp_beh: [B, T] under the distribution that was sampled from, as the sampler recorded it.
      entropy_old, value_old: [B, T] constants of the rollout.
      adv: [B] or [B, T], written by ``prepare``.
      weights: written by ``weigh``: term name -> [B, T] or [B].
      per_token: other fields [B, T, ...] by name: log-probs under references, what protocols and parts write.
      per_row: other fields [B, ...] by name.
      layout: (static) roles of the consecutive rows that make one unit; () = a row is a unit.
      shared_prompt: (static) every so many consecutive rows begin with the same prompt; the policy then computes it
        once.
    """

    tokens: Array | None = None
    mask: Array | None = None
    prompt_length: Array | None = None
    count: Array | None = None
    group: Array | None = None
    role: Array | None = None
    prompt: Array | None = None
    seed: Array | None = None
    reward: Array | None = None
    correct: Array | None = None
    truncated: Array | None = None
    logp_old: Array | None = None
    logp_beh: Array | None = None
    entropy_old: Array | None = None
    value_old: Array | None = None
    adv: Array | None = None
    weights: dict[str, Array] = struct.field(default_factory=dict)
    per_token: dict[str, Array] = struct.field(default_factory=dict)
    per_row: dict[str, Array] = struct.field(default_factory=dict)
    layout: tuple[str, ...] = struct.field(pytree_node=False, default=())
    shared_prompt: int = struct.field(pytree_node=False, default=1)

    @property
    def rows(self) -> int:
        return self.mask.shape[0]

    @property
    def width(self) -> int:
        """T."""
        return self.mask.shape[1]

    @property
    def prompt_width(self) -> int:
        """P."""
        return self.tokens.shape[1] - self.width

    @property
    def completions(self) -> Array:
        """[B, T] completion tokens."""
        return self.tokens[:, self.prompt_width :]

    @property
    def lengths(self) -> Array:
        """[B] float: number of masked tokens of each row."""
        return self.mask.astype(jnp.result_type(float)).sum(-1)

    def get(self, name: str) -> Array:
        """A field by name; `MissingField` if the batch does not have it."""
        if name in _ARRAY_FIELDS and getattr(self, name) is not None:
            return getattr(self, name)
        for more in (self.per_token, self.per_row):
            if name in more:
                return more[name]
        raise MissingField(name, self.fields())

    def fields(self) -> list[str]:
        """Names that ``get`` answers."""
        return [f for f in _ARRAY_FIELDS if getattr(self, f) is not None] + [*self.per_token, *self.per_row]

    def with_token(self, **values: Array) -> "Rollouts":
        """The batch with fields [B, T, ...] of a part's or protocol's own."""
        return self.replace(per_token={**self.per_token, **values})

    def with_row(self, **values: Array) -> "Rollouts":
        """The batch with fields [B, ...] of a part's or protocol's own."""
        return self.replace(per_row={**self.per_row, **values})

    def unit(self, x: Array) -> Array:
        """[B, ...] -> [N, R, ...]: the R rows of each unit of ``layout`` side by side."""
        r = max(len(self.layout), 1)
        return x.reshape(x.shape[0] // r, r, *x.shape[1:])


_ATTRIBUTES = tuple(f.name for f in dataclasses.fields(Rollouts))
_by_attribute = Rollouts.__init__


def _by_name(self: Rollouts, *args: Any, **named: Any) -> None:
    """Fields that are no attributes go into their dictionary; None takes them out of it."""
    for name in [n for n in named if n not in _ATTRIBUTES]:
        home = home_of(name)
        held = {k: x for k, x in (named.get(home) or {}).items() if k != name}
        named[home] = held if named[name] is None else {**held, name: named[name]}
        del named[name]
    _by_attribute(self, *args, **named)


Rollouts.__init__ = _by_name

_DICTS = ("weights", "per_token", "per_row")
_TOKEN_FIELDS = ("mask", "logp_old", "logp_beh", "entropy_old", "value_old")
_ROW_FIELDS = ("prompt_length", "count", "group", "role", "prompt", "seed", "reward", "correct", "truncated")
_ARRAY_FIELDS = ("tokens", *_TOKEN_FIELDS, *_ROW_FIELDS, "adv")


def logps(by_name: Mapping[str, Array]) -> dict[str, Array]:
    """Log-probs by the name of what gave them, under the names of fields: ``ref`` -> ``logp_ref``."""
    return {f"logp_{name}": x for name, x in by_name.items()}


def roles_of(layout: Sequence[str], units: int) -> np.ndarray:
    """The roles [units * len(layout)] of the rows of so many units."""
    return np.tile(np.array([role_id(r) for r in layout], np.int32), units)


def complete(batch: Rollouts) -> Rollouts:
    """Validate, and fill the fields whose absence has one meaning: count 1, each row its own group, the roles of
    ``layout`` (own without one), seed and prompt = row."""
    validate(batch)
    b, index = batch.rows, jnp.arange(batch.rows, dtype=jnp.int32)
    layout = batch.layout or ("own",)
    role = jnp.asarray(roles_of(layout, b // len(layout)))
    defaults = dict(count=jnp.ones(b), group=index, role=role, prompt=index, seed=index.astype(jnp.uint32))
    return batch.replace(**{k: v for k, v in defaults.items() if getattr(batch, k) is None})


def validate(batch: Rollouts) -> Rollouts:
    """Check shapes and static fields; the same batch is returned.

    Raises:
      ValueError: naming the field, its shape and the shape it should have.
    """
    if batch.mask is None:
        raise ValueError("Rollouts.mask is required: [B, T], 1 on the tokens that count")
    if batch.mask.ndim != 2:
        raise ValueError(f"Rollouts.mask must have shape [B, T], not {batch.mask.shape}")
    b, t = batch.mask.shape

    def expect(name: str, x: Array, shape: tuple[int, ...]) -> None:
        if tuple(x.shape[: len(shape)]) != shape:
            raise ValueError(
                f"Rollouts.{name} has shape {tuple(x.shape)}; its first axes must be {shape} (B={b}, T={t}, from mask)"
            )

    for name in _TOKEN_FIELDS[1:]:
        if getattr(batch, name) is not None:
            expect(name, getattr(batch, name), (b, t))
    for name in _ROW_FIELDS:
        x = getattr(batch, name)
        if x is not None and tuple(x.shape) != (b,):
            raise ValueError(f"Rollouts.{name} has shape {tuple(x.shape)} where it must be ({b},), one number a row")
    if batch.adv is not None:
        expect("adv", batch.adv, (b, t) if batch.adv.ndim == 2 else (b,))
    if batch.tokens is not None and (batch.tokens.ndim != 2 or batch.tokens.shape[0] != b or batch.tokens.shape[1] < t):
        raise ValueError(
            f"Rollouts.tokens has shape {tuple(batch.tokens.shape)}; it must be [B, P+T] with B={b}, T={t} (from mask)"
        )
    for group, shape in (("per_token", (b, t)), ("per_row", (b,)), ("weights", (b,))):
        for name, x in getattr(batch, group).items():
            expect(f"{group}[{name!r}]", x, shape)
    for name, size in (("layout", max(len(batch.layout), 1)), ("shared_prompt", batch.shared_prompt)):
        if size < 1 or b % size:
            raise ValueError(
                f"Rollouts.{name} says {size} consecutive rows belong together, but {b} rows do not divide by it"
            )
    _check_roles(batch)
    return batch


def _check_roles(batch: Rollouts) -> None:
    """``ValueError`` for a role that contradicts ``layout``; roles whose values cannot be read here pass."""
    expected = roles_of(batch.layout, batch.rows // max(len(batch.layout), 1))
    if not batch.layout or batch.role is None or not all(readable(x) for x in (batch.role, batch.count)):
        return
    counted = np.ones(batch.rows, bool) if batch.count is None else np.asarray(batch.count) > 0
    wrong = np.flatnonzero((np.asarray(batch.role) != expected) & counted)
    if len(wrong):
        found, wanted = ROLES[int(batch.role[wrong[0]])], ROLES[expected[wrong[0]]]
        raise ValueError(
            f"Rollouts.role says that row {wrong[0]} is {found!r}, and Rollouts.layout {batch.layout} that it is "
            f"{wanted!r}: leave role out, or give the rows in the order of the layout"
        )


def readable(x: Any) -> bool:
    """Whether the values of an array can be read here: it is neither traced nor spread over several processes."""
    spread = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and not x.is_fully_addressable
    return not (spread or isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct))


def validate_stats(stats: TokenStats, batch: Rollouts, wants: Collection[str]) -> TokenStats:
    """Check what a policy says of a batch: everything that the objective wants is there, in the right shape.

    Raises:
      ValueError: naming the statistic, its shape and the shape it should have.
    """
    b, t = batch.mask.shape
    shapes = dict.fromkeys(("logp", "entropy", "value"), (b, t)) | dict.fromkeys(("score", "embed", "gate"), (b,))
    for name in sorted(wants):
        x = stats.derived.get(name) if name not in TokenStats.__dataclass_fields__ else getattr(stats, name)
        if x is None:
            where = f"TokenStats({name}=...)" if name in shapes else f"TokenStats(derived={{{name!r}: ...}})"
            raise ValueError(f"the policy gives no {name!r}, which this objective wants: return {where}")
    given = {name: getattr(stats, name) for name in shapes} | {f"derived[{n!r}]": x for n, x in stats.derived.items()}
    for name, x in given.items():
        shape = shapes.get(name, (b, t))
        exact = name in ("logp", "entropy", "value", "score")
        if x is not None and tuple(x.shape if exact else x.shape[: len(shape)]) != shape:
            raise ValueError(f"TokenStats.{name} has shape {tuple(x.shape)} where it must be {shape} (B={b}, T={t})")
    return stats


def take(batch: Rollouts, rows: Array, *, shared_prompt: int = 1) -> Rollouts:
    """The chosen rows, in the given order (indices [n] or a concrete boolean mask [B]). ``shared_prompt`` says what
    the new order keeps."""
    chosen = jax.tree.map(lambda x: x[rows], batch)
    return chosen.replace(shared_prompt=shared_prompt)


def slices(batch: Rollouts, n: int) -> Rollouts:
    """Cut into ``n`` equal runs of rows: every leaf [B, ...] becomes [n, B/n, ...].

    Raises:
      ValueError: B does not divide by n, or a cut would fall inside a unit of ``layout``.
    """
    b, unit = batch.rows, max(len(batch.layout), 1)
    if b % n or (b // n) % unit:
        raise ValueError(f"{b} rows in units of {unit} cannot be cut into {n} equal slices")
    shared = int(np.gcd(batch.shared_prompt, b // n))
    return jax.tree.map(lambda x: x.reshape(n, b // n, *x.shape[1:]), batch).replace(shared_prompt=shared)


def pad(
    batch: Rollouts, *, rows: int | None = None, width: int | None = None, prompt_width: int | None = None
) -> Rollouts:
    """Grow to ``rows`` (fillers with count 0 and an empty mask), completion ``width`` (right) and ``prompt_width``
    (left).

    Neither changes any loss: that is a contract of every objective.
    """
    b, t = batch.mask.shape
    rows, width = b if rows is None else rows, t if width is None else width
    if batch.tokens is not None:
        grow = 0 if prompt_width is None else prompt_width - batch.prompt_width
        length = (
            jnp.full(b, batch.prompt_width, jnp.int32) if batch.prompt_length is None and grow else batch.prompt_length
        )
        batch = batch.replace(tokens=_grow(batch.tokens, 1, grow, left=True), prompt_length=length)
        batch = batch.replace(tokens=_grow(batch.tokens, 1, width - t))
    batch = _map_token_arrays(lambda x: _grow(x, 1, width - t), batch)
    if rows == b:
        return validate(batch)
    count = jnp.ones(b, jnp.float32) if batch.count is None else batch.count
    unused = None if batch.group is None else jnp.max(batch.group) + 1 + jnp.arange(rows - b, dtype=batch.group.dtype)
    padded = jax.tree.map(lambda x: _grow(x, 0, rows - b), batch.replace(count=count))
    size = len(batch.layout)
    if size and batch.role is not None and (rows - b) % size == 0:  # fillers are units too
        padded = padded.replace(role=padded.role.at[b:].set(roles_of(batch.layout, (rows - b) // size)))
    if unused is not None:  # fillers are groups of their own, so that no real group changes size
        padded = padded.replace(group=padded.group.at[b:].set(unused))
    shared = int(np.gcd(batch.shared_prompt, rows - b))
    return validate(padded.replace(shared_prompt=shared))


def concatenate(batches: Sequence[Rollouts]) -> Rollouts:
    """Stack rows; widths are padded to the largest.

    Raises:
      ValueError: the batches do not have the same fields, or differ in layout (the field is named).
    """
    batches = list(batches)
    if not batches:
        raise ValueError("concatenate needs at least one batch")
    first = batches[0]
    for other in batches[1:]:
        if other.layout != first.layout:
            raise ValueError(f"Rollouts.layout differs: {first.layout} and {other.layout}")
        odd = set(first.fields()) ^ set(other.fields())
        if odd:
            raise ValueError(f"Rollouts.{sorted(odd)[0]} is present in some of the batches only")
    width = max(b.width for b in batches)
    prompt_width = max(b.prompt_width for b in batches) if first.tokens is not None else None
    ragged = prompt_width is not None and any(b.prompt_width != prompt_width for b in batches)
    if ragged:  # one of them would get a prompt_length by padding, so all need one
        batches = [
            b if b.prompt_length is not None else b.replace(prompt_length=jnp.full(b.rows, b.prompt_width, jnp.int32))
            for b in batches
        ]
    batches = [pad(b, width=width, prompt_width=prompt_width) for b in batches]
    shared = int(np.gcd.reduce([b.shared_prompt for b in batches]))
    return validate(jax.tree.map(lambda *x: jnp.concatenate(x), *[b.replace(shared_prompt=shared) for b in batches]))


def from_sequences(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    prompt_width: int | None = None,
    width: int | None = None,
    pad_id: int = 0,
    **fields: Any,
) -> Rollouts:
    """Rollouts (numpy) of ragged token lists; widths default to the longest.

    Raises:
      ValueError: a prompt or completion longer than its width (the row is named), or lists of different length.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
    p = max(map(len, prompts), default=0) if prompt_width is None else prompt_width
    t = max(map(len, completions), default=0) if width is None else width
    tokens, mask = np.full((len(prompts), p + t), pad_id, np.int32), np.zeros((len(prompts), t), np.float32)
    for i, (x, y) in enumerate(zip(prompts, completions, strict=True)):
        if len(x) > p or len(y) > t:
            raise ValueError(
                f"row {i}: a prompt of {len(x)} and a completion of {len(y)} tokens do not fit "
                f"prompt_width={p}, width={t}"
            )
        tokens[i, p - len(x) : p] = x
        tokens[i, p : p + len(y)] = y
        mask[i, : len(y)] = 1
    return validate(
        Rollouts(tokens=tokens, mask=mask, prompt_length=np.array([len(x) for x in prompts], np.int32), **fields)
    )


def Demonstrations(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], **kwargs: Any) -> Rollouts:  # noqa: N802
    """Rollouts somebody else wrote: role ``expert``. Arguments as `from_sequences`."""
    role = np.full(len(prompts), role_id("expert"), np.int32)
    return from_sequences(prompts, completions, role=role, **kwargs)


def Pairs(
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],  # noqa: N802
    **kwargs: Any,
) -> Rollouts:
    """Rollouts in units of two rows, ``layout = ("chosen", "rejected")``: row 2i is the chosen answer to prompt i,
    row 2i+1 the rejected one."""
    if not len(prompts) == len(chosen) == len(rejected):
        raise ValueError(
            f"{len(prompts)} prompts, {len(chosen)} chosen and {len(rejected)} rejected answers: the numbers must agree"
        )
    layout = ("chosen", "rejected")
    role = roles_of(layout, len(prompts))
    return from_sequences(
        [p for p in prompts for _ in layout],
        [y for pair in zip(chosen, rejected, strict=True) for y in pair],
        role=role,
        group=np.arange(2 * len(prompts), dtype=np.int32) // 2,
        layout=layout,
        shared_prompt=2,
        **kwargs,
    )


def _grow(x: Array, axis: int, by: int, left: bool = False) -> Array:
    if by < 0:
        raise ValueError(f"cannot pad axis {axis} of size {x.shape[axis]} by {by}")
    if by == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (by, 0) if left else (0, by)
    return jnp.pad(x, widths)


def _map_token_arrays(f: Any, batch: Rollouts) -> Rollouts:
    """Apply ``f`` to every [B, T, ...] array but ``tokens``."""
    fields = {n: f(getattr(batch, n)) for n in _TOKEN_FIELDS if getattr(batch, n) is not None}
    if batch.adv is not None and batch.adv.ndim == 2:
        fields["adv"] = f(batch.adv)
    dicts = {n: {k: f(x) for k, x in getattr(batch, n).items()} for n in ("per_token",)}
    dicts["weights"] = {k: f(x) if x.ndim == 2 else x for k, x in batch.weights.items()}
    return batch.replace(**fields, **dicts)


assert {f.name for f in dataclasses.fields(Rollouts)} == {*_ARRAY_FIELDS, *_DICTS, "layout", "shared_prompt"}
