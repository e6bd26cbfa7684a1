"""One sample of one request while it runs."""

import dataclasses

import numpy as np

from batchjax.cache.page_table import Run


@dataclasses.dataclass(eq=False)
class Row:
  """One sample of one request, from admission to retirement.

  Attributes:
    seq: place in the order of the window.
    request: index of its request; `sample` which of its n samples.
    node: tree node where its prompt ends.
    own_start: position of the first token in its own run.
    max_tokens: most tokens to generate.
    slot: device slot, -1 before and after.
    run: its own KV, None before and after.
    num_computed: own tokens dispatched before decoding starts.
    num_dispatched: generated tokens, those still in flight included.
    tokens, finish: generated tokens known on the host, and how they ended (0 while going on).
  """

  seq: int
  request: int
  sample: int
  node: int
  own_start: int
  max_tokens: int
  slot: int = -1
  run: Run | None = None
  num_computed: int = 0
  num_dispatched: int = 0
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  top: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
  finish: int = 0
