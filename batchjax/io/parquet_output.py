"""Output rows as a Parquet file."""

from collections.abc import Iterable, Iterator, Mapping
import itertools
from typing import Any, BinaryIO

from absl import logging
import pyarrow as pa
import pyarrow.parquet as pq

from batchjax.io import schemas
from batchjax.io.json_rows import dump

_BATCH_ROWS = 1024
_TYPES = {frozenset({"text"}): pa.string(), frozenset({"bool"}): pa.bool_()} | {
    frozenset(kinds): kind for kind, of_kind in (
        (pa.int64(), ({"int"}, {"long"}, {"int", "long"})),
        (pa.float64(), ({"float"}, {"int", "float"}))) for kinds in of_kind}


def write(f: BinaryIO, rows: Iterable[dict[str, Any]], types: Mapping[str, pa.DataType]) -> None:
  """Writes rows whose columns are those of the forms that occur, and the further fields.

  A further field has the type that `types` gives, or else that of its values where they are all
  text, all numbers or all true or false; what is neither is JSON text.

  Args:
    f: the file.
    rows: iterated twice.
    types: of further fields.
  """
  schema, as_json = _schema(rows, types)
  with pq.ParquetWriter(f, schema, compression="zstd") as writer:
    for batch in _batches(rows):
      batch = [_with_json(row, as_json) for row in batch]
      writer.write_table(pa.Table.from_pylist(batch, schema))


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
  remaining = iter(rows)
  while batch := list(itertools.islice(remaining, _BATCH_ROWS)):
    yield batch


def _schema(rows: Iterable[dict[str, Any]], types: Mapping[str, pa.DataType]
            ) -> tuple[pa.Schema, frozenset[str]]:
  """The columns, and which of them are JSON text."""
  forms: set[str] = set()
  kinds: dict[str, set[str]] = {}
  for batch in _batches(rows):
    forms |= {_form(row) for row in batch}
    known = set(schemas.output_schema(forms).names)
    for name in dict.fromkeys(name for row in batch for name in row if name not in known):
      values = [row.get(name) for row in batch]
      found = kinds.setdefault(name, set())
      if name not in types:
        found |= {_kind(value) for value in values if value is not None}
      elif not _fits(values, types[name]):
        found.add("other")
  columns = {name: types.get(name, _TYPES.get(frozenset(found), pa.string()))
             if "other" not in found else pa.string() for name, found in kinds.items()}
  as_json = frozenset(name for name, found in kinds.items()
                      if found and (frozenset(found) not in _TYPES))
  if as_json:
    logging.info("columns that hold JSON text: %s", ", ".join(sorted(as_json)))
  fields = list(schemas.output_schema(forms or {"batch"})) + [pa.field(*c) for c in columns.items()]
  return pa.schema(fields), as_json


def _form(row: dict[str, Any]) -> str:
  """The entry of `schemas.output_schema` that holds an output row."""
  if "custom_id" in row:
    return "batch"
  return "score" if "token_logprobs" in row.get("choices", [row])[0] else "plain"


def _kind(value: Any) -> str:
  """What one value asks of its column's type."""
  if isinstance(value, bool):
    return "bool"
  if isinstance(value, int):  # those beyond 2**53 are no floats, those beyond 2**63 no integers
    return "int" if abs(value) <= 2**53 else "long" if -2**63 <= value < 2**63 else "other"
  return {str: "text", float: "float"}.get(type(value), "other")


def _fits(values: list[Any], kind: pa.DataType) -> bool:
  try:
    pa.array(values, kind)
    return True
  except (pa.ArrowException, TypeError, ValueError, OverflowError):
    return False


def _with_json(row: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
  """The row with JSON text in these columns, and in the metadata of a response's body."""
  row = row | {name: dump(row[name]) for name in names & row.keys() if row[name] is not None}
  body = (row.get("response") or {}).get("body", {})
  if "metadata" in body:
    body = body | {"metadata": dump(body["metadata"])}
    row = row | {"response": row["response"] | {"body": body}}
  return row
