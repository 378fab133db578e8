"""Search meshes, microbatch counts and options for a config: rank them by formulas, and compile the best."""

import copy
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxpo.config.fill import fill
from jaxpo.config.resolve import resolve
from jaxpo.config.resolved import Resolved
from jaxpo.parallel import AXES, ROWS, TOKENS
from jaxpo.parallel.mesh import mesh_shape, reshaped_sizes
from jaxpo.plan import roofline
from jaxpo.plan.plan import Plan, Say, StepPlan, make_plan
from jaxpo.plan.topology import Topology
from jaxpo.plan.trace import Data, data_of
from jaxpo.policy import transformer
from jaxpo.policy.attention import LONG, QUERIES_AT_ONCE
from jaxpo.policy.config import TransformerConfig

Changes = Mapping[str, Any]  # fields of a config by path
SCORE_BYTES = 64  # bytes that each attention score moves in an update step, as compiled for v5e (docs/plans.md)
SEARCHED = ("data", "fsdp", "tensor")  # axes of the mesh; the others stay as they are
LOGITS = 2**31  # bytes of a block of logits, see `jaxpo.kernels.token_logprob.plan`


def changed(config: ConfigDict, changes: Changes) -> ConfigDict:
    """A filled copy of the config with these changes."""
    out = copy.deepcopy(config)
    for path, value in changes.items():
        *blocks, name = path.split(".")
        block = out
        for part in blocks:
            block = block[part]
        block[name] = value
    return fill(out)


def described(changes: Changes) -> str:
    """The changes as flags of the command line."""
    return " ".join(f"--config.{path}={value}" for path, value in changes.items())


def allowed(config: ConfigDict, changes: Changes, devices: int) -> Resolved | None:
    """Resolve the changed config; None if that is refused, as when it does not divide over the devices."""
    try:
        return resolve(changed(config, changes), devices)
    except ValueError:
        return None


def on_one_device(config: ConfigDict) -> Resolved:
    """Resolve the run for one device, for facts that do not depend on the mesh (which may not divide the run)."""
    one = {f"mesh.{axis}": 1 for axis in AXES} | {f"rollout.mesh.{axis}": None for axis in AXES}
    return resolve(changed(config, {**one, "training.microbatches": 1, "training.packing": False}), 1)


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Yield every (data, fsdp, tensor) whose product is ``devices``, as changes."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor in divisors:
        for fsdp in divisors:
            if devices % (tensor * fsdp) == 0:
                sizes = devices // (tensor * fsdp), fsdp, tensor
                yield {f"mesh.{axis}": n for axis, n in zip(SEARCHED, sizes, strict=True)}


# ---- on paper


class Sizes(NamedTuple):
    """The sizes that an estimate needs.

    parameters: number of parameters.
    active: parameters that one token uses.
    rows: rows of an iteration.
    tokens: tokens of an iteration, with prompts.
    width: T, the most tokens of an answer.
    length: tokens of a prompt and an answer.
    """

    parameters: float
    active: float
    rows: int
    tokens: int
    width: int
    length: int


def sizes_of(resolved: Resolved, model: TransformerConfig, data: Data) -> Sizes:
    """The `Sizes` of a run."""
    shapes = jax.eval_shape(partial(transformer.init, model), jax.random.key(0))
    share = 1 if model.experts is None else model.experts_per_token / model.experts
    total = active = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        expert = model.experts is not None and x.ndim == 5 - (path[-1].key == "w_down")
        total, active = total + x.size, active + x.size * (share if expert and "w_" in path[-1].key else 1)
    config, rows = resolved.config, resolved.rows
    width = config.sampling.max_new_tokens
    length = data.prompt_width + width
    return Sizes(total, active, rows, rows * width + config.rollout.prompts * data.prompt_width, width, length)


class Estimate(NamedTuple):
    """An estimate of an iteration.

    bytes: memory of a chip at the peak.
    seconds: time of an iteration, by the binding terms.
    hidden: seconds of the other terms.
    """

    bytes: float
    seconds: float
    hidden: float


def estimate(resolved: Resolved, where: Topology, model: TransformerConfig, s: Sizes) -> Estimate:
    """Estimate an iteration by formulas that are only good for ranking.

    It has the update (with a forward pass for each reference) and the rollout on the mesh that samples.
    """
    config = resolved.config
    parts = [update_work(resolved, model, s), *([rollout_work(config, where, model, s)] if resolved.samples else [])]
    held = 4 * s.parameters / (config.mesh.fsdp * config.mesh.tensor) * (3 + len(resolved.references))
    terms = [roofline.seconds(work, where.chip).values() for work, _ in parts]
    bound = sum(map(max, terms))
    return Estimate(held + max(size for _, size in parts), bound, sum(map(sum, terms)) - bound)


def update_work(resolved: Resolved, model: TransformerConfig, s: Sizes) -> tuple[roofline.Work, float]:
    """Estimate the work of a chip in an update, and the bytes that it needs beside the state it holds.

    Parameters and moments are float32, sharded over fsdp and tensor; matrix products are in bfloat16. fsdp gathers the
    parameters for every microbatch (forward, recomputation, backward) and scatters the gradients. tensor sums
    activations four times a layer. Attention scores go through memory, unless the attention is fused.
    """
    config = resolved.config
    f, t = config.mesh.fsdp, config.mesh.tensor
    d = math.prod(config.mesh[axis] for axis in TOKENS) // f  # axes that shard tokens but not parameters
    m, chips = config.training.microbatches * config.training.minibatches, d * f * t
    again = 0 if config.policy.remat == "none" else 1
    passes = 3 + again + len(resolved.references)
    scores = model.layers * model.heads * s.length * s.tokens
    fused = model.attention != "xla" and s.length >= LONG
    moved_scores = 0 if fused else SCORE_BYTES * scores / chips
    activation = 2 * model.width * s.tokens / (d * f)  # bytes of the residual stream
    stored = m * passes * 2 * s.parameters / t + 28 * s.parameters / (f * t) + passes * 12 * model.layers * activation
    gathered = m * (passes + 2) * 2 * s.parameters / t * (f - 1) / f
    summed = 8 * s.parameters / (f * t) * (d - 1) / d
    added = passes * 2 * model.layers * activation * 2 * (t - 1) / t
    products = 2 * s.active * s.tokens + 4 * model.head_dim * scores
    rows = s.rows / (m * d * f)
    part = 0 if fused else 12 * rows * model.heads / t * min(QUERIES_AT_ONCE, s.width) * s.length
    layers = model.layers * (1 if again else 12)
    size = 6 * s.parameters / (f * t) + layers * 2 * rows * s.length * model.width + part + LOGITS
    return roofline.Work(passes * products / chips, stored + moved_scores, gathered + summed + added), size


def rollout_work(
    config: ConfigDict, where: Topology, model: TransformerConfig, s: Sizes
) -> tuple[roofline.Work, float]:
    """Estimate the work of a chip in a rollout, and the bytes that it needs.

    At every token, decoding reads the parameters and the filled part of the cache.
    """
    sizes = mesh_shape(reshaped_sizes(config.rollout.mesh) or config.mesh, where.size)
    mesh = dict(zip(AXES, sizes, strict=True))
    f, t, chips = mesh["fsdp"], mesh["tensor"], where.size
    scores = model.layers * model.heads * s.length * s.tokens
    products = 2 * s.active * s.tokens + 4 * model.head_dim * scores
    cache = 4 * model.layers * model.kv_heads * model.head_dim * s.rows * s.width / chips
    row = 2 * model.width * s.rows * t / chips
    own = 2 * s.parameters / (f * t * mesh["expert"])
    moved = 7 * model.layers * row * ((f > 1) * f + (t > 1) * 2)  # activations to where the parameters lie, or
    gathered = own * (f - 1) + (t > 1) * 4 * model.layers * row
    work = roofline.Work(products / chips, s.width * (own + cache / 2), s.width * min(moved, gathered))
    return work, own + cache


def sampling_mesh(config: ConfigDict, where: Topology, model: TransformerConfig, s: Sizes) -> Changes:
    """The fastest mesh for the rollout among those that fit, as changes.

    It does not depend on the mesh that trains. {} if the config names a rollout mesh, or if nothing is sampled.
    """
    if reshaped_sizes(config.rollout.mesh) or not on_one_device(config).samples:
        return {}
    around = max(config.mesh.expert, 1)  # experts are sharded; positions are not when decoding
    best: tuple[float, float, Changes] | None = None
    for sizes in meshes(where.size // around):
        of = {axis: sizes[f"mesh.{axis}"] for axis in SEARCHED}
        changes = {"rollout.mesh.data": of["data"], "rollout.mesh.tensor": of["tensor"], "rollout.mesh.expert": around}
        if of["fsdp"] > 1 or not allowed(config, changes, where.size):
            continue
        work, size = rollout_work(changed(config, changes), where, model, s)
        terms = roofline.seconds(work, where.chip).values()
        if size < 0.8 * where.chip.hbm and (best is None or (max(terms), sum(terms)) < best[:2]):
            best = max(terms), sum(terms), changes
    return best[2] if best else {}


def ranked(config: ConfigDict, where: Topology, data: Data) -> list[tuple[Changes, Estimate]]:
    """Rank the meshes and microbatch counts that divide the run, each with the best sampling mesh.

    First those that seem to fit, by time; then the others, by bytes.
    """
    resolved = on_one_device(config)
    model = resolved.transformer(data.vocab_size or 1)
    sizes, rows = sizes_of(resolved, model, data), resolved.rows // config.training.minibatches
    sampling = sampling_mesh(config, where, model, sizes)
    out = []
    around = math.prod(max(n, 1) for axis, n in config.mesh.items() if axis not in SEARCHED)
    for mesh in meshes(where.size // around):
        shards = math.prod(mesh.get(f"mesh.{axis}", max(config.mesh[axis], 1)) for axis in ROWS)
        counts = [n for n in range(1, rows + 1) if rows % (n * shards) == 0]
        if counts and allowed(config, {**mesh, **sampling, "training.microbatches": counts[0]}, where.size):
            every = [{**mesh, **sampling, "training.microbatches": n} for n in counts]
            fitting = [(changes, allowed(config, changes, where.size)) for changes in every]
            out += [(changes, estimate(run, where, model, sizes)) for changes, run in fitting if run]

    def rank(pair: tuple[Changes, Estimate]) -> tuple[float, ...]:
        e = pair[1]
        return (1, e.bytes, 0) if e.bytes > where.chip.hbm else (0, e.seconds, e.hidden)

    return sorted(out, key=rank)


# ---- compiled


def fastest(config: ConfigDict, where: Topology, *, compile_most: int, say: Say) -> Plan:
    """Compile the ``compile_most`` best-ranked choices of mesh and microbatch count; return the fastest plan that fits.

    If none fits, it returns the last plan compiled.

    Raises:
      ValueError: no mesh of so many chips divides the config.
    """
    data = data_of(on_one_device(config))
    order = ranked(config, where, data)
    if not order:
        raise ValueError(
            f"no mesh of {where.size} chips divides the config: make config.rollout.prompts divisible by more chips"
        )
    plans = []
    for changes, guess in order[:compile_most]:
        say(f"compiling {described(changes)}: {guess.seconds:.3g} s, {guess.bytes / 2**30:.3g} GiB on paper")
        plans.append(make_plan(changed(config, changes), where, data=data, say=say))
    return min((p for p in plans if p.fits), key=lambda p: p.seconds, default=plans[-1])


def failing(plan: Plan) -> dict[str, StepPlan]:
    """The steps of a plan that do not fit in memory."""
    return {s.name: s for s in plan.steps if s.error is not None or s.peak > plan.chip.hbm}


def smaller_steps(config: ConfigDict, where: Topology, failed: set[str]) -> Iterator[Changes]:
    """Changes that make a step smaller and still divide over the chips, cheapest first."""
    d, f, t = (where.size if n == -1 else n for n in (config.mesh[axis] for axis in SEARCHED))
    n = config.training.microbatches
    smaller = [{"training.microbatches": n * 2}, {"training.microbatches": n * 4}] if failed != {"rollout"} else []
    if failed != {"rollout"} and config.policy.remat != "full":
        smaller = [{"policy.remat": "full"}, *smaller]
    if d > 1:
        smaller.append({"mesh.data": d // math.gcd(d, 2), "mesh.fsdp": f * math.gcd(d, 2)})
    smaller += [{"mesh.fsdp": f // 2, "mesh.tensor": t * 2}] if f % 2 == 0 else []
    if failed != {"rollout"}:
        smaller += [{**a, "training.microbatches": n * 4} for a in smaller if "training.microbatches" not in a]
    width = config.sampling.max_new_tokens
    smaller += [{"sampling.max_new_tokens": width // 2}, {"sampling.max_new_tokens": width // 4}]
    return (changes for changes in smaller if allowed(config, changes, where.size))


def proposals(config: ConfigDict, where: Topology, plan: Plan, *, most: int = 6, say: Say) -> list[tuple[str, Plan]]:
    """Compile changes to a plan that does not fit, until one fits, at most ``most``; return (change, its plan) pairs.

    For each change, the steps that failed are compiled first, and the others only if those fit.
    """
    data, names = data_of(on_one_device(config)), set(failing(plan))
    out = []
    for changes, _ in zip(smaller_steps(config, where, names), range(most), strict=False):
        say(f"trying {described(changes)}")
        other = changed(config, changes)
        tried = make_plan(other, where, data=data, only=names, say=say)
        if tried.fits:
            tried = make_plan(other, where, data=data, known={s.name: s for s in tried.steps}, say=say)
        out.append((described(changes), tried))
        if tried.fits:
            break
    return out
