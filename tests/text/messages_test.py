"""Messages from anywhere come into one form."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchjax.text.messages import Arguments, MessageError, normalize

FUNCTION = {"name": "f", "arguments": {"a": 1, "deep": {"b": ["c", {"d": False}]}}}
CLEAN = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
    {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}],
     "reasoning_content": "r", "thinking": "r"},
    {"role": "tool", "tool_call_id": "1", "content": "2", "more": {"x": {"y": 0, "z": ""}}}]


def noisy(draw, value, in_arguments=False):
  """The value with members that say nothing, at any depth."""
  if isinstance(value, list):
    return [noisy(draw, item, in_arguments) for item in value]
  if not isinstance(value, dict):
    return value
  empty = [None] if in_arguments else [None, []]
  value = {name: noisy(draw, item, in_arguments or name == "arguments")
           for name, item in value.items()}
  names = ("refusal", "annotations", "audio", "function_call", "index", "tool_calls")
  return {name: draw(st.sampled_from(empty)) for name in names
          if name not in value and draw(st.booleans())} | value


@given(st.data())
def test_what_says_nothing_is_as_absent(data):
  assert normalize(noisy(data.draw, CLEAN)) == normalize(CLEAN) == CLEAN


def test_normal_messages_stay():
  once = normalize(CLEAN)
  assert normalize(once) == once
  assert str(normalize(once)[2]["tool_calls"][0]["function"]["arguments"]) == json.dumps(
      FUNCTION["arguments"])
  assert isinstance(CLEAN[2]["tool_calls"][0]["function"]["arguments"], dict)  # as it was given


def arguments_of(given):
  call = {"function": {"name": "f", "arguments": given}}
  return normalize([{"role": "assistant", "tool_calls": [call]}])[0]["tool_calls"][0][
      "function"]["arguments"]


def test_arguments_in_a_string_keep_all_that_is_in_them():
  value = {"a": None, "b": [], "c": {"d": [None, {}]}}
  assert arguments_of(json.dumps(value)) == value
  assert arguments_of(value) == {"b": [], "c": {"d": [None, {}]}}  # Parquet cannot tell a null
  assert arguments_of(None) == arguments_of("{}") == arguments_of(" {} ") == {}


def test_arguments_beside_the_name():
  [message] = normalize([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}],
                          "function_call": {"name": "f", "arguments": '{"a": 1}'}}])
  assert message["tool_calls"] == [{"name": "f", "arguments": {}}]
  assert message["function_call"]["arguments"] == {"a": 1}


def test_arguments_are_an_object_and_its_text():
  arguments = Arguments({"a": "é"}, '{"a":"é"}')
  assert (arguments, str(arguments), "<" + arguments + ">") == (
      {"a": "é"}, '{"a":"é"}', '<{"a":"é"}>')
  assert json.dumps(arguments) == json.dumps({"a": "é"})


@pytest.mark.parametrize("given", ["", "x", "[]", "3", "null", 3, [1], True, '{"a": "\\ud800"}',
                                   "{" + '"a":' * 3, '{"a": ' + "9" * 5000 + "}"])
def test_arguments_that_are_no_object(given):
  with pytest.raises(MessageError, match="or a string that holds one as JSON") as e:
    arguments_of(given)
  assert e.value.field == "messages[0].tool_calls[0].function.arguments"
  assert len(str(e.value)) < 250
