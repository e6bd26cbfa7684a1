"""Runs one workload through `generate`: how fast it went, against what the device can do."""

import collections
from collections.abc import Callable
import dataclasses
import gc
import json
import pathlib
import re
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from batchjax.config import EngineConfig, ModelConfig
from batchjax.engine.batch import Batch
from batchjax.engine.compile import CompileRecord
from batchjax.generate import chip_of, generate, StepEvent
from batchjax.plan.cost import Chip, step_cost
from batchjax.plan.planner import Plan
from batchjax.weights import Model
from batchjax.workloads import Workload

_TOP_KERNELS = 15
# Transfers run beside the kernels: they are no work of the device.
_TRANSFERS = ("MemcpyH2D", "MemcpyD2H")


class BenchError(RuntimeError):
  """The figures or the profile of a run would be wrong; the message says why."""


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
    elapsed_secs: from the first dispatch, everything being compiled, to the last completion.
    startup_secs: what came before: planning, the KV pool, compiling.
    compile_secs: summed over shapes, which compile in parallel.
    num_compiled, num_cached: shapes, and those that the persistent cache had.
    requests_per_sec, output_tokens_per_sec: by `elapsed_secs`.
    total_tokens_per_sec: output tokens, and every prompt once.
    output_tokens: tokens drawn.
    prompt_tokens_asked: every prompt once per sample.
    prompt_tokens_computed: recomputed ones included.
    prompt_tokens_optimal: every shared prefix once.
    steps: by kind, "mixed" and "decode".
    padding_waste: part of the launched tokens that is padding.
    host_share: part of `elapsed_secs` that the host spent planning, packing and taking in results.
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
  elapsed_secs: float
  startup_secs: float
  compile_secs: float
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
  secs: float
  floor_secs: float | None


def run(model: Model, workload: Workload, engine: EngineConfig, *, ceilings: Chip | None = None,
        on_step: Callable[[float], None] = lambda secs: None) -> Figures:
  """Completes a workload and collects the figures.

  Args:
    model: what runs.
    workload: what to complete.
    engine: how.
    ceilings: measured rates of the device; None leaves the floor out.
    on_step: called after every dispatch with the seconds since the engine started.

  Raises:
    ConfigError: as `generate`.
    BenchError: a request is missing or too short.
  """
  steps: list[_Step] = []
  windows: list[tuple[Plan, float, int]] = []  # with their begin and first step
  compiles: list[CompileRecord] = []

  def observe(event: Plan | CompileRecord | StepEvent) -> None:
    if isinstance(event, Plan):
      windows.append((event, time.perf_counter(), len(steps)))
    elif isinstance(event, CompileRecord):
      compiles.append(event)
    else:
      steps.append(_step(event, model.config, ceilings))
      on_step(time.perf_counter() - windows[0][1])

  gc.collect()  # nothing of an earlier run may hold device memory
  called = time.perf_counter()
  output_tokens = num_completed = 0
  for completion in generate(model, workload.requests, engine, observe=observe):
    num_completed += 1
    output_tokens += sum(len(choice.token_ids) for choice in completion.choices)
  begin = windows[0][1]
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
      elapsed_secs=elapsed, startup_secs=begin - called,
      compile_secs=sum(record.secs for record in compiles), num_compiled=len(compiles),
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
  batch, stats = event.batch, event.stats
  is_decode = batch.kind == "decode"
  return _Step(
      kind=batch.kind, num_steps=batch.num_steps, num_rows=len(batch.samples),
      useful_tokens=event.generated_tokens if is_decode else batch.num_tokens,
      launched_tokens=event.bucket.num_tokens * batch.num_steps,
      prompt_tokens=batch.num_prompt_tokens, generated_tokens=event.generated_tokens,
      used_pages=stats.used_pages, num_preempted=stats.num_preempted, host_secs=event.host_secs,
      secs=event.step_secs,
      floor_secs=None if ceilings is None else dispatch_floor_secs(batch, config, ceilings))


def _totals(steps: list[_Step]) -> StepTotals:
  floors = [s.floor_secs for s in steps]
  return StepTotals(len(steps), sum(s.num_steps for s in steps), sum(s.secs for s in steps),
                    None if None in floors else sum(floors))


def dispatch_floor_secs(batch: Batch, config: ModelConfig, chip: Chip) -> float:
  """Seconds below which no engine gets with this batch: its roofline, summed over iterations.

  No padding; KV of every segment is read once, and only visible (query, key) pairs count; sliding
  windows are taken as full attention. Rows of a decode loop leave at their `max_tokens`, whatever
  stopped them before.
  """
  column = lambda name: np.array([getattr(entry, name) for entry in batch.entries], np.int64)
  lens, nodes = column("num_tokens"), column("node")
  is_row = column("seq") >= 0
  kv_start, kv_len = column("kv_start"), np.where(is_row, column("kv_len"), 0)
  starts = np.append(0, np.cumsum(lens))
  which = np.repeat(np.arange(len(lens)), lens)
  positions = column("first_position")[which] + np.arange(starts[-1]) - starts[which]
  visible = np.zeros(len(positions), np.int64)  # KV tokens of shared nodes that each token sees
  first = starts[np.searchsorted(nodes, [s.node for s in batch.shared])]
  end = starts[np.searchsorted(nodes, [s.subtree_end for s in batch.shared])]
  for low, high, shared in zip(first, end, batch.shared):
    visible[low:high] += np.clip(positions[low:high] + 1 - shared.kv_start, 0, shared.kv_len)
  shared_len = np.array([s.kv_len for s in batch.shared], np.int64)
  left = np.full(len(lens), 1)
  if batch.kind == "decode":  # row r is token r
    left = np.array([s.row.max_tokens - s.num_generated for s in batch.samples])
  secs = 0.0
  for i in range(batch.num_steps):
    runs = left > i
    tokens = runs[which]
    before = np.append(0, np.cumsum(tokens))
    own = np.where(kv_len > 0, kv_len + i, 0)
    seen = np.clip(positions + 1 + i - kv_start[which], 0, own[which])
    secs += step_cost(
        config, chip, num_tokens=int(before[-1]),
        num_sampled=int(runs.sum()) if batch.kind == "decode" else len(batch.samples),
        kv_read_tokens=int(own[runs].sum() + shared_len[before[end] > before[first]].sum()),
        attn_pairs=int((seen + visible)[tokens].sum())).secs if before[-1] else 0.0
  return secs


def measure_ceilings(dtype: str) -> Chip:
  """What this device reaches: a large square product, and reading or copying a large array.

  Returns:
    Its chip with these rates in place of the data sheet's, and steps without overhead.
  """
  device = jax.devices()[0]
  size, num_bytes = (1024, 1 << 26) if device.platform == "cpu" else (8192, 1 << 31)
  keys = jax.random.split(jax.random.key(0), 3)
  draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
  a, b = (draw(key, (size, size), jnp.dtype(dtype)) for key in keys[:2])
  # A product per pass, each of the last one's result, so that none can be left out.
  gemm = 2 * size ** 3 / _secs(lambda x: (x @ b) * size ** -0.5, a)
  del a, b
  x = draw(keys[2], (num_bytes // jnp.dtype(dtype).itemsize // 4096, 4096), jnp.dtype(dtype))
  read = num_bytes / _secs(lambda x: jnp.max(x, axis=1), x, chained=False)
  copy = 2 * num_bytes / _secs(lambda x: -x, x)
  return dataclasses.replace(chip_of(device), bf16_flops=gemm, f32_flops=gemm,
                             hbm_bytes_per_sec=max(read, copy), step_overhead_secs=0.0)


def _secs(fn: Callable[[jax.Array], jax.Array], x: jax.Array, chained: bool = True) -> float:
  """Seconds of a call: the best of three runs of ten that follow one another on the device."""
  compiled, times = jax.jit(fn).lower(x).compile(), []
  jax.block_until_ready(compiled(x))
  for _ in range(3):
    start, y = time.perf_counter(), x
    for _ in range(10):
      y = compiled(y if chained else x)
    jax.block_until_ready(y)
    times.append((time.perf_counter() - start) / 10)
  return min(times)


class Tracer:
  """Traces a stretch of a run into a folder; give `on_step` to `run`, then `close`.

  Args:
    directory: of the trace; None traces nothing.
    after_secs: when it begins, in seconds since the engine started.
    secs: how long it lasts.
  """

  def __init__(self, directory: str | None, after_secs: float, secs: float):
    self._directory, self._begin, self._end = directory, after_secs, after_secs + secs
    self._state = "done" if directory is None else "waiting"

  def on_step(self, secs: float) -> None:
    """Begins or ends the trace when it is time."""
    if self._state == "waiting" and secs >= self._begin:
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # tracing Python slows the host loop down
      jax.profiler.start_trace(self._directory, profiler_options=options)
      self._state = "tracing"
    elif self._state == "tracing" and secs >= self._end:
      self.close()

  def close(self) -> None:
    """Ends the trace with the run.

    Raises:
      BenchError: the run was over before the trace began.
    """
    if self._state == "waiting":
      raise BenchError(f"the run ended before the trace began, {self._begin} s after its start: "
                       "let it begin earlier (--profile_after_secs), or make the workload larger")
    if self._state == "tracing":
      jax.profiler.stop_trace()
      self._state = "done"


@dataclasses.dataclass(frozen=True)
class Profile:
  """Where device time went.

  Attributes:
    window_secs: from the first to the last event of the device.
    idle_share: part of it in which no kernel ran.
    kernels: name to seconds, the largest first; numbers at the end of names are cut off, so that
      layers add up. Time inside nested events counts for the innermost.
  """

  window_secs: float
  idle_share: float
  kernels: dict[str, float]


def read_profile(directory: str) -> Profile:
  """Reads the newest trace in a folder.

  Raises:
    BenchError: there is none, or it holds no event of a device.
  """
  paths = sorted(pathlib.Path(directory).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
  if not paths:
    raise BenchError(f"no trace (*.xplane.pb) lies in {directory}")
  data = jax.profiler.ProfileData.from_file(str(paths[-1]))
  lines = list(_device_lines(data))
  secs: collections.Counter[str] = collections.Counter()
  for line in lines:
    open_events: list[tuple[str, float]] = []  # name and end of those that the next may lie in
    for begin, end, name in sorted(line, key=lambda event: (event[0], -event[1])):
      while open_events and open_events[-1][1] <= begin:
        open_events.pop()
      secs[name] += end - begin
      if open_events:
        secs[open_events[-1][0]] -= min(end, open_events[-1][1]) - begin
      open_events.append((name, end))
  events = np.array(sorted((begin, end) for line in lines for begin, end, _ in line))
  if not len(events):
    raise BenchError(f"{paths[-1]} holds no event of a device, only "
                     f"{[(p.name, [line.name for line in p.lines]) for p in data.planes]}")
  # A gap opens where an event begins after all earlier ones have ended.
  reached = np.maximum.accumulate(events[:, 1])
  gaps = np.maximum(events[1:, 0] - reached[:-1], 0).sum()
  window = reached[-1] - events[0, 0]
  return Profile(window, float(gaps / window), dict(secs.most_common(_TOP_KERNELS)))


def _device_lines(data: Any):
  """The (begin, end, name) in seconds of what ran on the first device, by stream or thread."""
  planes = {plane.name: plane for plane in data.planes}
  devices = sorted(name for name in planes if re.fullmatch(r"/device:(GPU|TPU):\d+", name))
  is_cpu = not devices
  plane = planes["/host:CPU" if is_cpu else devices[0]]
  for line in plane.lines:
    # A TPU has further lines that cover the same time; on the CPU, operations are among the
    # events of the worker threads.
    if not is_cpu and line.name != "XLA Ops" and not line.name.startswith("Stream"):
      continue
    yield [(event.start_ns * 1e-9, event.end_ns * 1e-9, re.sub(r"([._]\d+)+$", "", event.name))
           for event in line.events
           if event.name not in _TRANSFERS
           and (not is_cpu or any(key == "hlo_op" for key, _ in event.stats))]
