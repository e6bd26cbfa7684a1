"""Converts a model between Hugging Face folders, Orbax checkpoints and (read only) GGUF files.

    batchjax convert --source=model.gguf --target=model_hf
    batchjax convert --source=model_hf --target=model_orbax --format=orbax --dtype=bfloat16

The tokenizer, the chat template and generation_config.json go along.

Exit codes: 0 done, 2 refused or failed, with one line that says why, 130 interrupted.
"""

import dataclasses
import json
import pathlib
import shutil

from absl import flags
from absl import logging

from batchjax import hub
from batchjax.config import ConfigError, ModelSource
from batchjax.jobs import folder
from batchjax.text.tokenizer import load_tokenizer
from batchjax.weights import (load_hf_config, load_model, save_hf, save_orbax, source_format,
                              stored_dtype)

_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
               "added_tokens.json", "vocab.json", "merges.txt", "*.model", "*.jinja",
               "chat_template.json", "generation_config.json")


def define_flags() -> None:
  """Those of `batchjax convert`."""
  flags.DEFINE_string("source", None, "Hugging Face folder, .gguf file, Orbax checkpoint, or a name of "
                      "the Hub: org/name.", required=True)
  flags.DEFINE_string("target", None, "Folder to write; must be empty or not exist.",
                      required=True)
  flags.DEFINE_bool("overwrite", False, "A target that exists is moved aside to <target>.1 (.2, "
                    "...).")
  flags.DEFINE_enum("format", "hf", ["hf", "orbax"], "What to write.")
  flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"],
                    "Of the tensors written; left out, the source's own (float32 for GGUF).")


def main(args: flags.FlagValues) -> None:
  """Writes the model."""
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step
  target = pathlib.Path(args.target).expanduser()
  if _is_taken(target) and not args.overwrite:
    raise ConfigError(f"--target={target} exists and is not an empty folder: name another, or move "
                      "it aside with --overwrite")
  source = hub.local_path(args.source)
  if source.resolve().is_relative_to(target.resolve()):
    raise ConfigError(f"--target={target} holds the source: name another")
  convert(source, target, args.format, args.dtype)


def _is_taken(target: pathlib.Path) -> bool:
  return target.exists() and (not target.is_dir() or any(target.iterdir()))


def convert(path: pathlib.Path, target: pathlib.Path, target_format: str,
            dtype: str | None) -> None:
  """Writes the model at `path` and its text files to `target`; what stands there is moved aside."""
  source = ModelSource(str(path))
  source = dataclasses.replace(source, dtype=dtype or stored_dtype(source))
  is_bare = source_format(source) == "orbax" and not (path / "config.json").exists()
  hf_config = None if is_bare and target_format == "orbax" else load_hf_config(source)
  model = load_model(source)
  if _is_taken(target):
    logging.warning("%s is moved to %s", target, folder.move_aside(target))
  if target_format == "hf":
    save_hf(str(target), model, hf_config)
  else:
    save_orbax(str(target), model, hf_config)
  if source_format(source) == "gguf":
    write_gguf_texts(path, target, model.config.eos_token_ids)
  else:
    for pattern in _TEXT_FILES:
      for file in path.glob(pattern):
        shutil.copy(file, target)
  num_bytes = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
  print(f"{target}: {target_format}, {source.dtype}, {num_bytes:,} bytes")


def write_gguf_texts(path: pathlib.Path, folder: pathlib.Path,
                     eos_token_ids: tuple[int, ...]) -> None:
  """Writes the tokenizer inside a GGUF file as the files of a Hugging Face folder."""
  tokenizer = load_tokenizer(path)
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
  if tokenizer.chat_templates:
    settings["chat_template"] = [{"name": name, "template": template}
                                 for name, template in tokenizer.chat_templates.items()]
  if list(tokenizer.chat_templates) == ["default"]:
    settings["chat_template"] = tokenizer.chat_template
  (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
  for name, content in (("tokenizer_config.json", settings),
                        ("generation_config.json", {"eos_token_id": list(eos_token_ids)})):
    (folder / name).write_text(json.dumps(content, indent=2) + "\n")
