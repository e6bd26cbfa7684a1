"""The simulated schedule against steps counted by hand."""

import dataclasses

import numpy as np
import pytest

from batchjax.config import EngineConfig
from batchjax.plan import planner
from batchjax.plan.cost import CHIPS, step_cost
from batchjax.plan.simulate import StepShape, simulate
from batchjax.testing.fake_model import fake_config
from batchjax.types import Request, SamplingParams

CONFIG = fake_config()
ENGINE = EngineConfig(page_size=4, num_pages=100, max_rows=4, max_step_tokens=4,
                      max_decode_steps=2)


def shapes_of(requests, engine=ENGINE, max_dispatches=200, **options):
  plan = planner.make_plan(CONFIG, requests, engine, CHIPS["cpu"], buckets=())
  scheduler = planner.make_scheduler(requests, plan, engine, engine.max_rows,
                                     engine.max_step_tokens, None)
  return simulate(scheduler, max_dispatches,
                  max(request.sampling_params.top_logprobs for request in requests), **options)


def request(name, prompt, **params):
  return Request(name, np.array(prompt, np.int32), SamplingParams(**params))


def test_one_request_step_by_step():
  got = shapes_of([request("a", range(10), max_tokens=5)])
  assert got == [
      StepShape("mixed", num_tokens=4, num_rows=0, num_steps=1, num_prompt_tokens=4, num_drawn=0,
                kv_read_tokens=4, attn_pairs=16, used_pages=1, num_slots=1),
      StepShape("mixed", num_tokens=4, num_rows=0, num_steps=1, num_prompt_tokens=4, num_drawn=0,
                kv_read_tokens=8, attn_pairs=32, used_pages=2, num_slots=1),
      StepShape("mixed", num_tokens=2, num_rows=1, num_steps=1, num_prompt_tokens=2, num_drawn=1,
                kv_read_tokens=10, attn_pairs=20, used_pages=3, num_slots=1),
      StepShape("decode", num_tokens=1, num_rows=1, num_steps=2, num_prompt_tokens=0, num_drawn=2,
                kv_read_tokens=11, attn_pairs=11, used_pages=3, num_slots=1),
      # The row leaves behind its last dispatch, whose pages are still its own.
      StepShape("decode", num_tokens=1, num_rows=1, num_steps=2, num_prompt_tokens=0, num_drawn=2,
                kv_read_tokens=13, attn_pairs=13, used_pages=4, num_slots=1),
  ]


def test_shared_kv_is_read_once():
  engine = dataclasses.replace(ENGINE, max_step_tokens=64)
  got = shapes_of([request("a", range(40), n=3, max_tokens=2)], engine)
  assert [shape.kind for shape in got] == ["mixed", "decode"]
  assert got[0].num_prompt_tokens == got[0].kv_read_tokens == 40 and got[0].num_rows == 3
  assert got[1].num_tokens == 3
  assert got[1].kv_read_tokens == 40 + 3 and got[1].attn_pairs == 3 * (40 + 1)


def test_without_sharing_it_is_read_by_each():
  requests = [request(f"{i}", range(12), max_tokens=2) for i in range(3)]
  engine = dataclasses.replace(ENGINE, max_step_tokens=64)
  shared, alone = (shapes_of(requests, dataclasses.replace(engine, share_prefixes=share))
                   for share in (True, False))
  assert sum(shape.num_prompt_tokens for shape in shared) == 12
  assert sum(shape.num_prompt_tokens for shape in alone) == 36
  assert shared[-1].kv_read_tokens == 12 + 3 and alone[-1].kv_read_tokens == 39


@pytest.mark.parametrize("params", [
    dict(max_tokens=0, prompt_logprobs=True),
    dict(max_tokens=3, prompt_logprobs=True, top_logprobs=2, n=2),
    dict(max_tokens=3, logprobs=True, top_logprobs=2),
])
def test_jobs_with_scores_can_be_simulated(params):
  got = shapes_of([request("a", range(10), **params), request("b", range(8), **params)])
  rows = [shape for shape in got if shape.num_rows]
  assert sum(shape.num_prompt_tokens for shape in got) >= 10 and rows


def test_stops_where_it_is_told():
  assert len(shapes_of([request("a", range(40))], max_dispatches=3)) == 3


def test_seconds_are_those_of_the_padded_step_times_the_iterations():
  model, chip = CONFIG, CHIPS["h100"]
  shape = StepShape("decode", 5, 5, 4, 0, 20, 30, 60, 9, 5)
  assert shape.secs(model, chip, 8) == 4 * step_cost(model, chip, 8, 8, 30, 60).serial_secs
  shape = dataclasses.replace(shape, kind="mixed", num_steps=1)  # draws from as many rows in any shape
  assert shape.secs(model, chip, 8) == step_cost(model, chip, 8, 5, 30, 60).serial_secs


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_an_end_that_nobody_foresaw_is_seen_lookahead_dispatches_later(lookahead):
  requests = [request(name, range(4), max_tokens=21) for name in "ab"]
  engine = dataclasses.replace(ENGINE, max_step_tokens=8, share_prefixes=False)
  lengths = np.array([4, 21])  # the first row ends in the second of its loops of two
  got = shapes_of(requests, engine, lengths=lengths, lookahead=lookahead)
  loops = [shape for shape in got if shape.kind == "decode"]
  assert [shape.num_drawn for shape in loops] == [4, 3] + 8 * [2]
  assert [shape.num_rows for shape in loops] == (2 + lookahead) * [2] + (8 - lookahead) * [1]
  assert [shape.num_steps for shape in loops] == 10 * [2]


def test_a_loop_ends_with_its_last_row():
  loops = [shape for shape in shapes_of([request("a", range(3), max_tokens=9)],
                                        lengths=np.array([2]), lookahead=1)
           if shape.kind == "decode"]
  assert [(shape.num_steps, shape.num_drawn) for shape in loops] == [(1, 1), (1, 0)]


def test_the_end_of_a_long_job_is_that_of_its_last_rows():
  requests = [request(f"{i}", range(3), max_tokens=12) for i in range(60)]
  lengths = np.tile([3, 12], 30)
  whole = shapes_of(requests, lengths=lengths)
  short = shapes_of(requests, max_dispatches=20, lengths=lengths)
  assert short[:20] == whole[:20]
  assert all(shape.is_end for shape in short[20:])
  # Rows that run go on to their ends, and no row comes any more.
  assert short[-1].num_rows < max(shape.num_rows for shape in short[:20])
  assert not any(shape.num_prompt_tokens for shape in short[-3:])
  assert len(short) < len(whole)
