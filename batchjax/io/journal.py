"""An append-only record of finished rows that survives a kill at any moment."""

from collections.abc import Iterator
import itertools
import json
import mmap
import os
from pathlib import Path
import time
from typing import Any, Literal, NamedTuple
import zlib

from jaxtyping import Bool
import numpy as np

from batchjax.io import files

Kind = Literal["output", "error"]
_KINDS: tuple[Kind, ...] = ("output", "error")
_CRC_BYTES = len('{"crc":"00000000",')


class JournalError(RuntimeError):
  """The journal cannot be read or written; the message names the line and the remedy."""


class Line(NamedTuple):
  """What a journal says of one row."""

  job: str
  index: int
  kind: Kind
  value: dict[str, Any]


class Journal:
  """One line of JSON per finished row: `{"crc": ..., "job": id, "index": i, "output" or "error": {...}}`.

  A line reaches the operating system before `append` returns, and the disk at
  most `sync_secs` later while rows keep finishing. A last line that a kill cut
  short is dropped on open; its row runs again. In memory each row takes 9 bytes.

  Args:
    path: the file; made if missing.
    job_id: of the job whose rows these are.
    num_rows: of that job.
    sync_secs: least time between two waits for the disk.

  Raises:
    JournalError: a whole line is damaged, or of another job, or names a row twice or one past the end.
  """

  def __init__(self, path: Path, job_id: str, num_rows: int, sync_secs: float = 0.5):
    self._path = path
    self._job_id = job_id
    self._sync_secs = sync_secs
    self._offsets = np.full(num_rows, -1)  # of each row's line; -1 unfinished
    self._kinds = np.zeros(num_rows, np.uint8)  # 0 unfinished, else 1 + index into _KINDS
    self._file = open(path, "a+b", buffering=0, opener=files.open_regular)
    try:
      self._end = self._scan()
      self._file.truncate(self._end)
    except BaseException:
      self._file.close()
      raise
    self._last_sync = time.monotonic()

  @property
  def finished_rows(self) -> Bool[np.ndarray, "num_rows"]:
    """Which rows of the input have a line."""
    return self._kinds > 0

  def num_finished(self, kind: Kind) -> int:
    """How many rows have a line of this kind."""
    return int((self._kinds == 1 + _KINDS.index(kind)).sum())

  def append(self, index: int, kind: Kind, value: dict[str, Any]) -> None:
    """Records what became of a row.

    Raises:
      JournalError: the row has a line already, or the disk takes no more; the
        journal then holds all rows before this one.
    """
    if self._kinds[index]:
      raise JournalError(f"row index {index} is in {self._path} already: each row finishes once")
    rest = files.dump({"job": self._job_id, "index": index, kind: value})[1:].encode() + b"\n"
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
    with self._file:
      self.sync()

  def rows(self, kind: Kind) -> "JournalRows":
    """The values of one kind in input order, read from disk as they are iterated.

    Iterating raises JournalError where a line was changed since the journal was opened.
    """
    return JournalRows(self._path, self._file.fileno(), self._offsets,
                       np.flatnonzero(self._kinds == 1 + _KINDS.index(kind)))

  def _scan(self) -> int:
    """Notes the rows of a journal that exists; returns where its whole lines end."""
    end = 0
    for number, text in enumerate(_whole_lines(self._path), start=1):
      try:
        line = parse_line(text)
        if line.job != self._job_id:
          raise ValueError(f"it is of job {line.job}, this is job {self._job_id}")
        if line.index >= len(self._kinds):
          raise ValueError(f"row index {line.index} is past the input's {len(self._kinds)} rows")
        self._mark(line.index, line.kind, end)
      except ValueError as e:
        raise JournalError(f"{self._path} is damaged at line {number} ({e}): delete that line, and "
                           "its row runs again; or start anew with --overwrite") from e
      end += len(text)
    return end

  def _mark(self, index: int, kind: Kind, offset: int) -> None:
    if self._kinds[index]:
      raise ValueError(f"row index {index} has an earlier line")
    self._kinds[index] = 1 + _KINDS.index(kind)
    self._offsets[index] = offset


class JournalRows:
  """The rows of one kind in input order, the places of the `indices`; may be iterated more than once."""

  def __init__(self, path: Path, fd: int, offsets: np.ndarray, indices: np.ndarray):
    self._path, self._fd, self._offsets, self.indices = path, fd, offsets, indices

  def __iter__(self) -> Iterator[dict[str, Any]]:
    if not len(self.indices):  # an empty file cannot be mapped
      return
    with mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) as lines:
      for index in self.indices:
        start = self._offsets[index]
        try:
          yield parse_line(lines[start:lines.find(b"\n", start) + 1]).value
        except ValueError as e:
          raise JournalError(f"{self._path} was changed by others (row index {index}: {e}): run the "
                             "same command again") from e


def survey(path: Path) -> tuple[set[str], bool]:
  """The jobs whose rows a journal holds ("" where a line is damaged), and whether one has an output."""
  jobs, has_output = set(), False
  for text in _whole_lines(path):
    try:
      line = parse_line(text)
    except ValueError:
      line = Line("", 0, "output", {})  # what it was cannot be told
    jobs.add(line.job)
    has_output |= line.kind == "output"
  return jobs, has_output


def _whole_lines(path: Path) -> Iterator[bytes]:
  try:
    with open(path, "rb", opener=files.open_regular) as f:
      yield from itertools.takewhile(lambda line: line.endswith(b"\n"), f)
  except FileNotFoundError:
    return


def parse_line(text: bytes) -> Line:
  """What a line says; raises ValueError where its checksum does not fit or it says something else."""
  if text[:_CRC_BYTES] != b'{"crc":"%08x",' % zlib.crc32(text[_CRC_BYTES:]):
    raise ValueError("its checksum does not fit")
  try:
    values = json.loads(text)
    kind, = values.keys() & set(_KINDS)
    line = Line(values["job"], values["index"], kind, values[kind])
  except (ValueError, KeyError, AttributeError, RecursionError) as e:
    raise ValueError(f"it is no line of a journal of this version: {e!r}") from e
  if type(line.job) is not str or type(line.index) is not int or line.index < 0:
    raise ValueError(f"it names job {line.job!r} and row index {line.index!r}")
  return line
