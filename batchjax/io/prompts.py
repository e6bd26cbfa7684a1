"""The prompt of a row: text, token ids or chat messages."""

from typing import Any

import numpy as np

from batchjax.io.fields import Form, InvalidField, reject, token_ids
from batchjax.text import messages
from batchjax.text.chat import RESERVED_NAMES

_SOURCES: dict[Form, tuple[str, ...]] = {
    "chat": ("messages",),
    "completions": ("prompt",),
    "plain": ("prompt", "messages", "prompt_token_ids"),
}


def prompt(fields: dict[str, Any], form: Form) -> str | list[dict[str, Any]] | np.ndarray:
  """Text, messages as `text.messages.normalize` returns them, or i32[prompt_len] token ids.

  Raises:
    InvalidField: there is none, more than one, or it is not well formed.
  """
  sources = [name for name in _SOURCES[form] if name in fields]
  names = " or ".join(_SOURCES[form])
  if not sources:
    raise InvalidField(_SOURCES[form][0], f"the row has no {names}: give it one", "missing_field")
  if len(sources) > 1:
    raise InvalidField(sources[1], f"the row has both {' and '.join(sources)}: keep one of them")
  name, value = sources[0], fields[sources[0]]
  if name == "messages":
    try:
      return messages.normalize(value)
    except messages.MessageError as e:
      raise InvalidField(e.field, str(e), e.code) from e
  if name == "prompt":
    value = _one_prompt(value)
    if value == "":
      raise InvalidField("prompt", "prompt is empty: give it at least one character")
    if isinstance(value, str):
      return value
  ids = token_ids(name, value)
  if not ids:
    raise InvalidField(name, f"{name} is empty: give it at least one token")
  return np.array(ids, np.int32)


def tools(fields: dict[str, Any]) -> list[dict[str, Any]] | None:
  """Function descriptions for the chat template; raises InvalidField where they are malformed.

  Null members of a tool and of its function are dropped; its JSON schema stays as it is.
  """
  value = fields.get("tools")
  if value is None:
    return None
  _needs_messages("tools", fields)
  if not isinstance(value, list):
    reject("tools", "a list", value)
  for i, tool in enumerate(value):
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
      reject(f"tools[{i}]", 'an object such as {"type": "function", "function": {"name": ...}}',
             tool)
  present = lambda members: {name: item for name, item in members.items() if item is not None}
  return [present(tool) | {"function": present(tool["function"])} for tool in value] or None


def chat_template_kwargs(fields: dict[str, Any]) -> dict[str, Any]:
  """Further variables of the chat template; raises InvalidField where it may not have them."""
  value = fields.get("chat_template_kwargs", {})
  if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
    reject("chat_template_kwargs", "an object", value)
  if taken := sorted(RESERVED_NAMES & set(value)):
    raise InvalidField(f"chat_template_kwargs.{taken[0]}", f"chat_template_kwargs may not name "
                       f"{taken[0]}, which every template is given: remove it")
  if value:
    _needs_messages("chat_template_kwargs", fields)
  return value


def _needs_messages(field: str, fields: dict[str, Any]) -> None:
  if "messages" not in fields:
    raise InvalidField(field, f"{field} needs messages: use them instead of a prompt, "
                       f"or remove {field}")


def _one_prompt(value: Any) -> Any:
  """The text or token ids; OpenAI's API also allows a list of prompts, here of one."""
  if isinstance(value, str):
    return value
  if not isinstance(value, list):
    reject("prompt", "a string or a list of token ids", value)
  if not value or not isinstance(value[0], (str, list)):
    return value
  if len(value) > 1:
    raise InvalidField("prompt", f"prompt is a list of {len(value)} prompts: "
                       "write one row for each", "unsupported")
  return value[0]
