"""What is foretold of rows and dispatches to come, where it can be said by hand."""


from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from batchjax.config import EngineConfig
from batchjax.plan import planner, simulate
from batchjax.plan.cost import CHIPS
from batchjax.plan.outlook import bins_of, Dispatch, dispatches, Outlook, predict_lengths
from batchjax.testing.fake_model import fake_config
from batchjax.types import Request, SamplingParams


def outlook(known, max_tokens, *, num_decoding=None, fixed=False, ended=(), **changes) -> Outlook:
  """Rows of one limit; `ended` are lengths of rows that have ended."""
  known = np.array(known)
  limits = np.full(len(known), max_tokens)
  ended = np.array(ended, int)
  values = dict(
      num_decoding=len(known) if num_decoding is None else num_decoding, num_known=known,
      num_dispatched=known, max_tokens=limits, is_fixed=np.full(len(known), fixed),
      ended=bins_of(ended, np.full(len(ended), max_tokens)), prompt_tokens=0, max_rows=8,
      max_step_tokens=64, max_decode_steps=16, num_in_flight=0)
  return Outlook(**values | changes)


def test_before_a_row_has_ended_lengths_are_spread_evenly():
  lengths = predict_lengths(outlook([0] * 1000, 200))
  np.testing.assert_allclose(np.quantile(lengths, [0.1, 0.5, 0.9]), [20, 100, 180], atol=6)


def test_lengths_are_those_of_rows_that_ended():
  lengths = predict_lengths(outlook([0] * 500, 1000, ended=[40, 50, 60] * 100))
  assert 40 < np.median(lengths) < 62 and np.mean(lengths < 70) > 0.95


def test_rows_that_go_on_count_against_the_short_ones_that_ended():
  ended = [10] * 10
  alone = predict_lengths(outlook([0] * 200, 100, ended=ended))
  beside = predict_lengths(outlook([60] * 90 + [0] * 200, 100, ended=ended))[90:]
  assert np.median(alone) < 15 and np.median(beside) > 60


@given(st.lists(st.integers(0, 99), min_size=1, max_size=30), st.lists(st.integers(1, 100), max_size=30))
def test_a_row_gets_longer_than_it_is_and_no_longer_than_it_may(known, ended):
  lengths = predict_lengths(outlook(known, 100, ended=ended))
  assert ((lengths > known) & (lengths <= 100)).all()
  assert (predict_lengths(outlook(known, 100, fixed=True, ended=ended)) == 100).all()


def test_rows_alone_decode_in_loops_to_the_longest():
  assert dispatches(outlook([0, 10], 40, fixed=True)) == [
      Dispatch("decode", 2, 16), Dispatch("decode", 2, 16), Dispatch("decode", 1, 8)]


def test_waiting_rows_take_slots_as_they_come_free():
  found = dispatches(outlook([38, 39, 0], 40, num_decoding=2, fixed=True, prompt_tokens=30, max_rows=2))
  # Both slots are taken; a loop ends with the first row, and the third one enters.
  assert found == [Dispatch("decode", 2, 2), Dispatch("mixed", 30, 1), Dispatch("decode", 1, 16),
                   Dispatch("decode", 1, 16), Dispatch("decode", 1, 7)]


def test_rows_that_end_early_keep_their_slots_until_it_is_seen():
  rows = dict(num_decoding=2, prompt_tokens=20, max_rows=2)
  late = dispatches(outlook([1, 1] + [0] * 20, 40, ended=[2] * 99, num_in_flight=2, **rows))
  soon = dispatches(outlook([1, 1] + [0] * 20, 40, ended=[2] * 99, num_in_flight=0, **rows))
  assert len(late) > len(soon)


def test_many_waiting_rows_are_sampled():
  few = dispatches(outlook([0] * 64, 10, num_decoding=0, fixed=True, prompt_tokens=640))
  many = dispatches(outlook([0] * 3200, 10, num_decoding=0, fixed=True, prompt_tokens=32000))
  steps = lambda found: sum(d.num_steps * d.count for d in found)
  assert len(many) <= len(few) + 1
  assert steps(many) == pytest.approx(50 * steps(few), rel=0.1)


def test_a_scheduler_foretells_the_steps_that_it_then_takes():
  config = fake_config(max_len=4096)
  engine = EngineConfig(max_rows=16, max_step_tokens=128, page_size=16, num_pages=800)
  requests = [Request(str(i), np.arange(30 + i % 3, dtype=np.int32) + i % 7,
                      SamplingParams(max_tokens=20 + 7 * i % 41, ignore_eos=True)) for i in range(80)]
  plan = planner.make_plan(config, requests, engine, CHIPS["cpu"], buckets=())
  make = lambda: planner.make_scheduler(requests, plan, engine, 16, 128, None)
  coming = dispatches(make().outlook())
  taken = simulate.simulate(make(), 1000)
  for kind in ("mixed", "decode"):
    assert sum(d.num_steps * d.count for d in coming if d.kind == kind) == pytest.approx(
        sum(shape.num_steps for shape in taken if shape.kind == kind), rel=0.25)


def test_a_batch_carries_the_rows_and_pages_of_its_own_time():
  engine = EngineConfig(max_rows=2, max_step_tokens=64, page_size=4, num_pages=40)
  requests = [Request(str(i), np.arange(8, dtype=np.int32) + i, SamplingParams(max_tokens=5))
              for i in range(3)]
  plan = planner.make_plan(fake_config(), requests, engine, CHIPS["cpu"], buckets=())
  scheduler = planner.make_scheduler(requests, plan, engine, 2, 64, None)
  seen = []
  while not scheduler.finished:
    batch = scheduler.next_batch()
    seen.append((batch.stats, batch.num_rows))
    scheduler.retire(batch, simulate.outputs_of(batch, 0))
  assert all(stats.num_running >= num_rows > 0 for stats, num_rows in seen)
  assert all(stats.used_pages >= 2 * stats.num_running for stats, _ in seen)
  assert [stats.num_waiting for stats, _ in seen] == sorted(
      (stats.num_waiting for stats, _ in seen), reverse=True)
  assert scheduler.stats.num_running == scheduler.stats.used_pages == 0
