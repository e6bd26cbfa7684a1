"""A model whose next token is a hash of the row's whole prefix, read back through the page table.

It has the interface of `models.Transformer`. Each token's id and position are
written into the KV pool as its key and value; attention is a sum of hashes over
all KV that a token's segments show. Any mix-up of page, row, position or slot
changes the text, and the engine's tests need no weights.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batchjax.cache.kv_state import KVState
from batchjax.config import ModelConfig
from batchjax.sharding import Split
from batchjax.types import Segments, StepInputs

_MIX = np.uint32(0x9E3779B1)


def fake_config(vocab_size: int = 97, max_len: int = 4096,
                eos: tuple[int, ...] = ()) -> ModelConfig:
  """The shape of the fake model: one layer, one KV head; query heads are there to be divided."""
  return ModelConfig(family="fake", vocab_size=vocab_size, hidden_size=1, ffn_size=1, num_layers=1,
                     num_heads=8, num_kv_heads=1, head_dim=1, max_len=max_len, eos_token_ids=eos)


def mix(token: Any, position: Any) -> Any:
  """A 32-bit hash of each (token, position) pair; works on jax and numpy arrays."""
  x = (token.astype("uint32") + np.uint32(1)) * _MIX
  x = x ^ position.astype("uint32") * np.uint32(0x85EBCA6B)  # not in place: shapes broadcast
  x = (x ^ (x >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
  x = (x ^ (x >> np.uint32(12))) * np.uint32(0x297A2D39)
  return x ^ (x >> np.uint32(15))


@dataclasses.dataclass(frozen=True)
class FakeModel:
  """`module.apply` of a transformer, without parameters.

  Attributes:
    config, page_size, attention, max_levels, split: as of `models.Transformer`.
    nan_every: one logit is NaN after one in so many prefixes; 0 after none.
  """

  config: ModelConfig
  page_size: int
  attention: str | None = None
  max_levels: int = 4
  split: Split = Split()
  nan_every: int = 0

  def apply(self, params: Any, *args, method: str = "__call__"):
    """Dispatches like `flax.linen.Module.apply`."""
    methods = {"__call__": self._forward, "logits": self._logits,
               "make_schedule": lambda inputs: inputs.segments}
    return methods[method](*args)

  def _forward(self, inputs: StepInputs, kv: KVState,
               schedule: Segments | None = None) -> tuple[jax.Array, KVState]:
    number = lambda x: x.astype(jnp.float32)[:, None, None]
    page_size = self.page_size
    slots = jnp.where(inputs.write_slots < 0, kv.pages[0].shape[0] * page_size, inputs.write_slots)
    new = jnp.concatenate([number(inputs.tokens), number(inputs.positions)], axis=-1)
    pages = kv.pages[0].at[slots // page_size, :, slots % page_size, :2].set(new, mode="drop")
    segments = inputs.segments if schedule is None else schedule
    token = jnp.arange(inputs.tokens.shape[0])

    def add_segment(i, total):
      seg = jax.tree.map(lambda x: x[i], segments)

      def add_kv(j, total):
        page = inputs.page_indices[seg.page_start + j // page_size]
        key, value = pages[page, 0, j % page_size, :2]
        # The stored position, not the one it should have: a misplaced token changes the hash.
        hashed = mix(key.astype(jnp.int32), value.astype(jnp.int32))
        seen = ((token >= seg.q_start) & (token < seg.q_start + seg.q_len)
                & (seg.kv_start + j <= inputs.positions))
        return total + jnp.where(seen, hashed, np.uint32(0))

      return jax.lax.fori_loop(0, seg.kv_len, add_kv, total)

    total = jnp.zeros(inputs.tokens.shape, jnp.uint32)
    total = jax.lax.fori_loop(0, segments.q_start.shape[0], add_segment, total)
    return total[:, None], KVState((pages,))

  def _logits(self, hidden: jax.Array) -> jax.Array:
    """Logits that differ for every token, so that sampling has something to choose from."""
    token = self.split.token_ids(jnp.arange(self.config.vocab_size))
    logits = (mix(token, hidden) % np.uint32(1000)).astype(jnp.float32) / 100
    if self.nan_every:
      vocab_size = self.split.vocab_size or token.size
      logits = jnp.where((hidden % np.uint32(self.nan_every) == 0) & (token == hidden % vocab_size),
                         jnp.nan, logits)
    return self.split.mask_padding(logits)


def fake_logits(prefix: np.ndarray, vocab_size: int, nan_every: int = 0) -> np.ndarray:
  """What the fake model gives after `prefix`, computed without any cache: f32[V]."""
  total = mix(np.asarray(prefix), np.arange(len(prefix))).sum(dtype=np.uint32)
  return logits_of_hashes(total[None], vocab_size, nan_every)[0]


def logits_of_hashes(totals: np.ndarray, vocab_size: int, nan_every: int = 0) -> np.ndarray:
  """What the fake model makes of sums of hashes, u32[R] to f32[R, V]."""
  hashed = mix(np.arange(vocab_size), totals[:, None])
  logits = (hashed % np.uint32(1000)).astype(np.float32) / 100
  if nan_every:
    is_nan = totals % np.uint32(nan_every) == 0
    logits[is_nan, (totals % np.uint32(vocab_size))[is_nan]] = np.nan
  return logits
