"""The few static shapes that a job compiles, solved for from its own histogram of sizes."""

import bisect
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from jaxtyping import Num
import numpy as np


class Bucket(NamedTuple):
  """The static shape of a step.

  Attributes:
    kind: "mixed" or "decode".
    num_tokens: T; in a decode loop one token per row.
    num_rows: R.
    num_segments: S.
    num_page_indices: I.
  """

  kind: str
  num_tokens: int
  num_rows: int
  num_segments: int
  num_page_indices: int


def ladder(size: int, multiple: int) -> int:
  """The next rung at or above `size`: eight to each power of two, all multiples of `multiple`.

  Jobs that differ little so ask for the same shapes, at no more than an eighth of padding.
  """
  step = max(multiple, 1 << max(0, (size - 1).bit_length() - 4))
  return -(-size // step) * step


def solve_buckets(
    sizes: Num[np.ndarray, "n"] | Sequence[int],
    counts: Num[np.ndarray, "n"] | Sequence[float],
    *,
    candidates: Collection[int],
    lasts: Collection[int],
    max_buckets: int,
    step_cost_fn: Callable[[int], float],
    compile_cost_fn: Callable[[int], float],
) -> tuple[float, tuple[int, ...]]:
  """The bucket sizes that minimise padded work plus compile time, exactly.

  Minimises sum_i counts[i] * step_cost_fn(bucket of sizes[i]) + the sum of compile_cost_fn
  over the buckets, by a dynamic program over the candidates: O(max_buckets *
  candidates^2) in numpy. Ties take fewer buckets. A step larger than the last
  bucket is cut into several that fill it.

  Args:
    sizes: how large steps are expected to be, at least 1, at most the largest candidate.
    counts: how often, in the same order; fractions are welcome.
    candidates: sizes that buckets may have.
    lasts: those of them that may be the last bucket.
    max_buckets: most buckets, at least 1.
    step_cost_fn: seconds of a step of that size; must not fall with size.
    compile_cost_fn: seconds until a bucket of that size can run.

  Returns:
    The minimum, and ascending bucket sizes.

  Raises:
    ValueError: a size is larger than all candidates, a size or max_buckets is below 1, or no
      candidate may be the last.
  """
  sizes = np.asarray(sizes)
  if max_buckets < 1:
    raise ValueError(f"max_buckets must be at least 1, got {max_buckets}")
  buckets = np.unique(np.array(list(candidates), np.int64))
  if len(sizes) and not (1 <= sizes.min() and sizes.max() <= buckets[-1]):
    raise ValueError(f"sizes lie in [{sizes.min()}, {sizes.max()}], outside [1, {buckets[-1]}]")
  may_be_last = np.isin(buckets, list(lasts))
  if not may_be_last.any():
    raise ValueError(f"none of the candidates {buckets.tolist()} is in lasts={sorted(lasts)}")
  weight = np.bincount(np.searchsorted(buckets, sizes), counts, len(buckets)).astype(float)
  before = np.append(0.0, np.cumsum(weight))
  step_costs = [step_cost_fn(int(size)) for size in buckets]
  compile_costs = [compile_cost_fn(int(size)) for size in buckets]
  # rest[i - 1]: cost of all that is larger than candidate i, cut to it.
  rest = np.array([cost * (weight[i:] * -(-buckets[i:] // buckets[i - 1])).sum()
                   for i, cost in enumerate(step_costs, start=1)])

  # best[i]: least cost of everything in the first i candidates, the last of them a bucket.
  best = np.append(0.0, np.full(len(buckets), np.inf))
  choices, totals, ends = [], [], []
  for _ in range(min(max_buckets, len(buckets))):
    grown = np.full(len(buckets) + 1, np.inf)
    choice = np.zeros(len(buckets) + 1, np.int64)
    for i, step_cost in enumerate(step_costs, start=1):
      costs = best[:i] + step_cost * (before[i] - before[:i])
      choice[i] = costs.argmin()
      grown[i] = costs[choice[i]] + compile_costs[i - 1]
    best = grown
    choices.append(choice)
    complete = np.where(may_be_last, best[1:] + rest, np.inf)
    ends.append(int(np.argmin(complete)) + 1)
    totals.append(complete[ends[-1] - 1])
  num = int(np.argmin(totals))
  chosen, end = [], ends[num]
  for choice in choices[:num + 1][::-1]:
    chosen.append(int(buckets[end - 1]))
    end = choice[end]
  return float(totals[num]), tuple(chosen[::-1])


def pick(buckets: Sequence[int], size: int) -> int:
  """The smallest bucket that holds `size`.

  Raises:
    ValueError: none does.
  """
  index = bisect.bisect_left(buckets, size)
  if index == len(buckets):
    raise ValueError(f"size {size} exceeds the largest bucket {buckets[-1]}")
  return buckets[index]
