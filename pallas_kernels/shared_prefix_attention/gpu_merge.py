"""Merges partial results of a token by their log-sum-exp, in float32.

One warpgroup takes the rows of one KV head of a token at a time, as one vector, and walks
the token's slots. Tokens that no item covers get zeros here.
"""

import math

from jax import lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_WARPGROUPS = 4
_CTAS = 2  # per multiprocessor


def padded_group(group: int, head_dim: int) -> int:
  """Rows of one token and KV head in the partial buffer: their elements fill 128 lanes."""
  while group * head_dim % 128:
    group += 1
  return group


def merge_parts(merge, part, lse, o_ref, merged_lse_ref, *, num_kv_heads: int, group: int,
                num_ctas: int, interpret=None):
  """Writes the merged rows into `o_ref` and their base-2 log-sum-exp.

  Args:
    merge: which slots make up a token.
    part: f32[K, slots, Gp * H].
    lse: f32[K, rows], base 2.
    o_ref: [T, Q, H].
    merged_lse_ref: f32[T, Q].
    num_kv_heads, group, num_ctas: static sizes.
    interpret: `plgpu.InterpretGPUParams` or None.
  """
  head_dim, dtype = o_ref.shape[-1], o_ref.dtype
  width = part.shape[-1]

  def merge_parts_kernel(tokens, num_tokens, starts, slots, lse_rows, part, lse, o, merged_lse, stage):
    wg = lax.axis_index("wg")
    worker = lax.axis_index("cta") * _WARPGROUPS + wg
    workers = _CTAS * num_ctas * _WARPGROUPS
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(width // 128, 4))
    row = lax.div(plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout), head_dim)

    def spread(values):
      """Vector with values[g] at all elements of row g."""
      out = plgpu.layout_cast(jnp.full((width,), values[0], jnp.float32), layout)
      for g in range(1, group):
        out = jnp.where(row == g, values[g], out)
      return out

    def do_unit(i, _):
      unit = worker + i * workers
      token = tokens[lax.div(unit, num_kv_heads)]
      head = lax.rem(unit, num_kv_heads)

      def do_part(j, carry):
        acc, top, total = carry
        value = plgpu.load(part.at[head, slots[j]], layout=layout)
        first = lse_rows[j]
        new_top, new_total, decay, weight = [], [], [], []
        for g in range(group):
          x = lse[head, first + g]
          peak = jnp.maximum(top[g], x)
          shift = jnp.where(peak == -jnp.inf, 0.0, peak)
          decay.append(jnp.exp2(top[g] - shift))
          weight.append(jnp.exp2(x - shift))
          new_total.append(total[g] * decay[g] + weight[g])
          new_top.append(peak)
        acc = acc * spread(decay) + value * spread(weight)
        return acc, tuple(new_top), tuple(new_total)

      zeros = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
      carry = (zeros, (jnp.float32(-jnp.inf),) * group, (jnp.float32(0.0),) * group)
      acc, top, total = lax.fori_loop(starts[token], starts[token + 1], do_part, carry)
      safe = [jnp.where(t > 0.0, t, 1.0) for t in total]
      acc = acc * spread([1.0 / s for s in safe])
      for g in range(group):
        merged_lse[token, head * group + g] = top[g] + jnp.log2(safe[g])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      if interpret is None:
        stage.at[wg].reshape(width)[...] = acc.astype(dtype)
      else:  # which cannot reshape a reference
        stage[wg] = acc.astype(dtype).reshape(stage.shape[1:])
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(stage.at[wg, pl.ds(0, group)],
                              o.at[token, pl.ds(head * group, group)])

    units = num_tokens[0] * num_kv_heads
    lax.fori_loop(0, lax.div(units - worker + workers - 1, workers), do_unit, None)
    plgpu.wait_smem_to_gmem(0)

  params = {} if interpret is None else {"interpret": interpret}
  plgpu.kernel(
      merge_parts_kernel, out_type=(),
      scratch_types=[plgpu.SMEM((_WARPGROUPS, width // head_dim, head_dim), dtype)],
      grid=(_CTAS * num_ctas,), grid_names=("cta",), num_threads=_WARPGROUPS, thread_name="wg",
      compiler_params=plgpu.CompilerParams(
          approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
      **params,
  )(merge.tokens, merge.num_tokens, merge.starts, merge.slots, merge.lse_rows, part, lse,
    o_ref, merged_lse_ref)
