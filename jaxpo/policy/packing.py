"""Pack completions of unequal lengths into fewer, fuller rows, so that less is computed for padding.

The rows of a lane (the rows of one device, or all rows) are put into bins, by a plan that the host makes from their
lengths. For computations on single tokens, a lane is one sequence [p P + M T]: its p prompts, each once, and M bins of
T tokens, in which completions follow each other. In attention a completion must see its prompt and no other row. So
there it follows a copy of its prompt's keys and values in a wider bin, as a segment of its own. Statistics come back as
[B, T], 0 where there is no token.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxpo.batch import Rollouts
from jaxpo.parallel import batch_shards, constrain_rows
from jaxpo.policy.attention import causal_attention, prompt_attend, prompt_mask
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.transformer import Attend, Model, Params, embedded

PLAN = "packing"  # the plan in `Rollouts.per_row`: [B, 3] int32, a row's bin, its start there and in the wider bin
SHARES = 8  # the number of bins is a multiple of an eighth of the rows, so at most 8 programs are compiled


def room(width: int, prompt_width: int, rows: int, bins: int) -> int:
    """Tokens of a wider bin: T, and a prompt for each completion that a bin holds on average (rounded up)."""
    return width + prompt_width * -(-rows // bins)


def first_fit(length: np.ndarray, prompt: np.ndarray, width: int, attention: int, bins: int) -> np.ndarray | None:
    """Make the plan [rows, 3] of one lane: each row, longest first, goes into the first bin that has room. None if the
    rows do not fit.

    Args:
      length, prompt: [rows] tokens of the completion and of its prompt.
      width, attention: tokens of a bin, and of a wider bin.
    """
    plan, filled, attended = np.zeros((len(length), 3), np.int32), np.zeros(bins, int), np.zeros(bins, int)
    for row in np.argsort(-length, kind="stable"):
        if length[row] == 0:
            break
        both = length[row] + prompt[row]
        fits = (filled + length[row] <= width) & (attended + both <= attention)
        if not fits.any():
            return None
        at = int(fits.argmax())
        plan[row] = at, filled[at], attended[at]
        filled[at] += length[row]
        attended[at] += both
    return plan


def plan(length: np.ndarray, prompt: np.ndarray, width: int, prompt_width: int, lanes: int) -> tuple[np.ndarray, int]:
    """Make the plan [B, 3] of rows in ``lanes`` equal runs, and choose the number of bins of a lane: the fewest eighths
    of its rows that are enough for every lane.

    Raises:
      ValueError: the lanes do not divide the rows.
    """
    if len(length) % lanes:
        raise ValueError(f"{len(length)} rows do not divide into {lanes} lanes")
    rows = len(length) // lanes
    for bins in sorted({-(-rows * eighth // SHARES) for eighth in range(1, SHARES + 1)}):
        attention = room(width, prompt_width, rows, bins)
        parts = []
        for n, p in zip(length.reshape(lanes, rows), prompt.reshape(lanes, rows), strict=True):
            part = first_fit(n, p, width, attention, bins) if n.sum() <= bins * width else None
            if part is None:
                break
            parts.append(part)
        else:
            return np.concatenate(parts), bins
    raise AssertionError("as many bins as rows hold them all")


def lengths(mask: Array) -> Array:
    """[B] number of tokens up to the last one that counts, including it; 0 for a row without any."""
    return jnp.max((1 + jnp.arange(mask.shape[1])) * (mask > 0), -1)


def lanes_of(mesh: Mesh | None, rows: int) -> int:
    """The number of lanes: one for each part of the mesh that has rows of its own if that divides the rows, else 1."""
    shards = 1 if mesh is None else batch_shards(mesh)
    return 1 if rows % shards else shards


class Packed(NamedTuple):
    """Places of the tokens of S lanes. All indices are into the lane's own sequence of N = p P + M T tokens, or into
    its bins.

    tokens: [S, N] ids.
    positions: [S, N] positions for the rotary embedding.
    prompt_ok: [S p, P] real prompt tokens.
    before: [S, M T] the token whose state predicts each token of the bins.
    slots: [S, R T] the place of each row's tokens in the bins; M T = nowhere.
    keys: [S, M, A] the tokens in the wider bins of attention.
    segments: [S, M, A] 1 + the row that each of them belongs to; 0 = none.
    answers: [S, M T] the place of the bins' tokens in the wider bins.
    ends: [S, 2, R] the last token of each row's prompt, and of the row itself.
    """

    tokens: Array
    positions: Array
    prompt_ok: Array
    before: Array
    slots: Array
    keys: Array
    segments: Array
    answers: Array
    ends: Array


def taken(x: Array, index: Array) -> Array:
    """Index x [S, N, ...] by index [S, ...] in each lane: [S, ..., ...]; 0 where an index is N."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, index)


def pack(batch: Rollouts, prompt_ok: Array, lanes: int, per_prompt: int, bins: int) -> Packed:
    """The lanes of a batch whose ``per_row`` holds the plan; ``prompt_ok`` [B / per_prompt, P] marks real tokens.

    Raises:
      ValueError: there is no plan.
    """
    if PLAN not in batch.per_row:
        raise ValueError(f"a packed batch holds its plan as Rollouts.per_row[{PLAN!r}] (`jaxpo.policy.packing.plan`)")
    b, t, p = batch.rows, batch.width, batch.prompt_width
    rows, prompts = b // lanes, b // lanes // per_prompt
    width = room(t, p, rows, bins)

    def lane(tokens: Array, plan: Array, length: Array, ok: Array) -> Packed:
        """tokens [R, P + T], plan [R, 3], length [R], ok [p, P]."""
        owner, start = jnp.arange(rows) // per_prompt, ok.sum(-1)[jnp.arange(rows) // per_prompt]
        at, inside = jnp.arange(t), jnp.arange(t) < length[:, None]
        slot = jnp.where(inside, plan[:, :1] * t + plan[:, 1:2] + at, bins * t)  # [R, T]
        place = plan[:, :1] * width + plan[:, 2:] + start[:, None] + at
        copied = jnp.where(ok[owner] & (length > 0)[:, None], place[:, :1] - p + jnp.arange(p), bins * width)  # [R, P]

        def laid(size: int, where: Array, what: Array, empty: int = 0) -> Array:
            return jnp.full(size, empty, jnp.int32).at[where].set(jnp.broadcast_to(what, where.shape), mode="drop")

        row, wide = jnp.arange(rows)[:, None], (bins, width)
        last, own = owner[:, None] * p + p - 1, prompts * p + slot
        whole = jnp.where(length > 0, prompts * p + plan[:, 0] * t + plan[:, 1] + length - 1, last[:, 0])
        of_bins = laid(bins * t, slot, tokens[:, p:]), laid(bins * t, slot, start[:, None] + at)
        of_prompts = tokens[::per_prompt, :p].reshape(-1), jnp.maximum(jnp.cumsum(ok, -1) - 1, 0).reshape(-1)
        answered = jnp.where(inside, place, bins * width)
        where = jnp.concatenate([copied, answered], 1)
        return Packed(
            *(jnp.concatenate(x) for x in zip(of_prompts, of_bins, strict=True)),
            prompt_ok=ok,
            before=laid(bins * t, slot, jnp.where(at == 0, last, own - 1)),
            slots=slot.reshape(-1),
            keys=laid(bins * width, where, jnp.concatenate([owner[:, None] * p + jnp.arange(p), own], 1)).reshape(wide),
            segments=laid(bins * width, where, row + 1).reshape(wide),
            answers=laid(bins * t, slot, place),
            ends=jnp.stack([last[:, 0], whole]),
        )

    def cut(x: Array) -> Array:
        return x.reshape(lanes, -1, *x.shape[1:])

    out = jax.vmap(lane)(cut(batch.tokens), cut(batch.per_row[PLAN]), cut(lengths(batch.mask)), cut(prompt_ok))
    return out._replace(prompt_ok=prompt_ok)


def packed_attend(config: TransformerConfig, packed: Packed, mesh: Mesh | None = None) -> Attend:
    """Attention over [S, N] tokens: prompts see themselves, completions see their prompt and themselves."""
    lanes, bins, width = packed.keys.shape
    prompts, p = packed.prompt_ok.shape
    of_prompts = prompt_attend(config, packed.prompt_ok, mesh)
    segments, cut = packed.segments.reshape(lanes * bins, width), prompts // lanes * p

    def attend(q: Array, k: Array, v: Array, window: int | Array | None) -> tuple[Array, None]:
        own = (x[:, :cut].reshape(prompts, p, *x.shape[2:]) for x in (q, k, v))
        of_prompt = of_prompts(*own, window)[0].reshape(lanes, cut, *q.shape[2:])
        wide = (taken(x, packed.keys).reshape(lanes * bins, width, *x.shape[2:]) for x in (q, k, v))
        out = causal_attention(config, *wide, segments, segments, window, mesh)
        out = taken(out.reshape(lanes, bins * width, *q.shape[2:]), packed.answers)
        return jnp.concatenate([of_prompt, out], 1), None

    return attend


def packed_hidden(
    model: Model, params: Params, batch: Rollouts, bins: int, mesh: Mesh | None = None
) -> tuple[Array, Array, Callable[[Array], Array], Callable[[Array], Array], Callable[[int], Array]]:
    """Run the blocks on a packed batch.

    Args:
      bins: bins of each lane, as `plan` chose them.
      mesh: rows are spread over it; each device that has rows of its own has a lane.

    Returns:
      The final hidden states [n, D] that predict the tokens of the bins, and these tokens [n]; a function that lays out
      arrays [n, ...] as [B, T, ...]; a function that lays those into the bins again (0 where there is no token); a
      function that gives the states [B, D] after each row's prompt (of 0) or after its last token (of 1).

    Raises:
      ValueError: as in `pack`.
    """
    lanes = lanes_of(mesh, batch.rows)
    spread = lanes > 1
    per_prompt = math.gcd(batch.shared_prompt, batch.rows // lanes)
    length = None if batch.prompt_length is None else batch.prompt_length[::per_prompt]
    packed = pack(batch, prompt_mask(length, batch.rows // per_prompt, batch.prompt_width), lanes, per_prompt, bins)
    if spread:
        packed = Packed(*constrain_rows(tuple(packed), mesh))
    x = embedded(model, params, packed.tokens, mesh if spread else None)
    attend = packed_attend(model.config, packed, mesh)
    x, _ = model.run_blocks(params, constrain_rows(x, mesh) if spread else x, packed.positions, attend)
    hidden = model.final(params, taken(x, packed.before)).reshape(-1, x.shape[-1])

    def as_rows(x: Array) -> Array:
        x = taken(x.reshape(lanes, -1, *x.shape[1:]), packed.slots)
        return x.reshape(batch.rows, batch.width, *x.shape[2:])

    def as_bins(x: Array) -> Array:
        x, n = x.reshape(lanes, -1, *x.shape[2:]), packed.before.shape[1]
        laid = jax.vmap(lambda x, to: jnp.zeros((n, *x.shape[1:]), x.dtype).at[to].set(x, mode="drop"))
        return laid(x, packed.slots).reshape(-1, *x.shape[2:])

    def ends(which: int) -> Array:
        return model.final(params, taken(x, packed.ends[:, which])).reshape(batch.rows, -1)

    return hidden, packed.tokens[:, -packed.before.shape[1] :].reshape(-1), as_rows, as_bins, ends


def with_plan(batch: Rollouts, plan: Array | None) -> Rollouts:
    """The batch with the plan of its rows; None = it is not packed."""
    return batch if plan is None else batch.with_row(**{PLAN: plan})
