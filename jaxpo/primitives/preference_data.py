"""Rules that turn scores of answers into pairs and weights: functions of arrays, without gradient."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxpo.primitives.numerics import promote, ratio_or_zero


def rejection_sample(
    cand_reward: Array, uniforms: Array, *, beta: float, n: int, text: Array | None = None
) -> tuple[Array, Array]:
    """RSO's sampler (arXiv:2309.06657): up to n candidates, without replacement, from the policy tilted by
    ``exp(r/beta)``.

    It sweeps over the remaining candidates, in order, until n are accepted. A candidate is accepted iff
    ``u < exp((r - r_max)/beta)``; ``r_max`` is the largest reward among those that remained when the sweep began. Each
    sweep accepts at least the candidate with that reward.

    Args:
      cand_reward: [C] rewards of the candidates.
      uniforms: [n C] draws from [0, 1), used one after the other.
      text: [C] ids of the candidates' texts. Equal texts are one candidate, at the first place with the last reward.

    Returns:
      index [n] of the accepted candidates in the order of acceptance, -1 beyond their number; and that number, which is
      at most the number of distinct candidates.

    Raises:
      ValueError: the shape of ``uniforms`` is not [n C]."""
    c = cand_reward.shape[0]
    if uniforms.shape != (n * c,):
        raise ValueError(f"uniforms must have shape ({n * c},) = n x candidates, not {uniforms.shape}")
    place = jnp.arange(c)
    same = jnp.eye(c, dtype=bool) if text is None else text[:, None] == text[None, :]
    first = jnp.argmax(same, 1) == place
    reward = promote(cand_reward)[c - 1 - jnp.argmax(same[:, ::-1], 1)]
    most = jnp.minimum(n, first.sum())

    def visit(carry: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], None]:
        left, sweep, highest, chosen, accepted, used = carry
        begins = i == 0
        sweep = jnp.where(begins, left, sweep)
        highest = jnp.where(begins, jnp.max(jnp.where(left, reward, -jnp.inf)), highest)
        seen = sweep[i] & (accepted < most)
        take = seen & (uniforms[used] < jnp.exp((reward[i] - highest) / beta))
        chosen = jnp.where(take, chosen.at[accepted].set(i), chosen)
        return (left.at[i].set(left[i] & ~take), sweep, highest, chosen, accepted + take, used + seen), None

    start = (first, first, jnp.zeros((), reward.dtype), jnp.full(n, -1), jnp.int32(0), jnp.int32(0))
    *_, chosen, accepted, _ = lax.scan(visit, start, jnp.tile(place, n))[0]
    return chosen, accepted


def ranker_reward(rho: Array, *, clip: float = 1e-6) -> Array:
    """``logit(rho)`` of the probability that an answer beats a random one, clipped to [clip, 1 - clip] (RSO)."""
    rho = jnp.clip(promote(rho), clip, 1 - clip)
    return jnp.log(rho) - jnp.log1p(-rho)


def win_matrix(score: Array) -> Array:
    """[..., K, K] ``P_ij = sig(s_i - s_j)`` of scores [..., K], diagonal 1/2; its row means are SPPO's win rates."""
    return jax.nn.sigmoid(score[..., :, None] - score[..., None, :])


def best_and_worst(score: Array, *, margin: float = 0.0) -> tuple[Array, Array, Array]:
    """(best, worst, kept) of scores [N, K], [N] each: two indices, ties to the lowest, and whether the scores differ by
    more than ``margin`` (a single sample or equal scores give no pair)."""
    best, worst = jnp.argmax(score, -1), jnp.argmin(score, -1)
    return best, worst, score.max(-1) - score.min(-1) > margin


def graded_pairs(
    judge_score: Array,
    is_teacher: Array,
    repeats: Array | None = None,
    *,
    positive: float = 5.0,
    teacher_gap: float = 2.0,
    own_gap: float = 1.0,
) -> Array:
    """[K, K] bool of DNO-Prct (arXiv:2404.03715): i may be the chosen and j the rejected answer.

    The chosen answer scores at least ``positive``. The rejected one scores less, by at least ``teacher_gap`` if the
    chosen answer is the teacher's, and by at least ``own_gap`` if it is the policy's own. The defaults are points on a
    scale of 6. An answer that ``repeats`` itself [K] is never chosen, and may always be rejected."""
    repeats = jnp.zeros(judge_score.shape, bool) if repeats is None else repeats
    gap = judge_score[:, None] - judge_score[None, :]
    worse = gap >= jnp.where(is_teacher, teacher_gap, own_gap)[:, None]
    return ((judge_score >= positive) & ~repeats)[:, None] & (worse | repeats[None, :])


SEVERITY = (1.0, 2.5, 2.0, 1.5, 1.0)  # weights of no error, and of errors of severity 1 (worst) to 4


def severity_weight(severity: Array) -> Array:
    """Weights of tokens from an expert's grades 0 to 4: 1, 2.5, 2.0, 1.5, 1.0 (OPA-DPO, arXiv:2501.09695)."""
    return jnp.asarray(SEVERITY)[severity]


def relevance_weight(recognition_error: Array) -> Array:
    """Weights of tokens: 3.0 in a recognition error, 1.0 elsewhere (OPA-DPO)."""
    return jnp.where(recognition_error > 0, 3.0, 1.0)


def easy_pairs(rm_w: Array, rm_l: Array, *, gap: Array | float) -> Array:
    """[N] bool: the scores of the two answers differ by more than ``gap``, whichever is higher (MPO,
    arXiv:2403.19443)."""
    return jnp.abs(promote(rm_w) - promote(rm_l)) > gap


def true_utility(choice: Array, satisfies: Array, cost: Array) -> Array:
    """[B] utility of a user's decision (RLHS, arXiv:2501.08617): 0 for no choice, -1 for an option that violates the
    requirement, otherwise the lowest cost among satisfying options divided by the cost paid.

    Args:
      choice: [B] index of an option; -1 = none.
      satisfies: [B, O] 1 if an option meets the requirement.
      cost: [B, O], positive."""
    at = jnp.maximum(choice, 0).astype(jnp.int32)[:, None]
    met = jnp.take_along_axis(satisfies > 0, at, 1)[:, 0]
    paid = jnp.take_along_axis(promote(cost), at, 1)[:, 0]
    lowest = jnp.min(jnp.where(satisfies > 0, promote(cost), jnp.inf), 1)
    gained = ratio_or_zero(jnp.where(jnp.isfinite(lowest), lowest, 0), paid)
    return jnp.where(choice < 0, 0.0, jnp.where(met, gained, -1.0))


def normalized_rating(likert: Array) -> Array:
    """``(r - 3)/2`` of ratings 1 to 5 (RLHS)."""
    return (promote(likert) - 3) / 2
