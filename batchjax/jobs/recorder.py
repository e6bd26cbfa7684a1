"""What `generate` shows of itself, as metrics and progress."""

import json
import pathlib
import time

from batchjax import report
from batchjax.engine.compile import CompileRecord
from batchjax.generation import StartEvent, StepEvent
from batchjax.io import files
from batchjax.io.store import StoredRow
from batchjax.jobs.signals import Interrupted, Stop
from batchjax.plan.planner import Plan
from batchjax.plan.summary import plan_summary
from batchjax.types import Completion


class Recorder:
  """Turns what `generate` shows of itself into metrics and progress."""

  def __init__(self, directory: pathlib.Path, metrics: report.MetricsWriter,
               progress: report.Progress, num_errors: int, stop: Stop):
    self._directory, self._sinks = directory, (metrics.write, progress.update)
    self._num_errors, self._stop = num_errors, stop
    self._is_last_step = False
    self._start = time.perf_counter()
    self._started: dict[str, float] = {}

  def _emit(self, record: report.Record) -> None:
    for sink in self._sinks:
      sink(record)

  def observe(self, event: Plan | CompileRecord | StartEvent | StepEvent) -> None:
    """Raises Interrupted once the results of the first step after a stop signal are kept."""
    now = time.perf_counter() - self._start
    if isinstance(event, Plan):
      self._stop.is_deferred = True  # steps begin
      with files.atomic(self._directory / report.PLAN_FILE) as f:
        f.write(json.dumps(plan_summary(event), indent=1).encode())
    elif isinstance(event, CompileRecord):
      self._emit(report.CompileRecord(bucket=event.name, secs=event.secs, cached=event.cached))
    elif isinstance(event, StepEvent):
      if self._is_last_step:
        raise Interrupted
      # Completions of a step are handed out only after it was observed.
      self._is_last_step = self._stop.is_requested
      for admission in event.batch.admissions:
        self._started.setdefault(admission.request_id, now - event.step_secs)
      batch, steps = event.batch, event.batch.num_steps
      self._emit(report.StepRecord(
          secs=now, kind=batch.kind, step_secs=event.step_secs, host_secs=event.host_secs,
          num_steps=steps,
          num_tokens=event.generated_tokens if batch.kind == "decode" else batch.num_tokens,
          bucket_tokens=event.bucket.num_tokens * steps, num_rows=event.stats.num_running,
          bucket_rows=event.bucket.num_rows, prompt_tokens=batch.num_prompt_tokens,
          generated_tokens=event.generated_tokens, used_pages=event.stats.used_pages,
          waiting=event.stats.num_waiting,
          finished=event.stats.num_retired + self._num_errors,
          preempted=event.stats.num_preempted))

  def finish(self, row: StoredRow, completion: Completion) -> None:
    """Records a finished request."""
    reasons = {choice.finish_reason for choice in completion.choices}
    reason = next(name for name in ("error", "length", "stop") if name in reasons)
    self._emit(report.RequestRecord(
        request_id=completion.request_id, row=row.index,
        prompt_tokens=completion.num_prompt_tokens, cached_tokens=completion.num_cached_tokens,
        generated_tokens=sum(len(choice.token_ids) for choice in completion.choices),
        start_secs=self._started.pop(completion.request_id),
        end_secs=time.perf_counter() - self._start,
        finish_reason=reason))
