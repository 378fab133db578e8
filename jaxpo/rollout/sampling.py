"""Draw tokens from logits: temperature, top-k, top-p, min-p, greedy; one uniform number per row."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxpo.arguments import Positive, PositiveShare, Share, Whole, check_record, is_array
from jaxpo.primitives.numerics import promote
from jaxpo.primitives.token_advantages import entropy_position


@struct.dataclass
class EntropyTemperature:
    """A temperature for each token that follows from the entropy of the next token (HAPO, arXiv:2509.16591).

    ``T = base (1 + slope clip(h, -1, 1))``; ``h`` compares the entropy of ``softmax(logits / base)`` with the entropies
    of an earlier batch. Call it with logits [B, V]; it returns T [B].

    Attributes:
      numbers: q, s, high, low of `jaxpo.primitives.token_advantages.entropy_signal`; all 0 (no batch yet) gives T =
        base.
      official: (static) use the sign of the released code, in which h is never negative.
    """

    base: float | Array
    slope: float | Array
    numbers: dict[str, Array]
    official: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, logits: Array) -> Array:
        z = jax.nn.log_softmax(logits / self.base)
        entropy = -jnp.sum(jnp.where(z > -jnp.inf, jnp.exp(z) * z, 0), -1)
        scales = {name: jnp.maximum(self.numbers[name], 1e-8) for name in ("high", "low")}
        h = entropy_position(entropy, {**self.numbers, **scales}, official=self.official)
        return self.base * (1 + self.slope * jnp.clip(h, -1, 1))


@struct.dataclass
class SamplingOptions:
    """How completions are sampled. Static fields decide what is compiled; the others may change from step to step.

    Attributes:
      max_new_tokens: (static) T.
      eos_ids: (static) ids that end a completion; () = only the length ends it.
      greedy: (static) take the most probable token; excludes every other setting below.
      temperature: divides the logits. Truncations apply to the tempered distribution, in this order:
      top_k: (static) keep the k most probable; ties go to the lowest ids.
      top_p: keep the smallest set of most probable tokens that holds this much probability.
      min_p: keep tokens at least this likely relative to the most probable one.
      adaptive: the temperature of each token, from its logits, in place of ``temperature`` (which must be 1).
      stop_table: [S, V] transitions of the automaton of the stop strings (`jaxpo.rollout.stopping`); its last state
        ends the completion.
    """

    max_new_tokens: Whole = struct.field(pytree_node=False)
    eos_ids: tuple[int, ...] = struct.field(pytree_node=False, default=())
    greedy: bool = struct.field(pytree_node=False, default=False)
    top_k: Whole | None = struct.field(pytree_node=False, default=None)
    temperature: Positive | Array = 1.0
    top_p: PositiveShare | Array | None = None
    min_p: Share | Array | None = None
    adaptive: EntropyTemperature | None = None
    stop_table: Array | None = None

    @property
    def plain(self) -> bool:
        """Whether tokens are sampled from the unchanged policy, as far as static and concrete values tell."""
        unit = isinstance(self.temperature, int | float) and self.temperature == 1
        cut = self.top_k is not None or self.top_p is not None or self.min_p is not None
        return unit and not self.greedy and not cut and self.adaptive is None


def validate(options: SamplingOptions) -> SamplingOptions:
    """Check the ranges of concrete values, and that they do not contradict each other. Returns the options.

    Raises:
      ValueError: names the field; also for a setting that greedy decoding would ignore.
    """

    check_record(options, "sampling.")
    unit = not is_array(options.temperature) and options.temperature == 1
    if options.adaptive is not None and (options.greedy or not unit):
        raise ValueError(
            "sampling.adaptive sets the temperature of each token: it excludes greedy and temperature != 1"
        )
    if options.greedy and not (unit and options.top_k is None and options.top_p is None and options.min_p is None):
        raise ValueError(
            "sampling.greedy takes the most probable token: temperature, top_k, top_p and min_p have no effect with it"
        )
    return options


def truncate(z: Array, options: SamplingOptions) -> Array:
    """Logits [B, V] with -inf at the tokens that top-k, top-p and min-p remove."""
    if options.top_k is not None or options.top_p is not None:
        k = z.shape[-1] if options.top_k is None else min(options.top_k, z.shape[-1])
        values, ids = jax.lax.top_k(z, k)  # sorted; equal logits by lowest id
        keep = jnp.ones(values.shape, bool)
        if options.top_p is not None:
            p = jax.nn.softmax(values, -1)
            before = jnp.cumsum(p, -1) - p  # keep a token while the tokens before it hold less than top_p
            # At top_p = 1 keep all tokens: a rounded sum reaches 1 before the tail.
            keep = (before < options.top_p) | (jnp.asarray(options.top_p) >= 1)
        kept = jnp.zeros(z.shape, bool).at[jnp.arange(z.shape[0])[:, None], ids].set(keep)
        z = jnp.where(kept, z, -jnp.inf)
    if options.min_p is not None:
        z = jnp.where(z >= z.max(-1, keepdims=True) + jnp.log(promote(options.min_p)), z, -jnp.inf)
    return z


def inverse_cdf(weight: Array, total: Array, u: Array, *, block: int = 256) -> Array:
    """Index [B] drawn with probability ``weight / total`` from uniforms ``u`` [B] in [0, 1).

    Two levels of cumulative sums (over blocks, then inside one block) keep the additions short, so that float32 is
    exact to about 1e-7 of the total. They cost one pass over ``weight`` [B, V]. An index of weight 0 is never returned
    (unless all are 0).
    """
    b, v = weight.shape
    n = -(-v // block)
    blocks = jnp.pad(weight, ((0, 0), (0, n * block - v))).reshape(b, n, block)
    sums = blocks.sum(-1)
    cumulative = jnp.cumsum(sums, -1)
    # Scale by the last entry of this same cumulative sum: another sum may be rounded differently, and lie beyond it.
    target = u * jnp.minimum(total, cumulative[:, -1])

    def first_above(cumulative: Array, weight: Array, target: Array) -> Array:
        above = (cumulative > target[:, None]) & (weight > 0)
        last = weight.shape[-1] - 1 - jnp.argmax(weight[:, ::-1] > 0, -1)
        return jnp.where(above.any(-1), jnp.argmax(above, -1), last)

    i = first_above(cumulative, sums, target)
    inside = jnp.take_along_axis(blocks, i[:, None, None], 1)[:, 0]
    before = jnp.take_along_axis(cumulative - sums, i[:, None], 1)[:, 0]
    token = i * block + first_above(jnp.cumsum(inside, -1), inside, jnp.maximum(target - before, 0))
    return jnp.minimum(token, v - 1)  # NaN logits still give a valid token, and its log-prob shows the NaN


def log_prob(z: Array, token: Array) -> Array:
    """[B] log-prob of a token of each row under logits [B, V]."""
    return jnp.take_along_axis(z, token[:, None], 1)[:, 0] - jax.nn.logsumexp(z, axis=-1)


def sample(
    logits: Array, u: Array, options: SamplingOptions, *, policy_temperature: float = 1.0
) -> tuple[Array, Array, Array]:
    """Draw one token per row.

    Args:
      logits: [B, V] float32.
      u: [B] uniforms in [0, 1); unused when greedy.
      policy_temperature: the temperature at which the trainer scores.

    Returns:
      token [B], its log-prob under the sampling distribution (0 when greedy), and its log-prob under the plain policy.
    """
    if options.greedy:
        token = jnp.argmax(logits, -1)
        return token, jnp.zeros(token.shape, logits.dtype), log_prob(logits / policy_temperature, token)
    temperature = options.temperature if options.adaptive is None else options.adaptive(logits)[:, None]
    z = truncate(logits / temperature, options)
    top = z.max(-1, keepdims=True)
    weight = jnp.exp(z - top)
    total = weight.sum(-1)
    token = inverse_cdf(weight, total, u)
    logp = jnp.take_along_axis(z - top, token[:, None], 1)[:, 0] - jnp.log(total)
    if options.plain and policy_temperature == 1:
        return token, logp, logp
    return token, logp, log_prob(logits / policy_temperature, token)
