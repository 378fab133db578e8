"""Generation in one compiled function: prefill once per prompt, then decode in a loop until every row has ended.

The K responses to a prompt share its keys and values; each row keeps only the keys and values of its own completion.
Layers are either unrolled or scanned. Unrolled, each layer's cache is a separate buffer that the loop updates in place.
Scanned, there is one compiled layer and one stacked cache, which the layers update in turn.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from jaxpo.batch import Rollouts
from jaxpo.parallel import TOKENS, constrain
from jaxpo.policy.attention import narrowed, prompt_attend, prompt_mask
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.transformer import Attend, Model, Params, softcap
from jaxpo.primitives.preferences import geometric_mixture
from jaxpo.rollout.sampling import SamplingOptions, log_prob, sample

POSITIONS_AT_ONCE = 1024  # positions of a row's cache that are read at a time

# Keys and values [rows, KV, positions, d] of each layer: a list, or, scanned, one pair with a leading axis of layers.
Cache = list[tuple[Array, Array]] | tuple[Array, Array]


def prefill(
    model: Model, params: Params, prompts: Array, prompt_length: Array | None, *, scan_layers: bool = False
) -> tuple[Array, Cache, Array]:
    """Run the prompts [G, P] once.

    Returns:
      final hidden state [G, D] after the last prompt token, the cache of each layer [G, KV, P, d], and the mask of
      real tokens [G, P].
    """
    g, p = prompts.shape
    ok = prompt_mask(prompt_length, g, p)
    x, cache, attend = model.embed(params, prompts), [], prompt_attend(model.config, ok, model.mesh)
    positions = jnp.maximum(jnp.cumsum(ok, -1) - 1, 0)

    def block(x: Array, layer: Any) -> tuple[Array, tuple[Array, Array]]:
        x, kept = model.run_block(layer, x, positions, attend)
        return x, tuple(y.swapaxes(1, 2) for y in kept)

    if scan_layers:
        x, cache = jax.lax.scan(block, x, model.layers(params))
    else:
        for i in range(model.config.layers):
            x, kept = block(x, model.layer(params, i))
            cache.append(kept)
    return model.final(params, x[:, -1]), cache, ok


def decode(
    model: Model, layers: Any, x: Array, positions: Array, of_prompt: Cache, own: Cache, ok: Array, t: Array
) -> tuple[Array, Cache]:
    """Run one new token of each row, x [B, D], through all layers. Returns the new x, and the cache with position ``t``
    filled."""
    attend = partial(decode_attend, model.config, ok=ok, t=t)
    if isinstance(own, list):
        new = []
        for layer, prompt, mine in zip(layers, of_prompt, own, strict=True):
            x, kept = model.run_block(layer, x, positions, attend(prompt, mine))
            new.append(kept)
        return x, new

    def block(i: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
        layer, prompt = jax.tree.map(
            partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False), (layers, of_prompt)
        )
        return model.run_block(layer, carry[0], positions, attend(prompt, carry[1], layer=i))

    return jax.lax.fori_loop(0, model.config.layers, block, (x, own))


def decode_attend(
    config: TransformerConfig,
    of_prompt: tuple[Array, Array],
    own: tuple[Array, Array],
    *,
    ok: Array,
    t: Array,
    layer: Array | None = None,
) -> Attend:
    """Attention of one new token per row: to the prompt's keys [G, KV, P, d], and to the row's own keys [B, KV, T, d]
    up to and including position ``t``. With ``layer``, ``own`` is the cache of all layers [L, B, KV, T, d].

    A long cache is read `POSITIONS_AT_ONCE` positions at a time, and only as far as it is filled. The running maximum
    and sums of the online softmax (arXiv:1805.02867) are float32.
    """
    kp, vp = of_prompt
    g, kv, p, d = kp.shape
    b, width = own[0].shape[-4], own[0].shape[-2]
    at, size = () if layer is None else (layer,), min(width, POSITIONS_AT_ONCE)

    def written(cache: Array, new: Array) -> Array:
        new = new[:, :, None].astype(cache.dtype).reshape((1,) * len(at) + (b, kv, 1, d))
        return jax.lax.dynamic_update_slice(cache, new, (*at, 0, 0, t, 0))

    def read(cache: Array, start: Array | int) -> Array:
        sizes = (1,) * len(at) + (b, kv, size, d)
        return jax.lax.dynamic_slice(cache, (*at, 0, 0, start, 0), sizes).reshape(b, kv, size, d)

    def attend(q: Array, k: Array, v: Array, window: int | Array | None) -> tuple[Array, tuple[Array, Array]]:
        kept = written(own[0], k), written(own[1], v)
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        qs = (q * config.attention_scale).reshape(b, kv, -1, d)
        r = qs.shape[2]
        shared = qs.reshape(g, b // g, kv, r, d)

        def scored(equation: str, q: Array, k: Array, seen: Array) -> Array:
            score = jnp.einsum(equation, q, k, preferred_element_type=dtype)
            return jnp.where(seen, softcap(score, config.attention_softcap), -jnp.inf)

        def part(i: Array | int, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = so_far
            positions = i * size + jnp.arange(size)
            seen = narrowed(positions <= t, t - positions, window)
            s = scored("bhrd,bhtd->bhrt", qs, read(kept[0], i * size), seen)
            new = jnp.maximum(top, s.max(-1, keepdims=True))
            e, again = jnp.exp(s - new), jnp.exp(top - new)
            v = read(kept[1], i * size)
            o = jnp.einsum("bhrt,bhtd->bhrd", e.astype(v.dtype), v, preferred_element_type=dtype)
            return new, total * again + e.sum(-1, keepdims=True), out * again + o

        seen = narrowed(ok, p + t - jnp.arange(p), window)[:, None, None, None]
        s = scored("gkhrd,ghpd->gkhrp", shared, kp, seen)
        top = jnp.maximum(s.max(-1, keepdims=True), jnp.finfo(dtype).min)  # a window may have left the prompt behind
        e = jnp.exp(s - top)
        o = jnp.einsum("gkhrp,ghpd->gkhrd", e.astype(vp.dtype), vp, preferred_element_type=dtype)
        so_far = tuple(x.reshape(b, kv, r, -1) for x in (top, e.sum(-1, keepdims=True), o))
        _, total, out = part(0, so_far) if size == width else jax.lax.fori_loop(0, t // size + 1, part, so_far)
        return (out / total).reshape(q.shape).astype(q.dtype), kept

    return attend


def empty_cache(of_prompt: Cache, rows: int, width: int, mesh: Mesh | None) -> Cache:
    """An empty cache for ``width`` positions of each row, next to the cache of its prompt. Rows and heads are sharded
    over the mesh."""
    if width > POSITIONS_AT_ONCE:
        width += -width % POSITIONS_AT_ONCE

    def room(x: Array) -> Array:
        *layers, _, kv, _, d = x.shape
        room = jnp.zeros((*layers, rows, kv, width, d), x.dtype)
        if mesh is None:
            return room
        where = [None] * len(layers)
        return constrain(room, mesh, *where, TOKENS, "tensor")

    return jax.tree.map(room, of_prompt)


def decode_trips(width: int) -> tuple[float, ...]:
    """Trips of the nested loops of `generate` if all completions have ``width`` tokens: the number of tokens, and the
    average number of parts of the cache that a token reads."""
    read = max(width - 1, 1)  # the first comes from the prompt
    if read <= POSITIONS_AT_ONCE:
        return (read,)
    return read, sum(t // POSITIONS_AT_ONCE + 1 for t in range(read)) / read


def generate(
    model: Model,
    params: Params,
    prompts: Array,
    key: Array,
    options: SamplingOptions,
    *,
    prompt_length: Array | None = None,
    budget: Array | None = None,
    responses: int = 1,
    policy_temperature: float = 1.0,
    pad_id: int = 0,
    scan_layers: bool = False,
    partner: Params | None = None,
    share: Array | float | None = None,
) -> Rollouts:
    """Sample ``responses`` completions of each prompt; jit it with ``options`` as an ordinary argument.

    Args:
      prompts: [G, P] ids, left-padded.
      key: source of the uniforms (one per row and position).
      prompt_length: [G] number of real tokens; None = all.
      budget: [G] most tokens of each completion, within ``options.max_new_tokens``; None = ``max_new_tokens``.
      policy_temperature: the temperature at which the trainer scores.
      scan_layers: compile one layer for all. A deep model then compiles in one minute instead of many, but reads its
        cache through a slice of a larger buffer.
      partner, share: parameters of a second policy of the same model, and its exponent. Every token is drawn from
        ``params^(1 - share) partner^share``, normalised (Nash-MD, arXiv:2312.00886). ``logp_sampler`` still belongs to
        ``params`` alone.

    On ``model.mesh`` (None = the partitioner decides) heads are spread over "tensor" and rows over all other axes:
    decoding one token at a time has no use for an axis of positions.

    Returns:
      Rollouts of B = G * responses rows in the order of the prompts: ``tokens``; ``mask`` (1 up to and including the
      token that ended the row); ``truncated`` (the length limit ended the row); ``logp_beh`` under the sampling
      distribution; ``per_token["logp_sampler"]`` under the plain policy, if that is another distribution; ``group``
      and ``shared_prompt``.
    """
    g, p = prompts.shape
    b, width, mesh = g * responses, options.max_new_tokens, model.mesh
    if mesh is not None:
        prompts, prompt_length, budget = constrain((prompts, prompt_length, budget), mesh, TOKENS)
    nets = [params] if partner is None else [params, partner]
    filled = [prefill(model, net, prompts, prompt_length, scan_layers=scan_layers) for net in nets]
    ok = filled[0][2]
    layers = [
        model.layers(net) if scan_layers else [model.layer(net, i) for i in range(model.config.layers)] for net in nets
    ]
    uniform = jax.random.uniform(key, (width, b))
    start = jnp.repeat(ok.sum(-1), responses)
    eos = jnp.asarray(options.eos_ids, jnp.int32)
    limit = None if budget is None else jnp.repeat(budget, responses)
    last_state = None if options.stop_table is None else options.stop_table.shape[0] - 1

    def running(t: Array, state: dict[str, Any]) -> Array:
        """[B] bool: the row gets a token at position ``t``."""
        return ~state["done"] if limit is None else ~state["done"] & (t < limit)

    def draw(t: Array, hidden: list[Array], state: dict[str, Any]) -> dict[str, Any]:
        """Sample position ``t`` of the rows that have not ended, and record it."""
        u = jax.lax.dynamic_index_in_dim(uniform, t, keepdims=False)
        own, *others = (model.logits(net, h) for net, h in zip(nets, hidden, strict=True))
        logits = geometric_mixture(own, *others, share) if others else own
        token, logp, plain = sample(logits, u, options, policy_temperature=policy_temperature)
        plain = log_prob(own / policy_temperature, token) if others else plain
        alive = running(t, state)
        token = jnp.where(alive, token, pad_id).astype(jnp.int32)
        new = dict(
            tokens=token,
            mask=alive.astype(jnp.float32),
            logp=jnp.where(alive, logp, 0.0),
            plain=jnp.where(alive, plain, 0.0),
        )
        record = {k: jax.lax.dynamic_update_index_in_dim(state[k], v, t, 0) for k, v in new.items() if k in state}
        done = state["done"] | jnp.isin(token, eos) & alive
        if last_state is not None:
            record["stop"] = jnp.where(alive, options.stop_table[state["stop"], token], state["stop"])
            done |= record["stop"] == last_state
        return {**state, **record, "done": done}

    def step(carry: tuple[Array, dict[str, Any], list[Cache]]) -> tuple[Array, dict[str, Any], list[Cache]]:
        t, state, caches = carry
        last, hidden, kept = jax.lax.dynamic_index_in_dim(state["tokens"], t - 1, keepdims=False), [], []
        for net, layer, (_, of_prompt, _), cache in zip(nets, layers, filled, caches, strict=True):
            x = model.embed(net, last)
            if mesh is not None:
                x = constrain(x, mesh, TOKENS)
            x, cache = decode(model, layer, x, start + t - 1, of_prompt, cache, ok, t - 1)
            hidden.append(model.final(net, x))
            kept.append(cache)
        return t + 1, draw(t, hidden, state), kept

    state: dict[str, Any] = dict(
        tokens=jnp.full((width, b), pad_id, jnp.int32),
        mask=jnp.zeros((width, b)),
        logp=jnp.zeros((width, b)),
        done=jnp.zeros(b, bool),
    )
    if not (options.plain and policy_temperature == 1 and partner is None):
        state["plain"] = jnp.zeros((width, b))
    if last_state is not None:
        state["stop"] = jnp.zeros(b, jnp.int32)
    state = draw(jnp.int32(0), [jnp.repeat(hidden, responses, 0) for hidden, _, _ in filled], state)
    cache = [empty_cache(of_prompt, b, max(width - 1, 1), mesh) for _, of_prompt, _ in filled]
    _, state, _ = jax.lax.while_loop(
        lambda c: (c[0] < width) & jnp.any(running(c[0], c[1])), step, (jnp.int32(1), state, cache)
    )
    return Rollouts(
        tokens=jnp.concatenate([jnp.repeat(prompts, responses, 0), state["tokens"].T], 1),
        mask=state["mask"].T,
        logp_beh=state["logp"].T,
        prompt_length=start.astype(jnp.int32),
        group=jnp.repeat(jnp.arange(g, dtype=jnp.int32), responses),
        shared_prompt=responses,
        truncated=(~state["done"]).astype(jnp.float32),
        logp_sampler=state["plain"].T if "plain" in state else None,
    )
