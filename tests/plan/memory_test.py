import dataclasses

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from batchjax.config import ConfigError
from batchjax.config import EngineConfig
from batchjax.config import MeshConfig
from batchjax.config import ModelConfig
from batchjax.plan import memory
from batchjax.plan.cost import CHIPS
from batchjax.plan.grouping import choose_nodes
from batchjax.plan.grouping import no_sharing
from batchjax.plan.prefix_tree import build_prefix_tree

LLAMA_8B = ModelConfig("llama", vocab_size=128_256, hidden_size=4096, ffn_size=14_336,
                       num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, max_len=8192,
                       dtype="bfloat16")


def test_pool_from_bytes_and_from_pages():
  # 32 layers * (k, v) * 8 heads * 128 * 2 bytes = 128 KiB a token, 2 MiB a page of 16.
  engine = EngineConfig(kv_memory_bytes=(1 << 30) + 12345, page_size=16)
  assert memory.num_kv_pages(LLAMA_8B, engine) == 512
  assert memory.num_kv_pages(LLAMA_8B, dataclasses.replace(engine, num_pages=7)) == 7
  with pytest.raises(ConfigError, match="holds no page of 2097152 bytes.*raise it"):
    memory.num_kv_pages(LLAMA_8B, dataclasses.replace(engine, kv_memory_bytes=1 << 20))


@given(st.integers(0, 1000), st.sampled_from([1, 2, 16, 64]))
def test_pages_for(num_tokens, page_size):
  pages = memory.pages_for(num_tokens, page_size)
  assert pages * page_size >= num_tokens > (pages - 1) * page_size
  assert memory.pages_for(np.array([num_tokens]), page_size).tolist() == [pages]


def test_estimate_of_an_8b_model():
  estimate = memory.estimate_memory(LLAMA_8B, EngineConfig(max_rows=64, max_step_tokens=1024))
  assert estimate.weight_bytes == pytest.approx(16.06e9, rel=1e-3)  # 8.03e9 parameters
  assert estimate.kv_bytes == 1 << 30
  assert estimate.logits_bytes == 3 * 64 * 128_256 * 4
  assert estimate.activation_bytes == 1024 * (2 * 4096 + 3 * 14_336) * 2
  assert estimate.total_bytes == sum(dataclasses.astuple(estimate))
  half = memory.estimate_memory(LLAMA_8B, EngineConfig(max_rows=64, max_step_tokens=512))
  assert half.activation_bytes * 2 == estimate.activation_bytes


def test_estimate_of_one_device_of_a_mesh():
  engine = EngineConfig(max_rows=64, num_pages=100, page_size=16)
  one = memory.estimate_memory(LLAMA_8B, engine)
  four, sixteen = (memory.estimate_memory(LLAMA_8B, dataclasses.replace(engine, mesh=MeshConfig(n)))
                   for n in (4, 16))
  # All of these sizes divide by 4 and 16 but the 8 KV heads: two devices hold each.
  assert four.weight_bytes * 4 == one.weight_bytes
  assert four.kv_bytes * 4 == one.kv_bytes == sixteen.kv_bytes * 8
  assert four.logits_bytes * 4 == one.logits_bytes == sixteen.logits_bytes * 16
  with pytest.raises(ConfigError, match="engine.mesh.tensor=3 does not divide the 32 query heads"):
    memory.settle(LLAMA_8B, dataclasses.replace(engine, mesh=MeshConfig(3)), CHIPS["h100"], None)


def _planned(prompts, rows):
  prompts = [np.array(p, np.int32) for p in prompts]
  rows = np.array(rows, np.int32)
  tree = build_prefix_tree(prompts, rows)
  return choose_nodes(tree, tree.end[tree.node_of_request], rows, 4, 0.0)


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.integers(1, 2),
                          st.integers(1, 9)), min_size=1, max_size=8), st.sampled_from([1, 2, 4]))
def test_pages_alone_walks_the_path(job, page_size):
  prompts, rows, max_tokens = zip(*job)
  tree = _planned(prompts, rows)
  pages = memory.pages_alone(tree, np.array(max_tokens), page_size)
  for request in range(len(job)):
    node, own_len, needed = tree.node_of_request[request], max_tokens[request], 0
    if tree.num_rows[node] == 1:
      own_len, node = own_len + tree.length[node], tree.parent[node]
    while node >= 0:
      needed += -(-int(tree.length[node]) // page_size)
      node = tree.parent[node]
    assert pages[request] == needed - (-own_len // page_size)


def test_every_node_begins_a_page_of_its_own():
  # Together 5 shared + 3 own + 4 generated tokens are 3 pages of 4; apart they are 2 + 2.
  shared = _planned([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 9, 9, 9]], [1, 1])
  alone = no_sharing(np.array([8, 8], np.int32), np.ones(2, np.int32))
  max_tokens = np.array([4, 4])
  assert memory.pages_alone(shared, max_tokens, 4).tolist() == [4, 4]
  assert memory.pages_alone(alone, max_tokens, 4).tolist() == [3, 3]


def test_check_fits_names_the_numbers_and_the_remedy():
  tree = no_sharing(np.array([30, 3, 40], np.int32), np.ones(3, np.int32))
  errors = memory.check_fits(tree, np.array([2, 4, 9]), num_pages=4, page_size=8)
  assert list(errors) == [2]
  for part in ("40 prompt tokens", "max_tokens=9", "7 KV pages of 8", "has 4", "lower max_tokens"):
    assert part in errors[2]
  assert memory.check_fits(tree, np.array([2, 4, 9]), num_pages=7, page_size=8) == {}


def test_an_automatic_pool_takes_what_is_left():
  engine = EngineConfig(max_rows=1024, max_step_tokens=8192, page_size=64)
  device_bytes = 76 * 10**9
  settle = lambda engine, device_bytes: memory.settle(LLAMA_8B, engine, CHIPS["h100"], device_bytes)
  settled = settle(engine, device_bytes)
  assert 0.97 * device_bytes < memory.estimate_memory(LLAMA_8B, settled).total_bytes < device_bytes
  assert settle(engine, device_bytes - (1 << 20)) == settled  # cached shapes
  assert settle(engine, None) == engine  # the device does not say
  for named in (dict(num_pages=5), dict(kv_memory_bytes=1 << 30)):
    named = dataclasses.replace(engine, **named)
    assert settle(named, device_bytes) == named
  with pytest.raises(ConfigError, match=r"of 14.90 GiB, weights take 14.96 GiB.*engine.max_rows"):
    settle(engine, 16 * 10**9)


def test_a_pool_on_a_tpu_fills_whole_lanes():
  model = dataclasses.replace(LLAMA_8B, head_dim=80)
  engine = EngineConfig(page_size=64)
  device_bytes = 95 << 30
  on_gpu, on_tpu = (memory.settle(model, engine, CHIPS[name], device_bytes)
                    for name in ("h100", "v5p"))
  assert (on_gpu.kv_lanes, on_tpu.kv_lanes) == (1, 128)
  # 256 lanes instead of 160: fewer pages, in as many bytes.
  multiple = 128  # of both numbers of pages; a 64th of 8,192
  assert on_tpu.num_pages % multiple == on_gpu.num_pages % multiple == 0
  assert abs(on_tpu.num_pages - on_gpu.num_pages * 160 / 256) < multiple
  page_bytes = 32 * 8 * 64 * 256 * 2
  assert memory.estimate_memory(model, on_tpu).kv_bytes == on_tpu.num_pages * page_bytes
  named = dataclasses.replace(on_tpu, num_pages=0, kv_memory_bytes=10 * page_bytes)
  assert memory.num_kv_pages(model, named) == 10
