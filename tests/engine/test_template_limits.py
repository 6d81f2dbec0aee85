"""A chat template that does not end, or makes too much of little, ends in an error: whatever it does."""

from __future__ import annotations

import pytest

from engine.errors import InvalidRequest
from engine.models.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}]
LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"
ENDLESS = [
    LOOP * 3 + END * 3,
    "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% for c in r %}" + END * 3,
    "{% macro f(n) %}{{ f(n + 1) ~ f(n + 1) if n < 40 }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    f"{{% macro _turn() %}}{{% endmacro %}}{{% set _budget = 1 %}}{LOOP * 3}{END * 3}",
    f"{LOOP * 2}{{{{ i }}}}{END * 2}",
    "{% for i in range(3) recursive %}{{ loop(range(3)) }}{% endfor %}",
]
GROW = "{{% set ns = namespace(s='xxxxxxxx') %}}{{% for i in range(60) %}}{{% set ns.s = {} %}}{{% endfor %}}"
HUGE = [
    "{{ 'x' * 10 ** 10 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ '%999999999d' % 1 }}",
    GROW.format("ns.s ~ ns.s"),
    GROW.format("ns.s + ns.s"),
    GROW.format("ns.s | replace('x', ns.s)"),
    GROW.format("ns.s.replace('x', ns.s)"),
    GROW.format("ns.s.join(ns.s)"),
    GROW.format("ns.s | join(ns.s)"),
    "{{ 'x' | center(10 ** 9) }}",
    "{{ 'x\nx' | indent(10 ** 9) }}",
    "{{ 'x'.ljust(10 ** 9) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=10 ** 9) }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    f"{{% set s = 'x' * 100000 %}}{LOOP}{{{{ s }}}}{END}",
]


@pytest.mark.parametrize("source", ENDLESS + HUGE)
def test_it_ends_in_an_error_that_names_the_messages(source: str) -> None:
    with pytest.raises(InvalidRequest, match="the model's chat template refuses") as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for i in range(3) %}{{ i ~ ',' }}{% else %}none{% endfor %}", "0,1,2,"),
        (
            "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content ~ 1 ~ none }}{% endfor %}",
            "1hello1None",
        ),
        ("{{ 'a' ~ missing ~ 2 }}", "a2"),
        ("{{ 'a' * 3 + 'b' }}{{ 2 ** 3 * 4 % 5 }}", "aaab2"),
        ("{{ '%s-%d' | format('a', 2) }}{{ ['a', 'b'] | join(', ') }}{{ 'a' | replace('a', 'b') }}", "a-2a, bb"),
        ("{{ messages | map(attribute='role') | join }}{{ 'x' | center(3) }}{{ 'a\nb' | indent(2) }}", "user x a\n  b"),
        ("{{ '{ 1234567' | replace('1', '2') }}{{ '% 1234567'.replace('1', '2') }}", "{ 2234567% 2234567"),
        ("{{ 'a,b'.split(',')[-1] }}{{ 'a'.join(['x', 'y']) }}", "bxay"),
    ],
)
def test_what_templates_really_do_goes_as_before(source: str, expected: str) -> None:
    assert ChatTemplate(source, {}).render(MESSAGES) == expected


def test_a_render_takes_nothing_from_the_next_one() -> None:
    template = ChatTemplate("{% for i in range(15000) %}{% for j in range(4) %}{% endfor %}{% endfor %}x", {})
    assert [template.render(MESSAGES) for _ in range(3)] == ["x"] * 3


def test_variables_are_the_templates_own() -> None:
    source = "{{ enable_thinking }}|{{ eos_token }}|{{ messages[0].content }}|{{ add_generation_prompt }}"
    given = {"enable_thinking": False, "eos_token": "no", "messages": [], "add_generation_prompt": 3}
    assert ChatTemplate(source, {"eos_token": "</s>"}).render(MESSAGES, True, None, given) == "False|</s>|hello|True"


def test_a_template_that_uses_tools_knows_them() -> None:
    assert ChatTemplate("{% if tools %}{{ tools }}{% endif %}", {}).knows_tools
    assert not ChatTemplate("{% set tools = 1 %}{{ messages }}", {}).knows_tools
