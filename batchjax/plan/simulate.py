"""The scheduler run on paper: which steps a job takes, and how long they should last."""

import dataclasses
import itertools

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
    num_tokens, num_rows: of one iteration, before padding.
    num_steps: iterations.
    num_prompt_tokens: prompt tokens computed.
    kv_read_tokens, attn_pairs: see `cost.step_cost`; of the first iteration.
    used_pages: pages held.
    num_slots: rows that held a slot.
  """

  kind: str
  num_tokens: int
  num_rows: int
  num_steps: int
  num_prompt_tokens: int
  kv_read_tokens: int
  attn_pairs: int
  used_pages: int
  num_slots: int

  def secs(self, model: ModelConfig, chip: Chip, num_tokens: int) -> float:
    """Seconds by the roofline when padded to `num_tokens`, attention after the products."""
    return self.num_steps * step_cost(model, chip, num_tokens, self.num_rows,
                                      self.kv_read_tokens, self.attn_pairs).serial_secs


def simulate(scheduler: Scheduler, max_dispatches: int, num_top: int = 0) -> list[StepShape]:
  """Runs `scheduler` with every row reaching its `max_tokens`.

  Args:
    scheduler: fresh; it is used up.
    max_dispatches: stop after this many.
    num_top: most `top_logprobs` of its requests.
  """
  shapes = []
  for _ in itertools.repeat(None, max_dispatches):
    if scheduler.finished:
      break
    batch = scheduler.next_batch()
    shapes.append(_shape(batch))
    scheduler.retire(batch, outputs_of(batch, num_top))
  return shapes


def _shape(batch: Batch) -> StepShape:
  entries, shared, offsets = batch.entries, batch.shared, batch.entries.offsets
  own_len = np.where(entries.seq >= 0, entries.kv_len, 0)
  num_below = offsets[shared.end_entry] - offsets[shared.first_entry]
  return StepShape(
      batch.kind, batch.num_tokens, batch.num_rows, batch.num_steps, batch.num_prompt_tokens,
      kv_read_tokens=int(own_len.sum() + shared.kv_len.sum()),
      attn_pairs=int(own_len @ entries.num_tokens + shared.kv_len @ num_below),
      used_pages=batch.stats.used_pages, num_slots=batch.stats.num_running)


def outputs_of(batch: Batch, num_top: int) -> StepOutputs:
  """Every row draws token 0 until it has `max_tokens`; all log-probabilities are 0."""
  step = np.arange(batch.num_steps)[:, None]
  left = batch.samples.max_tokens - batch.samples.num_generated
  tokens = np.where(step < left, 0, -1).astype(np.int32)
  finish = np.where(step == left - 1, 3, 0).astype(np.int8)
  drawn, prompt = tokens.shape, (batch.num_tokens,)
  return StepOutputs(tokens, finish, np.zeros(drawn), np.zeros((*drawn, num_top), np.int32),
                     np.zeros((*drawn, num_top)), np.zeros(prompt),
                     np.zeros((*prompt, num_top), np.int32), np.zeros((*prompt, num_top)))
