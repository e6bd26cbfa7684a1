"""What the JSON files beside a Hugging Face tokenizer say."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchjax.model_files import check_file, read_object
from batchjax.text.vocab import check_ids


@dataclasses.dataclass(frozen=True)
class FolderConfig:
  """The settings that matter here.

  Attributes:
    special_tokens, chat_templates: as in `vocab.Vocab`.
    eos_token_ids: of generation_config.json.
    adds_bos: whether encoding puts BOS first; None leaves it to the tokenizer's own file.
    is_legacy: `legacy`: False puts no space before text behind a special token.
    added_tokens: id to (text, is special).
  """

  special_tokens: Mapping[str, str]
  chat_templates: Mapping[str, str]
  eos_token_ids: tuple[int, ...]
  adds_bos: bool | None
  is_legacy: bool
  added_tokens: Mapping[int, tuple[str, bool]]


def read_folder_config(folder: Path) -> FolderConfig:
  """Reads the files beside a tokenizer; those that are missing say nothing."""
  config = {**read_json(folder / "special_tokens_map.json"),
            **read_json(folder / "tokenizer_config.json")}
  eos_ids = read_json(folder / "generation_config.json").get("eos_token_id")
  eos_ids = [] if eos_ids is None else eos_ids if isinstance(eos_ids, list) else [eos_ids]
  check_ids(eos_ids)
  return FolderConfig(
    special_tokens=_special_tokens(config),
    chat_templates=_chat_templates(folder, config.get("chat_template")),
    eos_token_ids=tuple(eos_ids),
    adds_bos=config.get("add_bos_token"),
    is_legacy=config.get("legacy") is not False,
    added_tokens=_added_tokens(folder, config))


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file; empty where there is no such file."""
  return read_object(path) if path.exists() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
  """All `..._token` settings that name a token; models have some of their own, as `image_token`."""
  named = config
  for key in ("extra_special_tokens", "model_specific_special_tokens"):
    named = {**named, **extra} if isinstance(extra := config.get(key), dict) else named
  texts = {name: token["content"] if isinstance(token, dict) and "content" in token else token
           for name, token in named.items() if name.endswith("_token")}
  for name in ("bos_token", "eos_token"):
    if not isinstance(texts.get(name), str | None):
      raise ValueError(f"tokenizer_config.json: {name} names the token {texts[name]!r}, which is no string")
  return {name: text for name, text in texts.items() if isinstance(text, str)}


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
  """Those of tokenizer_config.json, else of added_tokens.json, where older folders have them."""
  if "added_tokens_decoder" in config:
    return {int(i): (token["content"], token.get("special", False))
            for i, token in config["added_tokens_decoder"].items()}
  extra = config.get("additional_special_tokens") or ()
  special = {*_special_tokens(config).values(),
             *(token["content"] if isinstance(token, dict) else token for token in extra)}
  return {i: (text, text in special)
          for text, i in read_json(folder / "added_tokens.json").items()}


def _chat_templates(folder: Path, setting: str | list[dict[str, str]] | None) -> dict[str, str]:
  """Templates in files of their own, else those of tokenizer_config.json, one or a named list."""
  files = {"default": folder / "chat_template.jinja"}
  files |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
  files = {name: path for name, path in files.items() if path.exists()}
  for path in files.values():
    check_file(path)
  templates = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
  if templates or setting is None:
    return templates
  if isinstance(setting, list):
    templates = {entry["name"]: entry["template"] for entry in setting}
  else:
    templates = {"default": setting}
  if not all(isinstance(template, str) for template in templates.values()):
    raise ValueError("tokenizer_config.json: chat_template must be a string or a list of named ones")
  return templates
