"""What every implementation owes the public op: a schedule that serves a whole decode loop."""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import shared_prefix_attention as spa
from pallas_kernels.shared_prefix_attention import gpu
from pallas_kernels.shared_prefix_attention import specs
from pallas_kernels.shared_prefix_attention import tpu
from pallas_kernels.shared_prefix_attention.specs import Node, Row

NUM_STEPS = 2
# Rows whose loop stays inside a page, fills one, and begins a new one.
LOOP = specs.Spec("loop", (Node(20, (Row(14), Row(15), Row(16))), Row(40)), 4, 2, 64, 16)


@pytest.fixture(autouse=True)
def two_multiprocessors(monkeypatch):
  """The interpreter runs one after the other, and of a card's 132 most would idle."""
  few = gpu.tuned() | {"num_sms": 2}
  monkeypatch.setattr(gpu, "tuned", lambda device: few)


def interpreter(implementation):
  if implementation == "mosaic_gpu":
    if not hasattr(plgpu, "InterpretGPUParams"):
      pytest.skip("mosaic_gpu and its interpreter need JAX 0.11")
    return plgpu.InterpretGPUParams()
  return pltpu.InterpretParams() if implementation == "mosaic_tpu" else None


@pytest.mark.parametrize("implementation", spa.IMPLEMENTATIONS)
def test_one_schedule_serves_a_decode_loop(implementation, monkeypatch):
  monkeypatch.setattr(tpu, "_target_kind", lambda: "TPU v6 lite")
  interpret, case = interpreter(implementation), specs.build(LOOP)
  layout, segments = case.layout, case.layout.segments
  # Made for the first step, with the KV that the last one sees.
  schedule = spa.make_schedule(
      spa.Segments(**{k: jnp.asarray(v) for k, v in segments.items()}),
      jnp.asarray(layout.page_indices), jnp.asarray(layout.positions - (NUM_STEPS - 1)),
      page_size=LOOP.page_size, num_heads=LOOP.num_heads, num_kv_heads=LOOP.num_kv_heads,
      head_dim=LOOP.head_dim, dtype=case.q.dtype, implementation=implementation)

  @jax.jit
  def attend(schedule, positions, q, kv_pages):
    return spa.shared_prefix_attention(q, kv_pages, spa.advance(schedule, positions),
                                       scale=LOOP.scale, return_lse=True, interpret=interpret)

  for left in reversed(range(NUM_STEPS)):  # steps that the loop still takes after this one
    now = layout._replace(positions=layout.positions - left)
    kv_pages = np.array(case.kv_pages)
    for num_tokens, length, page in zip(segments["q_len"], segments["kv_len"], segments["page_start"]):
      for slot in range(length - left, length) if num_tokens == 1 else ():  # not written yet
        index = layout.page_indices[page + slot // LOOP.page_size]
        kv_pages[index, :, slot % LOOP.page_size] = np.nan
    o, lse = attend(schedule, jnp.asarray(now.positions), case.q, kv_pages)
    exact_o, exact_lse = specs.exact(LOOP, now, case.q, kv_pages)
    error = np.linalg.norm(np.asarray(o, np.float64) - exact_o) / np.linalg.norm(exact_o)
    assert error < 6e-3, left
    np.testing.assert_allclose(np.asarray(lse), exact_lse, atol=2e-3)


# Chunks of prompts, decode rows and prefixes side by side, so that they share tiles.
NEIGHBOURS = specs.Spec("neighbours", (Row(4, 5), Row(7), Node(9, (Row(4), Row(2))), Row(0, 3)), 4, 2,
                        64, 16)


@pytest.mark.parametrize("implementation", spa.IMPLEMENTATIONS)
def test_nan_in_the_kv_of_some_tokens_is_none_of_the_others(implementation, monkeypatch):
  monkeypatch.setattr(tpu, "_target_kind", lambda: "TPU v6 lite")
  interpret, case = interpreter(implementation), specs.build(NEIGHBOURS)
  layout, segments = case.layout, case.layout.segments
  schedule = spa.make_schedule(
      spa.Segments(**{k: jnp.asarray(v) for k, v in segments.items()}),
      jnp.asarray(layout.page_indices), jnp.asarray(layout.positions),
      page_size=NEIGHBOURS.page_size, num_heads=NEIGHBOURS.num_heads,
      num_kv_heads=NEIGHBOURS.num_kv_heads, head_dim=NEIGHBOURS.head_dim, dtype=case.q.dtype,
      implementation=implementation)
  kv_pages, sees_nan = np.array(case.kv_pages), np.zeros(len(case.q), bool)
  for segment in (0, 3):  # a chunk, and one of two decode rows on a prefix
    kv_pages[layout.page_indices[segments["page_start"][segment]]] = np.nan
    start = segments["q_start"][segment]
    sees_nan[start:start + segments["q_len"][segment]] = True
  o = np.asarray(jax.jit(lambda *x: spa.shared_prefix_attention(
      *x, schedule, scale=NEIGHBOURS.scale, interpret=interpret))(case.q, kv_pages), np.float64)
  assert np.isnan(o[sees_nan]).all() and sees_nan.sum() == 5 + 1
  exact_o, _ = specs.exact(NEIGHBOURS, layout, case.q, case.kv_pages)
  np.testing.assert_allclose(o[~sees_nan], exact_o[~sees_nan], atol=2e-2)
