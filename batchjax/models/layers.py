"""Building blocks of the transformer; every parameter carries logical axis names.

Weights are stored as matrices, and outputs split: TPUs tile the last two axes, and would
copy a weight [D, 2, F] to another layout in every step.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from batchjax.config import ModelConfig, RopeScaling
from batchjax.ops import attention as attention_op
from batchjax.sharding import Split


def _dense_init(in_axis, out_axis):
  return nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis, out_axis)


class RMSNorm(nn.Module):
  """x / rms(x) * scale in float32 (Zhang and Sennrich, 2019, section 4).

  The last cast follows transformers: Llama casts before it multiplies with the
  scale, Gemma (`plus_one`) multiplies with 1 + scale and casts after.
  """

  eps: float
  plus_one: bool
  dtype: str
  axis: str = "embed"

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
    scale = self.param("scale", nn.with_logical_partitioning(init, (self.axis,)),
                       (x.shape[-1],), self.dtype)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    if self.plus_one:
      return (y * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
    return y.astype(x.dtype) * scale


def rope_frequencies(head_dim: int, theta: float,
                     scaling: RopeScaling | None = None) -> np.ndarray:
  """f32[H // 2], radians per position (Su et al., 2021, section 3.2.2)."""
  frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if scaling is None:
    return frequencies.astype(np.float32)
  if scaling.kind == "linear":
    return (frequencies / scaling.factor).astype(np.float32)
  # Share of the unscaled frequency: 1 where the trained context holds more than
  # high_freq_factor turns, 0 where fewer than low_freq_factor, linear between.
  turns = scaling.original_max_len * frequencies / (2 * math.pi)
  keep = np.clip((turns - scaling.low_freq_factor)
                 / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0)
  return (frequencies * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def rope_table(config: ModelConfig, kind: str,
               positions: Int[Array, "T"]) -> tuple[Float[Array, "T h"], Float[Array, "T h"]]:
  """cos and sin, each f32[T, H // 2], for the layers of one kind."""
  if kind == "local" and config.rope_local_theta is not None:
    frequencies = rope_frequencies(config.head_dim, config.rope_local_theta)
  else:
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
  angles = positions[:, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "T ... H"], cos: Float[Array, "T h"],
           sin: Float[Array, "T h"]) -> Float[Array, "T ... H"]:
  """Rotates the pairs (x[i], x[i + H/2]) by each token's angles, in float32."""
  shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1] // 2,)
  cos, sin = cos.reshape(shape), sin.reshape(shape)
  low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
  """Grouped-query attention, over paged KV or whole rows (Ainslie et al., 2023, section 2.2).

  Attributes:
    config: the model's.
    kind: "global", or "local" for a sliding window.
    split: the devices that share the heads.
  """

  config: ModelConfig
  kind: str
  split: Split = Split()

  @nn.compact
  def __call__(self, x: Float[Array, "T D"], rope: tuple[Array, Array],
               kv_pages: Float[Array, "A K page kv_dim"] | None,
               write_slots: Int[Array, "T"] | None,
               schedule: attention_op.Schedule) -> tuple[Array, Array | None]:
    """Returns the output [T, D] and the pool with this step's KV written (None for whole rows)."""
    c = self.config
    group = c.num_heads // c.num_kv_heads
    qkv_shape = (c.num_kv_heads, group + 2, c.head_dim)
    out_shape = (c.num_kv_heads, group, c.head_dim, c.hidden_size)
    head_axes = ("kv_heads", "heads_per_kv_head", "head_dim")

    w = self.param("qkv", nn.with_logical_partitioning(
        _dense_init(0, 1), ("embed", "kv_heads")), (c.hidden_size, math.prod(qkv_shape)), c.dtype)
    qkv = (x @ w).reshape(-1, *qkv_shape)
    if c.qkv_bias:
      qkv += self.param("qkv_bias", nn.with_logical_partitioning(
          nn.initializers.zeros, head_axes), qkv_shape, c.dtype)
    q, k, v = qkv[:, :, :group], qkv[:, :, group], qkv[:, :, group + 1]
    if c.qk_norm:
      norm = lambda name: RMSNorm(c.norm_eps, c.norm_plus_one, c.dtype, "head_dim", name=name)
      q, k = norm("q_norm")(q), norm("k_norm")(k)
    q, k = rotate(q, *rope), rotate(k, *rope)

    o, kv_pages = attention_op.attend(
        q.reshape(-1, c.num_heads, c.head_dim), k, v, kv_pages, write_slots, schedule,
        scale=c.head_dim ** -0.5 if c.query_scale is None else c.query_scale,
        window=c.sliding_window if self.kind == "local" else None,
        soft_cap=c.attn_soft_cap)

    w = self.param("out", nn.with_logical_partitioning(
        _dense_init((0, 1, 2), 3), (*head_axes, "embed")), out_shape, c.dtype)
    # Flattened by hand: an einsum over k, g and h orders them anew and transposes the weight.
    num_tokens = x.shape[0]
    return self.split.sum(o.reshape(num_tokens, -1) @ w.reshape(-1, c.hidden_size)), kv_pages


class FeedForward(nn.Module):
  """Gated feed-forward: down(act(gate x) * up x) (Shazeer, 2020, section 2)."""

  config: ModelConfig
  split: Split = Split()

  @nn.compact
  def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    c = self.config
    gate_up = self.param("gate_up", nn.with_logical_partitioning(
        _dense_init(0, 1), ("embed", "ffn")), (c.hidden_size, 2 * c.ffn_size), c.dtype)
    down = self.param("down", nn.with_logical_partitioning(
        _dense_init(0, 1), ("ffn", "embed")), (c.ffn_size, c.hidden_size), c.dtype)
    gate, up = jnp.split(x @ gate_up, 2, axis=1)
    act = jax.nn.silu if c.activation == "silu" else jax.nn.gelu  # gelu: the tanh form
    return self.split.sum((act(gate) * up) @ down)


class VocabTable(nn.Module):
  """One vector per token of the vocabulary: looked up, or multiplied to logits."""

  config: ModelConfig
  param_name: str
  split: Split = Split()

  def setup(self):
    c = self.config
    self.table = self.param(self.param_name, nn.with_logical_partitioning(
        _dense_init(1, 0), ("vocab", "embed")), (c.vocab_size, c.hidden_size), c.dtype)

  def lookup(self, tokens: Int[Array, "T"]) -> Float[Array, "T D"]:
    """Rows of the table; padding (-1) reads row 0, or zeros where the table is split."""
    if self.split.num_devices == 1:
      return jnp.take(self.table, tokens, axis=0, mode="clip")
    # One device has the row, the others add zeros.
    return self.split.sum(jnp.take(self.table, self.split.places(tokens), axis=0, mode="fill",
                                   fill_value=0))

  def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Dot products with every row, in float32."""
    return jnp.einsum("...d,vd->...v", hidden, self.table, preferred_element_type=jnp.float32)
