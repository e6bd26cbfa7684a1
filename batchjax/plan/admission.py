"""Which waiting rows fit: a forward simulation of the KV pool; numpy only."""

from jaxtyping import Bool, Int
import numpy as np

from batchjax.cache.page_table import pages_for, PageTable
from batchjax.plan.lengths import LengthPredictor, peak_pages
from batchjax.plan.prefix_tree import PrefixTree
from batchjax.plan.rows import Rows


def num_admissible(waiting: Int[np.ndarray, "n"], rows: Rows, tree: PrefixTree, pool: PageTable,
                   is_open: Bool[np.ndarray, "N"], lengths: LengthPredictor) -> int:
  """How many of the `waiting` rows fit with those that run, until the end as far as it can be foretold.

  Rows leave when they reach their predicted lengths; shared nodes count once, and whole from the
  beginning (Past-Future, section 3).

  Args:
    waiting: the rows that come next, ascending.
    is_open: the shared nodes that have a run.
  """
  page_size = pool.page_size
  running = rows.running
  seqs = np.concatenate([running, waiting])
  generated, max_tokens = rows.num_dispatched[seqs], rows.max_tokens[seqs]
  own_lens = rows.prompt_len[seqs] - rows.own_start[seqs] + generated
  remaining = lengths.predict(generated, max_tokens) - generated
  # A waiting row opens the nodes on its path that no row before it lies below.
  node = rows.shared_node[waiting]
  before = np.append(0, rows.node[waiting[:-1]])
  opened = np.zeros(len(waiting), np.int64)
  while (is_new := node > before).any():
    opened += np.where(is_new & ~is_open[node], pages_for(tree.length[node], page_size), 0)
    node = np.where(is_new, tree.parent[node], node)
  shared = pages_for(tree.length[is_open], page_size).sum() + np.append(0, np.cumsum(opened))

  longest_first = np.argsort(-remaining, kind="stable")

  def fits(count: int) -> bool:
    these = longest_first[longest_first < len(running) + count]
    most = peak_pages(own_lens[these], remaining[these], page_size) + int(shared[count])
    return most <= pool.num_pages

  low, high = 0, len(waiting)
  middle = high  # most often all fit
  while low < high:
    low, high = (middle, high) if fits(middle) else (low, middle - 1)
    middle = (low + high + 1) // 2
  return low
