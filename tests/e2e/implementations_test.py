"""A job with each implementation of attention, on the kernels' interpreters: the reference's tokens."""

import contextlib
import dataclasses
import functools

import jax
from jax.experimental import io_callback
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
import numpy as np
import pytest

from batchjax.config import EngineConfig, MeshConfig, ModelSource
from batchjax.generation import generate
from batchjax.models import SHAPES
from batchjax.testing.on_mesh import on_mesh
from batchjax.text.tokenizer import load_tokenizer
from batchjax.types import Request, SamplingParams
from batchjax.weights import load_model, Model
from batchjax.weights.random import random_params
from pallas_kernels.shared_prefix_attention import gpu, reference, tpu, tpu_write

# Chunked prefill, decode loops of a few steps, two levels of sharing.
ENGINE = EngineConfig(max_rows=4, max_step_tokens=24, page_size=16, num_pages=40,
                      max_decode_steps=3, max_buckets=1, compilation_cache_dir="")
# Two tokens this close may change places in bfloat16; roundings add up over real layers.
_NEAR = 0.05
_NEAR_OF_30_LAYERS = 0.1

# One mixed step, no larger than the GPU's narrow tile, and one decode loop.
SMOLLM2_ENGINE = EngineConfig(max_rows=2, max_step_tokens=21, page_size=16, num_pages=8,
                              max_decode_steps=2, max_buckets=1, compilation_cache_dir="")
SHARED = "The three primary colours are red, yellow and blue. Mixed in pairs of equal parts"
PROMPTS = {"they": f"{SHARED}, they", "red": f"{SHARED}: red"}
# Most of the time would go into the compiler.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

needs_new_jax = pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"),
                                   reason="mosaic_gpu and its interpreter need JAX 0.11")


@functools.cache
def model(dtype: str, head_dim: int) -> Model:
  # One layer where the interpreter takes seconds for each.
  config = dataclasses.replace(SHAPES["tiny_llama"], head_dim=head_dim, dtype=dtype, layer_kinds=(),
                               num_layers=2 if dtype == "float32" else 1)
  return Model(config, random_params(config, seed=0))


def requests(max_tokens: int) -> list[Request]:
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(0, SHAPES["tiny_llama"].vocab_size, n).astype(np.int32)
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
  yield
  jax.clear_caches()  # traces hold what a test has put in the place of a kernel


def complete(dtype: str, attention: str, head_dim: int = 64, kv_lanes: int = 1,
             mesh: MeshConfig = MeshConfig()) -> dict:
  engine = dataclasses.replace(ENGINE, attention=attention, kv_lanes=kv_lanes, mesh=mesh)
  jobs = requests(5) if dtype == "float32" else requests(3)[1:3]
  return {c.request_id: c.choices[0]
          for c in generate(on_mesh(model(dtype, head_dim), mesh), jobs, engine)}


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "reference"])
def test_tpu_kernels_and_wide_pools_give_the_tokens_of_the_reference(implementation, monkeypatch):
  monkeypatch.setattr(tpu, "_target_kind", lambda: "TPU v6 lite")
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    got = complete("float32", implementation, head_dim=80, kv_lanes=128)
  want = complete("float32", "reference", head_dim=80)
  assert len(want) == 4
  assert_equal(got, want)


def test_tpu_kernels_on_a_mesh_give_the_tokens_of_the_reference_but_for_ties(monkeypatch):
  monkeypatch.setattr(tpu, "_target_kind", lambda: "TPU v6 lite")
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    got = complete("bfloat16", "mosaic_tpu", mesh=MeshConfig(2))
  assert_equal_but_for_ties(got, complete("bfloat16", "reference"), _NEAR)


def use_one_cta(monkeypatch):
  """The tuned blocks on one multiprocessor: the interpreter would run 132 that mostly idle."""
  tuned = gpu.default_tiling
  monkeypatch.setattr(gpu, "default_tiling", lambda **shape: tuned(**shape)._replace(num_ctas=1))


@needs_new_jax
def test_gpu_kernels_give_the_tokens_of_the_reference_but_for_ties(monkeypatch):
  use_one_cta(monkeypatch)
  monkeypatch.setattr(gpu, "attend", functools.partial(
      gpu.attend, interpret=plgpu.InterpretGPUParams()))
  got, want = complete("bfloat16", "mosaic_gpu"), complete("bfloat16", "reference")
  assert len(want) == 2
  assert_equal_but_for_ties(got, want, _NEAR)


def assert_equal(got: dict, want: dict):
  assert set(got) == set(want)
  for name, choice in want.items():
    np.testing.assert_array_equal(got[name].token_ids, choice.token_ids)
    np.testing.assert_allclose(got[name].logprobs, choice.logprobs, atol=1e-4)


def assert_equal_but_for_ties(got: dict, want: dict, near: float):
  assert set(got) == set(want)
  for name, choice in want.items():
    differ = np.flatnonzero(got[name].token_ids != choice.token_ids)
    same = differ[0] if len(differ) else len(choice.token_ids)
    np.testing.assert_allclose(got[name].logprobs[:same], choice.logprobs[:same], atol=near)
    if len(differ):
      first, second = choice.top_logprobs[same]
      assert first - second < near, f"request {name} parts at token {same}, no tie"


def called(function, **options):
  """`function` as a computation that steps call: compiled once, not within each of 30 layers."""
  @functools.cache
  def compiled(**static):
    return jax.jit(functools.partial(function, **static | options))

  def call(*arrays, **static):
    run = compiled(**static)
    host = lambda *args: jax.tree.map(np.asarray, run(*args))
    # In order, for the interpreters keep one state.
    return io_callback(host, jax.eval_shape(run, *arrays), *arrays, ordered=True)
  return call


def complete_smollm2(gguf, dtype: str, attention: str, monkeypatch) -> tuple[dict, dict]:
  """Choices of the real model, of all its layers: with `attention`, and with the reference."""
  monkeypatch.setattr(reference, "attend", called(reference.attend))
  model, tokenizer = load_model(ModelSource(str(gguf), dtype=dtype)), load_tokenizer(gguf)
  params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=True,
                          top_logprobs=2)
  jobs = [Request(name, np.array(tokenizer.encode(text), np.int32), params)
          for name, text in PROMPTS.items()]

  def complete(attention: str) -> dict:
    engine = dataclasses.replace(SMOLLM2_ENGINE, attention=attention)
    done = list(generate(model, jobs, engine, compiler_options=_QUICK))
    # More than a page of the prefix was computed once, for both.
    assert sorted(c.num_cached_tokens for c in done)[1] > engine.page_size
    return {c.request_id: c.choices[0] for c in done}

  assert model.config.num_layers == 30
  return complete(attention), complete("reference")


def test_smollm2_on_tpu_kernels_gives_the_tokens_of_the_reference(gguf, monkeypatch):
  monkeypatch.setattr(tpu, "_target_kind", lambda: "TPU v6 lite")
  interpret = pltpu.InterpretParams()
  monkeypatch.setattr(tpu, "attend", called(tpu.attend, interpret=interpret))
  monkeypatch.setattr(tpu_write, "write_kv", called(tpu_write.write_kv, interpret=interpret))
  got, want = complete_smollm2(gguf, "float32", "mosaic_tpu", monkeypatch)
  assert_equal(got, want)


@needs_new_jax
def test_smollm2_on_gpu_kernels_gives_the_tokens_of_the_reference_but_for_ties(gguf, monkeypatch):
  use_one_cta(monkeypatch)
  monkeypatch.setattr(gpu, "attend", called(gpu.attend, interpret=plgpu.InterpretGPUParams()))
  got, want = complete_smollm2(gguf, "bfloat16", "mosaic_gpu", monkeypatch)
  assert_equal_but_for_ties(got, want, _NEAR_OF_30_LAYERS)
