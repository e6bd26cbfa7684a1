"""Between compiling and the first token: does it fit the device, and are the kernels loaded."""

from collections.abc import Sequence
import sys
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
            features: SamplingFeatures,
            placement: jax.sharding.Sharding | None = None) -> EngineState:
  """Runs every shape once with nothing in it: accelerators load kernels when they first run.

  Returns:
    The state, as it was; CPUs have nothing to load.
  """
  for bucket in buckets if jax.default_backend() != "cpu" else ():
    inputs = pack(Batch.empty(bucket.kind), bucket, table, page_size=page_size,
                  prompt_logprobs=features.prompt_logprobs)
    count = (np.int32(1),) if bucket.kind == "decode" else ()
    arguments = jax.device_put((inputs, *count), placement)
    _, state = steps[bucket](params, stop_transitions, state, *arguments)
  return jax.block_until_ready(state)
