"""What a job needs of device memory, and which requests can never fit."""

import dataclasses

from jaxtyping import Int
import numpy as np

from batchjax.cache.page_table import pages_for
from batchjax.config import ConfigError, EngineConfig, ModelConfig
from batchjax.plan.cost import Chip
from batchjax.plan.prefix_tree import PrefixTree

# Float32 arrays [max_rows, vocab_size] alive at once while a step samples: the
# logits, the processed copy, and what a sort or a log-softmax makes of it.
_LOGITS_COPIES = 3
# The KV pool where nobody says how large it may be, nor the device how much memory it has.
_DEFAULT_KV_BYTES = 1 << 30
# Part of an accelerator's memory that JAX gets; the rest is the driver's and its libraries'.
DEVICE_SHARE = 0.95
# An automatic pool has a multiple of this many pages, and of a 64th of the next power of two: else a
# few bytes more in use somewhere would change every shape, and none that was compiled before be of use.
_PAGE_MULTIPLE = 32
# Part of that which an automatic pool leaves alone: what the estimate does not see, and the
# allocator's own losses.
_SLACK = 0.02


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
  """Memory that a running job takes of each device, in bytes.

  Attributes:
    weight_bytes: parameters, norms left out.
    kv_bytes: the page pool.
    logits_bytes: float32 logits of `max_rows` rows and the copies that sampling makes.
    activation_bytes: the widest layer's values for `max_step_tokens` tokens.
  """

  weight_bytes: int
  kv_bytes: int
  logits_bytes: int
  activation_bytes: int

  @property
  def total_bytes(self) -> int:
    """Everything."""
    return self.weight_bytes + self.kv_bytes + self.logits_bytes + self.activation_bytes


def estimate_memory(model: ModelConfig, engine: EngineConfig) -> MemoryEstimate:
  """An estimate before anything is compiled; the compiler's own figure is exact."""
  page_bytes, num_pages = _page_bytes(model, engine), num_kv_pages(model, engine)
  model = model.of_device(engine.mesh.tensor)
  itemsize = 4 if model.dtype == "float32" else 2
  attention = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
  # Residual stream and its norm, beside the wider of attention (q, k, v, out) and feed-forward.
  widest = 2 * model.hidden_size + max(attention + model.num_heads * model.head_dim,
                                       3 * model.ffn_size)
  return MemoryEstimate(
      weight_bytes=model.num_params * itemsize,
      kv_bytes=num_pages * page_bytes,
      logits_bytes=_LOGITS_COPIES * engine.max_rows * model.vocab_size * 4,
      activation_bytes=engine.max_step_tokens * widest * itemsize,
  )


def _page_bytes(model: ModelConfig, engine: EngineConfig) -> int:
  """Of a page, on each device."""
  return engine.page_size * model.of_device(engine.mesh.tensor).kv_bytes_per_token(engine.kv_lanes)


def settle(model: ModelConfig, engine: EngineConfig, chip: Chip,
           device_bytes: int | None) -> EngineConfig:
  """The engine with its KV pool settled: as wide as the chip likes it, and its size.

  Args:
    model: shapes of the model.
    engine: keeps the size that it names, if any; else the pool is to take what is left.
    chip: where it will run.
    device_bytes: memory that JAX may take on the device; None where the device does not say.

  Raises:
    ConfigError: weights and steps leave no memory, or the model does not divide over the mesh.
  """
  model.of_device(engine.mesh.tensor)
  engine = dataclasses.replace(engine, kv_lanes=max(engine.kv_lanes, chip.lanes))
  if engine.num_pages or engine.kv_memory_bytes or device_bytes is None:
    return engine
  needed = estimate_memory(model, dataclasses.replace(engine, num_pages=1))
  left = int(device_bytes * (1 - _SLACK)) - needed.total_bytes
  num_pages = left // _page_bytes(model, engine)
  num_pages -= num_pages % max(_PAGE_MULTIPLE, 1 << max(0, num_pages.bit_length() - 6))
  if num_pages <= 0:
    gib = lambda num_bytes: f"{num_bytes / 2**30:.2f} GiB"
    raise ConfigError(
        f"no memory is left for the KV pool: of {gib(device_bytes)}, weights take "
        f"{gib(needed.weight_bytes)}, the largest step {gib(needed.logits_bytes)} for logits and "
        f"{gib(needed.activation_bytes)} for activations: lower engine.max_rows or "
        "engine.max_step_tokens, or take a smaller model.dtype")
  return dataclasses.replace(engine, num_pages=num_pages)


def num_kv_pages(model: ModelConfig, engine: EngineConfig) -> int:
  """Pages of the KV pool: `num_pages`, or as many as `kv_memory_bytes` or else 1 GiB hold.

  Raises:
    ConfigError: the bytes hold no page.
  """
  if engine.num_pages > 0:
    return engine.num_pages
  page_bytes = _page_bytes(model, engine)
  kv_bytes = engine.kv_memory_bytes or _DEFAULT_KV_BYTES
  num_pages = kv_bytes // page_bytes
  if num_pages == 0:
    raise ConfigError(f"engine.kv_memory_bytes={kv_bytes} holds no page of "
                      f"{page_bytes} bytes ({engine.page_size} tokens): raise it, or lower "
                      "engine.page_size")
  return num_pages


def pages_alone(tree: PrefixTree, max_tokens: Int[np.ndarray, "requests"],
                page_size: int) -> Int[np.ndarray, "requests"]:
  """Pages that each request needs with nothing else running, one sample at a time.

  They are those of every node on its path, the run of one row grown by `max_tokens`.
  """
  length = tree.length.astype(np.int64)
  pages = pages_for(length, page_size)
  node = tree.node_of_request
  own_len = np.where(tree.num_rows[node] == 1, length[node], 0)
  own_pages = pages_for(own_len + max_tokens, page_size) - pages_for(own_len, page_size)
  return tree.path_sum(pages)[node] + own_pages


def check_fits(tree: PrefixTree, max_tokens: Int[np.ndarray, "requests"], num_pages: int,
               page_size: int) -> dict[int, str]:
  """The requests that could not run even alone, each with its error message.

  Returns:
    {request: message} in ascending order; empty when every request fits.
  """
  needed = pages_alone(tree, max_tokens, page_size)
  prompt_lens = tree.end[tree.node_of_request]
  return {
      int(i): f"{prompt_lens[i]} prompt tokens and max_tokens={max_tokens[i]} need {needed[i]} KV "
              f"pages of {page_size} tokens, the pool has {num_pages}: lower max_tokens, shorten "
              "the prompt, or raise engine.kv_memory_bytes or engine.num_pages"
      for i in np.flatnonzero(needed > num_pages)
  }
