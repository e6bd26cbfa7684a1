"""Tokenized requests on disk, read back row by row through a memory map."""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

from jaxtyping import Int32, Int64
import numpy as np
import pyarrow as pa

from batchjax.io import files
from batchjax.io.fields import Form
from batchjax.io.schemas import REQUEST_SCHEMA
from batchjax.io.validate import Row
from batchjax.types import Request, SamplingParams

_BATCH_ROWS = 4096
_BATCH_TOKENS = 1 << 20
_DEFAULTS = dataclasses.asdict(SamplingParams())
# Requests stand together in a window when their first so many tokens agree.
_PREFIX_LENS = (16, 64, 256, 1024, 4096)
_HASH_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class StoredRow:
  """A request and what its output needs; the fields are those of `validate.Row`."""

  index: int
  row: int
  form: Form
  model: str
  echo: bool
  return_token_ids: bool
  request: Request


class RequestWriter:
  """Spills requests to an Arrow IPC file that appears under its name only when complete.

  A context manager; memory is bounded by one batch of rows. Prompt text is not kept.
  """

  def __init__(self, path: Path):
    self._path = path
    self._stack = contextlib.ExitStack()
    self._rows: list[tuple[Any, ...]] = []
    self._token_ids: list[np.ndarray] = []
    self._num_tokens = 0

  def __enter__(self) -> "RequestWriter":
    f = self._stack.enter_context(files.atomic(self._path))
    self._writer = pa.ipc.new_file(f, REQUEST_SCHEMA)
    return self

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
    with self._stack:  # leaves no file where the block, or what follows, raises
      if error is not None:
        raise error
      self._flush()
      self._writer.close()

  def append(self, row: Row, token_ids: Int32[np.ndarray, "prompt_len"]) -> None:
    """Adds a valid row with its tokenized prompt."""
    params = row.sampling_params
    changed = {name: getattr(params, name) for name, default in _DEFAULTS.items()
               if name != "seed" and getattr(params, name) != default}
    self._rows.append((row.index, row.row, row.request_id, files.dump(changed), params.seed, row.form,
                       row.model, row.echo, row.return_token_ids))
    self._token_ids.append(np.asarray(token_ids, np.int32))
    self._num_tokens += len(token_ids)
    if len(self._rows) >= _BATCH_ROWS or self._num_tokens >= _BATCH_TOKENS:
      self._flush()

  def _flush(self) -> None:
    if not self._rows:
      return
    offsets = np.cumsum([0] + [len(ids) for ids in self._token_ids], dtype=np.int32)
    token_ids = pa.ListArray.from_arrays(offsets, np.concatenate(self._token_ids))
    columns = [pa.array(column, field.type)
               for column, field in zip(zip(*self._rows), REQUEST_SCHEMA)]
    self._writer.write_batch(
        pa.RecordBatch.from_arrays(columns + [token_ids], schema=REQUEST_SCHEMA))
    self._rows, self._token_ids, self._num_tokens = [], [], 0


class RequestReader:
  """The requests of a spilled file as a sequence; a context manager.

  Position i counts the stored requests; rows that were errors have none, so
  the row's place in the input is `indices[i]`.

  Args:
    path: of the file.
    sha256: its hash, as hex digits; None does not look.

  Raises:
    DamagedFile: it is missing, or its hash another one.

  Attributes:
    prompt_lens: i32[num_requests], tokens of each prompt.
    indices: i64[num_requests], ascending places in the input file.
  """

  prompt_lens: Int32[np.ndarray, "num_requests"]
  indices: Int64[np.ndarray, "num_requests"]

  def __init__(self, path: Path, sha256: str | None = None):
    try:
      with open(path, "rb", opener=files.open_regular) as f:
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, ValueError) as e:  # an empty file cannot be mapped
      raise files.DamagedFile(f"{path} is missing or empty") from e
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
      raise files.DamagedFile(f"{path} is damaged: its hash does not fit")
    stored = pa.ipc.open_file(pa.py_buffer(data))
    self._batches = [stored.get_batch(i) for i in range(stored.num_record_batches)]
    self._starts = np.cumsum([0] + [batch.num_rows for batch in self._batches])
    self._params_fn = functools.lru_cache(1024)(_sampling_params)  # most rows share theirs
    lens = [np.diff(batch["token_ids"].offsets.to_numpy()) for batch in self._batches]
    indices = [batch["index"].to_numpy() for batch in self._batches]
    self.prompt_lens = np.concatenate([np.zeros(0, np.int32), *lens])
    self.indices = np.concatenate([np.zeros(0, np.int64), *indices])

  def __enter__(self) -> "RequestReader":
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def close(self) -> None:
    """Lets go of the file; requests that were read keep what they need of it."""
    self._batches.clear()

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, i: int | slice) -> Request | list[Request]:
    """The request at a position, or those of a window."""
    if not isinstance(i, slice):
      return self.row(i).request
    start, stop, step = i.indices(len(self))
    if step != 1:
      return [self[j] for j in range(start, stop, step)]
    return [row.request for row in self.rows(start, stop)]

  def row(self, i: int) -> StoredRow:
    """The stored row at a position; raises IndexError past the end."""
    i = range(len(self))[i]
    return self.rows(i, i + 1)[0]

  def rows(self, start: int, stop: int) -> list[StoredRow]:
    """The stored rows start to stop-1; their token ids lie in the memory map, read-only."""
    rows = []
    while start < stop:
      b = int(np.searchsorted(self._starts, start, side="right")) - 1
      end = min(stop, int(self._starts[b + 1]))
      rows += self._stored(self._batches[b].slice(start - int(self._starts[b]), end - start))
      start = end
    return rows

  def take(self, positions: Int64[np.ndarray, "rows"]) -> list[StoredRow]:
    """The stored rows at any positions, in their order; the token ids are copies."""
    rows: dict[int, StoredRow] = {}
    batch_of = np.searchsorted(self._starts, positions, side="right") - 1
    for b in np.unique(batch_of):
      here = positions[batch_of == b]
      taken = self._batches[b].take(pa.array(here - self._starts[b]))
      rows.update(zip(here.tolist(), self._stored(taken)))
    return [rows[i] for i in positions.tolist()]

  def windows(self, size: int) -> Iterator[Int64[np.ndarray, "rows"]]:
    """Positions of all requests, `size` at a time, so that shared prefixes meet in a window.

    Requests whose first tokens agree come together wherever they stand in the
    file, groups in the order of their first request; a file of one window
    keeps its order. Depends on the requests alone. Memory: 8 bytes a request
    for each of the compared lengths.
    """
    order = np.arange(len(self))
    if len(self) > size:
      firsts = []
      for hashes in zip(*map(_prefix_hashes, self._batches)):
        _, first, group = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
        firsts.append(first[group])
      order = np.lexsort(firsts[::-1])
    for start in range(0, len(self), size):
      yield order[start:start + size]

  def _stored(self, batch: pa.RecordBatch) -> Iterator[StoredRow]:
    columns = [batch[name].to_pylist() for name in
               ("index", "row", "form", "model", "echo", "return_token_ids", "request_id",
                "sampling_params", "seed")]
    offsets = batch["token_ids"].offsets.to_numpy()
    token_ids = batch["token_ids"].values.to_numpy()  # of the whole batch, as the offsets count
    for i, (*fields, request_id, params, seed) in enumerate(zip(*columns)):
      params = dataclasses.replace(self._params_fn(params), seed=seed)
      yield StoredRow(*fields, Request(request_id, token_ids[offsets[i]:offsets[i + 1]], params))


def _sampling_params(text: str) -> SamplingParams:
  fields = json.loads(text)
  for name in ("stop", "stop_token_ids"):
    fields[name] = tuple(fields.get(name, ()))
  fields["logit_bias"] = tuple((token, bias) for token, bias in fields.get("logit_bias", ()))
  return SamplingParams(**fields)


def _prefix_hashes(batch: pa.RecordBatch) -> list[np.ndarray]:
  """For each of `_PREFIX_LENS`, a hash of every row's tokens up to there: u64[rows].

  A polynomial modulo 2**64; two prefixes that collide merely stand together.
  """
  column = batch["token_ids"]
  offsets = column.offsets.to_numpy().astype(np.int64)
  tokens = column.values.to_numpy()[offsets[0]:offsets[-1]].astype(np.uint64)
  offsets, lens = offsets[:-1] - offsets[0], np.diff(offsets)
  powers = np.cumprod(np.full(max(lens.max(initial=0), 1), _HASH_BASE))
  within = np.arange(len(tokens)) - np.repeat(offsets, lens)
  sums = np.append(np.uint64(0), np.cumsum((tokens + np.uint64(1)) * powers[within]))
  return [sums[offsets + np.minimum(lens, cut)] - sums[offsets] for cut in _PREFIX_LENS]
