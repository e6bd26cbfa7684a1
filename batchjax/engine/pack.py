"""A batch as the padded arrays of its bucket; numpy only."""

import numpy as np

from batchjax.engine.sampling_inputs import SamplingTable
from batchjax.plan.batch import Batch
from batchjax.plan.buckets import Bucket
from batchjax.types import Segments, StepInputs


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
  """
  entries = batch.entries
  lens = np.array([entry.num_tokens for entry in entries], np.int64)
  starts = np.concatenate([[0], np.cumsum(lens)])
  num_tokens = int(starts[-1])
  own = [i for i, entry in enumerate(entries) if entry.seq >= 0 and entry.kv_len > 0]
  sizes = dict(num_tokens=num_tokens, num_rows=len(batch.samples),
               num_segments=len(own) + len(batch.shared))
  for name, size in sizes.items():
    if size > getattr(bucket, name):
      raise ValueError(f"{name}={size} exceeds that of {bucket}")

  which = np.repeat(np.arange(len(entries)), lens)
  offset = np.arange(num_tokens) - starts[which]
  column = lambda name: np.array([getattr(entry, name) for entry in entries], np.int64)
  first, kv_start = column("first_position"), column("kv_start")
  positions = first[which] + offset
  tokens = np.concatenate([np.array([-1], np.int32) if entry.tokens is None else entry.tokens
                           for entry in entries] or [np.empty(0, np.int32)])

  # One page list: the runs that entries write to, then the shared ones that they only read.
  # No page stands in it twice, so the pool's size bounds it.
  run_of_node = {entry.node: i for i, entry in enumerate(entries) if entry.seq < 0}
  runs = [entry.pages for entry in entries]
  for shared in batch.shared:
    if shared.node not in run_of_node:
      run_of_node[shared.node] = len(runs)
      runs.append(shared.pages)
  run_starts = np.concatenate([[0], np.cumsum([len(pages) for pages in runs])])
  page_list = np.concatenate(runs) if runs else np.empty(0, np.int32)
  if len(page_list) > bucket.num_page_indices:
    raise ValueError(f"num_page_indices={len(page_list)} exceeds that of {bucket}")
  written = offset >= column("num_requeried")[which]
  in_run = positions - kv_start[which]
  page = page_list[np.where(written, run_starts[which] + in_run // page_size, 0)] \
      if len(page_list) else np.zeros(num_tokens, np.int64)
  write_slots = np.where(written, page * page_size + in_run % page_size, -1)

  nodes = column("node")
  segments = [(starts[i], lens[i], entries[i].kv_start, entries[i].kv_len, run_starts[i])
              for i in own]
  for shared in batch.shared:
    low, high = np.searchsorted(nodes, (shared.node, shared.subtree_end))
    segments.append((starts[low], starts[high] - starts[low], shared.kv_start, shared.kv_len,
                     run_starts[run_of_node[shared.node]]))
  fields = np.zeros((5, bucket.num_segments), np.int32)
  if segments:
    fields[:, :len(segments)] = np.array(segments).T

  samples = batch.samples
  place = {(entry.node, entry.seq): i for i, entry in enumerate(entries)}
  drawn_from = np.array([place[sample.node, sample.seq] for sample in samples], np.int64)
  segment_of = np.full(len(entries), -1, np.int64)
  segment_of[own] = np.arange(len(own))
  slots = np.array([sample.slot for sample in samples], np.int32)
  return StepInputs(
      tokens=_pad(tokens, bucket.num_tokens, -1),
      positions=_pad(positions, bucket.num_tokens, -1),
      token_slots=_pad(column("slot")[which], bucket.num_tokens, -1),
      write_slots=_pad(write_slots, bucket.num_tokens, -1),
      segments=Segments(*fields),
      page_indices=_pad(page_list, bucket.num_page_indices, 0),
      sample_tokens=_pad(starts[drawn_from + 1] - 1, bucket.num_rows, -1),
      slots=_pad(slots, bucket.num_rows, -1),
      own_segments=_pad(segment_of[drawn_from], bucket.num_rows, -1),
      is_first=_pad(np.array([s.is_first for s in samples], bool), bucket.num_rows, False),
      stop_states=_pad(np.array([s.stop_state for s in samples], np.int32), bucket.num_rows, 0),
      num_generated=_pad(np.array([s.num_generated for s in samples]), bucket.num_rows, 0),
      sampling=table.gather(_pad(slots, bucket.num_rows, -1)),
      next_tokens=_next_tokens(batch, bucket) if prompt_logprobs else None)


def _next_tokens(batch: Batch, bucket: Bucket) -> np.ndarray:
  next_tokens = np.full(bucket.num_tokens, -1, np.int32)
  place = batch.entry_starts
  for score in batch.prompt_scores:
    first = place[score.entry_node, score.entry_seq] + score.first
    next_tokens[first:first + len(score.next_tokens)] = score.next_tokens
  return next_tokens


def _pad(values: np.ndarray, length: int, fill: int | bool) -> np.ndarray:
  padded = np.full(length, fill, bool if isinstance(fill, bool) else np.int32)
  padded[:len(values)] = values
  return padded
