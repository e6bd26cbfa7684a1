"""What every tokenizer file comes down to, whatever its format."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Codec(Protocol):
  """Text to ids, by the library that owns the format."""

  def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    ...

  def to_json(self) -> str:
    ...


@dataclasses.dataclass(frozen=True)
class Vocab:
  """A tokenizer file, read.

  Attributes:
    codec: turns text into ids.
    pieces: for each id the bytes it stands for; those of a special token spell its name.
    special_ids: tokens that are no text: left out when a text is decoded.
    has_space_prefix: the encoder puts a space before a text, so decoding a whole text drops it.
    bos_token_id: None where the model has no such token.
    eos_token_ids: tokens that end a text, the main one first.
    chat_template: jinja2 source, or None.
  """

  codec: Codec
  pieces: Sequence[bytes]
  special_ids: frozenset[int]
  has_space_prefix: bool
  bos_token_id: int | None
  eos_token_ids: tuple[int, ...]
  chat_template: str | None


@dataclasses.dataclass(frozen=True)
class FolderConfig:
  """What the JSON files beside a Hugging Face tokenizer say.

  Attributes:
    bos_token, eos_token: their text, or None.
    eos_token_ids: of generation_config.json.
    adds_bos: whether encoding puts BOS first; None leaves it to the tokenizer's own file.
    chat_template: jinja2 source, or None.
    added_tokens: id to (text, is special).
  """

  bos_token: str | None
  eos_token: str | None
  eos_token_ids: tuple[int, ...]
  adds_bos: bool | None
  chat_template: str | None
  added_tokens: Mapping[int, tuple[str, bool]]


def read_folder_config(folder: Path) -> FolderConfig:
  """Reads the files beside a tokenizer; those that are missing say nothing."""
  config = {**read_json(folder / "special_tokens_map.json"),
            **read_json(folder / "tokenizer_config.json")}
  eos_ids = read_json(folder / "generation_config.json").get("eos_token_id")
  if eos_ids is None:
    eos_ids = []
  template_file = folder / "chat_template.jinja"
  if template_file.exists():
    template = template_file.read_text(encoding="utf-8")
  else:
    template = _default_template(config.get("chat_template"))
  return FolderConfig(
    bos_token=_token_text(config.get("bos_token")),
    eos_token=_token_text(config.get("eos_token")),
    eos_token_ids=tuple(eos_ids) if isinstance(eos_ids, list) else (eos_ids,),
    adds_bos=config.get("add_bos_token"),
    chat_template=template,
    added_tokens={int(i): (token["content"], token.get("special", False))
                  for i, token in config.get("added_tokens_decoder", {}).items()})


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file; empty where there is no such file."""
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error


def _token_text(token: str | dict[str, Any] | None) -> str | None:
  return token["content"] if isinstance(token, dict) else token


def _default_template(template: str | list[dict[str, str]] | None) -> str | None:
  """Some models carry several named templates; chat takes the one called "default"."""
  if isinstance(template, list):
    return {entry["name"]: entry["template"] for entry in template}.get("default")
  return template
