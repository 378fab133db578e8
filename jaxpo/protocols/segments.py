"""Values of prefixes from extra rollouts (SPO): from cutpoints of each response (chain), or from a tree of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.arguments import Whole, when
from jaxpo.batch import Rollouts
from jaxpo.learning.state import Run
from jaxpo.parallel.distributed import to_host
from jaxpo.primitives.token_advantages import cutpoints, previous_at
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.on_policy import sample_once
from jaxpo.protocols.prefixes import Prefixes
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.registry import register

ROUNDING = 1e-9  # rounding errors of values: a smaller advantage counts as 0
Collect = Callable[[Run, Gatherer, Array], tuple[Run, Rollouts]]


@register(
    "protocol",
    source="SPO (segments), arXiv:2505.23564; AIFrameResearch/SPO",
    when={"rollouts": when(form="chain")}
    | dict.fromkeys(("branching", "segment", "max_edges", "divide_std"), when(form="tree")),
)
def spo_segment(
    form: Literal["chain", "tree"] = "chain",
    interval: Whole = 5,
    threshold: float = 0.9,
    rollouts: Whole = 9,
    branching: tuple[Whole, ...] = (6, 6, 6),
    segment: Whole = 30,
    max_edges: Whole = 32,
    divide_std: bool = False,
) -> Protocol:
    """Gather the data of Segment Policy Optimization: ``mc_value`` [B, T] (chain) or ``edge_adv`` [B] (tree).

    Chain: the value of the prefix before each cutpoint is the mean reward of ``rollouts`` completions of that prefix
    within the rest of the budget. Cutpoints are found from the trainer's own log-probs, as the objective finds them.

    Tree: each question is expanded breadth first. A node gets ``branching`` children of ``segment`` tokens each (on the
    last level, up to the budget); a branch that ended is a leaf. The value of a leaf is its reward, the value of a node
    is the mean over its children, and the advantage of an edge is ``V(child) - V(parent)``. Edges of advantage 0 are
    dropped. Of the others at most ``max_edges`` a question, chosen at random, become rows (prompt = question and path,
    response = the edge's tokens, ``reward`` = V(child)). There are always ``prompts * max_edges`` rows, each a group of
    its own in minibatches; unused rows have count 0. Unlike the released code, this keeps no edges for later
    iterations.

    A stop string that crosses a cut does not end the completion of the second part; the verifier's text is still cut
    before it.

    Args:
      interval, threshold: where cutpoints are.
      rollouts: completions of each prefix ("chain").
      branching: children of a node on each level ("tree").
      segment: tokens of an edge ("tree").
      max_edges: most rows of a question ("tree").
      divide_std: divide advantages by the siblings' population std + 1e-8 ("tree").
    """
    if not branching:
        raise ValueError("branching must name the children of a node on each level; it is empty")
    if form == "chain":
        collect = chain(interval, threshold, rollouts)
        return Protocol(collect, facts=Facts(provides=frozenset({"mc_value"})))
    collect = tree(tuple(branching), segment, max_edges, divide_std)
    more = len(set(branching)) - 1
    check = partial(check_tree, last=segment * (len(branching) - 1))
    facts = Facts(provides=frozenset({"edge_adv"}), compiles={"complete": more}, check=check)
    return Protocol(collect, facts=facts)


def chain(interval: int, threshold: float, completions: int) -> Collect:
    """``collect`` of the chain."""

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        run, batch = sample_once(run, gather, jax.random.fold_in(key, 0))
        logp = to_host(gather.score(run.state.params, batch).logp)
        batch = to_host(batch)
        cuts = np.asarray(cutpoints(logp, batch.mask, interval=interval, threshold=threshold))
        row, at = np.nonzero(cuts)
        value = np.zeros(batch.mask.shape, np.float32)
        if len(row):
            prefixes = Prefixes.of_rollouts(batch, row, at)
            ends = prefixes.go_on(run, gather, gather.width - at, jax.random.fold_in(key, 1), completions)[0]
            value[row, at] = ends.rewards(gather).reshape(-1, completions).mean(1)
        gather.note("chain/cutpoints", len(row) / batch.rows)
        value = np.asarray(previous_at(value, cuts)[0])  # read at cutpoints only
        return run, batch.replace(mc_value=value)

    return collect


def tree(branching: Sequence[int], segment: int, max_edges: int, divide_std: bool) -> Collect:
    """``collect`` of the tree."""

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        run, questions = gather.draw(run, gather.prompts)
        levels = grow(run, gather, questions, branching, segment, jax.random.fold_in(key, 0))
        values = back_up(levels, gather)
        adv = [np.zeros(gather.prompts)]
        for level, value, above in zip(levels[1:], values[1:], values[:-1], strict=True):
            gain = value - above[level.parent]
            gain = np.where(np.abs(gain) > ROUNDING, gain, 0)  # before any division by an equally small std
            if divide_std:
                siblings = value.reshape(-1, level.siblings)
                gain = gain / np.repeat(siblings.std(1) + 1e-8, level.siblings)
            adv.append(gain)
        prefix = min(gather.width, segment * (len(branching) - 1))
        batch, kept, found = rows_of(
            levels[1:], adv[1:], values[1:], max_edges, prefix, gather, jax.random.fold_in(key, 1)
        )
        gather.note("tree/reward", float(values[0].mean()))
        gather.note("tree/edges", kept / gather.prompts)
        gather.note("tree/zero_frac", 1 - found / sum(len(level) for level in levels[1:]))
        return run, batch

    return collect


def check_tree(config: ConfigDict, last: int) -> None:
    """Raise ``ValueError`` if ``config.rollout.responses`` is not 1, or if the last level, which begins at token
    ``last``, has no tokens left to sample. The rows, ``prompts * max_edges``, divide wherever ``prompts`` do."""
    if last >= config.sampling.max_new_tokens:
        raise ValueError(
            f"the last level of the tree begins after {last} tokens, and config.sampling.max_new_tokens is "
            f"{config.sampling.max_new_tokens}: set a shorter config.protocol.segment, or fewer levels in "
            "config.protocol.branching"
        )
    if config.rollout.responses != 1:
        raise ValueError(
            f"config.rollout.responses must be 1 with protocol 'spo_segment' and form='tree', not "
            f"{config.rollout.responses}: config.protocol.branching says how many completions there are"
        )


# ---- trees


@dataclass(frozen=True)
class Level:
    """The n nodes of one depth, siblings side by side.

    paths: tokens from the question to each node.
    start: [n] where the node's own edge begins.
    parent: [n] row of the parent in the level above.
    cut: [n] bool: only the budget ended the edge.
    siblings: children of each parent.
    sampled: the edges as they were sampled.
    """

    paths: Prefixes
    start: np.ndarray
    parent: np.ndarray
    cut: np.ndarray
    siblings: int = 1
    sampled: Rollouts | None = None

    def __len__(self) -> int:
        return len(self.paths)


def grow(
    run: Run, gather: Gatherer, questions: np.ndarray, branching: Sequence[int], segment: int, key: Array
) -> list[Level]:
    """Grow the trees of all questions: their levels, the questions themselves first. Stops early if no branch is
    open."""
    n, roots = len(questions), Prefixes.of_prompts(gather, questions)
    levels = [Level(roots, roots.stop, np.arange(n), np.ones(n, bool))]
    for depth, children in enumerate(branching):
        above = np.flatnonzero(levels[-1].cut & (levels[-1].paths.stop < gather.width))
        if not len(above):
            break
        from_ = levels[-1].paths.take(above)
        left = gather.width - from_.stop
        budget = left if depth == len(branching) - 1 else np.minimum(left, segment)
        paths, sampled = from_.go_on(run, gather, budget, jax.random.fold_in(key, depth), children)
        cut = np.asarray(sampled.truncated) > 0
        start, parent = np.repeat(from_.stop, children), np.repeat(above, children)
        levels.append(Level(paths, start, parent, cut, children, sampled))
    return levels


def back_up(levels: Sequence[Level], gather: Gatherer) -> list[np.ndarray]:
    """Values [n] of the nodes of each level: a leaf's reward, otherwise the mean over the children."""
    leaf = [~np.isin(np.arange(len(a)), b.parent) for a, b in zip(levels, levels[1:], strict=False)]
    leaf.append(np.ones(len(levels[-1]), bool))
    values = [np.zeros(len(level)) for level in levels]
    for level, value, ends in zip(levels, values, leaf, strict=True):
        if ends.any():
            value[ends] = level.paths.take(np.flatnonzero(ends)).rewards(gather)
    for i in reversed(range(len(levels) - 1)):
        below = levels[i + 1]
        values[i][below.parent[:: below.siblings]] = values[i + 1].reshape(-1, below.siblings).mean(1)
    return values


def rows_of(
    levels: Sequence[Level],
    adv: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    max_edges: int,
    prefix: int,
    gather: Gatherer,
    key: Array,
) -> tuple[Rollouts, int, int]:
    """Choose ``prompts * max_edges`` rows among the edges; the rows of a question stand side by side.

    Args:
      prefix: longest path before an edge.

    Returns:
      the rows, how many of them are edges, and how many edges have an advantage other than 0.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    questions = levels[0].paths.question[:: levels[0].siblings]  # of the trees, in order
    tree_of = [np.arange(len(questions)).repeat(levels[0].siblings)]
    for level in levels[1:]:
        tree_of.append(tree_of[-1][level.parent])
    owner, gain = np.concatenate(tree_of), np.concatenate(adv)
    telling = np.flatnonzero(gain)
    rows, used = np.zeros((len(questions), max_edges), np.int64), np.zeros((len(questions), max_edges), bool)
    for q in range(len(questions)):
        edges = rng.permutation(telling[owner[telling] == q])[:max_edges]
        rows[q] = np.flatnonzero(owner == q)[0]  # an unused row repeats some edge, and does not count
        rows[q, : len(edges)], used[q, : len(edges)] = edges, True
    rows, used = rows.reshape(-1), used.reshape(-1)

    def of_rows(pick: Callable[[Level], np.ndarray]) -> np.ndarray:
        return np.concatenate([np.asarray(pick(level)) for level in levels])[rows]

    paths = Prefixes(*[of_rows(lambda x, f=f.name: getattr(x.paths, f)) for f in fields(Prefixes)])
    start = of_rows(lambda level: level.start)
    prompts, length = paths.joined(paths.prompt.shape[1] + prefix, start)
    own = of_rows(lambda level: level.sampled.completions)
    mask = of_rows(lambda level: level.sampled.mask) * used[:, None]
    extra = levels[0].sampled.per_token
    batch = Rollouts(
        tokens=np.concatenate([prompts, own], 1),
        mask=mask.astype(np.float32),
        prompt_length=length,
        count=used.astype(np.float32),
        group=owner[rows].astype(np.int32),
        role=np.zeros(len(rows), np.int32),
        prompt=paths.question.astype(np.int32),
        seed=rng.integers(0, 2**32, len(rows), np.uint32),
        reward=np.concatenate(values)[rows].astype(np.float32),
        truncated=of_rows(lambda level: level.cut & (level.paths.stop == gather.width)).astype(np.float32),
        logp_beh=of_rows(lambda level: level.sampled.logp_beh),
        per_token={name: of_rows(lambda level, n=name: level.sampled.per_token[n]) for name in extra},
        edge_adv=np.where(used, gain[rows], 0).astype(np.float32),
    )
    return batch, int(used.sum()), len(telling)
