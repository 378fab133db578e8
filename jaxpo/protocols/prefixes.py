"""Prefixes that the policy continues; chains, trees, hints, repair, windows and turns are built on them."""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from jax import Array

from jaxpo.batch import Rollouts
from jaxpo.learning.state import Run
from jaxpo.protocols.gatherer import Gatherer


@dataclass(frozen=True)
class Prefixes:
    """n prompts with prefixes of their completions (NumPy).

    question: [n] index of the prompt in its data set.
    prompt: [n, P] tokens of the prompt, left-padded.
    prompt_length: [n] number of prompt tokens.
    tokens: [n, T]; the first ``stop`` are the prefix.
    stop: [n] length of the prefix.
    mask: [n, T] 1 on tokens of the prefix that the policy sampled, 0 on given ones and beyond ``stop``.
    logp_beh: [n, T] log-probs of the sampled tokens, as the sampler recorded them.
    """

    question: np.ndarray
    prompt: np.ndarray
    prompt_length: np.ndarray
    tokens: np.ndarray
    stop: np.ndarray
    mask: np.ndarray
    logp_beh: np.ndarray

    @classmethod
    def of_prompts(cls, gather: Gatherer, indices: np.ndarray, responses: int = 1) -> "Prefixes":
        """Empty prefixes for ``responses`` completions of each training prompt."""
        indices = np.repeat(indices, responses)
        prompt, length = gather.encoded(indices)
        empty = np.zeros((len(indices), gather.width), np.float32)
        zero = np.zeros(len(indices), np.int32)
        return cls(indices, prompt, length, empty.astype(np.int32), zero, empty, empty)

    @classmethod
    def of_rollouts(cls, batch: Rollouts, rows: np.ndarray, stop: np.ndarray) -> "Prefixes":
        """The first ``stop`` [n] tokens of the completions in these ``rows`` [n] of a NumPy batch."""
        within = np.arange(batch.width) < stop[:, None]
        logp = np.zeros((len(rows), batch.width), np.float32)
        if batch.logp_beh is not None:
            logp = np.where(within, np.asarray(batch.logp_beh)[rows], 0).astype(np.float32)
        mask = np.where(within, np.asarray(batch.mask)[rows], 0).astype(np.float32)
        prompt = batch.tokens[rows, : batch.prompt_width]
        known = batch.prompt[rows], prompt, batch.prompt_length[rows], batch.completions[rows]
        return cls(*known, stop, mask, logp)

    def __len__(self) -> int:
        return len(self.question)

    @cached_property
    def width(self) -> int:
        """T, the most tokens of a completion."""
        return self.tokens.shape[1]

    def take(self, rows: np.ndarray) -> "Prefixes":
        """The prefixes in these rows."""
        return Prefixes(*[getattr(self, f.name)[rows] for f in fields(self)])

    def joined(self, width: int, stop: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Join each prompt and the first ``stop`` tokens of its prefix to a left-padded prompt [n, width], and give its
        length [n] too."""
        return joined(self.prompt, self.prompt_length, self.tokens, self.stop if stop is None else stop, width)

    def go_on(
        self, run: Run, gather: Gatherer, budget: np.ndarray, key: Array, responses: int = 1
    ) -> tuple["Prefixes", Rollouts]:
        """Let the current policy continue each prefix by at most ``budget`` [n] tokens.

        Returns:
          the longer prefixes, ``responses`` of each (consecutive rows), and the rollouts that hold the added tokens.
        """
        prompts, length = self.joined(self.prompt.shape[1] + gather.width)
        out = gather.complete(run.state.params, prompts, length, budget, key, gather.sampling(run), responses)
        longer = self.take(np.repeat(np.arange(len(self)), responses))
        added = np.asarray(out.mask).sum(1).astype(np.int32)
        logp = np.zeros(out.mask.shape, np.float32) if out.logp_beh is None else np.asarray(out.logp_beh)
        return longer._extended(np.asarray(out.completions), added, 1.0, logp), out

    def append(self, tokens: np.ndarray, length: np.ndarray) -> "Prefixes":
        """Append given tokens [n, W] to the prefixes, the first ``length`` [n] of each; their mask is 0.

        Raises:
          ValueError: a prefix would be longer than T.
        """
        if (self.stop + length > self.width).any():
            row = int(np.argmax(self.stop + length))
            raise ValueError(
                f"row {row}: {self.stop[row]} tokens and {length[row]} more do not fit into completions of {self.width}"
            )
        return self._extended(tokens, length.astype(np.int32), 0.0, np.zeros(tokens.shape, np.float32))

    def _extended(self, tokens: np.ndarray, added: np.ndarray, mask: float, logp: np.ndarray) -> "Prefixes":
        place = np.arange(self.width) - self.stop[:, None]
        new = (place >= 0) & (place < added[:, None])
        at = np.clip(place, 0, tokens.shape[1] - 1)
        return replace(
            self,
            tokens=np.where(new, np.take_along_axis(tokens, at, 1), self.tokens),
            stop=self.stop + added,
            mask=np.where(new, np.float32(mask), self.mask),
            logp_beh=np.where(new, np.take_along_axis(logp, at, 1), self.logp_beh),
        )

    def rewards(self, gather: Gatherer) -> np.ndarray:
        """[n] rewards of the prefixes, as if they were whole completions."""
        whole = (np.arange(self.width) < self.stop[:, None]).astype(np.float32)
        return np.asarray(gather.reward(self.rollouts().replace(mask=whole)).reward, np.float64)

    def rollouts(self, **more: Array) -> Rollouts:
        """The prefixes as rows of a batch: ``mask`` is 1 on sampled tokens only.

        Args:
          more: further fields of the batch, by name.
        """
        return Rollouts(
            tokens=np.concatenate([self.prompt, self.tokens], 1),
            mask=self.mask,
            prompt_length=self.prompt_length,
            prompt=self.question.astype(np.int32),
            logp_beh=self.logp_beh,
            **more,
        )


def joined(
    prompt: np.ndarray, prompt_length: np.ndarray, path: np.ndarray, path_length: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Join left-padded prompts [n, P] and the first tokens of paths [n, T] to one left-padded prompt [n, width], and
    give its length [n] too."""
    p, length = prompt.shape[1], prompt_length + path_length
    place = np.arange(width) - (width - length)[:, None]  # in the joined prompt; negative = padding
    source = p - prompt_length[:, None] + place
    tokens = np.take_along_axis(np.concatenate([prompt, path], 1), np.clip(source, 0, p + path.shape[1] - 1), 1)
    return np.where(place >= 0, tokens, 0).astype(np.int32), length.astype(np.int32)
