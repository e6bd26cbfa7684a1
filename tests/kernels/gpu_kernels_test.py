"""`engine.gpu_kernels`, on a layer lowered for a GPU that need not be there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from batchjax.engine import gpu_kernels
from batchjax.models import SHAPES
from batchjax.ops import attention
from batchjax.types import Segments

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11),
                                reason="Mosaic GPU kernels need JAX 0.11")


def lowered_attention(num_layers):
  config = dataclasses.replace(SHAPES["llama3_2_1b"], dtype="bfloat16")
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  segments = Segments(*(ints(8) for _ in Segments._fields))

  @functools.partial(jax.jit, static_argnums=3)
  def attend(q, pages, schedule, scale):
    return attention.shared_prefix_attention(q, pages, schedule, scale=scale)

  def fn(segments, page_indices, positions, q, pages):
    schedule = attention.make_schedule(segments, page_indices, positions, config=config, page_size=64,
                                       max_levels=1, implementation="mosaic_gpu")
    for _ in range(num_layers):
      q = attend(q, pages, schedule, 0.125)
    return q

  bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  return jax.jit(fn).trace(segments, ints(64), ints(64), bf16(64, 32, 64),
                           bf16(64, 8, 64, 128)).lower(lowering_platforms=("cuda",))


def test_each_kernel_of_a_program_is_found_once_and_its_own_program_holds_the_same_text():
  kernels = gpu_kernels.kernels_of(lowered_attention(num_layers=2))
  assert len(kernels) == 3  # wide and narrow tiles, and the merge
  for digest, (program, arguments) in kernels.items():
    alone = program.trace(*arguments).lower(lowering_platforms=("cuda",))
    assert list(gpu_kernels.kernels_of(alone)) == [digest]


def test_programs_without_kernels_have_none():
  assert not gpu_kernels.kernels_of(jax.jit(jnp.sort).lower(jnp.arange(4)))
