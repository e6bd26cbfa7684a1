"""Workloads: their lengths and counts, what they share, and that a seed fixes them."""

import numpy as np
import pytest

from batchjax.bench.workloads import (default_sizes, Draw, mixed_lengths, multi_level, never_drawn,
                                      prefix_groups, WORKLOADS)
from batchjax.bench.workloads import random as random_workload
from batchjax.bench.workloads import samples
from batchjax.plan.prefix_tree import build_prefix_tree
from batchjax.types import SamplingParams

# So many tokens that no two draws begin alike by chance, and closed forms are exact.
VOCAB = 1 << 30
SMALL = {
    "prefix_groups": dict(num_requests=12, prefix_len=20, share_degree=4, distinct_len=3,
                          output_len=5),
    "samples": dict(num_prompts=4, prompt_len=7, num_samples=3, output_len=5),
    "random": dict(num_requests=6, prompt_len=9, output_len=5),
    "mixed_lengths": dict(num_requests=40, prompt_len=16, output_len=8, sigma=0.7),
    "multi_level": dict(num_documents=3, questions_per_document=4, system_len=10, document_len=20,
                        question_len=3, output_len=5),
}


def prompts(workload) -> list[list[int]]:
  return [r.prompt_token_ids.tolist() for r in workload.requests]


def test_every_workload_is_covered():
  assert set(SMALL) == set(WORKLOADS)
  for name, sizes in SMALL.items():
    assert set(sizes) == set(default_sizes(name)) - {"shuffled"}


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_fixes_the_workload(name):
  make = lambda seed: WORKLOADS[name](Draw(256, seed), **SMALL[name])
  assert prompts(make(3)) == prompts(make(3))
  assert prompts(make(3)) != prompts(make(4))


@pytest.mark.parametrize("name", SMALL)
def test_requests_are_valid_and_run_to_their_last_token(name):
  workload = WORKLOADS[name](Draw(10, sampling=SamplingParams(temperature=0.5, top_k=3)), **SMALL[name])
  assert len({r.request_id for r in workload.requests}) == len(workload.requests)
  for request in workload.requests:
    assert request.prompt_token_ids.dtype == np.int32 and len(request.prompt_token_ids) > 0
    assert 0 <= request.prompt_token_ids.min() and request.prompt_token_ids.max() < 10
    assert request.sampling_params.ignore_eos and not request.sampling_params.stop_token_ids
    assert request.sampling_params.temperature == 0.5 and request.sampling_params.top_k == 3


@pytest.mark.parametrize("name", SMALL)
def test_sampling_is_greedy_unless_asked(name):
  workload = WORKLOADS[name](Draw(256), **SMALL[name])
  assert {r.sampling_params.temperature for r in workload.requests} == {0.0}


@pytest.mark.parametrize("num_requests, num_groups", [(12, 3), (13, 4), (3, 1)])
def test_prefix_groups(num_requests, num_groups):
  sizes = SMALL["prefix_groups"] | dict(num_requests=num_requests)
  workload = prefix_groups(Draw(VOCAB), **sizes)
  assert len(workload.requests) == num_requests
  assert workload.prompt_tokens == workload.prompt_tokens_asked == num_requests * 23
  assert workload.prompt_tokens_optimal == num_groups * 20 + num_requests * 3
  assert workload.output_tokens == num_requests * 5
  prefixes = [tuple(p[:20]) for p in prompts(workload)]
  assert max(prefixes.count(p) for p in prefixes) == min(4, num_requests)


def test_shuffling_moves_requests_and_changes_none():
  shuffled = prefix_groups(Draw(VOCAB), **SMALL["prefix_groups"], shuffled=True)
  in_order = prefix_groups(Draw(VOCAB), **SMALL["prefix_groups"], shuffled=False)
  assert prompts(shuffled) != prompts(in_order)
  assert sorted(prompts(shuffled)) == sorted(prompts(in_order))
  neighbours = [tuple(p[:20]) for p in prompts(in_order)]
  assert neighbours == sorted(neighbours, key=neighbours.index)
  assert {r.request_id: r.prompt_token_ids.tolist() for r in shuffled.requests} == {
      r.request_id: r.prompt_token_ids.tolist() for r in in_order.requests}


def test_samples():
  workload = samples(Draw(VOCAB), **SMALL["samples"])
  assert [r.sampling_params.n for r in workload.requests] == [3] * 4
  assert workload.prompt_tokens == workload.prompt_tokens_optimal == 28
  assert workload.prompt_tokens_asked == 84
  assert workload.output_tokens == 60


def test_random_shares_nothing():
  workload = random_workload(Draw(VOCAB), **SMALL["random"])
  assert workload.prompt_tokens_optimal == workload.prompt_tokens_asked == 54
  assert workload.output_tokens == 30


def test_the_optimum_counts_prefixes_shared_by_chance():
  workload = random_workload(Draw(2), num_requests=6, prompt_len=9, output_len=1)
  runs = {tuple(p[:n]) for p in prompts(workload) for n in range(1, 10)}
  assert workload.prompt_tokens_optimal == len(runs) < 54


def test_mixed_lengths_are_log_normal():
  workload = mixed_lengths(Draw(256), num_requests=4000, prompt_len=100, output_len=50, sigma=0.5)
  for median, lens in ((100, [len(r.prompt_token_ids) for r in workload.requests]),
                       (50, [r.sampling_params.max_tokens for r in workload.requests])):
    logs = np.log(np.array(lens) / median)
    assert abs(np.median(logs)) < 0.05
    assert abs(logs.std() - 0.5) < 0.03
    assert 1 <= min(lens) and max(lens) <= 8 * median


def test_mixed_lengths_stay_in_bounds():
  workload = mixed_lengths(Draw(256), num_requests=200, prompt_len=4, output_len=2, sigma=4.0)
  lens = [len(r.prompt_token_ids) for r in workload.requests]
  assert (min(lens), max(lens)) == (1, 32)


def test_stop_strings_are_followed_and_never_drawn():
  stop = never_drawn(3)
  workload = random_workload(Draw(50, sampling=SamplingParams(stop=stop)), **SMALL["random"])
  table = workload.stop_table(50)
  assert {r.sampling_params.stop for r in workload.requests} == {stop} == set(table.automaton)
  assert table.transitions.shape[1] == 50
  assert table.transitions.max() > 0, "numbers begin strings"
  assert table.transitions.min() == 0, "and complete none"
  assert random_workload(Draw(50), **SMALL["random"]).stop_table(50) is None


def test_multi_level():
  workload = multi_level(Draw(VOCAB), **SMALL["multi_level"])
  assert len(workload.requests) == 12
  assert workload.prompt_tokens_asked == 12 * 33
  assert workload.prompt_tokens_optimal == 10 + 3 * 20 + 12 * 3
  tree = build_prefix_tree([r.prompt_token_ids for r in workload.requests])
  assert sorted(tree.length.tolist()) == [0] + [3] * 12 + [10] + [20] * 3
