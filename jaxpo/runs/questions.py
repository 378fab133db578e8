"""A task as tokens: encode its prompts, decode and verify completions, and encode its own answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpo.batch import Demonstrations, Rollouts
from jaxpo.parallel.distributed import from_rows, own_rows, take_rows, to_host
from jaxpo.protocols.gatherer import Codec, Prompts, Verdict
from jaxpo.tasks import Example, Task, imperfect
from jaxpo.tasks.base import Completion, Score
from jaxpo.tasks.failures import Failures
from jaxpo.text.conversations import MARK, Question, Said, Turn, plain_answer, plain_text
from jaxpo.text.tokenizers import Tokenizer

Answers = list[list[Said]]  # texts, or messages with more than content
Opinion = Callable[[Sequence[Example], Answers], Verdict]


class Judged(NamedTuple):
    """What a task's rewards say of rows.

    table: [B, 4] reward, correct, error and abstained (0 or 1).
    parts: [B, R] what each of R rewards gave; 0 where it gave nothing.
    gave: [B, R] whether it gave a number.
    own: indices of the rows that this process verified.
    scores: of these.
    """

    table: np.ndarray
    parts: np.ndarray
    gave: np.ndarray
    own: np.ndarray
    scores: list[Score]


@dataclass(frozen=True)
class Questions:
    """A task as tokens.

    task: examples, verifier, demonstrations.
    tokenizer: encodes prompts and answers.
    train: prompts to train on.
    test: prompts to evaluate on.
    width: T, the most tokens of an answer.
    stop: strings at which an answer ends.
    rewards: names and weights of the task's rewards, if it has several.
    failures: where errors of the verifier and of the judge are told.
    """

    task: Task
    tokenizer: Tokenizer
    train: Prompts
    test: Prompts
    width: int
    stop: tuple[str, ...] = ()
    rewards: Mapping[str, float] = field(default_factory=dict)
    failures: Failures = field(default_factory=Failures)

    def texts(self, rollouts: Rollouts) -> list[Completion]:
        """The completions [..., B] as text, without special tokens and cut before a stop string; with their ids."""
        width, mask = rollouts.mask.shape[-1], np.asarray(rollouts.mask) > 0
        tokens = np.asarray(rollouts.tokens)[..., -width:].reshape(-1, width)
        out = []
        for row, on in zip(tokens, mask.reshape(-1, width), strict=True):
            ids = row[on].tolist()
            text = self.tokenizer.decode(ids)
            for stop in self.stop:
                text = text.split(stop)[0]
            out.append(Completion(text))
            out[-1].ids = ids
        return out

    @property
    def codec(self) -> Codec:
        """What turns tokens into texts and back, for protocols."""
        return Codec(self.texts, self.asked, lambda example, text: as_told(self.tokenizer, example, text).answer)

    def asked(self, examples: Sequence[Example], questions: Sequence[Question]) -> list[list[int]]:
        """The tokens of other questions about these examples, as prompts.

        Raises:
          ValueError: a question has no encoding, or the chat template refuses it; the line names the example's place.
        """
        return tokenize(
            [replace(e, question=q) for e, q in zip(examples, questions, strict=True)], self.tokenizer, None
        )[1]

    def verdicts(self, examples: Sequence[Example], rollouts: Rollouts) -> np.ndarray:
        """Verify the rows, which answer ``examples`` [B]; returns reward, correct and error (0 or 1) [B, 3]."""
        return self.judged(examples, rollouts).table[:, :3]

    def judged(self, examples: Sequence[Example], rollouts: Rollouts) -> Judged:
        """Verify the rows, which answer ``examples`` [B]. Each process verifies its own rows; every process gets all
        results.

        Raises:
          NoVerdict: not one row could be verified, or one of the rewards failed on all of them.
        """
        rows = own_rows(rollouts.tokens)
        said = Rollouts(tokens=rollouts.tokens, mask=rollouts.mask)
        own = jax.tree.map(lambda x: take_rows(x, rows), said)
        scores = self.task.score([examples[i] for i in rows], self.texts(own)) if len(rows) else []
        said = [(s.reward, s.correct, s.error is not None, s.abstained) for s in scores]
        said = np.array(said, np.float64).reshape(-1, 4)
        parts = [[s.parts.get(name) for name in self.rewards] for s in scores]
        failed = np.array([[isinstance(p, str) for p in row] for row in parts], np.float64)
        parts = np.array([[p if isinstance(p, float) else np.nan for p in row] for row in parts], np.float64)
        shape, total = (len(scores), len(self.rewards)), rollouts.rows
        table, parts, failed = (from_rows(x, rows, total) for x in (said, parts.reshape(shape), failed.reshape(shape)))
        self._tell(scores, table, failed)
        return Judged(table, np.nan_to_num(parts), np.isfinite(parts), rows, scores)

    def _tell(self, scores: Sequence[Score], table: np.ndarray, failed: np.ndarray) -> None:
        """Tell the errors of the rewards, and stop if nothing works."""
        if not self.rewards:
            what = f"the verifier of {getattr(self.task, 'name', 'the task')}"
            self.failures.tell(what, [s.error for s in scores])
            self.failures.check_any(what, int(table[:, 2].sum()), len(table))
        for name, column in zip(self.rewards, failed.T, strict=True):
            parts = [s.parts.get(name) for s in scores]
            self.failures.tell(f"reward {name!r}", [p if isinstance(p, str) else None for p in parts])
            self.failures.check_any(f"reward {name!r}", int(column.sum()), len(column))

    def answers(self, column: Rollouts, prompts: np.ndarray) -> np.ndarray:
        """The texts [n, K] of the answers to the prompts with these indices in a generated batch (NumPy)."""
        k = column.shared_prompt
        rows = (prompts[:, None] * k + np.arange(k)).reshape(-1)
        texts = self.texts(Rollouts(tokens=column.tokens[rows], mask=column.mask[rows]))
        return np.array(texts, object).reshape(len(prompts), k)

    def compare(
        self, opinion: Opinion, examples: Sequence[Example], *columns: Rollouts, whole: bool = False
    ) -> Verdict:
        """Ask a judge about the answers of several generated batches to the same prompts, side by side.

        Args:
          opinion: the judge's ``(examples [G], answers [G][K]) -> Verdict``; NaN scores of a prompt on which it fails.
          whole: every process gives the judge all answers, for a judge that computes on the mesh. Otherwise each
            process decodes and judges its share of the prompts, and every process gets the whole verdict.

        Raises:
          NoVerdict: the judge failed on all prompts.
        """
        columns = tuple(to_host(column) for column in columns)
        at = columns[0].prompt[:: columns[0].shared_prompt]
        own = np.arange(len(at)) if whole else own_rows(at)
        answers = np.concatenate([self.answers(column, own) for column in columns], 1)
        k = answers.shape[1]
        said = Verdict(np.zeros((0, k)), np.zeros((0, k, k)))
        if len(own):
            said = opinion([examples[i] for i in at[own]], answers.tolist())
        self.failures.tell("the judge", said.errors)
        parts = said.scores, said.wins, said.preference
        scores, wins, odds = parts if whole else (from_rows(x, own, len(at)) for x in parts)
        failed = np.isnan(scores).all(-1)
        self.failures.check_any("the judge", int(failed.sum()), len(failed))
        if not failed.any():
            return Verdict(scores, wins, log_odds=odds)
        scores = np.where(failed[:, None], scores[~failed].mean(), scores)  # neither better nor worse than the others
        own_errors = dict(zip(own.tolist(), said.errors, strict=False))
        errors = [own_errors.get(i, "another process shows it") if f else None for i, f in enumerate(failed)]
        return Verdict(scores, wins, errors, odds)

    def demonstrations(self, indices: np.ndarray, drop_last: float = 0.0, seed: int = 0) -> Rollouts:
        """The task's own answers to training prompts, each with its end (`jaxpo.text.tokenizers.Tokenizer.turn`).

        A share ``drop_last`` of them lose their last character.

        Raises:
          ValueError: the task has no answers, one has no encoding or is refused by the chat template, or one is longer
            than ``width``.
        """
        if self.task.demonstrate is None:
            raise ValueError(f"config.task.name: {self.task.name} has no answers to demonstrate")
        demonstrate, prompts = self.task.demonstrate, self.train
        if drop_last:
            demonstrate = imperfect(demonstrate, drop_last, seed)

        def shown(example: Example) -> Turn:
            return named(example, "demonstration", lambda: self.tokenizer.turn(example.question, demonstrate(example)))

        answers = [shown(prompts.examples[i]).answer for i in indices]
        longest = max(map(len, answers))
        if longest > self.width:
            raise ValueError(
                f"config.sampling.max_new_tokens {self.width} is too short for demonstrations of {longest} tokens"
            )
        width = prompts.tokens.shape[1]
        questions = [prompts.tokens[i, width - prompts.length[i] :].tolist() for i in indices]
        sizes = dict(prompt_width=width, width=self.width, pad_id=self.tokenizer.pad_id)
        return Demonstrations(questions, answers, **sizes)


def as_told(tokenizer: Tokenizer, example: Example, answer: Said) -> Turn:
    """A question and any answer that a policy may have written, as tokens.

    A text that the chat template cannot show follows the prompt as it is.

    Raises:
      ValueError: the question, or an answer that is a message, has no encoding or is refused by the chat template.
    """

    def told() -> Turn:
        try:
            return tokenizer.turn(example.question, answer)
        except ValueError:
            if not isinstance(answer, str):
                raise
            text = answer.replace(MARK, "\ufffd")
            prompt = tokenizer.encode(tokenizer.render(example.question))
            return Turn(prompt, [*tokenizer.encode(text), tokenizer.eos_ids[0]], text)

    return named(example, "a judge reads it", told)


def texts_of(task: Task) -> list[str]:
    """Every text of a task: questions, answers, and demonstrations, which may hold more than the answer."""
    examples = [*task.train, *task.test]
    answers = [e.answer for e in examples if e.answer is not None]
    answers += [task.demonstrate(e) for e in examples] if task.demonstrate else []
    return [*(plain_text(e.question) for e in examples), *map(plain_answer, answers)]


def named(example: Example, what: str, f: Callable[[], Any]) -> Any:
    """What ``f`` returns; its ``ValueError`` names the example's place."""
    try:
        return f()
    except ValueError as error:
        raise ValueError(f"{example.where or f'example {example.index}'}: {what}: {error}") from error


def tokenize(
    examples: Sequence[Example], tokenizer: Tokenizer, width: int | None
) -> tuple[list[Example], list[list[int]]]:
    """Encode prompts; return the examples whose prompt has at most ``width`` tokens (None = any), and these prompts.

    Raises:
      ValueError: a question has no encoding, or the chat template refuses it; the line names the example's place.
    """
    ids = [named(e, "question", lambda e=e: tokenizer.encode(tokenizer.render(e.question))) for e in examples]
    kept = [i for i, x in enumerate(ids) if width is None or len(x) <= width]
    return [examples[i] for i in kept], [ids[i] for i in kept]


def pad_prompts(examples: Sequence[Example], ids: Sequence[Sequence[int]], width: int, pad_id: int) -> Prompts:
    """Pad prompts on the left to ``width``."""
    tokens = np.full((len(ids), width), pad_id, np.int32)
    for row, x in zip(tokens, ids, strict=True):
        row[width - len(x) :] = x
    return Prompts(examples, tokens, np.array([len(x) for x in ids], np.int32))
