"""Metrics that every objective reports."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.fields import role_id
from jaxpo.metrics import Max, Mean, Moments, Sum
from jaxpo.primitives import ratios, regularizers
from jaxpo.primitives.numerics import promote

WRITTEN_BY_OTHERS = ("expert", "rehearsal", "ptx")


def sampled(batch: Rollouts) -> Array:
    """[B] 1 for the rows that the policy, or an earlier one of this run, sampled: their ratio to ``logp_old`` means
    something. The rows of a unit all count."""
    if batch.layout:
        return jnp.ones(batch.rows)
    return promote(~jnp.isin(batch.role, jnp.asarray([role_id(name) for name in WRITTEN_BY_OTHERS])))


def sampled_tokens(batch: Rollouts) -> Array:
    """[B, T] 1 for the tokens that the policy sampled in its rows (`sampled`), apart from mask and count."""
    rows = sampled(batch)[:, None]
    return rows * (1 - promote(batch.per_token["off_mask"] > 0)) if "off_mask" in batch.per_token else rows


def per_token(x: Array) -> Array:
    """[B] -> [B, 1], so that it broadcasts over tokens; [B, T] as it is."""
    return x[:, None] if x.ndim == 1 else x


def standard_metrics(stats: TokenStats, batch: Rollouts) -> dict[str, Any]:
    """The metrics that every objective reports under the same names, of sanitized inputs.

    Ratios and KLs are of the rows that the policy sampled (`sampled`); the mismatch with the sampler is of the own rows
    of this iteration alone. Of units of compared answers there is no ``kl``: the estimate is one for samples of the
    policy alone, and on given answers explodes; how far these have moved is ``drift``."""
    count = promote(batch.count)
    tokens = promote(batch.mask) * count[:, None]
    own = tokens * sampled_tokens(batch)
    log_ratio = ratios.token_log_ratio(stats.logp, batch.logp_old, batch.mask)
    out: dict[str, Any] = {
        "ratio/mean": Mean.of(jnp.exp(log_ratio), own),
        "ratio/max": Max.of(jnp.exp(log_ratio), own),
        "length/mean": Mean.of(batch.lengths, count),
        "tokens": Sum(tokens.sum()),
    }
    if stats.entropy is not None:
        out["entropy"] = Mean.of(stats.entropy, tokens)
    if not batch.layout:
        past = {"old": batch.logp_old, "ref": batch.per_token.get("logp_ref")}
        kl = {k: regularizers.kl_estimate(stats.logp, x, "k3") for k, x in past.items() if x is not None}
        out |= {f"kl/{k}_k3": Mean.of(x, own) for k, x in kl.items()}
    if batch.reward is not None:
        out["reward"] = Moments.of(batch.reward, count)
    if batch.adv is not None:
        out["adv"] = Moments.of(jnp.broadcast_to(per_token(batch.adv), tokens.shape), tokens)
    if batch.truncated is not None:
        out["length/truncated_frac"] = Mean.of(batch.truncated, count)
    sampler = batch.per_token.get("logp_sampler", batch.logp_beh)
    if sampler is not None:  # ``logp_old`` is the trainer's word on the same tokens under the same parameters
        fresh = tokens * sampled_tokens(batch) * (batch.role == role_id("own"))[:, None]
        gap = jnp.abs(batch.logp_old - jnp.where(batch.mask > 0, promote(sampler), 0))
        out["mismatch/logp_abs_max"] = Max.of(gap, fresh)
    if "degenerate" in batch.per_row:
        out["group/degenerate_frac"] = Mean.of(batch.per_row["degenerate"], count)
    return out
