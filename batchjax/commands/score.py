"""Log-probabilities of given continuations.

    batchjax score --config=smollm2_135m --input=pairs.jsonl --output=scores.jsonl

Each line of the input is {"id": ..., "prompt": text, "continuation": text}; each
line of the output {"id", "logprob", "num_tokens", "is_greedy", "token_logprobs"},
in input order. The continuation's tokens are those that follow the prompt's in
the tokenized whole, as lm-evaluation-harness counts them.

Exit codes: 0 done, 2 refused or failed, with one line that says why, 130 interrupted.
"""

from absl import flags

from batchjax.commands import command_line
from batchjax.jobs.score import score_file


def define_flags() -> None:
  """Those of `batchjax score`."""
  command_line.define_config()
  command_line.define_input("Pairs")
  flags.DEFINE_string("output", None, "Scores: likewise.", required=True)


def main(args: flags.FlagValues) -> None:
  """Writes the scores."""
  count = score_file(command_line.job_config(args.config), args.input, args.output,
                     limit=args.limit)
  print(f"{count} scores -> {args.output}")
