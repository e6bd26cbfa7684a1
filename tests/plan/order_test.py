from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from batchjax.config import ModelConfig
from batchjax.plan import cost
from batchjax.plan.grouping import no_sharing
from batchjax.plan.order import order_nodes
from batchjax.plan.prefix_tree import build_prefix_tree

JOB = st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(0, 5)),
               min_size=1, max_size=12)


def _tree(job):
  prompts = [np.array(p, np.int32) for p, _ in job]
  return build_prefix_tree(prompts), np.array([d for _, d in job])


def _path(tree, node):
  """The path from the root as (source, start, length), which no renumbering changes."""
  path = []
  while node > 0:
    path.append((tree.source[node], tree.start[node], tree.length[node]))
    node = tree.parent[node]
  return path[::-1]


def _recursive_order(tree, decode_lens, node):
  """The order by its definition: siblings by falling R, then by lowest request."""
  def key(child):
    below = range(child, tree.subtree_end[child])
    requests = [r for r, n in enumerate(tree.node_of_request) if n in below]
    prompt_tokens = tree.length[child:tree.subtree_end[child]].sum()
    return -decode_lens[requests].sum() / prompt_tokens, min(requests)
  children = sorted(np.flatnonzero(tree.parent == node).tolist(), key=key)
  return [node] + [n for child in children for n in _recursive_order(tree, decode_lens, child)]


@given(JOB)
def test_equals_the_recursive_definition(job):
  tree, decode_lens = _tree(job)
  ordered = order_nodes(tree, decode_lens)
  expected = _recursive_order(tree, decode_lens, 0)
  assert ([_path(ordered, node) for node in range(tree.num_nodes)]
          == [_path(tree, node) for node in expected])


@given(JOB)
def test_it_is_the_same_tree_in_preorder(job):
  tree, decode_lens = _tree(job)
  ordered = order_nodes(tree, decode_lens)
  for before, after in zip(tree.node_of_request, ordered.node_of_request):
    assert _path(tree, before) == _path(ordered, after)
    assert tree.num_rows[before] == ordered.num_rows[after]
  sizes = np.ones(tree.num_nodes, int)
  for node in range(tree.num_nodes - 1, 0, -1):
    assert ordered.parent[node] < node
    sizes[ordered.parent[node]] += sizes[node]
  np.testing.assert_array_equal(ordered.subtree_end, np.arange(tree.num_nodes) + sizes)


@given(JOB)
def test_ordering_twice_changes_nothing(job):
  tree, decode_lens = _tree(job)
  once = order_nodes(tree, decode_lens)
  twice = order_nodes(once, decode_lens)
  np.testing.assert_array_equal(once.source, twice.source)
  np.testing.assert_array_equal(once.parent, twice.parent)


def test_equal_requests_keep_the_order_of_the_file():
  rng = np.random.default_rng(0)
  prompts = [np.append(i, rng.integers(0, 99, 4)).astype(np.int32) for i in rng.permutation(300)]
  ordered = order_nodes(build_prefix_tree(prompts), np.full(300, 8))
  np.testing.assert_array_equal(ordered.node_of_request, np.arange(1, 301))


def test_a_group_counts_its_shared_prefix_once():
  # Alone, each request of the group has R = 4/5; with the prefix counted once
  # the group has 12/7 and runs before the single request with 1.
  prompts = [np.array(p, np.int32) for p in
             ([9, 9, 9, 9], [1, 1, 1, 1, 2], [1, 1, 1, 1, 3], [1, 1, 1, 1, 4])]
  ordered = order_nodes(build_prefix_tree(prompts), np.array([4, 4, 4, 4]))
  assert ordered.node_of_request.tolist() == [5, 2, 3, 4]


def _modelled_secs(prompt_lens, decode_lens, order, max_rows=64, max_step_tokens=512):
  """A job under the roofline: decodes first, then prefill chunks, rows admitted in `order`."""
  model = ModelConfig("llama", vocab_size=32_000, hidden_size=2048, ffn_size=8192, num_layers=16,
                      num_heads=32, num_kv_heads=8, head_dim=64, max_len=8192, dtype="bfloat16")
  waiting = [(prompt_lens[i], decode_lens[i]) for i in order][::-1]
  prefill, decode, kv = np.zeros((3, max_rows))
  secs = 0.0
  while waiting or prefill.any() or decode.any():
    for slot in np.flatnonzero((prefill == 0) & (decode == 0)):
      if waiting:
        (prefill[slot], decode[slot]), kv[slot] = waiting.pop(), 0
    decoding = (prefill == 0) & (decode > 0)
    budget = max_step_tokens - decoding.sum()
    chunk = np.clip(budget - (np.cumsum(prefill) - prefill), 0, prefill)
    active = decoding | (chunk > 0)
    pairs = kv[decoding].sum() + (chunk * (kv + chunk / 2)).sum()
    secs += cost.step_cost(model, cost.CHIPS["v5e"], int(decoding.sum() + chunk.sum()),
                           int(decoding.sum()), int(kv[active].sum()), int(pairs)).secs
    kv += chunk + decoding
    prefill -= chunk
    decode -= decoding
  return secs


def _ends_meet(prompt_lens, decode_lens):
  """BlendServe's scan from both ends of the order by R, steered to the job's own mix."""
  by_ratio = np.argsort(-decode_lens / prompt_lens, kind="stable").tolist()
  order, prompt, decode = [], 0, 0
  mix = decode_lens.sum() / prompt_lens.sum()
  while by_ratio:
    order.append(by_ratio.pop(-1 if decode > mix * prompt else 0))
    prompt, decode = prompt + prompt_lens[order[-1]], decode + decode_lens[order[-1]]
  return np.array(order)


@pytest.mark.parametrize("seed", [0, 1])
def test_decode_heavy_first_shortens_the_modelled_job(seed):
  """Few long decodes among many prompts: started late they run on alone, in near-empty steps."""
  rng = np.random.default_rng(seed)
  long = rng.random(300) < 0.05
  prompt_lens = np.where(long, 64, rng.integers(200, 600, 300)).astype(np.int32)
  decode_lens = np.where(long, 800, rng.integers(5, 30, 300))
  tree = order_nodes(no_sharing(prompt_lens, np.ones(300, np.int32)), decode_lens)
  secs = {name: _modelled_secs(prompt_lens, decode_lens, order) for name, order in {
      "chosen": np.argsort(tree.node_of_request),
      "file": np.arange(300),
      "prefill first": np.argsort(-tree.node_of_request),
      "ends meet": _ends_meet(prompt_lens, decode_lens)}.items()}
  assert secs["chosen"] < 0.9 * min(secs["file"], secs["prefill first"], secs["ends meet"])
