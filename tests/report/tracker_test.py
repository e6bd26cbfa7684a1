"""Counts and rates of a running job; what it says of the time left is in `forecast_test`."""

import dataclasses

from batchjax.report import RequestRecord, RunRecord, StepRecord, Tracker

_RUN = RunRecord(0.0, "cpu", 1, "m", "0", 1, 0, 10, 16, 8)
_STEP = StepRecord(0.0, "decode", 1.0, 0.0, 1, 0, 8, 0, 8, 0, 0, 0, 0, 0, 0)


def test_rates_cover_the_window_and_compiling_is_left_out():
  tracker = Tracker(_RUN, window_secs=3.0)
  for secs, tokens in ((100.0, 1000), (101.0, 1000), (105.0, 30), (106.0, 30)):
    tracker.update(dataclasses.replace(_STEP, secs=secs, generated_tokens=tokens,
                                       prompt_tokens=2 * tokens, used_pages=5))
  now = tracker.snapshot()
  assert (now.output_tokens_per_sec, now.prompt_tokens_per_sec) == (30.0, 60.0)
  assert (now.generated_tokens, now.kv_use, now.secs) == (2060, 0.5, 106.0)


def test_prompt_tokens_of_the_plan_and_cached_ones_count():
  tracker = Tracker(dataclasses.replace(_RUN, num_requests=4, num_prompt_tokens=400))
  tracker.plan(3, 200)
  tracker.plan(1, 30)
  tracker.update(RequestRecord("a", 0, 100, 75, 10, 0.0, 1.0, "stop"))
  tracker.update(dataclasses.replace(_STEP, secs=2.0, prompt_tokens=30, finished=1))
  now = tracker.snapshot()
  assert (now.computed_tokens, now.planned_tokens, now.cached_share) == (30, 230, 0.75)


def test_before_the_first_step_nothing_is_known():
  now = Tracker(dataclasses.replace(_RUN, num_requests=7, num_done=3)).snapshot()
  assert (now.secs, now.finished, now.num_requests, now.num_done) == (0.0, 3, 10, 3)
  assert now.secs_left is now.cached_share is now.waiting is None
  assert (now.output_tokens_per_sec, now.done_share) == (0.0, 0.0)
