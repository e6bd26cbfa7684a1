"""Chat messages to the text of a prompt, by the model's own jinja2 template."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes

from batchjax.config import RowLimits
from batchjax.text.sandbox import BoundedEnvironment

Message = Mapping[str, Any]

# Names that `render` gives to the template itself, so that no row may.
RESERVED_NAMES = frozenset(["messages", "tools", "add_generation_prompt", "bos_token", "eos_token",
                            "pad_token", "unk_token"])


class _GenerationBlock(jinja2.ext.Extension):
  """`{% generation %}` marks what the assistant said for training; here it is only text."""

  tags = {"generation"}

  def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str, limits: RowLimits = RowLimits()) -> jinja2.Template:
  """Compiles a chat template in a sandbox, with the names that Hugging Face templates use.

  Args:
    source: of the template.
    limits: time and size of one rendering.

  Raises:
    ValueError: the source is no jinja2 template; the message names the line.
  """
  environment = BoundedEnvironment(
      limits.max_template_secs, limits.max_template_chars, trim_blocks=True, lstrip_blocks=True,
      extensions=[jinja2.ext.loopcontrols, _GenerationBlock])
  environment.add_filter("tojson", _to_json)
  environment.globals.update(raise_exception=_raise, strftime_now=_strftime_now)
  try:
    return environment.from_string(source)
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(f"the chat template is not valid at line {error.lineno}: "
                     f"{error.message}") from error
  except Exception as error:  # the parser and Python's compiler recurse
    raise ValueError("the chat template cannot be compiled "
                     f"({type(error).__name__}: {error}): simplify it") from error


def render(template: str | jinja2.Template, messages: Sequence[Message], /, *, bos_token: str,
           eos_token: str, add_generation_prompt: bool = True,
           tools: Sequence[Mapping[str, Any]] | None = None, **extra: Any) -> str:
  """The prompt that `messages` make.

  The template writes BOS itself where the model wants one, so encode the
  result with `add_special_tokens=False`.

  Args:
    template: source, or what `compile_template` made of it (for many calls).
    messages: each has `role` and, as a rule, `content`: a string, or a list of
      parts {"type": "text", "text": ...}, which are joined by line breaks.
    bos_token, eos_token: their text; "" where the model has none.
    add_generation_prompt: end with the opening of the assistant's turn.
    tools: JSON schemas of functions that the model may call.
    **extra: further names for the template; they win over its built-in ones.

  Raises:
    ValueError: a message is malformed, or the template is invalid, refuses the
      messages or uses something undefined; with the template's own message.
  """
  if isinstance(template, str):
    template = compile_template(template)
  names = dict(messages=[_flatten_content(message, i) for i, message in enumerate(messages)],
               tools=tools, documents=None, add_generation_prompt=add_generation_prompt,
               bos_token=bos_token, eos_token=eos_token)
  try:
    return template.render({**names, **extra})
  except jinja2.TemplateError as error:
    raise ValueError(f"the chat template refused the messages: {error}") from error
  except Exception as error:  # what a template can raise over messages that it was not written for
    raise ValueError("the chat template refused the messages: "
                     f"{type(error).__name__}: {error}") from error


def _flatten_content(message: Message, index: int) -> Message:
  if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
    raise ValueError(f"messages[{index}] needs a `role` that is a string")
  content = message.get("content")
  if content is None or isinstance(content, str):
    return message
  if not isinstance(content, Sequence):
    raise ValueError(f"messages[{index}].content must be a string or a list of text parts, "
                     f"got {type(content).__name__}")
  return {**message, "content": "\n".join(_part_text(part, index) for part in content)}


def _part_text(part: Any, index: int) -> str:
  kind = part.get("type") if isinstance(part, Mapping) else None
  if kind != "text" or not isinstance(part.get("text"), str):
    raise ValueError(f"messages[{index}].content has a part of type {kind!r}; only parts "
                     '{"type": "text", "text": ...} are understood')
  return part["text"]


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
  # Jinja's own filter escapes HTML characters and sorts keys; models were trained on plain JSON.
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
  return datetime.datetime.now().strftime(pattern)
