"""Attention of a step over its segments; the kernels live in `pallas_kernels`."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from batchjax.config import ModelConfig
from batchjax.ops.causal import causal_attention, WholeRows
from batchjax.types import Segments
from pallas_kernels import shared_prefix_attention as kernel

# What `make_schedule` returns: only `shared_prefix_attention` of the same implementation reads it.
# `WholeRows` in its place says that there is no pool.
Schedule = Any


def make_schedule(segments: Segments, page_indices: Int[Array, "I"], positions: Int[Array, "T"], *,
                  config: ModelConfig, page_size: int, max_levels: int,
                  implementation: str | None = None) -> Schedule:
  """Work list of a step: built once, shared by every layer.

  Args:
    segments, page_indices, positions: see `StepInputs`.
    config: shapes of the model.
    page_size: tokens of a KV page.
    max_levels: most shared nodes above a row's own KV.
    implementation: None picks by device.

  Raises:
    NotImplementedError: the implementation is unknown or cannot run here.
  """
  with jax.named_scope("attention_schedule"):
    return kernel.make_schedule(
        kernel.Segments(*segments), page_indices, positions, page_size=page_size,
        num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        dtype=config.dtype, max_segments=max_levels + 1, implementation=implementation)


def advance(schedule: Schedule, positions: Int[Array, "T"]) -> Schedule:
  """The work list of a later step of a decode loop, at these positions.

  Args:
    schedule: from `make_schedule`, whose segments hold the KV that the loop ends with.
    positions: each at or behind the one that the schedule was made for.
  """
  with jax.named_scope("attention_schedule"):
    return kernel.advance(schedule, positions)


def attend(q: Float[Array, "T Q H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"],
           kv_pages: Float[Array, "A K page kv_dim"] | None, write_slots: Int[Array, "T"] | None,
           schedule: Schedule, **options: Any) -> tuple[Float[Array, "T Q H"], Any]:
  """The attention of a layer: over the pool, which first takes in k and v, or within whole rows.

  Args:
    q, k, v, kv_pages, write_slots: as in `write_kv` and `shared_prefix_attention`; no pool and no
      slots for whole rows.
    schedule: from `make_schedule`, or `WholeRows`.
    **options: scale, window and soft_cap.

  Returns:
    The output and the pool.
  """
  if isinstance(schedule, WholeRows):
    return causal_attention(q, k, v, schedule, **options), kv_pages
  kv_pages = write_kv(kv_pages, k, v, write_slots, schedule)
  return shared_prefix_attention(q, kv_pages, schedule, **options), kv_pages


def shared_prefix_attention(q: Float[Array, "T Q H"], kv_pages: Float[Array, "A K page kv_dim"],
                            schedule: Schedule, *, scale: float, window: int | None = None,
                            soft_cap: float | None = None) -> Float[Array, "T Q H"]:
  """softmax(scale * q k^T) v over the KV of all segments that hold a token.

  Args:
    q: rotated queries.
    kv_pages: one layer's pool, this step's keys and values already written.
    schedule: from `make_schedule`, which settled the implementation.
    scale: multiplies the scores.
    window: a token sees itself and the window - 1 positions before; None sees all.
    soft_cap: scores become soft_cap * tanh(scores / soft_cap).

  Returns:
    In q's dtype; zeros where a token attends to nothing.

  Raises:
    NotImplementedError: the implementation is unknown or cannot run here.
    ValueError: shapes do not fit together.
  """
  with jax.named_scope("shared_prefix_attention"):
    return kernel.shared_prefix_attention(q, kv_pages, schedule, scale=scale, window=window,
                                          soft_cap=soft_cap)


def write_kv(kv_pages: Float[Array, "A K page kv_dim"], k: Float[Array, "T K H"],
             v: Float[Array, "T K H"], write_slots: Int[Array, "T"],
             schedule: Schedule) -> Float[Array, "A K page kv_dim"]:
  """Writes the keys and values of a step into one layer's pool, in place when it is donated.

  Args:
    kv_pages: the pool.
    k, v: keys (rotated) and values.
    write_slots: page * page_size + offset of each token; -1 drops it.
    schedule: of the step; it settled the implementation.
  """
  return kernel.write_kv(kv_pages, k, v, write_slots, implementation=schedule.implementation)
