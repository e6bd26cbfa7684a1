"""The compressed trie of all prompts of a window."""

from collections.abc import Sequence
import dataclasses

from jaxtyping import Int
from jaxtyping import Int32
from jaxtyping import Num
import numpy as np

# Tokens compared at once when common-prefix lengths are computed; bounds temporary memory.
_CHUNK_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixTree:
  """Runs of tokens shared by requests, as a tree whose nodes lie in depth-first preorder.

  Node 0 is the root and holds no token. A path from the root spells a prompt.
  A node's descendants are the nodes after it and before `subtree_end`, so every
  subtree is one contiguous range.

  Attributes:
    parent: i32[N], -1 for the root.
    start: absolute position of the node's first token.
    length: tokens that the node holds.
    source: a request whose prompt holds the node's tokens at
      [start, start + length); -1 for the root.
    subtree_end: one past the node's last descendant.
    num_rows: rows (samples) that end at the node or below it.
    node_of_request: the node at whose end the request's prompt ends.
  """

  parent: Int32[np.ndarray, "N"]
  start: Int32[np.ndarray, "N"]
  length: Int32[np.ndarray, "N"]
  source: Int32[np.ndarray, "N"]
  subtree_end: Int32[np.ndarray, "N"]
  num_rows: Int32[np.ndarray, "N"]
  node_of_request: Int32[np.ndarray, "requests"]

  @property
  def num_nodes(self) -> int:
    """Nodes, the root included."""
    return len(self.parent)

  @property
  def end(self) -> Int32[np.ndarray, "N"]:
    """Absolute position after each node's last token."""
    return self.start + self.length

  def path_sum(self, values: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Sum of `values` from the root to each node, both included."""
    # A node's value counts from its index on, and no more from the end of its subtree on.
    ended = np.bincount(self.subtree_end, values, self.num_nodes + 1)[:-1]
    return np.cumsum(values - ended.astype(values.dtype))

  def subtree_sum(self, values: Num[np.ndarray, "N"]) -> Num[np.ndarray, "N"]:
    """Sum of `values` over each node and its descendants."""
    sums = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])
    return sums[self.subtree_end] - sums[:-1]

  def subtree_min(self, values: Num[np.ndarray, "N"]) -> Num[np.ndarray, "N"]:
    """Least of `values` over each node and its descendants. O(N * height)."""
    bounds = np.stack([np.arange(self.num_nodes), self.subtree_end], axis=1)
    return np.minimum.reduceat(np.append(values, values[-1:]), bounds.ravel())[::2]


def build_prefix_tree(
    prompts: Sequence[Int32[np.ndarray, "_"]],
    rows_per_request: Int32[np.ndarray, "requests"] | None = None,
) -> PrefixTree:
  """Builds the compressed trie of the prompts from their sorted order.

  A node is created for every distinct prompt and every place where prompts
  part, so an inner node has two children at least, or one and a prompt that
  ends there. Identical prompts end at the same node. O(total tokens); the
  tokens are copied while the tree is built, none is kept.

  Args:
    prompts: the token ids of each request, at least one each.
    rows_per_request: samples of each request; None is one each.

  Returns:
    The tree. Siblings follow the byte order of their tokens, which is
    deterministic and otherwise without meaning (see `order.order_nodes`).

  Raises:
    ValueError: a prompt is empty.

  >>> prompts = [[1, 2, 3, 4], [1, 2, 3, 5], [9]]
  >>> tree = batchjax.build_prefix_tree([np.array(prompt, np.int32) for prompt in prompts])
  >>> tree.length.tolist()  # the root, the shared prefix, what is behind it, the other prompt
  [0, 3, 1, 1, 1]
  """
  num_requests = len(prompts)
  lens = np.fromiter(map(len, prompts), np.int64, num_requests)
  if num_requests and lens.min() == 0:
    raise ValueError(f"request {int(lens.argmin())} has an empty prompt: give it a token")
  rows = (np.ones(num_requests, np.int64) if rows_per_request is None
          else rows_per_request.astype(np.int64))
  # Byte order groups equal prefixes as well as token order does, and Python sorts bytes fast.
  keys = [np.ascontiguousarray(prompt, np.int32).tobytes() for prompt in prompts]
  by_tokens = np.array(sorted(range(num_requests), key=keys.__getitem__), np.int64)
  del keys
  lens = lens[by_tokens]
  common = _common_prefix_lens([prompts[i] for i in by_tokens], lens)

  depth, first, last, parent, node_of_row = _trie_nodes(lens, common)
  # An ancestor begins at the same sorted row as its first child, or before, and is less deep.
  preorder = np.lexsort((depth, first))
  rank = np.empty_like(preorder)
  rank[preorder] = np.arange(len(preorder))
  depth, first, last = depth[preorder], first[preorder], last[preorder]
  parent = np.where(preorder == 0, -1, rank[parent[preorder]])
  start = np.where(parent < 0, 0, depth[parent])
  rows_before = np.concatenate([[0], np.cumsum(rows[by_tokens])])
  node_of_request = np.empty(num_requests, np.int32)
  node_of_request[by_tokens] = rank[node_of_row]
  return PrefixTree(
      parent=parent.astype(np.int32),
      start=start.astype(np.int32),
      length=(depth - start).astype(np.int32),
      source=np.append(-1, by_tokens[first[1:]]).astype(np.int32),
      subtree_end=np.maximum(np.searchsorted(first, last), 1).astype(np.int32),
      num_rows=(rows_before[last] - rows_before[first]).astype(np.int32),
      node_of_request=node_of_request,
  )


def _common_prefix_lens(prompts: Sequence[np.ndarray], lens: np.ndarray) -> np.ndarray:
  """For each prompt, the tokens it has in common with the one before it; 0 for the first."""
  common = np.zeros(len(prompts), np.int64)
  if len(prompts) < 2:
    return common
  flat = np.concatenate(prompts)
  offsets = np.concatenate([[0], np.cumsum(lens)])
  lo = 0
  while lo < len(prompts) - 1:
    hi = int(np.searchsorted(offsets, offsets[lo] + _CHUNK_TOKENS, "right")) - 1
    hi = min(max(hi, lo + 1), len(prompts) - 1)
    begin, end = offsets[lo], offsets[hi]
    # Token j of a prompt lies one prompt length before token j of the next.
    partner = np.arange(begin, end) + np.repeat(lens[lo:hi], lens[lo:hi])
    differs = np.flatnonzero(flat[begin:end] != flat.take(partner, mode="clip"))
    starts = offsets[lo:hi] - begin
    first_differs = np.append(differs, end - begin)[np.searchsorted(differs, starts)]
    shorter = np.minimum(lens[lo:hi], lens[lo + 1:hi + 1])
    common[lo + 1:hi + 1] = np.minimum(first_differs - starts, shorter)
    lo = hi
  return common


def _trie_nodes(lens: np.ndarray, common: np.ndarray) -> tuple[np.ndarray, ...]:
  """Per node, as created: depth, first and last (exclusive) row, parent; then each row's node."""
  depth, first, last, parent = [0], [0], [len(lens)], [0]
  node_of_row = []
  path = [0]
  for row, (prompt_len, shared) in enumerate(zip(lens.tolist(), common.tolist())):
    child = -1
    while depth[path[-1]] > shared:
      child = path.pop()
      last[child] = row
    if depth[path[-1]] < shared:  # the prompts part inside `child`: split it
      parent[child] = len(depth)
      depth.append(shared)
      first.append(first[child])
      last.append(len(lens))
      parent.append(path[-1])
      path.append(parent[child])
    if depth[path[-1]] < prompt_len:
      depth.append(prompt_len)
      first.append(row)
      last.append(len(lens))
      parent.append(path[-1])
      path.append(len(depth) - 1)
    node_of_row.append(path[-1])
  return tuple(np.array(x, np.int64) for x in (depth, first, last, parent, node_of_row))
