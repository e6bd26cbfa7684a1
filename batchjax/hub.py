"""Models by their name on the Hugging Face Hub: fetched into its cache, pinned to a commit.

A name is `org/name`, `org/name@revision`, or with a GGUF file of the repository at the end,
`org/name@revision/file.gguf`; a path that exists on this machine is never one. What the cache holds
is used without asking the network. `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean
what they mean to the library.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
import re
from typing import Literal, NamedTuple

from absl import logging

from batchjax.config import ConfigError, ModelSource
from batchjax.model_files import read_object

Need = Literal["tokenizer", "config", "weights"]

# No repository has a name that ends like one of a model's files.
_NAME = re.compile(r"(?:hf://)?(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)"
                   r"(?<!\.gguf)(?<!\.json)(?<!\.model)"
                   r"(?:@(?P<revision>[\w./-]+?))?(?:/(?P<file>[^@]+\.gguf))?", re.ASCII)
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# All that is read of a repository beside its weights.
_TEXTS = ("config.json", "generation_config.json", _INDEX, "tokenizer.json", "tokenizer.model",
          "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "chat_template.jinja", "additional_chat_templates/*.jinja")
# A folder that has one of each is taken to lack nothing, so that the repository need not be asked.
_USUAL = (("config.json",), ("generation_config.json",), ("tokenizer_config.json",),
          ("tokenizer.json", "tokenizer.model"))
_REQUIRED = {"tokenizer": (), "config": (("config.json",),),
             "weights": (("config.json",), (_INDEX, _SINGLE))}


class _Name(NamedTuple):
  """`file` is "" where the repository as a whole is meant."""

  repo: str
  revision: str
  file: str

  def __str__(self) -> str:
    return f"{self.repo}@{self.revision}" + (f"/{self.file}" if self.file else "")


def pin(source: ModelSource, known: Mapping[str, str] | None = None) -> ModelSource:
  """The source with each name of the Hub at the commit that it means now: `org/name@<commit>`.

  Args:
    source: whose `path` and `tokenizer` may be names.
    known: names to what they were pinned to before, which they keep.

  Raises:
    ConfigError: the commit cannot be told; as `local_path`.
  """
  pinned = lambda path: _pin(path, known or {})
  return dataclasses.replace(source, path=pinned(source.path), tokenizer=pinned(source.tokenizer))


def pins(asked: ModelSource, pinned: ModelSource) -> dict[str, str]:
  """What `pin` made of each name that held no commit: the `known` of a later call."""
  pairs = (asked.path, pinned.path), (asked.tokenizer, pinned.tokenizer)
  return {name: commit for name, commit in pairs if name != commit}


def local_path(path: str | pathlib.Path, need: Need = "weights") -> pathlib.Path:
  """Where the files are on this machine, fetched first where they are not; `~` is expanded.

  Args:
    path: a path, or a name of the Hub.
    need: what will be read. "config" fetches all but the weights.

  Returns:
    A path as it is; of a name the folder in the cache, or the GGUF file in it.

  Raises:
    ConfigError: huggingface_hub is not installed; it finds neither the network nor the files in its
      cache; there is no such repository, revision or file, or no access to it; or the path is of
      a store in the cloud.
  """
  name = _parse(path)
  if name is None:
    if "://" in str(path):
      raise ConfigError(f"{path}: models are read from local paths and from the Hub (org/name): copy "
                        "it to this machine")
    return pathlib.Path(path).expanduser()
  folder = _fetch_base(name, need)
  if name.file:
    return folder / name.file
  if need == "weights":
    groups = [(file,) for file in _weight_files(folder)]
    _fetch(name, _weight_files(folder), groups, groups)
  return folder


def files(name: str, need: Need) -> dict[str, pathlib.Path]:
  """What `local_path` fetches, by the names in the repository; other files may lie beside it."""
  root = local_path(name, need)
  if root.is_file():
    return {root.name: root}
  found = [file for pattern in _TEXTS for file in root.glob(pattern)]
  found += [root / file for file in (_weight_files(root) if need == "weights" else ())]
  return {str(file.relative_to(root)): file for file in sorted(found)}


def title(path: str) -> str:
  """A short name to show: `org/name@0123456`, or the last part of a path."""
  name = _parse(path)
  return str(name._replace(revision=name.revision[:7])) if name else pathlib.Path(path).name


def is_name(path: str | pathlib.Path) -> bool:
  """Whether it reads as a name of the Hub, and nothing on this machine has that path."""
  return _parse(path) is not None


def _parse(path: str | pathlib.Path) -> _Name | None:
  found = _NAME.fullmatch(str(path))
  if not found or os.path.lexists(path):
    return None
  return _Name(found["repo"], found["revision"] or "main", found["file"] or "")


def _pin(path: str, known: Mapping[str, str]) -> str:
  name = _parse(path)
  if name is None:
    return path
  pinned = known.get(path) or str(name._replace(revision=_fetch_base(name, "tokenizer").name))
  logging.info("from the Hub: %s", pinned)
  return pinned


def _fetch_base(name: _Name, need: Need) -> pathlib.Path:
  """The folder of the commit, with the file of the name, or with all but the weights."""
  if name.file:
    return _fetch(name, [name.file], [(name.file,)], [(name.file,)])
  return _fetch(name, _TEXTS, (*_USUAL, *_REQUIRED[need]), _REQUIRED[need])


def _weight_files(folder: pathlib.Path) -> list[str]:
  """The safetensors that the index names, or the one where there is no index."""
  if not (folder / _INDEX).exists():
    return [_SINGLE]
  placed = read_object(folder / _INDEX).get("weight_map")
  files = placed.values() if isinstance(placed, dict) else ()
  return sorted({file for file in files if isinstance(file, str)}) or [_SINGLE]


def _fetch(name: _Name, patterns: Sequence[str], usual: Sequence[Sequence[str]],
           required: Sequence[Sequence[str]]) -> pathlib.Path:
  """The folder of the commit in the cache, with the files of the repository that fit the patterns.

  The repository is not asked where the folder has one of each group in `usual`; where it cannot be
  reached, one of each in `required` will do.
  """
  try:
    from huggingface_hub import constants, errors, HfApi, snapshot_download  # an extra
  except ImportError as error:
    raise _no(name, f"names of the Hub need huggingface_hub ({error}): pip install "
              "'batchjax[hub]', or correct the path") from error
  fetch = lambda **kwargs: pathlib.Path(snapshot_download(
      name.repo, revision=name.revision, allow_patterns=list(patterns), **kwargs))
  page, folder = f"{constants.ENDPOINT}/{name.repo}", None
  has = lambda groups: folder and all(any((folder / file).exists() for file in group)
                                      for group in groups)
  try:
    try:
      folder = fetch(local_files_only=True)
    except errors.LocalEntryNotFoundError as error:  # no such commit, or known to be incomplete
      folder = getattr(error, "snapshot_path", None) and pathlib.Path(error.snapshot_path)
    if has(usual):
      return folder
    info = HfApi().model_info(name.repo, revision=name.revision)
    held = [file.rfilename for file in info.siblings]
    for group in required:
      if not set(group) & set(held):
        raise _lacking(name, group[-1], held, page)
    folder = None  # it can be had: no part of it will do
    return fetch()
  except ConfigError:
    raise
  except errors.HFValidationError as error:
    raise _no(name, f"no name of the Hub ({error}): correct it") from error
  except errors.GatedRepoError as error:
    raise ConfigError(f"{name.repo} is gated: ask for access at {page}, and give your token (hf auth "
                      "login, or HF_TOKEN)") from error
  except errors.RepositoryNotFoundError as error:
    raise _no(name, f"the Hub shows no repository at {page}: correct it; a private one needs a "
              "token (hf auth login, or HF_TOKEN)") from error
  except errors.RevisionNotFoundError as error:
    raise ConfigError(f"{name.repo} has no revision {name.revision!r}: name a branch, tag or "
                      f"commit of {page}") from error
  # Transport, disk and transfer libraries raise their own types.
  except Exception as error:
    cause = _cause(error)
    if has(required):
      logging.warning("%s: the Hub cannot be asked for more than the cache holds (%s)", name,
                      cause)
      return folder
    lacks = f"the cache ({constants.HF_HUB_CACHE}) lacks files of its revision {name.revision}"
    if constants.HF_HUB_OFFLINE:
      raise _no(name, f"{lacks}, and HF_HUB_OFFLINE is set: unset it, or bring the files there "
                f"with: hf download {name.repo}") from error
    raise _no(name, f"{lacks}, and they cannot be fetched from {constants.ENDPOINT} ({cause}): mend "
              "that and run the same command again, or name a local path") from error


def _lacking(name: _Name, file: str, held: Sequence[str], page: str) -> ConfigError:
  ggufs = sorted(path for path in held if path.endswith(".gguf"))
  remedy = (f"name one of its GGUF files, as {name.repo}/{ggufs[0]}" if ggufs else
            "name a repository with config.json and safetensors, or a GGUF file of one")
  return ConfigError(f"{name.repo} has no {file} at revision {name.revision}: {remedy}; "
                     f"see {page}")


def _cause(error: BaseException) -> str:
  error = error.__cause__ or error
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _no(name: _Name, reading: str) -> ConfigError:
  return ConfigError(f"{name.repo} is no local path, and {reading}")
