"""Files that appear whole or not at all, in the format that their path ends in."""

from collections.abc import Iterable, Iterator
import contextlib
import gzip
import io
import itertools
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchjax.io import schemas
from batchjax.io.records import InputError, file_format

_PARQUET_BATCH_ROWS = 1024


def dump(value: Any) -> str:
  """The one compact JSON text of a value; raises ValueError for NaN and infinities."""
  return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
  """A file that takes its name once the block ends without an error and its bytes are on disk."""
  temporary = path.with_name(path.name + ".tmp")
  try:
    with temporary.open("wb") as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  sync_directory(path.parent)


def sync_directory(path: Path) -> None:
  """Puts the names in a directory on disk."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def check_output(path: str | Path) -> None:
  """Raises InputError where `write_rows` could not write; call it before the work starts."""
  file_format(path)
  if "://" in str(path):
    raise InputError(f"{path}: output is written to local paths only; copy it there afterwards")
  if Path(path).is_dir():
    raise InputError(f"{path} is a directory: name the file to write")
  if not Path(path).parent.is_dir():
    raise InputError(f"{path}: its directory does not exist; make it first")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
  """Writes rows atomically as .jsonl, .jsonl.gz or .parquet; equal rows make equal bytes.

  Args:
    path: where to; a file that is there is replaced.
    rows: as `output` formats them; iterated twice for Parquet, whose columns
      are those of the row forms that occur.
  """
  check_output(path)
  suffix = file_format(path)
  with atomic(path) as f:
    if suffix == ".parquet":
      _write_parquet(f, rows)
    elif suffix == ".jsonl.gz":
      with gzip.GzipFile("", "wb", compresslevel=6, fileobj=f, mtime=0) as packed:
        _write_lines(packed, rows)
    else:
      _write_lines(f, rows)


def _write_lines(f: io.BufferedIOBase, rows: Iterable[dict[str, Any]]) -> None:
  for row in rows:
    f.write(dump(row).encode("utf-8") + b"\n")


def _write_parquet(f: BinaryIO, rows: Iterable[dict[str, Any]]) -> None:
  forms = {"batch" if "custom_id" in row else "plain" for row in rows}
  schema = schemas.output_schema(forms or {"batch"})
  with pq.ParquetWriter(f, schema, compression="zstd") as writer:
    remaining = iter(rows)
    while batch := list(itertools.islice(remaining, _PARQUET_BATCH_ROWS)):
      writer.write_table(pa.Table.from_pylist(batch, schema))
