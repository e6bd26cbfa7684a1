"""Attention over a tree of shared prefixes held in paged KV.

One op covers decode rows, speculative rows and prefill chunks in one step.
Tokens lie on one flat axis so that every tree node covers a contiguous range
of them; a `Segments` entry says which range attends to which KV. A prefix
shared by n rows is one segment, so its KV is read once for the group instead
of once per row (Hydragen, section 3; BatchLLM, section 5 is the two-level case,
ragged paged attention the one-level case).

KV layout: `kv_pages[A, K, page_size, 2 * H]`, keys in the lower and values in
the upper half of the last axis. Why: the KV of one head and page is one
contiguous tile, so a page arrives as one TMA box or DMA for all heads of a
device; head_dim 64 fills all 128 TPU lanes without padding; page_size is the
sublane axis and never padded by an odd number of heads; sharding over KV
heads splits one axis.

Dimension letters: T flat tokens, Q query heads, K KV heads, H head dim,
A pages in the pool, S segments, I entries of the flat page list.
"""

from typing import NamedTuple

import jax

from pallas_kernels.shared_prefix_attention import reference

IMPLEMENTATIONS = ("reference",)


class Segments(NamedTuple):
  """KV that a contiguous range of tokens attends to; all fields i32[S].

  Segments of one tree level have disjoint ranges. Unused entries have
  q_len = kv_len = 0.

  Attributes:
    q_start, q_len: the token range.
    kv_start: absolute position of the first KV token held.
    kv_len: KV tokens held, those written in this step included.
    page_start: where the segment's page list begins in `page_indices`.
  """

  q_start: jax.Array
  q_len: jax.Array
  kv_start: jax.Array
  kv_len: jax.Array
  page_start: jax.Array


def make_schedule(segments: Segments, page_indices: jax.Array, positions: jax.Array, *,
                  page_size: int, implementation: str | None = None):
  """Work list of a step: built once, shared by every layer.

  Args:
    segments: what each token attends to.
    page_indices: i32[I], page lists of all segments.
    positions: i32[T], absolute position of each token; -1 is padding.
    page_size: tokens of a KV page.
    implementation: as in `shared_prefix_attention`.

  Returns:
    A pytree that only `shared_prefix_attention` with the same implementation reads.
  """
  _pick(implementation)
  return reference.make_schedule(segments, page_indices, positions, page_size=page_size)


def shared_prefix_attention(q: jax.Array, kv_pages: jax.Array, schedule, *, scale: float,
                            window: int | None = None, soft_cap: float | None = None,
                            implementation: str | None = None,
                            return_lse: bool = False):
  """softmax(scale * q k^T) v over the KV of all segments that hold a token.

  Args:
    q: [T, Q, H], rotated queries.
    kv_pages: [A, K, page_size, 2 * H]; this step's K and V are already written.
      Slots that no segment holds may contain anything, NaN included.
    schedule: from `make_schedule`.
    scale: multiplies the scores.
    window: token at position p sees KV positions in (p - window, p]; None sees all <= p.
    soft_cap: scores become soft_cap * tanh(scores / soft_cap).
    implementation: "reference" (XLA); None picks by device.
    return_lse: also return the log-sum-exp of the scores.

  Returns:
    o: [T, Q, H] in q's dtype, zeros where a token attends to nothing;
    with `return_lse` also f32[T, Q], -inf where a token attends to nothing.

  Raises:
    NotImplementedError: the implementation cannot run here.
    ValueError: shapes do not fit together.
  """
  if q.ndim != 3 or kv_pages.ndim != 4 or kv_pages.shape[3] != 2 * q.shape[2]:
    raise ValueError(f"q {q.shape} needs kv_pages [A, K, page_size, {2 * q.shape[-1]}], got {kv_pages.shape}")
  if q.shape[1] % kv_pages.shape[1]:
    raise ValueError(f"{q.shape[1]} query heads do not divide over {kv_pages.shape[1]} KV heads")
  _pick(implementation)
  o, lse = reference.attend(q, kv_pages, schedule, scale=scale, window=window, soft_cap=soft_cap)
  o = o.astype(q.dtype)
  return (o, lse) if return_lse else o


def _pick(implementation: str | None) -> str:
  if implementation is None:
    return "reference"
  if implementation not in IMPLEMENTATIONS:
    raise NotImplementedError(
        f"shared_prefix_attention has no implementation {implementation!r}; it has {IMPLEMENTATIONS}")
  return implementation
