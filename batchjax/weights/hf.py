"""Hugging Face folders: `config.json` and safetensors, in one file or in shards."""

import contextlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from batchjax.config import ConfigError
from batchjax.model_files import check_file, damaged, read_object
from batchjax.weights.stored import StoredTensors, WeightError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """`config.json`, its end tokens widened by those of `generation_config.json`."""
  config = read_object(folder / "config.json")
  generation = folder / "generation_config.json"
  if generation.exists():
    ends = _end_tokens(folder / "config.json", config)
    ends += _end_tokens(generation, read_object(generation))
    config["eos_token_id"] = list(dict.fromkeys(ends))
  return config


def _end_tokens(path: pathlib.Path, values: dict[str, Any]) -> list[int]:
  ids = values.get("eos_token_id")
  ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
  if not all(type(i) is int and i >= 0 for i in ids):
    raise ConfigError(f"{path}: eos_token_id={values['eos_token_id']!r} must be a token id or a list "
                      "of them: fetch the file again")
  return ids


def write_config(folder: pathlib.Path, config: dict[str, Any], dtype: str) -> None:
  """Writes `config.json` for tensors of `dtype`."""
  config = {key: value for key, value in config.items() if key != "dtype"} | {"torch_dtype": dtype}
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def stored_dtype(folder: pathlib.Path) -> str:
  """The dtype that all tensors of the folder have, or float32 where they differ."""
  found = {dtype for _, dtype, _ in _headers(folder).values()}
  return _DTYPES[found.pop()] if len(found) == 1 else "float32"


def open_tensors(folder: pathlib.Path) -> StoredTensors:
  """The tensors of a folder; only the headers of its files are read.

  An index decides which file a tensor is read from. Copies in other files are
  named in a warning.

  Raises:
    ConfigError: the folder has no safetensors, or a file is damaged.
    WeightError: the index is wrong, or a tensor is quantised.
  """
  headers = _headers(folder)

  def read(name: str) -> np.ndarray:
    # Opened anew for each tensor: the mapped pages count as ours until the file is closed.
    with _open(headers[name][0]) as tensors:
      return tensors.get_tensor(name)

  return StoredTensors(
      shapes={name: shape for name, (_, _, shape) in headers.items()}, read=read,
      locate=lambda name: str(headers[name][0] if name in headers else folder))


def _headers(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, str, tuple[int, ...]]]:
  """File, dtype and shape of every tensor."""
  placed = _read_index(folder / _INDEX) if (folder / _INDEX).exists() else None
  single = folder / _SINGLE
  if placed is None and not single.exists():
    raise WeightError(f"{folder} has neither {_SINGLE} nor {_INDEX}; save the model as safetensors")
  files = {single} if placed is None else set(placed.values())
  headers, superfluous = {}, []
  for file in sorted(files | ({single} if single.exists() else set())):
    with _open(file) as tensors:
      for name in tensors.keys():
        if placed is not None and placed.get(name) != file:
          superfluous.append(f"{name} in {file.name}")
          continue
        header = tensors.get_slice(name)
        if header.get_dtype() not in _DTYPES:
          raise WeightError(f"{file}: {name} is stored as {header.get_dtype()}; supported: "
                            f"{sorted(_DTYPES)}: load the model's own weights")
        headers[name] = file, header.get_dtype(), tuple(header.get_shape())
  for name, file in (placed or {}).items():
    if name not in headers:
      raise WeightError(f"{file}: lacks the tensor {name} that {_INDEX} places there: fetch both "
                        "again, of one revision")
  if superfluous:
    more = f" and {len(superfluous) - 3} more" if len(superfluous) > 3 else ""
    logging.warning("%s places %s%s elsewhere or nowhere: these copies are not read",
                    folder / _INDEX, ", ".join(superfluous[:3]), more)
  return headers


def _read_index(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """The file of each tensor that an index names."""
  weight_map = read_object(path).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise WeightError(f"{path}: weight_map must be an object from tensor names to files, got "
                      f"{type(weight_map).__name__}: fetch the index again")
  for name, file in weight_map.items():
    parts = pathlib.PurePath(file).parts if isinstance(file, str) else ()
    if not parts or pathlib.PurePath(file).is_absolute() or ".." in parts:
      raise WeightError(f"{path}: weight_map places {name} in {file!r}, which is no file of this "
                        "folder: fetch the index again")
    if not (path.parent / file).exists():
      raise WeightError(f"{path} names {file}, which is not in the folder: fetch that file, or remove "
                        "the index if it belongs to other weights")
  return {name: path.parent / file for name, file in weight_map.items()}


@contextlib.contextmanager
def _open(file: pathlib.Path) -> Iterator[safe_open]:
  """An open safetensors file; what the library says of its damage becomes one line."""
  check_file(file)
  try:
    with safe_open(file, "np") as tensors:
      yield tensors
  except (SafetensorError, OSError) as error:  # does not name the file
    raise damaged(file, error) from error


def write_tensors(folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]],
                  max_shard_bytes: int) -> None:
  """Writes the tensors in order, as `model.safetensors` or as shards with their index.

  Only one shard is held in memory; a tensor larger than `max_shard_bytes` gets its own.
  """
  shards: list[list[str]] = []
  total_bytes = 0
  for shard in _in_shards(tensors, max_shard_bytes):
    # The number of shards is part of their names and known only at the end.
    save_file(shard, folder / f"shard-{len(shards)}.tmp", metadata={"format": "pt"})
    shards.append(list(shard))
    total_bytes += sum(t.nbytes for t in shard.values())
  if len(shards) == 1:
    (folder / "shard-0.tmp").rename(folder / _SINGLE)
    return
  weight_map = {}
  for i, names in enumerate(shards):
    file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    (folder / f"shard-{i}.tmp").rename(folder / file)
    weight_map |= dict.fromkeys(names, file)
  index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
  (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _in_shards(tensors: Iterable[tuple[str, np.ndarray]],
               max_bytes: int) -> Iterator[dict[str, np.ndarray]]:
  shard, num_bytes = {}, 0
  for name, tensor in tensors:
    if shard and num_bytes + tensor.nbytes > max_bytes:
      yield shard
      shard, num_bytes = {}, 0
    shard[name] = np.ascontiguousarray(tensor)
    num_bytes += tensor.nbytes
  if shard:
    yield shard
