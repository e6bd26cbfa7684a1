"""Whole steps of a plan through the production TPU compiler."""

import dataclasses
import importlib.util

import pytest

from batchjax.bench.workloads import Draw, prefix_groups
from batchjax.config import EngineConfig
from batchjax.engine.absent import compile_absent
from batchjax.engine.sampling_inputs import SamplingFeatures
from batchjax.models import SHAPES
from batchjax.plan import memory, planner
from batchjax.plan.cost import CHIPS
from pallas_kernels.shared_prefix_attention import tpu_analysis


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                    reason="libtpu, the TPU compiler, is not installed")
@pytest.mark.parametrize("generation, head_dim", [("v5e", 64), ("v6e", 80), ("tpu7x", 64)])
def test_steps_of_a_plan_compile_without_copies_of_pool_or_weights(generation, head_dim):
  config = dataclasses.replace(SHAPES["llama3_2_1b"], num_layers=2, layer_kinds=(),
                               head_dim=head_dim, dtype="bfloat16")
  engine = EngineConfig(max_rows=64, max_step_tokens=256, page_size=64, num_pages=8192,
                        max_buckets=1)
  engine = memory.settle(config, engine, CHIPS[generation], device_bytes=None)
  requests = prefix_groups(Draw(config.vocab_size), num_requests=64, prefix_len=100,
                           share_degree=8, distinct_len=20, output_len=20).requests
  plan = planner.make_plan(config, requests, engine, CHIPS[generation])
  features = SamplingFeatures.of((r.sampling_params for r in requests), config.eos_token_ids)
  assert {bucket.kind for bucket in plan.buckets} == {"mixed", "decode"}
  pool_bytes = memory.estimate_memory(config, engine).kv_bytes
  for bucket in plan.buckets:
    stats = compile_absent(bucket, plan, config, engine, features,
                           tpu_analysis.absent_device(generation),
                           "mosaic_tpu").memory_analysis()
    assert stats.alias_size_in_bytes >= pool_bytes
    # Less than a layer's pool, and than the weights of both layers, which a loop could keep a copy of.
    assert stats.temp_size_in_bytes < 100e6 < pool_bytes // 2
