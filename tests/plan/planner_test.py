"""Plans of small windows: what they hold, and that the schedule keeps to them."""

import dataclasses
import functools

import numpy as np
import pytest

from batchjax.config import ConfigError, EngineConfig, ModelConfig
from batchjax.plan import planner, simulate
from batchjax.plan.buckets import Bucket
from batchjax.plan.cost import CHIPS
from batchjax.testing.fake_model import fake_config
from batchjax.types import Request, SamplingParams

CONFIG, CPU = fake_config(), CHIPS["cpu"]
ENGINE = EngineConfig(page_size=4, num_pages=500, max_rows=16, max_step_tokens=256,
                      compile_secs=0.0)


def window(num=20, shared_len=30, own_len=10, **params):
  rng = np.random.default_rng(0)
  base = rng.integers(0, 97, shared_len)
  return [Request(f"r{i}", np.append(base, rng.integers(0, 97, own_len)).astype(np.int32),
                  SamplingParams(**{"max_tokens": 10 + i, **params})) for i in range(num)]


def test_the_tree_spells_every_prompt():
  requests = window()
  tree = planner.make_plan(CONFIG, requests, ENGINE, CPU).tree
  for i, request in enumerate(requests):
    node, spelled = int(tree.node_of_request[i]), []
    while node > 0:
      source = requests[tree.source[node]].prompt_token_ids
      spelled = source[tree.start[node]:tree.end[node]].tolist() + spelled
      node = int(tree.parent[node])
    assert spelled == request.prompt_token_ids.tolist()


def test_totals_tell_what_sharing_saves():
  plan = planner.make_plan(CONFIG, window(), ENGINE, CPU)
  alone = planner.make_plan(CONFIG, window(), dataclasses.replace(ENGINE, share_prefixes=False),
                            CPU)
  assert plan.totals.prompt_tokens_planned == 30 + 20 * 10
  assert alone.totals.prompt_tokens_planned == 20 * 40
  assert plan.totals.decode_tokens == sum(range(10, 30))


def test_requests_that_never_fit_are_named():
  requests = window(3) + window(1, shared_len=3000)
  plan = planner.make_plan(CONFIG, requests, ENGINE, CPU)
  assert list(plan.rejected) == [3] and "num_pages" in plan.rejected[3]
  assert plan.buckets == () and plan.prediction is None


@pytest.mark.parametrize("is_only", [True, False])
def test_buckets_ascend_to_the_limit(is_only):
  plan = planner.make_plan(CONFIG, window(4), ENGINE, CPU, is_only_window=is_only)
  # The rungs of the ladder above 30 + 4 * 10 + 4 tokens and 4 rows.
  for kind, limit in (("mixed", 128 if is_only else 256), ("decode", 8 if is_only else 16)):
    sizes = [bucket.num_tokens for bucket in plan.buckets if bucket.kind == kind]
    assert sizes == sorted(set(sizes)) and sizes[-1] == limit
    assert 1 <= len(sizes) <= ENGINE.max_buckets
  for bucket in plan.buckets:
    assert bucket.num_page_indices == plan.num_pages
    assert bucket.num_rows == (bucket.num_tokens if bucket.kind == "decode" else
                               8 if is_only else 16)


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_rows_that_the_pool_never_holds_widen_no_step_of_known_lengths(ignore_eos):
  # Each row takes 5 to 10 of 60 pages.
  engine = dataclasses.replace(ENGINE, num_pages=60, compile_secs=1e6)
  requests = window(16, shared_len=0, own_len=20, max_tokens=20, ignore_eos=ignore_eos)
  plan = planner.make_plan(CONFIG, requests, engine, CPU)
  (decode,) = (bucket for bucket in plan.buckets if bucket.kind == "decode")
  assert decode.num_tokens == (8 if ignore_eos else 16)


def test_buckets_of_an_earlier_window_are_kept():
  buckets = planner.make_plan(CONFIG, window(4), ENGINE, CPU, is_only_window=False).buckets
  plan = planner.make_plan(CONFIG, window(9), ENGINE, CPU, buckets=buckets, is_only_window=False)
  assert plan.buckets == buckets and plan.prediction is None


def available(plan):
  """What a job of this plan leaves compiled."""
  slots = max(bucket.num_rows for bucket in plan.buckets)
  return {(bucket, slots) for bucket in plan.buckets}


DEAR = dataclasses.replace(ENGINE, compile_secs=1e6)


@pytest.mark.parametrize("num, own_len", [(20, 10), (16, 12), (24, 8), (20, 3)])
def test_like_jobs_take_up_what_an_earlier_one_compiled(num, own_len):
  first = planner.make_plan(CONFIG, window(), DEAR, CPU)
  again = planner.make_plan(CONFIG, window(num, own_len=own_len), DEAR, CPU,
                            available=available(first))
  assert set(again.buckets) <= set(first.buckets)
  assert again.prediction.secs > 0


def test_shapes_that_fit_badly_are_taken_only_where_compiling_is_dear():
  wide = dataclasses.replace(ENGINE, max_step_tokens=2048)
  large = planner.make_plan(CONFIG, window(100), dataclasses.replace(wide, compile_secs=1e6), CPU)
  small = lambda **secs: [bucket.num_tokens for bucket in planner.make_plan(
      CONFIG, window(3), dataclasses.replace(wide, **secs), CPU, available=available(large)).buckets
                          if bucket.kind == "mixed"]
  assert small() == [64]
  large_sizes = [bucket.num_tokens for bucket in large.buckets if bucket.kind == "mixed"]
  assert large_sizes[0] > 64
  assert small(compile_secs=60.0) == small(first_compile_secs=60.0) == large_sizes


def test_shapes_of_another_pool_or_with_too_few_segments_are_no_use():
  first = planner.make_plan(CONFIG, window(), DEAR, CPU)
  for other in ({(b._replace(num_page_indices=400), slots) for b, slots in available(first)},
                {(b._replace(num_segments=2), slots) for b, slots in available(first)},
                {(b, slots + 1) for b, slots in available(first)}):
    plan = planner.make_plan(CONFIG, window(), DEAR, CPU, available=other)
    assert plan.buckets == first.buckets


def test_the_ladder_says_what_it_costs():
  prediction = planner.make_plan(CONFIG, window(4), ENGINE, CPU).prediction
  assert 0 < prediction.ladder_secs < prediction.secs


def test_dear_compiles_mean_few_buckets():
  assert len(planner.make_plan(CONFIG, window(), DEAR, CPU).buckets) == 2
  assert len(planner.make_plan(CONFIG, window(), ENGINE, CPU).buckets) > 2


def test_prediction_counts_the_dispatches_of_a_short_window():
  prediction = planner.make_plan(CONFIG, window(2, n=2, max_tokens=33), ENGINE, CPU).prediction
  # One step for the prompts; 32 more tokens of each row, 16 at most in a loop.
  assert (prediction.num_mixed, prediction.num_decode) == (1, 2)
  assert not prediction.is_extrapolated and prediction.secs > 0
  assert 0 <= prediction.padding_waste < 1
  # 30 + 2 * 10 prompt tokens, and 4 rows of 32 tokens, in pages of 4.
  assert prediction.peak_pages <= 8 + 2 * 3 + 4 * 8


def test_a_long_window_is_extrapolated():
  engine = dataclasses.replace(ENGINE, max_step_tokens=64, max_decode_steps=1)
  first, second = (planner.make_plan(CONFIG, window(num, shared_len=1, max_tokens=40, ignore_eos=True), engine,
                                       CPU)
                   .prediction for num in (200, 400))
  assert first.is_extrapolated and second.is_extrapolated
  for ratio in (second.secs / first.secs, second.num_mixed / first.num_mixed,
                second.num_decode / first.num_decode):
    assert 1.8 < ratio < 2.2


H100 = EngineConfig(page_size=64, max_rows=1024, max_step_tokens=8192, compile_secs=0.5,
                    first_compile_secs=12.0)
LLAMA = ModelConfig("llama", vocab_size=128_256, hidden_size=2048, ffn_size=8192, num_layers=16,
                    num_heads=32, num_kv_heads=8, head_dim=64, max_len=131_072, tie_embeddings=True,
                    dtype="bfloat16")
LLAMA_8B = dataclasses.replace(LLAMA, hidden_size=4096, ffn_size=14_336, num_layers=32, layer_kinds=(),
                               head_dim=128, tie_embeddings=False)


@pytest.mark.parametrize("model, num_pages, groups, share, prefix, own, output, n, mixed, decode", [
    (LLAMA_8B, 6656, 64, 16, 2000, 200, 100, 1, [8192], [128, 896]),
    (LLAMA_8B, 6656, 512, 1, 0, 1024, 256, 1, [8192], [352]),
    (LLAMA_8B, 6656, 1, 512, 16_000, 64, 64, 1, [8192], [512]),
    (LLAMA, 32_768, 512, 3, 1570, 30, 100, 1, [8192], [1024]),
    (LLAMA, 32_768, 64, 1, 0, 900, 256, 32, [8192], [1024]),
])
def test_shapes_of_jobs_whose_lengths_are_known(model, num_pages, groups, share, prefix, own, output, n,
                                                mixed, decode):
  """Those that the figures of scripts/BENCHMARKS.md were measured with."""
  rng = np.random.default_rng(0)
  prefixes = rng.integers(0, 1000, (groups, prefix))
  requests = [Request(f"{i}", np.append(prefixes[i // share], rng.integers(0, 1000, own)).astype(np.int32),
                      SamplingParams(max_tokens=output, n=n, ignore_eos=True))
              for i in range(groups * share)]
  plan = planner.make_plan(model, requests, dataclasses.replace(H100, num_pages=num_pages),
                           CHIPS["h100"])
  sizes = {kind: [b.num_tokens for b in plan.buckets if b.kind == kind] for kind in ("mixed", "decode")}
  assert sizes == {"mixed": mixed, "decode": decode}


@pytest.mark.parametrize("params, is_only, kinds", [
    (dict(max_tokens=1), True, {"mixed"}),
    (dict(max_tokens=1, n=3), True, {"mixed"}),
    (dict(max_tokens=0, prompt_logprobs=True), True, {"mixed"}),
    (dict(max_tokens=1), False, {"mixed", "decode"}),
    (dict(max_tokens=2), True, {"mixed", "decode"}),
])
def test_jobs_that_never_decode_compile_no_loop(params, is_only, kinds):
  plan = planner.make_plan(CONFIG, window(**params), ENGINE, CPU, is_only_window=is_only)
  assert {bucket.kind for bucket in plan.buckets} == kinds


def secs_of(requests, lengths, engine, plan):
  """Seconds of a job whose rows have these lengths, compiling included, and its padding."""
  largest = max(bucket.num_tokens for bucket in plan.buckets)
  shapes = simulate.simulate(
      planner.make_scheduler(requests, plan, engine, engine.max_rows, largest, None),
      10_000, lengths=lengths, lookahead=engine.lookahead)
  sizes = [plan.bucket_for(shape.kind, shape.num_tokens).num_tokens for shape in shapes]
  secs = sum(shape.secs(LLAMA_8B, CHIPS["h100"], size) for shape, size in zip(shapes, sizes))
  launched = sum(size * shape.num_steps for shape, size in zip(shapes, sizes))
  return (secs + engine.compile_secs * len(plan.buckets),
          1 - sum(shape.num_useful for shape in shapes) / launched)


def test_where_lengths_are_unknown_a_plan_for_many_beats_one_for_a_guess():
  engine = dataclasses.replace(H100, num_pages=6656, max_rows=512, max_step_tokens=4096)
  requests = window(1200, shared_len=100, own_len=50, max_tokens=128)
  plan = planner.make_plan(LLAMA_8B, requests, engine, CHIPS["h100"])
  guesses = np.ceil(128 * (1 - np.arange(1200) * 0.618 % 1)).astype(int)
  guess = planner.make_plan(LLAMA_8B, [dataclasses.replace(request, sampling_params=SamplingParams(
      max_tokens=int(length), ignore_eos=True)) for request, length in zip(requests, guesses)],
                            engine, CHIPS["h100"])
  rng, got = np.random.default_rng(0), []
  for lengths in (rng.integers(1, 129, 1200), np.exp(rng.normal(np.log(20), 0.8, 1200))):
    lengths = np.clip(np.ceil(lengths), 1, 128).astype(int)
    got.append([secs_of(requests, lengths, engine, p) for p in (plan, guess)])
  (secs, padding), (guess_secs, guess_padding) = np.mean(got, axis=0)
  assert secs < 0.99 * guess_secs and padding < guess_padding


def test_pick_bucket_takes_the_smallest_of_its_kind():
  buckets = [Bucket("mixed", 64, 8, 8, 8), Bucket("mixed", 128, 8, 8, 8),
             Bucket("decode", 8, 8, 8, 8)]
  assert planner.pick_bucket(buckets, "mixed", 64) == buckets[0]
  assert planner.pick_bucket(buckets, "mixed", 65) == buckets[1]
  assert planner.pick_bucket(buckets, "decode", 1) == buckets[2]
  with pytest.raises(ValueError, match="9 exceeds"):
    planner.pick_bucket(buckets, "decode", 9)


def test_scoring_needs_room_for_two_tokens():
  engine = dataclasses.replace(ENGINE, max_rows=1, max_step_tokens=1)
  with pytest.raises(ConfigError, match="max_step_tokens=1"):
    planner.make_plan(CONFIG, window(2, prompt_logprobs=True), engine, CPU)


@pytest.mark.parametrize("options, kinds", [
    (dict(max_tokens=0, prompt_logprobs=True), {"mixed"}), (dict(max_tokens=1, n=2), {"mixed"}),
    (dict(max_tokens=2), {"mixed", "decode"})])
def test_a_job_that_draws_no_second_token_has_no_decode_loop(options, kinds):
  engine = EngineConfig(max_rows=8, max_step_tokens=32, num_pages=400)
  make = functools.partial(planner.make_plan, CONFIG, window(30, **options), engine, CPU)
  assert {bucket.kind for bucket in make().buckets} == kinds
  assert {bucket.kind for bucket in make(is_only_window=False).buckets} == {"mixed", "decode"}, (
      "others may follow that decode")
