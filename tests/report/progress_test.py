"""What a running job prints."""

import dataclasses
import io
import logging
import sys

import numpy as np
import pytest

from batchjax.plan.outlook import NUM_BINS, Outlook
from batchjax.report import Progress


class _Terminal(io.StringIO):

  def isatty(self) -> bool:
    return True


class _Clock:
  """Seconds that pass when a test says so."""

  now = 100.0

  def __call__(self) -> float:
    return self.now


def _one_row_of(max_tokens):
  """A row that decodes to its limit, and nothing else."""
  one = np.array([max_tokens])
  return lambda: Outlook(1, 0 * one, 0 * one, one, one > 0, np.zeros(NUM_BINS, int), 0, 8, 64, 16, 0)


def _steps(progress: Progress, clock: _Clock, records: list, step, every_secs: float, count: int,
           *coming) -> None:
  for record in records:
    progress.update(record)
  for i in range(count):
    clock.now = 100.0 + every_secs * (i + 1)
    progress.update(dataclasses.replace(step, secs=every_secs * (i + 1)), *coming)


def test_lines_off_a_terminal_are_plain_at_the_interval(run_record, step_record, first_run):
  stream, clock = io.StringIO(), _Clock()
  with Progress(interval_secs=10, stream=stream, clock=clock) as progress:
    progress.phase("reading rows")
    progress.advance(4)
    clock.now += 2
    progress.phase("compiling", 2)
    progress.begin(run_record).plan(4, 500)
    _steps(progress, clock, first_run[1:3], step_record, 4.0, 4)
  status = "1 out tok/s; 3 rows; KV 20%"
  assert stream.getvalue().splitlines() == [
      "0:00:00  reading rows",
      "0:00:02  compiling 0 of 2",
      "0:00:04  1/4 requests; time left not known; prefill 118/500; 2 out tok/s; 3 rows; KV 20%",
      f"0:00:16  1/4 requests; time left not known; prefill 472/500; {status}",
      f"0:00:16  1/4 requests; time left not known; prefill 472/500; {status}"]


def test_an_exception_ends_with_stopped_and_is_not_swallowed(run_record):
  stream = io.StringIO()
  with pytest.raises(KeyboardInterrupt):
    with Progress(stream=stream) as progress:
      progress.begin(run_record)
      raise KeyboardInterrupt
  assert stream.getvalue() == "0:00:00  stopped\n"


@pytest.mark.parametrize("stream", [io.StringIO(), _Terminal()])
def test_quiet_prints_nothing_and_keeps_the_clocks(stream, run_record, step_record):
  clock = _Clock()
  with Progress(quiet=True, stream=stream, clock=clock) as progress:
    progress.phase("loading")
    clock.now += 3
    progress.phase("running")
    progress.begin(run_record)
    _steps(progress, clock, [], step_record, 20.0, 3)
  assert not stream.getvalue()
  assert (progress.phase_secs("loading"), progress.phase_secs("none")) == (3.0, 0)


def _screen(monkeypatch, columns=100) -> _Terminal:
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", str(columns))
  return _Terminal()


def test_a_terminal_gets_phases_with_clocks_and_then_a_bar(monkeypatch, run_record, step_record,
                                                           first_run):
  stream, clock = _screen(monkeypatch), _Clock()
  with Progress(stream=stream, clock=clock) as progress:
    progress.phase("reading rows")
    progress.advance(1234)
    clock.now += 2
    progress._live.refresh()
    progress.phase("compiling", 2)
    progress.begin(run_record).plan(4, 130)
    progress.update(first_run[1])
    clock.now += 75
    progress._live.refresh()
    progress._tracker.forecast.foretell({("decode", 8): 0.5})
    _steps(progress, clock, [], step_record, 80.0, 1, (), _one_row_of(20))
    progress._live.refresh()
    clock.now += 4
    progress._live.refresh()
    clock.now = 190.0
    progress.update(dataclasses.replace(step_record, secs=90.0, finished=4, preempted=5))
  text = stream.getvalue()
  assert "reading rows 1,234" in text and "0:00:02" in text
  assert "compiling 1 of 2" in text and "0:01:15" in text and "reading rows 2.0 s" in text
  assert "1/4 requests" in text and "0:00:10 left" in text and "━" in text
  assert "0:00:06 left" in text, "it counts down between steps"
  assert "0:01:20 · prefill 118/130 · " in text
  assert "4/4 requests" in text and "done in 0:01:30" in text
  assert "3 rows · KV 20% · 5 preempted" in text


def test_a_resumed_job_counts_from_where_it_was(monkeypatch, run_record, step_record):
  stream = _screen(monkeypatch)
  with Progress(stream=stream) as progress:
    progress.begin(dataclasses.replace(run_record, num_done=96))
    progress.update(dataclasses.replace(step_record, finished=1))
  assert "97/100 requests" in stream.getvalue() and "96 from before" in stream.getvalue()


def test_log_lines_go_above_the_bar(monkeypatch, run_record):
  from absl import logging as absl_logging
  handler = absl_logging.get_absl_handler().python_handler
  stream, before = _screen(monkeypatch), handler.stream
  record = logging.LogRecord("x", logging.INFO, "file.py", 1, "a line of the log", None, None)
  with Progress(stream=stream) as progress:
    progress.phase("loading")
    progress._live.refresh()
    assert handler.stream is sys.stderr
    handler.emit(record)
  assert handler.stream is before
  # Behind the line the bar is drawn again, on a line of its own.
  before, after = stream.getvalue().split("a line of the log")
  assert "loading" in before and after.split("\n", 1)[0].strip() == "" and "loading" in after


def test_a_job_with_nothing_to_do_leaves_no_bar(monkeypatch):
  stream = _screen(monkeypatch)
  with Progress(stream=stream) as progress:
    progress.phase("reading rows")
  assert stream.getvalue().rstrip().endswith("\x1b[2K")  # the last line is wiped
