"""What a job records of itself: JSON lines in `metrics.jsonl` of the job directory.

Each line is one record with its type under "record". A run (the first one, or a
resume) begins with a "run" line; all lines up to the next one belong to it.
"""

from collections.abc import Iterator
import dataclasses
import json
import operator
import os
import pathlib
from typing import Any, ClassVar, Literal

from batchjax.config import from_config_dict
from batchjax.io import files

METRICS_FILE = "metrics.jsonl"
_MOST = 1e15  # no count of a job is larger, and pictures can be drawn up to here
_MOST_SECS = 1e11  # nor is a time; a calendar goes on for longer


class MetricsError(ValueError):
  """A line of a metrics file is not a record; the message names file and line."""


@dataclasses.dataclass(frozen=True, slots=True)
class RunRecord:
  """The begin of a run; `secs` of all its records count from here.

  Attributes:
    time: seconds since the epoch.
    device_kind: what JAX calls the device, e.g. "TPU v5e".
    num_devices: devices in the mesh.
    model: name of the model.
    jax_version: of the installed JAX.
    num_requests: requests this run sets out to answer: all of the job in the
      first run, those left after a resume. Error rows count.
    num_done: requests that earlier runs had answered.
    num_prompt_tokens: prompt tokens of these requests, shared ones counted each time.
    num_pages: pages of the KV pool.
    page_size: tokens of a page.
    max_rows: most rows decoded at once.
    buckets: names of the shapes that may be launched.
  """

  TAG: ClassVar[str] = "run"
  time: float
  device_kind: str
  num_devices: int
  model: str
  jax_version: str
  num_requests: int
  num_prompt_tokens: int
  num_pages: int
  page_size: int
  max_rows: int
  buckets: tuple[str, ...] = ()
  num_done: int = 0

  def __post_init__(self):
    object.__setattr__(self, "buckets", tuple(self.buckets))


@dataclasses.dataclass(frozen=True, slots=True)
class StartRecord:
  """What came before the first step, in seconds of wall time.

  Attributes:
    read_secs: reading rows and turning them into tokens, or taking those of an earlier run.
    load_secs: loading the model.
    plan_secs: planning.
    compile_secs: having every shape: looked up, or compiled side by side.
    warm_up_secs: making the KV pool, and the first run of each shape.
  """

  TAG: ClassVar[str] = "start"
  read_secs: float
  load_secs: float
  plan_secs: float
  compile_secs: float
  warm_up_secs: float


@dataclasses.dataclass(frozen=True, slots=True)
class CompileRecord:
  """One compiled shape.

  Attributes:
    bucket: its name.
    secs: time it took; shapes compile in parallel, so these overlap.
    cached: whether it came from the persistent cache.
  """

  TAG: ClassVar[str] = "compile"
  bucket: str
  secs: float
  cached: bool


@dataclasses.dataclass(frozen=True, slots=True)
class StepRecord:
  """One dispatch: a mixed step, or a decode loop of several iterations.

  Attributes:
    secs: when its results were read, since the begin of the run.
    kind: "mixed" or "decode".
    step_secs: wall time attributed to it; these add up to the run's.
    host_secs: time the host spent to plan and pack it.
    num_steps: iterations dispatched; 1 in a mixed step.
    num_tokens: useful tokens, over all iterations.
    bucket_tokens: tokens launched, over all iterations.
    num_rows: rows that held a slot while it ran.
    bucket_rows: rows launched.
    prompt_tokens: prompt tokens computed, those of preempted rows again.
    generated_tokens: tokens drawn.
    used_pages: pages of the KV pool in use while it ran.
    waiting: rows not yet admitted then.
    finished: requests of this run answered so far, error rows included.
    preempted: rows preempted in this run so far.
  """

  TAG: ClassVar[str] = "step"
  secs: float
  kind: Literal["mixed", "decode"]
  step_secs: float
  host_secs: float
  num_steps: int
  num_tokens: int
  bucket_tokens: int
  num_rows: int
  bucket_rows: int
  prompt_tokens: int
  generated_tokens: int
  used_pages: int
  waiting: int
  finished: int
  preempted: int

  @property
  def bucket(self) -> str:
    """Name of the launched shape: "decode 64", or "mixed 1024x64" (tokens x rows)."""
    if self.kind == "decode":
      return f"decode {self.bucket_rows}"
    return f"mixed {self.bucket_tokens // max(self.num_steps, 1)}x{self.bucket_rows}"


@dataclasses.dataclass(frozen=True, slots=True)
class RequestRecord:
  """One answered request.

  Attributes:
    request_id: its id in the job; "" where an error row has none.
    row: its place among the rows of the input file, from 0.
    prompt_tokens: length of the prompt.
    cached_tokens: prompt tokens whose KV another request had computed.
    generated_tokens: over all its samples.
    start_secs: when its first row was admitted, since the begin of the run.
    end_secs: when its last sample was done.
    finish_reason: "length" if any sample ran into it, else "stop"; "error" if any failed.
  """

  TAG: ClassVar[str] = "request"
  request_id: str
  row: int
  prompt_tokens: int
  cached_tokens: int
  generated_tokens: int
  start_secs: float
  end_secs: float
  finish_reason: Literal["stop", "length", "error"]


Record = RunRecord | StartRecord | CompileRecord | StepRecord | RequestRecord


@dataclasses.dataclass
class Run:
  """The records of one run, in the order they were written; `start` is None until it has started."""

  record: RunRecord
  start: StartRecord | None = None
  compiles: list[CompileRecord] = dataclasses.field(default_factory=list)
  steps: list[StepRecord] = dataclasses.field(default_factory=list)
  requests: list[RequestRecord] = dataclasses.field(default_factory=list)

  @property
  def wall_secs(self) -> float:
    """From its begin to the last result."""
    return max([s.secs for s in self.steps] + [r.end_secs for r in self.requests], default=0.0)


def to_json(values: dict[str, Any]) -> str:
  """One line of JSON; numpy scalars become numbers.

  Raises:
    ValueError: a value is NaN or infinite.
  """
  return json.dumps(values, default=operator.methodcaller("item"), allow_nan=False)


class MetricsWriter:
  """Appends records to a metrics file, one write per line, so that a kill tears at most the last.

  Opening an existing file first cuts off such a torn line.
  """

  def __init__(self, path: str | os.PathLike):
    self._path = pathlib.Path(path)
    if self._path.exists():
      _cut_torn_line(self._path)
    self._file = open(self._path, "a", encoding="utf-8", buffering=1, opener=files.open_regular)

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def write(self, record: Record) -> None:
    """Appends one record."""
    with files.naming(self._path):
      self._file.write(to_json({"record": record.TAG, **dataclasses.asdict(record)}) + "\n")

  def close(self) -> None:
    with files.naming(self._path):
      self._file.close()


def read_records(path: str | os.PathLike) -> Iterator[Record]:
  """Records of a metrics file, which may still be written to; a torn last line is left out.

  Raises:
    MetricsError: a whole line is not a record.
    FileNotFoundError: there is no such file.
  """
  classes = {cls.TAG: cls for cls in (RunRecord, StartRecord, CompileRecord, StepRecord,
                                      RequestRecord)}
  with open(path, encoding="utf-8", newline="\n", errors="replace",
            opener=files.open_regular) as file:
    for number, line in enumerate(file, start=1):
      if not line.endswith("\n"):
        return
      try:
        values = json.loads(line)
        cls = classes[values.pop("record")]
        record = from_config_dict(cls, values, cls.TAG)
        for name, value in values.items():
          most = _MOST_SECS if name == "time" or name.endswith("secs") else _MOST
          if isinstance(value, (int, float)) and not 0 <= value <= most:
            raise ValueError(f"{name} is {value}")
      except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MetricsError(f"{path}, line {number} is not a record of this version of batchjax "
                           f"({error!r}); move the file away to report without it") from error
      yield record


def read_runs(path: str | os.PathLike) -> tuple[Run, ...]:
  """All runs of a metrics file, oldest first.

  Raises:
    MetricsError: a whole line is not a record, or comes before the first "run" line.
    FileNotFoundError: there is no such file.
  """
  runs: list[Run] = []
  for record in read_records(path):
    if isinstance(record, RunRecord):
      runs.append(Run(record))
    elif not runs:
      raise MetricsError(f"{path} begins with a {record.TAG!r} record; a run must come first")
    elif isinstance(record, StartRecord):
      runs[-1].start = record
    elif isinstance(record, CompileRecord):
      runs[-1].compiles.append(record)
    elif isinstance(record, StepRecord):
      runs[-1].steps.append(record)
    else:
      runs[-1].requests.append(record)
  return tuple(runs)


def _cut_torn_line(path: pathlib.Path) -> None:
  chunk_bytes = 1 << 16
  with open(path, "r+b", opener=files.open_regular) as file:
    end = file.seek(0, os.SEEK_END)
    while end:
      start = max(0, end - chunk_bytes)
      file.seek(start)
      newline = file.read(end - start).rfind(b"\n")
      if newline >= 0:
        end = start + newline + 1
        break
      end = start
    file.truncate(end)
