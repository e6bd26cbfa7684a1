"""Opens the files of a model, whoever wrote them: damage is one line with file and remedy."""

import functools
import json
import pathlib
from typing import Any

import gguf
import numpy as np

from batchjax.config import ConfigError

# The largest tokenizer.json of known models has 35 MB.
_MAX_JSON_BYTES = 1 << 29
# Four times the entries of the largest known vocabulary and its merges.
_MAX_GGUF_ARRAY = 1 << 22


def check_file(path: pathlib.Path) -> None:
  """Raises ConfigError unless `path` is a regular file that can be opened; never waits for one."""
  try:
    if path.is_file():
      path.open("rb").close()
      return
    found = path.exists()
  except (OSError, ValueError) as error:
    raise ConfigError(f"{path} cannot be read ({_first_line(error)}): check its name and its "
                      "permissions") from error
  raise ConfigError(f"{path} is no regular file: put the model's own file there" if found else
                    f"{path} is not there: correct the path, or fetch the model again")


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    ConfigError: it is no readable file, too large, not JSON, or JSON of another kind.
  """
  check_file(path)
  if path.stat().st_size > _MAX_JSON_BYTES:
    raise ConfigError(f"{path} has {path.stat().st_size:,} bytes, more than any file of its kind: "
                      "fetch it again")
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{path} is not JSON ({_first_line(error)}): fetch it again") from error
  if not isinstance(value, dict):
    raise ConfigError(f"{path} holds a {type(value).__name__} where an object is meant: "
                      "fetch it again")
  return value


def damaged(path: pathlib.Path, error: BaseException) -> ConfigError:
  """What to raise when the library that reads `path` failed."""
  return ConfigError(f"{path} is damaged or incomplete ({type(error).__name__}: "
                     f"{_first_line(error)}): fetch it again")


def open_gguf(path: pathlib.Path) -> gguf.GGUFReader:
  """Parses the metadata of a GGUF file; its tensors are read by whoever wants them.

  Raises:
    ConfigError: it is no GGUF file, cut short, or its header contradicts itself.
  """
  check_file(path)
  status = path.stat()
  return _read_gguf(path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # configuration, tokenizer and weights each ask, and it takes seconds
def _read_gguf(path: pathlib.Path, *version: int) -> gguf.GGUFReader:
  del version  # of the file, so that another one at the path is read anew
  try:
    with np.errstate(over="raise"):
      return _GgufReader(path)
  # The library trusts the file: what it trips over may be of any type.
  except Exception as error:
    raise damaged(path, error) from error


class _GgufReader(gguf.GGUFReader):
  """Stops at the end of the file, where the library goes on with empty arrays."""

  def _get(self, offset, dtype, count=1, override_order=None):
    end = int(offset) + np.dtype(dtype).itemsize * int(count)
    if end > self.data.size:
      raise ValueError(f"it has {self.data.size} bytes and refers to byte {end}")
    return super()._get(int(offset), dtype, count, override_order)

  def _get_field_parts(self, orig_offs, raw_type):
    if raw_type == gguf.GGUFValueType.ARRAY:
      length = int(self._get(orig_offs + 4, np.uint64)[0])
      if length > _MAX_GGUF_ARRAY:
        raise ValueError(f"an array of {length} entries at byte {orig_offs}")
    return super()._get_field_parts(orig_offs, raw_type)

  def _build_tensors(self, start_offs, fields):
    super()._build_tensors(start_offs, fields)
    ends = 0
    for tensor in sorted(self.tensors, key=lambda tensor: tensor.data_offset):
      if tensor.data_offset < ends:
        raise ValueError(f"the tensor {tensor.name} overlaps the one before it")
      ends = tensor.data_offset + tensor.n_bytes


def _first_line(error: BaseException) -> str:
  return (str(error).splitlines() or [""])[0][:200]
