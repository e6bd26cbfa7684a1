"""Shows what a job would do, without loading weights or touching an accelerator.

    python scripts/plan.py --config=configs/smollm2_135m.py --input=requests.jsonl \
        --output=completions.jsonl [--chip=h100]

Prints rows and errors, sharing, order, memory, compiled shapes, padding and the
predicted seconds (the roofline of the chip: a floor). A large file is planned
window by window, as it would run.
"""

import json
import pathlib
import sys
import tempfile

from absl import app
from absl import flags
from ml_collections import config_flags

from batchjax.config import ConfigError, JobConfig, from_config_dict
from batchjax.io import files
from batchjax.io.records import InputError
from batchjax.jobs.plan import plan_file, to_text
from batchjax.jobs.prepare import BadRow
from batchjax.plan.cost import CHIPS
from batchjax.weights import WeightError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_INPUT = flags.DEFINE_string("input", None, "Requests: .jsonl, .jsonl.gz or .parquet.",
                             required=True)
_OUTPUT = flags.DEFINE_string("output", None, "As for run.py; only checked.")
_STRICT = flags.DEFINE_bool("strict", False, "As for run.py: stop at the first bad row.")
_CHIP = flags.DEFINE_enum("chip", "cpu", sorted(CHIPS), "Whose roofline to predict with.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of text.")


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  try:
    values = _CONFIG.value.to_dict()
    if _STRICT.value:
      values["strict"] = True
    config = from_config_dict(JobConfig, values)
    if _OUTPUT.value:
      files.check_output(_OUTPUT.value)
    with tempfile.TemporaryDirectory() as directory:
      plan = plan_file(config, _INPUT.value, pathlib.Path(directory),
                                   CHIPS[_CHIP.value])
  except (ConfigError, InputError, BadRow, WeightError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(json.dumps(plan, indent=1) if _JSON.value else to_text(plan))
  return 0


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
