"""Attention of whole sequences, without a KV pool; differentiable."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class WholeRows:
  """In the place of a schedule: the flat token axis is whole sequences of `row_len` tokens."""

  row_len: int


def causal_attention(q: Float[Array, "T Q H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"],
                     rows: WholeRows, *, scale: float, window: int | None = None,
                     soft_cap: float | None = None) -> Float[Array, "T Q H"]:
  """softmax(scale * q k^T) v over each token and those before it in its row.

  Scores are held whole: float32 [rows, Q, row_len, row_len].

  Args:
    q, k, v: rotated queries and keys, and values.
    rows: how the token axis is cut.
    scale, window, soft_cap: as in `attention.shared_prefix_attention`.

  Returns:
    In q's dtype.
  """
  num_kv_heads, length = k.shape[1], rows.row_len
  split = lambda x, *heads: x.reshape(-1, length, *heads, x.shape[-1])
  q = split(q, num_kv_heads, q.shape[1] // num_kv_heads)
  k, v = split(k, num_kv_heads), split(v, num_kv_heads)
  scores = scale * jnp.einsum("bqkgh,bskh->bkgqs", q, k, preferred_element_type=jnp.float32)
  if soft_cap is not None:
    scores = soft_cap * jnp.tanh(scores / soft_cap)
  behind = jnp.arange(length)[:, None] - jnp.arange(length)
  visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
  # No row of scores is all -inf, since a token sees itself.
  weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
  o = jnp.einsum("bkgqs,bskh->bqkgh", weights, v.astype(jnp.float32))
  return o.reshape(-1, q.shape[2] * q.shape[3], q.shape[-1]).astype(q.dtype)
