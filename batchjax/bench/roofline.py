"""What a device can do, and the seconds below which no engine gets with a batch."""

from collections.abc import Callable
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from batchjax.config import ModelConfig
from batchjax.engine.device import chip_of
from batchjax.plan.batch import Batch
from batchjax.plan.cost import Chip, step_cost


def dispatch_floor_secs(batch: Batch, config: ModelConfig, chip: Chip) -> float:
  """Seconds below which no engine gets with this batch: its roofline, summed over iterations.

  No padding; logits of tokens that draw or are scored; KV of every segment is read once, and only
  visible (query, key) pairs count; sliding windows are taken as full attention. Rows of a decode loop leave at their `max_tokens`, whatever
  stopped them before.
  """
  entries, shared, starts = batch.entries, batch.shared, batch.entries.offsets
  kv_len = np.where(entries.seq >= 0, entries.kv_len, 0)
  which = np.repeat(np.arange(len(kv_len)), entries.num_tokens)
  positions = entries.first_position[which] + np.arange(starts[-1]) - starts[which]
  visible = np.zeros(len(positions), np.int64)  # KV tokens of shared nodes that each token sees
  first, end = starts[shared.first_entry], starts[shared.end_entry]
  for low, high, kv_start, shared_len in zip(first, end, shared.kv_start, shared.kv_len):
    visible[low:high] += np.clip(positions[low:high] + 1 - kv_start, 0, shared_len)
  left = np.ones(len(kv_len), np.int64)
  if batch.kind == "decode":  # row r is token r
    left = batch.samples.max_tokens - batch.samples.num_generated
  scored = sum(len(score.next_tokens) for score in batch.prompt_scores)
  secs = 0.0
  for i in range(batch.num_steps):
    runs = left > i
    tokens = runs[which]
    before = np.append(0, np.cumsum(tokens))
    own = np.where(kv_len > 0, kv_len + i, 0)
    seen = np.clip(positions + 1 + i - entries.kv_start[which], 0, own[which])
    secs += step_cost(
        config, chip, num_tokens=int(before[-1]),
        num_sampled=int(runs.sum()) if batch.kind == "decode" else batch.num_rows + scored,
        kv_read_tokens=int(own[runs].sum() + shared.kv_len[before[end] > before[first]].sum()),
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
