"""Where a running job stands: counts, current rates and the time left."""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import time

from batchjax.plan.outlook import Dispatch, Outlook
from batchjax.report.forecast import Forecast
from batchjax.report.metrics import CompileRecord, Record, RequestRecord, RunRecord, StepRecord

# The time left is reckoned anew once this long has passed, and this many times as long as it took.
_FORECAST_SECS, _FORECAST_SHARE = 0.5, 100.0


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """A run at one moment; None where something is not known.

  Attributes:
    secs: when the last step's results were read, since the begin of the run; 0 before.
    finished: requests of the job answered, of `num_requests`, those of earlier runs among them.
    num_done: of these, answered by earlier runs.
    num_compiles: shapes compiled or looked up.
    planned_tokens: prompt tokens that the windows planned so far compute.
    computed_tokens: of these, computed.
    generated_tokens: tokens drawn.
    output_tokens_per_sec: drawn, over the last seconds.
    prompt_tokens_per_sec: prompt tokens computed, over the last seconds.
    cached_share: of the finished requests' prompt tokens, those taken from another's KV.
    num_rows: rows running.
    waiting: rows not yet admitted.
    kv_use: share of the KV pool in use.
    preempted: rows preempted.
    secs_left: estimated.
    done_share: share of the run's steps that is done, by time.
  """

  secs: float
  finished: int
  num_requests: int
  num_done: int
  num_compiles: int
  planned_tokens: int
  computed_tokens: int
  generated_tokens: int
  output_tokens_per_sec: float
  prompt_tokens_per_sec: float
  cached_share: float | None
  num_rows: int
  waiting: int | None
  kv_use: float
  preempted: int
  secs_left: float | None
  done_share: float


class Tracker:
  """Adds up the records of one run.

  Args:
    run: the run's first record.
    window_secs: current rates are averages over this long.
  """

  def __init__(self, run: RunRecord, window_secs: float = 10.0):
    self._run = run
    self._window_secs = window_secs
    self._window: collections.deque[StepRecord] = collections.deque()
    self._window_generated = 0
    self._window_computed = 0
    self._last: StepRecord | None = None
    self._first_secs = 0.0
    self._num_compiles = 0
    self._planned_tokens = 0
    self._generated_tokens = 0
    self._computed_tokens = 0
    self._finished_prompt_tokens = 0
    self._cached_tokens = 0
    self._num_planned = 0
    self._forecast = Forecast()
    self._next_forecast_secs = 0.0
    self._end_secs: float | None = None  # when the last step will have come back, as foretold
    self._done_share = 0.0

  @property
  def forecast(self) -> Forecast:
    """The times of the run's shapes."""
    return self._forecast

  def plan(self, num_requests: int, prompt_tokens: int) -> None:
    """Takes what one more window holds: requests, and prompt tokens to compute."""
    self._num_planned += num_requests
    self._planned_tokens += prompt_tokens

  def update(self, record: Record, in_flight: Sequence[Dispatch] = (),
             outlook: Callable[[], Outlook] | None = None) -> None:
    """Takes the next record of the run; with a step, also what is still to come."""
    if isinstance(record, CompileRecord):
      self._num_compiles += 1
    elif isinstance(record, RequestRecord):
      self._finished_prompt_tokens += record.prompt_tokens
      self._cached_tokens += record.cached_tokens
    elif isinstance(record, StepRecord):
      self._add_step(record)
      if outlook is not None and record.secs >= self._next_forecast_secs:
        self._foresee(record, in_flight, outlook)

  def _add_step(self, record: StepRecord) -> None:
    if self._last is None:
      # Compiling is over by then and tells nothing about the steps to come.
      self._first_secs = record.secs - record.step_secs
    self._last = record
    self._forecast.measure(record.kind, record.bucket_tokens // max(record.num_steps, 1),
                           record.num_steps, record.step_secs)
    self._generated_tokens += record.generated_tokens
    self._computed_tokens += record.prompt_tokens
    self._window.append(record)
    self._window_generated += record.generated_tokens
    self._window_computed += record.prompt_tokens
    while record.secs - self._window[0].secs > self._window_secs:
      old = self._window.popleft()
      self._window_generated -= old.generated_tokens
      self._window_computed -= old.prompt_tokens

  def _foresee(self, last: StepRecord, in_flight: Sequence[Dispatch],
               outlook: Callable[[], Outlook]) -> None:
    start = time.perf_counter()
    left = self._forecast.secs_left(outlook(), in_flight)
    # Windows that are not planned yet take as long by request as those that are.
    to_plan = max(0, self._run.num_requests - self._num_planned)
    left += to_plan / max(self._num_planned, 1) * (last.secs - self._first_secs + left)
    self._end_secs = last.secs + left
    took = time.perf_counter() - start
    self._next_forecast_secs = last.secs + max(_FORECAST_SECS, _FORECAST_SHARE * took)

  def snapshot(self) -> Snapshot:
    """Where the run stands after the last record."""
    last, run = self._last, self._run
    span = last.secs - self._window[0].secs + self._window[0].step_secs if last else 0.0
    known_cached = self._finished_prompt_tokens > 0
    finished, left = last.finished if last else 0, self._secs_left()
    if left is not None:
      spent = last.secs - self._first_secs
      self._done_share = max(self._done_share, spent / max(spent + left, 1e-9))
    return Snapshot(
        secs=last.secs if last else 0.0,
        finished=finished + run.num_done,
        num_requests=run.num_requests + run.num_done,
        num_done=run.num_done,
        num_compiles=self._num_compiles,
        planned_tokens=self._planned_tokens,
        computed_tokens=self._computed_tokens,
        generated_tokens=self._generated_tokens,
        output_tokens_per_sec=_rate(self._window_generated, span),
        prompt_tokens_per_sec=_rate(self._window_computed, span),
        cached_share=self._cached_tokens / self._finished_prompt_tokens if known_cached else None,
        num_rows=last.num_rows if last else 0,
        waiting=last.waiting if last else None,
        kv_use=last.used_pages / max(run.num_pages, 1) if last else 0.0,
        preempted=last.preempted if last else 0,
        secs_left=left,
        done_share=self._done_share)

  def _secs_left(self) -> float | None:
    last = self._last
    if last is not None and last.finished >= self._run.num_requests:
      return 0.0
    return None if self._end_secs is None else max(0.0, self._end_secs - last.secs)


def _rate(amount: float, secs: float) -> float:
  return amount / secs if secs > 0 else 0.0
