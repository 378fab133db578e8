"""What the policy says of a batch: hidden states of the completion positions, reduced to `TokenStats`."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from jaxpo.batch import Rollouts, Statistic, TokenStats, compared, from_logits
from jaxpo.kernels import token_logprob
from jaxpo.parallel import POSITIONS, ROWS, batch_shards, by_row, by_token, constrain
from jaxpo.policy import heads
from jaxpo.policy.attention import joined, parted, prompt_mask, shared_prompt_attend
from jaxpo.policy.packing import packed_hidden
from jaxpo.policy.transformer import Model, Params, embedded
from jaxpo.registry import unknown

# Statistics of the pass that gives the log-probs. Besides the first two they are found in `TokenStats.derived`, "top1"
# as top1_id and top1_logp.
AVAILABLE = ("logp", "entropy", "logsumexp", "sum_p2", "top1", "logp_at_temperature")
CRITIC = "critic"  # entry of the parameters that holds a critic of its own
HIDDEN = "hidden"  # [B, T, D] in `TokenStats.derived`: the final hidden states, from which each token is predicted
NONE: Mapping[str, "Other"] = MappingProxyType({})


class Other(NamedTuple):
    """A frozen model that stands beside the policy. params: of the whole model, or of its head alone (`head_of`)."""

    model: Model
    params: Params


def head_of(other: Other) -> Other:
    """The model with nothing but what makes logits of hidden states."""
    name = "embedding" if other.model.config.tied else "head"
    return other._replace(params={name: other.params[name]})


def hidden_field(name: str) -> str:
    """The field of a batch, in ``per_token``, that holds the hidden states [B, T, D'] of the model ``name``."""
    return f"hidden_{name}"


def completion_hidden(
    model: Model, params: Params, batch: Rollouts, mesh: Mesh | None = None, *, read_last: bool = False
) -> Array:
    """[B, T, D]: the final hidden state from which each completion token is predicted.

    With ``read_last`` [B, T + 1, D]: also the state after the last of them. The prompt of ``batch.shared_prompt``
    consecutive rows is run once; with a ``mesh``, over which rows are spread, once on every device that has some of
    them. Where positions are spread too (mesh.context = C > 1) T is filled up to a multiple of C, and each device has
    T / C positions of every completion.

    Raises:
      ValueError: a batch without tokens; positions that are to be spread while the rows do not divide.
    """
    if batch.tokens is None:
        raise ValueError("Rollouts.tokens is required by a policy: [B, P+T] token ids")
    b, p, t, k = batch.rows, batch.prompt_width, batch.width, batch.shared_prompt
    spread = mesh is not None and b % batch_shards(mesh) == 0
    if spread:  # the most rows that a prompt can serve without leaving a device
        k = math.gcd(k, b // batch_shards(mesh))
    parts = 1 if mesh is None else mesh.shape[POSITIONS]
    if parts > 1 and not spread:
        raise ValueError(
            f"{b} rows do not divide over mesh.data * mesh.fsdp * mesh.expert = {batch_shards(mesh)}, which "
            f"mesh.{POSITIONS} {parts} asks for"
        )
    prompts = b // k
    length = None if batch.prompt_length is None else batch.prompt_length[::k]
    ok = prompt_mask(length, prompts, p)
    start = jnp.full(b, p) if batch.prompt_length is None else batch.prompt_length
    prompt_positions = jnp.maximum(jnp.cumsum(ok, -1) - 1, 0)
    read = t if read_last else t - 1  # for log-probs the last token is predicted, never read
    prompt, inputs, at = batch.tokens[::k, :p], batch.completions[:, :read], start[:, None] + jnp.arange(read)
    if parts > 1:  # the last token of a prompt is run with each completion: so states lie where they are needed
        prompt, prompt_positions, ok = (x[:, :-1] for x in (prompt, prompt_positions, ok))
        inputs = jnp.concatenate([batch.tokens[:, p - 1 : p], inputs], 1)
        at = jnp.maximum(start[:, None] + jnp.arange(-1, read), 0)
        full = -(-max(p - 1, 1) // parts) * parts
        prompt, prompt_positions, ok = (widened(x, full, left=True) for x in (prompt, prompt_positions, ok))
        inputs, at = (widened(x, -(-inputs.shape[1] // parts) * parts) for x in (inputs, at))
    tokens, positions = joined(prompt, inputs, parts), joined(prompt_positions, at, parts)
    if spread:  # what rows are made of lies where they do, whatever the partitioner would think of the parameters
        tokens, positions = constrain((tokens, positions), mesh, ROWS, POSITIONS)
        ok = constrain(ok, mesh, ROWS)
    attend = shared_prompt_attend(model.config, k, inputs.shape[1], ok, mesh)
    x = embedded(model, params, tokens, mesh if spread else None)
    x, _ = model.run_blocks(params, constrain(x, mesh, ROWS, POSITIONS) if spread else x, positions, attend)
    of_prompt, x = parted(x, ok.shape[1], k, parts)
    if parts == 1:
        x = jnp.concatenate([jnp.repeat(of_prompt[:, -1:], k, 0), x], 1)
    return model.final(params, constrain(x, mesh, ROWS, POSITIONS) if spread else x)


def widened(x: Array, width: int, *, left: bool = False) -> Array:
    """[B, n, ...] as [B, width, ...], with zeros on one side."""
    grow = width - x.shape[1]
    return jnp.pad(x, ((0, 0), (grow, 0) if left else (0, grow), *[(0, 0)] * (x.ndim - 2)))


def token_stats(
    model: Model,
    params: Params,
    batch: Rollouts,
    *,
    wants: frozenset[str] = frozenset({"logp", "entropy"}),
    derived: Mapping[str, Statistic] = MappingProxyType({}),
    temperature: float = 1.0,
    second_temperature: float | None = None,
    mesh: Mesh | None = None,
    bins: int = 0,
    others: Mapping[str, Other] = NONE,
    critic: Model | None = None,
) -> TokenStats:
    """`TokenStats` of the completion tokens; logp and entropy [B, T] of ``softmax(logits / temperature)``, in float32.

    Args:
      wants: what to compute besides logp: of ``AVAILABLE`` and the names in ``derived``; "hidden" [B, T, D], the states
        that logits are made of; "value" [B, T], of the text before each token, "score" [B] and "embed" [B, n], of the
        text up to and with the last token, and "gate" [B, k], of the prompt, if the parameters have that head.
      derived: name -> function of (logits [n, V], tokens [n]), or a `jaxpo.batch.Compared`, for which the batch holds
        the other model's hidden states (`hidden_field`); those in ``wants`` are computed for a few tokens at a time,
        and again in the backward pass.
      second_temperature: of "logp_at_temperature".
      mesh: a head that is spread over its axis "tensor" is used where it lies: each device reduces its part of the
        vocabulary, and a few floats a token are exchanged; positions are spread over its axis "context". None = the
        partitioner decides.
      bins: into which the rows of a device are packed, by the plan in ``batch.per_row`` (`jaxpo.policy.packing`); 0 =
        they are not.
      others: heads of the models that the policy is compared with (`head_of`).
      critic: a model of its own that gives the values; its parameters, with a value head, are ``params["critic"]``.

    Raises:
      ValueError: ``wants`` holds a statistic that this policy does not give, or one that compares with a model that is
        not there; or "logp_at_temperature" and ``second_temperature`` are not given together.
    """
    known = (*AVAILABLE, HIDDEN, *derived, *heads.NAMES)
    for name in wants:
        if name not in known:
            raise ValueError(unknown("policy statistic", name, known))
    asked = {name: f for name, f in derived.items() if name in wants}
    theirs = {name: states_of(name, batch, others) for name in sorted(compared(asked, wants))}
    apart = {}
    if critic is not None and "value" in wants:
        apart = {"value": values_of(critic, params[CRITIC], batch, bins, mesh)}
    on_policy = wants.difference(apart)
    if bins:
        hidden, tokens, as_rows, by_state, ends = packed_hidden(model, params, batch, bins, mesh)
        own = head_stats(params, on_policy, hidden, ends)
        own |= {"value": as_rows(own["value"])} if "value" in own else {}
    else:
        hidden = completion_hidden(model, params, batch, mesh, read_last=not wants.isdisjoint(heads.AFTER_ALL))
        states = hidden  # [B, T, D], or [B, T + 1, D]: position t holds the text before token t

        def ends(which: int) -> Array:
            return states[jnp.arange(batch.rows), 1 + heads.last(batch.mask)] if which else states[:, 0]

        own = head_stats(params, on_policy, states[:, : batch.width], ends)
        parts = 1 if mesh is None else mesh.shape[POSITIONS]
        hidden = hidden[:, : -(-batch.width // parts) * parts]
        width = hidden.shape[1]

        def by_state(x: Array) -> Array:
            return by_token(widened(x, width), mesh)

        tokens, hidden = by_state(batch.completions), by_token(hidden, mesh)

        def as_rows(x: Array) -> Array:
            return by_row(x, batch.rows, mesh)[:, : batch.width]

    out = token_logprob(
        hidden,
        model.unembed(params).T,
        tokens,
        temperature=temperature,
        softcap=model.config.final_softcap,
        want=[name for name in AVAILABLE if name == "logp" or name in wants and name not in derived],
        second_temperature=second_temperature,
        mesh=mesh,
    )
    theirs = {name: (others[name], by_state(x)) for name, x in theirs.items()}
    more = derived_stats(model, params, hidden, tokens, asked, temperature=temperature, theirs=theirs) if asked else {}
    more |= {HIDDEN: hidden} if HIDDEN in wants else {}
    given = {name: x for name, x in out._asdict().items() if x is not None} | more
    given = {name: as_rows(x) for name, x in given.items()}
    return TokenStats(logp=given.pop("logp"), entropy=given.pop("entropy", None), derived=given, **own, **apart)


def values_of(critic: Model, params: Params, batch: Rollouts, bins: int, mesh: Mesh | None) -> Array:
    """[B, T] values of the text before each token by a critic of its own."""
    if bins:
        hidden, _, as_rows, _, _ = packed_hidden(critic, params, batch, bins, mesh)
        return as_rows(heads.apply(params, "value", hidden))
    return heads.apply(params, "value", completion_hidden(critic, params, batch, mesh)[:, : batch.width])


def head_stats(params: Params, wants: frozenset[str], before: Array, ends: Callable[[int], Array]) -> dict[str, Array]:
    """What heads of their own say of the hidden states ``before`` each token [..., D], and of those [B, D] after the
    prompt, ``ends(0)``, and after the last token, ``ends(1)``."""
    own = {"value": heads.apply(params, "value", before)} if "value" in wants else {}
    own |= {"gate": heads.apply(params, "gate", ends(0))} if "gate" in wants else {}
    return own | {name: heads.apply(params, name, ends(1)) for name in heads.AFTER_ALL if name in wants}


def states_of(name: str, batch: Rollouts, others: Mapping[str, Other]) -> Array:
    """[B, T, D'] final hidden states of the model ``name``, as the batch holds them.

    Raises:
      ValueError: they are not there, or the model's head is not."""
    field = hidden_field(name)
    if field not in batch.per_token or name not in others:
        lacking = f"the batch has no {field!r}" if name in others else "its head is not given"
        raise ValueError(
            f"a statistic compares the policy with the model {name!r}, but {lacking}: pass "
            f"others={{{name!r}: head_of(...)}} and per_token=dict({field}=...) [B, T, D]; in a run "
            f"config.references.{name} gives both"
        )
    return batch.per_token[field]


def derived_stats(
    model: Model,
    params: Params,
    hidden: Array,
    tokens: Array,
    derived: Mapping[str, Statistic],
    *,
    temperature: float = 1.0,
    logits_at_once: int = 2**22,
    theirs: Mapping[str, tuple[Other, Array]] = MappingProxyType({}),
) -> dict[str, Array]:
    """Statistics of logits [N] by name, from hidden states [N, D], for so many tokens at a time that
    ``logits_at_once`` numbers are held.

    Args:
      theirs: the head of each model that the policy is compared with, and its hidden states [N, D']; constant.
    """
    n = hidden.shape[0]
    numbers = sum(m.config.vocab_size for m in (model, *(other.model for other, _ in theirs.values())))
    size = min(n, max(1, logits_at_once // numbers))
    blocks = -(-n // size)
    grow = blocks * size - n

    def cut(x: Array) -> Array:
        return jnp.pad(x, ((0, grow), *[(0, 0)] * (x.ndim - 1))).reshape(blocks, size, *x.shape[1:])

    parts = cut(hidden), cut(tokens), {name: cut(states) for name, (_, states) in theirs.items()}

    @jax.checkpoint
    def block(part: tuple[Array, Array, dict[str, Array]]) -> dict[str, Array]:
        def logits(model: Model, params: Params, states: Array) -> Array:
            return model.logits(params, states) / temperature

        own, others = logits(model, params, part[0]), {n: logits(*theirs[n][0], x) for n, x in part[2].items()}
        return {name: from_logits(f, own, part[1], others) for name, f in derived.items()}

    return {name: x.reshape(-1)[:n] for name, x in jax.lax.map(block, parts).items()}


def policy_of(model: Model, **options: object) -> partial:
    """``(params, batch) -> TokenStats``: what the training step calls."""
    return partial(token_stats, model, **options)
