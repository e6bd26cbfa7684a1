"""The XLA reference against a float64 computation written as plainly as can be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import shared_prefix_attention as spa
from pallas_kernels.shared_prefix_attention import reference


def random_tree_step(rng, *, num_groups, rows_per_group, prefix_len, max_own, chunk, page_size,
                     num_kv_heads=2, head_dim=8, depth=2):
  """Decode rows and prefill chunks under `depth` levels of shared prefixes, pages shuffled.

  Returns kv_pages with NaN wherever no segment looks, and one list of (segment) tuples.
  """
  segments, pages, positions = [], [], []
  num_pages_used = 0

  def new_run(kv_len):
    nonlocal num_pages_used
    start = len(pages)
    count = -(-kv_len // page_size)
    pages.extend(range(num_pages_used, num_pages_used + count))
    num_pages_used += count
    return start

  token = 0
  for _ in range(num_groups):
    group_start, upper = token, []
    kv_start = 0
    for level in range(depth - 1):
      upper.append((level, kv_start, prefix_len))
      kv_start += prefix_len
    for _ in range(rows_per_group):
      own = int(rng.integers(1, max_own + 1))
      q_len = min(own, int(rng.choice([1, chunk])))
      segments.append((token, q_len, kv_start, own, new_run(own)))
      positions.extend(range(kv_start + own - q_len, kv_start + own))
      token += q_len
    for _, start, length in upper:
      segments.append((group_start, token - group_start, start, length, new_run(length)))
  segments.append((0, 0, 0, 0, 0))
  permutation = rng.permutation(num_pages_used + 3)
  kv = np.full((num_pages_used + 3, num_kv_heads, page_size, 2 * head_dim), np.nan, np.float32)
  pages = permutation[np.array(pages)]
  for _, _, _, kv_len, page_start in segments:
    for i in range(kv_len):
      kv[pages[page_start + i // page_size], :, i % page_size] = rng.normal(
          size=(num_kv_heads, 2 * head_dim))
  fields = np.array(segments, np.int32).T
  return spa.Segments(*map(jnp.asarray, fields)), pages.astype(np.int32), kv, np.array(positions)


def plain_attention(q, kv_pages, segments, pages, positions, *, scale, window, soft_cap):
  """float64, token by token."""
  num_heads, head_dim = q.shape[1:]
  page_size, group = kv_pages.shape[2], num_heads // kv_pages.shape[1]
  o = np.zeros(q.shape)
  lse = np.full(q.shape[:2], -np.inf)
  for t, position in enumerate(positions):
    keys, values = [], []
    for q_start, q_len, kv_start, kv_len, page_start in zip(*map(np.asarray, segments)):
      if not q_start <= t < q_start + q_len:
        continue
      for i in range(kv_len):
        if kv_start + i > position or (window and kv_start + i <= position - window):
          continue
        row = kv_pages[pages[page_start + i // page_size], :, i % page_size].astype(np.float64)
        keys.append(row[:, :head_dim])
        values.append(row[:, head_dim:])
    if not keys:
      continue
    for head in range(num_heads):
      s = np.array([k[head // group] @ q[t, head].astype(np.float64) for k in keys]) * scale
      if soft_cap:
        s = soft_cap * np.tanh(s / soft_cap)
      p = np.exp(s - s.max())
      lse[t, head] = s.max() + np.log(p.sum())
      o[t, head] = sum(w * v[head // group] for w, v in zip(p / p.sum(), values))
  return o, lse


CASES = {
    "decode": dict(num_groups=1, rows_per_group=5, prefix_len=0, max_own=21, chunk=1, depth=1),
    "two_levels": dict(num_groups=2, rows_per_group=3, prefix_len=13, max_own=6, chunk=1, depth=2),
    "mixed": dict(num_groups=2, rows_per_group=3, prefix_len=9, max_own=12, chunk=7, depth=3),
    "four_levels": dict(num_groups=1, rows_per_group=4, prefix_len=5, max_own=9, chunk=4, depth=4),
    "alone_on_all_levels": dict(num_groups=3, rows_per_group=1, prefix_len=6, max_own=9, chunk=1,
                                depth=3),
    "one_row": dict(num_groups=1, rows_per_group=1, prefix_len=0, max_own=30, chunk=30, depth=1),
}


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("window,soft_cap", [(None, None), (6, None), (None, 2.0)])
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case, window, soft_cap):
  rng = np.random.default_rng(sorted(CASES).index(case))
  segments, pages, kv, positions = random_tree_step(rng, page_size=4, **CASES[case])
  q = rng.normal(size=(len(positions) + 3, 6, 8)).astype(np.float32)
  padded = np.concatenate([positions, [-1] * 3]).astype(np.int32)
  want_o, want_lse = plain_attention(q, kv, segments, pages, padded, scale=0.5, window=window,
                                     soft_cap=soft_cap)

  @functools.partial(jax.jit, static_argnames="tiling")
  def run(q, kv, segments, pages, positions, tiling):
    schedule = reference.make_schedule(segments, pages, positions, page_size=4, tiling=tiling)
    return reference.attend(q, kv, schedule, scale=0.5, window=window, soft_cap=soft_cap)

  wide = np.pad(kv, ((0, 0), (0, 0), (0, 0), (0, 5)), constant_values=np.nan)
  for pool, tiling in ((kv, reference.Tiling()),
                       (wide, reference.Tiling(4, 8, 2, 4, rows=2, row_kv=4))):
    o, lse = run(q, pool, segments, pages, padded, tiling)
    np.testing.assert_allclose(o, want_o, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)


def test_long_prefix_needs_no_score_matrix():
  """Temporaries stay far under tokens x KV scores."""
  num_tokens, kv_len, page_size = 1024, 32_768, 64
  pages = kv_len // page_size
  segments = spa.Segments(*(jnp.array([x], jnp.int32) for x in (0, num_tokens, 0, kv_len, 0)))

  def run(q, kv, positions):
    schedule = spa.make_schedule(segments, jnp.arange(pages), positions, page_size=page_size,
                                 num_heads=2, num_kv_heads=1, head_dim=16, dtype="float32")
    return spa.shared_prefix_attention(q, kv, schedule, scale=1.0)

  compiled = jax.jit(run).lower(jax.ShapeDtypeStruct((num_tokens, 2, 16), jnp.float32),
                                jax.ShapeDtypeStruct((pages, 1, page_size, 32), jnp.float32),
                                jax.ShapeDtypeStruct((num_tokens,), jnp.int32)).compile()
  scores_bytes = num_tokens * 2 * kv_len * 4
  assert compiled.memory_analysis().temp_size_in_bytes < scores_bytes / 50


def test_bad_arguments_are_named():
  q, kv = jnp.zeros((4, 4, 8)), jnp.zeros((2, 2, 4, 16))
  segments = spa.Segments(*(jnp.zeros(1, jnp.int32) for _ in range(5)))
  make = functools.partial(spa.make_schedule, segments, jnp.zeros(1, jnp.int32),
                           jnp.zeros(4, jnp.int32), page_size=4, num_heads=4, num_kv_heads=2,
                           head_dim=8, dtype="float32")
  schedule = make()
  assert schedule.implementation == "reference"
  with pytest.raises(ValueError, match="kv_pages"):
    spa.shared_prefix_attention(q, kv[..., :8], schedule, scale=1.0)
  with pytest.raises(ValueError, match="KV heads"):
    spa.shared_prefix_attention(q[:, :3], kv, schedule, scale=1.0)
  with pytest.raises(NotImplementedError, match="cudnn.*mosaic_gpu"):
    make(implementation="cudnn")
  with pytest.raises(NotImplementedError, match="page sizes"):
    make(implementation="mosaic_tpu")
