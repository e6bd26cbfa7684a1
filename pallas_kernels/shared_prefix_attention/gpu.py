"""shared_prefix_attention on Hopper GPUs: the Mosaic GPU implementation.

Two launches of the attention kernel (narrow and wide q tiles) and one of the merge.
Their sizes are data: `tuned/<device>.json`, by head dim.
"""

import functools
import importlib.resources
import json
import math

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.shared_prefix_attention import gpu_kernel
from pallas_kernels.shared_prefix_attention import gpu_merge
from pallas_kernels.shared_prefix_attention import gpu_schedule
from pallas_kernels.shared_prefix_attention.gpu_schedule import (
    advance, Blocks, CostModel, ROWS, Tiling)

__all__ = ("advance", "attend", "default_tiling", "make_schedule", "tuned", "why_not",
           "why_not_on")

HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (16, 32, 64, 128, 256)


def why_not(*, head_dim: int, page_size: int, num_heads: int, num_kv_heads: int, q_dtype,
            kv_dtype) -> str | None:
  """The reason why this implementation cannot take a case, or None."""
  if jax.__version_info__ < (0, 11):
    return f"mosaic_gpu needs JAX 0.11, whose kernels write into references, got {jax.__version__}"
  if jnp.dtype(q_dtype) != jnp.bfloat16 or jnp.dtype(kv_dtype) != jnp.bfloat16:
    return (f"mosaic_gpu takes bfloat16 q and KV, got {jnp.dtype(q_dtype)} and "
            f"{jnp.dtype(kv_dtype)}: wgmma has no float32 operands")
  if head_dim not in HEAD_DIMS:
    return f"mosaic_gpu takes head dims {HEAD_DIMS}, got {head_dim}"
  if page_size not in PAGE_SIZES:
    return f"mosaic_gpu takes page sizes {PAGE_SIZES}, got {page_size}"
  if num_heads // num_kv_heads > ROWS:
    return f"mosaic_gpu takes up to {ROWS} query heads per KV head, got {num_heads // num_kv_heads}"
  return None


def why_not_on(device: jax.Device) -> str | None:
  """The reason why these kernels cannot run on a device, or None."""
  if device.platform != "gpu":
    return f"mosaic_gpu needs a GPU, got {device.platform}"
  if getattr(device, "compute_capability", None) != "9.0":
    return ("mosaic_gpu multiplies with wgmma, which only compute capability 9.0 (Hopper) has, "
            f"got {device.compute_capability} ({device.device_kind})")
  return None


@functools.cache
def tuned(device: str = "nvidia_h100") -> dict:
  """Block sizes and cost model measured on a device."""
  folder = importlib.resources.files("pallas_kernels.shared_prefix_attention")
  return json.loads((folder / "tuned" / f"{device}.json").read_text())


def default_tiling(*, page_size: int, num_heads: int, num_kv_heads: int, head_dim: int,
                   device: str = "nvidia_h100") -> Tiling:
  """Block sizes for a shape and the cost model, from the table of a device."""
  table = tuned(device)
  by_dim = table["blocks"][str(head_dim)]
  narrow = Blocks(**by_dim["narrow"])
  if num_kv_heads % narrow.kv_sets:  # its warpgroups would take KV heads in pairs
    narrow = Blocks(**by_dim["narrow_odd_kv_heads"])
  return Tiling(narrow=narrow, wide=Blocks(**by_dim["wide"]), num_ctas=table["num_sms"],
                page_size=page_size, num_heads=num_heads, num_kv_heads=num_kv_heads,
                cost_model=CostModel(**table["cost_model"]))


def make_schedule(segments, page_indices: jax.Array, positions: jax.Array, *, page_size: int,
                  num_heads: int, num_kv_heads: int, head_dim: int, max_levels: int = 4,
                  tiling: Tiling | None = None) -> gpu_schedule.Schedule:
  """See `shared_prefix_attention.make_schedule`.

  Args:
    segments: `Segments` of the step.
    page_indices: i32[I], page lists of all segments.
    positions: i32[T], -1 is padding.
    page_size, num_heads, num_kv_heads, head_dim: shapes that `attend` will get.
    max_levels: the most segments that hold one token; bounds the partial results.
    tiling: block sizes; the device's tuned ones where None.
  """
  reason = why_not(head_dim=head_dim, page_size=page_size, num_heads=num_heads,
                   num_kv_heads=num_kv_heads, q_dtype=jnp.bfloat16, kv_dtype=jnp.bfloat16)
  if reason:
    raise NotImplementedError(reason)
  if tiling is None:
    tiling = default_tiling(page_size=page_size, num_heads=num_heads, num_kv_heads=num_kv_heads,
                            head_dim=head_dim)
  return gpu_schedule.make_schedule(segments, page_indices, positions, tiling,
                                    max_levels=max_levels)


def attend(q: jax.Array, kv_pages: jax.Array, schedule: gpu_schedule.Schedule, *, scale: float,
           window: int | None = None, soft_cap: float | None = None,
           interpret=None) -> tuple[jax.Array, jax.Array]:
  """See `shared_prefix_attention`. Returns o [T, Q, H] in q's dtype and f32 lse [T, Q].

  `interpret` runs the kernels in the Mosaic GPU interpreter (JAX 0.11 and newer).
  """
  tiling = schedule.tiling
  num_tokens, num_heads, head_dim = q.shape
  num_kv_heads, page_size = kv_pages.shape[1:3]
  if (num_heads, num_kv_heads, page_size) != (tiling.num_heads, tiling.num_kv_heads,
                                               tiling.page_size):
    raise ValueError(f"the schedule was made for {tiling.num_heads} heads, {tiling.num_kv_heads} "
                     f"KV heads, pages of {tiling.page_size}; got {num_heads}, {num_kv_heads}, "
                     f"{page_size}")
  if kv_pages.shape[3] != 2 * head_dim:
    raise ValueError(f"mosaic_gpu takes pools of width {2 * head_dim}, got {kv_pages.shape[3]}")
  reason = why_not(head_dim=head_dim, page_size=page_size, num_heads=num_heads,
                   num_kv_heads=num_kv_heads, q_dtype=q.dtype, kv_dtype=kv_pages.dtype)
  if reason:
    raise NotImplementedError(reason)
  if scale <= 0.0:
    raise NotImplementedError(f"mosaic_gpu needs a positive scale, got {scale}")

  group, merge = tiling.group, schedule.merge
  q_boxes = gpu_kernel.arrange_q(q, tiling, interpret)
  padded = gpu_merge.padded_group(group, head_dim)
  o = jax.new_ref(lax.empty(q.shape, q.dtype))
  num_slots = merge.slots.shape[0]
  part = jax.new_ref(lax.empty((num_kv_heads, num_slots * padded, head_dim), jnp.float32))
  num_rows = schedule.items.shape[0] * tiling.item_rows
  lse = jax.new_ref(lax.empty((num_kv_heads, num_rows), jnp.float32))
  kinds = ("wide", "narrow") if num_tokens > tiling.tokens else ("narrow",)
  for kind in kinds:
    gpu_kernel.attend_items(q_boxes, kv_pages, schedule, o, part, lse, kind=kind, scale=scale,
                            window=window, soft_cap=soft_cap, interpret=interpret)
  part, lse = jax.freeze(part), jax.freeze(lse)
  merged_lse = jax.new_ref(lax.empty((num_tokens, num_heads), jnp.float32))
  gpu_merge.merge_parts(merge, part.reshape(num_kv_heads, num_slots, -1), lse, o, merged_lse,
                        num_kv_heads=num_kv_heads, group=group, num_ctas=tiling.num_ctas,
                        interpret=interpret)
  rows = merge.direct_row[:, None] + jnp.arange(group)
  direct_lse = lse[:, jnp.maximum(rows, 0)].swapaxes(0, 1).reshape(num_tokens, num_heads)
  lse2 = jnp.where(merge.direct_row[:, None] >= 0, direct_lse, jax.freeze(merged_lse))
  return jax.freeze(o), lse2 * math.log(2.0)
