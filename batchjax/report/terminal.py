"""Standard output and error as a job uses them: no text steers a terminal, and a lost one ends no job."""

from collections.abc import Callable
import contextlib
import os
import re
import sys
from typing import Any, TextIO

from absl import logging


def printable(text: str) -> str:
  """The text on one line, each character that does not print as its escape sequence."""
  if text.isprintable():
    return text
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Outlet:
  """A text stream in front of another one, which may go away.

  Args:
    stream: where to; None, as Python has it for a closed descriptor, is nowhere.
    escapes: write what does not print as escape sequences, except for newlines and tabs.
    lost: errors that mean that nobody reads any more; what follows is dropped.
  """

  def __init__(self, stream: Any, *, escapes: bool = True,
               lost: type[OSError] | tuple[type[OSError], ...] = OSError):
    self._stream: TextIO = stream or open(os.devnull, "w", encoding="utf-8")
    self._escapes, self._lost = escapes, lost

  @property
  def unescaped(self) -> "Outlet":
    """The same for a program that draws on the terminal."""
    return Outlet(self._stream, escapes=False, lost=self._lost)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    if self._escapes:
      text = re.sub(r"[^\n\t]+", lambda match: printable(match[0]), text)
    self._try(self._stream.write, text)
    return len(text)

  def flush(self) -> None:
    self._try(self._stream.flush)

  def _try(self, action: Callable[..., Any], *args: str) -> None:
    try:
      action(*args)
    except OSError as e:
      nowhere = open(os.devnull, "w", encoding="utf-8")
      with contextlib.suppress(OSError):  # what it still holds back must not fail again at the exit
        os.dup2(nowhere.fileno(), self._stream.fileno())
      lost, self._stream = self._stream, nowhere
      if not isinstance(e, self._lost):
        e.filename = getattr(lost, "name", None)
        raise


def log_to(stream: TextIO) -> TextIO:
  """Sends log lines to a stream; returns where they went before."""
  handler = logging.get_absl_handler().python_handler
  before = handler.stream
  handler.setStream(stream)
  return before


def guard_streams() -> None:
  """Puts an `Outlet` in front of standard output and error, which log lines take too.

  A closed descriptor is opened on nothing first: else the next file that the
  job opens would get its number, and what a library prints.
  """
  for fd in range(3):
    try:
      os.fstat(fd)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
  logging.use_absl_handler()  # takes the place of handlers that libraries made on standard error
  for stream in (sys.stdout, sys.stderr):
    if stream:
      stream.reconfigure(errors="backslashreplace")
  sys.stdout = Outlet(sys.stdout, lost=BrokenPipeError)
  sys.stderr = Outlet(sys.stderr)
  log_to(sys.stderr)
