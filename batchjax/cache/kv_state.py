"""The KV pool on the device: one array of pages per layer."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from batchjax.config import ModelConfig

# Logical axis names of a layer's pool, for the sharding rules.
KV_AXES = ("pages", "kv_heads", "page", "kv_dim")


@flax.struct.dataclass
class KVState:
  """Keys and values of every cached token.

  The layers are separate arrays, not one stacked array, so that each layer's
  write updates its own donated buffer in place.

  Attributes:
    pages: for each layer [A, K, page_size, 2 * H]; keys (rotated) in the lower
      and values in the upper half of the last axis.
  """

  pages: tuple[Any, ...]  # arrays, or what stands for them: shapes, shardings

  @property
  def page_size(self) -> int:
    """Tokens of a page."""
    return self.pages[0].shape[2]


def init_kv_state(config: ModelConfig, num_pages: int, page_size: int) -> KVState:
  """An empty pool of `num_pages` pages of `page_size` tokens, in the model's dtype."""
  shape = (num_pages, config.num_kv_heads, page_size, 2 * config.head_dim)
  return KVState(tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)))


def write_kv(kv_pages: Float[Array, "A K page kv_dim"], k: Float[Array, "T K H"],
             v: Float[Array, "T K H"],
             write_slots: Int[Array, "T"]) -> Float[Array, "A K page kv_dim"]:
  """Writes the keys and values of a step into one layer's pool.

  In place when `kv_pages` is donated.

  Args:
    kv_pages: the pool.
    k: rotated keys.
    v: values.
    write_slots: page * page_size + offset of each token; -1 drops it. Slots
      other than -1 differ from one another.
  """
  num_pages, _, page_size, _ = kv_pages.shape
  # Dropped tokens point behind the pool, each at a page of its own: the indices
  # are then unique, which spares the scatter its atomics on GPU.
  behind = num_pages + jnp.arange(write_slots.shape[0], dtype=jnp.int32)
  page = jnp.where(write_slots < 0, behind, write_slots // page_size)
  with jax.named_scope("write_kv"):
    kv = jnp.concatenate([k, v], axis=-1).astype(kv_pages.dtype)
    return kv_pages.at[page, :, write_slots % page_size].set(
        kv, mode="drop", unique_indices=True)
