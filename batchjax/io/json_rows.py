"""The rows of a JSONL file, each by itself."""

from collections.abc import Iterator
import datetime
import json
from typing import Any, BinaryIO

from batchjax.io.fields import InvalidField

_CHUNK_BYTES = 1 << 18


def dump(value: Any) -> str:
  """The one compact JSON text of a value, times in ISO 8601; raises ValueError for NaN and infinities."""
  return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_text)


def _text(value: Any) -> str:
  """What Parquet has values of and JSON does not."""
  if isinstance(value, (datetime.date, datetime.time)):
    return value.isoformat()
  if isinstance(value, datetime.timedelta):
    return str(value)
  raise TypeError(f"JSON has no value for a {type(value).__name__}")


def json_rows(source: BinaryIO, max_bytes: int
              ) -> Iterator[tuple[int, str | None, dict[str, Any] | InvalidField]]:
  """Yields each row's number, None, and its object or what is wrong with it."""
  for row, line in enumerate(_lines(source, max_bytes), start=1):
    if line is None:
      yield row, None, InvalidField("", f"the line has more than limits.max_line_bytes={max_bytes} "
                                    "bytes: shorten it, or raise the limit", "limit_exceeded")
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
  except MemoryError:
    problem = "the JSON of the line does not fit into memory: shorten it"
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
