"""Log-probabilities of given continuations: the path of `generate`, with nothing drawn."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from batchjax.config import EngineConfig
from batchjax.generation import generate
from batchjax.types import NOT_FINITE, Request, SCORING
from batchjax.weights import Model, WeightError


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
  """A continuation to score.

  Attributes:
    request_id: unique.
    prompt_token_ids: i32[prompt_len], at least one token.
    continuation_token_ids: i32[len], at least one token.

  >>> request = batchjax.ScoreRequest("a", np.array([7, 8]), np.array([9]))
  """

  request_id: str
  prompt_token_ids: np.ndarray
  continuation_token_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Score:
  """What the model thinks of a continuation.

  Attributes:
    request_id: the request's.
    logprobs: f32[len], of each token given the prompt and the tokens before it.
    is_greedy: bool[len], the token is the model's most likely one.

  >>> score, = batchjax.score(model, [batchjax.ScoreRequest("a", np.array([7, 8]), np.array([9, 4]))])
  >>> score.total < 0, len(score.logprobs), len(score.is_greedy)
  (True, 2, 2)
  """

  request_id: str
  logprobs: np.ndarray
  is_greedy: np.ndarray

  @property
  def total(self) -> float:
    """Log-probability of the whole continuation."""
    return float(self.logprobs.sum(dtype=np.float64))


def score(model: Model, requests: Iterable[ScoreRequest],
          engine: EngineConfig = EngineConfig(), **options: Any) -> Iterator[Score]:
  """Scores continuations; prompts that share a prefix share its computation.

  Of the prompts themselves no logits are computed.

  Args:
    model: configuration and parameters.
    requests: what to score.
    engine: limits and sizes.
    **options: of `generate`: `observe`, `module_class`.

  Yields:
    Scores in the order in which they finish.

  Raises:
    ValueError: a prompt or a continuation is empty.
    WeightError: the model's logits for a request are not finite.

  >>> question = np.array(tokenizer.encode("What is the time?"))
  >>> requests = [batchjax.ScoreRequest(answer, question, np.array(tokenizer.encode(answer)))
  ...             for answer in (" noon", " night")]
  >>> likeliest = max(batchjax.score(model, requests), key=lambda score: score.total).request_id
  """
  pending: dict[str, ScoreRequest] = {}

  def as_requests() -> Iterator[Request]:
    for request in requests:
      for name in ("prompt_token_ids", "continuation_token_ids"):
        if not len(getattr(request, name)):
          raise ValueError(f"request {request.request_id!r}: {name} is empty: give it at least one "
                           "token; what begins a text can stand behind the model's BOS or end token")
      pending[request.request_id] = request
      tokens = np.concatenate([request.prompt_token_ids, request.continuation_token_ids])
      yield Request(request.request_id, tokens.astype(np.int32), dataclasses.replace(
          SCORING, prompt_logprobs_start=len(request.prompt_token_ids)))

  for completion in generate(model, as_requests(), engine, **options):
    request = pending.pop(completion.request_id)
    if completion.choices[0].finish_reason == "error":
      raise WeightError(f"request {request.request_id!r}: {NOT_FINITE}")
    first = len(request.prompt_token_ids)
    yield Score(request.request_id, completion.prompt_logprobs[first:],
                completion.prompt_top_token_ids[first:, 0] == request.continuation_token_ids)
