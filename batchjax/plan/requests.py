"""What is wrong with a request, whoever made it: found before anything is computed."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from batchjax.config import ConfigError, ModelConfig
from batchjax.types import Request, SamplingParams, StopTable


class Problem(NamedTuple):
  """Why a request cannot run: its field, a sentence with the remedy, and the code of an error row."""

  field: str
  message: str
  code: str = "invalid_value"


def find_problem(token_ids: np.ndarray | Sequence[int], params: SamplingParams, vocab_size: int,
                 max_len: int) -> Problem | None:
  """What is wrong with a tokenized prompt and its parameters, for a model; None where nothing is.

  Args:
    token_ids: i32[prompt_len].
    params: how to draw the completion.
    vocab_size: token ids must be below it.
    max_len: most tokens of prompt and completion together.
  """
  token_ids = np.asarray(token_ids)
  if not token_ids.size:
    return Problem("prompt", "the prompt has no tokens: give it at least one")
  bad = np.flatnonzero((token_ids < 0) | (token_ids >= vocab_size))
  if bad.size:
    return Problem("prompt", f"prompt token {bad[0]} is {token_ids[bad[0]]}, but the model's "
                   f"vocabulary has {vocab_size} tokens: use the model's own tokenizer")
  for name, tokens in (("stop_token_ids", params.stop_token_ids),
                       ("logit_bias", tuple(token for token, _ in params.logit_bias))):
    if max(tokens, default=0) >= vocab_size:
      return Problem(name, f"{name} names token {max(tokens)}, but the model's vocabulary "
                     f"has {vocab_size} tokens: remove it")
  if params.top_logprobs > vocab_size:
    return Problem("top_logprobs", f"{params.top_logprobs} alternatives per token exceed the "
                   f"vocabulary of {vocab_size} tokens: ask for fewer")
  room, least = max_len - token_ids.size, min(1, params.max_tokens)  # scoring needs no room
  if room < least:
    return Problem("prompt", f"the prompt has {token_ids.size} tokens, which leaves no room "
                   f"in the context of {max_len}: shorten it to at most {max_len - least}",
                   "context_length_exceeded")
  for name in ("min_tokens", "max_tokens"):
    if (value := getattr(params, name)) > room:
      return Problem(name, f"the prompt has {token_ids.size} tokens and {name} is {value}, "
                     f"together over the context of {max_len}: shorten the prompt or set {name} to "
                     f"at most {room}", "context_length_exceeded")
  return None


def check_requests(requests: Iterable[Request], model: ModelConfig,
                   stop_table: StopTable | None) -> None:
  """Raises ConfigError for the first request that cannot run, with the remedy."""
  used = set()
  for request in requests:
    where, params = f"request {request.request_id!r}", request.sampling_params
    if found := find_problem(request.prompt_token_ids, params, model.vocab_size, model.max_len):
      raise ConfigError(f"{where}: {found.message}")
    if params.stop and (stop_table is None or params.stop not in stop_table.automaton):
      raise ConfigError(f"{where}: nothing finds its stop strings {list(params.stop)} in tokens: "
                        "give tokenizer=, or a stop_table of the stop strings of all requests")
    if request.request_id in used:
      raise ConfigError(f"{where}: an earlier request has this id: make it unique")
    used.add(request.request_id)
