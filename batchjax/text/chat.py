"""Chat messages to the text of a prompt, by the model's own jinja2 template."""

import dataclasses
import datetime
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes

from batchjax.config import RowLimits
from batchjax.text.sandbox import BoundedEnvironment

from batchjax.text.messages import Message, MessageError, content_text, map_strings, normalize
from batchjax.text.special_text import SpecialText
from batchjax.text.template_reads import TemplateReads, template_reads

# Names that `render` gives to the template itself, so that no row may.
RESERVED_NAMES = frozenset(["messages", "tools", "add_generation_prompt", "bos_token", "eos_token",
                            "pad_token", "unk_token"])


class _GenerationBlock(jinja2.ext.Extension):
  """`{% generation %}` marks what the assistant said for training; here it is only text.

  A scope of its own, as in transformers: what is set inside is not seen outside.
  """

  tags = {"generation"}

  def parse(self, parser: Any) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method("text"), [], [], body).set_lineno(line)

  def text(self, caller: Any) -> str:
    """What the block wrote."""
    return caller()


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A compiled template, and what it reads of its messages."""

  template: jinja2.Template
  reads: TemplateReads


def compile_template(source: str, limits: RowLimits = RowLimits()) -> ChatTemplate:
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
    return ChatTemplate(environment.from_string(source), template_reads(environment, source))
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(f"the chat template is not valid at line {error.lineno}: "
                     f"{error.message}") from error
  except Exception as error:  # the parser and Python's compiler recurse
    raise ValueError("the chat template cannot be compiled "
                     f"({type(error).__name__}: {error}): simplify it") from error


def choose(templates: Mapping[str, ChatTemplate], tools: Any) -> ChatTemplate | None:
  """Of a model's named templates "tool_use" where there are tools, else "default"."""
  return (templates.get("tool_use") if tools else None) or templates.get("default")


def render(template: str | ChatTemplate, messages: Sequence[Message], /, *,
           add_generation_prompt: bool = True,
           tools: Sequence[Mapping[str, Any]] | None = None,
           special_tokens: Mapping[str, str] = types.MappingProxyType({}),
           special_text: SpecialText | None = None, **names: Any) -> str:
  """The prompt that `messages` make.

  The template writes BOS itself where the model wants one, so encode the
  result with `Tokenizer.encode_chat`.

  Args:
    template: source, or what `compile_template` made of it (for many calls).
    messages: each has `role` and, as a rule, `content`: a string, or a list of
      parts {"type": "text", "text": ...}. They are brought into the form that the
      template expects (`messages.normalize`): parts stay parts for a template that
      goes through them, for others their texts are joined by a space.
    add_generation_prompt: end with the opening of the assistant's turn.
    tools: JSON schemas of functions that the model may call.
    special_tokens: `Tokenizer.special_tokens`, under their names for the template.
    special_text: `Tokenizer.special_text`: names of special tokens in messages, tools and
      `names` stay text. None lets them become tokens, as transformers does.
    **names: further names for the template; they win over its built-in ones.

  Raises:
    ValueError: a message is malformed (`MessageError`), or the template is invalid,
      never reads the tools, refuses the messages or uses something undefined; with the
      template's own message.
  """
  if isinstance(template, str):
    template = compile_template(template)
  if tools and not template.reads.tools:
    raise MessageError("tools", "the chat template never reads tools: remove them, describe them "
                       "in a message, or set chat_template to a template that reads them",
                       "unsupported")
  messages = [_shape(message, template.reads) for message in normalize(messages)]
  if special_text is not None:
    messages, tools, names = (map_strings(value, special_text.hide)
                              for value in (messages, tools, names))
  given = dict(messages=messages, tools=tools, documents=None,
               add_generation_prompt=add_generation_prompt)
  try:
    return template.template.render({**given, **special_tokens, **names})
  except jinja2.TemplateError as error:
    raise ValueError(f"the chat template refused the messages: {error}") from error
  except Exception as error:  # what a template can raise over messages that it was not written for
    raise ValueError("the chat template refused the messages: "
                     f"{type(error).__name__}: {error}") from error


def _shape(message: dict[str, Any], reads: TemplateReads) -> dict[str, Any]:
  """The message with its content in the form that the template reads."""
  content = message.get("content")
  if content is None:  # most templates add it to text; those that ask for none want to see it
    content = None if reads.nulls else ""
  elif not reads.parts:
    content = content_text(content)
  if reads.parts and not reads.strings and isinstance(content, str):
    content = [{"type": "text", "text": content}] if content else []
  return {**message, "content": content}


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
  # Jinja's own filter escapes HTML characters and sorts keys; models were trained on plain JSON.
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
  return datetime.datetime.now().strftime(pattern)
