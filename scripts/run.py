"""Completes a file of requests.

    python scripts/run.py --config=configs/smollm2_135m.py --input=requests.jsonl \
        --output=completions.jsonl

Any field of the configuration can be set: --config.engine.max_rows=32. The same
command again resumes a job that was stopped. Bad rows go to the error file.

Exit codes: 0 all rows answered, 3 finished with error rows, 2 refused or failed, with one
line that says why, 130 stopped by SIGINT or SIGTERM (what is done is kept).
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, Ctrl-C just ends the process

import pathlib
import sys

from absl import flags
from absl import logging
from ml_collections import config_flags

from batchjax.jobs import command_line
from batchjax.jobs.run import default_error_path, run
from batchjax.jobs.signals import Interrupted
from batchjax.report import METRICS_FILE, MetricsError, summarize, to_text

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_INPUT = flags.DEFINE_string("input", None, "Requests: .jsonl, .jsonl.gz or .parquet.",
                             required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Completions: likewise.", required=True)
_ERRORS = flags.DEFINE_string("errors", None, "Bad rows; if left out, out.errors.jsonl for the "
                              "output out.jsonl, out.errors.parquet for out.parquet.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Start anew: the folder of an earlier job is "
                               "moved aside to <output>.job.1 (.2, ...).")
_QUIET = flags.DEFINE_bool("quiet", False, "Show warnings and errors alone: no progress, "
                           "no log, no closing report.")
_STRICT = flags.DEFINE_bool("strict", False, "Stop at the first bad row, before the model loads.")


def main() -> int:
  if _QUIET.value:
    logging.set_verbosity(logging.WARNING)
  job = pathlib.Path(f"{_OUTPUT.value}.job")
  config = command_line.job_config(_CONFIG.value, **({"strict": True} if _STRICT.value else {}))
  try:
    finished = run(config, _INPUT.value, _OUTPUT.value, error_path=_ERRORS.value,
                   overwrite=_OVERWRITE.value, quiet=_QUIET.value)
  except Interrupted as stopped:
    again = "the same command again" + " without --overwrite" * _OVERWRITE.value
    raise Interrupted(f"stopped; finished rows are kept in {job}: run {again} to go on"
                      if job.exists() else "stopped before any row was done") from stopped
  if not _QUIET.value:
    show(job, finished)
  return command_line.ERROR_ROWS if finished.num_errors else 0


def show(job, finished) -> None:
  """The closing report, on standard output."""
  try:
    if (job / METRICS_FILE).exists():  # else every row was bad
      print(to_text(summarize(job)), end="\n\n")
  except MetricsError as error:
    print(f"no report: {error}", file=sys.stderr)
  print(f"{finished} -> {_OUTPUT.value}")
  if finished.num_errors:
    error_path = _ERRORS.value or default_error_path(_OUTPUT.value)
    print(f"bad rows are explained in {error_path}")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  command_line.launch(main)
