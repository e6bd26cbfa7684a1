"""The rows of a Parquet file, each by itself."""

from collections.abc import Iterable, Iterator
import decimal
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchjax.io.fields import InvalidField, one_line

_BATCH_ROWS, _BATCH_BYTES = 256, 2 << 30

# The id of a bad row, where it can be read, and a row's object or what is wrong with it.
_Row = tuple[str | None, dict[str, Any] | InvalidField]


def parquet_rows(source: BinaryIO, max_bytes: int
                 ) -> Iterator[tuple[int, str | None, dict[str, Any] | InvalidField]]:
  """Yields each row's number, the id of a bad row, and its object or what is wrong with it."""
  row, parquet = 0, pq.ParquetFile(source, page_checksum_verification=True)
  names = parquet.schema_arrow.names
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise ValueError(f"two columns have the name {twice[0]!r}")
  for batch in parquet.iter_batches(_batch_rows(parquet.metadata)):
    for request_id, value in _batch(batch, max_bytes):
      row += 1
      yield row, request_id, value


def _batch_rows(metadata: pq.FileMetaData) -> int:
  """How many rows to decode at a time, so that they hold no more than `_BATCH_BYTES`.

  A value may stand once in its row group and be that of every row; it is no larger than the group.
  """
  # Not the columns' own sizes: Arrow aborts the process over some damage in them.
  largest = max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)),
                default=0)
  return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(largest, 1)))


def _batch(batch: pa.RecordBatch, max_bytes: int) -> Iterable[_Row]:
  one_by_one = (_row(batch.slice(i, 1), max_bytes) for i in range(batch.num_rows))
  if batch.nbytes > max_bytes:
    return one_by_one
  try:
    return [(None, _json_value(value)) for value in batch.to_pylist(maps_as_pydicts="strict")]
  except Exception:  # over some row, which is told where each is read by itself
    return one_by_one


def _row(batch: pa.RecordBatch, max_bytes: int) -> _Row:
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
