"""What --help prints: a command's own flags and every field of the configuration."""

from collections.abc import Iterable, Iterator
import dataclasses
import shutil
import textwrap
import types
import typing
from typing import Any, NamedTuple

from absl import flags

from batchjax.config import JobConfig

_MAX_COLUMNS = 100


class Field(NamedTuple):
  """A field of the configuration, for people: its class, its own name, its type in words, its default."""

  owner: type
  name: str
  kind: str
  default: str


def fields(cls: type = JobConfig, prefix: str = "") -> dict[str, Field]:
  """The fields of a dataclass by their dotted names, those of dataclasses inside too."""
  found, hints = {}, typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    hint, name = hints[field.name], f"{prefix}{field.name}"
    default = "" if field.default is dataclasses.MISSING else repr(field.default)
    found |= fields(hint, f"{name}.") if dataclasses.is_dataclass(hint) else {
        name: Field(cls, field.name, _kind(hint), default)}
  return found


def meaning(field: Field) -> str:
  """What the docstring of its class says of a field."""
  import docstring_parser  # help alone needs it
  attributes = {p.arg_name: p.description for p in docstring_parser.parse(field.owner.__doc__).params}
  return " ".join(attributes[field.name].split())


def _kind(hint: Any) -> str:
  """A type in words."""
  origin, args = typing.get_origin(hint), [a for a in typing.get_args(hint) if a is not Ellipsis]
  if origin is typing.Literal:
    return " or ".join(map(str, args))
  if origin in (typing.Union, types.UnionType):
    return " or ".join(_kind(arg) for arg in args if arg is not type(None))
  if origin is tuple:
    return f"({', '.join(map(_kind, args))}{', ...' if Ellipsis in typing.get_args(hint) else ''})"
  return hint.__name__


def of_command(document: str, own: Iterable[flags.Flag], *, has_all: bool = False) -> str:
  """The text.

  Args:
    document: what the command does, with an example.
    own: its flags.
    has_all: with absl's flags too.
  """
  own = list(own)
  lines = [document.strip(), "", "Flags:", *entries(map(_flag, own))]
  if any(flag.name == "config" for flag in own):
    lines += ["", "Fields of the configuration; the defaults hold where its file says nothing:", *entries(
                  (_heading(f"config.{name}", field.kind, field.default), meaning(field))
                  for name, field in fields().items())]
  if has_all:
    modules = flags.FLAGS.flags_by_module_dict()
    others = {flag.name: flag for module in modules.values() for flag in module if flag not in own}
    lines += ["", "Flags of absl:", *entries(_flag(others[name]) for name in sorted(others))]
  else:
    lines += ["", "--helpfull lists the flags of absl too, which are those of logging."]
  return "\n".join(lines)


def _flag(flag: flags.Flag) -> tuple[str, str]:
  kind = " or ".join(getattr(flag.parser, "enum_values", [])) or {
      "string": "str", "config object": "str"}.get(flag.flag_type(), flag.flag_type())
  is_required = flag.default is None and not all(v.checker(None) for v in flag.validators)
  default = "" if flag.default is None else repr(flag.default)
  return _heading(flag.name, kind, default, is_required), flag.help or ""


def _heading(name: str, kind: str, default: str, is_required: bool = False) -> str:
  shown = f"--[no]{name}" if kind == "bool" else f"--{name}=<{kind}>"
  return f"{shown}{'  (required)' if is_required else f'  (default {default})' if default else ''}"


def entries(entries: Iterable[tuple[str, str]]) -> Iterator[str]:
  """Lines of headings, each with its meaning below it, for the width of the terminal."""
  width = min(_MAX_COLUMNS, shutil.get_terminal_size().columns)
  for heading, meaning in entries:
    yield f"  {heading}"
    yield from textwrap.wrap(meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
