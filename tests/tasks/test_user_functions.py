"""Functions that a config names: what is wrong with one is a line that names the field; what counts as a number."""

import functools
import operator
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from jaxpo.tasks.user_functions import as_number, check_places, locate, name_of

MODULES = {
    "ufn_good": "NUMBER = 1\ndef broken(completion, answer):\n    return 1.0\nclass Judges:\n    @staticmethod\n"
    "    def one(completion, answer):\n        return 1.0\n",
    "ufn_typo": "def f(completion, answer) return 1.0\n",
    "ufn_import": "import nowhere_at_all\n",
    "ufn_exit": "raise SystemExit(3)\n",
    "ufn_zero": "def g():\n    return 1 / 0\n\ng()\n",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


def test_functions_are_found_by_module_and_name(modules):
    assert locate("ufn_good:broken")("a", "b") == locate("ufn_good:Judges.one")("a", "b") == 1.0
    assert locate("operator:eq") is operator.eq


@pytest.mark.parametrize(
    "path, message",
    [
        ("ufn_good:brokn", "config.x: ufn_good has no function 'brokn': did you mean 'broken'"),
        ("ufn_good:Judges.tow", "config.x: Judges has no function 'tow'"),
        ("ufn_good:NUMBER", "ufn_good:NUMBER is 1, a value of type int, and no function"),
        ("ufn_good:", "'ufn_good:' names no function: write \"module:function\""),
        ("ufn_good", 'write "module:function"'),
        (":broken", 'write "module:function"'),
        ("ufn_god:broken", "there is no module 'ufn_god': did you mean 'ufn_good'"),
        ("json.decodr:loads", "there is no module 'json.decodr': did you mean 'json.decoder'"),
        ("ufn_typo:f", "module 'ufn_typo' cannot be imported: SyntaxError: .*line 1"),
        (
            "ufn_import:f",
            "cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all' .*ufn_import.py, line 1",
        ),
        ("ufn_exit:f", "cannot be imported: SystemExit: 3"),
        ("ufn_zero:f", "cannot be imported: ZeroDivisionError: division by zero .*ufn_zero.py, line 2"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(modules, path, message):
    with pytest.raises(ValueError, match=message) as error:
        locate(path, "config.x")
    assert "\n" not in str(error.value) and "config.x" in str(error.value)


def test_arguments_by_place_are_checked():
    check_places(lambda questions, answers: 0, ("questions", "answers"), "config.judge.path")
    check_places(operator.eq, ("questions", "answers"), "config.judge.path")
    check_places(max, ("questions", "answers"), "config.judge.path")  # it tells no signature
    for function in (lambda q: 0, lambda a, b, c: 0, lambda a, *, b: 0):
        with pytest.raises(
            ValueError, match=r"config.judge.path is called with \(questions, answers\), but .* does not"
        ):
            check_places(function, ("questions", "answers"), "config.judge.path")


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.float64(2), np.int8(2), np.array(2.0), Fraction(4, 2), Decimal(2)]
)
def test_numbers(value):
    assert as_number(value) == 2.0 and type(as_number(value)) is float


def test_truth_values_are_numbers():
    assert [as_number(x) for x in (True, False, np.bool_(True), np.array(False))] == [1, 0, 1, 0]


async def later():
    return 1.0


@pytest.mark.parametrize(
    "value, message",
    [
        ("1", "'1', a value of type str, and not a number"),
        (None, "NoneType"),
        ([1.0], "type list"),
        (np.ones(1), "type ndarray"),
        (np.ones((1, 1)), "type ndarray"),
        (1j, "type complex"),
        (float("nan"), "nan, and not a finite number"),
        (np.float32("inf"), "inf, and not a finite number"),
        (10**400, "int too large"),
    ],
)
def test_what_is_no_number(value, message):
    with pytest.raises(ValueError, match=message):
        as_number(value)


def test_a_coroutine_is_named():
    with pytest.raises(ValueError, match="write def instead of async def"):
        as_number(later())


def test_names():
    class Called:
        def __call__(self):
            return 0

    assert [name_of(f) for f in (len, functools.partial(later), Called())] == ["len", "later", "Called"]
