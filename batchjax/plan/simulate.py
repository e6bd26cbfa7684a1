"""The scheduler run on paper: which steps a job takes, and how long they should last."""

import collections
from collections.abc import Iterator
import dataclasses
import itertools

from jaxtyping import Int
import numpy as np

from batchjax.config import ModelConfig
from batchjax.plan.batch import Batch
from batchjax.plan.cost import Chip, step_cost
from batchjax.plan.scheduler import Scheduler
from batchjax.types import StepOutputs


@dataclasses.dataclass(frozen=True)
class StepShape:
  """One simulated dispatch.

  Attributes:
    kind: "mixed" or "decode".
    num_tokens, num_rows: of one iteration, before padding; rows that have ended and are not yet
      known to have are among them.
    num_steps: iterations.
    num_prompt_tokens: prompt tokens computed.
    num_drawn: tokens drawn, in all iterations.
    kv_read_tokens, attn_pairs: see `cost.step_cost`; of the first iteration.
    used_pages: pages held.
    num_slots: rows that held a slot.
    is_end: of the end of a job whose middle was left out.
    count: dispatches of the job that it stands for.
  """

  kind: str
  num_tokens: int
  num_rows: int
  num_steps: int
  num_prompt_tokens: int
  num_drawn: int
  kv_read_tokens: int
  attn_pairs: int
  used_pages: int
  num_slots: int
  is_end: bool = False
  count: float = 1.0

  @property
  def num_useful(self) -> int:
    """Tokens that are not padding: those that a loop draws, all of a mixed step."""
    return self.num_drawn if self.kind == "decode" else self.num_tokens

  def secs(self, model: ModelConfig, chip: Chip, num_tokens: int) -> float:
    """Seconds by the roofline when padded to `num_tokens`, attention after the products."""
    num_sampled = num_tokens if self.kind == "decode" else self.num_rows
    return self.num_steps * step_cost(model, chip, num_tokens, num_sampled,
                                      self.kv_read_tokens, self.attn_pairs).serial_secs


def simulate(scheduler: Scheduler, max_dispatches: int, num_top: int = 0, *,
             lengths: Int[np.ndarray, "rows"] | None = None, lookahead: int = 0) -> list[StepShape]:
  """Runs `scheduler` as `generate` does, on a device that takes no time.

  Args:
    scheduler: fresh; it is used up.
    max_dispatches: of a longer job, this many from its beginning are simulated and at most as many
      from its end.
    num_top: most `top_logprobs` of its requests.
    lengths: tokens that each row draws before it ends, in the order of the window; the scheduler does
      not know them. None: every row reaches its `max_tokens`, and the end of a longer job is left out.
    lookahead: dispatches in flight before the oldest one's results are read.
  """
  dispatches = _dispatches(scheduler, num_top, lengths, lookahead)
  shapes = list(itertools.islice(dispatches, max_dispatches))
  if lengths is not None:
    scheduler.stop_admitting()
    shapes += [dataclasses.replace(shape, is_end=True)
               for shape in itertools.islice(dispatches, max_dispatches)]
  return shapes


def _dispatches(scheduler: Scheduler, num_top: int, lengths: Int[np.ndarray, "rows"] | None,
                lookahead: int) -> Iterator[StepShape]:
  in_flight = collections.deque()
  while not scheduler.finished:
    batch = scheduler.next_batch()
    if batch is None and not in_flight:
      return
    if batch is not None:
      outputs = outputs_of(batch, num_top, lengths)
      yield _shape(batch, outputs)
      in_flight.append((batch, outputs))
    if batch is None or len(in_flight) > lookahead:
      scheduler.retire(*in_flight.popleft())


def _shape(batch: Batch, outputs: StepOutputs) -> StepShape:
  entries, shared, offsets = batch.entries, batch.shared, batch.entries.offsets
  own_len = np.where(entries.seq >= 0, entries.kv_len, 0)
  num_below = offsets[shared.end_entry] - offsets[shared.first_entry]
  is_drawn = outputs.tokens >= 0
  return StepShape(
      batch.kind, batch.num_tokens, batch.num_rows,
      num_steps=max(int(is_drawn.any(axis=1).sum()), 1),  # a loop ends when all rows have
      num_prompt_tokens=batch.num_prompt_tokens, num_drawn=int(is_drawn.sum()),
      kv_read_tokens=int(own_len.sum() + shared.kv_len.sum()),
      attn_pairs=int(own_len @ entries.num_tokens + shared.kv_len @ num_below),
      used_pages=batch.stats.used_pages, num_slots=batch.stats.num_running)


def outputs_of(batch: Batch, num_top: int,
               lengths: Int[np.ndarray, "rows"] | None = None) -> StepOutputs:
  """Every row draws token 0 until it has `max_tokens`, or its length; all log-probabilities are 0."""
  samples = batch.samples
  length = samples.max_tokens if lengths is None else lengths[samples.seq]
  step = np.arange(batch.num_steps)[:, None]
  left = length - samples.num_generated
  tokens = np.where(step < left, 0, -1).astype(np.int32)
  finish = np.where(step == left - 1, np.where(length < samples.max_tokens, 1, 3), 0).astype(np.int8)
  drawn, prompt = tokens.shape, (batch.num_tokens,)
  return StepOutputs(tokens, finish, np.zeros(drawn), np.zeros((*drawn, num_top), np.int32),
                     np.zeros((*drawn, num_top)), np.zeros(prompt),
                     np.zeros((*prompt, num_top), np.int32), np.zeros((*prompt, num_top)))
