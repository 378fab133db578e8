"""Parameters that are not finite: they are neither saved nor taken from a file."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpo.storage.manifest import is_key, named_leaves


@jax.jit
def _finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(x).all() for x in leaves]


def not_finite(tree: Any) -> list[str]:
    """Names of the leaves that hold NaN or infinity, such as ``blocks/w_in``."""
    floats = {
        name: leaf
        for name, (_, leaf) in named_leaves(tree).items()
        if hasattr(leaf, "dtype") and not is_key(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    finite = jax.device_get(_finite(list(floats.values()))) if floats else []
    return [name for name, good in zip(floats, finite, strict=True) if not good]


def check_finite(params: Any, source: str, hint: str = "") -> Any:
    """Return ``params``.

    Raises:
      ValueError: they hold NaN or infinity; names ``source`` and the first leaf.
    """
    if bad := not_finite(params):
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(f"{source}: {bad[0]}{more} hold NaN or infinite values{'; ' * bool(hint)}{hint}")
    return params
