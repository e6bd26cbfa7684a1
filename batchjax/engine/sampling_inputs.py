"""SamplingParams as arrays: what a job's sampling needs, and the rows of each step."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from batchjax.types import SamplingInputs, SamplingParams, StopTable

# What penalties know of a token in a row: this bit says that the prompt holds it, the others how often it
# was generated.
IN_PROMPT = 1 << 15
MAX_COUNT = IN_PROMPT - 1


@dataclasses.dataclass(frozen=True)
class SamplingFeatures:
  """What the sampling of a job uses, so that nothing else is compiled.

  Attributes:
    greedy_only: every row takes the most likely token.
    any_greedy: some row does.
    max_top_k: no row's `top_k` is larger (a power of two, so that similar jobs
      share compiled steps); 0 without top-k.
    top_p, min_p: some row draws with them.
    penalties: some row has a presence, frequency or repetition penalty.
    num_bias: room for the `logit_bias` entries of a row (a power of two, or 0).
    min_tokens: some row has a least length.
    num_stop_ids: room for the tokens that end a row, the model's own included (likewise).
    stop_strings: some row ends at strings.
    logprobs: some row returns the log-probabilities of its tokens.
    num_top_logprobs: most alternatives that a row returns per token.
    prompt_logprobs: some row returns the log-probabilities of its prompt.

  >>> params = batchjax.SamplingParams(top_k=5), batchjax.SamplingParams(temperature=0.0)
  >>> features = batchjax.SamplingFeatures.of(params, eos_token_ids=(2,))
  >>> features.any_greedy, features.greedy_only, features.max_top_k
  (True, False, 16)
  """

  greedy_only: bool = True
  any_greedy: bool = False
  max_top_k: int = 0
  top_p: bool = False
  min_p: bool = False
  penalties: bool = False
  num_bias: int = 0
  min_tokens: bool = False
  num_stop_ids: int = 0
  stop_strings: bool = False
  logprobs: bool = False
  num_top_logprobs: int = 0
  prompt_logprobs: bool = False

  @property
  def truncate(self) -> bool:
    """Some row draws from a part of the vocabulary."""
    return self.max_top_k > 0 or self.top_p or self.min_p

  @classmethod
  def of(cls, params: Iterable[SamplingParams],
         eos_token_ids: Sequence[int]) -> "SamplingFeatures":
    """The features that `params` need together; those of no params are the defaults."""
    kinds = {_features_of_one(p, eos_token_ids) for p in params}
    return functools.reduce(cls.union, kinds, cls())

  def union(self, other: "SamplingFeatures") -> "SamplingFeatures":
    """The features that serve the rows of both."""
    mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
    merged = {name: max(mine[name], theirs[name]) for name in mine}
    merged["greedy_only"] = self.greedy_only and other.greedy_only
    return SamplingFeatures(**merged)


class SamplingTable:
  """The sampling settings of every device slot, packed once when a row enters its slot.

  A step's inputs are then one fancy index per field. The last row of each
  array is harmless padding (greedy, one token long); slot -1 selects it.

  Attributes:
    rows: the settings of all slots, [max_rows + 1, ...].

  >>> params = batchjax.SamplingParams(temperature=0.5, seed=7)
  >>> table = batchjax.SamplingTable(4, batchjax.SamplingFeatures.of([params], ()), ())
  >>> table.set(2, params, sample_index=0)
  >>> table.gather(np.array([2, -1])).seed.tolist()
  [7, 0]
  """

  def __init__(self, max_rows: int, features: SamplingFeatures, eos_token_ids: Sequence[int],
               stop_table: StopTable | None = None):
    self._features = features
    self._eos_token_ids = tuple(eos_token_ids)
    self._automata = {} if stop_table is None else stop_table.automaton
    self._gathered: tuple[np.ndarray, SamplingInputs] | None = None  # what was last asked for
    self._served: set[SamplingFeatures] = set()  # those that were found among `features`

    def full(value, dtype, width=()):
      return np.full((max_rows + 1, *width), value, dtype)

    self.rows = SamplingInputs(
      temperature=full(0, np.float32), top_p=full(1, np.float32), min_p=full(0, np.float32),
      top_k=full(-1, np.int32), seed=full(0, np.uint32), sample_index=full(0, np.int32),
      min_tokens=full(0, np.int32), max_tokens=full(1, np.int32),
      presence_penalty=full(0, np.float32), frequency_penalty=full(0, np.float32),
      repetition_penalty=full(1, np.float32),
      bias_ids=full(-1, np.int32, (features.num_bias,)),
      bias_values=full(0, np.float32, (features.num_bias,)),
      stop_ids=full(-1, np.int32, (features.num_stop_ids,)), automaton=full(-1, np.int32))

  def set(self, slot: int, params: SamplingParams, sample_index: int) -> None:
    """Packs one sample of a request into `slot`.

    Raises:
      IndexError: `slot` is not a slot.
      ValueError: `params` need more than the table's features, or stop
        strings that the stop table lacks.
    """
    rows, self._gathered = self.rows, None
    if not 0 <= slot < len(rows.seed) - 1:
      raise IndexError(f"slot {slot} is not among the {len(rows.seed) - 1} slots of the table")
    needed = _features_of_one(params, self._eos_token_ids)
    if needed not in self._served and self._features.union(needed) != self._features:
      raise ValueError(f"slot {slot}: the sampling parameters need {needed}, the table was made "
                       f"for {self._features}; build it from the features of all requests")
    self._served.add(needed)
    if params.stop and params.stop not in self._automata:
      raise ValueError(f"slot {slot}: no automaton for stop={params.stop!r} in the stop table; "
                       "build that from all requests")
    for name in ("temperature", "top_p", "min_p", "top_k", "seed", "min_tokens", "max_tokens",
                 "presence_penalty", "frequency_penalty", "repetition_penalty"):
      getattr(rows, name)[slot] = getattr(params, name)
    rows.sample_index[slot] = sample_index
    rows.bias_ids[slot], rows.bias_values[slot] = -1, 0
    for i, (token, bias) in enumerate(params.logit_bias):
      rows.bias_ids[slot, i], rows.bias_values[slot, i] = token, bias
    stop_ids = _stop_ids(params, self._eos_token_ids)
    rows.stop_ids[slot] = -1
    rows.stop_ids[slot, :len(stop_ids)] = stop_ids
    rows.automaton[slot] = self._automata[params.stop] if params.stop else -1

  def gather(self, slots: np.ndarray) -> SamplingInputs:
    """The settings of the rows in `slots` (i32[R], -1 is padding), in arrays that stay as they are.

    A decode loop that continues the last one gets the same arrays again.
    """
    if self._gathered is None or not np.array_equal(self._gathered[0], slots):
      self._gathered = slots, SamplingInputs(*(field[slots] for field in self.rows))
    return self._gathered[1]


def pack_sampling(params: Sequence[SamplingParams], sample_indices: Sequence[int] | np.ndarray,
                  features: SamplingFeatures, eos_token_ids: Sequence[int],
                  stop_table: StopTable | None, num_rows: int) -> SamplingInputs:
  """Packs rows at once, padded to `num_rows`; a running engine keeps a SamplingTable instead.

  Raises:
    ValueError: more rows than `num_rows`, or what `SamplingTable.set` refuses.

  >>> params = batchjax.SamplingParams(temperature=0.5)
  >>> features = batchjax.SamplingFeatures.of([params], eos_token_ids=())
  >>> batchjax.pack_sampling([params], [0], features, (), None, num_rows=2).temperature.tolist()
  [0.5, 0.0]
  """
  if len(params) > num_rows:
    raise ValueError(f"{len(params)} rows do not fit num_rows={num_rows}")
  table = SamplingTable(len(params), features, eos_token_ids, stop_table)
  for slot, (row, sample_index) in enumerate(zip(params, sample_indices, strict=True)):
    table.set(slot, row, sample_index)
  slots = np.full(num_rows, -1)
  slots[:len(params)] = np.arange(len(params))
  return table.gather(slots)


def _features_of_one(params: SamplingParams, eos_token_ids: Sequence[int]) -> SamplingFeatures:
  # Truncation leaves the most likely token in place, so greedy rows need none.
  greedy = bool(np.float32(params.temperature) == 0)
  top_k = 0 if greedy or params.top_k < 0 else params.top_k
  return SamplingFeatures(
    greedy_only=greedy, any_greedy=greedy,
    max_top_k=1 << max(4, (top_k - 1).bit_length()) if top_k else 0,
    top_p=not greedy and params.top_p < 1, min_p=not greedy and params.min_p > 0,
    penalties=(params.presence_penalty, params.frequency_penalty,
               params.repetition_penalty) != (0, 0, 1),
    num_bias=_rung(len(params.logit_bias)), min_tokens=params.min_tokens > 0,
    num_stop_ids=_rung(len(_stop_ids(params, eos_token_ids))), stop_strings=bool(params.stop),
    logprobs=params.logprobs,
    num_top_logprobs=params.top_logprobs, prompt_logprobs=params.prompt_logprobs)


def _rung(count: int) -> int:
  """The next power of two, 0 for none."""
  return 1 << (count - 1).bit_length() if count else 0


def _stop_ids(params: SamplingParams, eos_token_ids: Sequence[int]) -> list[int]:
  own = () if params.ignore_eos else eos_token_ids
  return sorted({*own, *params.stop_token_ids})
