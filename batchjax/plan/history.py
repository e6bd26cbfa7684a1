"""What rows have drawn so far, until they end; numpy only."""

from jaxtyping import Int
import numpy as np

_MIN_CAPACITY = 64
_DTYPES = {"tokens": np.int32, "logprobs": np.float32, "top_token_ids": np.int32,
           "top_logprobs": np.float32}


class History:
  """Tokens of rows that have not ended, and what goes with them: one line of each array per row.

  Lines are handed out when a row draws first and taken back with `pop`, so that
  there are only as many as rows draw at once, as long as the longest of them.

  Attributes:
    num_tokens: i64[rows], tokens kept of each row.
  """

  def __init__(self, num_rows: int):
    self.num_tokens = np.zeros(num_rows, np.int64)
    self._line = np.full(num_rows, -1)
    self._free_lines: list[int] = []
    self._num_lines = 0
    self._fields: dict[str, np.ndarray] = {}  # [lines, capacity, ...]

  def append(self, seqs: Int[np.ndarray, "n"], counts: Int[np.ndarray, "n"],
             **fields: np.ndarray) -> None:
    """Adds what rows drew: the first `counts` of each field [steps, n, ...]."""
    if not len(seqs):
      return
    new = seqs[self._line[seqs] < 0]
    self._line[new] = self._take_lines(len(new))
    num_steps, at = int(counts.max()), self.num_tokens[seqs]
    # What is written behind a row's last token is no harm: the next ones go there.
    line, step = self._line[seqs], np.arange(num_steps)[:, None]
    for name, values in fields.items():
      kept = self._reserve(name, int(at.max()) + num_steps, values.shape[2:])
      flat = kept.reshape(kept.shape[0] * kept.shape[1], *kept.shape[2:])
      flat[line * kept.shape[1] + at + step] = values[:num_steps]
    self.num_tokens[seqs] += counts

  def tokens(self, seq: int) -> Int[np.ndarray, "len"]:
    """The tokens that a row has drawn."""
    if not self.num_tokens[seq]:
      return np.empty(0, np.int32)
    return self._fields["tokens"][self._line[seq], :self.num_tokens[seq]].copy()

  def pop(self, seq: int, num_tokens: int) -> dict[str, np.ndarray]:
    """The first `num_tokens` of a row in all fields; the row is forgotten."""
    line = int(self._line[seq])
    self._line[seq], self.num_tokens[seq] = -1, 0
    self._free_lines.append(line)
    return {name: values[line, :num_tokens].copy() for name, values in self._fields.items()}

  def _take_lines(self, count: int) -> list[int]:
    more = max(0, count - len(self._free_lines))
    self._free_lines += range(self._num_lines + more - 1, self._num_lines - 1, -1)
    self._num_lines += more
    return [self._free_lines.pop() for _ in range(count)]

  def _reserve(self, name: str, capacity: int, width: tuple[int, ...]) -> np.ndarray:
    """The array of a field with room for all lines and `capacity` tokens each."""
    old = self._fields.get(name, np.empty((0, 0, *width), _DTYPES[name]))
    shape = self._num_lines, capacity
    if any(need > have for need, have in zip(shape, old.shape)):
      shape = [have if need <= have else max(_MIN_CAPACITY, 1 << (need - 1).bit_length())
               for need, have in zip(shape, old.shape)]
      self._fields[name] = np.empty((*shape, *width), _DTYPES[name])
      self._fields[name][:old.shape[0], :old.shape[1]] = old
    return self._fields[name]
