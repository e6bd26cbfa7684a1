"""How the progress of a job looks: two lines, the first one with a bar."""

from collections.abc import Sequence
import datetime

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchjax.report.tracker import Snapshot


def of_start(phases: Sequence[tuple[str, float]], num_done: int, num_all: int, secs: float) -> Group:
  """Before the first step: the phase with its clock, and below it how long those before it took.

  Args:
    phases: names and begins.
    num_done, num_all: of the last phase; 0 where there is nothing to count.
    secs: now.
  """
  name, begin = phases[-1] if phases else ("starting", 0.0)
  ends = [begin for _, begin in phases[1:]]
  took = [f"{name} {end - begin:.1f} s" for (name, begin), end in zip(phases, ends)]
  return _lines(phase_text(name, num_done, num_all), ProgressBar(total=None, pulse_style="cyan"),
                clock(secs - begin), took)


def of_steps(now: Snapshot, secs: float) -> Group:
  """From the first step on: requests, the share of the work that is done, the time left, and rates."""
  is_done = now.finished >= now.num_requests
  done = ProgressBar(total=1.0, completed=1.0 if is_done else now.done_share, complete_style="cyan")
  requests, left, *status = facts(now, secs)
  return _lines(requests, done, left, [clock(secs), *status])


def facts(now: Snapshot, secs: float) -> list[str]:
  """Where a run stands at `secs`, in words; what is most wanted first."""
  if now.finished >= now.num_requests:
    left = f"done in {clock(now.secs)}"
  elif now.secs_left is None:
    left = "time left not known"
  else:
    left = f"{clock(max(0.0, now.secs + now.secs_left - secs))} left"
  parts = [f"{now.finished:,}/{now.num_requests:,} requests", left]
  if now.computed_tokens < now.planned_tokens:
    parts.append(f"prefill {now.computed_tokens:,}/{now.planned_tokens:,}")
  parts += [f"{now.output_tokens_per_sec:,.0f} out tok/s", f"{now.num_rows:,} rows",
            f"KV {now.kv_use:.0%}"]
  if now.cached_share is not None:
    parts.append(f"cached {now.cached_share:.0%}")
  if now.preempted:
    parts.append(f"{now.preempted:,} preempted")
  if now.num_done:
    parts.append(f"{now.num_done:,} from before")
  return parts


def phase_text(name: str, num_done: int, num_all: int) -> str:
  """A phase, and how far it is."""
  if num_all:
    return f"{name} {num_done:,} of {num_all:,}"
  return f"{name} {num_done:,}" if num_done else name


def clock(secs: float) -> str:
  """Hours, minutes and seconds."""
  return str(datetime.timedelta(seconds=round(secs)))


def _lines(left: str, bar: ProgressBar, right: str, below: Sequence[str]) -> Group:
  grid = Table.grid(padding=(0, 1), expand=True)
  grid.add_column(no_wrap=True)
  grid.add_column(ratio=1)
  grid.add_column(no_wrap=True, justify="right")
  grid.add_row(left, bar, right)
  return Group(grid, Text(" · ".join(below), style="dim", overflow="ellipsis", no_wrap=True))
