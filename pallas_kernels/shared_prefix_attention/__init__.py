"""Attention over a tree of shared prefixes held in paged KV.

One op covers decode rows, speculative rows and prefill chunks in one step.
Tokens lie on one flat axis so that every tree node covers a contiguous range
of them; a `Segments` entry says which range attends to which KV. A prefix
shared by n rows is one segment, so its KV is read once for the group instead
of once per row (Hydragen, section 3; BatchLLM, section 5 is the two-level case,
ragged paged attention the one-level case).

KV layout: `kv_pages[A, K, page_size, W]`, keys at [0, H) and values at [H, 2 * H)
of the last axis. Why: the KV of one head and page is one contiguous tile, so a
page arrives as one TMA box or DMA for all heads of a device; head_dim 64 fills
all 128 TPU lanes without padding; page_size is the sublane axis and never padded
by an odd number of heads; sharding over KV heads splits one axis.

W is 2 * H. "reference" and "mosaic_tpu" also take a wider pool, and whatever lies
behind 2 * H, NaN included, changes no result. On TPU W should be a multiple of the
128 lanes: else XLA stores the pool with pages in the lanes, and copies all of it
before every kernel.

Dimension letters: T flat tokens, Q query heads, K KV heads, H head dim, W width of
the pool, A pages in the pool, S segments, I entries of the flat page list.
"""

import functools
import importlib
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.shared_prefix_attention import reference

# Each names a module with `make_schedule`, `advance` and `attend`.
_MODULES = {"reference": "reference", "mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}
IMPLEMENTATIONS = tuple(_MODULES)


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


class Schedule(NamedTuple):
  """Work list of a step for one implementation."""

  implementation: "Implementation"
  work: Any


@jax.tree_util.register_static
class Implementation(str):
  """Name of an implementation; static in a pytree."""


def make_schedule(segments: Segments, page_indices: jax.Array, positions: jax.Array, *,
                  page_size: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: Any,
                  max_segments: int = 5, implementation: str | None = None) -> Schedule:
  """Work list of a step: built once, shared by every layer.

  Args:
    segments: what each token attends to.
    page_indices: i32[I], page lists of all segments.
    positions: i32[T], absolute position of each token; -1 is padding.
    page_size: tokens of a KV page.
    num_heads, num_kv_heads, head_dim, dtype: of the queries and KV to come.
    max_segments: the most segments that hold one token.
    implementation: "reference" (XLA), "mosaic_gpu" (Hopper), "mosaic_tpu"; None
      takes the one made for the default device where it can do these shapes,
      else the reference; the log names it.

  Raises:
    NotImplementedError: the named implementation cannot do this; it says why.
  """
  shapes = dict(page_size=page_size, num_heads=num_heads, num_kv_heads=num_kv_heads,
                head_dim=head_dim)
  name = implementation
  if name is None:
    name = _pick(jax.devices()[0], jnp.dtype(dtype).name, **shapes)
  if name not in _MODULES:
    raise NotImplementedError(
        f"shared_prefix_attention has no implementation {name!r}; it has {IMPLEMENTATIONS}")
  if name == "reference":
    work = reference.make_schedule(segments, page_indices, positions, page_size=page_size)
  else:
    reason = _why_not(name, jnp.dtype(dtype).name, **shapes)
    if reason:
      raise NotImplementedError(reason)
    options = {"dtype": dtype} if name == "mosaic_tpu" else {}  # VMEM sizes depend on it
    work = _module(name).make_schedule(segments, page_indices, positions,
                                       max_levels=max_segments, **shapes, **options)
  return Schedule(Implementation(name), work)


def advance(schedule: Schedule, positions: jax.Array) -> Schedule:
  """The same work list for new positions: the next step of a decode loop.

  Made once with the `kv_len` that the loop ends with, a schedule serves every step of it: what a
  token sees is cut off at its position.

  Args:
    schedule: from `make_schedule`.
    positions: i32[T], none before the one that the schedule was made for.
  """
  return schedule._replace(work=_module(schedule.implementation).advance(schedule.work, positions))


def shared_prefix_attention(q: jax.Array, kv_pages: jax.Array, schedule: Schedule, *, scale: float,
                            window: int | None = None, soft_cap: float | None = None,
                            return_lse: bool = False, interpret: Any = None):
  """softmax(scale * q k^T) v over the KV of all segments that hold a token.

  Args:
    q: [T, Q, H], rotated queries.
    kv_pages: [A, K, page_size, W]; this step's K and V are already written.
      Slots that no segment holds may contain anything, NaN included.
    schedule: from `make_schedule`, which also settled the implementation.
    scale: multiplies the scores.
    window: token at position p sees KV positions in (p - window, p]; None sees all <= p.
    soft_cap: scores become soft_cap * tanh(scores / soft_cap).
    return_lse: also return the log-sum-exp of the scores.
    interpret: interpreter parameters of the Pallas kernels, for tests on the CPU.

  Returns:
    o: [T, Q, H] in q's dtype, zeros where a token attends to nothing;
    with `return_lse` also f32[T, Q], -inf where a token attends to nothing.

  Raises:
    NotImplementedError: the implementation cannot run here.
    ValueError: shapes do not fit together.
  """
  if q.ndim != 3 or kv_pages.ndim != 4 or kv_pages.shape[3] < 2 * q.shape[2]:
    raise ValueError(f"q {q.shape} needs kv_pages [A, K, page_size, {2 * q.shape[-1]} or more], "
                     f"got {kv_pages.shape}")
  if q.shape[1] % kv_pages.shape[1]:
    raise ValueError(f"{q.shape[1]} query heads do not divide over {kv_pages.shape[1]} KV heads")
  o, lse = _attend(q, kv_pages, schedule, float(scale), window, soft_cap, interpret)
  return (o, lse) if return_lse else o


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _attend(q, kv_pages, schedule, scale, window, soft_cap, interpret):
  """Jitted so that the layers of a model share one trace and one lowering."""
  options = {"interpret": interpret} if interpret else {}
  o, lse = _module(schedule.implementation).attend(
      q, kv_pages, schedule.work, scale=scale, window=window, soft_cap=soft_cap, **options)
  return o.astype(q.dtype), lse


def write_kv(kv_pages: jax.Array, k: jax.Array, v: jax.Array, write_slots: jax.Array, *,
             implementation: str = "reference", interpret: Any = None) -> jax.Array:
  """Writes the keys and values of a step into one layer's pool, in place when it is donated.

  Args:
    kv_pages: [A, K, page_size, W].
    k, v: [T, K, H], keys rotated.
    write_slots: i32[T], page * page_size + offset of each token; -1 drops it. Slots other than
      -1 differ, and those of one page stand side by side on the flat axis.
    implementation: `Schedule.implementation` of the step. XLA's scatter is in place on CPU and
      GPU; on TPU it copies the pool, so "mosaic_tpu" has a kernel.
    interpret: interpreter parameters, for tests on the CPU.
  """
  if implementation == "mosaic_tpu":
    from pallas_kernels.shared_prefix_attention import tpu_write  # as `_module`: only when needed
    return tpu_write.write_kv(kv_pages, k, v, write_slots, interpret=interpret or False)
  return reference.write_kv(kv_pages, k, v, write_slots)


def _module(name: str):
  """The module of an implementation; the Mosaic ones are imported when first needed."""
  return importlib.import_module(f"{__name__}.{_MODULES[name]}")


def _why_not(name: str, dtype: str, *, page_size: int, num_heads: int, num_kv_heads: int,
             head_dim: int) -> str | None:
  if name == "mosaic_tpu":
    return _module(name).why_not(head_dim=head_dim, page_size=page_size, q_dtype=dtype,
                                 kv_dtype=dtype)
  return _module(name).why_not(head_dim=head_dim, page_size=page_size, num_heads=num_heads,
                               num_kv_heads=num_kv_heads, q_dtype=dtype, kv_dtype=dtype)


@functools.cache
def _pick(device: jax.Device, dtype: str, **shapes: int) -> str:
  """The best implementation that can run; cached so that the log names it once."""
  if device.platform == "tpu":
    name, reason = "mosaic_tpu", _why_not("mosaic_tpu", dtype, **shapes)
  elif device.platform == "gpu":
    name = "mosaic_gpu"
    reason = _module(name).why_not_on(device) or _why_not(name, dtype, **shapes)
  else:
    name, reason = "reference", None
  if reason:
    logging.getLogger(__name__).warning("shared_prefix_attention runs as XLA reference: %s", reason)
    return "reference"
  logging.getLogger(__name__).info("shared_prefix_attention runs as %s", name)
  return name
