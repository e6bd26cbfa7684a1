"""Requests in, completions out: the whole job, and its only host/device junction."""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from batchjax.config import ConfigError, EngineConfig, ModelConfig
from batchjax.engine import compile as compile_lib
from batchjax.engine import startup
from batchjax.engine.device import chip_of, memory_limit
from batchjax.engine.pack import pack, pack_admissions
from batchjax.engine.sampling_inputs import SamplingFeatures, SamplingTable
from batchjax.engine.step import EngineState
from batchjax.models import Transformer
from batchjax.plan import memory, planner
from batchjax.plan.batch import Batch
from batchjax.plan.buckets import Bucket
from batchjax.plan.cost import Chip
from batchjax.plan.outlook import Dispatch, Outlook
from batchjax.plan.requests import check_requests
from batchjax.sharding import make_mesh, replicated, resolve, Split
from batchjax.types import Completion, Request, StepOutputs, StopTable
from batchjax.weights import LoadingModel, Model
from batchjax.weights.layout import check_placed

LOADING = "loading the model"  # the phase in which nothing else is left to do


class StartEvent(NamedTuple):
  """What came before the first dispatch, in seconds of wall time.

  Attributes:
    plan_secs: reading the first window and planning it.
    compile_secs: having every step: looked up, or traced, lowered and compiled.
    warm_up_secs: making the KV pool and running every step once with nothing in it.
    step_secs: of one iteration of each decode loop, with nothing in it.
  """

  plan_secs: float
  compile_secs: float
  warm_up_secs: float
  step_secs: dict[Bucket, float]


class StepEvent(NamedTuple):
  """One dispatch whose results have come back, for metrics and progress.

  Attributes:
    batch, bucket: what ran, in which shape.
    num_finished: requests of the window completed with its results.
    generated_tokens: tokens that it drew.
    host_secs: planning, packing, sending the inputs and taking results in, while the device works.
    step_secs: since the results before these came back.
    launch_secs: handing the step to the runtime, which may wait there for the device.
    in_flight: what was dispatched after it.
    outlook: where the rows stand that have to be dispatched again; to be called while observing.
  """

  batch: Batch
  bucket: Bucket
  num_finished: int
  generated_tokens: int
  host_secs: float
  step_secs: float
  launch_secs: float
  in_flight: tuple[Dispatch, ...]
  outlook: Callable[[], Outlook]


def generate(model: Model | LoadingModel, requests: Iterable[Request], engine: EngineConfig = EngineConfig(), *,
             features: SamplingFeatures | None = None, tokenizer: Any = None,
             stop_table: StopTable | None = None,
             observe: Callable[[Any], None] = lambda event: None,
             module_class: Callable[..., Any] = Transformer,
             compiler_options: dict[str, Any] | None = None) -> Iterator[Completion]:
  """Completes requests, handing each out as soon as it is done.

  Args:
    model: configuration and parameters; steps compile while a `LoadingModel` loads.
    requests: read `engine.plan_window` at a time.
    engine: limits and sizes.
    features: what sampling has to do; found from the requests when None, which
      takes them all to be in the first window.
    tokenizer: builds the automata of the first window's stop strings (`Tokenizer.stop_table`);
      needed where requests have any and there is no `stop_table`.
    stop_table: automata of all stop strings, made before.
    observe: is given each `Phase` and `CompileRecord` of the start, the `StartEvent`, then the `Plan`
      of each window and every `StepEvent`.
    module_class: `module_class(config, page_size, attention, max_levels, split)` makes the module.
    compiler_options: of XLA; None takes those that serve the backend best.

  Yields:
    Completions in the order in which they finish.

  Raises:
    ConfigError: a request is not one of this model or can never fit, the engine's sizes do not fit
      together, a device has too little memory for them, or the model is laid out for another mesh.

  >>> params = batchjax.SamplingParams(temperature=0.0, max_tokens=8, stop=("a", "e"))
  >>> requests = [batchjax.Request(prompt, tokenizer.encode(prompt), params)
  ...             for prompt in ("The", "What is")]
  >>> for completion in batchjax.generate(model, requests, tokenizer=tokenizer):
  ...   text = tokenizer.decode(completion.choices[0].token_ids, is_continuation=True)
  >>> next(batchjax.generate(model, requests))
  Traceback (most recent call last):
  ...
  batchjax.config.ConfigError: request 'The': nothing finds its stop strings ['a', 'e'] in tokens: ...
  """
  called = time.perf_counter()
  observe(compile_lib.Phase("planning"))
  windows = _windows(requests, engine.plan_window)
  window, is_only_window = next(windows, ((), True))
  if not window:
    return
  device, config = jax.devices()[0], model.config
  chip, device_bytes = chip_of(device), memory_limit(device, model.shapes)
  engine = dataclasses.replace(engine, mesh=resolve(engine.mesh))
  engine = memory.settle(config, engine, chip, device_bytes)
  check_placed(model.shapes, engine.mesh)
  placement = replicated(make_mesh(engine.mesh))
  if features is None:
    features = SamplingFeatures.of((r.sampling_params for r in window), config.eos_token_ids)
  stops = dict.fromkeys(r.sampling_params.stop for r in window if r.sampling_params.stop)
  if stops and stop_table is None and tokenizer is not None:
    stop_table = tokenizer.stop_table(stops, config.vocab_size)
  compiler = compile_lib.StepCompiler(
      module_class(config.of_device(engine.mesh.tensor), engine.page_size, engine.attention,
                   engine.max_levels, Split.of(engine.mesh, config)),
      model.shapes, features, stop_table, config, engine, device, compiler_options)
  available = compiler.available(memory.num_kv_pages(config, engine))
  plan = _plan(config, window, engine, chip, available=available, is_only_window=is_only_window,
               stop_table=stop_table)
  buckets = plan.buckets
  max_rows = max(bucket.num_rows for bucket in buckets)
  table = SamplingTable(max_rows, features, config.eos_token_ids, stop_table)
  transitions = None if stop_table is None else jax.device_put(stop_table.transitions, placement)
  make_state = compile_lib.make_state_fn(config, engine, plan.num_pages, max_rows, features)
  planned = time.perf_counter()
  steps = compiler.compile(jax.eval_shape(make_state), buckets, observe)
  compiled = time.perf_counter()
  startup.check_memory(steps.records, device_bytes)
  observe(compile_lib.Phase(LOADING))
  params, loaded = model.params, time.perf_counter()
  observe(compile_lib.Phase("warming up"))
  state, step_secs = startup.warm_up(steps, buckets, params, transitions, make_state(), table,
                                     engine.page_size, features, placement)
  observe(StartEvent(planned - called, compiled - planned, time.perf_counter() - loaded,
                     step_secs))

  def dispatch(batch: Batch, state: EngineState) -> tuple[Bucket, float, StepOutputs, EngineState]:
    """Sends a batch to the device; also returns the seconds of handing it over."""
    for admission in batch.admissions:
      table.set(admission.slot, admission.sampling_params, admission.sample_index)
    for known in pack_admissions(batch.admissions, max_rows) if features.penalties else ():
      known = jax.device_put(known, placement)
      state = state.replace(penalties=steps["admit"](state.penalties, *known))
    bucket = planner.pick_bucket(buckets, batch.kind, batch.num_tokens)
    inputs = pack(batch, bucket, table, page_size=engine.page_size,
                  prompt_logprobs=features.prompt_logprobs)
    count = (np.int32(batch.num_steps),) if batch.kind == "decode" else ()
    arguments = jax.device_put((inputs, *count), placement)
    start = time.perf_counter()
    results = steps[bucket](params, transitions, state, *arguments)
    return bucket, time.perf_counter() - start, *results

  while window:
    observe(plan)
    scheduler = planner.make_scheduler(
        window, plan, engine, min(max_rows, engine.max_rows),
        min(max(bucket.num_tokens for bucket in buckets), engine.max_step_tokens), stop_table)
    in_flight: collections.deque = collections.deque()
    last_read = time.perf_counter()
    while not scheduler.finished:
      completions = []
      with jax.transfer_guard("disallow"):  # every crossing is one of the explicit ones here
        start = time.perf_counter()
        batch = scheduler.next_batch()
        if batch is not None:
          bucket, launch_secs, outputs, state = dispatch(batch, state)
          host_secs = time.perf_counter() - start - launch_secs
          in_flight.append((batch, bucket, outputs, host_secs, launch_secs))
        if batch is None and not in_flight:
          raise RuntimeError(f"the scheduler has nothing to run and nothing to wait for: "
                             f"{scheduler.stats}")
        if batch is None or len(in_flight) > engine.lookahead:
          batch, bucket, outputs, host_secs, launch_secs = in_flight.popleft()
          outputs = jax.device_get(outputs)
          start = time.perf_counter()
          completions = scheduler.retire(batch, outputs)
          now = time.perf_counter()
          observe(StepEvent(
              batch, bucket, scheduler.num_finished, int((outputs.tokens >= 0).sum()),
              host_secs + now - start, now - last_read, launch_secs,
              tuple(Dispatch(b.kind, b.num_tokens, b.num_steps) for b, *_ in in_flight),
              scheduler.outlook))
          last_read = now
      yield from completions
    window, is_only_window = next(windows, ((), True))
    if window:
      plan = _plan(config, window, engine, chip, buckets=buckets, is_only_window=is_only_window,
                   stop_table=stop_table)


def _windows(requests: Iterable[Request], size: int) -> Iterator[tuple[list[Request], bool]]:
  """Requests `size` at a time, each with whether it is the only window."""
  source = iter(requests)
  window, is_first = list(itertools.islice(source, size)), True
  while window:
    following = list(itertools.islice(source, size)) if len(window) == size else []
    yield window, is_first and not following
    window, is_first = following, False


def _plan(config: ModelConfig, window: list[Request], engine: EngineConfig, chip: Chip,
          stop_table: StopTable | None, **options: Any) -> planner.Plan:
  check_requests(window, config, stop_table)
  plan = planner.make_plan(config, window, engine, chip, stop_table=stop_table, **options)
  if plan.rejected:
    index, reason = next(iter(plan.rejected.items()))
    raise ConfigError(f"request {window[index].request_id!r}: {reason}")
  return plan
