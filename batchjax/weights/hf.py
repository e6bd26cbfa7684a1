"""Hugging Face folders: `config.json` and safetensors, in one file or in shards."""

import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from batchjax.weights.stored import StoredTensors, WeightError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """`config.json`, its end tokens widened by those of `generation_config.json`."""
  config = json.loads((folder / "config.json").read_text())
  generation = folder / "generation_config.json"
  if generation.exists():
    ends = _as_list(config.get("eos_token_id"))
    ends += _as_list(json.loads(generation.read_text()).get("eos_token_id"))
    config["eos_token_id"] = list(dict.fromkeys(ends))
  return config


def _as_list(ids: int | list[int] | None) -> list[int]:
  return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def write_config(folder: pathlib.Path, config: dict[str, Any], dtype: str) -> None:
  """Writes `config.json` for tensors of `dtype`."""
  config = {key: value for key, value in config.items() if key != "dtype"} | {"torch_dtype": dtype}
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def stored_dtype(folder: pathlib.Path) -> str:
  """The dtype that all tensors of the folder have, or float32 where they differ."""
  found = set()
  for file in _files(folder)[0]:
    with _open(file) as tensors:
      found |= {_DTYPES[tensors.get_slice(name).get_dtype()] for name in tensors.keys()}
  return found.pop() if len(found) == 1 else "float32"


def open_tensors(folder: pathlib.Path) -> StoredTensors:
  """The tensors of a folder; only the headers of its files are read.

  Raises:
    WeightError: the folder has no safetensors, lacks a shard that its index
      names, holds quantised tensors or a file that is cut short.
  """
  files, expected = _files(folder)
  shapes, found = {}, {}
  for file in files:
    with _open(file) as tensors:
      for name in tensors.keys():
        header = tensors.get_slice(name)
        if header.get_dtype() not in _DTYPES:
          raise WeightError(f"{file}: {name} is stored as {header.get_dtype()}; "
                            f"supported: {sorted(_DTYPES)}")
        found[name], shapes[name] = file, tuple(header.get_shape())

  def read(name: str) -> np.ndarray:
    # Opened anew for each tensor: the mapped pages count as ours until the file is closed.
    with _open(found[name]) as tensors:
      return tensors.get_tensor(name)

  return StoredTensors(
      shapes=shapes, read=read,
      locate=lambda name: str(found.get(name) or expected.get(name) or folder))


def _open(file: pathlib.Path) -> safe_open:
  try:
    return safe_open(file, "np")
  except SafetensorError as error:  # does not name the file
    raise WeightError(f"{file} is damaged or incomplete ({error}); fetch it again") from error


def _files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, pathlib.Path]]:
  """The files of a folder, and in which of them its index says that a tensor lies."""
  if (folder / _SINGLE).exists():
    return [folder / _SINGLE], {}
  index = folder / _INDEX
  if not index.exists():
    raise WeightError(f"{folder} has neither {_SINGLE} nor {_INDEX}; save the model as safetensors")
  expected = {name: folder / file
              for name, file in json.loads(index.read_text())["weight_map"].items()}
  files = sorted(set(expected.values()))
  for file in files:
    if not file.exists():
      raise WeightError(f"{index} names {file.name}, which is not in the folder")
  return files, expected


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
