r"""Numbers as people and models write and typeset them: ``-1,234.5``, ``10{,}000``, ``3\times10^{5}``, ``\frac{1}{2}``.

What is read, in every locale:

  signs         ``-`` ``+``, U+2212 and its relatives, ``-$5``
  groups        of three digits, apart by a thin or non-breaking space, ``\,`` ``\;`` ``\!`` ``\ `` ``~`` or ``_``
  fractions     ``3/4``, ``\frac{1}{2}``, ``\frac12``, ``½``; mixed ones ``2 1/2``, ``2\frac{1}{2}``, ``2½``
  powers of 10  ``1e5``, ``3\times10^{5}``, ``3×10⁵``, ``3*10**5``, ``10^5``
  percent       ``50%``, ``50\%``, ``50 percent``

A locale adds its separators: "en" 1,234.5; "de" 1.234,5; "fr" 1 234,5; "ch" 1'234.5; "in" 12,34,567.8. ``{,}`` is a
comma.

What is ambiguous, and how it is read:

  1,234         one number in "en" and 1.234 in "de", though it may be a list or a decimal comma
  1,2 or 1,23   no groups of three: in "en" and "ch" a list, whose last number is 2 or 23; else a decimal comma
  1.234         in "de" a group: 1234; 1.5 and 1234.567 cannot be groups, and are read with a decimal point
  12 345        with a plain space two numbers, except in "fr"
  2 1/2         2.5, because 1/2 is below 1; 2 3/2 is two numbers
  3-2, 3–2      two numbers, 3 and 2; a dash between digits is no sign
  - 5           minus 5 only where nothing else is in the text, or after one of ``= ( { [ : $``
  2^{10}        two numbers: only powers of 10 are read
"""

import functools
import re
import unicodedata
from fractions import Fraction
from typing import Literal, NamedTuple

Locale = Literal["en", "de", "fr", "ch", "in"]

LONGEST = 1000  # characters of a number: int() refuses longer ones
MINUS = dict.fromkeys("\u2212\u2010\u2011\u2013\ufe63\uff0d", "-")
WIDE = {"\uff0b": "+", "\u2044": "/", "\u2215": "/", "\uff05": "%", "\uff0e": ".", "\uff0c": ","}
PLAIN = str.maketrans(MINUS | WIDE)
PLAIN_END = re.compile(r"(?:^|[\s#=:({$])-?[0-9]{1,15}\s*$")  # a short whole number after a space, and nothing else
SPACE = "\u2009"  # what every thin, fixed or non-breaking space becomes
SPACES = re.compile(r"[\u00a0\u2007-\u200a\u202f~]|\{\\[,;:! ]\}|\\[,;:! ]|\\thinspace\b|\\nobreakspace\b")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
VULGAR = "".join(c for c in map(chr, [*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189]))
# The separators of a locale: of thousands (regular expressions), and the decimal one.
GROUPS = {"en": ",", "de": r"\.", "fr": " ", "ch": "['\u2019]", "in": ","}
DECIMAL = {"en": r"\.", "de": ",", "fr": ",", "ch": r"\.", "in": r"\."}


class Number(NamedTuple):
    """A number that was found in a text.

    text: as it was written, with plain signs and spaces.
    value: exact; of 50% it is 50.
    percent: whether a percent sign follows it.
    """

    text: str
    value: Fraction
    percent: bool


def last_number(text: str, locale: Locale = "en") -> str | None:
    """The last number in a text, as it is written: ``-3``, ``1,000``, ``.5``, ``2e-3``, ``3/4``; None without one."""
    found = _last(text, locale)
    return found.group("number") if found else None


def ends_in_a_number(text: str) -> bool:
    """Whether the text plainly ends in a number that has a value, in every locale. False may be wrong: it is the quick
    look at whole data files."""
    return PLAIN_END.search(text[-24:]) is not None


def read_number(text: str, locale: Locale = "en") -> Number | None:
    """The last number in a text; None if there is none, or if it has no value (1/0, or thousands of digits)."""
    found = _last(text, locale)
    if found is None or len(found.group()) > LONGEST:
        return None
    value = _value(found, locale)
    return None if value is None else Number(found.group("number"), value, found.group("percent") is not None)


def _last(text: str, locale: Locale) -> re.Match[str] | None:
    return max(_pattern(locale).finditer(_plain(text)), key=re.Match.start, default=None)


def _plain(text: str) -> str:
    """The text with one character for each kind of sign and space, and without LaTeX's guards around separators."""
    text = text.translate(PLAIN).replace("{,}", ",").replace("{.}", ".").replace(r",\!", ",")
    text = SPACES.sub(SPACE, text)
    text = re.sub(r"10([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda m: f"10^{{{m[1].translate(SUPERSCRIPTS)}}}", text)
    text = re.sub(r"(?<![\w)$])([-+])\s?(\\?[$€£¥])\s?(?=[\d.])", r"\2\1", text)  # -$5 is $-5
    alone = re.fullmatch(r"\s*([-+])\s+(\S+)\s*", text)  # "- 5" and nothing else
    return "".join(alone.groups()) if alone else re.sub(r"(?<=[=({\[:$])(\s*[-+])\s+(?=[\d.\\])", r"\1", text)


@functools.cache
def _pattern(locale: Locale) -> re.Pattern[str]:
    """The regular expression of a number in a locale."""
    decimal = DECIMAL[locale]
    part = _digits(locale)
    fraction = rf"\\[dtc]?frac\s*(?:\{{\s*(?P<top>[-+]?{part})\s*\}}|(?P<top1>\d))\s*"
    fraction += rf"(?:\{{\s*(?P<bottom>[-+]?{part})\s*\}}|(?P<bottom1>\d))"
    power = r"10\s?(?:\^|\*\*)\s?(?:\{\s*(?P<%s>[-+]?\d{1,3})\s*\}|\(?(?P<%s>[-+]?\d{1,3})(?!\d)\)?)"
    times = rf"\s*(?:\\times|\\cdot|[×·⋅*xX])\s*{power % ('exp1', 'exp2')}"
    exponent = rf"(?:[eE](?P<exp>[-+]?\d{{1,3}})(?!\d)|{times})"
    plain = rf"(?P<digits>{part}|{decimal}\d+){exponent}?(?:\s?/\s?(?P<below>{_digits(locale)}))?"
    after = fraction.replace("top", "mtop").replace("bottom", "mbottom")
    mixed = rf"(?P<whole>{part})\s?(?:{after}|(?P<mvulgar>[{VULGAR}]))"
    spaced = r"(?P<units>\d+) (?P<over>\d+)/(?P<under>\d+)"
    number = "|".join([spaced, mixed, fraction, rf"(?P<vulgar>[{VULGAR}])", power % ("exp3", "exp4"), plain])
    before = r"(?<![\d.,])" if decimal == "," else r"(?<![\d.])"
    percent = rf"(?P<percent>[ {SPACE}]?(?:\\?%|per ?cent\b))?"
    return re.compile(rf"(?P<number>{before}(?P<sign>[-+]?)(?:{number})){percent}", re.IGNORECASE)


def _digits(locale: Locale) -> str:
    """Digits with or without groups, and their decimals. Few groups: a text of nothing else must not take long."""
    decimal, alternatives = DECIMAL[locale], []
    for separator in (GROUPS[locale], SPACE, "_"):
        first, rest = (r"\d{1,2}", r"\d{2}") if locale == "in" and separator == "," else (r"\d{1,3}", r"\d{3}")
        alternatives.append(rf"{first}(?:{separator}{rest}){{0,20}}{separator}\d{{3}}(?!\d|{separator}\d)")
    alternatives.append(r"\d+")
    decimals = rf"{decimal}\d{{3}}(?:{SPACE}\d{{3}}){{1,20}}(?!\d)|{decimal}\d+"
    if decimal == ",":
        decimals += r"|\.\d+"  # what cannot be a group
    return rf"(?:{'|'.join(alternatives)})(?:{decimals})?"


def _value(found: re.Match[str], locale: Locale) -> Fraction | None:
    """The value of a match of `_pattern`; None for a division by zero."""
    said = found.groupdict()
    number = functools.partial(_fraction, locale=locale)
    sign = -1 if said["sign"] == "-" else 1
    if said["units"]:
        top, bottom = int(said["over"]), int(said["under"])
        if top >= bottom:  # no mixed number, but two numbers
            return Fraction(top, bottom) if bottom else None
        return sign * (int(said["units"]) + Fraction(top, bottom))
    whole = number(said["whole"]) if said["whole"] else Fraction(0)
    if vulgar := said["vulgar"] or said["mvulgar"]:
        return sign * (whole + Fraction(unicodedata.numeric(vulgar)).limit_denominator(10))
    top, bottom = ((said[p] or said[f"{p}1"] or said[f"m{p}"] or said[f"m{p}1"]) for p in ("top", "bottom"))
    if top:
        return sign * (whole + number(top) / number(bottom)) if number(bottom) else None
    power = next((int(said[name]) for name in ("exp", "exp1", "exp2", "exp3", "exp4") if said[name]), 0)
    below = number(said["below"]) if said["below"] else Fraction(1)
    return sign * number(said["digits"] or "1") * Fraction(10) ** power / below if below else None


def _fraction(digits: str, locale: Locale) -> Fraction:
    """The value of `_digits` with a sign or without."""
    if DECIMAL[locale] == ",":
        grouped = re.fullmatch(r"[-+]?\d{1,3}(\.\d{3})+(,.*)?", digits, re.DOTALL)
        digits = (digits.replace(".", "") if grouped and locale == "de" else digits).replace(",", ".")
    return Fraction(re.sub(rf"[,'\u2019_ {SPACE}]", "", digits))
