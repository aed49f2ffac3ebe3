"""Chat templates that no engine could parse are refused; the server judges the rest."""

from __future__ import annotations

import sys

import pytest

from orchestrator.errors import InvalidRequest
from orchestrator.settings.template import check_template


@pytest.mark.parametrize(
    "text",
    [
        "{% if x %}",
        "{% for m in messages %}{{ m }}",
        "{{ x",
        "{# x",
        "{% for a in %}{% endfor %}",
        "{{ a b }}",
        "{% endif %}",
        "{% %}",
        "{% generation %}{{ x",
        "{% macro f( %}{% endmacro %}",
        "{% if a %}{% endfor %}{% endif %}",
    ],
)
def test_template_that_cannot_be_parsed_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_template("first line\n" + text, "chat_template_override")
    assert refused.value.field == "chat_template_override"
    assert "line 2" in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "chatml",
        "",
        "{% generation %}x{% endgeneration %}",
        "{% break %}{% continue %}",
        "{% call_tools a b c %}",
        "{% trans %}a{% endtrans %}",
        "{{ x | no_such_filter }}{% if a is no_such_test %}{% endif %}",
        "{%- for m in messages if m.x -%}{{ m['a'][1:-1] ~ 'x' }}{%- endfor -%}",
        "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{% do f() %}",
        "{{ raise_exception('no') }}{{ strftime_now('%Y') }}",
        "{% raw %}{{ {% endraw %}",
        "}} %} #}",
        "{% macro f(a=1) -%}{{ caller() }}{%- endmacro %}{% call f() %}{% endcall %}",
        "{% if a %}" * 10_000,  # deeper than jinja2 can follow
        "{{ " + "9" * 5000 + " }}",  # longer than Python converts
        "{{ 1" + "+1" * 100_000 + " }",  # would take seconds
    ],
)
def test_template_that_jinja2_cannot_judge_passes(text: str) -> None:
    check_template(text, "chat_template_override")


def test_without_jinja2_the_server_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.settings import template

    monkeypatch.setitem(sys.modules, "jinja2", None)
    template._parser.cache_clear()
    try:
        check_template("{% if x %}", "chat_template_override")
    finally:
        template._parser.cache_clear()
