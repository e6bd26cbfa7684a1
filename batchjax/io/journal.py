"""An append-only record of finished rows that survives a kill at any moment."""

import array
from collections.abc import Iterator
import json
import mmap
import os
from pathlib import Path
import time
from typing import Any, Literal
import zlib

from jaxtyping import Bool
import numpy as np

from batchjax.io import files

Kind = Literal["output", "error"]
_KINDS: tuple[Kind, ...] = ("output", "error")
_CRC_BYTES = len('{"crc":"00000000",')


class JournalError(RuntimeError):
  """The journal cannot be read or written; the message names the line and the remedy."""


class Journal:
  """One line of JSON per finished row: `{"crc": ..., "index": i, "output" or "error": {...}}`.

  A line reaches the operating system before `append` returns, and the disk at
  most `sync_secs` later while rows keep finishing. A last line that a kill cut
  short is dropped on open; its row runs again. In memory each row takes 9 bytes.

  Args:
    path: the file; made if missing.
    sync_secs: least time between two waits for the disk.

  Raises:
    JournalError: a whole line is damaged or names a row twice.
  """

  def __init__(self, path: Path, sync_secs: float = 0.5):
    self._path = path
    self._sync_secs = sync_secs
    self._offsets = array.array("q")  # of each row's line; -1 unfinished
    self._kinds = bytearray()  # 0 unfinished, else 1 + index into _KINDS
    self._end = self._scan() if path.exists() else 0
    self._file = path.open("ab", buffering=0)
    self._file.truncate(self._end)
    self._last_sync = time.monotonic()

  def finished_rows(self, num_rows: int) -> Bool[np.ndarray, "num_rows"]:
    """Which rows of the input have a line."""
    finished = np.zeros(num_rows, bool)
    kinds = np.frombuffer(bytes(self._kinds), np.uint8)[:num_rows]
    finished[:len(kinds)] = kinds > 0
    return finished

  def num_finished(self, kind: Kind) -> int:
    """How many rows have a line of this kind."""
    return self._kinds.count(1 + _KINDS.index(kind))

  def append(self, index: int, kind: Kind, value: dict[str, Any]) -> None:
    """Records what became of a row.

    Raises:
      JournalError: the row has a line already, or the disk takes no more; the
        journal then holds all rows before this one.
    """
    if index < len(self._kinds) and self._kinds[index]:
      raise JournalError(f"row index {index} is in {self._path} already: each row finishes once")
    rest = files.dump({"index": index, kind: value})[1:].encode("utf-8") + b"\n"
    line = b'{"crc":"%08x",' % zlib.crc32(rest) + rest
    try:
      remaining = memoryview(line)
      while remaining:
        remaining = remaining[self._file.write(remaining):]
      if time.monotonic() - self._last_sync >= self._sync_secs:
        self.sync()
    except OSError as e:
      self._file.truncate(self._end)
      raise JournalError(f"{self._path} cannot be written ({e}): make room and run the same "
                         "command again; it goes on from here") from e
    self._mark(index, kind, self._end)
    self._end += len(line)

  def sync(self) -> None:
    """Waits until every line is on disk."""
    os.fsync(self._file.fileno())
    self._last_sync = time.monotonic()

  def close(self) -> None:
    """Syncs and closes the file."""
    self.sync()
    self._file.close()

  def rows(self, kind: Kind) -> "JournalRows":
    """The values of one kind in input order, read from disk as they are iterated."""
    return JournalRows(self._path, self._offsets, self._kinds, 1 + _KINDS.index(kind))

  def _scan(self) -> int:
    """Notes the rows of a journal that exists; returns where its whole lines end."""
    end = 0
    with self._path.open("rb") as f:
      for number, line in enumerate(f, start=1):
        if not line.endswith(b"\n"):
          break
        try:
          value = parse_line(line)
          kind = next(kind for kind in _KINDS if kind in value)
          self._mark(value["index"], kind, end)
        except ValueError as e:
          raise JournalError(f"{self._path} is damaged at line {number} ({e}): delete that line, "
                             "and its row runs again") from e
        end += len(line)
    return end

  def _mark(self, index: int, kind: Kind, offset: int) -> None:
    num_new = index + 1 - len(self._kinds)
    if num_new > 0:
      self._kinds.extend(bytes(num_new))
      self._offsets.extend([-1] * num_new)
    if self._kinds[index]:
      raise ValueError(f"row index {index} has an earlier line")
    self._kinds[index] = 1 + _KINDS.index(kind)
    self._offsets[index] = offset


class JournalRows:
  """The rows of one kind in input order; may be iterated more than once."""

  def __init__(self, path: Path, offsets: array.array, kinds: bytearray, kind: int):
    self._path, self._offsets, self._kinds, self._kind = path, offsets, kinds, kind

  def __iter__(self) -> Iterator[dict[str, Any]]:
    if self._kind not in self._kinds:  # an empty file cannot be mapped
      return
    with self._path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as lines:
      for index, kind in enumerate(self._kinds):
        if kind == self._kind:
          start = self._offsets[index]
          value = parse_line(lines[start:lines.find(b"\n", start) + 1])
          yield value[_KINDS[kind - 1]]


def parse_line(line: bytes) -> dict[str, Any]:
  """The object of a journal line; raises ValueError where its checksum does not fit."""
  if line[:_CRC_BYTES] != b'{"crc":"%08x",' % zlib.crc32(line[_CRC_BYTES:]):
    raise ValueError("its checksum does not fit")
  return json.loads(line)
