"""Log-probabilities in the shapes that the output forms give them."""

import codecs
from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from batchjax.types import Choice, Completion, Request

_LEAST = -9999.0  # what OpenAI's API writes for a probability of 0


class TokenScore(NamedTuple):
  """One token: its id, its log-probability (None for a first token), its likeliest alternatives."""

  token_id: int
  logprob: float | None
  top: list[tuple[int, float]]


def of_choice(choice: Choice) -> list[TokenScore] | None:
  """The scores of a sample's tokens, or None where they were not asked for."""
  if choice.logprobs is None:
    return None
  return _scores(choice.token_ids, choice.logprobs, choice.top_token_ids, choice.top_logprobs)


def of_prompt(request: Request, completion: Completion) -> list[TokenScore] | None:
  """The scores of the prompt's tokens, or None; the first, and those not asked for, have none."""
  if completion.prompt_logprobs is None:
    return None
  start = max(1, request.sampling_params.prompt_logprobs_start)
  before = [TokenScore(token, None, []) for token in request.prompt_token_ids[:start].tolist()]
  tops = completion.prompt_top_token_ids, completion.prompt_top_logprobs
  return before + _scores(request.prompt_token_ids[start:], completion.prompt_logprobs[start:],
                          *(None if top is None else top[start:] for top in tops))


def _scores(token_ids: np.ndarray, logprobs: np.ndarray, top_ids: np.ndarray | None,
            top_logprobs: np.ndarray | None) -> list[TokenScore]:
  scores = []
  for i, (token, logprob) in enumerate(zip(token_ids.tolist(), logprobs)):
    top = [] if top_ids is None else [
        (other, _number(value)) for other, value in zip(top_ids[i].tolist(), top_logprobs[i])]
    scores.append(TokenScore(token, _number(logprob), top))
  return scores


def _number(logprob: np.float32) -> float:
  """The float32 in its fewest digits; raises ValueError for NaN."""
  if math.isnan(logprob):
    raise ValueError("a log-probability is NaN: the model's logits are not finite")
  return max(float(str(np.float32(logprob))), _LEAST)


def chat(scores: list[TokenScore] | None, name_fn: Callable[[int], bytes]) -> Any:
  """`{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}`, or None.

  `name_fn` gives a token's bytes; those of a special token spell its name.
  """
  if scores is None:
    return None
  def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
    return {"token": _text(token_id, name_fn), "logprob": logprob,
            "bytes": list(name_fn(token_id))}
  return {"content": [entry(score.token_id, score.logprob)
                      | {"top_logprobs": [entry(*other) for other in score.top]}
                      for score in scores]}


def completions(scores: list[TokenScore] | None, name_fn: Callable[[int], bytes],
                pieces: Sequence[bytes], text_len: int, has_top: bool) -> Any:
  """`{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`, or None.

  `top_logprobs` maps texts to log-probabilities, the token's own among them.
  `text_offset` counts characters and stays within the text, which may end before
  the last tokens' (a stop string).

  Args:
    scores: of each token, those of an echoed prompt first.
    name_fn: as in `chat`.
    pieces: what each token adds to the text.
    text_len: characters of the text.
    has_top: alternatives were asked for; else `top_logprobs` is None.
  """
  if scores is None:
    return None
  offsets, tops, offset = [], [], 0
  decoder = codecs.getincrementaldecoder("utf-8")("replace")
  for score, piece in zip(scores, pieces, strict=True):
    offsets.append(min(offset, text_len))
    offset += len(decoder.decode(piece))
    top = {}
    for other, logprob in [*score.top, (score.token_id, score.logprob)]:
      top.setdefault(_text(other, name_fn), logprob)
    tops.append(None if score.logprob is None else top)
  return {"tokens": [_text(score.token_id, name_fn) for score in scores],
          "token_logprobs": [score.logprob for score in scores],
          "top_logprobs": tops if has_top else None, "text_offset": offsets}


def plain(scores: list[TokenScore], name_fn: Callable[[int], bytes]) -> list[dict[str, Any]]:
  """`[{"token_id", "token", "logprob", "top_logprobs"}]`; the last only where asked for."""
  def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
    return {"token_id": token_id, "token": _text(token_id, name_fn), "logprob": logprob}
  return [entry(score.token_id, score.logprob)
          | ({"top_logprobs": [entry(*other) for other in score.top]} if score.top else {})
          for score in scores]


def _text(token_id: int, name_fn: Callable[[int], bytes]) -> str:
  """The token's text; bytes that are no whole character appear as \\xNN, so none look alike.

  An id outside the vocabulary, which has no bytes, shows its number.
  """
  data = name_fn(token_id)
  return data.decode("utf-8", errors="backslashreplace") if data else f"token_id:{token_id}"
