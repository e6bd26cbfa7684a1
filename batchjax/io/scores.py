"""Rows that are scored: the tokens of each continuation, and what is written of them."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from jaxtyping import Int32
import numpy as np

from batchjax.config import RowLimits
from batchjax.io import logprobs
from batchjax.io.fields import InvalidField, require_at_most
from batchjax.io.store import StoredRow
from batchjax.io.validate import Row
from batchjax.types import Completion, SCORING


def texts(row: Row, prompt: str | np.ndarray, limits: RowLimits) -> tuple[str | np.ndarray, ...]:
  """What of a row is to be tokenized: its prompt, then the prompt with each continuation of text.

  Spaces and line breaks at the end of a prompt of text go to the continuations, since tokenizers
  join them with what follows; those that a chat template wrote stay. lm-evaluation-harness does so too.

  Args:
    row: to complete, or to score.
    prompt: its text, that which a chat template made of its messages, or its token ids.
    limits: `max_line_bytes` bounds the continuations, the prompt before each counted.

  Raises:
    InvalidField: they are more.
  """
  if not row.continuations or isinstance(row.continuations[0], np.ndarray):
    return (prompt,)
  num_chars = sum(len(prompt) + len(continuation) for continuation in row.continuations)
  require_at_most("continuations" if row.form == "choices" else "continuation", num_chars,
                  "characters, the prompt before each counted,", limits, "max_line_bytes")
  end = "" if isinstance(row.prompt, list) else prompt[len(prompt.rstrip()):]
  prompt = prompt.removesuffix(end)
  return (prompt, *(prompt + end + continuation for continuation in row.continuations))


def requests_of(row: Row, token_ids: Sequence[Int32[np.ndarray, "_"]], first_token: int | None
                ) -> list[tuple[Row, Int32[np.ndarray, "_"]]]:
  """The requests of a row, each a row of its own with its tokens.

  A continuation's tokens are those of the whole from the first on in which it differs from the
  tokenized prompt: a token that spans the border counts as the continuation's, and none of its
  text is lost. Where the whole begins with the prompt's tokens, that is what
  lm-evaluation-harness counts.

  Args:
    row: to complete, which is one request, or to score, which is one for each continuation.
    token_ids: of its `texts`.
    first_token: stands before a text that nothing else precedes; None where there is none.

  Raises:
    InvalidField: a continuation adds no token, or nothing precedes its first one.
  """
  if not row.continuations:
    return [(row, token_ids[0])]
  prompt, *wholes = token_ids
  wholes = wholes or [np.append(prompt, ids).astype(np.int32) for ids in row.continuations]
  requests = []
  for i, tokens in enumerate(wholes):
    shorter = min(len(prompt), len(tokens))
    differs = np.flatnonzero(prompt[:shorter] != tokens[:shorter])
    border = int(differs[0]) if len(differs) else shorter
    if border == len(tokens):
      name = {"document": "text", "choices": f"continuations[{i}]"}.get(row.form, "continuation")
      raise InvalidField(name, f"{name} adds no token to the prompt: lengthen it")
    if not border:
      if first_token is None:
        raise InvalidField("prompt", "nothing precedes the first token, and the tokenizer has neither a "
                           "BOS nor an end token to put there: give a prompt")
      tokens, border = np.append(np.int32(first_token), tokens), 1
    params = dataclasses.replace(SCORING, prompt_logprobs_start=border)
    name = f"{row.request_id}[{i}]" if row.form == "choices" else row.request_id
    requests.append((dataclasses.replace(row, request_id=name, sampling_params=params), tokens))
  return requests


def row_id(row: StoredRow) -> str:
  """The id of the row that a request is of."""
  request_id = row.request.request_id
  return request_id.rpartition("[")[0] if row.form == "choices" else request_id


def format_scores(answers: Sequence[tuple[StoredRow, Completion]]) -> dict[str, Any]:
  """The output object of a row to score.

  Args:
    answers: its requests with what came back, in any order.

  Returns:
    `{"id", "logprob", "num_tokens", "is_greedy", "token_ids", "token_logprobs"}`; of a whole text also
    `perplexity`, null where a token is impossible; of a list of continuations
    `{"id", "choices": [{"index", "logprob", ...}]}`.
  """
  first, _ = answers[0]
  if first.form != "choices":
    return {"id": row_id(first), **_score(*answers[0])}
  index_of = lambda answer: int(answer[0].request.request_id.rpartition("[")[2][:-1])
  return {"id": row_id(first), "choices": [
      {"index": index_of(answer), **_score(*answer)} for answer in sorted(answers, key=index_of)]}


def _score(row: StoredRow, completion: Completion) -> dict[str, Any]:
  start = row.request.sampling_params.prompt_logprobs_start
  scored = logprobs.of_prompt(row.request, completion)[start:]
  total = sum(score.logprob for score in scored)
  fields = {"logprob": float(str(np.float32(total))), "num_tokens": len(scored),
            "is_greedy": all(score.top[0][0] == score.token_id for score in scored),
            "token_ids": [score.token_id for score in scored],
            "token_logprobs": [score.logprob for score in scored]}
  if row.form == "document":
    mean = -total / len(scored)
    fields["perplexity"] = float(str(np.float32(math.exp(mean)))) if mean < 80 else None
  return fields
