"""Log-probs and entropies with both gradients: seconds and memory beside the naive form, and the bars of both.

``python -m experiments.benchmarks.token_logprob [--tokens=4096] [--width=256] [--vocab=32768] [--repeats=5]
[--json=F]``

All forms do the same work in one process, in turn, repetition after repetition; the least CPU-seconds and wall seconds
of each are printed. The bar for the seconds is made in the same run: 8 N D V operations at the rate of the three
products of a block (logits, dhidden, dunembed) inside one jitted scan with the tile that the plan chooses, and the
softmax passes of all blocks over one tile that is there already. Memory is the compiler's account: temporaries, and
all of it with inputs, outputs and gradients.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.table import Table

from jaxpo.kernels import token_logprob, token_logprob_grad
from jaxpo.kernels.token_logprob import core, xla
from jaxpo.kernels.token_logprob.plan import Blocks, plan
from jaxpo.training.config import parse

SECONDS, MEMORY = 1.0, 64  # bars: times what the operations need, and MiB of temporaries
KINDS = ("argument", "output", "temp")
DTYPE = jnp.float32
Arrays = tuple[Array, Array, Array, Array]  # hidden [N, D], table [V, D], targets [N], cotangents [2, N]


def arrays(tokens: int, width: int, vocab: int) -> Arrays:
    """Logits of standard deviation 1."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (tokens, width), DTYPE)
    table = jax.random.normal(keys[1], (vocab, width), DTYPE) / np.sqrt(width)
    targets = jax.random.randint(keys[2], (tokens,), 0, vocab)
    return hidden, table, targets, jax.random.normal(keys[3], (2, tokens), DTYPE)


def gradient(f: Callable[..., Any], hidden: Array, table: Array, targets: Array, g: Array) -> Any:
    """(logp, entropy) of ``f`` and the gradients of <g, (logp, entropy)> in hidden and table."""
    out, pull = jax.vjp(lambda h, t: f(h, t, targets), hidden, table)
    return out, pull(tuple(g))


def stats(hidden: Array, table: Array, targets: Array, impl: str) -> tuple[Array, Array]:
    out = token_logprob(hidden, table.T, targets, impl=impl)
    return out.logp, out.entropy


def known(hidden: Array, table: Array, targets: Array, g: Array) -> Any:
    """One pass for a cotangent of logp that is known before it."""
    return token_logprob_grad(hidden, table.T, targets, g[0])


def frozen(hidden: Array, table: Array, targets: Array, g: Array) -> Any:
    """logp and its gradient in hidden, the table being a constant."""
    out, pull = jax.vjp(lambda h: token_logprob(h, table.T, targets, want=("logp",)).logp, hidden)
    return out, pull(g[0])


def products(blocks: Blocks, hidden: Array, table: Array, targets: Array, g: Array) -> Any:
    """The three products of every block of a vocabulary that the block divides: 6 N D V operations."""

    def step(dhidden: Array, rows: Array) -> tuple[Array, Array]:
        z = jnp.dot(hidden, rows.T)
        return dhidden + jnp.dot(z, rows), jnp.dot(z.T, hidden)

    return jax.lax.scan(step, jnp.zeros_like(hidden), table.reshape(-1, blocks.vocab, table.shape[1]))


def softmax_passes(blocks: Blocks, hidden: Array, table: Array, targets: Array, g: Array) -> Any:
    """What is done to the logits of every block between the products, forward and backward, on a tile that is there."""
    n, count = hidden.shape[0], table.shape[0] // blocks.vocab
    problem = core.Problem(hidden, table, targets, None, None, jnp.ones((), DTYPE), None, None)
    need, want = core.needed_sums(frozenset({"logp", "entropy"})), frozenset({"logp", "entropy"})
    tile = jnp.broadcast_to(table.reshape(-1)[: blocks.vocab], (n, blocks.vocab)) + g[0][:, None]
    starts = jnp.arange(count, dtype=jnp.int32) * blocks.vocab

    def forward(carry: tuple[core.Sums, Array], start: Array) -> tuple[Any, None]:
        sums, z = jax.lax.optimization_barrier(carry)
        return (xla.merge(sums, xla.block_sums(z, None, targets, start, problem, need), problem), z), None

    (sums, tile), _ = jax.lax.scan(forward, (xla.no_sums(n, DTYPE, need), tile), starts)
    _, done = core.finish(problem, sums, want)
    rows = core.coefficients(problem, done, core.TokenLogProb(logp=g[0], entropy=g[1]))

    def backward(z: Array, start: Array) -> tuple[Array, None]:
        return jax.lax.optimization_barrier(xla.block_dx(z, None, None, targets, start, rows, problem)), None

    return jax.lax.scan(backward, tile, starts)[0]


def forms(blocks: Blocks) -> dict[str, Callable[..., Any]]:
    """What is timed, by name."""
    naive = partial(stats, impl="reference")
    return {
        "token_logprob": partial(gradient, partial(stats, impl="auto")),
        "naive": partial(gradient, naive),
        "naive, checkpointed": partial(gradient, jax.checkpoint(naive)),
        "known cotangent of logp": known,
        "logp, frozen table": frozen,
        "forward alone": lambda h, t, targets, g: stats(h, t, targets, impl="auto"),
        "three products": partial(products, blocks),
        "softmax passes": partial(softmax_passes, blocks),
    }


def measure(tokens: int, width: int, vocab: int, repeats: int) -> dict[str, dict[str, float]]:
    """Least wall seconds and CPU-seconds, and MiB of temporaries, of each form.

    Raises:
      ValueError: a vocabulary that the planned block does not divide: the floor would do other work.
    """
    blocks = plan(jax.default_backend(), tokens, vocab, DTYPE)
    if vocab % blocks.vocab:
        raise ValueError(f"--vocab={vocab} is not a multiple of the block, {blocks.vocab}")
    args, results, compiled = arrays(tokens, width, vocab), {}, {}
    for name, f in forms(blocks).items():
        compiled[name] = jax.jit(f).lower(*args).compile()
        jax.block_until_ready(compiled[name](*args))
        memory = compiled[name].memory_analysis()
        results[name] = {
            "wall_s": np.inf,
            "cpu_s": np.inf,
            "temp_mib": memory.temp_size_in_bytes / 2**20,
            "all_mib": sum(getattr(memory, f"{kind}_size_in_bytes") for kind in KINDS) / 2**20,
        }
    for _ in range(repeats):
        for name, f in compiled.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(f(*args))
            spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
            results[name] |= {key: min(x, results[name][key]) for key, x in spent.items()}
    return results


def bars(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """The share of token_logprob in what its operations need, by clock, and in the naive form."""
    ours = results["token_logprob"]
    out = {}
    for clock in ("wall_s", "cpu_s"):
        needed = 8 / 6 * results["three products"][clock] + results["softmax passes"][clock]
        out[f"{clock}/needed"] = ours[clock] / needed
        for name in ("naive", "naive, checkpointed"):
            out[f"{clock}/{name}"] = ours[clock] / results[name][clock]
    return out | {"temp_mib": ours["temp_mib"]}


def table_of(results: dict[str, dict[str, float]], title: str) -> Table:
    """One line a form."""
    out = Table(title=title)
    for column in ("form", "wall s", "CPU s", "relative", "temporaries MiB", "all MiB"):
        out.add_column(column, justify="left" if column == "form" else "right")
    base = results["token_logprob"]["cpu_s"]
    for name, r in results.items():
        numbers = f"{r['wall_s']:.3f}", f"{r['cpu_s']:.3f}", f"{r['cpu_s'] / base:.2f}"
        out.add_row(name, *numbers, f"{r['temp_mib']:.0f}", f"{r['all_mib']:.0f}")
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and prints; see the module's docstring."""
    flags = dict(
        tokens=(4096, "N"),
        width=(256, "D"),
        vocab=(32768, "V"),
        repeats=(5, "timed calls"),
        json=("", "file for the figures"),
    )
    try:
        _, given = parse(sys.argv[1:] if argv is None else argv, config_required=False, **flags)
        sizes = {name: given[name] for name in ("tokens", "width", "vocab")}
        results = measure(**sizes, repeats=given["repeats"])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    record = {"job": sizes, "platform": jax.default_backend(), "forms": results, "bars": bars(results)}
    console, found = Console(), record["bars"]
    console.print(table_of(results, f"forward + backward, N={sizes['tokens']}, D={sizes['width']}, V={sizes['vocab']}"))
    for clock in ("wall_s", "cpu_s"):
        share = found[f"{clock}/needed"]
        verdict = "reached" if share <= SECONDS else "MISSED"
        console.print(
            f"{clock}: {share:.2f} of 8 N D V at the products' rate + softmax passes; bar {SECONDS}: {verdict}"
        )
    verdict = "reached" if found["temp_mib"] <= MEMORY else "MISSED"
    console.print(f"temporaries: {found['temp_mib']:.0f} MiB; bar {MEMORY}: {verdict}")
    if given["json"]:
        Path(given["json"]).write_text(json.dumps(record, indent=1))
    return record


if __name__ == "__main__":
    main()
