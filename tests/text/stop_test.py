"""Stop tables against looking for the strings in the text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchjax.text import build_stop_table, cut, load_tokenizer
from batchjax.text import stop as stop_lib
from batchjax.text.stop import StopBudget


def first_complete(token_ids, stops, token_bytes):
  """The index of the token within which a stop string ends first, by looking; -1 for none."""
  for end in range(len(token_ids)):
    text = b"".join(token_bytes[i] for i in token_ids[:end + 1])
    if any(stop.encode() in text for stop in stops):
      return end
  return -1


def first_in_table(token_ids, table, stop):
  start, state = table.automaton[stop], 0
  for index, token_id in enumerate(token_ids):
    state = table.transitions[start + state, token_id]
    if state == -1:
      return index
  return -1


# Few letters, one of them of two bytes, so that strings overlap in every way.
letters = st.text("abé", min_size=1, max_size=5)
vocabularies = st.lists(st.text("abé", max_size=4).map(str.encode)
                        | st.binary(max_size=2), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), token_bytes=vocabularies,
       stops=st.lists(st.lists(letters, min_size=1, max_size=4).map(tuple), min_size=1, max_size=3))
def test_table_equals_searching_the_text(data, token_bytes, stops):
  table = build_stop_table(stops, token_bytes)
  ids = data.draw(st.lists(st.integers(0, len(token_bytes) - 1), max_size=20))
  for stop in stops:
    found = first_in_table(ids, table, stop)
    assert found == first_complete(ids, stop, token_bytes)


@settings(max_examples=300)
@given(text=st.text("abc", max_size=20), stops=st.lists(st.text("abc", min_size=1, max_size=4)))
def test_cut_equals_reading_letter_by_letter(text, stops):
  for end in range(1, len(text) + 1):
    if complete := [stop for stop in stops if text[:end].endswith(stop)]:
      assert cut(text, stops) == text[:end - max(map(len, complete))]
      assert cut(text[:end], stops) == cut(text, stops)
      return
  assert cut(text, stops) == text


def test_layout():
  table = build_stop_table([("ab",), (), ("c", "abc"), ("ab",), ("c",)], [b"a", b"b", b"xab!", b""])
  assert table.transitions.dtype == np.int16
  assert table.automaton == {("ab",): 0, ("c", "abc"): 2, ("c",): 2}
  # From the start and from "a": tokens a, b, xab! (complete, though a byte follows), nothing.
  # No automaton takes more rows than it has states.
  np.testing.assert_array_equal(table.transitions,
                                [[1, 0, -1, 0], [1, -1, -1, 1], [0, 0, 0, 0]])


def test_a_stop_string_split_inside_a_character():
  token_bytes = [b"\xf0\x9f", b"\x98\x80", b"\x98\x81"]
  table = build_stop_table([("😀",)], token_bytes)
  assert first_in_table([0, 1], table, ("😀",)) == 1
  assert first_in_table([0, 2, 0, 1], table, ("😀",)) == 3


def test_real_tokens(byte_level_folder):
  tokenizer = load_tokenizer(byte_level_folder)
  token_bytes = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
  table = build_stop_table([("\n\nthe", "Paris,")], token_bytes)
  for text, expected in [("the capital is Paris, the", "the capital is "), ("a\n\n\nthe b", "a\n"),
                         ("Pari s,", "Pari s,")]:
    ids = tokenizer.encode(text)
    index = first_in_table(ids, table, ("\n\nthe", "Paris,"))
    assert (index >= 0) == (expected != text)
    kept = ids[:index + 1] if index >= 0 else ids
    assert cut(tokenizer.decode(kept), ("\n\nthe", "Paris,")) == expected


def test_no_stop_strings():
  table = build_stop_table([(), ()], [b"a", b"b"])
  assert table.transitions.shape == (0, 2)
  assert table.automaton == {}


def test_what_cannot_be_built():
  with pytest.raises(ValueError, match="stop string is empty"):
    build_stop_table([("a", "")], [b"a"])
  with pytest.raises(ValueError, match="would take 62000 bytes .* more than 61999: use fewer"):
    build_stop_table([("a" * 30,), ("b",)], [b"a"] * 1000, max_bytes=61_999)
  for length in (40_000, 400_000):
    with pytest.raises(ValueError, match="32767"):
      build_stop_table([("a" * length,)], [b"a"])


def test_a_budget_refuses_the_strings_that_are_too_much_and_takes_later_ones():
  budget = StopBudget(vocab_size=10, max_bytes=100)  # five states
  budget.add(("abc",))
  with pytest.raises(ValueError, match="120 bytes"):
    budget.add(("xyz",))
  assert budget.add(("abc", "abcd")) == budget.add(("abc",)) == (b"abc",)
  budget.add(("xy",))
  with pytest.raises(ValueError, match="120 bytes"):
    budget.add(("z",))


def test_many_automata_are_built_in_groups_and_blocks(monkeypatch):
  stops = [(a + b, c) for a in "abé" for b in "ab" for c in ("bab", "é", "aa")]
  token_bytes = [b"", *(text.encode() for text in ("a", "b", "é", "ab", "bé", "babab", "xéa"))]
  whole = build_stop_table(stops, token_bytes)
  monkeypatch.setattr(stop_lib, "_GROUP_STATES", 5)
  monkeypatch.setattr(stop_lib, "_BLOCK_PAIRS", 3)
  parts = build_stop_table(stops, token_bytes)
  np.testing.assert_array_equal(whole.transitions, parts.transitions)
  assert whole.automaton == parts.automaton
