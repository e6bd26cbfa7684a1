"""Log-probabilities of given continuations.

    python scripts/score.py --config=configs/smollm2_135m.py --input=pairs.jsonl \
        --output=scores.jsonl

Each line of the input is {"id": ..., "prompt": text, "continuation": text}; each
line of the output {"id", "logprob", "num_tokens", "is_greedy", "token_logprobs"},
in input order. The continuation's tokens are those that follow the prompt's in
the tokenized whole, as lm-evaluation-harness counts them.
"""

import sys

from absl import app
from absl import flags
from ml_collections import config_flags

from batchjax.config import ConfigError, JobConfig, from_config_dict
from batchjax.io.records import InputError
from batchjax.jobs.prepare import BadRow
from batchjax.jobs.score import score_file
from batchjax.weights import WeightError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_INPUT = flags.DEFINE_string("input", None, "Pairs: .jsonl, .jsonl.gz or .parquet.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Scores: likewise.", required=True)


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  try:
    config = from_config_dict(JobConfig, _CONFIG.value.to_dict())
    count = score_file(config, _INPUT.value, _OUTPUT.value)
  except (ConfigError, InputError, BadRow, WeightError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"{count} scores -> {_OUTPUT.value}")
  return 0


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
