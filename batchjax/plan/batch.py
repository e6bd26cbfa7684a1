"""What one step computes, as the scheduler hands it to `pack`: complete, host side."""

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np

from batchjax.types import SamplingParams


class Entry(NamedTuple):
  """Consecutive tokens of one shared node or one row.

  Attributes:
    node: tree node that the tokens belong to or hang below; with `seq` the
      order on the flat token axis, which is a depth-first walk of the tree.
    seq: order of the row within the job window; -1 for a shared node's own tokens.
    slot: device slot of the row; -1 for a shared node's own tokens.
    first_position: absolute position of the first token.
    tokens: i32[], or None for one token that the device drew last.
    num_requeried: leading tokens whose KV is in the pool already.
    kv_start, kv_len, pages: the run that the tokens are written to, after this step.
  """

  node: int
  seq: int
  slot: int
  first_position: int
  tokens: np.ndarray | None
  num_requeried: int
  kv_start: int
  kv_len: int
  pages: np.ndarray

  @property
  def num_tokens(self) -> int:
    """Length on the flat token axis."""
    return 1 if self.tokens is None else len(self.tokens)


class SharedKV(NamedTuple):
  """The resident KV of a shared node that some entries attend to."""

  node: int
  subtree_end: int
  kv_start: int
  kv_len: int
  pages: np.ndarray


class Sample(NamedTuple):
  """One row that draws a token.

  Attributes:
    row: the scheduler's row.
    slot: its device slot.
    node, seq: the entry whose last token's logits it draws from.
    num_generated: tokens generated before this step.
    is_first: first draw since the row entered its slot.
    stop_state: stop automaton state on entry.
  """

  row: Any
  slot: int
  node: int
  seq: int
  num_generated: int
  is_first: bool
  stop_state: int


class Admission(NamedTuple):
  """A row that enters a slot: its settings, and what its penalties have to know."""

  slot: int
  request_id: str
  sampling_params: SamplingParams
  sample_index: int
  prompt_tokens: np.ndarray
  output_tokens: np.ndarray


class PromptScore(NamedTuple):
  """Prompt tokens whose log-probabilities this step computes.

  Attributes:
    node: tree node that the log-probabilities belong to.
    offset: of the first one within the node.
    entry_node, entry_seq: the entry that computes them.
    first: index within the entry of the token that precedes the first scored one.
    next_tokens: i32[], the scored tokens.
  """

  node: int
  offset: int
  entry_node: int
  entry_seq: int
  first: int
  next_tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Batch:
  """The work of one dispatch.

  Attributes:
    kind: "mixed" (one forward over decode rows and prefill chunks) or "decode"
      (a device loop of `num_steps` over decode rows).
    entries: in depth-first order of the tree.
    shared: resident shared nodes that entries attend to.
    samples: rows that draw a token.
    admissions: rows that enter a slot in this step.
    prompt_scores: prompt log-probabilities to collect.
    num_steps: iterations of the decode loop; 1 for a mixed step.
    num_tokens: tokens of all entries.
    num_prompt_tokens: of which prompt tokens, recomputed ones included.
  """

  kind: Literal["mixed", "decode"]
  entries: tuple[Entry, ...]
  shared: tuple[SharedKV, ...]
  samples: tuple[Sample, ...]
  admissions: tuple[Admission, ...]
  prompt_scores: tuple[PromptScore, ...]
  num_steps: int
  num_tokens: int
  num_prompt_tokens: int

  @property
  def entry_starts(self) -> dict[tuple[int, int], int]:
    """Flat index of the first token of each entry, by (node, seq)."""
    starts = np.cumsum([0] + [entry.num_tokens for entry in self.entries]).tolist()
    return {(entry.node, entry.seq): start for entry, start in zip(self.entries, starts)}
