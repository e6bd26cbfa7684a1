"""Shows what a job would do, without loading weights or touching an accelerator.

    python scripts/plan.py --config=configs/smollm2_135m.py --input=requests.jsonl \
        --output=completions.jsonl [--chip=h100]

Prints rows and errors, sharing, order, memory, compiled shapes, padding and the
predicted seconds (the roofline of the chip: a floor). A large file is planned
window by window, as it would run.

Exit codes: 0 done, 2 refused or failed, with one line that says why, 130 interrupted.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, Ctrl-C just ends the process

import json
import pathlib
import tempfile

from absl import flags
from ml_collections import config_flags

from batchjax.io import files
from batchjax.jobs import command_line
from batchjax.jobs.plan import plan_file, to_text
from batchjax.plan.cost import CHIPS

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_INPUT = flags.DEFINE_string("input", None, "Requests: .jsonl, .jsonl.gz or .parquet.",
                             required=True)
_OUTPUT = flags.DEFINE_string("output", None, "As for run.py; only checked.")
_STRICT = flags.DEFINE_bool("strict", False, "As for run.py: stop at the first bad row.")
_CHIP = flags.DEFINE_enum("chip", "cpu", sorted(CHIPS), "Whose roofline to predict with.")
_SCORES = flags.DEFINE_bool("scores", False, "The rows are to score, as for score.py.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of text.")


def main() -> None:
  config = command_line.job_config(_CONFIG.value, **({"strict": True} if _STRICT.value else {}))
  files.check_paths(_INPUT.value, {"output": _OUTPUT.value} if _OUTPUT.value else {})
  with tempfile.TemporaryDirectory() as directory:
    plan = plan_file(config, _INPUT.value, pathlib.Path(directory), CHIPS[_CHIP.value],
                     scores=_SCORES.value)
  print(json.dumps(plan, indent=1) if _JSON.value else to_text(plan))


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  command_line.launch(main)
