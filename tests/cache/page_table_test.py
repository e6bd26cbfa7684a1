"""The page table against a model of lists."""

import hypothesis
import hypothesis.stateful as stateful
import hypothesis.strategies as st
import numpy as np
import pytest

from batchjax.cache.page_table import PageTable

NUM_RUNS = 5


def ints(*values):
  return np.array(values, np.int64)


class Pages(stateful.RuleBasedStateMachine):
  """Grows and closes any runs, many at once, in any order."""

  @stateful.initialize(num_pages=st.integers(1, 12), page_size=st.integers(1, 5))
  def start(self, num_pages, page_size):
    self.table = PageTable(num_pages, page_size, NUM_RUNS)
    self.pages = {run: [] for run in range(NUM_RUNS)}  # as they were handed out

  def lists(self):
    """The page list of each run, by the table, all asked for at once."""
    flat, starts = self.table.page_lists(np.arange(NUM_RUNS))
    assert flat.dtype == np.int32
    return {run: flat[start:start + held].tolist()
            for run, (start, held) in enumerate(zip(starts, self.table.num_held))}

  @stateful.rule(more=st.dictionaries(st.integers(0, NUM_RUNS - 1), st.integers(0, 20)))
  def grow(self, more):
    runs, num_free = ints(*more), self.table.num_free
    kv_lens = self.table.kv_len[runs] + ints(*more.values())
    missing = [max(0, -(-int(kv_len) // self.table.page_size) - len(self.pages[run]))
               for run, kv_len in zip(more, kv_lens)]
    assert self.table.missing(runs, kv_lens).tolist() == missing
    if sum(missing) > num_free:
      before = self.table.kv_len.copy()
      with pytest.raises(MemoryError, match=f"{sum(missing)} KV pages needed, {num_free} of"):
        self.table.grow(runs, kv_lens)
      assert self.lists() == self.pages and (self.table.kv_len == before).all()
      return
    self.table.grow(runs, kv_lens)
    assert self.table.kv_len[runs].tolist() == kv_lens.tolist()
    assert self.table.num_free == num_free - sum(missing)
    lists = self.lists()
    for run, count in zip(more, missing):
      assert len(lists[run]) == len(self.pages[run]) + count
      assert lists[run][:len(self.pages[run])] == self.pages[run], "tokens written before moved"
      self.pages[run] = lists[run]

  @stateful.rule(which=st.sets(st.integers(0, NUM_RUNS - 1)))
  def close(self, which):
    num_free, held = self.table.num_free, sum(len(self.pages[run]) for run in which)
    self.table.close(ints(*which))
    assert self.table.num_free == num_free + held
    assert not self.table.kv_len[ints(*which)].any()
    self.pages |= {run: [] for run in which}

  @stateful.invariant()
  def is_whole(self):
    if not hasattr(self, "table"):
      return
    self.table.check_integrity()
    assert self.lists() == self.pages
    held = [page for pages in self.pages.values() for page in pages]
    assert sorted([*held, *self.table.free_pages]) == list(range(self.table.num_pages))


Pages.TestCase.settings = hypothesis.settings(max_examples=60, stateful_step_count=30,
                                              deadline=None)
TestAnySequence = Pages.TestCase


def test_grow_within_the_last_page_takes_none():
  table = PageTable(2, 4, 1)
  table.grow(ints(0), ints(3))
  table.grow(ints(0), ints(4))
  assert table.num_free == 1 and table.num_held.tolist() == [1]


def test_lists_follow_one_another_in_the_order_asked_for():
  table = PageTable(6, 1, 4)
  for run in (2, 0, 2, 3):
    table.grow(ints(run), table.kv_len[[run]] + 1)
  pages, starts = table.page_lists(ints(3, 1, 2))
  assert starts.tolist() == [3, 1, 1, 0]
  assert pages.tolist() == [3, 0, 2], "pages are handed out in order"


def test_lists_of_an_earlier_batch_are_not_changed_by_growth():
  table = PageTable(4, 1, 1)
  table.grow(ints(0), ints(1))
  handed_out, _ = table.page_lists(ints(0))
  table.grow(ints(0), ints(3))
  assert handed_out.tolist() == [0]


@pytest.mark.parametrize("spoil, message", [
    (lambda table: table._free.__setitem__(0, 0), "a free page is held"),
    (lambda table: table._free.__setitem__(0, table._free[0] - 1), "a page is free twice"),
    (lambda table: table._run_of_page.__setitem__(0, 1), "pages miscounted"),
    (lambda table: table._index_in_run.__setitem__(0, 1), "a place is held twice"),
    (lambda table: table._index_in_run.__setitem__(0, 2), "a run has a gap"),
    (lambda table: table.kv_len.__setitem__(0, 5), "a run lacks pages"),
])
def test_integrity_check_sees(spoil, message):
  table = PageTable(6, 2, 2)
  table.grow(ints(0, 1), ints(4, 1))
  table.check_integrity()
  spoil(table)
  with pytest.raises(AssertionError, match=message):
    table.check_integrity()


def test_freed_pages_are_handed_out_again():
  table = PageTable(3, 1, 2)
  table.grow(ints(0), ints(3))
  table.close(ints(0))
  table.grow(ints(1), ints(3))
  assert sorted(table.page_lists(ints(1))[0].tolist()) == [0, 1, 2]
