"""Reads the rows of an input file one by one, whatever its format."""

from collections.abc import Iterator
import dataclasses
import gzip
import itertools
from typing import Any, BinaryIO

from etils import epath

from batchjax.config import RowLimits
from batchjax.io.fields import InvalidField, one_line
from batchjax.io.json_rows import json_rows
from batchjax.io.paths import InputError, open_input, store_errors
from batchjax.io.parquet_rows import parquet_rows

FORMATS = (".jsonl", ".jsonl.gz", ".parquet")
_MAX_MESSAGE_CHARS = 1000


@dataclasses.dataclass(frozen=True)
class RowError:
  """Why one row has no completion.

  Attributes:
    index: 0-based place among the records of the file; it orders the output.
    row: 1-based line of a JSONL file (blank lines count) or row of a Parquet file.
    request_id: the row's id, or None where it cannot be told.
    field: the offending field as the file spells it; "" for the whole row.
    message: one sentence with the remedy; what is too long to read is cut out of its middle.
    code: "invalid_json", "invalid_value", "missing_field", "unknown_field", "unsupported",
      "limit_exceeded", "model_not_found", "duplicate_id", "context_length_exceeded" or
      "model_error".
  """

  index: int
  row: int
  request_id: str | None
  field: str
  message: str
  code: str

  def __post_init__(self):
    if len(self.message) > _MAX_MESSAGE_CHARS:
      half = _MAX_MESSAGE_CHARS // 2
      object.__setattr__(self, "message", f"{self.message[:half]} … {self.message[-half:]}")
    object.__setattr__(self, "field", self.field[:_MAX_MESSAGE_CHARS])

  def __str__(self) -> str:
    where = f"row {self.row}" if self.request_id is None else f"row {self.row} ({self.request_id})"
    return f"{where}: {self.message}"


@dataclasses.dataclass(frozen=True)
class Record:
  """One row as it stands in the file; `index` and `row` are those of `RowError`."""

  index: int
  row: int
  value: dict[str, Any] | RowError


def file_format(path: epath.PathLike) -> str:
  """The entry of `FORMATS` that the path ends in; raises InputError for any other."""
  for suffix in FORMATS:
    if str(path).endswith(suffix):
      return suffix
  raise InputError(f"{path}: the format is told by the ending, which must be one of "
                   f"{', '.join(FORMATS)}; rename or convert the file")


def read(path: epath.PathLike, max_row_bytes: int = RowLimits.max_line_bytes,
         limit: int | None = None) -> Iterator[Record]:
  """Yields the rows of a file in order, holding only a few in memory.

  A row that cannot be decoded, or is too long, carries a RowError and the next
  one follows; blank lines are skipped but counted in `row`. A null column or
  struct field of a Parquet file counts as absent, and bytes are text in UTF-8.

  Args:
    path: of the file.
    max_row_bytes: longest line of a JSONL file, unpacked, or row of a Parquet file; no more of a
      longer line is ever held.
    limit: yield no more than the first so many rows; None yields all.

  Raises:
    InputError: at once where the file is missing, empty, a directory or of an
      unknown format; while reading where the file as a whole is damaged.
  """
  suffix = file_format(path)
  source = open_input(path)
  try:
    with store_errors(path, "read"):
      is_empty = not source.read(1)
      source.seek(0)
  except InputError:
    source.close()
    raise
  if is_empty:
    source.close()
    raise InputError(f"{path} is empty: write at least one request into it")
  return itertools.islice(_records(path, suffix, source, max_row_bytes), limit)


def _records(path: epath.PathLike, suffix: str, source: BinaryIO,
             max_row_bytes: int) -> Iterator[Record]:
  index, read_fn = -1, parquet_rows if suffix == ".parquet" else json_rows
  with source:
    try:
      stream = gzip.GzipFile(fileobj=source) if suffix == ".jsonl.gz" else source
      for index, (row, request_id, value) in enumerate(read_fn(stream, max_row_bytes)):
        if isinstance(value, InvalidField):
          value = RowError(index, row, request_id, value.field, str(value), value.code)
        yield Record(index, row, value)
    except Exception as e:  # libraries have many names for damage
      if isinstance(e, OSError) and e.errno is not None:
        raise InputError(f"{path} cannot be read after row index {index}: {one_line(e)}") from e
      kind = {".parquet": "Parquet", ".jsonl.gz": "gzip"}.get(suffix, "JSONL")
      remedy = "compress" if kind == "gzip" else "write"
      raise InputError(f"{path} is not a whole {kind} file ({one_line(e)}): {remedy} it "
                       "again") from e
  if index < 0:
    raise InputError(f"{path} holds no rows: write at least one request into it")
