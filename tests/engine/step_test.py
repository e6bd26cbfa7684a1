"""The compiled steps on the fake model: any engine gives what one row alone gives."""

import dataclasses

import numpy as np
import pytest

from batchjax.config import EngineConfig, MeshConfig
from batchjax.generation import StepEvent, generate
from batchjax.plan import scheduler
from batchjax.testing.fake_model import FakeModel, fake_config, fake_logits
from batchjax.testing.oracle import assert_same, make_draw_fn, oracle_completion
from batchjax.text.stop import build_stop_table
from batchjax.types import Request, SamplingParams
from batchjax.weights import Model

VOCAB = 29
EOS = (5,)
TOKEN_BYTES = [bytes([97 + i]) for i in range(26)] + [b"ab", b"", b"cd"]
MODEL = Model(fake_config(VOCAB, max_len=128, eos=EOS), {})
ENGINE = EngineConfig(num_pages=300, page_size=4, max_rows=8, max_step_tokens=32, max_buckets=1,
                      max_decode_steps=4, compilation_cache_dir="")
SAMPLING = (
    SamplingParams(temperature=0.0, max_tokens=14),
    SamplingParams(temperature=0.0, max_tokens=20, stop=("ab", "q")),
    SamplingParams(temperature=1.0, max_tokens=12, n=3, seed=1),
    SamplingParams(temperature=0.7, max_tokens=15, top_k=4, seed=2, ignore_eos=True),
    SamplingParams(temperature=1.5, max_tokens=9, top_p=0.7, seed=3, min_tokens=6),
    SamplingParams(temperature=1.0, max_tokens=16, min_p=0.2, n=2, stop=("e", "xyz"), seed=4),
    SamplingParams(temperature=1.0, max_tokens=18, presence_penalty=1.5, frequency_penalty=0.5,
                   repetition_penalty=1.3, seed=5),
    SamplingParams(temperature=2.0, max_tokens=7, logit_bias=((3, 5.0), (7, -50.0)),
                   stop_token_ids=(9, 11), seed=6, logprobs=True, top_logprobs=3),
    SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=True, top_logprobs=2),
    SamplingParams(temperature=1.0, max_tokens=3, prompt_logprobs=True, logprobs=True, n=2),
)


def make_requests() -> list[Request]:
  """Every kind of sampling at each of several depths of a shared prompt."""
  rng = np.random.default_rng(0)
  base = rng.integers(0, VOCAB, 40)
  prompts = [base, base[:23], np.append(base[:23], 1), base[:9],
             np.append(base[:9], rng.integers(0, VOCAB, 17)), rng.integers(0, VOCAB, 5)]
  return [Request(f"{i}-{j}", prompt.astype(np.int32), params)
          for i, params in enumerate(SAMPLING)
          for j, prompt in enumerate(prompts) if (i + j) % 2]


REQUESTS = make_requests()
# Draws and stop strings, without the rest of sampling: their steps compile much faster.
SIMPLE = [request for request in REQUESTS if request.request_id[0] in "012"]

# Texts do not depend on how well the steps were optimised, and less of it takes less time.
pytestmark = pytest.mark.usefixtures("quick_compiler_of_module")


@pytest.fixture(scope="module")
def oracle():
  """What each request gives by itself: its own features, one row, no cache."""
  draw_fn = make_draw_fn(EOS)
  return {request.request_id: oracle_completion(
      request, lambda prefix: fake_logits(prefix, VOCAB), draw_fn, EOS, TOKEN_BYTES)
          for request in REQUESTS}


def run(requests, engine):
  events = []
  stop_table = build_stop_table([r.sampling_params.stop for r in requests], TOKEN_BYTES)
  completions = {c.request_id: c for c in generate(
      MODEL, requests, engine, stop_table=stop_table, module_class=FakeModel,
      observe=events.append)}
  return completions, [event for event in events if isinstance(event, StepEvent)]


def assert_equal(completions, requests, oracle):
  assert sorted(completions) == sorted(request.request_id for request in requests)
  for request in requests:
    assert_same(completions[request.request_id], oracle[request.request_id])


@pytest.mark.parametrize("mesh", [1, 8])
def test_every_kind_of_sampling_survives_preemption(mesh, oracle, monkeypatch):
  class Optimist(scheduler.LengthPredictor):
    def predict(self, num_generated, max_tokens):
      return np.minimum(num_generated + 1, max_tokens)

  monkeypatch.setattr(scheduler, "LengthPredictor", Optimist)
  order = np.random.default_rng(1).permutation(len(REQUESTS))
  completions, events = run([REQUESTS[i] for i in order],
                            dataclasses.replace(ENGINE, num_pages=18, mesh=MeshConfig(mesh)))
  assert events[-1].batch.stats.num_preempted > 0
  assert {event.batch.kind for event in events} == {"mixed", "decode"}
  assert_equal(completions, REQUESTS, oracle)


@pytest.mark.parametrize("change", [
    dict(page_size=1, lookahead=0, max_step_tokens=9),
    dict(page_size=16, lookahead=3, max_decode_steps=7, max_rows=3, share_prefixes=False),
    dict(max_levels=1, max_rows=5, max_buckets=3, compile_secs=0.0, plan_window=7),
    dict(mesh=MeshConfig(2), lookahead=1, max_rows=7),
], ids=str)
def test_any_engine_gives_the_same_text(change, oracle):
  completions, _ = run(SIMPLE, dataclasses.replace(ENGINE, **change))
  assert_equal(completions, SIMPLE, oracle)


def test_a_row_alone_gives_the_same_text_with_a_stop_table_of_no_strings(oracle):
  request = next(r for r in SIMPLE if r.sampling_params.temperature > 0)
  completions, _ = run([request], ENGINE)
  assert_equal(completions, [request], oracle)
