"""Scores of continuations on the fake model, whose log-probabilities are known exactly."""

import functools

import numpy as np
import pytest

from batchjax.config import EngineConfig
from batchjax.scoring import ScoreRequest, score
from batchjax.testing.fake_model import FakeModel, fake_config, fake_logits
from batchjax.weights import Model, WeightError

MODEL = Model(fake_config(eos=(0,)), {})
ENGINE = EngineConfig(max_rows=4, max_step_tokens=32, page_size=4, num_pages=64, max_buckets=1,
                      max_levels=2)


def run(requests):
  scores = list(score(MODEL, requests, ENGINE, module_class=FakeModel))
  assert len(scores) == len(requests)
  return {s.request_id: s for s in scores}


def expected(request):
  """Log-probabilities and likeliest tokens along a continuation, without engine or cache."""
  tokens = np.concatenate([request.prompt_token_ids, request.continuation_token_ids])
  logprobs, best = [], []
  for i in range(len(request.prompt_token_ids), len(tokens)):
    logits = fake_logits(tokens[:i], MODEL.config.vocab_size).astype(np.float64)
    logprobs.append(logits[tokens[i]] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    best.append(logits.argmax())
  return np.array(logprobs), np.array(best)


def test_scores_are_exact_and_every_prompt_length_works():
  rng = np.random.default_rng(0)
  prefix = rng.integers(1, 97, 21).astype(np.int32)
  requests = []
  for i in range(14):
    prompt = np.concatenate([prefix[:(21, 9, 1)[i % 3]], rng.integers(1, 97, i % 5)])
    requests.append(ScoreRequest(f"r{i}", prompt.astype(np.int32),
                                 rng.integers(0, 97, 1 + i % 7).astype(np.int32)))
  # Longer than a step, and one whose tokens are what the model would say.
  requests.append(ScoreRequest("long", prefix, rng.integers(1, 97, 60).astype(np.int32)))
  greedy = list(prefix)
  for _ in range(5):
    greedy.append(int(fake_logits(np.array(greedy), 97).argmax()))
  requests.append(ScoreRequest("greedy", prefix, np.array(greedy[21:], np.int32)))

  scores = run(requests)
  for request in requests:
    logprobs, best = expected(request)
    ours = scores[request.request_id]
    np.testing.assert_allclose(ours.logprobs, logprobs, atol=2e-5)
    np.testing.assert_array_equal(ours.is_greedy, best == request.continuation_token_ids)
    assert np.isclose(ours.total, logprobs.sum(), atol=1e-3)
  assert scores["greedy"].is_greedy.all() and not scores["long"].is_greedy.all()


@pytest.mark.parametrize("prompt, continuation, field", [
    ([], [3], "prompt_token_ids"), ([3], [], "continuation_token_ids")])
def test_an_empty_part_is_named(prompt, continuation, field):
  request = ScoreRequest("q", np.array(prompt, np.int32), np.array(continuation, np.int32))
  with pytest.raises(ValueError, match=f"request 'q': {field} is empty"):
    run([request])


def test_a_model_that_gives_nan_is_an_error_that_names_the_request():
  prompt, continuation = np.array([3, 4, 5], np.int32), np.array([6, 7], np.int32)
  is_nan = lambda every: np.isnan(
      [fake_logits([3, 4, 5, 6, 7][:i], 97, every)[0:97].max() for i in range(1, 5)]).any()
  every = next(n for n in range(2, 50) if is_nan(n))
  with pytest.raises(WeightError, match="request 'q': the model gives logits that are NaN"):
    list(score(MODEL, [ScoreRequest("q", prompt, continuation)], ENGINE,
               module_class=functools.partial(FakeModel, nan_every=every)))


def test_nothing_to_score():
  assert run([]) == {}
