"""Completes a file of requests.

    python scripts/run.py --config=configs/smollm2_135m.py --input=requests.jsonl \
        --output=completions.jsonl

Any field of the configuration can be set: --config.engine.max_rows=32. The same
command again resumes a job that was stopped. Bad rows go to the error file.
"""

import pathlib
import sys

from absl import app
from absl import flags
from ml_collections import config_flags

from batchjax.config import ConfigError, JobConfig, from_config_dict
from batchjax.io.journal import JournalError
from batchjax.io.records import InputError
from batchjax.jobs.job import JobError
from batchjax.jobs.prepare import BadRow
from batchjax.jobs.run import default_error_path, run
from batchjax.jobs.signals import Interrupted
from batchjax.report import METRICS_FILE, summarize, to_text
from batchjax.weights import WeightError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_INPUT = flags.DEFINE_string("input", None, "Requests: .jsonl, .jsonl.gz or .parquet.",
                             required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Completions: likewise.", required=True)
_ERRORS = flags.DEFINE_string("errors", None, "Bad rows; <output stem>.errors.jsonl if left out.")
_QUIET = flags.DEFINE_bool("quiet", False, "Show neither progress nor the closing report.")
_STRICT = flags.DEFINE_bool("strict", False, "Stop at the first bad row, before the model loads.")

USER_ERRORS = (ConfigError, InputError, JobError, JournalError, BadRow, WeightError, OSError)


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  try:
    values = _CONFIG.value.to_dict()
    if _STRICT.value:
      values["strict"] = True
    config = from_config_dict(JobConfig, values)
    finished = run(config, _INPUT.value, _OUTPUT.value, error_path=_ERRORS.value,
                   quiet=_QUIET.value)
  except Interrupted:
    print(f"\nstopped; finished rows are kept in {_OUTPUT.value}.job: run the same command again "
          "to go on", file=sys.stderr)
    return 130
  except USER_ERRORS as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if not _QUIET.value:
    job = pathlib.Path(f"{_OUTPUT.value}.job")
    if (job / METRICS_FILE).exists():  # else every row was bad
      print(to_text(summarize(job)), end="\n\n")
    print(f"{finished} -> {_OUTPUT.value}")
    if finished.num_errors:
      error_path = _ERRORS.value or default_error_path(_OUTPUT.value)
      print(f"bad rows are explained in {error_path}")
  return 0


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
