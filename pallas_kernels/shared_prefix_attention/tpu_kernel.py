"""The Mosaic TPU kernel of shared_prefix_attention.

One grid step is one q block; its softmax state stays in VMEM until the output is written.
Pages come from HBM by DMA into a ring of KV buffers that runs across items and q blocks:
while a step computes, the pages of `ahead` later units are in flight, and the page lists of
as many more. Tiles keep their state by KV head, [K, tokens * G, .], so that a shared prefix
is one dense product; rows keep theirs by token, [tokens, Q, .], so that the heads of one
token are adjacent rows. The two are merged by log-sum-exp at the end of the q block.

The maximum of the scores never falls below `_FLOOR` and a hidden score is `_HIDDEN`, far
below it: exp gives exact zeros and no infinity arises. The top and the sum of a state fill
all lanes: the top is the same in each, the sum is spread over them.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.shared_prefix_attention import tpu_schedule
from pallas_kernels.shared_prefix_attention.tpu_schedule import (
    BLOCKS, FIRST, HIGH, KV_END, KV_START, LANES, LOW, NUM_FIELDS, NUM_TOKENS, PAGE_START, TOKEN)

_FLOOR = -1e29
_HIDDEN = -1e30
_LOG2_E = 1.4426950408889634
_CURSOR_ITEM, _CURSOR_BLOCK, _CURSOR_UNIT = range(3)
_RUN = 4  # page copies started without a branch between them
_CHUNK = 8  # tokens whose output is written at once
_PAGES, _KV, _COMPUTE = range(3)  # the three cursors over the units


def attend_blocks(table: jax.Array, units: jax.Array, schedule: tpu_schedule.Schedule,
                  q_rows: jax.Array, q_tiles: jax.Array, kv_pages: jax.Array, *, values_at: int,
                  scale: float, window: int | None, soft_cap: float | None, interpret):
  """One launch over all q blocks.

  Args:
    table, units: from `tpu_schedule.scalars`.
    schedule: from `tpu_schedule.make_schedule`.
    q_rows: [T', cores, Q', D], by token; Q' a multiple of 8 (padded heads per core).
    q_tiles: [K, T' * G, D], by KV head. D is H, or 2 * H (upper half zero) where H does not
      fill lanes.
    kv_pages: [A, K, page_size, W]; lanes behind 2 * H arrive in VMEM and are not read there.
    values_at: first of the D lanes that probabilities multiply: H, or 0 where D is 2 * H.

  Returns:
    o: [T', cores, Q', D] in q's dtype; where D is 2 * H the upper half holds the result.
    lse: f32[cores, T', Q'], the last axis filled up to whole lanes.
  """
  tiling, page_size = schedule.tiling, schedule.page_size.tokens
  num_tokens, cores, num_heads, width = q_rows.shape
  num_kv_heads = kv_pages.shape[1] // cores
  group = q_tiles.shape[1] // num_tokens
  num_blocks = num_tokens // tiling.q
  slots = tiling.ahead + tiling.rows
  kv_len = max(tiling.tile_kv, tiling.row_kv)
  lse_lanes = -(-num_heads // LANES) * LANES
  row_positions = jnp.repeat(schedule.positions, group, axis=0)

  tile_state = (num_kv_heads, tiling.q * group)
  row_state = (tiling.q, num_heads)
  scratch = [
      pltpu.VMEM((slots, num_kv_heads, kv_len, kv_pages.shape[3]), kv_pages.dtype),
      pltpu.VMEM((2, tiling.tile_rows, tiling.tile_kv), jnp.float32),
      pltpu.SMEM((2 * slots, 2, 1, LANES), jnp.int32),
      pltpu.SMEM((3 * 3,), jnp.int32),
      *(pltpu.VMEM((*shape, lanes), jnp.float32) for shape in (tile_state, row_state)
        for lanes in (LANES, LANES, width)),
      pltpu.SemaphoreType.DMA((slots,)),
      pltpu.SemaphoreType.DMA((2 * slots,)),
  ]
  hbm_spec = pl.BlockSpec(memory_space=pltpu.HBM)
  q_spec = pl.BlockSpec((tiling.q, None, num_heads, width), lambda c, b, *_: (b, c, 0, 0))
  pages = schedule.pages
  if not interpret:
    # XLA would prefetch a small pool into VMEM, all of it, in every layer.
    kv_pages = pltpu.with_memory_space_constraint(kv_pages, pltpu.HBM)
    pages = pltpu.with_memory_space_constraint(pages, pltpu.HBM)
  body = functools.partial(
      _kernel, tiling=tiling, page_size=page_size, group=group, num_blocks=num_blocks,
      values_at=values_at, scale=scale, window=window, soft_cap=soft_cap)
  return pl.pallas_call(
      body,
      out_shape=[jax.ShapeDtypeStruct(q_rows.shape, q_rows.dtype),
                 jax.ShapeDtypeStruct((cores, num_tokens, lse_lanes), jnp.float32)],
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2,
          grid=(cores, num_blocks),
          in_specs=[hbm_spec, hbm_spec,
                    pl.BlockSpec((tiling.q * group, 1), lambda c, b, *_: (b, 0)),
                    q_spec,
                    pl.BlockSpec((num_kv_heads, tiling.q * group, width),
                                 lambda c, b, *_: (c, b, 0))],
          out_specs=[q_spec, pl.BlockSpec((None, tiling.q, lse_lanes), lambda c, b, *_: (c, b, 0))],
          scratch_shapes=scratch),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          disable_bounds_checks=True,
          vmem_limit_bytes=vmem_bytes(tiling, num_heads, num_kv_heads, group, width,
                                      kv_pages.shape[3], q_rows.dtype, kv_pages.dtype)),
      interpret=interpret,
      name="shared_prefix_attention",
  )(table, units, pages, kv_pages, row_positions, q_rows, q_tiles)


def vmem_bytes(tiling, num_heads, num_kv_heads, group, width, kv_width, q_dtype, kv_dtype) -> int:
  """VMEM that a launch may take: buffers in whole lanes, and room for spilled values."""
  lanes = lambda n: -(-n // LANES) * LANES
  q_size, kv_size = jnp.dtype(q_dtype).itemsize, jnp.dtype(kv_dtype).itemsize
  rows = tiling.q * num_heads
  head_rows = num_kv_heads * tiling.q * group
  kv_len = max(tiling.tile_kv, tiling.row_kv)
  slots = tiling.ahead + tiling.rows
  kv = slots * num_kv_heads * kv_len * lanes(kv_width) * kv_size
  state = (rows + head_rows) * (lanes(width) + 2 * LANES) * 4
  # q by token pads its sublanes to whole bf16 tiles; inputs and outputs are double-buffered.
  blocks = 2 * ((2 * 2 * rows + head_rows) * lanes(width) * q_size + rows * 4
                + tiling.q * group * LANES * 4 + tiling.q * lanes(num_heads) * 4)
  scores = 2 * tiling.tile_rows * tiling.tile_kv * 4
  return kv + scores + state + blocks + (12 << 20)


def _kernel(table, units, pages_hbm, kv_hbm, positions, q_rows, q_tiles, o_ref, lse_ref,
            kv_buf, s_buf, pages, cursors, tile_top, tile_sum, tile_acc, row_top, row_sum, row_acc,
            kv_sems, page_sems, *, tiling, page_size, group, num_blocks, values_at, scale, window,
            soft_cap):
  core, block = pl.program_id(0), pl.program_id(1)
  slots, num_kv_heads, _, kv_width = kv_buf.shape
  num_heads, width = q_rows.shape[1:]
  capacity = table.shape[0] // NUM_FIELDS
  num_items = units[2 * num_blocks]
  tile_state, row_state = (tile_top, tile_sum, tile_acc), (row_top, row_sum, row_acc)
  keys, values = slice(0, width), slice(values_at, values_at + width)
  precision = lax.Precision.HIGHEST if q_rows.dtype == jnp.float32 else None
  field = lambda name, item: table[name * capacity + item]

  # --- the pipeline: cursors over the units, page lists, pages ---

  def advance(which):
    item, at = cursors[3 * which], cursors[3 * which + _CURSOR_BLOCK] + 1
    done = at == field(BLOCKS, item)
    cursors[3 * which] = jnp.where(done, item + 1, item)
    cursors[3 * which + _CURSOR_BLOCK] = jnp.where(done, 0, at)
    cursors[3 * which + _CURSOR_UNIT] += 1

  def unit_kv(item):
    return jnp.where(field(NUM_TOKENS, item) == 1, tiling.row_kv, tiling.tile_kv)

  def unit_at(which):
    """(item, first KV token of the unit, number of the unit) under a cursor."""
    item = cursors[3 * which]
    at = field(FIRST, item) + cursors[3 * which + _CURSOR_BLOCK]
    return item, at * unit_kv(item), cursors[3 * which + _CURSOR_UNIT]

  def num_pages(item, begin):
    held = jnp.clip(field(KV_END, item) - begin, 0, unit_kv(item))
    return _div(held + (page_size - 1), page_size)

  def page_list_copy(item, begin, unit):
    line = _div(field(PAGE_START, item) + _div(begin, page_size), LANES)
    line = jnp.minimum(line, pages_hbm.shape[0] - 2)
    slot = _mod(unit, 2 * slots)
    return pltpu.make_async_copy(pages_hbm.at[pl.ds(line, 2)], pages.at[slot], page_sems.at[slot])

  def page_copy(page, place, slot):
    heads = pl.ds(core * num_kv_heads, num_kv_heads)
    to = pl.ds(pl.multiple_of(place * page_size, page_size), page_size)
    return pltpu.make_async_copy(kv_hbm.at[page, heads], kv_buf.at[slot, :, to], kv_sems.at[slot])

  def start_page_list():
    @pl.when(cursors[3 * _PAGES] < num_items)
    def _():
      page_list_copy(*unit_at(_PAGES)).start()
      advance(_PAGES)

  def start_pages():
    @pl.when(cursors[3 * _KV] < num_items)
    def _():
      item, begin, unit = unit_at(_KV)
      page_list_copy(item, begin, unit).wait()
      slot, list_slot = _mod(unit, slots), _mod(unit, 2 * slots)
      offset = _mod(field(PAGE_START, item) + _div(begin, page_size), LANES)

      def start(i, _):
        at = offset + i
        page = pages[list_slot, _div(at, LANES), 0, _mod(at, LANES)]
        page_copy(page, i, slot).start()
        return _

      for_pages(num_pages(item, begin), start)
      advance(_KV)

  def for_pages(count, body):
    """body(i, None) for i < count, in straight runs: the scalar unit is slow at branches."""
    runs = _div(count, _RUN)

    def run(i, _):
      for j in range(_RUN):
        body(i * _RUN + j, None)
      return _

    lax.fori_loop(0, runs, run, None)
    lax.fori_loop(runs * _RUN, count, body, None)

  def wait_pages():
    """Takes the next unit: (item, first KV token, slot of its KV), tail zeroed."""
    item, begin, unit = unit_at(_COMPUTE)
    slot = _mod(unit, slots)
    count = num_pages(item, begin)

    def wait(i, _):
      page_copy(0, i, slot).wait()
      return _

    for_pages(count, wait)
    held = field(KV_END, item) - begin

    @pl.when((held > 0) & (held < count * page_size))
    def _():
      clear(slot, held, count * page_size)

    advance(_COMPUTE)
    return item, begin, slot

  def clear(slot, start, stop):
    """Zeroes KV rows [start, stop) of a buffer: 0 * NaN is NaN, so no NaN may lie there."""
    step = 32 // kv_buf.dtype.itemsize  # rows of a tile in VMEM
    first = _div(start, step) * step
    edge = pl.ds(pl.multiple_of(first, step), step)
    old = kv_buf[slot, :, edge, :].astype(jnp.float32)
    row = lax.broadcasted_iota(jnp.int32, old.shape, 1)
    kv_buf[slot, :, edge, :] = jnp.where(row < start - first, old, 0.0).astype(kv_buf.dtype)

    def zero(i, _):
      rows = pl.ds(pl.multiple_of(i * step, step), step)
      kv_buf[slot, :, rows, :] = jnp.zeros((num_kv_heads, step, kv_width), kv_buf.dtype)
      return _

    lax.fori_loop(_div(first, step) + 1, _div(stop, step), zero, None)

  @pl.when(block == 0)
  def _():
    for i in range(9):
      cursors[i] = 0
    # Slots past the end of a page list are computed on and hidden: they must be finite.
    kv_buf[...] = jnp.zeros(kv_buf.shape, kv_buf.dtype)
    for _ in range(tiling.ahead + slots):
      start_page_list()
    for _ in range(tiling.ahead):
      start_pages()

  def prefetch(count):
    for _ in range(count):
      start_page_list()
      start_pages()

  # --- tiles ---

  def product(a, b, contract):
    return lax.dot_general(a, b.astype(a.dtype), (contract, ((), ())), precision=precision,
                           preferred_element_type=jnp.float32)

  # Scores and their top stay in units of `to_log2`: exp2 of a difference is then one multiply
  # and one subtraction per score, and all else that scales them happens once per row.
  to_log2 = (scale if soft_cap is None else soft_cap) * _LOG2_E

  def scores(q, k):
    s = product(q, k, ((1,), (1,)))
    return s if soft_cap is None else jnp.tanh(s * (scale / soft_cap))

  def decay(old, new):
    # Subtract first: the products of two _FLOORs need not cancel where they are fused.
    return jnp.exp2((old - new) * to_log2)

  def do_tile(_, carry):
    prefetch(1)
    item, begin, slot = wait_pages()
    position = field(KV_START, item) + begin
    end = jnp.minimum(field(KV_START, item) + field(KV_END, item), position + tiling.tile_kv)
    # Where every token sees every KV token of the unit, nothing needs hiding.
    plain = (end == position + tiling.tile_kv) & (end <= field(LOW, item) + 1)
    if window is not None:
      plain &= position > field(HIGH, item) - window
    first = field(TOKEN, item) * group
    stop = first + field(NUM_TOKENS, item) * group
    align = 32 // q_tiles.dtype.itemsize
    base = _div(first, align) * align
    count = _div(stop - base + tiling.tile_rows - 1, tiling.tile_rows)

    def sub_tile(i, hide):
      low = base + i * tiling.tile_rows
      # The last product starts early rather than run over; `mine` keeps its rows apart.
      start = jnp.minimum(low, tiling.q * group - tiling.tile_rows)
      at = pl.ds(pl.multiple_of(start, align), tiling.tile_rows)

      def is_mine(lanes):
        row = start + lax.broadcasted_iota(jnp.int32, (tiling.tile_rows, lanes), 0)
        return (row >= jnp.maximum(low, first)) & (row < stop)

      mine, mine_acc = is_mine(LANES), is_mine(width)
      if hide:
        column = position + lax.broadcasted_iota(
            jnp.int32, (tiling.tile_rows, tiling.tile_kv), 1)
        here = positions[at, :]
        seen = (column <= here) & (column < end)
        if window is not None:
          seen &= column > here - window

      def first_product(i, head):
        s_buf[i % 2] = scores(q_tiles[head, at, :], kv_buf[slot, head, :tiling.tile_kv, keys])

      def update(i, head):
        old_top = tile_top[head, at, :]
        s = s_buf[i % 2]
        if hide:
          s = jnp.where(seen, s, _HIDDEN)
        top = jnp.where(mine, jnp.maximum(old_top, s.max(axis=1, keepdims=True)), old_top)
        p = jnp.exp2(s * to_log2 - _lanes(top * to_log2, tiling.tile_kv))
        keep = decay(old_top, top)
        acc = product(p.astype(q_tiles.dtype), kv_buf[slot, head, :tiling.tile_kv, values],
                      ((1,), (0,)))
        tile_top[head, at, :] = top
        # Rows of other items keep their state, whatever this one's KV makes of them.
        tile_sum[head, at, :] = tile_sum[head, at, :] * keep + jnp.where(mine, _fold_lanes(p), 0.0)
        tile_acc[head, at, :] = (tile_acc[head, at, :] * _lanes(keep, width)
                                 + jnp.where(mine_acc, acc, 0.0))

      def of_heads(step, _):
        # Two buffers of scores pace the scheduler: the first product of the next head runs
        # on the MXU under the softmax of this one.
        heads = [step * tiling.heads + i for i in range(tiling.heads)]
        first_product(0, heads[0])
        for i, head in enumerate(heads):
          if i + 1 < len(heads):
            first_product(i + 1, heads[i + 1])
          update(i, head)
        return _

      if tiling.heads == num_kv_heads:
        of_heads(0, None)  # all indices static
      else:
        lax.fori_loop(0, num_kv_heads // tiling.heads, of_heads, None)

    for hide in (False, True):
      @pl.when(plain != hide)
      def _(hide=hide):
        lax.fori_loop(0, count, lambda i, c: (sub_tile(i, hide), c)[1], None)

    return carry

  # --- rows ---

  def row_unit(item, begin, slot):
    """Softmax of one token over one unit: (top, sum, acc) of all heads, not yet merged.

    The heads of the token against all KV heads are one product: q is block-diagonal, zero
    outside its own KV head, and the KV heads lie side by side along the contraction.
    """
    kv_heads = range(num_kv_heads)
    owner = lax.div(lax.broadcasted_iota(jnp.int32, (num_heads, 1), 0), group)
    q = q_rows[field(TOKEN, item)].astype(jnp.float32)
    q = [jnp.where(owner == i, q, 0.0).astype(q_rows.dtype) for i in kv_heads]
    k = [kv_buf[slot, i, :tiling.row_kv, keys] for i in kv_heads]
    v = [kv_buf[slot, i, :tiling.row_kv, values] for i in kv_heads]
    s = scores(jnp.concatenate(q, axis=1), jnp.concatenate(k, axis=1))
    column = begin + lax.broadcasted_iota(jnp.int32, s.shape, 1)
    seen = column < field(KV_END, item)
    if window is not None:
      seen &= column > field(LOW, item) - window - field(KV_START, item)
    s = jnp.where(seen, s, _HIDDEN)
    top = jnp.maximum(s.max(axis=1, keepdims=True), _FLOOR)
    p = jnp.exp2(s * to_log2 - top * to_log2)
    parts = product(p.astype(q_rows.dtype), jnp.concatenate(v, axis=1), ((1,), (0,)))
    acc = parts[:, :width]
    for i in kv_heads[1:]:
      acc = jnp.where(owner == i, parts[:, i * width:(i + 1) * width], acc)
    return jnp.broadcast_to(top, (num_heads, LANES)), _fold_lanes(p), acc

  def do_rows(_, carry):
    prefetch(tiling.rows)
    taken = [wait_pages() for _ in range(tiling.rows)]
    parts = [row_unit(*unit) for unit in taken]
    for (item, _, _), (top, total, acc) in zip(taken, parts):
      token = field(TOKEN, item)
      old = row_top[token]
      new = jnp.maximum(old, top)
      keep, add = decay(old, new), decay(top, new)
      row_top[token] = new
      row_sum[token] = row_sum[token] * keep + total * add
      row_acc[token] = row_acc[token] * _lanes(keep, width) + acc * _lanes(add, width)
    return carry

  # --- one q block ---

  num_tiles, num_rows = units[2 * block], units[2 * block + 1]
  for state, count in ((tile_state, num_tiles), (row_state, num_rows)):
    @pl.when(count > 0)
    def _(state=state):
      for x, value in zip(state, (_FLOOR, 0.0, 0.0)):
        x[...] = jnp.full(x.shape, value, jnp.float32)

  lax.fori_loop(0, num_tiles, do_tile, None)
  lax.fori_loop(0, _div(num_rows, tiling.rows), do_rows, None)

  def normalize(top, total, acc):
    """(log-sum-exp, output) of a softmax state; the log-sum-exp of nothing is _FLOOR."""
    total = jnp.broadcast_to(total.sum(axis=-1, keepdims=True), total.shape)
    some = total > 0.0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, top * (to_log2 / _LOG2_E) + jnp.log(total), _FLOOR)
    return lse, acc * _lanes(1.0 / total, width)

  def of_rows(at):
    return normalize(*(x[at] for x in row_state))

  def of_tiles(at):
    """The tiles' results of some tokens, the heads of a token side by side."""
    rows = pl.ds(pl.multiple_of(at.start * group, 8), at.size * group)
    by_head = [normalize(*(x[head, rows, :] for x in tile_state)) for head in range(num_kv_heads)]
    spare = num_heads - num_kv_heads * group
    by_token = []
    for parts in zip(*by_head):
      parts = [x.reshape(at.size, group, x.shape[1]) for x in parts]
      if spare:
        parts.append(jnp.zeros((at.size, spare, parts[0].shape[2]), jnp.float32))
      by_token.append(jnp.concatenate(parts, axis=1))
    return tuple(by_token)

  def of_both(at):
    (lse, o), (other, more) = of_rows(at), of_tiles(at)
    top = jnp.maximum(lse, other)
    a, b = jnp.exp(lse - top), jnp.exp(other - top)
    inverse = 1.0 / (a + b)
    o = o * _lanes(a * inverse, width) + more * _lanes(b * inverse, width)
    return top + jnp.log(a + b), o

  def write(result):
    def chunk(i, carry):
      at = pl.ds(pl.multiple_of(i * _CHUNK, _CHUNK), _CHUNK)
      lse, o = result(at)
      o_ref[at] = o.astype(o_ref.dtype)
      lse = jnp.where(lse > 0.5 * _FLOOR, lse, -jnp.inf)
      # Lane h of a token's line is row h of its (heads, lanes) square: take the diagonal.
      squares = []
      for first in range(0, num_heads, LANES):
        part = lse[:, first:first + LANES]
        diagonal = (lax.broadcasted_iota(jnp.int32, part.shape, 1)
                    == lax.broadcasted_iota(jnp.int32, part.shape, 2))
        squares.append(jnp.where(diagonal, part, 0.0).sum(axis=1))
      lse_ref[at, :] = jnp.concatenate(squares, axis=1)
      return carry

    lax.fori_loop(0, tiling.q // _CHUNK, chunk, None)

  def nothing(at):
    shape = (at.size, num_heads)
    return jnp.full((*shape, LANES), _FLOOR), jnp.zeros((*shape, width), jnp.float32)

  for has_tiles, has_rows, result in ((True, True, of_both), (True, False, of_tiles),
                                      (False, True, of_rows), (False, False, nothing)):
    @pl.when(((num_tiles > 0) == has_tiles) & ((num_rows > 0) == has_rows))
    def _(result=result):
      write(result)


def _div(x: jax.Array, n: int) -> jax.Array:
  """x // n of a scalar x >= 0; a shift where n is a power of two."""
  return lax.shift_right_logical(x, n.bit_length() - 1) if n & (n - 1) == 0 else lax.div(x, n)


def _mod(x: jax.Array, n: int) -> jax.Array:
  """x % n of a scalar x >= 0; a mask where n is a power of two."""
  return lax.bitwise_and(x, n - 1) if n & (n - 1) == 0 else lax.rem(x, n)


def _lanes(x: jax.Array, width: int) -> jax.Array:
  """`width` lanes of a value that is the same in all its LANES lanes."""
  copies = -(-width // LANES)
  return x if width == LANES else jnp.concatenate([x] * copies, axis=-1)[..., :width]


def _fold_lanes(x: jax.Array) -> jax.Array:
  """Sums [rows, n * LANES] to [rows, LANES], lane by lane: the last reduction comes once."""
  total = x[:, :LANES]
  for i in range(LANES, x.shape[1], LANES):
    total += x[:, i:i + LANES]
  return total
