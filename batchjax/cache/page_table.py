"""Which page of the KV pool holds what: allocation on the host, numpy only."""

import dataclasses
from typing import TypeVar

import numpy as np

Tokens = TypeVar("Tokens", int, np.ndarray)


def pages_for(num_tokens: Tokens, page_size: int) -> Tokens:
  """Pages that a run of tokens fills; every run begins on a page of its own."""
  return -(-num_tokens // page_size)


@dataclasses.dataclass
class Run:
  """Consecutive KV of one tree node or one row, in pages of its own.

  Attributes:
    kv_start: absolute position of the first token.
    kv_len: tokens written by the steps dispatched so far.
    pages: i32[], the pages held; the last one may be partly filled.
  """

  kv_start: int
  kv_len: int
  pages: np.ndarray


class PageTable:
  """The free list of the pool. The scheduler is its only user.

  Pages are handed out and taken back by run; a shared prefix is one run, so
  sharing needs no reference count here: the scheduler frees the run after the
  last row below it.
  """

  def __init__(self, num_pages: int, page_size: int):
    self.num_pages = num_pages
    self.page_size = page_size
    self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # a stack, top at the end
    self._num_free = num_pages

  @property
  def num_free(self) -> int:
    """Pages that no run holds."""
    return self._num_free

  def open_run(self, kv_start: int) -> Run:
    """A run without pages yet."""
    return Run(kv_start, 0, np.empty(0, np.int32))

  def missing(self, run: Run, kv_len: int) -> int:
    """Pages that `run` lacks to hold `kv_len` tokens."""
    return max(0, pages_for(kv_len, self.page_size) - len(run.pages))

  def grow(self, run: Run, kv_len: int) -> None:
    """Gives `run` the pages for `kv_len` tokens and counts them as written.

    Raises:
      MemoryError: the pool has too few free pages; nothing changed.
    """
    missing = self.missing(run, kv_len)
    if missing > self._num_free:
      raise MemoryError(f"{missing} KV pages needed, {self._num_free} of {self.num_pages} free")
    if missing:
      taken = self._free[self._num_free - missing:self._num_free][::-1]
      run.pages = np.concatenate([run.pages, taken])
      self._num_free -= missing
    run.kv_len = kv_len

  def close(self, run: Run) -> None:
    """Takes the pages of `run` back."""
    self._free[self._num_free:self._num_free + len(run.pages)] = run.pages
    self._num_free += len(run.pages)
    run.pages, run.kv_len = np.empty(0, np.int32), 0

  def check_integrity(self, runs: list[Run]) -> None:
    """Raises AssertionError unless every page is free or in exactly one of `runs`."""
    held = np.concatenate([self._free[:self._num_free], *(run.pages for run in runs)])
    assert len(held) == self.num_pages, f"{len(held)} pages accounted for of {self.num_pages}"
    assert len(np.unique(held)) == self.num_pages, "a page is held twice"
    for run in runs:
      assert pages_for(run.kv_len, self.page_size) <= len(run.pages), "a run lacks pages"
