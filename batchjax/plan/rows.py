"""The rows of a window, a column per field, and the slots that they take; numpy only."""

from collections.abc import Sequence

from jaxtyping import Int
import numpy as np

from batchjax.plan.prefix_tree import PrefixTree
from batchjax.types import Request


class Rows:
  """Every row (one sample of one request) of a window.

  A row's index in all columns is its `seq`, its place in the order of
  execution. Rows lie in depth-first order of the tree: by node, then by sample.

  Attributes (i32[rows] each but the last):
    request: index of its request; `sample` which of its n samples.
    node: tree node where its prompt ends.
    shared_node: the deepest node on its path that it shares with other rows, 0 without one.
    prompt_len: tokens of its prompt.
    own_start: position of the first token in its own run.
    max_tokens: most tokens to generate.
    is_fixed: bool[rows], taken to reach it: the model's end tokens are ignored.
    num_dispatched: generated tokens, those still in flight included.
    slot: device slot, -1 before and after.
    seq_of_slot: i64[slots], the row in each slot, -1 where there is none.
  """

  def __init__(self, requests: Sequence[Request], tree: PrefixTree,
               max_tokens: Int[np.ndarray, "requests"], num_slots: int):
    samples = np.array([r.sampling_params.n for r in requests], np.int64)
    order = np.argsort(tree.node_of_request, kind="stable")
    samples = samples[order]
    self.request = np.repeat(order, samples).astype(np.int32)
    first = np.repeat(np.cumsum(samples) - samples, samples)
    self.sample = (np.arange(len(first)) - first).astype(np.int32)
    self.node = tree.node_of_request[self.request]
    is_private = tree.num_rows[self.node] == 1
    self.shared_node = np.where(is_private, tree.parent[self.node], self.node)
    self.prompt_len = tree.end[self.node]
    self.own_start = np.where(is_private, tree.start[self.node], self.prompt_len)
    self.max_tokens = max_tokens.astype(np.int32)[self.request]
    self.is_fixed = np.array([r.sampling_params.ignore_eos for r in requests], bool)[self.request]
    self.num_dispatched = np.zeros(len(first), np.int32)
    self.slot = np.full(len(first), -1, np.int32)
    self.seq_of_slot = np.full(num_slots, -1)
    self._free_slots = list(range(num_slots - 1, -1, -1))

  def __len__(self) -> int:
    return len(self.request)

  @property
  def num_free_slots(self) -> int:
    """Slots without a row."""
    return len(self._free_slots)

  @property
  def running(self) -> Int[np.ndarray, "n"]:
    """The rows in slots, in no order."""
    return self.seq_of_slot[self.seq_of_slot >= 0]

  def enter_slot(self, seq: int) -> int:
    """Gives a row a slot."""
    slot = self._free_slots.pop()
    self.slot[seq], self.seq_of_slot[slot] = slot, seq
    return slot

  def leave_slots(self, seqs: Int[np.ndarray, "n"]) -> None:
    """Takes the slots of rows back."""
    slots = self.slot[seqs]
    self._free_slots += slots.tolist()
    self.slot[seqs] = self.seq_of_slot[slots] = -1

  def check_integrity(self) -> None:
    """Raises AssertionError if rows and slots contradict each other."""
    taken = np.flatnonzero(self.seq_of_slot >= 0)
    assert sorted([*self._free_slots, *taken.tolist()]) == list(range(len(self.seq_of_slot))), (
        "a slot is lost or held twice")
    assert (self.slot[self.seq_of_slot[taken]] == taken).all(), "a row is not in its slot"
    assert (self.slot >= 0).sum() == len(taken), "a row is in a slot that is free"
