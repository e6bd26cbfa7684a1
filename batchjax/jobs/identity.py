"""What makes a job the same job: everything that its output depends on."""

import dataclasses
import pathlib
from typing import Any

from batchjax import hub
from batchjax.config import JobConfig
from batchjax.jobs.job import hash_file


def identity(config: JobConfig, input_path: str, limit: int | None = None) -> dict[str, Any]:
  """All that the output depends on; most engine settings change speed only and are left out.

  A limit is part of it: what prompts share, which usage shows, depends on all rows of the job.
  Names of the Hub in `config` are pinned (`hub.pin`).
  """
  source = config.model
  model = {"name": source.name, "dtype": source.dtype, "shape": source.shape, "seed": source.seed,
           "split_special_tokens": source.split_special_tokens,
           "files": _hash_model(source.path, "weights")}
  if hub.is_name(source.path):
    model["hub"] = source.path
  # What `planner.cached_tokens` depends on, which the usage of each completion shows.
  engine = {name: getattr(config.engine, name)
            for name in ("share_prefixes", "max_levels", "plan_window")}
  settings = {"sampling": dataclasses.asdict(config.sampling), "seed": config.seed,
              "limits": dataclasses.asdict(config.limits), "strict": config.strict, "engine": engine,
              "chat_template": _hash_files(config.chat_template)}
  return {"input": hash_file(input_path), **({} if limit is None else {"limit": limit}), "model": model,
          "tokenizer": _hash_model(source.tokenizer, "tokenizer"), "settings": settings}


def _hash_model(path: str, need: hub.Need) -> dict[str, str]:
  if not hub.is_name(path):
    return _hash_files(path)
  return {name: hash_file(file) for name, file in hub.files(path, need).items()}


def _hash_files(path: str) -> dict[str, str]:
  """SHA-256 of a file, or of every file in a folder."""
  if not path:
    return {}
  root = pathlib.Path(path).expanduser()
  paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
  return {str(p.relative_to(root.parent)): hash_file(p) for p in paths}
