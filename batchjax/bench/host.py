"""Times the host's part of a workload alone: planning, forming steps, packing, taking results in."""

import collections
import dataclasses
import statistics
import time

from batchjax.bench.workloads import Workload
from batchjax.config import ConfigError, EngineConfig, ModelConfig
from batchjax.engine.pack import pack
from batchjax.engine.sampling_inputs import SamplingFeatures, SamplingTable
from batchjax.plan import planner, simulate
from batchjax.plan.cost import Chip


@dataclasses.dataclass(frozen=True)
class DispatchTimes:
  """Dispatches of one kind, and the medians over them.

  Attributes:
    count: dispatches.
    rows: that draw a token.
    next_batch_ms, pack_ms, retire_ms: CPU time; packing has the settings of admitted rows in it.
    total_ms: median of the sum.
  """

  count: int
  rows: float
  next_batch_ms: float
  pack_ms: float
  retire_ms: float
  total_ms: float


@dataclasses.dataclass(frozen=True)
class HostFigures:
  """CPU seconds of planning, and the times of dispatches by kind, "mixed" and "decode"."""

  plan_secs: float
  dispatches: dict[str, DispatchTimes]


def run(config: ModelConfig, workload: Workload, engine: EngineConfig, chip: Chip) -> HostFigures:
  """Plans a workload as one window and runs it with no device: every row draws token 0 to its end.

  Args:
    config: of the model.
    workload: what to complete.
    engine: how; without `num_pages` or `kv_memory_bytes` the KV pool has 1 GiB.
    chip: that the plan is for.

  Raises:
    ConfigError: a request can never fit.
  """
  requests, clock = workload.requests, time.process_time
  start = clock()
  plan = planner.make_plan(config, requests, engine, chip)
  plan_secs = clock() - start
  if plan.rejected:
    index, reason = next(iter(plan.rejected.items()))
    raise ConfigError(f"request {requests[index].request_id!r}: {reason}")
  features = SamplingFeatures.of((r.sampling_params for r in requests), config.eos_token_ids)
  max_rows = max(bucket.num_rows for bucket in plan.buckets)
  stop_table = workload.stop_table(config.vocab_size)
  table = SamplingTable(max_rows, features, config.eos_token_ids, stop_table)
  max_step_tokens = max(bucket.num_tokens for bucket in plan.buckets)
  scheduler = planner.make_scheduler(requests, plan, engine, min(max_rows, engine.max_rows),
                                     min(max_step_tokens, engine.max_step_tokens), stop_table)
  in_flight, times = collections.deque(), collections.defaultdict(list)
  while not scheduler.finished:
    start = clock()
    batch = scheduler.next_batch()
    formed = clock()
    if batch is not None:
      for admission in batch.admissions:
        table.set(admission.slot, admission.sampling_params, admission.sample_index)
      pack(batch, plan.bucket_for(batch.kind, batch.num_tokens), table,
           page_size=engine.page_size, prompt_logprobs=features.prompt_logprobs)
      in_flight.append((batch, formed - start, clock() - formed))
    if batch is None or len(in_flight) > engine.lookahead:
      batch, *secs = in_flight.popleft()
      outputs = simulate.outputs_of(batch, features.num_top_logprobs)
      if not features.logprobs:
        outputs = outputs._replace(logprobs=None, top_token_ids=None, top_logprobs=None)
      start = clock()
      scheduler.retire(batch, outputs)
      secs.append(clock() - start)
      times[batch.kind].append((batch.num_rows, *(1e3 * s for s in secs), 1e3 * sum(secs)))
  return HostFigures(plan_secs, {kind: DispatchTimes(len(rows), *map(statistics.median, zip(*rows)))
                                 for kind, rows in sorted(times.items())})
