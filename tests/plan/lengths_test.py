"""Predicted lengths and the pages they come to, against slow counts."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np

from batchjax.plan.lengths import LengthPredictor, likely_lengths, peak_pages


def predictor_of(fractions, **options) -> LengthPredictor:
  predictor = LengthPredictor(**options)
  for fraction in fractions:
    add_one(predictor, round(fraction * 1000), 1000)
  return predictor


def add_one(predictor, num_generated, max_tokens):
  predictor.add(np.array([num_generated]), np.array([max_tokens]))


def predict_one(predictor, num_generated, max_tokens):
  return int(predictor.predict(np.array([num_generated]), np.array([max_tokens]))[0])


def test_without_history_rows_reach_their_limit():
  predictor = predictor_of([0.1] * 31)
  assert predict_one(predictor, 0, 50) == 50
  add_one(predictor, 100, 1000)
  assert abs(predict_one(predictor, 0, 50) - 5) <= 1  # rounded up


def test_a_row_is_compared_with_those_that_ran_longer():
  predictor = predictor_of([0.1] * 30 + [0.8] * 10)
  assert abs(predict_one(predictor, 20, 100) - 80) <= 1
  assert predict_one(predictor, 85, 100) == 100  # none ran longer: back to the limit


def test_a_spread_history_is_met_with_caution():
  fractions = np.linspace(0.2, 0.6, 41)
  want = np.ceil(1000 * (fractions.mean() + fractions.std()))
  assert abs(predict_one(predictor_of(fractions), 0, 1000) - want) <= 1


def test_old_rows_are_forgotten():
  predictor = predictor_of([0.9] * 64 + [0.1] * 64, max_history=64)
  assert abs(predict_one(predictor, 0, 100) - 10) <= 1


def test_rows_that_finish_together_count_in_their_order():
  fractions = np.linspace(0.1, 0.9, 100)
  together = LengthPredictor(max_history=64)
  together.add(np.round(fractions * 1000).astype(int), np.full(100, 1000))
  apart = predictor_of(fractions, max_history=64)
  assert predict_one(together, 150, 1000) == predict_one(apart, 150, 1000) < 1000


def test_rows_that_generate_nothing_teach_nothing():
  predictor = predictor_of([0.5] * 40)
  add_one(predictor, 0, 0)
  assert predict_one(predictor, 0, 100) == 50
  assert predict_one(predictor, 0, 0) == 0


@hypothesis.given(st.lists(st.floats(0, 1), min_size=32, max_size=60),
                  st.integers(0, 99), st.integers(1, 100))
def test_predictions_lie_between_what_is_and_what_may_be(fractions, num_generated, max_tokens):
  num_generated = min(num_generated, max_tokens)
  predicted = predict_one(predictor_of(fractions), num_generated, max_tokens)
  assert min(num_generated + 1, max_tokens) <= predicted <= max_tokens


def slow_peak(own_lens, remaining, page_size):
  most = 0
  for time in range(max(remaining) + 1):
    lens = [own + time for own, left in zip(own_lens, remaining) if left >= time]
    most = max(most, sum(-(-length // page_size) for length in lens))
  return most


@hypothesis.given(hnp.arrays(np.int64, st.tuples(st.integers(1, 8), st.just(2)),
                             elements=st.integers(0, 20)), st.integers(1, 6))
def test_peak_is_never_too_low_and_exact_for_pages_of_one(rows, page_size):
  own_lens, remaining = rows.T
  want = slow_peak(own_lens.tolist(), remaining.tolist(), page_size)
  got = peak_pages(own_lens, remaining, page_size)
  assert want <= got <= want + len(rows)
  assert page_size > 1 or got == want


def test_no_rows_hold_no_pages():
  assert peak_pages(np.empty(0, int), np.empty(0, int), 4) == 0


@hypothesis.given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=40))
def test_likely_lengths_lie_in_their_room(pairs):
  least, room = np.array(pairs).T
  draws = likely_lengths(least, least + room)
  assert len(draws) == (3 if room.any() else 1)
  assert (draws[:, room == 0] == least[room == 0]).all()
  assert (draws > least)[:, room > 0].all() and (draws <= least + room).all()
  assert (np.diff(draws, axis=0) <= 0).all()


def test_likely_lengths_are_spread_evenly_over_all_half_and_a_quarter_of_the_room():
  least = np.full(1000, 100)
  for part, lengths in zip((1, 1 / 2, 1 / 4), likely_lengths(least, least + 1000)):
    counts, _ = np.histogram(lengths, 10, (100, 100 + 1000 * part))
    assert abs(counts - 100).max() <= 10
