"""What a row holds beside its request: it goes into the row's output as it is.

That is every field that batchjax does not read of a plain row or a row to score, and the `metadata` of
the body of an OpenAI batch line. It is kept nowhere: when the output is written, the input is read once more.
"""

from collections.abc import Collection, Iterator
from typing import Any

from etils import epath
import pyarrow as pa
import pyarrow.parquet as pq

from batchjax.config import RowLimits
from batchjax.io import paths, records
from batchjax.io.fields import ENVELOPE, Form, InvalidField, is_carried, one_line
from batchjax.io.journal import JournalRows
from batchjax.io.json_rows import dump
from batchjax.io.records import Record, RowError

_MAX_NAMES = 1000
# What is not nested so deeply can be written, however deep the stack is then.
_SPARE_DEPTH = 64


def is_batch_line(value: dict[str, Any], form: Form) -> bool:
  """Whether a row is the line of an OpenAI batch file, which rows to score never are."""
  return form != "score" and any(value.get(name) is not None for name in ENVELOPE)


def of_row(value: dict[str, Any], form: Form = "plain") -> dict[str, Any]:
  """What a row ("plain" or "score") carries, by name."""
  if not is_batch_line(value, form):
    return {name: item for name, item in value.items() if is_carried(name, form)}
  body = value.get("body")
  metadata = body.get("metadata") if isinstance(body, dict) else None
  return {} if metadata is None else {"metadata": metadata}


class Names:
  """The names under which the rows of a job carry something: a bounded number of them."""

  def __init__(self, limits: RowLimits, form: Form = "plain"):
    self._limits, self._form = limits, form
    self._names: dict[str, None] = {}

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def add(self, record: Record) -> None:
    """Notes those of a row, as far as there is room."""
    if not isinstance(record.value, RowError):
      for name in of_row(record.value, self._form):
        if len(self._names) < _MAX_NAMES and len(name) <= self._limits.max_name_chars:
          self._names[name] = None

  def check(self, record: Record) -> None:
    """Raises InvalidField where what a good row carries cannot be written."""
    fields = of_row(record.value, self._form)
    if more := sorted(fields.keys() - self._names):
      raise InvalidField(more[0], f"{more[0]}: the rows of a job may have {_MAX_NAMES} different fields "
                         "that are carried through, and those before this one have them: move it into "
                         "metadata", "limit_exceeded")
    if fields and (error := _dump_error(fields)):  # mostly there is none
      name, error = next((name, error) for name, item in fields.items()
                         if (error := _dump_error([item])))
      raise InvalidField(name, f"{name} is carried through to the output, which cannot hold it "
                         f"({one_line(error)}): write it as text, or leave it out") from error


def _dump_error(item: Any) -> Exception | None:
  """Why a value cannot be written."""
  for _ in range(_SPARE_DEPTH):
    item = [item]
  try:
    dump(item)
    return None
  except (ValueError, TypeError, RecursionError) as e:
    return e


class Carried:
  """What the rows of an input file carry, read from it as their output is written.

  Args:
    path: of the input.
    names: which fields.
    max_row_bytes: as for `records.read`.
    limit: likewise.
    form: "plain" or "score".
  """

  def __init__(self, path: epath.PathLike, names: Collection[str], max_row_bytes: int,
               limit: int | None = None, form: Form = "plain"):
    self.path, self._form = path, form
    self._names, self._args = frozenset(names), (max_row_bytes, limit)

  def __bool__(self) -> bool:
    """Whether there is anything to carry."""
    return bool(self._names)

  def join(self, rows: JournalRows) -> "JoinedRows":
    """Output or error objects with what their rows carry."""
    return JoinedRows(self, rows)

  @property
  def types(self) -> dict[str, pa.DataType]:
    """Types of the columns of a Parquet input; none for other formats."""
    if not str(self.path).endswith(".parquet"):
      return {}
    with paths.open_input(self.path) as source:
      return {field.name: field.type for field in pq.read_schema(source)}

  def records(self) -> Iterator[Record]:
    """The rows of the input."""
    return records.read(self.path, *self._args)

  def into(self, row: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """An output or error object with what the row carries.

    The metadata of a batch line stands in the response's body, as in the API; what a plain row
    carries stands beside the object's own fields, whose names it cannot have.
    """
    carried = {name: item for name, item in of_row(value, self._form).items() if name in self._names}
    if not carried or not is_batch_line(value, self._form):
      return row | carried
    response = row["response"]
    return row | {"response": response | {"body": response["body"] | carried}}


class JoinedRows:
  """The objects of a journal with what their rows carry; may be iterated more than once."""

  def __init__(self, carried: Carried, rows: JournalRows):
    self._carried, self._rows = carried, rows

  def __iter__(self) -> Iterator[dict[str, Any]]:
    inputs = self._carried.records()
    for index, row in zip(self._rows.indices, self._rows):
      record = next(record for record in inputs if record.index == index)
      yield row if isinstance(record.value, RowError) else self._carried.into(row, record.value)
