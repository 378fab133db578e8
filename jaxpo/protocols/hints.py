"""Protocols that show a part of the solution: in the prompt (GHPO), or as the beginning of the answer (ADHint)."""

from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.arguments import Count, PositiveShare, Share, Whole
from jaxpo.batch import Rollouts
from jaxpo.fields import role_id
from jaxpo.learning.state import Run
from jaxpo.parallel.distributed import to_host
from jaxpo.primitives.guidance import hint_length, hint_ratio
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.on_policy import sample_once
from jaxpo.protocols.prefixes import Prefixes
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.protocols.rows import side_by_side, widened, with_rows
from jaxpo.registry import register
from jaxpo.text.conversations import Question, said_more

# ---- hints in the prompt


@register("protocol", source="GHPO, arXiv:2507.10628; code of hkgc-1/GHPO")
def ghpo(
    ratios: tuple[PositiveShare, ...] = (0.25, 0.5, 0.75),
    sentence: str = "\nThe beginning of the answer: ",
    room: Whole | None = None,
    start_hint_step: Count = 0,
) -> Protocol:
    """Sample K answers to each prompt. A prompt that no answer solves is asked again with the beginning of its
    solution, the task's demonstration, and K new answers replace the old ones; then with more of it.

    The hint of ratio w is the first ``round(w length)`` characters of the solution (halves to even). It follows the
    user's last message after a sentence, so it is part of the prompt. The answers of the last ratio stay even if none
    of them is right. A prompt that would be longer than the prompt width and ``room`` stays without that hint.

    Metrics: ``hints/hard``, share of prompts that nobody solved without a hint; ``hints/hard_after``, with all hints;
    ``hints/ratio``, mean ratio of the hints in use; ``hints/too_long``, hints that did not fit.

    Args:
      ratios: shares of the solution, in the order in which they are tried.
      sentence: stands between the message and the hint. A character tokenizer must know its characters.
      room: tokens that a prompt may gain; None = ``config.sampling.max_new_tokens``.
      start_hint_step: iterations before this one give no hints.
    """
    if not ratios:
        raise ValueError("ratios must name at least one share of the solution; it is empty")
    if list(ratios) != sorted(ratios):
        raise ValueError(f"ratios must grow, since each hint is tried where a smaller one has failed; got {ratios}")

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        run, out = sample_once(run, gather, jax.random.fold_in(key, 0))
        more = gather.width if room is None else room
        batch, used = widened(to_host(out), more), np.zeros(gather.prompts)
        hard = unsolved(batch)
        gather.note("hints/hard", float(hard.mean()))
        for stage, ratio in enumerate(ratios if run.iteration >= start_hint_step else (), start=1):
            at = np.flatnonzero(hard)
            if not len(at):
                break
            prompts, length = hinted_prompts(gather, batch, at, ratio, sentence)
            fits = length > 0
            gather.watch.add("hints/too_long", float((~fits).sum()))
            if fits.any():
                asked = at[fits], prompts[fits], length[fits]
                batch = asked_again(run, gather, batch, *asked, jax.random.fold_in(key, stage))
                used[asked[0]], hard = ratio, unsolved(batch)
        gather.note("hints/hard_after", float(hard.mean()))
        gather.note("hints/ratio", float(used.mean()))
        return run, batch

    facts = Facts(compiles={"complete": 1}, room=lambda width: width if room is None else room, check=needs_two)
    return Protocol(collect, facts=facts)


def unsolved(batch: Rollouts) -> np.ndarray:
    """[G] prompts none of whose answers has an accuracy above 0: the first of several rewards, or ``correct``. They are
    not solvable in this stage (`jaxpo.primitives.guidance.first_solvable_stage`)."""
    several = batch.per_row.get("rewards_multi")
    accuracy = batch.correct if several is None or several.shape[1] < 2 else several[:, 0]
    return np.asarray(accuracy).reshape(-1, batch.shared_prompt).max(1) <= 0


def hinted_prompts(
    gather: Gatherer, batch: Rollouts, at: np.ndarray, ratio: float, sentence: str
) -> tuple[np.ndarray, np.ndarray]:
    """The prompts of the groups ``at`` [n] with a hint: tokens [n, P] and lengths [n]; 0 where one does not fit."""
    indices = batch.prompt[at * batch.shared_prompt]
    solutions = gather.texts(gather.demonstrations(indices))
    ends = hint_length(np.array([len(s) for s in solutions]), ratio)

    def write(i: int) -> Question:
        return said_more(gather.train.examples[indices[i]].question, sentence + solutions[i][: ends[i]])

    return gather.rewritten(indices, batch.prompt_width, write, "config.protocol.sentence")


def asked_again(
    run: Run, gather: Gatherer, batch: Rollouts, at: np.ndarray, prompts: np.ndarray, length: np.ndarray, key: Array
) -> Rollouts:
    """The batch whose groups ``at`` are replaced by new answers to other prompts for the same questions."""
    k = batch.shared_prompt
    rows = (at[:, None] * k + np.arange(k)).reshape(-1)
    budget = np.full(len(at), gather.width, np.int32)
    out = gather.complete(run.state.params, prompts, length, budget, key, gather.sampling(run), k)
    same = {name: getattr(batch, name)[rows] for name in ("group", "prompt", "seed", "role", "count")}
    out = to_host(gather.reward(out.replace(prompt_length=np.repeat(length, k), **same)))
    return jax.tree.map(lambda old, new: with_rows(old, rows, new), batch, out)


def needs_two(config: ConfigDict) -> None:
    """``ValueError`` unless a prompt has several answers: one alone is neither better nor worse than the others."""
    if config.rollout.responses < 2:
        raise ValueError(f"config.rollout.responses must be at least 2, not {config.rollout.responses}")


# ---- hints that begin the answer


class Difficulty(NamedTuple):
    """How the length of a hint follows from what the policy does without one; see `hint_ratio`."""

    w_min: float
    w_max: float
    noise: float


@register("protocol", source="ADHint, arXiv:2512.13095 (reconstructed from a secondary text: numbers assumed)")
def adhint(hinted: Whole | None = None, w_min: Share = 0.1, w_max: Share = 0.9, noise: Share = 0.0) -> Protocol:
    """Sample K - ``hinted`` answers to each prompt, K = ``config.rollout.responses``. Then sample ``hinted`` ones that
    begin with a part of the task's demonstration: the larger, the fewer of the prompt's first answers were right.

    A hint of ratio w is the first ``round(w length)`` tokens of the demonstration, without its end (halves to even).
    Its tokens belong to the row and are in ``mask``; ``hint_mask`` is 1 on them, and the row's role is ``hinted``.

    Metric ``hints/ratio``: mean ratio.

    Args:
      hinted: None = half of K, rounded down.
      w_min, w_max: ratio where all, or none, of the answers are right.
      noise: added to each prompt's ratio: uniform in [-noise, noise] (the law is assumed).
    """
    if w_min > w_max:
        raise ValueError(f"w_min {w_min:g} must not be above w_max {w_max:g}: harder prompts get longer hints")

    def of(responses: int) -> int:
        return responses // 2 if hinted is None else hinted

    def check(config: ConfigDict) -> None:
        k = config.rollout.responses
        if not 0 < of(k) < k:
            raise ValueError(
                f"config.protocol.hinted {of(k)} of config.rollout.responses {k}: at least one answer must begin with "
                "a hint and one without"
            )

    facts = Facts(provides=frozenset({"hint_mask"}), compiles={"complete": 2}, check=check)

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        return with_hints(of(gather.responses), Difficulty(w_min, w_max, noise), run, gather, key)

    return Protocol(collect, facts=facts)


def with_hints(hinted: int, law: Difficulty, run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
    """Collect answers without a hint, then answers with one; the rows of a prompt stand side by side."""
    run, indices = gather.draw(run, gather.prompts)
    naive = gather.responses - hinted
    first_key, second_key, seed_key = jax.random.split(key, 3)
    start = Prefixes.of_prompts(gather, indices)
    full = np.full(len(indices), gather.width, np.int32)
    own, sampled = start.go_on(run, gather, full, first_key, naive)
    own = rewarded(gather, own, sampled, own.stop * 0)
    shown, ratio = hints(gather, own, indices, law, seed_key)
    gather.note("hints/ratio", float(ratio.mean()))
    begun = start.append(*shown)
    helped, sampled = begun.go_on(run, gather, gather.width - begun.stop, second_key, hinted)
    helped = rewarded(gather, helped, sampled, np.repeat(begun.stop, hinted))
    return run, side_by_side([own, helped], [naive, hinted], seed_key)


def hints(
    gather: Gatherer, own: Rollouts, indices: np.ndarray, law: Difficulty, key: Array
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """The beginnings of demonstrations: tokens [G, T] and lengths [G]; and their ratios [G]."""
    group = np.repeat(np.arange(len(indices)), own.shared_prompt)
    ones, noise = np.ones(own.rows), np.zeros(own.rows)
    if law.noise:
        drawn = jax.random.uniform(key, (len(indices),), minval=-law.noise, maxval=law.noise)
        noise = np.repeat(np.asarray(drawn), own.shared_prompt)
    ratio = hint_ratio(own.reward, group, ones < 0, ones, w_min=law.w_min, w_max=law.w_max, noise=noise)
    ratio = np.asarray(ratio)[:: own.shared_prompt]
    shown = gather.demonstrations(indices)
    length = hint_length(np.asarray(shown.mask).sum(1) - 1, ratio)  # without the token that ends the answer
    return (np.asarray(shown.completions), length), ratio


def rewarded(gather: Gatherer, paths: Prefixes, sampled: Rollouts, stop: np.ndarray) -> Rollouts:
    """Rows that begin with a hint of ``stop`` [n] tokens, whose answers are rewarded whole."""
    place = np.arange(paths.width)
    whole = (place < paths.stop[:, None]).astype(np.float32)
    hint = (place < stop[:, None]).astype(np.float32)
    role = np.where(stop > 0, role_id("hinted"), role_id("own")).astype(np.int32)
    said = {name: x * (role == role_id("own"))[:, None] for name, x in sampled.per_token.items()}  # begin where it does
    rows = paths.rollouts(
        role=role,
        truncated=np.asarray(sampled.truncated),
        shared_prompt=sampled.shared_prompt,
        per_token={**said, "hint_mask": hint},
    )
    return to_host(gather.reward(rows.replace(mask=whole)))
