"""Chat templates: the names they use, and what happens when they refuse."""

import json
from pathlib import Path

import pytest

from batchjax.text import compile_template, render
from batchjax.text.chat import choose
from batchjax.text.messages import MessageError

USER = [{"role": "user", "content": "hi"}]


def show(template, messages=USER, **names):
  return render(template, messages, bos_token="<s>", eos_token="</s>", **names)


def test_names_of_a_template():
  template = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
              "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")
  assert show(template) == "<s>[user]hi</s>[assistant]"
  assert show(template, add_generation_prompt=False) == "<s>[user]hi</s>"
  assert show(compile_template(template)) == show(template)


def test_blocks_leave_no_lines_behind():
  assert show("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n"
              "{% endfor %}") == "hi\n"


def test_loop_controls_and_generation_blocks():
  assert show("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
              "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "02"
  assert show("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "ahib"


def test_tojson_is_plain_json():
  tools = [{"name": "f<b>", "x": {"z": 1, "a": "é'"}}]
  assert show("{{ tools[0] | tojson }}", tools=tools) == (
      '{"name": "f<b>", "x": {"z": 1, "a": "é\'"}}')
  assert show("{{ tools[0].x | tojson(indent=1) }}", tools=tools) == (
      '{\n "z": 1,\n "a": "é\'"\n}')
  assert show("{% if tools %}yes{% else %}no{% endif %}") == "no"


def test_extra_names_win():
  assert show("{{ enable_thinking }}", enable_thinking=False) == "False"
  assert len(show("{{ strftime_now('%Y-%m-%d') }}")) == 10
  assert show("{{ strftime_now('%Y') }}", strftime_now=lambda pattern: "then") == "then"


def test_text_parts_are_joined_for_templates_that_take_text():
  parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
  messages = [{"role": "user", "content": parts}]
  assert show("{{ messages[0]['content'] + '!' }}", messages) == "a b!"
  assert messages[0]["content"] is parts  # what the caller gave is left alone


LOOP = "{% for p in m.content %}({{ p.text }}){% endfor %}"


@pytest.mark.parametrize("body", [
    LOOP, "{% for p in m['content'] | list %}({{ p.text }}){% endfor %}",
    "{% set c = m.content %}{% for p in c %}({{ p.text }}){% endfor %}",
    "{% macro parts(content) %}{% for p in content[0:] %}({{ p.text }}){% endfor %}{% endmacro %}"
    "{{ parts(m.content) }}",
    "{% for p in m.content or [] %}({{ p['text'] }}){% endfor %}",
    "{% if m.content is string %}{{ '(' + m.content + ')' }}{% else %}" + LOOP + "{% endif %}"])
def test_templates_that_go_through_parts_get_parts(body):
  template = "{% for m in messages %}" + body + ";{% endfor %}"
  text = lambda content: show(template, [{"role": "user", "content": content}])
  assert text([{"text": "a"}, {"type": "text", "text": "b"}]) == "(a)(b);"
  assert text("ab") == "(ab);"  # a string is one part, and never its characters
  absent = [{"role": "assistant"}]
  assert show(template, absent) == ("();" if "string" in body else ";")


@pytest.mark.parametrize("body", [
    "{% for line in m.content.split(' ') %}{{ line }} {% endfor %}",
    "{% for c in m.content %}{{ c }}{% endfor %} ",
    # A message that holds calls in its content, beside others whose content is text.
    "{% if m.role == 'calls' %}{% set calls = m.content %}{% for c in calls %}{{ c.function.name }}"
    "{% endfor %}{% else %}{{ m.content + ' ' }}{% endif %}"])
def test_templates_that_go_through_something_else_get_text(body):
  template = "{% for m in messages %}" + body + "{% endfor %}"
  for content in ("a b", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]):
    assert show(template, [{"role": "user", "content": content}]) == "a b "


def test_absent_content_is_empty_and_never_the_word_none():
  calls = [{"role": "assistant", "tool_calls": [{"name": "f"}]},
           {"role": "assistant", "content": None, "tool_calls": [{"name": "g"}]},
           {"role": "assistant", "content": [], "tool_calls": [{"name": "h"}]}]
  template = "{% for m in messages %}{{ m.tool_calls[0].name + m.content }} {% endfor %}"
  assert show(template, calls) == "f g h "


@pytest.mark.parametrize("test", ["m.content is none", "m['content'] == none",
                                  "m.content is not defined or m.content is none"])
def test_templates_that_ask_for_none_see_none(test):
  template = "{% for m in messages %}{% if " + test + " %}call{% else %}say{% endif %} {% endfor %}"
  messages = [{"role": "assistant", "tool_calls": [{"name": "f"}]},
              {"role": "assistant", "content": "a"}]
  assert show(template, messages) == "call say "


def test_arguments_are_objects_that_are_written_as_json():
  template = ("{% for c in messages[0].tool_calls %}{% set a = c.function.arguments %}"
              "{{ a | tojson }} {{ a is mapping }} {{ a.x }} {{ a }} {{ '>' + a + '<' }} "
              "{{ a ~ '' }} {% for k, v in a | items %}{{ k }}={{ v }}{% endfor %};{% endfor %}")
  calls = lambda *arguments: [{"role": "assistant", "tool_calls": [
      {"function": {"name": "f", "arguments": given}} for given in arguments]}]
  assert show(template, calls({"x": "é"}, '{"x":"é"}')) == (
      '{"x": "é"} True é {"x": "é"} >{"x": "é"}< {"x": "é"} x=é;'
      '{"x": "é"} True é {"x":"é"} >{"x":"é"}< {"x":"é"} x=é;')
  assert show("{{ messages[0].tool_calls[0].function.arguments | tojson }}",
              [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]) == "{}"


def test_reasoning_is_found_under_each_of_its_names():
  for name in ("reasoning_content", "thinking", "reasoning"):
    messages = [{"role": "assistant", "content": "a", name: "r"}]
    assert show("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}", messages) == "rr"


def test_tools_need_a_template_that_reads_them():
  tools = [{"type": "function", "function": {"name": "f"}}]
  assert show("{% if not tools is defined %}{% set tools = none %}{% endif %}"
              "{{ tools[0].function.name }}", tools=tools) == "f"
  with pytest.raises(MessageError, match="never reads tools: remove them, .*chat_template") as e:
    show("{% set tools = [] %}{{ tools }}", tools=tools)
  assert e.value.field == "tools"
  assert show("x", tools=[]) == show("x", tools=None) == "x"


def test_tools_choose_the_template_of_that_name():
  templates = {name: compile_template(name) for name in ("default", "tool_use")}
  assert choose(templates, None) is templates["default"]
  assert choose(templates, [{}]) is templates["tool_use"]
  assert choose({"default": templates["default"]}, [{}]) is templates["default"]
  assert choose({"tool_use": templates["tool_use"]}, []) is None


def test_generation_blocks_are_scopes():
  assert show("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
              ) == "21"


def test_special_tokens_have_their_names_and_what_a_model_lacks_is_undefined():
  tokens = {"pad_token": "<pad>", "unk_token": "<unk>"}
  template = "{{ pad_token }}{{ unk_token }}{{ mask_token is defined }}{{ sep_token }}"
  assert show(template, special_tokens=tokens) == "<pad><unk>False"
  assert show("{{ pad_token }}", special_tokens=tokens, pad_token="x") == "x"


@pytest.mark.parametrize(("messages", "field", "error"), [
    ("hi", "messages", "a list of objects"),
    ([], "messages", "is empty"),
    ([{"content": "hi"}], "messages[0].role", 'a string such as "user"'),
    ([*USER, {"role": 3, "content": "hi"}], "messages[1].role", "got 3"),
    (["hi"], "messages[0]", "an object with role and content"),
    ([{"role": "user", "content": 3}], "messages[0].content", "a string or a list .* got 3"),
    ([{"role": "user", "content": None}], "messages[0].content", "a string or a list .* got null"),
    ([{"role": "tool"}], "messages[0].content", "a string or a list"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]",
     "of type 'image_url'"),
    ([{"role": "user", "content": ["hi"]}], "messages[0].content[0]", "an object such as"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]", "an object")])
def test_malformed_messages(messages, field, error):
  with pytest.raises(MessageError, match=error) as e:
    show("{{ messages }}", messages)
  assert e.value.field == field


def test_what_is_nested_too_deeply_is_a_malformed_message():
  deep = []
  for _ in range(5000):
    deep = [deep]
  with pytest.raises(MessageError, match="nested too deeply"):
    show("x", [{"role": "user", "content": "x", "more": deep}])
  with pytest.raises(MessageError, match="nested too deeply"):
    show("x", [{"role": "assistant", "function_call": {"arguments": '{"a":' * 9999}}])


@pytest.mark.parametrize(("template", "error"), [
    ("{{ raise_exception('roles must alternate') }}", "refused.*roles must alternate"),
    ("a\n{% if %}", "not valid at line 2"),
    ("{{ 'a' + messages[0]['name'] }}", "refused.*no attribute 'name'"),
    ("{{ nothing.at_all }}", "'nothing' is undefined"),
    ("{{ 'a' + none }}", "refused"),
    ("{{ 'a' | unknown_filter }}", "not valid.*unknown_filter"),
    ("{{ messages.append(1) }}", "refused"),
    ("{{ ''.__class__.__mro__ }}", "refused"),
    ("{{ range(99999999) | list }}", "refused"),
    ("{{ 1 // 0 }}", "refused")])
def test_template_errors_are_value_errors(template, error):
  with pytest.raises(ValueError, match=error):
    show(template)


GOLDENS = json.loads(Path(__file__).with_name("chat_transformers.json").read_text("utf-8"))


def in_strings(messages):
  """The same with arguments as OpenAI's API writes them."""
  messages = json.loads(json.dumps(messages))
  for call in (call for message in messages for call in message.get("tool_calls", ())):
    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
  return messages


@pytest.mark.parametrize("case", GOLDENS["cases"])
def test_prompts_are_those_of_transformers(case):
  """make_transformers_goldens.py wrote them."""
  template = GOLDENS["templates"][case["template"]]
  options = {"tools": case["tools"], "special_tokens": GOLDENS["special_tokens"], **case["names"]}
  assert render(template, case["messages"], **options) == case["text"]
  assert render(template, in_strings(case["messages"]), **options) == case["text"]
