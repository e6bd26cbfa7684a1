"""Decides what each step computes. The one mutable owner of rows, nodes and pages; numpy only."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from batchjax.cache.page_table import pages_for, PageTable, Run
from batchjax.config import ConfigError
from batchjax.plan.batch import Admission, Batch
from batchjax.plan.builder import BatchBuilder
from batchjax.plan.lengths import LengthPredictor, peak_pages
from batchjax.plan.prefix_tree import PrefixTree
from batchjax.plan.results import Results
from batchjax.plan.row import Row
from batchjax.types import Completion, Request, StepOutputs, StopTable


class SchedulerStats(NamedTuple):
  """Pages in use, rows in slots and waiting, requests completed and rows preempted so far."""

  used_pages: int
  num_running: int
  num_waiting: int
  num_retired: int
  num_preempted: int


class Scheduler:
  """Runs one window of requests: `next_batch` until `finished`, `retire` what comes back.

  A shared node is computed once, when the first row below it is admitted, and
  its pages are freed with the last row below it. A row is admitted when a
  forward simulation of the KV pool says that it and all running rows will fit
  (Past-Future, section 3); if lengths were predicted too short, the youngest
  row is preempted and later recomputed.
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
    self._pool = PageTable(num_pages, page_size)
    self._lengths = LengthPredictor()
    self._scores = any(r.sampling_params.prompt_logprobs for r in requests)
    if self._scores and max_step_tokens < 2:
      raise ConfigError("engine.max_step_tokens=1 holds no token beside the one that scores it: "
                        "prompt_logprobs needs at least 2")

    samples = np.array([r.sampling_params.n for r in requests], np.int64)
    order = np.argsort(tree.node_of_request, kind="stable")
    self._row_request = np.repeat(order, samples[order])
    self._row_sample = np.concatenate([np.arange(samples[i]) for i in order] or [np.empty(0, int)])
    self._next_seq = 0
    self._preempted: list[Row] = []  # waiting again, youngest first
    self._free_slots = list(range(max_rows - 1, -1, -1))
    self._active: dict[int, Row] = {}  # by slot, in order of admission
    self._decoding: dict[int, Row] = {}  # those whose next token comes from their last one
    self._prefill: collections.deque[Row | int] = collections.deque()  # rows and shared nodes

    self._node_run: dict[int, Run] = {}
    self._node_left = tree.num_rows.copy()  # rows below that have not finished
    self._node_active = np.zeros(len(tree.parent), np.int64)  # rows below in slots
    self._computed = np.zeros(len(tree.parent), bool)  # nodes whose tokens were counted once
    self._admissions: list[Admission] = []  # that no batch has carried yet
    self._results = Results(requests, tree)
    self._num_in_flight = 0
    self._num_preempted = 0

  @property
  def finished(self) -> bool:
    """Every request has been completed and handed out."""
    return self._results.finished

  @property
  def stats(self) -> SchedulerStats:
    """Counters for metrics and progress."""
    return SchedulerStats(used_pages=self._pool.num_pages - self._pool.num_free,
                          num_running=len(self._active), num_waiting=self._num_waiting,
                          num_retired=self._results.num_complete, num_preempted=self._num_preempted)

  # -- forming a step -------------------------------------------------------

  def next_batch(self) -> Batch | None:
    """The work of the next dispatch, or None: read results first, then ask again."""
    if not self._reserve_decode():
      return None
    step = self._builder(1)
    if self._fill(step):
      batch = step.build("mixed", self._admissions)
    elif not self._decoding:
      return None
    else:
      num_steps = self._loop_steps()
      for row in self._decoding.values():
        self._pool.grow(row.run, self._kv_len(row, num_steps))
      batch = self._builder(num_steps).build("decode", self._admissions)
    self._admissions = []
    self._num_in_flight += 1
    for sample in batch.samples:
      row = sample.row
      row.num_dispatched = min(row.num_dispatched + batch.num_steps, row.max_tokens)
      self._decoding[row.slot] = row
      if row.num_dispatched == row.max_tokens:
        self._release(row)  # later steps may reuse slot and pages: the device runs in order
    return batch

  def _builder(self, num_steps: int) -> BatchBuilder:
    """A batch with all decode rows in it."""
    step = BatchBuilder(self._requests, self._tree, self._pool, self._node_run,
                        budget=self._max_step_tokens, num_steps=num_steps,
                        scores=self._scores, stop_table=self._stop_table)
    for row in self._decoding.values():
      step.add_decode(row)
    return step

  def _kv_len(self, row: Row, num_steps: int) -> int:
    """Length of a decoding row's own run after `num_steps` more tokens went in."""
    prompt_len = len(self._requests[row.request].prompt_token_ids)
    num_in = min(row.num_dispatched + num_steps - 1, row.max_tokens - 1)
    return prompt_len + num_in - row.own_start

  def _loop_steps(self) -> int:
    left = [row.max_tokens - row.num_dispatched for row in self._decoding.values()]
    if self._num_waiting:  # free slots soon, but not one by one
      longest = max(min(left), self._max_decode_steps // 4)
    else:
      longest = max(left)
    steps = min(longest, max(left), self._max_decode_steps)
    rows = list(self._decoding.values())
    while steps > 1 and self._num_missing(rows, steps) > self._pool.num_free:
      steps //= 2
    return steps

  def _num_missing(self, rows: list[Row], num_steps: int) -> int:
    return sum(self._pool.missing(row.run, self._kv_len(row, num_steps)) for row in rows)

  def _reserve_decode(self) -> bool:
    """Gives every decoding row room for one token, preempting if it must.

    Returns False when rows in flight have to come back before anything can be preempted.
    """
    while True:
      rows = list(self._decoding.values())
      if self._num_missing(rows, 1) <= self._pool.num_free:
        break
      if not self._make_room():
        return False
    for row in rows:
      self._pool.grow(row.run, self._kv_len(row, 1))
    return True

  def _make_room(self) -> bool:
    """Frees pages: idle shared nodes first, then the youngest row. False: nothing to free now."""
    for node, run in list(self._node_run.items()):
      if not self._node_active[node]:
        self._pool.close(run)
        del self._node_run[node]
        return True
    if self._num_in_flight or len(self._active) < 2:
      return False
    self._preempt(max(self._active.values(), key=lambda row: row.seq))
    return True

  def _fill(self, step: BatchBuilder) -> bool:
    """Adds prefill chunks and admits rows until the step is full. False: nothing could be added."""
    admissible = None
    while True:
      if self._prefill:
        if step.add_chunk(self._prefill[0]):
          self._prefill.popleft()
        elif step.is_empty and self._make_room():
          admissible = None
        else:
          return step.has_prefill
      else:
        if admissible is None:
          admissible = self._num_admissible()
        if not admissible or not step.has_room_for(self._peek(1)[0]):
          return step.has_prefill
        admissible -= 1
        self._admit()

  # -- admission --------------------------------------------------------------

  @property
  def _num_waiting(self) -> int:
    return len(self._preempted) + len(self._row_request) - self._next_seq

  def _peek(self, count: int) -> list[Row]:
    """The next `count` waiting rows; preempted ones come before new ones."""
    rows = self._preempted[::-1][:count]
    stop = min(self._next_seq + count - len(rows), len(self._row_request))
    return rows + [self._new_row(seq) for seq in range(self._next_seq, stop)]

  def _new_row(self, seq: int) -> Row:
    request = int(self._row_request[seq])
    node = int(self._tree.node_of_request[request])
    private = self._tree.num_rows[node] == 1
    prompt_len = len(self._requests[request].prompt_token_ids)
    return Row(seq=seq, request=request, sample=int(self._row_sample[seq]), node=node,
               own_start=int(self._tree.start[node]) if private else prompt_len,
               max_tokens=self._requests[request].sampling_params.max_tokens)

  def _num_admissible(self) -> int:
    """How many waiting rows fit: slots now, pages until the end as far as it can be foretold."""
    limit = min(len(self._free_slots), self._num_waiting)
    if not limit:
      return 0
    rows = self._peek(limit)
    page_size, num_running = self._pool.page_size, len(self._active)
    both = list(self._active.values()) + rows
    generated = np.array([row.num_dispatched for row in both])
    max_tokens = np.array([row.max_tokens for row in both])
    prompt_lens = np.array([len(self._requests[row.request].prompt_token_ids) for row in both])
    own = prompt_lens - np.array([row.own_start for row in both]) + generated
    remaining = self._lengths.predict(generated, max_tokens) - generated
    shared = sum(len(run.pages) for run in self._node_run.values())
    new_nodes: set[int] = set()
    shared_pages = [shared]
    for row in rows:
      for node in self._path(row):
        if node not in self._node_run and node not in new_nodes:
          new_nodes.add(node)
          shared += pages_for(int(self._tree.length[node]), page_size)
      shared_pages.append(shared)
    # Nodes being computed hold fewer pages now than they will.
    growing = sum(self._pool.missing(run, int(self._tree.length[node]))
                  for node, run in self._node_run.items())

    def fits(count: int) -> bool:
      upto = num_running + count
      return (peak_pages(own[:upto], remaining[:upto], page_size) + shared_pages[count] + growing
              <= self._pool.num_pages)

    low, high = 0, limit
    while low < high:
      middle = (low + high + 1) // 2
      low, high = (middle, high) if fits(middle) else (low, middle - 1)
    # With nothing running the next row has the pool for itself; planning saw that it fits.
    return max(low, 0 if self._active else 1)

  def _path(self, row: Row) -> list[int]:
    """Shared nodes above (or at) the row's node, top first."""
    node = row.node if self._tree.num_rows[row.node] > 1 else int(self._tree.parent[row.node])
    path = []
    while node > 0:
      path.append(node)
      node = int(self._tree.parent[node])
    return path[::-1]

  def _admit(self) -> None:
    row = self._peek(1)[0]
    prompt = self._requests[row.request].prompt_token_ids
    if self._preempted:
      self._preempted.pop()
    else:
      self._next_seq += 1
      fresh = [node for node in self._tree_path(row) if not self._computed[node]]
      self._computed[fresh] = True
      if row.sample == 0:
        num_computed = int(self._tree.length[fresh].sum())
        self._results.num_cached[row.request] = len(prompt) - num_computed
    row.slot = self._free_slots.pop()
    row.run = self._pool.open_run(row.own_start)
    row.num_computed = 0
    self._active[row.slot] = row
    path = self._path(row)
    for node in path:
      self._node_active[node] += 1
      if node not in self._node_run:
        self._node_run[node] = self._pool.open_run(int(self._tree.start[node]))
        if self._tree.length[node]:
          self._prefill.append(node)
    self._prefill.append(row)
    request = self._requests[row.request]
    self._admissions.append(Admission(row.slot, request.request_id, request.sampling_params,
                                     row.sample, prompt, np.array(row.tokens, np.int32)))

  def _tree_path(self, row: Row) -> list[int]:
    path = self._path(row)
    return path if self._tree.num_rows[row.node] > 1 else [*path, row.node]

  # -- leaving ------------------------------------------------------------------

  def _leave_slot(self, row: Row) -> None:
    self._pool.close(row.run)
    del self._active[row.slot]
    self._decoding.pop(row.slot, None)
    self._free_slots.append(row.slot)
    row.slot, row.run = -1, None
    self._node_active[self._path(row)] -= 1

  def _release(self, row: Row) -> None:
    """The row needs no more steps: its slot and pages, and nodes that served it last, are free."""
    self._leave_slot(row)
    for node in self._path(row):
      self._node_left[node] -= 1
      if not self._node_left[node] and node in self._node_run:
        self._pool.close(self._node_run.pop(node))

  def _preempt(self, row: Row) -> None:
    self._num_preempted += 1
    if row in self._prefill:
      self._prefill.remove(row)
    self._leave_slot(row)
    self._preempted.append(row)
    self._preempted.sort(key=lambda r: -r.seq)
    for node in self._path(row):  # half-computed nodes nobody waits for would never be finished
      if not self._node_active[node] and node in self._prefill:
        self._prefill.remove(node)
        self._pool.close(self._node_run.pop(node))

  def retire(self, batch: Batch, outputs: StepOutputs) -> list[Completion]:
    """Takes in the results of `batch`; returns the requests that are complete with them."""
    self._num_in_flight -= 1
    self._results.add_scores(batch, outputs)
    tokens, finish = np.asarray(outputs.tokens), np.asarray(outputs.finish)
    num_drawn = (tokens >= 0).sum(axis=0).tolist()
    completions = []
    for i, (sample, count) in enumerate(zip(batch.samples, num_drawn)):
      row = sample.row
      if row.finish:  # known since an earlier step; this one was in flight
        continue
      row.tokens.extend(tokens[:count, i].tolist())
      if outputs.logprobs is not None:
        row.logprobs.extend(outputs.logprobs[:count, i].tolist())
      if outputs.top_logprobs is not None:
        row.top.extend(zip(outputs.top_token_ids[:count, i], outputs.top_logprobs[:count, i]))
      row.finish = int(finish[count - 1, i]) if row.max_tokens else 3
      if row.finish:
        if row.slot >= 0:
          self._release(row)
        self._lengths.add(len(row.tokens), row.max_tokens)
        completions.append(self._results.finish(row))
    return [completion for completion in completions if completion is not None]

  def check_integrity(self) -> None:
    """Raises AssertionError if rows, nodes, slots and pages contradict each other."""
    runs = [row.run for row in self._active.values()] + list(self._node_run.values())
    self._pool.check_integrity(runs)
    slots = self._free_slots + list(self._active)
    assert sorted(slots) == list(range(self._max_rows)), "a slot is lost or held twice"
    active = np.zeros_like(self._node_active)
    for row in self._active.values():
      active[self._path(row)] += 1
    assert (active == self._node_active).all(), "active rows of a node miscounted"
    assert all(self._node_left[node] > 0 for node in self._node_run), "a node outlived its rows"
