"""The time left of jobs on a made-up device, against the time that they then take."""

import collections
import dataclasses

import numpy as np
import pytest

from batchjax.config import EngineConfig
from batchjax.plan import planner, simulate
from batchjax.plan.cost import CHIPS
from batchjax.plan.outlook import Dispatch
from batchjax.report import RunRecord, StepRecord, Tracker
from batchjax.report.forecast import Forecast
from batchjax.testing.fake_model import fake_config
from batchjax.types import Request, SamplingParams

CONFIG = fake_config(max_len=4096)
ENGINE = EngineConfig(max_rows=64, max_step_tokens=512, page_size=16, num_pages=2000, compile_secs=0.1)
RUN = RunRecord(0.0, "cpu", 1, "m", "0", 0, 0, 2000, 16, 64)


def true_secs(kind: str, num_tokens: int) -> float:
  """Of one iteration; a mixed step is faster than any roofline says, a decode step slower."""
  return 1e-3 * num_tokens if kind == "mixed" else 0.05 + 1.5e-3 * num_tokens


def foretold_secs(kind: str, num_tokens: int) -> float:
  return true_secs(kind, num_tokens) * (1.7 if kind == "mixed" else 0.85)


def requests_of(limits, own_len=40, ignore_eos=False) -> list[Request]:
  rng, shared = np.random.default_rng(0), np.arange(200)
  return [Request(str(i), np.concatenate([shared, rng.integers(1, 90, own_len)]).astype(np.int32),
                  SamplingParams(max_tokens=int(limit), ignore_eos=ignore_eos))
          for i, limit in enumerate(limits)]


def outputs_of(batch, lengths):
  """What a device returns whose rows end at their lengths; and the iterations that it ran."""
  samples, outputs = batch.samples, simulate.outputs_of(batch, 0)
  step = samples.num_generated + np.arange(batch.num_steps)[:, None]
  end = np.minimum(lengths, samples.max_tokens)
  finish = np.where(step == end - 1, np.where(end < samples.max_tokens, 2, 3), 0).astype(np.int8)
  num_steps = int(np.clip((end - samples.num_generated).max(initial=1), 1, batch.num_steps))
  return outputs._replace(tokens=np.where(step < end, 0, -1).astype(np.int32),
                          finish=finish), num_steps


def run(requests, lengths, engine=ENGINE, window=None):
  """Seconds left after each step, foretold and true, as `generate` would have them observed."""
  tracker = Tracker(dataclasses.replace(RUN, num_requests=len(requests)))
  now, seen, finished, buckets = 0.0, [], 0, None
  window = window or len(requests)
  for first in range(0, len(requests), window):
    part = requests[first:first + window]
    plan = planner.make_plan(CONFIG, part, engine, CHIPS["cpu"], buckets=buckets,
                             is_only_window=window == len(requests))
    buckets = plan.buckets
    tracker.forecast.foretell({(b.kind, b.num_tokens): foretold_secs(b.kind, b.num_tokens)
                               for b in buckets})
    tracker.plan(len(part), plan.totals.prompt_tokens_planned)
    scheduler = planner.make_scheduler(part, plan, engine, buckets[0].num_rows,
                                       max(b.num_tokens for b in buckets), None)
    in_flight = collections.deque()
    while not scheduler.finished:
      batch = scheduler.next_batch()
      if batch is not None:
        in_flight.append(batch)
      if batch is None or len(in_flight) > engine.lookahead:
        batch = in_flight.popleft()
        rows = scheduler._rows.request[batch.samples.seq]
        outputs, num_steps = outputs_of(batch, lengths[first + rows])
        scheduler.retire(batch, outputs)
        size = plan.bucket_for(batch.kind, batch.num_tokens).num_tokens
        secs = num_steps * true_secs(batch.kind, size)
        now += secs
        tracker.update(StepRecord(
            now, batch.kind, secs, 0.0, batch.num_steps, batch.num_tokens, size * batch.num_steps,
            batch.stats.num_running, 64, batch.num_prompt_tokens, int((outputs.tokens >= 0).sum()),
            batch.stats.used_pages, batch.stats.num_waiting, finished + scheduler.num_finished, 0),
            [Dispatch(b.kind, b.num_tokens, b.num_steps) for b in in_flight], scheduler.outlook)
        seen.append((now, tracker.snapshot().secs_left))
    finished += len(part)
  left, true = np.array([left for _, left in seen]), now - np.array([secs for secs, _ in seen])
  return left, true


RNG = np.random.default_rng(1)


@pytest.mark.parametrize("limits, lengths, error", [
    (np.full(64, 128), RNG.integers(1, 129, 64), 0.25),
    (np.full(64, 128), np.minimum(RNG.geometric(1 / 60, 64), 128), 0.25),
    (np.full(300, 128), np.minimum(RNG.geometric(1 / 60, 300), 128), 0.25),
    # Half of the rows reach their limits, which is learned only as they do.
    (RNG.integers(8, 200, 250), RNG.integers(1, 200, 250), 0.45),
], ids=["all rows at once", "a long tail", "rows that wait", "limits that differ"])
def test_time_left_is_near_the_truth_from_the_first_step_on(limits, lengths, error):
  left, true = run(requests_of(limits), lengths)
  early = true > 0.1 * true[0]
  np.testing.assert_allclose(left[early], true[early], rtol=error)
  np.testing.assert_allclose(left[~early], true[~early], atol=0.05 * true[0])
  assert left[-1] == 0.0


@pytest.mark.parametrize("engine", [
    ENGINE, dataclasses.replace(ENGINE, num_pages=150)], ids=["slots", "pages"])
def test_known_lengths_are_foretold_well_whatever_bounds_the_rows(engine):
  limits = RNG.integers(40, 100, 200)
  left, true = run(requests_of(limits, ignore_eos=True), limits, engine)
  early = true > 0.1 * true[0]
  np.testing.assert_allclose(left[early], true[early], rtol=0.25)


def test_windows_to_come_count():
  limits = np.full(200, 64)
  left, true = run(requests_of(limits, ignore_eos=True), limits, window=50)
  early = true > 0.1 * true[0]
  np.testing.assert_allclose(left[early], true[early], rtol=0.25)


def test_answers_far_shorter_than_their_limits_are_learned():
  left, true = run(requests_of(np.full(300, 1024)), RNG.integers(10, 120, 300))
  assert left[0] > 2 * true[0], "nothing is known of their lengths yet"
  middle = (true < 0.75 * true[0]) & (true > 0.25 * true[0])
  assert (left[middle] < 2 * true[middle]).all() and (left[middle] > 0.75 * true[middle]).all()


def test_a_shape_that_was_not_measured_takes_the_ratio_of_its_kind():
  forecast = Forecast()
  forecast.foretell({("mixed", 64): 1.0, ("mixed", 128): 2.0, ("decode", 8): 0.5})
  assert forecast.secs([Dispatch("mixed", 100, 1), Dispatch("decode", 3, 4, 2.0)]) == 2.0 + 2 * 4 * 0.5
  forecast.measure("mixed", 64, 1, 3.0)
  assert forecast.secs([Dispatch("mixed", 100, 1)]) == pytest.approx(6.0)
  assert forecast.secs([Dispatch("decode", 8, 1)]) == 0.5
  assert forecast.secs([Dispatch("mixed", 300, 1)]) == pytest.approx(3 * 6.0), "cut to the largest"
