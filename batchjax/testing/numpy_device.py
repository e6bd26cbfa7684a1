"""A device of numpy for the engine's tests: runs the fake model, and distrusts the scheduler.

It interprets `StepInputs` as `engine.step` does, in milliseconds and without
compiling. Besides, it follows every KV page: a page that was just handed out
or taken back holds nothing, and reading nothing, writing twice or writing to
a page that no run holds is an error.
"""

import numpy as np

from batchjax.cache.page_table import PageTable
from batchjax.engine.sampling_inputs import SamplingFeatures
from batchjax.testing.fake_model import logits_of_hashes, mix
from batchjax.types import Request, SamplingInputs, StepInputs, StepOutputs


def fake_draw(logits: np.ndarray, temperature: float, seed: int, sample_index: int,
              position: int) -> int:
  """A stand-in for sampling: the most likely token after noise of (seed, sample, position)."""
  key = mix(mix(np.uint32([seed]), np.uint32([sample_index])), np.uint32([position]))
  noise = mix(np.arange(len(logits)), key) % np.uint32(1000)
  return int(np.argmax(logits + temperature * noise.astype(np.float32) / 100))


def masked(logits: np.ndarray, stop_ids: np.ndarray, is_masked: bool) -> np.ndarray:
  """Logits without the stop tokens where the row is still too short to end."""
  logits = logits.copy()
  if is_masked:
    logits[[token for token in stop_ids if token >= 0]] = -np.inf
  return logits


def draw_of_request(eos_token_ids):
  """The oracle's draw function that belongs to this device."""
  def draw_fn(logits: np.ndarray, request: Request, sample: int, output: list[int]) -> int:
    params = request.sampling_params
    stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    logits = masked(logits, sorted(stop_ids), len(output) < params.min_tokens)
    return fake_draw(logits, params.temperature, params.seed, sample,
                     len(request.prompt_token_ids) + len(output))
  return draw_fn


class NumpyDevice:
  """Pool, slots and steps. Steps run when they are dispatched, in order."""

  def __init__(self, num_pages: int, page_size: int, max_rows: int, vocab_size: int,
               features: SamplingFeatures, max_decode_steps: int,
               stop_transitions: np.ndarray | None, nan_every: int = 0):
    self._page_size, self._max_decode_steps = page_size, max_decode_steps
    self._logits_fn = lambda totals: logits_of_hashes(totals, vocab_size, nan_every)
    self._features = features
    self._stop_transitions = stop_transitions
    self._tokens = np.full(num_pages * page_size, -7, np.int64)  # the pool: token and position
    self._positions = np.full(num_pages * page_size, -7, np.int64)
    self._written = np.zeros((num_pages, page_size), bool)
    self._held = np.zeros(num_pages, bool)
    self._freed: set[int] = set()
    self._last_tokens = np.zeros(max_rows, np.int64)
    self._done = np.ones(max_rows, bool)
    self._stop_states = np.zeros(max_rows, np.int64)

  # -- pages ---------------------------------------------------------------------

  def watch(self, pool: PageTable) -> None:
    """Follows the pages that `pool` hands out and takes back from now on."""
    grow, close = pool.grow, pool.close

    def watched_grow(runs, kv_lens):
      free_before = set(pool.free_pages)
      grow(runs, kv_lens)
      taken = sorted(free_before - set(pool.free_pages))
      self._freed -= set(taken)
      self._written[taken] = False
      self._held[taken] = True

    def watched_close(runs):
      free_before = set(pool.free_pages)
      close(runs)
      self._freed |= set(pool.free_pages) - free_before

    pool.grow, pool.close = watched_grow, watched_close

  def settle(self) -> None:
    """To be called before a batch is formed: pages freed until here are nobody's."""
    freed = sorted(self._freed)
    self._written[freed] = False
    self._held[freed] = False
    self._freed.clear()

  # -- steps ---------------------------------------------------------------------

  def run(self, kind: str, inputs: StepInputs, num_steps: int) -> StepOutputs:
    """One dispatch; `inputs` stays as it is."""
    if kind == "mixed":
      outputs, prompt_scores = self._advance(inputs)
      stacked = StepOutputs(*(None if x is None else x[None] for x in outputs))
      return stacked._replace(**prompt_scores)
    shape, top = (self._max_decode_steps, len(inputs.slots)), self._features.num_top_logprobs
    buffers = StepOutputs(np.full(shape, -1, np.int32), np.zeros(shape, np.int8))
    if self._features.logprobs:
      buffers = buffers._replace(logprobs=np.zeros(shape, np.float32))
      if top:
        buffers = buffers._replace(top_token_ids=np.zeros((*shape, top), np.int32),
                                   top_logprobs=np.zeros((*shape, top), np.float32))
    slots = inputs.slots[inputs.slots >= 0]
    for step in range(num_steps):
      if self._done[slots].all():  # before the first step too: the host learns of it later
        break
      for buffer, values in zip(buffers, self._advance(inputs)[0]):
        if buffer is not None:
          buffer[step] = values
      inputs = self._next_inputs(inputs)
    return buffers

  def _next_inputs(self, inputs: StepInputs) -> StepInputs:
    segments, own = inputs.segments, inputs.own_segments
    used = own >= 0
    kv_len = segments.kv_len.copy()
    kv_len[own[used & ~self._done[inputs.slots]]] += 1
    positions = np.where(inputs.positions < 0, -1, inputs.positions + 1)
    write_slots = np.full_like(inputs.write_slots, -1)
    in_run = positions[used] - segments.kv_start[own[used]]
    index = segments.page_start[own[used]] + in_run // self._page_size
    page = inputs.page_indices[np.minimum(index, len(inputs.page_indices) - 1)]
    write_slots[used] = page * self._page_size + in_run % self._page_size
    return inputs._replace(
        tokens=np.full_like(inputs.tokens, -1), positions=positions, write_slots=write_slots,
        segments=segments._replace(kv_len=kv_len), is_first=np.zeros_like(inputs.is_first),
        num_generated=inputs.num_generated + 1)

  def _advance(self, inputs: StepInputs) -> tuple[StepOutputs, dict[str, np.ndarray]]:
    slot = np.maximum(inputs.token_slots, 0)
    from_device = (inputs.tokens < 0) & (inputs.token_slots >= 0)
    tokens = np.where(from_device, self._last_tokens[slot], inputs.tokens)
    live = (inputs.positions >= 0) & ~(from_device & self._done[slot])
    self._write(tokens, inputs, live)
    hidden = self._attend(inputs, live)

    num_rows = len(inputs.slots)
    drawn, finish = np.full(num_rows, -1, np.int32), np.zeros(num_rows, np.int8)
    logits = self._logits_fn(hidden[np.maximum(inputs.sample_tokens, 0)])
    for r, slot in enumerate(inputs.slots):
      row = SamplingInputs(*(field[r] for field in inputs.sampling))
      if slot < 0 or row.max_tokens == 0 or (self._done[slot] and not inputs.is_first[r]):
        continue
      assert live[inputs.sample_tokens[r]], "a row draws from a dead token"
      drawn[r] = fake_draw(
          masked(logits[r], row.stop_ids, inputs.num_generated[r] < row.min_tokens),
          row.temperature, int(row.seed), int(row.sample_index),
          int(inputs.positions[inputs.sample_tokens[r]]) + 1)
      finish[r] = self._finish(r, int(slot), int(drawn[r]), np.isnan(logits[r]).any(), inputs, row)
    top = self._features.num_top_logprobs
    scores = (None,) * 3
    if self._features.logprobs:
      scores = token_scores(logits, drawn, top)
    prompt_scores = {}
    if inputs.next_tokens is not None:
      prompt_scores = dict(zip(StepOutputs._fields[5:], token_scores(
          self._logits_fn(hidden), inputs.next_tokens, top)))
    return StepOutputs(drawn, finish, *scores), prompt_scores

  def _finish(self, r: int, slot: int, token: int, is_nan: bool, inputs: StepInputs,
              row: SamplingInputs) -> int:
    state = 0
    if self._stop_transitions is not None and row.automaton >= 0:
      state = int(inputs.stop_states[r]) if inputs.is_first[r] else int(self._stop_states[slot])
      state = int(self._stop_transitions[row.automaton + max(state, 0), token])
    count = int(inputs.num_generated[r]) + 1
    may_stop = count > row.min_tokens
    reason = 3 if count >= row.max_tokens else 0
    reason = 2 if state < 0 and may_stop else reason
    reason = 1 if token in row.stop_ids and may_stop else reason
    reason = 4 if is_nan else reason
    self._last_tokens[slot], self._stop_states[slot], self._done[slot] = token, state, reason > 0
    return reason

  # -- KV ------------------------------------------------------------------------

  def _write(self, tokens: np.ndarray, inputs: StepInputs, live: np.ndarray) -> None:
    writes = live & (inputs.write_slots >= 0)
    where = inputs.write_slots[writes]
    assert len(np.unique(where)) == len(where), "two tokens of a step write to one slot"
    page, offset = where // self._page_size, where % self._page_size
    assert self._held[page].all(), "a token writes to a page that no run holds"
    assert not self._written[page, offset].any(), "a token's KV is written over"
    self._written[page, offset] = True
    self._tokens[where], self._positions[where] = tokens[writes], inputs.positions[writes]

  def _attend(self, inputs: StepInputs, live: np.ndarray) -> np.ndarray:
    """The sum of hashes of what each token sees: u32[T]."""
    num_indices = sum(-(-kv_len // self._page_size) for kv_len in inputs.segments.kv_len.tolist())
    assert num_indices <= len(inputs.page_indices), "segments are longer than the page list"
    total = np.zeros(len(live), np.uint32)
    num_seen = np.zeros(len(live), np.int64)
    for q_start, q_len, kv_start, kv_len, page_start in zip(*map(np.ndarray.tolist,
                                                               inputs.segments)):
      if not q_len or not kv_len:
        continue
      here = np.arange(q_start, q_start + q_len)
      here = here[live[here]]
      j = np.arange(kv_len)
      assert page_start + j[-1] // self._page_size < len(inputs.page_indices), "no such page"
      page = inputs.page_indices[page_start + j // self._page_size]
      slot = page * self._page_size + j % self._page_size
      sees = kv_start + j <= inputs.positions[here][:, None]
      seen = sees.any(axis=0)
      assert self._written[page, j % self._page_size][seen].all(), "KV is read before its writing"
      assert (self._positions[slot] == kv_start + j)[seen].all(), "KV of another position is read"
      hashed = mix(self._tokens[slot], self._positions[slot])
      total[here] += np.where(sees, hashed, np.uint32(0)).sum(axis=1, dtype=np.uint32)
      num_seen[here] += sees.sum(axis=1)
    assert (num_seen == inputs.positions + 1)[live].all(), "a token misses KV or sees it twice"
    return total


def token_scores(logits: np.ndarray, tokens: np.ndarray, num_top: int):
  """Log-probabilities of tokens f32[n] (NaN for -1), and the most likely ids and theirs."""
  logits = logits.astype(np.float64)
  logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  chosen = np.take_along_axis(logprobs, np.maximum(tokens, 0)[:, None], axis=1)[:, 0]
  chosen = np.where(tokens < 0, np.nan, chosen).astype(np.float32)
  if not num_top:
    return chosen, None, None
  order = np.argsort(-np.nan_to_num(logits, nan=np.inf), axis=1, kind="stable")  # NaN first
  ids = order[:, :num_top].astype(np.int32)
  return chosen, ids, np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)
