"""What a running job prints."""

import dataclasses
import io
import json

import pytest

from batchjax.report import Progress, Snapshot


class _Terminal(io.StringIO):

  def isatty(self) -> bool:
    return True


def _feed(progress: Progress, records: list, step, every_secs: float, count: int) -> None:
  for record in records:
    progress.update(record)
  for i in range(count):
    progress.update(dataclasses.replace(step, secs=every_secs * (i + 1)))


def test_lines_off_a_terminal_are_json_at_the_interval(run_record, step_record, first_run):
  stream = io.StringIO()
  with Progress(run_record, interval_secs=10, stream=stream) as progress:
    _feed(progress, first_run[1:3], step_record, 4.0, 9)
  lines = [json.loads(line) for line in stream.getvalue().splitlines()]
  assert [(line["event"], line["secs"]) for line in lines] == [
      ("progress", 12.0), ("progress", 24.0), ("progress", 36.0), ("end", 36.0)]
  fields = {field.name for field in dataclasses.fields(Snapshot)}
  assert all(set(line) == fields | {"event"} for line in lines)
  assert (lines[-1]["num_compiles"], lines[-1]["num_requests"]) == (2, 4)
  assert lines[-1]["generated_tokens"] == 9 * step_record.generated_tokens


def test_an_exception_ends_with_stopped_and_is_not_swallowed(run_record):
  stream = io.StringIO()
  with pytest.raises(KeyboardInterrupt):
    with Progress(run_record, stream=stream):
      raise KeyboardInterrupt
  assert json.loads(stream.getvalue())["event"] == "stopped"


@pytest.mark.parametrize("stream", [io.StringIO(), _Terminal()])
def test_quiet_prints_nothing(stream, run_record, step_record):
  with Progress(run_record, quiet=True, stream=stream) as progress:
    _feed(progress, [], step_record, 20.0, 3)
  assert not stream.getvalue()


def test_a_terminal_gets_a_bar_with_the_last_state(monkeypatch, run_record, step_record, first_run):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "100")
  stream = _Terminal()
  with Progress(run_record, stream=stream) as progress:
    _feed(progress, first_run[1:3] + first_run[6:], step_record, 2.0, 1)
    progress.update(dataclasses.replace(step_record, secs=3.0, finished=3, preempted=5))
  text = stream.getvalue()
  assert "compiling, 0 shapes ready" in text
  assert "3/4 requests" in text and "left" in text and "━" in text
  # Tokens of both steps in two seconds; 80 of the 200 prompt tokens answered were cached.
  assert "2 out, 118 prompt tok/s · cached 40% · 3 rows · KV 20% · 5 preempted" in text


def test_a_finished_bar_says_how_long_it_took(monkeypatch, run_record, step_record):
  monkeypatch.setenv("TERM", "xterm")
  stream = _Terminal()
  with Progress(run_record, stream=stream) as progress:
    progress.update(dataclasses.replace(step_record, secs=75.0, finished=4))
  assert "done in 0:01:15" in stream.getvalue()
