"""The progress of a running job: a live bar on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Sequence
import sys
import time
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live

from batchjax.plan.outlook import Dispatch, Outlook
from batchjax.report import bar, terminal
from batchjax.report.metrics import CompileRecord, Record, RunRecord, StepRecord
from batchjax.report.tracker import Snapshot, Tracker


class Progress:
  """Shows a job while it goes on; use it as a context manager around the whole of it.

  Before the first step it names the phase and shows a clock, afterwards requests, time left and
  rates. On a terminal that is a live bar; elsewhere a line for each phase, one each `interval_secs`
  of steps, and a last one, which begins with "stopped" where an exception ended the job.

  Args:
    quiet: show nothing, and just keep the clocks.
    interval_secs: between two lines.
    stream: where to; standard error if None.
    clock: seconds that only grow.
  """

  def __init__(self, *, quiet: bool = False, interval_secs: float = 10.0,
               stream: TextIO | None = None, clock: Callable[[], float] = time.perf_counter):
    stream = sys.stderr if stream is None else stream
    is_outlet = isinstance(stream, terminal.Outlet)
    self._stream = stream.unescaped if is_outlet else terminal.Outlet(stream, escapes=False)
    self._clock, self._start = clock, clock()
    self._interval_secs = interval_secs
    self._next_secs = 0.0
    self._tracker: Tracker | None = None
    self._snapshot: Snapshot | None = None
    self._phases: list[tuple[str, float]] = []  # with their begin
    self._num_done = self._num_all = 0  # of the phase
    self._live: Live | None = None
    self._writes_lines = not quiet and not self._stream.isatty()
    if not quiet and not self._writes_lines:
      self._live = Live(console=Console(file=self._stream), refresh_per_second=4,
                        get_renderable=self._render)

  def __enter__(self) -> "Progress":
    if self._live:
      self._streams = sys.stdout, sys.stderr
      self._live.start(refresh=True)
      # It takes what others print to above the bar, past the outlets that were there before.
      sys.stdout, sys.stderr = map(terminal.Outlet, (sys.stdout, sys.stderr))
      self._log_stream = terminal.log_to(sys.stderr)
    return self

  def __exit__(self, exc_type, *exc_info) -> None:
    if self._tracker:
      self._snapshot = self._tracker.snapshot()
    has_steps = self._snapshot is not None and self._snapshot.secs > 0
    if self._live:
      self._live.transient = not has_steps
      self._live.stop()
      sys.stdout, sys.stderr = self._streams
      terminal.log_to(self._log_stream)
    if self._writes_lines and self._tracker:
      self._write_line("; ".join(["stopped"] * bool(exc_type) + self._facts()))

  @property
  def secs(self) -> float:
    """Since it was made."""
    return self._clock() - self._start

  def phase(self, name: str, num_all: int = 0) -> None:
    """A part of the start begins; it consists of `num_all` things, if that is known."""
    self._phases.append((name, self.secs))
    self._num_done, self._num_all = 0, num_all
    if self._writes_lines:
      self._write_line(bar.phase_text(name, 0, num_all))

  def advance(self, num_done: int) -> None:
    """So many more things of the phase are done."""
    self._num_done += num_done

  def phase_secs(self, name: str) -> float:
    """How long a phase took that is over; 0 if there was none."""
    ends = [begin for _, begin in self._phases[1:]] + [self.secs]
    return sum(end - begin for (other, begin), end in zip(self._phases, ends) if other == name)

  def begin(self, run: RunRecord) -> Tracker:
    """The run's first record is there; returns what adds up those to come."""
    self._tracker = Tracker(run)
    return self._tracker

  def update(self, record: Record, in_flight: Sequence[Dispatch] = (),
             outlook: Callable[[], Outlook] | None = None) -> None:
    """Takes the next record of the run; with a step, also what is still to come."""
    if isinstance(record, CompileRecord):
      self.advance(1)
    shows = self._live or self._writes_lines
    self._tracker.update(record, in_flight, outlook if shows else None)
    if not isinstance(record, StepRecord):
      return
    if self._live:
      self._snapshot = self._tracker.snapshot()
    elif self._writes_lines and record.secs >= self._next_secs:
      self._snapshot = self._tracker.snapshot()
      self._next_secs = record.secs + self._interval_secs
      self._write_line("; ".join(self._facts()))

  def _write_line(self, text: str) -> None:
    print(f"{bar.clock(self.secs)}  {text}", file=self._stream, flush=True)

  def _facts(self) -> list[str]:
    """Where the run stands, in words; nothing before its first step."""
    if self._snapshot is None or not self._snapshot.secs:
      return []
    return bar.facts(self._snapshot, self.secs)

  def _render(self) -> Group:
    if self._snapshot is not None and self._snapshot.secs:
      return bar.of_steps(self._snapshot, self.secs)
    return bar.of_start(self._phases, self._num_done, self._num_all, self.secs)
