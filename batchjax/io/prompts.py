"""The prompt of a row, text, token ids or chat messages; and the continuations to score behind it."""

from typing import Any

import numpy as np

from batchjax.config import RowLimits
from batchjax.io.fields import Form, InvalidField, reject, require_at_most, token_ids
from batchjax.text import messages
from batchjax.text.chat import RESERVED_NAMES

_SOURCES: dict[Form, tuple[str, ...]] = {
    "chat": ("messages",),
    "completions": ("prompt",),
    "plain": ("prompt", "messages", "prompt_token_ids"),
    "score": ("prompt", "messages", "prompt_token_ids"),
}
_CONTINUATIONS = ("continuation", "continuations", "continuation_token_ids")


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
    if value == "" and form != "score":
      raise InvalidField("prompt", "prompt is empty: give it at least one character")
    if isinstance(value, str):
      return value
  return np.array(_some_ids(name, value), np.int32)


def scored(fields: dict[str, Any], limits: RowLimits) -> tuple[
    Form, str | list[dict[str, Any]] | np.ndarray, tuple[str, ...] | tuple[np.ndarray, ...]]:
  """What a row to score is, its prompt ("" for a whole text), and its continuations, one at least.

  Raises:
    InvalidField: a part is missing, not well formed, or does not go with another.
  """
  if "text" in fields:
    if others := [name for name in (*_SOURCES["score"], *_CONTINUATIONS) if name in fields]:
      raise InvalidField(others[0], f"the row has both text and {others[0]}: text is scored whole, keep "
                         "one of them")
    return "document", "", (_text("text", fields["text"]),)
  given = [name for name in _CONTINUATIONS if name in fields]
  if not given:
    raise InvalidField("continuation", f"the row has no {' or '.join(_CONTINUATIONS)}: give it one, or "
                       "text alone to score a whole text", "missing_field")
  if len(given) > 1:
    raise InvalidField(given[1], f"the row has both {' and '.join(given)}: keep one of them")
  name, value, before = given[0], fields[given[0]], prompt(fields, "score")
  is_list = name == "continuations"
  if is_list and not (isinstance(value, list) and value):
    reject(name, "a list of strings, one at least", value)
  if name == "continuation_token_ids":
    is_list = isinstance(value, list) and any(isinstance(item, list) for item in value)
    parts = tuple(np.array(_some_ids(part, ids), np.int32) for part, ids in _named(name, value, is_list))
  elif isinstance(before, np.ndarray):
    raise InvalidField(name, f"{name} is text and the prompt is not, so that it is open where their tokens "
                       "meet: give continuation_token_ids, or a prompt of text")
  else:
    parts = tuple(_text(part, text) for part, text in _named(name, value, is_list))
  require_at_most(name, len(parts), "continuations", limits, "max_n")
  return "choices" if is_list else "score", before, parts


def _named(name: str, value: Any, is_list: bool) -> list[tuple[str, Any]]:
  return [(f"{name}[{i}]", item) for i, item in enumerate(value)] if is_list else [(name, value)]


def _text(name: str, value: Any) -> str:
  if not isinstance(value, str) or not value:
    reject(name, "a string that is not empty", value)
  return value


def _some_ids(name: str, value: Any) -> list[int]:
  ids = token_ids(name, value)
  if not ids:
    raise InvalidField(name, f"{name} is empty: give it at least one token")
  return ids


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
