import itertools

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from batchjax.plan import buckets


def _cost(chosen, sizes, counts, step_cost_fn, compile_cost_fn):
  def work(size):
    if size <= chosen[-1]:
      return step_cost_fn(buckets.pick(chosen, size))
    return -(-size // chosen[-1]) * step_cost_fn(chosen[-1])
  return (sum(c * work(s) for s, c in zip(sizes, counts))
          + sum(compile_cost_fn(size) for size in chosen))


def _quadratic(size):
  return 3 + size + 0.125 * size * size


def _solve(sizes, counts=None, *, max_buckets, candidates, lasts=None, step_cost_fn=float,
           compile_cost_fn=lambda size: 0.0):
  return buckets.solve_buckets(
      np.array(sizes), np.ones(len(sizes)) if counts is None else np.array(counts),
      max_buckets=max_buckets, candidates=candidates,
      lasts={max(candidates)} if lasts is None else lasts, step_cost_fn=step_cost_fn,
      compile_cost_fn=compile_cost_fn)


@given(st.data(), st.integers(1, 5), st.sampled_from([0.0, 7.5, 60.0, 1e6]), st.sets(st.integers(1, 13)))
def test_equals_brute_force(data, max_buckets, compile_cost, known):
  candidates = data.draw(st.sets(st.integers(1, 13), min_size=1))
  lasts = data.draw(st.sets(st.sampled_from(sorted(candidates)), min_size=1))
  histogram = data.draw(st.lists(st.tuples(st.sampled_from(sorted(candidates)), st.integers(1, 9)),
                                 max_size=8))
  sizes, counts = [s for s, _ in histogram], [c for _, c in histogram]
  compile_cost_fn = lambda size: 0.0 if size in known else compile_cost
  cost, chosen = _solve(sizes, counts, max_buckets=max_buckets, candidates=candidates,
                        lasts=lasts, step_cost_fn=_quadratic,
                        compile_cost_fn=compile_cost_fn)
  assert list(chosen) == sorted(set(chosen)) and set(chosen) <= candidates
  assert chosen[-1] in lasts and len(chosen) <= max_buckets
  best = min(_cost(subset, sizes, counts, _quadratic, compile_cost_fn)
             for k in range(1, max_buckets + 1)
             for subset in itertools.combinations(sorted(candidates), k)
             if subset[-1] in lasts)
  assert _cost(chosen, sizes, counts, _quadratic, compile_cost_fn) == pytest.approx(cost, rel=1e-12)
  assert cost == pytest.approx(best, rel=1e-12)


def test_a_compile_is_bought_only_when_it_pays():
  solve = lambda compile_cost: _solve(
      [64, 1000], [100, 100], max_buckets=4, candidates={64, 1000, 1024}, lasts={1024},
      compile_cost_fn=lambda size: compile_cost)[1]
  assert solve(95_000.0) == (64, 1024)
  assert solve(97_000.0) == (1024,)
  assert solve(1.0) == (64, 1000, 1024)


def test_what_is_compiled_already_is_taken_where_it_pads_little():
  solve = lambda known: _solve(
      [704], [100], max_buckets=4, candidates={704, 768, 4096}, lasts={704, 768, 4096},
      compile_cost_fn=lambda size: 0.0 if size == known else 10_000.0)[1]
  assert solve(768) == (768,)
  assert solve(4096) == (704,), "padding costs more than compiling"


def test_a_smaller_last_bucket_serves_where_larger_ones_would_have_to_be_compiled():
  solve = lambda compile_cost: _solve(
      [704], [1], max_buckets=2, candidates={640, 704}, lasts={640, 704},
      compile_cost_fn=lambda size: 0.0 if size == 640 else compile_cost)[1]
  assert solve(1e6) == (640,), "the step is cut in two"
  assert solve(1.0) == (704,)


def test_steps_of_equal_cost_take_one_bucket():
  assert _solve(range(1, 65), max_buckets=8, candidates=range(1, 65),
                step_cost_fn=lambda size: 1.0)[1] == (64,)


def test_nothing_known_leaves_the_largest():
  assert _solve([], max_buckets=3, candidates={100})[1] == (100,)


def test_a_thousand_sizes():
  assert _solve(range(1, 2049), max_buckets=4, candidates=range(1, 2049))[1] == (
      512, 1024, 1536, 2048)


@given(st.integers(1, 1 << 20), st.sampled_from([1, 8, 64]))
def test_the_ladder_pads_by_an_eighth_at_most(size, multiple):
  rung = buckets.ladder(size, multiple)
  assert size <= rung and rung % multiple == 0
  assert rung - size < max(multiple, size / 8 + 1)
  assert buckets.ladder(rung, multiple) == rung


def test_the_ladder_has_eight_rungs_to_a_power_of_two():
  assert len({buckets.ladder(size, 8) for size in range(1025, 2049)}) == 8


def test_pick():
  assert [buckets.pick((8, 32, 64), size) for size in (1, 8, 9, 32, 64)] == [8, 8, 32, 32, 64]
  with pytest.raises(ValueError, match="size 65 exceeds the largest bucket 64"):
    buckets.pick((8, 32, 64), 65)


@pytest.mark.parametrize("sizes, max_buckets, lasts, message", [
    ([5, 101], 2, {100}, r"\[5, 101\], outside \[1, 100\]"), ([0], 2, {100}, "outside"),
    ([5], 0, {100}, "max_buckets"), ([5], 2, {101}, r"\[50, 100\] is in lasts=\[101\]")])
def test_errors(sizes, max_buckets, lasts, message):
  with pytest.raises(ValueError, match=message):
    _solve(sizes, max_buckets=max_buckets, candidates={50, 100}, lasts=lasts)
