"""Reads the rows of an input file one by one, whatever its format."""

from collections.abc import Iterable, Iterator
import dataclasses
import decimal
import gzip
import json
from typing import Any, BinaryIO

from etils import epath
import pyarrow as pa
import pyarrow.parquet as pq

from batchjax.config import RowLimits
from batchjax.io.fields import InvalidField

FORMATS = (".jsonl", ".jsonl.gz", ".parquet")
_PARQUET_BATCH_ROWS, _PARQUET_BATCH_BYTES = 256, 2 << 30
_CHUNK_BYTES = 1 << 18
_MAX_MESSAGE_CHARS = 1000


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


def read(path: epath.PathLike, max_row_bytes: int = RowLimits.max_line_bytes) -> Iterator[Record]:
  """Yields the rows of a file in order, holding only a few in memory.

  A row that cannot be decoded, or is too long, carries a RowError and the next
  one follows; blank lines are skipped but counted in `row`. A null column or
  struct field of a Parquet file counts as absent, and bytes are text in UTF-8.

  Args:
    path: of the file.
    max_row_bytes: longest line of a JSONL file, unpacked, or row of a Parquet file; no more of a
      longer line is ever held.

  Raises:
    InputError: at once where the file is missing, empty, a directory or of an
      unknown format; while reading where the file as a whole is damaged.
  """
  suffix = file_format(path)
  source = open_input(path)
  try:
    is_empty = not source.read(1)
    source.seek(0)
  except OSError as e:
    source.close()
    raise InputError(f"{path} cannot be read: {e}") from e
  if is_empty:
    source.close()
    raise InputError(f"{path} is empty: write at least one request into it")
  return _records(path, suffix, source, max_row_bytes)


def _records(path: epath.PathLike, suffix: str, source: BinaryIO,
             max_row_bytes: int) -> Iterator[Record]:
  index, read_fn = -1, _parquet_rows if suffix == ".parquet" else _json_rows
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


def one_line(error: BaseException) -> str:
  """The type of an exception and the first of its words."""
  words = " ".join(str(error).split())
  return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__


# Row, id where a bad row has one that can be read, and the object or what is wrong with it.
_Row = tuple[int, str | None, dict[str, Any] | InvalidField]


def _json_rows(source: BinaryIO, max_bytes: int) -> Iterator[_Row]:
  for row, line in enumerate(_lines(source, max_bytes), start=1):
    if line is None:
      yield row, None, InvalidField("", f"the line has more than limits.max_line_bytes={max_bytes} bytes: "
                              "shorten it, or raise the limit", "limit_exceeded")
    else:
      if row == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
      if line.strip():
        yield row, None, _decode(line.removesuffix(b"\r"))


def _lines(source: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
  """Lines without their ends; None for a longer one, of which no more than the limit is held."""
  parts, num_bytes = [], 0  # of the line that is not at its end yet
  while chunk := source.read(_CHUNK_BYTES):
    *ended, rest = chunk.split(b"\n")
    for piece in ended:
      yield b"".join([*parts, piece]) if num_bytes + len(piece) <= max_bytes else None
      parts, num_bytes = [], 0
    num_bytes += len(rest)
    if num_bytes <= max_bytes:
      parts.append(rest)
    else:
      parts.clear()
  if num_bytes:
    yield b"".join(parts) if num_bytes <= max_bytes else None


def _decode(line: bytes) -> dict[str, Any] | InvalidField:
  """The object in the line, or what is wrong with it."""
  try:
    value = json.loads(line.decode("utf-8"))
    if b"\\u" in line:  # half of a surrogate pair decodes, but no file can hold it
      json.dumps(value, ensure_ascii=False).encode("utf-8")
  except UnicodeDecodeError as e:
    problem = f"byte {e.start + 1} of the line is not valid UTF-8: save the file as UTF-8"
  except UnicodeEncodeError:
    problem = ("the line has half of a surrogate pair (\\ud800 to \\udfff): write the whole "
               "character")
  except json.JSONDecodeError as e:
    problem = (f"the line is not valid JSON at column {e.colno} ({e.msg}): "
               "write each request as one JSON object on one line")
  except RecursionError:
    problem = "the JSON of the line is nested too deeply: flatten it"
  except ValueError as e:  # an integer of thousands of digits
    words = str(e).split(";")[0]
    problem = f"the line has a number that cannot be read ({words}): shorten it"
  else:
    if isinstance(value, dict):
      return value
    problem = (f"the line holds {_JSON_NAMES[type(value)]}, not an object: "
               'write each request as {"id": ..., "prompt": ...}')
  return InvalidField("", problem, "invalid_json")


_JSON_NAMES = {list: "a list", str: "a string", int: "a number", float: "a number",
               bool: "true or false", type(None): "null"}


def _parquet_rows(source: BinaryIO, max_bytes: int) -> Iterator[_Row]:
  row, parquet = 0, pq.ParquetFile(source, page_checksum_verification=True)
  names = parquet.schema_arrow.names
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise ValueError(f"two columns have the name {twice[0]!r}")
  for batch in parquet.iter_batches(_batch_rows(parquet.metadata)):
    for request_id, value in _parquet_batch(batch, max_bytes):
      row += 1
      yield row, request_id, value


def _batch_rows(metadata: pq.FileMetaData) -> int:
  """How many rows to decode at a time, so that they hold no more than `_PARQUET_BATCH_BYTES`.

  A value may stand once in its row group and be that of every row; it is no larger than the group.
  """
  # Not the columns' own sizes: Arrow aborts the process over some damage in them.
  largest = max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)),
                default=0)
  return max(1, min(_PARQUET_BATCH_ROWS, _PARQUET_BATCH_BYTES // max(largest, 1)))


def _parquet_batch(batch: pa.RecordBatch, max_bytes: int
                   ) -> Iterable[tuple[str | None, dict[str, Any] | InvalidField]]:
  one_by_one = (_parquet_row(batch.slice(i, 1), max_bytes) for i in range(batch.num_rows))
  if batch.nbytes > max_bytes:
    return one_by_one
  try:
    return [(None, _json_value(value)) for value in batch.to_pylist(maps_as_pydicts="strict")]
  except Exception:  # over some row, which is told where each is read by itself
    return one_by_one


def _parquet_row(batch: pa.RecordBatch, max_bytes: int
                 ) -> tuple[str | None, dict[str, Any] | InvalidField]:
  """The id of a bad row, and the object in a batch of one row or what is wrong with it."""
  if batch.nbytes > max_bytes:
    return None, InvalidField("", f"the row has more than limits.max_line_bytes={max_bytes} bytes: "
                              "shorten it, or raise the limit", "limit_exceeded")
  value, problem = {}, None
  for name, column in zip(batch.schema.names, batch.columns):
    try:
      item = _json_value(column[0].as_py(maps_as_pydicts="strict"))
    except Exception as e:  # Arrow holds more than Python has values for
      problem = problem or InvalidField(name, f"column {name} holds what cannot be read "
                                        f"({one_line(e)}): correct it, or leave the column out")
    else:
      if item is not None:
        value[name] = item
  if problem is None:
    return None, value
  request_id = value.get("custom_id", value.get("id"))
  return request_id if isinstance(request_id, str) else None, problem


def _json_value(value: Any) -> Any:
  """The value as JSON has it: without nulls, bytes as text, decimals as numbers."""
  if isinstance(value, dict):
    return {key: _json_value(item) for key, item in value.items() if item is not None}
  if isinstance(value, list):
    return [_json_value(item) for item in value]
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, decimal.Decimal):
    return int(value) if value == value.to_integral_value() else float(value)
  return value
