"""Chat messages in the form that templates expect, whatever wrote them."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

Message = Mapping[str, Any]

# Under which names a message's reasoning is found; templates read the first, gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class MessageError(ValueError):
  """A message, or what comes with it, is not as it must be.

  Attributes:
    field: the place, as "messages[0].content".
    code: of `io.records.RowError`.
  """

  def __init__(self, field: str, message: str, code: str = "invalid_value"):
    super().__init__(message)
    self.field, self.code = field, code


class Arguments(dict):
  """Arguments of a tool call: an object, and its JSON where a template writes it as text.

  Most templates take an object, and some join the string of OpenAI's format to others.
  """

  def __init__(self, value: Mapping[str, Any], written: str | None = None):
    super().__init__(value)
    self._written = json.dumps(value, ensure_ascii=False) if written is None else written

  def __str__(self) -> str:
    return self._written

  def __add__(self, other: str) -> str:
    return self._written + other

  def __radd__(self, other: str) -> str:
    return other + self._written


def normalize(messages: Any) -> list[dict[str, Any]]:
  """Messages as templates expect them; what is normal already stays as it is.

  A member that is null or an empty list is as absent, at any depth; files made from
  columns and the SDKs write them for what is not there. Arguments of tool calls
  become objects: a string is decoded, and keeps every null and list in it; of an
  object nulls are dropped, and lists stay. Content is a string or parts of text, and
  only an assistant's may be absent. Reasoning is found under every name for it.

  Raises:
    MessageError: a message is malformed.
  """
  if not isinstance(messages, Sequence) or isinstance(messages, str):
    _reject("messages", "a list of objects with role and content", messages)
  if not messages:
    raise MessageError("messages", "messages is empty: give it at least one message")
  try:
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
  except RecursionError as error:
    raise MessageError("messages", "messages are nested too deeply: flatten them") from error


def content_text(content: Any) -> Any:
  """The content as one text, its parts joined by a space, as transformers' server joins them."""
  return " ".join(part["text"] for part in content) if isinstance(content, list) else content


def map_strings(value: Any, text_fn: Callable[[str], str]) -> Any:
  """The value with `text_fn` applied to every string in it, names of members too."""
  if isinstance(value, str):
    return text_fn(value)
  if isinstance(value, Mapping):
    mapped = {text_fn(name): map_strings(item, text_fn) for name, item in value.items()}
    return Arguments(mapped, text_fn(str(value))) if isinstance(value, Arguments) else mapped
  return [map_strings(item, text_fn) for item in value] if isinstance(value, list) else value


def _message(where: str, message: Any) -> dict[str, Any]:
  if not isinstance(message, Mapping):
    _reject(where, "an object with role and content", message)
  message = _present(message)
  role = message.get("role")
  if not isinstance(role, str) or not role:
    _reject(f"{where}.role", 'a string such as "user"', role)
  if "tool_calls" in message:
    calls = message["tool_calls"]
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
      _reject(f"{where}.tool_calls", "a list of objects", calls)
    message["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", c) for i, c in enumerate(calls)]
  if isinstance(message.get("function_call"), Mapping):
    message["function_call"] = _call(f"{where}.function_call", message["function_call"])
  if "content" in message or role != "assistant":
    message["content"] = _content(f"{where}.content", message.get("content"))
  reasoning = next((message[name] for name in _REASONING if name in message), None)
  if reasoning is not None:
    message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
  return message


def _present(value: Any) -> Any:
  if isinstance(value, Arguments):
    return value
  if isinstance(value, Mapping):
    return {name: _without_nulls(item) if name == "arguments" else _present(item)
            for name, item in value.items() if item is not None and item != []}
  return [_present(item) for item in value] if isinstance(value, list) else value


def _without_nulls(value: Any) -> Any:
  if isinstance(value, Mapping) and not isinstance(value, Arguments):
    return {name: _without_nulls(item) for name, item in value.items() if item is not None}
  return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _call(where: str, call: Mapping[str, Any]) -> dict[str, Any]:
  """A tool call with decoded arguments; they lie in its `function`, or beside the name."""
  function = call.get("function")
  if function is None and "arguments" in call:
    return {**call, "arguments": _arguments(f"{where}.arguments", call["arguments"])}
  if function is None:
    return dict(call)
  if not isinstance(function, Mapping):
    _reject(f"{where}.function", "an object with name and arguments", function)
  arguments = _arguments(f"{where}.function.arguments", function.get("arguments", {}))
  return {**call, "function": {**function, "arguments": arguments}}


def _arguments(where: str, value: Any) -> Arguments:
  written = None
  if isinstance(value, str):
    written = value
    try:
      value = json.loads(written)
      json.dumps(value, ensure_ascii=False).encode("utf-8")  # no half of a surrogate pair
    except ValueError:
      value = written
  if isinstance(value, Arguments):
    return value
  if not isinstance(value, Mapping):
    _reject(where, 'an object, or a string that holds one as JSON such as "{}"', value)
  return Arguments(value, written)


def _content(where: str, content: Any) -> str | list[dict[str, Any]]:
  if isinstance(content, str):
    return content
  if not isinstance(content, list):
    _reject(where, "a string or a list of text parts", content)
  for i, part in enumerate(content):
    if isinstance(part, Mapping) and part.get("type") not in (None, "text"):
      raise MessageError(f"{where}[{i}]", f"{where}[{i}] is of type {part['type']!r}, but the "
                         "model reads text alone: remove it", "unsupported")
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
      _reject(f"{where}[{i}]", 'an object such as {"type": "text", "text": ...}', part)
  return [{"type": "text", **part} for part in content]


def _reject(field: str, rule: str, value: Any) -> NoReturn:
  shown = json.dumps(value, ensure_ascii=False, default=repr)
  raise MessageError(field, f"{field} must be {rule}, got {shown[:60]}{'…' * (len(shown) > 60)}")
