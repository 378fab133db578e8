"""Log-probs and entropies with both gradients: seconds and memory beside the naive form, and the bars of both.

``python -m experiments.benchmarks.token_logprob [--tokens=4096] [--width=256] [--vocab=32768] [--repeats=5]
[--dtype=float32] [--vs=torch,trl,liger] [--python=.venv-peers/bin/python] [--json=F]``

All forms do the same work in one process, in turn, repetition after repetition; the least CPU-seconds and wall seconds
of each are printed. The bar for the seconds is made in the same run: 8 N D V operations at the rate of the three
products of a block (logits, dhidden, dunembed) inside one jitted scan with the tile that the plan chooses, and the
softmax passes of all blocks over one tile that is there already. Memory is the compiler's account: temporaries, and
all of it with inputs, outputs and gradients.

``--vs=`` adds other systems, each in a process of its own with the interpreter ``--python`` (`make bench` installs
them): torch's full logits, TRL's chunked log-probs, and Liger's chunked GRPO loss, which does less (its loss, no
entropy, the gradients in the same pass). Their memory is what the first call had resident beyond inputs and gradients;
on a GPU, what torch had allocated.

On an H100: ``--tokens=16384 --width=4096 --vocab=151936 --dtype=bfloat16``.
"""

import json
import os
import subprocess
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

from experiments.benchmarks.step import ROOT
from jaxpo.config.command_line import parse
from jaxpo.kernels import token_logprob, token_logprob_grad, token_logprob_loss
from jaxpo.kernels.token_logprob import core, xla
from jaxpo.kernels.token_logprob.plan import Blocks, plan, whole_vocabulary_slices
from jaxpo.registry import unknown

SECONDS, MEMORY = 1.0, 64  # bars: times what the operations need, and MiB of temporaries
KINDS = ("argument", "output", "temp")
DTYPES = ("float32", "bfloat16")
PEERS = {"torch": "torch", "trl": "trl", "liger": "liger_kernel"}
ROWS = 16  # of the tokens, where a loss goes over them row by row
Arrays = tuple[Array, Array, Array, Array]  # hidden [N, D], table [V, D], targets [N], cotangents [2, N]


def arrays(tokens: int, width: int, vocab: int, dtype: str = "float32") -> Arrays:
    """Logits of standard deviation 1."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (tokens, width)).astype(dtype)
    table = (jax.random.normal(keys[1], (vocab, width)) / np.sqrt(width)).astype(dtype)
    targets = jax.random.randint(keys[2], (tokens,), 0, vocab)
    return hidden, table, targets, jax.random.normal(keys[3], (2, tokens))


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


def sliced(count: int, hidden: Array, table: Array, targets: Array, g: Array) -> Any:
    """A loss of log-probs and entropies with its gradients, from one pass over the logits of ``count`` slices."""

    def loss(out: core.TokenLogProb, g: Array) -> tuple[Array, Any]:
        return jnp.sum(g[:, 0] * out.logp + g[:, 1] * out.entropy), (out.logp, out.entropy)

    def whole(hidden: Array, table: Array) -> tuple[Array, Any]:
        return token_logprob_loss(loss, hidden, table.T, targets, g.T.reshape(count, -1, 2))

    (_, out), grads = jax.value_and_grad(whole, (0, 1), has_aux=True)(hidden, table)
    return tuple(x.reshape(-1) for x in out), grads


def products(blocks: Blocks, hidden: Array, table: Array, targets: Array, g: Array) -> Any:
    """The three products of every block: 6 N D V operations. The block divides the tokens and the vocabulary, and is
    whole in one of them."""
    wide = dict(preferred_element_type=jnp.float32)

    def columns(dhidden: Array, rows: Array) -> tuple[Array, Array]:
        z = jnp.dot(hidden, rows.T, **wide).astype(rows.dtype)
        return dhidden + jnp.dot(z, rows, **wide), jnp.dot(z.T, hidden)

    def tokens(dtable: Array, rows: Array) -> tuple[Array, Array]:
        z = jnp.dot(rows, table.T, **wide).astype(rows.dtype)
        return dtable + jnp.dot(z.T, rows, **wide), jnp.dot(z, table)

    if blocks.tokens < hidden.shape[0]:
        over = hidden.reshape(-1, blocks.tokens, hidden.shape[1])
        return jax.lax.scan(tokens, jnp.zeros(table.shape, jnp.float32), over)
    over = table.reshape(-1, blocks.vocab, table.shape[1])
    return jax.lax.scan(columns, jnp.zeros(hidden.shape, jnp.float32), over)


def softmax_passes(blocks: Blocks, hidden: Array, table: Array, targets: Array, g: Array) -> Any:
    """What is done to the logits of every block between the products, forward and backward, on a tile that is there."""
    n, count = blocks.tokens, hidden.shape[0] // blocks.tokens * (table.shape[0] // blocks.vocab)
    hidden, targets, g = hidden[:n], targets[:n], g[:, :n]
    problem = core.Problem(hidden, table, targets, None, None, jnp.ones(()), None, None)
    need, want = core.needed_sums(frozenset({"logp", "entropy"})), frozenset({"logp", "entropy"})
    tile = jnp.broadcast_to(table.reshape(-1)[: blocks.vocab], (n, blocks.vocab)) + g[0][:, None]
    tile = tile.astype(jnp.float32)
    starts = jnp.arange(count, dtype=jnp.int32) * blocks.vocab

    def forward(carry: tuple[core.Sums, Array], start: Array) -> tuple[Any, None]:
        sums, z = jax.lax.optimization_barrier(carry)
        return (xla.merge(sums, xla.block_sums(z, None, targets, start, problem, need), problem), z), None

    (sums, tile), _ = jax.lax.scan(forward, (xla.no_sums(n, jnp.float32, need), tile), starts)
    _, done = core.finish(problem, sums, want)
    rows = core.coefficients(problem, done, core.TokenLogProb(logp=g[0], entropy=g[1]))

    def backward(z: Array, start: Array) -> tuple[Array, None]:
        return jax.lax.optimization_barrier(xla.block_dx(z, None, None, targets, start, rows, problem)), None

    return jax.lax.scan(backward, tile, starts)[0]


def forms(blocks: Blocks, slices: int) -> dict[str, Callable[..., Any]]:
    """What is timed, by name. slices: of the loss in one pass."""
    naive = partial(stats, impl="reference")
    return {
        "token_logprob": partial(gradient, partial(stats, impl="auto")),
        "loss in one pass": partial(sliced, slices),
        "naive": partial(gradient, naive),
        "naive, checkpointed": partial(gradient, jax.checkpoint(naive)),
        "known cotangent of logp": known,
        "logp, frozen table": frozen,
        "forward alone": lambda h, t, targets, g: stats(h, t, targets, impl="auto"),
        "three products": partial(products, blocks),
        "softmax passes": partial(softmax_passes, blocks),
    }


def measure(tokens: int, width: int, vocab: int, repeats: int, dtype: str = "float32") -> dict[str, dict[str, float]]:
    """Least wall seconds and CPU-seconds, and MiB of temporaries, of each form that fits the memory.

    Raises:
      ValueError: sizes that the planned block does not divide (the floor would do other work), or the rows.
    """
    platform = jax.default_backend()
    blocks = plan(platform, tokens, vocab, jnp.float32)
    for name, size, block in (("tokens", tokens, blocks.tokens), ("vocab", vocab, blocks.vocab)):
        if size % block:
            raise ValueError(f"--{name}={size} is not a multiple of the block, {block}")
    if tokens % ROWS:
        raise ValueError(f"--tokens={tokens} is not a multiple of the {ROWS} rows of a loss")
    slices = whole_vocabulary_slices("gpu" if platform == "cpu" else platform, ROWS, tokens // ROWS, vocab) or ROWS
    args, results, compiled = arrays(tokens, width, vocab, dtype), {}, {}
    for name, f in forms(blocks, slices).items():
        try:
            compiled[name] = jax.jit(f).lower(*args).compile()
            jax.block_until_ready(compiled[name](*args))
        except jax.errors.JaxRuntimeError as error:
            if name == "token_logprob" or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled.pop(name, None)
            continue
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


def measure_peer(peer: str, python: str, sizes: dict[str, int], repeats: int, dtype: str) -> dict[str, Any]:
    """The record of another system, from a process of its own; raises ValueError when it fails."""
    flags = [f"--{name}={value}" for name, value in (sizes | {"repeats": repeats, "dtype": dtype}).items()]
    command = [python, "-m", "experiments.benchmarks.peers.projection", peer, *flags]
    # Idle threads sleep: see `experiments.benchmarks.step.environment`.
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
    except OSError as error:
        raise ValueError(f"--python: cannot run {python}: {error.strerror}; `make bench` installs the peers") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise ValueError(f"--vs={peer} failed with {python}: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def bars(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """The share of token_logprob in what its operations need, by clock, and in the naive form."""
    ours = results["token_logprob"]
    out = {}
    for clock in ("wall_s", "cpu_s"):
        needed = 8 / 6 * results["three products"][clock] + results["softmax passes"][clock]
        out[f"{clock}/needed"] = ours[clock] / needed
        for name in ("naive", "naive, checkpointed", *PEERS):
            if name in results:
                out[f"{clock}/{name}"] = ours[clock] / results[name][clock]
    return out | {"temp_mib": ours["temp_mib"]}


def table_of(results: dict[str, dict[str, float]], title: str) -> Table:
    """One line a form."""
    out = Table(title=title)
    for column in ("form", "wall s", "CPU s", "relative", "temporaries MiB", "all MiB"):
        out.add_column(column, justify="left" if column == "form" else "right")
    clock = "cpu_s" if jax.default_backend() == "cpu" else "wall_s"
    base = results["token_logprob"][clock]
    for name, r in results.items():
        numbers = f"{r['wall_s']:.3f}", f"{r['cpu_s']:.3f}", f"{r[clock] / base:.2f}"
        out.add_row(name, *numbers, f"{r['temp_mib']:.0f}", f"{r['all_mib']:.0f}" if "all_mib" in r else "")
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and prints; see the module's docstring."""
    flags = dict(
        tokens=(4096, "N"),
        width=(256, "D"),
        vocab=(32768, "V"),
        repeats=(5, "timed calls"),
        dtype=("float32", f"of hidden and table: {', '.join(DTYPES)}"),
        vs=("", f"other systems: {', '.join(PEERS)}"),
        python=(str(ROOT / ".venv-peers/bin/python"), "interpreter that has them"),
        json=("", "file for the figures"),
    )
    try:
        _, given = parse(sys.argv[1:] if argv is None else argv, config_required=False, **flags)
        sizes = {name: given[name] for name in ("tokens", "width", "vocab")}
        peers = [x for x in given["vs"].split(",") if x]
        for flag, value, known in [("--dtype", given["dtype"], DTYPES), *(("--vs", x, PEERS) for x in peers)]:
            if value not in known:
                raise ValueError(unknown(flag, value, known))
        results = measure(**sizes, repeats=given["repeats"], dtype=given["dtype"])
        for peer in peers:
            results[peer] = measure_peer(peer, given["python"], sizes, given["repeats"], given["dtype"])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    job = sizes | {"dtype": given["dtype"]}
    record = {"job": job, "platform": jax.default_backend(), "forms": results, "bars": bars(results)}
    console, found = Console(), record["bars"]
    console.print(table_of(results, f"forward + backward, N={sizes['tokens']}, D={sizes['width']}, V={sizes['vocab']}"))
    for clock in ("wall_s", "cpu_s"):
        share = found[f"{clock}/needed"]
        verdict = "reached" if share <= SECONDS else "MISSED"
        console.print(
            f"{clock}: {share:.2f} of 8 N D V at the products' rate + softmax passes; bar {SECONDS}: {verdict}"
        )
    rate = 6e-12 * np.prod(list(sizes.values())) / results["three products"]["wall_s"]
    share = 8 / 6 * results["three products"]["wall_s"] / results["token_logprob"]["wall_s"]
    console.print(f"the three products: {rate:.3g} TFLOP/s, of which token_logprob's 8 N D V are done at {share:.0%}")
    verdict = "reached" if found["temp_mib"] <= MEMORY else "MISSED"
    console.print(f"temporaries: {found['temp_mib']:.0f} MiB; bar {MEMORY}: {verdict}")
    if given["json"]:
        Path(given["json"]).write_text(json.dumps(record, indent=1))
    return record


if __name__ == "__main__":
    main()
