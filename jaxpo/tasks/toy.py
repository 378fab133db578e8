"""A task small enough to live inside jit: write the digits of the prompt in reverse, then stop.

Prompts, targets and rewards are jax arrays, so whole training runs can be scanned and vmapped; ``toy`` offers the same
task to the ordinary loop, with the same rewards.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxpo.arguments import Whole, check_record
from jaxpo.registry import register
from jaxpo.tasks.base import Example, Score, Task, split, verdict
from jaxpo.text.tokenizers import Base, IntegerTokenizer


@dataclass(frozen=True)
class ReverseDigits:
    """Prompts of ``digits`` digits and a separator (P = digits + 1); token ids are those of ``IntegerTokenizer(base)``.

    Attributes:
      digits: digits a prompt.
      base: digits are in [0, base).
      partial_credit: the reward is the share of right positions; otherwise it is 1 if all are right and 0 if not.
    """

    digits: Whole = 3
    base: Base = 10
    partial_credit: bool = False

    def __post_init__(self):
        check_record(self)

    @property
    def tokenizer(self) -> IntegerTokenizer:
        return IntegerTokenizer(self.base)

    def prompts(self, key: jax.Array, n: int) -> jax.Array:
        """``n`` random prompts [n, P], int32."""
        digits = jax.random.randint(key, (n, self.digits), 2, 2 + self.base, jnp.int32)
        return jnp.concatenate([digits, jnp.ones((n, 1), jnp.int32)], axis=1)

    def targets(self, prompt_tokens: jax.Array) -> jax.Array:
        """The right completions [B, digits + 1], with the end of sequence. Prompts may be padded on the left."""
        answer = prompt_tokens[:, -2 : -2 - self.digits : -1]
        return jnp.pad(answer, ((0, 0), (0, 1)))  # the end of sequence is token 0

    def reward(self, prompt_tokens: jax.Array, completion: jax.Array, mask: jax.Array) -> jax.Array:
        """The reward [B], float32, of completions.

        Args:
          prompt_tokens: [B, P] int; if P is larger than digits + 1, the rest is padding on the left.
          completion: [B, T] int; only the sampled tokens before the end of sequence are read.
          mask: [B, T]; 1 on tokens that were sampled.

        Raises:
          ValueError: T leaves no room for the answer and the end of sequence.
        """
        if completion.shape[1] < self.digits + 1:
            raise ValueError(f"{completion.shape[1]} completion tokens cannot hold {self.digits} digits and the end")
        written = (mask > 0) & (completion != 0)
        answer = self.targets(prompt_tokens)[:, :-1]
        right = jnp.sum(written[:, : self.digits] & (completion[:, : self.digits] == answer), axis=1)
        # Longer text lowers the share, so padding earns nothing.
        share = right / jnp.maximum(self.digits, jnp.sum(written, axis=1))
        return (share if self.partial_credit else share == 1).astype(jnp.float32)

    def score(self, question: str, text: str) -> float:
        """The same reward, computed from texts on the host."""
        right = sum(a == b for a, b in zip(question[::-1], text, strict=False))
        share = right / max(self.digits, len(text))
        return share if self.partial_credit else float(share == 1)


@register("task")
def toy(
    train_size: Whole, test_size: Whole, seed: int, digits: Whole = 3, base: Base = 10, partial_credit: bool = False
) -> Task:
    """``ReverseDigits`` as a task for the ordinary loop; its tokenizer is ``IntegerTokenizer(base)``.

    Questions are strings of digits, answers the reversed strings. Test questions are distinct; training items are drawn
    with replacement and those that occur in the test set are removed, so ``train`` may be shorter than ``train_size``.

    Raises:
      ValueError: sizes that are not positive, too many digits, or a test set that takes every prompt.
    """
    game = ReverseDigits(digits, base, partial_credit)
    if base**digits > sys.maxsize:
        raise ValueError(f"digits={digits} of base {base} give more prompts than can be numbered")
    if test_size >= base**digits:
        raise ValueError(f"test_size={test_size} leaves nothing to train on: {base**digits} different prompts exist")
    rng, prompts = random.Random(seed), range(base**digits)
    held_out, drawn = rng.sample(prompts, test_size), rng.choices(prompts, k=train_size)

    def examples(numbers: Sequence[int]) -> list[Example]:
        texts = [game.tokenizer.decode([2 + n // base**place % base for place in range(digits)]) for n in numbers]
        return [Example(i, text, text[::-1], {}) for i, text in enumerate(texts)]

    train, test, report = split(examples(drawn), examples(held_out))

    def score(examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        pairs = zip(examples, texts, strict=True)
        return [verdict(game.score(e.question, text), None, partial_credit) for e, text in pairs]

    return Task("toy", train, test, score, lambda example: example.answer, report)
