"""Stop strings: automata over tokens for the device, and the cut of the text on the host."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int16, Int32, UInt8

from batchjax.types import StopTable

_MAX_STATES = np.iinfo(np.int16).max


def build_stop_table(stops: Iterable[tuple[str, ...]], token_bytes: Sequence[bytes],
                     max_bytes: int = 512 << 20) -> StopTable:
  """Automata that see a stop string while it is generated, across token borders too.

  Each distinct set of stop strings becomes an automaton over UTF-8 bytes (Aho
  and Corasick, CACM 18(6), 1975), run through every token from every state. A
  transition of -1 says that a stop string ends within the token, whatever
  bytes follow it there.

  Args:
    stops: the stop strings of each request; empty tuples are passed over.
    token_bytes: for each of the V ids of the model, the bytes it adds to the
      text; b"" leaves the state alone.
    max_bytes: largest table to build.

  Returns:
    transitions i16[U, states, V] (U = 0 when no request has stop strings), and
    the index of each tuple. Tuples that stop at the same place share an automaton.

  Raises:
    ValueError: a stop string is empty, or the table would exceed `max_bytes`.
  """
  tuples = list(dict.fromkeys(stop for stop in stops if stop))
  if any("" in strings for strings in tuples):
    raise ValueError("a stop string is empty: it would end every sample at once; leave it out")
  sets = list(dict.fromkeys(_shortest(stop) for stop in tuples))
  automata = [_byte_automaton([string.encode() for string in strings]) for strings in sets]

  num_states = max((len(automaton) for automaton in automata), default=1)
  num_bytes = 2 * len(sets) * num_states * len(token_bytes)
  if num_bytes > max_bytes or num_states > _MAX_STATES:
    longest = max(sets, key=lambda strings: sum(map(len, strings)))
    raise ValueError(
        f"the stop table of {len(sets)} distinct stop lists, {num_states} states and "
        f"{len(token_bytes)} tokens would take {num_bytes} bytes, more than {max_bytes} (or more "
        f"than {_MAX_STATES} states): use fewer distinct stop lists or shorter strings (the "
        f"longest list is {longest!r}), split the job, or raise max_bytes")
  transitions = np.zeros((len(sets), num_states, len(token_bytes)), np.int16)
  rows = _bytes_by_position(token_bytes)
  for index, automaton in enumerate(automata):
    _lift_to_tokens(automaton, rows, transitions[index, :len(automaton)])
  index_of = {strings: index for index, strings in enumerate(sets)}
  return StopTable(transitions, {stop: index_of[_shortest(stop)] for stop in tuples})


def cut(text: str, stops: Iterable[str]) -> str:
  """The text before the stop string that is complete first; all of it where there is none.

  Of several that end at the same place the longest counts. So text behind the
  place where a sample stopped, in the same token, changes nothing.
  """
  found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
  return text[:min(found)[1]] if found else text


def _shortest(stops: tuple[str, ...]) -> tuple[str, ...]:
  """The strings, sorted, less those that hold another one, which is always complete first."""
  return tuple(sorted(stop for stop in set(stops)
                      if not any(other in stop for other in stops if other != stop)))


def _byte_automaton(strings: Sequence[bytes]) -> Int32[np.ndarray, "states 256"]:
  """Next state for each state and byte; -1 once a string is complete."""
  children: list[dict[int, int]] = [{}]
  ends = [False]
  for string in strings:
    state = 0
    for byte in string:
      if byte not in children[state]:
        children[state][byte] = len(children)
        children.append({})
        ends.append(False)
      state = children[state][byte]
    ends[state] = True

  # Breadth first: a state falls back to a shorter suffix, whose row is complete already.
  table = np.zeros((len(children), 256), np.int32)
  fallback = [0] * len(children)
  queue = [0]
  for state in queue:
    ends[state] |= ends[fallback[state]]
    if state:
      table[state] = table[fallback[state]]
    for byte, child in children[state].items():
      fallback[child] = int(table[state, byte])
      table[state, byte] = child
      queue.append(child)

  # States in which a string is complete leave the table: they are -1.
  goes_on = ~np.array(ends)
  renumbered = np.where(goes_on, np.cumsum(goes_on) - 1, -1)
  return renumbered[table[goes_on]].astype(np.int32)


def _bytes_by_position(
    token_bytes: Sequence[bytes]
) -> list[tuple[Int32[np.ndarray, "n"], UInt8[np.ndarray, "n"]]]:
  """For each byte position, the tokens that reach it and their byte there."""
  lengths = np.array([len(data) for data in token_bytes], np.int64)
  starts = np.cumsum(lengths) - lengths
  joined = np.frombuffer(b"".join(token_bytes), np.uint8)
  ids = np.arange(len(token_bytes), dtype=np.int32)
  rows = []
  for position in range(lengths.max(initial=0)):
    ids = ids[lengths[ids] > position]
    rows.append((ids, joined[starts[ids] + position]))
  return rows


def _lift_to_tokens(automaton: Int32[np.ndarray, "states 256"],
                    rows: list[tuple[np.ndarray, np.ndarray]],
                    out: Int16[np.ndarray, "states V"]) -> None:
  """Runs the automaton through every token from every state, into `out`."""
  complete = len(automaton)  # one more state, which nothing leaves
  next_state = np.full((complete + 1, 256), complete, np.int16)
  next_state[:-1] = np.where(automaton < 0, complete, automaton)
  next_state = next_state.ravel()
  for start in range(len(automaton)):
    states = np.full(out.shape[1], start, np.int32)
    for ids, data in rows:
      states[ids] = next_state[states[ids] * 256 + data]
    out[start] = np.where(states == complete, -1, states)
