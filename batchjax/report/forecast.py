"""How long a job still takes: the dispatches to come, by the times of those that were measured."""

from collections.abc import Iterable, Mapping, Sequence

from batchjax.plan.outlook import Dispatch, dispatches, Outlook

# What the newest dispatch of a shape weighs in the mean of its times.
_NEWEST_WEIGHT = 0.25


class Forecast:
  """Times of the shapes of a job: foretold, then measured.

  A shape that was not measured yet takes what was foretold for it, times the ratio of measured to
  foretold of the shapes of its kind.
  """

  def __init__(self):
    self._foretold: dict[tuple[str, int], float] = {}
    self._measured: dict[tuple[str, int], float] = {}

  def foretell(self, step_secs: Mapping[tuple[str, int], float]) -> None:
    """Takes seconds of one iteration, by kind and tokens of the shape; later ones go before."""
    self._foretold |= step_secs

  def measure(self, kind: str, num_tokens: int, num_steps: int, secs: float) -> None:
    """Takes the time of a dispatch of the shape of that many tokens."""
    each, shape = secs / max(num_steps, 1), (kind, num_tokens)
    before = self._measured.get(shape, each)
    self._measured[shape] = before + _NEWEST_WEIGHT * (each - before)

  def secs(self, coming: Iterable[Dispatch]) -> float:
    """Seconds of dispatches to come; a mixed step larger than every shape is cut."""
    sizes = {kind: sorted(size for k, size in self._foretold if k == kind)
             for kind in ("mixed", "decode")}
    total = 0.0
    for kind, num_tokens, num_steps, count in coming:
      if sizes[kind]:
        size = next((size for size in sizes[kind] if size >= num_tokens), sizes[kind][-1])
        total += count * num_steps * max(1, -(-num_tokens // size)) * self._step_secs(kind, size)
    return total

  def secs_left(self, outlook: Outlook, in_flight: Sequence[Dispatch]) -> float:
    """Seconds until the last row of the outlook has come back."""
    return self.secs([*in_flight, *dispatches(outlook)])

  def _step_secs(self, kind: str, size: int) -> float:
    if (kind, size) in self._measured:
      return self._measured[kind, size]
    same = [shape for shape in self._measured if shape[0] == kind and shape in self._foretold]
    ratio = (sum(self._measured[shape] for shape in same)
             / sum(self._foretold[shape] for shape in same)) if same else 1.0
    return ratio * self._foretold[kind, size]
