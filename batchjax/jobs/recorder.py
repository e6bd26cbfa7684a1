"""What `generate` shows of itself, as metrics and progress."""

from collections.abc import Callable, Sequence
import json
import pathlib

from batchjax import report
from batchjax.engine.compile import CompileRecord, Phase
from batchjax.generation import LOADING, StartEvent, StepEvent
from batchjax.io import files
from batchjax.io.records import RowError
from batchjax.io.store import StoredRow
from batchjax.jobs.signals import Interrupted, Stop
from batchjax.plan.planner import Plan
from batchjax.plan.summary import plan_summary
from batchjax.types import Completion

# Phases of a job before `generate` has its own.
READING = "loading the tokenizer", "reading rows"


class Recorder:
  """Turns what `generate` shows of itself into metrics and progress.

  Args:
    directory: of the job.
    run: the first record, which is written already.
    metrics, progress: where to; the clock is that of `progress`.
    errors: rows that this run refused.
    text_of: `text_of(request_index, start, length)` is the text of tokens of a prompt of the window
      that is planned.
    stop: whether a signal came.
  """

  def __init__(self, directory: pathlib.Path, run: report.RunRecord, metrics: report.MetricsWriter,
               progress: report.Progress, errors: Sequence[RowError],
               text_of: Callable[[int, int, int], str], stop: Stop):
    self._directory, self._metrics, self._progress = directory, metrics, progress
    self._text_of, self._stop = text_of, stop
    self._is_last_step = False
    self._started: dict[str, float] = {}
    # Of windows that are done, or refused; and of the window that runs.
    self._finished_before, self._finished = len(errors), 0
    self._preempted_before, self._preempted = 0, 0
    self._tracker = progress.begin(run)
    self._tracker.plan(len(errors), 0)
    now = progress.secs
    for error in errors:
      self._emit(report.RequestRecord(error.request_id or "", error.index, prompt_tokens=0,
                                      cached_tokens=0, generated_tokens=0, start_secs=now,
                                      end_secs=now, finish_reason="error"))

  def _emit(self, record: report.Record, *coming) -> None:
    self._metrics.write(record)
    self._progress.update(record, *coming)

  def observe(self, event: Phase | CompileRecord | StartEvent | Plan | StepEvent) -> None:
    """Raises Interrupted once the results of the first step after a stop signal are kept."""
    if isinstance(event, Phase):
      self._progress.phase(event.name, event.num_steps)
    elif isinstance(event, CompileRecord):
      self._emit(report.CompileRecord(bucket=event.name, secs=event.secs, cached=event.cached))
    elif isinstance(event, StartEvent):
      self._emit(report.StartRecord(
          sum(map(self._progress.phase_secs, READING)), self._progress.phase_secs(LOADING), event.plan_secs,
          event.compile_secs, event.warm_up_secs))
      self._step_secs = {(b.kind, b.num_tokens): secs for b, secs in event.step_secs.items()}
    elif isinstance(event, Plan):
      self._plan(event)
    else:
      self._step(event)

  def _plan(self, plan: Plan) -> None:
    self._stop.is_deferred = True  # steps begin
    with files.atomic(self._directory / report.PLAN_FILE) as f:
      f.write(json.dumps(plan_summary(plan, self._text_of), indent=1).encode())
    if plan.prediction is not None:
      self._tracker.forecast.foretell({
          (bucket.kind, bucket.num_tokens): secs
          for bucket, secs in zip(plan.buckets, plan.prediction.step_secs)} | self._step_secs)
    self._tracker.plan(len(plan.tree.node_of_request), plan.totals.prompt_tokens_planned)
    self._finished_before, self._finished = self._finished_before + self._finished, 0
    self._preempted_before, self._preempted = self._preempted_before + self._preempted, 0

  def _step(self, event: StepEvent) -> None:
    if self._is_last_step:
      raise Interrupted
    # Completions of a step are handed out only after it was observed.
    self._is_last_step = self._stop.is_requested
    now, batch, steps = self._progress.secs, event.batch, event.batch.num_steps
    for admission in batch.admissions:
      self._started.setdefault(admission.request_id, now - event.step_secs)
    self._finished, self._preempted = event.num_finished, batch.stats.num_preempted
    self._emit(report.StepRecord(
        secs=now, kind=batch.kind, step_secs=event.step_secs, host_secs=event.host_secs,
        num_steps=steps,
        num_tokens=event.generated_tokens if batch.kind == "decode" else batch.num_tokens,
        bucket_tokens=event.bucket.num_tokens * steps, num_rows=batch.stats.num_running,
        bucket_rows=event.bucket.num_rows, prompt_tokens=batch.num_prompt_tokens,
        generated_tokens=event.generated_tokens, used_pages=batch.stats.used_pages,
        waiting=batch.stats.num_waiting, finished=self._finished_before + self._finished,
        preempted=self._preempted_before + self._preempted), event.in_flight, event.outlook)

  def finish(self, row: StoredRow, completion: Completion) -> None:
    """Records a finished request."""
    reasons = {choice.finish_reason for choice in completion.choices}
    reason = next(name for name in ("error", "length", "stop") if name in reasons)
    self._emit(report.RequestRecord(
        request_id=completion.request_id, row=row.index,
        prompt_tokens=completion.num_prompt_tokens, cached_tokens=completion.num_cached_tokens,
        generated_tokens=sum(len(choice.token_ids) for choice in completion.choices),
        start_secs=self._started.pop(completion.request_id), end_secs=self._progress.secs,
        finish_reason=reason))
