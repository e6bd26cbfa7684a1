"""Which page of the KV pool holds what: allocation on the host, numpy only."""

from typing import TypeVar

from jaxtyping import Int
import numpy as np

Tokens = TypeVar("Tokens", int, np.ndarray)


def pages_for(num_tokens: Tokens, page_size: int) -> Tokens:
  """Pages that a run of tokens fills; every run begins on a page of its own."""
  return -(-num_tokens // page_size)


class PageTable:
  """The free list of the pool, and for each page the run that holds it. The scheduler is its only user.

  A run is the consecutive KV of one tree node or one row, in pages of its own.
  A shared prefix is one run, so sharing needs no reference count here: the
  scheduler closes the run after the last row below it. Runs are numbers, and
  every method takes many of them, each once.

  Attributes:
    num_free: pages that no run holds.
    kv_len: i64[runs], tokens written by the steps dispatched so far.
    num_held: i64[runs], pages held; the last one may be partly filled.
  """

  def __init__(self, num_pages: int, page_size: int, num_runs: int):
    self.num_pages = num_pages
    self.page_size = page_size
    self.num_free = num_pages
    self.kv_len = np.zeros(num_runs, np.int64)
    self.num_held = np.zeros(num_runs, np.int64)
    self._free = np.arange(num_pages - 1, -1, -1)  # a stack, top at the end
    self._run_of_page = np.full(num_pages, -1)  # -1: free
    self._index_in_run = np.zeros(num_pages, np.int64)
    self._place = np.empty(num_pages, np.int64)  # of `page_lists`: fresh memory would cost most of its time

  @property
  def free_pages(self) -> list[int]:
    """The pages that no run holds, in no order."""
    return self._free[:self.num_free].tolist()

  def missing(self, runs: Int[np.ndarray, "n"], kv_lens: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Pages that each run lacks to hold `kv_lens` tokens."""
    return np.maximum(pages_for(kv_lens, self.page_size) - self.num_held[runs], 0)

  def grow(self, runs: Int[np.ndarray, "n"], kv_lens: Int[np.ndarray, "n"]) -> None:
    """Gives each run the pages for `kv_lens` tokens and counts them as written.

    Raises:
      MemoryError: the pool has too few free pages; nothing changed.
    """
    missing = self.missing(runs, kv_lens)
    total = int(missing.sum())
    if total > self.num_free:
      raise MemoryError(f"{total} KV pages needed, {self.num_free} of {self.num_pages} free")
    if total:
      taken = self._free[self.num_free - total:self.num_free][::-1]
      self._run_of_page[taken] = np.repeat(runs, missing)
      # The first new page of a run is number `num_held` of it.
      first = self.num_held[runs] - (np.cumsum(missing) - missing)
      self._index_in_run[taken] = np.repeat(first, missing) + np.arange(total)
      self.num_held[runs] += missing
      self.num_free -= total
    self.kv_len[runs] = kv_lens

  def close(self, runs: Int[np.ndarray, "n"]) -> None:
    """Takes the pages of `runs` back."""
    if not len(runs):
      return
    closed = np.zeros(len(self.kv_len) + 1, bool)  # the last one is -1, which holds the free pages
    closed[runs] = True
    pages = np.flatnonzero(closed[self._run_of_page])
    self._free[self.num_free:self.num_free + len(pages)] = pages
    self._run_of_page[pages] = -1
    self.num_free += len(pages)
    self.num_held[runs] = self.kv_len[runs] = 0

  def page_lists(self, runs: Int[np.ndarray, "n"]) -> tuple[Int[np.ndarray, "I"],
                                                             Int[np.ndarray, "runs"]]:
    """The pages of `runs`, one list behind the other, and where the list of each run begins.

    Returns:
      The pages, and the starts by run: i64[runs], their number for those that are not listed.
    """
    held = self.num_held[runs]
    total = int(held.sum())
    starts = np.full(len(self.kv_len) + 1, total)  # the last one is -1, which holds the free pages
    starts[runs] = np.cumsum(held) - held
    place = self._place
    np.take(starts, self._run_of_page, out=place, mode="wrap")
    np.add(place, self._index_in_run, out=place)
    np.minimum(place, total, out=place)  # pages that are not listed go behind the others
    pages = np.empty(total + 1, np.int32)
    pages[place] = np.arange(self.num_pages, dtype=np.int32)
    return pages[:total], starts[:-1]

  def check_integrity(self) -> None:
    """Raises AssertionError unless every page is free or at one place of one run, and all are there."""
    free = self._free[:self.num_free]
    assert len(np.unique(free)) == len(free), "a page is free twice"
    assert np.array_equal(np.sort(free), np.flatnonzero(self._run_of_page < 0)), "a free page is held"
    held = np.flatnonzero(self._run_of_page >= 0)
    run, index = self._run_of_page[held], self._index_in_run[held]
    assert (np.bincount(run, minlength=len(self.num_held)) == self.num_held).all(), "pages miscounted"
    assert len(np.unique(np.stack([run, index]), axis=1)[0]) == len(held), "a place is held twice"
    assert (index < self.num_held[run]).all(), "a run has a gap"
    assert (pages_for(self.kv_len, self.page_size) <= self.num_held).all(), "a run lacks pages"
