"""Which shared nodes keep KV of their own; the others fold into their children."""

from jaxtyping import Int32
import numpy as np

from batchjax.plan.prefix_tree import PrefixTree


def prompt_tokens(tree: PrefixTree) -> int:
  """Prompt tokens that are computed when every node of the tree is computed once."""
  return int(tree.length.sum(dtype=np.int64))


def no_sharing(prompt_lens: Int32[np.ndarray, "requests"],
               rows_per_request: Int32[np.ndarray, "requests"]) -> PrefixTree:
  """The tree of a job whose requests share nothing: each is a leaf below the root.

  The n samples of one request still share its prompt, as one leaf of n rows.
  """
  num_requests = len(prompt_lens)
  nodes = np.arange(num_requests + 1, dtype=np.int32)
  subtree_end = nodes + 1
  subtree_end[0] = num_requests + 1
  num_rows = np.append(rows_per_request.sum(), rows_per_request).astype(np.int32)
  return PrefixTree(
      parent=np.where(nodes > 0, 0, -1).astype(np.int32),
      start=np.zeros(num_requests + 1, np.int32),
      length=np.append(0, prompt_lens).astype(np.int32),
      source=nodes - 1,
      subtree_end=subtree_end,
      num_rows=num_rows,
      node_of_request=nodes[1:],
  )


def choose_nodes(
    tree: PrefixTree,
    prompt_lens: Int32[np.ndarray, "requests"],
    rows_per_request: Int32[np.ndarray, "requests"],
    max_levels: int,
    node_overhead: float,
) -> PrefixTree:
  """Keeps the shared nodes that minimise prompt tokens + node_overhead * shared nodes, exactly.

  A node is shared when it serves more than one row. At most `max_levels`
  shared nodes lie above any row's own run. The tokens of a dropped node are
  computed again by whatever hangs below it: kept nodes, and a leaf for each
  request that ends at no kept node. That leaf is the run of the request's one
  row; a request with several samples always shares its prompt among them, so
  there its leaf is a shared node too, and counts as one level. Ties drop.

  The program is exact where BatchLLM (arXiv 2412.03594, Algorithm 1) is greedy,
  and takes any number of levels where that takes one.
  F(v, a, l) is the least cost of subtree v when a is the nearest kept ancestor
  and l more levels may be kept:

    keep  F = end(v) - end(a) + node_overhead + sum_c F(c, v, l - 1)
    drop  F = sum_r (prompt_len(r) - end(a) [+ node_overhead]) + sum_c F(c, a, l)

  over children c and requests r that end at v. As a function of end(a), keep
  falls with slope -1 and drop with a slope of -1 or steeper, so v is kept
  exactly below a threshold of a's rank on the path: one integer per (v, l).
  Nodes of equal height are solved together. Time O(N * height * levels), where
  N counts shared nodes only; that is at most O(total prompt tokens * levels).

  Args:
    tree: every shared prefix, as `build_prefix_tree` makes it.
    prompt_lens: tokens of each prompt.
    rows_per_request: samples of each request.
    max_levels: at least 1.
    node_overhead: what one shared node costs, in prompt tokens.

  Returns:
    A tree in which a node that serves one row is that row's own run.

  Raises:
    ValueError: max_levels is below 1.
  """
  if max_levels < 1:
    raise ValueError(f"max_levels must be at least 1, got {max_levels}")
  height = tree.path_sum(np.ones(tree.num_nodes, np.int32)) - 1
  shared = tree.num_rows > 1
  shared[0] = False
  candidates = np.flatnonzero(shared)
  candidates = candidates[np.argsort(height[candidates], kind="stable")]
  bounds = np.flatnonzero(np.diff(height[candidates])) + 1
  by_height = [np.zeros(1, np.int64)] + ([*np.split(candidates, bounds)] if len(candidates) else [])
  max_levels = min(max_levels, len(by_height) - 1)
  thresholds = _solve(tree, prompt_lens, rows_per_request, shared, by_height, max_levels,
                      node_overhead)

  kept = np.zeros(tree.num_nodes, bool)
  anchor = np.zeros(tree.num_nodes, np.int64)  # nearest kept proper ancestor
  levels_left = np.full(tree.num_nodes, max_levels)
  for nodes, threshold in zip(by_height[1:], thresholds):
    above = tree.parent[nodes]
    anchor[nodes] = np.where(kept[above], above, anchor[above])
    levels_left[nodes] = levels_left[above] - kept[above]
    kept[nodes] = height[anchor[nodes]] < threshold[np.arange(len(nodes)), levels_left[nodes]]
  above = tree.parent[~shared]
  anchor[~shared] = np.where(kept[above], above, anchor[above])
  anchor[0] = -1
  kept[0] = True
  return _keep(tree, kept, anchor, prompt_lens, rows_per_request)


def _solve(tree, prompt_lens, rows_per_request, shared, by_height, max_levels, node_overhead):
  """For each height from 1, i64[nodes, levels left]: keep iff the anchor's height is below."""
  ends_at = tree.node_of_request
  is_leaf = ~shared[ends_at]
  leaf_parent = tree.parent[ends_at[is_leaf]]
  num_leaves = np.bincount(leaf_parent, minlength=tree.num_nodes)
  leaf_tokens = np.bincount(leaf_parent, prompt_lens[is_leaf], tree.num_nodes)
  multi = rows_per_request > 1
  num_here = np.bincount(ends_at[~is_leaf], minlength=tree.num_nodes)
  cost_here = np.bincount(ends_at[~is_leaf], (prompt_lens + node_overhead * multi)[~is_leaf],
                          tree.num_nodes)
  needs_level = np.bincount(ends_at[multi], minlength=tree.num_nodes) > 0

  # path_ends[h][i, j]: where the ancestor of height j of the i-th node of height h ends.
  position = np.zeros(tree.num_nodes, np.int64)
  path_ends = [np.zeros((1, 0))]
  for above, nodes in zip(by_height[:-1], by_height[1:]):
    position[above] = np.arange(len(above))
    parent = tree.parent[nodes]
    path_ends.append(np.column_stack([path_ends[-1][position[parent]], tree.end[parent]]))

  thresholds = []
  below, child_cost = np.zeros(0, np.int64), np.zeros((0, max_levels + 1, len(by_height)))
  for h in range(len(by_height) - 1, 0, -1):
    nodes, end = by_height[h], tree.end[by_height[h]]
    # cost[i, l, j]: all that hangs below node i, when its anchor is the node of height j on
    # its path (j == h: the node itself).
    anchors = np.column_stack([path_ends[h], end])[:, None]
    cost = np.repeat(leaf_tokens[nodes, None, None] - num_leaves[nodes, None, None] * anchors,
                     max_levels + 1, axis=1)
    parent = tree.parent[below]
    groups = np.flatnonzero(np.diff(parent, prepend=-1))
    if len(groups):
      cost[position[parent[groups]]] += np.add.reduceat(child_cost, groups, axis=0)
    keep = cost[:, :-1, h:] + (end[:, None] - path_ends[h] + node_overhead)[:, None]
    drop = cost[:, :, :h] + (cost_here[nodes, None] - num_here[nodes, None] * path_ends[h])[:, None]
    drop[needs_level[nodes], 0] = np.inf
    threshold = np.zeros((len(nodes), max_levels + 1), np.int64)
    threshold[:, 1:] = (keep < drop[:, 1:]).sum(axis=-1)
    thresholds.append(threshold)
    np.minimum(drop[:, 1:], keep, out=drop[:, 1:])
    below, child_cost = nodes, drop
  return thresholds[::-1]


def _keep(tree, kept, anchor, prompt_lens, rows_per_request) -> PrefixTree:
  """The tree of the kept nodes, the root among them, and of a leaf for each other request."""
  nodes = np.flatnonzero(kept)
  leaves = np.flatnonzero(~kept[tree.node_of_request])
  at = tree.node_of_request[leaves]
  old = np.concatenate([nodes, at])
  preorder = np.argsort(old, kind="stable")
  old = old[preorder]
  rank = np.empty_like(preorder)
  rank[preorder] = np.arange(len(preorder))
  new_of_node = np.full(tree.num_nodes, -1)
  new_of_node[nodes] = rank[:len(nodes)]
  node_of_request = new_of_node[tree.node_of_request]
  node_of_request[leaves] = rank[len(nodes):]

  parent = np.where(anchor[old] < 0, -1, new_of_node[anchor[old]])
  start = np.where(anchor[old] < 0, 0, tree.end[anchor[old]])
  end = np.concatenate([tree.end[nodes], prompt_lens[leaves]])[preorder]
  is_leaf = preorder >= len(nodes)
  subtree_end = np.searchsorted(old, tree.subtree_end[old])
  subtree_end[is_leaf] = np.flatnonzero(is_leaf) + 1
  return PrefixTree(
      parent=parent.astype(np.int32),
      start=start.astype(np.int32),
      length=(end - start).astype(np.int32),
      source=np.concatenate([tree.source[nodes], leaves])[preorder].astype(np.int32),
      subtree_end=subtree_end.astype(np.int32),
      num_rows=np.concatenate([tree.num_rows[nodes], rows_per_request[leaves]])[preorder]
      .astype(np.int32),
      node_of_request=node_of_request.astype(np.int32),
  )
