"""Work list of the Mosaic GPU kernels: q tiles of segments, split over KV, sorted by cost.

A *tile* is up to 64 query rows of one KV head per warpgroup, rows in token-major order
(row = token * group + head of the group). Segments with few rows make *narrow* tiles of
one warpgroup, the others *wide* tiles of several warpgroups that share the KV they read.
An *item* is a tile and a range of its segment's KV; every item is taken for all KV heads.
A segment that is not worth tiles of its own is *folded*: the tiles of its children read its
KV before their own. What a device makes worth it is data, `CostModel`.

An item that alone covers its tokens writes the output (it is *direct*). All others write
a partial result per token into a *slot*; the merge reads the slots of each token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ROWS = 64  # query rows of a warpgroup's tile: M of wgmma

# Columns of an item row. It holds tokens [TOKEN, TOKEN + NUM_TOKENS), at positions LOW to
# HIGH, and two runs of KV: offsets [KV_BEGIN, KV_END) of its segment, behind those of the
# segment folded into it, if any. SLOT is -1 for direct items.
TOKEN, NUM_TOKENS, LOW, HIGH, SLOT = range(5)
HEAD_PAGE_START, HEAD_KV_START, HEAD_BEGIN, HEAD_END = HEAD = range(5, 9)
PAGE_START, KV_START, KV_BEGIN, KV_END = OWN = range(9, 13)
NUM_COLUMNS = 13
_WIDTH = 32  # the 128 bytes of a TMA copy into shared memory

# Positions that the kernel copies for a tile: such a copy begins at a multiple of ALIGNED of them, 16 bytes,
# and takes a multiple of 128 bytes.
ALIGNED = 4
COPIED = ROWS + 32

_MAX_SPLITS = 32
_SPLIT_FILL = 4  # splitting may fill the card at most this many times over


class Blocks(NamedTuple):
  """Block sizes of one kind of tile; data of `tuned/<device>.json`.

  Attributes:
    warpgroups: 64-row tiles that share one KV stream.
    kv_sets: KV heads a block takes at once, one per warpgroup; 1 where they share one head.
    kv: KV tokens of a pipeline stage.
    stages: pipeline stages in shared memory, at least 2: V of a block stays until the next one's has come.
    q_buffers: q tiles in shared memory, so that the next item's loads start early.
  """

  warpgroups: int
  kv_sets: int
  kv: int
  stages: int
  q_buffers: int


class CostModel(NamedTuple):
  """When a shared segment is worth tiles of its own; measured, data of `tuned/<device>.json`.

  Attributes:
    min_saved_tokens_per_row: KV tokens that each row must be spared reading.
    tile_overhead_blocks: KV blocks that cost what a wide tile costs by itself: its start, its partial
      result and the merge.
  """

  min_saved_tokens_per_row: int
  tile_overhead_blocks: int


class Tiling(NamedTuple):
  """Static sizes that shape the compiled kernels, and what decides their work.

  Attributes:
    narrow, wide: block sizes.
    num_ctas: of the persistent grid.
    page_size, num_heads, num_kv_heads: shapes.
    cost_model: None gives every segment tiles of its own.
  """

  narrow: Blocks
  wide: Blocks
  num_ctas: int
  page_size: int
  num_heads: int
  num_kv_heads: int
  cost_model: CostModel | None = None

  @property
  def group(self) -> int:
    return self.num_heads // self.num_kv_heads

  @property
  def tokens(self) -> int:
    """Tokens of one warpgroup's tile."""
    return ROWS // self.group

  @property
  def wide_tokens(self) -> int:
    return self.wide.warpgroups * self.tokens

  @property
  def item_rows(self) -> int:
    """Rows of the log-sum-exp table that an item owns."""
    return self.wide.warpgroups * ROWS


class Merge(NamedTuple):
  """Which partial results make up a token.

  Attributes:
    tokens: i32[T], tokens that the merge writes, in use first.
    num_tokens: i32[1].
    starts: i32[T + 1], range of each token in the two lists below.
    slots: i32[C], slots ordered by token.
    lse_rows: i32[C], row of the log-sum-exp table of each.
    direct_row: i32[T], row of that table for a token with a direct item, else -1.
  """

  tokens: jax.Array
  num_tokens: jax.Array
  starts: jax.Array
  slots: jax.Array
  lse_rows: jax.Array
  direct_row: jax.Array


class Schedule(NamedTuple):
  """Work list of a step; shared by all layers.

  Attributes:
    items: i32[N, 32], narrow items first, each kind by falling cost.
    ranges: i32[2, 2], first item and number of items of the narrow and of the wide kind.
    merge: how partial results combine.
    page_indices: i32[I].
    row_positions: i32[T * G + padding], position of each query row, -1 in the padding.
    tiling: static.
  """

  items: jax.Array
  ranges: jax.Array
  merge: Merge
  page_indices: jax.Array
  row_positions: jax.Array
  tiling: Tiling


jax.tree_util.register_static(Tiling)


def make_schedule(segments, page_indices: jax.Array, positions: jax.Array, tiling: Tiling, *,
                  max_levels: int) -> Schedule:
  """Builds the work list from device arrays, in static shapes.

  Args:
    segments: `Segments` of the step.
    page_indices: i32[I], page lists of all segments.
    positions: i32[T], -1 is padding.
    tiling: static sizes.
    max_levels: segments that may hold one token at most.
  """
  num_tokens = positions.shape[0]
  table, is_wide = _split(*_tiles(segments, positions, tiling, max_levels), tiling)
  num_items, used = table.shape[0], table[:, NUM_TOKENS] > 0

  # Tokens that only one item covers are written by that item itself.
  token, inside = _tokens(table, tiling)
  cover = _cover(table, num_tokens, used)
  direct = used & ~jnp.any(inside & jnp.take(cover != 1, token, mode="clip"), axis=1)
  todo = (_cover(table, num_tokens, used & ~direct) > 0) | (cover == 0)

  size = jnp.where(direct, 0, table[:, NUM_TOKENS])
  table = table.at[:, SLOT].set(jnp.where(direct, -1, jnp.cumsum(size) - size))
  extra = _extra_items(tiling)
  capacity = min(num_items * tiling.wide_tokens,
                 max_levels * num_tokens + extra * (tiling.tokens + tiling.wide_tokens))
  item, local, here = _expand(size, capacity)
  token_of = jnp.where(here, table[item, TOKEN] + local, num_tokens)
  lse_row = (item * tiling.item_rows + _row(local, tiling)).astype(jnp.int32)
  counts = jnp.zeros((num_tokens,), jnp.int32).at[token_of].add(1, mode="drop")
  starts = jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))
  # Slots of a token stand in the order of their items.
  begin, end = table[:, TOKEN], table[:, TOKEN] + size
  earlier = ((begin <= token_of[:, None]) & (token_of[:, None] < end)
             & (jnp.arange(num_items) < item[:, None])).sum(axis=1, dtype=jnp.int32)
  place = jnp.where(here, jnp.take(starts, token_of, mode="clip") + earlier, capacity)
  placed = lambda values: jnp.zeros((capacity,), jnp.int32).at[place].set(values, mode="drop")

  own_row = jnp.arange(num_items)[:, None] * tiling.item_rows
  own_row += _row(jnp.arange(tiling.wide_tokens), tiling)
  direct_row = jnp.full((num_tokens,), -1, jnp.int32)
  direct_row = direct_row.at[jnp.where(inside & direct[:, None], token, num_tokens)].set(
      own_row.astype(jnp.int32), mode="drop")

  num_narrow = jnp.sum(used & ~is_wide, dtype=jnp.int32)
  num_wide = jnp.sum(used & is_wide, dtype=jnp.int32)
  todo_first = jnp.nonzero(todo, size=num_tokens, fill_value=0)[0]
  return Schedule(
      items=table,
      ranges=jnp.stack([jnp.stack([jnp.int32(0), num_narrow]), jnp.stack([num_narrow, num_wide])]),
      merge=Merge(
          tokens=todo_first.astype(jnp.int32),
          num_tokens=jnp.sum(todo, dtype=jnp.int32)[None],
          starts=starts, slots=placed(jnp.arange(capacity, dtype=jnp.int32)),
          lse_rows=placed(lse_row), direct_row=direct_row),
      page_indices=page_indices.astype(jnp.int32),
      row_positions=_row_positions(positions, tiling),
      tiling=tiling)


def advance(schedule: Schedule, positions: jax.Array) -> Schedule:
  """See `shared_prefix_attention.advance`."""
  low, high = _extent(schedule.items, positions, schedule.tiling)
  items = schedule.items.at[:, LOW].set(low).at[:, HIGH].set(high)
  return schedule._replace(items=items, row_positions=_row_positions(positions, schedule.tiling))


def _row_positions(positions, tiling: Tiling):
  padding = tiling.item_rows - ROWS + COPIED  # for the last warpgroup of an item on the last token
  return jnp.pad(jnp.repeat(positions.astype(jnp.int32), tiling.group), (0, padding),
                 constant_values=-1)


def _extra_items(tiling: Tiling) -> int:
  """Most items that splitting adds per kind: `_split` stops at _SPLIT_FILL works per CTA."""
  sets = max(tiling.narrow.kv_sets, tiling.wide.kv_sets)
  return _SPLIT_FILL * tiling.num_ctas * sets // tiling.num_kv_heads + 1


def _row(local, tiling: Tiling):
  """Row, inside an item, of its token number `local`: warpgroups start at multiples of 64."""
  return local // tiling.tokens * ROWS + local % tiling.tokens * tiling.group


def _expand(counts: jax.Array, capacity: int):
  """Owner, index within the owner, and validity of each unit when owner i has counts[i]."""
  starts = jnp.cumsum(counts) - counts
  owner = jnp.zeros((capacity,), jnp.int32).at[starts].add(1, mode="drop")
  owner = jnp.cumsum(owner) - 1
  unit = jnp.arange(capacity, dtype=jnp.int32)
  return owner, unit - starts[owner], unit < jnp.sum(counts)


def _order(first: jax.Array, second: jax.Array) -> jax.Array:
  """Stable argsort by two keys. By comparing all pairs: XLA takes seconds to compile a sort."""
  place = jnp.arange(first.shape[0], dtype=jnp.int32)
  less, same = first < first[:, None], first == first[:, None]
  less |= same & ((second < second[:, None])
                  | ((second == second[:, None]) & (place < place[:, None])))
  return jnp.zeros_like(place).at[less.sum(axis=1, dtype=jnp.int32)].set(place)


def _tokens(table: jax.Array, tiling: Tiling):
  """Tokens of each item, [N, most tokens of an item], and which of them are its own."""
  lane = jnp.arange(tiling.wide_tokens, dtype=jnp.int32)
  return table[:, TOKEN, None] + lane, lane < table[:, NUM_TOKENS, None]


def _extent(table: jax.Array, positions: jax.Array, tiling: Tiling):
  """Least and greatest position of each item."""
  token, inside = _tokens(table, tiling)
  position = jnp.take(positions.astype(jnp.int32), token, mode="clip")
  low = jnp.where(inside, position, jnp.iinfo(jnp.int32).max).min(axis=1)
  return low, jnp.where(inside, position, -1).max(axis=1)


def _fold(segments, tiling: Tiling, max_levels: int):
  """Lets children read the KV of segments that are not worth tiles of their own.

  The children of a segment must hold each of its tokens once. Narrow ones read it where it is too
  short to spare them much; wide ones, which fill their tiles and so are spared only the rounding
  of those, where it is not very long. If one kind does and the other does not, the segment keeps
  tiles for the other, whose tokens must lie side by side. No tile reads two folded segments.

  Returns:
    The segments, of those folded only the tokens that still need them; and for each segment
    the one whose KV its tiles read too, i32[S], -1 where there is none.
  """
  num_segments = segments.q_len.shape[0]
  nowhere = jnp.full((num_segments,), -1, jnp.int32)
  if tiling.cost_model is None:
    return segments, nowhere
  first, last = segments.q_start, segments.q_start + segments.q_len
  used = (segments.q_len > 0) & (segments.kv_len > 0)
  above = (used & used[:, None] & (first <= first[:, None]) & (last[:, None] <= last)
           & (segments.kv_start < segments.kv_start[:, None]))
  parent = jnp.where(above, segments.kv_start, -1).argmax(axis=1).astype(jnp.int32)
  parent = jnp.where(above.any(axis=1), parent, nowhere)

  target = jnp.where(parent < 0, num_segments, parent)
  total = lambda values: jnp.zeros((num_segments,), jnp.int32).at[target].add(
      values.astype(jnp.int32), mode="drop")
  # Children side by side, from the first token to the last: disjoint, and nothing between them.
  # Segments without a parent, of which there is one at least, come first.
  order = _order(parent, first)
  before = jnp.where(jnp.roll(parent[order], 1) == parent[order], jnp.roll(last[order], 1),
                     first[parent[order]])
  apart = jnp.zeros((num_segments,), bool).at[order].set(first[order] != before)
  covered = (total(segments.q_len) == segments.q_len) & (total(apart) == 0)

  model, is_wide = tiling.cost_model, segments.q_len > tiling.tokens
  num_narrow = total(used & ~is_wide)
  short = segments.kv_len * (num_narrow - 1) < model.min_saved_tokens_per_row * num_narrow
  tiles = lambda q_len: -(-q_len // tiling.wide_tokens)
  own_tiles = total(jnp.where(is_wide, tiles(segments.q_len), 0))
  shared_tiles = tiles(total(jnp.where(is_wide, segments.q_len, 0)))
  more_blocks = (own_tiles - shared_tiles) * -(-segments.kv_len // tiling.wide.kv)
  bearable = (own_tiles > 0) & (more_blocks <= model.tile_overhead_blocks * own_tiles)

  reads = (parent >= 0) & jnp.where(is_wide, bearable[parent], short[parent])
  stays = (parent >= 0) & ~reads
  num_left = total(jnp.where(stays, segments.q_len, 0))
  left_first = jnp.full((num_segments,), jnp.iinfo(jnp.int32).max).at[target].min(
      jnp.where(stays, first, jnp.iinfo(jnp.int32).max), mode="drop")
  left_last = jnp.zeros((num_segments,), jnp.int32).at[target].max(
      jnp.where(stays, last, 0), mode="drop")
  worth = covered & (total(reads) > 0) & ((num_left == 0) | (num_left == left_last - left_first))
  folded = jnp.zeros_like(worth)
  for _ in range(max_levels):  # from the leaves up
    folded = worth & (total(folded) == 0)
  segments = segments._replace(
      q_start=jnp.where(folded & (num_left > 0), left_first, segments.q_start),
      q_len=jnp.where(folded, num_left, segments.q_len))
  return segments, jnp.where(reads & folded[parent], parent, nowhere)


def _tiles(segments, positions: jax.Array, tiling: Tiling, max_levels: int):
  """i32[., 32] with one row per q tile, holding all KV of its segment; and which are wide."""
  num_tokens, num_segments = positions.shape[0], segments.q_len.shape[0]
  segments, above = _fold(segments, tiling, max_levels)
  used = (segments.q_len > 0) & (segments.kv_len > 0)
  wide = segments.q_len > tiling.tokens
  num_tiles = jnp.where(wide, -(-segments.q_len // tiling.wide_tokens), 1)
  capacity = num_segments + max_levels * (num_tokens // tiling.wide_tokens)
  owner, local, here = _expand(jnp.where(used, num_tiles, 0), capacity)
  take = lambda index: jax.tree.map(lambda x: x[index].astype(jnp.int32), segments)
  segment, head = take(owner), take(above[owner])
  step = jnp.where(wide[owner], tiling.wide_tokens, tiling.tokens)
  token = segment.q_start + local * step
  num = jnp.where(here, jnp.minimum(step, segment.q_start + segment.q_len - token), 0)
  columns = {TOKEN: token, NUM_TOKENS: num, PAGE_START: segment.page_start,
             KV_START: segment.kv_start, KV_END: segment.kv_len,
             HEAD_PAGE_START: head.page_start, HEAD_KV_START: head.kv_start,
             HEAD_END: jnp.where(above[owner] < 0, 0, head.kv_len)}
  zero = jnp.zeros_like(token)
  table = jnp.stack([columns.get(c, zero) for c in range(_WIDTH)], axis=1)
  low, high = _extent(table, positions, tiling)
  return table.at[:, LOW].set(low).at[:, HIGH].set(high), wide[owner]


def _split(tiles: jax.Array, is_wide: jax.Array, tiling: Tiling):
  """Cuts tiles along KV where that evens out the load of the card; sorts by kind and cost.

  With W works of the largest cost in the list, s cuts of each take
  ceil(W * s / num_ctas) / s rounds; the best s decides the largest item.
  """
  size = jnp.where(is_wide, tiling.wide.kv, tiling.narrow.kv)
  visible = jnp.clip(tiles[:, HIGH] + 1 - tiles[:, KV_START], 0, tiles[:, KV_END])
  head_blocks = -(-tiles[:, HEAD_END] // size)
  blocks = jnp.where(tiles[:, NUM_TOKENS] > 0, head_blocks - (-visible // size), 0)
  cuts = jnp.arange(1, _MAX_SPLITS + 1)
  parts = jnp.zeros_like(blocks)
  for kind, sets in ((False, tiling.narrow.kv_sets), (True, tiling.wide.kv_sets)):
    mine = jnp.where(is_wide == kind, blocks, 0)
    heads = tiling.num_kv_heads // sets
    largest = jnp.maximum(mine.max(), 1)
    works = jnp.sum(mine) * heads / largest
    rounds = jnp.ceil(works * cuts / tiling.num_ctas) / cuts * (1.0 + 0.01 * cuts)
    allowed = (works * cuts <= _SPLIT_FILL * tiling.num_ctas) & (largest >= 4 * cuts)
    best = cuts[jnp.argmin(jnp.where(allowed | (cuts == 1), rounds, jnp.inf))]
    target = -(-largest // best)
    # Long lists stay whole, save for the tiles of their last round where it is not full.
    count = jnp.sum(mine > 0)
    rest = count * heads % tiling.num_ctas
    few = cuts[:_SPLIT_FILL]
    rounds = jnp.ceil(rest * few / tiling.num_ctas) / few * (1.0 + 0.01 * few)
    last_round = few[jnp.argmin(rounds)]
    is_last = (count - jnp.cumsum(mine > 0)) * heads < rest
    is_last &= (best == 1) & (mine >= 4 * last_round) & (count * heads > tiling.num_ctas)
    parts += jnp.where(is_last, last_round, -(-mine // target))
  length = -(-blocks // jnp.maximum(parts, 1))
  parts = -(-blocks // jnp.maximum(length, 1))  # rounding can leave the last part empty
  owner, local, here = _expand(parts, tiles.shape[0] + 2 * _extra_items(tiling))
  cost = jnp.where(here, jnp.minimum(length[owner], blocks[owner] - local * length[owner]), 0)
  # Unused rows last: after the wide items, as if of a third kind.
  kind = jnp.where(here, is_wide[owner].astype(jnp.int32), 2)
  order = _order(kind, -cost)
  owner, local, here = owner[order], local[order], here[order]
  table, size = tiles[owner], size[owner]
  begin = local * length[owner]  # in blocks, those of the head first
  end, own = begin + length[owner], head_blocks[owner]
  # The last part keeps all the rest, so that positions may advance into it.
  is_last = local + 1 == parts[owner]
  table = table.at[:, KV_BEGIN].set(jnp.maximum(begin - own, 0) * size)
  table = table.at[:, KV_END].min(
      jnp.where(is_last, jnp.iinfo(jnp.int32).max, jnp.maximum(end - own, 0) * size))
  head_end = table[:, HEAD_END]
  table = table.at[:, HEAD_BEGIN].set(jnp.minimum(begin * size, head_end))
  table = table.at[:, HEAD_END].min(end * size)
  return jnp.where(here[:, None], table, 0), is_wide[owner]


def _cover(table: jax.Array, num_tokens: int, which: jax.Array) -> jax.Array:
  """i32[T]: items among `which` that hold each token."""
  one = jnp.where(which, 1, 0)
  steps = jnp.zeros((num_tokens + 1,), jnp.int32)
  steps = steps.at[table[:, TOKEN]].add(one).at[table[:, TOKEN] + table[:, NUM_TOKENS]].add(-one)
  return jnp.cumsum(steps)[:num_tokens]
