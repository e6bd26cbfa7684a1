"""shared_prefix_attention on TPUs: the Mosaic TPU implementation.

Block sizes are data, `tuned/tpu_<generation>.json`; a shape that does not fit a chip's VMEM
with them gets smaller ones. `TPU.md` states how the kernel works and what it costs.
"""

import functools
import importlib.resources
import json

import jax
import jax.numpy as jnp

from pallas_kernels.shared_prefix_attention import tpu_kernel
from pallas_kernels.shared_prefix_attention import tpu_schedule
from pallas_kernels.shared_prefix_attention.tpu_schedule import advance, LANES, Schedule, Tiling

__all__ = ("advance", "attend", "default_tiling", "generation_of", "make_schedule", "pool_width",
           "tuned", "why_not")

GENERATIONS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
               "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x", "TPU v7x": "tpu7x"}
PAGE_SIZES = (16, 32, 64, 128, 256)

# A q block starts at whole bf16 tiles of VMEM, whatever the heads.
_TOKEN_ALIGN = 16


def why_not(*, head_dim: int, page_size: int, q_dtype, kv_dtype) -> str | None:
  """The reason why this implementation cannot take a case, or None."""
  for name, dtype in (("q", q_dtype), ("KV", kv_dtype)):
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
      return f"mosaic_tpu takes bfloat16 and float32, got {name} of {jnp.dtype(dtype)}"
  if page_size not in PAGE_SIZES:
    return f"mosaic_tpu takes page sizes {PAGE_SIZES}, got {page_size}"
  if head_dim % 8 or head_dim > 256:
    return f"mosaic_tpu takes head dims up to 256 that 8 divides, got {head_dim}"
  return None


def pool_width(head_dim: int) -> int:
  """The width of a KV pool that XLA stores as the kernels read it: 2 * H in whole lanes."""
  return -(-2 * head_dim // LANES) * LANES


@functools.cache
def tuned(generation: str) -> dict:
  """Block sizes and rates of a TPU generation: "v5e", "v5p", "v6e" or "tpu7x"."""
  folder = importlib.resources.files("pallas_kernels.shared_prefix_attention")
  return json.loads((folder / "tuned" / f"tpu_{generation}.json").read_text())


def generation_of(device_kind: str) -> str:
  """The name of the table of a `jax.Device.device_kind`.

  Raises:
    NotImplementedError: there is none.
  """
  if device_kind not in GENERATIONS:
    raise NotImplementedError(
        f"mosaic_tpu has block sizes for {sorted(GENERATIONS)}, not for {device_kind!r}")
  return GENERATIONS[device_kind]


def _target_kind() -> str:
  target = jax.sharding.get_abstract_mesh().abstract_device
  return (target or jax.devices()[0]).device_kind


def default_tiling(*, num_tokens: int, page_size: int, num_heads: int, num_kv_heads: int,
                   head_dim: int, generation: str, dtype=jnp.bfloat16) -> Tiling:
  """Block sizes for a shape, from the table of a generation.

  Raises:
    NotImplementedError: even the smallest blocks exceed the chip's VMEM.
  """
  table = tuned(generation)
  sizes, limit = table["blocks"], table["vmem_bytes"] - (4 << 20)
  cores = table["cores"] if num_kv_heads % table["cores"] == 0 else 1
  kv_heads, group = num_kv_heads // cores, num_heads // num_kv_heads
  width = head_dim if head_dim % LANES == 0 else 2 * head_dim
  # Few or narrow KV heads make small pages: more tokens per unit keep the cycles per byte low.
  token_lanes = kv_heads * pool_width(head_dim)
  row_kv = sizes["row_kv"]
  while row_kv < sizes["max_row_kv"] and 2 * row_kv * token_lanes <= sizes["row_unit_lanes"]:
    row_kv *= 2
  q = sizes["q_rows"] // (kv_heads * group) // _TOKEN_ALIGN * _TOKEN_ALIGN
  q = min(max(q, _TOKEN_ALIGN), -(-num_tokens // _TOKEN_ALIGN) * _TOKEN_ALIGN)
  heads = max(n for n in range(1, min(kv_heads, sizes["heads"]) + 1) if kv_heads % n == 0)
  tiling = Tiling(q=q, tile_rows=min(sizes["tile_rows"], q * group), heads=heads,
                  tile_kv=sizes["tile_kv"], row_kv=row_kv, rows=sizes["rows"],
                  ahead=sizes["ahead"], cores=cores)
  smallest = max(page_size, LANES)
  while True:
    used = tpu_kernel.vmem_bytes(
        tiling, -(-kv_heads * group // 8) * 8, kv_heads, group, width, 2 * head_dim, dtype, dtype)
    if used <= limit:
      return tiling
    if max(tiling.tile_kv, tiling.row_kv) > smallest:
      half = max(tiling.tile_kv, tiling.row_kv) // 2
      tiling = tiling._replace(tile_kv=min(tiling.tile_kv, half), row_kv=min(tiling.row_kv, half))
    elif tiling.rows > 2:
      tiling = tiling._replace(rows=2, ahead=2)
    elif tiling.q > _TOKEN_ALIGN:
      q = tiling.q // 2 // _TOKEN_ALIGN * _TOKEN_ALIGN
      tiling = tiling._replace(q=q, tile_rows=min(tiling.tile_rows, q * group))
    else:
      raise NotImplementedError(
          f"{num_heads} query and {num_kv_heads} KV heads of {head_dim} need {used >> 20} MiB of "
          f"VMEM on one device, {generation} has {limit >> 20}: shard the heads")


def make_schedule(segments, page_indices: jax.Array, positions: jax.Array, *, page_size: int,
                  num_heads: int, num_kv_heads: int, head_dim: int, dtype=jnp.bfloat16,
                  max_levels: int = 4, generation: str | None = None,
                  tiling: Tiling | None = None) -> Schedule:
  """See `shared_prefix_attention.make_schedule`.

  Args:
    segments: `Segments` of the step.
    page_indices: i32[I], page lists of all segments; any length, they stay in HBM.
    positions: i32[T], -1 is padding.
    page_size, num_heads, num_kv_heads, head_dim: shapes that `attend` will get.
    dtype: the wider one of q and KV.
    max_levels: the most segments that hold one token; bounds the work list.
    generation: whose block sizes to take; where None that of the mesh in context, if it names
      an abstract device (to compile for a TPU that is not there), else of the default device.
    tiling: block sizes; the tuned ones where None.

  Raises:
    NotImplementedError: the shapes or the device have no block sizes.
  """
  reason = why_not(head_dim=head_dim, page_size=page_size, q_dtype=dtype, kv_dtype=dtype)
  if reason:
    raise NotImplementedError(reason)
  if tiling is None:
    tiling = default_tiling(
        num_tokens=positions.shape[0], page_size=page_size, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype,
        generation=generation or generation_of(_target_kind()))
  return tpu_schedule.make_schedule(segments, page_indices, positions, tiling,
                                    page_size=page_size, max_levels=max_levels)


def attend(q: jax.Array, kv_pages: jax.Array, schedule: Schedule, *, scale: float,
           window: int | None = None, soft_cap: float | None = None,
           interpret=False) -> tuple[jax.Array, jax.Array]:
  """See `shared_prefix_attention`. Returns o [T, Q, H] in q's dtype and f32 lse [T, Q].

  All levels are merged in float32 before o is rounded. `interpret` is `pallas_call`'s, for
  instance `pltpu.InterpretParams()`.

  Raises:
    NotImplementedError: the reason of `why_not`, or a scale that is not positive.
    ValueError: the schedule was made for other shapes.
  """
  tiling = schedule.tiling
  num_tokens, num_heads, head_dim = q.shape
  num_kv_heads, page_size = kv_pages.shape[1:3]
  reason = why_not(head_dim=head_dim, page_size=page_size, q_dtype=q.dtype,
                   kv_dtype=kv_pages.dtype)
  if reason:
    raise NotImplementedError(reason)
  if scale <= 0.0:
    raise NotImplementedError(f"mosaic_tpu needs a positive scale, got {scale}")
  padded_tokens, group = schedule.positions.shape[0], num_heads // num_kv_heads
  if page_size != schedule.page_size.tokens or not 0 <= padded_tokens - num_tokens < tiling.q:
    raise ValueError(f"the schedule was made for pages of {schedule.page_size.tokens} and up to "
                     f"{padded_tokens} tokens; got {page_size} and {num_tokens}")
  if num_kv_heads % (tiling.cores * tiling.heads) or tiling.tile_rows > tiling.q * group:
    raise ValueError(f"{tiling} does not fit {num_heads} query and {num_kv_heads} KV heads")

  dtype = jnp.promote_types(q.dtype, kv_pages.dtype)
  # Where the keys do not fill lanes, q is padded with zeros and meets the whole [K, V] row:
  # q [K, V]^T is q K^T, and P [K, V] holds P V behind P K.
  width = head_dim if head_dim % LANES == 0 else 2 * head_dim
  padding = ((0, padded_tokens - num_tokens), (0, 0), (0, width - head_dim))
  padded = jnp.pad(q.astype(dtype), padding)
  q_tiles = padded.reshape(padded_tokens, num_kv_heads, group, width).swapaxes(0, 1)
  q_tiles = q_tiles.reshape(num_kv_heads, padded_tokens * group, width)
  heads = num_heads // tiling.cores
  q_rows = padded.reshape(padded_tokens, tiling.cores, heads, width)
  q_rows = jnp.pad(q_rows, ((0, 0), (0, 0), (0, -heads % 8), (0, 0)))

  table, units = tpu_schedule.scalars(schedule, window)
  o, lse = tpu_kernel.attend_blocks(
      table, units, schedule, q_rows, q_tiles, kv_pages, values_at=2 * head_dim - width,
      scale=scale, window=window, soft_cap=soft_cap, interpret=interpret)
  o = o[:num_tokens, :, :heads, width - head_dim:].reshape(q.shape)
  lse = lse[:, :num_tokens, :heads].swapaxes(0, 1).reshape(num_tokens, num_heads)
  return o.astype(q.dtype), lse
