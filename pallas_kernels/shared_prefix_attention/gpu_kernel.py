"""The Mosaic GPU attention kernel: one launch works through a list of items.

One warpgroup issues TMA loads, the others compute (FlashAttention-3, section 3.1). The
grid is persistent: CTA c takes works c, 2n - 1 - c, 2n + c, ... of the list, sorted by cost,
so that the sums come out even. The pipeline runs on across items: K and V stages are
numbered over the whole list, and the next q tile loads while the last one computes.
"""

import functools
import math

from jax import lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.shared_prefix_attention import gpu_merge
from pallas_kernels.shared_prefix_attention import gpu_schedule
from pallas_kernels.shared_prefix_attention.gpu_schedule import ALIGNED, COPIED, ROWS

_LOG2E = math.log2(math.e)
_LINES = 16  # a block that is part of one page is read up to a multiple of as many tokens


def store(ref, value):
  """Stores a register array in plain row-major memory, bank conflicts or not."""
  if hasattr(plgpu, "store"):
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


def columns_of_swizzle(head_dim: int) -> int:
  """Columns of a bf16 wgmma operand that the widest swizzle covers."""
  return next(c for c in (64, 32, 16) if head_dim % c == 0)


def stage_width(head_dim: int) -> int:
  """Columns of a bf16 staging tile; twice those of a float32 one."""
  return head_dim if head_dim <= 128 else head_dim // 2


def stage_pitch(group: int, columns: int, dtype) -> int:
  """Row length of a staging tile: a TMA store starts at a multiple of 128 bytes.

  The rows of a token leave together where that holds for every token, else one by one,
  each padded to such a multiple.
  """
  itemsize = jnp.dtype(dtype).itemsize
  if group * columns * itemsize % 128 == 0:
    return columns
  return -(-columns * itemsize // 128) * 128 // itemsize


def arrange_q(q, tiling: gpu_schedule.Tiling, interpret=None):
  """q as [T, K, G, H], from which a tile is one box, or [T * G, K, 1, H] where G has no such box.

  A box of 64 // G tokens fills the 64 rows of a tile only where G is a power of two. Copies
  may run over the end, where TMA reads zeros; the interpreter needs the rows to exist.
  """
  num_tokens, _, head_dim = q.shape
  q = q.reshape(num_tokens, tiling.num_kv_heads, tiling.group, head_dim)
  if ROWS % tiling.group:
    q = q.swapaxes(1, 2).reshape(-1, tiling.num_kv_heads, 1, head_dim)
  return q if interpret is None else jnp.pad(q, ((0, tiling.item_rows), (0, 0), (0, 0), (0, 0)))


def attend_items(q, kv_pages, schedule: gpu_schedule.Schedule, o_ref, part_ref, lse_ref,
                 *, kind: str, scale: float, window: int | None, soft_cap: float | None,
                 interpret=None):
  """Runs the items of one kind; writes into the given references in place.

  Args:
    q: from `arrange_q`.
    kv_pages: [A, K, page_size, 2H].
    schedule: the work list.
    o_ref: [T, Q, H], receives rows of direct items.
    part_ref: f32[K, slots * Gp, H], receives rows of all others.
    lse_ref: f32[K, N * rows of an item], base-2 log-sum-exp of every row of every item.
    kind: "narrow" or "wide".
    scale, window, soft_cap: as in `shared_prefix_attention`.
    interpret: `plgpu.InterpretGPUParams` or None.
  """
  tiling = schedule.tiling
  blocks = getattr(tiling, kind)
  head_dim, dtype = q.shape[-1], q.dtype
  warpgroups, sets, block, stages, q_buffers = blocks
  copies = max(1, block // tiling.page_size) * sets
  chunk = columns_of_swizzle(head_dim)
  chunks = head_dim // chunk
  swizzle = plgpu.SwizzleTransform(chunk * 2)
  transforms = (plgpu.TilingTransform((8, chunk)), swizzle)
  kv_smem = plgpu.SMEM((stages, sets, block, head_dim), dtype, transforms=transforms)
  # Rows leave token by token, so their staging is plain row-major; the columns of a
  # float32 partial result go out in pieces and take no more room than those of a bf16 tile.
  width = stage_width(head_dim)
  # The interpreter keeps the members of a union apart, and would see races between them.
  union = plgpu.RefUnion if interpret is None else lambda *refs: refs
  rows_out = (plgpu.SMEM((warpgroups, ROWS, stage_pitch(tiling.group, columns, t)), t)
              for columns, t in ((width, dtype), (width // 2, jnp.float32)))
  # A tiled copy could only start at multiples of 8 rows. One swizzle wide, rows and tiles
  # have the same bytes in the same places: copy as rows, multiply as tiles.
  box = (q_buffers, warpgroups, chunks, ROWS // q.shape[2], q.shape[2], chunk)
  q_box = plgpu.SMEM(box, dtype, transforms=(swizzle,))
  q_tile = plgpu.SMEM((*box[:3], ROWS, chunk), dtype, transforms=transforms)
  # The output of a full tile leaves as q came.
  o_box = plgpu.SMEM((warpgroups, width // chunk, *box[3:]), dtype, transforms=(swizzle,))
  o_tile = plgpu.SMEM((warpgroups, width // chunk, ROWS, chunk), dtype, transforms=transforms)
  scratch = dict(
      q_smem=union(q_box, q_tile), k_smem=kv_smem, v_smem=kv_smem,
      stage=union(*rows_out, o_box, o_tile),
      # Of an item: its record, and the positions of each warpgroup's rows.
      header=plgpu.SMEM((q_buffers, schedule.items.shape[1] + warpgroups * COPIED), jnp.int32),
      q_full=plgpu.Barrier(num_arrivals=warpgroups * (chunks + 1) + 1, num_barriers=q_buffers),
      q_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=q_buffers),
      k_full=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
      v_full=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
      k_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
      v_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
      v_clean=plgpu.Barrier(num_barriers=stages),
      turn=plgpu.Barrier(num_barriers=2))
  names = list(scratch)

  def body(*refs):
    _body(*refs[:9], kind=kind, tiling=tiling, blocks=blocks, scale=scale, window=window,
          soft_cap=soft_cap, interpreted=interpret is not None, **dict(zip(names, refs[9:])))

  body.__name__ = f"attend_{kind}"  # what profiles call it
  params = {} if interpret is None else {"interpret": interpret}
  plgpu.kernel(
      body, out_type=(), scratch_types=[scratch[n] for n in names],
      grid=(tiling.num_ctas,), grid_names=("cta",),
      num_threads=warpgroups + 1, thread_name="wg",
      compiler_params=plgpu.CompilerParams(
          approx_math=True, unsafe_no_auto_barriers=False,
          reduction_scratch_bytes=0,  # rows lie within a warp
          lowering_semantics=plgpu.LoweringSemantics.Lane),
      **params,
  )(schedule.items, schedule.ranges, schedule.page_indices, schedule.row_positions, q, kv_pages,
    o_ref, part_ref, lse_ref)


def _registers(warpgroups: int) -> tuple[int, int]:
  """Registers of a thread that loads and of one that computes; they share what a launch gets."""
  threads = (warpgroups + 1) * 128
  at_launch = min((1 << 16) // threads, 255) // 8 * 8
  load = 40 if warpgroups <= 2 else 32
  return load, min((at_launch * threads - load * 128) // (warpgroups * 128) // 8 * 8, 232)


def _body(table, ranges, pages, row_positions, q, kv_pages, o, part, lse, *, q_smem, k_smem, v_smem,
          stage, header, q_full, q_free, k_full, v_full, k_free, v_free, v_clean, turn, kind,
          tiling, blocks, scale, window, soft_cap, interpreted):
  warpgroups, sets, block, stages, q_buffers = blocks
  group, page_size = tiling.group, tiling.page_size
  head_dim, dtype = q.shape[-1], q.dtype
  padded = gpu_merge.padded_group(group, head_dim)
  q_box, q_tile = q_smem
  chunks, box_tokens, box_group, chunk = q_box.shape[2:]
  cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
  head_sets = tiling.num_kv_heads // sets
  kind = ("narrow", "wide").index(kind)
  first_item, num_works = ranges[kind, 0], ranges[kind, 1] * head_sets
  rounds, rest = lax.div(num_works, tiling.num_ctas), lax.rem(num_works, tiling.num_ctas)
  is_odd = lambda i: lax.rem(i, 2) == 1
  snake = lambda i: jnp.where(is_odd(i), tiling.num_ctas - 1 - cta, cta)
  num_rounds = rounds + (snake(rounds) < rest).astype(jnp.int32)
  shares_kv = warpgroups > 1 and sets == 1

  def find_item(i):
    """Item and first KV head of the work of round i; some others past the end."""
    work = i * tiling.num_ctas + snake(i)
    item = jnp.minimum(first_item + lax.div(work, head_sets), table.shape[0] - 1)
    return item, lax.rem(work, head_sets) * sets

  def kv_run(column, run):
    """Page list, first position, offsets [first, end) to read, and number of blocks of a run.

    Run 0 is KV of a folded segment, run 1 that of the item's own; column(c, run) reads the table.
    """
    page_start, kv_start, first, end = (column(c, run) for c in gpu_schedule.OWN)
    end = jnp.minimum(end, column(gpu_schedule.HIGH, 1) + 1 - kv_start)
    if window is not None:
      seen = column(gpu_schedule.LOW, 1) - window + 1 - kv_start
      first = jnp.maximum(first, lax.div(jnp.maximum(seen, 0), block) * block)
    num_blocks = lax.div(jnp.maximum(end - first, 0) + block - 1, block)
    return page_start, kv_start, first, end, num_blocks

  def first_run(column):
    """1 for an item without KV of a folded segment."""
    return (column(gpu_schedule.KV_END, 0) <= column(gpu_schedule.KV_BEGIN, 0)).astype(jnp.int32)

  @pl.when(wg == warpgroups)
  def _load():
    plgpu.set_max_registers(_registers(warpgroups)[0], action="decrease")

    def read_item(i):
      item, head = find_item(i)
      return item, head, tuple(table[item, c] for c in range(gpu_schedule.NUM_COLUMNS))

    def do_item(i, carry):
      step, (item, head, columns) = carry
      following = read_item(i + 1)  # read ahead: its latency hides behind this item

      def column(c, run):
        own = gpu_schedule.OWN
        return columns[c] if c not in own else jnp.where(
            run == 0, columns[gpu_schedule.HEAD[own.index(c)]], columns[c])

      buffer = lax.rem(i, q_buffers)
      pl.when(i >= q_buffers)(lambda: plgpu.barrier_wait(q_free.at[buffer]))
      record = header.at[buffer, pl.ds(0, table.shape[1])]
      plgpu.copy_gmem_to_smem(table.at[item], record, q_full.at[buffer])
      for w in range(warpgroups):
        token = columns[gpu_schedule.TOKEN] + (0 if sets > 1 else w * tiling.tokens)
        plgpu.copy_gmem_to_smem(
            row_positions.at[pl.ds(lax.div(token * group, ALIGNED) * ALIGNED, COPIED)],
            header.at[buffer, pl.ds(table.shape[1] + w * COPIED, COPIED)],
            q_full.at[buffer])
        row = token * (group // box_group)
        for c in range(chunks):
          plgpu.copy_gmem_to_smem(
              q.at[pl.ds(row, box_tokens), head + (w if sets > 1 else 0), :,
                   pl.ds(c * chunk, chunk)],
              q_box.at[buffer, w, c], q_full.at[buffer])
      run = functools.partial(load_run, head=head, column=column)
      return lax.fori_loop(first_run(column), 2, run, step), following

    def load_run(run, step, *, head, column):
      page_start, _, first, end, num_blocks = kv_run(column, run)
      last_page = page_start + lax.div(jnp.maximum(end - 1, 0), page_size)

      def do_block(b, step):
        slot = lax.rem(step, stages)
        offset = first + b * block
        size = min(block, page_size)
        # Pages past the run's end are not its own: the last one is read again instead.
        at = [(pages[jnp.minimum(page_start + lax.div(offset + j * size, page_size), last_page)],
               lax.rem(offset, page_size) if page_size > block else 0)
              for j in range(block // size)]
        # A block that is part of one page is read no further than a few lines past the run's end.
        lengths = range(_LINES, size + 1, _LINES) if len(at) == 1 else (size,)
        lines = lax.div(jnp.clip(end - offset, 1, size) + _LINES - 1, _LINES) * _LINES
        for smem, full, free, column0 in ((k_smem, k_full, k_free, 0),
                                          (v_smem, v_full, v_free, head_dim)):
          pl.when(step >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
          for length in lengths:
            @pl.when(lines == length if len(lengths) > 1 else True)
            def _(smem=smem, full=full, column0=column0, length=length):
              for s in range(sets):
                for j, (page, within) in enumerate(at):
                  plgpu.copy_gmem_to_smem(
                      kv_pages.at[page, head + s, pl.ds(within, length), pl.ds(column0, head_dim)],
                      smem.at[slot, s, pl.ds(j * size, length)], full.at[slot])
        return step + 1

      return lax.fori_loop(0, num_blocks, do_block, step)

    lax.fori_loop(0, num_rounds, do_item, (jnp.int32(0), read_item(0)))

  @pl.when(wg < warpgroups)
  def _compute():
    plgpu.set_max_registers(_registers(warpgroups)[1], action="increase")
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    kv_set = wg if sets > 1 else 0
    rows_of = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), row_layout)
    zeros = lambda columns: plgpu.layout_cast(
        jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)

    # Two warpgroups multiply in turn, each while the other does its softmax (FlashAttention-3,
    # section 3.1), and let the other go on once their products are issued. More than two keep the
    # tensor cores busy by themselves; the shuffles of their row sums cost more than the registers
    # for sums by column, mod 8, which are added up at the end.
    takes_turns = shares_kv and warpgroups == 2

    def wait_for_turn():
      if takes_turns:
        plgpu.barrier_wait(turn.at[wg])

    def end_turn():
      if takes_turns:
        plgpu.barrier_arrive(turn.at[1 - wg])

    def do_item(i, step):
      item, head = find_item(i)
      buffer = lax.rem(i, q_buffers)
      plgpu.barrier_wait(q_full.at[buffer])

      def column(c, run=1):
        shift = len(gpu_schedule.OWN) * (1 - run) if c in gpu_schedule.OWN else 0
        return header[buffer, c - shift]

      slot, token, num_tokens = (
          column(c) for c in (gpu_schedule.SLOT, gpu_schedule.TOKEN, gpu_schedule.NUM_TOKENS))
      token_begin = token + (0 if sets > 1 else wg * tiling.tokens)
      first_position = (table.shape[1] + wg * COPIED
                        + lax.rem(token_begin * group, ALIGNED))
      position = plgpu.load(header.at[buffer, pl.ds(first_position, ROWS)], layout=row_layout,
                            optimized=False)
      acc = zeros(head_dim)
      total = rows_of(0.0) if takes_turns else zeros(8)
      count = jnp.clip(token + num_tokens - token_begin, 0, tiling.tokens)
      is_idle = count == 0
      begin = first_run(column)
      run = functools.partial(do_run, column=column, position=position, buffer=buffer)
      acc, top, total, step = lax.fori_loop(
          jnp.where(is_idle, 2, begin), 2, run, (acc, rows_of(-jnp.inf), total, step))
      if not takes_turns:
        total = total.sum(axis=1)
      if shares_kv:
        step = lax.fori_loop(jnp.where(is_idle, begin, 2), 2,
                             functools.partial(skip_run, column=column), step)
      plgpu.barrier_arrive(q_free.at[buffer])

      @pl.when(jnp.logical_not(is_idle))
      def _():
        write(item, head + kv_set, slot, slot + token_begin - token, token_begin, count,
              acc, top, total)
      return step

    def skip_run(run, step, *, column):
      """What the other warpgroups expect of one without tokens in this item."""
      _, _, first, end, num_blocks = kv_run(column, run)
      def skip_block(b, step):
        slot = lax.rem(step, stages)
        wait_for_turn()
        end_turn()
        for full, free in ((k_full, k_free), (v_full, v_free)):
          plgpu.barrier_wait(full.at[slot])
          plgpu.barrier_arrive(free.at[slot])
        return step + 1
      step = lax.fori_loop(0, num_blocks, skip_block, step)

      @pl.when(num_blocks > 0)
      def _():
        clean_tail(lax.rem(step + stages - 1, stages), end - first - (num_blocks - 1) * block)
        wait_for_turn()
        end_turn()
      return step

    def do_run(run, carry, *, column, position, buffer):
      """Attention of this warpgroup's rows to one run of KV, on top of what they have seen.

      The product of a block's probabilities with V is issued behind the next block's scores, so
      that it runs while those go through the softmax (FlashAttention-3, section 3.2).
      """
      _, kv_start, first, end, num_blocks = kv_run(column, run)
      low, high = column(gpu_schedule.LOW), column(gpu_schedule.HIGH)
      # Blocks [begin_full, end_full) need no mask.
      end_full = lax.div(jnp.maximum(jnp.minimum(end, low + 1 - kv_start) - first, 0), block)
      begin_full = jnp.int32(1)
      if window is not None:
        hidden = high - window + 1 - kv_start - first
        begin_full = jnp.maximum(lax.div(jnp.maximum(hidden, 0) + block - 1, block), 1)
      begin_full = jnp.minimum(begin_full, num_blocks)
      end_full = jnp.clip(end_full, begin_full, num_blocks)
      no_scores = zeros(block)

      def do_block(b, carry, *, masked, is_first=False):
        acc, top, total, probs, step = carry
        slot, last_slot = lax.rem(step, stages), lax.rem(step + stages - 1, stages)
        plgpu.barrier_wait(k_full.at[slot])
        values = v_smem.at[last_slot, kv_set]

        def multiply(refs):
          acc, scores, *results = refs
          wait_for_turn()
          for c in range(chunks):
            keys = k_smem.at[slot, kv_set, :, pl.ds(c * chunk, chunk)]
            plgpu.wgmma(scores, q_tile.at[buffer, wg, c], keys.transpose((1, 0)))
          if not is_first:
            plgpu.wgmma(acc, probs, values)
          end_turn()
          scores = plgpu.wgmma_accumulator_load(scores, wait_n=0 if is_first else 1)
          scores = lax.optimization_barrier(scores)  # or it may be read before the wait
          plgpu.barrier_arrive(k_free.at[slot])
          weights = lax.optimization_barrier(softmax(b, scores, top, total, masked=masked))
          for ref, value in zip(results, weights):
            ref[...] = value
          # Here, since no compiler moves the softmax beyond such a wait: the one for `acc` follows.
          plgpu.barrier_wait(v_full.at[slot])

        if interpreted:  # which takes neither wgmma from registers nor run_state
          scores = interpreted_qk(slot)
          if not is_first:
            acc += interpreted_pv(probs, values)
          plgpu.barrier_arrive(k_free.at[slot])
          probs, top, total, decay = softmax(b, scores, top, total, masked=masked)
          plgpu.barrier_wait(v_full.at[slot])
        else:
          acc, _, probs, top, total, decay = pl.run_state(multiply)(
              (plgpu.ACC.init(acc), plgpu.ACC.init(no_scores), no_scores, top, total, top))
        if not is_first:
          plgpu.barrier_arrive(v_free.at[last_slot])
        acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
        return acc, top, total, probs.astype(dtype), step + 1

      def softmax(b, scores, top, total, *, masked):
        """Weights of a block's scores; the new maximum and sum, and the decay of the old ones."""
        to_log2 = scale * _LOG2E
        if soft_cap is not None:
          scores = jnp.tanh(scores * (scale / soft_cap))
          to_log2 = soft_cap * _LOG2E
        if masked:
          offset = first + b * block
          lane = plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 1, layout=plgpu.Layout.WGMMA)
          last = jnp.minimum(position - (kv_start + offset), end - offset - 1)
          visible = lane <= lax.broadcast_in_dim(last, lane.shape, [0])
          if window is not None:
            hidden = position - (kv_start + offset + window)
            visible &= lane > lax.broadcast_in_dim(hidden, lane.shape, [0])
          scores = jnp.where(visible, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1) * to_log2)
        if not takes_turns:
          new_top = lax.optimization_barrier(new_top)  # of both rows of a thread, then their weights
        # A row that has seen nothing keeps -inf; 0 in its place makes exp2(-inf - 0) = 0.
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
        decay = jnp.exp2(top - shift)
        probs = jnp.exp2(scores * to_log2 - lax.broadcast_in_dim(shift, scores.shape, [0]))
        if takes_turns:
          return probs, new_top, total * decay + probs.sum(axis=1), decay
        sums = functools.reduce(jnp.add, (probs[:, i:i + 8] for i in range(0, block, 8)))
        return probs, new_top, total * lax.broadcast_in_dim(decay, total.shape, [0]) + sums, decay

      def finish(_, carry):
        """The last block's product with V."""
        acc, top, total, probs, step = carry
        slot = lax.rem(step + stages - 1, stages)
        clean_tail(slot, end - first - (num_blocks - 1) * block)
        values = v_smem.at[slot, kv_set]

        def multiply(acc):
          wait_for_turn()
          plgpu.wgmma(acc, probs, values)
          end_turn()

        if interpreted:
          wait_for_turn()
          acc += interpreted_pv(probs, values)
          end_turn()
        else:
          acc = pl.run_state(multiply)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, top, total, probs, step

      def interpreted_qk(slot):
        """Scores where the members of a union are apart."""
        wait_for_turn()
        rows = [q_box[buffer, wg, c].reshape(ROWS, chunk) for c in range(chunks)]
        keys = k_smem[slot, kv_set]
        plgpu.commit_smem()  # such reads, unlike those of wgmma, are not ordered with TMA writes
        end_turn()
        return jnp.dot(jnp.concatenate(rows, axis=1), keys.T, preferred_element_type=jnp.float32)

      def interpreted_pv(probs, values):
        product = jnp.dot(probs, values[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        return product

      acc, top, total, step = carry
      carry = acc, top, total, no_scores.astype(dtype), step
      begin = functools.partial(do_block, masked=True, is_first=True)
      with_mask = functools.partial(do_block, masked=True)
      carry = lax.fori_loop(0, jnp.minimum(num_blocks, 1), begin, carry)
      if window is not None:
        carry = lax.fori_loop(1, begin_full, with_mask, carry)
      carry = lax.fori_loop(begin_full, end_full, functools.partial(do_block, masked=False), carry)
      carry = lax.fori_loop(end_full, num_blocks, with_mask, carry)
      acc, top, total, _, step = lax.fori_loop(0, jnp.minimum(num_blocks, 1), finish, carry)
      return acc, top, total, step

    def clean_tail(slot, length):
      """Zeroes V past the run's end: its weight is 0, but 0 * NaN is NaN."""
      def clean():
        for begin in range(0, block, ROWS):
          ref = v_smem.at[slot, kv_set, pl.ds(begin, ROWS)]
          value = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
          line = plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=plgpu.Layout.WGMMA)
          ref[...] = jnp.where(line + begin < length, value, jnp.zeros_like(value))
        plgpu.commit_smem()

      @pl.when(length < block)
      def _():
        if shares_kv:
          @pl.when(wg == 0)
          def _():
            clean()
            plgpu.barrier_arrive(v_clean.at[slot])
          pl.when(wg > 0)(lambda: plgpu.barrier_wait(v_clean.at[slot]))
        else:
          clean()

    def write(item, head, slot, first_slot, token_begin, count, acc, top, total):
      """Normalises a tile and sends the rows of its `count` tokens out."""
      seen = total > 0.0
      inverse = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
      acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
      row_lse = jnp.where(seen, top + jnp.log2(jnp.where(seen, total, 1.0)), -jnp.inf)
      row = item * tiling.item_rows + (0 if sets > 1 else wg * ROWS)
      lse[head, pl.ds(row, ROWS)] = row_lse

      def send(source, width, token_rows):
        """Sends the rows of `count` tokens; token_rows(j) is [G, H] of token number j."""
        for begin in range(0, head_dim, width):
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          columns = pl.ds(0, width)
          store(source.at[:, columns], acc[:, begin:begin + width].astype(source.dtype))
          plgpu.commit_smem()
          together = group if source.shape[-1] == width else 1

          def send_rows(j, _, begin=begin):
            target = token_rows(lax.div(j * together, group))
            first = lax.rem(j * together, group)
            plgpu.copy_smem_to_gmem(
                source.at[pl.ds(j * together, together), columns],
                target.at[pl.ds(first, together), pl.ds(begin, width)], commit_group=False)
          lax.fori_loop(0, count * (group // together), send_rows, None)
          plgpu.commit_smem_to_gmem_group()

      o_stage, part_stage, o_box, o_tile = (s.at[wg] for s in stage)
      width = stage_width(head_dim)
      is_full = count == tiling.tokens

      def send_tile():
        for begin in range(0, head_dim, width):
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          for c in range(width // chunk):
            tile = acc[:, begin + c * chunk:begin + (c + 1) * chunk].astype(dtype)
            if interpreted:
              o_box[c] = tile.reshape(box_tokens, group, chunk)
            else:
              o_tile[c] = tile
          plgpu.commit_smem()
          for c in range(width // chunk):
            plgpu.copy_smem_to_gmem(
                o_box.at[c], o.at[pl.ds(token_begin, box_tokens), pl.ds(head * group, group),
                                  pl.ds(begin + c * chunk, chunk)], commit_group=False)
          plgpu.commit_smem_to_gmem_group()

      if ROWS % group == 0:
        pl.when((slot < 0) & is_full)(send_tile)

      @pl.when((slot < 0) & jnp.logical_not(is_full & (ROWS % group == 0)))
      def _():
        send(o_stage, width, lambda j: o.at[token_begin + j, pl.ds(head * group, group)])

      # The rows of a full tile lie side by side: they go straight from registers to memory, where
      # the four threads of a row fill whole sectors.
      is_full &= ROWS == tiling.tokens * padded

      @pl.when((slot >= 0) & is_full)
      def _():
        store(part.at[head, pl.ds(first_slot * padded, ROWS)], acc)

      @pl.when((slot >= 0) & jnp.logical_not(is_full))
      def _():
        send(part_stage, width // 2,
             lambda j: part.at[head, pl.ds((first_slot + j) * padded, group)])

    pl.when(wg == warpgroups - 1)(end_turn)
    lax.fori_loop(0, num_rounds, do_item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
