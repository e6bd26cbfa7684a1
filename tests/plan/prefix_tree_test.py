from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from batchjax.plan import prefix_tree
from batchjax.plan.prefix_tree import build_prefix_tree

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=12)


def _arrays(prompts):
  return [np.array(p, np.int32) for p in prompts]


def _brute_force_nodes(prompts):
  """Every prefix at which a prompt ends or two prompts part, as a set of tuples."""
  prefixes = {tuple(p[:i]) for p in prompts for i in range(len(p) + 1)}
  ends = {tuple(p) for p in prompts}
  def parts(prefix):
    return len({p[:len(prefix) + 1] for p in prefixes if p[:len(prefix)] == prefix
                and len(p) > len(prefix)}) > 1
  return {p for p in prefixes if p in ends or parts(p)} | {()}


def _spell(tree, prompts, node):
  """The tokens from the root to the end of a node."""
  tokens = []
  while node > 0:
    begin, source = tree.start[node], prompts[tree.source[node]]
    tokens = [*source[begin:begin + tree.length[node]]] + tokens
    node = tree.parent[node]
  return tuple(tokens)


def check_preorder(tree):
  """What must hold of every PrefixTree, whoever made it."""
  assert tree.parent[0] == -1 and tree.length[0] == 0 and tree.subtree_end[0] == tree.num_nodes
  for node in range(1, tree.num_nodes):
    parent = tree.parent[node]
    assert 0 <= parent < node < tree.subtree_end[node] <= tree.subtree_end[parent]
    assert tree.start[node] == tree.end[parent]
    assert tree.length[node] > 0
    below = [n for n in range(tree.num_nodes) if _is_ancestor(tree, node, n)]
    assert below == list(range(node, tree.subtree_end[node]))


def _is_ancestor(tree, ancestor, node):
  while node > ancestor:
    node = tree.parent[node]
  return node == ancestor


@given(PROMPTS)
def test_equals_the_trie_of_every_prefix(prompts):
  tree = build_prefix_tree(_arrays(prompts))
  check_preorder(tree)
  spelled = [_spell(tree, prompts, node) for node in range(tree.num_nodes)]
  assert len(set(spelled)) == len(spelled)
  assert set(spelled) == _brute_force_nodes(prompts)
  for request, prompt in enumerate(prompts):
    assert spelled[tree.node_of_request[request]] == tuple(prompt)
  assert tree.source[0] == -1


@given(PROMPTS, st.data())
def test_num_rows_counts_samples_at_and_below(prompts, data):
  rows = data.draw(st.lists(st.integers(1, 4), min_size=len(prompts), max_size=len(prompts)))
  tree = build_prefix_tree(_arrays(prompts), np.array(rows, np.int32))
  for node in range(tree.num_nodes):
    spelled = _spell(tree, prompts, node)
    below = [n for p, n in zip(prompts, rows) if tuple(p[:len(spelled)]) == spelled]
    assert tree.num_rows[node] == sum(below)


@given(PROMPTS)
def test_path_and_subtree_sums_and_minima(prompts):
  tree = build_prefix_tree(_arrays(prompts))
  values = np.arange(tree.num_nodes) ** 2 + 3
  paths, subtrees = tree.path_sum(values), tree.subtree_sum(values)
  mixed = values * 7 % 13
  minima = tree.subtree_min(mixed)
  for node in range(tree.num_nodes):
    on_path = [n for n in range(tree.num_nodes) if _is_ancestor(tree, n, node)]
    assert paths[node] == values[on_path].sum()
    assert subtrees[node] == values[node:tree.subtree_end[node]].sum()
    assert minima[node] == mixed[node:tree.subtree_end[node]].min()


@pytest.mark.parametrize("chunk_tokens", [1, 3, 10])
def test_comparison_in_chunks_changes_nothing(monkeypatch, chunk_tokens):
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 2, rng.integers(1, 12)).astype(np.int32) for _ in range(40)]
  expected = build_prefix_tree(prompts)
  monkeypatch.setattr(prefix_tree, "_CHUNK_TOKENS", chunk_tokens)
  chunked = build_prefix_tree(prompts)
  np.testing.assert_array_equal(chunked.parent, expected.parent)
  np.testing.assert_array_equal(chunked.length, expected.length)


def test_prefix_of_another_ends_inside_and_identical_prompts_meet():
  tree = build_prefix_tree(_arrays([[5, 6, 7], [5, 6], [5, 6], [9]]))
  assert tree.num_nodes == 4
  inner = tree.node_of_request[1]
  assert inner == tree.node_of_request[2] == tree.parent[tree.node_of_request[0]]
  assert (tree.start[inner], tree.length[inner], tree.num_rows[inner]) == (0, 2, 3)


def test_token_ids_beyond_a_byte_stay_whole_tokens():
  # 0x0101 and 0x0201 share their lowest byte; the prompts share one token only.
  tree = build_prefix_tree(_arrays([[4, 0x0101], [4, 0x0201], [0x10004]]))
  assert sorted(tree.length.tolist()) == [0, 1, 1, 1, 1]
  assert tree.num_nodes == 5


def test_deep_chain_of_growing_prompts():
  tokens = np.arange(2000, dtype=np.int32)
  tree = build_prefix_tree([tokens[:n] for n in range(2000, 0, -1)])
  assert tree.num_nodes == 2001
  np.testing.assert_array_equal(tree.parent, np.arange(-1, 2000))
  np.testing.assert_array_equal(tree.num_rows[1:], np.arange(2000, 0, -1))
  np.testing.assert_array_equal(tree.node_of_request, np.arange(2000, 0, -1))


def test_no_requests():
  tree = build_prefix_tree([])
  assert tree.num_nodes == 1 and tree.subtree_end[0] == 1 and tree.num_rows[0] == 0


def test_empty_prompt_is_named():
  with pytest.raises(ValueError, match="request 1 has an empty prompt"):
    build_prefix_tree(_arrays([[1], []]))
