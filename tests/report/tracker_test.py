"""Counts, rates and the time left of a running job."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st
import pytest

from batchjax.report import RequestRecord, RunRecord, StepRecord, Tracker

_RUN = RunRecord(0.0, "cpu", 1, "m", "0", 1, 0, 10, 16, 8)
_STEP = StepRecord(0.0, "decode", 1.0, 0.0, 1, 0, 8, 0, 8, 0, 0, 0, 0, 0, 0)


def _secs_left_of_a_job(lengths: list[int], max_rows: int) -> list[tuple[int, float, int]]:
  """(finished, estimated, true) seconds left, at one token of each row a second."""
  tracker = Tracker(dataclasses.replace(_RUN, num_requests=len(lengths)))
  waiting, rows, finished, secs, seen = list(lengths), [], 0, 100, []
  while waiting or rows:
    while waiting and len(rows) < max_rows:
      rows.append(waiting.pop(0))
    secs += 1
    num_rows = len(rows)
    rows = [left - 1 for left in rows if left > 1]
    finished = len(lengths) - len(waiting) - len(rows)
    tracker.update(dataclasses.replace(
        _STEP, secs=float(secs), num_rows=len(rows), generated_tokens=num_rows,
        finished=finished, waiting=len(waiting)))
    seen.append((finished, tracker.snapshot().secs_left, secs))
  return [(finished, left, secs - now) for finished, left, now in seen]


def test_time_left_is_unknown_until_a_request_is_done_and_zero_at_the_end():
  seen = _secs_left_of_a_job([20] * 64, 8)
  assert all((left == -1.0) == (finished == 0) for finished, left, _ in seen)
  assert seen[-1] == (64, 0.0, 0)


@pytest.mark.parametrize("lengths", [
    [50] * 400, [5, 95] * 200, [1 + 37 * i % 100 for i in range(400)]])
def test_time_left_is_near_the_truth(lengths):
  seen = _secs_left_of_a_job(lengths, 16)
  middle = [(left, true) for finished, left, true in seen if 32 <= finished <= 360]
  assert all(0.5 * true < left < 2 * true for left, true in middle)


def test_a_short_first_request_does_not_make_all_look_short():
  seen = _secs_left_of_a_job([2] + [100] * 159, 16)
  left, true = next((left, true) for finished, left, true in seen if finished and true < 985)
  assert left > 0.5 * true


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 9))
def test_time_left_is_never_negative_but_for_unknown(lengths, max_rows):
  assert all(left >= 0 or (left == -1 and not finished)
             for finished, left, _ in _secs_left_of_a_job(lengths, max_rows))


def test_prompts_that_wait_count_at_the_share_they_need():
  tracker = Tracker(dataclasses.replace(_RUN, num_requests=4, num_prompt_tokens=400))
  tracker.update(RequestRecord("a", 0, 100, 75, 10, 0.0, 1.0, "stop"))
  tracker.update(dataclasses.replace(_STEP, secs=2.0, step_secs=2.0, prompt_tokens=30,
                                     generated_tokens=10, finished=1))
  # Of 400 tokens a quarter needs computing: 100 - 30. Outputs: 4 x 10 - 10. Rate: 40 in 2 s.
  assert tracker.snapshot().secs_left == pytest.approx((70 + 30) / 20)
  assert tracker.snapshot().cached_share == 0.75


def test_rates_cover_the_window_and_compiling_is_left_out():
  tracker = Tracker(_RUN, window_secs=3.0)
  for secs, tokens in ((100.0, 1000), (101.0, 1000), (105.0, 30), (106.0, 30)):
    tracker.update(dataclasses.replace(_STEP, secs=secs, generated_tokens=tokens,
                                       prompt_tokens=2 * tokens, used_pages=5))
  now = tracker.snapshot()
  assert (now.output_tokens_per_sec, now.prompt_tokens_per_sec) == (30.0, 60.0)
  assert (now.generated_tokens, now.kv_use, now.secs) == (2060, 0.5, 106.0)


def test_before_the_first_step_nothing_is_known():
  now = Tracker(dataclasses.replace(_RUN, num_requests=7)).snapshot()
  assert (now.secs, now.finished, now.waiting, now.num_requests) == (0.0, 0, 7, 7)
  assert (now.secs_left, now.cached_share, now.output_tokens_per_sec) == (-1.0, -1.0, 0.0)
