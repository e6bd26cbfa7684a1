"""What one step computes, as the scheduler hands it to `pack`: arrays, complete, host side."""

import dataclasses
from typing import Literal, NamedTuple

from jaxtyping import Bool, Int
import numpy as np

from batchjax.types import SamplingParams


@dataclasses.dataclass(frozen=True)
class Entries:
  """Consecutive tokens of one shared node or one row each, in depth-first order of the tree.

  Attributes (i64[entries] each):
    seq: the row's place in the order of the window; -1 for a shared node's own tokens.
    slot: device slot of the row; -1 for a shared node's own tokens.
    first_position: absolute position of the first token.
    num_tokens: length on the flat token axis.
    num_requeried: leading tokens whose KV is in the pool already.
    kv_start, kv_len: the run that the tokens are written to, after this step.
    page_start: where its pages begin in the batch's `page_indices`.
  """

  seq: Int[np.ndarray, "entries"]
  slot: Int[np.ndarray, "entries"]
  first_position: Int[np.ndarray, "entries"]
  num_tokens: Int[np.ndarray, "entries"]
  num_requeried: Int[np.ndarray, "entries"]
  kv_start: Int[np.ndarray, "entries"]
  kv_len: Int[np.ndarray, "entries"]
  page_start: Int[np.ndarray, "entries"]

  @property
  def offsets(self) -> Int[np.ndarray, "_"]:
    """Flat index of each entry's first token, and the number of tokens behind them."""
    return np.concatenate([[0], np.cumsum(self.num_tokens)])


@dataclasses.dataclass(frozen=True)
class SharedKV:
  """The resident KV of shared nodes that some entries attend to.

  Attributes (i64[nodes] each):
    first_entry, end_entry: the entries below the node, its own tokens included.
    kv_start, kv_len: its run.
    page_start: where its pages begin in the batch's `page_indices`.
  """

  first_entry: Int[np.ndarray, "nodes"]
  end_entry: Int[np.ndarray, "nodes"]
  kv_start: Int[np.ndarray, "nodes"]
  kv_len: Int[np.ndarray, "nodes"]
  page_start: Int[np.ndarray, "nodes"]


@dataclasses.dataclass(frozen=True)
class Samples:
  """Rows that draw a token, in the order of the window; in a decode loop row r is entry r.

  Attributes (i64[rows] where nothing is said):
    seq: the row's place in the order of the window; slot: its device slot.
    entry: the entry whose last token's logits it draws from.
    num_generated: tokens generated before this step.
    max_tokens: most tokens to generate.
    is_first: bool[rows], first draw since the row entered its slot.
    stop_state: stop automaton state on entry.
  """

  seq: Int[np.ndarray, "rows"]
  slot: Int[np.ndarray, "rows"]
  entry: Int[np.ndarray, "rows"]
  num_generated: Int[np.ndarray, "rows"]
  max_tokens: Int[np.ndarray, "rows"]
  is_first: Bool[np.ndarray, "rows"]
  stop_state: Int[np.ndarray, "rows"]


class Admission(NamedTuple):
  """A row that enters a slot: its settings, and what its penalties have to know."""

  slot: int
  request_id: str
  sampling_params: SamplingParams
  sample_index: int
  prompt_tokens: np.ndarray
  output_tokens: np.ndarray


class PromptScore(NamedTuple):
  """Prompt tokens whose log-probabilities an entry computes: those behind its tokens, one each.

  Attributes:
    node: tree node that the log-probabilities belong to.
    offset: of the first one within the node.
    entry: the entry that computes them.
    skipped: tokens of the entry before the first that scores its successor.
    next_tokens: i32[], the scored tokens.
  """

  node: int
  offset: int
  entry: int
  skipped: int
  next_tokens: np.ndarray


class SchedulerStats(NamedTuple):
  """Pages in use, rows in slots and waiting, and rows preempted so far."""

  used_pages: int
  num_running: int
  num_waiting: int
  num_preempted: int


@dataclasses.dataclass(frozen=True)
class Batch:
  """The work of one dispatch.

  Attributes:
    kind: "mixed" (one forward over decode rows and prefill chunks) or "decode"
      (a device loop of `num_steps` over decode rows).
    entries: what is computed.
    tokens: i32[T], of all entries; -1 is one that the device drew last.
    shared: resident shared nodes that entries attend to.
    samples: rows that draw a token.
    page_indices: i32[], the pages of all runs; none stands in it twice.
    admissions: rows that enter a slot in this step.
    prompt_scores: prompt log-probabilities to collect.
    num_steps: iterations of the decode loop; 1 for a mixed step.
    num_prompt_tokens: prompt tokens among `tokens`, recomputed ones included.
    stats: the scheduler while the batch runs: rows and pages that leave with it are still there.
  """

  kind: Literal["mixed", "decode"]
  entries: Entries
  tokens: Int[np.ndarray, "T"]
  shared: SharedKV
  samples: Samples
  page_indices: Int[np.ndarray, "pages"]
  admissions: tuple[Admission, ...]
  prompt_scores: tuple[PromptScore, ...]
  num_steps: int
  num_prompt_tokens: int
  stats: SchedulerStats = SchedulerStats(0, 0, 0, 0)

  @classmethod
  def empty(cls, kind: Literal["mixed", "decode"]) -> "Batch":
    """A step with nothing in it."""
    none = np.empty(0, np.int64)
    return cls(kind, Entries(*[none] * 8), none, SharedKV(*[none] * 5),
               Samples(*[none] * 5, is_first=none.astype(bool), stop_state=none), none, (), (), 1, 0)

  @property
  def num_tokens(self) -> int:
    """Tokens of one iteration."""
    return len(self.tokens)

  @property
  def num_rows(self) -> int:
    """Rows that draw a token."""
    return len(self.samples.seq)
