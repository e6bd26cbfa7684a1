"""Where a running job stands: counts, current rates and the time left."""

import collections
import dataclasses

from batchjax.report.metrics import CompileRecord, RequestRecord, RunRecord, StepRecord


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """A run at one moment; -1 where nothing is known yet.

  Attributes:
    secs: since the begin of the run.
    finished: requests answered, of `num_requests`.
    num_compiles: shapes compiled.
    generated_tokens: tokens drawn.
    output_tokens_per_sec: drawn, over the last seconds.
    prompt_tokens_per_sec: prompt tokens computed, over the last seconds.
    cached_share: of the finished requests' prompt tokens, those taken from another's KV.
    num_rows: rows running.
    waiting: requests not yet admitted.
    kv_use: share of the KV pool in use.
    preempted: rows preempted.
    secs_left: estimated.
  """

  secs: float
  finished: int
  num_requests: int
  num_compiles: int
  generated_tokens: int
  output_tokens_per_sec: float
  prompt_tokens_per_sec: float
  cached_share: float
  num_rows: int
  waiting: int
  kv_use: float
  preempted: int
  secs_left: float


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
    self._generated_tokens = 0
    self._computed_tokens = 0
    self._finished_prompt_tokens = 0
    self._cached_tokens = 0

  def update(self, record: StepRecord | RequestRecord | CompileRecord) -> None:
    """Takes the next record of the run."""
    if isinstance(record, CompileRecord):
      self._num_compiles += 1
    elif isinstance(record, RequestRecord):
      self._finished_prompt_tokens += record.prompt_tokens
      self._cached_tokens += record.cached_tokens
    else:
      if self._last is None:
        # Compiling is over by then and tells nothing about the steps to come.
        self._first_secs = record.secs - record.step_secs
      self._last = record
      self._generated_tokens += record.generated_tokens
      self._computed_tokens += record.prompt_tokens
      self._window.append(record)
      self._window_generated += record.generated_tokens
      self._window_computed += record.prompt_tokens
      while record.secs - self._window[0].secs > self._window_secs:
        old = self._window.popleft()
        self._window_generated -= old.generated_tokens
        self._window_computed -= old.prompt_tokens

  def snapshot(self) -> Snapshot:
    """Where the run stands after the last record."""
    last = self._last
    span = last.secs - self._window[0].secs + self._window[0].step_secs if last else 0.0
    known_cached = self._finished_prompt_tokens > 0
    return Snapshot(
        secs=last.secs if last else 0.0,
        finished=last.finished if last else 0,
        num_requests=self._run.num_requests,
        num_compiles=self._num_compiles,
        generated_tokens=self._generated_tokens,
        output_tokens_per_sec=_rate(self._window_generated, span),
        prompt_tokens_per_sec=_rate(self._window_computed, span),
        cached_share=self._cached_tokens / self._finished_prompt_tokens if known_cached else -1.0,
        num_rows=last.num_rows if last else 0,
        waiting=last.waiting if last else self._run.num_requests,
        kv_use=last.used_pages / max(self._run.num_pages, 1) if last else 0.0,
        preempted=last.preempted if last else 0,
        secs_left=self._secs_left())

  def _secs_left(self) -> float:
    """Tokens left, by the length of requests so far, at the average rate so far."""
    last = self._last
    if last is None or not last.finished:
      return -1.0
    if last.finished >= self._run.num_requests:
      return 0.0
    # A running row counts as half a request, but not before as many have finished as run:
    # those that finish first are the short ones, and would make all requests look short.
    num_lengths = last.finished + min(last.finished, last.num_rows) / 2
    output_tokens = self._generated_tokens * self._run.num_requests / num_lengths
    computed_share = 1.0
    if self._finished_prompt_tokens:
      computed_share -= self._cached_tokens / self._finished_prompt_tokens
    prompt_tokens = self._run.num_prompt_tokens * computed_share
    left = (max(output_tokens - self._generated_tokens, 0.0)
            + max(prompt_tokens - self._computed_tokens, 0.0))
    rate = _rate(self._generated_tokens + self._computed_tokens, last.secs - self._first_secs)
    return left / rate if rate > 0 else -1.0


def _rate(amount: float, secs: float) -> float:
  return amount / secs if secs > 0 else 0.0
