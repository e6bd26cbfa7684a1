"""Chat templates: the names they use, and what happens when they refuse."""

import pytest

from batchjax.text import compile_template, render

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


def test_text_parts_are_joined():
  parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
  messages = [{"role": "user", "content": parts}]
  assert show("{{ messages[0]['content'] + '!' }}", messages) == "a\nb!"
  assert messages[0]["content"] is parts  # what the caller gave is left alone


def test_content_may_be_missing_or_none():
  calls = [{"role": "assistant", "tool_calls": [{"name": "f"}]},
           {"role": "assistant", "content": None, "tool_calls": [{"name": "g"}]}]
  template = ("{% for m in messages %}{{ m.tool_calls[0].name }}"
              "{{ m.content is defined and m.content is not none }} {% endfor %}")
  assert show(template, calls) == "fFalse gFalse "


@pytest.mark.parametrize(("messages", "error"), [
    ([{"content": "hi"}], r"messages\[0\] needs a `role`"),
    ([*USER, {"role": 3, "content": "hi"}], r"messages\[1\] needs a `role`"),
    (["hi"], r"messages\[0\] needs a `role`"),
    ([{"role": "user", "content": 3}], r"messages\[0\].content must be a string .* got int"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "part of type 'image_url'"),
    ([{"role": "user", "content": ["hi"]}], "part of type None"),
    ([{"role": "user", "content": [{"type": "text"}]}], "part of type 'text'")])
def test_malformed_messages(messages, error):
  with pytest.raises(ValueError, match=error):
    show("{{ messages }}", messages)


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
