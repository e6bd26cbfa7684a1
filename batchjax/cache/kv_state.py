"""The KV pool on the device: one array of pages per layer."""

from typing import Any

import flax.struct
import jax.numpy as jnp

from batchjax.config import ModelConfig

# Logical axis names of a layer's pool (`sharding.spec_of`).
KV_AXES = ("pages", "kv_heads", "page", "kv_dim")


@flax.struct.dataclass
class KVState:
  """Keys and values of every cached token.

  The layers are separate arrays, not one stacked array, so that each layer's
  write updates its own donated buffer in place.

  Attributes:
    pages: for each layer [A, K, page_size, W]; keys (rotated) at [0, H) and values
      at [H, 2 * H) of the last axis, the rest of it unused.
  """

  pages: tuple[Any, ...]  # arrays, or what stands for them: shapes, shardings

  @property
  def page_size(self) -> int:
    """Tokens of a page."""
    return self.pages[0].shape[2]


def init_kv_state(config: ModelConfig, num_pages: int, page_size: int, lanes: int = 1) -> KVState:
  """An empty pool of `num_pages` pages of `page_size` tokens, in the model's dtype.

  The last axis fills whole `lanes` (`EngineConfig.kv_lanes`).

  >>> batchjax.init_kv_state(batchjax.SHAPES["tiny_llama"], num_pages=8, page_size=16).pages[0].shape
  (8, 2, 16, 16)
  """
  shape = (num_pages, config.num_kv_heads, page_size, config.kv_width(lanes))
  return KVState(tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)))
