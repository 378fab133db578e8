"""Rules for arguments, with one message each: what a number must be, which names exist, when an option has an effect.

A factory states the domain of each hyperparameter in its annotation, and in ``when`` the setting in which an option has
an effect; `jaxpo.registry.register` checks both whenever the factory is called::

    @register(source="...", when={"adv_eps": when(scale=("group", "batch"))})
    def grpo(eps: Positive = 0.2, scale: Literal["group", "batch", "none"] = "group", adv_eps: NonNegative = 1e-6):
        ...

Elsewhere `check_record` checks the fields of a record by their annotations, and `check` one value.

Arrays pass, traced or not: a hyperparameter may be an argument of a compiled function. This module imports nothing of
jaxpo, and no jax.
"""

import collections.abc
import functools
import inspect
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple


def beyond(value: numbers.Real) -> bool:
    """Whether a whole number is too large for a float: a number of 400 digits is a slip, wherever it is given."""
    try:
        float(value)
    except OverflowError:
        return True
    return False


class Domain(NamedTuple):
    """The numbers that an argument may be.

    low, high: the ends.
    ends: "[]", "(]", "[)" or "()": which ends belong to it.
    whole: whether it must be an integer.
    infinite: whether an end at infinity belongs to it. NaN never does.
    """

    low: float = -math.inf
    high: float = math.inf
    ends: str = "[]"
    whole: bool = False
    infinite: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or beyond(value) or math.isnan(value):
            return False
        if self.whole and not isinstance(value, numbers.Integral):
            return False
        if math.isinf(value) and not self.infinite:
            return False
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        return above and (value < self.high if self.ends[1] == ")" else value <= self.high)

    @property
    def says(self) -> str:
        """The domain in words."""
        noun = "whole number" if self.whole else "number"
        if self.high < math.inf:
            low, high = (int(x) if self.whole else f"{x:g}" for x in (self.low, self.high))
            return f"a {noun} in {self.ends[0]}{low}, {high}{self.ends[1]}"
        if self.low == -math.inf:
            return f"a {noun}" if self.infinite or self.whole else f"a finite {noun}"
        if self.ends[0] == "(":
            return f"a positive {noun}" if self.low == 0 else f"a {noun} above {self.low:g}"
        return f"a {noun} of at least {self.low:g}"


FINITE = Domain()
Threshold = Annotated[float, Domain(infinite=True)]  # infinite: nothing, or everything, passes it
Positive = Annotated[float, Domain(0, ends="(]")]
PositiveOrInfinite = Annotated[float, Domain(0, ends="(]", infinite=True)]
NonNegative = Annotated[float, Domain(0)]
NonNegativeOrInfinite = Annotated[float, Domain(0, infinite=True)]
Share = Annotated[float, Domain(0, 1)]
OpenShare = Annotated[float, Domain(0, 1, "()")]
PositiveShare = Annotated[float, Domain(0, 1, "(]")]
ShareBelowOne = Annotated[float, Domain(0, 1, "[)")]
AboveOne = Annotated[float, Domain(1, ends="(]", infinite=True)]
Whole = Annotated[int, Domain(1, whole=True)]
Count = Annotated[int, Domain(0, whole=True)]


# ---- checks of one argument ---------------------------------------------------------------------------------------


def is_array(value: object) -> bool:
    """Whether a value is an array, traced or not: it passes every check."""
    return hasattr(value, "dtype") and not isinstance(value, numbers.Number)


def number(name: str, value: Any, domain: Domain = FINITE) -> Any:
    """``value``, if it is in the domain; ``ValueError`` naming it otherwise."""
    if not is_array(value) and value not in domain:
        raise ValueError(f"{name} must be {domain.says}, not {value!r}")
    return value


def positive(name: str, value: Any) -> Any:
    """``value``, if it is a positive number; ``ValueError`` naming it otherwise."""
    return number(name, value, Domain(0, ends="(]"))


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """``value``, if it is one of its ``choices``; ``ValueError`` naming them otherwise."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
    return value


def unused(name: str, value: object, default: object, used: bool, where: str) -> None:
    """Raise ``ValueError`` for an option that was changed where it has no effect; ``where`` says where it has one."""
    if not used and changed(value, default):
        raise ValueError(f"{name} has no effect here; it belongs to {where}")


def changed(value: Any, default: Any) -> bool:
    """Whether an option was given another value than its default; arrays count as its default."""
    return not is_array(value) and value is not default and not (value == default)


# ---- the setting in which an option has an effect -----------------------------------------------------------------


class OtherThan(NamedTuple):
    """Any value but this one."""

    value: Any


def other_than(value: Any) -> OtherThan:
    """The condition "any value but this one", for `when`: ``when(penalty=other_than(0))``."""
    return OtherThan(value)


NONZERO = other_than(0)


class When(NamedTuple):
    """A setting: conditions on other options, all of which must hold.

    conditions: by option: a value, a tuple of values, or `other_than`.
    """

    conditions: Mapping[str, Any]

    def failing(self, given: Mapping[str, Any]) -> list[str]:
        """The options whose conditions do not hold; arrays meet every condition."""
        return [n for n, wanted in self.conditions.items() if not is_array(given[n]) and not _meets(given[n], wanted)]

    def says(self, given: Mapping[str, Any]) -> str:
        """The conditions that do not hold, in words."""
        return " and ".join(_wanted(name, self.conditions[name]) for name in self.failing(given))


def when(**conditions: Any) -> When:
    """The setting in which an option has an effect: ``when(scale=("group", "batch"))``, ``when(beta=NONZERO)``."""
    return When(conditions)


def _meets(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, OtherThan):
        return not (value == wanted.value)
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def _wanted(name: str, wanted: Any) -> str:
    if isinstance(wanted, OtherThan):
        return f"{name} != {wanted.value!r}"
    return f"{name}={' or '.join(map(repr, wanted if isinstance(wanted, tuple) else (wanted,)))}"


def has_effect(setting: When | tuple[When, ...], given: Mapping[str, Any]) -> bool:
    """Whether an option has an effect among the given arguments; one of several settings is enough."""
    return any(not s.failing(given) for s in ((setting,) if isinstance(setting, When) else setting))


def check_effect(
    where: str, name: str, default: Any, setting: When | tuple[When, ...], given: Mapping[str, Any]
) -> None:
    """Raise ``ValueError`` for an option that is not at its default where it has no effect."""
    settings = (setting,) if isinstance(setting, When) else setting
    if has_effect(settings, given) or not changed(given[name], default):
        return
    culprits = dict.fromkeys(culprit for s in settings for culprit in s.failing(given))
    found = " and ".join(f"{c}={'a function' if callable(given[c]) else repr(given[c])}" for c in culprits)
    raise ValueError(
        f"{where}{name} has no effect with {found}; it belongs to {' or '.join(s.says(given) for s in settings)}"
    )


# ---- annotations --------------------------------------------------------------------------------------------------


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def domain_of(annotation: Any) -> Domain | None:
    """The domain of numbers that an annotation (no union) states; None = it is of no number."""
    if typing.get_origin(annotation) is Annotated:
        return next((x for x in annotation.__metadata__ if isinstance(x, Domain)), FINITE)
    return {float: FINITE, int: Domain(whole=True)}.get(annotation)


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The values that the ``Literal`` of an annotation lists; () without one."""
    return tuple(
        value for one in alternatives(annotation) if typing.get_origin(one) is Literal for value in typing.get_args(one)
    )


def plain(annotation: Any) -> Any:
    """The annotation without domains: ``float`` of ``Positive``, ``str`` of a ``Literal`` of strings."""
    members = []
    for one in alternatives(annotation):
        if typing.get_origin(one) is Annotated:
            one = typing.get_args(one)[0]
        elif typing.get_origin(one) is Literal:
            one = type(typing.get_args(one)[0])
        members.append(one)
    return functools.reduce(operator.or_, members) if len(members) > 1 else members[0]


def says(annotation: Any) -> str:
    """What an annotation allows, in words; "" = anything."""
    words = []
    for one in alternatives(annotation):
        if typing.get_origin(one) is Literal:
            words.append(f"one of {', '.join(map(str, typing.get_args(one)))}")
        elif (domain := domain_of(one)) is not None:
            words.append(domain.says)
        elif one in (bool, str, types.NoneType):
            words.append({bool: "True or False", str: "a string", types.NoneType: "None"}[one])
        elif _is_function(one):
            words.append("a function")
        elif typing.get_origin(one) is tuple:
            inner = says(typing.get_args(one)[0])
            words.append(f"a tuple (each {inner})" if inner else "a tuple")
        elif not _is_array_type(one):
            return ""
    return " or ".join(words)


def _is_function(annotation: Any) -> bool:
    return collections.abc.Callable in (annotation, typing.get_origin(annotation))


def _is_array_type(annotation: Any) -> bool:
    return isinstance(annotation, type) and hasattr(annotation, "dtype")


def allows(annotation: Any, value: Any) -> bool:
    """Whether an annotation allows a value; one that says nothing of its domain allows all."""
    return is_array(value) or any(_allows(one, value) for one in alternatives(annotation))


def _allows(annotation: Any, value: Any) -> bool:
    if typing.get_origin(annotation) is Literal:
        return value in typing.get_args(annotation)
    if (domain := domain_of(annotation)) is not None:
        return value in domain
    if annotation in (bool, str, types.NoneType):
        return isinstance(value, annotation)
    if _is_function(annotation):
        return callable(value)
    if typing.get_origin(annotation) is tuple:
        inner = typing.get_args(annotation)[:1]
        return isinstance(value, tuple | list) and all(allows(inner[0], x) for x in value if inner)
    return not _is_array_type(annotation)  # arrays have passed before


def check(name: str, value: Any, annotation: Any) -> Any:
    """``value``, if the annotation (``Share``, ``Whole | None``, ``tuple[Whole, ...]``) allows it.

    Raises:
      ValueError: it does not; the message has the name, what is allowed, and the value."""
    if not allows(annotation, value):
        raise ValueError(f"{name} must be {says(annotation)}, not {value!r}")
    return value


def check_record(record: Any, prefix: str = "") -> None:
    """`check` every field of a dataclass or NamedTuple against its annotation; messages call it ``prefix`` + field."""
    for name, annotation in _fields_of(type(record)).items():
        check(f"{prefix}{name}", getattr(record, name), annotation)


@functools.cache
def _fields_of(record: type) -> Mapping[str, Any]:
    return typing.get_type_hints(record, include_extras=True)


def checked(
    factory: Callable[..., Any],
    name: str,
    *,
    settings: Mapping[str, When | tuple[When, ...]] = types.MappingProxyType({}),
    returns: Callable[[Any], Any] = lambda made: made,
) -> Callable[..., Any]:
    """The factory, which refuses arguments outside their domain and options without effect.

    Its signature has plain types (``float`` for ``Positive``); the domains are in its attribute ``domains``, and the
    settings in ``settings``.

    Args:
      name: of what it makes, for messages.
      settings: where an option has an effect, by option.
      returns: applied to what it makes.

    Raises:
      ValueError: ``settings`` names an option that the factory does not have."""
    signature = inspect.signature(factory)
    domains = _hints(factory, signature)
    for option, setting in settings.items():
        for known in (option, *[n for s in ((setting,) if isinstance(setting, When) else setting) for n in s[0]]):
            if known not in signature.parameters:
                raise ValueError(f"{name}: when names the option {known!r}, which it does not have")

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        for option, annotation in domains.items():
            check(f"{name}: {option}", given[option], annotation)
        for option, setting in settings.items():
            check_effect(f"{name}: ", option, signature.parameters[option].default, setting, given)
        return returns(factory(*args, **kwargs))

    parameters = [p.replace(annotation=plain(domains.get(n, p.annotation))) for n, p in signature.parameters.items()]
    call.__signature__ = signature.replace(parameters=parameters)
    call.domains, call.settings = domains, dict(settings)
    return call


def _hints(factory: Callable[..., Any], signature: inspect.Signature) -> dict[str, Any]:
    """Annotations of the parameters that take one argument each, where they say something of its domain."""
    try:
        hints = typing.get_type_hints(factory, include_extras=True)
    except NameError:  # of names that are known to type checkers only
        return {}
    single = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: hints[n] for n, p in signature.parameters.items() if n in hints and p.kind in single and says(hints[n])}
