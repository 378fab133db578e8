"""Reward functions against answers worked out by hand."""

import sys
import threading

import pytest

from jaxpo.tasks.rewards import EXTRACT, extract_answer, make_reward, mathematical, numeric, preparation, present
from jaxpo.tasks.workers import WorkerPool


@pytest.mark.parametrize(
    "text, expected",
    [
        ("the answer is 42.", "42"),
        ("3 - 2 is 1, no: -7", "-7"),
        ("3-2", "2"),
        ("1,234,567 dollars", "1,234,567"),
        ("1,2", "2"),
        (".5", ".5"),
        ("2.5e-3 m", "2.5e-3"),
        ("it is 3/4", "3/4"),
        ("v1.2.3", "1.2"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, expected):
    assert extract_answer(text, "last_number") == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so \boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{ 3 } and \boxed{4", "3"),
        ("3", None),
        (r"\boxed {a}", "a"),
        (r"\boxed{}", ""),
    ],
)
def test_boxed(text, expected):
    assert extract_answer(text, "boxed") == expected


@pytest.mark.parametrize(
    "text, expected",
    [("<answer>1</answer> wait <answer> 2\n</answer>", "2"), ("<answer><answer>3</answer>", "3"), ("<answer>4", None)],
)
def test_answer_tag(text, expected):
    assert extract_answer(text, "answer_tag") == expected


@pytest.mark.parametrize("how", EXTRACT)
def test_present_is_undone_by_extract(how):
    assert extract_answer(present("12", how), how) == "12"


@pytest.mark.parametrize(
    "name, options, completion, answer, expected",
    [
        ("exact", {}, "  olleh\n", "olleh", 1),
        ("exact", {}, "olle", "olleh", 0),
        ("exact", {}, "Olleh", "olleh", 0),
        ("exact", {"ignore_case": True}, "OLLEH", "olleh", 1),
        ("exact", {}, "olleh olleh", "olleh", 0),
        ("exact", {"extract": "answer_tag"}, "olleh", "olleh", 0),
        ("exact", {"extract": "answer_tag"}, "<answer>olleh</answer>", "olleh", 1),
        ("numeric", {}, "it is 1,000 dollars", "1000", 1),
        ("numeric", {}, "1000.5", "1000", 0),
        ("numeric", {}, "0.5", "1/2", 1),
        ("numeric", {}, "1/0", "1", 0),
        ("numeric", {}, "no idea", "1", 0),
        ("numeric", {}, "18 eggs", "3 * 6 = 18\n#### 18", 1),
        ("numeric", {}, "9007199254740993", "9007199254740992", 0),
        ("numeric", {"tolerance": 0.01}, "3.14", "3.1416", 1),
        ("numeric", {"tolerance": 0.001}, "3.14", "3.1416", 0),
        ("numeric", {}, "9" * 5000, "9", 0),
        ("numeric", {"extract": "boxed"}, r"\boxed{x = 7} then 8", "7", 1),
        ("numeric", {}, "1e999", "1", 0),
        ("regex", {}, "2024-02-03", r"\d{4}-\d\d-\d\d", 1),
        ("regex", {}, "on 2024-02-03", r"\d{4}-\d\d-\d\d", 0),
        ("regex", {"pattern": r"#### (\S+)"}, "#### 5\n#### 6", "6", 1),
        ("regex", {"pattern": r"#### (\S+)"}, "#### 6\n#### 5", "6", 0),
        ("regex", {"pattern": "x+"}, "a xx b", "xx", 1),
        ("regex", {"pattern": r"#### (\S+)"}, "6", "6", 0),
        ("math", {}, r"so $\frac{2}{4}$", "1/2", 1),
        ("math", {}, r"$\frac{2}{3}$", "1/2", 0),
        ("math", {}, "nothing", "1/2", 0),
        ("math", {"extract": "boxed"}, r"it is \boxed{(x+1)^2}", "x^2+2x+1", 1),
        ("math", {"extract": "boxed"}, r"\boxed{12}", r"12\pi", 0),
        ("math", {"extract": "boxed"}, r"\boxed{12\pi}", "12", 0),
        ("math", {"extract": "boxed"}, r"\boxed{12\pi}", r"12 \pi", 1),
        ("math", {"extract": "boxed"}, "12", "12", 0),
        ("math", {}, "x^2+1", "x^2+1", 1),
    ],
)
def test_rewards(name, options, completion, answer, expected):
    assert make_reward(name, **options)(completion, answer) == expected


@pytest.mark.parametrize(
    "options, completion, expected",
    [
        ({}, "<think>a\nb</think>\n<answer>2</answer>\n", 1),
        ({}, "<think>a</think><answer>2</answer> bye", 0),
        ({}, "so <think>a</think><answer>2</answer>", 0),
        ({}, "<answer>2</answer><think>a</think>", 0),
        ({}, "<think>a</think>", 0),
        ({}, "<think>a<think>b</think></think><answer>2</answer>", 0),
        ({}, "<think>a</think><answer>2</answer><answer>3</answer>", 0),
        ({}, "<think>a</think> so <answer>2</answer>", 0),
        ({}, "", 0),
        ({"opened": True}, "a</think><answer>2</answer>", 1),
        ({"opened": True}, "<think>a</think><answer>2</answer>", 0),
        ({"tags": ("answer",)}, "<answer>2</answer>", 1),
        ({"pattern": r"#### \d+"}, "#### 12", 1),
        ({"pattern": r"#### \d+"}, "it is #### 12", 0),
        ({"pattern": r".*#### \d+"}, "a\nb #### 12\n", 1),
    ],
)
def test_format(options, completion, expected):
    assert make_reward("format", **options)(completion) == expected


@pytest.mark.parametrize(
    "options, n, expected",
    [
        ({"target": 10, "within": 5}, 10, 1),
        ({"target": 10, "within": 5}, 12, 0.6),
        ({"target": 10, "within": 5}, 8, 0.6),
        ({"target": 10, "within": 5}, 30, 0),
        ({"most": 10, "within": 4}, 6, 0),
        ({"most": 10, "within": 4}, 7, -0.25),
        ({"most": 10, "within": 4}, 10, -1),
        ({"most": 10, "within": 4}, 50, -1),
    ],
)
def test_length(options, n, expected):
    assert make_reward("length", **options)("", range(n)) == pytest.approx(expected)
    assert make_reward("length", unit="characters", **options)("x" * n) == pytest.approx(expected)
    assert make_reward("length", unit="words", **options)("xy " * n) == pytest.approx(expected)


def test_the_answer_goes_first():
    # verify is not symmetric: an equation may be answered by its right side, but not the other way round.
    assert mathematical("$5$", "x=5") == 1
    assert mathematical("$y=x+5$", "5") == 0


def test_an_answer_that_cannot_be_judged_by_raises():
    with pytest.raises(ValueError, match="contains no number"):
        numeric("3", "three")
    with pytest.raises(ValueError, match="cannot be read as mathematics"):
        mathematical("$3$", "$$")


def test_math_runs_off_the_main_thread_and_in_workers():
    result = []
    thread = threading.Thread(target=lambda: result.append(mathematical("$0.5$", "1/2")))
    thread.start()
    thread.join()
    assert result == [1.0]

    def use():
        with WorkerPool(make_reward("math", extract="boxed"), workers=1, timeout=20) as pool:
            result.extend(pool.map([(r"\boxed{0.5}", "1/2"), ("0.5", "1/2"), (r"\boxed{1}", "$$")]))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert [o.value for o in result[1:]] == [1.0, 0.0, None]
    assert result[3].error == "ValueError: the answer '$$' cannot be read as mathematics"


def test_math_that_hangs_is_a_counted_error():
    with WorkerPool(mathematical, workers=1, timeout=1.5, prepare=preparation("math")) as pool:
        assert pool.map([("$9^{9^{9}}$", "2"), ("$2$", "2")]) == [(None, "timed out after 1.5 s"), (1.0, None)]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: make_reward("exat"), "unknown verifier 'exat': did you mean 'exact'"),
        (lambda: make_reward("exact", ignorecase=True), "'ignorecase': did you mean 'ignore_case'"),
        (lambda: make_reward("exact", extract="boxd"), "unknown extract 'boxd': did you mean 'boxed'"),
        (lambda: make_reward("regex", pattern="("), "pattern '\\(' is not a regular expression"),
        (lambda: make_reward("length"), "needs either target"),
        (lambda: make_reward("length", target=3, most=4), "needs either target"),
        (lambda: make_reward("length", most=4), "most=4 is less than within=100"),
        (lambda: make_reward("length", target=4, unit="token"), "unit must be one of tokens, words, characters"),
        (lambda: make_reward("format", tags=()), "tags must be different names"),
        (lambda: make_reward("format", tags="think"), "tags must be different names"),
        (lambda: make_reward("format", tags=("a", "a")), "tags must be different names"),
        (lambda: make_reward("format", tags=("a",), pattern="x"), "no effect with pattern"),
        (lambda: make_reward("format", pattern="("), "is not a regular expression"),
        (lambda: make_reward("numeric", locale="us"), "locale must be one of en, de, fr, ch, in"),
        (lambda: make_reward("numeric", tolerance=-1), "tolerance must be a number of at least 0, not -1"),
    ],
)
def test_wrong_names_and_options_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_own_functions():
    assert make_reward("operator:eq")("a", "a") is True
    own = make_reward(lambda completion, answer: 0.25)
    assert own("a", "b") == 0.25


def test_math_without_math_verify_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxpo\[math\]'"):
        make_reward("math")
