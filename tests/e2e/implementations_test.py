"""A job with each implementation of attention, on the kernels' interpreters: the reference's tokens."""

import contextlib
import dataclasses
import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
import numpy as np
import pytest

from batchjax.config import EngineConfig
from batchjax.generate import generate
from batchjax.models import SHAPES
from batchjax.types import Request, SamplingParams
from batchjax.weights import Model
from batchjax.weights.random import random_params
from pallas_kernels.shared_prefix_attention import gpu, tpu

# Chunked prefill, decode loops of a few steps, two levels of sharing.
ENGINE = EngineConfig(max_rows=4, max_step_tokens=24, page_size=16, num_pages=40,
                      max_decode_steps=3, max_buckets=1, compilation_cache_dir="")
# Two tokens this close may change places in bfloat16.
_NEAR = 0.05


@functools.cache
def model(dtype: str) -> Model:
  # One layer where the interpreter takes seconds for each.
  config = dataclasses.replace(SHAPES["tiny_llama"], head_dim=64, dtype=dtype, layer_kinds=(),
                               num_layers=2 if dtype == "float32" else 1)
  return Model(config, random_params(config, seed=0))


def requests(max_tokens: int) -> list[Request]:
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(0, model("float32").config.vocab_size, n).astype(np.int32)
  system, document = draw(21), draw(19)
  # The second prompt ends with a page of its own run, the last shares nothing.
  prompts = [np.concatenate(parts) for parts in (
      (system, document, draw(5)), (system, document, draw(16)), (system, draw(3)), (draw(9),))]
  return [Request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True,
                                                 logprobs=True, top_logprobs=2))
          for i, prompt in enumerate(prompts)]


@pytest.fixture(autouse=True)
def no_transfer_guard(monkeypatch):
  """Interpreters call the host while a step runs."""
  monkeypatch.setattr(jax, "transfer_guard", lambda level: contextlib.nullcontext())


def complete(dtype: str, attention: str) -> dict:
  engine = dataclasses.replace(ENGINE, attention=attention)
  jobs = requests(5) if dtype == "float32" else requests(3)[1:3]
  return {c.request_id: c.choices[0] for c in generate(model(dtype), jobs, engine)}


def test_tpu_kernels_give_the_tokens_of_the_reference(monkeypatch):
  monkeypatch.setattr(tpu, "_target_kind", lambda: "TPU v6 lite")
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    got = complete("float32", "mosaic_tpu")
  want = complete("float32", "reference")
  assert set(got) == set(want) and len(want) == 4
  for name, choice in want.items():
    np.testing.assert_array_equal(got[name].token_ids, choice.token_ids)
    np.testing.assert_allclose(got[name].logprobs, choice.logprobs, atol=1e-4)


@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"),
                    reason="mosaic_gpu and its interpreter need JAX 0.11")
def test_gpu_kernels_give_the_tokens_of_the_reference_but_for_ties(monkeypatch):
  monkeypatch.setattr(gpu, "attend", functools.partial(
      gpu.attend, interpret=plgpu.InterpretGPUParams()))
  got, want = complete("bfloat16", "mosaic_gpu"), complete("bfloat16", "reference")
  assert set(got) == set(want) and len(want) == 2
  for name, choice in want.items():
    differ = np.flatnonzero(got[name].token_ids != choice.token_ids)
    same = differ[0] if len(differ) else len(choice.token_ids)
    np.testing.assert_allclose(got[name].logprobs[:same], choice.logprobs[:same], atol=_NEAR)
    if len(differ):
      first, second = choice.top_logprobs[same]
      assert first - second < _NEAR, f"request {name} parts at token {same}, no tie"
