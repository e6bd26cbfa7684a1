import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchjax import models
from batchjax.cache.kv_state import KV_AXES, init_kv_state
from pallas_kernels.shared_prefix_attention import write_kv

NUM_PAGES, PAGE_SIZE, HEADS, HEAD_DIM = 16, 4, 2, 8


@pytest.fixture(scope="module")
def write():
  return jax.jit(write_kv, donate_argnums=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_pool(dtype):
  config = dataclasses.replace(models.SHAPES["tiny_qwen3"], dtype=dtype)
  kv = init_kv_state(config, NUM_PAGES, PAGE_SIZE)
  assert kv.page_size == PAGE_SIZE and len(kv.pages) == config.num_layers
  assert all(x.shape == (NUM_PAGES, 2, PAGE_SIZE, 32) and x.dtype == dtype for x in kv.pages)
  assert len(KV_AXES) == kv.pages[0].ndim
  assert sum(x.nbytes for x in kv.pages) == NUM_PAGES * PAGE_SIZE * config.kv_bytes_per_token(1)
  wide = init_kv_state(config, NUM_PAGES, PAGE_SIZE, lanes=128)
  assert all(x.shape == (NUM_PAGES, 2, PAGE_SIZE, 128) for x in wide.pages)
  assert sum(x.nbytes for x in wide.pages) == NUM_PAGES * PAGE_SIZE * config.kv_bytes_per_token(128)


@pytest.mark.parametrize("seed", range(5))
def test_writes_what_a_loop_writes(write, seed):
  rng = np.random.default_rng(seed)
  pool = rng.normal(size=(NUM_PAGES, HEADS, PAGE_SIZE, 2 * HEAD_DIM)).astype(np.float32)
  k, v = rng.normal(size=(2, 12, HEADS, HEAD_DIM)).astype(np.float32)
  slots = rng.permutation(NUM_PAGES * PAGE_SIZE)[:12].astype(np.int32)
  slots[rng.random(12) < 0.3] = -1
  expected = pool.copy()
  for t, slot in enumerate(slots):
    if slot >= 0:
      expected[slot // PAGE_SIZE, :, slot % PAGE_SIZE] = np.concatenate([k[t], v[t]], axis=-1)
  np.testing.assert_array_equal(write(jnp.asarray(pool), k, v, slots), expected)


def test_dropping_all_tokens_changes_nothing(write):
  pool = np.arange(NUM_PAGES * HEADS * PAGE_SIZE * 2 * HEAD_DIM, dtype=np.float32)
  pool = pool.reshape(NUM_PAGES, HEADS, PAGE_SIZE, 2 * HEAD_DIM)
  new = np.full((12, HEADS, HEAD_DIM), np.nan, np.float32)
  after = write(jnp.asarray(pool), new, new, np.full(12, -1, np.int32))
  np.testing.assert_array_equal(after, pool)


def test_the_pool_is_written_in_place(write):
  pool = jnp.zeros((NUM_PAGES, HEADS, PAGE_SIZE, 2 * HEAD_DIM))
  new = jnp.ones((12, HEADS, HEAD_DIM))
  compiled = write.lower(pool, new, new, jnp.arange(12)).compile()
  assert compiled.memory_analysis().alias_size_in_bytes == pool.nbytes
  shape = "f32[{},{},{},{}]".format(*pool.shape)
  copies = [line for line in compiled.as_text().splitlines() if " copy(" in line]
  assert not any(shape in line for line in copies)


def test_the_pool_is_carried_through_a_loop_in_place():
  def loop(pool, new):
    body = lambda i, pool: write_kv(pool, new, new, i + jnp.arange(12, dtype=jnp.int32))
    return jax.lax.fori_loop(0, 3, body, pool)

  pool = jnp.zeros((NUM_PAGES, HEADS, PAGE_SIZE, 2 * HEAD_DIM))
  new = jnp.ones((12, HEADS, HEAD_DIM))
  compiled = jax.jit(loop, donate_argnums=0).lower(pool, new).compile()
  assert compiled.memory_analysis().alias_size_in_bytes == pool.nbytes
  assert compiled.memory_analysis().temp_size_in_bytes < pool.nbytes
