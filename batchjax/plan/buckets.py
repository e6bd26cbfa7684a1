"""The few static shapes that a job compiles, solved for from its own histogram of sizes."""

import bisect
from collections.abc import Callable, Sequence
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


def solve_buckets(
    sizes: Num[np.ndarray, "n"] | Sequence[int],
    counts: Num[np.ndarray, "n"] | Sequence[float],
    *,
    max_buckets: int,
    limit: int,
    step_cost_fn: Callable[[int], float],
    compile_cost: float,
    multiple: int = 1,
) -> tuple[int, ...]:
  """The bucket sizes that minimise padded work plus compile time, exactly.

  Minimises sum_i counts[i] * step_cost_fn(bucket of sizes[i]) + compile_cost *
  number of buckets, by a dynamic program over the distinct rounded sizes:
  O(max_buckets * sizes^2) in numpy. Ties take fewer buckets. The last bucket
  is always `limit`, so a size that the histogram missed still has a bucket.

  Args:
    sizes: how large steps are expected to be, each from 1 to `limit`.
    counts: how often, in the same order; fractions are welcome.
    max_buckets: most buckets, at least 1.
    limit: the largest size that can occur.
    step_cost_fn: seconds of a step of that size; must not fall with size.
    compile_cost: seconds that one bucket costs to compile.
    multiple: buckets are multiples of this, except for `limit`.

  Returns:
    Ascending bucket sizes, `limit` last.

  Raises:
    ValueError: a size lies outside 1 to `limit`, or max_buckets is below 1.
  """
  sizes = np.asarray(sizes)
  if max_buckets < 1:
    raise ValueError(f"max_buckets must be at least 1, got {max_buckets}")
  if len(sizes) and not (1 <= sizes.min() and sizes.max() <= limit):
    raise ValueError(f"sizes lie in [{sizes.min()}, {sizes.max()}], outside [1, {limit}]: "
                     "raise the limit or split the step")
  padded = np.minimum(-(-sizes // multiple) * multiple, limit).astype(np.int64)
  buckets, index = np.unique(np.append(padded, limit), return_inverse=True)
  weight = np.bincount(index[:-1], counts, len(buckets)).astype(float)
  before = np.append(0.0, np.cumsum(weight))
  step_costs = [step_cost_fn(int(size)) for size in buckets]

  # best[i]: least cost of everything in the first i candidates, the last of them a bucket.
  best = np.append(0.0, np.full(len(buckets), np.inf))
  choices, totals = [], []
  for _ in range(min(max_buckets, len(buckets))):
    grown = np.full(len(buckets) + 1, np.inf)
    choice = np.zeros(len(buckets) + 1, np.int64)
    for i, step_cost in enumerate(step_costs, start=1):
      costs = best[:i] + step_cost * (before[i] - before[:i])
      choice[i] = costs.argmin()
      grown[i] = costs[choice[i]]
    best = grown
    choices.append(choice)
    totals.append(best[-1] + compile_cost * len(choices))
  chosen, end = [], len(buckets)
  for choice in choices[:int(np.argmin(totals)) + 1][::-1]:
    chosen.append(int(buckets[end - 1]))
    end = choice[end]
  return tuple(chosen[::-1])


def pick(buckets: Sequence[int], size: int) -> int:
  """The smallest bucket that holds `size`.

  Raises:
    ValueError: none does.
  """
  index = bisect.bisect_left(buckets, size)
  if index == len(buckets):
    raise ValueError(f"size {size} exceeds the largest bucket {buckets[-1]}")
  return buckets[index]
