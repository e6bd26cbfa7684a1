"""The order in which the nodes of a prefix tree run."""

from jaxtyping import Int
from jaxtyping import Num
import numpy as np

from batchjax.plan.prefix_tree import PrefixTree


def order_nodes(tree: PrefixTree, decode_lens: Num[np.ndarray, "requests"]) -> PrefixTree:
  """The same tree in the order of execution: decode-heavy subtrees first, prefix groups whole.

  Siblings run by R = decode tokens / prompt tokens of their subtrees, larger
  first (BatchLLM, arXiv 2412.03594): long decodes start early, and the prompts
  that follow fill the steps that they leave short of work. BlendServe (ASPLOS
  2026) scans this order from both ends at once; that pays where matrix products
  and attention overlap, and otherwise leaves long decodes to run on alone at
  the end. Ties run in the order of the lowest request of each subtree.

  Args:
    tree: any prefix tree.
    decode_lens: tokens that each request is expected to generate, all its
      samples together.

  Returns:
    The tree renumbered: index order is execution order, and is the order of
    the flat token axis.
  """
  decode_tokens = np.bincount(tree.node_of_request, decode_lens, tree.num_nodes)
  tokens = np.maximum(tree.subtree_sum(tree.length.astype(np.int64)), 1)
  ratio = tree.subtree_sum(decode_tokens) / tokens

  siblings = np.lexsort((lowest_request(tree), -ratio, tree.parent))[1:]  # the root sorts first
  parent = tree.parent[siblings]
  size = (tree.subtree_end - np.arange(tree.num_nodes))[siblings]
  before = np.cumsum(size) - size
  is_first = np.diff(parent, prepend=-1) > 0
  base = before[is_first][np.cumsum(is_first) - 1]
  offset = np.zeros(tree.num_nodes, np.int64)
  offset[siblings] = 1 + before - base
  return _renumber(tree, tree.path_sum(offset))


def lowest_request(tree: PrefixTree) -> Int[np.ndarray, "N"]:
  """The lowest request that ends at each node or below it."""
  lowest = np.full(tree.num_nodes + 1, len(tree.node_of_request))
  np.minimum.at(lowest, tree.node_of_request, np.arange(len(tree.node_of_request)))
  ranges = np.column_stack([np.arange(tree.num_nodes), tree.subtree_end]).ravel()
  return np.minimum.reduceat(lowest, ranges)[::2]


def _renumber(tree: PrefixTree, new_index: np.ndarray) -> PrefixTree:
  old_index = np.empty_like(new_index)
  old_index[new_index] = np.arange(tree.num_nodes)
  parent = tree.parent[old_index]
  size = tree.subtree_end[old_index] - old_index
  return PrefixTree(
      parent=np.where(parent < 0, -1, new_index[parent]).astype(np.int32),
      start=tree.start[old_index],
      length=tree.length[old_index],
      source=tree.source[old_index],
      subtree_end=(np.arange(tree.num_nodes) + size).astype(np.int32),
      num_rows=tree.num_rows[old_index],
      node_of_request=new_index[tree.node_of_request].astype(np.int32),
  )
