"""A job's figures as a short plain text."""

import textwrap

from batchjax.report.metrics import RequestRecord
from batchjax.report.summary import RunFigures, StepTotals, Summary
from batchjax.report.terminal import printable

_LABEL_WIDTH, _WIDTH = 10, 80


def to_text(summary: Summary, *, num_slowest: int = 3) -> str:
  """A report of about a dozen lines of 80 columns, without a trailing newline."""
  lines = [("job", f"{summary.name}: {_state(summary)}")]
  if summary.runs:
    lines += _lines(summary, num_slowest)
  # Ids and names are the user's text: nothing in them may steer the terminal.
  return "\n".join(textwrap.fill(
      printable(text), _WIDTH, initial_indent=f"{label:<{_LABEL_WIDTH}}", drop_whitespace=True,
      subsequent_indent=" " * _LABEL_WIDTH, break_long_words=False, break_on_hyphens=False)
      for label, text in lines)


def _lines(s: Summary, num_slowest: int) -> list[tuple[str, str]]:
  run = s.runs[-1]
  pages = f"{s.peak_pages:,} of {s.peak_pool_pages:,} pages of {run.page_size} tokens"
  reasons = ", ".join(f"{count:,} {reason}" for reason, count in s.finish_reasons) or "none yet"
  scopes = [("", s.last_run)]
  if len(s.runs) > 1:
    scopes = [(f"last run, {s.last_run.num_answered:,} requests: ", s.last_run),
              (f"all runs, {s.all_runs.num_answered:,} requests: ", s.all_runs)]
  lines = [
      ("model", f"{run.model} on {run.num_devices} x {run.device_kind}, jax {run.jax_version}"),
      *[("time" if i == 0 else "", scope + time_text(figures))
        for i, (scope, figures) in enumerate(scopes)],
      *[("speed" if i == 0 else "", f"{scope}{figures.output_tokens_per_sec:,.1f} output tok/s in "
                                    f"steps, {figures.wall_tokens_per_sec:,.1f} from call to end")
        for i, (scope, figures) in enumerate(scopes)],
      ("prompt", f"{s.prompt_tokens:,} tokens asked, {s.computed_tokens:,} computed; "
                 + (f"{s.cached_share:.1%} cached" if s.finished_prompt_tokens
                    else "cached share not known yet")),
      ("output", f"{s.generated_tokens:,} tokens drawn, {s.output_tokens:,} in answers"),
      ("finish", reasons),
      ("steps", ", ".join(map(_kind, s.kinds)) or "none yet"),
      ("padding", f"{s.padding:.1%} of launched tokens"),
      ("host", f"{s.host_share:.1%} of step time"),
      ("kv", f"peak {s.peak_kv_use:.1%}, {pages}; {s.num_preempted:,} rows preempted"),
      ("compiles", f"{s.num_compiles} shapes, {s.num_cached_compiles} of them from the cache"),
  ]
  return lines + [("slowest" if i == 0 else "", _slow(r))
                  for i, r in enumerate(s.slowest[:num_slowest])]


def _state(s: Summary) -> str:
  if not s.runs:
    return "no run recorded yet"
  state = "complete" if s.is_complete else "not complete"
  runs = f", {len(s.runs)} runs, added up below" if len(s.runs) > 1 else ""
  return (f"{state}, {s.num_finished:,} of {s.num_requests:,} requests answered, "
          f"{s.num_errors:,} errors{runs}")


def time_text(figures: RunFigures) -> str:
  """From the call to the last result, its end, and what it was spent on."""
  start, wall = figures.start, figures.wall_secs
  parts = [(figures.step_secs, "in steps")]
  if start is not None:
    parts += [(start.compile_secs, "compiling"), (start.load_secs, "loading the model"),
              (start.read_secs, "reading rows"), (start.plan_secs, "planning"),
              (start.warm_up_secs, "warming up")]
    parts.append((wall - sum(secs for secs, _ in parts), "other"))
  shown = ", ".join(f"{secs:,.1f} s {name}" for secs, name in parts if secs >= 0.05) or "no step yet"
  rest = "" if start is not None else "; what came before them is not recorded"
  return f"{wall:,.1f} s from call to end: {shown}{rest}"


def _kind(totals: StepTotals) -> str:
  loops = f" ({totals.num_steps:,} iterations)" if totals.num_steps != totals.num_dispatches else ""
  return f"{totals.num_dispatches:,} {totals.name}{loops} in {totals.secs:,.1f} s"


def _slow(r: RequestRecord) -> str:
  return (f"{r.request_id} {r.end_secs - r.start_secs:,.1f} s "
          f"({r.prompt_tokens:,} prompt, {r.generated_tokens:,} output tokens)")
