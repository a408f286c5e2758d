"""The sandbox of chat templates: transformers' results for what it allows, and an error, soon, for what it doesn't."""

import time

import jinja2
import pytest

from moe.data.jinja_sandbox import BEGIN, END, LONGEST, Sandbox


def render(source, **names):
    sandbox = Sandbox()
    template = sandbox.compiled(source)
    sandbox.budget.refill(3, 100)
    return template.render(**names)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}:{{ m.content | trim }},{% endfor %}",
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content.strip() }}{% endfor %}",
        "{% set n = namespace(n=0) %}{% for m in messages if m.role %}{% set n.n = n.n + 1 %}{% endfor %}{{ n.n }}",
        "{{ messages | tojson(indent=2) }}{{ {'a': '<é>'} | tojson }}",
        "{% macro f(x) %}[{{ x.split('l')[-1] }}]{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[-1]['content'][1:3] }}",
        "{{ 'a' * 3 ~ (1 + 2) }}{{ messages[::-1] | map(attribute='role') | join('-') }}{{ range(3) | list }}",
        "  {% if messages is defined and not tools %}\n  x\n  {% endif %}\n{{ no }}{{ messages[0].role.upper() }}",
        "{% set x %}{{ messages | length }}!{% endset %}{{ x | indent(2) }}{{ messages[0].items() | list }}",
        "{{ messages | join(', ', attribute='role') }}{{ [1, 'a', [2]] | join('-') }}{{ ', '.join(['a', 'b']) }}",
        "{{ 'aba' | replace('b', 'xx', 1) }}{{ 'aba'.replace('b', 'xx') }}{{ [[1, 2], [3]] | map('sum') | join }}",
        "{{ messages }}{{ messages[0].values() }}{{ messages | string }}{{ 'a\\nb\\n' | indent('> ', true) }}",
    ],
)
def test_templates_give_what_they_give_in_transformers(source):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    messages = [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "all well"}]
    assert render(source, messages=messages) == _compile_jinja_template(source).render(messages=messages)


def test_a_namespace_is_printed_without_its_values():
    assert render("{% set ns = namespace(x=['a' * 1000000] * 1000) %}{{ ns }}") == "<Namespace>"


def test_generation_is_marked():
    assert render("a{% generation %}b{{ 1 }}{% endgeneration %}c") == f"a{BEGIN}b1{END}c"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for a in range(10**9) %}x{% endfor %}",
        "{{ range(10**18) | list }}",
        "{{ 'a' * 10**10 }}",
        "{{ ['a'] * 99999999 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(99) %}{% set n.x %}{{ n.x ~ n.x }}{% endset %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ 'a'.ljust(999999999) }}{{ 'a'.center(1000000) }}",
        "{{ 'a' | center(999999999) }}",
        "{{ 'ab'.replace('', 'x' * 1000000).replace('x', 'y' * 1000000) }}",
        "{{ ('x' * 1000) | replace('x', 'y' * 1000000) }}",
        "{{ ('x' * 1000).replace('x', 'y' * 1000000) }}",
        "{{ ('x' * 1000).translate({120: 'y' * 1000000}) }}",
        "{{ (['y' * 1000000] * 1000) | join }}",
        "{{ ('y' * 1000000).join(['x'] * 1000) }}",
        "{{ ('x' * 1000) | list | join('y' * 1000000) }}",
        "{{ ['y' * 1000000] * 1000 }}",
        "{{ (['y' * 1000000] * 1000) | tojson }}",
        "{{ (['y' * 1000000] * 1000) | string | length }}",
        "{{ (['y' * 1000000] * 1000) ~ '' }}",
        "{{ [['y' * 1000000] * 1000] | map('string') | map('length') | list }}",
        "{{ [[['y' * 1000] * 1000] * 1000] | join }}",
        "{{ {'a': ['y' * 1000000] * 1000}.items() }}",
        "{{ ('\\n' * 1000) | indent('y' * 1000000) }}",
        "{{ ([[1] * 1000000] * 1000) | sum(start=[]) | length }}",
        "{{ [1] | batch(10**9, 0) | first | length }}",
        "{% for a in range(9999) %}{{ [a] | slice(1000000) | list | length }}{% endfor %}",
        "{% for a in range(9999) %}{{ ('x' * 100000) | upper | length }}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ namespace(_x=1) }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)  # fmt: skip
def test_hostile_templates_end_soon_with_an_error(source):
    started = time.process_time()
    with pytest.raises((jinja2.TemplateError, RecursionError, TypeError)):
        render(source, messages=[])
    assert time.process_time() - started < 2


def test_a_nested_template_is_an_error():
    with pytest.raises(Exception, match=r"."):  # whatever Jinja or Python raises: `ChatTemplate` turns it into one line
        Sandbox().compiled("{% if x %}" * 3000 + "{% endif %}" * 3000)


def test_a_long_conversation_is_within_the_budget():
    sandbox = Sandbox()
    template = sandbox.compiled("{% for m in messages %}{{ m.role + ': ' + m.content | trim ~ '\n' }}{% endfor %}")
    messages = [{"role": "user", "content": "word " * 2000}] * 2000
    sandbox.budget.refill(len(messages), sum(len(m["content"]) for m in messages))
    assert len(template.render(messages=messages)) > 10 * LONGEST
