"""Text cannot steer a terminal, and a reader that goes away ends nothing."""

import io
import logging
import os
import sys

import pytest

from batchjax.report import Progress
from batchjax.report.terminal import Outlet, printable

HOSTILE = "a\x1b]0;x\x07[red]é\r\u202e\x9b2J\ud800"
ESCAPED = r"a\x1b]0;x\x07[red]é\r\u202e\x9b2J\ud800"


def test_printable_is_one_line_of_what_prints():
  assert printable(HOSTILE + "\n\u2028") == ESCAPED + r"\n\u2028"
  assert printable("plain [bold]é") == "plain [bold]é"


def test_an_outlet_keeps_lines_and_tabs_and_escapes_the_rest():
  stream = io.StringIO()
  outlet = Outlet(stream)
  print(HOSTILE, "b\tc\n", file=outlet)
  outlet.unescaped.write("\x1b[2K")
  assert stream.getvalue() == f"{ESCAPED} b\tc\n\n\x1b[2K"
  assert outlet.getvalue() == stream.getvalue()  # the rest is the stream's


class Gone(io.StringIO):
  name = "<stream>"

  def __init__(self, error):
    super().__init__()
    self.error = error

  def write(self, text):
    raise self.error


def test_what_nobody_reads_is_dropped():
  outlet = Outlet(Gone(BrokenPipeError(32, "Broken pipe")))
  print("x", file=outlet, flush=True)
  print("y", file=outlet, flush=True)
  print("x", file=Outlet(None), flush=True)


def test_what_is_lost_otherwise_is_told_once():
  outlet = Outlet(Gone(OSError(28, "No space left on device")), lost=BrokenPipeError)
  with pytest.raises(OSError, match="No space left on device") as error:
    outlet.write("x")
  assert error.value.filename == "<stream>"
  outlet.write("y")
  outlet.flush()


def test_what_a_full_file_holds_back_does_not_fail_again():
  full = open("/dev/full", "w")
  outlet = Outlet(full)
  outlet.write("x")
  outlet.flush()
  full.close()  # would raise where the text was still to be written there


class _Terminal(io.StringIO):

  def isatty(self) -> bool:
    return True


def test_lines_beside_the_bar_are_escaped_too(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "100")
  stream, streams = _Terminal(), (sys.stdout, sys.stderr)
  with Progress(stream=stream):
    print(HOSTILE, file=sys.stderr)
    logging.StreamHandler(sys.stderr).emit(logging.makeLogRecord({"msg": "[bold]log\x1b]0;y\x07"}))
  assert (sys.stdout, sys.stderr) == streams
  assert ESCAPED in stream.getvalue() and r"[bold]log\x1b]0;y\x07" in stream.getvalue()
  assert "\x1b]0" not in stream.getvalue() and "\x9b" not in stream.getvalue()


def test_a_job_outlives_its_terminal(monkeypatch, run_record, step_record):
  monkeypatch.setenv("TERM", "xterm")
  stream = Gone(OSError(5, os.strerror(5)))
  stream.isatty = lambda: True
  with Progress(stream=stream) as progress:
    progress.begin(run_record)
    progress.update(step_record)
  with Progress(stream=Gone(BrokenPipeError(32, "")), interval_secs=0) as progress:
    progress.begin(run_record)
    progress.update(step_record)
