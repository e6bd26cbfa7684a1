"""The progress of a running job: a live bar on a terminal, JSON lines elsewhere."""

import dataclasses
import datetime
import sys
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchjax.report import terminal
from batchjax.report.metrics import CompileRecord, RequestRecord, RunRecord, StepRecord, to_json
from batchjax.report.tracker import Snapshot, Tracker


class Progress:
  """Shows a run while it goes on; use it as a context manager around the run.

  On a terminal a live bar; elsewhere one JSON line each `interval_secs` of the
  run ({"event": "progress", ...the fields of `Snapshot`}) and a last one with
  event "end", or "stopped" where an exception ended the run.

  Args:
    run: the run's first record; it holds the totals.
    quiet: show nothing.
    interval_secs: between two JSON lines.
    stream: where to; standard error if None.
  """

  def __init__(self, run: RunRecord, *, quiet: bool = False, interval_secs: float = 10.0,
               stream: TextIO | None = None):
    stream = sys.stderr if stream is None else stream
    is_outlet = isinstance(stream, terminal.Outlet)
    self._stream = stream.unescaped if is_outlet else terminal.Outlet(stream, escapes=False)
    self._tracker = Tracker(run)
    self._interval_secs = interval_secs
    self._next_secs = interval_secs
    self._snapshot = self._tracker.snapshot()
    self._live: Live | None = None
    self._writes_lines = not quiet and not self._stream.isatty()
    if not quiet and not self._writes_lines:
      self._live = Live(console=Console(file=self._stream), refresh_per_second=4,
                        get_renderable=lambda: _render(self._snapshot))

  def __enter__(self) -> "Progress":
    if self._live:
      self._streams = sys.stdout, sys.stderr
      self._live.start(refresh=True)
      # It takes what others print to above the bar, past the outlets that were there before.
      sys.stdout, sys.stderr = map(terminal.Outlet, (sys.stdout, sys.stderr))
    return self

  def __exit__(self, exc_type, *exc_info) -> None:
    self._snapshot = self._tracker.snapshot()
    if self._live:
      self._live.stop()
      sys.stdout, sys.stderr = self._streams
    if self._writes_lines:
      self._write_line("end" if exc_type is None else "stopped")

  def update(self, record: StepRecord | RequestRecord | CompileRecord) -> None:
    """Takes the next record of the run."""
    self._tracker.update(record)
    if self._live:
      self._snapshot = self._tracker.snapshot()
    elif self._writes_lines and isinstance(record, StepRecord) and record.secs >= self._next_secs:
      self._snapshot = self._tracker.snapshot()
      self._next_secs = record.secs + self._interval_secs
      self._write_line("progress")

  def _write_line(self, event: str) -> None:
    values = {name: round(value, 4) if isinstance(value, float) else value
              for name, value in dataclasses.asdict(self._snapshot).items()}
    print(to_json({"event": event, **values}), file=self._stream, flush=True)


def _render(now: Snapshot) -> Group:
  bar = Table.grid(padding=(0, 1), expand=True)
  bar.add_column(no_wrap=True)
  bar.add_column(ratio=1)
  bar.add_column(no_wrap=True, justify="right")
  total = max(now.num_requests, 1)
  bar.add_row(f"{now.finished:,}/{now.num_requests:,} requests",
              ProgressBar(total=total, completed=min(now.finished, total), complete_style="cyan"),
              _time_left(now))
  return Group(bar, Text(_status(now), style="dim", overflow="ellipsis", no_wrap=True))


def _status(now: Snapshot) -> str:
  if not now.secs:
    return f"compiling, {now.num_compiles} shapes ready"
  parts = [f"{now.output_tokens_per_sec:,.0f} out, {now.prompt_tokens_per_sec:,.0f} prompt tok/s"]
  if now.cached_share >= 0:
    parts.append(f"cached {now.cached_share:.0%}")
  parts += [f"{now.num_rows} rows", f"KV {now.kv_use:.0%}"]
  if now.preempted:
    parts.append(f"{now.preempted} preempted")
  return " · ".join(parts)


def _time_left(now: Snapshot) -> str:
  if now.finished >= now.num_requests:
    return f"done in {_clock(now.secs)}"
  return "estimating" if now.secs_left < 0 else f"{_clock(now.secs_left)} left"


def _clock(secs: float) -> str:
  return str(datetime.timedelta(seconds=round(secs)))
