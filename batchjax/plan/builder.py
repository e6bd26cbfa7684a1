"""Collects the work of one step; numpy only."""

from collections.abc import Sequence

import numpy as np

from batchjax.cache.page_table import pages_for, PageTable
from batchjax.plan.batch import Admission, Batch, Entries, PromptScore, Samples, SharedKV
from batchjax.plan.history import History
from batchjax.plan.prefix_tree import PrefixTree
from batchjax.plan.rows import Rows
from batchjax.types import Request, StopTable


class BatchBuilder:
  """A batch in the making: all decoding rows, and prefill chunks as long as tokens and pages last.

  Rows write to the run of their slot, node v to run `num_slots + v`.
  """

  def __init__(self, requests: Sequence[Request], tree: PrefixTree, rows: Rows, pool: PageTable,
               history: History, decoding: np.ndarray, *, budget: int,
               score_start: np.ndarray | None, stop_table: StopTable | None):
    """Args:
      decoding: rows whose next token comes from their last one, in order; their runs have room.
      budget: tokens of the step.
      score_start: of each node, the position of the first token that is scored there or below;
        None where no prompt is.
    """
    self._requests, self._tree, self._rows, self._pool = requests, tree, rows, pool
    self._history, self._decoding = history, decoding
    self._score_start, self._stop_table = score_start, stop_table
    self._num_slots = len(rows.seq_of_slot)
    self._budget = budget - len(decoding)
    self._num_free_pages = pool.num_free
    # Of each chunk its node, seq, slot, first position, tokens, tokens computed again, kv_start,
    # kv_len and run.
    self._chunks: list[tuple[int, ...]] = []
    self._tokens: list[np.ndarray] = []
    self._scored: list[tuple[int, int, int, int, np.ndarray]] = []  # see `PromptScore`
    self._first_draws: list[tuple[int, int]] = []  # rows, and the chunks that they draw from
    self._completed: dict[int, int] = {}  # shared nodes that end in this step: their chunks
    self._num_prompt_tokens = 0

  @property
  def has_prefill(self) -> bool:
    """A chunk was added."""
    return bool(self._chunks)

  @property
  def is_empty(self) -> bool:
    """No row decodes and no chunk was added."""
    return not len(self._decoding) and not self._chunks

  def has_room_for(self, seq: int) -> bool:
    """Whether a waiting row could begin in this step."""
    return self._budget > 0 or self._draws_from_node(seq)

  def _draws_from_node(self, seq: int) -> bool:
    """The row has only its prompt, which ends with a node that ends in this step."""
    return self._rows.node[seq] in self._completed and not self._history.num_tokens[seq]

  def add_node(self, node: int) -> bool:
    """Adds as much of a shared node as fits. True: all of it is computed now."""
    start, length = int(self._tree.start[node]), int(self._tree.length[node])
    prompt = self._requests[self._tree.source[node]].prompt_token_ids
    is_done = self._add(node, -1, -1, self._num_slots + node, prompt, start, start + length)
    if is_done:
      self._completed[node] = len(self._chunks) - 1
    return is_done

  def add_row(self, seq: int) -> bool:
    """Adds as much of a row's own prompt as fits. True: all of it is computed, and it draws."""
    rows = self._rows
    node, slot, own_start = int(rows.node[seq]), int(rows.slot[seq]), int(rows.own_start[seq])
    prompt = self._requests[rows.request[seq]].prompt_token_ids
    sequence = prompt
    if self._history.num_tokens[seq]:  # it was preempted
      sequence = np.append(prompt, self._history.tokens(seq))
    if own_start < len(sequence):
      if not self._add(node, seq, slot, slot, sequence, own_start, len(sequence), len(prompt)):
        return False
    elif self._draws_from_node(seq):
      self._first_draws.append((seq, self._completed[node]))
      return True
    elif not self._budget:
      return False
    else:  # the whole prompt is shared, and was computed earlier: once more its last token
      self._budget -= 1
      self._num_prompt_tokens += 1
      self._chunks.append((node, seq, slot, own_start - 1, 1, 1, own_start, 0, slot))
      self._tokens.append(prompt[-1:])
    self._first_draws.append((seq, len(self._chunks) - 1))
    return True

  def _add(self, node: int, seq: int, slot: int, run: int, sequence: np.ndarray, start: int,
           end: int, prompt_len: int | None = None) -> bool:
    """Adds the tokens of `sequence` that the run lacks up to `end`; True if all of them fit."""
    prompt_len = end if prompt_len is None else prompt_len
    offset, num_held = int(self._pool.kv_len[run]), int(self._pool.num_held[run])
    # The first token of a node is scored by the last one above it, which is computed once more.
    score_start = prompt_len if self._score_start is None else self._score_start[node]
    requeried = int(offset == 0 and 0 < start and score_start <= start < prompt_len)
    room = (num_held + self._num_free_pages) * self._pool.page_size
    count = min(end - start - offset, self._budget - requeried, room - offset)
    if count <= 0:
      return False
    first, kv_len = start + offset, offset + count
    self._num_free_pages -= max(0, pages_for(kv_len, self._pool.page_size) - num_held)
    self._budget -= count + requeried
    self._num_prompt_tokens += max(0, min(first + count, prompt_len) - first + requeried)
    behind = first - requeried + 1  # the place that this entry's first token scores
    begin = max(behind, int(score_start))
    if begin < (score_end := min(first + count + 1, prompt_len)):
      self._scored.append((node, begin - start, len(self._chunks), begin - behind,
                           sequence[begin:score_end]))
    self._chunks.append((node, seq, slot, first - requeried, count + requeried, requeried, start,
                         kv_len, run))
    self._tokens.append(sequence[first - requeried:first + count])
    return first + count == end

  def build(self, kind: str, num_steps: int, admissions: Sequence[Admission],
            open_nodes: np.ndarray) -> Batch:
    """The finished batch, its chunks' runs grown.

    Args:
      kind, num_steps, admissions: of the batch.
      open_nodes: shared nodes that have a run, ascending.
    """
    rows, tree, pool, decoding = self._rows, self._tree, self._pool, self._decoding
    position = rows.prompt_len[decoding] + rows.num_dispatched[decoding] - 1
    slots, own_start = rows.slot[decoding], rows.own_start[decoding]
    one = np.ones(len(decoding), np.int64)
    columns = np.stack([rows.node[decoding], decoding, slots, position, one, 0 * one, own_start,
                        position + 1 - own_start, slots])
    place = np.arange(len(decoding) + len(self._chunks))  # of decoding rows, then of chunks
    chunks = np.array(self._chunks, np.int64).reshape(-1, 9).T
    if self._chunks:
      pool.grow(chunks[8], chunks[7])
      columns = np.hstack([columns, chunks])
      # Depth-first order: a node's own tokens come before the rows at its end and below it.
      order = np.argsort(columns[0] * (len(rows) + 1) + columns[1], kind="stable")
      columns, place[order] = columns[:, order], place.copy()

    nodes = open_nodes[pool.kv_len[self._num_slots + open_nodes] > 0]
    first_entry = np.searchsorted(columns[0], nodes)
    end_entry = np.searchsorted(columns[0], tree.subtree_end[nodes])
    is_read = first_entry < end_entry
    nodes, first_entry, end_entry = nodes[is_read], first_entry[is_read], end_entry[is_read]
    computed = chunks[0, chunks[1] < 0]
    only_read = nodes[~np.isin(nodes, computed)]
    page_indices, page_starts = pool.page_lists(
        np.concatenate([columns[8], self._num_slots + only_read]))
    entries = Entries(*columns[1:8], page_starts[columns[8]])

    tokens = np.full(int(entries.num_tokens.sum()), -1, np.int32)
    offsets = entries.offsets[place[len(decoding):]]
    for offset, chunk in zip(offsets.tolist(), self._tokens):
      tokens[offset:offset + len(chunk)] = chunk
    return Batch(
        kind=kind, entries=entries, tokens=tokens,
        shared=SharedKV(first_entry, end_entry, tree.start[nodes],
                        pool.kv_len[self._num_slots + nodes], page_starts[self._num_slots + nodes]),
        samples=self._samples(place), page_indices=page_indices, admissions=tuple(admissions),
        prompt_scores=tuple(
            PromptScore(node, offset, int(place[len(decoding) + chunk]), skipped, scored)
            for node, offset, chunk, skipped, scored in self._scored),
        num_steps=num_steps, num_prompt_tokens=self._num_prompt_tokens)

  def _samples(self, place: np.ndarray) -> Samples:
    """All decoding rows, and those whose prompt is complete with this step."""
    rows, num_decoding = self._rows, len(self._decoding)
    first, chunk = np.array(self._first_draws, np.int64).reshape(-1, 2).T
    seqs = np.append(self._decoding, first)
    order = np.argsort(seqs, kind="stable")
    seqs = seqs[order]
    stop_states = np.zeros(len(seqs), np.int64)
    stop_states[num_decoding:] = [self._stop_state(seq) for seq in first.tolist()]
    return Samples(
        seq=seqs, slot=rows.slot[seqs],
        entry=np.append(place[:num_decoding], place[num_decoding + chunk])[order],
        num_generated=rows.num_dispatched[seqs], max_tokens=rows.max_tokens[seqs],
        is_first=order >= num_decoding, stop_state=stop_states[order])

  def _stop_state(self, seq: int) -> int:
    """The state of a row's stop automaton after the tokens that it has; plans may have no automata."""
    stop = self._requests[self._rows.request[seq]].sampling_params.stop
    state = 0
    if stop and self._stop_table is not None:
      start = self._stop_table.automaton[stop]
      for token in self._history.tokens(seq).tolist():
        state = int(self._stop_table.transitions[start + max(state, 0), token])
    return state
