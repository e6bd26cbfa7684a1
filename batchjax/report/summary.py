"""The figures of a job, over all its runs."""

import collections
from collections.abc import Iterable, Sequence
import dataclasses
import heapq
import os
import pathlib

from batchjax.report.metrics import METRICS_FILE, RequestRecord, Run, RunRecord, StartRecord
from batchjax.report.metrics import StepRecord
from batchjax.report.metrics import read_runs


@dataclasses.dataclass(frozen=True)
class StepTotals:
  """Steps of one kind, or of one bucket, added up.

  Attributes:
    name: the kind or the bucket.
    num_dispatches: launches.
    num_steps: iterations.
    secs: wall time.
    num_tokens: useful tokens.
    bucket_tokens: launched tokens.
  """

  name: str
  num_dispatches: int
  num_steps: int
  secs: float
  num_tokens: int
  bucket_tokens: int

  @property
  def padding(self) -> float:
    """Share of the launched tokens that is padding."""
    return 1 - self.num_tokens / self.bucket_tokens if self.bucket_tokens else 0.0


@dataclasses.dataclass(frozen=True)
class RunFigures:
  """One run, or all runs of a job, in seconds of wall time and tokens.

  Attributes:
    num_answered: requests answered, error rows not included.
    generated_tokens: tokens drawn.
    prompt_tokens: of the requests answered.
    computed_tokens: prompt tokens computed.
    wall_secs: from the call to the last result.
    step_secs: of these, in steps.
    start: of these, before the first step; None where that is not recorded, or not over yet.
  """

  num_answered: int
  generated_tokens: int
  prompt_tokens: int
  computed_tokens: int
  wall_secs: float
  step_secs: float
  start: StartRecord | None

  @property
  def output_tokens_per_sec(self) -> float:
    """Tokens drawn per second in steps."""
    return _ratio(self.generated_tokens, self.step_secs)

  @property
  def wall_tokens_per_sec(self) -> float:
    """Tokens drawn per second from the call to the last result."""
    return _ratio(self.generated_tokens, self.wall_secs)


@dataclasses.dataclass(frozen=True)
class Summary:
  """A job in figures, a running or resumed one included.

  A request that more than one run answered (it was done, but not yet in the
  journal when the run was killed) counts once.

  Attributes:
    name: of the job directory.
    runs: the first record of each run, oldest first.
    last_run, all_runs: figures of the newest run, and of all of them; those of a job without a run
      are zero.
    num_requests: requests of the job, error rows included.
    num_finished: requests answered, error rows not included.
    num_errors: error rows.
    prompt_tokens: prompt tokens asked for by the whole job.
    finished_prompt_tokens: those of the requests answered.
    cached_tokens: of these, tokens whose KV another request had computed.
    computed_tokens: prompt tokens computed, those of preempted rows and lost work again.
    output_tokens: tokens in the answers.
    generated_tokens: tokens drawn, by unfinished requests and lost runs too.
    host_secs: of the host's planning and packing, most of it while the device computes.
    kinds: steps by kind.
    buckets: steps by launched shape.
    num_compiles: shapes compiled or loaded.
    num_cached_compiles: of these, from the persistent cache.
    num_preempted: rows preempted.
    peak_pages: pages in use when the largest share of the pool was.
    peak_pool_pages: pages of that pool; a resume may bring another one.
    finish_reasons: (reason, requests), most frequent first.
    slowest: answered requests by time in the engine, longest first.
  """

  name: str
  runs: tuple[RunRecord, ...]
  last_run: RunFigures
  all_runs: RunFigures
  num_requests: int
  num_finished: int
  num_errors: int
  prompt_tokens: int
  finished_prompt_tokens: int
  cached_tokens: int
  computed_tokens: int
  output_tokens: int
  generated_tokens: int
  host_secs: float
  kinds: tuple[StepTotals, ...]
  buckets: tuple[StepTotals, ...]
  num_compiles: int
  num_cached_compiles: int
  num_preempted: int
  peak_pages: int
  peak_pool_pages: int
  finish_reasons: tuple[tuple[str, int], ...]
  slowest: tuple[RequestRecord, ...]

  @property
  def is_complete(self) -> bool:
    """Whether every request is answered."""
    return bool(self.runs) and self.num_finished + self.num_errors >= self.num_requests

  @property
  def cached_share(self) -> float:
    """Share of the answered requests' prompt tokens that need not be computed."""
    return _ratio(self.cached_tokens, self.finished_prompt_tokens)

  @property
  def padding(self) -> float:
    """Share of all launched tokens that is padding."""
    launched = sum(b.bucket_tokens for b in self.buckets)
    return 1 - sum(b.num_tokens for b in self.buckets) / launched if launched else 0.0

  @property
  def peak_kv_use(self) -> float:
    """Largest share of the KV pool in use."""
    return _ratio(self.peak_pages, self.peak_pool_pages)

  @property
  def host_share(self) -> float:
    """Host time per step time; the device waits for the host as this nears 1."""
    return _ratio(self.host_secs, self.all_runs.step_secs)


def summarize(job_dir: str | os.PathLike, *, num_slowest: int = 10) -> Summary:
  """Adds up the metrics of a job directory; all zero where no run is recorded yet.

  Raises:
    FileNotFoundError: there is no such directory.
    MetricsError: the metrics file is damaged before its last line.
  """
  job_dir = pathlib.Path(job_dir)
  return summarize_runs(job_dir.resolve().name, load_runs(job_dir), num_slowest=num_slowest)


def load_runs(job_dir: str | os.PathLike) -> tuple[Run, ...]:
  """The runs recorded in a job directory, none if it has no metrics yet.

  Raises:
    FileNotFoundError: there is no such directory.
    MetricsError: the metrics file is damaged before its last line.
  """
  job_dir = pathlib.Path(job_dir)
  if not job_dir.is_dir():
    raise FileNotFoundError(f"{job_dir} is no job directory: a job writes <output>.job beside "
                            "its output file")
  path = job_dir / METRICS_FILE
  return read_runs(path) if path.exists() else ()


def summarize_runs(name: str, runs: tuple[Run, ...], *, num_slowest: int = 10) -> Summary:
  """Adds up the runs of one job."""
  steps = [step for run in runs for step in run.steps]
  compiles = [compiled for run in runs for compiled in run.compiles]
  requests = answered(runs)
  done = [r for r in requests if r.finish_reason != "error"]
  pools = [(s.used_pages, run.record.num_pages) for run in runs for s in run.steps]
  peak_pages, peak_pool_pages = max(pools, key=lambda pool: _ratio(*pool), default=(0, 0))
  # A kill may have taken the record of a request, but not its answer, which the next run has counted.
  num_known = runs[-1].record.num_done + len(answered(runs[-1:])) if runs else 0
  reasons = collections.Counter(r.finish_reason for r in requests)
  return Summary(
      name=name,
      runs=tuple(run.record for run in runs),
      last_run=_figures(runs[-1:], answered(runs[-1:])), all_runs=_figures(runs, requests),
      num_requests=max((run.record.num_requests + run.record.num_done for run in runs), default=0),
      num_finished=max(len(requests), num_known) - (len(requests) - len(done)),
      num_errors=len(requests) - len(done),
      prompt_tokens=max((run.record.num_prompt_tokens for run in runs), default=0),
      finished_prompt_tokens=sum(r.prompt_tokens for r in done),
      cached_tokens=sum(r.cached_tokens for r in done),
      computed_tokens=sum(s.prompt_tokens for s in steps),
      output_tokens=sum(r.generated_tokens for r in done),
      generated_tokens=sum(s.generated_tokens for s in steps),
      host_secs=sum(s.host_secs for s in steps),
      kinds=_totals((s.kind, s) for s in steps),
      buckets=_totals((s.bucket, s) for s in steps),
      num_compiles=len(compiles),
      num_cached_compiles=sum(c.cached for c in compiles),
      num_preempted=sum(max((s.preempted for s in run.steps), default=0) for run in runs),
      peak_pages=peak_pages,
      peak_pool_pages=peak_pool_pages,
      finish_reasons=tuple(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
      slowest=tuple(heapq.nlargest(num_slowest, done, key=lambda r: r.end_secs - r.start_secs)))


def answered(runs: Iterable[Run]) -> list[RequestRecord]:
  """The requests answered, each once, as its last run recorded it."""
  return list({(r.row, r.request_id): r for run in runs for r in run.requests}.values())


def _figures(runs: Sequence[Run], requests: Iterable[RequestRecord]) -> RunFigures:
  steps = [step for run in runs for step in run.steps]
  done = [r for r in requests if r.finish_reason != "error"]
  starts = [dataclasses.astuple(run.start) for run in runs if run.start is not None]
  return RunFigures(
      num_answered=len(done), generated_tokens=sum(s.generated_tokens for s in steps),
      prompt_tokens=sum(r.prompt_tokens for r in done),
      computed_tokens=sum(s.prompt_tokens for s in steps), wall_secs=sum(run.wall_secs for run in runs),
      step_secs=sum(s.step_secs for s in steps),
      start=StartRecord(*map(sum, zip(*starts))) if runs and len(starts) == len(runs) else None)


def _totals(named_steps: Iterable[tuple[str, StepRecord]]) -> tuple[StepTotals, ...]:
  groups: dict[str, list[StepRecord]] = {}
  for name, step in named_steps:
    groups.setdefault(name, []).append(step)
  totals = [StepTotals(name, len(steps), sum(s.num_steps for s in steps),
                       sum(s.step_secs for s in steps), sum(s.num_tokens for s in steps),
                       sum(s.bucket_tokens for s in steps)) for name, steps in groups.items()]
  return tuple(sorted(totals, key=lambda t: (-t.bucket_tokens, t.name)))


def _ratio(part: float, whole: float) -> float:
  return part / whole if whole else 0.0
