"""What rows have drawn, against lists."""

import hypothesis
import hypothesis.stateful as stateful
import hypothesis.strategies as st
import numpy as np

from batchjax.plan.history import History

NUM_ROWS, MAX_STEPS, NUM_TOP = 6, 5, 2


class Rows(stateful.RuleBasedStateMachine):
  """Rows draw together and end in any order, and may come back."""

  def __init__(self):
    super().__init__()
    self.history = History(NUM_ROWS)
    self.drawn = {seq: [] for seq in range(NUM_ROWS)}
    self.next_token = 0

  @stateful.rule(counts=st.dictionaries(st.integers(0, NUM_ROWS - 1), st.integers(0, MAX_STEPS)),
                 more=st.sampled_from([1, 1, 30]))
  def append(self, counts, more):
    counts = {seq: more * count for seq, count in counts.items()}
    tokens = np.full((more * MAX_STEPS, len(counts)), -1, np.int32)
    for column, (seq, count) in enumerate(counts.items()):
      new = list(range(self.next_token, self.next_token + count))
      self.drawn[seq] += new
      self.next_token += count
      tokens[:count, column] = new
    self.history.append(np.array([*counts], int), np.array([*counts.values()], int), tokens=tokens,
                        logprobs=tokens / 2, top_logprobs=np.stack([tokens] * NUM_TOP, axis=2) / 4)

  @stateful.precondition(lambda self: any(self.drawn.values()))
  @stateful.rule(which=st.integers(0, 99), left_out=st.integers(0, 1))
  def pop(self, which, left_out):
    seqs = [seq for seq, drawn in self.drawn.items() if drawn]
    seq = seqs[which % len(seqs)]
    tokens = np.array(self.drawn[seq][:len(self.drawn[seq]) - left_out], np.int32)
    got = self.history.pop(seq, len(tokens))
    assert got["tokens"].tolist() == tokens.tolist()
    assert got["logprobs"].tolist() == (tokens / 2).tolist()
    assert got["top_logprobs"].tolist() == np.stack([tokens / 4] * NUM_TOP, axis=1).tolist()
    assert got["tokens"].dtype == np.int32 and got["logprobs"].dtype == np.float32
    self.drawn[seq] = []

  @stateful.invariant()
  def is_whole(self):
    for seq, drawn in self.drawn.items():
      assert self.history.num_tokens[seq] == len(drawn)
      assert self.history.tokens(seq).tolist() == drawn


Rows.TestCase.settings = hypothesis.settings(max_examples=40, stateful_step_count=20, deadline=None)
TestAnySequence = Rows.TestCase


def test_what_was_taken_out_is_not_written_over():
  history, row = History(2), np.array([0])
  history.append(row, np.array([2]), tokens=np.array([[4], [5]], np.int32))
  taken = history.pop(0, 2)["tokens"]
  history.append(row + 1, np.array([2]), tokens=np.array([[6], [7]], np.int32))
  assert taken.tolist() == [4, 5]
