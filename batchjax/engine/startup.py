"""Between compiling and the first token: does it fit the device, and are the kernels loaded."""

from collections.abc import Sequence
import sys
import time
from typing import Any

import jax
import numpy as np

from batchjax.config import ConfigError
from batchjax.engine.compile import CompileRecord, Steps
from batchjax.engine.pack import pack
from batchjax.engine.sampling_inputs import SamplingFeatures, SamplingTable
from batchjax.engine.step import EngineState
from batchjax.plan.batch import Batch
from batchjax.plan.buckets import Bucket


def check_memory(records: Sequence[CompileRecord], device_bytes: int | None) -> None:
  """Raises ConfigError where a step and its arguments are larger than the device's memory."""
  largest = max(records, key=lambda record: record.argument_bytes + record.temp_bytes)
  over = largest.argument_bytes + largest.temp_bytes - (device_bytes or sys.maxsize)
  if over > 0:
    gib = lambda num_bytes: f"{num_bytes / 2**30:.2f} GiB"
    raise ConfigError(
        f"the step {largest.name!r} needs {gib(largest.argument_bytes)} for weights, KV pool and "
        f"inputs and {gib(largest.temp_bytes)} for what it computes, {gib(over)} more than the "
        f"{gib(device_bytes)} of the device: lower engine.kv_memory_bytes or engine.num_pages, "
        "or engine.max_step_tokens and engine.max_rows")


def warm_up(steps: Steps, buckets: Sequence[Bucket], params: Any, stop_transitions: Any,
            state: EngineState, table: SamplingTable, page_size: int,
            features: SamplingFeatures, placement: jax.sharding.Sharding | None = None
            ) -> tuple[EngineState, dict[Bucket, float]]:
  """Runs every shape once with nothing in it: accelerators load kernels when they first run.

  CPUs have nothing to load, and run decode loops alone, for their times.

  Returns:
    The state, as it was, and the seconds of one iteration of each decode loop, run once more: no
    roofline foretells them as well, and the first of them comes late in a job.
  """
  secs = {}
  for bucket in buckets:
    is_decode = bucket.kind == "decode"
    inputs = pack(Batch.empty(bucket.kind), bucket, table, page_size=page_size,
                  prompt_logprobs=features.prompt_logprobs)
    arguments = (inputs, np.int32(1)) if is_decode else (inputs,)
    for _ in range(2 if is_decode else jax.default_backend() != "cpu"):
      sent = jax.block_until_ready(jax.device_put(arguments, placement))
      start = time.perf_counter()
      _, state = steps[bucket](params, stop_transitions, state, *sent)
      if is_decode:
        jax.block_until_ready(state)
        secs[bucket] = time.perf_counter() - start
  return jax.block_until_ready(state), secs
