r"""Reward functions ``(completion, answer) -> float``, for direct use or chosen by name.

``exact``, ``numeric``, ``regex`` and ``math`` say whether the answer is right: 1 or 0. They first take it out of the
completion (``extract``):

  text         the whole text, stripped
  last_number  the last number
  boxed        the last ``\boxed{...}``
  answer_tag   the last ``<answer>...</answer>``

A completion without such an answer is wrong (0). An exception means that the pair could not be judged.

``format`` and ``length`` look at the form of a completion, and are meant to be added to one of these with a weight.
``relevance`` compares embeddings of the completion and of the question or the answer.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

from jaxpo.arguments import NonNegative, Whole
from jaxpo.registry import entry, make, names, register, unknown
from jaxpo.tasks.numbers import Locale, Number, ends_in_a_number, last_number, read_number
from jaxpo.tasks.relevance import relevance
from jaxpo.tasks.user_functions import locate, signature_of

Reward = Callable[..., Any]

_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


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


def numeric(
    completion: str,
    answer: str,
    *,
    extract: str = "last_number",
    tolerance: NonNegative = 0.0,
    locale: Locale = "en",
    percent: Literal["either", "share", "number"] = "either",
) -> float:
    """1 if the last number of the extracted text differs from the last number of the answer by at most ``tolerance``.

    Numbers are read as they are typeset (`jaxpo.tasks.numbers` has the forms, and what is ambiguous) and compared
    exactly: 1/2 is 0.5, and neighbors beyond 2**53 stay apart. Raises ``ValueError`` for an answer without a number.

    Args:
      locale: which separators numbers have, in completions and answers: "en", "de", "fr", "ch" or "in".
      percent: what 50% is: "share" = 0.5, "number" = 50; "either" = whichever of the two the other side, without a
        percent sign, has.
    """
    expected = _check_number(answer, locale)
    found = completion if extract == "last_number" else extract_answer(completion, extract)
    value = None if found is None else read_number(found, locale)
    if value is None:
        return 0.0
    return float(any(abs(a - b) <= tolerance for a, b in _comparable(value, expected, percent)))


def _comparable(a: Number, b: Number, percent: str) -> list[tuple[Fraction, Fraction]]:
    """The pairs of values that two numbers may be compared by."""
    shares = tuple(n.value / 100 if n.percent else n.value for n in (a, b))
    if percent == "either":
        return [shares, (a.value, b.value)] if a.percent != b.percent else [(a.value, b.value)]
    return [shares if percent == "share" else (a.value, b.value)]


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


def _check_number(answer: str, locale: Locale = "en") -> Number:
    value = read_number(answer, locale)
    if value is None:
        raise ValueError(f"the answer {answer!r} contains no number")
    return value


def formatted(
    completion: str, *, tags: tuple[str, ...] = ("think", "answer"), opened: bool = False, pattern: str | None = None
) -> float:
    """1 if the completion has the asked form, and 0 otherwise.

    Args:
      tags: it consists of these elements in this order, ``<think>...</think> <answer>...</answer>``, each once, with
        nothing but white space around and between them.
      opened: the prompt has opened the first element already, so that the completion begins inside it.
      pattern: a regular expression that the whole completion must match, white space at both ends apart, instead of
        ``tags``; a dot matches line ends too.
    """
    text = completion.strip()
    if pattern is not None:
        return float(re.fullmatch(pattern, text, re.DOTALL) is not None)
    rest = f"<{tags[0]}>{text}" if opened else text
    for tag in tags:
        start, end = f"<{tag}>", f"</{tag}>"
        if not rest.startswith(start) or text.count(start) != (not opened or tag != tags[0]) or text.count(end) != 1:
            return 0.0
        rest = rest.partition(end)[2].lstrip()
    return float(not rest)


def length(
    completion: str,
    completion_ids: Sequence[int] = (),
    *,
    unit: Literal["tokens", "words", "characters"] = "tokens",
    target: Whole | None = None,
    most: Whole | None = None,
    within: Whole = 100,
) -> float:
    """How well the completion has the asked length; give either ``target`` or ``most``.

    Args:
      unit: what is counted: tokens (with the one that ends the completion), words or characters.
      target: 1 at this length, falling to 0 at ``within`` from it on either side.
      most: 0 up to ``most - within``, falling to -1 at ``most`` and beyond it (the soft cap of DAPO).
      within: the width of the slope.
    """
    counts = {"tokens": len(completion_ids), "characters": len(completion)}
    n = counts[unit] if unit in counts else len(completion.split())
    if target is not None:
        return max(0.0, 1 - abs(n - target) / within)
    return -min(1.0, max(0.0, (n - (most - within)) / within))


def _check_form(name: str, options: Mapping[str, Any]) -> None:
    """Check what the options of some rewards must be together; ``ValueError`` names them."""
    if name == "length" and (options.get("target") is None) == (options.get("most") is None):
        raise ValueError("reward 'length' needs either target (the asked length) or most (the longest length)")
    if name == "length" and (options.get("most") or math.inf) < options.get("within", 100):
        raise ValueError(f"reward 'length': most={options['most']} is less than within={options.get('within', 100)}")
    if name == "relevance":
        if options.get("embed") is None:
            raise ValueError("reward 'relevance' needs embed, a function \"module:function\" of texts [n]")
        locate(options["embed"], "embed of reward 'relevance'")
    if name == "format":
        tags = options.get("tags", ("think", "answer"))
        if options.get("pattern") is not None and (options.get("opened") or tuple(tags) != ("think", "answer")):
            raise ValueError("reward 'format': tags and opened have no effect with pattern")
        if isinstance(tags, str) or not tags or len({*tags}) < len(tags) or not all(isinstance(t, str) for t in tags):
            raise ValueError(f"reward 'format': tags must be different names of elements, not {tags!r}")


def _with_options(reward: Callable[..., float]) -> Callable[..., Reward]:
    """A factory that takes a reward's options (its keyword-only parameters) and returns the reward."""

    @functools.wraps(reward)
    def factory(**options: object) -> Reward:
        return functools.partial(reward, **options) if options else reward

    parameters = inspect.signature(reward).parameters.values()
    factory.__signature__ = inspect.Signature([p for p in parameters if p.kind is p.KEYWORD_ONLY])
    del factory.__wrapped__
    return factory


BUILT_IN = {
    "exact": exact,
    "numeric": numeric,
    "regex": regex,
    "math": mathematical,
    "format": formatted,
    "length": length,
    "relevance": relevance,
}
for _name, _reward in BUILT_IN.items():
    register("verifier", id=_name)(_with_options(_reward))


def make_reward(reward: str | Reward, *, field: str = "reward", **options: Any) -> Reward:
    """The reward function of a registered name, a ``"module:function"`` or a function, with its options filled in.

    Args:
      reward: names it, or is it.
      field: what messages call it, such as ``config.task.reward``.
      options: of the reward (`option_names`).

    Raises:
      ValueError: unknown name, option or ``extract`` (with the nearest), a function that cannot be loaded, or a pattern
        that is not a regular expression.
      ImportError: ``math`` without math-verify.
    """
    if reward == "math" and importlib.util.find_spec("math_verify") is None:
        raise ImportError("reward 'math' needs math-verify: pip install 'jaxpo[math]'")
    for name in options:
        if name not in option_names(reward, field):
            raise ValueError(unknown(f"option of reward {reward!r}", name, option_names(reward, field)))
    if is_registered(reward):
        extract_answer("", options.get("extract", "text"))
        _compiles(options.get("pattern") or "", "pattern")
        _check_form(reward, options)
        return make(reward, "verifier", **options)
    function = locate(reward, field) if isinstance(reward, str) else reward
    return functools.partial(function, **options) if options else function


def is_registered(reward: str | Reward) -> bool:
    """Whether a reward is chosen by a registered name, and not a function of the user."""
    return isinstance(reward, str) and ":" not in reward


def may_hang(reward: str | Reward, function: Callable) -> bool:
    """Whether a reward runs in worker processes with a time limit: one that backtracks, does symbolic algebra, or is
    (or asks) the user's own."""
    pattern = getattr(function, "keywords", {}).get("pattern")
    slow = ("regex", "math", "relevance")
    return not is_registered(reward) or reward in slow or (reward == "format" and pattern is not None)


def preparation(reward: str | Reward) -> Callable[[], object] | None:
    """What a worker process must import before the first verdict, so that the import does not count as a slow item."""
    return functools.partial(importlib.import_module, "math_verify") if reward == "math" else None


def options_of(reward: str | Reward, field: str = "reward") -> Mapping[str, inspect.Parameter]:
    """The options of a reward: its keyword-only parameters, and what else has a default.

    Raises:
      ValueError: an unknown name (with the nearest), or a function that cannot be loaded.
    """
    if is_registered(reward):
        if reward not in names("verifier"):
            raise ValueError(unknown(f"reward ({field})" if field != "reward" else field, reward, names("verifier")))
        return entry(reward, "verifier").parameters
    signature = signature_of(locate(reward, field) if isinstance(reward, str) else reward)
    kept = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = signature.parameters.items() if signature else ()
    return {n: p for n, p in found if p.kind is kept[0] or (p.kind is kept[1] and p.default is not p.empty)}


def option_names(reward: str | Reward, field: str = "reward") -> list[str]:
    """The names of `options_of`."""
    return list(options_of(reward, field))


def check_answer(reward: str | Reward, answer: str, **options: object) -> None:
    """Raise ``ValueError`` if the reward can never judge against this answer. Cheap enough for whole data files."""
    if reward == "numeric" and not ends_in_a_number(answer):
        _check_number(answer, options.get("locale", "en"))
    if reward == "regex" and options.get("pattern") is None:
        _compiles(answer, "the answer")


def _compiles(pattern: str, what: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} {pattern!r} is not a regular expression: {error}") from error
