"""Completions the slow way: one request at a time, no cache, the whole sequence for each token."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from batchjax.engine import sampling
from batchjax.engine.pack import pack_admissions
from batchjax.engine.sampling_inputs import SamplingFeatures, pack_sampling
from batchjax.forward_pass import forward
from batchjax.plan.batch import Admission
from batchjax.types import Choice, Completion, Request
from batchjax.weights import Model

# The logits f32[V] that follow a sequence i32[n].
LogitsFn = Callable[[np.ndarray], np.ndarray]
# (logits, request, sample index, tokens generated so far) to the next token.
DrawFn = Callable[[np.ndarray, Request, int, list[int]], int]


def oracle_generate(model: Model, requests: Iterable[Request], max_len: int,
                    token_bytes: Sequence[bytes] = ()) -> Iterator[Completion]:
  """What `generate` has to give, in the order of `requests`.

  Args:
    model: computed in its own dtype; float32 is what to compare with token for token.
    requests: as for `generate`.
    max_len: every sequence is padded to this, so that one shape is compiled.
    token_bytes: of each token id, where requests have stop strings.
  """
  eos_token_ids = model.config.eos_token_ids
  logits_fn, draw_fn = transformer_logits(model, max_len), make_draw_fn(eos_token_ids)
  for request in requests:
    yield oracle_completion(request, logits_fn, draw_fn, eos_token_ids, token_bytes)


def oracle_completion(request: Request, logits_fn: LogitsFn, draw_fn: DrawFn,
                      eos_token_ids: Sequence[int],
                      token_bytes: Sequence[bytes] = ()) -> Completion:
  """Completes one request; `num_cached_tokens` is 0, as nothing is cached."""
  params, prompt = request.sampling_params, request.prompt_token_ids
  choices = tuple(_choice(request, sample, logits_fn, draw_fn, eos_token_ids, token_bytes)
                  for sample in range(params.n))
  scores = (None,) * 3
  if params.prompt_logprobs:
    all_logits = [logits_fn(prompt[:i]) for i in range(1, len(prompt))]
    scores = _scores(all_logits, prompt[1:], params.top_logprobs, first_is_null=True)
    for values, null in zip(scores, (np.nan, -1, np.nan)):
      if values is not None:
        values[:params.prompt_logprobs_start] = null
    if not all(map(is_finite, all_logits[max(0, params.prompt_logprobs_start - 1):])):
      choices = tuple(dataclasses.replace(choice, finish_reason="error") for choice in choices)
  return Completion(request.request_id, choices, len(prompt), 0, *scores)


def _choice(request, sample, logits_fn, draw_fn, eos_token_ids, token_bytes) -> Choice:
  params = request.sampling_params
  stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
  tokens: list[int] = []
  all_logits = []
  text, reason, stop_token_id = b"", "", -1
  while not reason and len(tokens) < params.max_tokens:
    sequence = np.append(request.prompt_token_ids, np.array(tokens, np.int32))
    logits = logits_fn(sequence)
    if not is_finite(logits):
      reason = "error"
      break
    all_logits.append(logits)
    token = int(draw_fn(all_logits[-1], request, sample, tokens))
    tokens.append(token)
    text += token_bytes[token] if params.stop else b""
    is_string = any(stop.encode() in text for stop in params.stop)
    if len(tokens) > params.min_tokens and (token in stop_ids or is_string):
      reason = "stop"
      if token in stop_ids:
        stop_token_id = tokens.pop()
    elif is_string:
      text = b""  # one that came too early is passed over, and matching starts afresh
  scores = _scores(all_logits[:len(tokens)], tokens, params.top_logprobs)
  return Choice(sample, np.array(tokens, np.int32), reason or "length",
                *(scores if params.logprobs else (None,) * 3), stop_token_id)


def is_finite(logits: np.ndarray) -> bool:
  """Whether logits f32[V] can be drawn from: finite, or -inf here and there."""
  return bool(np.isfinite(logits.max()))


def _scores(all_logits, tokens, num_top, first_is_null=False):
  """Log-probabilities of tokens, and ids and log-probabilities of the most likely ones."""
  ids = np.zeros((len(tokens), num_top), np.int32)
  top = np.zeros((len(tokens), num_top), np.float32)
  chosen = np.zeros(len(tokens), np.float32)
  for i, (logits, token) in enumerate(zip(all_logits, tokens, strict=True)):
    logits = logits.astype(np.float64)
    logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    ids[i] = np.argsort(-np.nan_to_num(logits, nan=np.inf), kind="stable")[:num_top]  # NaN first
    chosen[i], top[i] = logprobs[token], logprobs[ids[i]]
  if first_is_null:
    chosen, ids, top = (np.concatenate([np.full((1, *x.shape[1:]), null, x.dtype), x])
                        for x, null in ((chosen, np.nan), (ids, -1), (top, np.nan)))
  return (chosen, ids, top) if num_top else (chosen, None, None)


def assert_same(got: Completion, want: Completion, atol: float = 1e-4) -> None:
  """Raises AssertionError unless texts are equal and log-probabilities close."""
  name = want.request_id
  assert got.request_id == name and got.num_prompt_tokens == want.num_prompt_tokens
  assert [choice.index for choice in got.choices] == [choice.index for choice in want.choices]
  close = functools.partial(_assert_close, atol=atol)
  for mine, other in zip(got.choices, want.choices):
    where = f"request {name}, sample {other.index}"
    assert mine.token_ids.tolist() == other.token_ids.tolist(), where
    assert (mine.finish_reason, mine.stop_token_id) == (other.finish_reason, other.stop_token_id), where
    close(mine.logprobs, other.logprobs, where)
    close(mine.top_token_ids, other.top_token_ids, where)
    close(mine.top_logprobs, other.top_logprobs, where)
  for field in ("prompt_logprobs", "prompt_top_token_ids", "prompt_top_logprobs"):
    close(getattr(got, field), getattr(want, field), f"request {name}, {field}")


def _assert_close(got, want, where, atol):
  assert (got is None) == (want is None), where
  if want is not None:
    assert got.shape == want.shape and got.dtype == want.dtype, where
    np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=where)


def transformer_logits(model: Model, max_len: int) -> LogitsFn:
  """Logits of a transformer after a sequence, by `forward`: none of the engine's attention or KV."""

  @jax.jit
  def run(model, tokens, length):
    return forward(model, tokens).logits[length - 1]

  def logits_fn(sequence):
    padded = np.zeros(max_len, np.int32)
    padded[:len(sequence)] = sequence
    return np.asarray(run(model, padded, np.int32(len(sequence))))

  return logits_fn


def make_draw_fn(eos_token_ids: Sequence[int]) -> DrawFn:
  """Draws with `sampling.sample`, one row at a time, with the features of that row alone."""

  @functools.partial(jax.jit, static_argnames="features")
  def run(logits, inputs, position, num_generated, known, features):
    penalties = sampling.PenaltyState.create(1, logits.shape[-1], features)
    if penalties is not None:
      penalties = sampling.admit(penalties, *known)
    tokens, _ = sampling.sample(logits[None], inputs, position[None], num_generated[None], features,
                                penalties, jnp.zeros(1, jnp.int32))
    return tokens[0]

  def draw_fn(logits, request, sample, output):
    params = request.sampling_params
    features = SamplingFeatures.of([params], eos_token_ids)
    if params.stop:
      params = dataclasses.replace(params, stop=())  # draws do not depend on them
    inputs = pack_sampling([params], [sample], features, eos_token_ids, None, 1)
    prompt = request.prompt_token_ids
    row = Admission(0, request.request_id, params, sample, prompt, np.array(output, np.int32))
    known, = pack_admissions([row], 1)
    return int(run(logits, inputs, np.int32(len(prompt) + len(output)), np.int32(len(output)),
                   known if features.penalties else None, features))

  return draw_fn
