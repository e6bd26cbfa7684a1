"""Shows what a job would do, without loading weights or touching an accelerator.

    batchjax plan --config=smollm2_135m --input=requests.jsonl --chip=h100

Prints rows and errors, sharing, order, memory, compiled shapes, padding and the
predicted seconds (the roofline of the chip: a floor). A large file is planned
window by window, as it would run.

Exit codes: 0 done, 2 refused or failed, with one line that says why, 130 interrupted.
"""

import json
import pathlib
import tempfile

from absl import flags

from batchjax.commands import command_line, packaged
from batchjax.io import files
from batchjax.jobs.plan import plan_file, to_text
from batchjax.plan.cost import CHIPS


def define_flags() -> None:
  """Those of `batchjax plan`."""
  command_line.define_config()
  command_line.define_input("Requests", packaged.examples())
  flags.DEFINE_string("output", None, "As for run; only checked.")
  flags.DEFINE_bool("strict", False, "As for run: stop at the first bad row.")
  flags.DEFINE_enum("chip", "cpu", sorted(CHIPS), "Whose roofline to predict with.")
  flags.DEFINE_bool("scores", False, "The rows are to score, as for `batchjax score`.")
  flags.DEFINE_bool("json", False, "Print one JSON object instead of text.")


def main(args: flags.FlagValues) -> None:
  """Prints the plan."""
  config = command_line.job_config(args.config, **({"strict": True} if args.strict else {}))
  input_path = packaged.input_path(args.input)
  files.check_paths(input_path, {"output": args.output} if args.output else {})
  with tempfile.TemporaryDirectory() as directory:
    plan = plan_file(config, input_path, pathlib.Path(directory), CHIPS[args.chip],
                     limit=args.limit, scores=args.scores)
  print(json.dumps(plan, indent=1) if args.json else to_text(plan))
