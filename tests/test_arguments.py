"""Arguments: one message each, arrays pass, and an option is refused where it has no effect."""

import inspect
import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpo
from jaxpo import arguments, registry
from jaxpo.arguments import (
    NONZERO,
    AboveOne,
    Domain,
    NonNegative,
    Positive,
    PositiveOrInfinite,
    PositiveShare,
    Share,
    Whole,
    check,
    check_record,
    choice,
    number,
    other_than,
    positive,
    unused,
    when,
)
from jaxpo.objectives.parts import surrogates


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))


@pytest.mark.parametrize(
    ("domain", "inside", "outside", "says"),
    [
        (Domain(), (0, -1.5, np.float32(2)), (math.nan, math.inf, "1", None, True), "a finite number"),
        (Domain(0, ends="(]"), (1e-9, 3), (0, -1, math.inf), "a positive number"),
        (Domain(0, ends="(]", infinite=True), (math.inf,), (0, math.nan), "a positive number"),
        (Domain(0), (0, 3), (-1e-9,), "a number of at least 0"),
        (Domain(1, ends="(]"), (1.1,), (1,), "a number above 1"),
        (Domain(0, 1), (0, 1), (1.1,), "a number in [0, 1]"),
        (Domain(0, 0.5, "[)"), (0,), (0.5,), "a number in [0, 0.5)"),
        (Domain(1, whole=True), (1, np.int64(4)), (0, 1.0, True), "a whole number of at least 1"),
    ],
)
def test_domains(domain, inside, outside, says):
    assert domain.says == says
    for x in inside:
        assert number("x", x, domain) is x
    for x in outside:
        with pytest.raises(ValueError, match="x must be a .*, not"):
            number("x", x, domain)


def test_one_message_each():
    for call, message in (
        (lambda: positive("tau", 0), "tau must be a positive number, not 0"),
        (lambda: positive("tau", None), "tau must be a positive number, not None"),
        (lambda: check("mixture", 2, Share), r"mixture must be a number in \[0, 1\], not 2"),
        (lambda: check("keep", 0, PositiveShare), r"keep must be a number in \(0, 1\], not 0"),
        (lambda: check("n", 2.5, Whole | None), "n must be a whole number of at least 1 or None, not 2.5"),
        (lambda: check("top_p", "1", Share | jax.Array), r"top_p must be a number in \[0, 1\], not '1'"),
        (lambda: check("k", (1, 0), tuple[Whole, ...]), r"k must be a tuple \(each .* of at least 1\), not \(1, 0\)"),
        (lambda: choice("form", "x", ("a", "b")), "form must be one of a, b, not 'x'"),
        (lambda: unused("U", 3, 10, False, "form='paper'"), "U has no effect here; it belongs to form='paper'"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            call()


class Sizes(NamedTuple):
    n: Whole
    scale: Positive | jax.Array = 1.0
    name: str | None = None
    anything: object = None


def test_records():
    check_record(Sizes(3, jnp.zeros(())))  # arrays pass, and what states no domain
    check_record(Sizes(3, anything=-1))
    for record, message in (
        (Sizes(0), "sizes.n must be a whole number of at least 1, not 0"),
        (Sizes(1, 0.0), "sizes.scale must be a positive number, not 0.0"),
        (Sizes(1, name=2), "sizes.name must be a string or None, not 2"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            check_record(record, "sizes.")
    assert positive("tau", jnp.zeros(())) == 0  # arrays pass
    unused("U", 10, 10, False, "")
    unused("U", jnp.ones(()), 10, False, "")


def table(
    scale: Literal["group", "none"] = "group",
    adv_eps: NonNegative = 1e-6,
    penalty: float = 1.0,
    max_len: Whole | None = None,
    rule: Literal["a"] | Callable = "a",
    weights: tuple[float, ...] = (1.0,),
    flag: bool = False,
) -> tuple:
    """What it was given."""
    return scale, adv_eps, penalty, max_len, rule, weights, flag


SETTINGS = {"adv_eps": when(scale="group"), "max_len": (when(penalty=NONZERO), when(flag=True))}


def test_a_factory_checks_its_arguments():
    made = arguments.checked(table, "thing", settings=SETTINGS)
    assert made() == table() and made("none", max_len=3) == table("none", max_len=3)
    for given, message in (
        (dict(scale="x"), "thing: scale must be one of group, none, not 'x'"),
        (dict(adv_eps=-1), "thing: adv_eps must be a number of at least 0, not -1"),
        (dict(penalty=math.nan), "thing: penalty must be a finite number, not nan"),
        (dict(max_len=0), "thing: max_len must be a whole number of at least 1 or None, not 0"),
        (dict(rule="b"), "thing: rule must be one of a or a function, not 'b'"),
        (dict(weights=(1.0, math.inf)), r"thing: weights must be a tuple .*, not \(1.0, inf\)"),
        (dict(flag=2), "thing: flag must be True or False, not 2"),
        (
            dict(scale="none", adv_eps=0.1),
            "thing: adv_eps has no effect with scale='none'; it belongs to scale='group'",
        ),
        (
            dict(penalty=0, max_len=3),
            "thing: max_len has no effect with penalty=0 and flag=False; it belongs to penalty != 0 or flag=True",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            made(**given)
    made(penalty=0, max_len=3, flag=True), made(scale="none", adv_eps=1e-6), made(rule=len)


def test_a_signature_has_plain_types_and_the_domains_stay_known():
    made = arguments.checked(table, "thing")
    annotations = {n: p.annotation for n, p in inspect.signature(made).parameters.items()}
    assert annotations["scale"] is str and annotations["adv_eps"] is float and annotations["max_len"] == int | None
    assert arguments.choices_of(made.domains["scale"]) == ("group", "none")
    assert made.__name__ == "table" and made.__doc__ == table.__doc__


def test_a_setting_of_options_that_are_not_there_is_refused():
    with pytest.raises(ValueError, match="when names the option 'alpha'"):
        arguments.checked(table, "thing", settings={"adv_eps": when(alpha=1)})


def test_traced_numbers_pass():
    @registry.register("objective", when={"b": when(a=other_than(0))})
    def two(a: Positive = 1.0, b: Share = 0.5):
        """Two numbers."""
        return a + b

    assert jax.vmap(lambda a, b: two(a, b))(jnp.array([-1.0, 2.0]), jnp.array([3.0, 4.0])).tolist() == [2.0, 6.0]


def test_describe_tells_the_domains():
    text = jaxpo.describe("grpo")
    assert "scale: one of group, batch, none" in text and "eps_low: a positive number" in text
    assert "dual_clip: a number above 1 or None" in text


ONE_AND_MORE = Annotated[float, Domain(1)]


def test_plain_types_of_annotations():
    assert arguments.plain(ONE_AND_MORE) is float and arguments.plain(AboveOne | None) == float | None
    assert arguments.plain(PositiveOrInfinite) is float and arguments.plain(int) is int
    assert arguments.says(int | None) == "a whole number or None"


# ---- what used to be accepted ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grpo", dict(scale="none", adv_eps=0.1), "adv_eps has no effect with scale='none'.*scale='group' or 'batch'"),
        ("grpo", dict(beta=0, kl_is=True), "kl_is has no effect with beta=0"),
        ("dapo", dict(penalty=0, max_len=5), "max_len has no effect with penalty=0"),
        ("hapo", dict(penalty=0, buffer=5), "buffer has no effect with penalty=0"),
        (
            "reinforce_pp",
            dict(variant="baseline", kl_coef=0, kl_estimator="k3"),
            "kl_estimator has no effect with kl_coef=0",
        ),
        ("lp_reg", dict(form="paper", beta=0, rho=0.1), "rho has no effect with beta=0"),
        ("lp_reg", dict(form="paper", beta=0, kappa=0.1), "kappa has no effect with beta=0"),
        ("canon", dict(mu=0, alpha=0.5), "alpha has no effect with mu=0"),
        ("kl_cov", dict(coef=0, ratio=0.1), "ratio has no effect with coef=0"),
        ("rec", dict(regularizer="k2", coef=0), "regularizer has no effect with coef=0"),
        ("adora", dict(rule=len, correct_score=0.1), "correct_score has no effect with rule=a function"),
        ("adora", dict(rule=len, max_len=5), "max_len has no effect with rule=a function"),
        ("adora", dict(max_len=0.0), "max_len must be a positive number or None"),
        ("opmd", dict(tau=-1), "tau must be a number of at least 0, not -1"),
        ("asymre", dict(tau=-1), "tau must be a number of at least 0, not -1"),
        ("hapo", dict(rho=1.5), r"rho must be a number in \[0, 1\], not 1.5"),
        ("rec", dict(weight="advantage", temp=0), "temp must be a positive number, not 0"),
        ("clip_cov", dict(ratio=2), r"ratio must be a number in \[0, 1\], not 2"),
        ("dpo", dict(beta=-1), "beta must be a number of at least 0, not -1"),
        ("nash_md", dict(mixture=2), r"mixture must be a number in \[0, 1\], not 2"),
        ("grpo", dict(log_ratio_clip=0), "log_ratio_clip must be a positive number"),
        ("grpo", dict(adv_eps=math.nan), "adv_eps must be a number of at least 0, not nan"),
        ("simpo", dict(gamma=math.inf), "gamma must be a finite number, not inf"),
        ("spo_segment", dict(interval=0), "interval must be a whole number of at least 1, not 0"),
    ],
)
def test_what_is_refused_now(name, options, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}" if "needs" not in message else message):
        jaxpo.make(name, **options)


def test_a_direct_call_and_a_string_are_checked_too():
    with pytest.raises(ValueError, match="clipped: eps_low must be a positive number, not 0"):
        surrogates.clipped(0)
    with pytest.raises(ValueError, match="clipped: dual_clip must be a number above 1 or None, not 1"):
        jaxpo.make("policy_gradient", surrogate="clipped(dual_clip=1)")
    jaxpo.make("grpo", log_ratio_clip=math.inf)


def test_a_run_fills_in_nothing_that_has_no_effect():
    row = registry.entry("dapo")
    assert row.of_run(100, 10) == {"max_len": 100, "buffer": 20}
    assert row.of_run(100, 10, {"penalty": 0}) == {}
    assert registry.entry("adora").of_run(100, 10, {"rule": len}) == {}
