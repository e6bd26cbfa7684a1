"""Scheduler and pack on a numpy device: any job on any engine equals the oracle."""

import collections
import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from batchjax.config import EngineConfig
from batchjax.engine.pack import pack
from batchjax.engine.sampling_inputs import SamplingFeatures, SamplingTable
from batchjax.engine.scheduler import Scheduler
from batchjax.plan import memory, planner
from batchjax.plan.cost import CHIPS
from batchjax.testing.fake_model import fake_config, fake_logits
from batchjax.testing.numpy_device import NumpyDevice, draw_of_request
from batchjax.testing.oracle import assert_same, oracle_completion
from batchjax.text.stop import build_stop_table
from batchjax.types import Request, SamplingParams

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
    logprobs, max_tokens = bool(rng.integers(2)), int(rng.integers(1, max_new + 1))
    scores = has_scores and bool(rng.integers(2))
    requests.append(Request(f"r{i}", prompt.astype(np.int32), SamplingParams(
        temperature=float(rng.integers(3)), n=int(rng.choice([1, 1, 1, 2, 5])),
        seed=int(rng.integers(3)), max_tokens=max_tokens,
        min_tokens=int(rng.integers(0, max_tokens + 1)) * int(rng.integers(2)),
        stop=[(), ("ab",), ("c", "dab"), ("aa", "bca")][rng.integers(4) if has_stops else 0],
        stop_token_ids=tuple(rng.integers(0, VOCAB, rng.integers(3)).tolist()),
        ignore_eos=bool(rng.integers(2)), logprobs=logprobs, prompt_logprobs=scores,
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
  return Job(requests, engine, draw(st.booleans()), integers(0, 2))


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


class Optimist:
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
                           engine.max_decode_steps, stop_table.transitions)
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
      log.num_requeried += sum(entry.num_requeried for entry in batch.entries)
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
  assert scheduler.stats.num_retired == scheduler._unfinished.size if hasattr(
      scheduler, "_unfinished") else True


def expected(request: Request):
  return oracle_completion(request, lambda prefix: fake_logits(prefix, VOCAB),
                           draw_of_request(EOS), EOS, TOKEN_BYTES)


@hypothesis.settings(max_examples=150, deadline=None,
                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(jobs())
def test_any_job_on_any_engine_equals_the_oracle(job):
  log = run_job(job)
  assert len(log.completions) == len(job.requests)
  for request in job.requests:
    assert_same(log.completions[request.request_id], expected(request))
  if not log.num_preempted and not job.is_optimistic:
    computed = log.num_prompt_tokens - log.num_requeried
    assert computed == log.num_planned
  cached = sum(c.num_cached_tokens for c in log.completions.values())
  asked = sum(len(r.prompt_token_ids) for r in job.requests)
  assert asked - cached == log.num_planned
