"""Runs one workload through `generate`: how fast it went, against what the device can do."""

from collections.abc import Callable
import dataclasses
import gc
import json
import statistics
import time
from typing import Any, NamedTuple

import jax

from batchjax.bench.roofline import dispatch_floor_secs
from batchjax.bench.workloads import Workload
from batchjax.config import EngineConfig, ModelConfig
from batchjax.engine.compile import CompileRecord, Phase
from batchjax.generation import generate, StartEvent, StepEvent
from batchjax.plan.cost import Chip
from batchjax.plan.planner import Plan
from batchjax.weights import Model


class BenchError(RuntimeError):
  """The figures of a run would be wrong; the message says why."""


@dataclasses.dataclass(frozen=True)
class StepTotals:
  """Dispatches of one kind: how many, their iterations, seconds, and floor if asked for."""

  dispatches: int
  steps: int
  secs: float
  floor_secs: float | None


@dataclasses.dataclass(frozen=True)
class Figures:
  """What a run did and how fast. Seconds are wall time.

  Attributes:
    device, jax_version: where it ran.
    total_secs: from the call of `generate` to the last completion.
    elapsed_secs: the part from the first dispatch on, everything being compiled.
    startup_secs: the part before it: `plan_secs` of planning, `compile_secs` of having the steps, and
      `warm_up_secs` of making the KV pool and loading kernels.
    lower_secs: of `compile_secs`, tracing and lowering.
    read_secs: of `compile_secs`, reading the step that took longest from disk.
    num_compiled, num_cached: shapes, and those that an earlier job had left.
    requests_per_sec, output_tokens_per_sec: by `elapsed_secs`.
    total_tokens_per_sec: output tokens, and every prompt once.
    output_tokens: tokens drawn.
    prompt_tokens_asked: every prompt once per sample.
    prompt_tokens_computed: recomputed ones included.
    prompt_tokens_optimal: every shared prefix once.
    steps: by kind, "mixed" and "decode".
    padding_waste: part of the launched tokens that is padding.
    host_share: part of `elapsed_secs` that the host spent planning, packing and taking in results.
    launch_share: part that it spent in calls that hand steps to the runtime, waits for the device among it.
    kv_peak_use: largest part of the pool in use.
    num_preempted: rows preempted.
    decode_rows: rows of the fullest decode loop.
    decode_ms_per_step: median over such loops; None without a decode loop.
    decode_floor_ms: the same by the roofline.
    peak_memory_bytes, memory_limit_bytes: of the device, in this process so far; None where the
      backend does not say.
    gemm_flops, stream_bytes_per_sec: measured ceilings, None where not asked for.
    floor_secs: sum over dispatches of `dispatch_floor_secs` at these ceilings.
    share_of_floor: floor_secs / elapsed_secs; 1 would be perfect.
  """

  device: str
  jax_version: str
  total_secs: float
  elapsed_secs: float
  startup_secs: float
  plan_secs: float
  compile_secs: float
  lower_secs: float
  read_secs: float
  warm_up_secs: float
  num_compiled: int
  num_cached: int
  num_requests: int
  requests_per_sec: float
  output_tokens_per_sec: float
  total_tokens_per_sec: float
  output_tokens: int
  prompt_tokens_asked: int
  prompt_tokens_computed: int
  prompt_tokens_optimal: int
  steps: dict[str, StepTotals]
  padding_waste: float
  host_share: float
  launch_share: float
  kv_peak_use: float
  num_preempted: int
  decode_rows: int
  decode_ms_per_step: float | None
  decode_floor_ms: float | None
  peak_memory_bytes: int | None
  memory_limit_bytes: int | None
  gemm_flops: float | None
  stream_bytes_per_sec: float | None
  floor_secs: float | None
  share_of_floor: float | None


class _Step(NamedTuple):
  """What is kept of a StepEvent: holding on to its batch would slow the run down."""

  kind: str
  num_steps: int
  num_rows: int
  useful_tokens: int
  launched_tokens: int
  prompt_tokens: int
  generated_tokens: int
  used_pages: int
  num_preempted: int
  host_secs: float
  launch_secs: float
  secs: float
  floor_secs: float | None


def run(model: Model, workload: Workload, engine: EngineConfig, *, ceilings: Chip | None = None,
        on_step: Callable[[float], None] = lambda secs: None, traceable: bool = False) -> Figures:
  """Completes a workload and collects the figures.

  Args:
    model: what runs.
    workload: what to complete.
    engine: how.
    ceilings: measured rates of the device; None leaves the floor out.
    on_step: called after every dispatch with the seconds since the engine started.
    traceable: keep kernels visible in a trace, at the cost of a gap before every decode step: a
      GPU shows none of those inside a graph's loop.

  Raises:
    ConfigError: as `generate`.
    BenchError: a request is missing or too short.
  """
  steps: list[_Step] = []
  windows: list[tuple[Plan, float, int]] = []  # with their begin and first step
  compiles: list[CompileRecord] = []

  starts: list[StartEvent] = []

  def observe(event: Plan | Phase | CompileRecord | StartEvent | StepEvent) -> None:
    if isinstance(event, StartEvent):
      starts.append(event)
    elif isinstance(event, Plan):
      windows.append((event, time.perf_counter(), len(steps)))
    elif isinstance(event, CompileRecord):
      compiles.append(event)
    elif isinstance(event, StepEvent):
      steps.append(_step(event, model.config, ceilings))
      on_step(time.perf_counter() - windows[0][1])

  gc.collect()  # nothing of an earlier run may hold device memory
  output_tokens = num_completed = 0
  options = {} if traceable else None
  stop_table = workload.stop_table(model.config.vocab_size)
  called = time.perf_counter()
  for completion in generate(model, workload.requests, engine, observe=observe,
                             stop_table=stop_table, compiler_options=options):
    num_completed += 1
    output_tokens += sum(len(choice.token_ids) for choice in completion.choices)
  (start,), begin = starts, windows[0][1]
  elapsed = time.perf_counter() - begin
  if (num_completed, output_tokens) != (len(workload.requests), workload.output_tokens):
    raise BenchError(f"{num_completed} requests with {output_tokens} tokens came back, asked "
                     f"were {len(workload.requests)} with {workload.output_tokens}")

  fullest = [s for s in steps if s.kind == "decode"]
  decode_rows = max((s.num_rows for s in fullest), default=0)
  fullest = [s for s in fullest if s.num_rows == decode_rows]
  per_step = lambda values: statistics.median(1e3 * value / s.num_steps
                                              for s, value in zip(fullest, values, strict=True))
  floor = None if ceilings is None else sum(s.floor_secs for s in steps)
  memory = jax.devices()[0].memory_stats() or {}
  last_of_window = [first - 1 for *_, first in windows[1:]] + [len(steps) - 1]
  return Figures(
      device=jax.devices()[0].device_kind, jax_version=jax.__version__,
      total_secs=begin + elapsed - called, elapsed_secs=elapsed, startup_secs=begin - called,
      plan_secs=start.plan_secs, compile_secs=start.compile_secs, warm_up_secs=start.warm_up_secs,
      lower_secs=sum(record.lower_secs for record in compiles),
      read_secs=max(record.read_secs for record in compiles), num_compiled=len(compiles),
      num_cached=sum(record.cached for record in compiles),
      num_requests=num_completed, requests_per_sec=num_completed / elapsed,
      output_tokens_per_sec=output_tokens / elapsed,
      total_tokens_per_sec=(workload.prompt_tokens + output_tokens) / elapsed,
      output_tokens=output_tokens, prompt_tokens_asked=workload.prompt_tokens_asked,
      prompt_tokens_computed=sum(s.prompt_tokens for s in steps),
      prompt_tokens_optimal=workload.prompt_tokens_optimal,
      steps={kind: _totals([s for s in steps if s.kind == kind]) for kind in ("mixed", "decode")},
      padding_waste=1 - sum(s.useful_tokens for s in steps) / sum(s.launched_tokens for s in steps),
      host_share=sum(s.host_secs for s in steps) / elapsed,
      launch_share=sum(s.launch_secs for s in steps) / elapsed,
      kv_peak_use=max(s.used_pages for s in steps) / windows[0][0].num_pages,
      num_preempted=sum(steps[i].num_preempted for i in last_of_window),
      decode_rows=decode_rows,
      decode_ms_per_step=per_step([s.secs for s in fullest]) if fullest else None,
      decode_floor_ms=(per_step([s.floor_secs for s in fullest])
                       if fullest and ceilings is not None else None),
      peak_memory_bytes=memory.get("peak_bytes_in_use"),
      memory_limit_bytes=memory.get("bytes_limit"),
      gemm_flops=None if ceilings is None else ceilings.bf16_flops,
      stream_bytes_per_sec=None if ceilings is None else ceilings.hbm_bytes_per_sec,
      floor_secs=floor, share_of_floor=None if floor is None else floor / elapsed)


def to_json(values: dict[str, Any]) -> str:
  """One line of JSON, five digits of each number."""
  return json.dumps(json.loads(json.dumps(values), parse_float=lambda x: float(f"{float(x):.5g}")))


def _step(event: StepEvent, config: ModelConfig, ceilings: Chip | None) -> _Step:
  batch, stats = event.batch, event.batch.stats
  is_decode = batch.kind == "decode"
  return _Step(
      kind=batch.kind, num_steps=batch.num_steps, num_rows=batch.num_rows,
      useful_tokens=event.generated_tokens if is_decode else batch.num_tokens,
      launched_tokens=event.bucket.num_tokens * batch.num_steps,
      prompt_tokens=batch.num_prompt_tokens, generated_tokens=event.generated_tokens,
      used_pages=stats.used_pages, num_preempted=stats.num_preempted, host_secs=event.host_secs,
      launch_secs=event.launch_secs,
      secs=event.step_secs,
      floor_secs=None if ceilings is None else dispatch_floor_secs(batch, config, ceilings))


def _totals(steps: list[_Step]) -> StepTotals:
  floors = [s.floor_secs for s in steps]
  return StepTotals(len(steps), sum(s.num_steps for s in steps), sum(s.secs for s in steps),
                    None if None in floors else sum(floors))
