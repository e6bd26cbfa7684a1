"""Every shape of a job, compiled before its first token."""

import concurrent.futures
import contextlib
import functools
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from batchjax.cache.kv_state import init_kv_state
from batchjax.config import EngineConfig, ModelConfig
from batchjax.engine import gpu_kernels, sampling, step, step_cache
from batchjax.engine.pack import ADMITTED_TOKENS
from batchjax.engine.sampling_inputs import SamplingFeatures, SamplingTable
from batchjax.plan.buckets import Bucket
from batchjax.sharding import devices_of, jit, make_mesh, spec_of, specs_of
from batchjax.types import SamplingInputs, Segments, StepInputs, StopTable
from batchjax.weights.tree import shapes_of


COMPILER_OPTIONS = {
    # A decode loop becomes one CUDA graph, its condition read on the device: with XLA's own choice
    # the host reads it after every step, and whoever dispatched the loop waits until it ends.
    "gpu": {"xla_gpu_enable_command_buffer":
            "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL",
            # Products by cuBLAS alone: trying out Triton's takes seconds of every compile, and on an H100
            # steps were slower with what it chose.
            "xla_gpu_enable_triton_gemm": False},
    # 16-bit arrays stay in tiles of 8 by 128, as arguments come. On tpu7x XLA prefers 16 by 128 in
    # loops, and a decode loop would hold a second copy of all weights.
    "tpu": {"xla_tpu_control_large_2nd_minor_layout_for_x16": False}}


class CompileRecord(NamedTuple):
  """One compiled shape.

  Attributes:
    name: of its kind and size.
    lower_secs: that tracing and lowering took.
    compile_secs: that compiling took.
    read_secs: that loading it from the cache folder took.
    cached: an earlier job had left it, in this process or in the cache folder.
    argument_bytes, temp_bytes: device memory while it runs: weights, KV pool and inputs, and all
      that it makes itself.
  """

  name: str
  lower_secs: float = 0.0
  compile_secs: float = 0.0
  read_secs: float = 0.0
  cached: bool = False
  argument_bytes: int = 0
  temp_bytes: int = 0

  @property
  def secs(self) -> float:
    """All that it took."""
    return self.lower_secs + self.compile_secs + self.read_secs


class Phase(NamedTuple):
  """What a job does from here on, before its first step; `num_steps` records of compiles follow."""

  name: str
  num_steps: int = 0


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
  """Makes an engine at rest on its devices: an empty pool and empty slots."""
  return functools.partial(_make_state, config.of_device(engine.mesh.tensor), engine.page_size,
                           engine.kv_lanes, num_pages, max_rows, features, make_mesh(engine.mesh))


@functools.partial(jax.jit, static_argnums=range(7))
def _make_state(config, page_size, kv_lanes, num_pages, max_rows, features, mesh):
  make = lambda: step.init_engine_state(
      init_kv_state(config, num_pages, page_size, kv_lanes), max_rows, config.vocab_size, features)
  if mesh is None:
    return make()
  return jax.shard_map(make, mesh=mesh, in_specs=(), check_vma=False,
                       out_specs=step.state_specs(config.num_layers, features))()


class StepCompiler:
  """Makes the compiled steps of one model and one kind of job, and takes up those that exist."""

  def __init__(self, module: Any, params: Any, features: SamplingFeatures,
               stop_table: StopTable | None, config: ModelConfig, engine: EngineConfig,
               device: jax.Device, compiler_options: dict[str, Any] | None = None):
    """Args:
      module, features: see `step.mixed_step`.
      params: as the steps will get them, or their shapes.
      stop_table: stop automata, None where no row has stop strings.
      config: shapes of the model.
      engine: page size, longest decode loop, mesh, and the folder that keeps steps for other processes.
      device: where they will run; without meaning on a mesh.
      compiler_options: of XLA; None takes those that serve the backend best.

    Raises:
      ConfigError: the cache folder cannot be trusted.
    """
    self._module, self._features, self._mesh = module, features, make_mesh(engine.mesh)
    self._devices = [device] if self._mesh is None else devices_of(self._mesh)
    device = self._devices[0]
    self._state_specs = step.state_specs(config.num_layers, features)
    self._params = shapes_of(params)
    self._transitions = shapes_of(None if stop_table is None else stop_table.transitions)
    self._sampling = SamplingTable(1, features, config.eos_token_ids).rows
    self._max_decode_steps = engine.max_decode_steps
    self._options = (COMPILER_OPTIONS.get(device.platform) if compiler_options is None
                     else compiler_options)
    self._folder = None
    if engine.compilation_cache_dir:
      self._folder = step_cache.StepFolder(engine.compilation_cache_dir,
                                           engine.compilation_cache_bytes)
    self._page = engine.page_size, engine.kv_lanes

  @functools.cached_property
  def base(self) -> str:
    """The part of the steps' keys that is not sizes."""
    return step_cache.base_key(
        self._module, self._devices[0], features=self._features, params=self._params,
        num_devices=len(self._devices), transitions=self._transitions,
        sampling=[x.shape[1:] for x in self._sampling],
        page=self._page, max_decode_steps=self._max_decode_steps,
        options=self._options)

  def available(self, num_pages: int) -> set[tuple[Bucket, int]]:
    """Shapes of this model and kind of job that need no compiling, with the slots of their state."""
    keys = step_cache.compiled_steps().keys()
    if self._folder is not None:
      keys += self._folder.keys()
    return {(key.bucket, key.num_slots) for key in keys
            if (key.base, key.num_pages) == (self.base, num_pages)}

  def compile(self, state: step.EngineState, buckets: Sequence[Bucket],
              observe: Callable[[Any], None] = lambda event: None) -> Steps:
    """All steps of a job.

    Shapes are looked up side by side. What is missing is lowered one after the other, since that
    is Python, while those lowered before compile in other threads, their kernels in threads of
    their own.

    Args:
      state: shapes of the state that the steps will get.
      buckets: the shapes.
      observe: is given each `Phase`, and each `CompileRecord` when it is there.
    """
    num_slots, num_pages = len(state.done), len(state.kv.pages[0])
    jobs = {bucket: (step_cache.StepKey(self.base, bucket, num_slots, num_pages),
                     functools.partial(self.lower, bucket, state)) for bucket in buckets}
    if self._features.penalties:
      shape = Bucket("admit", ADMITTED_TOKENS, num_slots, 0, 0)
      jobs["admit"] = (step_cache.StepKey(self.base, shape, num_slots, 0),
                       functools.partial(self._lower_admit, state))
    observe(Phase("looking up compiled steps", len(jobs)))
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
      found = dict(zip(jobs, pool.map(lambda job: self._find(job[0]), jobs.values())))
      for _, record in filter(None, found.values()):
        observe(record)
      if num_missing := list(found.values()).count(None):
        observe(Phase("compiling", num_missing))
      built, kernels = {}, {}
      for name, (key, lower) in jobs.items():
        if found[name] is None:
          start = time.perf_counter()
          with _uncollected():
            lowered = lower()
          for digest, kernel in gpu_kernels.kernels_of(lowered).items():
            if digest not in kernels:
              kernels[digest] = pool.submit(kernel.compile)
          built[name] = pool.submit(self._build, key, lowered, time.perf_counter() - start)
      for future in concurrent.futures.as_completed(built.values()):
        observe(future.result()[1])
      results = {name: found[name] or built[name].result() for name in jobs}
      for kernel in kernels.values():
        kernel.result()
    return Steps({name: executable for name, (executable, _) in results.items()},
                 [record for _, record in results.values()])

  def _find(self, key: step_cache.StepKey) -> tuple[Callable, CompileRecord] | None:
    start, memory = time.perf_counter(), step_cache.compiled_steps()
    if (known := memory.get(key)) is None and self._folder is not None:
      if (known := self._folder.get(key, self._devices)) is not None:
        memory.put(key, known)
    if known is None:
      return None
    return known.executable, CompileRecord(
        _name(key), read_secs=time.perf_counter() - start, cached=True,
        argument_bytes=known.argument_bytes, temp_bytes=known.temp_bytes)

  def _build(self, key: step_cache.StepKey, lowered: jax.stages.Lowered,
             lower_secs: float) -> tuple[Callable, CompileRecord]:
    start = time.perf_counter()
    executable = lowered.compile(self._options)
    compile_secs = time.perf_counter() - start
    memory = executable.memory_analysis()
    made = step_cache.CompiledStep(
        executable, memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes)
    step_cache.compiled_steps().put(key, made)
    if self._folder is not None:
      self._folder.put(key, made)
    return executable, CompileRecord(_name(key), lower_secs, compile_secs,
                                     argument_bytes=made.argument_bytes, temp_bytes=made.temp_bytes)

  def lower(self, bucket: Bucket, state: step.EngineState) -> jax.stages.Lowered:
    """The program of one shape.

    Args:
      bucket: the shape.
      state: shapes of the state.
    """
    inputs = input_shapes(bucket, self._sampling, self._features)
    if bucket.kind == "mixed":
      fn, count = functools.partial(step.mixed_step, self._module, self._features), ()
    else:
      fn = functools.partial(step.decode_loop, self._module, self._features, self._max_decode_steps)
      count = (jax.ShapeDtypeStruct((), jnp.int32),)
    whole = spec_of(())
    specs = specs_of(self._params, self._mesh), whole, self._state_specs, whole
    specs += (whole,) * len(count)
    return jit(fn, self._mesh, specs, (whole, self._state_specs), donate_argnums=2).lower(
        self._params, self._transitions, state, inputs, *count)

  def _lower_admit(self, state: step.EngineState) -> jax.stages.Lowered:
    array = lambda size, dtype: jax.ShapeDtypeStruct((size,), dtype)
    tokens = array(ADMITTED_TOKENS, jnp.int32)
    admit = functools.partial(sampling.admit, split=self._module.split)
    specs = self._state_specs.penalties, *(spec_of(()),) * 4
    return jit(admit, self._mesh, specs, specs[0], donate_argnums=0).lower(
        state.penalties, array(len(state.done), jnp.int32), tokens, tokens,
        array(ADMITTED_TOKENS, jnp.uint16))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
  """Python's garbage collector waits: tracing makes a million objects that live, and it would look at
  all of the process again and again."""
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()


def _name(key: step_cache.StepKey) -> str:
  kind, size = key.bucket[:2]
  return kind if kind == "admit" else f"{kind} {size}"


def input_shapes(bucket: Bucket, sampling_rows: SamplingInputs,
                 features: SamplingFeatures) -> StepInputs:
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
          lambda x: jax.ShapeDtypeStruct((bucket.num_rows, *x.shape[1:]), x.dtype), sampling_rows),
      next_tokens=tokens if features.prompt_logprobs else None)
