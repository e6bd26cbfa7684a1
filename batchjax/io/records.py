"""Reads the rows of an input file one by one, whatever its format."""

from collections.abc import Iterator
import dataclasses
import gzip
import json
from typing import Any, BinaryIO
import zlib

from etils import epath
import pyarrow as pa
import pyarrow.parquet as pq

FORMATS = (".jsonl", ".jsonl.gz", ".parquet")
_PARQUET_BATCH_ROWS = 1024


class InputError(ValueError):
  """An input file cannot be read at all; the message names it and the remedy."""


@dataclasses.dataclass(frozen=True)
class RowError:
  """Why one row has no completion.

  Attributes:
    index: 0-based place among the records of the file; it orders the output.
    row: 1-based line of a JSONL file (blank lines count) or row of a Parquet file.
    request_id: the row's id, or None where it cannot be told.
    field: the offending field as the file spells it; "" for the whole row.
    message: one sentence with the remedy.
    code: "invalid_json", "invalid_value", "missing_field", "unknown_field", "unsupported",
      "model_not_found", "duplicate_id", "context_length_exceeded" or "model_error".
  """

  index: int
  row: int
  request_id: str | None
  field: str
  message: str
  code: str

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


def open_input(path: epath.PathLike) -> BinaryIO:
  """Opens a local or remote file for reading bytes; raises InputError where it cannot."""
  try:
    source = epath.Path(path)
    if source.is_dir():
      raise InputError(f"{path} is a directory: name one file in it")
    return source.open("rb")
  except KeyError as e:
    raise InputError(f"{path}: paths that begin with {e} cannot be opened; "
                     "use a local path, gs:// or s3://") from e
  except FileNotFoundError as e:
    raise InputError(f"{path} does not exist: check the path") from e
  except (OSError, ImportError) as e:
    raise InputError(f"{path} cannot be opened: {e}") from e


def read(path: epath.PathLike) -> Iterator[Record]:
  """Yields the rows of a file in order, holding only a few in memory.

  A row that cannot be decoded carries a RowError and the next one follows;
  blank lines are skipped but counted in `row`. A null column or struct field
  of a Parquet file counts as absent.

  Raises:
    InputError: at once where the file is missing, empty, a directory or of an
      unknown format; while reading where the file as a whole is damaged.
  """
  suffix = file_format(path)
  source = open_input(path)
  if not source.read(1):
    source.close()
    raise InputError(f"{path} is empty: write at least one request into it")
  source.seek(0)
  return _records(path, suffix, source)


def _records(path: epath.PathLike, suffix: str, source: BinaryIO) -> Iterator[Record]:
  index = -1
  with source:
    try:
      rows = _parquet_rows(source) if suffix == ".parquet" else _json_rows(source, suffix)
      for index, (row, value) in enumerate(rows):
        if isinstance(value, str):
          value = RowError(index, row, None, "", value, "invalid_json")
        yield Record(index, row, value)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
      raise InputError(f"{path} is not a whole gzip file ({e}): compress it again") from e
    except pa.ArrowException as e:
      raise InputError(f"{path} is not a whole Parquet file ({e}): write it again") from e
    except OSError as e:
      raise InputError(f"{path} cannot be read after row index {index}: {e}") from e
  if index < 0:
    raise InputError(f"{path} holds no rows: write at least one request into it")


def _json_rows(source: BinaryIO, suffix: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
  lines = gzip.GzipFile(fileobj=source) if suffix == ".jsonl.gz" else source
  for row, line in enumerate(lines, start=1):
    if row == 1:
      line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
    if line.strip():
      yield row, _decode(line.rstrip(b"\r\n"))


def _decode(line: bytes) -> dict[str, Any] | str:
  """The object in the line, or what is wrong with it."""
  try:
    value = json.loads(line.decode("utf-8"))
    if b"\\u" in line:  # half of a surrogate pair decodes, but no file can hold it
      json.dumps(value, ensure_ascii=False).encode("utf-8")
  except UnicodeDecodeError as e:
    return f"byte {e.start + 1} of the line is not valid UTF-8: save the file as UTF-8"
  except UnicodeEncodeError:
    return "the line has half of a surrogate pair (\\ud800 to \\udfff): write the whole character"
  except json.JSONDecodeError as e:
    return (f"the line is not valid JSON at column {e.colno} ({e.msg}): "
            "write each request as one JSON object on one line")
  except RecursionError:
    return "the JSON of the line is nested too deeply: flatten it"
  except ValueError as e:  # an integer of thousands of digits
    return f"the line has a number that cannot be read ({e}): shorten it"
  if not isinstance(value, dict):
    return (f"the line holds {_JSON_NAMES[type(value)]}, not an object: "
            'write each request as {"id": ..., "prompt": ...}')
  return value


_JSON_NAMES = {list: "a list", str: "a string", int: "a number", float: "a number",
               bool: "true or false", type(None): "null"}


def _parquet_rows(source: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
  row = 0
  for batch in pq.ParquetFile(source).iter_batches(_PARQUET_BATCH_ROWS):
    for value in batch.to_pylist(maps_as_pydicts="strict"):
      row += 1
      yield row, _without_nulls(value)


def _without_nulls(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _without_nulls(item) for key, item in value.items() if item is not None}
  if isinstance(value, list):
    return [_without_nulls(item) for item in value]
  return value
