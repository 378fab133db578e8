"""Chat templates have a limit of time and of output, on any thread; ordinary ones are what transformers makes of
them."""

import threading
import time
import tracemalloc

import pytest

from jaxpo.text import metered
from jaxpo.text.conversations import Conversation
from jaxpo.text.templates import compiled
from jaxpo.text.tokenizers import PretrainedTokenizer
from tests.text import chat_models

TURN = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
NESTED = "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
HOSTILE = {
    "a loop": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "a loop of four": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}"
    "{% endfor %}{% endfor %}",
    "range beyond jinja's": "{% for i in range(10**9) %}{% endfor %}",
    "a recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "a recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macros that call each other twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
    "{% endif %}{% endmacro %}{{ f(60) }}",
    "doubling by ~": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling by replace": "{% set ns = namespace(s='x') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s | replace('x', 'xx') %}{% endfor %}",
    "doubling by the method": "{% set ns = namespace(s='x') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}",
    "doubling a list": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a product": "{{ 'x' * 10**10 }}",
    "a product of lists": "{{ [1] * 10**9 }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "center": "{{ 'x' | center(10**10) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "indent": "{{ 'x\n' | indent(10**10) }}",
    "a format": "{{ '%9999999999d' | format(1) }}",
    "a format by %": "{{ '%9999999999d' % 1 }}",
    "a format by the method": "{{ '{:9999999999d}'.format(1) }}",
    "tojson": "{{ [1] | tojson(indent=10**10) }}",
    "join": "{% set s = 'x' * 1000000 %}{{ range(1000) | list | join(s) }}",
    "join by the method": "{% set s = 'x' * 1000000 %}{{ s.join('ab' * 1000) }}",
    "lists of lists": NESTED + "{{ ns.s }}",
    "lists of lists as json": NESTED + "{{ ns.s | tojson }}",
    "lists of lists by ~": NESTED + "{{ 'x' ~ ns.s }}",
    "much output": "{% for i in range(9999) %}{% for j in range(9999) %}" + "y" * 200 + "{% endfor %}{% endfor %}",
    "a block that is set": "{% set s %}{% for i in range(9999) %}{% for j in range(9999) %}yyyy"
    "{% endfor %}{% endfor %}{% endset %}",
}


def made(template: str) -> PretrainedTokenizer:
    return PretrainedTokenizer(
        chat_models.tokenizer_of(chat_models.CHATML_TOKENS, "<|im_end|>", template), chat_template=True
    )


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(metered, "SECONDS", 0.5)
    monkeypatch.setattr(metered, "ITEMS", 1 << 16)


def refused(template: str) -> str:
    """The line of a tokenizer with this template, which it shows before anything long."""
    with pytest.raises(ValueError) as error:
        made(TURN + template).render("hello")
    return str(error.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_takes_too_much_is_refused_in_a_line(name, short):
    tracemalloc.start()
    start = time.monotonic()
    line = refused(HOSTILE[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in line and "chat template" in line
    assert time.monotonic() - start < 20 and peak < 600 << 20


def test_on_another_thread_too(short):
    lines = []
    thread = threading.Thread(target=lambda: lines.append(refused(HOSTILE["a loop"])))
    thread.start()
    thread.join(20)
    assert lines and "takes longer than 0.5 s" in lines[0]


@pytest.mark.parametrize(
    "source",
    (
        "{{ 'a' ~ 1 ~ none ~ [1, 'b'] ~ true }}{{ 'x' * 3 }}{{ 2 ** 5 }}{{ '%s-%03d' % ('a', 7) }}"
        "{{ 1 + 2 }}{{ [1] + [2] }}",
        "{% macro f(x) %}<{{ x }}>{% endmacro %}{% for i in range(3) %}{{ f(i) }}{{ loop.index }}"
        "{% else %}-{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for i in [3, 4] if i > 3 %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
        "{% set s %}a{{ 1 }}{% endset %}{{ s | upper }}{{ {'a': [1, 'é']} | tojson }}{{ ['a', 'b'] | join(', ') }}",
        "{{ messages[0].content.strip() }}{{ messages | length }}{{ 'abc'[1:] }}"
        "{{ '{}!'.format('y') }}{{ none }}{{ true }}",
        "{% generation %}{{ 'x' }}{% endgeneration %}{% filter upper %}abc{{ 'd' }}"
        "{% endfilter %}{{ 'a,b'.split(',') }}",
    ),
)
def test_ordinary_templates_write_what_transformers_writes(source):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    messages = [{"role": "user", "content": " hi "}]
    with metered.metered():
        ours = compiled(source).render(messages=messages)
    assert ours == _compile_jinja_template(source).render(messages=messages)


@pytest.mark.slow
def test_the_counters_cost_little():
    """Seconds of a long conversation with and without; printed, not asserted beyond a factor."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    source = chat_models.QWEN3
    messages = [{"role": r, "content": "word " * 20} for _ in range(200) for r in ("user", "assistant")]

    def seconds(template):
        start = time.perf_counter()
        for _ in range(20):
            template.render(messages=messages, add_generation_prompt=True)
        return time.perf_counter() - start

    plain = min(seconds(_compile_jinja_template(source)) for _ in range(3))
    with metered.metered():
        ours = min(seconds(compiled(source)) for _ in range(3))
    print(f"{ours / plain:.2f} of the time")
    assert ours < 4 * plain + 0.1


def test_a_long_conversation_is_no_attack():
    talk = Conversation(tuple({"role": "user", "content": "x" * 10_000} for _ in range(500)))
    tokenizer = made(chat_models.CHATML)
    assert isinstance(tokenizer, PretrainedTokenizer) and len(tokenizer.render(talk)) > 5_000_000
