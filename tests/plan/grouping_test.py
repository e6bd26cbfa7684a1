import itertools

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from batchjax.plan import grouping
from batchjax.plan.prefix_tree import build_prefix_tree


def _arrays(prompts):
  return [np.array(p, np.int32) for p in prompts]


def _choose(prompts, rows=None, max_levels=4, node_overhead=0.0):
  prompts = _arrays(prompts)
  rows = np.ones(len(prompts), np.int32) if rows is None else np.array(rows, np.int32)
  lens = np.array([len(p) for p in prompts], np.int32)
  tree = build_prefix_tree(prompts, rows)
  return grouping.choose_nodes(tree, lens, rows, max_levels, node_overhead)


def _paths(prompts, rows):
  """The nodes that may be kept, named by their prefixes, and those on each request's path."""
  weight = {}
  for prompt, n in zip(prompts, rows):
    for i in range(1, len(prompt) + 1):
      weight[tuple(prompt[:i])] = weight.get(tuple(prompt[:i]), 0) + n
  ends = {tuple(p) for p in prompts}
  def is_node(prefix):
    children = [p for p in weight if len(p) == len(prefix) + 1 and p[:-1] == prefix]
    return weight[prefix] > 1 and (prefix in ends or len(children) > 1)
  nodes = {prefix for prefix in weight if is_node(prefix)}
  return sorted(nodes), [[tuple(p[:i]) for i in range(1, len(p) + 1) if tuple(p[:i]) in nodes]
                         for p in prompts]


def _brute_force(prompts, rows, max_levels, node_overhead):
  """The least cost over all subsets of the shared nodes."""
  nodes, paths = _paths(prompts, rows)
  best = np.inf
  for bits in itertools.product([False, True], repeat=len(nodes)):
    kept = {node for node, bit in zip(nodes, bits) if bit}
    cost, runs, feasible = 0.0, {}, True
    for request, (prompt, n, path) in enumerate(zip(prompts, rows, paths)):
      above = 0
      levels = 0
      for node in (node for node in path if node in kept):
        runs[node] = len(node) - above + node_overhead
        above, levels = len(node), levels + 1
      if tuple(prompt) not in kept:
        runs[request] = len(prompt) - above + (node_overhead if n > 1 else 0)
        levels += n > 1
      feasible &= levels <= max_levels
    cost = sum(runs.values())
    if feasible:
      best = min(best, cost)
  return best


def _cost(tree, node_overhead):
  return grouping.prompt_tokens(tree) + node_overhead * (tree.num_rows[1:] > 1).sum()


JOB = st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6),
                         st.sampled_from([1, 1, 1, 2, 3])), min_size=1, max_size=8)


@given(JOB, st.integers(1, 4), st.sampled_from([0.0, 0.5, 1.5, 3.25, 100.0]))
def test_equals_brute_force_over_all_subsets(job, max_levels, node_overhead):
  prompts, rows = zip(*job)
  tree = _choose(prompts, rows, max_levels, node_overhead)
  assert _cost(tree, node_overhead) == _brute_force(prompts, rows, max_levels, node_overhead)


@given(JOB, st.integers(1, 4), st.sampled_from([0.0, 1.5, 100.0]))
def test_the_chosen_tree_spells_every_prompt_within_the_levels(job, max_levels, node_overhead):
  prompts, rows = zip(*job)
  tree = _choose(prompts, rows, max_levels, node_overhead)
  assert tree.parent[0] == -1 and tree.length[0] == 0 and tree.subtree_end[0] == tree.num_nodes
  num_rows = np.zeros(tree.num_nodes, int)
  for request, prompt in enumerate(prompts):
    node, tokens, levels = tree.node_of_request[request], [], 0
    assert tree.num_rows[node] > 1 or rows[request] == 1
    assert tree.num_rows[node] >= rows[request]
    while node > 0:
      begin, source = tree.start[node], prompts[tree.source[node]]
      tokens = [*source[begin:begin + tree.length[node]]] + tokens
      levels += tree.num_rows[node] > 1
      num_rows[node] += rows[request]
      parent = tree.parent[node]
      assert tree.length[node] > 0 and tree.start[node] == tree.end[parent]
      assert parent < node < tree.subtree_end[node] <= tree.subtree_end[parent]
      node = parent
    assert tokens == list(prompt)
    assert levels <= max_levels
  num_rows[0] = sum(rows)
  np.testing.assert_array_equal(tree.num_rows, num_rows)
  sizes = np.ones(tree.num_nodes, int)
  for node in range(tree.num_nodes - 1, 0, -1):
    sizes[tree.parent[node]] += sizes[node]
  np.testing.assert_array_equal(tree.subtree_end, np.arange(tree.num_nodes) + sizes)


@given(JOB)
def test_unbounded_levels_keep_every_shared_token_once(job):
  prompts, rows = zip(*job)
  distinct = {tuple(p[:i]) for p in prompts for i in range(1, len(p) + 1)}
  assert grouping.prompt_tokens(_choose(prompts, rows, max_levels=9)) == len(distinct)


def test_batchllm_enlarges_the_first_level():
  # Five prompts share one token, so the first level of the trie saves 4. Giving
  # it up for the two longer prefixes below saves 8: the figures of the
  # example in arXiv 2412.03594.
  prompts = [[1, 2, 2, i] for i in range(10, 13)] + [[1, 3, i] for i in range(13, 15)]
  asked = sum(map(len, prompts))
  chosen = _choose(prompts, max_levels=1)
  assert asked - grouping.prompt_tokens(chosen) == 8
  assert sorted(chosen.length[chosen.num_rows > 1].tolist()) == [0, 2, 3]
  assert asked - grouping.prompt_tokens(_choose(prompts, max_levels=2)) == 9


@pytest.mark.parametrize("prefix, distinct, degree, saving", [
    (2000, 200, 16, 85.2), (2000, 200, 4, 68.2), (2000, 1000, 16, 62.5), (2000, 1000, 4, 50.0),
    (1000, 1000, 16, 46.9), (1000, 1000, 4, 37.5), (16000, 200, 16, 92.6)])
@pytest.mark.parametrize("max_levels", [1, 4])
def test_savings_of_the_batchllm_workloads(prefix, distinct, degree, saving, max_levels):
  """The optimal savings of the shapes in BatchLLM's table of micro-benchmarks."""
  rng = np.random.default_rng(0)
  shared = rng.integers(0, 30_000, (2, prefix))
  prompts = [np.append(shared[i % 2], rng.integers(0, 30_000, distinct)) for i in range(2 * degree)]
  # Distinct parts that begin alike by chance would save more.
  for i, prompt in enumerate(prompts):
    prompt[prefix] = 30_000 + i
  asked = sum(map(len, prompts))
  saved = 1 - grouping.prompt_tokens(_choose(prompts, None, max_levels)) / asked
  assert round(100 * saved, 1) == saving


def test_overhead_folds_small_groups_and_keeps_large_ones():
  prompts = [[1, 1, 1, i] for i in range(10, 14)] + [[2, i] for i in range(2)]
  tree = _choose(prompts, node_overhead=2.0)
  assert tree.length[tree.num_rows > 1].tolist() == [0, 3]
  assert grouping.prompt_tokens(_choose(prompts, node_overhead=1e9)) == sum(map(len, prompts))


def test_samples_share_their_prompt_whatever_the_overhead():
  tree = _choose([[1, 2, 3], [1, 2, 4]], rows=[8, 1], node_overhead=1e9)
  node = tree.node_of_request[0]
  assert (tree.start[node], tree.length[node], tree.num_rows[node]) == (0, 3, 8)
  assert tree.num_rows[tree.node_of_request[1]] == 1


def test_identical_prompts_of_one_sample_end_at_one_shared_node():
  tree = _choose([[1, 2], [1, 2], [1, 2, 3]])
  assert tree.node_of_request[0] == tree.node_of_request[1] == tree.parent[tree.node_of_request[2]]
  apart = _choose([[1, 2], [1, 2], [1, 2, 3]], node_overhead=100.0)
  assert len(set(apart.node_of_request.tolist())) == 3


@pytest.mark.parametrize("max_levels", [1, 3])
def test_deep_chain_needs_no_recursion(max_levels):
  tokens = np.arange(1500, dtype=np.int32)
  prompts = [tokens[:n] for n in range(1, 1501)]
  chosen = _choose(prompts, None, max_levels)
  assert grouping.prompt_tokens(chosen) < sum(map(len, prompts)) / (max_levels + 0.9)


def test_flat_file_of_many_leaves():
  num_requests = 50_000
  lens = np.full(num_requests, 3, np.int32)
  prompts = list(np.stack([np.full(num_requests, 7), np.full(num_requests, 8),
                           np.arange(num_requests)], axis=1).astype(np.int32))
  tree = build_prefix_tree(prompts)
  chosen = grouping.choose_nodes(tree, lens, np.ones(num_requests, np.int32), 4, 1.0)
  assert grouping.prompt_tokens(chosen) == num_requests + 2
  assert len(set(chosen.node_of_request.tolist())) == num_requests


def test_no_sharing_gives_every_request_its_own_leaf():
  lens = np.array([3, 1, 2], np.int32)
  tree = grouping.no_sharing(lens, np.ones(3, np.int32))
  assert grouping.prompt_tokens(tree) == 6
  np.testing.assert_array_equal(tree.length[tree.node_of_request], lens)
  np.testing.assert_array_equal(tree.source[tree.node_of_request], [0, 1, 2])
  assert tree.num_rows.tolist() == [3, 1, 1, 1] and tree.subtree_end.tolist() == [4, 2, 3, 4]


def test_without_sharing_the_samples_of_a_request_still_share_its_prompt():
  tree = grouping.no_sharing(np.array([3, 1], np.int32), np.array([1, 4], np.int32))
  assert grouping.prompt_tokens(tree) == 4 and tree.num_rows.tolist() == [5, 1, 4]


def test_errors_name_the_remedy():
  with pytest.raises(ValueError, match="max_levels must be at least 1"):
    _choose([[1]], max_levels=0)
