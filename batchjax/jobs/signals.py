"""SIGINT and SIGTERM end a job between two steps."""

from collections.abc import Iterator
import contextlib
import dataclasses
import signal
import sys


class Interrupted(KeyboardInterrupt):
  """The job was asked to stop; what is done is in its journal."""


@dataclasses.dataclass
class Stop:
  """Whether a signal asked to stop, and whether it waits for the end of a step."""

  is_requested: bool = False
  is_deferred: bool = False


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
  """Lets SIGINT and SIGTERM raise Interrupted, or note the request while it is deferred.

  A second one acts as it would without this.
  """
  stop = Stop()
  previous = {}

  def note(number, frame):
    signal.signal(number, previous[number])
    stop.is_requested = True
    if not stop.is_deferred:
      raise Interrupted

  def raise_again(number, frame):
    if not stop.is_deferred:
      raise Interrupted

  def note_lost(lost):
    # Raised inside a callback of the garbage collector, from which no exception comes out.
    if isinstance(lost.exc_value, Interrupted):
      signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
      previous_hook(lost)

  previous_hook, sys.unraisablehook = sys.unraisablehook, note_lost
  for number in (signal.SIGINT, signal.SIGTERM):
    previous[number] = signal.signal(number, note)
  previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, raise_again)
  try:
    yield stop
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.unraisablehook = previous_hook
    for number, handler in previous.items():
      signal.signal(number, handler)
