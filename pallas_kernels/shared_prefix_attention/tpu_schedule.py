"""Work list of the Mosaic TPU kernel: the pieces of segments inside each q block.

The flat token axis is cut into *q blocks*. An *item* is the part of one segment that lies
in one q block; the kernel walks the items of a q block in list order and its KV in blocks,
so softmax state never leaves VMEM. Items of one token are *rows*, the others *tiles*:
tiles take one KV block at a time for many query rows, rows take several KV blocks (of one
or several rows) at once. A KV block of an item is a *unit*, the grain of the DMA pipeline.

The page lists stay in HBM; only items are prefetched as scalars, so a row may have any
number of pages.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Fields of an item, each `capacity + 1` entries of the flat scalar table.
TOKEN, NUM_TOKENS, PAGE_START, KV_START, KV_END, LOW, HIGH, FIRST, BLOCKS = range(9)
NUM_FIELDS = 9

LANES = 128


class Tiling(NamedTuple):
  """Static sizes of the kernel.

  Attributes:
    q: tokens of a q block.
    tile_rows: query rows (tokens times heads of a KV head) of one product of a tile.
    heads: KV heads of a tile that one step takes, so that their products overlap.
    tile_kv: KV tokens of a tile's unit.
    row_kv: KV tokens of a row's unit.
    rows: units that one step of the row loop takes.
    ahead: units whose pages are in flight while a step computes.
    cores: TensorCores that share one device's memory and split the KV heads.
  """

  q: int
  tile_rows: int
  heads: int
  tile_kv: int
  row_kv: int
  rows: int
  ahead: int
  cores: int


class Schedule(NamedTuple):
  """Work list of a step; shared by all layers.

  Attributes:
    items: i32[N + 1, 7], fields TOKEN to HIGH; used ones first, ordered by q block, tiles
      before rows.
    keys: i32[N + 1], 2 * q block + (item is a row); unused ones come last.
    kv_len: i32[N + 1], KV tokens of each item's segment.
    pages: i32[I', 1, 128], page lists of all segments.
    positions: i32[T', 1], position of each token, -1 is padding; T' fills the q blocks.
    tiling, page_size: static.
  """

  items: jax.Array
  keys: jax.Array
  kv_len: jax.Array
  pages: jax.Array
  positions: jax.Array
  tiling: Tiling
  page_size: "PageSize"


class PageSize(NamedTuple):
  """Tokens of a KV page, as static data."""

  tokens: int


# Block sizes are Python numbers that shape the kernel, so they travel as static data.
jax.tree_util.register_static(Tiling)
jax.tree_util.register_static(PageSize)


def make_schedule(segments, page_indices: jax.Array, positions: jax.Array, tiling: Tiling, *,
                  page_size: int, max_levels: int) -> Schedule:
  """Builds the work list from device arrays, in static shapes.

  Args:
    segments: `Segments` of the step.
    page_indices: i32[I], page lists of all segments.
    positions: i32[T], -1 is padding.
    tiling: static sizes.
    page_size: tokens of a KV page.
    max_levels: segments that may hold one token at most.
  """
  num_tokens, num_segments = positions.shape[0], segments.q_len.shape[0]
  num_blocks = -(-num_tokens // tiling.q)
  # Every boundary between q blocks cuts at most one segment of each level.
  capacity = num_segments + max_levels * (num_blocks - 1)

  last = segments.q_start + segments.q_len - 1
  used = (segments.q_len > 0) & (segments.kv_len > 0)
  first_block = segments.q_start // tiling.q
  pieces = jnp.where(used, last // tiling.q - first_block + 1, 0)
  ends = jnp.cumsum(pieces)
  unit = jnp.arange(capacity + 1)
  owner = jnp.searchsorted(ends, unit, side="right")
  here = unit < ends[-1]
  segment = jax.tree.map(lambda x: jnp.take(x, owner, mode="clip"), segments)
  local = unit - jnp.take(ends - pieces, owner, mode="clip")

  block = jnp.take(first_block, owner, mode="clip") + local
  token = jnp.maximum(segment.q_start, block * tiling.q)
  stop = jnp.minimum(segment.q_start + segment.q_len, (block + 1) * tiling.q)
  end, low, high = _extent(token, stop, segment.kv_start, segment.kv_len, positions, tiling)

  is_row = stop - token == 1
  key = jnp.where(here & (end > 0), 2 * block + is_row, 2 * num_blocks)
  fields = [token - block * tiling.q, stop - token, segment.page_start, segment.kv_start, end,
            low, high]
  order = jnp.argsort(key, stable=True)
  # A fetch takes two lines of the page list from any start, so one more line must exist.
  lines = -(-page_indices.shape[0] // LANES) + 1
  pages = jnp.pad(page_indices, (0, lines * LANES - page_indices.shape[0]))
  return Schedule(
      items=jnp.stack(fields, axis=1).astype(jnp.int32)[order],
      keys=key.astype(jnp.int32)[order],
      kv_len=segment.kv_len.astype(jnp.int32)[order],
      pages=pages.astype(jnp.int32).reshape(lines, 1, LANES),
      positions=_pad_positions(positions, tiling),
      tiling=tiling, page_size=PageSize(page_size))


def advance(schedule: Schedule, positions: jax.Array) -> Schedule:
  """See `shared_prefix_attention.advance`."""
  items, tiling = schedule.items, schedule.tiling
  token = items[:, TOKEN] + schedule.keys // 2 * tiling.q
  extent = _extent(token, token + items[:, NUM_TOKENS], items[:, KV_START], schedule.kv_len,
                   positions, tiling)
  return schedule._replace(items=items.at[:, KV_END:HIGH + 1].set(jnp.stack(extent, axis=1)),
                           positions=_pad_positions(positions, tiling))


def _extent(token, stop, kv_start, kv_len, positions: jax.Array, tiling: Tiling):
  """Where the KV that each item sees ends, and the least and greatest position in it."""
  lane = token[:, None] + jnp.arange(tiling.q)
  inside = lane < stop[:, None]
  position = jnp.take(positions.astype(jnp.int32), lane, mode="clip")
  low = jnp.where(inside, position, jnp.iinfo(jnp.int32).max).min(axis=1)
  high = jnp.where(inside, position, -1).max(axis=1)
  return jnp.clip(high + 1 - kv_start, 0, kv_len), low, high


def _pad_positions(positions: jax.Array, tiling: Tiling) -> jax.Array:
  padding = -positions.shape[0] % tiling.q
  return jnp.pad(positions.astype(jnp.int32), (0, padding), constant_values=-1)[:, None]


def scalars(schedule: Schedule, window: int | None) -> tuple[jax.Array, jax.Array]:
  """The scalar tables of a layer; equal for all layers with one window.

  Returns:
    i32[NUM_FIELDS * (N + 1)], fields of the items one after the other; KV blocks that lie
    before every token's window are left out.
    i32[2 * blocks + 1]: units of the tiles and of the rows of each q block, the last entry
    is the number of items. Units of rows fill whole steps: the last row of a q block
    repeats with units past its end, which hold nothing.
  """
  tiling, items, keys = schedule.tiling, schedule.items, schedule.keys
  num_keys = 2 * (schedule.positions.shape[0] // tiling.q)
  size = jnp.where(items[:, NUM_TOKENS] == 1, tiling.row_kv, tiling.tile_kv)
  stop = -(-items[:, KV_END] // size)
  first = jnp.zeros_like(stop)
  if window is not None:
    first = jnp.clip(items[:, LOW] - window + 1 - items[:, KV_START], 0, items[:, KV_END]) // size
  blocks = jnp.maximum(stop - first, 1)
  units = jnp.zeros((num_keys + 1,), jnp.int32).at[keys].add(blocks)[:num_keys]
  spare = jnp.where(jnp.arange(num_keys) % 2 == 1, -units % tiling.rows, 0)
  last = jnp.searchsorted(keys, jnp.arange(num_keys), side="right") - 1
  blocks = blocks.at[jnp.where(spare > 0, last, keys.shape[0])].add(spare, mode="drop")
  num_items = jnp.sum(keys < num_keys, dtype=jnp.int32)
  table = jnp.concatenate([items.T, first[None], blocks[None]]).reshape(-1)
  return table, jnp.concatenate([units + spare, num_items[None]])
