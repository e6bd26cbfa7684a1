"""Scheduler and pack on a numpy device: any job on any engine equals the oracle."""

import collections
import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from batchjax.config import ConfigError, EngineConfig
from batchjax.engine.pack import pack
from batchjax.engine.sampling_inputs import SamplingFeatures, SamplingTable
from batchjax.plan import memory, planner
from batchjax.plan.cost import CHIPS
from batchjax.plan.lengths import LengthPredictor
from batchjax.plan.scheduler import Scheduler
from batchjax.testing.fake_model import fake_config, fake_logits
from batchjax.testing.numpy_device import NumpyDevice, draw_of_request
from batchjax.testing.oracle import assert_same, oracle_completion
from batchjax.text.stop import build_stop_table
from batchjax.types import Request, SamplingParams, StepOutputs

VOCAB = 13
TOKEN_BYTES = [bytes([97 + i]) for i in range(VOCAB - 1)] + [b"ab"]
EOS = (5,)
CONFIG = fake_config(VOCAB, eos=EOS)


@dataclasses.dataclass(frozen=True)
class Job:
  """One example: requests, the engine, and how pessimistic its forecast of lengths is."""

  requests: list[Request]
  engine: EngineConfig
  is_optimistic: bool
  read_early: int
  nan_every: int


@st.composite
def jobs(draw) -> Job:
  integers = lambda low, high: draw(st.integers(low, high))
  rng = np.random.default_rng(integers(0, 2**32 - 1))
  has_scores, has_stops, has_top = (draw(st.booleans()) for _ in range(3))
  max_new = integers(1, 20)
  prompts: list[np.ndarray] = []
  for _ in range(integers(1, 14)):
    if prompts and rng.random() < 0.7:
      base = prompts[rng.integers(len(prompts))]  # all of it: identical, or a prefix of this one
      base = base[:rng.integers(1, len(base) + 1)] if rng.random() < 0.7 else base
    else:
      base = rng.integers(0, VOCAB, rng.integers(1, 16))
    prompts.append(np.append(base, rng.integers(0, VOCAB, rng.integers(0, 3) * rng.integers(0, 9))))
  requests = []
  for i, prompt in enumerate(prompts):
    logprobs, scores = bool(rng.integers(2)), has_scores and bool(rng.integers(2))
    max_tokens = int(rng.integers(0 if scores else 1, max_new + 1))
    requests.append(Request(f"r{i}", prompt.astype(np.int32), SamplingParams(
        temperature=float(rng.integers(3)), n=int(rng.choice([1, 1, 1, 2, 5])),
        seed=int(rng.integers(3)), max_tokens=max_tokens,
        min_tokens=int(rng.integers(0, max_tokens + 1)) * int(rng.integers(2)),
        stop=[(), ("ab",), ("c", "dab"), ("aa", "bca")][rng.integers(4) if has_stops else 0],
        stop_token_ids=tuple(rng.integers(0, VOCAB, rng.integers(3)).tolist()),
        ignore_eos=bool(rng.integers(2)), logprobs=logprobs, prompt_logprobs=scores,
        prompt_logprobs_start=int(rng.integers(len(prompt) + 2)) * int(rng.integers(2)),
        top_logprobs=int(rng.integers(4)) if has_top and (logprobs or scores) else 0)))
  max_rows = integers(1, 9)
  engine = EngineConfig(
      max_rows=max_rows, max_step_tokens=max(2, max_rows) + draw(st.sampled_from([0, 1, 7, 60])),
      page_size=2 ** integers(0, 4), num_pages=10_000, max_decode_steps=integers(1, 9),
      lookahead=integers(0, 3), max_levels=integers(1, 4), share_prefixes=integers(0, 3) > 0,
      max_buckets=integers(1, 3), plan_window=draw(st.sampled_from([100, 100, 3])))
  fitting = num_pages_of_largest(requests, engine)
  engine = dataclasses.replace(
      engine, num_pages=fitting + draw(st.sampled_from([0, 0, 1, 2, 4, 8, 16, 200])))
  return Job(requests, engine, draw(st.booleans()), integers(0, 2),
             draw(st.sampled_from([0, 0, 0, 3, 20])))


def windows_of(job_requests, engine):
  size = engine.plan_window
  return [job_requests[i:i + size] for i in range(0, len(job_requests), size)]


def num_pages_of_largest(requests, engine) -> int:
  """Pages without which some request could not run even alone."""
  needed = []
  for window in windows_of(requests, engine):
    plan = planner.make_plan(CONFIG, window, engine, CHIPS["cpu"], buckets=())
    max_tokens = np.array([request.sampling_params.max_tokens for request in window])
    needed.append(memory.pages_alone(plan.tree, max_tokens, engine.page_size).max())
  return int(max(needed))


class Optimist(LengthPredictor):
  """Foretells that every row is about to end: the pool runs full, and rows are preempted."""

  def add(self, num_generated, max_tokens):
    pass

  def predict(self, num_generated, max_tokens):
    return np.minimum(num_generated + 1, max_tokens)


@dataclasses.dataclass
class Log:
  """What a run did, for tests to look at."""

  completions: dict = dataclasses.field(default_factory=dict)
  batches: list = dataclasses.field(default_factory=list)
  num_prompt_tokens: int = 0
  num_planned: int = 0
  num_requeried: int = 0
  num_preempted: int = 0


def run_job(job: Job) -> Log:
  """`generate` on the numpy device, every invariant checked after every call."""
  requests, engine = job.requests, job.engine
  log = Log()
  stop_table = build_stop_table([r.sampling_params.stop for r in requests], TOKEN_BYTES)
  features = SamplingFeatures.of([r.sampling_params for r in requests], EOS)
  buckets = device = table = None
  for window in windows_of(requests, engine):
    is_only = len(window) == len(requests)
    plan = planner.make_plan(CONFIG, window, engine, CHIPS["cpu"], buckets=buckets,
                             is_only_window=is_only, stop_table=stop_table)
    assert not plan.rejected
    if buckets is None:
      buckets = plan.buckets
      max_rows = max(bucket.num_rows for bucket in buckets)
      table = SamplingTable(max_rows, features, EOS, stop_table)
      device = NumpyDevice(engine.num_pages, engine.page_size, max_rows, VOCAB, features,
                           engine.max_decode_steps, stop_table.transitions, job.nan_every)
    scheduler = planner.make_scheduler(window, plan, engine, max_rows,
                                       max(bucket.num_tokens for bucket in buckets), stop_table)
    run_window(job, scheduler, device, table, buckets, features, log)
    log.num_planned += int(plan.tree.length.sum())
    log.num_preempted += scheduler.stats.num_preempted
  return log


def run_window(job, scheduler: Scheduler, device, table, buckets, features, log: Log) -> None:
  engine, rng = job.engine, np.random.default_rng(job.read_early)
  device.watch(scheduler._pool)
  if job.is_optimistic:
    scheduler._lengths = Optimist()
  in_flight = collections.deque()
  for _ in range(5000):
    if scheduler.finished:
      break
    device.settle()
    batch = scheduler.next_batch()
    scheduler.check_integrity()
    if batch is not None:
      for admission in batch.admissions:
        table.set(admission.slot, admission.sampling_params, admission.sample_index)
      bucket = planner.pick_bucket(buckets, batch.kind, batch.num_tokens)
      inputs = pack(batch, bucket, table, page_size=engine.page_size,
                    prompt_logprobs=features.prompt_logprobs)
      assert batch.num_steps <= engine.max_decode_steps
      in_flight.append((batch, device.run(batch.kind, inputs, batch.num_steps)))
      log.batches.append(batch)
      log.num_prompt_tokens += batch.num_prompt_tokens
      log.num_requeried += int(batch.entries.num_requeried.sum())
    # Reading earlier than need be is allowed, and must change nothing.
    while in_flight and (batch is None or len(in_flight) > engine.lookahead
                         or rng.integers(5) < job.read_early):
      for completion in scheduler.retire(*in_flight.popleft()):
        assert completion.request_id not in log.completions, "completed twice"
        log.completions[completion.request_id] = completion
      scheduler.check_integrity()
      if batch is None:
        break
    else:
      assert batch is not None, "nothing to do and nothing in flight, but not finished"
  assert scheduler.finished, "too many steps"
  assert scheduler.stats.used_pages == 0, "pages are left behind"
  assert scheduler.stats.num_running == scheduler.stats.num_waiting == 0


def expected(request: Request, nan_every: int = 0):
  return oracle_completion(request, lambda prefix: fake_logits(prefix, VOCAB, nan_every),
                           draw_of_request(EOS), EOS, TOKEN_BYTES)


@hypothesis.settings(max_examples=150, deadline=None,
                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(jobs())
def test_any_job_on_any_engine_equals_the_oracle(job):
  log = run_job(job)
  assert len(log.completions) == len(job.requests)
  for request in job.requests:
    assert_same(log.completions[request.request_id], expected(request, job.nan_every))
  num_rows = sum(request.sampling_params.n for request in job.requests)
  longest = max(len(request.prompt_token_ids) for request in job.requests)
  # Too few rows to learn from: all are taken to be long. What is foretold has no prompt take several steps,
  # in which other rows go on.
  if not job.is_optimistic and num_rows <= 32 and longest + job.engine.max_rows <= job.engine.max_step_tokens:
    assert log.num_preempted == 0
    assert log.num_prompt_tokens - log.num_requeried == log.num_planned
  cached = sum(c.num_cached_tokens for c in log.completions.values())
  asked = sum(len(r.prompt_token_ids) for r in job.requests)
  assert asked - cached == log.num_planned


def scheduler_of(requests, **changes) -> Scheduler:
  engine = EngineConfig(**{**dict(page_size=2, num_pages=64, max_rows=4, max_step_tokens=16,
                                  max_decode_steps=8), **changes})
  plan = planner.make_plan(CONFIG, requests, engine, CHIPS["cpu"], buckets=())
  stop_table = build_stop_table([r.sampling_params.stop for r in requests], TOKEN_BYTES)
  return planner.make_scheduler(requests, plan, engine, engine.max_rows, engine.max_step_tokens,
                                stop_table)


def request(name, prompt, **params):
  return Request(name, np.array(prompt, np.int32), SamplingParams(**params))


def outputs_of(batch) -> StepOutputs:
  """Every row draws token 1 until it has `max_tokens`."""
  steps = np.arange(batch.num_steps)[:, None]
  left = batch.samples.max_tokens - batch.samples.num_generated
  drawn = np.where(steps < left, 1, -1).astype(np.int32)
  ends = np.where(steps == left - 1, 3, 0).astype(np.int8)
  return StepOutputs(drawn, ends)


def test_rows_of_one_prompt_draw_from_its_one_computation():
  scheduler = scheduler_of([request("a", range(6), n=4, max_tokens=3)])
  batch = scheduler.next_batch()
  assert batch.num_tokens == batch.num_prompt_tokens == 6
  assert batch.samples.seq.tolist() == [0, 1, 2, 3]
  assert set(batch.samples.slot.tolist()) == {0, 1, 2, 3}
  assert [a.sample_index for a in batch.admissions] == [0, 1, 2, 3]


def test_a_row_that_comes_later_computes_the_last_shared_token_again():
  scheduler = scheduler_of([request("a", range(6), n=3, max_tokens=1)], max_rows=2)
  scheduler.retire(batch := scheduler.next_batch(), outputs_of(batch))
  batch = scheduler.next_batch()
  assert (batch.num_tokens, batch.num_prompt_tokens, batch.entries.num_requeried[0]) == (1, 1, 1)
  assert batch.shared.kv_len.tolist() == [6]


def test_pages_of_a_prefix_are_freed_with_its_last_row():
  requests = [request(f"{i}", [*range(16), i], max_tokens=1) for i in range(3)]
  scheduler = scheduler_of(requests, max_rows=1, page_size=4)
  used = []
  while not scheduler.finished:
    batch = scheduler.next_batch()
    used.append(scheduler.stats.used_pages)
    scheduler.retire(batch, outputs_of(batch))
  # The first step is full with the prefix; then a row at a time, gone with its one token.
  assert used == [4, 4, 4, 0]


def test_pages_of_rows_at_their_limit_are_free_before_their_results_are_read():
  scheduler = scheduler_of([request("a", range(4), max_tokens=5)])
  scheduler.next_batch()
  batch = scheduler.next_batch()
  assert (batch.kind, batch.num_steps) == ("decode", 4)
  assert scheduler.stats.used_pages == scheduler.stats.num_running == 0
  assert not scheduler.finished and scheduler.next_batch() is None


def test_waiting_rows_shorten_decode_loops():
  rows = [request("a", [1, 2], max_tokens=30), request("b", [3, 4], max_tokens=4)]
  alone = scheduler_of(rows)
  alone.next_batch()
  assert alone.next_batch().num_steps == 8
  waiting = scheduler_of([*rows, request("c", [5, 6], max_tokens=2)], max_rows=2)
  waiting.next_batch()
  assert waiting.next_batch().num_steps == 3  # until "b" leaves its slot


def test_decoding_goes_on_beside_a_long_prompt():
  scheduler = scheduler_of([request("a", [1, 2], max_tokens=30),
                            request("b", range(40), max_tokens=5)])
  order = [scheduler.next_batch() for _ in range(3)]
  assert [batch.kind for batch in order] == ["mixed"] * 3
  assert [batch.num_tokens for batch in order[:2]] == [16, 16]
  assert (order[1].tokens == -1).any()


def test_the_youngest_row_is_preempted_and_comes_back_with_what_it_had():
  requests = [request("old", range(4), max_tokens=12),
              request("young", range(4, 8), max_tokens=9, stop=("b" * 12,))]
  scheduler = scheduler_of(requests, num_pages=9, max_decode_steps=1)
  scheduler._lengths = Optimist()
  again = []
  while not scheduler.finished:
    batch = scheduler.next_batch()
    again += [a for a in batch.admissions if len(a.output_tokens)]
    # Row 1 is the young one. Token 1 is "b": as many as it had are matched.
    is_again = (batch.samples.seq == 1) & batch.samples.is_first
    assert batch.samples.stop_state.tolist() == np.where(
        is_again, batch.samples.num_generated, 0).tolist()
    scheduler.retire(batch, outputs_of(batch))
    scheduler.check_integrity()
  assert scheduler.stats.num_preempted >= 1
  assert {a.request_id for a in again} == {"young"}
  assert again[0].output_tokens.tolist() == [1] * len(again[0].output_tokens)


def test_settings_of_a_row_that_cannot_begin_yet_are_not_lost():
  """Its slot is taken while scoring leaves it no token; its settings travel with a later batch."""
  requests = [request(f"{i}", [*range(12), i], max_tokens=6, prompt_logprobs=True)
              for i in range(4)]
  scheduler = scheduler_of(requests, max_rows=4, max_step_tokens=4, max_decode_steps=2)
  seen, num_admissions = set(), 0
  while not scheduler.finished:
    batch = scheduler.next_batch()
    num_admissions += len(batch.admissions)
    seen |= {(a.slot, a.request_id) for a in batch.admissions}
    for slot, seq in zip(batch.samples.slot.tolist(), batch.samples.seq.tolist()):
      assert (slot, f"{seq}") in seen
    outputs = outputs_of(batch)._replace(prompt_logprobs=np.zeros(batch.num_tokens))
    scheduler.retire(batch, outputs)
  assert num_admissions == 4, "settings travel once"


def test_nothing_is_scored_that_nobody_asked_for():
  """Nor is a token computed once more for the sake of a score that is not wanted."""
  shared = list(range(12))
  requests = [request(f"{i}", [*shared, *range(i, 2 * i)], max_tokens=0, prompt_logprobs=True,
                      prompt_logprobs_start=start) for i, start in ((5, 12), (6, 10), (7, 15))]
  requests.append(request("silent", [*shared, 50, 51], max_tokens=1))
  batch = scheduler_of(requests, max_rows=4, max_step_tokens=64).next_batch()
  scored = {(score.node, score.offset, score.skipped): score.next_tokens.tolist()
            for score in batch.prompt_scores}
  entries = {seq: n for seq, n in zip(batch.entries.seq.tolist(),
                                      batch.entries.num_requeried.tolist())}
  assert sorted(map(len, scored.values())) == [2, 4, 5, 6], scored
  assert [10, 11] in scored.values(), "of the shared prefix what one of them wants"
  assert sum(entries.values()) == 2, "rows 5 and 6 want their first own token, 7 and silent do not"
  assert {n for n in scored if n[2]} and all(tokens for tokens in scored.values())


def test_steps_of_one_token_cannot_score():
  with pytest.raises(ConfigError, match="max_step_tokens=1"):
    scheduler_of([request("a", range(4), prompt_logprobs=True)], max_rows=1, max_step_tokens=1)


def test_a_first_token_that_stops_leaves_empty_scores():
  scheduler = scheduler_of([request("a", range(3), logprobs=True, top_logprobs=2)])
  batch = scheduler.next_batch()
  outputs = StepOutputs(np.array([[5]], np.int32), np.array([[1]], np.int8),
                        np.zeros((1, 1), np.float32), np.zeros((1, 1, 2), np.int32),
                        np.zeros((1, 1, 2), np.float32))
  choice, = scheduler.retire(batch, outputs)[0].choices
  assert choice.finish_reason == "stop" and not len(choice.token_ids)
  assert choice.top_token_ids.shape == choice.top_logprobs.shape == (0, 2)
