"""A batch as the padded arrays of its bucket; numpy only."""

from collections.abc import Iterator, Sequence

import numpy as np

from batchjax.engine.sampling_inputs import IN_PROMPT, MAX_COUNT, SamplingTable
from batchjax.plan.batch import Admission, Batch
from batchjax.plan.buckets import Bucket
from batchjax.types import Segments, StepInputs

# Tokens of admitted rows that go to the device at a time.
ADMITTED_TOKENS = 1 << 16


def pack(batch: Batch, bucket: Bucket, table: SamplingTable, *, page_size: int,
         prompt_logprobs: bool = False) -> StepInputs:
  """Lays a batch out on the flat token axis, padded to the bucket.

  Args:
    batch: from the scheduler.
    bucket: at least as large as the batch in every dimension.
    table: the sampling settings of all slots.
    page_size: tokens of a KV page.
    prompt_logprobs: fill `next_tokens`.

  Raises:
    ValueError: the batch does not fit the bucket.

  >>> greedy = batchjax.SamplingParams(temperature=0.0)
  >>> request = batchjax.Request("a", tokenizer.encode("The end"), greedy)
  >>> engine = batchjax.EngineConfig(max_rows=8, max_step_tokens=64, num_pages=64)
  >>> plan = batchjax.make_plan(model.config, [request], engine, batchjax.CHIPS["cpu"])
  >>> scheduler = batchjax.make_scheduler([request], plan, engine, max_rows=8, max_step_tokens=64,
  ...                                     stop_table=None)
  >>> batch = scheduler.next_batch()
  >>> features = batchjax.SamplingFeatures.of([greedy], eos_token_ids=())
  >>> table = batchjax.SamplingTable(8, features, eos_token_ids=())
  >>> for admission in batch.admissions:
  ...   table.set(admission.slot, admission.sampling_params, admission.sample_index)
  >>> bucket = plan.bucket_for(batch.kind, batch.num_tokens)
  >>> inputs = batchjax.pack(batch, bucket, table, page_size=engine.page_size)
  >>> inputs.tokens[:batch.num_tokens].tolist() == tokenizer.encode("The end")
  True
  """
  entries, shared, samples, page_indices = batch.entries, batch.shared, batch.samples, batch.page_indices
  own = np.flatnonzero((entries.seq >= 0) & (entries.kv_len > 0))
  sizes = dict(num_tokens=batch.num_tokens, num_rows=batch.num_rows,
               num_segments=len(own) + len(shared.kv_len), num_page_indices=len(page_indices))
  for name, size in sizes.items():
    if size > getattr(bucket, name):
      raise ValueError(f"{name}={size} exceeds that of {bucket}")

  offsets = entries.offsets
  which = np.repeat(np.arange(len(entries.seq)), entries.num_tokens)
  offset = np.arange(batch.num_tokens) - offsets[which]
  positions = entries.first_position[which] + offset
  write_slots = np.full(batch.num_tokens, -1)
  written = np.flatnonzero(offset >= entries.num_requeried[which])
  run = which[written]
  in_run = positions[written] - entries.kv_start[run]
  page = page_indices[entries.page_start[run] + in_run // page_size]
  write_slots[written] = page * page_size + in_run % page_size

  # Own segments, then those of shared nodes.
  segments = np.zeros((5, bucket.num_segments), np.int32)
  segments[:, :len(own)] = (offsets[own], entries.num_tokens[own], entries.kv_start[own],
                            entries.kv_len[own], entries.page_start[own])
  q_start = offsets[shared.first_entry]
  segments[:, len(own):sizes["num_segments"]] = (
      q_start, offsets[shared.end_entry] - q_start, shared.kv_start, shared.kv_len,
      shared.page_start)
  segment_of = np.full(len(entries.seq), -1)
  segment_of[own] = np.arange(len(own))

  slots = _pad(samples.slot, bucket.num_rows, -1)
  return StepInputs(
      tokens=_pad(batch.tokens, bucket.num_tokens, -1),
      positions=_pad(positions, bucket.num_tokens, -1),
      token_slots=_pad(entries.slot[which], bucket.num_tokens, -1),
      write_slots=_pad(write_slots, bucket.num_tokens, -1),
      segments=Segments(*segments),
      page_indices=_pad(page_indices, bucket.num_page_indices, 0),
      sample_tokens=_pad(offsets[samples.entry + 1] - 1, bucket.num_rows, -1),
      slots=slots,
      own_segments=_pad(segment_of[samples.entry], bucket.num_rows, -1),
      is_first=_pad(samples.is_first, bucket.num_rows, False),
      stop_states=_pad(samples.stop_state, bucket.num_rows, 0),
      num_generated=_pad(samples.num_generated, bucket.num_rows, 0),
      sampling=table.gather(slots),
      next_tokens=_next_tokens(batch, bucket) if prompt_logprobs else None)


def pack_admissions(admissions: Sequence[Admission], max_rows: int) -> Iterator[tuple[np.ndarray, ...]]:
  """What the penalties must know of rows that enter their slots.

  Args:
    admissions: of a batch.
    max_rows: number of slots.

  Yields:
    Arguments of the "admit" step behind the penalty state, padded with -1: i32[max_rows], the slots
    to start over; then i32[C] slots, i32[C] tokens and u16[C], what each token is to the row, with
    C = ADMITTED_TOKENS. Pairs of slot and token that come twice come with the same value.
  """
  if not admissions:
    return
  known = [_known_tokens(admission) for admission in admissions]
  slots = np.repeat([a.slot for a in admissions], [len(tokens) for tokens, _ in known])
  tokens, values = (np.concatenate(parts) for parts in zip(*known, strict=True))
  fresh = [a.slot for a in admissions]
  for begin in range(0, max(len(slots), 1), ADMITTED_TOKENS):
    here = slice(begin, begin + ADMITTED_TOKENS)
    yield (_pad(fresh, max_rows, -1), _pad(slots[here], ADMITTED_TOKENS, -1),
           _pad(tokens[here], ADMITTED_TOKENS, -1),
           _pad(values[here], ADMITTED_TOKENS, 0).astype(np.uint16))
    fresh = []


def _known_tokens(admission: Admission) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of the prompt and of what was generated before a preemption; and their values."""
  prompt, output = admission.prompt_tokens, admission.output_tokens
  if not len(output):
    return prompt, np.full(len(prompt), IN_PROMPT)
  tokens, places = np.unique(np.concatenate([prompt, output]), return_inverse=True)
  counts = np.bincount(places[len(prompt):], minlength=len(tokens))
  in_prompt = np.bincount(places[:len(prompt)], minlength=len(tokens)) > 0
  return tokens, np.minimum(counts, MAX_COUNT) + IN_PROMPT * in_prompt


def _next_tokens(batch: Batch, bucket: Bucket) -> np.ndarray:
  next_tokens = np.full(bucket.num_tokens, -1, np.int32)
  offsets = batch.entries.offsets
  for score in batch.prompt_scores:
    first = offsets[score.entry] + score.skipped
    next_tokens[first:first + len(score.next_tokens)] = score.next_tokens
  return next_tokens


def _pad(values: np.ndarray, length: int, fill: int | bool) -> np.ndarray:
  padded = np.full(length, fill, bool if isinstance(fill, bool) else np.int32)
  padded[:len(values)] = values
  return padded
