"""Collects the entries of one step; numpy only."""

from collections.abc import Sequence

import numpy as np

from batchjax.cache.page_table import PageTable, Run
from batchjax.plan.batch import Admission, Batch, Entry, PromptScore, Sample, SharedKV
from batchjax.plan.prefix_tree import PrefixTree
from batchjax.plan.row import Row
from batchjax.types import Request, StopTable

_NO_PAGES = np.empty(0, np.int32)


class BatchBuilder:
  """A batch in the making. Adds tokens as long as the token budget and the pool allow."""

  def __init__(self, requests: Sequence[Request], tree: PrefixTree, pool: PageTable,
               node_run: dict[int, Run], *, budget: int, num_steps: int, scores: bool,
               stop_table: StopTable | None):
    self._requests, self._tree, self._pool, self._node_run = requests, tree, pool, node_run
    self._num_steps, self._scores, self._stop_table = num_steps, scores, stop_table
    self._budget = budget
    self._entries: list[Entry] = []
    self._samples: list[Sample] = []
    self._prompt_scores: list[PromptScore] = []
    self._completed: set[int] = set()  # shared nodes whose last token is in this step
    self._num_prompt_tokens = 0
    self.has_prefill = False

  @property
  def is_empty(self) -> bool:
    """No row draws and no token is computed."""
    return not self._entries and not self._samples

  def has_room_for(self, row: Row) -> bool:
    """Whether a waiting row could begin in this step."""
    return self._budget > 0 or (row.node in self._completed and not row.tokens)

  def add_decode(self, row: Row) -> None:
    """Adds the next token of a row whose prompt is done; its run has room already."""
    position = len(self._requests[row.request].prompt_token_ids) + row.num_dispatched - 1
    self._add(Entry(row.node, row.seq, row.slot, position, None, 0, row.own_start,
                    position + 1 - row.own_start, row.run.pages))
    self._draw(row, row.seq, is_first=False)

  def add_chunk(self, work: Row | int) -> bool:
    """Adds as much of a node's or a row's prompt as fits. True: all of it is computed now."""
    return self._add_row(work) if isinstance(work, Row) else self._add_node(work)

  def _add_node(self, node: int) -> bool:
    run, length = self._node_run[node], int(self._tree.length[node])
    start = int(self._tree.start[node])
    prompt = self._requests[self._tree.source[node]].prompt_token_ids
    if self._chunk(node, -1, -1, run, prompt, run.kv_len, start, start + length):
      self._completed.add(node)
    return run.kv_len == length

  def _add_row(self, row: Row) -> bool:
    prompt = self._requests[row.request].prompt_token_ids
    sequence = np.append(prompt, np.array(row.tokens, np.int32)) if row.tokens else prompt
    if row.own_start == len(sequence):  # the whole prompt is shared
      if row.node in self._completed:
        self._draw(row, -1, is_first=True)
        return True
      if not self._budget:
        return False
      position = len(prompt) - 1
      self._num_prompt_tokens += 1
      self._add(Entry(row.node, row.seq, row.slot, position, prompt[position:], 1,
                      row.own_start, 0, _NO_PAGES))
      self._draw(row, row.seq, is_first=True)
      return True
    end = self._chunk(row.node, row.seq, row.slot, row.run, sequence, row.num_computed,
                      row.own_start, len(sequence), len(prompt))
    row.num_computed = row.run.kv_len
    if end:
      self._draw(row, row.seq, is_first=True)
    return end

  def _chunk(self, node: int, seq: int, slot: int, run: Run, sequence: np.ndarray, offset: int,
             start: int, end: int, prompt_len: int | None = None) -> bool:
    """Adds tokens of `sequence` from `start + offset` on; True if they reach `end`."""
    prompt_len = end if prompt_len is None else prompt_len
    # The first token of a node is scored by the last one above it, which is computed once more.
    requeried = int(self._scores and offset == 0 and start > 0)
    room = (len(run.pages) + self._pool.num_free) * self._pool.page_size
    count = min(end - start - offset, self._budget - requeried, room - offset)
    if count <= 0:
      return False
    first = start + offset
    self._pool.grow(run, offset + count)
    self._add(Entry(node, seq, slot, first - requeried, sequence[first - requeried:first + count],
                    requeried, start, offset + count, run.pages))
    self._num_prompt_tokens += max(0, min(first + count, prompt_len) - first + requeried)
    if self._scores:
      scored = sequence[first - requeried + 1:min(first + count + 1, prompt_len)]
      self._prompt_scores.append(PromptScore(node, first - requeried + 1 - start, node, seq, 0,
                                             scored))
    return first + count == end

  def _add(self, entry: Entry) -> None:
    self._entries.append(entry)
    self._budget -= entry.num_tokens
    self.has_prefill |= entry.tokens is not None

  def _draw(self, row: Row, seq: int, is_first: bool) -> None:
    self.has_prefill |= is_first
    params = self._requests[row.request].sampling_params
    state = 0
    if is_first and row.tokens and params.stop:
      start = self._stop_table.automaton[params.stop]
      for token in row.tokens:
        state = int(self._stop_table.transitions[start + max(state, 0), token])
    self._samples.append(Sample(row, row.slot, row.node, seq, row.num_dispatched, is_first, state))

  def build(self, kind: str, admissions: Sequence[Admission]) -> Batch:
    """The finished batch: entries and samples in depth-first order, and the shared KV above."""
    self._entries.sort(key=lambda entry: (entry.node, entry.seq))
    self._samples.sort(key=lambda sample: (sample.node, sample.seq))  # decode: row r is token r
    nodes = np.array([entry.node for entry in self._entries])
    shared = []
    for node, run in sorted(self._node_run.items()):
      end = int(self._tree.subtree_end[node])
      first, stop = np.searchsorted(nodes, (node, end))
      if run.kv_len and first < stop:
        shared.append(SharedKV(node, end, run.kv_start, run.kv_len, run.pages))
    return Batch(kind=kind, entries=tuple(self._entries), shared=tuple(shared),
                 samples=tuple(self._samples), admissions=tuple(admissions),
                 prompt_scores=tuple(self._prompt_scores), num_steps=self._num_steps,
                 num_tokens=sum(entry.num_tokens for entry in self._entries),
                 num_prompt_tokens=self._num_prompt_tokens)
