"""Writes a step's keys and values into their pages in place, on TPU.

XLA's scatter does not do it: the pool keeps tokens next to lanes (the tile of VMEM and of
HBM), the scatter wants KV heads there, so it copies the whole pool to another layout and
back in every layer. A row of a tile cannot be written alone either: a tile of `_ROWS` tokens
is read, changed and written back, many tiles in flight.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

_ROWS = 8  # tokens of a tile in HBM
_AHEAD = 8  # tiles whose reads are in flight
_BLOCK = 256  # tokens of a grid step


def write_kv(kv_pages: jax.Array, k: jax.Array, v: jax.Array, write_slots: jax.Array, *,
             interpret=False) -> jax.Array:
  """Writes the keys and values of a step into one layer's pool.

  In place when `kv_pages` is donated or otherwise dead.

  Args:
    kv_pages: [A, K, page_size, W], the pool; page_size a multiple of 8. Of a written slot the
      lanes behind 2 * H become zeros.
    k, v: [T, K, H].
    write_slots: i32[T], page * page_size + offset of each token; -1 drops it. Tokens whose
      slots lie in the same 8 tokens of a page are adjacent on the flat axis.
    interpret: as of `pallas_call`.

  Returns:
    The pool, in the buffer of `kv_pages`.
  """
  num_tokens, (_, num_kv_heads, page_size, width) = write_slots.shape[0], kv_pages.shape
  block = min(_BLOCK, num_tokens)
  num_blocks = -(-num_tokens // block)
  padding = num_blocks * block - num_tokens
  # float32 rows: a row of packed bf16 cannot be addressed alone.
  new = jnp.concatenate([k, v], axis=-1).astype(kv_pages.dtype).astype(jnp.float32)
  new = jnp.pad(new, ((0, padding), (0, 0), (0, width - new.shape[2])))
  slots = jnp.pad(write_slots.astype(jnp.int32), (0, padding), constant_values=-1)

  # A run is the tokens of one grid step that fall into one tile.
  token = jnp.arange(slots.shape[0])
  tile = jnp.where(slots < 0, -1, slots // _ROWS)
  opens = (tile >= 0) & ((tile != jnp.roll(tile, 1)) | (token % block == 0))
  run = jnp.cumsum(opens) - 1
  starts = jnp.argsort(~opens, stable=True).astype(jnp.int32)
  lengths = jnp.zeros_like(slots).at[jnp.where(tile >= 0, run, slots.shape[0])].add(1, mode="drop")
  firsts = jnp.concatenate([jnp.zeros((1,), jnp.int32), (run + 1)[block - 1::block]])

  scratch = [pltpu.VMEM((2 * _AHEAD, num_kv_heads, _ROWS, width), kv_pages.dtype),
             pltpu.SemaphoreType.DMA((2 * _AHEAD,)), pltpu.SemaphoreType.DMA((2 * _AHEAD,))]
  hbm = pl.BlockSpec(memory_space=pltpu.HBM)
  return pl.pallas_call(
      functools.partial(_kernel, block=block, page_size=page_size),
      out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=4, grid=(num_blocks,),
          in_specs=[pl.BlockSpec((block, num_kv_heads, width), lambda b, *_: (b, 0, 0)), hbm],
          out_specs=hbm, scratch_shapes=scratch),
      input_output_aliases={5: 0},
      compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",),
                                           disable_bounds_checks=True),
      interpret=interpret, name="write_kv",
  )(slots, starts, lengths, firsts.astype(jnp.int32), new, kv_pages)


def _kernel(slots, starts, lengths, firsts, new, kv_in, kv_out, tiles, read_sems, write_sems, *,
            block, page_size):
  del kv_in  # the same buffer as kv_out
  step = pl.program_id(0)
  first, stop = firsts[step], firsts[step + 1]
  num_slots = tiles.shape[0]

  def place(run):
    """(tile in HBM, slot in VMEM) of a run."""
    at = slots[starts[run]]
    row = lax.rem(at, page_size) - lax.rem(at, _ROWS)
    tile = kv_out.at[lax.div(at, page_size), :, pl.ds(pl.multiple_of(row, _ROWS), _ROWS)]
    return tile, lax.rem(run, num_slots)

  def read(run):
    tile, slot = place(run)
    return pltpu.make_async_copy(tile, tiles.at[slot], read_sems.at[slot])

  def write(run):
    tile, slot = place(run)
    return pltpu.make_async_copy(tiles.at[slot], tile, write_sems.at[slot])

  def start_read(run):
    @pl.when(run < stop)
    def _():
      # The slot's last write was of the run `num_slots` before, in this grid step or none.
      @pl.when(run - num_slots >= first)
      def _():
        write(run - num_slots).wait()

      read(run).start()

  def change(run, carry):
    start_read(run + _AHEAD)
    read(run).wait()
    slot = lax.rem(run, num_slots)

    def put(i, tile):
      token = starts[run] + i
      row = lax.broadcasted_iota(jnp.int32, tile.shape, 1)
      value = new[token - step * block]
      return jnp.where(row == lax.rem(slots[token], _ROWS), value[:, None, :], tile)

    tile = tiles[slot].astype(jnp.float32)
    tiles[slot] = lax.fori_loop(0, lengths[run], put, tile).astype(tiles.dtype)
    write(run).start()
    return carry

  def wait_write(run, carry):
    write(run).wait()
    return carry

  for i in range(_AHEAD):
    start_read(first + i)
  lax.fori_loop(first, stop, change, None)
  # A tile may go on in the next grid step: all writes end before it reads.
  lax.fori_loop(jnp.maximum(first, stop - num_slots), stop, wait_write, None)
