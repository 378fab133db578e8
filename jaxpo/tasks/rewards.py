r"""Reward functions ``(completion, answer) -> float in [0, 1]``, for direct use or chosen by name.

Each function first takes the answer out of the completion (``extract``):

  text         the whole text, stripped
  last_number  the last number
  boxed        the last ``\boxed{...}``
  answer_tag   the last ``<answer>...</answer>``

A completion without such an answer is wrong (0). An exception means that the pair could not be judged.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
import re
from collections.abc import Callable
from fractions import Fraction

from jaxpo.arguments import NonNegative
from jaxpo.registry import entry, make, names, register, unknown
from jaxpo.tasks.base import locate

Reward = Callable[[str, str], float]

_NUMBER = re.compile(
    r"(?<![\d.])[-+]?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+|(?=\.\d))(?:\.\d+)?"  # -1,234.5
    r"(?:[eE][-+]?\d{1,3}(?!\d))?(?:/\d+)?"
)  # e-3, /4
_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def last_number(text: str) -> str | None:
    """The last number in a text: ``-3``, ``1,000``, ``.5``, ``2e-3`` or ``3/4``; ``None`` if there is none."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def boxed(text: str) -> str | None:
    r"""The content of the last closed ``\boxed{...}``, braces inside it matched; ``None`` if there is none."""
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end].strip()
    return None


def answer_tag(text: str) -> str | None:
    """The content of the last ``<answer>...</answer>``; ``None`` if there is none."""
    found = _ANSWER_TAG.findall(text)
    return found[-1].strip() if found else None


EXTRACT: dict[str, Callable[[str], str | None]] = {
    "text": str.strip,
    "last_number": last_number,
    "boxed": boxed,
    "answer_tag": answer_tag,
}
_PRESENT = {"text": "{}", "last_number": "{}", "boxed": r"\boxed{{{}}}", "answer_tag": "<answer>{}</answer>"}


def extract_answer(completion: str, how: str) -> str | None:
    """The answer in a completion, or ``None``; ``how`` is one of ``EXTRACT``."""
    if how not in EXTRACT:
        raise ValueError(unknown("extract", how, EXTRACT))
    return EXTRACT[how](completion)


def present(answer: str, how: str) -> str:
    """Write ``answer`` as a completion from which ``extract_answer`` takes it, for demonstrations."""
    return _PRESENT[how].format(answer)


def exact(completion: str, answer: str, *, extract: str = "text", ignore_case: bool = False) -> float:
    """1 if the extracted text equals the answer, apart from white space at both ends."""
    found = extract_answer(completion, extract)
    if found is None:
        return 0.0
    fold = str.casefold if ignore_case else str
    return float(fold(found.strip()) == fold(answer.strip()))


def numeric(completion: str, answer: str, *, extract: str = "last_number", tolerance: NonNegative = 0.0) -> float:
    """1 if the last number of the extracted text differs from the last number of the answer by at most ``tolerance``.

    Numbers are compared exactly (1/2 is 0.5, and neighbors beyond 2**53 stay apart). Raises ``ValueError`` for an
    answer without a number.
    """
    expected = _check_number(answer)
    found = extract_answer(completion, extract)
    value = None if found is None else _number(found)
    return float(value is not None and abs(value - expected) <= tolerance)


def regex(completion: str, answer: str, *, pattern: str | None = None, extract: str = "text") -> float:
    """1 if the last match of ``pattern`` in the extracted text (its first group, if it has one) is the answer.

    Without ``pattern`` the answer itself is the pattern, and must match the whole extracted text.
    """
    found = extract_answer(completion, extract)
    if found is None:
        return 0.0
    if pattern is None:
        return float(re.fullmatch(answer, found) is not None)
    matches = list(re.finditer(pattern, found))
    if not matches:
        return 0.0
    last = matches[-1].group(1) if matches[-1].re.groups else matches[-1].group()
    return float(last is not None and last.strip() == answer.strip())


def mathematical(completion: str, answer: str, *, extract: str = "text") -> float:
    r"""1 if math-verify finds the completion's expression equal to the answer's; needs the extra ``[math]``.

    With ``extract="text"`` math-verify looks for the expression in the completion by its own rules, and the last
    one is lenient (``12\pi`` without ``$`` reads as 12). Prefer ``boxed`` if the model can be told to box.

    It can hang: tasks run it in worker processes, so its own time-outs, which work in a main thread only, are off.

    Raises:
      ValueError: nothing in the answer can be read as mathematics.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
    read = functools.partial(parse, parsing_timeout=None, raise_on_error=True)
    found = extract_answer(completion, extract)
    if found is None:
        return 0.0
    if found == answer.strip():
        return 1.0
    gold = read(_delimited(answer))
    if not gold:
        raise ValueError(f"the answer {answer!r} cannot be read as mathematics")
    # The answer goes first: verify is not symmetric.
    target = read(found if extract == "text" else _delimited(found))
    return float(verify(gold, target, timeout_seconds=None, raise_on_error=True))


def _delimited(expression: str) -> str:
    """Put bare LaTeX between dollar signs: without them math-verify reads ``12\\pi`` as 12 and ``x^2+1`` as nothing."""
    return expression if re.search(r"\$|\\boxed|\\\(|\\\[", expression) else f"${expression.strip()}$"


def _number(text: str) -> Fraction | None:
    found = last_number(text)
    if found is None or len(found) > 1000:  # int() refuses longer ones
        return None
    numerator, _, denominator = found.replace(",", "").partition("/")
    if denominator and not int(denominator):
        return None
    return Fraction(numerator) / int(denominator or 1)


def _check_number(answer: str) -> Fraction:
    value = _number(answer)
    if value is None:
        raise ValueError(f"the answer {answer!r} contains no number")
    return value


def _with_options(reward: Callable[..., float]) -> Callable[..., Reward]:
    """A factory that takes a reward's options (its keyword-only parameters) and returns the reward."""

    @functools.wraps(reward)
    def factory(**options: object) -> Reward:
        return functools.partial(reward, **options) if options else reward

    parameters = inspect.signature(reward).parameters.values()
    factory.__signature__ = inspect.Signature([p for p in parameters if p.kind is p.KEYWORD_ONLY])
    del factory.__wrapped__
    return factory


for _name, _reward in {"exact": exact, "numeric": numeric, "regex": regex, "math": mathematical}.items():
    register("verifier", id=_name)(_with_options(_reward))
MAY_HANG = frozenset({"regex", "math"})  # backtracking, symbolic algebra: run in worker processes with a time limit


def make_reward(reward: str | Reward, **options: object) -> Reward:
    """The reward function of a registered name, a ``"module:function"`` or a function, with its options filled in.

    Raises:
      ValueError: unknown name, option or ``extract`` (with the nearest), or a pattern that is not a regular expression.
      ImportError: ``math`` without math-verify.
    """
    if reward == "math" and importlib.util.find_spec("math_verify") is None:
        raise ImportError("reward 'math' needs math-verify: pip install 'jaxpo[math]'")
    for name in options:
        if name not in option_names(reward):
            raise ValueError(unknown(f"option of reward {reward!r}", name, option_names(reward)))
    if isinstance(reward, str) and ":" not in reward:
        extract_answer("", options.get("extract", "text"))
        _compiles(options.get("pattern") or "", "pattern")
        return make(reward, "verifier", **options)
    function = locate(reward) if isinstance(reward, str) else reward
    return functools.partial(function, **options) if options else function


def preparation(reward: str | Reward) -> Callable[[], object] | None:
    """What a worker process must import before the first verdict, so that the import does not count as a slow item."""
    return functools.partial(importlib.import_module, "math_verify") if reward == "math" else None


def option_names(reward: str | Reward) -> list[str]:
    """The options of a reward: its keyword-only parameters. Raises ``ValueError`` for an unknown name."""
    if isinstance(reward, str) and ":" not in reward:
        if reward not in names("verifier"):
            raise ValueError(unknown("reward", reward, names("verifier")))
        return list(entry(reward, "verifier").parameters)
    function = locate(reward) if isinstance(reward, str) else reward
    return [n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]


def check_answer(reward: str | Reward, answer: str, **options: object) -> None:
    """Raise ``ValueError`` if the reward can never judge against this answer. Cheap enough for whole data files."""
    if reward == "numeric":
        _check_number(answer)
    if reward == "regex" and options.get("pattern") is None:
        _compiles(answer, "the answer")


def _compiles(pattern: str, what: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} {pattern!r} is not a regular expression: {error}") from error
