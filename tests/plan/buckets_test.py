import itertools

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from batchjax.plan import buckets


def _cost(chosen, sizes, counts, step_cost_fn, compile_cost):
  work = sum(c * step_cost_fn(buckets.pick(chosen, s)) for s, c in zip(sizes, counts))
  return work + compile_cost * len(chosen)


def _quadratic(size):
  return 3 + size + 0.125 * size * size


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), max_size=8),
       st.integers(1, 5), st.sampled_from([0.0, 7.5, 60.0, 1e6]), st.sampled_from([1, 2, 4]))
def test_equals_brute_force(histogram, max_buckets, compile_cost, multiple):
  sizes, counts = [s for s, _ in histogram], [c for _, c in histogram]
  limit = 13
  chosen = buckets.solve_buckets(
      np.array(sizes), np.array(counts), max_buckets=max_buckets, limit=limit,
      step_cost_fn=_quadratic, compile_cost=compile_cost, multiple=multiple)
  assert list(chosen) == sorted(set(chosen)) and chosen[-1] == limit
  assert len(chosen) <= max_buckets and all(b % multiple == 0 for b in chosen[:-1])
  inner = range(multiple, limit, multiple)
  best = min(_cost((*subset, limit), sizes, counts, _quadratic, compile_cost)
             for k in range(max_buckets) for subset in itertools.combinations(inner, k))
  assert _cost(chosen, sizes, counts, _quadratic, compile_cost) == pytest.approx(best, rel=1e-12)


def test_a_compile_is_bought_only_when_it_pays():
  arguments = dict(max_buckets=4, limit=1024, step_cost_fn=float, multiple=8)
  sizes, counts = np.array([64, 1000]), np.array([100, 100])
  solve = lambda compile_cost: buckets.solve_buckets(
      sizes, counts, compile_cost=compile_cost, **arguments)
  assert solve(95_000.0) == (64, 1024)
  assert solve(97_000.0) == (1024,)
  assert solve(1.0) == (64, 1000, 1024)


def test_steps_of_equal_cost_take_one_bucket():
  chosen = buckets.solve_buckets(np.arange(1, 65), np.ones(64), max_buckets=8, limit=64,
                                 step_cost_fn=lambda size: 1.0, compile_cost=0.0)
  assert chosen == (64,)


def test_nothing_known_leaves_the_limit():
  assert buckets.solve_buckets(np.zeros(0), np.zeros(0), max_buckets=3, limit=100,
                               step_cost_fn=float, compile_cost=1.0, multiple=16) == (100,)


def test_a_thousand_sizes():
  sizes = np.arange(1, 2049)
  chosen = buckets.solve_buckets(sizes, np.ones(2048), max_buckets=4, limit=2048,
                                 step_cost_fn=float, compile_cost=0.0)
  assert chosen == (512, 1024, 1536, 2048)


def test_pick():
  assert [buckets.pick((8, 32, 64), size) for size in (1, 8, 9, 32, 64)] == [8, 8, 32, 32, 64]
  with pytest.raises(ValueError, match="size 65 exceeds the largest bucket 64"):
    buckets.pick((8, 32, 64), 65)


@pytest.mark.parametrize("sizes, max_buckets, message", [
    ([5, 101], 2, r"\[5, 101\], outside \[1, 100\]"), ([0], 2, "outside"), ([5], 0, "max_buckets")])
def test_errors(sizes, max_buckets, message):
  with pytest.raises(ValueError, match=message):
    buckets.solve_buckets(np.array(sizes), np.ones(len(sizes)), max_buckets=max_buckets,
                          limit=100, step_cost_fn=float, compile_cost=0.0)
