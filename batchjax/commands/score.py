"""Scores a file of prompts and continuations: their log-probabilities.

    batchjax score --config=smollm2_135m --input=choices --output=scores.jsonl

A row of the input has an `id` and a `prompt`, `messages` or `prompt_token_ids`; and a `continuation`,
a list of `continuations` (the choices of a question), or `continuation_token_ids`. Or it has a `text`
alone, which is scored whole. A row of the output has of each continuation `logprob` (the sum),
`num_tokens`, `is_greedy` (every token is the most likely one), `token_ids` and `token_logprobs`;
that of a list has them in `choices`, that of a text has `perplexity` too.

A continuation's tokens are those of prompt and continuation, tokenized together, that lie behind
the tokens of the prompt; a token that spans the border is among them. White space at the end of
a `prompt` belongs to its continuations. So lm-evaluation-harness counts them.

Any field of the configuration can be set: --config.engine.max_rows=32. The same command again
resumes a job that was stopped. Bad rows go to the error file.

Exit codes: 0 all rows scored, 3 finished with error rows, 2 refused or failed, with one
line that says why, 130 stopped by SIGINT or SIGTERM (what is done is kept).
"""

from absl import flags

from batchjax.commands import command_line, packaged, run


def define_flags() -> None:
  """Those of `batchjax score`."""
  command_line.define_config()
  command_line.define_input("Rows to score", packaged.examples())
  run.define_output("Scores")


def main(args: flags.FlagValues) -> int:
  """Returns the exit code."""
  return run.main(args, scores=True)
