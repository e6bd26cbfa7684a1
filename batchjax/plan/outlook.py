"""What is still to come of a window: the scheduler's state carried on, on paper; numpy only.

Unlike `simulate`, it starts in the middle of a job, and learns lengths from rows that ended or did not.
"""

import collections
import dataclasses
from typing import NamedTuple

from jaxtyping import Bool, Int
import numpy as np

# Of shares of `max_tokens`; narrow at the beginning, since many rows end long before a generous limit.
NUM_BINS = 32
_EDGES = np.linspace(0.0, 1.0, NUM_BINS + 1) ** 2
_PRIOR_ROWS = 2.0  # imagined, whose lengths are spread evenly
# Multiples of it, modulo 1, spread evenly however many there are.
_GOLDEN_RATIO = 0.6180339887498949
_MOST_WAITING = 8  # for each row that runs at once; of more a sample is taken


class Dispatch(NamedTuple):
  """Dispatches to come: `count` of them, of `num_steps` iterations with `num_tokens` tokens each."""

  kind: str
  num_tokens: int
  num_steps: int
  count: float = 1.0


@dataclasses.dataclass(frozen=True)
class Outlook:
  """Where the rows of a window stand that have to be dispatched again.

  Attributes:
    num_decoding: the first rows of the columns decode; the prompts of the others are to be computed.
    num_known: i64[rows], tokens that have come back.
    num_dispatched: i64[rows], tokens drawn once all that was dispatched has come back.
    max_tokens: i64[rows].
    is_fixed: bool[rows], ends at `max_tokens` and not before.
    ended: i64[NUM_BINS], rows that have ended, not fixed ones, by their share of `max_tokens`.
    prompt_tokens: still to be computed.
    max_rows: most rows that run at once: slots, or what the pool holds.
    max_step_tokens, max_decode_steps: of a mixed step, of a loop.
    num_in_flight: dispatches after which a row's end is seen.
  """

  num_decoding: int
  num_known: Int[np.ndarray, "rows"]
  num_dispatched: Int[np.ndarray, "rows"]
  max_tokens: Int[np.ndarray, "rows"]
  is_fixed: Bool[np.ndarray, "rows"]
  ended: Int[np.ndarray, "bins"]
  prompt_tokens: int
  max_rows: int
  max_step_tokens: int
  max_decode_steps: int
  num_in_flight: int


def bins_of(num_tokens: Int[np.ndarray, "n"], max_tokens: Int[np.ndarray, "n"]) -> Int[np.ndarray, "bins"]:
  """Counts rows by their share of `max_tokens`."""
  bins = np.searchsorted(_EDGES[1:-1], num_tokens / np.maximum(max_tokens, 1))
  return np.bincount(bins, minlength=NUM_BINS)


def predict_lengths(outlook: Outlook) -> Int[np.ndarray, "rows"]:
  """A likely length of each row, which is at least what it has; together they are spread as lengths are.

  The share of rows that end in each bin, of those that come so far, is that of rows seen (Kaplan and Meier:
  running ones count up to where they are) and of a few imagined ones, spread evenly, but none ends
  later than rows seen do at their overall rate.
  """
  share = outlook.num_known / np.maximum(outlook.max_tokens, 1)
  is_seen = (outlook.num_known > 0) & ~outlook.is_fixed
  passed = np.bincount(np.searchsorted(_EDGES[1:], share[is_seen], side="right"),
                       minlength=NUM_BINS + 1)
  num_at_risk = np.cumsum(outlook.ended[::-1])[::-1] + np.cumsum(passed[::-1])[::-1][1:]
  widths = np.diff(_EDGES)
  rate = outlook.ended.sum() / (num_at_risk @ widths + _PRIOR_ROWS)
  prior = np.maximum(widths / (1.0 - _EDGES[:-1]), 1.0 - np.exp(-rate * widths))
  hazard = (outlook.ended + _PRIOR_ROWS * prior) / (num_at_risk + _PRIOR_ROWS)
  survival = np.cumprod(np.append(1.0, 1.0 - hazard))
  survival[-1] = 0.0

  index = np.arange(len(share))
  index[outlook.num_decoding:] -= outlook.num_decoding
  target = np.interp(share, _EDGES, survival) * (1.0 - (0.5 + _GOLDEN_RATIO * index) % 1.0)
  likely = np.interp(target, survival[::-1], _EDGES[::-1]) * outlook.max_tokens
  likely = np.maximum(np.ceil(likely).astype(np.int64), outlook.num_known + 1)
  return np.where(outlook.is_fixed, outlook.max_tokens, np.minimum(likely, outlook.max_tokens))


def dispatches(outlook: Outlook) -> list[Dispatch]:
  """The dispatches that are still to be formed, in their order."""
  # [2, rows]: tokens that a row still draws, and that it is taken to be able to draw.
  left = np.stack([predict_lengths(outlook), outlook.max_tokens]) - outlook.num_dispatched
  running, waiting = left[:, :outlook.num_decoding], left[:, outlook.num_decoding:]
  running, num_waiting = running[:, running[0] > 0], waiting.shape[1]
  tokens_each = outlook.prompt_tokens / max(num_waiting, 1)
  most = min(num_waiting, _MOST_WAITING * outlook.max_rows)
  waiting = waiting[:, np.linspace(0, num_waiting - 1, most).astype(np.int64)]
  # The work left when none waits any more, about half of the rows that run, is the same, sampled or not.
  stretch = max(1.0, (num_waiting - outlook.max_rows / 2) / max(most - outlook.max_rows / 2, 1.0))
  # Rows that end before their limit keep their slots until that is seen.
  leaving = collections.deque([0] * outlook.num_in_flight)
  found = []
  while running.size or waiting.size:
    num_busy = running.shape[1] + sum(leaving)
    count = stretch if waiting.size else 1.0
    free = min(outlook.max_rows - num_busy, waiting.shape[1])
    if free > 0 or not running.size:
      room = max(outlook.max_step_tokens - num_busy, 1)
      num_new = max(1, min(free, int(room // max(tokens_each, 1.0))))
      num_steps = max(1, round(num_new * tokens_each / room))  # a long prompt takes several
      num_tokens = num_busy + max(num_new, int(min(num_new * tokens_each, room)))
      found.append(Dispatch("mixed", num_tokens, 1, count * num_steps))
      new, waiting = waiting[:, :num_new], waiting[:, num_new:]
      going = np.hstack([running - num_steps, new - 1])
    else:
      num_steps = int(min(running[1].max(), outlook.max_decode_steps))
      if waiting.size:
        num_steps = min(num_steps, max(int(running[1].min()), outlook.max_decode_steps // 4))
      found.append(Dispatch("decode", num_busy, min(num_steps, int(running[0].max())), count))
      going = running - num_steps
    running = going[:, going[0] > 0]
    leaving.append(int(((going[0] <= 0) & (going[1] > 0)).sum()))
    leaving.popleft()
  return found
