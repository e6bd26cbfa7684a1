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
