"""Completes a file of requests.

    batchjax run --config=smollm2_135m --input=gsm8k_64 --output=completions.jsonl
    batchjax run --config=model:path/to/model --input=requests.jsonl --output=completions.jsonl

Any field of the configuration can be set: --config.engine.max_rows=32. The same
command again resumes a job that was stopped. Bad rows go to the error file.

Exit codes: 0 all rows answered, 3 finished with error rows, 2 refused or failed, with one
line that says why, 130 stopped by SIGINT or SIGTERM (what is done is kept).
"""

import pathlib
import sys

from absl import flags
from absl import logging

from batchjax.commands import command_line, packaged
from batchjax.jobs import job as job_lib
from batchjax.jobs.folder import directory_of
from batchjax.jobs.run import default_error_path, run
from batchjax.jobs.signals import Interrupted
from batchjax.report import METRICS_FILE, MetricsError, summarize, to_text


def define_flags() -> None:
  """Those of `batchjax run`."""
  command_line.define_config()
  command_line.define_input("Requests", packaged.examples())
  define_output("Completions")


def define_output(what: str) -> None:
  """Flags of what a job writes, and of the job itself."""
  flags.DEFINE_string("output", None, f"{what}: likewise; a local path or of a store, as "
                      "gs://bucket/out.jsonl.", required=True)
  flags.DEFINE_string("job_dir", "", "Folder of this machine for the job's state; if left out, "
                      "<output>.job, and for an output in a store (gs://, s3://) that below "
                      "~/.local/state/batchjax.")
  flags.DEFINE_string("errors", None, "Bad rows; if left out, out.errors.jsonl for the output "
                      "out.jsonl, out.errors.parquet for out.parquet.")
  flags.DEFINE_bool("overwrite", False, "Start anew: the folder of an earlier job is moved aside "
                    "to <its name>.1 (.2, ...).")
  flags.DEFINE_bool("quiet", False, "Show warnings and errors alone: no progress, no log, no closing "
                    "report.")
  flags.DEFINE_bool("strict", False, "Stop at the first bad row, before the model loads.")


def main(args: flags.FlagValues, scores: bool = False) -> int:
  """Runs the job, which scores its rows or completes them; returns the exit code."""
  if args.quiet:
    logging.set_verbosity(logging.WARNING)
  job = directory_of(args.output, args.job_dir)
  config = command_line.job_config(args.config, **({"strict": True} if args.strict else {}))
  try:
    finished = run(config, packaged.input_path(args.input), args.output, error_path=args.errors,
                   job_dir=args.job_dir, limit=args.limit, overwrite=args.overwrite,
                   quiet=args.quiet, scores=scores)
  except Interrupted as stopped:
    again = "the same command again" + " without --overwrite" * args.overwrite
    raise Interrupted(f"stopped; finished rows are kept in {job}: run {again} to go on"
                      if job.exists() else "stopped before any row was done") from stopped
  if not args.quiet:
    show(job, finished, args.output, args.errors or default_error_path(args.output))
  return command_line.ERROR_ROWS if finished.num_errors else 0


def show(job: pathlib.Path, finished: job_lib.Finished, output_path: str, error_path: str) -> None:
  """The closing report, on standard output."""
  try:
    if (job / METRICS_FILE).exists():  # else every row was bad
      print(to_text(summarize(job)), end="\n\n")
  except MetricsError as error:
    print(f"no report: {error}", file=sys.stderr)
  print(f"{finished} -> {output_path}")
  if finished.num_errors:
    print(f"bad rows are explained in {error_path}")
