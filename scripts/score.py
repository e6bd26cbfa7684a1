"""Log-probabilities of given continuations.

    python scripts/score.py --config=configs/smollm2_135m.py --input=pairs.jsonl \
        --output=scores.jsonl

Each line of the input is {"id": ..., "prompt": text, "continuation": text}; each
line of the output {"id", "logprob", "num_tokens", "is_greedy", "token_logprobs"},
in input order. The continuation's tokens are those that follow the prompt's in
the tokenized whole, as lm-evaluation-harness counts them.

Exit codes: 0 done, 2 refused or failed, with one line that says why, 130 interrupted.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, Ctrl-C just ends the process

from absl import flags
from ml_collections import config_flags

from batchjax.jobs import command_line
from batchjax.jobs.score import score_file

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_INPUT = flags.DEFINE_string("input", None, "Pairs: .jsonl, .jsonl.gz or .parquet.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Scores: likewise.", required=True)


def main() -> None:
  count = score_file(command_line.job_config(_CONFIG.value), _INPUT.value, _OUTPUT.value)
  print(f"{count} scores -> {_OUTPUT.value}")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  command_line.launch(main)
