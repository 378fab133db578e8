r"""The table of forms that `jaxpo.tasks.numbers` reads, and of what is ambiguous."""

import time
from fractions import Fraction

import pytest

from jaxpo.tasks.numbers import last_number, read_number
from jaxpo.tasks.rewards import numeric

FORMS = [
    # plain
    ("42", 42),
    ("it is -3.", -3),
    (".5", "1/2"),
    ("1234567", 1234567),
    ("１２", 12),
    # signs
    ("\u22125", -5),
    ("\u2013 5 x", 5),
    ("\u20135", -5),
    ("\uff0d5", -5),
    ("x = - 5", -5),
    ("- 5", -5),
    (r"\boxed{- 5}", -5),
    ("-$5", -5),
    (r"-\$1{,}000", -1000),
    ("3-2", 2),
    ("pages 3\u20135", 5),
    ("5 - 3", 3),
    # groups
    ("1,234,567 dollars", 1234567),
    (r"10{,}000", 10000),
    (r"10{,}000{,}000.5", "20000001/2"),
    (r"10\,000", 10000),
    (r"10\;000", 10000),
    (r"10\!000", 10000),
    (r"10{\,}000", 10000),
    (r"10\ 000", 10000),
    (r"1,\!000", 1000),
    ("10~000", 10000),
    ("10\u2009000", 10000),
    ("10\u202f000", 10000),
    ("10\u00a0000", 10000),
    ("10_000", 10000),
    ("$12{,}345$.", 12345),
    ("1,000, I think", 1000),
    ("(1,000)", 1000),
    (r"12\,345\,678", 12345678),
    ("10,000.00", 10000),
    (r"3.141\,592", "3141592/1000000"),
    # lists and what only looks like groups
    ("1,2", 2),
    ("1,234,56", 56),
    ("12 345", 345),
    (r"1\,2\,3", 3),
    ("v1.2.3", "6/5"),
    # fractions
    ("3/4", "3/4"),
    ("3 / 4", "3/4"),
    ("1/1,000", "1/1000"),
    ("1\u20442", "1/2"),
    (r"\frac{1}{2}", "1/2"),
    (r"-\frac{1}{2}", "-1/2"),
    (r"\frac{-1}{2}", "-1/2"),
    (r"\dfrac{3}{4}", "3/4"),
    (r"\tfrac{1,000}{3}", "1000/3"),
    (r"\frac12", "1/2"),
    ("½", "1/2"),
    ("⅓", "1/3"),
    ("−½", "-1/2"),
    ("2 1/2", "5/2"),
    (r"2\frac{1}{2}", "5/2"),
    (r"-2\frac{1}{2}", "-5/2"),
    ("2½", "5/2"),
    ("2 3/2", "3/2"),
    ("3/4/2024", 2024),
    ("1/0", None),
    (r"\frac{1}{0}", None),
    # powers of ten
    ("2.5e-3 m", "1/400"),
    ("1E5", 100000),
    (r"3\times10^{5}", 300000),
    (r"3 \times 10^5", 300000),
    (r"3\cdot 10^{-2}", "3/100"),
    ("3×10⁵", 300000),
    ("3 × 10⁻²", "3/100"),
    ("3*10**5", 300000),
    ("3 x 10^5", 300000),
    (r"-1.5\times10^{3}", -1500),
    ("10^5", 100000),
    ("2^{10}", 10),
    # percent: of 50% the value is 50
    ("50%", 50),
    (r"50\%", 50),
    ("50 percent", 50),
    # nothing
    ("none", None),
    ("", None),
    ("9" * 5000, None),
]
LOCALES = [
    ("de", "1.234,5", "2469/2"),
    ("de", "1.234.567", 1234567),
    ("de", "1.234", 1234),
    ("de", "1,5", "3/2"),
    ("de", "3{,}14", "157/50"),
    ("de", "1.5", "3/2"),
    ("de", "1234.567", "1234567/1000"),
    ("de", "10\u202f000,5", "20001/2"),
    ("fr", "1 234,5", "2469/2"),
    ("fr", "12\u202f345,6", "61728/5"),
    ("fr", "3,14", "157/50"),
    ("ch", "1'234.5", "2469/2"),
    ("ch", "1’234’567", 1234567),
    ("in", "12,34,567.8", "6172839/5"),
    ("in", "1,234", 1234),
    ("en", "1'234", 234),
]


@pytest.mark.parametrize("text, expected", FORMS)
def test_forms(text, expected):
    found = read_number(text)
    assert (None if found is None else found.value) == (None if expected is None else Fraction(expected))


@pytest.mark.parametrize("locale, text, expected", LOCALES)
def test_locales(locale, text, expected):
    assert read_number(text, locale).value == Fraction(expected)


@pytest.mark.parametrize("text", ["1" + ",234" * 10000 + ",2", "10" + "\u2009000" * 10000 + "\u20090", "1 1/" * 10000])
def test_long_texts_take_no_time(text):
    start = time.monotonic()
    read_number(text)
    assert time.monotonic() - start < 5


def test_percent_signs_are_told_apart():
    assert [read_number(text).percent for text in ("50%", "50 %", r"5\%", "5 per cent", "50")] == [True] * 4 + [False]


def test_the_text_of_a_number_is_plain():
    assert last_number(r"about $10{,}000$ or so") == "10,000"
    assert last_number("\u22125 degrees") == "-5"


@pytest.mark.parametrize(
    "completion, answer, options, expected",
    [
        (r"\boxed{10{,}000}", "10000", {"extract": "boxed"}, 1),
        (r"\boxed{10\,000}", "10000", {"extract": "boxed"}, 1),
        (r"\boxed{10{,}000}", "0", {"extract": "boxed"}, 0),
        ("10000", r"10{,}000", {}, 1),
        ("1.234,5", "1234,5", {"locale": "de"}, 1),
        ("1.234", "1234", {"locale": "de"}, 1),
        ("1.234", "1234", {}, 0),
        ("50%", "50", {}, 1),
        ("50%", "0.5", {}, 1),
        ("50", "50%", {}, 1),
        ("0.5%", "50%", {}, 0),
        ("50%", "50%", {}, 1),
        ("50%", "50", {"percent": "share"}, 0),
        ("50%", "0.5", {"percent": "number"}, 0),
        ("0.501", "50%", {"percent": "share", "tolerance": 0.01}, 1),
    ],
)
def test_numeric_compares_values(completion, answer, options, expected):
    assert numeric(completion, answer, **options) == expected
