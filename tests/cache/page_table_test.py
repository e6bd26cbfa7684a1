"""The page table against a model of sets."""

import hypothesis
import hypothesis.stateful as stateful
import hypothesis.strategies as st
import numpy as np
import pytest

from batchjax.cache.page_table import PageTable


class Pages(stateful.RuleBasedStateMachine):
  """Opens, grows and closes runs in any order."""

  @stateful.initialize(num_pages=st.integers(1, 12), page_size=st.integers(1, 5))
  def start(self, num_pages, page_size):
    self.table = PageTable(num_pages, page_size)
    self.runs = []

  @stateful.rule(kv_start=st.integers(0, 100))
  def open(self, kv_start):
    run = self.table.open_run(kv_start)
    assert (run.kv_start, run.kv_len, len(run.pages)) == (kv_start, 0, 0)
    self.runs.append(run)

  @stateful.precondition(lambda self: self.runs)
  @stateful.rule(which=st.integers(0, 99), more=st.integers(0, 20))
  def grow(self, which, more):
    run = self.runs[which % len(self.runs)]
    kv_len, before, num_free = run.kv_len + more, run.pages.tolist(), self.table.num_free
    missing = max(0, -(-kv_len // self.table.page_size) - len(before))
    assert self.table.missing(run, kv_len) == missing
    if missing > num_free:
      with pytest.raises(MemoryError, match=f"{missing} KV pages needed, {num_free} of"):
        self.table.grow(run, kv_len)
      assert run.pages.tolist() == before and run.kv_len == kv_len - more
    else:
      self.table.grow(run, kv_len)
      assert run.pages[:len(before)].tolist() == before, "tokens written before moved"
      assert len(run.pages) == len(before) + missing and run.kv_len == kv_len
      assert self.table.num_free == num_free - missing

  @stateful.precondition(lambda self: self.runs)
  @stateful.rule(which=st.integers(0, 99))
  def close(self, which):
    run = self.runs.pop(which % len(self.runs))
    num_free, held = self.table.num_free, len(run.pages)
    self.table.close(run)
    assert self.table.num_free == num_free + held
    assert run.kv_len == 0 and not len(run.pages)

  @stateful.invariant()
  def is_whole(self):
    if not hasattr(self, "table"):
      return
    self.table.check_integrity(self.runs)
    pages = [page for run in self.runs for page in run.pages.tolist()]
    assert len(set(pages)) == len(pages) == self.table.num_pages - self.table.num_free
    assert set(pages) <= set(range(self.table.num_pages))


Pages.TestCase.settings = hypothesis.settings(max_examples=60, stateful_step_count=30,
                                              deadline=None)
TestAnySequence = Pages.TestCase


def test_grow_within_the_last_page_takes_none():
  table = PageTable(2, 4)
  run = table.open_run(0)
  table.grow(run, 3)
  table.grow(run, 4)
  assert table.num_free == 1 and len(run.pages) == 1


def test_pages_of_an_earlier_batch_are_not_changed_by_growth():
  table = PageTable(4, 1)
  run = table.open_run(0)
  table.grow(run, 1)
  handed_out = run.pages
  table.grow(run, 3)
  assert len(handed_out) == 1


def _run(table, kv_len):
  run = table.open_run(0)
  table.grow(run, kv_len)
  return run


@pytest.mark.parametrize("spoil, message", [
    (lambda table, runs: runs.pop(), "3 pages accounted for of 4"),
    (lambda table, runs: runs[0].pages.__setitem__(0, runs[1].pages[0]), "held twice"),
    (lambda table, runs: setattr(runs[0], "kv_len", 3), "a run lacks pages"),
])
def test_integrity_check_sees(spoil, message):
  table = PageTable(4, 2)
  runs = [_run(table, 2), _run(table, 1)]
  table.check_integrity(runs)
  spoil(table, runs)
  with pytest.raises(AssertionError, match=message):
    table.check_integrity(runs)


def test_freed_pages_are_handed_out_again():
  table = PageTable(3, 1)
  first = _run(table, 3)
  table.close(first)
  second = _run(table, 3)
  assert sorted(second.pages.tolist()) == [0, 1, 2]
  assert second.pages.dtype == np.int32
