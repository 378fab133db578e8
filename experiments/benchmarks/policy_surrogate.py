"""The one-pass surrogate beside the composed primitives, which the compiler fuses: milliseconds and bytes a token.

``python -m experiments.benchmarks.policy_surrogate [--rows=512] [--width=1024] [--repeats=20] [--json=F]``

Both give the clipped loss, a k3 penalty, their sums and metrics, and the gradient in the log-probs. It is a matter of
memory traffic: each of six arrays is read once and the gradient written, about 28 bytes a token, and parity is what the
kernel is for. The least of the repeats counts; the two take turns.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console
from rich.table import Table

from jaxpo.config.command_line import parse
from jaxpo.kernels import policy_surrogate
from jaxpo.primitives import ratios, regularizers, surrogates

LOW, HIGH, BETA = 0.8, 1.28, 0.04
BAR = 1.1  # of the time of the composed primitives


def arrays(rows: int, width: int) -> dict[str, Array]:
    """[B, T] each, [B] the advantage; a mask of ragged rows."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape = rows, width
    logp = -jax.random.exponential(keys[0], shape)
    mask = (jnp.arange(width) < jax.random.randint(keys[1], (rows, 1), 1, width + 1)).astype(jnp.float32)
    return dict(
        logp=logp,
        logp_old=logp + 0.1 * jax.random.normal(keys[2], shape),
        logp_ref=logp + 0.1 * jax.random.normal(keys[3], shape),
        adv=jax.random.normal(keys[4], (rows,)),
        weight=mask / mask.sum(),
        count=mask,
    )


def kernel(logp: Array, x: dict[str, Array]) -> tuple[Array, Any]:
    """By `policy_surrogate`."""
    options = dict(low=LOW, high=HIGH, kl="k3", logp_ref=x["logp_ref"], kl_weight=x["weight"])
    out = policy_surrogate(logp, x["logp_old"], x["adv"], x["weight"], x["count"], **options)
    return out.policy + BETA * out.kl, out


def composed(logp: Array, x: dict[str, Array]) -> tuple[Array, Any]:
    """By the primitives, as the objectives compose them on CPUs."""
    count, adv = x["count"], x["adv"][:, None]
    logp, *others = (jnp.where(count > 0, y, 0) for y in (logp, x["logp_old"], x["logp_ref"]))
    x = {**x, "logp_old": others[0], "logp_ref": others[1]}
    r = jnp.exp(ratios.token_log_ratio(logp, x["logp_old"], count))
    policy = jnp.sum(x["weight"] * surrogates.clipped(r, adv, LOW, HIGH))
    kl = jnp.sum(x["weight"] * regularizers.kl_estimate(logp, x["logp_ref"], "k3"))
    cut = surrogates.is_clipped(r, adv, LOW, HIGH)
    old = regularizers.kl_estimate(logp, x["logp_old"], "k3")
    ref = regularizers.kl_estimate(logp, x["logp_ref"], "k3")
    return policy + BETA * kl, (policy, kl, *(jnp.sum(count * y) for y in (1, cut, r, r * adv, old, ref)))


FORMS = {"policy_surrogate": kernel, "composed primitives": composed}


def measure(rows: int, width: int, repeats: int) -> dict[str, dict[str, float]]:
    """Least milliseconds of each form, and MiB of temporaries by the compiler's account."""
    x, results, compiled = arrays(rows, width), {}, {}
    for name, f in FORMS.items():
        step = jax.jit(jax.value_and_grad(f, has_aux=True))
        compiled[name] = step.lower(x["logp"], x).compile()
        jax.block_until_ready(compiled[name](x["logp"], x))
        memory = compiled[name].memory_analysis()
        results[name] = {"ms": float("inf"), "temp_mib": memory.temp_size_in_bytes / 2**20}
    for _ in range(repeats):
        for name, step in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(step(x["logp"], x))
            results[name]["ms"] = min(results[name]["ms"], 1000 * (time.perf_counter() - start))
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and prints; see the module's docstring."""
    flags = dict(rows=(512, "B"), width=(1024, "T"), repeats=(20, "timed calls"), json=("", "file for the figures"))
    try:
        _, given = parse(sys.argv[1:] if argv is None else argv, config_required=False, **flags)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    results = measure(given["rows"], given["width"], given["repeats"])
    table = Table(title=f"surrogate with metrics and gradient, B={given['rows']}, T={given['width']}")
    for column in ("form", "ms", "temporaries MiB"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for name, r in results.items():
        table.add_row(name, f"{r['ms']:.2f}", f"{r['temp_mib']:.1f}")
    share = results["policy_surrogate"]["ms"] / results["composed primitives"]["ms"]
    console = Console()
    console.print(table)
    verdict = "parity" if share <= BAR else "SLOWER"
    console.print(f"{share:.2f} of the composed primitives' time on {jax.default_backend()}: {verdict} (bar {BAR})")
    record = {"job": {k: given[k] for k in ("rows", "width")}, "forms": results, "share": share}
    if given["json"]:
        Path(given["json"]).write_text(json.dumps(record, indent=1))
    return record


if __name__ == "__main__":
    main()
