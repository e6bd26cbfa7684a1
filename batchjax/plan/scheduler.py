"""Decides what each step computes. The one mutable owner of rows, nodes and pages; numpy only."""

import bisect
import collections
from collections.abc import Sequence
import dataclasses

from jaxtyping import Int
import numpy as np

from batchjax.cache.page_table import PageTable
from batchjax.config import ConfigError
from batchjax.plan.admission import num_admissible
from batchjax.plan.batch import Admission, Batch, SchedulerStats
from batchjax.plan.builder import BatchBuilder
from batchjax.plan.lengths import LengthPredictor
from batchjax.plan.outlook import bins_of, NUM_BINS, Outlook
from batchjax.plan.prefix_tree import PrefixTree
from batchjax.plan.results import Results
from batchjax.plan.rows import Rows
from batchjax.types import Completion, Request, StepOutputs, StopTable


class Scheduler:
  """Runs one window of requests: `next_batch` until `finished`, `retire` what comes back.

  A shared node is computed once, when the first row below it is admitted, and
  its pages are freed with the last row below it. A row is admitted when a
  forward simulation of the KV pool says that it and all running rows will fit
  (Past-Future, section 3); if lengths were predicted too short, the youngest
  row is preempted and later recomputed.

  Rows and nodes are numbers, and what is known of them are columns: a step costs
  a few passes over arrays, and Python only for rows that come or go.
  """

  def __init__(self, requests: Sequence[Request], tree: PrefixTree, *, num_pages: int,
               page_size: int, max_rows: int, max_step_tokens: int, max_decode_steps: int,
               stop_table: StopTable | None = None):
    """Args:
      requests: of the window.
      tree: their prefix tree in the order of execution.
      num_pages, page_size: of the KV pool.
      max_rows, max_step_tokens, max_decode_steps: see `EngineConfig`.
      stop_table: stop automata, if any request has stop strings.

    Raises:
      ConfigError: the steps are too small to score prompts.
    """
    self._requests, self._tree = requests, tree
    self._max_rows, self._max_step_tokens = max_rows, max_step_tokens
    self._max_decode_steps, self._stop_table = max_decode_steps, stop_table
    self._score_start = _score_start(requests, tree)
    if self._score_start is not None and max_step_tokens < 2:
      raise ConfigError("engine.max_step_tokens=1 holds no token beside the one that scores it: "
                        "prompt_logprobs needs at least 2")
    max_tokens = np.array([r.sampling_params.max_tokens for r in requests], np.int64)

    self._rows = Rows(requests, tree, max_tokens, max_rows)
    self._pool = PageTable(num_pages, page_size, max_rows + tree.num_nodes)
    self._results = Results(requests, tree, self._rows)
    self._lengths = LengthPredictor()
    self._next_seq = 0  # the first row that was never admitted
    self._preempted: list[int] = []  # rows that wait again, ascending
    self._prefill: collections.deque[tuple[bool, int]] = collections.deque()  # (is a node, number)
    self._decoding = np.empty(0, np.int64)  # rows whose next token comes from their last, ascending
    self._admissions: list[Admission] = []  # that no batch has carried yet
    # Of each node: whether it has a run, rows below in slots, rows below that have not finished.
    self._is_open = np.zeros(tree.num_nodes, bool)
    self._num_active = np.zeros(tree.num_nodes, np.int64)
    self._num_left = tree.num_rows.astype(np.int64)
    self._num_in_flight = 0
    self._num_preempted = 0
    self._ended = np.zeros(NUM_BINS, np.int64)
    self._prompt_tokens_left = int(tree.length.sum(dtype=np.int64))

  @property
  def finished(self) -> bool:
    """Every request has been completed and handed out."""
    return self._results.finished

  @property
  def stats(self) -> SchedulerStats:
    """Counters, as they are now; those of a batch are in it."""
    return SchedulerStats(used_pages=self._pool.num_pages - self._pool.num_free,
                          num_running=self._num_running, num_waiting=self._num_waiting,
                          num_preempted=self._num_preempted)

  @property
  def num_finished(self) -> int:
    """Requests of the window that have been completed and handed out."""
    return self._results.num_complete

  def outlook(self) -> Outlook:
    """Where the rows stand that are to be dispatched again."""
    rows, decoding = self._rows, self._decoding
    seqs = np.concatenate([decoding, np.setdiff1d(rows.running, decoding), self._preempted,
                           np.arange(self._next_seq, len(rows))]).astype(np.int64)
    known, waiting = self._results.history.num_tokens[seqs], seqs[len(decoding):]
    # Rows that came together are at their ends together.
    lengths = self._lengths.predict(rows.num_dispatched[waiting], rows.max_tokens[waiting])
    own_lens, page_size = rows.prompt_len[waiting] - rows.own_start[waiting], self._pool.page_size
    shared = self._pool.num_held[self._max_rows + np.flatnonzero(self._is_open)].sum()
    room = (self._pool.num_pages - shared) * page_size
    fit = room / ((own_lens + lengths).mean() + page_size / 2) if len(waiting) else self._max_rows
    return Outlook(
        num_decoding=len(decoding), num_known=known, num_dispatched=rows.num_dispatched[seqs],
        max_tokens=rows.max_tokens[seqs], is_fixed=rows.is_fixed[seqs], ended=self._ended.copy(),
        prompt_tokens=self._prompt_tokens_left,
        max_rows=max(1, min(self._max_rows, int(fit))), max_step_tokens=self._max_step_tokens,
        max_decode_steps=self._max_decode_steps, num_in_flight=self._num_in_flight)

  @property
  def _num_running(self) -> int:
    return self._max_rows - self._rows.num_free_slots

  @property
  def _num_waiting(self) -> int:
    return len(self._preempted) + len(self._rows) - self._next_seq

  # -- forming a step -------------------------------------------------------

  def next_batch(self) -> Batch | None:
    """The work of the next dispatch, or None: read results first, then ask again."""
    if not self._reserve_decode():
      return None
    step = BatchBuilder(self._requests, self._tree, self._rows, self._pool, self._results.history,
                        self._decoding, budget=self._max_step_tokens, score_start=self._score_start,
                        stop_table=self._stop_table)
    kind, num_steps = "mixed", 1
    if not self._fill(step):
      if not len(self._decoding):
        return None
      kind, num_steps = "decode", self._reserve_loop()
    batch = step.build(kind, num_steps, self._admissions, np.flatnonzero(self._is_open))
    batch = dataclasses.replace(batch, stats=self.stats)
    self._admissions = []
    self._num_in_flight += 1
    self._prompt_tokens_left = max(0, self._prompt_tokens_left - batch.num_prompt_tokens)
    drawing = batch.samples.seq
    num_dispatched = np.minimum(batch.samples.num_generated + num_steps, batch.samples.max_tokens)
    self._rows.num_dispatched[drawing] = num_dispatched
    self._decoding = drawing
    # Later steps may reuse slots and pages of rows at their limit: the device runs in order.
    self._release(drawing[num_dispatched == batch.samples.max_tokens])
    return batch

  def _kv_lens(self, num_steps: int) -> Int[np.ndarray, "n"]:
    """Lengths of the decoding rows' own runs after `num_steps` more tokens went in."""
    rows, seqs = self._rows, self._decoding
    num_in = np.minimum(rows.num_dispatched[seqs] + num_steps, rows.max_tokens[seqs]) - 1
    return rows.prompt_len[seqs] + num_in - rows.own_start[seqs]

  def _grow_decode(self, num_steps: int) -> bool:
    """Gives every decoding row room for `num_steps` more tokens, if the pool has it."""
    slots, kv_lens = self._rows.slot[self._decoding], self._kv_lens(num_steps)
    if self._pool.missing(slots, kv_lens).sum() > self._pool.num_free:
      return False
    self._pool.grow(slots, kv_lens)
    return True

  def _reserve_decode(self) -> bool:
    """Gives every decoding row room for one token, preempting if it must.

    Returns False when rows in flight have to come back before anything can be preempted.
    """
    while not self._grow_decode(1):
      if not self._make_room():
        return False
    return True

  def _reserve_loop(self) -> int:
    """Gives every decoding row room for a loop; returns its steps."""
    left = self._rows.max_tokens[self._decoding] - self._rows.num_dispatched[self._decoding]
    longest = int(left.max())
    if self._num_waiting:  # free slots soon, but not one by one
      longest = min(longest, max(int(left.min()), self._max_decode_steps // 4))
    steps = min(longest, self._max_decode_steps)
    while not self._grow_decode(steps):  # for one step they have room
      steps //= 2
    return steps

  def _make_room(self) -> bool:
    """Frees pages: idle shared nodes first, then the youngest row. False: nothing to free now."""
    idle = np.flatnonzero(self._is_open & (self._num_active == 0))
    if len(idle):
      self._close_nodes(idle[:1])
      return True
    if self._num_in_flight or self._num_running < 2:
      return False
    self._preempt(int(self._rows.running.max()))
    return True

  def _fill(self, step: BatchBuilder) -> bool:
    """Adds prefill chunks and admits rows until the step is full. False: nothing could be added."""
    admissible = None
    while True:
      if self._prefill:
        is_node, number = self._prefill[0]
        if step.add_node(number) if is_node else step.add_row(number):
          self._prefill.popleft()
        elif step.is_empty and self._make_room():
          admissible = None
        else:
          return step.has_prefill
      else:
        if admissible is None:
          admissible = self._num_admissible()
        if not admissible or not step.has_room_for(int(self._waiting(1)[0])):
          return step.has_prefill
        admissible -= 1
        self._admit()

  # -- admission --------------------------------------------------------------

  def _waiting(self, count: int) -> Int[np.ndarray, "n"]:
    """The next `count` waiting rows, ascending: preempted ones come before new ones."""
    again = self._preempted[:count]
    stop = min(self._next_seq + count - len(again), len(self._rows))
    return np.array([*again, *range(self._next_seq, stop)], np.int64)

  def _num_admissible(self) -> int:
    """How many waiting rows fit: slots now, pages until the end as far as it can be foretold."""
    limit = min(self._rows.num_free_slots, self._num_waiting)
    if not limit:
      return 0
    count = num_admissible(self._waiting(limit), self._rows, self._tree, self._pool, self._is_open,
                           self._lengths)
    # With nothing running the next row has the pool for itself; planning saw that it fits.
    return max(count, 0 if self._num_running else 1)

  def _admit(self) -> None:
    """Gives the next waiting row a slot, and queues its prompt and the nodes that lack theirs."""
    if self._preempted:
      seq = self._preempted.pop(0)
    else:
      seq, self._next_seq = self._next_seq, self._next_seq + 1
    slot = self._rows.enter_slot(seq)
    node, path = int(self._rows.shared_node[seq]), []
    while node:
      path.append(node)
      node = int(self._tree.parent[node])
    for node in reversed(path):
      self._num_active[node] += 1
      if not self._is_open[node]:
        self._is_open[node] = True
        if self._tree.length[node]:
          self._prefill.append((True, node))
    self._prefill.append((False, seq))
    request = self._requests[self._rows.request[seq]]
    self._admissions.append(Admission(
        slot, request.request_id, request.sampling_params, int(self._rows.sample[seq]),
        request.prompt_token_ids, self._results.history.tokens(seq)))

  def stop_admitting(self) -> None:
    """Rows that were never admitted stay away: the schedule goes on as at the end of a window."""
    self._next_seq = len(self._rows)

  # -- leaving ------------------------------------------------------------------

  def _nodes_above(self, seqs: Int[np.ndarray, "n"]) -> Int[np.ndarray, "nodes"]:
    """Shared nodes above rows or at their end, once for each row; deepest first."""
    node, levels = self._rows.shared_node[seqs], []
    while len(node := node[node > 0]):
      levels.append(node)
      node = self._tree.parent[node]
    return np.concatenate(levels) if levels else node

  def _leave_slots(self, seqs: Int[np.ndarray, "n"]) -> Int[np.ndarray, "nodes"]:
    """Frees slots and own pages of rows; returns the shared nodes above them."""
    self._pool.close(self._rows.slot[seqs])
    self._rows.leave_slots(seqs)
    self._decoding = self._decoding[self._rows.slot[self._decoding] >= 0]
    nodes = self._nodes_above(seqs)
    np.subtract.at(self._num_active, nodes, 1)
    return nodes

  def _close_nodes(self, nodes: Int[np.ndarray, "n"]) -> None:
    self._pool.close(self._max_rows + nodes)
    self._is_open[nodes] = False

  def _release(self, seqs: Int[np.ndarray, "n"]) -> None:
    """The rows need no more steps: their slots and pages, and nodes that served them last, are free."""
    if not len(seqs):
      return
    nodes = self._leave_slots(seqs)
    np.subtract.at(self._num_left, nodes, 1)
    self._close_nodes(np.unique(nodes[(self._num_left[nodes] == 0) & self._is_open[nodes]]))

  def _preempt(self, seq: int) -> None:
    self._num_preempted += 1
    self._prompt_tokens_left += int(self._rows.prompt_len[seq] - self._rows.own_start[seq])
    if (False, seq) in self._prefill:
      self._prefill.remove((False, seq))
    nodes = self._leave_slots(np.array([seq]))
    bisect.insort(self._preempted, seq)
    for node in nodes[::-1].tolist():  # half-computed nodes nobody waits for would never be finished
      if not self._num_active[node] and (True, node) in self._prefill:
        self._prefill.remove((True, node))
        self._close_nodes(np.array([node]))

  def retire(self, batch: Batch, outputs: StepOutputs) -> list[Completion]:
    """Takes in the results of `batch`; returns the requests that are complete with them."""
    self._num_in_flight -= 1
    ended = self._results.add(batch, outputs)
    self._release(ended[self._rows.slot[ended] >= 0])
    lengths, max_tokens = self._results.history.num_tokens[ended], self._rows.max_tokens[ended]
    self._lengths.add(lengths, max_tokens)
    if not (is_fixed := self._rows.is_fixed[ended]).all():
      self._ended += bins_of(lengths[~is_fixed], max_tokens[~is_fixed])
    return self._results.complete(ended)

  def check_integrity(self) -> None:
    """Raises AssertionError if rows, nodes, slots and pages contradict each other."""
    self._pool.check_integrity()
    self._rows.check_integrity()
    running = self._rows.running
    has_run = np.zeros(self._max_rows + self._tree.num_nodes, bool)
    has_run[self._rows.slot[running]] = True
    has_run[self._max_rows + np.flatnonzero(self._is_open)] = True
    assert not self._pool.num_held[~has_run].any(), "pages are left behind"
    active = np.bincount(self._nodes_above(running), minlength=self._tree.num_nodes)
    assert (active == self._num_active).all(), "active rows of a node miscounted"
    assert (self._num_left[self._is_open] > 0).all(), "a node outlived its rows"
    assert (np.diff(self._decoding) > 0).all(), "decoding rows are out of order"


def _score_start(requests: Sequence[Request], tree: PrefixTree) -> Int[np.ndarray, "N"] | None:
  """Of each node the first position that a request there or below wants scored; None if none does."""
  wants = np.array([r.sampling_params.prompt_logprobs for r in requests])
  if not wants.any():
    return None
  starts = np.array([r.sampling_params.prompt_logprobs_start for r in requests])
  of_node = np.full(tree.num_nodes, np.iinfo(np.int32).max)
  np.minimum.at(of_node, tree.node_of_request[wants], starts[wants])
  return tree.subtree_min(of_node)
