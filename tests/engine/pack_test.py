"""Batches laid out by hand, against the arrays that they must become."""

import dataclasses

import numpy as np
import pytest

from batchjax.engine.pack import pack
from batchjax.engine.sampling_inputs import SamplingFeatures, SamplingTable
from batchjax.plan.batch import Batch, Entries, PromptScore, Samples, SharedKV
from batchjax.plan.buckets import Bucket
from batchjax.types import SamplingParams

PAGE_SIZE = 4
BUCKET = Bucket("mixed", num_tokens=12, num_rows=4, num_segments=6, num_page_indices=10)


def ints(*values):
  return np.array(values, np.int32)


def entry(seq, slot, position, tokens, kv_start, kv_len, page_start, num_requeried=0):
  """An entry's columns, and its tokens."""
  return (seq, slot, position, len(tokens), num_requeried, kv_start, kv_len, page_start), tokens


def sample(seq, slot, entry, num_generated=0, is_first=True, stop_state=0):
  return seq, slot, entry, num_generated, 9, is_first, stop_state


def columns(table, rows):
  names = [field.name for field in dataclasses.fields(table)]
  return table(**{name: np.array([row[i] for row in rows], bool if name == "is_first" else np.int64)
                  for i, name in enumerate(names)})


def batch_of(entries, pages, shared=(), samples=(), scores=()):
  tokens = ints(*[token for _, tokens in entries for token in tokens])
  return Batch("mixed", columns(Entries, [row for row, _ in entries]), tokens,
               columns(SharedKV, shared), columns(Samples, samples), ints(*pages), (),
               tuple(scores), 1, 0)


# Node 1 holds positions 0..5 (pages 7, 3), its last two tokens are computed now. Below it are
# node 2 with the row of seq 0 (three tokens, a requery of position 5 before them), and row seq 1
# at node 3 that decodes at position 9 in its own run from position 6 on.
BATCH = batch_of(
    entries=[entry(-1, -1, 4, [44, 45], 0, 6, 0),
             entry(0, 2, 5, [45, 60, 61, 62], 6, 3, 2, num_requeried=1),
             entry(1, 0, 9, [-1], 6, 4, 3)],
    pages=[7, 3, 5, 0],
    shared=[(0, 3, 0, 6, 0)],
    samples=[sample(0, 2, 1, stop_state=3), sample(1, 0, 2, num_generated=2, is_first=False)],
    scores=[PromptScore(1, 5, 0, 0, ints(45)), PromptScore(2, 1, 1, 1, ints(61, 62))])


def table_of(*seeds):
  table = SamplingTable(4, SamplingFeatures(greedy_only=False, num_stop_ids=1), (9,))
  for slot, seed in enumerate(seeds):
    table.set(slot, SamplingParams(seed=seed), slot)
  return table


def packed(batch=BATCH, bucket=BUCKET, **options):
  return pack(batch, bucket, table_of(10, 11, 12, 13), page_size=PAGE_SIZE, **options)


def padded(*values, length=12, fill=-1):
  return [*values, *[fill] * (length - len(values))]


def test_tokens_and_where_they_go():
  inputs = packed()
  assert inputs.tokens.tolist() == padded(44, 45, 45, 60, 61, 62, -1)
  assert inputs.positions.tolist() == padded(4, 5, 5, 6, 7, 8, 9)
  assert inputs.token_slots.tolist() == padded(-1, -1, 2, 2, 2, 2, 0)
  # Page 3 holds positions 4 to 7 of node 1; the requery writes nothing.
  assert inputs.write_slots.tolist() == padded(12, 13, -1, 20, 21, 22, 3)


def test_segments_and_their_pages():
  inputs = packed()
  segments = [tuple(int(field[i]) for field in inputs.segments) for i in range(6)]
  assert segments[:3] == [(2, 4, 6, 3, 2),  # the own KV of seq 0, then of seq 1
                          (6, 1, 6, 4, 3),
                          (0, 7, 0, 6, 0)]  # node 1 is read by itself and all below
  assert segments[3:] == [(0, 0, 0, 0, 0)] * 3
  assert inputs.page_indices.tolist() == padded(7, 3, 5, 0, length=10, fill=0)


def test_no_page_is_listed_twice():
  tight = BUCKET._replace(num_page_indices=4)
  assert packed(bucket=tight).page_indices.tolist() == [7, 3, 5, 0]


def test_shared_pages_that_are_only_read_come_behind():
  batch = batch_of([entry(1, 0, 9, [-1], 6, 4, 0)], [0, 7, 3], [(0, 1, 0, 6, 1)],
                   [sample(1, 0, 0, is_first=False)])
  inputs = packed(batch)
  assert inputs.page_indices[:3].tolist() == [0, 7, 3]
  assert [field[1] for field in inputs.segments] == [0, 1, 0, 6, 1]


def test_rows():
  inputs = packed()
  assert inputs.sample_tokens.tolist() == padded(5, 6, length=4)
  assert inputs.slots.tolist() == padded(2, 0, length=4)
  assert inputs.own_segments.tolist() == padded(0, 1, length=4)
  assert inputs.is_first.tolist() == padded(True, False, length=4, fill=False)
  assert inputs.stop_states.tolist() == padded(3, 0, length=4, fill=0)
  assert inputs.num_generated.tolist() == padded(0, 2, length=4, fill=0)
  assert inputs.sampling.seed[:2].tolist() == [12, 10]
  assert inputs.sampling.temperature[2:].tolist() == [0, 0], "padding is greedy"


def test_rows_whose_whole_prompt_is_shared_draw_from_the_node():
  batch = dataclasses.replace(BATCH, samples=columns(
      Samples, [sample(2, 1, 0), sample(3, 3, 0)]))
  inputs = packed(batch)
  assert inputs.sample_tokens.tolist() == [1, 1, -1, -1]
  assert inputs.own_segments.tolist() == [-1, -1, -1, -1]


def test_a_requery_alone_reads_and_writes_nothing_of_its_own():
  batch = batch_of([entry(0, 2, 5, [45], 6, 0, 0, num_requeried=1)], [7, 3], [(0, 1, 0, 6, 0)],
                   [sample(0, 2, 0)])
  inputs = packed(batch)
  assert inputs.write_slots.tolist() == padded()
  assert inputs.segments.kv_len.tolist() == [6, 0, 0, 0, 0, 0]
  assert inputs.sample_tokens[0] == 0 and inputs.own_segments[0] == -1


def test_scored_tokens_stand_at_the_token_before():
  assert packed().next_tokens is None
  inputs = packed(prompt_logprobs=True)
  assert inputs.next_tokens.tolist() == padded(45, -1, -1, 61, 62)


def test_an_empty_batch_is_all_padding():
  inputs = packed(Batch.empty("mixed"))
  assert (inputs.positions == -1).all() and (inputs.slots == -1).all()
  assert not any(field.any() for field in inputs.segments)


@pytest.mark.parametrize("name, size", [("num_tokens", 7), ("num_rows", 2), ("num_segments", 3),
                                        ("num_page_indices", 4)])
def test_a_batch_that_does_not_fit_is_an_error(name, size):
  assert packed(bucket=BUCKET._replace(**{name: size})) is not None
  with pytest.raises(ValueError, match=f"{name}={size} exceeds"):
    packed(bucket=BUCKET._replace(**{name: size - 1}))


def test_arrays_have_the_types_of_the_compiled_shapes():
  inputs = packed(prompt_logprobs=True)
  for name in inputs._fields:
    if name not in ("sampling", "segments", "is_first"):
      assert getattr(inputs, name).dtype == np.int32, name
  assert inputs.is_first.dtype == bool
  assert all(field.dtype == np.int32 for field in inputs.segments)
