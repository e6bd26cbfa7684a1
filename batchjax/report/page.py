"""One self-contained HTML page about a job: figures, pictures, tables.

A picture or table whose data is not there yet says so in its place, so the page
of a running job, or of one that only was planned, is whole.
"""

from collections.abc import Callable
import datetime
import json
import os
import pathlib
from typing import Any

import jinja2
import markupsafe

from batchjax.io import files
from batchjax.report import plan_words, plots
from batchjax.report.metrics import Run, RunRecord
from batchjax.report.sharing import PLAN_FILE, PlanFile, PlanFileError, read_plan_file
from batchjax.report.summary import answered, load_runs, RunFigures, Summary, summarize_runs
from batchjax.report.text import time_text

MANIFEST_FILE = "manifest.json"


def render_page(job_dir: str | os.PathLike) -> str:
  """The page of a job directory, as HTML.

  Raises:
    FileNotFoundError: there is no such directory.
    MetricsError: the metrics file is damaged before its last line.
  """
  job_dir = pathlib.Path(job_dir)
  runs = load_runs(job_dir)
  summary = summarize_runs(job_dir.resolve().name, runs)
  plan, no_plan = _read_plan(job_dir / PLAN_FILE)
  settings, no_settings = _read_settings(job_dir / MANIFEST_FILE)
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
      autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
  return environment.get_template("page.html.j2").render(
      summary=summary, tiles=_tiles(summary), runs=[_run_row(run.record, run) for run in runs],
      compiles=[record for run in runs for record in run.compiles],
      figures=_run_figures(summary), plan_rows=plan_words.rows(plan) if plan else [],
      prefixes=plan_words.prefixes(plan) if plan else [],
      over_time=_picture(plots.over_time, runs),
      padding=_picture(plots.padding, summary.buckets),
      lengths=_picture(plots.lengths, [r for r in answered(runs) if r.finish_reason != "error"]),
      sharing=_picture(plots.sharing, plan) if plan else _missing(no_plan),
      plan=plan, no_plan=no_plan, settings=settings, no_settings=no_settings)


def write_page(job_dir: str | os.PathLike, path: str | os.PathLike) -> None:
  """Writes the page of `job_dir` to `path`, whole or not at all.

  Raises:
    FileNotFoundError: there is no such job directory.
    MetricsError: the metrics file is damaged before its last line.
  """
  # JSON lets an id hold half a surrogate pair, which no encoding writes.
  text = render_page(job_dir).encode("utf-8", errors="replace")
  with files.atomic(pathlib.Path(path)) as f:
    f.write(text)


def _tiles(s: Summary) -> list[tuple[str, str, str]]:
  """(figure, what it is, a detail) of what a person asks first; of all runs."""
  start = s.all_runs.start
  return [
      (f"{s.all_runs.output_tokens_per_sec:,.0f}", "output tokens per second in steps",
       f"{s.all_runs.wall_tokens_per_sec:,.0f} from the call to the last result"),
      (f"{s.num_finished:,}", f"of {s.num_requests:,} requests answered",
       f"{s.num_errors:,} errors"),
      (f"{s.all_runs.wall_secs:,.1f} s", "from the call to the last result",
       f"{s.all_runs.step_secs:,.1f} s in steps"
       + (f", {len(s.runs)} runs" if len(s.runs) > 1 else "")),
      (f"{s.cached_share:.1%}" if s.finished_prompt_tokens else "–", "of prompt tokens cached",
       f"{s.computed_tokens:,} computed of {s.prompt_tokens:,}"),
      (f"{s.padding:.1%}", "padding", "of launched tokens"),
      (f"{s.host_share:.1%}", "host share", "of step time"),
      (f"{s.peak_kv_use:.1%}", "KV pool at its peak", f"{s.num_preempted:,} rows preempted"),
      (f"{start.compile_secs:,.1f} s" if start else "not known", f"to have {s.num_compiles} shapes",
       f"{s.num_cached_compiles} of them from the cache"),
  ]


def _run_figures(s: Summary) -> list[tuple[str, RunFigures, str]]:
  """(whose, figures, their time in words) of the last run, and of all of them where there are more."""
  runs = [("last run", s.last_run), ("all runs", s.all_runs)] if len(s.runs) > 1 else [
      ("this run", s.all_runs)]
  return [(name, figures, time_text(figures)) for name, figures in runs if s.runs]


def _run_row(record: RunRecord, run: Run) -> dict[str, Any]:
  begin = datetime.datetime.fromtimestamp(record.time, datetime.timezone.utc)
  return {"begin": f"{begin:%Y-%m-%d %H:%M:%S} UTC", "record": record,
          "wall_secs": run.wall_secs, "num_answered": len(run.requests)}


def _picture(draw: Callable[[Any, float], str], data: Any) -> markupsafe.Markup:
  """The picture, for wide and for narrow screens, or the reason there is none."""
  try:
    return markupsafe.Markup("".join(
        f'<div class="{name}">{draw(data, width)}</div>'
        for name, width in (("wide", plots.WIDE), ("narrow", plots.NARROW))))
  except plots.NothingToDraw as reason:
    return _missing(str(reason).capitalize())


def _missing(reason: str) -> markupsafe.Markup:
  return markupsafe.Markup('<p class="missing">{}</p>').format(reason + ".")


def _read_plan(path: pathlib.Path) -> tuple[PlanFile | None, str]:
  """The plan, or None and why there is none."""
  try:
    return read_plan_file(path), ""
  except FileNotFoundError:
    return None, f"{path.name} is not in the job directory: no plan is written yet"
  except (PlanFileError, OSError) as error:
    return None, str(error)


def _read_settings(path: pathlib.Path) -> tuple[list[tuple[str, str]], str]:
  """Dotted names and values of the manifest, or an empty list and why."""
  try:
    with open(path, "rb", opener=files.open_regular) as f:
      return _flatten("", json.loads(f.read())), ""
  except FileNotFoundError:
    return [], f"{path.name} is not in the job directory"
  except (ValueError, RecursionError, OSError) as error:
    return [], f"{path.name} is not JSON: {error}"


def _flatten(name: str, value: Any) -> list[tuple[str, str]]:
  if isinstance(value, dict) and value:
    return [pair for key, inner in value.items()
            for pair in _flatten(f"{name}.{key}" if name else str(key), inner)]
  return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
