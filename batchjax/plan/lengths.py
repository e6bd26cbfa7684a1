"""How long outputs get: learned while the job runs (Past-Future, section 3; Tokasaurus)."""

from jaxtyping import Int
import numpy as np

# Multiples of it, modulo 1, spread evenly however many there are.
_GOLDEN_RATIO = 0.6180339887498949
# Parts of their room that the rows of a job use at most; none is likelier than another.
_PARTS = (1.0, 0.5, 0.25)


def likely_lengths(least: Int[np.ndarray, "rows"],
                   max_tokens: Int[np.ndarray, "rows"]) -> Int[np.ndarray, "draws rows"]:
  """Final lengths to plan for, where a row is known to draw `least` to `max_tokens` and no more.

  Limits are often set without knowing the scale of the answers, so there is a draw for each of
  several scales, evenly spaced in their logarithm (Jeffreys' prior of a scale); within a draw
  lengths are spread evenly. One draw where all lengths are known.
  """
  spread = 1.0 - (np.arange(len(least)) * _GOLDEN_RATIO) % 1.0
  room = max_tokens - least
  return np.stack([least + np.ceil(room * part * spread).astype(np.int64)
                   for part in (_PARTS if room.any() else _PARTS[:1])])


class LengthPredictor:
  """Predicts the final length of a running row from the rows that finished last.

  Works on fractions of `max_tokens`, so rows with different limits inform each
  other. Before `min_history` rows have finished every row is taken to reach its
  limit, which can only admit too few rows, never too many.
  """

  def __init__(self, min_history: int = 32, max_history: int = 1024):
    self._fractions = np.empty(0)
    self._min_history, self._max_history = min_history, max_history

  def add(self, num_generated: np.ndarray, max_tokens: np.ndarray) -> None:
    """Records rows that finished, in their order."""
    teaches = max_tokens > 0
    fractions = num_generated[teaches] / max_tokens[teaches]
    self._fractions = np.append(self._fractions, fractions)[-self._max_history:]

  def predict(self, num_generated: np.ndarray, max_tokens: np.ndarray) -> np.ndarray:
    """Predicted final lengths, i64[rows]: mean plus one deviation of the longer finished rows."""
    if len(self._fractions) < self._min_history:
      return max_tokens.copy()
    done = np.sort(self._fractions)
    count = np.arange(len(done), 0, -1)
    mean = np.cumsum(done[::-1])[::-1] / count
    spread = np.sqrt(np.maximum(np.cumsum(done[::-1] ** 2)[::-1] / count - mean ** 2, 0.0))
    upper = np.append(np.minimum(mean + spread, 1.0), 1.0)
    longer = np.searchsorted(done, num_generated / np.maximum(max_tokens, 1), side="right")
    predicted = np.ceil(upper[longer] * max_tokens).astype(np.int64)
    return np.clip(predicted, np.minimum(num_generated + 1, max_tokens), max_tokens)


def peak_pages(own_lens: np.ndarray, remaining: np.ndarray, page_size: int) -> int:
  """Most pages that rows hold at once when row r grows for `remaining[r]` tokens, then leaves.

  The maximum lies at the moment before some row leaves; partly filled last
  pages are counted whole, so the figure is never too low.
  """
  if not len(own_lens):
    return 0
  order = np.argsort(-remaining, kind="stable")
  held = np.cumsum(own_lens[order] + page_size - 1)
  grown = np.arange(1, len(order) + 1) * remaining[order]
  return int(-(-(held + grown).max() // page_size))
