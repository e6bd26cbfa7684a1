"""Templates that would not end, or fill the memory, are refused in bounded time; others run as ever."""

import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest

from batchjax.text.sandbox import BoundedEnvironment, TooMuch

MAX_CHARS = 1 << 18


def render(source, max_secs=0.2, **names):
  return BoundedEnvironment(max_secs, MAX_CHARS, extensions=[jinja2.ext.loopcontrols]).from_string(
      source).render(names)


def grow(step, start, last="", turns=99):
  """A template that applies a step to `ns.x` many times."""
  return (f"{{% set ns = namespace(x={start}) %}}{{% for i in range({turns}) %}}"
          f"{{% set ns.x = {step} %}}{{% endfor %}}{last}")


LOOPS = {
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered": "{% for i in range(99999) %}{% for j in range(99999) if i < 0 %}{% endfor %}{% endfor %}",
    "recursive": "{% for x in range(3) recursive %}{% if loop.depth < 60 %}{{ loop(range(3)) }}"
                 "{% endif %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "caller": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 40
              + "x" + "{% endcall %}" * 40,
    "blocks": "".join(f"{{% block b{i} scoped %}}{{{{ self.b{i + 1}() }}}}{{{{ self.b{i + 1}() }}}}"
                      "{% endblock %}" for i in range(50)) + "{% block b50 %}{% endblock %}",
    "filters": "{% for i in range(99999) %}{{ range(99999)|map('string')|list|length }}{% endfor %}",
    "tests": "{{ (['b'] * 90000)|select('in', 'a' * 200000)|list }}",
}
SIZES = {
    "+": grow("ns.x + ns.x", "'a'"), "~": grow("ns.x ~ ns.x", "'a'"),
    "set": grow("t", "'a'").replace("{% set ns.x", "{% set t %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x"),
    "macro": "{% macro f(s) %}{{ s }}{{ s }}{% endmacro %}" + grow("f(ns.x)", "'a'"),
    "output": "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    "*": "{{ 'a' * 10**9 }}", "reversed *": "{{ 10**9 * 'a' }}", "list *": "{{ [1] * 10**9 }}",
    "list +": grow("ns.x + ns.x", "['a' * 999]", "{{ ns.x }}"),
    "lists": grow("[ns.x, ns.x]", "[]", "{{ ns.x }}"), "tuples": grow("(ns.x, ns.x)", "()", "{{ {ns.x: 1} }}"),
    "dicts": grow("dict(a=ns.x, b=ns.x)", "{}", "{{ ns.x == ns.x }}"),
    "namespaces": grow("namespace(a=ns.x, b=ns.x)", "1", "{{ ns.x }}"),
    "batches": grow("ns.x|batch(2, ns.x)|list", "[1]", "{{ ns.x }}"),
    "integers": grow("ns.x * ns.x", "10"), "powers": "{{ (10**999) ** 999 }}",
    "center": "{{ 'a'|center(10**9) }}", "ljust": "{{ 'a'.ljust(10**9) }}", "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ ('\t' * 99999).expandtabs(99999) }}", "indent": "{{ ('\n' * 99999)|indent(99999) }}",
    "join": "{{ (['a'] * 99999)|join('b' * 99999) }}", "method join": "{{ ('b' * 99999).join(['a'] * 99999) }}",
    "lazy join": "{{ range(99999)|map('string')|join('b' * 99999) }}",
    "replace": "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "named replace": "{{ ('a' * 99999)|replace(new='b' * 99999, old='a') }}",
    "method replace": "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "%": "{{ '%999999999d' % 1 }}", "% *": "{{ '%*d' % (10**9, 1) }}", "format filter": "{{ '%999999999d'|format(1) }}",
    "many %": "{{ ('%s' * 9999) % (('a' * 99999,) * 9999) }}", "many fields": "{{ ('{0}' * 9999).format('a' * 99999) }}",
    "format": "{{ '{:>999999999}'.format(1) }}", "nested format": "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "format_map": "{{ '{a:.999999999f}'.format_map({'a': 1.5}) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}", "slice": "{{ [1]|slice(10**9)|list }}",
    "to_bytes": "{{ (5).to_bytes(10**9, 'big') }}", "round": "{{ 1.5|round(10**9) }}",
    "lazy lists": "{{ ([''] * 99999)|map('replace', '', 'b' * 99999)|list }}",
    "lazy defaults": "{{ ([{}] * 99999)|map(attribute='z', default='b' * 99999)|list }}",
    "loop.length": "{% for x in ([''] * 99999)|map('replace', '', 'b' * 99999) %}{{ loop.length }}{% endfor %}",
    "views": "{{ [{'a': 'b' * 99999}.items()] * 9999 }}",
}
SLOW = {
    "strip": "{{ ('a' * 200000).strip('b' * 200000 ~ 'a') }}", "trim": "{{ ('a' * 200000)|trim('b' * 200000 ~ 'a') }}",
    "rfind": "{{ ('a' * 200000).rfind('b' + 'a' * 100000) }}", "wordwrap": "{{ ('a' * 200000)|wordwrap(1) }}",
    "striptags": "{{ ('<!---->' * 30000)|striptags }}", "sum": "{{ ([[1]] * 99999)|sum(start=[]) }}",
}


@pytest.mark.parametrize("source", [pytest.param(source, id=f"{kind}-{name}") for kind, bombs in (
    ("loop", LOOPS), ("size", SIZES), ("slow", SLOW)) for name, source in bombs.items()])
def test_bombs_are_refused(source):
  with pytest.raises(TooMuch):  # without bounds they take hours, or more memory than there is
    render(source)


def test_the_limit_is_named():
  with pytest.raises(TooMuch, match=r"more than limits.max_template_secs=0.2"):
    render(LOOPS["nested"])
  with pytest.raises(TooMuch, match=r"more .* than limits.max_template_chars=262144"):
    render(SIZES["*"])


def test_all_text_together_is_bounded():
  with pytest.raises(TooMuch, match="128 times limits.max_template_chars=262144 characters in all"):
    render("{% set s = 'a' * 100000 %}" + "".join(f"{{% set x{i} = s ~ {i} %}}" for i in range(400)), 9)


@pytest.mark.parametrize("source", [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{% endblock %}"])
def test_deep_recursion_is_an_exception(source):
  with pytest.raises(RecursionError):
    render(source, 9)


def test_a_long_chain_of_lazy_filters_does_not_overflow_the_stack():
  assert render(grow("ns.x|map('upper')", "['a']", "{{ ns.x|first }}", 50_000), 60) == "A"


MESSAGES = [{"role": role, "content": f"{role} says <{i}>\n"} for i, role in enumerate(
    ("system", "user", "assistant", "user"))]


@pytest.mark.parametrize("source", [
    "{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
    "{{ loop.previtem.role if not loop.first }}{% else %}none{% endfor %}",
    "{% for m in messages[::-1] %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.content|trim }}"
    "{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}",
    "{% for m in [] %}x{% else %}empty{% endfor %}{% for x in missing %}x{% endfor %}",
    "{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else '(' ~ loop(x) ~ ')' }}{% endfor %}",
    "{% set ns = namespace(n=0, found=false, l=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.l = ns.l + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.l|join('+') }}{{ ns.found }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join('|') }}",
    "{% if messages|selectattr('role', 'equalto', 'nobody') %}a generator is true{% endif %}",
    "{{ messages|rejectattr('role', 'in', ['user'])|list|length }}{{ messages|map('length')|sum }}",
    "{% macro show(m, mark='-') %}{{ mark }}{{ m.role|upper }}{{ caller() if caller }}{% endmacro %}"
    "{{ show(messages[0]) }}{% call show(messages[1], mark='*') %}!{% endcall %}",
    "{% set a, b = 1, 'x' %}{{ a + 2 * 3 ** 2 // 4 % 5 - 1 }}{{ b * 3 ~ a }}{{ (1, 2) + (3,) }}{{ -a / 2 }}",
    "{{ 'a,b'.split(',') }}{{ '%s-%03d' % ('x', 7) }}{{ '{}:{n:>4}'.format(1, n=2) }}{{ 'a'.center(5) }}|",
    "{{ messages[0].content.replace('<', '[').rstrip('\n').rsplit('s', 1) }}{{ 'x' in 'xyz' }}",
    "{% set x %}block {{ messages[0].role }}{% endset %}{{ x|title }}{% filter upper %}low{% endfilter %}",
    "{{ {'a': 1, 'b': [2]}.items()|list }}{{ {'a': 1}|dictsort }}{{ dict(a=1).a }}{{ [3, 1]|sort|batch(1)|list }}",
    "{{ 'a\nb'|indent(2) }}{{ 1.256|round(1) }}{{ ' x '|trim }}{{ 'x'|default('y') }}{{ none|default('y', true) }}",
    "{% with a = 5 %}{{ a is odd }}{{ a is defined }}{{ a is divisibleby 5 }}{% endwith %}{{ cycler(1, 2).next() }}",
    "{{ messages[0]['role'] if messages and messages[0] else 'none' }}{{ not missing }}{{ ['a'] + ['b'] }}",
    "{{ ('<b>'|e) ~ '<i>' }}{{ ['<']|join|safe }}{{ 'a' < 'b' <= 'c' }}{{ messages|length > 3 }}",
])
def test_other_templates_render_as_in_a_plain_sandbox(source):
  plain = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=[jinja2.ext.loopcontrols])
  assert render(source, 60, messages=MESSAGES) == plain.from_string(source).render(messages=MESSAGES)
