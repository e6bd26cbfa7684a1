"""Every shape of a job, compiled before its first token."""

import concurrent.futures
import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from batchjax.cache.kv_state import init_kv_state
from batchjax.config import EngineConfig, ModelConfig
from batchjax.engine import sampling, step
from batchjax.engine.sampling_inputs import SamplingFeatures, SamplingTable
from batchjax.plan.batch import Admission
from batchjax.plan.buckets import Bucket
from batchjax.types import Segments, StepInputs


COMPILER_OPTIONS = {
    # A decode loop becomes one CUDA graph, its condition read on the device: with XLA's own choice
    # the host reads it after every step, and whoever dispatched the loop waits until it ends.
    "gpu": {"xla_gpu_enable_command_buffer":
            "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"},
    # 16-bit arrays stay in tiles of 8 by 128, as arguments come. On tpu7x XLA prefers 16 by 128 in
    # loops, and a decode loop would hold a second copy of all weights.
    "tpu": {"xla_tpu_control_large_2nd_minor_layout_for_x16": False}}


class CompileRecord(NamedTuple):
  """One compiled shape.

  Attributes:
    name: of its kind and size.
    secs: that tracing and compiling took.
    cached: the persistent cache had it.
    argument_bytes, temp_bytes: device memory while it runs: weights, KV pool and inputs, and all
      that it makes itself.
  """

  name: str
  secs: float
  cached: bool
  argument_bytes: int = 0
  temp_bytes: int = 0


class ShapeError(RuntimeError):
  """A step asked for a shape that was not compiled before the job began."""


class Steps:
  """The compiled steps of a job. Calling one never compiles: an unknown shape is an error."""

  def __init__(self, executables: Mapping[Any, Callable], records: Sequence[CompileRecord]):
    self._executables = dict(executables)
    self.records = tuple(records)

  def __getitem__(self, key: Any) -> Callable:
    """The executable of a bucket, or of "admit".

    Raises:
      ShapeError: it was not compiled.
    """
    if key not in self._executables:
      raise ShapeError(f"no step was compiled for {key}; compiled: {list(self._executables)}")
    return self._executables[key]


def make_state_fn(config: ModelConfig, engine: EngineConfig, num_pages: int, max_rows: int,
                  features: SamplingFeatures) -> Callable[[], step.EngineState]:
  """Makes an engine at rest on the device: an empty pool and empty slots."""
  return jax.jit(lambda: step.init_engine_state(
      init_kv_state(config, num_pages, engine.page_size, engine.kv_lanes), max_rows,
      config.vocab_size, features))


def compile_steps(module: Any, params: Any, state: step.EngineState, buckets: Sequence[Bucket],
                  features: SamplingFeatures, table: SamplingTable, stop_transitions: Any, *,
                  max_decode_steps: int, max_len: int,
                  compiler_options: dict[str, Any] | None = None) -> Steps:
  """Lowers every bucket, then compiles them in parallel threads.

  Args:
    module, features: see `step.mixed_step`.
    params, state, stop_transitions: as the steps will get them; shapes will do for the state, so
      that the compiler has the memory for itself while it tries out products.
    buckets: the shapes.
    table: whose rows give the shapes of sampling inputs.
    max_decode_steps: most iterations of a decode loop.
    max_len: longest prompt, for the penalties' token counts.
    compiler_options: of XLA; None takes those that serve the backend best.
  """
  if compiler_options is None:
    compiler_options = COMPILER_OPTIONS.get(jax.default_backend())
  mixed = jax.jit(functools.partial(step.mixed_step, module, features), donate_argnums=2)
  decode = jax.jit(functools.partial(step.decode_loop, module, features, max_decode_steps),
                   donate_argnums=2)
  jobs = {}
  for bucket in buckets:
    inputs = input_shapes(bucket, table, features)
    if bucket.kind == "mixed":
      jobs[bucket] = functools.partial(mixed.lower, params, stop_transitions, state, inputs)
    else:
      jobs[bucket] = functools.partial(decode.lower, params, stop_transitions, state, inputs,
                                       jax.ShapeDtypeStruct((), jnp.int32))
  if features.penalties:
    tokens = jax.ShapeDtypeStruct((max_len,), jnp.int32)
    jobs["admit"] = functools.partial(
        jax.jit(sampling.admit, donate_argnums=0).lower, state.penalties,
        jax.ShapeDtypeStruct((), jnp.int32), tokens, tokens)

  lowered = []
  for key, lower in jobs.items():  # one after the other: their order shows in the programs' text
    start = time.perf_counter()
    lowered.append((key, lower(), time.perf_counter() - start))
  with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
    built = dict(zip(jobs, pool.map(functools.partial(_build, compiler_options), lowered)))
  return Steps({key: executable for key, (executable, _) in built.items()},
               [record for _, record in built.values()])


def _build(options: dict[str, Any] | None, job: tuple[Bucket | str, jax.stages.Lowered, float]
           ) -> tuple[Callable, CompileRecord]:
  """Compiles one shape in this thread."""
  key, lowered, lower_secs = job
  thread, hits = threading.get_ident(), []

  def listen(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits" and threading.get_ident() == thread:
      hits.append(event)

  start = time.perf_counter()
  jax.monitoring.register_event_listener(listen)
  try:
    executable = lowered.compile(options)
  finally:
    jax.monitoring.unregister_event_listener(listen)
  memory = executable.memory_analysis()
  return executable, CompileRecord(
      _name(key), lower_secs + time.perf_counter() - start, bool(hits),
      memory.argument_size_in_bytes,
      memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes)


def _name(key: Bucket | str) -> str:
  return key if isinstance(key, str) else f"{key.kind} {key.num_tokens}"


def input_shapes(bucket: Bucket, table: SamplingTable, features: SamplingFeatures) -> StepInputs:
  """Shapes and types of what `pack` makes for a bucket."""
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  tokens, rows = ints(bucket.num_tokens), ints(bucket.num_rows)
  return StepInputs(
      tokens=tokens, positions=tokens, token_slots=tokens, write_slots=tokens,
      segments=Segments(*(ints(bucket.num_segments) for _ in Segments._fields)),
      page_indices=ints(bucket.num_page_indices), sample_tokens=rows, slots=rows,
      own_segments=rows, is_first=jax.ShapeDtypeStruct((bucket.num_rows,), jnp.bool_),
      stop_states=rows, num_generated=rows,
      sampling=jax.tree.map(
          lambda x: jax.ShapeDtypeStruct((bucket.num_rows, *x.shape[1:]), x.dtype), table.rows),
      next_tokens=tokens if features.prompt_logprobs else None)


def admission_inputs(admission: Admission, max_len: int) -> tuple[np.ndarray, ...]:
  """Arguments of the "admit" step behind the penalty state."""
  pad = lambda tokens: np.pad(tokens, (0, max_len - len(tokens)), constant_values=-1)
  return (np.int32(admission.slot), pad(admission.prompt_tokens.astype(np.int32)),
          pad(admission.output_tokens.astype(np.int32)))
