"""Protocols in which failed answers are repaired: written again after a critique (Critique-GRPO), or continued by a
corrector from the first wrong step (SCOPE)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from jaxpo.arguments import Threshold, Whole
from jaxpo.batch import Rollouts, take
from jaxpo.fields import role_id
from jaxpo.learning.state import Run
from jaxpo.parallel.distributed import from_rows, own_rows, to_host
from jaxpo.primitives.guidance import first_error, pick_refinement
from jaxpo.protocols.gatherer import Gatherer
from jaxpo.protocols.on_policy import sample_once
from jaxpo.protocols.protocol import Facts, Protocol
from jaxpo.protocols.rows import with_rows
from jaxpo.registry import register
from jaxpo.tasks import Example
from jaxpo.tasks.user_functions import check_places, locate
from jaxpo.text.conversations import Question, plain_answer, plain_text, said_more

# ---- written again after a critique

REQUEST = "\nYour answer: {answer}\n{critique}\nAnswer again."
ASKED = ("question", "answer", "correct", "reference")  # of a critique


@register("protocol", source="Critique-GRPO, arXiv:2506.03106; code of zhangxy-2019/critique-GRPO")
def critique_grpo(critique: str = "simple_gt", request: str = REQUEST, room: Whole | None = None) -> Protocol:
    """Sample K answers to each prompt, write a critique of each, and let the policy answer again, once for each. One of
    a prompt's new answers replaces its first old one, whichever it came from: the first whose reward is exactly 1, else
    the first of the highest reward. Its role is ``expert``, and it is trained under the original prompt: the first
    attempt and the critique are not in its context. A new answer that the length limit ended gets the end token.

    Metrics: ``refine/reward``, mean reward of the new answers; ``refine/chosen``, of those that were taken;
    ``refine/too_long``, requests that did not fit.

    Args:
      critique: "simple_gt" (says whether the answer is right, and the reference answer), or ``"module:function"`` of
        ``(question, answer, correct, reference)``, all texts but ``correct`` (a truth value), which returns the
        critique as a text. An answer on which it fails gets no new one.
      request: follows the user's last message; it must hold ``{answer}`` and ``{critique}``.
      room: tokens that a prompt may gain; None = three times ``config.sampling.max_new_tokens``.
    """
    for field in ("{answer}", "{critique}"):
        if field not in request:
            raise ValueError(f"request must hold {field}, where the policy reads it; it is {request!r:.80}")
    written = simple_gt if critique == "simple_gt" else locate(critique, "config.protocol.critique")
    check_places(written, ASKED, "config.protocol.critique")

    def wide(width: int) -> int:
        return 3 * width if room is None else room

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        run, out = sample_once(run, gather, jax.random.fold_in(key, 0))
        batch = to_host(out)
        prompts, length = requests(gather, batch, written, request, gather.prompt_width + wide(gather.width))
        there = length > 0
        gather.note("refine/too_long", float((~there).mean()))
        if not there.any():
            return run, batch
        again = gather.complete(
            *(run.state.params, prompts, length, there * gather.width, jax.random.fold_in(key, 1)),
            *(gather.sampling(run), 1),
        )
        batch = refined(gather, batch, again, there, gather.options.eos_ids)
        return run, batch

    return Protocol(collect, facts=Facts(compiles={"complete": 1}))


def simple_gt(question: str, answer: str, correct: bool, reference: str) -> str:
    """Says whether the answer is right, and what the right one is."""
    return f"This is {'right' if correct else 'wrong'}. The right answer is: {reference}"


def requests(
    gather: Gatherer, batch: Rollouts, critique: Callable[..., Any], request: str, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """A request to answer again for each row: tokens [B, width] and lengths [B]; 0 = there is none."""
    examples = [gather.train.examples[i] for i in batch.prompt]
    own, answers, notes = own_rows(batch.prompt), gather.texts(batch), {}
    calls = [
        (plain_text(e.question), a, bool(c), reference(e))
        for e, a, c in zip(examples, answers, batch.correct, strict=True)
    ]
    said = gather.call("critique of config.protocol.critique", critique, [calls[i] for i in own])
    for i, text in zip(own, said, strict=True):
        if text is not None and not isinstance(text, str):
            raise ValueError(f"config.protocol.critique must return a text; it returned {text!r:.60}")
        notes[i] = text

    def write(i: int) -> Question | None:
        if notes[i] is None:
            return None
        return said_more(examples[i].question, request.format(answer=answers[i], critique=notes[i]))

    return gather.rewritten(batch.prompt, width, write, "config.protocol.request")


def reference(example: Example) -> str:
    """The text of the right answer; "" where none is known."""
    return "" if example.answer is None else plain_answer(example.answer)


def refined(gather: Gatherer, batch: Rollouts, again: Rollouts, there: np.ndarray, ends: Sequence[int]) -> Rollouts:
    """The batch in which one refinement of each prompt, if there is one, replaces the prompt's first row."""
    k, p = batch.shared_prompt, batch.prompt_width
    said, mask = ended(again, ends), np.asarray(again.mask)
    new = batch.replace(
        tokens=np.concatenate([batch.tokens[:, :p], said], 1), mask=mask, truncated=np.asarray(again.truncated)
    )
    new = to_host(gather.reward(new))
    choice = pick_refinement(new.reward.reshape(-1, k), there.reshape(-1, k))
    prompts = np.flatnonzero(choice >= 0)
    first, taken = prompts * k, prompts * k + choice[prompts]
    gather.note("refine/reward", float(new.reward[there].mean()))
    gather.note("refine/chosen", float(new.reward[taken].mean()))
    own = {name: getattr(batch, name) for name in ("group", "seed", "prompt", "prompt_length")}
    new = new.replace(role=np.full_like(batch.role, role_id("expert")), logp_beh=np.zeros_like(batch.logp_beh), **own)
    return jax.tree.map(lambda old, x: with_rows(old, first, x[taken]), batch, new)


def ended(rows: Rollouts, ends: Sequence[int]) -> np.ndarray:
    """[n, T] completion tokens; the last token of a row that the length limit ended becomes the end token."""
    tokens, mask = np.array(rows.completions), np.asarray(rows.mask)
    cut = np.flatnonzero(np.asarray(rows.truncated) * (mask.sum(1) > 0))
    tokens[cut, mask[cut].sum(1).astype(int) - 1] = ends[0]
    return tokens


# ---- continued from the first wrong step


class Words(NamedTuple):
    """The user's functions of `scope`; None = by the demonstration.

    prm: (question, steps) -> a score of each step.
    corrector: (question, beginning) -> the rest of the answer.
    separator: ends a step.
    """

    prm: Callable[..., Any] | None
    corrector: Callable[..., Any] | None
    separator: str

    def steps(self, text: str) -> list[str]:
        """The steps of a text, each with its separator; of single characters without one."""
        if not self.separator:
            return list(text)
        parts = text.split(self.separator)
        return [x for x in [*(p + self.separator for p in parts[:-1]), parts[-1]] if x]


@register("protocol", source="SCOPE, arXiv:2602.24110 (reconstructed from abstract and summaries: rules assumed)")
def scope(
    prm: str = "demonstration", corrector: str = "demonstration", separator: str = "\n", threshold: Threshold = 0.5
) -> Protocol:
    """Sample K answers to each prompt. A process reward model scores the steps of each wrong answer, and a corrector
    goes on before the first step whose score is below the threshold. The first repaired answer of a prompt that the
    verifier accepts replaces the wrong one that it came from. ``off_mask`` is 1 on the corrector's tokens.

    An answer without a wrong step is left alone; one that becomes too long is not used.

    Metrics: ``repair/tried``, share of the rows that were repaired; ``repair/accepted``, share of those that the
    verifier accepts; ``repair/kept``, share of the prompts that got one.

    Args:
      prm: ``"module:function"`` of (question, steps), which returns a score of each step; "demonstration" gives 1 to
        the steps with which the task's own answer begins, too, and 0 to the others.
      corrector: ``"module:function"`` of (question, beginning), which returns the rest of the answer as a text;
        "demonstration" gives the rest of the task's own answer, from the same step on.
      separator: ends a step; "" = each character is a step.
    """
    own = [
        None if name == "demonstration" else locate(name, f"config.protocol.{field}")
        for field, name in (("prm", prm), ("corrector", corrector))
    ]
    for function, field, last in zip(own, ("prm", "corrector"), ("steps", "beginning"), strict=True):
        if function is not None:
            check_places(function, ("question", last), f"config.protocol.{field}")
    words = Words(*own, separator)

    def collect(run: Run, gather: Gatherer, key: Array) -> tuple[Run, Rollouts]:
        run, out = sample_once(run, gather, key)
        batch = to_host(out)
        return run, repaired(gather, batch.with_token(off_mask=np.zeros_like(batch.mask)), words, threshold)

    def check(config: ConfigDict) -> None:
        if config.rollout.responses < 2:
            raise ValueError(f"config.rollout.responses must be at least 2, not {config.rollout.responses}")

    return Protocol(collect, facts=Facts(provides=frozenset({"off_mask"}), check=check))


def repaired(gather: Gatherer, batch: Rollouts, words: Words, threshold: float) -> Rollouts:
    """The batch in which one repaired answer of each prompt replaces the wrong one that it came from."""
    wrong = np.flatnonzero(batch.correct <= 0)
    if not len(wrong):
        return batch
    failed = take(batch, wrong)
    texts = gather.texts(failed)
    shown = gather.texts(gather.demonstrations(failed.prompt)) if None in (words.prm, words.corrector) else texts
    steps, models = ([words.steps(text) for text in column] for column in (texts, shown))
    examples = [gather.train.examples[i] for i in failed.prompt]
    place = first_wrong(gather, words, examples, steps, models, threshold)
    start = np.array([sum(map(len, parts[:j])) for parts, j in zip(steps, place, strict=True)])
    cut = token_at(gather, failed, start)
    todo = place < [len(parts) for parts in steps]
    more, length = continuations(gather, words, examples, steps, models, place, todo)
    fits = todo & (length > 0) & (cut + length <= batch.width)
    gather.note("repair/tried", float(fits.sum() / batch.rows))
    new = to_host(gather.reward(spliced(failed, cut, more, length)))
    accepted = fits & (np.asarray(new.correct) > 0)
    kept = np.flatnonzero(accepted)
    kept = kept[np.unique(wrong[kept] // batch.shared_prompt, return_index=True)[1]]
    gather.note("repair/accepted", float(accepted.sum() / max(fits.sum(), 1)))
    gather.note("repair/kept", float(len(kept) / gather.prompts))
    return jax.tree.map(
        lambda old, x: with_rows(old, wrong[kept], x[kept]), batch, new.replace(shared_prompt=batch.shared_prompt)
    )


def first_wrong(
    gather: Gatherer,
    words: Words,
    examples: Sequence[Example],
    steps: Sequence[Sequence[str]],
    models: Sequence[Sequence[str]],
    threshold: float,
) -> np.ndarray:
    """[n] the first wrong step of each answer; its number of steps if there is none, or the function failed."""
    own, counts = own_rows(np.zeros(len(steps))), np.array([len(x) for x in steps])
    scores = np.ones((len(own), max(counts.max(), 1)))
    if words.prm is None:
        given: list[Any] = [agreement(steps[i], models[i]) for i in own]
    else:
        calls = [(plain_text(examples[i].question), list(steps[i])) for i in own]
        given = gather.call("prm of config.protocol.prm", words.prm, calls)
    for row, i, said in zip(scores, own, given, strict=True):
        if said is None:
            continue
        told = np.asarray(said, np.float64)
        if told.shape != (counts[i],) or not np.isfinite(told).all():
            raise ValueError(
                f"config.protocol.prm must return a finite score of each of {counts[i]} steps; it returned {said!r:.60}"
            )
        row[: counts[i]] = told
    return first_error(from_rows(scores, own, len(steps)), counts, threshold=threshold)


def agreement(steps: Sequence[str], model: Sequence[str]) -> list[float]:
    """1 for the steps with which another text begins, too, and 0 for the others."""
    return [float(list(steps[: j + 1]) == list(model[: j + 1])) for j in range(len(steps))]


def continuations(
    gather: Gatherer,
    words: Words,
    examples: Sequence[Example],
    steps: Sequence[Sequence[str]],
    models: Sequence[Sequence[str]],
    place: np.ndarray,
    todo: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """What the corrector writes from step ``place`` [n] on: tokens [n, T] with their end, and lengths [n]; 0 = nothing,
    or too much."""
    own = own_rows(place)
    own_todo = [i for i in own if todo[i]]
    if words.corrector is None:
        given: list[Any] = ["".join(models[i][place[i] :]) for i in own_todo]
    else:
        calls = [(plain_text(examples[i].question), "".join(steps[i][: place[i]])) for i in own_todo]
        given = gather.call("corrector of config.protocol.corrector", words.corrector, calls)
    tokens, length = np.zeros((len(own), gather.width)), np.zeros(len(own))
    for i, text in zip(own_todo, given, strict=True):
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(f"config.protocol.corrector must return a text; it returned {text!r:.60}")
        ids, row = gather.codec.answer(examples[i], text), int(np.searchsorted(own, i))
        if len(ids) <= gather.width:
            tokens[row, : len(ids)], length[row] = ids, len(ids)
    return tuple(from_rows(x, own, len(place)).astype(np.int32) for x in (tokens, length))


def token_at(gather: Gatherer, rows: Rollouts, start: np.ndarray) -> np.ndarray:
    """[n] the token that holds character ``start`` [n] of each completion: the most first tokens whose text is no
    longer than ``start``, found by halving."""
    low, high = np.zeros(len(start), np.int32), np.asarray(rows.mask).sum(1).astype(np.int32)
    while (low < high).any():
        middle = (low + high + 1) // 2
        within = (np.arange(rows.width) < middle[:, None]) * rows.mask
        short = np.array([len(text) for text in gather.texts(rows.replace(mask=within))]) <= start
        low, high = np.where(short, middle, low), np.where(short, high, middle - 1)
    return low


def spliced(rows: Rollouts, cut: np.ndarray, more: np.ndarray, length: np.ndarray) -> Rollouts:
    """Rows whose first ``cut`` [n] tokens are their own, and then come ``length`` [n] tokens of ``more`` [n, T]."""
    place = np.arange(rows.width) - cut[:, None]
    own, theirs = place < 0, (place >= 0) & (place < length[:, None])
    written = np.take_along_axis(more, np.clip(place, 0, more.shape[1] - 1), 1)
    completions = np.where(own, rows.completions, np.where(theirs, written, 0))
    per_token = {name: np.where(own, x, 0).astype(x.dtype) for name, x in rows.per_token.items()}
    return rows.replace(
        tokens=np.concatenate([rows.tokens[:, : rows.prompt_width], completions], 1).astype(np.int32),
        mask=np.where(own, rows.mask, theirs).astype(np.float32),
        logp_beh=np.where(own, rows.logp_beh, 0).astype(np.float32),
        truncated=np.zeros_like(rows.truncated),
        per_token={**per_token, "off_mask": theirs.astype(np.float32)},
    )
