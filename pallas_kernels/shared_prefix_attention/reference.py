"""The XLA implementation: runs everywhere, bounded memory, the standard for the others.

Work comes in two kinds. *Tiles* are blocks of tokens of one segment: a shared
prefix with its n rows is one dense product of n * G query rows, its KV gathered
once per tile. Short segments (a prompt's own few tokens) get smaller tiles than
long ones. *Rows* are segments with one token (decode rows on their own KV),
taken many at a time as a batched product. All walk the KV in blocks with the
online softmax, so no more than one block of scores exists at a time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_NEG_INF = float("-inf")


class Tiling(NamedTuple):
  """Block sizes: tokens of long and of short segments' tiles, rows, and KV tokens of rows."""

  q: int = 128
  kv: int = 512
  short_q: int = 32
  short_kv: int = 64
  rows: int = 32
  row_kv: int = 64


class Schedule(NamedTuple):
  """Work list of a step.

  Attributes:
    tile_ends, short_tile_ends: i32[S], tiles of this and all earlier segments.
    num_rows: i32[], one-token segments.
    row_segment: i32[S], their indices, in use first.
    segments: the step's segments.
    page_indices: i32[I + pages of the largest block], padded so that a block may overrun.
    positions: i32[T + q block], padded likewise.
    tiling: block sizes, static.
  """

  tile_ends: jax.Array
  short_tile_ends: jax.Array
  num_rows: jax.Array
  row_segment: jax.Array
  segments: NamedTuple
  page_indices: jax.Array
  positions: jax.Array
  tiling: Tiling


# Block sizes are Python numbers that shape the compiled loop, so they travel as static data.
jax.tree_util.register_static(Tiling)


def make_schedule(segments, page_indices: jax.Array, positions: jax.Array, *, page_size: int,
                  tiling: Tiling = Tiling()) -> Schedule:
  """See `shared_prefix_attention.make_schedule`."""
  num_tokens, num_segments = positions.shape[0], segments.q_len.shape[0]
  whole_pages = lambda block: -(-block // page_size) * page_size
  tiling = Tiling(q=min(tiling.q, num_tokens), kv=whole_pages(tiling.kv),
                  short_q=min(tiling.short_q, num_tokens), short_kv=whole_pages(tiling.short_kv),
                  rows=min(tiling.rows, num_segments), row_kv=whole_pages(tiling.row_kv))

  used = segments.kv_len > 0
  # Rows run many at a time, so no two of them may be one token: where a token is all that a step
  # has of several levels, only the last is a row, and the others are tiles.
  index = jnp.arange(num_segments)
  is_single = used & (segments.q_len == 1)
  last = jnp.zeros(num_tokens, jnp.int32).at[
      jnp.where(is_single, segments.q_start, num_tokens)].max(index, mode="drop")
  is_row = is_single & (jnp.take(last, segments.q_start, mode="clip") == index)
  is_tiled = used & ~is_row
  is_short = (segments.q_len <= tiling.short_q) | (segments.kv_len <= 2 * tiling.short_kv)
  ends = lambda here, block: jnp.cumsum(jnp.where(here, -(-segments.q_len // block), 0))
  overrun = max(tiling.kv, tiling.short_kv, tiling.row_kv) // page_size
  return Schedule(
      tile_ends=ends(is_tiled & ~is_short, tiling.q),
      short_tile_ends=ends(is_tiled & is_short, tiling.short_q),
      num_rows=jnp.sum(is_row),
      row_segment=jnp.argsort(~is_row, stable=True).astype(jnp.int32),
      segments=segments,
      page_indices=jnp.pad(page_indices, (0, overrun)),
      positions=_pad_positions(positions, tiling),
      tiling=tiling)


def advance(schedule: Schedule, positions: jax.Array) -> Schedule:
  """See `shared_prefix_attention.advance`."""
  return schedule._replace(positions=_pad_positions(positions, schedule.tiling))


def _pad_positions(positions: jax.Array, tiling: Tiling) -> jax.Array:
  return jnp.pad(positions, (0, tiling.q), constant_values=-1)


def attend(q: jax.Array, kv_pages: jax.Array, schedule: Schedule, *, scale: float,
           window: int | None = None,
           soft_cap: float | None = None) -> tuple[jax.Array, jax.Array]:
  """See `shared_prefix_attention`. Returns float32 o [T, Q, H] and lse [T, Q]."""
  num_tokens, num_heads, head_dim = q.shape
  num_kv_heads, page_size = kv_pages.shape[1:3]
  group = num_heads // num_kv_heads
  tiling, segments = schedule.tiling, schedule.segments
  q = q.reshape(num_tokens, num_kv_heads, group, head_dim)
  q = jnp.pad(q, ((0, tiling.q), (0, 0), (0, 0), (0, 0)))

  def accumulate(state, q, kv, visible):
    """One online-softmax step. q [..., M, H], kv [..., C, 2H], visible [..., M, C]."""
    acc, top, total = state
    # A slot that nobody may read can hold NaN, and 0 * NaN is NaN.
    is_read = visible.any(axis=-2)[..., None]
    if q.shape[-2] == group:  # one token: products with zeros are cheaper than copies of the halves
      q = jnp.pad(q, [(0, 0)] * (q.ndim - 1) + [(0, head_dim)])
      keys = values = jnp.where(is_read, kv, 0)
    else:
      keys, values = jnp.split(kv, 2, axis=-1)
      values = jnp.where(is_read, values, 0)
    scores = jnp.einsum("...mh,...ch->...mc", q, keys, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
      scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(visible, scores, _NEG_INF)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    shift = jnp.where(new_top == _NEG_INF, 0.0, new_top)  # nothing seen yet: exp(-inf - 0) = 0
    probs = jnp.exp(scores - shift[..., None])
    decay = jnp.exp(top - shift)
    new = jnp.einsum("...mc,...ch->...mh", probs, values.astype(jnp.float32))[..., -head_dim:]
    # A slot that only others of the tile may read can hold NaN too.
    acc = jnp.where(visible.any(axis=-1)[..., None], acc * decay[..., None] + new, acc)
    return acc, new_top, total * decay + probs.sum(axis=-1)

  def gather(page_start, block, block_len):
    """KV [K, block_len, 2 * H] of block number `block` of a page list."""
    num_pages = block_len // page_size
    pages = jax.lax.dynamic_slice_in_dim(
        schedule.page_indices, page_start + block * num_pages, num_pages)
    kv = jnp.take(kv_pages, pages, axis=0, mode="clip")
    return kv.swapaxes(0, 1).reshape(num_kv_heads, block_len, -1)[..., :2 * head_dim]

  def sees(kv_start, kv_len, block_start, block_len, positions):
    """bool[..., block_len]: which KV of a block the token at `positions[...]` may read."""
    offset = block_start + jnp.arange(block_len)
    kv_position = kv_start + offset
    positions = positions[..., None]
    seen = (offset < kv_len) & (kv_position <= positions)
    return seen if window is None else seen & (kv_position > positions - window)

  def block_range(kv_start, kv_len, low, high, block_len):
    """Blocks that hold KV visible from positions low..high."""
    stop = -(-jnp.clip(high + 1 - kv_start, 0, kv_len) // block_len)
    if window is None:
      return jnp.zeros_like(stop), stop
    return jnp.clip(low - window + 1 - kv_start, 0, None) // block_len, stop

  def do_tile(tile, state, tile_ends, q_block, kv_block):
    index = jnp.sum(tile_ends <= tile)
    segment = jax.tree.map(lambda x: x[index], segments)
    first_tile = jnp.where(index > 0, tile_ends[index - 1], 0)
    start = segment.q_start + (tile - first_tile) * q_block
    token = start + jnp.arange(q_block)
    here = jax.lax.dynamic_slice_in_dim(schedule.positions, start, q_block)
    here = jnp.where(token < segment.q_start + segment.q_len, here, -1)
    q_tile = jax.lax.dynamic_slice_in_dim(q, start, q_block)
    q_tile = q_tile.transpose(1, 0, 2, 3).reshape(num_kv_heads, q_block * group, head_dim)
    first, stop = block_range(segment.kv_start, segment.kv_len,
                              jnp.where(here < 0, jnp.iinfo(jnp.int32).max, here).min(),
                              here.max(), kv_block)
    part = [jax.lax.dynamic_slice_in_dim(x, start, q_block, axis=1) for x in state]
    part = [x.reshape(num_kv_heads, q_block * group, *x.shape[3:]) for x in part]

    def do_block(block, part):
      visible = sees(segment.kv_start, segment.kv_len, block * kv_block, kv_block, here)
      visible = jnp.repeat(visible, group, axis=0)[None]
      return accumulate(part, q_tile, gather(segment.page_start, block, kv_block), visible)

    part = jax.lax.fori_loop(first, stop, do_block, tuple(part))
    part = [x.reshape(num_kv_heads, q_block, group, *x.shape[2:]) for x in part]
    return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, start, axis=1)
                 for x, y in zip(state, part))

  def do_rows(block, state):
    row = block * tiling.rows + jnp.arange(tiling.rows)
    live = row < schedule.num_rows
    index = jnp.take(schedule.row_segment, row, mode="clip")
    segment = jax.tree.map(lambda x: x[index], segments)
    here = jnp.where(live, jnp.take(schedule.positions, segment.q_start, mode="clip"), -1)
    q_rows = jnp.take(q, segment.q_start, axis=0, mode="clip")
    first, stop = block_range(segment.kv_start, segment.kv_len, here, here, tiling.row_kv)
    stop = jnp.where(live, stop, 0)
    first = jnp.where(live & (first < stop), first, jnp.iinfo(jnp.int32).max)
    part = tuple(jnp.take(x, segment.q_start, axis=1, mode="clip").swapaxes(0, 1) for x in state)

    def do_block(kv_block, part):
      kv = jax.vmap(gather, (0, None, None))(segment.page_start, kv_block, tiling.row_kv)
      visible = sees(segment.kv_start[:, None], segment.kv_len[:, None], kv_block * tiling.row_kv,
                     tiling.row_kv, here)
      return accumulate(part, q_rows, kv, visible[:, None, None])

    part = jax.lax.fori_loop(first.min(), stop.max(), do_block, part)
    token = jnp.where(live, segment.q_start, num_tokens + tiling.q)
    return tuple(x.at[:, token].set(y.swapaxes(0, 1), mode="drop") for x, y in zip(state, part))

  shape = (num_kv_heads, num_tokens + tiling.q, group)
  state = (jnp.zeros((*shape, head_dim), jnp.float32), jnp.full(shape, _NEG_INF), jnp.zeros(shape))
  for tile_ends, q_block, kv_block in (
      (schedule.tile_ends, tiling.q, tiling.kv),
      (schedule.short_tile_ends, tiling.short_q, tiling.short_kv)):
    state = jax.lax.fori_loop(0, tile_ends[-1], functools.partial(
        do_tile, tile_ends=tile_ends, q_block=q_block, kv_block=kv_block), state)
  state = jax.lax.fori_loop(0, -(-schedule.num_rows // tiling.rows), do_rows, state)
  acc, top, total = (x[:, :num_tokens].swapaxes(0, 1) for x in state)
  o = acc / jnp.where(total == 0.0, 1.0, total)[..., None]
  lse = top + jnp.log(jnp.where(total == 0.0, 1.0, total))
  return o.reshape(num_tokens, num_heads, head_dim), lse.reshape(num_tokens, num_heads)


def write_kv(kv_pages: jax.Array, k: jax.Array, v: jax.Array,
             write_slots: jax.Array) -> jax.Array:
  """See `shared_prefix_attention.write_kv`: one XLA scatter."""
  num_pages, _, page_size, width = kv_pages.shape
  # Dropped tokens point behind the pool, each at a page of its own: the indices
  # are then unique, which spares the scatter its atomics on GPU.
  behind = num_pages + jnp.arange(write_slots.shape[0], dtype=jnp.int32)
  page = jnp.where(write_slots < 0, behind, write_slots // page_size)
  with jax.named_scope("write_kv"):
    kv = jnp.concatenate([k, v], axis=-1).astype(kv_pages.dtype)
    kv = jnp.pad(kv, ((0, 0), (0, 0), (0, width - kv.shape[2])))
    return kv_pages.at[page, :, write_slots % page_size].set(
        kv, mode="drop", unique_indices=True)
