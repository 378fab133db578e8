"""`policy_surrogate`: the public function, which chooses an implementation by name."""

import importlib
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxpo.kernels.chips import on_one_device, target_platform
from jaxpo.kernels.policy_surrogate import reference
from jaxpo.kernels.policy_surrogate.core import FORMS, KL, Settings, Sums, Tokens

Impl = Literal["auto", "xla", "pallas_tpu", "pallas_gpu", "reference"]
MODULES = {name: f"jaxpo.kernels.policy_surrogate.{name}" for name in ("xla", "pallas_tpu", "pallas_gpu")}


def policy_surrogate(
    logp: Array,
    logp_old: Array,
    adv: Array,
    weight: Array,
    count: Array,
    *,
    low: float | Array,
    high: float | Array,
    form: str = "clipped",
    dual: float | None = None,
    log_ratio_clip: float = 20.0,
    kl: str | None = None,
    logp_ref: Array | None = None,
    kl_weight: Array | None = None,
    impl: Impl = "auto",
    interpret: bool = False,
) -> Sums:
    """Compute ``policy = sum weight L(r, A)``, ``kl = sum kl_weight k(logp - logp_ref)`` and the sums for the metrics,
    with ``r = exp(clip(logp - logp_old, -log_ratio_clip, log_ratio_clip))``.

    The same pass computes the derivatives of both in logp. It reads and writes each array once, as one XLA fusion does,
    and promises no more. Differentiable in logp for any cotangents of policy and kl; everything else is constant.

    Args:
      logp, logp_old: [B, T].
      adv: [B, T] or [B].
      weight: [B, T] weights of the loss, 0 where masked.
      count: [B, T] weights of the metrics. Where all weights are 0 the other arrays may hold anything.
      low, high: ratio bounds, scalars or [B, T].
      form: "clipped" ``-min(r A, clip(r, low, high) A)``, or "detached" ``-sg(clip(r, low, high) A) logp``.
      dual: c > 1; where A < 0 the "clipped" objective does not fall below ``c A``. None = off.
      kl: estimator "k1", "k2" or "k3", which needs logp_ref [B, T] and kl_weight [B, T]; None = no KL.
      impl: "xla", "pallas_tpu", "pallas_gpu", "reference" (naive), or "auto" (`best`).
      interpret: run Pallas kernels interpreted.

    Returns:
      `Sums`, [] each, float32 at least.

    Raises:
      ValueError: shapes do not fit, a name is unknown, or an option is out of range or has no effect.
    """
    for name, value, known in (
        ("form", form, FORMS),
        ("kl", kl, (None, *KL)),
        ("impl", impl, ("auto", "reference", *MODULES)),
    ):
        if value not in known:
            raise ValueError(f"policy_surrogate: unknown {name} {value!r}; known: {', '.join(map(str, known))}")
    if dual is not None and (form != "clipped" or not dual > 1):
        raise ValueError(f"policy_surrogate: dual={dual} must be above 1 and belongs to form='clipped'")
    if not log_ratio_clip > 0:
        raise ValueError(f"policy_surrogate: log_ratio_clip must be positive, not {log_ratio_clip}")
    if len({kl is None, logp_ref is None, kl_weight is None}) != 1:
        raise ValueError("policy_surrogate: kl, logp_ref and kl_weight must be given together")
    name = best(logp.dtype) if impl == "auto" else impl
    if interpret and not name.startswith("pallas"):
        raise ValueError(f"policy_surrogate: interpret has no effect with impl={name!r}")
    tokens = tokens_of(logp, logp_old, adv, weight, count, low, high, logp_ref, kl_weight)
    if name.startswith("pallas") and tokens.logp.dtype != jnp.float32:
        raise ValueError(f"policy_surrogate: impl={name!r} takes no {tokens.logp.dtype}; take impl='xla'")
    settings = Settings(form, dual, log_ratio_clip, kl, interpret)
    if name == "reference":
        return reference.policy_surrogate(settings, tokens)
    return evaluate(name, settings, tokens.logp, tokens._replace(logp=None))


BY_PLATFORM = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def best(dtype: Any) -> str:
    """The implementation that "auto" takes: the Pallas form on an accelerator. But "xla" for float64, and for arrays
    that the compiler spreads over several devices: it cannot spread a kernel outside a ``shard_map``."""
    return BY_PLATFORM.get(target_platform(), "xla") if on_one_device() and dtype != jnp.float64 else "xla"


def tokens_of(logp: Array, logp_old: Array, adv: Array, *others: Any) -> Tokens:
    """The arrays, in float32 at least and with two axes. All except logp are constant."""
    if logp.ndim != 2:
        raise ValueError(f"policy_surrogate takes logp [B, T], not {logp.shape}")
    adv = adv[:, None] if adv.ndim == 1 else adv
    tokens = Tokens(logp, *jax.lax.stop_gradient((logp_old, adv, *others)))
    dtype = jnp.promote_types(logp.dtype, jnp.float32)

    def fitted(name: str, x: Any) -> Array:
        x = jnp.asarray(x).astype(dtype)
        x = x[None, None] if x.ndim == 0 else x
        fits = x.shape == logp.shape
        if name in ("adv", "low", "high"):
            fits = x.ndim == 2 and all(a in (1, b) for a, b in zip(x.shape, logp.shape, strict=True))
        if not fits:
            raise ValueError(f"policy_surrogate: {name} {x.shape} does not fit logp {logp.shape}")
        return x

    return Tokens(**{name: None if x is None else fitted(name, x) for name, x in tokens._asdict().items()})


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def evaluate(name: str, settings: Settings, logp: Array, rest: Tokens) -> Sums:
    """The sums from the implementation ``name``, which also computes the derivative."""
    return forward(name, settings, logp, rest)[0]


def forward(name: str, settings: Settings, logp: Array, rest: Tokens) -> tuple[Sums, Any]:
    """The sums, and the derivatives."""
    done = importlib.import_module(MODULES[name]).one_pass(settings, rest._replace(logp=logp))
    return done.sums, (done.dpolicy, done.dkl, rest)


def backward(name: str, settings: Settings, residuals: Any, g: Sums) -> tuple[Array, Tokens]:
    """The cotangent of logp. The sums over ``count`` are metrics, and have no gradient."""
    dpolicy, dkl, rest = residuals
    slope = g.policy * dpolicy
    return slope if dkl is None else slope + g.kl * dkl, jax.tree.map(jnp.zeros_like, rest)


evaluate.defvjp(forward, backward)
