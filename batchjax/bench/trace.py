"""Where device time goes: traces a stretch of a run and adds up its kernels."""

import collections
import dataclasses
import pathlib
import re
from typing import Any

import jax
import numpy as np

_TOP_KERNELS = 15
# Transfers run beside the kernels: they are no work of the device.
_TRANSFERS = ("MemcpyH2D", "MemcpyD2H")


class TraceError(RuntimeError):
  """A trace holds nothing; the message says why."""


class Tracer:
  """Traces a stretch of a run into a folder; give `on_step` to `run`, then `close`.

  Args:
    directory: of the trace; None traces nothing.
    after_secs: when it begins, in seconds since the engine started.
    secs: how long it lasts.
  """

  def __init__(self, directory: str | None, after_secs: float, secs: float):
    self._directory, self._begin, self._end = directory, after_secs, after_secs + secs
    self._state = "done" if directory is None else "waiting"

  def on_step(self, secs: float) -> None:
    """Begins or ends the trace when it is time."""
    if self._state == "waiting" and secs >= self._begin:
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # tracing Python slows the host loop down
      jax.profiler.start_trace(self._directory, profiler_options=options)
      self._state = "tracing"
    elif self._state == "tracing" and secs >= self._end:
      self.close()

  def close(self) -> None:
    """Ends the trace with the run.

    Raises:
      TraceError: the run was over before the trace began.
    """
    if self._state == "waiting":
      raise TraceError(f"the run ended before the trace began, {self._begin} s after its start: "
                       "let it begin earlier (--profile_after_secs), or make the workload larger")
    if self._state == "tracing":
      jax.profiler.stop_trace()
      self._state = "done"


@dataclasses.dataclass(frozen=True)
class Profile:
  """Where device time went.

  Attributes:
    window_secs: from the first to the last event of the device.
    idle_share: part of it in which no kernel ran; a little more than without tracing.
    kernels: name to seconds, the largest first; numbers at the end of names are cut off, so that
      layers add up. Time inside nested events counts for the innermost.
  """

  window_secs: float
  idle_share: float
  kernels: dict[str, float]


def read_profile(directory: str) -> Profile:
  """Reads the newest trace in a folder.

  Raises:
    TraceError: there is none, or it holds no event of a device.
  """
  paths = sorted(pathlib.Path(directory).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
  if not paths:
    raise TraceError(f"no trace (*.xplane.pb) lies in {directory}")
  data = jax.profiler.ProfileData.from_file(str(paths[-1]))
  lines = list(_device_lines(data))
  secs: collections.Counter[str] = collections.Counter()
  for line in lines:
    open_events: list[tuple[str, float]] = []  # name and end of those that the next may lie in
    for begin, end, name in sorted(line, key=lambda event: (event[0], -event[1])):
      while open_events and open_events[-1][1] <= begin:
        open_events.pop()
      secs[name] += end - begin
      if open_events:
        secs[open_events[-1][0]] -= min(end, open_events[-1][1]) - begin
      open_events.append((name, end))
  events = np.array(sorted((begin, end) for line in lines for begin, end, _ in line))
  if not len(events):
    raise TraceError(f"{paths[-1]} holds no event of a device, only "
                     f"{[(p.name, [line.name for line in p.lines]) for p in data.planes]}")
  # A gap opens where an event begins after all earlier ones have ended.
  reached = np.maximum.accumulate(events[:, 1])
  gaps = np.maximum(events[1:, 0] - reached[:-1], 0).sum()
  window = reached[-1] - events[0, 0]
  return Profile(window, float(gaps / window), dict(secs.most_common(_TOP_KERNELS)))


def _device_lines(data: Any):
  """The (begin, end, name) in seconds of what ran on the first device, by stream or thread."""
  planes = {plane.name: plane for plane in data.planes}
  devices = sorted(name for name in planes if re.fullmatch(r"/device:(GPU|TPU):\d+", name))
  is_cpu = not devices
  plane = planes["/host:CPU" if is_cpu else devices[0]]
  for line in plane.lines:
    # A TPU has further lines that cover the same time; on the CPU, operations are among the
    # events of the worker threads.
    if not is_cpu and line.name != "XLA Ops" and not line.name.startswith("Stream"):
      continue
    yield [(event.start_ns * 1e-9, event.end_ns * 1e-9, re.sub(r"([._]\d+)+$", "", event.name))
           for event in line.events
           if event.name not in _TRANSFERS
           and (not is_cpu or any(key == "hlo_op" for key, _ in event.stats))]
