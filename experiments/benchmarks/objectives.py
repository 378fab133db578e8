"""What an objective itself costs: ``prepare + weigh + loss + gradient`` w.r.t. log-probs, beside `grpo` in one run.

``python -m experiments.benchmarks.objectives [--names=gspo,gtpo] [--rows=512] [--width=1024] [--repeats=5] [--json=F]``

The policy is an array, so nothing of the model is in the figures. For objectives that peek, the peek is that array.
"""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.config.command_line import parse
from jaxpo.objectives import Objective, evaluate, make, names
from jaxpo.registry import entry, unknown
from jaxpo.testing import example

HEADS = {"score": (), "embed": (4,), "gate": (2,)}  # what a row's heads say, by their shapes
LIMIT = 3.0  # times grpo, above which a reason is due
REASONS = {
    "gtpo": "compares every token with those of the other rows of its group, from both ends",
    "d3s": "picks tokens by rank over the batch: 32 counting passes",
    "hapo": "a quantile over all tokens: 32 counting passes; bounds and advantages per token",
    "clip_cov": "a random number per token, and the smallest of them: 32 counting passes",
    "kl_cov": "the largest covariances over the batch: 32 counting passes",
    "lp_reg": "the least probable tokens over the batch: 32 counting passes",
    "spo_segment": "looks along rows for the cutpoints before and after every token",
    "reinforce_pp": "sums along rows, token after token",
}


def batch_of(objective: Objective, rows: int, width: int) -> Rollouts:
    """The contracts' example with so many rows (groups of 8; whole units) and tokens."""
    rng = np.random.default_rng(0)
    small = example(objective)
    unit = max(len(objective.unit.layout), 1)
    pick = (rng.integers(0, small.rows // unit, rows // unit)[:, None] * unit + np.arange(unit)).reshape(-1)
    rows = len(pick)
    columns = rng.integers(0, small.width, width)

    def grow(x: jax.Array) -> jax.Array:
        x = np.asarray(x)[pick]
        return jnp.asarray(x[:, columns] if x.shape[1:2] == (small.width,) else x)

    lengths = rng.integers(width // 4, width + 1, rows)
    completions = rng.integers(0, 7, (rows, width)).astype(np.int32)
    noise = rng.normal(0, 0.05, (rows, width)).astype(np.float32)
    batch = jax.tree.map(grow, small)
    return batch.replace(
        tokens=jnp.concatenate([batch.tokens[:, : small.prompt_width], completions], 1),
        mask=jnp.asarray(np.arange(width) < lengths[:, None], jnp.float32),
        group=jnp.arange(rows, dtype=jnp.int32) // 8,
        seed=jnp.arange(rows, dtype=jnp.uint32),
        logp_old=batch.logp_old + noise,
    )


def measure(name: str, rows: int, width: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of a call, and MiB of temporaries, by the compiler's account."""
    objective = make(name, **entry(name).of_run(width, 100))
    batch = batch_of(objective, rows, width)
    logp = batch.logp_old + 0.02
    more = {f: jnp.full((batch.rows, width), -1.0) for f in objective.asks.derived}
    entropy = batch.entropy_old
    heads = {f: jnp.ones((batch.rows, *shape)) for f, shape in HEADS.items() if f in objective.asks.wants}

    def loss(logp: jax.Array, batch: Rollouts) -> jax.Array:
        stats = TokenStats(logp=logp, entropy=entropy, derived=more, **heads)
        return evaluate(objective, lambda _: stats, batch)[0]

    compiled = jax.jit(jax.value_and_grad(loss)).lower(logp, batch).compile()
    jax.block_until_ready(compiled(logp, batch))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(logp, batch))
        seconds.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    return {"ms": 1000 * float(np.median(seconds)), "mib": memory.temp_size_in_bytes / 2**20}


def table(results: dict[str, dict[str, float]], rows: int, width: int) -> Table:
    """Every objective beside grpo, measured in the same run."""
    out = Table(title=f"prepare + loss + gradient w.r.t. logp, B={rows}, T={width}, relative to grpo")
    for column in ("objective", "ms", "x grpo", "MiB", "x grpo", "why, above 3"):
        out.add_column(column, justify="left" if column in ("objective", "why, above 3") else "right")
    base = results["grpo"]
    for name, r in sorted(results.items(), key=lambda item: item[1]["ms"]):
        ratio, memory = r["ms"] / base["ms"], r["mib"] / base["mib"]
        why = REASONS.get(name, "NO REASON STATED") if max(ratio, memory) > LIMIT else ""
        out.add_row(name, f"{r['ms']:.1f}", f"{ratio:.2f}", f"{r['mib']:.0f}", f"{memory:.2f}", why)
    return out


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures and prints; see the module's docstring."""
    import sys

    flags = dict(
        names=("", "objectives, separated by commas; all by default"),
        rows=(512, "B"),
        width=(1024, "T"),
        repeats=(5, "timed calls"),
        json=("", "file for the figures"),
    )
    try:
        _, given = parse(sys.argv[1:] if argv is None else argv, config_required=False, **flags)
        chosen = [n for n in given["names"].split(",") if n] or names()
        for name in chosen:
            if name not in names():
                raise ValueError(unknown("objective", name, names()))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    console, results = Console(), {}
    for name in sorted({"grpo", *chosen}):
        with console.status(name):
            results[name] = measure(name, given["rows"], given["width"], given["repeats"])
    console.print(table(results, given["rows"], given["width"]))
    if given["json"]:
        with open(given["json"], "w") as f:
            json.dump(results, f, indent=2)
    return results


if __name__ == "__main__":
    main()
